"""Every loss equals its formula, and its gradient goes where the method wants it and nowhere else."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from dynamic_video_sf import (
    RolloutConfig,
    causal_forcing_loss,
    dmd_loss,
    flow_matching_loss,
    gan_discriminator_loss,
    gan_generator_loss,
    ode_regression_loss,
    sid_loss,
)
from flow_match import FlowMatchScheduler
from randomness import generator, rand, randint, randn, randn_like
from tiny_causal_wan import TinyCausalWanModel, WanConfig

SCHEDULER = FlowMatchScheduler()
SHAPE = BATCH, FRAMES, *_ = 3, 4, 2, 2, 3
TIMES = torch.tensor([0.1, 0.5, 0.9])
COND, UNCOND = {"shift": 0.5}, {"shift": -0.2}
both_distillations = pytest.mark.parametrize("distillation", [dmd_loss, sid_loss])


def draw(name, shape=SHAPE):
    return randn(shape, generator(0, name))


def wide(t):
    """t [B] or [B, F] over a video [B, F, C, H, W]."""
    return t.reshape(*t.shape, *[1] * (5 - t.ndim))


class Score(nn.Module):
    """Sees the clean video gain * x_t + shift in x_t, where the shift is the prompt; notes what it was asked."""

    def __init__(self, gain):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.seen = []

    def forward(self, x_t, t, cond):
        self.seen.append((x_t, t, cond))
        return (x_t - self.gain * x_t - cond["shift"]) / wide(t)


def noised(video, t=TIMES):
    return (1 - wide(t)) * video + wide(t) * draw("noise")


@pytest.fixture
def video():
    scales = torch.tensor([0.3, 1.0, 5.0])  # every sample has a normaliser of its own
    return (wide(scales) * draw("video")).requires_grad_()


def distil(distillation, video, real, fake, guidance_scale=4.0, **options):
    given = {"t": TIMES, "noise": draw("noise")} | options
    return distillation(video, real, fake, SCHEDULER, COND, UNCOND, guidance_scale, **given)


# ------------------------------------------------------------------------------------------------------------ DMD


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_dmd_gradient_is_its_closed_form(video, guidance_scale):
    """d loss / d video = (x0_fake - x0_real) / mean|video - x0_real| / N, guidance being uncond + w (cond - uncond)."""
    loss = distil(dmd_loss, video, Score(0.7), Score(0.4), guidance_scale)
    x_t, x = noised(video.detach()), video.detach()
    shift = UNCOND["shift"] + guidance_scale * (COND["shift"] - UNCOND["shift"])
    x0_fake, x0_real = 0.4 * x_t + COND["shift"], 0.7 * x_t + shift
    expected = (x0_fake - x0_real) / (x - x0_real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    (gradient,) = torch.autograd.grad(loss, video)
    torch.testing.assert_close(gradient, expected / x.numel(), atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(loss, 0.5 * expected.square().mean())


def test_guidance_three_of_the_reference_is_four_here(video):
    """cond + 3 (cond - uncond), as the reference's training code writes it, is this scale 4."""

    class Guided(Score):
        def forward(self, x_t, t, cond):
            flow, flow_uncond = super().forward(x_t, t, COND), super().forward(x_t, t, UNCOND)
            return flow + 3 * (flow - flow_uncond)

    losses = [distil(dmd_loss, video, Score(0.7), Score(0.4), 4.0), distil(dmd_loss, video, Guided(0.7), Score(0.4), 1)]
    gradients = [torch.autograd.grad(loss, video)[0] for loss in losses]
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-4)


def test_dmd_moves_the_video_and_nothing_else(video):
    """Neither the scores' parameters nor the graph behind their inputs get a gradient."""
    real, fake = Score(0.7), Score(0.4)
    distil(dmd_loss, video, real, fake).backward()
    assert video.grad.abs().min() > 0
    assert all(p.grad is None for score in (real, fake) for p in score.parameters())
    assert not any(x_t.requires_grad for x_t, _, _ in real.seen + fake.seen)


def test_a_dmd_gradient_does_not_know_the_scale_of_the_video(video):
    """The normaliser takes it out, however small it is: its floor is only there for the exact zero."""
    found, nothing = [], {"shift": 0.0}
    for scale in (1, 1e-4):
        x = (scale * video.detach()).requires_grad_()
        given = {"t": TIMES, "noise": scale * draw("noise")}
        loss = dmd_loss(x, Score(0.7), Score(0.4), SCHEDULER, nothing, nothing, 1.0, **given)
        found += torch.autograd.grad(loss, x)
    torch.testing.assert_close(*found, atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize("name", ["dmd", "sid", "flow_matching"])
def test_a_loss_of_half_precision_networks_is_computed_in_full(name):
    """Networks and video may be bfloat16. What they say here is exact in it, so that no later rounding is hidden."""
    grid = torch.arange(math.prod(SHAPE)).reshape(SHAPE)
    video, noise, t = (grid * 7 % 51 - 25) / 16, (grid * 5 % 31 - 15) / 16, torch.full((BATCH,), 0.5)

    class Half(Score):
        def forward(self, x_t, t, cond):
            return super().forward(x_t, t, cond).to(x_t.dtype)

    def loss(dtype):
        x = video.to(dtype).requires_grad_()
        given = {"t": t, "noise": noise.to(dtype)}
        if name == "flow_matching":
            return flow_matching_loss(Half(0.75), SCHEDULER, x, COND, **given)
        distillation = {"dmd": dmd_loss, "sid": sid_loss}[name]
        return distillation(x, Half(0.75), Half(0.5), SCHEDULER, COND, COND, 1.0, **given)

    assert loss(torch.bfloat16).dtype == torch.float32
    torch.testing.assert_close(loss(torch.bfloat16), loss(torch.float32), atol=0, rtol=1e-6)


@both_distillations
def test_who_is_asked_what(video, distillation):
    """Teacher with and without the prompt, critic with it, all at the same noised video and time."""
    real, fake = Score(0.7), Score(0.4)
    distil(distillation, video, real, fake)
    assert [cond for _, _, cond in real.seen] == [COND, UNCOND]
    assert [cond for _, _, cond in fake.seen] == [COND]
    for x_t, t, _ in real.seen + fake.seen:
        torch.testing.assert_close(x_t, noised(video))
        assert torch.equal(t, TIMES)
    real.seen.clear()
    distil(distillation, video, real, fake, guidance_scale=1)
    assert [cond for _, _, cond in real.seen] == [COND]


@both_distillations
def test_no_gradient_where_the_scores_agree(video, distillation):
    """Teacher and critic that see the same clean video leave the student alone."""
    loss = distil(distillation, video, Score(0.7), Score(0.7), guidance_scale=1)
    assert loss == 0 and not torch.autograd.grad(loss, video)[0].any()


@both_distillations
def test_a_video_that_the_scores_confirm_to_the_last_bit(distillation):
    """Where even the normaliser is zero, loss and gradient are zero too, and numbers."""
    video, t = torch.zeros(SHAPE, requires_grad=True), torch.full((BATCH,), 0.5)
    loss = distil(distillation, video, lambda x_t, t, cond: 2 * x_t, lambda x_t, t, cond: 2 * x_t, t=t)
    assert loss == 0 and torch.equal(*torch.autograd.grad(loss, video), torch.zeros(SHAPE))


@both_distillations
def test_the_mask_names_the_frames_that_count(video, distillation):
    """Masked frames get no gradient; the mean runs over the others, and the normaliser over the whole clip."""
    mask = torch.tensor([[True] * 4, [False, True, True, False], [False] * 4])
    whole, masked = (
        torch.autograd.grad(distil(distillation, video, Score(0.7), Score(0.4), mask=m), video)[0] for m in (None, mask)
    )
    expected = torch.where(wide(mask), whole * mask.numel() / mask.sum(), 0)
    torch.testing.assert_close(masked, expected)
    nothing = distil(distillation, video, Score(0.7), Score(0.4), mask=torch.zeros_like(mask))
    assert nothing == 0 and not torch.autograd.grad(nothing, video)[0].any()


@both_distillations
def test_what_observe_reports(video, distillation):
    """Time, distance between the scores and normaliser of each sample, without a graph."""
    seen = []
    distil(distillation, video, Score(0.7), Score(0.4), guidance_scale=1, observe=lambda **s: seen.append(s))
    x, x_t = video.detach(), noised(video.detach())
    expected = {
        "t": TIMES,
        "score_distance": (0.3 * x_t).abs().flatten(1).mean(1),
        "normaliser": (x - 0.7 * x_t - COND["shift"]).abs().flatten(1).mean(1),
    }
    torch.testing.assert_close(seen, [expected])
    assert not any(x.requires_grad for x in seen[0].values())


@both_distillations
def test_default_times_and_noise(video, distillation):
    """By default each sample has one time from `sample_times`, then its noise, both from rng."""
    rng = generator(0, "loss")
    options = {"t": SCHEDULER.sample_times(BATCH, rng), "noise": randn_like(video, rng)}
    given = distil(distillation, video, Score(0.7), Score(0.4), **options)
    drawn = distil(distillation, video, Score(0.7), Score(0.4), t=None, noise=None, rng=generator(0, "loss"))
    assert torch.equal(given, drawn)


# ------------------------------------------------------------------------------------------------------------ SiD


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_sid_is_its_closed_form(video, alpha):
    """Loss and all three gradients: to the video also through x_t and both scores, and to the scores' parameters."""
    a, b = 0.4, 0.7
    fake, real = Score(a), Score(b)
    cond = {"shift": 0.0}
    loss = sid_loss(video, real, fake, SCHEDULER, cond, cond, 1.0, alpha=alpha, t=TIMES, noise=draw("noise"))
    x, x_t, fade = video.detach(), noised(video.detach()), 1 - wide(TIMES)
    gap, off = (b - a) * x_t, b * x_t - x
    norm = off.abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(loss, (gap * (off - alpha * gap) / norm).mean())
    inner = off - alpha * gap
    expected = {
        "video": ((b - a) * fade * inner + gap * (b * fade - 1 - alpha * (b - a) * fade)) / norm / x.numel(),
        "fake": (x_t * (alpha * gap - inner) / norm).mean(),
        "real": (x_t * (inner + gap * (1 - alpha)) / norm).mean(),
    }
    gradients = torch.autograd.grad(loss, [video, fake.gain, real.gain])
    for gradient, name in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


def test_sid_uses_alpha_one_by_default_and_guidance(video):
    """alpha defaults to 1; the teacher is guided as in DMD."""
    losses = [distil(sid_loss, video, Score(0.7), Score(0.4), **options) for options in ({}, {"alpha": 1.0})]
    assert torch.equal(*losses)
    x_t, x = noised(video.detach()), video.detach()
    real, fake = 0.7 * x_t - 0.2 + 4 * 0.7, 0.4 * x_t + 0.5
    norm = (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(losses[0], ((real - fake) * (fake - x) / norm).mean())


# ------------------------------------------------------------------------------------------------------------ GAN


def softplus(x):
    return math.log1p(math.exp(x))


def test_gan_losses_are_their_closed_forms():
    """Logistic, non-saturating losses; relativistic ones compare each fake with its real partner."""
    real, fake = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.3])
    losses = {
        "generator": (gan_generator_loss(fake), softplus(-2.0) + softplus(-0.3)),
        "relativistic generator": (gan_generator_loss(fake, real), softplus(0.5 - 2.0) + softplus(-1.0 - 0.3)),
        "discriminator": (
            gan_discriminator_loss(real, fake),
            softplus(-0.5) + softplus(1.0) + softplus(2.0) + softplus(0.3),
        ),
        "relativistic discriminator": (
            gan_discriminator_loss(real, fake, relativistic=True),
            softplus(2.0 - 0.5) + softplus(0.3 + 1.0),
        ),
    }
    for name, (loss, total) in losses.items():
        assert loss.item() == pytest.approx(total / 2, rel=1e-6), name


# --------------------------------------------------------------------------------------------------- flow matching


@pytest.mark.parametrize("t", [TIMES, rand((BATCH, FRAMES), generator(0, "t"))], ids=["B", "BF"])
def test_flow_matching_is_its_formula(t):
    """Mean squared distance of the predicted flow to noise - x0, at one time per sample or per frame."""
    x0, noise, model, seen = draw("x0"), draw("noise"), Score(0.4), []
    loss = flow_matching_loss(model, SCHEDULER, x0, COND, t=t, noise=noise, observe=lambda **s: seen.append(s))
    x_t = (1 - wide(t)) * x0 + wide(t) * noise
    error = ((0.6 * x_t - COND["shift"]) / wide(t) - (noise - x0)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, error.mean())
    torch.testing.assert_close(seen, [{"t": t, "error": error}], check_stride=False)
    (gradient,) = torch.autograd.grad(loss, model.gain)
    residual = (0.6 * x_t - COND["shift"]) / wide(t) - (noise - x0)
    torch.testing.assert_close(gradient, (-2 * residual * x_t / wide(t)).mean(), rtol=1e-4, atol=1e-5)


def test_flow_matching_is_zero_for_the_true_flow():
    """A model that knows the noise has nothing to learn."""
    x0, noise = draw("x0"), draw("noise")
    assert flow_matching_loss(lambda x_t, t, cond: noise - x0, SCHEDULER, x0, COND, t=TIMES, noise=noise) == 0


def test_flow_matching_draws_one_warped_time_per_sample():
    """Times are uniform before the warp: at shift 5 only one in six falls below 0.5."""
    model, x0 = Score(0.4), torch.zeros(4000, 2, 1, 1, 1)
    flow_matching_loss(model, SCHEDULER, x0, COND, rng=generator(0, "t"))
    (_, t, cond) = model.seen[0]
    assert t.shape == (4000,) and cond is COND
    u = t / (5 - 4 * t)  # the inverse of the warp
    for quantile in (0.25, 0.5, 0.75):
        assert (u < quantile).float().mean() == pytest.approx(quantile, abs=0.03)


# ------------------------------------------------------------------------------------------------- causal forcing


CAUSAL = RolloutConfig(frames_per_block=(1, 3), sink_frames=1, window_frames=2)
WAN_SHAPE = (2, 7, 1, 4, 4)  # blocks of 1, 3, 3
BLOCKS = [slice(0, 1), slice(1, 4), slice(4, 7)]


class Recorder:
    """Passes calls on and keeps what went in and what came out."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x_t, t, cond, **options):
        self.x_t, self.t, self.cond, self.options = x_t, t, cond, options
        self.flow = self.model(x_t, t, cond, **options)
        return self.flow


@pytest.fixture(scope="module")
def wan():
    """A Wan of two layers, all parameters perturbed: a fresh one answers zero whatever it sees."""
    torch.manual_seed(0)
    model = TinyCausalWanModel(
        WanConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=2, patch_size=(1, 2, 2), text_dim=8, text_len=6)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.requires_grad_(False)


@pytest.mark.parametrize("teacher_forcing", [True, False])
def test_causal_forcing_is_masked_flow_matching(wan, teacher_forcing):
    """The model is told blocks, sink and window, and for teacher forcing the clean clip; the rest is the formula."""
    x0, noise, t = draw("x0", WAN_SHAPE), draw("noise", WAN_SHAPE), rand((2, 7), generator(0, "t"))
    model, cond = Recorder(wan), {"prompt_embeds": draw("prompt", (2, 5, 8))}
    options = {"teacher_forcing": teacher_forcing, "t": t, "noise": noise}
    loss = causal_forcing_loss(model, SCHEDULER, x0, cond, CAUSAL, **options)
    expected = {"frames_per_block": (1, 3), "sink_frames": 1, "window_frames": 2}
    assert (model.options.pop("clean") is x0) == teacher_forcing
    assert model.options == expected and model.cond is cond and torch.equal(model.t, t)
    torch.testing.assert_close(model.x_t, (1 - wide(t)) * x0 + wide(t) * noise)
    flow = wan(model.x_t, t, cond, clean=x0 if teacher_forcing else None, **expected)
    torch.testing.assert_close(loss, (flow - (noise - x0)).square().mean())


def test_every_block_has_a_time_of_its_own():
    """Default times are per block, constant inside, independent between blocks and samples, uniform before the warp."""
    batch, seen = 2000, []

    def model(x_t, t, cond, **options):
        seen.append(t)
        return x_t

    causal_forcing_loss(model, SCHEDULER, torch.zeros(batch, 7, 1, 1, 1), {}, CAUSAL, rng=generator(0, "t"))
    t = seen[0]
    assert t.shape == (batch, 7)
    assert all((t[:, block] == t[:, block][:, :1]).all() for block in BLOCKS)
    u = (t / (5 - 4 * t))[:, [0, 1, 4]]
    torch.testing.assert_close(u.mean(0), torch.full((3,), 0.5), atol=0.03, rtol=0)
    torch.testing.assert_close(torch.corrcoef(u.T), torch.eye(3), atol=0.1, rtol=0)


def test_teacher_forcing_sees_the_past_clean_and_diffusion_forcing_as_noisy_as_it_is(wan):
    """Other noise on block 1 moves the prediction of block 2 under diffusion forcing alone; other data always does."""
    x0, noise, t = draw("x0", WAN_SHAPE), draw("noise", WAN_SHAPE), torch.full((2, 7), 0.6)
    other_noise, other_x0 = noise.clone(), x0.clone()
    other_noise[:, BLOCKS[1]] += 1
    other_x0[:, BLOCKS[1]] += 1

    def flow(x0, noise, teacher_forcing):
        model = Recorder(wan)
        cond = {"prompt_embeds": draw("prompt", (2, 5, 8))}
        options = {"teacher_forcing": teacher_forcing, "t": t, "noise": noise}
        causal_forcing_loss(model, SCHEDULER, x0, cond, CAUSAL, **options)
        return [model.flow[:, block] for block in BLOCKS]

    for teacher_forcing in (True, False):
        before = flow(x0, noise, teacher_forcing)
        noisier, different = flow(x0, other_noise, teacher_forcing), flow(other_x0, noise, teacher_forcing)
        same = partial(torch.allclose, atol=1e-6)
        assert same(before[0], noisier[0]) and same(before[0], different[0])  # the past never sees the future
        assert not same(before[1], noisier[1]) and not same(before[1], different[1])
        assert same(before[2], noisier[2]) == teacher_forcing
        assert not same(before[2], different[2])


# --------------------------------------------------------------------------------------------------- ODE regression

STATES = (1.0, 0.9, 0.6, 0.0)
TRAJECTORY = (2, 4, 7, 1, 2, 2)  # B, K, F, C, H, W
INDEX = torch.tensor([[0, 2, 1], [3, 1, 3]])  # sample 1 starts clean in its first and last block


def per_frame(index):
    return index.repeat_interleave(torch.tensor([1, 3, 3]), dim=1)


def regress(model, trajectory, index=INDEX, **options):
    return ode_regression_loss(model, SCHEDULER, trajectory, STATES, COND, CAUSAL, index=index, **options)


def test_ode_regression_gathers_states_and_is_its_formula():
    """Every frame starts at its block's state and time, and is compared with the clean end of its trajectory."""
    trajectory, model = draw("trajectory", TRAJECTORY), Recorder(lambda x_t, t, cond, **options: 0.3 * x_t)
    loss = regress(model, trajectory)
    index = per_frame(INDEX)
    for b in range(2):
        for f in range(7):
            assert torch.equal(model.x_t[b, f], trajectory[b, index[b, f], f])
            assert model.t[b, f] == pytest.approx(STATES[index[b, f]])
    assert model.options == {"frames_per_block": (1, 3), "sink_frames": 1, "window_frames": 2, "clean": None}
    x0 = model.x_t - wide(model.t) * 0.3 * model.x_t
    error = (x0 - trajectory[:, -1]).square().mean(dim=(2, 3, 4))
    torch.testing.assert_close(loss, error[index < 3].mean())


def test_ode_regression_ignores_blocks_that_start_clean():
    """Nothing that the model says there matters, be it no number at all; if all start clean, the loss is 0."""
    trajectory, clean = draw("trajectory", TRAJECTORY), wide(per_frame(INDEX) == 3)
    sane = regress(lambda x_t, t, cond, **options: 0.3 * x_t, trajectory)
    mad = regress(lambda x_t, t, cond, **options: torch.where(clean, torch.nan, 0.3 * x_t), trajectory)
    assert sane == mad > 0
    assert regress(lambda x_t, t, cond, **options: x_t, trajectory, torch.full((2, 3), 3)) == 0


def test_ode_regression_is_zero_for_a_perfect_student():
    """The student that jumps straight to the end of each trajectory has no loss; one that is off by 0.1 has 0.01."""
    trajectory = draw("trajectory", TRAJECTORY)

    def jump(x_t, t, cond, miss=0.0, **options):
        return (x_t - trajectory[:, -1] + miss) / wide(t).clamp_min(1e-3)

    assert regress(jump, trajectory) < 1e-12
    assert regress(partial(jump, miss=0.1), trajectory).item() == pytest.approx(0.01, rel=1e-4)


def test_ode_regression_draws_every_state_for_every_block():
    """By default the index is uniform over all states, one per block and sample."""
    batch, seen = 400, []

    def model(x_t, t, cond, **options):
        seen.append(t)
        return x_t

    regress(model, torch.zeros(batch, 4, 7, 1, 1, 1), None, rng=generator(0, "index"))
    t = seen[0]
    assert all((t[:, block] == t[:, block][:, :1]).all() for block in BLOCKS)
    index = randint(4, (batch, 3), generator(0, "index"))
    torch.testing.assert_close(t[:, [0, 1, 4]], torch.tensor(STATES)[index])
    for block in (0, 1, 4):
        for state in STATES:
            assert (t[:, block] - state).abs().lt(1e-6).float().mean() == pytest.approx(0.25, abs=0.08)
