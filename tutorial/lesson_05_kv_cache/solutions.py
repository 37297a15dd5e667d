"""Solutions of lesson 5: the core itself, where it has the function."""

import torch

from kv_cache import KVCache, remembers
from tiny_causal_wan import sdpa_attention

__all__ = ["RingCache", "attend_with_past", "extend", "remembers"]


def extend(cache: KVCache, layers, num_frames) -> KVCache:
    return cache.extend(layers, num_frames)


def attend_with_past(q, k, v, past=None):
    """No mask at all: of [past, itself] a block may see everything, and nothing else is there."""
    if past is not None:
        k, v = (torch.cat([old, new], dim=1) for old, new in zip(past, (k, v), strict=True))
    return sdpa_attention(q, k, v)


class RingCache:
    """Keys carry their position in their rotation, so attention does not care in which slot a frame lies: a new frame
    simply takes the slot of the one that falls out of the window."""

    gap = 0

    def __init__(self, sink_frames: int, window_frames: int):
        self.sink_frames, self.window_frames = sink_frames, window_frames
        self.next_frame, self.stores = 0, None

    @property
    def frames(self) -> tuple[int, ...]:
        seen = range(self.next_frame)
        return tuple(f for f in seen if remembers(f, self.next_frame, self.sink_frames, self.window_frames))

    @property
    def layers(self):
        held = min(self.next_frame, self.sink_frames + self.window_frames)
        return [tuple(store[:, :held].flatten(1, 2) for store in pair) for pair in self.stores or []]

    def slot(self, frame: int) -> int:
        return frame if frame < self.sink_frames else self.sink_frames + (frame - self.sink_frames) % self.window_frames

    def extend(self, layers, num_frames: int) -> "RingCache":
        if self.stores is None:
            room = self.sink_frames + self.window_frames
            self.stores = [[allocate(x, num_frames, room) for x in pair] for pair in layers]
        new = range(self.next_frame, self.next_frame + num_frames)
        self.next_frame += num_frames
        kept = [frame for frame in new if frame in self.frames]  # a block may be longer than the window
        slots, rows = [self.slot(frame) for frame in kept], [frame - new.start for frame in kept]
        for pair, stores in zip(layers, self.stores, strict=True):
            for x, store in zip(pair, stores, strict=True):
                store[:, slots] = x.detach().unflatten(1, (num_frames, -1))[:, rows]
        return self


def allocate(x, num_frames: int, room: int):
    """Room for so many frames like those of x [b l n d]: [b room s n d]."""
    batch, tokens, *rest = x.shape
    return x.new_empty(batch, room, tokens // num_frames, *rest)
