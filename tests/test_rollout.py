"""One rollout for training and inference: its numbers, its blocks, its cache, and where its gradient goes."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from dynamic_video_sf import (
    CachePair,
    Guided,
    RolloutConfig,
    euler,
    generate,
    predict_x0,
    prefill,
    recache,
    renoise,
    rollout,
    stochastic,
)
from flow_match import FlowMatchScheduler
from kv_cache import KVCache, block_borders, block_sizes
from randomness import generators, randn
from samplers import UniPC
from tiny_causal_wan import TinyCausalWanModel, WanConfig, WanLayer, sdpa_attention
from tutorial.moments import watch

SCHEDULER = FlowMatchScheduler()
TIMES = (1.0, 0.9375, 5 / 6, 0.625)  # 1000, 750, 500, 250 at shift 5
BATCH, FRAME = 2, (1, 4, 6)
SHAPES = {  # frames, frames per block, sink, window
    "even": (6, 3, 0, None),
    "uneven": (7, (1, 3), 0, None),
    "single": (3, 1, 0, None),
    "window": (8, 2, 0, 3),
    "sink and window": (8, 2, 1, 2),
    "large sink": (9, (2, 1, 3), 4, 1),
    "no past": (4, 2, 0, 0),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def shaped(shape, **settings):
    """The number of frames and the RolloutConfig of one of SHAPES."""
    num_frames, frames_per_block, sink, window = SHAPES[shape]
    names = {"frames_per_block": frames_per_block, "sink_frames": sink, "window_frames": window}
    return num_frames, RolloutConfig(**names, **settings)


def tiny_model():
    """A Wan of two layers, all parameters perturbed: a fresh one answers zero whatever it sees."""
    torch.manual_seed(0)
    config = WanConfig(
        dim=24, ffn_dim=48, num_heads=2, num_layers=2, patch_size=(1, 2, 2), text_dim=8, text_len=6, freq_dim=32
    )
    model = TinyCausalWanModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def prompt(seed=0):
    return {"prompt_embeds": randn((BATCH, 5, 8), generators(seed, "prompt", samples=range(BATCH)))}


def start(num_frames):
    return randn((BATCH, num_frames, *FRAME), rng("start"))


def rng(purpose="renoise"):
    return generators(0, purpose, samples=range(BATCH))


class Spy:
    """A generator that notes every call, gives each its own gain (1, with a gradient), and passes it on."""

    def __init__(self, generator):
        self.generator, self.seen, self.remembered = generator, [], []

    def __call__(self, x_t, t, cond, cache):
        return self.note(self.seen, x_t, t, cond, cache) * self.generator(x_t, t, cond, cache)

    def remember(self, x, t, cond, cache):
        gain = self.note(self.remembered, x, t, cond, cache)
        return self.generator.remember(gain * x, t, cond, cache)

    def note(self, calls, x, t, cond, cache):
        call = SimpleNamespace(frame=cache.next_frame, x=x, t=t, cond=cond, cache=cache)
        call.gain, call.graph = torch.ones((), requires_grad=True), torch.is_grad_enabled()
        calls.append(call)
        return call.gain


def collect(blocks):
    """The blocks that a rollout yields, and the cache that it returns."""
    made = []
    while True:
        try:
            made.append(next(blocks))
        except StopIteration as end:
            return made, end.value


def gradients(loss, model):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {name: x for (name, _), x in zip(model.named_parameters(), found, strict=True) if x is not None}


# ----------------------------------------------------------------------------------------------------- the numbers


@every_shape
@pytest.mark.parametrize("context_noise", [0, 200])
def test_training_and_inference_make_the_same_video(model, shape, context_noise):
    """Left at the last step with gradients on, a rollout is bit for bit the video of `generate`."""
    num_frames, config = shaped(shape, context_noise=context_noise)
    blocks = rollout(model, SCHEDULER, start(num_frames), prompt(), config, exit_step=3, rng=rng())
    trained = torch.cat(list(blocks), dim=1)
    inferred = generate(model, SCHEDULER, start(num_frames), prompt(), config, rng=rng())
    assert trained.requires_grad and not inferred.requires_grad
    assert torch.equal(trained, inferred)


def masked_rollout(model, noise, cond, config, rng, teacher_forcing):
    """The same video without a cache: every call computes the whole clip anew under a mask."""
    see = partial(
        model,
        frames_per_block=config.frames_per_block,
        sink_frames=config.sink_frames,
        window_frames=config.window_frames,
    )
    level = config.context_noise / 1000
    video, memory = torch.zeros_like(noise), torch.zeros_like(noise)
    for first, end in pairwise(block_borders(noise.shape[1], config.frames_per_block)):
        block, x_t = slice(first, end), noise[:, first:end]
        for t, t_next in zip(TIMES, (*TIMES[1:], level), strict=True):
            whole, times = memory.clone(), torch.full(noise.shape[:2], level)
            whole[:, block], times[:, block] = x_t, t
            x0 = x_t - t * see(whole, times, cond, clean=memory if teacher_forcing else None)[:, block]
            x_t = (1 - t_next) * x0 + t_next * randn(x0.shape, rng)
        video[:, block], memory[:, block] = x0, x_t
    return video


@every_shape
@pytest.mark.parametrize("mask, context_noise", [("causal", 0), ("causal", 300), ("teacher forcing", 0)])
def test_rollout_equals_the_masked_model(model, shape, mask, context_noise):
    """A rollout with a cache is the plain loop over the masked model without one, also after eviction."""
    num_frames, config = shaped(shape, context_noise=context_noise)
    noise = start(num_frames)
    cached = generate(model, SCHEDULER, noise, prompt(), config, rng=rng())
    with torch.no_grad():
        masked = masked_rollout(model, noise, prompt(), config, rng(), mask == "teacher forcing")
    torch.testing.assert_close(cached, masked, atol=2e-5, rtol=1e-5)


@every_shape
def test_noise_acts_on_its_own_and_later_blocks_only(model, shape):
    """Other noise in block k leaves every earlier block bit for bit as it was, and changes what remembers it."""
    num_frames, config = shaped(shape)
    sizes = block_sizes(num_frames, config.frames_per_block)
    make = partial(generate, model, SCHEDULER, cond=prompt(), config=config)
    video = make(start(num_frames), rng=rng()).split(sizes, dim=1)
    for k in range(len(sizes)):
        noise = start(num_frames)
        noise[:, sum(sizes[:k]) : sum(sizes[: k + 1])] += 1
        changed = [
            not torch.equal(a, b) for a, b in zip(video, make(noise, rng=rng()).split(sizes, dim=1), strict=True)
        ]
        assert changed[: k + 1] == [False] * k + [True]
        assert not any(changed[k + 1 :]) if shape == "no past" else all(changed[k + 1 : k + 2])


def test_euler_follows_the_ode(model):
    """With `euler` a block is Euler's method on dx/dt = flow, whatever the random numbers."""
    config = RolloutConfig((1000, 750, 500, 250), frames_per_block=4)
    x = noise = start(4)
    with torch.no_grad():
        for t, t_next in pairwise((*TIMES, 0.0)):
            x = x + (t_next - t) * model(x, t, prompt())
    for draws in (rng(), rng("other")):
        video = generate(model, SCHEDULER, noise, prompt(), config, rng=draws, sampler=euler)
        torch.testing.assert_close(video, x, atol=1e-5, rtol=1e-5)


def test_stochastic_lies_between_euler_and_renoise():
    """0 is `euler`, 1 is `renoise`; between them the noise keeps its variance, of which fresh_noise^2 is new."""
    x0, kept, noise = torch.randn(3, 4, 8, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    for t, t_next in ((0.9, 0.5), (torch.tensor([1.0, 0.9, 0.8, 0.7]), torch.tensor([0.1, 0.2, 0.3, 0.4]))):
        step = (SCHEDULER, x0, SCHEDULER.add_noise(x0, kept, t), t, t_next, noise)
        torch.testing.assert_close(stochastic(1.0)(*step), renoise(*step), atol=0, rtol=0)
        if isinstance(t, float):
            torch.testing.assert_close(stochastic(0.0)(*step), euler(*step), atol=1e-6, rtol=1e-5)
        mixed = SCHEDULER.add_noise(x0, 0.8 * kept + 0.6 * noise, t_next)
        torch.testing.assert_close(stochastic(0.6)(*step), mixed, atol=1e-5, rtol=1e-5)
    for refused in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="fresh_noise must lie between 0"):
            stochastic(refused)


def test_predict_x0(model):
    """x0 = x_t - t flow, at a float, per sample and per frame."""
    x_t = start(3)
    for t in (0.5, torch.tensor([0.2, 0.9]), torch.rand(BATCH, 3)):
        spread = torch.as_tensor(t).reshape(-1, t.shape[1] if getattr(t, "ndim", 0) == 2 else 1, 1, 1, 1)
        with torch.no_grad():
            expected = x_t - spread * model(x_t, t, prompt())
            torch.testing.assert_close(predict_x0(model, SCHEDULER, x_t, t, prompt()), expected)


# --------------------------------------------------------------------------------------------- blocks and streaming


def test_blocks_come_before_they_are_remembered(model):
    """A viewer gets a block when its last call is done; the memory pass waits until the next one is asked for."""
    spy, config = Spy(model), RolloutConfig(frames_per_block=2)
    for k, block in enumerate(rollout(spy, SCHEDULER, start(6), prompt(), config, rng=rng())):
        assert block.shape == (BATCH, 2, *FRAME)
        assert len(spy.seen) == 4 * (k + 1)
        assert len(spy.remembered) == k
    assert len(spy.remembered) == 3


@every_shape
def test_blocks_have_their_sizes_and_places(model, shape):
    """Blocks follow frames_per_block, each is made and remembered at its own frame and with its own prompt."""
    num_frames, config = shaped(shape)
    sizes, spy, cond = block_sizes(num_frames, config.frames_per_block), Spy(model), prompt()
    blocks, cache = collect(rollout(spy, SCHEDULER, start(num_frames), cond, config, exit_step=0, rng=rng()))
    assert [block.shape[1] for block in blocks] == sizes
    starts = block_borders(num_frames, config.frames_per_block)[:-1]
    assert [call.frame for call in spy.seen] == [call.frame for call in spy.remembered] == starts
    assert all(call.cond is cond for call in spy.seen + spy.remembered)
    assert cache.next_frame == num_frames
    assert (cache.sink_frames, cache.window_frames) == (config.sink_frames, config.window_frames)


def stream(model, noise, config, draws, cut):
    cache = yield from rollout(model, SCHEDULER, noise[:, :cut], prompt(), config, rng=draws)
    cache = yield from rollout(model, SCHEDULER, noise[:, cut:], prompt(), config, rng=draws, cache=cache)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("shape, cut", [("even", 3), ("uneven", 4), ("window", 4), ("large sink", 3)])
def test_a_stream_goes_on_where_it_stopped(model, shape, cut):
    """`cache = yield from rollout(...)` twice is one longer rollout: same blocks, same cache, bit for bit."""
    num_frames, config = shaped(shape, context_noise=100)
    noise = start(num_frames)
    blocks, cache = collect(stream(model, noise, config, rng(), cut))
    expected, expected_cache = collect(rollout(model, SCHEDULER, noise, prompt(), config, rng=rng()))
    assert all(torch.equal(a, b) for a, b in zip(blocks, expected, strict=True))
    assert (cache.next_frame, cache.frames) == (num_frames, expected_cache.frames)
    for pair, expected_pair in zip(cache.layers, expected_cache.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, expected_pair, strict=True))


@torch.no_grad()
def test_a_cache_has_two_futures(model):
    """Rolling on from a cache leaves it as it was: the second future is not disturbed by the first."""
    _, config = shaped("sink and window")
    _, cache = collect(rollout(model, SCHEDULER, start(4), prompt(), config, rng=rng()))
    futures = [generate(model, SCHEDULER, start(2), prompt(), config, rng=rng(), cache=cache) for _ in range(2)]
    assert torch.equal(*futures)
    assert cache.next_frame == 4


@torch.no_grad()
def test_context_noise_is_added_to_what_is_remembered(model):
    """A block is remembered as 0.7 x0 + 0.3 noise at time 0.3, with noise of its own; without it, as x0 at time 0."""
    for context_noise, t in ((300, 0.3), (0, 0.0)):
        spy, config = Spy(model), RolloutConfig(frames_per_block=2, context_noise=context_noise)
        blocks = list(rollout(spy, SCHEDULER, start(4), prompt(), config, exit_step=0, rng=rng()))
        draws = rng()
        for x0, call in zip(blocks, spy.remembered, strict=True):
            torch.testing.assert_close(call.x, (1 - t) * x0 + t * randn(x0.shape, draws))
            assert call.t == t


@torch.no_grad()
def test_observe_sees_every_guess(model):
    """observe gets frame, step, time, what the generator saw and what it guessed, of every call in order."""
    guesses = []
    config, spy = RolloutConfig(frames_per_block=(1, 2)), Spy(model)
    options = {"exit_step": [1, 0, 2], "rng": rng(), "observe": lambda **seen: guesses.append(seen)}
    blocks = list(rollout(spy, SCHEDULER, start(5), prompt(), config, **options))
    assert [(g["frame"], g["step"]) for g in guesses] == [(0, 0), (0, 1), (1, 0), (3, 0), (3, 1), (3, 2)]
    for guess, call in zip(guesses, spy.seen, strict=True):
        assert guess["t"] == call.t == pytest.approx(TIMES[guess["step"]]) and guess["x_t"] is call.x
        flow = model(call.x, call.t, call.cond, call.cache)
        torch.testing.assert_close(guess["x0"], call.x - call.t * flow)
    assert [guesses[i]["x0"] is block for i, block in zip((1, 2, 5), blocks, strict=True)] == [True] * 3


# ---------------------------------------------------------------------------------------------------- the exit step


@torch.no_grad()
@pytest.mark.parametrize(
    "exit_step, calls",
    [(None, [4, 4, 4]), (3, [4, 4, 4]), (0, [1, 1, 1]), ([2, 0, 3], [3, 1, 4]), (torch.tensor([1, 1, 2]), [2, 2, 3])],
)
def test_every_block_is_left_at_its_exit_step(model, exit_step, calls):
    """One step for all blocks, one for each, or the last; the calls walk down the warped times."""
    spy, config = Spy(model), RolloutConfig(frames_per_block=2)
    list(rollout(spy, SCHEDULER, start(6), prompt(), config, exit_step=exit_step, rng=rng()))
    times = [[call.t for call in spy.seen if call.frame == frame] for frame in (0, 2, 4)]
    assert times == [pytest.approx(TIMES[:count]) for count in calls]


@pytest.mark.parametrize("exit_step", [4, -1, [0, 0], [0, 0, 4], [0, 0, 0, 0], []])
def test_an_impossible_exit_step_is_refused(model, exit_step):
    """Steps that do not exist, and lists that do not name one per block."""
    blocks = rollout(model, SCHEDULER, start(6), prompt(), RolloutConfig(frames_per_block=2), exit_step=exit_step)
    with pytest.raises(ValueError, match="exit_step must be one or 3 numbers from 0 to 3, got"):
        next(blocks)


def test_a_cut_block_is_refused(model):
    """Frame counts that are no whole number of blocks, also when a stream goes on."""
    with pytest.raises(ValueError, match="7 frames are not a whole number of blocks .* use 6 or 9 frames"):
        next(rollout(model, SCHEDULER, start(7), prompt(), RolloutConfig(frames_per_block=3)))
    config, cache = RolloutConfig(frames_per_block=(1, 3)), KVCache(next_frame=2)
    with pytest.raises(ValueError, match="no block border at frame 2"):
        next(rollout(model, SCHEDULER, start(3), prompt(), config, cache=cache))


def test_rollout_config():
    """Lists become tuples, a trailing 0 goes, and impossible settings are named."""
    config = RolloutConfig([1000, 500, 0], [1, 3])
    assert (config.denoising_steps, config.frames_per_block) == ((1000, 500), (1, 3))
    assert hash(config) == hash(RolloutConfig((1000, 500), (1, 3)))
    for settings, sentence in (
        ({"denoising_steps": (750, 500)}, "must fall strictly from 1000"),
        ({"denoising_steps": (1000, 500, 500)}, "must fall strictly from 1000"),
        ({"context_noise": 1001}, "between 0 and 1000, got 1001"),
        ({"context_noise": -1}, "between 0 and 1000, got -1"),
        ({"window_frames": -1}, "count frames"),
    ):
        with pytest.raises(ValueError, match=sentence):
            RolloutConfig(**settings)


# ----------------------------------------------------------------------------------------------------- the gradient


def exits_of(shape, sizes):
    """A different exit for neighbouring blocks, the first and the last step among them."""
    return [(2 * i + len(shape)) % 4 for i in range(len(sizes))]


@every_shape
def test_gradient_passes_through_the_exit_call_alone(model, shape):
    """Of all calls only the last of each block is differentiated: no earlier guess, no memory pass."""
    num_frames, config = shaped(shape, context_noise=100)
    sizes = block_sizes(num_frames, config.frames_per_block)
    exit_step, spy = exits_of(shape, sizes), Spy(model)
    blocks = rollout(spy, SCHEDULER, start(num_frames), prompt(), config, exit_step=exit_step, rng=rng())
    loss = torch.cat(list(blocks), dim=1).square().sum()
    starts = block_borders(num_frames, config.frames_per_block)[:-1]
    steps = [step for last in exit_step for step in range(last + 1)]
    found = torch.autograd.grad(loss, [call.gain for call in spy.seen + spy.remembered], allow_unused=True)
    calls = [(call.frame, step) for call, step in zip(spy.seen, steps, strict=True)] + ["memory"] * len(sizes)
    differentiated = [call for call, gradient in zip(calls, found, strict=True) if gradient is not None]
    assert differentiated == list(zip(starts, exit_step, strict=True))
    assert [call.frame for call in spy.seen if call.graph] == starts  # the others do not even build a graph
    assert not any(call.graph for call in spy.remembered)


@every_shape
def test_gradient_equals_a_graph_built_by_hand(model, shape):
    """The gradient is that of the exit calls alone, their inputs and caches taken as plain numbers."""
    num_frames, config = shaped(shape)
    sizes, spy = block_sizes(num_frames, config.frames_per_block), Spy(model)
    exit_step, pull = exits_of(shape, sizes), randn((BATCH, num_frames, *FRAME), rng("pull"))
    blocks = rollout(spy, SCHEDULER, start(num_frames), prompt(), config, exit_step=exit_step, rng=rng())
    video = torch.cat(list(blocks), dim=1)
    last = [[call for call in spy.seen if call.frame == memory.frame][-1] for memory in spy.remembered]
    assert not any(x.requires_grad for call in last for x in (call.x, *sum(call.cache.layers, ())))
    by_hand = [call.x - call.t * model(call.x, call.t, call.cond, call.cache) for call in last]
    found, expected = (gradients((x * pull).sum(), model) for x in (video, torch.cat(by_hand, dim=1)))
    assert len(found) == len(list(model.parameters()))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert gradient.any(), name


def test_no_gradient_from_one_block_to_another(model):
    """A block's graph ends at its own exit call: neither past blocks nor the noise it started from are in it."""
    noise, config = start(6).requires_grad_(), RolloutConfig(frames_per_block=2)
    blocks = list(rollout(model, SCHEDULER, noise, prompt(), config, exit_step=[1, 2, 0], rng=rng()))
    for i, earlier in ((1, blocks[0]), (2, blocks[0]), (2, blocks[1]), (0, noise), (1, noise)):
        (gradient,) = torch.autograd.grad(blocks[i].sum(), earlier, retain_graph=True, allow_unused=True)
        assert gradient is None
    (gradient,) = torch.autograd.grad(blocks[2].sum(), noise)
    assert not gradient[:, :4].any() and gradient[:, 4:].any()  # left at step 0, it is a function of its noise


def test_a_cache_gradient_reaches_every_remembered_block(model):
    """With cache_gradient a block pulls at the one in its window, and through it at those before; the video stays the
    same."""
    noise, config = start(8), RolloutConfig(frames_per_block=2, window_frames=2, cache_gradient=True)
    kept = list(rollout(model, SCHEDULER, noise, prompt(), config, exit_step=1, rng=rng()))
    config = replace(config, cache_gradient=False)
    cut = list(rollout(model, SCHEDULER, noise, prompt(), config, exit_step=1, rng=rng()))
    for a, b in zip(kept, cut, strict=True):
        assert torch.equal(a, b)
    reached = [torch.autograd.grad(kept[3].sum(), kept[i], retain_graph=True, allow_unused=True)[0] for i in range(3)]
    assert all(gradient.any() for gradient in reached)  # through block 2, which remembers 1, which remembers 0
    assert torch.autograd.grad(cut[3].sum(), cut[2], allow_unused=True) == (None,)


@every_shape
def test_activation_checkpointing_changes_no_gradient(model, shape):
    """Recomputed layers see the cache they saw, also after eviction and with sinks."""
    num_frames, config = shaped(shape, context_noise=100)
    sizes = block_sizes(num_frames, config.frames_per_block)
    calls = []
    checkpointed = tiny_model()
    wrap = partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
    apply_activation_checkpointing(checkpointed, checkpoint_wrapper_fn=wrap, check_fn=lambda m: isinstance(m, WanLayer))

    def counted(*args, **options):
        calls.append(options["kind"])
        return sdpa_attention(*args, **options)

    checkpointed.attention = counted
    found = []
    for network in (model, checkpointed):
        blocks = rollout(
            network, SCHEDULER, start(num_frames), prompt(), config, exit_step=exits_of(shape, sizes), rng=rng()
        )
        video, made = torch.cat(list(blocks), dim=1), len(calls)
        found.append([*gradients(video.square().sum(), network).values(), video])
    assert len(calls) - made == 2 * 2 * len(sizes)  # self and cross, two layers, one exit call per block: recomputed
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ------------------------------------------------------------------------------------------------------ guidance


def test_guidance_convention(model):
    """uncond + w (cond - uncond), as diffusers and Wan; the reference's training scale s is w = s + 1."""
    x_t, cond, uncond = start(3), prompt(1), prompt(2)
    with torch.no_grad():
        flow, flow_uncond = model(x_t, 0.5, cond), model(x_t, 0.5, uncond)
        for w in (0.0, 1.0, 4.0):
            expected = flow_uncond + w * (flow - flow_uncond)
            torch.testing.assert_close(Guided(model, uncond, w)(x_t, 0.5, cond), expected)
        torch.testing.assert_close(Guided(model, uncond, 4.0)(x_t, 0.5, cond), flow + 3 * (flow - flow_uncond))


def test_guidance_one_never_asks_without_a_prompt(model):
    """At scale 1 the unconditional call is not made, and the answer is the plain one, bit for bit."""
    spy, cond = Spy(model), prompt(1)
    with torch.no_grad():
        flow = Guided(spy, prompt(2), 1)(start(2), 0.5, cond, KVCache())
        assert torch.equal(flow, model(start(2), 0.5, cond))
    assert [call.cond is cond for call in spy.seen] == [True]


@torch.no_grad()
def test_a_guided_rollout_equals_two_caches_run_by_hand(model):
    """With and without the prompt the past is read separately: two caches, both filled with the guided video."""
    num_frames, config = shaped("sink and window", context_noise=100)
    cond, uncond, w, noise = prompt(1), prompt(2), 3.0, start(num_frames)
    guided = Guided(model, uncond, w)
    blocks, pair = collect(rollout(guided, SCHEDULER, noise, cond, config, rng=rng()))
    draws, caches = rng(), [KVCache(1, 2), KVCache(1, 2)]
    for block, x_t in zip(blocks, noise.split(2, dim=1), strict=True):
        for t, t_next in zip(TIMES, (*TIMES[1:], 0.1), strict=True):
            flow, flow_uncond = (model(x_t, t, c, cache) for c, cache in zip((cond, uncond), caches, strict=True))
            x0 = x_t - t * (flow_uncond + w * (flow - flow_uncond))
            x_t = (1 - t_next) * x0 + t_next * randn(x0.shape, draws)
        caches = [model.remember(x_t, 0.1, c, cache) for c, cache in zip((cond, uncond), caches, strict=True)]
        torch.testing.assert_close(block, x0, atol=2e-5, rtol=1e-5)
    assert isinstance(pair, CachePair) and pair.next_frame == num_frames
    for held, expected in zip((pair.cond, pair.uncond), caches, strict=True):
        assert held.frames == expected.frames == (0, 6, 7)
        torch.testing.assert_close(held.layers, expected.layers, atol=2e-5, rtol=1e-4)
    assert not torch.equal(pair.cond.layers[1][1], pair.uncond.layers[1][1])


@torch.no_grad()
def test_a_guided_stream_goes_on_but_not_from_an_unguided_cache(model):
    """A pair of caches continues a guided rollout; a single filled one is refused, its second half is unknown."""
    noise, config = start(4), RolloutConfig(frames_per_block=2)
    guided = Guided(model, prompt(2), 3.0)
    draws, whole = rng(), generate(guided, SCHEDULER, noise, prompt(), config, rng=rng())
    first, pair = collect(rollout(guided, SCHEDULER, noise[:, :2], prompt(), config, rng=draws))
    second = generate(guided, SCHEDULER, noise[:, 2:], prompt(), config, rng=draws, cache=pair)
    assert torch.equal(torch.cat([*first, second], dim=1), whole)
    with pytest.raises(ValueError, match="cannot continue an unguided cache"):
        generate(guided, SCHEDULER, noise[:, 2:], prompt(), config, cache=pair.cond)


# ----------------------------------------------------------------------------------------- given videos, new prompts


def test_a_prefilled_cache_is_that_of_a_rollout_that_made_the_same(model):
    """Given the blocks that a rollout made, prefill returns the rollout's own cache: what follows is the same."""
    num_frames, config = shaped("sink and window")
    blocks, made = rollout(model, SCHEDULER, start(num_frames), prompt(), config, rng=rng()), []
    with torch.no_grad():
        try:
            while True:
                made.append(next(blocks))
        except StopIteration as end:
            own = end.value
    given = prefill(model, SCHEDULER, torch.cat(made, dim=1), prompt(), config)
    assert (given.frames, given.next_frame) == (own.frames, own.next_frame)
    for ours, theirs in zip(given.layers, own.layers, strict=True):
        torch.testing.assert_close(ours, theirs)
    more = prefill(model, SCHEDULER, start(2), prompt(), config, cache=given)
    assert more.next_frame == num_frames + 2
    with pytest.raises(ValueError, match="3 frames are not a whole number of blocks"):
        prefill(model, SCHEDULER, start(3), prompt(), config)


def test_a_cache_under_another_prompt(model):
    """recache keeps frames and place; under the old prompt it changes nothing that one layer can tell, under a new one
    every key and value that the prompt reaches."""
    num_frames, config = shaped("sink and window")
    video = start(num_frames).tanh()
    cache = prefill(model, SCHEDULER, video, prompt(), config)
    past = video[:, list(cache.frames)]
    same = recache(model, SCHEDULER, past, prompt(), config, cache)
    new = {"prompt_embeds": -prompt()["prompt_embeds"]}
    other = recache(model, SCHEDULER, past, new, config, cache)
    for anew in (same, other):
        assert (anew.frames, anew.next_frame) == (cache.frames, cache.next_frame)
    torch.testing.assert_close(same.layers[0], cache.layers[0])  # the first layer's keys see no past and no prompt
    torch.testing.assert_close(other.layers[0], cache.layers[0])
    assert (other.layers[1][0] - same.layers[1][0]).abs().max() > 1e-2
    whole = RolloutConfig(frames_per_block=2)  # nothing forgotten: the recomputed cache is the prefilled one
    old = prefill(model, SCHEDULER, video, prompt(), whole)
    anew, fresh = recache(model, SCHEDULER, video, new, whole, old), prefill(model, SCHEDULER, video, new, whole)
    for ours, theirs in zip(anew.layers, fresh.layers, strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match=r"past must be the 3 frames \[0, 6, 7\], got 8."):
        recache(model, SCHEDULER, video, prompt(), config, cache)


def test_a_given_past_is_as_noisy_as_a_made_one(model):
    """Under context noise prefill and recache remember blocks noised to that level, and say so; and keep no graph."""
    config, video = RolloutConfig(frames_per_block=2, context_noise=150), start(4).tanh()
    spy = Spy(model)
    cache = prefill(spy, SCHEDULER, video, prompt(), config, rng=rng())
    recache(spy, SCHEDULER, video, prompt(), config, cache, rng=rng())
    fresh = rng()
    expected = [SCHEDULER.add_noise(block, randn(block.shape, fresh), 0.15) for block in video.split(2, dim=1)]
    assert len(spy.remembered) == 4 and not any(call.graph for call in spy.remembered)
    for call, x in zip(spy.remembered, expected * 2, strict=True):
        assert call.t == 0.15
        torch.testing.assert_close(call.x, x)


def test_frames_far_down_the_video_are_read_anew_as_in_a_short_one(model):
    """A sink that follows does so for the first block after it too, before any window is there: what is read anew is
    the same however late it is, and is not where the sink stays behind."""
    past = start(6).tanh()

    def values(late, follows=True):
        config = RolloutConfig(frames_per_block=2, sink_frames=2, window_frames=4, sink_follows=follows)
        frames = (0, 1, *range(late + 2, late + 6))
        held = replace(config.empty_cache(), frames=frames, next_frame=late + 6)
        return [v for _, v in recache(model, SCHEDULER, past, prompt(), config, held).layers]

    for near, far in zip(values(0), values(100), strict=True):
        torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)
    assert (values(0, False)[-1] - values(100, False)[-1]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------------- UniPC


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_unipc_is_the_solver_of_diffusers(model, shift):
    """A rollout of two blocks with `UniPC` equals diffusers' own loop, run once for each block."""
    diffusers = pytest.importorskip("diffusers")
    scheduler, steps = FlowMatchScheduler(shift), [1000 * (8 - i) / 8 for i in range(8)]
    config = RolloutConfig(steps, frames_per_block=2)
    noise = start(4)
    video = generate(model, scheduler, noise, prompt(), config, sampler=UniPC(scheduler, steps))
    cache, expected = KVCache(), []
    with torch.no_grad():
        for x in noise.split(2, dim=1):
            solver = diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
            )
            solver.set_timesteps(sigmas=torch.tensor(steps).numpy() / 1000)
            solver.set_begin_index(0)
            for i, t in enumerate(solver.timesteps):
                flow = model(x, scheduler.denoising_times(steps)[i], prompt(), cache)
                x = solver.step(flow, t, x, return_dict=False)[0]
            expected.append(x)
            cache = model.remember(x, 0.0, prompt(), cache)
    torch.testing.assert_close(video, torch.cat(expected, dim=1), atol=2e-4, rtol=1e-3)


def test_unipc_is_closer_to_the_end_of_the_ode_than_euler():
    """For Gaussian data the ODE ends at mean + std * noise exactly: in 50 steps UniPC misses it by less than half.

    (In 8 steps at shift 5 it is no better: the last step, from t = 0.42, is all error, and of first order in both.)
    """
    mean, std, steps = 0.5, 0.3, [1000 * (50 - i) / 50 for i in range(50)]

    class Gaussian:
        def __call__(self, x_t, t, cond, cache):
            variance = ((1 - t) * std) ** 2 + t**2
            x0 = mean + (1 - t) * std**2 / variance * (x_t - (1 - t) * mean)
            return SCHEDULER.to_flow(x0, x_t, t)

        def remember(self, x, t, cond, cache):
            return cache.extend([], x.shape[1])

    noise, config = start(4), RolloutConfig(steps, 2)
    missed = {
        name: (generate(Gaussian(), SCHEDULER, noise, {}, config, sampler=sampler) - (mean + std * noise)).abs().mean()
        for name, sampler in {"unipc": UniPC(SCHEDULER, steps), "euler": euler}.items()
    }
    assert missed["unipc"] < 0.5 * missed["euler"] and missed["euler"] > 1e-3


@every_shape
def test_a_watched_rollout_is_the_rollout(model, shape):
    """The course's pictures tell what happened: every call in order, its guess, and what the cache held in it."""
    num_frames, config = shaped(shape)
    noise, cond, spy = start(num_frames), prompt(), Spy(model)
    moments = watch(spy, SCHEDULER, noise, cond, config, rng=rng())
    video = generate(model, SCHEDULER, noise, cond, config, rng=rng())
    calls = [moment for moment in moments if moment.step is not None]
    assert [moment.frames[0] for moment in calls] == [call.frame for call in spy.seen]
    assert [moment.held for moment in calls] == [call.cache.frames for call in spy.seen]
    assert all(torch.equal(moment.noisy, call.x[0]) for moment, call in zip(calls, spy.seen, strict=True))
    finished = [moment for moment in moments if moment.step is None]
    assert torch.equal(torch.cat([moment.guess for moment in finished]), video[0])
    assert [moment.after for moment in finished[:-1]] == [moment.held for moment in finished[1:]]
