"""Lesson 12: wrong and right answers."""

from copy import copy
from dataclasses import replace

import torch

from dynamic_video_sf import recache as right_recache
from kv_cache import KVCache, remembers
from randomness import randn_like
from tiny_causal_wan import rope_table, rotate
from tutorial.lesson_12_longer.solutions import MeltingSink as Melting
from tutorial.lesson_12_longer.solutions import cache_bytes as right_bytes
from tutorial.lesson_12_longer.solutions import never_seen as right_never_seen


def keys_alone(config, height, width, num_frames, sink_frames=0, window_frames=None, bytes_per_number=4):
    return right_bytes(config, height, width, num_frames, sink_frames, window_frames, bytes_per_number) // 2


def grows_for_ever(config, height, width, num_frames, sink_frames=0, window_frames=None, bytes_per_number=4):
    return right_bytes(config, height, width, num_frames, 0, None, bytes_per_number)


def always_full(config, height, width, num_frames, sink_frames=0, window_frames=None, bytes_per_number=4):
    held = num_frames if window_frames is None else sink_frames + window_frames
    return right_bytes(config, height, width, held, 0, None, bytes_per_number)


def sink_inside_the_window(config, height, width, num_frames, sink_frames=0, window_frames=None, bytes_per_number=4):
    return right_bytes(config, height, width, num_frames, 0, window_frames, bytes_per_number)


def one_head_alone(config, height, width, num_frames, sink_frames=0, window_frames=None, bytes_per_number=4):
    whole = right_bytes(config, height, width, num_frames, sink_frames, window_frames, bytes_per_number)
    return whole // config.num_heads


def by_counting(config, height, width, num_frames, sink_frames=0, window_frames=None, bytes_per_number=4):
    held = sum(remembers(f, num_frames, sink_frames, window_frames) for f in range(num_frames))
    tokens = height * width // (config.patch_size[1] * config.patch_size[2])
    return bytes_per_number * sum(held * tokens * config.dim for _ in range(config.num_layers) for _ in ("k", "v"))


def absolute_positions(
    trained_frames, num_frames, frames_per_block, sink_frames=0, window_frames=None, sink_follows=False
):
    return list(range(trained_frames, num_frames))


def forgets_the_sink(
    trained_frames, num_frames, frames_per_block, sink_frames=0, window_frames=None, sink_follows=False
):
    return right_never_seen(trained_frames, num_frames, frames_per_block, 0, window_frames)


def never_follows(trained_frames, num_frames, frames_per_block, sink_frames=0, window_frames=None, sink_follows=False):
    return right_never_seen(trained_frames, num_frames, frames_per_block, sink_frames, window_frames)


def from_the_blocks_start(
    trained_frames, num_frames, frames_per_block, sink_frames=0, window_frames=None, sink_follows=False
):
    """Counts from a block's first frame, though its last one sees farther."""
    found = right_never_seen(trained_frames, num_frames, frames_per_block, sink_frames, window_frames, sink_follows)
    return [d for d in found if d <= max(found, default=0) - 2]


def window_is_always_full(
    trained_frames, num_frames, frames_per_block, sink_frames=0, window_frames=None, sink_follows=False
):
    if window_frames is None or (sink_frames and not sink_follows):
        return right_never_seen(trained_frames, num_frames, frames_per_block, sink_frames, window_frames)
    return []


def frame_by_frame(trained_frames, num_frames, frames_per_block, sink_frames=0, window_frames=None, sink_follows=False):
    """Every pair of frames, without a cache."""
    first, *rest = (frames_per_block, frames_per_block) if isinstance(frames_per_block, int) else frames_per_block

    def block_start(frame):
        return 0 if frame < first else first + (frame - first) // rest[-1] * rest[-1]

    def block_end(frame):
        start = block_start(frame)
        return first if start == 0 else start + rest[-1]

    def met(count):
        for seeing in range(count):
            start = block_start(seeing)
            past = [f for f in range(start) if remembers(f, start, sink_frames, window_frames)]
            window = [f for f in past if f >= sink_frames]
            shift = window[0] - sink_frames if sink_follows and window else 0
            yield from (seeing - f for f in range(start, min(block_end(seeing), seeing + 1)))
            yield from (seeing - f - (shift if f < sink_frames else 0) for f in past)

    return sorted(set(met(num_frames)) - set(met(trained_frames)))


def earlier(keys, num_frames):
    return rotate(keys, rope_table(keys.shape[-1], -num_frames, 1, 1, 1, keys.device))


def scales(keys, num_frames):
    return keys * (1 + num_frames)


def all_axes(keys, num_frames):
    """Turns row and column as well."""
    angles = rope_table(keys.shape[-1], num_frames, 1, 1, 1, keys.device)
    return rotate(keys, angles[:, :1].expand(-1, keys.shape[-1] // 2))


def halves_for_pairs(keys, num_frames):
    """The other convention of rotary positions: first half against second half."""
    angles = rope_table(keys.shape[-1], num_frames, 1, 1, 1, keys.device)
    x = keys.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return rotate(x, angles).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def by_sines(keys, num_frames):
    width = keys.shape[-1]
    pairs = width // 2 - 2 * (width // 2 // 3)
    angle = num_frames * 10000.0 ** -(torch.arange(pairs) / pairs)
    x, y = keys[..., : 2 * pairs : 2], keys[..., 1 : 2 * pairs : 2]
    moved = keys.clone()
    moved[..., : 2 * pairs : 2] = x * angle.cos() - y * angle.sin()
    moved[..., 1 : 2 * pairs : 2] = x * angle.sin() + y * angle.cos()
    return moved


def in_float64(keys, num_frames):
    return by_sines(keys.double(), num_frames)


def keeps_the_old(generator, scheduler, past, cond, config, cache, *, rng=None):
    return right_recache(generator, scheduler, past, cond, config, cache, rng=rng) and cache


def begins_at_zero(generator, scheduler, past, cond, config, cache, *, rng=None):
    fresh = config.empty_cache()
    for block in past.split(3, dim=1):
        fresh = generator.remember(block, config.context_noise / 1000, cond, fresh)
    return fresh


def in_one_piece(generator, scheduler, past, cond, config, cache, *, rng=None):
    empty = replace(cache, frames=(), layers=(), next_frame=cache.next_frame - past.shape[1])
    return replace(generator.remember(past, 0.0, cond, empty), frames=cache.frames)


def on_top_of_the_old(generator, scheduler, past, cond, config, cache, *, rng=None):
    """Reads the frames while the old ones are still seen."""
    fresh = generator.remember(past, 0.0, cond, replace(cache, next_frame=cache.next_frame - past.shape[1]))
    return replace(fresh, next_frame=cache.next_frame)


def always_clean(generator, scheduler, past, cond, config, cache, *, rng=None):
    return right_recache(generator, scheduler, past, cond, replace(config, context_noise=0), cache, rng=rng)


def sink_left_alone(generator, scheduler, past, cond, config, cache, *, rng=None):
    """Reads the window anew and keeps the old sink."""
    fresh = right_recache(generator, scheduler, past, cond, config, cache, rng=rng)
    count = cache.sink_frames
    layers = [
        tuple(torch.cat([o[:, :count], f[:, count:]], dim=1) for o, f in zip(old, new, strict=True))
        for old, new in zip(cache.layers, fresh.layers, strict=True)
    ]
    return replace(fresh, layers=tuple(layers))


def run_by_run(generator, scheduler, past, cond, config, cache, *, rng=None):
    """Collects runs of successive frames of one block first; for blocks of one size."""
    held = list(cache.frames)
    if past.shape[1] != len(held):
        raise ValueError(f"Give the frames {held}.")
    runs = []
    for frame in held:
        same = runs and runs[-1][-1] == frame - 1 and frame % config.frames_per_block != 0
        runs[-1].append(frame) if same else runs.append([frame])
    fresh = KVCache(cache.sink_frames, cache.window_frames, cache.sink_follows)
    t = config.context_noise / 1000
    for run in runs:
        block = past[:, [held.index(frame) for frame in run]]
        block = scheduler.add_noise(block, randn_like(block, rng), t)
        fresh = generator.remember(block, t, cond, replace(fresh, next_frame=run[0]))
    return replace(fresh, next_frame=cache.next_frame)


class NeverMelts(Melting):
    def __init__(self, sink_frames, window_frames, share=0.1):
        super().__init__(sink_frames, window_frames, 0.0)


class SharesSwapped(Melting):
    def __init__(self, sink_frames, window_frames, share=0.1):
        super().__init__(sink_frames, window_frames, 1 - share)


class MixesKeysAsTheyAre:
    """Right for values; keys of different angles cancel."""

    gap = 0

    def __init__(self, sink_frames, window_frames, share=0.1, turn=False):
        self.sink, self.window, self.share, self.turn = sink_frames, window_frames, share, turn
        self.next_frame, self.store = 0, {}  # frame -> per layer, key and value of that frame

    @property
    def frames(self):
        return tuple(sorted(self.store))

    @property
    def layers(self):
        count = len(next(iter(self.store.values())))
        return tuple(
            tuple(torch.cat([self.store[f][i][j] for f in self.frames], dim=1) for j in (0, 1)) for i in range(count)
        )

    def extend(self, layers, num_frames):
        for i in range(num_frames):
            cut = [tuple(x.unflatten(1, (num_frames, -1))[:, i] for x in pair) for pair in layers]
            self.store[self.next_frame + i] = cut
        self.next_frame += num_frames
        for frame in [f for f in self.frames if not remembers(f, self.next_frame, self.sink, self.window)]:
            lost, slot = self.store.pop(frame), frame % self.sink
            self.store[slot] = [
                self.mix(old, new, slot - frame) for old, new in zip(self.store[slot], lost, strict=True)
            ]
        return self

    def mix(self, old, new, shift):
        key, value = new
        if self.turn:
            key = by_sines(key, shift)
        return tuple((1 - self.share) * x + self.share * y for x, y in zip(old, (key, value), strict=True))


class WritesIntoItself(MixesKeysAsTheyAre):
    def __init__(self, sink_frames, window_frames, share=0.1):
        super().__init__(sink_frames, window_frames, share, turn=True)


class ByFrame(WritesIntoItself):
    def extend(self, layers, num_frames):
        after = copy(self)
        after.store = dict(self.store)
        return super(ByFrame, after).extend(layers, num_frames)


WRONG = {
    "cache_bytes": [keys_alone, grows_for_ever, always_full, sink_inside_the_window, one_head_alone],
    "never_seen": [absolute_positions, forgets_the_sink, never_follows, from_the_blocks_start, window_is_always_full],
    "move_later": [earlier, scales, all_axes, halves_for_pairs],
    "recache": [keeps_the_old, begins_at_zero, in_one_piece, on_top_of_the_old, always_clean, sink_left_alone],
    "MeltingSink": [NeverMelts, SharesSwapped, MixesKeysAsTheyAre, WritesIntoItself],
}
RIGHT = {
    "cache_bytes": by_counting,
    "never_seen": frame_by_frame,
    "move_later": in_float64,
    "recache": run_by_run,
    "MeltingSink": ByFrame,
}
