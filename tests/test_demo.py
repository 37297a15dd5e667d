"""demo.py: a page, a websocket and downloads, spoken to as a browser does, and looked at in a real one."""

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import uvicorn
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from test_live import NEW, OLD, loaded_model
from websockets.sync.client import connect

import demo
from demo import ACTIONS, build_app, listen, read_message
from generate import to_pixels
from live import Live, live_model

REPOSITORY = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


@pytest.fixture
def app():
    return build_app(live_model(loaded_model(sink_frames=3)))


@pytest.fixture
def client(app):
    with TestClient(app) as client:
        yield client


class Page:
    """What the page does, without drawing: says what it wants, and counts what it was shown."""

    def __init__(self, connection):
        self.connection = connection
        self.hello = self.hear("hello")

    def say(self, action, **what):
        self.connection.send_text(json.dumps({"do": action, **what}))

    def hear(self, kind, patience=100):
        """The next message of a kind; blocks on the way are shown and passed over."""
        for _ in range(patience):
            event = self.connection.receive()
            if "bytes" in event:
                header, pictures = unpack(event["bytes"])
                self.say("shown", count=len(pictures))
                message = {"is": "block", **header, "pictures": pictures}
            else:
                message = json.loads(event["text"])
            if message["is"] == kind:
                return message
        raise AssertionError(f"no {kind} among {patience} messages")

    def start(self, prompt=OLD, **more):
        self.say("start", prompt=prompt, **more)
        return self.hear("playing")


def unpack(message):
    length = int.from_bytes(message[:4], "little")
    header = json.loads(message[4 : 4 + length])
    return header, np.frombuffer(message[4 + length :], np.uint8).reshape(header["shape"])


def until(condition, seconds=20):
    """Wait for something that happens in another thread."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@contextmanager
def served(app):
    """The address of a real server, in a thread."""
    door = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [door]})
    thread.start()
    assert until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{door.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        door.close()
    assert not thread.is_alive()


# ------------------------------------------------------------------------------------------------------- one viewer


def test_frames_arrive_and_are_those_of_the_source(client, app):
    """Start, four blocks as uint8, bit for bit those of live.Live with this prompt and seed, what the cache held."""
    expected = Live(app.state.stage.model, OLD, seed=3)
    with client.websocket_connect("/live") as connection:
        page = Page(connection)
        assert page.hello["sink_frames"] == 3 and page.hello["window_frames"] == 6 and page.hello["grammar"]
        page.start(seed=3)
        for _ in range(4):
            block, own = page.hear("block"), next(expected)
            assert np.array_equal(block["pictures"][..., 0], to_pixels(own.pixels[0, :, 0]))
            assert (block["first_frame"], block["held"], block["num_sink"]) == (
                own.frames.start,
                list(own.held),
                own.num_sink,
            )
            assert block["seconds"] > 0 and "<img" in block["cache"]


def test_prompt_window_and_cache_change_in_mid_video(client):
    """Each change shows within the blocks that may be on their way, and the video goes on."""
    with client.websocket_connect("/live") as connection:
        page = Page(connection)
        page.start()
        page.hear("block")
        page.say("change", prompt=NEW, cache="anew", window_frames=3)
        blocks = [page.hear("block") for _ in range(4)]
        assert blocks[-1]["prompt"] == NEW and len(blocks[-1]["held"]) == 6
        assert [block["first_frame"] for block in blocks] == [3, 6, 9, 12]
        page.say("change", cache="emptied")
        assert [] in [page.hear("block")["held"] for _ in range(4)]
        page.say("start", prompt=OLD, seed=5)  # while it runs: anew
        assert 0 in [page.hear("block")["first_frame"] for _ in range(4)]


def test_bad_input_gets_a_sentence_and_stops_nothing(client):
    """Prompts outside the grammar, numbers out of bounds, and texts that no page would send."""
    with client.websocket_connect("/live") as connection:
        page = Page(connection)
        page.say("start", prompt="a 3 moving sideways")
        assert 'write "a DIGIT moving DIRECTION"' in page.hear("error")["text"]
        page.say("change", prompt="nonsense")  # before anything runs
        assert "cannot read the prompt" in page.hear("error")["text"]
        page.start()
        page.hear("block")
        for wish, sentence in (
            ({"prompt": "an 8"}, "cannot read the prompt"),
            ({"window_frames": 1000}, "window_frames must be between 0 and 48"),
            ({"window_frames": "many"}, "window_frames must be a whole number, got 'many'"),
            ({"cache": "burnt"}, "cache must be one of kept, anew, emptied"),
            ({"colour": "red"}, "has no field 'colour'"),
        ):
            page.say("change", **wish)
            assert sentence in page.hear("error")["text"]
        connection.send_text("{")
        assert "A message is a JSON object" in page.hear("error")["text"]
        connection.send_bytes(b"\x00\x01")
        assert "A message is JSON text" in page.hear("error")["text"]
        first = page.hear("block")
        assert page.hear("block")["first_frame"] == first["first_frame"] + 3 and first["prompt"] == OLD


@pytest.mark.parametrize(
    "text",
    [
        None, "", "[]", "3", '{"do": 3}', '{"do": "listen"}', '{"do": "__init__"}', '{"do": "start"}',
        '{"do": "start", "prompt": 3}', '{"do": "shown", "count": true}', '{"do": "stop", "prompt": "a"}', " " * 5000,
    ],
)  # fmt: skip
def test_messages_that_no_page_would_send(text):
    """Each is a sentence, a ValueError; no other method of the viewer can be called."""
    with pytest.raises(ValueError, match=r"message|needs|must be|has no field"):
        read_message(text)
    assert all(hasattr(demo.Viewer, action) for action in ACTIONS)


def test_stop_and_start_again(client, app):
    """After stop no block comes and nobody is in line; start begins at frame 0; stop twice does no harm."""
    with client.websocket_connect("/live") as connection:
        page = Page(connection)
        page.start()
        page.hear("block")
        page.say("stop")
        page.say("stop")
        assert page.hear("stopped")["text"] == "" and app.state.stage.line == []
        page.say("stop")
        page.start()
        assert page.hear("block")["first_frame"] == 0


def test_start_at_once_after_stop_is_not_lost(client):
    """The block at hand is still being made when start comes: the new video follows, the old one says that it ended."""
    with client.websocket_connect("/live") as connection:
        page = Page(connection)
        page.start()
        page.say("stop")
        page.say("start", prompt=NEW)
        page.hear("stopped")
        page.hear("playing")
        block = page.hear("block")
        assert (block["prompt"], block["first_frame"]) == (NEW, 0)


# -------------------------------------------------------------------------------------------------- when work is done


class Gate:
    """A generator that counts its calls and can be held."""

    def __init__(self, generator):
        self.generator, self.calls, self.held, self.open = generator, 0, False, threading.Event()
        self.open.set()

    def __call__(self, *arguments):
        self.held = not self.open.is_set()
        self.open.wait(20)
        self.calls += 1
        return self.generator(*arguments)

    def remember(self, *arguments):
        return self.generator.remember(*arguments)


@pytest.fixture
def gate():
    return Gate(live_model(loaded_model()).generator)


@pytest.fixture
def gated(gate):
    app = build_app(replace(live_model(loaded_model()), generator=gate))
    with TestClient(app) as client:
        client.stage = app.state.stage
        yield client


@pytest.mark.parametrize("moment", ["in a block", "between blocks", "in line"])
def test_a_disconnect_ends_the_work_after_the_block_at_hand(gate, moment):
    """Over a real connection: a block at hand is finished, no other is begun, and the line moves on at once."""
    app = build_app(replace(live_model(loaded_model()), generator=gate))
    with served(app) as address, connect(f"ws{address[4:]}/live") as other:
        with connect(f"ws{address[4:]}/live") as leaving:
            playing, waiting = (other, leaving) if moment == "in line" else (leaving, other)
            if moment == "in a block":
                gate.open.clear()
            for connection in (playing, waiting):
                connection.recv()
                connection.send(json.dumps({"do": "start", "prompt": OLD}))
                connection.recv()  # playing, or waiting
            wanted = 0 if moment == "in a block" else 4  # two blocks of two denoising steps, and nobody shows them
            assert until(lambda: gate.calls == wanted and (gate.held or wanted))
            time.sleep(0.2)
        assert until(lambda: len(app.state.stage.line) == (2 if moment == "in a block" else 1), 5)
        gate.open.set()
        assert until(lambda: len(app.state.stage.line) == 1 and len(app.state.stage.viewers) == 1, 5)
        more = {"in a block": 2 + 4, "between blocks": 4 + 4, "in line": 4}[
            moment
        ]  # the next viewer has its two blocks
        assert until(lambda: gate.calls == more, 5)
        time.sleep(0.3)
        assert gate.calls == more


def test_a_page_that_shows_nothing_has_nothing_made(gated, gate, monkeypatch):
    """Two blocks are made ahead and no third; after a while the turn ends with a sentence."""
    monkeypatch.setattr(demo, "PATIENCE", 0.5)
    with gated.websocket_connect("/live") as connection:
        page = Page(connection)
        page.start()
        blocks = [unpack(connection.receive()["bytes"]) for _ in range(2)]
        assert [header["first_frame"] for header, _ in blocks] == [0, 3]
        assert "nothing was watched" in json.loads(connection.receive()["text"])["text"]
        assert gate.calls == 4 and gated.stage.line == []


def test_a_model_that_fails_is_a_sentence(gated, gate):
    """Out of memory, say: the viewer is told, the server goes on, and the next start works."""
    with gated.websocket_connect("/live") as connection:
        page = Page(connection)
        kind, gate.generator = gate.generator, None
        gate.generator = lambda *arguments: (_ for _ in ()).throw(RuntimeError("out of memory"))
        page.start()
        assert page.hear("stopped")["text"] == "The model stopped: out of memory"
        gate.generator = kind
        page.start()
        page.hear("block")


def test_a_second_viewer_waits_and_gets_the_turn(client, app):
    """It is told its place, and its video begins when the first leaves; who waits behind it moves up."""
    with client.websocket_connect("/live") as third_connection, client.websocket_connect("/live") as second_connection:
        second, third = Page(second_connection), Page(third_connection)
        with client.websocket_connect("/live") as first_connection:
            first = Page(first_connection)
            first.start()
            first.hear("block")
            second.say("start", prompt=NEW)
            assert second.hear("waiting")["text"].startswith("One viewer is before you")
            third.say("start", prompt=OLD)
            assert third.hear("waiting")["text"].startswith("2 viewers are before you")
            second.say("change", prompt="nonsense")  # one may try prompts while waiting
            assert "cannot read" in second.hear("error")["text"]
            first.hear("block")
        second.hear("playing")
        block = second.hear("block")
        assert (block["first_frame"], block["prompt"]) == (0, NEW)
        assert third.hear("waiting")["text"].startswith("One viewer is before you")
        second.say("stop")  # stopping is enough
        third.hear("playing")
        assert third.hear("block")["prompt"] == OLD
    assert until(lambda: app.state.stage.line == [] and not app.state.stage.viewers)


def test_one_who_leaves_the_line_is_passed_over(client, app):
    """The second goes while it waits; the third follows the first."""
    with client.websocket_connect("/live") as third_connection, client.websocket_connect("/live") as first_connection:
        first, third = Page(first_connection), Page(third_connection)
        first.start()
        with client.websocket_connect("/live") as second_connection:
            second = Page(second_connection)
            second.say("start", prompt=NEW)
            second.hear("waiting")
            third.say("start", prompt=NEW)
            assert third.hear("waiting")["text"].startswith("2 viewers")
        assert third.hear("waiting")["text"].startswith("One viewer")
        first.say("stop")
        third.hear("playing")


# ----------------------------------------------------------------------------------------------- page and downloads


def test_downloads_hold_what_was_seen(client):
    """GIF and MP4 play the pictures that were shown, in order, enlarged; before that there is a sentence."""
    with client.websocket_connect("/live") as connection:
        page = Page(connection)
        path = f"/seen/{page.hello['token']}"
        assert client.get(f"{path}.gif").status_code == 404 and "press start" in client.get(f"{path}.gif").text
        page.start()
        pictures = np.concatenate([page.hear("block")["pictures"] for _ in range(3)])
        page.say("stop")
        page.hear("stopped")
        gif, mp4 = (client.get(f"{path}.{ending}?fps=10") for ending in ("gif", "mp4"))
        assert (gif.headers["content-type"], mp4.headers["content-type"]) == ("image/gif", "video/mp4")
        frames = imageio.imread(gif.content, extension=".gif")[:9, ::12, ::12]
        assert np.array_equal(frames, pictures[..., 0])
        assert len(imageio.imread(mp4.content, extension=".mp4")) >= 9
        for wrong in (f"{path}.avi", f"{path}.gif?fps=0", f"{path}.gif?fps=x", "/seen/someone.gif"):
            assert client.get(wrong).status_code == 404
    assert until(lambda: client.get(f"{path}.gif").status_code == 404)  # gone with the page


def test_a_download_is_bounded(client, app, monkeypatch):
    """The last pictures, by number and by bytes."""
    monkeypatch.setattr(demo, "MOST_PICTURES", 7)
    with client.websocket_connect("/live") as connection:
        page = Page(connection)
        page.start()
        pictures = np.concatenate([page.hear("block")["pictures"] for _ in range(4)])
        page.say("stop")
        page.hear("stopped")
        seen = app.state.stage.viewers[page.hello["token"]].seen
        assert len(seen) == 7
        monkeypatch.setattr(demo, "MOST_BYTES", 3 * pictures[0].nbytes)
        page.start()
        for _ in range(3):
            page.hear("block")
        page.say("stop")
        page.hear("stopped")
        assert len(seen) == 3


def test_the_page_needs_nothing_from_elsewhere(client):
    """One file, no address but its own, and a policy that lets the browser ask no other."""
    answer = client.get("/")
    assert answer.status_code == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"https?://|//cdn|@import|src=", answer.text)
    ids = re.findall(r'\bid="([\w-]+)"', answer.text)
    assert len(ids) == len(set(ids)) and set(re.findall(r'\$\("([\w-]+)"\)', answer.text)) <= set(ids)
    labelled = set(re.findall(r'<label[^>]* for="([\w-]+)"', answer.text))
    for tag in re.findall(r"<input[^>]*>", answer.text):
        own = re.search(r'id="([\w-]+)"', tag)
        inside = re.search(r"<label[^>]*>[^<]*" + re.escape(tag), answer.text)
        assert (own and own[1] in labelled) or inside, f"{tag} has no label"


def test_another_sites_page_is_turned_away(client):
    """A browser names the page that speaks: only the server's own may."""
    with (
        pytest.raises(WebSocketDisconnect),
        client.websocket_connect("/live", headers={"origin": "http://elsewhere.example"}) as connection,
    ):
        connection.receive_text()
    with client.websocket_connect("/live", headers={"origin": "http://testserver"}) as connection:
        assert Page(connection).hello


# ------------------------------------------------------------------------------------------------------- command line


def test_a_port_in_use_is_one_sentence():
    """As a user types it: exit code 2 and a line that names another port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} .*in use.*choose another, such as --port {port + 1}"):
            listen("127.0.0.1", port)
        command = [sys.executable, "demo.py", "--port", str(port)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "in use" in done.stderr


@pytest.mark.parametrize("host, port", [("127.0.0.1", 70000), ("no.such.host.invalid", 0)])
def test_addresses_that_do_not_exist(host, port):
    """A sentence, not a traceback."""
    with pytest.raises(ValueError, match="Nothing can listen at"):
        listen(host, port)


def test_wans_options_need_a_model_path(capsys):
    """An option of full_scale.generate without --model_path is no option."""
    with pytest.raises(SystemExit):
        demo.main(["--tiny_decoder", "x.pth"])
    assert "need --model_path" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- a real browser


@pytest.fixture
def address():
    """The page with a small model."""
    with served(build_app(live_model(loaded_model(sink_frames=3)))) as address:
        yield address


@pytest.fixture
def browser(tmp_path):
    if not CHROMIUM or not DRIVER:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--window-size=1280,1000",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    folder = {"download.default_directory": str(tmp_path / "downloads")}
    options.add_experimental_option("prefs", folder)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def colours(driver):
    """How many different colours the video shows."""
    code = (
        "const c = document.getElementById('video'); const x = c.getContext('2d').getImageData(0, 0, c.width, c.height)"
    )
    return driver.execute_script(f"{code}.data; return new Set(x).size")


def test_in_a_real_browser(address, browser, tmp_path):
    """Start, a moving picture, keyboard and buttons change the prompt, an error and its end, stop, download, two tabs,
    a small screen without sideways scrolling, and no complaint of the browser's."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def find(name):
        return browser.find_element(By.ID, name)

    def says(name, text, seconds=20):
        return until(lambda: text in find(name).text, seconds)

    browser.get(address)
    assert says("state", "Ready.") and until(lambda: find("start").is_enabled())
    assert "a DIGIT moving DIRECTION" in find("grammar").text
    find("start").send_keys(Keys.ENTER)
    assert says("state", "Playing: a 3 moving down")
    assert until(lambda: find("frame").text.isdecimal() and int(find("frame").text) > 12)
    assert colours(browser) > 10 and float(find("made").text) > 0
    assert len(browser.find_elements(By.CSS_SELECTOR, "#cache img")) >= 12 and "evicted" in find("cache").text

    browser.find_element(By.CSS_SELECTOR, "[aria-label='digit 8']").click()
    assert says("state", "Playing: a 8 moving down")
    find("video").send_keys("5", Keys.ARROW_LEFT)
    assert says("state", "Playing: a 5 moving left") and find("prompt").get_attribute("value") == "a 5 moving left"
    assert find("video").get_attribute("aria-label") == "Live video: a 5 moving left"

    find("prompt").clear()
    find("prompt").send_keys("a 5 moving sideways", Keys.ENTER)
    assert says("error", "annot read the prompt") and find("error").is_displayed()
    assert find("prompt").get_attribute("aria-invalid") == "true"
    frame = int(find("frame").text)
    assert until(lambda: int(find("frame").text) > frame)  # it stops nothing
    find("prompt").clear()
    find("prompt").send_keys("a 9 moving up", Keys.ENTER)
    assert says("state", "Playing: a 9 moving up") and not find("error").is_displayed()

    find("window").clear()
    find("window").send_keys("3", Keys.TAB)
    assert says("cache", "in the window: 3")
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    browser.get(address)
    assert until(lambda: find("start").is_enabled())
    find("start").click()
    assert says("state", "One viewer is before you")
    browser.switch_to.window(first)
    find("stop").click()
    assert says("state", "Stopped.")
    find("gif").click()
    assert until(lambda: [*tmp_path.glob("downloads/*.gif")])
    browser.close()
    browser.switch_to.window(browser.window_handles[0])
    assert says("state", "Playing: a 3 moving down")

    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    assert [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]] == []
