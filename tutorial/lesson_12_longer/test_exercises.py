"""Graders of lesson 12. `make grade LESSON=12`; each message says which idea is missing."""

from dataclasses import replace

import torch

from dynamic_video_sf import RolloutConfig
from flow_match import FlowMatchScheduler
from kv_cache import KVCache
from randomness import generator
from tiny_causal_wan import TinyCausalWanModel, WanConfig, rope_table, rotate

SMALL = WanConfig(dim=32, ffn_dim=32, num_layers=2, num_heads=2, patch_size=(1, 4, 4))

# ----------------------------------------------------------------------------------------------------- cache_bytes


def weighed(num_frames, **memory):
    """What a real cache of the small model weighs, in bytes, after blocks of 3 frames of 8 x 16 pixels."""
    torch.manual_seed(0)
    model, cache = TinyCausalWanModel(SMALL), KVCache(**memory)
    cond = {"prompt_embeds": torch.zeros(1, 2, 32)}
    with torch.no_grad():
        for block in torch.zeros(1, num_frames, 1, 8, 16).split(3, dim=1):
            cache = model.remember(block, 0.0, cond, cache)
    return sum(x.numel() * x.element_size() for pair in cache.layers for x in pair)


def test_it_weighs_what_a_real_cache_weighs(cache_bytes):
    got, right = cache_bytes(SMALL, 8, 16, 6), weighed(6)
    assert got == right, (
        f"Six frames of 8 x 16 pixels in patches of 4 x 4, two layers of width 32 in float32, weigh {right} bytes in "
        f"a real cache; yours says {got}. Per frame (8 / 4) (16 / 4) tokens, per token and layer a key and a value of "
        "dim numbers."
    )


def test_a_window_ends_the_growth(cache_bytes):
    memory = {"sink_frames": 1, "window_frames": 4}
    for num_frames in (3, 6, 30):
        got, right = cache_bytes(SMALL, 8, 16, num_frames, **memory), weighed(num_frames, **memory)
        assert got == right, (
            f"With a sink of 1 and a window of 4, {num_frames} frames leave {right} bytes, yours says {got}: at most "
            "sink + window frames are held, and never more than were made."
        )
    assert cache_bytes(SMALL, 8, 16, 10**6, **memory) == cache_bytes(SMALL, 8, 16, 5, **memory), (
        "A million frames weigh what five do: that is the point of a window."
    )


def test_half_precision_is_half(cache_bytes):
    full, half = (cache_bytes(SMALL, 8, 16, 6, bytes_per_number=size) for size in (4, 2))
    assert full == 2 * half, "Two bytes per number (bf16) are half of four."


def test_wan(cache_bytes):
    wan = WanConfig(in_dim=16, out_dim=16, dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, patch_size=(1, 2, 2))
    got = cache_bytes(wan, 60, 104, 21, bytes_per_number=2)
    assert got == 2 * 30 * 21 * 1560 * 1536 * 2, (
        f"21 latent frames of 60 x 104 in Wan 1.3B: 1560 tokens each, 6.04 GB in bf16; yours says {got / 1e9:.2f} GB. "
        "The number of heads does not count: together they are the model's width."
    )


# ------------------------------------------------------------------------------------------------------ never_seen


def test_without_a_window_every_new_frame_is_a_new_distance(never_seen):
    got = list(never_seen(12, 18, 3))
    assert got == [12, 13, 14, 15, 16, 17], (
        "Trained on 12 frames, the largest distance is 11 (from the last to the first); in 18 frames it is 17. "
        f"Yours: {got}."
    )


def test_a_window_alone_meets_nothing_new(never_seen):
    got = list(never_seen(12, 300, 3, window_frames=6))
    assert got == [], (
        "With a window of 6 no block ever looks back further than the third of training did: nothing is new; yours "
        f"{got}. Distances count, not absolute positions."
    )


def test_a_window_that_training_never_filled(never_seen):
    got = list(never_seen(6, 30, 3, window_frames=9))
    assert got == [6, 7, 8, 9, 10, 11], (
        f"In six frames a window of 9 is never full: the largest distance is 5. Later it is 2 + 9 = 11; yours {got}."
    )


def test_a_sink_that_stays_drifts_away(never_seen):
    got = list(never_seen(12, 24, 3, sink_frames=3, window_frames=6))
    assert got == list(range(12, 24)), (
        f"A sink at frames 0 to 2 lies up to 23 frames behind the last of 24 frames, and 11 in training; yours {got}."
    )


def test_a_sink_that_follows_does_not(never_seen):
    got = list(never_seen(12, 96, 3, sink_frames=3, window_frames=6, sink_follows=True))
    assert got == [], (
        "A sink that follows stands right before the window: the block at frame 90 sees it at frames 81 to 83. The "
        f"largest distance is 2 + 6 + 3 = 11, as in twelve frames of training; yours finds {got}."
    )
    got = list(never_seen(9, 96, 3, sink_frames=3, window_frames=6, sink_follows=True))
    assert got == [9, 10, 11], (
        f"In nine frames the sink was never outside of the window's reach: distances 9, 10, 11 are new. Yours: {got}."
    )


def test_uneven_blocks(never_seen):
    got = list(never_seen(4, 7, (1, 3)))
    assert got == [4, 5, 6], f"Blocks of 1, 3, 3 frames: from frame 6 back to frame 0 it is 6; yours {got}."


# ------------------------------------------------------------------------------------------------------ move_later


def keys(length=4, width=24):
    return torch.randn(2, length, 3, width, generator=generator(0, "keys"))


def at(frame, width=24):
    return rope_table(width, frame, 1, 1, 1, torch.device("cpu"))


def test_angles_add_up(move_later):
    raw = keys()
    got = torch.as_tensor(move_later(rotate(raw, at(5)), 7)).float()
    assert got.shape == raw.shape and torch.allclose(got, rotate(raw, at(12)), atol=1e-5), (
        "Keys that were turned by frame 5 and are moved by 7 should be those that were turned by frame 12: turn what "
        "is there by the angles of 7 frames."
    )


def test_no_gap_is_no_change(move_later):
    got = move_later(keys(), 0).float()
    assert torch.allclose(got, keys(), atol=1e-6), "Moved by 0 frames, keys stay as they are."


def test_back_again(move_later):
    got = move_later(move_later(keys(), 9), -9).float()
    assert torch.allclose(got, keys(), atol=1e-5), "9 later and 9 earlier is where they were: angles may be negative."


def test_rows_and_columns_stay(move_later):
    raw, width = keys(), 24
    grid = rope_table(width, 3, 1, 2, 2, torch.device("cpu"))  # four tokens of frame 3
    later = rope_table(width, 10, 1, 2, 2, torch.device("cpu"))
    got = move_later(rotate(raw, grid), 7).float()
    assert torch.allclose(got, rotate(raw, later), atol=1e-5), (
        "The four tokens of a frame differ in row and column; moving in time must leave both. Only the first pairs of "
        "channels carry time: rope_table(width, start, 1, 1, 1, device) turns those and no others."
    )


def test_attention_sees_the_new_distance(move_later):
    query, key = keys(1), keys(2)[:, :1]
    near = (rotate(query, at(20)) * move_later(rotate(key, at(2)), 15)).sum(-1).float()
    right = (rotate(query, at(103)) * rotate(key, at(100))).sum(-1)
    assert torch.allclose(near, right, atol=1e-4), (
        "A query at frame 20 and a key moved from frame 2 to 17 are three frames apart: their product should be that "
        "of frames 103 and 100. Move the key towards later frames, not earlier ones."
    )


# --------------------------------------------------------------------------------------------------------- recache

SCHEDULER = FlowMatchScheduler(3.0)
MEMORY = {"frames_per_block": 3, "sink_frames": 2, "window_frames": 4}
CONFIG = RolloutConfig(**MEMORY)


class Reader:
    """A generator whose keys say what was read: the frame's content, where, at which level and under which prompt."""

    def __init__(self):
        self.calls = []

    def remember(self, x, t, cond, cache):
        self.calls.append({"frames": list(range(cache.next_frame, cache.next_frame + x.shape[1])), "t": t, "x": x})
        self.calls[-1]["saw"] = list(cache.frames)
        layer = x.flatten(2)[:, :, None] + 1000 * cond["prompt"]  # [b f 1 d]
        return cache.extend([(layer, layer + 0.5)], x.shape[1])


def content(frames):
    """Frames whose pixels are their number."""
    return torch.tensor([float(frame) for frame in frames]).reshape(1, -1, 1, 1, 1).expand(1, -1, 1, 1, 4)


def filled(num_frames, config=CONFIG, prompt=1):
    cache, reader = config.empty_cache(), Reader()
    for start in range(0, num_frames, 3):
        block = content(range(start, start + 3))
        cache = reader.remember(block, 0.0, {"prompt": prompt}, cache)
    return cache


def seen_anew(recache, num_frames=15, config=CONFIG, **options):
    reader, cache = Reader(), filled(num_frames, config)
    fresh = recache(reader, SCHEDULER, content(cache.frames), {"prompt": 2}, config, cache, **options)
    return fresh, cache, reader


def test_it_holds_the_same_frames(recache):
    fresh, cache, _ = seen_anew(recache)
    assert (fresh.next_frame, tuple(fresh.frames)) == (cache.next_frame, tuple(cache.frames)), (
        f"The new cache goes on at frame {cache.next_frame} and holds {cache.frames}, yours at {fresh.next_frame} and "
        f"{fresh.frames}. Do not begin to count anew: the frames stay where they were."
    )


def test_every_key_is_of_the_new_prompt(recache):
    fresh, cache, _ = seen_anew(recache)
    found = fresh.layers[0][0][0, :, 0, 0].tolist()
    assert found == [2000.0 + frame for frame in cache.frames], (
        "Nothing of the old prompt may be left, in no layer, not even in the sink: expected contents "
        f"{[2000 + frame for frame in cache.frames]} (2000 is the new prompt), got {found}."
    )


def test_blocks_are_read_in_their_places(recache):
    _, _, reader = seen_anew(recache)
    read = [call["frames"] for call in reader.calls]
    assert read == [[0, 1], [11], [12, 13, 14]], (
        "Held are 0, 1 and 11 to 14. They are read as the rollout read them, in blocks of three: [0, 1] of the first "
        f"block, [11] of the fourth, [12, 13, 14]; each at its own position. Yours read {read}."
    )
    contents = [call["x"][0, :, 0, 0, 0].tolist() for call in reader.calls]
    assert contents == [[float(f) for f in frames] for frames in read], (
        f"Content and place belong together: {contents}."
    )


def test_a_block_sees_the_fresh_ones_before_it(recache):
    _, _, reader = seen_anew(recache)
    saw = [call["saw"] for call in reader.calls]
    assert saw == [[], [0, 1], [0, 1, 11]], (
        f"The first block is read without a past, the next sees what was read anew, and so on; yours saw {saw}. The "
        "old cache must not be seen: it would go on telling the old prompt."
    )


def test_it_remembers_as_a_rollout_does(recache):
    _, _, reader = seen_anew(recache, config=replace(CONFIG, context_noise=200), rng=generator(0, "noise"))
    last = reader.calls[-1]
    off = (last["x"][0, :, 0, 0].mean(1) - 0.8 * torch.tensor(last["frames"])).abs().max()
    assert last["t"] == 0.2 and 0 < off < 1.5, (
        "With context_noise=200 the frames are noised to t = 0.2 before they are read, and the model is told so, as in "
        f"rollout. Yours were read at t = {last['t']}, and are up to {off:.1f} away from 0.8 times the clean ones."
    )


def test_the_old_cache_is_as_it_was(recache):
    _, cache, _ = seen_anew(recache)
    again = filled(15)
    assert torch.equal(cache.layers[0][0], again.layers[0][0]), "A cache is a value: leave the old one alone."


def test_it_wants_the_frames_that_are_held(recache):
    cache = filled(15)
    try:
        recache(Reader(), SCHEDULER, content(range(15)), {"prompt": 2}, CONFIG, cache)
    except ValueError:
        return
    raise AssertionError(
        "The cache holds 6 frames and 15 were given, perhaps the whole video: raise a ValueError that names the frames "
        "that are wanted, cache.frames."
    )


# ----------------------------------------------------------------------------------------------------- MeltingSink


def numbered(first, num_frames):
    """Keys of zero and values that are the frame's number, two tokens per frame, of one layer."""
    values = (
        torch.arange(first, first + num_frames).repeat_interleave(2).float()[None, :, None, None].expand(1, -1, 1, 4)
    )
    return [(torch.zeros_like(values), values)]


def filled_sink(MeltingSink, num_frames, sink=1, window=3, share=0.25, layers=numbered):
    cache = MeltingSink(sink, window, share)
    for start in range(0, num_frames, 3):
        cache = cache.extend(layers(start, 3), num_frames=3)
    return cache


def test_before_it_is_full_it_is_a_cache(MeltingSink):
    cache = filled_sink(MeltingSink, 3)
    assert (cache.next_frame, tuple(cache.frames), cache.gap) == (3, (0, 1, 2), 0), (
        "next_frame, frames and gap are those of a KVCache with that sink and window."
    )
    assert torch.equal(cache.layers[0][1], numbered(0, 3)[0][1]), "Nothing was evicted: nothing melts."


def test_it_holds_what_a_cache_holds(MeltingSink):
    cache, plain = filled_sink(MeltingSink, 15), KVCache(1, 3)
    for start in range(0, 15, 3):
        plain = plain.extend(numbered(start, 3), 3)
    assert (cache.next_frame, tuple(cache.frames)) == (plain.next_frame, plain.frames), (
        f"Held are frames {plain.frames}, yours {tuple(cache.frames)}: what melted is not held, it is in the sink."
    )
    window = cache.layers[0][1][:, 2:]
    assert torch.equal(window, plain.layers[0][1][:, 2:]), (
        "The window is untouched; only the sink takes up the evicted."
    )


def test_evicted_values_melt_into_the_sink(MeltingSink):
    got = filled_sink(MeltingSink, 9).layers[0][1][0, 0, 0, 0].item()
    right = 0.0
    for frame in (1, 2, 3, 4, 5):
        right = 0.75 * right + 0.25 * frame
    assert abs(got - right) < 1e-5, (
        "With a window of 3, frames 1 to 5 were evicted after nine frames. Mixed in one after the other, oldest "
        f"first, a quarter each, frame 0's value of 0 becomes {right:.4f}; yours is {got:.4f}."
    )


def test_each_sink_frame_takes_its_own(MeltingSink):
    tokens = filled_sink(MeltingSink, 9, sink=2, share=0.5).layers[0][1][0, ::2, 0, 0].tolist()[:2]
    even, odd = 0.5 * (0.5 * 0 + 0.5 * 2) + 0.5 * 4, 0.5 * (0.5 * 1 + 0.5 * 3) + 0.5 * 5
    assert abs(tokens[0] - even) < 1e-5 and abs(tokens[1] - odd) < 1e-5, (
        f"Frame f melts into sink frame f % sink_frames: even ones into the first, {even}, odd ones into the second, "
        f"{odd}; yours {tokens}."
    )


def test_it_is_a_value(MeltingSink):
    cache = filled_sink(MeltingSink, 6)
    frames, values = tuple(cache.frames), cache.layers[0][1].clone()
    cache.extend(numbered(6, 3), num_frames=3)
    assert tuple(cache.frames) == frames and torch.equal(cache.layers[0][1], values), (
        "extend returns a new cache and leaves the old one as it was, as that of KVCache does."
    )


def test_a_share_of_zero_is_a_cache(MeltingSink):
    cache = filled_sink(MeltingSink, 12, share=0.0)
    assert cache.layers[0][1][0, 0, 0, 0] == 0, "With share 0 the sink is what it was: frame 0's value of 0."


def test_keys_are_turned_before_they_melt(MeltingSink):
    raw = torch.randn(1, 2, 1, 24, generator=generator(0, "raw"))

    def still(first, num_frames):
        """A world that stands still: every frame has the same two keys, turned to its own position."""
        turned = [rotate(raw, rope_table(24, frame, 1, 1, 1, raw.device)) for frame in range(first, first + num_frames)]
        return [(torch.cat(turned, dim=1), torch.zeros(1, 2 * num_frames, 1, 24))]

    cache = filled_sink(MeltingSink, 30, sink=2, share=0.5, layers=still)
    expected = still(0, 2)[0][0]
    assert torch.allclose(cache.layers[0][0][:, :4], expected, atol=1e-4), (
        "Every frame holds the same key here, turned to its own position, so melting must change nothing. Turn an "
        "evicted key back to the sink frame's position first (move_later by slot - frame); mixed as they are, keys of "
        "different angles cancel."
    )
