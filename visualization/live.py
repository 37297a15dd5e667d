"""A video while it is being made: the frames that the cache holds as a strip of HTML, and a player for notebooks.

    player = Player(live, choices={"a three": {"prompt": "a 3 moving right"}, "a seven": {"prompt": "a 7 moving left"}})
    player.start()
    player                    # the last line of a cell shows it

`live` is an endless iterator of blocks with a method `change`, such as live.Live; this file knows no model. Blocks have
frames (a range), held, num_sink, stills [n, C, H, W], pixels [1, f, C, H, W], prompt and fps.
"""

import asyncio
from base64 import b64encode
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from html import escape
from io import BytesIO
from itertools import count
from time import monotonic

from PIL import Image

from visualization.frames import to_bytes, to_clips
from visualization.style import INK, LOOKS, PAPER, SOFT

STILL = 44  # pixels that a frame is wide in the strip
LOST = 3  # frames that are still shown after they were evicted
GROUPS = {"sink": LOOKS["sink"].meaning, "evicted": "evicted", "cached": "in the window", "clean": "this block"}


class CacheStrip:
    """The frames so far, as HTML with nothing outside: the sink, what was evicted, the window, the block just made."""

    def __init__(self):
        self.stills = {}  # frame -> picture as a data URL; of old frames only those that are still shown

    def update(self, block) -> str:
        """The strip after one more block."""
        if not block.frames.start:
            self.stills.clear()
        self.stills |= zip(block.frames, map(data_url, images(block.stills)), strict=True)
        groups = group_frames(block)
        shown = {frame for kind in groups for frame in groups[kind]}
        self.stills = {frame: still for frame, still in self.stills.items() if frame in shown}
        return strip(groups, self.stills, num_lost=block.frames.start - len(block.held))


def group_frames(block) -> dict[str, list[int]]:
    """Kinds of LOOKS -> frames to be shown; of those that were evicted, the last."""
    held, start = block.held, block.frames.start
    lost = (frame for frame in range(start - 1, -1, -1) if frame not in held)
    newest_lost = [frame for frame, _ in zip(lost, range(LOST), strict=False)]
    kept = {"sink": held[: block.num_sink], "evicted": newest_lost[::-1], "cached": held[block.num_sink :]}
    return {kind: list(frames) for kind, frames in (kept | {"clean": block.frames}).items()}


def strip(groups, stills, num_lost) -> str:
    cells = []
    for kind, frames in groups.items():
        count = num_lost if kind == "evicted" else len(frames)
        row = "".join(cell(kind, frame, stills.get(frame)) for frame in frames)
        before = "<span>&hellip;</span>" if num_lost > len(frames) and kind == "evicted" else ""
        cells.append(
            f'<div style="min-width:5.5em"><div style="font-size:12px;color:{SOFT};white-space:nowrap">'
            f'{GROUPS[kind]}: {count}</div><div style="display:flex;flex-wrap:wrap;gap:4px;align-items:center;'
            f'min-height:{STILL + 24}px">{before}{row}</div></div>'
        )
    return (
        f'<div role="img" aria-label="{describe(groups, num_lost)}" style="display:flex;flex-wrap:wrap;gap:4px 18px;'
        f'color:{INK};background:{PAPER};font-family:sans-serif">{"".join(cells)}</div>'
    )


def cell(kind, frame, still) -> str:
    """One frame: its picture, or a blank, in the edge of its kind, its number below; crossed out if evicted."""
    look = LOOKS[kind]
    line = {"-": "solid", "--": "dashed", ":": "dotted"}[look.line]
    cross = f"linear-gradient(to top right,transparent 47%,{look.edge} 47% 53%,transparent 53%)"
    faded = "opacity:.35;" if kind == "evicted" else ""
    image = f'<img src="{still}" alt="" style="width:100%;display:block;image-rendering:pixelated;{faded}">'
    over = f'<div style="position:absolute;inset:0;background:{cross}"></div>' if kind == "evicted" else ""
    return (
        f'<div style="width:{STILL}px;text-align:center;font-size:11px;line-height:14px"><div style="position:relative;'
        f"background:{look.face};border:{2 * look.width:.0f}px {line} {look.edge};box-sizing:border-box;"
        f'min-height:18px">{image if still else ""}{over}</div>{frame}</div>'
    )


def describe(groups, num_lost) -> str:
    """The strip in words."""
    held = groups["sink"] + groups["cached"]
    seen = f"saw {len(held)} past frames, {len(groups['sink'])} of them the sink" if held else "saw no past frame"
    new = groups["clean"]
    return escape(f"Frames {new[0]} to {new[-1]} were made; they {seen}; {num_lost} frames are evicted.")


def images(video):
    """[F, C, H, W] in [-1, 1] -> uint8 images [H, W, 3 or 1]."""
    return list(to_bytes(to_clips(video)[0]))


def data_url(image, width: int = 2 * STILL) -> str:
    """A small PNG, for the strip; pictures that are smaller stay as they are."""
    picture = picture_of(image)
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)))
    return f"data:image/png;base64,{b64encode(png(picture)).decode()}"


def picture_of(image) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, format="png")
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------- in a notebook


class Player:
    """Widgets around a live video: buttons that change it while it goes on, speed, and what the cache holds.

    choices: words on a button -> what `live.change` is given. caches: what a change may do about the cache, the first
    by default. fps: pictures shown per second, if so many are made.
    """

    def __init__(self, live, choices, *, caches=("emptied", "anew", "kept"), fps: float = 8, width: int = 288):
        import ipywidgets as widgets

        self.live, self.fps, self.width, self.strip = live, fps, width, CacheStrip()
        self.is_playing, self.coming, self.thread = False, None, ThreadPoolExecutor(1)
        self.speeds = deque(maxlen=8)  # of the last blocks
        self.video = widgets.Image(format="png", width=width, layout={"border": f"1px solid {SOFT}"})
        self.words, self.cache = widgets.HTML("Press start."), widgets.HTML()
        self.button = widgets.ToggleButton(value=False, description="start", icon="play")
        self.button.observe(self.pressed, "value")
        self.treatment = widgets.Dropdown(options=list(caches), description="past is", layout={"width": "220px"})
        self.choices = {text: widgets.Button(description=text, tooltip=str(wish)) for text, wish in choices.items()}
        for text, button in self.choices.items():
            button.on_click(lambda _, wish=choices[text]: self.ask(wish))
        rows = [widgets.HBox([self.button, self.treatment]), widgets.HBox([*self.choices.values()])]
        rows[1].layout.flex_flow = "row wrap"
        self.widget = widgets.VBox([*rows, self.video, self.words, self.cache])

    def _repr_mimebundle_(self, **options):
        return self.widget._repr_mimebundle_(**options)

    def ask(self, wish) -> None:
        """Change the video from its next block on; a wish that it refuses is answered with a sentence."""
        try:
            self.live.change(cache=self.treatment.value, **wish)
        except ValueError as error:
            self.words.value = escape(str(error))

    def pressed(self, change) -> None:
        (self.start if change["new"] else self.stop)()

    def start(self) -> None:
        """Go on beside whatever else the notebook does, until `stop`."""
        if not self.is_playing:
            self.task = asyncio.get_running_loop().create_task(self.play())
        self.label("stop", "pause", True)

    def stop(self) -> None:
        """Show the block at hand to its end and hold; `start` goes on from there."""
        self.is_playing = False
        self.label("start", "play", False)

    def label(self, word, icon, value) -> None:
        self.button.description, self.button.icon, self.button.value = word, icon, value

    async def play(self, num_blocks: int | None = None) -> None:
        """Show so many blocks, or blocks until `stop`; the next is made, in a thread, while one is shown."""
        make = partial(asyncio.get_running_loop().run_in_executor, self.thread, next, self.live)
        self.is_playing = True
        for shown in count(1):
            block = await (self.coming or make())
            self.is_playing &= shown != num_blocks
            self.coming = make() if self.is_playing else None
            await self.show(block)
            if not self.is_playing:
                return

    async def show(self, block) -> None:
        self.speeds.append(block.fps)
        self.cache.value = self.strip.update(block)
        speed = len(self.speeds) / sum(1 / fps for fps in self.speeds)
        self.words.value = (
            f"{escape(block.prompt)} &middot; frame {block.frames[-1]} &middot; {speed:.0f} frames made per second"
        )
        for image in images(block.pixels[0]):
            due = monotonic() + 1 / self.fps
            self.video.value = png(enlarged(image, self.width))
            await asyncio.sleep(max(0, due - monotonic()))


def enlarged(image, width: int) -> Image.Image:
    """As many times as fit into a width, every pixel a sharp square."""
    picture, times = picture_of(image), max(1, width // image.shape[1])
    return picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)
