"""Graders of lesson 1. `make grade LESSON=1`; each message says which idea is missing."""

import time
from functools import cache

import torch

from moving_mnist import MovingMNIST, WorldConfig


def walked(start, velocity, num_frames, reach):
    """Step by step, for one coordinate: positions, and velocities on leaving."""
    x, v, path = start, velocity, []
    for _ in range(num_frames):
        v = abs(v) if x <= 0 else -abs(v) if x >= reach else v
        path.append((x, v))
        x += v
        if x > reach:
            x, v = 2 * reach - x, -v
        elif x < 0:
            x, v = -x, -v
    return torch.tensor(path, dtype=torch.float64).unbind(1)


def test_it_goes_straight_until_it_meets_a_wall(bounce):
    positions, velocities = bounce(torch.tensor([1.0]), torch.tensor([2.0]), 5, 10)
    assert tuple(positions.shape) == (5, 1), (
        f"Positions are [num_frames, ...], here [5, 1], not {list(positions.shape)}."
    )
    assert positions[:, 0].tolist() == [1, 3, 5, 7, 9] and velocities[:4, 0].tolist() == [2] * 4, (
        f"From 1 at speed 2 it is at 1, 3, 5, 7, 9; yours is at {positions[:, 0].tolist()}."
    )


def test_it_is_reflected_with_what_it_overshot(bounce):
    positions, _ = bounce(torch.tensor([9.0]), torch.tensor([4.0]), 4, 10)
    assert positions[:, 0].tolist() == [9, 7, 3, 1], (
        f"From 9 at speed 4, with a wall at 10: 9, then 13 which is 3 too far, so 7, 3, 1; yours "
        f"{positions[:, 0].tolist()}. It neither stops at the wall nor comes in again at the other side."
    )


def test_at_the_wall_the_velocity_points_inwards(bounce):
    positions, velocities = bounce(torch.tensor([6.0, 4.0]), torch.tensor([2.0, -2.0]), 4, 10)
    assert positions[2].tolist() == [10, 0] and velocities[2].tolist() == [-2, 2], (
        f"At frame 2 both touch a wall, at 10 and at 0, and leave it with -2 and 2; your velocities are "
        f"{velocities[2].tolist()}. Otherwise a motion could not be continued from there."
    )


def test_each_coordinate_moves_by_itself(bounce):
    torch.manual_seed(0)
    start, velocity = torch.rand(6, 2, dtype=torch.float64) * 10, (torch.rand(6, 2, dtype=torch.float64) - 0.5) * 12
    positions, velocities = bounce(start, velocity, 60, 10)
    for i, k in ((0, 0), (0, 1), (3, 1), (5, 0)):
        right, leaving = walked(start[i, k].item(), velocity[i, k].item(), 60, 10)
        off = (positions[:, i, k] - right).abs().max()
        assert off < 1e-6, (
            f"From {start[i, k]:.2f} with velocity {velocity[i, k]:.2f} yours is {off:.2g} pixels off a walk step by "
            "step. Does a motion to the left start on its way back? It has not touched the far wall yet."
        )
        assert torch.allclose(velocities[:, i, k].double(), leaving), (
            "The signs of the velocities are not those of the walk."
        )


def test_it_does_not_walk(bounce):
    begin = time.process_time()
    positions, _ = bounce(
        torch.tensor([0.25], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64), 50_001, 10
    )
    assert time.process_time() - begin < 0.3, (
        "Fifty thousand frames take their time: yours walks from one to the next, a closed form does not."
    )
    right = 0.25 + 3.0 * 50_000
    right = 10 - abs(right % 20 - 10)
    assert abs(positions[-1, 0].item() - right) < 1e-6, (
        "Fifty thousand frames later it is elsewhere. A motion between two mirrors is a triangle wave."
    )


def middles(centre_of_mass, ink):
    """The answer in float32, whatever it was computed in."""
    return torch.as_tensor(centre_of_mass(ink)).float()


def test_one_pixel_is_its_own_middle(centre_of_mass):
    ink = torch.zeros(5, 9)
    ink[1, 7] = 0.3
    got = middles(centre_of_mass, ink).tolist()
    assert [round(x, 4) for x in got] == [1, 7], (
        f"A single pixel in row 1, column 7 has its middle at (1, 7), not {got}: y first, and pixel k lies at k."
    )


def test_brighter_pixels_weigh_more(centre_of_mass):
    ink = torch.zeros(2, 6, 6)
    ink[0, 2, 1], ink[0, 2, 5] = 0.25, 0.75
    ink[1] = 2 * ink[0]
    got = middles(centre_of_mass, ink)
    assert torch.allclose(got[0], torch.tensor([2.0, 4.0]), atol=1e-4), (
        f"A quarter of the ink at column 1 and three quarters at column 5 balance at column 4, not {got[0].tolist()}."
    )
    assert torch.allclose(got[0], got[1], atol=1e-4), "Twice the ink at the same places has the same middle."


def test_any_number_of_axes_before(centre_of_mass):
    torch.manual_seed(0)
    ink = torch.rand(2, 3, 7, 5)
    got = middles(centre_of_mass, ink)
    assert tuple(got.shape) == (2, 3, 2), f"Ink [2, 3, 7, 5] has middles [2, 3, 2], yours {list(got.shape)}."
    alone = torch.stack([torch.stack([middles(centre_of_mass, x) for x in row]) for row in ink])
    assert torch.allclose(got, alone, atol=1e-4), "Each picture has a middle of its own."


def test_no_ink_is_in_the_middle(centre_of_mass):
    got = middles(centre_of_mass, torch.zeros(3, 5, 8))
    assert torch.allclose(got, torch.tensor([2.0, 3.5]).expand(3, 2)), (
        f"Without ink the middle of the canvas, (2, 3.5) for 5 x 8, not {got[0].tolist()}: 0 / 0 would poison "
        "every mean."
    )


def gaussian(seed, dim=4):
    factor = torch.randn(dim, 2 * dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor[:, 0], factor @ factor.T / dim


def near(got, right):
    """As near as the answer's own precision allows."""
    return abs(float(got) - right) < (1e-4 if getattr(got, "dtype", None) == torch.float32 else 1e-6)


def test_the_same_gaussian_is_at_no_distance(frechet_between):
    mean, covariance = gaussian(0)
    got = frechet_between(mean, covariance, mean, covariance)
    assert near(got, 0), f"A Gaussian is at distance 0 from itself, yours says {got:.3g}."


def test_means_count_squared(frechet_between):
    mean, covariance = gaussian(0)
    got = frechet_between(mean, covariance, mean + 3, covariance)
    assert near(got, 36), f"Four means, each 3 apart, are 4 x 9 = 36, not {got:.3g}: the distance is squared."


def test_widths_count_as_standard_deviations(frechet_between):
    zero, first, second = torch.zeros(2, dtype=torch.float64), torch.tensor([4.0, 9.0]), torch.tensor([1.0, 25.0])
    got = frechet_between(zero, torch.diag(first).double(), zero, torch.diag(second).double())
    assert near(got, 5), f"Standard deviations 2 and 3 against 1 and 5: (2 - 1)^2 + (3 - 5)^2 = 5, yours {got:.3g}."


def test_covariances_that_do_not_commute(frechet_between):
    mean = torch.zeros(2, dtype=torch.float64)
    first = torch.tensor([[2.0, 1.2], [1.2, 1.0]], dtype=torch.float64)
    second = torch.tensor([[1.0, -0.7], [-0.7, 3.0]], dtype=torch.float64)
    product = first @ second  # in two dimensions tr M^1/2 = sqrt(tr M + 2 sqrt det M)
    right = first.trace() + second.trace() - 2 * (product.trace() + 2 * product.det().sqrt()).sqrt()
    for pair in ((first, second), (second, first)):
        got = frechet_between(mean, pair[0], mean, pair[1])
        assert near(got, right), (
            f"For two covariances with different axes it is {right:.4f}, yours {got:.4f}. S1^1/2 S2^1/2 is not "
            "(S1 S2)^1/2, and the root of a matrix is not that of its entries."
        )


def test_few_samples_do_not_break_it(frechet_between):
    mean, covariance = gaussian(1, dim=6)
    few = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got = frechet_between(mean, covariance, few.mean(0), few.T.cov())
    assert got == got and got > 0, (
        f"Three samples in six dimensions give {got}: a covariance without full rank has eigenvalues that rounding "
        "makes a little negative. Their root is 0."
    )


@cache
def real(sub_pixel=False):
    """Real clips, faster than pixels where sub_pixel."""
    config = WorldConfig(split="validation", sub_pixel=sub_pixel, speed=1.7 if sub_pixel else 2)
    return MovingMNIST(config, seed=5).batch(range(24))["video"]


def lit(videos, brightness):
    """Ink times brightness [B, F] or [F]."""
    return (videos + 1) * brightness[..., None, None, None] - 1


def flickering():
    """Frames at 0.9 and 0.7 of their brightness in turn; half of the clips begin dark."""
    turn = (torch.arange(24)[:, None] + torch.arange(12)) % 2
    return lit(real(), 0.7 + 0.2 * turn)


def test_it_sees_flicker(flicker):
    still, moved = flicker(real()), flicker(flickering())
    assert tuple(still.shape) == (24,), f"One number per video, [24], not {list(still.shape)}."
    assert moved.min() > still.max() and moved.mean() - still.mean() > 3 * still.std(), (
        f"Clips whose brightness jumps by a quarter score {moved.mean():.3g}, real ones {still.mean():.3g} with a "
        f"spread of {still.std():.3g}: the fault should stand out by more than three spreads, clip by clip."
    )


def test_motion_is_no_flicker(flicker):
    between = flicker(real(sub_pixel=True))
    assert between.mean() < 0.2 * flicker(flickering()).mean(), (
        f"Clips that move by parts of a pixel score {between.mean():.3g}, too close to flickering ones. What moves "
        "changes pixels; what flickers changes how much ink there is in all."
    )


def test_fading_is_no_flicker(flicker):
    faded = flicker(lit(real(), torch.linspace(1, 0.2, 12)))
    assert faded.mean() < 0.25 * flicker(flickering()).mean(), (
        f"A slow fade scores {faded.mean():.3g}, flicker {flicker(flickering()).mean():.3g}. Ink has a metric for what "
        "goes slowly: compare a frame with what the ones before and after it let you expect."
    )


def test_a_darker_copy_flickers_as_much(flicker):
    bright, dark = flicker(flickering()), flicker(lit(flickering(), torch.full((12,), 0.6)))
    assert (dark / bright - 1).abs().max() < 0.25, (
        "The same flicker in a darker copy scores otherwise: give it relative to the ink of the clip, or thin digits "
        "would seem to flicker less than fat ones."
    )


def test_a_black_video_has_a_value(flicker):
    assert flicker(torch.full((2, 12, 1, 24, 24), -1.0)).isfinite().all(), (
        "A black video gives NaN: guard the division."
    )
