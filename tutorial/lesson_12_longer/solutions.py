"""Solutions of lesson 12: the core itself, where it has the function."""

from copy import copy
from dataclasses import replace

import torch

from dynamic_video_sf import recache
from kv_cache import KVCache, block_borders
from tiny_causal_wan import rope_table, rotate

__all__ = ["MeltingSink", "cache_bytes", "move_later", "never_seen", "recache"]


def cache_bytes(config, height, width, num_frames, sink_frames=0, window_frames=None, bytes_per_number=4):
    """Frames held x tokens of a frame x width of the model, for keys and values of every layer."""
    held = num_frames if window_frames is None else min(num_frames, sink_frames + window_frames)
    _, patch_height, patch_width = config.patch_size
    tokens = held * (height // patch_height) * (width // patch_width)
    return 2 * config.num_layers * tokens * config.dim * bytes_per_number


def distances(num_frames, frames_per_block, sink_frames, window_frames, sink_follows):
    """All distances that the blocks of a rollout meet."""
    cache, found = KVCache(sink_frames, window_frames, sink_follows), set()
    borders = block_borders(num_frames, frames_per_block)
    for start, end in zip(borders, borders[1:], strict=False):
        own = range(start, end)
        past = [frame + cache.gap * (frame < sink_frames) for frame in cache.frames]
        found |= {seeing - seen for seeing in own for seen in (*past, *own) if seeing >= seen}
        cache = cache.extend([], end - start)
    return found


def never_seen(trained_frames, num_frames, frames_per_block, sink_frames=0, window_frames=None, sink_follows=False):
    met, trained = (
        distances(count, frames_per_block, sink_frames, window_frames, sink_follows)
        for count in (num_frames, trained_frames)
    )
    return sorted(met - trained)


def move_later(keys, num_frames):
    """Angles add up, so the table of one frame at position num_frames is all that it takes."""
    return rotate(keys, rope_table(keys.shape[-1], num_frames, 1, 1, 1, keys.device))


class MeltingSink:
    gap = 0

    def __init__(self, sink_frames, window_frames, share=0.1):
        self.cache, self.share = KVCache(sink_frames, window_frames), share

    next_frame = property(lambda self: self.cache.next_frame)
    frames = property(lambda self: self.cache.frames)
    layers = property(lambda self: self.cache.layers)

    def extend(self, layers, num_frames):
        before, new = self.cache, range(self.next_frame, self.next_frame + num_frames)
        cache, after = before.extend(layers, num_frames), copy(self)
        sink_frames, melted = before.sink_frames, []
        lost = [frame for frame in (*before.frames, *new) if frame not in cache.frames] if sink_frames else []
        for i, pair in enumerate(cache.layers):
            old = before.layers[i] if before.layers else [x[:, :0] for x in pair]
            held = [torch.cat(both, 1) for both in zip(old, layers[i], strict=True)]
            held = [x.unflatten(1, (len(before.frames) + num_frames, -1)) for x in held]  # [b f s n d]
            keys, values = (x.unflatten(1, (len(cache.frames), -1)).clone() for x in pair)
            for frame in lost:
                place, slot = (*before.frames, *new).index(frame), frame % sink_frames
                key, value = (x[:, place] for x in held)
                keys[:, slot] += self.share * (move_later(key, slot - frame) - keys[:, slot])
                values[:, slot] += self.share * (value - values[:, slot])
            melted.append((keys.flatten(1, 2), values.flatten(1, 2)))
        after.cache = replace(cache, layers=tuple(melted))
        return after
