"""Graders of lesson 5. `make grade LESSON=5`; each message says which idea is missing."""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dynamic_video_sf import RolloutConfig, generate
from flow_match import FlowMatchScheduler
from kv_cache import KVCache
from randomness import generators
from tiny_causal_wan import TinyCausalWanModel, WanConfig


def seen(remembers, start, **memory):
    return [frame for frame in range(start + 6) if remembers(frame, start, **memory)]


def test_the_whole_past_without_a_window(remembers):
    got = seen(remembers, 6)
    assert got == list(range(6)), (
        f"Without a window a block at frame 6 sees frames 0 to 5 of the past, yours {got}; its own frames are no past."
    )


def test_the_window_counts_back_from_the_blocks_first_frame(remembers):
    got = seen(remembers, 9, window_frames=4)
    assert got == [5, 6, 7, 8], (
        f"A window of 4 before a block at frame 9 is frames 5 to 8, yours is {got}. The block itself does not count."
    )
    assert seen(remembers, 3, window_frames=0) == [], "A window of 0 frames leaves nothing of the past."


def test_the_sink_stays(remembers):
    got = seen(remembers, 12, sink_frames=2, window_frames=3)
    assert got == [0, 1, 9, 10, 11], (
        f"With a sink of 2 and a window of 3, a block at frame 12 sees 0, 1 and 9, 10, 11; yours {got}. The sink is "
        "kept besides the window, however far it lies back."
    )


def test_a_sink_is_past_before_it_is_kept(remembers):
    got = seen(remembers, 1, sink_frames=3, window_frames=0)
    assert got == [0], f"At frame 1 only frame 0 has been made, though the sink has room for 3; yours sees {got}."


def block(seed, length=4):
    return torch.randn(3, 2, length, 2, 8, generator=torch.Generator().manual_seed(seed)).unbind()


def test_it_is_softmax_attention_over_past_and_block(attend_with_past):
    q, k, v = block(0)
    _, *past = block(1, length=6)
    keys, values = (torch.cat(pair, dim=1) for pair in zip(past, (k, v), strict=True))
    weights = (torch.einsum("blnd,bmnd->bnlm", q, keys) / 8**0.5).softmax(-1)
    right = torch.einsum("bnlm,bmnd->blnd", weights, values)
    assert torch.allclose(attend_with_past(q, k, v, tuple(past)).float(), right, atol=1e-5), (
        "It should be softmax(q k^T / sqrt(d)) v over the keys of the past and of the block together."
    )


def test_every_query_sees_the_whole_block(attend_with_past):
    q, k, v = block(0)
    _, *past = block(1, length=6)
    moved = v.clone()
    moved[:, -1] += 10
    change = (attend_with_past(q, k, moved, tuple(past)) - attend_with_past(q, k, v, tuple(past))).abs().amax((0, 2, 3))
    assert change.min() > 1e-3, (
        "The first query of the block does not see the block's last token. A block is denoised as a whole: no causal "
        "mask inside of it. (is_causal=True is wrong twice: with fewer queries than keys it aligns at the top left.)"
    )


def test_the_first_block_has_no_past(attend_with_past):
    q, k, v = block(0)
    nothing = tuple(x[:, :0] for x in (k, v))
    assert torch.allclose(attend_with_past(q, k, v), attend_with_past(q, k, v, nothing), atol=1e-6), (
        "Without a past (None) the block attends to itself alone."
    )


TOKENS = 2  # of a frame


def numbered(first, num_frames, requires_grad=False):
    """Keys and values of a block whose entries are the numbers of their frames."""
    numbers = torch.arange(first, first + num_frames).repeat_interleave(TOKENS).float()
    x = numbers[None, :, None, None].expand(1, -1, 1, 2).clone().requires_grad_(requires_grad)
    return [(x, x + 0.5), (x + 100, x + 100.5)]


def filled(extend, cache, sizes):
    for size in sizes:
        cache = extend(cache, numbered(cache.next_frame, size), size)
    return cache


def test_it_holds_what_the_window_leaves(extend):
    cache = filled(extend, KVCache(sink_frames=1, window_frames=4, sink_follows=True), [3, 3, 3])
    assert cache.next_frame == 9, (
        f"After 9 frames the next one is 9, not {cache.next_frame}: it goes on counting when frames fall out."
    )
    assert tuple(cache.frames) == (0, 5, 6, 7, 8), (
        f"With a sink of 1 and a window of 4, frames 0 and 5 to 8 are left after 9, not {cache.frames}."
    )
    assert cache.sink_follows, (
        "A setting of the cache got lost on the way: dataclasses.replace keeps what it is not told."
    )


def test_a_block_may_be_longer_than_the_window(extend):
    cache = filled(extend, KVCache(sink_frames=1, window_frames=2), [3, 3])
    assert tuple(cache.frames) == (0, 4, 5), (
        "The new frames obey the rule, too: with a sink of 1 and a window of 2, frames 0, 4 and 5 are left after 6, "
        f"not {cache.frames}."
    )


def test_keys_and_values_belong_to_those_frames(extend):
    cache = filled(extend, KVCache(sink_frames=1, window_frames=4), [3, 3, 3])
    wanted = torch.tensor([0, 5, 6, 7, 8]).repeat_interleave(TOKENS).float()
    for layer, base in zip(cache.layers, (0, 100), strict=True):
        for x, half in zip(layer, (0, 0.5), strict=True):
            got = (x[0, :, 0, 0] - base - half).tolist()
            assert got == wanted.tolist(), (
                f"Each of the {TOKENS} tokens of each kept frame, oldest first, in every layer, and nothing else: "
                f"expected those of frames {wanted.tolist()}, got {got}."
            )


def test_the_old_cache_is_as_it_was(extend):
    before = filled(extend, KVCache(window_frames=4), [3])
    kept = [x.clone() for pair in before.layers for x in pair]
    extend(before, numbered(3, 3), 3)
    same = all(torch.equal(x, y) for x, y in zip((x for pair in before.layers for x in pair), kept, strict=True))
    assert before.next_frame == 3 and tuple(before.frames) == (0, 1, 2) and same, (
        "A cache is a value: extend returns a new one and leaves the old one alone. Writing in place would change "
        "tensors that an autograd graph still needs."
    )


def test_no_gradient_passes(extend):
    cache = extend(KVCache(), numbered(0, 3, requires_grad=True), 3)
    assert not any(x.requires_grad for pair in cache.layers for x in pair), (
        "What is remembered must be detached: Self-Forcing lets no gradient flow from a block into the one before."
    )


def small_video(cache, num_frames=12, frames_per_block=2):
    torch.manual_seed(0)
    model = TinyCausalWanModel(WanConfig(dim=32, ffn_dim=32, num_layers=2))
    nn.init.normal_(model.head.head.weight, std=0.1)
    noise = torch.randn(1, num_frames, 1, 8, 8)
    cond = {"prompt_embeds": torch.randn(1, 4, 32)}
    config = RolloutConfig(denoising_steps=(1000, 500), frames_per_block=frames_per_block)
    options = {"rng": generators(0, "ring", samples=[0]), "cache": cache}
    return generate(model, FlowMatchScheduler(3.0), noise, cond, config, **options)


def test_it_makes_the_video_of_a_kv_cache(RingCache):
    for sink, window, per_block in ((0, 4, 2), (2, 4, 2), (3, 2, 3), (1, 5, 4)):
        right = small_video(KVCache(sink, window), frames_per_block=per_block)
        error = (small_video(RingCache(sink, window), frames_per_block=per_block) - right).abs().max().item()
        assert error < 1e-4, (
            f"With a sink of {sink}, a window of {window} and blocks of {per_block}, the video differs by {error:.2g} "
            "from that of KVCache. Is every held frame in exactly one slot, and the sink in slots of its own?"
        )


def test_it_says_what_it_holds(RingCache):
    ring, cache = RingCache(2, 4), KVCache(2, 4)
    for _ in range(5):
        layers = numbered(cache.next_frame, 3)
        ring, cache = ring.extend(layers, 3), cache.extend(layers, 3)
        got = (ring.next_frame, sorted(ring.frames))
        assert got == (cache.next_frame, sorted(cache.frames)), (
            f"next_frame and frames should be {(cache.next_frame, sorted(cache.frames))}, yours say {got}."
        )


def test_its_memory_does_not_move(RingCache):
    ring, places = RingCache(1, 4), set()
    for start in range(0, 30, 3):
        ring = ring.extend(numbered(start, 3), 3)
        if start >= 6:
            places.add(tuple(x.untyped_storage().data_ptr() for pair in ring.layers for x in pair))
    assert len(places) == 1, "Once the ring is full its tensors should lie where they lay: write into them."


class Allocates(TorchFunctionMode):
    """Entries of the largest tensor in new memory that a function of torch returned."""

    entries = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
            self.entries = max(self.entries, made.numel())
        return made


def test_a_full_ring_makes_nothing_of_its_size(RingCache):
    ring = RingCache(1, 12)
    for start in range(0, 30, 3):
        ring = ring.extend(numbered(start, 3), 3)
    layers = numbered(30, 3)
    with Allocates() as made:
        ring.extend(layers, 3)
    assert made.entries <= layers[0][0].numel(), (
        f"A full ring took in a block of {layers[0][0].numel()} numbers per tensor and made a new tensor of "
        f"{made.entries}: write the block into its slots, and leave the rest where it lies."
    )
