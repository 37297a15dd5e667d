"""The rest of the family: pasts made of data, CausVid's single call, the GAN and its judge; one train.py for all."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_rollout import BATCH, FRAME, SCHEDULER, TIMES, prompt, shaped, start, tiny_model
from tiny_runs import assert_same, final_state, make_weights, options

import train
from discriminator import Discriminator
from dynamic_video_sf import (
    DataPast,
    RolloutConfig,
    SelfForcingConfig,
    data_past_rollout,
    gan_step,
    generate,
    one_call_video,
    predict_x0,
    prefill,
    rollout,
    score_times,
    slope_penalty,
)
from experiments import run
from flow_match import FlowMatchScheduler
from kv_cache import KVCache, block_sizes
from randomness import generator, generators, randn

ALL = {"sink_frames": 0, "window_frames": None}  # a cache that forgets nothing
OBJECTIVES = ("sf_dmd", "sf_sid", "sf_gan", "tf_dmd", "df_dmd", "causvid")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def clip(num_frames, name="data"):
    """Data [B, F, C, H, W] that no model made."""
    return randn((BATCH, num_frames, *FRAME), generators(0, name, samples=range(BATCH))).tanh()


def settings(num_frames, config, **more):
    lengths = dict.fromkeys(("gradient_frames", "min_num_frames", "max_num_frames"), num_frames)
    return SelfForcingConfig(config, **(lengths | more))


def streams(name="rng"):
    return {"rng": generators(0, name, samples=range(BATCH)), "shared_rng": generator(0, name)}


# ------------------------------------------------------------------------------------------------- pasts made of data


@pytest.mark.parametrize("shape", ["even", "uneven", "window", "sink and window"])
def test_a_past_of_data_is_teacher_forcing(model, shape):
    """One step on the data's past equals the masked teacher-forcing call on noise, whatever the student made before."""
    num_frames, config = shaped(shape, denoising_steps=(1000,))
    noise, data = start(num_frames), clip(num_frames)
    with torch.no_grad():
        video, _ = data_past_rollout(
            model, SCHEDULER, noise, prompt(), settings(num_frames, config), data=data, **streams()
        )
        flow = model(
            noise, 1.0, prompt(), frames_per_block=config.frames_per_block, clean=data,
            sink_frames=config.sink_frames, window_frames=config.window_frames,
        )  # fmt: skip
    torch.testing.assert_close(video, noise - flow, atol=1e-5, rtol=1e-5)


def test_only_the_block_at_hand_is_the_students(model):
    """The cache after a rollout holds the data block by block; the student's own rollout holds something else."""
    num_frames, config = shaped("even")
    data, caches = clip(num_frames), {}
    for name, network in {"data": DataPast(model, SCHEDULER, data), "own": model}.items():
        blocks = rollout(network, SCHEDULER, start(num_frames), prompt(), config, rng=streams()["rng"])
        with torch.no_grad():
            while True:
                try:
                    next(blocks)
                except StopIteration as end:
                    caches[name] = end.value
                    break
    expected = KVCache()
    with torch.no_grad():
        for block in data.split(block_sizes(num_frames, config.frames_per_block), dim=1):
            expected = model.remember(block, 0.0, prompt(), expected)
    for got, other, want in zip(caches["data"].layers, caches["own"].layers, expected.layers, strict=True):
        torch.testing.assert_close(got, want)
        assert (other[0] - want[0]).abs().max() > 0.1


class Spy:
    """A generator that notes what it is to remember."""

    def __init__(self):
        self.seen = []

    def remember(self, x, t, cond, cache):
        self.seen.append((x, t))
        return cache.extend([], x.shape[1])


def test_a_noisy_past_has_a_level_of_its_own_for_every_block(model):
    """noisy=True: remembered is the data at a warped uniform time per sample and block, told to the model."""
    data, spy = clip(6), Spy()
    past, cache = DataPast(spy, SCHEDULER, data, noisy=True, rng=streams()["rng"]), KVCache()
    for block in data.split(2, dim=1):
        cache = past.remember(torch.zeros_like(block), 0.0, prompt(), cache)
    times = torch.stack([t for _, t in spy.seen])
    assert times.shape == (3, BATCH) and len(times.unique()) == 3 * BATCH and times.min() > 0 and times.max() < 1
    for (x, t), block in zip(spy.seen, data.split(2, dim=1), strict=True):
        noise = (x - (1 - t.reshape(-1, 1, 1, 1, 1)) * block) / t.reshape(-1, 1, 1, 1, 1)
        assert 0.5 < noise.std() < 1.5

    u = SCHEDULER.warp(torch.rand(4000, generator=torch.Generator().manual_seed(1)))
    many = DataPast(spy, SCHEDULER, data[:1, :2].expand(4000, -1, -1, -1, -1), True, torch.Generator().manual_seed(0))
    many.remember(many.data, 0.0, prompt(), KVCache())
    torch.testing.assert_close(spy.seen[-1][1].quantile(torch.tensor([0.2, 0.5, 0.8])), u.quantile(
        torch.tensor([0.2, 0.5, 0.8])), atol=0.03, rtol=0)  # fmt: skip


@pytest.mark.parametrize("noisy", [False, True])
def test_a_rollout_on_data_draws_from_the_streams_that_it_is_given(model, noisy):
    """Its video is the same again from the same streams, whatever was drawn from torch's own generator between."""
    config = settings(6, RolloutConfig(frames_per_block=2, context_noise=100), exit_rule="random")

    def video(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return data_past_rollout(
                model, SCHEDULER, start(6), prompt(), config, data=clip(6), noisy=noisy, **streams()
            )  # fmt: skip

    (once, exit_step), others = video(0), [video(seed) for seed in (1, 2, 3, 4)]
    assert all(torch.equal(once, again) and exit_step == other for again, other in others)


def test_every_block_of_a_one_call_video_has_a_level_of_its_own():
    """Frames of a block share it, blocks of a clip do not."""
    seen = []

    def oracle(x_t, t, cond, **options):
        seen.append(t)
        return x_t

    config = settings(6, RolloutConfig(frames_per_block=2))
    for draw in range(8):
        one_call_video(oracle, SCHEDULER, start(6), prompt(), config, data=clip(6), **streams(f"draw {draw}"))
    levels = torch.cat(seen)
    assert torch.equal(levels[:, ::2], levels[:, 1::2])
    assert any(len(clip.unique()) > 1 for clip in levels)


def test_a_past_of_data_has_the_context_noise(model):
    """Under context noise the data are remembered as the student's own blocks would be: at the time that is told."""
    data, spy = clip(6), Spy()
    past, cache, rng = DataPast(spy, SCHEDULER, data, rng=streams()["rng"]), KVCache(), streams()["rng"]
    for block in data.split(3, dim=1):
        cache = past.remember(torch.zeros_like(block), 0.3, prompt(), cache)
        x, t = spy.seen[-1]
        assert t == 0.3
        torch.testing.assert_close(x, 0.7 * block + 0.3 * randn(block.shape, rng))


@pytest.mark.parametrize("memory", [{}, {"sink_frames": 1, "window_frames": 3}, {"window_frames": 3}], ids=str)
def test_a_given_first_frame_is_a_clean_past(model, memory):
    """Image-to-video: what is remembered of the image is what a longer clip that begins with it leaves of its first
    frame, and every guess after it is the masked call's whose clean clip is the image and what was made since."""
    config, image = RolloutConfig(frames_per_block=(1, 3), **memory), clip(1)
    cache = prefill(model, SCHEDULER, image, prompt(), config)
    assert (cache.frames, cache.next_frame) == ((0,), 1)
    with torch.no_grad():
        longer = prefill(model, SCHEDULER, torch.cat([image, clip(3)], dim=1), prompt(), replace(config, **ALL))
    for own, all_four in zip(cache.layers, longer.layers, strict=True):
        for ours, theirs in zip(own, all_four, strict=True):
            torch.testing.assert_close(ours, theirs[:, : ours.shape[1]])

    seen = {}  # denoising step -> what every block looked like there, and what it was taken for
    video = generate(
        model, SCHEDULER, start(6), prompt(), config, cache=cache, rng=streams()["rng"],
        observe=lambda step, t, x_t, x0, frame: seen.setdefault((step, t), []).append((x_t, x0)),
    )  # fmt: skip
    whole = torch.cat([image, video], dim=1)
    assert len(seen) == len(TIMES)
    for (_, t), blocks in seen.items():
        x_t, x0 = (torch.cat(parts, dim=1) for parts in zip(*blocks, strict=True))
        noisy = torch.cat([torch.zeros_like(image), x_t], dim=1)  # nobody looks at the image's noisy half
        with torch.no_grad():
            flow = model(noisy, t, prompt(), frames_per_block=(1, 3), clean=whole, **memory)[:, 1:]
        torch.testing.assert_close(x0, x_t - t * flow, atol=1e-5, rtol=1e-5)


def test_data_must_reach_as_far_as_the_rollout(model):
    with pytest.raises(ValueError, match="The data end before frame 6: set max_num_frames to less."):
        config = settings(9, RolloutConfig(frames_per_block=3))
        data_past_rollout(model, SCHEDULER, start(9), prompt(), config, data=clip(4), **streams())


# --------------------------------------------------------------------------------------------------------- one call


def test_one_call_of_an_oracle_is_the_data():
    """A model that knows the data returns it from every level: noising and cleaning use one convention of time."""
    data, heard = clip(6), {}

    def oracle(x_t, t, cond, **options):
        heard.update(options, t=t)
        return SCHEDULER.to_flow(data, x_t, t)

    config = settings(6, RolloutConfig(frames_per_block=2, sink_frames=1, window_frames=2))
    video, exit_step = one_call_video(oracle, SCHEDULER, start(6), prompt(), config, data=data, **streams())
    torch.testing.assert_close(video, data, atol=1e-5, rtol=1e-5)
    assert exit_step is None
    assert (heard["frames_per_block"], heard["sink_frames"], heard["window_frames"]) == (2, 1, 2)
    t = heard["t"]
    assert t.shape == (BATCH, 6) and torch.equal(t[:, ::2], t[:, 1::2]) and len(t.unique()) > 1
    assert {round(x, 4) for x in t.flatten().tolist()} <= {round(x, 4) for x in [*TIMES, 0]}


def test_one_call_sees_the_others_as_noisy_as_they_are(model):
    """The clip is the block-causal call on the noised data; each of the levels is drawn, and none, as inference will
    find the past."""
    config, data, drawn = settings(6, RolloutConfig(frames_per_block=3)), clip(6), set()
    for k in range(16):
        seen = []
        hook = model.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given))
        given = streams(f"draw {k}")
        video, _ = one_call_video(model, SCHEDULER, start(6), prompt(), config, data=data, **given)
        hook.remove()
        x_t, t, _ = seen[0]
        torch.testing.assert_close(x_t, SCHEDULER.add_noise(data, start(6), t))
        causal = lambda *a: model(*a, frames_per_block=3)  # noqa: E731
        torch.testing.assert_close(video, predict_x0(causal, SCHEDULER, x_t, t, prompt()))
        assert video.requires_grad and torch.equal(video[t == 0], data[t == 0])
        drawn |= {round(x, 3) for x in t.flatten().tolist()}
    assert drawn == {round(x, 3) for x in [*TIMES, 0]}


def test_score_times_need_an_exit(model):
    config = settings(6, RolloutConfig(), ts_schedule=True)
    video, exit_step = one_call_video(model, SCHEDULER, start(6), prompt(), config, data=clip(6), **streams())
    with pytest.raises(ValueError, match="this objective has none"):
        score_times(SCHEDULER, config, exit_step, len(video), None)


# -------------------------------------------------------------------------------------------------------------- GAN


def test_a_score_is_no_discriminator(model):
    """The critic of another objective would pass for one, as its flow can be averaged too."""
    with pytest.raises(ValueError, match="a logit per clip, not .*discriminator.py"):
        next(gan_step(
            *(model, None, model, SCHEDULER, start(6), prompt(), prompt(), settings(6, RolloutConfig())),
            data=clip(6), **streams(),
        ))  # fmt: skip


def test_slope_penalty_is_the_squared_gradient_of_a_straight_judge():
    """For D(x) = w x, the mean over noise is |w|^2 whatever sigma."""
    weight = torch.randn(8, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(20000, 8)
    for sigma in (0.01, 1.0):
        penalty = slope_penalty(lambda x: x @ weight, x, x @ weight, sigma, torch.Generator().manual_seed(1))
        torch.testing.assert_close(penalty, weight.square().sum(), rtol=0.05, atol=0)


class Point(torch.nn.Module):
    """A student whose frame is one learned number, whatever it starts from."""

    def __init__(self):
        super().__init__()
        self.at = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x_t, t, cond, cache):
        return SCHEDULER.to_flow(self.at.expand_as(x_t), x_t, t)

    def remember(self, x, t, cond, cache):
        return cache.extend([], x.shape[1])


class Judge(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.SiLU(), torch.nn.Linear(32, 1))

    def forward(self, x_t, t, cond):
        return self.net(torch.stack([x_t.flatten(), t], dim=1))[:, 0]


class Squeeze(torch.nn.Module):
    """A student whose every frame is tanh(weight x_t), whatever came before."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.8))

    def forward(self, x_t, t, cond, cache):
        return SCHEDULER.to_flow(torch.tanh(self.weight * x_t), x_t, t)

    def remember(self, x, t, cond, cache):
        return cache.extend([], x.shape[1])


class Bowl(torch.nn.Module):
    """A judge: gain (1 + t) prompt |x_t|^2 / 24; curved, so that a slope in one place is not that in another."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x_t, t, cond):
        return self.gain * (1 + t) * cond["prompt"] * x_t.square().sum(dim=(1, 2, 3, 4)) / 24


def softplus(x):
    return (1 + x.exp()).log()


@pytest.mark.parametrize("relativistic", [True, False])
@pytest.mark.parametrize("fresh_rollouts", [True, False])
def test_a_gan_step_is_its_formula(relativistic, fresh_rollouts):
    """Each loss, and its gradient in both networks, against the formula written out, from the same draws: the last
    frame of two, both clips noised alike, R1 at the data and R2 at the video, nothing but the video's own way
    differentiated."""
    student, judge, cond = Squeeze(), Bowl(), {"prompt": 0.4}
    weight, gain = student.weight, judge.gain
    config = settings(
        2, RolloutConfig((1000,), 1), gradient_frames=1, min_score_time=0.2, critic_steps=2,
        fresh_rollouts=fresh_rollouts,
    )  # fmt: skip
    noise, data, r1, r2, sigma = start(2), clip(3)[:, 1:], 0.7, 0.3, 0.2
    losses = gan_step(
        student, None, judge, SCHEDULER, noise, cond, {"prompt": 9.0}, config, data=data, relativistic=relativistic,
        r1_weight=r1, r2_weight=r2, sigma=sigma, **streams(),
    )  # fmt: skip

    rng = streams()["rng"]

    def logits(x, t):
        return gain * (1 + t) * 0.4 * x.square().sum(dim=(1, 2, 3, 4)) / 24

    def video(noise):
        randn((BATCH, 1, *FRAME), rng)  # drawn to remember the first frame, at a level of 0
        return torch.tanh(weight * noise[:, 1:])

    def noised(*clips):
        t, e = SCHEDULER.sample_times(BATCH, rng, low=0.2), randn((BATCH, 1, *FRAME), rng)
        wide = t.reshape(-1, 1, 1, 1, 1)
        return t, *((1 - wide) * x + wide * e for x in clips)

    def slope(x, t):
        moved = x + sigma * randn(x.shape, rng)
        return ((logits(moved, t) - logits(x, t)) / sigma).square().mean()

    def agree(found, network, expected):
        assert found[0] == network
        torch.testing.assert_close(found[1], expected)
        gradients = (torch.autograd.grad(loss, (weight, gain), allow_unused=True) for loss in (found[1], expected))
        for ours, formula in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, formula)

    made = video(noise)
    t, fake, real = noised(made, data[:, 1:])
    gap = logits(fake, t) - (logits(real, t).detach() if relativistic else 0)
    agree(next(losses), "generator", softplus(-gap).mean())
    for _ in range(2):
        made = (video(randn(noise.shape, rng)) if fresh_rollouts else made).detach()
        t, fake, real = noised(made, data[:, 1:])
        if relativistic:
            expected = softplus(logits(fake, t) - logits(real, t)).mean()
        else:
            expected = softplus(-logits(real, t)).mean() + softplus(logits(fake, t)).mean()
        expected = expected + r1 / 2 * slope(real, t) + r2 / 2 * slope(fake, t)
        agree(next(losses), "critic", expected)
    assert next(losses, None) is None


def test_a_gan_compares_at_the_times_of_its_own_rollout():
    """With both bounds on, each loss is taken between the exit of the rollout that it judges and the next step."""
    config = settings(2, RolloutConfig(frames_per_block=1), critic_steps=3, ts_schedule=True, ts_schedule_max=True)
    student, judge, calls, times, exited = Squeeze(), Bowl(), [], [], set()
    student.register_forward_pre_hook(lambda _, given: calls.append(given[3].next_frame))
    judge.register_forward_pre_hook(lambda _, given, told: times.append(told["t"]), with_kwargs=True)
    for seed in range(8):
        given = start(2), {"prompt": 0.4}, {"prompt": 9.0}, config
        for _ in gan_step(student, None, judge, SCHEDULER, *given, data=clip(2), **streams(f"gan {seed}")):
            exit_step = calls.count(0) - 1
            high, low = (SCHEDULER.warp(edge / 1000) for edge in (1000, 750, 500, 250, 0)[exit_step : exit_step + 2])
            t = torch.stack(times)
            assert max(low, 0.02) - 1e-6 <= t.min() and t.max() <= min(high, 0.98) + 1e-6
            exited.add(exit_step)
            calls.clear(), times.clear()
    assert exited == {0, 1, 2, 3}


@pytest.mark.parametrize("relativistic", [True, False])
@pytest.mark.parametrize("fresh_rollouts", [True, False])
def test_the_gan_brings_a_student_to_the_data(relativistic, fresh_rollouts):
    """Data at 2, student from 0: it arrives (to 0.3) and stays; each loss trains its own network."""
    torch.manual_seed(0)
    rng, schedule = generator(0, "gan"), FlowMatchScheduler(1.0)
    config = settings(1, RolloutConfig((1000,), 1), critic_steps=2, fresh_rollouts=fresh_rollouts)
    networks = {"generator": Point(), "critic": Judge()}
    optimizers = {name: torch.optim.Adam(n.parameters(), 0.02, betas=(0.0, 0.9)) for name, n in networks.items()}
    data, places = torch.full((64, 1, 1, 1, 1), 2.0), []
    for _ in range(300):
        noise = randn(data.shape, rng)
        step = gan_step(
            *(networks["generator"], None, networks["critic"], schedule, noise, {}, {}, config),
            data=data, relativistic=relativistic, rng=rng, shared_rng=rng,
        )  # fmt: skip
        for name, loss in step:
            for network in networks.values():
                network.zero_grad()
            loss.backward()
            assert name == "generator" or networks["generator"].at.grad is None
            optimizers[name].step()
        places.append(networks["generator"].at.item())
    assert abs(sum(places[-50:]) / 50 - 2) < 0.3


def test_a_discriminator_reads_the_layers_it_is_told_to(model):
    """Its logits depend on the features of the chosen layers, and on nothing behind them."""
    torch.manual_seed(0)
    judge, x, t = Discriminator(model, layers=(0,)), clip(4), torch.tensor([0.3, 0.7])
    with torch.no_grad():
        before = judge(x, t, prompt())
        assert before.shape == (BATCH,) and before.std() > 1e-3
        saved = {name: p.clone() for name, p in model.state_dict().items()}
        for parameter in (*model.blocks[1].parameters(), *model.head.parameters()):
            parameter.mul_(2)
        assert torch.equal(judge(x, t, prompt()), before)
        for parameter in model.blocks[0].parameters():
            parameter.mul_(2)
        assert not torch.allclose(judge(x, t, prompt()), before)
        model.load_state_dict(saved)
    assert not judge.hidden  # nothing of a clip outlives its call
    with pytest.raises(ValueError, match="layers must lie between 0 and 1, got"):
        Discriminator(model, layers=(2,))


def test_a_discriminator_is_its_formula(model):
    """The backbone is asked about the very clip, time and prompt; of each chosen layer a learned token reads what came
    out, and the head sees all of them. Every register, every reader and every layer that is read learns."""
    torch.manual_seed(0)
    judge, told, made = Discriminator(model, layers=(0, 1)), [], []
    given = clip(4), torch.tensor([0.3, 0.7]), prompt()
    hooks = [block.register_forward_hook(lambda *seen: made.append(seen[-1][0])) for block in model.blocks]
    hooks.append(model.register_forward_pre_hook(lambda _, seen: told.append(seen)))
    logits = judge(*given)
    for hook in hooks:
        hook.remove()
    assert [x is own for x, own in zip(told[0], given, strict=True)] == [True] * 3 and len(told) == 1
    tokens = []
    for reader, hidden in zip(judge.readers, made, strict=True):
        token = reader.register.expand(BATCH, 1, -1)
        token = token + reader.cross_attn(token, reader.norm(hidden.flatten(1, 2)), None, model.attention)
        tokens.append((token + reader.ffn(reader.norm_ffn(token)))[:, 0])
    torch.testing.assert_close(logits, judge.head(torch.cat(tokens, dim=1))[:, 0])
    learning = [*judge.readers.parameters(), *model.blocks.parameters()]
    assert all(gradient is not None for gradient in torch.autograd.grad(logits.sum(), learning, allow_unused=True))


def test_a_discriminator_scales_the_references_layers():
    class Deep:
        def __init__(self, depth):
            from tiny_causal_wan import WanConfig

            self.config = WanConfig(dim=24, ffn_dim=48, num_layers=depth)
            self.blocks = [torch.nn.Identity() for _ in range(depth)]

    def layers(depth):
        backbone = torch.nn.Module()
        backbone.config, backbone.blocks = Deep(depth).config, Deep(depth).blocks
        return Discriminator(backbone).layers

    assert layers(30) == (13, 21, 29)  # 1.3B, as the reference
    assert layers(6) == (1, 3, 5)
    assert layers(1) == (0,)


# --------------------------------------------------------------------------------------------------------- train.py


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights"))


TURNING = "sf_dmd objective.student_video=tutorial.lesson_15_arrow_keys.solutions.turning_rollout"
TURNING += " training.gradient_frames=6 training.min_num_frames=6"  # clips of 6 to 12 frames, most of which turn


@pytest.mark.parametrize("objective", [*OBJECTIVES, pytest.param(TURNING, id="a student's own rollout")])
def test_every_objective_trains_and_resumes(objective, weights, tmp_path, monkeypatch):
    """Through the one train.py: both networks move, and a run that was stopped ends as one that was not."""
    monkeypatch.setattr(train, "film_strip", lambda *_, **__: None)
    more = [
        *f"objective={objective}".split(),
        "training.max_num_frames=12",
        "training.num_steps=3",
        "training.checkpoint_every=1",
    ]
    train.main(options("self_forcing", tmp_path / "whole", weights, *more))
    loop = train.training_loop

    def stopping(run):
        for values in loop(run):
            yield values
            if run.step == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "training_loop", stopping)
        with pytest.raises(KeyboardInterrupt):
            train.main(options("self_forcing", tmp_path / "broken", weights, *more))
    train.main(options("self_forcing", tmp_path / "broken", weights, *more))
    whole, broken = final_state(tmp_path / "whole"), final_state(tmp_path / "broken")
    assert_same(whole, broken)

    trained = train.build(train.load_config(options("self_forcing", "unused", weights, *more)))
    for name in ("generator", "critic"):
        before = trained.networks[name].state_dict()
        moved = [key for key, x in whole[f"{name}_state_dict"].items() if not torch.equal(x, before[key])]
        parts = ("readers", "head", "backbone.blocks") if "readers.0.register" in before else ("blocks", "head")
        assert all(any(key.startswith(part) for key in moved) for part in parts)
    assert (trained.teacher is None) == (objective == "sf_gan")


ROLLOUT = 2 * (4 * 4 * 3 + 3 * 3)  # two clips, four blocks of three frames in four calls; three blocks are remembered
WHOLE = 2 * 12  # two clips in one call
COSTS = {
    "sf_dmd": ROLLOUT + 2 * WHOLE + 3 * WHOLE + 3 * 3 * WHOLE,  # exits back, three scores, three critic steps
    "sf_sid": ROLLOUT + 2 * WHOLE + 3 * WHOLE + 2 * 3 * WHOLE + 3 * 3 * WHOLE,  # and back through the scores
    "sf_gan": ROLLOUT + 2 * WHOLE + 4 * WHOLE + 3 * 4 * 3 * WHOLE,  # real, fake and back; both, and both moved
    "tf_dmd": ROLLOUT + 2 * WHOLE + 3 * WHOLE + 3 * 3 * WHOLE,
    "df_dmd": ROLLOUT + 2 * WHOLE + 3 * WHOLE + 3 * 3 * WHOLE,
    "causvid": 3 * WHOLE + 3 * WHOLE + 3 * 3 * WHOLE,
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_a_step_costs(objective, weights):
    """Network evaluations in frames, forward 1 and backward 2, teacher and critic included."""
    overrides = options("self_forcing", "unused", weights, f"objective={objective}", "training.max_num_frames=12")
    trained = train.build(train.load_config(overrides))
    loop = train.training_loop(trained)
    assert [next(loop)["evaluations"] for _ in range(2)] == [COSTS[objective]] * 2


def test_the_main_table_is_at_equal_compute():
    """The steps of every row cost what those of sf_dmd do, to one percent; teacher forcing reads each frame twice."""
    plan = run.load_plan("main_table")
    trained = {one.row: one.overrides(plan) for one in run.all_runs("main_table", plan) if not one.given(plan)}
    rows = {**trained, "sf_dmd": run.load_plan("two_by_two").common}
    steps = {row: int(next(o for o in own if "num_steps" in o).split("=")[1]) for row, own in rows.items()}
    costs = COSTS | {"tf": 6 * WHOLE, "df": 3 * WHOLE, "sf_gan_slow": COSTS["sf_gan"]}
    spent = {row: steps[row] * costs[row] for row in steps}
    assert all(abs(cost / spent["sf_dmd"] - 1) < 0.01 for cost in spent.values()), spent


def test_groups_reach_their_own_stage_alone(monkeypatch):
    """init= and objective= bring settings of one stage: in a row of stages the others must not get them."""
    seen = {}
    monkeypatch.setattr(
        train, "fit_once", lambda cfg: seen.update({cfg.training.output_dir.split("/")[-1]: cfg}) or Path("made")
    )
    train.main(["experiment=from_scratch_cpu", "init=diffusion_forcing", "objective=tf_dmd"])
    assert {"teacher", "teacher_2", "init", "self_forcing", "self_forcing_2"} <= seen.keys()
    for name, cfg in seen.items():
        assert (cfg.training.init == "diffusion_forcing") == (name == "init")
        assert ("data" in cfg.objective.needs) == name.startswith("self_forcing")


def test_what_a_step_on_data_costs(weights):
    """The teacher 3 a frame; teacher forcing twice that, as it reads every frame clean and noisy."""
    for stage, cost in {"teacher": 3 * WHOLE, "init": 6 * WHOLE}.items():
        overrides = options(stage, "unused", weights, "training.short_clip_steps=0", "training.short_clip_share=0")
        assert next(train.training_loop(train.build(train.load_config(overrides))))["evaluations"] == cost


def first_losses(objective, weights, *more):
    """A run of two clips of 12 frames, and its first step's losses, not yet computed."""
    command = [f"objective={objective}", "training.max_num_frames=12", *more]
    run = train.build(train.load_config(options("self_forcing", "unused", weights, *command)))
    rng = generators(run.config.seed, 0, "train", samples=range(2))
    return run, train.self_forcing_losses(run, range(2), rng, lambda **_: None)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_an_objectives_networks_are_told(objective, weights, monkeypatch):
    """The student remembers its own clean blocks; forced, the data, clean or each block as noisy as it is told;
    CausVid's nothing. Student and critic read the prompts, the teacher also none."""
    run, losses = first_losses(objective, weights)
    student, remember, kept, read = run.networks["generator"], run.networks["generator"].remember, [], {}
    monkeypatch.setattr(student, "remember", lambda x, t, *rest: kept.append((x, t)) or remember(x, t, *rest))
    networks = {**run.networks, "teacher": run.teacher}
    for name, network in networks.items():
        if network:
            backbone = getattr(network, "backbone", network)
            backbone.register_forward_pre_hook(
                lambda _, given, name=name: read.setdefault(name, []).append(given[2]["prompt_embeds"])
            )
    for _ in range(2):
        next(losses)

    batch = run.data.batch(range(2))
    prompts, none = run.encoder(batch["prompts"])["prompt_embeds"], run.encoder.null(2)["prompt_embeds"]
    assert all(torch.equal(x, prompts) for name in run.networks for x in read[name])
    if run.teacher:
        assert len(read["teacher"]) == 2
        assert torch.equal(read["teacher"][0], prompts) and torch.equal(read["teacher"][1], none)

    blocks = batch["video"].split(3, dim=1)[:3]
    assert len(kept) == (0 if objective == "causvid" else 3)
    if objective == "df_dmd":
        times = torch.stack([t for _, t in kept])
        assert times.shape == (3, 2) and len(times.unique()) == 6 and 0 < times.min() < times.max() < 1
        for (x, t), block in zip(kept, blocks, strict=True):
            wide = t.reshape(-1, 1, 1, 1, 1)
            assert ((x - (1 - wide) * block) / wide).std() == pytest.approx(1, abs=0.2)
    else:
        assert all(t == 0 for _, t in kept)
        same = [torch.equal(x, block) for (x, _), block in zip(kept, blocks, strict=False)]
        assert same == [objective == "tf_dmd"] * len(kept)


def test_the_numbers_of_sid_and_of_the_gan():
    """With these signs a penalty penalises, and SiD's second term is the paper's."""
    sid, gan = (train.make_step(train.load_config([f"objective={name}"]).objective) for name in ("sf_sid", "sf_gan"))
    assert sid.keywords["loss"].keywords == {"alpha": 1.0}
    told = {name: gan.keywords[name] for name in ("relativistic", "r1_weight", "r2_weight", "sigma")}
    assert told == {"relativistic": True, "r1_weight": 1.0, "r2_weight": 1.0, "sigma": 0.1}


@pytest.mark.parametrize("objective", ["sf_sid", "sf_gan"])
def test_a_critic_steps_by_its_own_loss_alone(objective, weights):
    """The generator's loss of these two leaves a gradient in the critic, which is gone when the critic's turn comes."""
    still = ["training.lr=0.0", "training.critic_lr=0.0", "training.critic_steps=1"]
    run, losses = first_losses(objective, weights, *still)
    critic = list(run.networks["critic"].parameters())
    (_, first), (_, second) = next(losses), next(losses)
    left, own = (torch.autograd.grad(loss, critic, allow_unused=True) for loss in (first, second))
    norms = [torch.cat([g.flatten() for g in found if g is not None]).norm().item() for found in (left, own)]
    said = next(train.training_loop(first_losses(objective, weights, *still)[0]))
    assert norms[0] > 1e-6 and said["critic_grad_norm"] == pytest.approx(norms[1], rel=1e-4)


def test_a_whole_clip_is_one_block(weights):
    """experiment=bidirectional: the student makes all the frames at once, with no past, as its teacher does."""
    command = options("self_forcing", "unused", weights, "experiment=bidirectional")
    run, seen = train.build(train.load_config(command)), []
    run.networks["generator"].register_forward_pre_hook(lambda _, given: seen.append((*given, torch.is_grad_enabled())))
    rng = generators(0, 0, "train", samples=range(2))
    next(train.self_forcing_losses(run, range(2), rng, lambda **_: None))
    times = run.scheduler.denoising_times(run.config.denoising_steps)
    assert [(x_t.shape[1], t, cache.frames, graph) for x_t, t, _, cache, graph in seen] == [
        (12, t, (), t == times[-1]) for t in times
    ]


MISTAKES = {
    "objective=nothing": r"There is no objective/nothing; known are .*sf_dmd.*",
    "objective.los=dynamic_video_sf.sid_loss": r"There is no option objective.los; did you mean objective.loss\?",
    "objective.loss=dynamic_video_sf.no_loss": r".*dynamic_video_sf.no_loss.*",
    "objective.step=dynamic_video_sf.dmd_loss": r"dynamic_video_sf.dmd_loss does not go with these options .*",
    "objective=tf_dmd training.max_num_frames=24": r"This objective starts from data of 12 frames: set .* to no more.",
    "init=consistency": r"init= says how stage=init learns; stage=self_forcing has none.",
    "stage=init objective=sf_sid": r"objective= says how stage=self_forcing learns; stage=init has none.",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence(mistake, weights, tmp_path):
    stage = "init" if "stage=init" in mistake else "self_forcing"
    more = [part for part in mistake.split() if not part.startswith("stage")]
    with pytest.raises(ValueError) as error:
        train.main([*options(stage, tmp_path / "run", weights), *more])
    assert re.fullmatch(MISTAKES[mistake], str(error.value)), str(error.value)
