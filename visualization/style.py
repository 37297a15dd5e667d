"""One visual language for the whole course: colours, edges and patterns mean the same thing in every picture.

Colours are Okabe and Ito's colour-blind safe set; no meaning rests on colour alone (edges, hatches, line
styles and markers differ too), so that every picture survives a grey printer. Pictures are drawn on a page
measured in inches, y downwards, so that text has the room that it needs at any size.
"""

import re
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.text import Text
from matplotlib.textpath import TextPath
from PIL import Image

ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
INK, SOFT, FAINT, PALE, PAPER = "#222222", "#6B6B6B", "#BDBDBD", "#F5F5F2", "#FFFFFF"

DPI = 150
TITLE, HEADING, BODY, SMALL = 15, 11.5, 9.5, 8  # text sizes in points
KEY = 0.17  # side of a frame in a legend, in inches

# One entry per curve: colour, line style, marker.
LINES = (
    (BLUE, "-", "o"),
    (VERMILLION, "--", "s"),
    (GREEN, "-.", "^"),
    (INK, ":", "D"),
    (PURPLE, "-", "v"),
    (ORANGE, "--", "P"),
    (SKY, "-.", "X"),
)


def line_look(run):
    """Colour, line style and marker of a figure's curve; from the eighth on, colours return with another line."""
    again, i = divmod(run, len(LINES))
    return LINES[i][0], *LINES[(i + again) % len(LINES)][1:]


@dataclass(frozen=True)
class Look:
    """How one kind of frame is drawn and what it means; solid cells have the edge colour and the hatch."""

    meaning: str
    face: str
    edge: str
    width: float = 1.4
    line: str = "-"
    hatch: str | None = None


LOOKS = {
    "clean": Look("generated", "#CFE4F2", BLUE, 2.0),
    "cached": Look("in the cache", "#E4F3FC", SKY, 1.4),
    "sink": Look("sink, kept for ever", "#FBE7BD", ORANGE, 2.4, hatch="...."),
    "evicted": Look("evicted", PAPER, FAINT, 1.0, "--"),
    "noise": Look("noise", PALE, SOFT, 1.0, ":"),
    "leak": Look("must not be seen", "#F9DCC8", VERMILLION, 2.0, hatch="xxxx"),
}

styled = matplotlib.style.context(
    [
        "default",  # a user's dark theme must not turn dark text on our white page
        {
            "axes.edgecolor": SOFT,
            "axes.grid": True,
            "axes.labelcolor": INK,
            "axes.labelsize": BODY,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": HEADING,
            "axes.titleweight": "bold",
            "font.size": BODY,
            "grid.color": "#E6E6E6",
            "grid.linewidth": 0.8,
            "hatch.linewidth": 0.6,
            "legend.frameon": False,
            "text.color": INK,
            "xtick.color": SOFT,
            "ytick.color": SOFT,
        },
    ]
)
"""Decorator: what the function draws has the look of the course, whatever the user's matplotlib settings."""


class Picture(Figure):
    """A Figure that a notebook shows by itself; pyplot does not know it, so there is nothing to close."""

    def _repr_png_(self):
        buffer = BytesIO()
        self.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()


def page(width, height):
    """A blank page of width x height inches -> (figure, axes); one unit is one inch, y runs down."""
    fig = Picture(figsize=(width, height))
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    ax.axis("off")
    return fig, ax


def panels(rows, cols, width, height, **shared):
    """A figure of rows x cols plots, width x height inches in all -> (figure, axes [rows, cols])."""
    fig = Picture(figsize=(width, height), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    return fig, fig.subplots(rows, cols, squeeze=False, **shared)


def finish(fig, save_path=None):
    """Write the figure if a path is given (its folders are created) and return it."""
    if save_path is not None:
        path = Path(save_path)
        if path.suffix[1:].lower() not in fig.canvas.get_supported_filetypes():
            raise ValueError(f"cannot save a picture as '{path.name}': end its name in .png, .svg or .pdf")
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, dpi=DPI)
    return fig


def reduce_colours(path: Path):
    """A PNG in 64 colours, which looks the same and takes less than half the bytes in the repository."""
    Image.open(path).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def words_in(figure, most=300):
    """What is written in a figure, for those who cannot see it: titles, labels and legend, without the numbers."""
    figure.draw_without_rendering()  # a legend and the labels of axes are made when they are drawn
    shown = (text.get_text().strip() for text in figure.findobj(Text) if text.get_visible())
    plain = (re.sub(r"\\mathrm|\\;|[$\\{}]", "", text) for text in shown)  # formulas without their TeX
    words = dict.fromkeys(" ".join(text.split()) for text in plain if any(map(str.isalpha, text)))
    joined = "; ".join(words)
    return joined if len(joined) <= most else joined[: most - 1].rsplit(" ", 1)[0] + "\u2026"


def text_width(text, size=BODY, weight="normal"):
    """Inches that a line of text needs; 0 for no text."""
    if not text:
        return 0.0
    return TextPath((0, 0), text, size=size, prop={"weight": weight}).vertices[:, 0].max() / 72


def write(ax, x, y, text, *, size=BODY, color=INK, ha="center", va="center", **font):
    ax.text(x, y, text, fontsize=size, color=color, ha=ha, va=va, **font)


def draw_image(ax, image, x, y, width, alpha=1.0):
    """Image [H, W, C] in [0, 1], top-left corner at (x, y), true aspect ratio, every pixel a sharp square."""
    height = width * image.shape[0] / image.shape[1]
    image = image[..., 0] if image.shape[-1] == 1 else image
    box = (x, x + width, y + height, y)
    ax.imshow(image, extent=box, cmap="gray", vmin=0, vmax=1, interpolation="nearest", alpha=alpha, zorder=2)


def draw_frame(ax, x, y, kind, width=0.5, *, image=None, text=None, aspect=1.0):
    """One frame of a `kind` of LOOKS with its corner at (x, y); an image [H, W, C] sets its aspect, H / W."""
    look = LOOKS[kind]
    if image is None and kind == "noise":
        image = np.random.default_rng(int(1000 * x + y)).uniform(0.15, 0.95, (round(12 * aspect), 12, 1))
    height = width * (aspect if image is None else image.shape[0] / image.shape[1])
    if image is not None:
        draw_image(ax, image, x, y, width, alpha=0.3 if kind == "evicted" else 1.0)
    face = look.face if image is None else "none"
    edge = {"edgecolor": look.edge, "linewidth": look.width, "linestyle": look.line, "zorder": 3}
    ax.add_patch(Rectangle((x, y), width, height, facecolor=face, **edge))
    if kind == "evicted":
        ax.plot([x, x + width], [y + height, y], color=look.edge, linewidth=look.width, zorder=3)
    if text is not None:
        write(ax, x + width / 2, y + height / 2, text, size=SMALL, zorder=4)


def draw_block(ax, x, y, kind, num_frames=3, width=0.5, *, gap=0.04, images=None, texts=None, aspect=1.0):
    """`num_frames` frames side by side, which make one block; returns the x of its right edge."""
    for i in range(num_frames):
        image = None if images is None else images[i]
        text = None if texts is None else texts[i]
        draw_frame(ax, x + i * (width + gap), y, kind, width, image=image, text=text, aspect=aspect)
    return x + num_frames * (width + gap) - gap


def draw_cell(ax, x, y, kind, size):
    """A solid square, for pictures of many small frames."""
    look = LOOKS[kind]
    style = {"facecolor": look.edge, "edgecolor": PAPER, "linewidth": 0.6, "hatch": look.hatch}
    ax.add_patch(Rectangle((x, y), size, size, **style))


def draw_key(ax, x, y, meanings, draw=draw_frame):
    """A legend in one row from (x, y): `meanings` maps kinds of LOOKS to words."""
    for kind, words in meanings.items():
        draw(ax, x, y - KEY / 2, kind, KEY)
        write(ax, x + KEY + 0.08, y, words, ha="left")
        x += key_width({kind: words})


def key_width(meanings):
    """Inches that draw_key needs."""
    return sum(KEY + 0.35 + text_width(words) for words in meanings.values())


def draw_box(ax, x, y, width, height, *, edge=SOFT, face=PAPER, line="-", linewidth=1.4, zorder=1):
    """A rounded box with its top-left corner at (x, y)."""
    shape = "round,pad=0,rounding_size=0.08"
    style = {
        "facecolor": face,
        "edgecolor": edge,
        "linestyle": line,
        "linewidth": linewidth,
        "zorder": zorder,
    }
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, **style))


def draw_arrow(ax, start, end, *, color=INK, line="-", width=1.5, bend=0.0):
    """An arrow from point to point; `bend` curves it, as a fraction of its length."""
    shape = {"arrowstyle": "-|>", "mutation_scale": 12, "connectionstyle": f"arc3,rad={bend}"}
    style = {"color": color, "linestyle": line, "linewidth": width, "zorder": 5}
    ax.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **shape, **style))


def draw_path(ax, points, *, color, line="-", width=1.5):
    """An arrow along straight lines through all points."""
    xs, ys = zip(*points[:-1], strict=True)
    ax.plot(xs, ys, color=color, linestyle=line, linewidth=width, zorder=5, solid_capstyle="butt")
    draw_arrow(ax, points[-2], points[-1], color=color, line=line, width=width)
