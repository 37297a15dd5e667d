"""Lesson 5: wrong and right answers."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from kv_cache import KVCache
from tutorial.lesson_05_kv_cache.solutions import RingCache as Ring


def counts_the_block(frame, start, sink_frames=0, window_frames=None):
    """The reference's window, which includes the block itself, here one of 3 frames."""
    return frame < start and (frame < sink_frames or window_frames is None or frame >= start + 3 - window_frames)


def sink_inside_the_window(frame, start, sink_frames=0, window_frames=None):
    recent = window_frames is None or frame >= start - window_frames + sink_frames
    return frame < start and (frame < sink_frames or recent)


def off_by_one(frame, start, sink_frames=0, window_frames=None):
    return frame <= start and (frame < sink_frames or window_frames is None or frame > start - window_frames)


def forgets_the_sink(frame, start, sink_frames=0, window_frames=None):
    return frame < start and (window_frames is None or start - frame <= window_frames)


def sees_a_sink_to_come(frame, start, sink_frames=0, window_frames=None):
    return frame < sink_frames or (frame < start and (window_frames is None or frame >= start - window_frames))


def by_sets(frame, start, sink_frames=0, window_frames=None):
    past = list(range(start))
    recent = past if window_frames is None else past[len(past) - min(window_frames, len(past)) :]
    return frame in {*past[:sink_frames], *recent}


def joined(past, k, v):
    return (k, v) if past is None else (torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1))


def sdpa(q, k, v, **options):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def causal_at_the_top_left(q, k, v, past=None):
    return sdpa(q, *joined(past, k, v), is_causal=True)


def causal_inside_the_block(q, k, v, past=None):
    k, v = joined(past, k, v)
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    return sdpa(q, k, v, attn_mask=mask)


def past_alone(q, k, v, past=None):
    return sdpa(q, *(past or (k, v)))


def unscaled(q, k, v, past=None):
    return sdpa(q, *joined(past, k, v), scale=1.0)


def spelled_out(q, k, v, past=None):
    k, v = joined(past, k, v)
    heads = []
    for n in range(q.shape[2]):
        scores = q[:, :, n] @ k[:, :, n].mT / q.shape[-1] ** 0.5
        heads.append(scores.softmax(-1) @ v[:, :, n])
    return torch.stack(heads, dim=2)


def keeps_the_graph(cache, layers, num_frames):
    return replace(cache, keeps_gradient=True).extend(layers, num_frames)


def forgets_its_settings(cache, layers, num_frames):
    """Builds the new cache from what it thinks of."""
    new = cache.extend(layers, num_frames)
    return KVCache(cache.sink_frames, cache.window_frames, False, False, new.next_frame, new.frames, new.layers)


def counts_what_it_holds(cache, layers, num_frames):
    new = cache.extend(layers, num_frames)
    return replace(new, next_frame=len(new.frames))


def window_of_tokens(cache, layers, num_frames):
    new = replace(cache, window_frames=None).extend(layers, num_frames)
    cut = [tuple(x[:, -(cache.window_frames or 1000) :] for x in pair) for pair in new.layers]
    return replace(new, window_frames=cache.window_frames, layers=tuple(cut))


def evicts_the_sink(cache, layers, num_frames):
    return replace(replace(cache, sink_frames=0).extend(layers, num_frames), sink_frames=cache.sink_frames)


def writes_in_place(cache, layers, num_frames):
    for pair in cache.layers:
        for x in pair:
            x += 1
    return cache.extend(layers, num_frames)


def frame_by_frame(cache, layers, num_frames):
    """One frame after the other leads to the same cache."""
    for i in range(num_frames):
        one = [tuple(x.unflatten(1, (num_frames, -1))[:, i] for x in pair) for pair in layers]
        cache = cache.extend(one, 1)
    return cache


class OverwritesTheSink(Ring):
    def slot(self, frame):
        return frame % (self.sink_frames + self.window_frames)


class ConcatenatesAnew(Ring):
    """A KVCache under another name: right, but it allocates with every block."""

    def __init__(self, sink_frames, window_frames):
        self.cache = KVCache(sink_frames, window_frames)

    next_frame = property(lambda self: self.cache.next_frame)
    frames = property(lambda self: self.cache.frames)
    layers = property(lambda self: self.cache.layers)

    def extend(self, layers, num_frames):
        self.cache = self.cache.extend(layers, num_frames)
        return self


class CountsModulo(Ring):
    """next_frame wraps around with the ring, and the positions with it."""

    def extend(self, layers, num_frames):
        super().extend(layers, num_frames)
        self.next_frame %= self.sink_frames + self.window_frames + 5
        return self


class TwoStores:
    """A KVCache, copied into a store: all is allocated anew before it lies there."""

    gap = 0

    def __init__(self, sink_frames, window_frames):
        self.plain, self.room = KVCache(sink_frames, window_frames), sink_frames + window_frames
        self.stores, self.held = None, 0

    next_frame = property(lambda self: self.plain.next_frame)
    frames = property(lambda self: self.plain.frames)
    layers = property(lambda self: [tuple(x[:, : self.held] for x in pair) for pair in self.stores or []])

    def extend(self, layers, num_frames):
        before = replace(self.plain, layers=tuple(self.layers))
        after = before.extend(layers, num_frames)
        if self.stores is None:
            per_frame = layers[0][0].shape[1] // num_frames
            self.stores = [[x[:, :1].repeat(1, self.room * per_frame, 1, 1) for x in pair] for pair in layers]
        for pair, stores in zip(after.layers, self.stores, strict=True):
            for x, store in zip(pair, stores, strict=True):
                store[:, : x.shape[1]] = x
        self.held = after.layers[0][0].shape[1]
        self.plain = replace(after, layers=())
        return self


class LooksSlotsUp:
    """Stores of tokens, and a list of which frame lies in which slot."""

    gap = 0

    def __init__(self, sink_frames, window_frames):
        self.sink, self.where = sink_frames, [None] * (sink_frames + window_frames)
        self.next_frame, self.stores, self.size = 0, [], 0

    frames = property(lambda self: tuple(frame for frame in self.where if frame is not None))

    @property
    def layers(self):
        used = len(self.frames) * self.size
        return [tuple(store[:, :used] for store in pair) for pair in self.stores]

    def free(self):
        """An empty slot, or that of the oldest frame that is no sink."""
        oldest = None if None in self.where else min(self.where[self.sink :])
        return self.where.index(oldest)

    def extend(self, layers, num_frames):
        self.size = layers[0][0].shape[1] // num_frames
        if not self.stores:
            room = (1, len(self.where), 1, 1)
            self.stores = [[x[:, : self.size].detach().repeat(room) for x in pair] for pair in layers]
        for row in range(num_frames):
            slot = self.free()
            self.where[slot] = self.next_frame
            self.next_frame += 1
            for pair, stores in zip(layers, self.stores, strict=True):
                for x, store in zip(pair, stores, strict=True):
                    at, of = slot * self.size, row * self.size
                    store[:, at : at + self.size] = x.detach()[:, of : of + self.size]
        return self


def filters_the_old_alone(cache, layers, num_frames):
    """Keeps all new frames, also where the window is shorter than the block."""
    after = cache.extend(layers, num_frames)
    wide = replace(cache, window_frames=max(cache.window_frames or 0, num_frames)) if cache.window_frames else cache
    return replace(wide.extend(layers, num_frames), window_frames=after.window_frames)


WRONG = {
    "remembers": [counts_the_block, sink_inside_the_window, off_by_one, forgets_the_sink, sees_a_sink_to_come],
    "attend_with_past": [causal_at_the_top_left, causal_inside_the_block, past_alone, unscaled],
    "extend": [
        keeps_the_graph,
        forgets_its_settings,
        counts_what_it_holds,
        window_of_tokens,
        evicts_the_sink,
        writes_in_place,
        filters_the_old_alone,
    ],
    "RingCache": [OverwritesTheSink, ConcatenatesAnew, CountsModulo, TwoStores],
}
RIGHT = {"remembers": by_sets, "attend_with_past": spelled_out, "extend": frame_by_frame, "RingCache": LooksSlotsUp}
