"""The family in two dimensions, where every teacher is exact: python -m experiments.gaussian_mixture

A clip is two numbers, the data are a mixture of Gaussians, and so the teacher's flow is a formula. First a one-step
student is trained by DMD, SiD and a GAN with the functions of dynamic_video_sf.py: the two numbers are the pixels of a
frame. Then they are two frames of one pixel, and a causal student learns from ODE pairs of a bidirectional and of a
causal teacher. Writes experiments/records/gaussian_mixture.json, in a minute or two, and of that record
docs/results/gaussian_mixture.png.

No one-step student is as often near a mean as data are. Its network is continuous: between the noise that becomes one
cloud and the noise that becomes the next lies noise that ends between them, the less of it the steeper the network.
"""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint import atomic
from dynamic_video_sf import (
    RolloutConfig,
    SelfForcingConfig,
    flow_matching_loss,
    gan_step,
    generate,
    ode_regression_loss,
    ode_trajectory,
    self_forcing_step,
    sid_loss,
)
from flow_match import FlowMatchScheduler
from ode_pairs import grid
from randomness import generator, randn
from run_folder import machine
from visualization.mixtures import plot_mixtures

SCHEDULER = FlowMatchScheduler()
PIXELS = (1, 1, 1, 2)  # F, C, H, W: one frame of two pixels
FRAMES = (2, 1, 1, 1)  # two frames of one pixel
FIGURE, RECORD = Path("docs/results/gaussian_mixture.png"), Path("experiments/records/gaussian_mixture.json")
RUNS = {
    "DMD": {"objective": "dmd"},
    "DMD, critic not trained": {"objective": "dmd", "train_critic": False},
    "SiD": {"objective": "sid"},
    "GAN": {"objective": "gan"},
}
NUM_POINTS = 400  # of each snapshot, that a record keeps


class Mixture:
    """Gaussians of one standard deviation: means [K, D], weights [K]. As a model, its exact flow."""

    def __init__(self, means, weights, std: float):
        self.means, self.weights, self.std = torch.tensor(means), torch.tensor(weights), std

    def __call__(self, x_t: Tensor, t, cond, cache=None) -> Tensor:
        """E[noise - x0 | x_t] in closed form, for clips of D numbers."""
        t = torch.as_tensor(t, dtype=x_t.dtype).reshape(-1, 1)
        return self.flow(x_t.flatten(1), t, self.weights.log()).view_as(x_t)

    def flow(self, x: Tensor, t: Tensor, log_weights: Tensor) -> Tensor:
        """The flow of points [B, D] at times [B, 1], the components weighing exp(log_weights [K] or [B, K])."""
        variance = ((1 - t) * self.std) ** 2 + t**2
        off = x[:, None] - (1 - t)[..., None] * self.means[:, : x.shape[1]]  # [b k d]
        share = (log_weights - off.square().sum(-1) / (2 * variance)).softmax(-1)[..., None]
        shrink = ((1 - t) * self.std**2 / variance)[..., None]
        x0 = (share * (self.means[:, : x.shape[1]] + shrink * off)).sum(1)
        return (x - x0) / t

    def remember(self, x: Tensor, t, cond, cache):
        return cache.extend([(x.flatten(2)[:, :, None],) * 2], x.shape[1])

    def sample(self, count: int, rng) -> Tensor:
        """Points [count, D]."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=rng)
        return self.means[chosen] + self.std * randn((count, self.means.shape[1]), rng)


class CausalMixture(Mixture):
    """The same data told frame by frame: the flow of the next number, given those before it clean."""

    def __call__(self, x_t: Tensor, t, cond, cache=None) -> Tensor:
        t = torch.as_tensor(t, dtype=x_t.dtype).reshape(-1, 1)
        log_weights = self.weights.log()
        done = len(cache.frames)
        if done:
            past = cache.layers[0][0].flatten(1)  # [b frames]
            distance = (past[:, None] - self.means[:, :done]).square().sum(-1)
            log_weights = log_weights - distance / (2 * self.std**2)
        ahead = Mixture(self.means[:, done:].tolist(), self.weights.tolist(), self.std)
        return ahead.flow(x_t.flatten(1), t, log_weights).view_as(x_t)


TARGET = Mixture([[-1.0, 0.6], [1.0, 0.6], [0.0, -1.1], [0.0, 0.2]], [0.4, 0.3, 0.2, 0.1], 0.15)


def perceptron(num_inputs: int, num_outputs: int, width: int, num_layers: int = 2) -> nn.Sequential:
    sizes = [num_inputs, *[width] * num_layers]
    hidden = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*hidden, nn.Linear(width, num_outputs))


class OneStep(nn.Module):
    """A student that makes its frame in one step, from pure noise."""

    def __init__(self):
        super().__init__()
        self.net = perceptron(2, 2, 64, num_layers=3)

    def forward(self, x_t, t, cond, cache):
        return x_t - self.net(x_t.flatten(1)).view_as(x_t)

    def remember(self, x, t, cond, cache):
        return cache.extend([], x.shape[1])


class Network(nn.Module):
    """A critic (two outputs: the flow) or a discriminator (one: the logit)."""

    def __init__(self, num_outputs: int, width: int = 64):
        super().__init__()
        self.net = perceptron(3, num_outputs, width)

    def forward(self, x_t, t, cond):
        y = self.net(torch.cat([x_t.flatten(1), t[:, None]], dim=1))
        return y.view_as(x_t) if y.shape[1] == 2 else y[:, 0]


def distil(
    target: Mixture, objective: str, num_steps=300, batch=256, snapshots=(), train_critic=True, lr=5e-3
) -> list[Tensor]:
    """A one-step student under "dmd", "sid" or "gan": its points [4000, 2] after each of the snapshots' steps
    and at the end."""
    torch.manual_seed(0)
    rng = generator(0, "mixture")
    config = SelfForcingConfig(RolloutConfig((1000,), 1), 1.0, gradient_frames=1, min_num_frames=1, max_num_frames=1)
    networks = {"generator": OneStep(), "critic": Network(1 if objective == "gan" else 2, width=128)}
    adam = partial(torch.optim.Adam, lr=lr, betas=(0.0, 0.99))
    optimizers = {name: adam(network.parameters()) for name, network in networks.items()}

    def update(name, loss):
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()

    def videos(count, rng=rng):
        return generate(networks["generator"], SCHEDULER, randn((count, *PIXELS), rng), {}, config.rollout, rng=rng)

    if objective != "gan":  # the critic first learns what the student makes
        for _ in range(200):
            update("critic", flow_matching_loss(networks["critic"], SCHEDULER, videos(batch), {}, rng=rng))
    seen = []
    for step in range(num_steps + 1):
        if step in snapshots or step == num_steps:
            seen.append(videos(4000, generator(0, "look")).flatten(1))
        if step == num_steps:
            return seen
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = lr * (1 - step / num_steps)
        data = target.sample(batch, rng).view(batch, *PIXELS)
        losses = {
            "dmd": self_forcing_step,
            "sid": partial(self_forcing_step, loss=sid_loss),
            "gan": partial(gan_step, data=data),
        }[objective]
        noise = randn((batch, *PIXELS), rng)
        for name, loss in losses(
            networks["generator"], target, networks["critic"], SCHEDULER, noise, {}, {}, config, rng=rng, shared_rng=rng
        ):
            if name == "generator" or train_critic:
                update(name, loss)


def judge(points: Tensor, target: Mixture) -> dict[str, float]:
    """How many points lie within three standard deviations of a mean, and how far the components' shares are off."""
    distance, nearest = torch.cdist(points, target.means).min(1)
    shares = nearest.bincount(minlength=len(target.means)) / len(points)
    return {
        "on_target": (distance < 3 * target.std).float().mean().item(),
        "share_error": (shares - target.weights).abs().sum().item() / 2,
    }


class CausalStudent(nn.Module):
    """Two frames of one number: the second sees the first, clean or as noisy as it is, never the other way round."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList([perceptron(2, 1, 64), perceptron(4, 1, 64)])

    def forward(self, x_t, t, cond, *, frames_per_block, clean=None, sink_frames=0, window_frames=None):
        x = x_t.flatten(1)  # [b f]
        past = (x[:, :1], t[:, :1]) if clean is None else (clean.flatten(1)[:, :1], torch.zeros_like(t[:, :1]))
        first = self.nets[0](torch.stack([x[:, 0], t[:, 0]], dim=1))
        second = self.nets[1](torch.cat([x[:, 1:], t[:, 1:], *past], dim=1))
        return torch.cat([first, second], dim=1).view_as(x_t)


def first_frames(causal_teacher: bool, num_steps=400, num_pairs=2000) -> Tensor:
    """First frames [4000] that a causal student makes in one step after regression on ODE pairs.

    The data: both frames are near -1, or both near +1. A bidirectional teacher's ODE decides which by the noise of both
    frames; the student has seen only the first's when it must decide.
    """
    kind = CausalMixture if causal_teacher else Mixture
    teacher = kind([[-1.0, -1.0], [1.0, 1.0]], [0.5, 0.5], 0.1)
    torch.manual_seed(0)
    rng, student = generator(0, "pairs"), CausalStudent()
    noise = randn((num_pairs, *FRAMES), rng)
    config = RolloutConfig(grid(24), frames_per_block=1 if causal_teacher else 2)
    keep = (1000, 500)
    states = ode_trajectory(teacher, SCHEDULER, noise, {}, config, keep)
    times = [*SCHEDULER.denoising_times(keep), 0.0]
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    few = RolloutConfig(keep, frames_per_block=1)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / num_steps)
        optimizer.zero_grad()
        chosen = states[torch.randint(num_pairs, (256,), generator=rng)]
        options = {"teacher_forcing": causal_teacher, "rng": rng}
        ode_regression_loss(student, SCHEDULER, chosen, times, {}, few, **options).backward()
        optimizer.step()
    with torch.no_grad():
        x = randn((4000, *FRAMES), generator(0, "look"))
        return (x - student(x, torch.ones(4000, 2), {}, frames_per_block=1))[:, 0].flatten()


def measure(steps=(0, 50, 200, 1200), pair_steps=400) -> dict:
    """A record: the students of RUNS at these steps, judged at the last of them, first frames, and points to draw."""
    seen = {name: distil(TARGET, num_steps=steps[-1], snapshots=steps[:-1], **run) for name, run in RUNS.items()}
    firsts = {f"{name} teacher": first_frames(name == "causal", pair_steps) for name in ("bidirectional", "causal")}
    last = {"data": TARGET.sample(4000, generator(0, "real"))} | {name: points[-1] for name, points in seen.items()}
    return {
        "command": "python -m experiments.gaussian_mixture",
        "machine": machine(),
        "distilled": {name: judge(points, TARGET) for name, points in last.items()},
        "between_the_modes": {name: (x.abs() < 0.5).float().mean().item() for name, x in firsts.items()},
        "steps": list(steps),
        "points": {name: [brief(x) for x in points] for name, points in seen.items()},
        "first_frames": {name: brief(x, 3 * NUM_POINTS) for name, x in firsts.items()},
    }


def brief(x: Tensor, count: int = NUM_POINTS) -> list:
    """The first of many points or numbers, rounded."""
    return [[round(v, 2) for v in row] if isinstance(row, list) else round(row, 2) for row in x[:count].tolist()]


def draw(record: dict, path: Path = FIGURE) -> None:
    """The figure of a record: every student's points as training went on, over the data's; first frames below."""
    points = {name: [torch.tensor(x) for x in seen] for name, seen in record["points"].items()}
    firsts = {name: torch.tensor(x) for name, x in record["first_frames"].items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_mixtures(TARGET.sample(2000, generator(0, "data")), points, record["steps"], firsts, path)


def main() -> None:
    record = measure()
    with atomic(RECORD) as temporary:
        temporary.write_text(json.dumps(record) + "\n")
    draw(record)
    print(json.dumps({key: record[key] for key in ("distilled", "between_the_modes")}, indent=1))


if __name__ == "__main__":
    main()
