"""A rollout in motion: which frames are still noise, what is guessed of them, what the cache holds, who sees whom.

    moments = [Moment(frames=range(3, 6), held=(0, 1, 2), step=0, t=1.0, noisy=x_t[0], guess=x0[0]), ...]
    animate(draw_moments(moments), "rollout.gif")

A denoising call is a moment, and so is the pass that remembers a finished block. This file knows no model: whoever
rolls out says what happened (tutorial/moments.py does, with the real `rollout`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import Tensor

from visualization.frames import to_clips
from visualization.style import (
    BLUE,
    FAINT,
    HEADING,
    INK,
    LOOKS,
    SKY,
    SMALL,
    SOFT,
    TITLE,
    draw_arrow,
    draw_box,
    draw_cell,
    draw_frame,
    draw_key,
    draw_path,
    page,
    styled,
    write,
)
from visualization.video_files import write_frames, write_gif

LEFT, TOP, ROW = 1.25, 0.95, 0.88  # inches: labels, the row of the video, from row to row
STRIP, GAP = 7.2, 0.05  # the strip of all frames, and between two of them
MASK, SIDE = 9.15, 2.3  # the mask's corner and size


@dataclass(frozen=True, eq=False)
class Moment:
    """One call of the network in a rollout.

    frames: those of the block. held: frames that the cache holds in this call, of which num_sink are the sink. Of a
    denoising call: its step, its time t, what the network was given (noisy) and what it guessed, [n, C, H, W] in
    [-1, 1]. Of the memory pass, which has no step: the finished block, as guess, and what is held then, as `after`.
    """

    frames: range
    held: tuple[int, ...]
    num_sink: int = 0
    step: int | None = None
    t: float = 0.0
    noisy: Tensor | None = None
    guess: Tensor | None = None
    after: tuple[int, ...] = ()


def draw_moments(moments: Sequence[Moment]):
    """Yield a Figure for every moment, all of one size. Raises ValueError for no moments."""
    moments = list(moments)
    if not moments:
        raise ValueError("no moments: give one for every call of the network")
    made: dict[int, Tensor] = {}
    for moment in moments:
        yield draw_moment(moment, moments, made)
        if moment.step is None:
            made |= dict(zip(moment.frames, images(moment.guess), strict=True))


@styled
def draw_moment(moment, moments, made):
    """The page of one moment: video so far, guess, cache, and at the right the mask so far."""
    num_frames = 1 + max(one.frames[-1] for one in moments)
    num_steps = 1 + max(one.step or 0 for one in moments)
    width = min(0.6, STRIP / num_frames - GAP)
    fig, ax = page(11.8, 4.1)
    write(ax, 0.3, 0.38, words_of(moment, num_steps), size=TITLE, ha="left", weight="bold")
    draw_video(ax, moment, made, num_frames, width)
    draw_held(ax, moment, made, width)
    draw_seen(ax, moment, moments, num_frames)
    draw_key(ax, LEFT, 3.75, {kind: LOOKS[kind].meaning for kind in ("noise", "clean", "sink", "cached", "evicted")})
    return fig


def words_of(moment, num_steps) -> str:
    frames = f"frames {moment.frames[0]} to {moment.frames[-1]}"
    if moment.step is None:
        return f"Memory pass: {frames} are read once more, to be remembered"
    return f"Denoising call {moment.step + 1} of {num_steps}: {frames} at t = {moment.t:.2f}"


def place(frame, width) -> float:
    return LEFT + frame * (width + GAP)


def images(video):
    return list(to_clips(video)[0])


def draw_video(ax, moment, made, num_frames, width):
    """What the network is given: finished frames, the block at hand, and those to come; below, what it says of it."""
    write(ax, LEFT - 0.15, TOP + width / 2, "the video", ha="right", weight="bold")
    write(ax, LEFT - 0.15, TOP + ROW + width / 2, "guess of $x_0$", ha="right", weight="bold")
    remembering = moment.step is None
    given = images(moment.guess if remembering else moment.noisy)
    for frame in range(num_frames):
        if frame in moment.frames:
            kind = "clean" if remembering else "noise"
            draw_frame(ax, place(frame, width), TOP, kind, width, image=given[frame - moment.frames[0]])
        elif frame in made:
            draw_frame(ax, place(frame, width), TOP, "clean", width, image=made[frame])
        else:
            draw_box(ax, place(frame, width), TOP, width, width, edge=FAINT, line=":", linewidth=0.8)
    if not remembering:
        middle = (place(moment.frames[0], width) + place(moment.frames[-1], width) + width) / 2
        draw_arrow(ax, (middle, TOP + width + 0.04), (middle, TOP + ROW - 0.04), color=SOFT)
        for frame, image in zip(moment.frames, images(moment.guess), strict=True):
            draw_frame(ax, place(frame, width), TOP + ROW, "clean", width, image=image)


def draw_held(ax, moment, made, width):
    """The cache as the call sees it; in the memory pass, as it leaves it."""
    y = TOP + 2 * ROW
    write(ax, LEFT - 0.15, y + width / 2, "KV cache", ha="right", weight="bold")
    pictures = made | (dict(zip(moment.frames, images(moment.guess), strict=True)) if moment.step is None else {})
    held = moment.after if moment.step is None else moment.held
    for frame, picture in pictures.items():
        kind = ("sink" if frame < moment.num_sink else "cached") if frame in held else "evicted"
        draw_frame(ax, place(frame, width), y, kind, width, image=picture)
    middle = (place(moment.frames[0], width) + place(moment.frames[-1], width) + width) / 2
    if moment.step is None:
        draw_arrow(ax, (middle, TOP + width + 0.04), (middle, y - 0.04), color=BLUE, width=2.2)
        side, align = (0.12, "left") if middle < LEFT + STRIP / 2 else (-0.12, "right")
        write(ax, middle + side, TOP + ROW + width / 2, "keys and values", ha=align, color=BLUE)
    elif moment.held:
        right, middle_y = place(moment.held[-1] + 1, width), y + width / 2
        draw_path(ax, [(right, middle_y), (middle, middle_y), (middle, y - 0.3)], color=SKY)


def draw_seen(ax, moment, moments, num_frames):
    """Rows of the frames so far: which frames each sees. The same as a block-causal mask would let it see."""
    cell, top = SIDE / num_frames, TOP
    write(ax, MASK, top - 0.2, "who sees whom", size=HEADING, ha="left", weight="bold")
    rows = {}
    for one in moments[: moments.index(moment) + 1]:
        rows |= dict.fromkeys(one.frames, one)
    for query, one in rows.items():
        for key in (*one.held, *one.frames):
            kind = "clean" if key in one.frames else "sink" if key < one.num_sink else "cached"
            draw_cell(ax, MASK + key * cell, top + query * cell, kind, cell)
    draw_box(ax, MASK, top, SIDE, SIDE, edge=FAINT, face="none", linewidth=1.0)
    height = len(moment.frames) * cell
    draw_box(ax, MASK - 0.05, top + moment.frames[0] * cell, SIDE + 0.1, height, edge=INK, face="none", zorder=6)
    write(ax, MASK, top + SIDE + 0.18, "a row for each frame that looks", size=SMALL, ha="left")


def animate(figures, path, fps: float = 1.5, dpi: int = 80) -> Path:
    """Write Figures of one size as a looping GIF; returns the path. Raises ValueError for none."""
    moments = [as_drawn(figure, dpi) for figure in figures]
    if not moments:
        raise ValueError("no figures to animate")
    return write_frames(moments, path, fps, writers={".gif": write_gif})


def as_drawn(figure, dpi):
    """The page as uint8 [H, W, 3]."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
