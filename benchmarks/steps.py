"""The work that is timed: a teacher step, a Self-Forcing step, and an inference rollout."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from benchmarks.measure import PRECISIONS, count_gflop, median_seconds
from benchmarks.plan import Size
from dynamic_video_sf import SelfForcingConfig, flow_matching_loss, generate, self_forcing_step
from flow_match import FlowMatchScheduler
from settings import TrainingConfig
from tiny_causal_wan import TinyCausalWanModel, exact_attention, matmul_attention

SCHEDULER = FlowMatchScheduler(3.0)

Work = Callable[[], None]


def settings(num_frames: int, gradient_frames: int) -> SelfForcingConfig:
    """Algorithm 1 as the course trains it, on clips of num_frames frames."""
    lengths = {"min_num_frames": num_frames, "max_num_frames": num_frames, "gradient_frames": gradient_frames}
    return replace(TrainingConfig().self_forcing, **lengths)


def network(size: Size) -> TinyCausalWanModel:
    """A random network whose head is not zero, as it is when fresh: zeros would be no work for the scores."""
    model = TinyCausalWanModel(size.model)
    nn.init.normal_(model.head.head.weight, std=0.02)
    return model


def inputs(size: Size, num_frames: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """A noise video [B, F, C, H, W] and prompts."""
    shape = (size.batch, num_frames or size.num_frames, size.model.in_dim, size.canvas, size.canvas)
    return torch.randn(shape), {"prompt_embeds": torch.randn(size.batch, 5, size.model.text_dim)}


def autocast(precision: str):
    return torch.autocast("cpu", PRECISIONS[precision], enabled=precision != "fp32")


class Trained:
    """A network and its optimizer; `update` takes a loss to new weights."""

    def __init__(self, size: Size):
        self.model = network(size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def update(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def teacher_step(size: Size, precision: str, attention, compiled: bool = False) -> Work:
    """Flow matching on a clip: forward, backward, optimizer."""
    video, cond = inputs(size)
    teacher = Trained(size)
    teacher.model.attention = attention
    for layer in teacher.model.blocks if compiled else ():
        layer.compile(dynamic=False)

    def step():
        with autocast(precision):
            loss = flow_matching_loss(teacher.model, SCHEDULER, video, cond)
        teacher.update(loss)

    return step


def self_forcing(size: Size, precision: str, attention, config: SelfForcingConfig | None = None) -> Work:
    """One generator update and its critic updates."""
    config = config or settings(size.num_frames, size.num_frames)
    noise, cond = inputs(size, config.max_num_frames)
    uncond = {"prompt_embeds": torch.zeros(size.batch, 1, size.model.text_dim)}
    networks = {"generator": Trained(size), "critic": Trained(size)}
    teacher = network(size).requires_grad_(False)
    for model in (teacher, *(trained.model for trained in networks.values())):
        model.attention = attention
    student, critic = (trained.model for trained in networks.values())

    def step():
        losses = self_forcing_step(student, teacher, critic, SCHEDULER, noise, cond, uncond, config)
        for name in ("generator", *["critic"] * config.critic_steps):
            with autocast(precision):
                _, loss = next(losses)
            networks[name].update(loss)
        critic.zero_grad()

    return step


def inference(size: Size, precision: str, attention) -> Work:
    """A rollout of the training length, every denoising step, with a cache."""
    noise, cond = inputs(size)
    model = network(size)
    model.attention = attention
    config = settings(size.num_frames, size.num_frames).rollout

    def step():
        with autocast(precision):
            generate(model, SCHEDULER, noise, cond, config)

    return step


WORK = {"teacher step": teacher_step, "Self-Forcing step": self_forcing, "inference rollout": inference}


def measure_steps(size: Size, repeats: int, compiled: bool = False) -> Iterator[dict]:
    """One row per kind of work and precision; compiled: also what training.compile makes of the teacher's step.

    FLOPs are counted with attention spelled out as matrix products, because torch's counter does not see those inside
    the CPU's fused kernel; what that kernel computes twice in its backward is not counted as work.
    """
    for name, build in WORK.items():
        gflop = count_gflop(build(size, "fp32", matmul_attention))
        ways = {name: build}
        if compiled and build is teacher_step:
            ways[f"{name}, compiled"] = partial(teacher_step, compiled=True)
        for (way, build_way), precision in product(ways.items(), PRECISIONS):
            spent = median_seconds(build_way(size, precision, exact_attention), repeats)
            yield {
                "work": way,
                "size": size.name,
                "precision": precision,
                "seconds": spent,
                "tokens_per_second": size.tokens / spent,
                "gflop": gflop,
            }
