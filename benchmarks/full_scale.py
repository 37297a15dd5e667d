"""Speed and memory of Wan's shapes with random weights: python -m benchmarks.full_scale [--model t2v-1.3b] [--shrunken]

One rollout at inference, for every way to compute attention and with layers compiled or not, and one training step as
full_scale/parallelize.py has it in one process. FLOPs are the planner's; the peak is what this device's own product of
two large matrices reaches. Results go to benchmarks/full_scale_results.json; --shrunken shows on a CPU that it runs.
"""

import argparse
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import median_seconds, peak_mib
from checkpoint import atomic
from dynamic_video_sf import RolloutConfig, SelfForcingConfig, generate, self_forcing_step
from flow_match import FlowMatchScheduler
from full_scale.attention import fastest_attention
from full_scale.parallelize import FullySharded, leave
from full_scale.plan import Setup, step_flops, video_flops
from full_scale.speed import compile_layers, read_prompts_once
from full_scale.wan import WAN_CONFIGS
from processes import pick_device
from run_folder import machine
from tiny_causal_wan import TinyCausalWanModel, WanConfig, sdpa_attention

KERNELS = {"fastest": fastest_attention, "plain SDPA": sdpa_attention}
SHRUNKEN = {"dim": 96, "ffn_dim": 256, "num_heads": 2, "num_layers": 2, "text_dim": 64, "text_len": 32}
SCHEDULER = FlowMatchScheduler(5.0)


def setup_of(args) -> Setup:
    """What is measured, in the planner's words: one video on one device."""
    config, latent, frames = WAN_CONFIGS[args.model], (args.height // 8, args.width // 8), args.frames
    if args.shrunken:
        config, latent, frames = replace(config, **SHRUNKEN), (8, 12), 6
    lengths = dict.fromkeys(("gradient_frames", "min_num_frames", "max_num_frames"), frames)
    algorithm = SelfForcingConfig(RolloutConfig(frames_per_block=args.frames_per_block), exit_rule="last", **lengths)
    sizes = {"latent": latent, "gpus": 1, "gpus_per_node": 1, "batch": 1, "text_encoder": False}
    return Setup(student=config, teacher=config, algorithm=algorithm, sharding="full", **sizes)


def network(config: WanConfig, device: torch.device, dtype: torch.dtype) -> TinyCausalWanModel:
    """Random weights, the head's too: zeros would be no work for what comes after them."""
    with torch.device(device):
        model = TinyCausalWanModel(config).to(dtype)
    torch.nn.init.normal_(model.head.head.weight, std=0.02)
    return model.eval().requires_grad_(False)


def inputs(setup: Setup, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    config = setup.student
    noise = torch.randn(1, setup.num_frames, config.out_dim, *setup.latent, device=device)
    return noise, {"prompt_embeds": torch.randn(1, config.text_len, config.text_dim, device=device)}


def waiting(work: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The work and the wait for the device to have done it."""

    def done() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return done


def matrix_peak(device: torch.device, side: int) -> float:
    """FLOP per second of a product of two square bf16 matrices, laid out as in a linear map; others can be slower."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / median_seconds(waiting(lambda: F.linear(a, b), device), 10)


def peak_gib(work: Callable[[], object], device: torch.device) -> float:
    """GiB at the worst moment; on a CPU, beyond what was there before."""
    if device.type != "cuda":
        return peak_mib(work) / 1024
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) / 2**30


def rollouts(setup: Setup, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """The ways to make a video at inference, on a GPU also with compiled layers."""
    noise, cond = inputs(setup, device)
    for compiled in (False, True) if device.type == "cuda" else (False,):
        for name, attention in KERNELS.items():
            model = network(setup.student, device, torch.bfloat16)
            model.attention = attention
            model = compile_layers(model) if compiled else read_prompts_once(model)
            work = lambda model=model: generate(model, SCHEDULER, noise, cond, setup.algorithm.rollout)  # noqa: E731
            yield f"rollout, {name}{', compiled' if compiled else ''}", work


def training_step(setup: Setup, device: torch.device) -> Callable[[], None]:
    """One step of the recipe on one video: bf16 in the networks, fp32 masters, AdamW."""
    processes = FullySharded(device.type, precision="bf16")
    noise, cond = inputs(setup, device)
    student, critic = (processes.place(network(setup.student, device, torch.float32), trained=True) for _ in range(2))
    teacher = processes.place(network(setup.teacher, device, torch.bfloat16), trained=False)
    trained = {"generator": student.requires_grad_(True), "critic": critic.requires_grad_(True)}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-6) for name, model in trained.items()}
    for model in (student, critic, teacher):
        model.attention = fastest_attention

    def step() -> None:
        losses = self_forcing_step(student, teacher, critic, SCHEDULER, noise, cond, cond, setup.algorithm)
        for name in ("generator", *["critic"] * setup.algorithm.critic_steps):
            trained[name].zero_grad()
            next(losses)[1].backward()
            optimizers[name].step()

    return step


def measure(setup: Setup, device: torch.device, repeats: int, side: int) -> dict:
    peak, rows = matrix_peak(device, side), []

    def add(name: str, work: Callable[[], object], flops: float) -> None:
        done = waiting(work, device)
        seconds = median_seconds(done, repeats)
        rows.append(
            {
                "work": name,
                "seconds": seconds,
                "latent_frames_per_second": setup.num_frames / seconds,
                "teraflop": flops / 1e12,
                "fraction_of_peak": flops / seconds / peak,
                "peak_gib": peak_gib(done, device),
            }
        )
        print(json.dumps(rows[-1]))

    for name, work in rollouts(setup, device):
        add(name, work, float(video_flops(setup)))
        gc.collect()  # a compiled model holds itself
    add("training step", training_step(setup, device), float(sum(step_flops(setup).values())))
    leave()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else machine()["processor"]
    return {"device": where, "machine": machine(), "bf16_matrix_teraflops": peak / 1e12, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_scale", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("t2v-1.3b", "t2v-14b"), default="t2v-1.3b")
    parser.add_argument("--frames", type=int, default=21, help="latent frames")
    parser.add_argument("--height", type=int, default=480, help="pixels")
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--frames_per_block", type=int, default=3)
    parser.add_argument("--shrunken", action="store_true", help="miniature sizes: does it run?")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("full_scale_results.json"))
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    setup = setup_of(args)
    found = measure(setup, pick_device(args.device), args.repeats, side=256 if args.shrunken else 8192)
    chosen = {
        name: getattr(args, name) for name in ("model", "frames", "height", "width", "frames_per_block", "shrunken")
    }
    with atomic(args.json) as temporary:
        temporary.write_text(json.dumps(chosen | found, indent=1) + "\n")
    return args.json


if __name__ == "__main__":
    main()
