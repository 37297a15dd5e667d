"""Videos as still pictures: time runs to the right, frames keep their index, blocks keep their borders."""

from itertools import accumulate, pairwise

import torch

from visualization.frames import block_starts, matching_labels, to_clips
from visualization.style import (
    HEADING,
    SMALL,
    SOFT,
    TITLE,
    VERMILLION,
    draw_arrow,
    draw_block,
    draw_image,
    draw_key,
    finish,
    key_width,
    page,
    styled,
    text_width,
    write,
)

GAP, BLOCK_GAP, EDGE = 0.04, 0.16, 0.3  # inches


@styled
def film_strip(videos, save_path=None, every=1, labels=None, train_frames=None, frames_per_block=None):
    """Figure with one row per clip and its frames from left to right, indices on top.

    `videos`: [F, C, H, W], [B, F, C, H, W] or a list of such tensors, lengths free. `every`: show each
    every-th frame. `train_frames`: a line where the training length ends. `frames_per_block`: n or (1, 3):
    gaps between blocks.
    """
    if every < 1:
        raise ValueError(f"every must be 1 or more, got {every}: 2 shows every second frame")
    clips = to_clips(videos)
    labels = matching_labels(labels, len(clips), "clips")
    num_frames = max(map(len, clips))
    indices = range(0, num_frames, every)
    width = frame_width(len(indices))
    left = EDGE + (max(map(text_width, labels)) + 0.15 if any(labels) else 0)
    xs = columns(indices, width, block_starts(num_frames, frames_per_block), left)
    heights = [width * clip.shape[1] / clip.shape[2] for clip in clips]
    top = 0.75 if train_frames else 0.5
    ys = list(accumulate([height + 0.1 for height in heights], initial=top))
    fig, ax = page(xs[-1] + width + EDGE, ys[-1] + 0.15)
    for clip, label, y, height in zip(clips, labels, ys, heights, strict=False):
        write(ax, left - 0.15, y + height / 2, label, ha="right")
        for image, x in zip(clip[::every], xs, strict=False):
            draw_image(ax, image, x, y, width)
    write_indices(ax, indices, xs, width, top - 0.14)
    if train_frames:
        draw_training_length(ax, indices, xs, width, train_frames, top, ys[-1])
    return finish(fig, save_path)


def frame_width(num_columns, page_width=11.0, smallest=0.3, largest=0.85):
    """Inches per frame: as large as the page allows."""
    return min(largest, max(smallest, page_width / num_columns - GAP))


def columns(indices, width, starts, left):
    """The left edge of every shown frame, with a wider gap wherever a block starts in between."""
    edges = [left]
    for previous, k in pairwise(indices):
        crosses = any(previous < start <= k for start in starts)
        edges.append(edges[-1] + width + (BLOCK_GAP if crosses else GAP))
    return edges


def write_indices(ax, indices, xs, width, y):
    """Frame indices above the columns; only every n-th one where they would touch."""
    step = max(1, -(-round(100 * text_width(f"{indices[-1]}", SMALL) + 6) // round(100 * width)))
    for k, x in list(zip(indices, xs, strict=True))[::step]:
        write(ax, x + width / 2, y, f"{k}", size=SMALL, color=SOFT)


def draw_training_length(ax, indices, xs, width, train_frames, top, bottom):
    """A line behind the last trained frame, if the film goes on behind it."""
    first = next((i for i, k in enumerate(indices) if k >= train_frames), None)
    if first:
        x = (xs[first - 1] + width + xs[first]) / 2
        ax.plot([x, x], [top - 0.27, bottom], color=VERMILLION, linewidth=1.6, linestyle="--", zorder=6)
        words = f"training length: {train_frames} frames"
        write(ax, x, top - 0.4, words, size=SMALL, color=VERMILLION)


@styled
def visualize_autoregressive_generation(video_blocks, save_path=None, block_labels=None):
    """Figure of a video that grows block by block: one row per block, with the past and the noise to come.

    `video_blocks`: blocks [n, C, H, W] or [B, n, C, H, W] (the first sample is shown) in a list, or as
    `rollout` yields them; n may differ. `block_labels`: one text per block.
    """
    blocks = first_clips(video_blocks, "video_blocks")
    labels = block_labels or [f"block {i}" for i in range(len(blocks))]
    labels = matching_labels(labels, len(blocks), "blocks")
    starts = list(accumulate(map(len, blocks), initial=0))
    width = frame_width(starts[-1])
    left = EDGE + max(map(text_width, labels)) + 0.15
    xs = columns(range(starts[-1]), width, starts, left)
    height = width * blocks[0].shape[1] / blocks[0].shape[2]
    top, row = 1.15, height + 0.16
    key = {"clean": "generated now", "cached": "generated before: the context", "noise": "still noise"}
    fig, ax = page(max(xs[-1] + width, left + key_width(key)) + EDGE, top + row * len(blocks) + EDGE - 0.16)
    write(ax, left, 0.32, "A video grows block by block", size=TITLE, ha="left", weight="bold")
    draw_key(ax, left, 0.68, key)
    write_indices(ax, range(starts[-1]), xs, width, top - 0.14)
    for now, label in enumerate(labels):
        y = top + now * row
        write(ax, left - 0.15, y + height / 2, label, ha="right")
        for i, block in enumerate(blocks):
            draw_moment(ax, xs[starts[i]], y, block, i - now, width, height)
    return finish(fig, save_path)


def draw_moment(ax, x, y, block, age, width, height):
    """A block as it is `age` blocks before (-) or after (+) the one that is generated now."""
    if age > 0:
        draw_block(ax, x, y, "noise", len(block), width, aspect=height / width)
    else:
        draw_block(ax, x, y, "cached" if age else "clean", len(block), width, images=block)


@styled
def visualize_denoising_process(noisy_frames, denoised_frames, timesteps, save_path=None):
    """Figure of the few denoising steps of a block: what the generator gets, and below it its guess of x0.

    One entry per step: lists of frames [C, H, W] or blocks [n, C, H, W] or [B, n, C, H, W] (the first sample
    is shown), or tensors [steps, C, H, W] or [B, steps, C, H, W]. `timesteps`: the t of each step, shown as
    given.
    """
    noisy, denoised = per_step(noisy_frames, "noisy_frames"), per_step(denoised_frames, "denoised_frames")
    if not len(noisy) == len(denoised) == len(timesteps):
        counts = f"{len(noisy)} noisy, {len(denoised)} denoised and {len(timesteps)} timesteps"
        raise ValueError(f"every denoising step needs x_t, x0 and t, got {counts}")
    num_frames = max(map(len, noisy + denoised))
    width = min(1.1, max(0.35, 9 / (len(noisy) * num_frames)))
    height = width * noisy[0].shape[1] / noisy[0].shape[2]
    cell = max(num_frames * (width + GAP) - GAP, 1.0)
    left, top, between = 1.5, 1.25, 0.5
    low, pitch = top + height + 0.45, cell + between
    words = "Solid arrow: the generator guesses the clean frames. Dashed arrow: on to the next, smaller t."
    right = max(left + len(noisy) * pitch - between, EDGE + text_width(words))
    fig, ax = page(right + EDGE, low + height + EDGE)
    write(ax, EDGE, 0.32, "From noise to a block in a few steps", size=TITLE, ha="left", weight="bold")
    write(ax, EDGE, 0.64, words, color=SOFT, ha="left")
    write(ax, EDGE, top + height / 2, "input $x_t$", size=HEADING, ha="left")
    write(ax, EDGE, low + height / 2, "guess of $x_0$", size=HEADING, ha="left")
    for i, t in enumerate(timesteps):
        x, last = left + i * pitch, i == len(noisy) - 1
        write(ax, x + cell / 2, top - 0.16, f"t = {float(t):.4g}", size=HEADING)
        draw_centred(ax, x, top, cell, "noise", noisy[i], width)
        draw_centred(ax, x, low, cell, "clean" if last else "cached", denoised[i], width)
        draw_arrow(ax, (x + cell / 2, top + height + 0.06), (x + cell / 2, low - 0.06))
        if not last:
            start, end = (x + cell, low - 0.04), (x + pitch, top + height + 0.04)
            draw_arrow(ax, start, end, line="--", color=SOFT)
    return finish(fig, save_path)


def draw_centred(ax, x, y, cell, kind, images, width):
    """A block in the middle of a cell."""
    inset = (cell - len(images) * (width + GAP) + GAP) / 2
    draw_block(ax, x + inset, y, kind, len(images), width, images=images)


def per_step(frames, name):
    """One clip [n, H, W, C] per denoising step; a tensor holds one frame per step."""
    if isinstance(frames, torch.Tensor):
        return [frame[None] for frame in to_clips(frames)[0]]
    return first_clips([frame[None] if frame.ndim == 3 else frame for frame in frames], name)


def first_clips(blocks, name):
    """The first sample of every block."""
    if isinstance(blocks, torch.Tensor):
        raise ValueError(f"{name} must be a list of blocks: split a video with video.split(3, dim=-4)")
    clips = [to_clips(block)[0] for block in blocks]
    if not clips:
        raise ValueError(f"{name} is empty: there is nothing to show")
    return clips
