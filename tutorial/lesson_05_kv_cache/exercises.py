"""Exercises of lesson 5. README.md says what each wants; `make grade LESSON=5` says how far you are."""

from kv_cache import KVCache
from tutorial.grading import todo


def remembers(frame, start, sink_frames=0, window_frames=None):
    """Whether a block that starts at frame `start` sees the past frame `frame`: bool."""
    todo("say which past frames a block can see.")


def attend_with_past(q, k, v, past=None):
    """Attention of a new block: q, k, v [b l n d] are its own, past is (keys, values) [b L n d] of the frames
    before it, or None. Returns [b l n d]."""
    todo("let the new block see its past and the whole of itself.")


def extend(cache: KVCache, layers, num_frames) -> KVCache:
    """The cache with a new block and without what fell out of the window: a new KVCache.

    layers: the block's keys and values [b l n d], one pair per layer; it has num_frames frames.
    """
    todo("return a new cache that holds the block, and write into none.")


class RingCache:
    """A KVCache for inference alone, which allocates its memory once: use as KVCache(sink_frames, window_frames).

    next_frame, frames, gap (0) and extend(layers, num_frames) are those of KVCache, but extend may write in place and
    return self. layers: per layer, keys and values [b l n d] of what it holds, in any order of the frames; empty
    before the first block, as frames is.
    """

    gap = 0

    def __init__(self, sink_frames: int, window_frames: int):
        todo("make a cache that never allocates again once it is full.")
