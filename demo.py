"""The live video on a web page: python demo.py [--checkpoint C] [--port 5001] [--host 127.0.0.1]

By default the shipped student, on the CPU. With --model_path, the folder of Wan's text encoder and VAE, the
checkpoint is one of Wan's size, and the options of `python -m full_scale.generate` about the model and its sampling are
understood.

One viewer at a time: others wait in line. The page and the server talk over one websocket. From the page come
JSON objects: {"do": "start" | "change" | "stop" | "shown", ...}; to it go JSON objects {"is": ...} and, for every
block, one binary message: the length of its JSON header (4 bytes, little-endian), the header, and the pictures as
uint8 [f, H, W, 1 or 3]. Not more than two blocks are on their way: a page that shows none, since its tab is hidden,
has none made.
"""

import argparse
import json
import secrets
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import anyio
import numpy as np
import torch
import uvicorn
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from generate import load_model, to_pixels
from live import Block, Change, Live, LiveModel, live_model
from visualization import save_video
from visualization.live import CacheStrip

PAGE = Path(__file__).with_name("visualization") / "demo.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'"
MOST_PICTURES, MOST_BYTES = 600, 256_000_000  # of a download: the last so many, whichever is less
LONGEST_MESSAGE = 4096  # bytes from the page
PATIENCE = 60  # seconds that a viewer may show nothing before others get their turn


class Stage:
    """One model and those who watch it. `line`: a ticket for everyone who has pressed start; the first one plays."""

    def __init__(self, model: LiveModel):
        self.model, self.line, self.moved = model, [], anyio.Event()
        self.viewers: dict[str, Viewer] = {}
        self.worker = anyio.CapacityLimiter(1)

    @asynccontextmanager
    async def turn(self, viewer: "Viewer") -> AsyncIterator[None]:
        """Wait in line, and be told so; the turn ends with the block."""
        ticket = object()
        self.line.append(ticket)
        try:
            while place := self.line.index(ticket):
                others = "One viewer is" if place == 1 else f"{place} viewers are"
                await viewer.say("waiting", text=f"{others} before you: your video begins when they stop or leave.")
                await self.moved.wait()
            yield
        finally:
            self.line.remove(ticket)
            self.moved.set()
            self.moved = anyio.Event()


class Viewer:
    """One page: what it asked for, the video that is made for it, and what it has seen."""

    def __init__(self, connection: WebSocket, stage: Stage):
        self.connection, self.stage, self.token = connection, stage, secrets.token_urlsafe(16)
        self.live: Live | None = None
        self.turn: anyio.CancelScope | None = None  # of the video that is running or in line
        self.ended, self.progress = anyio.Event(), anyio.Event()
        self.unseen, self.seen, self.num_pictures = deque(), deque(), 0  # pictures on their way, seen, in a block
        self.strip = CacheStrip()

    async def say(self, kind: str, **what) -> None:
        await self.send(self.connection.send_text, json.dumps({"is": kind, **what}))

    async def send(self, way, message) -> None:
        try:
            await way(message)
        except (WebSocketDisconnect, RuntimeError):  # the page went away while this was on its way
            self.tasks.cancel_scope.cancel()

    # --------------------------------------------------------------------------------------- what comes from the page

    async def listen(self) -> None:
        """Do what the page asks until it goes away; then stop at once."""
        async with anyio.create_task_group() as self.tasks:
            await self.say("hello", token=self.token, **greeting(self.stage.model))
            while (event := await self.connection.receive())["type"] != "websocket.disconnect":
                await self.obey(event.get("text"))
            self.tasks.cancel_scope.cancel()

    async def obey(self, text: str | None) -> None:
        """One message; what is wrong with it is answered with a sentence, and nothing else happens."""
        try:
            action, wishes = read_message(text)
            await getattr(self, action)(**wishes)
        except ValueError as error:
            await self.say("error", text=str(error))

    async def start(self, **wishes) -> None:
        """Begin a video; where one is running, begin it anew."""
        if self.turn and self.turn.cancel_called:
            await self.ended.wait()
        if self.turn:
            self.live.change(**{"seed": 0} | wishes)
            return
        self.live, self.turn, self.ended = Live(self.stage.model, **wishes), anyio.CancelScope(), anyio.Event()
        self.tasks.start_soon(self.play)

    async def change(self, **wishes) -> None:
        """From the next block on; before the first, the prompt is looked at all the same."""
        if self.turn:
            self.live.change(**wishes)
        elif "prompt" in wishes:
            self.stage.model.check(wishes["prompt"])

    async def stop(self) -> None:
        if self.turn:
            self.turn.cancel()

    async def shown(self, count: int = 1) -> None:
        """So many more pictures were seen."""
        for _ in range(min(count, len(self.unseen))):
            self.seen.append(self.unseen.popleft())
        while len(self.seen) > MOST_PICTURES or sum(picture.nbytes for picture in self.seen) > MOST_BYTES:
            self.seen.popleft()
        self.progress.set()

    # ------------------------------------------------------------------------------------------- what goes to the page

    async def play(self) -> None:
        """Blocks, when it is this viewer's turn, until the turn is cancelled; a block at hand is finished first."""
        reason = ""
        with self.turn:
            async with self.stage.turn(self):
                self.unseen.clear()
                self.seen.clear()
                await self.say("playing")
                reason = await self.show_blocks()
        self.turn = None
        self.ended.set()
        await self.say("stopped", text=reason)

    async def show_blocks(self) -> str:
        """Blocks as long as they are watched, and why it ended."""
        while await self.has_room():
            try:
                block = await run_sync(next, self.live, limiter=self.stage.worker)
            except (RuntimeError, ValueError, OSError) as error:
                return f"The model stopped: {error}"
            await self.show(block)
        return f"Stopped, since nothing was watched for {PATIENCE} seconds."

    async def has_room(self) -> bool:
        """Wait until the page has shown all but the last block; False if it seems to sleep."""
        with anyio.move_on_after(PATIENCE):
            while len(self.unseen) > self.num_pictures:
                self.progress = anyio.Event()
                await self.progress.wait()
            return True
        return False

    async def show(self, block: Block) -> None:
        pictures = to_pixels(block.pixels[0].movedim(1, -1))  # [f h w c]
        self.num_pictures = len(pictures)
        self.unseen.extend(pictures)
        header = json.dumps(describe(block, pictures.shape) | {"cache": self.strip.update(block)}).encode()
        message = len(header).to_bytes(4, "little") + header + pictures.tobytes()
        await self.send(self.connection.send_bytes, message)


def greeting(model: LiveModel) -> dict:
    """What the page needs to know before it starts."""
    names = ("fps", "most_frames", "grammar", "pattern", "words", "whole_clip")
    settings = {name: getattr(model, name) for name in names}
    sizes = {name: getattr(model.rollout, name) for name in ("sink_frames", "window_frames")}
    return settings | sizes | {"examples": [*model.examples], "most_pictures": MOST_PICTURES}


def describe(block: Block, shape: Sequence[int]) -> dict:
    return {
        "shape": shape,  # of the pictures
        "first_frame": block.frames.start,
        "last_frame": block.frames[-1],
        "prompt": block.prompt,
        "seed": block.seed,
        "held": block.held,
        "num_sink": block.num_sink,
        "seconds": block.seconds,
    }


FIELDS = {"prompt": str, "cache": str, "sink_frames": int, "window_frames": int, "seed": int, "count": int}
CHANGES = {f.name for f in fields(Change)}
ACTIONS = {"start": CHANGES - {"cache"}, "change": CHANGES, "stop": set(), "shown": {"count"}}


def read_message(text: str | None) -> tuple[str, dict]:
    """A message of the page: what to do, and its fields. Raises ValueError, a sentence, for any other text."""
    if text is None or len(text) > LONGEST_MESSAGE:
        raise ValueError(f"A message is JSON text of at most {LONGEST_MESSAGE} letters.")
    try:
        message = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"A message is a JSON object: {error}.") from error
    if not isinstance(message, dict) or not isinstance(message.get("do"), str) or message["do"] not in ACTIONS:
        raise ValueError(f'A message is a JSON object with "do", one of {", ".join(ACTIONS)}.')
    action = message.pop("do")
    for name, value in message.items():
        if name not in ACTIONS[action]:
            raise ValueError(f'"{action}" has no field {name!r}; it takes {", ".join(sorted(ACTIONS[action]))}.')
        if not isinstance(value, FIELDS[name]) or isinstance(value, bool):
            raise ValueError(f"{name} must be {'a text' if FIELDS[name] is str else 'a whole number'}, got {value!r}.")
    if action == "start" and "prompt" not in message:
        raise ValueError('"start" needs a prompt.')
    return action, message


# ----------------------------------------------------------------------------------------------------- the web server


def build_app(model: LiveModel) -> Starlette:
    """The page, its websocket and its downloads, around one model."""
    stage = Stage(model)

    async def page(request: Request) -> Response:
        return FileResponse(PAGE, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-store"})

    async def watch(connection: WebSocket) -> None:
        origin = connection.headers.get("origin")
        if origin and urlsplit(origin).netloc != connection.headers.get("host"):  # another site's page
            return await connection.close(code=1008)
        await connection.accept()
        viewer = Viewer(connection, stage)
        stage.viewers[viewer.token] = viewer
        try:
            await viewer.listen()
        finally:
            del stage.viewers[viewer.token]

    async def download(request: Request) -> Response:
        viewer = stage.viewers.get(request.path_params["token"])
        if viewer is None or not viewer.seen:
            return PlainTextResponse("Nothing was seen yet: press start first.", status_code=404)
        ending, fps = request.path_params["ending"], request.query_params.get("fps", str(model.fps))
        if ending not in MEDIA or not fps.isdecimal() or not 1 <= int(fps) <= 60:
            return PlainTextResponse("A video is saved as gif or mp4, at 1 to 60 pictures a second.", status_code=404)
        return Response(await run_sync(video_file, [*viewer.seen], ending, int(fps)), media_type=MEDIA[ending])

    routes = [Route("/", page), Route("/seen/{token}.{ending}", download), WebSocketRoute("/live", watch)]
    app = Starlette(routes=routes)
    app.state.stage = stage
    return app


MEDIA = {"gif": "image/gif", "mp4": "video/mp4"}


def video_file(pictures: Sequence[np.ndarray], ending: str, fps: int) -> bytes:
    """Pictures, uint8 [H, W, C], as a file; small ones are enlarged, to about 200 pixels."""
    video = torch.from_numpy(np.stack(pictures)).movedim(-1, 1) / 127.5 - 1
    with TemporaryDirectory() as folder:
        return save_video(video, Path(folder) / f"seen.{ending}", fps, max(1, 200 // video.shape[-1])).read_bytes()


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for visitors. Raises ValueError where there can be none."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"Nothing can listen at {host}, port {port} ({error}): choose another, such as --port {port % 60000 + 1}."
        ) from error


def serve(model: LiveModel, door: socket.socket) -> None:
    """Serve the page until Ctrl-C."""
    host, port = door.getsockname()[:2]
    print(f"Open http://{f'[{host}]' if ':' in host else host}:{port} in a browser; Ctrl-C ends it.", flush=True)
    settings = {"log_level": "warning", "ws_max_size": 2**16, "timeout_graceful_shutdown": 3}
    uvicorn.Server(uvicorn.Config(build_app(model), **settings)).run(sockets=[door])


# ------------------------------------------------------------------------------------------------------- command line


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The options of this page and, where there is a --model_path, those that are full_scale's."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="With --model_path also what `python -m full_scale.generate --help` lists about the model and sampling.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", default="checkpoints/student.safetensors", help=".safetensors, train.py's .pt, or one of Wan's")
    add("--port", type=int, default=5001, help="0 for any that is free")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in; there is no password")
    add("--model_path", help="folder of Wan's text encoder and VAE: the checkpoint is then one of Wan's size")
    args, others = parser.parse_known_args(arguments)
    if others and not args.model_path:
        parser.error(f"unrecognized arguments: {' '.join(others)} (Wan's options need --model_path)")
    return args, others


def main(arguments: Sequence[str] | None = None) -> None:
    args, others = parse_arguments(arguments)
    with listen(args.host, args.port) as door:  # before anybody waits for a model
        if args.model_path:
            from full_scale.live import load_live

            model = load_live(["--checkpoint", args.checkpoint, "--model_path", args.model_path, *others])
        else:
            model = live_model(load_model(args.checkpoint))
        serve(model, door)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"demo.py: {error}", file=sys.stderr)
        sys.exit(2)
