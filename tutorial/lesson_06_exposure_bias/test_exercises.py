"""Graders of lesson 6. `make grade LESSON=6`; each message says which idea is missing."""

import numpy as np
import torch

from flow_match import FlowMatchScheduler
from kv_cache import KVCache
from randomness import generator

# ---------------------------------------------------------------------------------------------------- error_growth


def test_the_first_frame_has_one_frames_noise(error_growth):
    got = torch.as_tensor(error_growth(0.9, 0.3, 1))
    assert got.shape == (1,) and abs(got[0].item() - 0.09) < 1e-6, (
        f"After one frame, which continues a true one, the variance is that of the noise, 0.3^2 = 0.09; yours: {got}."
    )


def test_slope_one_is_a_random_walk(error_growth):
    got = torch.as_tensor(error_growth(1.0, 0.2, 50)).double()
    right = 0.04 * torch.arange(1, 51).double()
    assert got.shape == (50,) and torch.allclose(got, right, atol=1e-5), (
        "With slope 1 nothing of an error is lost, so variances add up: f * noise^2 after f frames. (Variances, "
        "not standard deviations; and a formula that divides by 1 - slope^2 needs a case of its own here.)"
    )


def test_a_slope_below_one_comes_to_rest(error_growth):
    got = torch.as_tensor(error_growth(0.8, 0.5, 200)).double()
    rest = 0.25 / (1 - 0.64)
    assert abs(got[-1].item() - rest) < 1e-4, (
        f"An error that is multiplied by 0.8 per frame fades: the sum ends at noise^2 / (1 - slope^2) = {rest:.3f}, "
        f"yours at {got[-1].item():.3f}. A factor on the error is a squared factor on its variance."
    )


def test_it_is_what_a_simulation_says(error_growth):
    rng, error, variance = generator(0, "growth"), torch.zeros(200_000), []
    for _ in range(6):
        error = -0.9 * error + 0.3 * torch.randn(error.shape, generator=rng)
        variance.append(error.var())
    got = torch.as_tensor(error_growth(-0.9, 0.3, 6)).float()
    assert torch.allclose(got, torch.stack(variance), rtol=0.03), (
        f"200,000 simulated errors have the variances {[round(v.item(), 3) for v in variance]}, yours are "
        f"{[round(v, 3) for v in got.tolist()]}. (The slope is negative here: errors may change their sign.)"
    )


# ------------------------------------------------------------------------------------------------------------- gap


def test_lost_accuracy_is_above_zero(gap):
    got = np.asarray(gap(np.array([0.9, 0.7, 0.5]), np.array([0.9, 0.9, 0.9])))
    assert got.shape == (3,) and np.allclose(got, [0, 0.2, 0.4]), (
        f"Accuracy 0.9, 0.7, 0.5 on the own past and 0.9 on the true one is a gap of 0, 0.2, 0.4; yours: {got}."
    )


def test_a_larger_error_is_above_zero_too(gap):
    got = np.asarray(gap(np.array([0.5, 2.0]), np.array([0.4, 0.5]), better="low"))
    assert np.allclose(got, [0.1, 1.5]), (
        f"Of an error less is better: 2.0 on the own past and 0.5 on the true one is a gap of 1.5; yours: {got}."
    )


def test_too_much_ink_is_as_bad_as_too_little(gap):
    got = np.asarray(gap(np.array([0.6, 1.4, 1.1]), np.array([1.1, 0.9, 0.8]), better="one"))
    assert np.allclose(got, [0.3, 0.3, -0.1]), (
        "Of a ratio the distance from 1 counts: ink 0.6 and ink 1.4 are equally far off; and a gap may be below 0 "
        f"where the true past was worse. Expected 0.3, 0.3, -0.1, yours: {got}."
    )


def test_seeds_are_averaged(gap):
    own, true = torch.tensor([[0.8, 0.6], [0.6, 0.2]]), torch.tensor([0.9, 0.8])
    got = np.asarray(gap(own, true))
    assert got.shape == (2,) and np.allclose(got, [0.2, 0.4], atol=1e-6), (
        f"[num_seeds, F] on one side and [F] on the other, tensors or arrays: average the seeds first. Yours: {got}."
    )
    wobbling = np.asarray(gap(np.array([[0.8], [1.2]]), np.array([1.0]), better="one"))
    assert np.allclose(wobbling, [0], atol=1e-6), (
        f"Seeds with ink 0.8 and 1.2 have a mean of 1: average first, then take the distance. Yours: {wobbling}."
    )


# ----------------------------------------------------------------------------------------------------------- drift


def records(*curves, metric="digit_accuracy"):
    """One record per seed."""
    return [{"curves": {metric: list(curve)}} for curve in curves]


def stairs(first, early, late):
    """A curve over 48 frames: first block, up to frame 36, and from there on."""
    return [first] * 3 + [early] * 33 + [late] * 12


def test_a_level_is_no_drift(drift):
    got = np.asarray(drift(records([0.4] * 48, [0.9] * 48), "digit_accuracy", "3T-4T"))
    assert np.allclose(got, 0), (
        f"Neither a student that is always right in 4 of 10 frames nor one in 9 of 10 loses anything; yours says {got}."
    )


def test_it_is_a_change_since_the_first_block(drift):
    own = records(stairs(0.9, 0.7, 0.5))
    got = [float(np.squeeze(drift(own, "digit_accuracy", span))) for span in ("first block", "0-T", "T-2T", "3T-4T")]
    assert np.allclose(got, [0, -0.15, -0.2, -0.4]), (
        "Accuracy is 0.9 in the first block, 0.7 up to frame 36 and 0.5 from there on. Since the first block it has "
        f"changed by 0 there, by -0.15 over 0-T (which has the first block in it), by -0.2 over T-2T and by -0.4 over "
        f"3T-4T; yours: {np.round(got, 3)}. A difference of means, below 0 where it fell."
    )


def test_the_first_block_is_more_than_a_frame(drift):
    got = float(np.squeeze(drift(records([0.5, 0.8, 0.8] + [0.6] * 45), "digit_accuracy", "3T-4T")))
    assert abs(got + 0.1) < 1e-6, (
        "The first block's frames, 0.5, 0.8 and 0.8, have the mean 0.7, and 0.6 is 0.1 below it; yours says "
        f"{got:+.3f}. All frames of the first block are without a past, the very first one is only the worst of them."
    )


def test_every_seed_has_its_own(drift):
    got = np.asarray(drift(records(stairs(0.9, 0.9, 0.5), stairs(0.5, 0.5, 0.9)), "digit_accuracy", "3T-4T"))
    assert got.shape == (2,) and np.allclose(got, [-0.4, 0.4]), (
        "One seed lost 0.4, the other won 0.4: two numbers, in the records' order. Averaged they would be 0, and "
        f"nobody could say how much seeds differ. Yours: {got}."
    )


def test_another_metric_has_its_own_sign(drift):
    own = records(stairs(0.3, 0.5, 1.5), metric="motion_error")
    got = float(np.squeeze(drift(own, "motion_error", "3T-4T")))
    assert abs(got - 1.2) < 1e-6, (
        f"An error that grew from 0.3 to 1.5 has changed by +1.2, not by {got:+.3f}: the change itself, whatever is "
        "good or bad; and of the metric that was asked for."
    )


def test_short_videos_have_no_far_end(drift):
    got = np.asarray(drift(records([0.8] * 24), "digit_accuracy", "3T-4T"), dtype=float)
    assert np.isnan(got).all(), f"Videos of 24 frames say nothing about frames 36 to 48: NaN, not {got}."


# -------------------------------------------------------------------------------------------------------- DataPast

SCHEDULER = FlowMatchScheduler(3.0)


class Recorder:
    """A generator that writes down what it is given to remember."""

    def __init__(self):
        self.seen, self.levels, self.asked = [], [], []

    def __call__(self, x_t, t, cond, cache=None):
        self.asked.append(x_t)
        return 2 * x_t

    def remember(self, x, t, cond, cache):
        self.seen.append(x)
        self.levels.append(t)
        return cache.extend([(x.flatten(2)[:, :, None],) * 2], x.shape[1])


def clip(num_frames=6, batch=2):
    return torch.arange(float(batch * num_frames)).reshape(batch, num_frames, 1, 1, 1).expand(-1, -1, 1, 2, 2)


def remembered(wrapped, blocks, t=0.0):
    cache = KVCache()
    for block in blocks:
        cache = wrapped.remember(block, t, {}, cache)
    return cache


def test_it_remembers_the_data_at_its_place(DataPast):
    data, recorder = clip(), Recorder()
    cache = remembered(DataPast(recorder, SCHEDULER, data), torch.full_like(data, -7.0).split(2, dim=1))
    assert cache.next_frame == 6, "remember returns the cache that the generator returns, extended by the block."
    assert torch.equal(torch.cat(recorder.seen, dim=1), data), (
        "Three blocks of two frames were made; remembered should be frames 0 and 1, then 2 and 3, then 4 and 5 of the "
        f"data, whatever was made. Remembered were {[x[0, :, 0, 0, 0].tolist() for x in recorder.seen]}. "
        "cache.next_frame says where a block stands."
    )


def test_it_makes_frames_as_the_generator_does(DataPast):
    x_t, cache = torch.randn(2, 2, 1, 2, 2), KVCache()
    recorder = Recorder()
    got = DataPast(recorder, SCHEDULER, clip())(x_t, 0.5, {}, cache)
    assert torch.equal(got, 2 * x_t), "The call is the generator's own: only the past is replaced."


def test_it_remembers_at_the_level_that_it_is_asked_for(DataPast):
    data, recorder = torch.zeros(1, 2, 1, 32, 32), Recorder()
    remembered(DataPast(recorder, SCHEDULER, data, rng=generator(0, "a")), [data], t=0.15)
    assert recorder.levels == [0.15] and abs(recorder.seen[0].std().item() - 0.15) < 0.01, (
        "With context_noise the past is remembered noised to t (scheduler.add_noise with fresh noise), and the model "
        f"is told so: expected t = 0.15, and noise of that size on black data, got t = {recorder.levels} and "
        f"{recorder.seen[0].std().item():.2f}."
    )


def test_a_noisy_past_has_its_own_levels(DataPast):
    data, recorder = torch.zeros(256, 2, 1, 8, 8), Recorder()
    remembered(DataPast(recorder, SCHEDULER, data, noisy=True, rng=generator(0, "b")), [data])
    t = torch.as_tensor(recorder.levels[0])
    t = t[:, 0] if t.ndim == 2 and (t == t[:, :1]).all() else t  # [B, 1] and [B, n] say the same
    assert t.shape == (256,) and t.unique().numel() > 200, (
        "With noisy=True every sample's block has a level of its own: t [B], drawn anew in every remember."
    )
    assert abs(t.mean().item() - 0.676) < 0.05, (
        f"The levels are uniform and then warped, as in diffusion forcing: at shift 3 their mean is 0.68, yours "
        f"{t.mean().item():.2f}."
    )
    assert torch.allclose(recorder.seen[0].std((1, 2, 3, 4)), t, rtol=0.35, atol=0.02), (
        "Noise and level must agree: noise the data to the very t that the model is told."
    )


def test_every_block_of_a_noisy_past_has_another_level(DataPast):
    data, recorder = torch.zeros(8, 4, 1, 8, 8), Recorder()
    remembered(DataPast(recorder, SCHEDULER, data, noisy=True, rng=generator(0, "c")), data.split(2, dim=1))
    first, second = (torch.as_tensor(t).flatten() for t in recorder.levels)
    assert not torch.equal(first, second), "Two blocks were remembered at the same levels: draw t in every remember."


def test_it_says_where_the_data_end(DataPast):
    data = clip(3)
    wrapped = DataPast(Recorder(), SCHEDULER, data)
    cache = remembered(wrapped, [data[:, :2]])
    try:
        wrapped.remember(torch.zeros(2, 2, 1, 2, 2), 0.0, {}, cache)
        refused = False
    except (ValueError, AssertionError) as error:
        refused = isinstance(error, ValueError)
    assert refused, (
        "The data have 3 frames and frames 2 and 3 were asked for: raise a ValueError that says so, or a block of "
        "one frame is remembered in the place of two."
    )


# ------------------------------------------------------------------------------------------------------- MixedPast


def sources(MixedPast, data_share, num_blocks=100, batch=2):
    """Which blocks were remembered from the data: bool [num_blocks]. The data are 1, what was made is -1."""
    recorder, data = Recorder(), torch.ones(batch, num_blocks, 1, 1, 1)
    wrapped = MixedPast(recorder, SCHEDULER, data, data_share, rng=generator(0, "coin"))
    cache = remembered(wrapped, (-data).split(1, dim=1))
    assert tuple(cache.frames) == tuple(range(num_blocks)), "Every block is remembered once, from one of the two."
    return torch.stack([x.flatten() for x in recorder.seen]) > 0  # [blocks, b]


def test_the_ends_are_the_two_pasts(MixedPast):
    assert sources(MixedPast, 1.0).all(), "With data_share 1 the past is the data's, always."
    assert not sources(MixedPast, 0.0).any(), "With data_share 0 the past is the model's own, always."


def test_the_share_is_kept(MixedPast):
    share = sources(MixedPast, 0.25)[:, 0].float().mean().item()
    assert 0.12 < share < 0.38, f"Of 100 blocks about a quarter should come from the data, not {share:.2f} of them."


def test_the_batch_shares_the_coin(MixedPast):
    found = sources(MixedPast, 0.5, batch=3)
    assert (found == found[:, :1]).all(), "The samples of a batch are remembered in one call: one coin for all of them."
    assert 0 < found[:, 0].float().mean() < 1, "Throw the coin for every block, not once for the whole video."


def test_it_draws_from_its_rng(MixedPast):
    torch.manual_seed(1)
    first = sources(MixedPast, 0.5)
    torch.manual_seed(2)
    second = sources(MixedPast, 0.5)
    assert torch.equal(first, second), (
        "The coin comes from rng, not from torch's global state: otherwise a resumed training differs from one that "
        "was never interrupted."
    )


def test_frames_are_made_as_ever(MixedPast):
    x_t = torch.randn(2, 2, 1, 2, 2)
    got = MixedPast(Recorder(), SCHEDULER, clip(), 0.5)(x_t, 0.5, {}, KVCache())
    assert torch.equal(got, 2 * x_t), "The call is the generator's own: only what is remembered is mixed."
