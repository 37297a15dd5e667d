"""The cache is a value that holds exactly the frames that the rule names; blocks fall where they should."""

from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest
import torch

from kv_cache import KVCache, block_borders, block_sizes, remembers

BATCH, TOKENS, LAYERS = 2, 3, 2  # tokens per frame
SHAPES = [(0, None), (2, None), (0, 0), (0, 2), (1, 0), (1, 2), (3, 1), (4, 2)]  # (sink, window)


def keys_values(frames, layer, sign):
    """A tensor [b l n d] whose numbers say batch, frame, token and layer they belong to."""
    frame = torch.tensor(list(frames), dtype=torch.float64).repeat_interleave(TOKENS)
    token = torch.arange(TOKENS).repeat(len(frames)) / 10
    numbers = frame + token + 100 * layer + 1000 * torch.arange(BATCH)[:, None]
    return sign * numbers[:, :, None, None].expand(BATCH, len(frame), 2, 4)


def layers_of(frames):
    return [(keys_values(frames, layer, 1), keys_values(frames, layer, -1)) for layer in range(LAYERS)]


def filled(sink_frames=0, window_frames=None, sizes=(), cache=None):
    cache = cache or KVCache(sink_frames, window_frames)
    for size in sizes:
        cache = cache.extend(layers_of(range(cache.next_frame, cache.next_frame + size)), size)
    return cache


def trace(sink_frames, window_frames, sizes):
    """What the cache holds after each block, as text: "0 1 2"."""
    held = [filled(sink_frames, window_frames, sizes[: i + 1]).frames for i in range(len(sizes))]
    return [" ".join(map(str, frames)) for frames in held]


# -------------------------------------------------------------------------------------------------- what is held


@pytest.mark.parametrize(
    "sink, window, sizes, held",
    [
        (0, None, (1, 3, 3), ["0", "0 1 2 3", "0 1 2 3 4 5 6"]),
        (2, None, (3, 3), ["0 1 2", "0 1 2 3 4 5"]),
        (0, 0, (2, 2), ["", ""]),
        (0, 2, (1, 1, 1, 1), ["0", "0 1", "1 2", "2 3"]),
        (1, 0, (1, 1, 1), ["0", "0", "0"]),
        (1, 2, (1, 1, 1, 1, 1), ["0", "0 1", "0 1 2", "0 2 3", "0 3 4"]),
        (3, 0, (3, 3, 3), ["0 1 2", "0 1 2", "0 1 2"]),
        (3, 0, (2, 2, 2), ["0 1", "0 1 2", "0 1 2"]),
        (1, 3, (3, 3, 3), ["0 1 2", "0 3 4 5", "0 6 7 8"]),
        (0, 1, (3, 3), ["2", "5"]),
        (1, 1, (3, 3), ["0 2", "0 5"]),
        (5, 2, (3, 3, 3), ["0 1 2", "0 1 2 3 4 5", "0 1 2 3 4 7 8"]),
        (3, 2, (1, 1, 1, 1, 1, 1), ["0", "0 1", "0 1 2", "0 1 2 3", "0 1 2 3 4", "0 1 2 4 5"]),
    ],
)
def test_frames_held(sink, window, sizes, held):
    """Hand-written traces: the sink stays, the window moves, even where a block is larger than it."""
    assert trace(sink, window, sizes) == held


@pytest.mark.parametrize("sink, window", SHAPES)
@pytest.mark.parametrize("sizes", [(1,) * 12, (3,) * 4, (1, 3, 3, 3, 2), (5, 7), (2, 1, 6, 3)])
def test_frames_held_are_the_sink_and_the_window(sink, window, sizes):
    """Whatever the blocks were, nothing that a later block may see was dropped, and nothing else is left."""
    cache = KVCache(sink, window)
    for size in sizes:
        cache = filled(sizes=[size], cache=cache)
        end = cache.next_frame
        recent = range(end if window is None else min(window, end))
        assert set(cache.frames) == set(range(min(sink, end))) | {end - 1 - i for i in recent}
        assert list(cache.frames) == sorted(cache.frames)
    assert cache.next_frame == 12


@pytest.mark.parametrize("sink, window", SHAPES)
@pytest.mark.parametrize("sizes", [(1,) * 6, (3, 3, 3), (1, 3, 3), (5, 2)])
def test_the_numbers_are_those_of_the_frames_held(sink, window, sizes):
    """Keys and values, every layer, sample and token, are those of `frames`, in that order."""
    cache = filled(sink, window, sizes)
    assert len(cache.layers) == LAYERS
    for held, expected in zip(cache.layers, layers_of(cache.frames), strict=True):
        for tensor, numbers in zip(held, expected, strict=True):
            assert torch.equal(tensor, numbers)


@pytest.mark.parametrize("start, sink, window, seen", [(4, 1, 2, {0, 2, 3}), (4, 0, 0, set()), (2, 5, 1, {0, 1})])
def test_remembers(start, sink, window, seen):
    """The rule itself: sink frames and the window before `start`, never `start` or later."""
    assert {frame for frame in range(8) if remembers(frame, start, sink, window)} == seen


@pytest.mark.parametrize(
    "sink, window, sizes, gaps",
    [
        (1, 3, (3, 3, 3), [0, 2, 5]),
        (3, 3, (3, 3, 3, 3), [0, 0, 3, 6]),
        (3, None, (3, 3, 3), [0, 0, 0]),  # nothing is forgotten, so nothing is far
        (0, 2, (2, 2, 2), [0, 0, 0]),
        (2, 0, (2, 2, 2), [0, 2, 4]),  # no window: right before the block
    ],
)
def test_the_gap_is_how_far_the_sink_moves_up(sink, window, sizes, gaps):
    """From its own place to right before the window, or the block, and only with sink_follows."""
    for follows in (True, False):
        cache, seen = KVCache(sink, window, follows), []
        for size in sizes:
            cache = filled(sizes=(size,), cache=cache)
            seen.append(cache.gap)
        assert seen == (gaps if follows else [0] * len(sizes))


# ------------------------------------------------------------------------------------------------ a cache is a value


def test_extend_leaves_the_old_cache_as_it_was():
    """A new cache comes back; the old one keeps its frames, position and numbers, so that it has two futures."""
    old = filled(1, 2, (3, 3))
    before = [tuple(x.clone() for x in pair) for pair in old.layers]
    futures = [filled(sizes=(size,), cache=old) for size in (1, 4)]
    assert [cache.next_frame for cache in (old, *futures)] == [6, 7, 10]
    assert [cache.frames for cache in (old, *futures)] == [(0, 4, 5), (0, 5, 6), (0, 8, 9)]
    for pair, copies in zip(old.layers, before, strict=True):
        assert all(torch.equal(x, copy) for x, copy in zip(pair, copies, strict=True))


def test_a_new_cache_never_shares_memory_with_an_old_one():
    """Writing into what one future holds changes neither the past nor the other future."""
    old = filled(sizes=(2,))
    one, two = filled(sizes=(1,), cache=old), filled(sizes=(1,), cache=old)
    one.layers[0][0].fill_(7)
    for cache in (old, two):
        assert torch.equal(cache.layers[0][0], layers_of(cache.frames)[0][0])


def test_the_cache_cannot_be_assigned_to():
    """Frozen, tuples all the way down."""
    cache = filled(sizes=(2,))
    with pytest.raises(FrozenInstanceError):
        cache.next_frame = 0
    assert isinstance(cache.frames, tuple) and isinstance(cache.layers, tuple)
    assert all(isinstance(pair, tuple) for pair in cache.layers)


@pytest.mark.parametrize("window", [None, 1])
def test_the_cache_is_detached(window):
    """No gradient reaches the past: held tensors carry no graph, and the caller's own keep theirs."""
    cache = KVCache(1, window)
    for start in (0, 2):
        layers = [tuple(x.clone().requires_grad_() * 2 for x in pair) for pair in layers_of(range(start, start + 2))]
        cache = cache.extend(layers, 2)
        assert all(x.requires_grad for pair in layers for x in pair)
    assert not any(x.requires_grad for pair in cache.layers for x in pair)


def test_a_cache_may_keep_its_gradient():
    """With keeps_gradient, and in the caches that come of it, held tensors are part of the caller's graph."""
    cache, given = KVCache(1, 2, keeps_gradient=True), []
    for start in (0, 2):
        given.append([tuple(x.clone().requires_grad_() for x in pair) for pair in layers_of(range(start, start + 2))])
        cache = cache.extend(given[-1], 2)
    assert cache.frames == (0, 2, 3)
    sum(x.sum() for pair in cache.layers for x in pair).backward()
    for layers, held in zip(given, ([1, 0], [1, 1]), strict=True):
        for x in (x for pair in layers for x in pair):
            assert x.grad.unflatten(1, (2, -1)).mean((0, 2, 3, 4)).tolist() == held


def test_a_fresh_cache_is_empty():
    """Frame 0 comes next, nothing is held, and everything is kept unless a window is set."""
    assert KVCache() == KVCache(sink_frames=0, window_frames=None, next_frame=0, frames=(), layers=())


# --------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize(
    "num_frames, frames_per_block, first_frame, sizes",
    [
        (6, 3, 0, [3, 3]),
        (7, (1, 3), 0, [1, 3, 3]),
        (7, (1, 3, 3), 0, [1, 3, 3]),
        (13, [1, 3, 3], 0, [1, 3, 3, 3, 3]),
        (5, (2, 1), 0, [2, 1, 1, 1]),
        (6, (1, 3), 7, [3, 3]),
        (3, (1, 3), 1, [3]),
        (4, 2, 8, [2, 2]),
        (4, 4, 0, [4]),
    ],
)
def test_block_sizes(num_frames, frames_per_block, first_frame, sizes):
    """Whole blocks, the pattern counted from frame 0 of the video also when a stream goes on later."""
    assert block_sizes(num_frames, frames_per_block, first_frame=first_frame) == sizes
    borders = block_borders(first_frame + num_frames, frames_per_block)
    assert [b - a for a, b in pairwise(borders) if a >= first_frame] == sizes


def test_block_borders_reach_past_the_end():
    """The last border is the first one at or after the last frame."""
    assert block_borders(7, 3) == [0, 3, 6, 9]
    assert block_borders(6, 3) == [0, 3, 6]
    assert block_borders(0, 3) == [0]


# ------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: KVCache(sink_frames=-1), r"count frames: 0 or more \(window_frames=None keeps all\)"),
        (lambda: KVCache(window_frames=-1), r"count frames: 0 or more \(window_frames=None keeps all\)"),
        (lambda: block_borders(6, 0), "must be a positive number or a tuple of them, got 0"),
        (lambda: block_borders(6, ()), r"must be a positive number or a tuple of them, got \(\)"),
        (lambda: block_borders(6, (3, 0)), r"must be a positive number or a tuple of them, got \(3, 0\)"),
        (lambda: block_sizes(7, 3), r"7 frames are not a whole number of blocks .*; use 6 or 9 frames"),
        (lambda: block_sizes(2, 3), "use 3 frames"),
        (lambda: block_sizes(6, (1, 3)), "use 4 or 7 frames"),
        (lambda: block_sizes(4, (1, 3), first_frame=1), "use 3 or 6 frames"),
        (lambda: block_sizes(3, 3, first_frame=4), "has no block border at frame 4"),
    ],
)
def test_mistakes_are_named_with_their_fix(call, sentence):
    """Every ValueError of the file, and the frame counts that it offers instead."""
    with pytest.raises(ValueError, match=sentence):
        call()
