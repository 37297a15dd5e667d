"""From video tensors to arrays that can be shown: one way in for every picture and every file."""

from itertools import accumulate, chain, repeat

import numpy as np
import torch

SHAPES = "a video is a float tensor [F, C, H, W] or [B, F, C, H, W] in [-1, 1] with C = 1 or 3"


def to_clips(videos):
    """Clips as arrays [F, H, W, C] in [0, 1], which is (x + 1) / 2, clipped.

    `videos`: [F, C, H, W] (one clip), [B, F, C, H, W] (B clips), or a list of such tensors, lengths free.
    """
    if isinstance(videos, list | tuple):
        if not videos:
            raise ValueError("there is no video to show: give at least one")
        return list(chain.from_iterable(map(to_clips, videos)))
    x = torch.as_tensor(videos).detach()
    if x.ndim not in (4, 5) or x.shape[-3] not in (1, 3) or 0 in x.shape:
        raise ValueError(f"{SHAPES}, got shape {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{SHAPES}, got {x.dtype}: convert bytes with x / 127.5 - 1")
    x = x.float().cpu()
    if not x.isfinite().all():
        raise ValueError("the video holds NaN or infinite values: find the step that diverged first")
    x = ((x + 1) / 2).clamp(0, 1).movedim(-3, -1)
    return list(x.reshape(-1, *x.shape[-4:]).numpy())  # [b f h w c]


def to_bytes(clip):
    """[..., C] in [0, 1] -> uint8 in 0..255, rounded to nearest."""
    return np.rint(255 * clip).astype(np.uint8)


def block_starts(num_frames, frames_per_block):
    """First frame of every block: (1, 3) means blocks of 1, 3, 3, ...; n means n, n, ...; None: no blocks."""
    if frames_per_block is None:
        return []
    sizes = (frames_per_block,) if isinstance(frames_per_block, int) else tuple(frames_per_block)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"frames_per_block must be 1 or more, got {frames_per_block}")
    starts = accumulate(chain(sizes, repeat(sizes[-1])), initial=0)
    return [start for start, _ in zip(starts, range(num_frames), strict=False) if start < num_frames]


def matching_labels(labels, num, what):
    """The labels as a list of `num`, empty strings if None; a wrong count is an error."""
    if labels is None:
        return [""] * num
    if len(labels) != num:
        raise ValueError(f"{len(labels)} labels for {num} {what}: give one label each")
    return [str(label) for label in labels]
