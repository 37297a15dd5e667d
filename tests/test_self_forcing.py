"""Algorithm 1: what it yields in which order, which frames and times it scores, and where it takes a student."""

from collections import Counter

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from dynamic_video_sf import (
    Guided,
    RolloutConfig,
    SelfForcingConfig,
    dmd_loss,
    flow_matching_loss,
    generate,
    score_times,
    self_forcing_step,
    sid_loss,
    training_rollout,
)
from experiments.gaussian_mixture import Mixture, distil
from flow_match import FlowMatchScheduler
from randomness import generator, generators, randn
from settings import make_step

SCHEDULER = FlowMatchScheduler()
BATCH, FRAME = 3, (1, 2, 2)
COND, UNCOND = {"shift": 0.5}, {"shift": -0.2}


class Walk(nn.Module):
    """Generator and score in one: a frame is a function of what it is seen in and of the last remembered frame.

    It works number by number, so that a sample is the same to the last bit in any batch. It notes its calls, and
    gives each a gain of 1 whose gradient tells whether the call was differentiated; `graphs` tells for which calls
    one was built at all.
    """

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.seen, self.gains, self.graphs = [], [], []

    def forward(self, x_t, t, cond, cache=None):
        past = cache.layers[0][0][:, -1:].reshape(-1, 1, *FRAME) if cache and cache.frames else 0.0
        x0 = torch.tanh(self.weight * x_t + 0.5 * past) + cond["shift"]
        self.seen.append((x_t, t, cond, cache))
        self.gains.append(torch.ones((), requires_grad=True))
        self.graphs.append(torch.is_grad_enabled())
        return self.gains[-1] * SCHEDULER.to_flow(x0, x_t, t)

    def remember(self, x, t, cond, cache):
        return cache.extend([(x.flatten(2)[:, :, None],) * 2], x.shape[1])


def settings(num_frames=6, frames_per_block=2, *, gradient_frames=None, min_num_frames=None, context_noise=0, **rest):
    return SelfForcingConfig(
        RolloutConfig(frames_per_block=frames_per_block, context_noise=context_noise),
        gradient_frames=gradient_frames or num_frames,
        min_num_frames=min_num_frames or num_frames,
        max_num_frames=num_frames,
        **rest,
    )


def algorithm(student, teacher, critic, config, *, samples=range(BATCH), seed=0, **options):
    """self_forcing_step with the numbers of some samples of a global batch."""
    noise = randn((len(samples), config.max_num_frames, *FRAME), generators(seed, "noise", samples=samples))
    given = {"rng": generators(seed, "rng", samples=samples), "shared_rng": generator(seed, "shared")} | options
    return self_forcing_step(student, teacher, critic, SCHEDULER, noise, COND, UNCOND, config, **given)


def roll(student, config, seed=0, **options):
    """A training rollout: the video that is scored, and its exit."""
    noise = randn((BATCH, config.max_num_frames, *FRAME), generators(seed, "noise", samples=range(BATCH)))
    rng = generators(seed, "rng", samples=range(BATCH))
    options |= {"rng": rng, "shared_rng": generator(seed, "shared")}
    return training_rollout(student, SCHEDULER, noise, COND, config, **options)


def rollouts(student):
    """How many rollouts a student was asked for: each begins once at frame 0 with pure noise."""
    return sum(t == 1 and cache.next_frame == 0 for _, t, _, cache in student.seen)


# ------------------------------------------------------------------------------------------------------ the sequence


@pytest.mark.parametrize("critic_steps", [1, 3])
@pytest.mark.parametrize("fresh_rollouts", [True, False])
def test_order_and_number_of_rollouts(critic_steps, fresh_rollouts):
    """One generator loss, then the critic's; the next rollout starts only when the optimizer had its turn."""
    student, teacher, critic = Walk(0.9), Walk(0.5), Walk(0.9)
    config = settings(critic_steps=critic_steps, fresh_rollouts=fresh_rollouts)
    names, counts = [], []
    for name, loss in algorithm(student, teacher, critic, config):
        assert loss.ndim == 0 and loss.requires_grad
        names.append(name)
        counts.append(rollouts(student))
    assert names == ["generator"] + ["critic"] * critic_steps
    assert counts == (list(range(1, critic_steps + 2)) if fresh_rollouts else [1] * (critic_steps + 1))
    assert len(teacher.seen) == 2  # with and without the prompt, in the generator's loss alone
    assert len(critic.seen) == 1 + critic_steps


@pytest.mark.parametrize("fresh_rollouts", [True, False])
def test_every_loss_trains_its_own_network(fresh_rollouts):
    """The generator's loss reaches the student alone, the critic's the critic alone, the teacher learns nothing."""
    student, teacher, critic = Walk(0.9), Walk(0.5), Walk(0.9)
    networks, config = {"generator": student, "critic": critic}, settings(critic_steps=2, fresh_rollouts=fresh_rollouts)
    for name, loss in algorithm(student, teacher, critic, config):
        loss.backward()
        trained = [n for n in (student, teacher, critic) if n.weight.grad is not None]
        assert trained == [networks[name]] and trained[0].weight.grad.abs() > 1e-8
        trained[0].weight.grad = None
        if name == "critic":
            assert not any(student.graphs)  # what the critic learns from costs no memory
        student.graphs.clear()


@pytest.mark.parametrize("fresh_rollouts", [True, False])
def test_every_update_of_the_critic_has_times_of_its_own(fresh_rollouts):
    """Also on one and the same rollout: times are drawn anew, and differ from the generator's."""
    critic = Walk(0.9)
    list(algorithm(Walk(0.9), Walk(0.5), critic, settings(critic_steps=3, fresh_rollouts=fresh_rollouts)))
    times = [tuple(t.tolist()) for _, t, _, _ in critic.seen]
    assert len(times) == len({*times}) == 4


def test_the_critic_follows_the_student_as_it_is_now():
    """Fresh rollouts have fresh noise and the weights that the student has after its update."""
    student, critic = Walk(0.9), Walk(0.9)
    steps = algorithm(student, Walk(0.5), critic, settings(2, exit_rule="last", critic_steps=1))
    next(steps)
    with torch.no_grad():
        student.weight.zero_()  # from now on its video is the prompt's shift, whatever the noise
    _, loss = next(steps)
    first, second = (x_t for x_t, t, _, _ in student.seen if t == 1)
    assert not torch.equal(first, second)
    x_t, t, cond, _ = critic.seen[-1]
    video, wide = torch.full_like(x_t, COND["shift"]), t.reshape(-1, 1, 1, 1, 1)
    noise = (x_t - (1 - wide) * video) / wide
    assert cond is COND
    torch.testing.assert_close(loss, flow_matching_loss(critic, SCHEDULER, video, COND, t=t, noise=noise))


@pytest.mark.parametrize("fake_guidance_scale, asked", [(None, [COND]), (1.0, [COND]), (3.0, [COND, UNCOND])])
def test_the_critic_can_be_guided_inside_the_generator_loss(fake_guidance_scale, asked):
    """fake_guidance_scale guides the critic where it is a score; where it learns, it is asked with the prompt alone."""
    critic = Walk(0.9)
    steps = algorithm(Walk(0.9), Walk(0.5), critic, settings(fake_guidance_scale=fake_guidance_scale, critic_steps=2))
    _, loss = next(steps)
    assert [cond for _, _, cond, _ in critic.seen] == asked
    list(steps)
    assert [cond for _, _, cond, _ in critic.seen] == asked + [COND] * 2
    guided = critic if fake_guidance_scale is None else Guided(critic, UNCOND, fake_guidance_scale)
    plain = settings(critic_steps=2)
    assert torch.equal(loss, next(algorithm(Walk(0.9), Walk(0.5), guided, plain))[1])


def test_losses_and_observers_are_passed_on():
    """Any distillation loss with dmd_loss's arguments fits; observe hears which network reports what."""
    seen, heard = {}, []

    def loss(video, *scores, **options):
        seen.update(options, scores=scores)
        return sid_loss(video, *scores, **options)

    student, teacher, critic, config = Walk(0.9), Walk(0.5), Walk(0.8), settings(critic_steps=2, guidance_scale=2.5)
    rng = generators(0, "rng", samples=range(BATCH))
    steps = algorithm(
        student, teacher, critic, config, loss=loss, rng=rng, observe=lambda who, **what: heard.append((who, what))
    )
    assert len(list(steps)) == 3
    assert seen["scores"] == (teacher, critic, SCHEDULER, COND, UNCOND, 2.5) and seen["rng"] is rng
    assert [who for who, _ in heard] == ["generator", "critic", "critic"]
    assert [sorted(what) for _, what in heard] == [["normaliser", "score_distance", "t"]] + [["error", "t"]] * 2
    assert all(x.shape == (BATCH,) for _, what in heard for x in what.values())


# ------------------------------------------------------------------------------------------- frames that are scored

WINDOWS = pytest.mark.parametrize(
    "num_frames, frames_per_block, gradient_frames, differentiated",
    [
        (8, 2, 4, [4, 6]),  # twice as long as the teacher's clips
        (8, 2, 3, [4, 6]),
        (10, (1, 3), 5, [4, 7]),  # blocks 0 | 1 2 3 | 4 5 6 | 7 8 9: the third reaches in with two frames
        (10, (1, 3), 6, [4, 7]),
        (10, (1, 3), 7, [1, 4, 7]),
        (6, 2, 6, [0, 2, 4]),
        (6, 2, 21, [0, 2, 4]),
    ],
)


@WINDOWS
def test_gradient_of_the_last_frames_alone(num_frames, frames_per_block, gradient_frames, differentiated):
    """Only exit calls of blocks that reach into the last gradient_frames frames are differentiated."""
    student, config = Walk(0.9), settings(num_frames, frames_per_block, gradient_frames=gradient_frames)
    video, exit_step = roll(student, config)
    assert video.shape[1] == min(num_frames, gradient_frames)
    gradients = torch.autograd.grad(video.sum(), student.gains, allow_unused=True)
    called = [(cache.next_frame, t) for _, t, _, cache in student.seen]
    found = [call for call, gradient in zip(called, gradients, strict=True) if gradient is not None]
    t = SCHEDULER.denoising_times(config.rollout.denoising_steps)[exit_step]
    assert found == [(frame, t) for frame in differentiated]


@WINDOWS
def test_teacher_and_critic_see_exactly_those_frames(num_frames, frames_per_block, gradient_frames, differentiated):
    """Both score the last gradient_frames frames of the clip that inference would make, and no other."""
    config = settings(
        num_frames, frames_per_block, gradient_frames=gradient_frames, exit_rule="last", context_noise=200
    )
    student, teacher, critic, videos = Walk(0.9), Walk(0.5), Walk(0.8), []

    def loss(video, *scores, **options):
        videos.append(video)
        return dmd_loss(video, *scores, **options)

    assert len(list(algorithm(student, teacher, critic, config, loss=loss))) == 6
    frames = {score: {x_t.shape[1] for x_t, _, _, _ in score.seen} for score in (teacher, critic)}
    assert frames == {teacher: {min(num_frames, gradient_frames)}, critic: {min(num_frames, gradient_frames)}}
    noise = randn((BATCH, num_frames, *FRAME), generators(0, "noise", samples=range(BATCH)))
    rng = generators(0, "rng", samples=range(BATCH))
    whole = generate(Walk(0.9), SCHEDULER, noise, COND, config.rollout, rng=rng)
    assert torch.equal(videos[0], whole[:, -gradient_frames:])


def test_the_scored_video_is_what_the_scores_see():
    """x_t of teacher and critic is the student's video at the time of the loss with one and the same noise."""
    student, teacher, critic, kept = Walk(0.9), Walk(0.5), Walk(0.8), {}

    def loss(video, *scores, t, **options):
        kept.update(video=video.detach(), t=t)
        return dmd_loss(video, *scores, t=t, **options)

    next(algorithm(student, teacher, critic, settings(8, gradient_frames=4), loss=loss))
    fade = 1 - kept["t"].reshape(-1, 1, 1, 1, 1)
    noises = [(x_t - fade * kept["video"]) / (1 - fade) for x_t, *_ in teacher.seen + critic.seen]
    assert all(torch.equal(noise, noises[0]) for noise in noises)
    assert noises[0].std() == pytest.approx(1, abs=0.3) and noises[0].mean() == pytest.approx(0, abs=0.3)
    assert all(torch.equal(t, kept["t"]) for _, t, _, _ in teacher.seen + critic.seen)


class Differences:
    """A toy codec: a clip's first frame is coded on its own, every other as its difference from the one before."""

    def decode(self, latents):
        return latents.cumsum(dim=1)

    def encode(self, pixels):
        return torch.cat([pixels[:, :1], pixels.diff(dim=1)], dim=1)

    def reencode(self, latents):
        return self.encode(self.decode(latents)[:, -1:])


@pytest.mark.parametrize("gradient_frames", [3, 4, 8, 21])
def test_a_clip_cut_out_of_a_longer_one_begins_anew_for_the_codec(gradient_frames):
    """Re-encoded, the scored latents are the code of the scored pixels; frames that stay as they are keep their
    gradient, the new first frame has none, and a clip that is not cut is left alone."""
    config, student, codec = settings(8, gradient_frames=gradient_frames), Walk(0.9), Differences()
    plain, _ = roll(student, config)
    video, _ = roll(student, config, reencode=codec.reencode)
    whole, _ = roll(student, settings(8))
    assert video.shape == plain.shape and torch.equal(video[:, 1:], plain[:, 1:])
    torch.testing.assert_close(video, codec.encode(codec.decode(whole)[:, -gradient_frames:]))
    cut = gradient_frames < 8
    assert torch.equal(video[:, :1], plain[:, :1]) != cut
    assert cut or torch.equal(video, plain)
    for i in range(video.shape[1]):
        old, new = (torch.autograd.grad(x[:, i].sum(), student.weight, retain_graph=True)[0] for x in (plain, video))
        assert old and new == (0 if cut and i == 0 else old)


def asks_for_it(*given, reencode=None, **options):
    """A student_video of somebody's own that re-encodes."""


def does_without(*given, **options):
    """One that does not."""


@pytest.mark.parametrize(("name", "handed"), [("asks_for_it", True), ("does_without", False)])
def test_whoever_asks_for_reencode_is_handed_the_codecs(name, handed):
    """So is `dynamic_video_sf.training_rollout`; without a codec nobody is."""

    class Codec:
        reencode_last_frame = staticmethod(lambda latents: latents)

    for student_video, wanted in ((f"{__name__}.{name}", handed), ("dynamic_video_sf.training_rollout", True)):
        objective = {"step": "dynamic_video_sf.self_forcing_step", "student_video": student_video, "needs": []}
        for codec in (Codec(), None):
            made = make_step(OmegaConf.create(objective), codec).keywords["student_video"]
            assert (getattr(made, "keywords", {}).get("reencode") is not None) == (wanted and codec is not None)


def test_without_gradient_a_training_rollout_keeps_none():
    """Under no_grad, as for the critic, no call builds a graph; the video is the same."""
    config, student = settings(8, gradient_frames=4), Walk(0.9)
    with torch.no_grad():
        video, _ = roll(student, config)
    assert not video.requires_grad and not any(student.graphs)
    assert torch.equal(video, roll(student, config)[0])


# ------------------------------------------------------------------------------------ clip lengths and exit steps


@pytest.mark.parametrize(
    "shortest, longest, frames_per_block, lengths",
    [(4, 10, (1, 3), [4, 7, 10]), (5, 10, 3, [6, 9]), (2, 12, (4, 1), [4, 5, 6, 7, 8, 9, 10, 11, 12]), (9, 9, 3, [9])],
)
def test_clip_lengths_are_whole_blocks(shortest, longest, frames_per_block, lengths):
    """Every whole number of blocks from min_num_frames to max_num_frames occurs, about equally often, and no other."""
    config = settings(longest, frames_per_block, min_num_frames=shortest)
    assert config.clip_lengths() == lengths
    with torch.no_grad():
        counts = Counter(roll(Walk(0.9), config, seed)[0].shape[1] for seed in range(40 * len(lengths)))
    assert sorted(counts) == lengths and min(counts.values()) > 20


@torch.no_grad()
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_share_of_the_clips_is_short(share):
    """shortest_share of them have min_num_frames frames, besides what chance gives; the others any length."""
    config = settings(8, 2, min_num_frames=4, shortest_share=share)
    counts = Counter(roll(Walk(0.9), config, seed)[0].shape[1] for seed in range(150))
    expected = share + (1 - share) / 3
    assert abs(counts[4] / 150 - expected) < 0.12
    assert share == 1 or min(counts[6], counts[8]) > 10


def exits(exit_rule, seeds=60):
    """Exit steps of 60 rollouts of three blocks: as reported, and as counted per block."""
    for seed in range(seeds):
        student = Walk(0.9)
        _, exit_step = roll(student, settings(exit_rule=exit_rule), seed)
        calls = Counter(cache.next_frame for _, _, _, cache in student.seen)
        yield exit_step, [calls[frame] - 1 for frame in (0, 2, 4)]


@torch.no_grad()
def test_exit_rules():
    """ "random" is one step for all blocks, "per_block" one for each, "last" the last; every step occurs."""
    counts = {rule: list(exits(rule)) for rule in ("random", "per_block", "last")}
    assert all(counted == [step] * 3 for step, counted in counts["random"])
    assert all(counted == step for step, counted in counts["per_block"])
    assert all((step, counted) == (3, [3, 3, 3]) for step, counted in counts["last"])
    assert min(Counter(step for step, _ in counts["random"])[i] for i in range(4)) > 5
    for block in range(3):
        assert min(Counter(step[block] for step, _ in counts["per_block"])[i] for i in range(4)) > 5
    assert any(len(set(step)) == 3 for step, _ in counts["per_block"])


@pytest.mark.parametrize("exit_rule", ["random", "per_block"])
def test_exit_and_length_are_shared_by_all_processes(exit_rule):
    """They are drawn from shared_rng alone: another batch, another rank, other noise, the same clip and exits."""
    config = settings(10, (1, 3), min_num_frames=4, exit_rule=exit_rule)
    for seed in range(8):
        drawn = []
        for samples in (range(1), range(5, 9)):
            noise = randn((len(samples), 10, *FRAME), generators(seed, "noise", samples=samples))
            rng, shared_rng = generators(seed, "rng", samples=samples), generator(seed, "shared")
            options = {"rng": rng, "shared_rng": shared_rng}
            video, exit_step = training_rollout(Walk(0.9), SCHEDULER, noise, COND, config, **options)
            drawn.append((video.shape[1:], exit_step))
        assert drawn[0] == drawn[1]


# ------------------------------------------------------------------------------------------------------ score times


@pytest.mark.parametrize(
    "options, exit_step, low, high",
    [
        ({}, 1, 0.0, 1.0),
        ({"min_score_time": 0.3}, 1, 0.3, 1.0),
        ({"ts_schedule": True}, 1, 0.5, 1.0),
        ({"ts_schedule": True}, 3, 0.0, 1.0),
        ({"ts_schedule": True, "min_score_time": 0.6}, 1, 0.6, 1.0),
        ({"ts_schedule_max": True}, 1, 0.0, 0.75),
        ({"ts_schedule_max": True}, 0, 0.0, 1.0),
        ({"ts_schedule": True, "ts_schedule_max": True}, 2, 0.25, 0.5),
        ({"ts_schedule": True, "ts_schedule_max": True}, 3, 0.0, 0.25),
    ],
)
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_score_times(options, exit_step, low, high, shift):
    """Uniform between the exit and the following step of [1000, 750, 500, 250, 0]; warped; clamped to 0.02..0.98."""
    scheduler = FlowMatchScheduler(shift)
    t = score_times(scheduler, settings(**options), exit_step, 4000, generator(0, "t"))
    assert t.shape == (4000,)
    assert t.median() == pytest.approx(scheduler.warp((low + high) / 2), abs=0.03)
    low, high = max(0.02, scheduler.warp(low)), min(0.98, scheduler.warp(high))
    assert low <= t.min() < low + 0.02 and high - 0.02 < t.max() <= high + 1e-6


def test_score_times_follow_the_exit_of_their_own_rollout():
    """With both bounds on, the time of every loss lies between the exit of the rollout that it scores and the next."""
    config, edges = settings(ts_schedule=True, ts_schedule_max=True, critic_steps=3), (1000, 750, 500, 250, 0)
    exited = set()
    for seed in range(12):
        student, critic = Walk(0.9), Walk(0.8)
        for _ in algorithm(student, Walk(0.5), critic, config, seed=seed):
            exit_step = sum(cache.next_frame == 0 for *_, cache in student.seen) - 1
            student.seen.clear()
            high, low = (SCHEDULER.warp(edges[exit_step + i] / 1000) for i in (0, 1))
            t = critic.seen[-1][1]
            assert max(low, 0.02) - 1e-6 <= t.min() and t.max() <= min(high, 0.98) + 1e-6
            assert t.shape == (BATCH,)
            exited.add(exit_step)
    assert exited == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"exit_rule": "first"}, "exit_rule must be 'random', 'per_block' or 'last', got 'first'"),
        ({"exit_rule": "per_block", "ts_schedule": True}, "needs exit_rule 'random' or 'last'"),
        ({"exit_rule": "per_block", "ts_schedule_max": True}, "needs exit_rule 'random' or 'last'"),
        ({"critic_steps": 0}, "critic_steps must be at least 1"),
        ({"num_frames": 5, "frames_per_block": 3, "min_num_frames": 4}, "No whole number of blocks .* widen the range"),
        ({"num_frames": 3, "frames_per_block": 1, "min_num_frames": 4}, "No whole number of blocks .* widen the range"),
    ],
)
def test_contradictory_settings_are_refused(options, sentence):
    """Each in one sentence, when the config is made."""
    with pytest.raises(ValueError, match=sentence):
        settings(**options)


# ---------------------------------------------------------------------------------------- samples, batches, chunks


@pytest.mark.parametrize("exit_rule", ["random", "per_block"])
def test_a_sample_does_not_depend_on_its_batch_mates(exit_rule):
    """Everything that teacher and critic are asked about sample 2 is bit for bit the same alone and in a batch."""
    config = settings(10, (1, 3), min_num_frames=4, context_noise=100, exit_rule=exit_rule, critic_steps=2)
    seen = []
    for samples in (range(4), [2], [7, 2]):
        student, teacher, critic = Walk(0.9), Walk(0.5), Walk(0.8)
        list(algorithm(student, teacher, critic, config, samples=samples))
        i = list(samples).index(2)
        seen.append([(x_t[i], t[i]) for score in (teacher, critic) for x_t, t, _, _ in score.seen])
    for other in seen[1:]:
        for (x_t, t), (expected, expected_t) in zip(other, seen[0], strict=True):
            assert torch.equal(x_t, expected) and torch.equal(t, expected_t)


@pytest.mark.parametrize("loss", [dmd_loss, sid_loss])
def test_accumulated_gradients_equal_those_of_one_large_batch(loss):
    """The mean gradient of three chunks of two samples is the gradient of six at once, for every loss of a step."""

    def gradients(samples):
        student, critic = Walk(0.9), Walk(0.8)
        config = settings(8, gradient_frames=4, context_noise=100, critic_steps=2)
        for name, value in algorithm(student, Walk(0.5), critic, config, samples=samples, loss=loss):
            network = student if name == "generator" else critic
            (gradient,) = torch.autograd.grad(value, network.weight)
            yield gradient

    whole = torch.stack(list(gradients(range(6))))
    chunks = [torch.stack(list(gradients(range(i, i + 2)))) for i in (0, 2, 4)]
    assert whole.abs().min() > 1e-4
    torch.testing.assert_close(torch.stack(chunks).mean(0), whole, atol=1e-6, rtol=1e-6)


# --------------------------------------------------------------------------------------------- an analytic teacher

MEANS, WEIGHTS, STD = torch.tensor([[-1.0, 0.5], [1.0, -0.5]]), torch.tensor([0.3, 0.7]), 0.3
TARGET = Mixture(MEANS.tolist(), WEIGHTS.tolist(), STD)


def component_weights(pixels):
    return torch.cdist(pixels, MEANS).argmin(1).bincount(minlength=2) / len(pixels)


def test_dmd_reaches_the_mixture():
    """A one-step student under DMD ends with the target's mean (to 0.1), component weights (to 0.05) and spread."""
    pixels = distil(TARGET, "dmd", num_steps=200)[-1]
    torch.testing.assert_close(pixels.mean(0), WEIGHTS @ MEANS, atol=0.1, rtol=0)
    torch.testing.assert_close(component_weights(pixels), WEIGHTS, atol=0.05, rtol=0)
    variance = STD**2 + WEIGHTS @ MEANS.square() - (WEIGHTS @ MEANS).square()
    torch.testing.assert_close(pixels.var(0), variance, atol=0, rtol=0.25)


def test_dmd_without_a_critic_that_follows_overshoots():
    """Against a critic that knows only the untrained student, it runs past both components into one corner."""
    pixels = distil(TARGET, "dmd", num_steps=200, train_critic=False)[-1]
    assert component_weights(pixels).max() > 0.99
    assert torch.cdist(pixels, MEANS).min(1).values.median() > 10 * STD
