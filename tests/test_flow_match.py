"""The schedule: one formula per quantity, right for every form of t, computed exactly, equal to diffusers' numbers."""

import pytest
import torch

from flow_match import FlowMatchScheduler, check_denoising_steps
from randomness import generator, generators, randn

SCHEDULER = FlowMatchScheduler(shift=5.0)
SHAPE = (2, 3, 1, 4, 4)
TIMES = {
    "float": 0.7,
    "scalar": torch.tensor(0.7),
    "small scalar": torch.tensor(0.3),  # 1 - t is not a bfloat16
    "[B]": torch.tensor([0.3, 0.9]),
    "[B, 1]": torch.tensor([[0.3], [0.9]]),
    "[B, F]": torch.tensor([[0.1, 0.5, 0.9], [1.0, 0.7, 0.2]]),
}
every_time = pytest.mark.parametrize("t", TIMES.values(), ids=TIMES)


def clip(seed, dtype=torch.float32):
    return randn(SHAPE, generator(seed), dtype=dtype)


def diffusers_scheduler(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)


# ---------------------------------------------------------------------------------------------------- the warp


@pytest.mark.parametrize(
    "shift, times",
    [
        (5, [1.0, 0.9375, 0.8333333, 0.625]),
        (8, [1.0, 0.96, 0.8888889, 0.7272727]),
        (1, [1.0, 0.75, 0.5, 0.25]),
    ],
)
def test_denoising_times_are_the_published_ones(shift, times):
    """1000, 750, 500, 250 become the released schedules of shift 5 and 8; a trailing 0 changes nothing."""
    assert FlowMatchScheduler(shift).denoising_times([1000, 750, 500, 250]) == pytest.approx(times, abs=1e-6)
    assert FlowMatchScheduler(shift).denoising_times([1000, 750, 500, 250, 0]) == pytest.approx(times, abs=1e-6)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0, 8.0])
def test_warp_keeps_the_ends_and_the_inverse_shift_undoes_it(shift):
    """warp fixes 0 and 1, rises strictly, moves towards noise where shift > 1, and 1 / shift is its inverse."""
    warp, t = FlowMatchScheduler(shift).warp, torch.linspace(0, 1, 101, dtype=torch.float64)
    warped = warp(t)
    assert (warp(0.0), warp(1.0)) == (0.0, 1.0)
    assert (warped.diff() > 0).all()
    assert torch.equal((warped - t)[1:-1].sign(), torch.full((99,), float((shift > 1) - (shift < 1))).double())
    torch.testing.assert_close(FlowMatchScheduler(1 / shift).warp(warped), t, atol=1e-12, rtol=0)
    assert warp(0.25) == pytest.approx(warped[25].item())


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
def test_warp_equals_diffusers(shift):
    """The thousand sigmas of diffusers' scheduler and its few-step schedule are our warp."""
    theirs = diffusers_scheduler(shift)
    ours = FlowMatchScheduler(shift)
    grid = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    torch.testing.assert_close(theirs.sigmas.double(), ours.warp(grid), atol=1e-6, rtol=0)
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    expected = torch.tensor([*ours.denoising_times([1000, 750, 500, 250]), 0.0])
    torch.testing.assert_close(theirs.sigmas, expected, atol=1e-6, rtol=0)


def test_noising_and_one_step_equal_diffusers():
    """add_noise is diffusers' scale_noise; stepping to t = 0 with a flow gives the clean video that to_x0 reads off."""
    theirs, x0, noise, flow = diffusers_scheduler(5.0), clip(0), clip(1), clip(2)
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    t = SCHEDULER.denoising_times([1000, 750, 500, 250])[-1]
    x_t = SCHEDULER.add_noise(x0, noise, t)
    torch.testing.assert_close(theirs.scale_noise(x0, theirs.timesteps[-1:], noise), x_t)
    torch.testing.assert_close(theirs.step(flow, theirs.timesteps[-1], x_t)[0], SCHEDULER.to_x0(flow, x_t, t))


# -------------------------------------------------------------------------------------------- noise, flow and x0


@every_time
def test_add_noise_is_the_straight_line_of_every_frame(t):
    """Each frame is (1 - t) x0 + t noise at its own t, written out frame by frame."""
    x0, noise = clip(0), clip(1)
    x_t = SCHEDULER.add_noise(x0, noise, t)
    each = torch.as_tensor(t).reshape(-1, 1 if torch.as_tensor(t).ndim < 2 else torch.as_tensor(t).shape[1])
    each = each.expand(2, 3)
    for b in range(2):
        for f in range(3):
            expected = (1 - each[b, f].item()) * x0[b, f] + each[b, f].item() * noise[b, f]
            torch.testing.assert_close(x_t[b, f], expected)


def test_ends_of_the_line():
    """t = 0 is the clean video and t = 1 the noise, exactly."""
    x0, noise = clip(0), clip(1)
    assert torch.equal(SCHEDULER.add_noise(x0, noise, 0.0), x0)
    assert torch.equal(SCHEDULER.add_noise(x0, noise, 1.0), noise)


@every_time
def test_flow_and_x0_undo_each_other(t):
    """The flow of a noised video is noise - x0, and leads back to x0, for every form of t."""
    x0, noise = clip(0), clip(1)
    x_t = SCHEDULER.add_noise(x0, noise, t)
    flow = SCHEDULER.to_flow(x0, x_t, t)
    torch.testing.assert_close(flow, noise - x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(SCHEDULER.to_x0(noise - x0, x_t, t), x0, atol=1e-6, rtol=0)
    torch.testing.assert_close(SCHEDULER.to_x0(flow, x_t, t), x0, atol=1e-6, rtol=0)


@every_time
@pytest.mark.parametrize("convert", ["add_noise", "to_x0", "to_flow"])
def test_bf16_is_computed_in_fp32(convert, t):
    """bf16 in, bf16 out, but rounded once only: equal to the fp32 result of the same numbers, rounded."""
    a, b = clip(0, torch.bfloat16), clip(1, torch.bfloat16)
    t = t.bfloat16() if isinstance(t, torch.Tensor) else t
    exact_t = t.float() if isinstance(t, torch.Tensor) else t
    function = getattr(SCHEDULER, convert)
    result = function(a, b, t)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, function(a.float(), b.float(), exact_t).bfloat16())


def test_the_scale_of_wan_is_refused():
    """750 for 0.75 is the first mistake of whoever comes from Wan's code."""
    with pytest.raises(ValueError, match="t runs from 0 .* got 750; divide Wan's 0..1000 by 1000"):
        SCHEDULER.add_noise(clip(0), clip(1), 750)


def test_float64_stays_float64():
    """Nothing is rounded to float32 on the way: float64 in, float64 accuracy out."""
    x0, noise = clip(0, torch.float64), clip(1, torch.float64)
    t = torch.tensor([0.3, 0.9], dtype=torch.float64)
    x_t = SCHEDULER.add_noise(x0, noise, t)
    torch.testing.assert_close(SCHEDULER.to_x0(noise - x0, x_t, t), x0, atol=1e-14, rtol=0)


def test_to_x0_passes_the_gradient_of_the_flow():
    """d x0 / d flow = -t: what a training rollout differentiates."""
    flow, t = clip(0).requires_grad_(), TIMES["[B, F]"]
    SCHEDULER.to_x0(flow, clip(1), t).sum().backward()
    torch.testing.assert_close(flow.grad, -t[:, :, None, None, None].expand(SHAPE))


# ---------------------------------------------------------------------------------------------- times of the scores


def test_sample_times_are_uniform_warped_and_clamped():
    """Un-warped, the times between the clamps are uniform; the clamps hold exactly and catch their fair share."""
    t = SCHEDULER.sample_times(20_000, generator(0))
    assert t.shape == (20_000,)
    assert (t.min().item(), t.max().item()) == pytest.approx((0.02, 0.98))
    inverse = FlowMatchScheduler(1 / SCHEDULER.shift).warp
    grid = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    share_below = (inverse(t)[:, None] < grid).float().mean(0)
    torch.testing.assert_close(share_below, grid, atol=0.015, rtol=0)
    assert (t == t.max()).float().mean().item() == pytest.approx(1 - inverse(0.98), abs=0.01)


def test_sample_times_stay_between_low_and_high():
    """low and high bound the un-warped time; minimum and maximum can be opened."""
    t = SCHEDULER.sample_times(5_000, generator(0), low=0.25, high=0.5)
    assert SCHEDULER.warp(0.25) <= t.min() < SCHEDULER.warp(0.26)
    assert SCHEDULER.warp(0.49) < t.max() <= SCHEDULER.warp(0.5)
    wide = SCHEDULER.sample_times(5_000, generator(0), minimum=0.0, maximum=1.0)
    assert wide.min() < 0.02 and wide.max() > 0.98


def test_sample_times_of_a_sample_ignore_its_batch_mates():
    """With one generator per sample, sample 3 gets the same time alone and in a batch."""
    alone = SCHEDULER.sample_times(1, generators(0, "t", samples=[3]))
    assert SCHEDULER.sample_times(4, generators(0, "t", samples=[1, 2, 3, 4]))[2] == alone[0]


# ----------------------------------------------------------------------------------------------------- mistakes


def test_denoising_steps_are_returned_as_a_tuple():
    """Lists and a trailing 0 are accepted; the steps come back as the tuple that everything else uses."""
    assert check_denoising_steps([1000, 500, 0]) == (1000, 500)
    assert check_denoising_steps((1000,)) == (1000,)


@pytest.mark.parametrize(
    "steps", [[], [0], [750, 500], [1000, 500, 500], [1000, 500, 750], [1000, -1], [1000, 500, 0, 0]]
)
def test_wrong_denoising_steps_are_refused(steps):
    """Empty, not from 1000, repeated, rising, negative: each is shown a list that works."""
    with pytest.raises(ValueError, match=r"must fall strictly from 1000 .* such as \[1000, 750, 500, 250\]"):
        SCHEDULER.denoising_times(steps)


@pytest.mark.parametrize("shift", [0, -5.0])
def test_a_shift_that_is_not_positive_is_refused(shift):
    """The sentence says which shift changes nothing and which one Wan uses."""
    with pytest.raises(ValueError, match=r"shift must be positive.*1 leaves time unchanged, Wan uses 5"):
        FlowMatchScheduler(shift)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (2, 2), (2, 3, 1)])
@pytest.mark.parametrize("convert", ["add_noise", "to_x0", "to_flow"])
def test_a_t_that_does_not_fit_the_video_is_refused(convert, shape):
    """A [F] or [F, B] time never broadcasts by accident; the sentence names the forms that fit."""
    with pytest.raises(ValueError, match=r"t must be a float, \[B\] or \[B, F\] for a video of shape"):
        getattr(SCHEDULER, convert)(clip(0), clip(1), torch.full(shape, 0.5))
