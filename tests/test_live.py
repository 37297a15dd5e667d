"""live.Live: one endless rollout, bit for bit, that obeys between two blocks; the strip and the notebook's player."""

import asyncio
import re
import threading
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

import dynamic_video_sf
from dynamic_video_sf import CachePair, Guided, RolloutConfig, rollout
from experiments import switching
from flow_match import FlowMatchScheduler
from generate import LoadedModel, SamplingConfig, draw_noise, load_model
from kv_cache import KVCache
from live import CACHES, Live, LiveModel, bounded, live_model, resized
from moving_mnist import PromptEncoder, WorldConfig
from randomness import generator, randn
from tiny_causal_wan import TinyCausalWanModel, WanConfig
from visualization.live import CacheStrip, Player
from visualization.style import LOOKS

OLD, NEW = "a 3 moving right", "a 6 moving right"  # switching.another_digit("a 3 ...") is a 6
SMALL = WanConfig(dim=24, ffn_dim=48, num_layers=2)
WORLD = WorldConfig(canvas=16, digit_size=10)


@lru_cache
def network():
    """Small, every parameter random, sharp enough that prompts and pasts matter."""
    model = TinyCausalWanModel(SMALL).eval().requires_grad_(False)
    for i, (name, parameter) in enumerate(model.named_parameters()):
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        parameter.copy_(randn(parameter.shape, generator(0, i)) / fan_in**0.5 + name.endswith("norm_q.weight"))
    return model


def loaded_model(guidance_scale=1.0, whole_clip=False, **settings) -> LoadedModel:
    config = RolloutConfig(**{"denoising_steps": (1000, 500), "context_noise": 150, "window_frames": 6} | settings)
    sampling = SamplingConfig(config, guidance_scale, whole_clip=whole_clip)
    encoder = PromptEncoder(SMALL.text_dim, SMALL.text_len)
    return LoadedModel(network(), FlowMatchScheduler(), encoder, sampling, WORLD)


def watch(live, num_blocks):
    return list(islice(live, num_blocks))


def video(blocks):
    return torch.cat([block.video for block in blocks], dim=1)


def one_rollout(model: LiveModel, prompt, seed, num_frames):
    """The same frames out of a single, uninterrupted rollout that is given all noise at once, and its cache."""
    size = model.rollout.frames_per_block
    starts = range(0, num_frames, size)
    noise, rngs = zip(*(draw_noise([(seed, "live", start)], size, model.frame_shape) for start in starts), strict=True)
    rng = [None]

    def observe(frame, step, **_):  # the numbers of the block at hand, from its first denoising step on
        if not step:
            rng[:] = rngs[frame // size]

    whole = rollout(
        model.generator, model.scheduler, torch.cat(noise, 1), model.read(prompt), model.rollout, rng=rng,
        sampler=model.sampler, observe=observe,
    )  # fmt: skip
    with torch.no_grad():
        return switching.run_to_end(whole)


# ----------------------------------------------------------------------------------------------------- the same video


@pytest.mark.parametrize("sink", [{}, {"sink_frames": 3, "sink_follows": True}])
def test_nothing_changed_is_one_uninterrupted_rollout(sink):
    """Bit for bit, past eviction, with noise on what is remembered; what a block saw is what its cache held."""
    model = live_model(loaded_model(**sink))
    live = Live(model, OLD, seed=5)
    blocks = watch(live, 8)
    whole, _ = one_rollout(model, OLD, 5, 24)
    assert torch.equal(video(blocks), whole)
    assert blocks[-1].held == (*range(sink.get("sink_frames", 0)), *range(15, 21))
    assert [block.frames.start for block in blocks] == [*range(0, 24, 3)] and blocks[-1].prompt == OLD
    assert all(torch.equal(block.pixels, block.video) and block.seconds > 0 for block in blocks)


def test_the_shipped_student_is_one_rollout_too():
    """The weights that the demo shows by default, with their own sink and window."""
    model = live_model(load_model("checkpoints/student.safetensors"))
    assert torch.equal(video(watch(Live(model, OLD), 2)), one_rollout(model, OLD, 0, 6)[0])


@pytest.mark.parametrize("treatment", CACHES)
def test_a_prompt_switch_is_that_of_the_experiment(treatment, monkeypatch):
    """Kept, anew and emptied: equal to experiments/switching.py bit for bit, and to each other only up to the switch.

    Both draw the same noise; what is drawn on the way (renoising, context, reading anew) is made a function of shape.
    """
    loaded = loaded_model(sink_frames=3)
    model = live_model(loaded)
    noise = torch.cat([draw_noise([(0, "live", start)], 3, model.frame_shape)[0] for start in range(0, 24, 3)], 1)
    monkeypatch.setattr(dynamic_video_sf, "randn_like", lambda x, rng: randn(x.shape, generator(1)))
    monkeypatch.setattr(switching, "draw_noise", lambda keys, num_frames, shape: (noise[:, :num_frames], None))
    expected = switching.switched_videos(loaded, [OLD], 24, 0, at=15, cache=treatment)
    live = Live(model, switching.another_digit(OLD))
    before = watch(live, 5)
    live.change(prompt=OLD, cache=treatment)
    assert torch.equal(video(before + watch(live, 3)), expected)


def test_the_three_treatments_are_those_of_the_experiment_and_differ():
    """The words are the same; the first block after a switch differs between all three and from no switch at all."""
    assert CACHES == switching.CACHES
    seen = []
    for wish in (*({"prompt": NEW, "cache": cache} for cache in CACHES), {"prompt": OLD}):
        live = Live(live_model(loaded_model()), OLD)
        watch(live, 4)
        live.change(**wish)
        seen.append(next(live).video)
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(seen) for b in seen[:i])


def test_the_same_changes_at_the_same_blocks_are_the_same_video():
    """Prompt, sink, window and a new beginning: replayed bit for bit; one block later, it is another video."""
    model = live_model(loaded_model())
    changes = {2: {"prompt": NEW, "cache": "anew"}, 4: {"window_frames": 3, "sink_frames": 2}, 6: {"cache": "emptied"}}

    def play(late=0):
        live, blocks = Live(model, OLD, seed=3), []
        for i in range(9):
            if i - late in changes:
                live.change(**changes[i - late])
            blocks.append(next(live))
        return video(blocks)

    first = play()
    assert torch.equal(first, play())
    assert torch.equal(first[:, :6], play(late=1)[:, :6]) and not torch.equal(first[:, 6:9], play(late=1)[:, 6:9])


def test_noise_is_a_function_of_seed_and_block():
    """A block's noise does not depend on what was asked for before it; a new seed begins anew at frame 0."""

    class Spy:
        def __init__(self):
            self.noises = []

        def __call__(self, x_t, t, cond, cache):
            self.noises += [x_t] if t == 1 else []
            return x_t

        def remember(self, x, t, cond, cache):
            return cache.extend([(x.flatten(2)[:, :, None],) * 2], x.shape[1])

    spies = Spy(), Spy()
    for spy, wish in zip(spies, ({}, {"prompt": NEW, "cache": "emptied", "window_frames": 9}), strict=True):
        live = Live(replace(live_model(loaded_model()), generator=spy), OLD, seed=1)
        watch(live, 2)
        live.change(**wish)
        watch(live, 2)
        live.change(seed=2)
        again = next(live)
        assert again.index == 0 and again.frames == range(3) and again.held == () and again.seed == 2
    assert all(torch.equal(a, b) for a, b in zip(*(spy.noises for spy in spies), strict=True))
    assert len({x.sum().item() for x in spies[0].noises}) == 5


# -------------------------------------------------------------------------------------------------------- what changes


def test_changes_wait_for_the_border_of_blocks(monkeypatch):
    """Asked for in the middle of a block, from another thread, a change shows in the next block and not before."""
    live, plain = (Live(live_model(loaded_model()), OLD) for _ in range(2))
    one, two = watch(plain, 2)
    model, threads = live.model.generator, []

    def ask(*arguments):  # while the first block is on its way
        if not threads:
            threads.append(threading.Thread(target=live.change, kwargs={"prompt": NEW}))
            threads[0].start()
            threads[0].join()
        return forward(*arguments)

    forward = model.forward
    monkeypatch.setattr(model, "forward", ask)
    first, second = watch(live, 2)
    assert torch.equal(first.video, one.video) and (first.prompt, second.prompt) == (OLD, NEW)
    assert not torch.equal(second.video, two.video)


def test_a_window_that_changes_holds_what_a_cache_can_hold():
    """Frames by hand: a smaller window evicts at once, a larger one fills up; a sink counts only what is still held."""
    live = Live(live_model(loaded_model()), OLD)
    watch(live, 5)
    held = []
    for wish in ({"window_frames": 3}, {"window_frames": 9}, {}, {}, {"sink_frames": 2}, {"window_frames": 0}):
        live.change(**wish)
        block = next(live)
        held.append((block.held, block.num_sink))
    assert held == [
        ((12, 13, 14), 0),
        ((15, 16, 17), 0),
        ((*range(15, 21),), 0),
        ((*range(15, 24),), 0),
        ((*range(18, 27),), 0),  # frames 0 and 1 are gone: there can be no sink
        ((), 0),
    ]
    live.change(cache="emptied")
    live.change(window_frames=3)
    assert [(block.held, block.num_sink) for block in watch(live, 4)] == [
        ((), 0),
        ((33, 34, 35), 2),  # the wish for a sink holds for the next beginning
        ((33, 34, 36, 37, 38), 2),
        ((33, 34, 39, 40, 41), 2),
    ]


@pytest.mark.parametrize(
    "sink, window, expected",
    [
        ((3, 6), (5, 6), (3, (0, 1, 2, *range(15, 21)))),  # 3 and 4 were evicted
        ((3, 6), (1, 6), (1, (0, *range(15, 21)))),
        ((3, 6), (0, 2), (0, (19, 20))),
        ((0, 6), (3, 6), (0, (*range(15, 21),))),
        ((0, None), (4, 6), (4, (0, 1, 2, 3, *range(15, 21)))),
        ((2, 0), (2, 3), (2, (0, 1))),  # a window fills up again
    ],
)
def test_resized_caches_are_consistent(sink, window, expected):
    """A resized cache holds the right tokens, and its sink is never larger than what it holds of the first frames."""
    cache = KVCache(*sink, sink_follows=True)
    for start in range(0, 21, 3):
        tokens = torch.arange(2 * start, 2 * start + 6).float().reshape(1, 6, 1, 1)  # two of each frame
        cache = cache.extend([(tokens, -tokens)], 3)
    smaller = resized(cache, RolloutConfig(sink_frames=window[0], window_frames=window[1]))
    assert (smaller.sink_frames, smaller.frames) == expected and smaller.next_frame == 21
    keys, values = smaller.layers[0]
    assert keys.flatten().tolist() == [2 * frame + i for frame in smaller.frames for i in (0, 1)]
    assert torch.equal(keys, -values)
    after = (*smaller.frames, smaller.next_frame)[smaller.sink_frames]
    assert smaller.gap == (after - smaller.sink_frames if smaller.sink_frames else 0)


def test_a_sink_may_grow_while_its_frames_are_still_to_come():
    """At the beginning nothing is lost: all that was asked for is kept."""
    live = Live(live_model(loaded_model()), OLD)
    next(live)
    live.change(sink_frames=5, window_frames=3)
    assert watch(live, 4)[-1].held == (0, 1, 2, 3, 4, 9, 10, 11)


def test_a_resized_stream_is_a_rollout_with_a_cache_cut_by_hand():
    """The block after a smaller window is a rollout's from the last frames' keys and values, bit for bit."""
    live, other = (Live(live_model(loaded_model(sink_frames=3, sink_follows=True)), OLD) for _ in range(2))
    watch(live, 5)
    live.change(window_frames=3, sink_frames=1)
    block = next(live)
    watch(other, 6)
    whole, tokens = other.cache, 16
    assert whole.frames == (0, 1, 2, *range(9, 15))
    by_hand = [0, *range(6, 9)]  # frame 0 and frames 12 to 14, by their places
    layers = [
        tuple(torch.cat([x[:, tokens * i : tokens * (i + 1)] for i in by_hand], 1) for x in pair)
        for pair in whole.layers
    ]
    past = KVCache(1, 3, True, next_frame=15, frames=(0, 12, 13, 14), layers=tuple(layers))
    model = live.model
    noise, rng = draw_noise([(0, "live", 15)], 3, model.frame_shape)
    with torch.no_grad():
        expected = next(
            rollout(model.generator, model.scheduler, noise, model.read(OLD), model.rollout, cache=past, rng=rng)
        )
    assert torch.equal(block.video, expected)


# ------------------------------------------------------------------------------------------------- guidance and clips


def test_guided_models_stream_and_switch():
    """With guidance both caches are resized; only the one with the prompt is read anew; it is one rollout as well."""
    model = live_model(loaded_model(guidance_scale=2.0))
    assert isinstance(model.generator, Guided)
    live = Live(model, OLD)
    assert torch.equal(video(watch(live, 4)), one_rollout(model, OLD, 0, 12)[0])
    live.change(window_frames=3, prompt=NEW, cache="anew")
    block = next(live)
    next(live)
    assert block.held == (9, 10, 11) and isinstance(live.cache, CachePair)
    assert live.cache.cond.frames == live.cache.uncond.frames == (12, 13, 14)


def test_reading_anew_leaves_the_unguided_past_alone():
    """What was read without a prompt does not depend on the prompt: those keys and values stay, the others are new."""
    caches = {}
    for treatment in ("kept", "anew"):
        live = Live(live_model(loaded_model(guidance_scale=2.0)), OLD)
        watch(live, 3)
        live.change(prompt=NEW, cache=treatment)
        next(live)  # the new block is not remembered yet
        caches[treatment] = live.cache
    kept, anew = caches["kept"], caches["anew"]
    assert torch.equal(kept.uncond.layers[1][0], anew.uncond.layers[1][0])
    assert not torch.equal(kept.cond.layers[1][0], anew.cond.layers[1][0])


def test_models_of_whole_clips_show_clip_after_clip():
    """Each clip is what an empty cache gives, frames go on counting, and nothing is remembered."""
    loaded = loaded_model(whole_clip=True, frames_per_block=12, window_frames=None)
    model = live_model(loaded)
    live = Live(model, OLD, seed=4)
    first, second = watch(live, 2)
    assert (first.frames, second.frames, second.held) == (range(12), range(12, 24), ())
    noise, rng = draw_noise([(4, "live", 12)], 12, model.frame_shape)
    with torch.no_grad():
        clip = next(rollout(loaded.model, model.scheduler, noise, model.read(OLD), model.rollout, rng=rng))
    assert torch.equal(second.video, clip)


# --------------------------------------------------------------------------------------------------- memory, mistakes


def storage(live) -> int:
    """Bytes that a live video holds: its cache's and its own frames', shared storage once."""
    cache = live.cache if isinstance(live.cache, KVCache) else live.cache.cond
    tensors = [x for pair in cache.layers for x in pair] + [*live.past.values(), live.newest]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def test_memory_is_constant():
    """Forty blocks: frames and bytes held stop growing when the window is full, switches and readings anew included."""
    live = Live(live_model(loaded_model(sink_frames=3)), OLD)
    sizes = []
    for i in range(40):
        if i % 8 == 7:
            live.change(prompt=(OLD, NEW)[i // 8 % 2], cache="anew")
        block = next(live)
        sizes.append((len(live.past), len(block.held), storage(live), len(live.changes)))
    assert len({size[2] for size in sizes[10:]}) == 1 and set(sizes[10:]) == {(9, 9, sizes[10][2], 0)}
    assert list(live.past) == list(live.cache.frames) == [0, 1, 2, *range(111, 117)]


@pytest.mark.parametrize(
    "wish, sentence",
    [
        ({"prompt": "a 3 moving sideways"}, "a DIGIT moving DIRECTION"),
        ({"prompt": "a 3 moving up and a 4 moving down"}, r"shows 1 digit\(s\) at a time"),
        ({"prompt": ""}, "cannot read the prompt"),
        ({"cache": "lost"}, "cache must be one of kept, anew, emptied, got 'lost'"),
        ({"window_frames": 49}, "window_frames must be between 0 and 48, got 49"),
        ({"sink_frames": -1}, "sink_frames must be between 0 and 48"),
    ],
)
def test_a_wrong_wish_is_a_sentence_and_changes_nothing(wish, sentence):
    """ValueError at once, in the caller's thread; the video goes on, and the right half is not done either."""
    live, plain = (Live(live_model(loaded_model()), OLD) for _ in range(2))
    watch(live, 1)
    with pytest.raises(ValueError, match=sentence):
        live.change(**{"window_frames": 3} | wish)
    assert torch.equal(video(watch(live, 2)), video(watch(plain, 3))[:, 3:])


def test_an_endless_video_needs_a_window():
    """A model trained without one gets what fits a clip of training; its own window stays."""
    assert bounded(RolloutConfig(), 21).window_frames == 18
    assert bounded(RolloutConfig(frames_per_block=(1, 4)), 21).window_frames == 17
    assert bounded(RolloutConfig(window_frames=6), 21).window_frames == 6
    assert bounded(RolloutConfig(frames_per_block=21), 21).window_frames == 0


def test_decoders_may_remember_and_make_four_pictures_of_a_frame():
    """One decoder serves a video until it begins anew; stills are each frame's last picture, as Wan counts them."""
    made = []

    def decoder():
        made.append(seen := [])

        def decode(x):
            first = not seen
            seen.append(x)
            return x.repeat_interleave(4, dim=1)[:, 3 if first else 0 :] + torch.arange(4).repeat(x.shape[1])[
                3 if first else 0 :
            ].reshape(1, -1, 1, 1, 1)

        return decode

    live = Live(replace(live_model(loaded_model()), decoder=decoder, pictures_per_frame=4), OLD)
    first, second = watch(live, 2)
    assert (first.pixels.shape[1], second.pixels.shape[1]) == (9, 12)
    for block in (first, second):
        assert torch.equal(block.stills, block.video[0] + 3)
    assert second.fps == pytest.approx(12 / second.seconds)
    live.change(seed=1)
    next(live)
    assert [len(seen) for seen in made] == [2, 1]


# ------------------------------------------------------------------------------------------------ the strip, a notebook


def fake_block(start, held, num_sink, **more):
    stills = torch.zeros(3, 1, 8, 8) + start / 100
    return SimpleNamespace(frames=range(start, start + 3), held=held, num_sink=num_sink, stills=stills, **more)


def test_the_strip_shows_sink_window_evicted_and_new():
    """Counts, the last evicted frames and every held frame, in the edges of LOOKS, and the whole of it in words."""
    view = CacheStrip()
    for start in range(0, 30, 3):
        html = view.update(fake_block(start, (*range(min(start, 2)), *range(max(2, start - 4), start)), min(start, 2)))
    assert re.findall(r">([a-z ,]+: \d+)<", html) == [
        "sink, kept for ever: 2", "evicted: 21", "in the window: 4", "this block: 3",
    ]  # fmt: skip
    assert re.findall(r"</div>(\d+)</div>", html) == [*map(str, (0, 1, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29))]
    assert html.count("<img") == len(view.stills) == 12 and html.count("&hellip;") == 1
    for kind in ("sink", "evicted", "cached", "clean"):
        assert LOOKS[kind].edge in html
    assert (
        'aria-label="Frames 27 to 29 were made; they saw 6 past frames, 2 of them the sink; 21 frames are evicted."'
        in html
    )
    assert not re.search(r"""(src|href)=["'](?!data:)""", html)


def test_the_strip_begins_anew():
    """At frame 0 nothing is left of the video before."""
    view = CacheStrip()
    view.update(fake_block(0, (), 0))
    view.update(fake_block(3, (0, 1, 2), 0))
    html = view.update(fake_block(0, (), 0))
    assert "evicted: 0" in html and list(view.stills) == [0, 1, 2]


def test_the_player_shows_and_steers():
    """Without a notebook: pictures change, words name the prompt and the speed, a button changes the prompt, a wrong
    wish is a sentence, and stop holds after the block at hand, from where start goes on."""
    live = Live(live_model(loaded_model()), OLD)
    wishes = {"six": {"prompt": NEW}, "wrong": {"prompt": "a b"}}
    player = Player(live, wishes, fps=1000, width=100)
    plain = watch(Live(live_model(loaded_model()), OLD), 2)

    async def press():
        await player.play(2)
        first = player.video.value
        assert OLD in player.words.value and "frame 5" in player.words.value and "per second" in player.words.value
        player.choices["wrong"].click()
        assert "cannot read the prompt" in player.words.value
        player.treatment.value = "anew"
        player.choices["six"].click()
        player.button.value = True  # as a press does
        while NEW not in player.words.value:
            await asyncio.sleep(0.01)
        player.button.value = False
        await player.task
        return first, live.num_blocks

    first, blocks = asyncio.run(press())
    assert first[:4] == b"\x89PNG" and first != player.video.value and "in the window" in player.cache.value
    assert blocks >= 2 and live.prompt == NEW and player.button.description == "start"
    assert torch.equal(plain[0].video, watch(Live(live_model(loaded_model()), OLD), 1)[0].video)
    assert "application/vnd.jupyter.widget-view+json" in player._repr_mimebundle_()
