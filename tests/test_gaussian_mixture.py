"""The family in two dimensions: where its students end, first frames against the formula, and a record that draws."""

import json

import pytest
import torch
from tiny_runs import REPOSITORY, some_slow

from experiments.gaussian_mixture import (
    FRAMES,
    NUM_POINTS,
    PIXELS,
    RECORD,
    RUNS,
    TARGET,
    Mixture,
    distil,
    draw,
    first_frames,
    judge,
    measure,
)
from randomness import generator, randn

PAIR = Mixture([[-1.0, 0.5], [1.0, -0.5]], [0.3, 0.7], 0.3)


def test_a_mixtures_flow_is_that_of_its_density():
    """x_t is a mixture too, of means (1 - t) m and variances ((1 - t) std)^2 + t^2. Its log-density's gradient, from
    autograd, is -E[noise | x_t] / t, and x0 follows from the noise."""
    t = torch.tensor([0.1, 0.4, 0.7, 0.95])
    x = randn((4, 2), generator(0, "places")).requires_grad_()
    variance = ((1 - t) * TARGET.std) ** 2 + t**2
    square = (x[:, None] - (1 - t)[:, None, None] * TARGET.means).square().sum(-1)
    density = (TARGET.weights.log() - square / (2 * variance[:, None])).logsumexp(1)
    (score,) = torch.autograd.grad(density.sum(), x)
    noise = -t[:, None] * score
    flow = noise - (x.detach() - t[:, None] * noise) / (1 - t[:, None])
    torch.testing.assert_close(TARGET(x.detach().view(4, *PIXELS), t, {}).flatten(1), flow, atol=1e-3, rtol=1e-3)


def test_judge():
    """Data are within three standard deviations of a mean as often as theory says of the plane, 1 - exp(-9 / 2), and in
    the right shares; points that all sit on the rarest mean are on target, and off by the shares of the others."""
    found = judge(TARGET.sample(4000, generator(0, "data")), TARGET)
    assert found["on_target"] == pytest.approx(0.989, abs=0.006) and found["share_error"] < 0.03
    found = judge(TARGET.means[3:].repeat(50, 1), TARGET)
    assert found["on_target"] == 1 and found["share_error"] == pytest.approx(0.9)
    assert judge(TARGET.means + torch.tensor([0.0, 3.1 * TARGET.std]), TARGET)["on_target"] == 0


@pytest.mark.parametrize("objective", some_slow(["sid", "gan"], {"gan"}))
def test_the_others_reach_the_mixture_too(objective):
    """As DMD does in test_self_forcing.py: mean, shares of the components and spread."""
    start, end = distil(PAIR, objective, num_steps=200, snapshots=(0,))
    shares = torch.cdist(end, PAIR.means).argmin(1).bincount(minlength=2) / len(end)
    mean, square = PAIR.weights @ PAIR.means, PAIR.weights @ PAIR.means.square()
    torch.testing.assert_close(end.mean(0), mean, atol=0.15, rtol=0)
    torch.testing.assert_close(shares, PAIR.weights, atol=0.08, rtol=0)
    torch.testing.assert_close(end.var(0), PAIR.std**2 + square - mean.square(), atol=0, rtol=0.3)
    assert start.var(0).max() < 0.1  # from a crowd


@pytest.mark.parametrize("causal_teacher", [False, True])
def test_first_frames_are_what_each_teachers_pairs_teach(causal_teacher):
    """A function of their own noise n: sign(n) of a causal teacher, and 2 Phi(n) - 1, the mean over the noise of the
    other frame, of a bidirectional one."""
    noise = randn((4000, *FRAMES), generator(0, "look"))[:, 0].flatten()
    formulas = {False: 2 * torch.distributions.Normal(0.0, 1.0).cdf(noise) - 1, True: noise.sign()}
    found = first_frames(causal_teacher)
    off = {kind: (found - formula).square().mean().sqrt().item() for kind, formula in formulas.items()}
    assert off[causal_teacher] < 0.8 * off[not causal_teacher]
    between = (found.abs() < 0.5).float().mean()  # 1/2 and 0 by the formulas; a small network has no step as steep
    assert 0.4 < between < 0.55 if not causal_teacher else between < 0.25


def test_a_record_is_enough_to_draw(tmp_path):
    """What `measure` returns survives JSON, and `draw` needs nothing else."""
    record = json.loads(json.dumps(measure(steps=(0, 1), pair_steps=1)))
    assert record["points"].keys() == RUNS.keys() and record["distilled"].keys() == {"data", *RUNS}
    assert all(len(seen) == 2 and len(seen[0]) == NUM_POINTS for seen in record["points"].values())
    draw(record, tmp_path / "figures" / "mixture.png")
    assert (tmp_path / "figures" / "mixture.png").stat().st_size > 10_000


def test_the_record_that_ships(tmp_path):
    """Small, drawn without a run, and its numbers are those of the points that it keeps; data bound every student."""
    path = REPOSITORY / RECORD
    record = json.loads(path.read_text())
    assert path.stat().st_size < 200_000
    draw(record, tmp_path / "mixture.png")
    for name, seen in record["points"].items():
        assert judge(torch.tensor(seen[-1]), TARGET)["on_target"] == pytest.approx(
            record["distilled"][name]["on_target"], abs=0.06
        )
        assert record["distilled"][name]["on_target"] < record["distilled"]["data"]["on_target"]
    assert record["distilled"]["data"]["on_target"] == pytest.approx(0.989, abs=0.006)
    for name, x in record["first_frames"].items():
        between = (torch.tensor(x).abs() < 0.5).float().mean().item()
        assert between == pytest.approx(record["between_the_modes"][name], abs=0.05)
