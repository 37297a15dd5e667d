"""What the model remembers of the frames it has made: keys and values, a sink, a window, and where it stands.

The cache is a value. `extend` returns a new one and never writes into the old, so a cache can be kept, compared, or
used for two futures, and no autograd graph ever sees its tensors change. One rule, `remembers`, says which past
frames a block can see; the cache evicts by it and the attention masks of the training modes are built from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

KeysValues = tuple[Tensor, Tensor]  # both [b l n d], l = frames held x tokens per frame
FramesPerBlock = int | tuple[int, ...]


def remembers(frame: int, start: int, sink_frames: int = 0, window_frames: int | None = None) -> bool:
    """Whether a block that starts at frame `start` sees the past frame `frame`: a sink frame, or one in the window."""
    return frame < start and (frame < sink_frames or window_frames is None or frame >= start - window_frames)


@dataclass(frozen=True)
class KVCache:
    """Keys and values of past frames, per layer, keys already rotated to their absolute position.

    Keeps the first `sink_frames` and, besides them, the `window_frames` most recent frames (None: all of them). The
    block being made is extra: it is never in the cache while it attends to it. With sink_follows, the model sees the
    sink as if it stood right before the window, or before the block where there is no window: no two frames are ever
    further apart than in a short video. What it holds is detached, unless keeps_gradient.
    """

    sink_frames: int = 0
    window_frames: int | None = None
    sink_follows: bool = False
    keeps_gradient: bool = False
    next_frame: int = 0
    frames: tuple[int, ...] = ()
    layers: tuple[KeysValues, ...] = ()

    def __post_init__(self):
        if self.sink_frames < 0 or (self.window_frames is not None and self.window_frames < 0):
            raise ValueError("sink_frames and window_frames count frames: 0 or more (window_frames=None keeps all).")

    @property
    def gap(self) -> int:
        """How many frames the sink has to move up to stand right before what comes after it."""
        if not self.sink_follows or not self.sink_frames or not self.frames:
            return 0
        return max(0, (*self.frames, self.next_frame)[min(self.sink_frames, len(self.frames))] - self.sink_frames)

    def extend(self, layers: Sequence[KeysValues], num_frames: int) -> "KVCache":
        """A new cache with `num_frames` more frames, and without what fell out of the window.

        layers: keys and values [b l n d] of the new frames only, one pair per layer of the model.
        """
        end = self.next_frame + num_frames
        held = (*self.frames, *range(self.next_frame, end))
        kept = [i for i, frame in enumerate(held) if remembers(frame, end, self.sink_frames, self.window_frames)]
        if not self.keeps_gradient:
            layers = [(k.detach(), v.detach()) for k, v in layers]
        past = self.layers or [None] * len(layers)
        return replace(
            self,
            next_frame=end,
            frames=tuple(held[i] for i in kept),
            layers=tuple(
                tuple(_keep(old, new, kept, len(held)) for old, new in zip(before or (None, None), now, strict=True))
                for before, now in zip(past, layers, strict=True)
            ),
        )


def _keep(old: Tensor | None, new: Tensor, kept: list[int], num_held: int) -> Tensor:
    """The kept frames of [old, new] along the token axis."""
    both = new if old is None else torch.cat([old, new], dim=1)  # [b l n d]
    if len(kept) == num_held:
        return both
    return both.unflatten(1, (num_held, -1))[:, kept].flatten(1, 2)


def block_borders(num_frames: int, frames_per_block: FramesPerBlock) -> list[int]:
    """Frame indices at which blocks begin or end, from 0 up to the first one at or past `num_frames`.

    frames_per_block: n, or a tuple whose last entry repeats: (1, 3) means blocks of 1, 3, 3, ... frames.
    """
    pattern = (frames_per_block,) if isinstance(frames_per_block, int) else tuple(frames_per_block)
    if not pattern or min(pattern) < 1:
        raise ValueError(f"frames_per_block must be a positive number or a tuple of them, got {frames_per_block}.")
    borders = [0]
    while borders[-1] < num_frames:
        borders.append(borders[-1] + pattern[min(len(borders), len(pattern)) - 1])
    return borders


def block_sizes(num_frames: int, frames_per_block: FramesPerBlock, *, first_frame: int = 0) -> list[int]:
    """How `num_frames` frames from frame `first_frame` of the video on fall into blocks.

    Raises ValueError where a block would have to be cut, and names the frame counts that fit.
    """
    borders = block_borders(first_frame + num_frames, frames_per_block)
    ahead = [border - first_frame for border in borders if border >= first_frame]
    if ahead[0] != 0:
        raise ValueError(f"A video in blocks of {frames_per_block} frames has no block border at frame {first_frame}.")
    if ahead[-1] != num_frames:
        raise ValueError(
            f"{num_frames} frames are not a whole number of blocks (frames_per_block={frames_per_block}); "
            f"use {' or '.join(str(count) for count in ahead[-2:] if count)} frames."
        )
    return [end - start for start, end in pairwise(ahead)]
