"""What the model may look at: sizes and contents of the cache, and attention masks over frames."""

from bisect import bisect_right
from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator

from visualization.frames import block_starts
from visualization.style import (
    BLUE,
    INK,
    LOOKS,
    PAPER,
    SKY,
    SMALL,
    SOFT,
    TITLE,
    draw_cell,
    draw_frame,
    draw_key,
    finish,
    key_width,
    page,
    panels,
    styled,
    text_width,
    write,
)

GAP = 0.05  # inches between frames
RULE = ("#E6E6E6", 0.6, 0)  # colour, line width, zorder: behind the cells


@styled
def visualize_kv_cache_growth(cache_sizes, save_path=None):
    """Figure of how much the cache holds after each block; the growth since the block before is dark.

    `cache_sizes`: the frames (or tokens) held after each block, or a mapping from a label to such a list, one
    panel each on one scale: {"all frames": [3, 6, 9, 12], "window of 6": [3, 6, 6, 6]}.
    """
    runs = dict(cache_sizes) if isinstance(cache_sizes, Mapping) else {"What the cache holds": cache_sizes}
    runs = {label: np.array([int(size) for size in sizes]) for label, sizes in runs.items()}
    if not runs or not all(map(len, runs.values())):
        raise ValueError("cache_sizes is empty: give the number of frames held after each block")
    fig, axes = panels(1, len(runs), 1 + 4 * len(runs), 3.6, sharey=True)
    for ax, (label, sizes) in zip(axes[0], runs.items(), strict=True):
        draw_growth(ax, sizes)
        ax.set(title=label, xlabel="after block")
    axes[0, 0].set_ylabel("held in the cache")
    axes[0, 0].set_ylim(0, max(1, 1.12 * max(sizes.max() for sizes in runs.values())))
    handles, words = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, words, loc="outside lower center", ncols=2)
    return finish(fig, save_path)


def draw_growth(ax, sizes):
    """Bars of the sizes, split into what was there before and what came on top; short ones show frames."""
    blocks, before = np.arange(len(sizes)), np.minimum(sizes, [0, *sizes[:-1]])
    ax.bar(blocks, before, color=SKY, width=0.72, label="as large as before")
    ax.bar(blocks, sizes - before, bottom=before, color=BLUE, width=0.72, label="growth")
    if sizes.max() <= 48:
        ax.hlines(range(1, sizes.max()), -0.5, len(sizes) - 0.5, color=PAPER, linewidth=0.8, zorder=2)
    if len(sizes) <= 16:
        above = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": SMALL}
        for block, size in enumerate(sizes):
            ax.annotate(f"{size}", (block, size), **above)
    ax.grid(False)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))


@styled
def show_cache(frames_held, save_path=None, sink_frames=0, title="Which frames the cache holds"):
    """Figure with a row per block: the frames that the cache holds afterwards, and those it has evicted.

    `frames_held`: the absolute frame indices held after each block, oldest first, as `KVCache.frames` gives
    them.
    """
    rows = [[int(k) for k in frames] for frames in frames_held]
    if not rows or not all(rows):
        raise ValueError("frames_held is empty: collect cache.frames after every block")
    kinds = [cache_kinds(held, sink_frames) for held in rows]
    num_frames = max(map(len, kinds))
    size = min(0.42, max(0.2, 10 / num_frames))
    left, top, pitch = 1.3, 1.05, size + GAP
    key = {kind: LOOKS[kind].meaning for kind in ("sink", "cached", "evicted") if any(kind in row for row in kinds)}
    width = left + max(num_frames * pitch, key_width(key), text_width(title, TITLE, "bold")) + 0.3
    fig, ax = page(width, top + len(rows) * (pitch + GAP) + 0.25)
    write(ax, left, 0.32, title, size=TITLE, ha="left", weight="bold")
    draw_key(ax, left, 0.7, key)
    for block, row in enumerate(kinds):
        y = top + block * (pitch + GAP)
        write(ax, left - 0.15, y + size / 2, f"after block {block}", ha="right")
        for k, kind in enumerate(row):
            text = f"{k}" if size > 0.27 and kind != "evicted" else None
            draw_frame(ax, left + k * pitch, y, kind, size, text=text)
    return finish(fig, save_path)


def cache_kinds(held, sink_frames):
    """The kind of LOOKS of every frame so far."""
    kept = {k: "sink" if k < sink_frames else "cached" for k in held}
    return [kept.get(k, "evicted") for k in range(1 + max(held))]


@styled
def show_mask(frame_mask, save_path=None, *, frames_per_block=None, sink_frames=0, halves=None, title=None):
    """Figure of which frame (row) sees which frame (column).

    `frame_mask`: bool [Q, K]; with Q < K the queries are the last frames, as when a block reads a cache. With
    `frames_per_block` the colours say why a frame is seen (own block, past, sink) and show up what must not
    be seen. `halves`: names of the two halves of both axes, as in teacher forcing: ("clean", "noisy").
    """
    mask = np.asarray(torch.as_tensor(frame_mask).detach().cpu())
    rows, cols = mask.shape if mask.ndim == 2 else (0, 0)
    if mask.dtype != bool or not 0 < rows <= cols:
        raise ValueError(f"frame_mask must be a bool [Q, K], Q <= K, got {mask.dtype} {list(mask.shape)}")
    if halves is not None and (len(halves) != 2 or rows != cols or cols % 2):
        raise ValueError(f"halves needs two names and an even square mask, got {halves} for {rows} x {cols}")
    kinds = mask_kinds(mask, frames_per_block, sink_frames, 2 if halves else 1)
    title = title or "Which frame sees which"
    key = {kind: words if frames_per_block else "sees" for kind, words in WHY.items() if (kinds == kind).any()}
    left, top, cell = 0.95, 1.4, min(0.3, max(0.1, 7 / cols))
    width = left + max(cols * cell, key_width(key), text_width(title, TITLE, "bold")) + 0.3
    fig, ax = page(width, top + max(rows * cell, 1.2) + 0.3)
    write(ax, left, 0.32, title, size=TITLE, ha="left", weight="bold")
    draw_key(ax, left, 0.7, key, draw_cell)
    for (q, k), kind in np.ndenumerate(kinds):
        if kind:
            draw_cell(ax, left + k * cell, top + q * cell, kind, cell)
    draw_mask_axes(ax, rows, cols, left, top, cell, halves)
    draw_borders(ax, rows, cols, left, top, cell, frames_per_block, halves)
    return finish(fig, save_path)


WHY = {"clean": "own block", "cached": "the past", "sink": "a sink", "leak": "must not be seen"}


def mask_kinds(mask, frames_per_block, sink_frames, num_halves):
    """Why each frame is seen: a kind of LOOKS per seen cell, an empty string elsewhere; [Q, K]."""
    rows, cols = mask.shape
    num_frames = cols // num_halves
    if frames_per_block is None:
        return np.where(mask, "clean", "")
    starts = block_starts(num_frames, frames_per_block)
    index = np.arange(cols)
    frame, half = index % num_frames, index // num_frames
    block = np.array([bisect_right(starts, k) for k in frame])
    query = index[cols - rows :]
    own = (block[query][:, None] == block) & (half[query][:, None] == half)
    past = (block[query][:, None] > block) & (half == 0)
    why = np.select([own, past & (frame < sink_frames), past], ["clean", "sink", "cached"], "leak")
    return np.where(mask, why, "")


def draw_mask_axes(ax, rows, cols, left, top, cell, halves):
    """Frame indices and the names of the axes."""
    num_frames, step = cols // (2 if halves else 1), 1 if cell > 0.2 else 5
    for k in range(cols):
        frame, y = k % num_frames, top + (k - cols + rows + 0.5) * cell
        if frame % step == 0:
            write(ax, left + (k + 0.5) * cell, top - 0.12, f"{frame}", size=SMALL - 1, color=SOFT)
            if y > top:
                write(ax, left - 0.08, y, f"{frame}", size=SMALL - 1, color=SOFT, ha="right")
    for half, name in enumerate(halves or [""]):
        middle, words = (half + 0.5) / len(halves or [""]), f"{name} frame".strip()
        write(ax, left + cols * cell * middle, top - 0.36, f"{words} that is seen")
        write(ax, left - 0.45, top + rows * cell * middle, f"{words} that sees", rotation=90)


def draw_borders(ax, rows, cols, left, top, cell, frames_per_block, halves):
    """Thin lines between frames, dark ones between blocks, thick ones between the halves."""
    num_frames = cols // (2 if halves else 1)
    starts = block_starts(num_frames, frames_per_block)
    right, bottom = left + cols * cell, top + rows * cell
    for k in range(cols + 1):
        look = (INK, 2.2, 6) if k in (num_frames, 0, cols) else (INK, 0.9, 5) if k % num_frames in starts else RULE
        style = dict(zip(("color", "linewidth", "zorder"), look, strict=True))
        x, y = left + k * cell, bottom - (cols - k) * cell
        ax.plot([x, x], [top, bottom], **style)
        if k >= cols - rows:
            ax.plot([left, right], [y, y], **style)
    ax.plot([left, right], [top, top], color=INK, linewidth=2.2, zorder=6)
