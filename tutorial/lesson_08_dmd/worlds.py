"""Two worlds of lesson 8 in which a run takes seconds: free points in the plane, and Gaussians on a line.

The points are a student without a network: each is a video of one frame of two pixels, and moves by itself. The
Gaussians leave logs like those of train.py, healthy ones and sick ones.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn

from dynamic_video_sf import dmd_loss, flow_matching_loss
from experiments.gaussian_mixture import PIXELS, SCHEDULER, Mixture
from randomness import generator, randn

CORNERS = [[-1.0, 0.6], [1.0, 0.6], [0.0, -1.1], [0.0, 0.2]]
TARGET = Mixture(CORNERS, [0.4, 0.3, 0.2, 0.1], 0.15)
FAULTS = ("healthy", "critic_frozen", "critic_on_data", "wrong_sign", "no_gradient")

Critic = Callable[[Tensor], Callable]


def exact_critic(points: Tensor) -> Mixture:
    """What a perfect critic knows of points [N, 2]: a narrow Gaussian around each."""
    return Mixture(points.tolist(), [1 / len(points)] * len(points), 0.1)


def frozen_critic(points: Tensor) -> Critic:
    """A critic that was perfect once, of these points, and never learned again."""
    known = exact_critic(points)
    return lambda points: known


def scattered(num_points: int) -> Tensor:
    """Points [N, 2] all over the plane."""
    return randn((num_points, 2), generator(0, "points"))


def crowded(num_points: int) -> Tensor:
    """Points [N, 2] around one of the four means."""
    return torch.tensor(CORNERS[2]) + 0.2 * scattered(num_points)


def move_points(
    start: Tensor, loss=dmd_loss, critic: Critic = exact_critic, *, teacher=TARGET, num_steps=400, lr=0.1, **options
) -> Iterator[tuple[Tensor, float]]:
    """Yield the points [N, 2] and the value of the loss, at the start and after each step of gradient descent.

    critic(points) -> the critic of that step. options: of the loss, instead of no prompt and no guidance.
    """
    rng = generator(0, "steps")
    given = {"cond": {}, "uncond": {}, "guidance_scale": 1.0} | options
    videos = start.clone().view(-1, *PIXELS).requires_grad_()
    for step in range(num_steps + 1):
        points = videos.detach().flatten(1)
        value = loss(videos, teacher, critic(points), SCHEDULER, rng=rng, **given)
        yield points.clone(), value.item()
        (gradient,) = torch.autograd.grad(value, videos)
        with torch.no_grad():
            videos -= lr * (1 - step / num_steps) * videos.numel() * gradient


class Line(nn.Module):
    """A critic that believes that pixels are N(mean, 1) and can learn the mean."""

    def __init__(self, mean: float):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))

    def forward(self, x_t: Tensor, t: Tensor, cond) -> Tensor:
        t = t.reshape(-1, 1, 1, 1, 1)
        shrink = (1 - t) / ((1 - t) ** 2 + t**2)
        x0 = self.mean + shrink * (x_t - (1 - t) * self.mean)
        return (x_t - x0) / t


@lru_cache
def log_of(fault: str, seed: int, num_steps=80, batch=32) -> dict[str, list[float]]:
    """The log of a run with one of the FAULTS: column of metrics.csv -> one number per step.

    In the teacher's videos every pixel is N(0, 1), in the student's N(m, 1), and m is what is learned. Raises
    ValueError for a fault that is none.
    """
    if fault not in FAULTS:
        raise ValueError(f"There is no fault {fault}; known are {', '.join(FAULTS)}.")
    rng, shape = generator(seed, "line"), (batch, 1, 1, 4, 4)
    start = 2 + 2 * torch.rand(1, generator=rng).item()
    teacher, student = Line(0.0), nn.Parameter(torch.tensor(start))
    critic = Line(0.0 if fault == "critic_on_data" else start)
    log = defaultdict(list)

    def note(name=None, score_distance=None, normaliser=None, **values):
        if score_distance is not None:
            log["score_distance"].append(score_distance.mean().item())
            log["normaliser"].append(normaliser.mean().item())

    def descend(parameter, loss, lr, name):
        (gradient,) = torch.autograd.grad(loss, parameter)
        log[f"{name}_loss"].append(loss.item())
        log[f"{name}_grad_norm"].append(gradient.abs().item())
        parameter.data -= lr * gradient

    for _ in range(num_steps):
        videos = student + randn(shape, rng)
        loss = dmd_loss(videos, teacher, critic, SCHEDULER, {}, {}, 1.0, rng=rng, observe=note)
        sign = {"wrong_sign": -1, "no_gradient": 0}.get(fault, 1)
        descend(student, sign * loss, 0.2, "generator")
        log["generator_loss"][-1] = loss.item()
        data = randn(shape, rng)
        seen = data if fault == "critic_on_data" else videos.detach()
        loss = flow_matching_loss(critic, SCHEDULER, seen, {}, rng=rng)
        descend(critic.mean, loss, 0 if fault == "critic_frozen" else 0.5, "critic")
    return dict(log)
