"""The course in one command: train Self-Forcing from the shipped weights and show what it changed.

    make quickstart        or        python -m experiments.quickstart [training.num_steps=200 ...]

The same prompts and noise go through the causal init ("before") and through the network that this run trained
("after"), three times as long as any training clip. Writes before_after.gif, curves.png, metrics.json and samples.npz
to outputs/quickstart/ and exits non-zero if accuracy past the training length did not rise as promised.
"""

import json
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from checkpoint import atomic, locate
from generate import load_model, sample_videos, to_pixels
from metrics import evaluate, load_classifier, make_reference, real_videos, uniform_prompts
from moving_mnist import WorldConfig
from run_folder import machine
from settings import load_config
from train import fit
from visualization import plot_metric_curves, save_video_grid

OUTPUT = Path("outputs/quickstart")
SHOWN = ["digit_accuracy", "frechet_distance", "motion_error", "speed_kept", "ink", "identity_consistency"]
NUM_VIDEOS, EVALUATION_SEED, LENGTHS = 80, 1, 3
RISE, GOAL = 0.30, 0.85


def main(overrides: list[str]) -> None:
    seconds: dict[str, float] = {}
    cfg = load_config(["experiment=quickstart", *overrides])
    with timed("training", seconds):
        trained = fit(cfg)
    with timed("sampling", seconds):
        world = WorldConfig()
        prompts, num_frames = uniform_prompts(NUM_VIDEOS), LENGTHS * world.num_frames
        videos = make_videos(cfg, trained, prompts, num_frames)
        held_out = WorldConfig(split="validation", num_frames=num_frames)
        videos["real"] = real_videos(prompts, held_out, EVALUATION_SEED)
    with timed("measuring", seconds):
        classifier = load_classifier()
        judge = {"world": world, "classifier": classifier, "reference": make_reference(world, classifier)}
        curves = {name: evaluate(video, prompts, **judge) for name, video in videos.items()}
    with timed("drawing", seconds):
        draw(videos, curves, prompts, world.num_frames)
    record = {
        "command": "python -m experiments.quickstart " + " ".join(overrides),
        "training": OmegaConf.to_container(cfg.training, resolve=True),
        "num_videos": NUM_VIDEOS,
        "seeds": {"training": cfg.training.seed, "evaluation": EVALUATION_SEED},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "machine": machine(),
        "curves": curves,
    }
    with atomic(OUTPUT / "metrics.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    report(curves, world.num_frames, num_frames, seconds)


def make_videos(cfg, trained: Path, prompts: list[str], num_frames: int) -> dict[str, torch.Tensor]:
    """The same prompts and noise through the network before and after, and through the shipped student."""
    before = load_model(cfg.training.pretrained_checkpoint)
    after = load_model(trained)
    loaded = {"before": replace(before, sampling=after.sampling), "after": after}
    if locate("checkpoints/student.safetensors").exists():
        loaded["shipped student"] = load_model("checkpoints/student.safetensors")
    return {name: sample_videos(model, prompts, num_frames, seed=EVALUATION_SEED) for name, model in loaded.items()}


def draw(videos: dict, curves: dict, prompts: list[str], train_frames: int) -> None:
    """One digit of each class, before above after; all curves; all pixels."""
    shown = [next(i for i, prompt in enumerate(prompts) if prompt.startswith(f"a {digit} ")) for digit in range(10)]
    rows = torch.cat([videos["before"][shown], videos["after"][shown]])
    labels = [f"{name} {digit}" for name in ("before", "after") for digit in range(10)]
    greys = (rows.clamp(-1, 1) * 7.5 + 7.5).round() / 7.5 - 1  # 16 of them: the GIF is less than half as large
    save_video_grid(greys, OUTPUT / "before_after.gif", columns=10, scale=3, labels=labels)
    plot_metric_curves(
        curves, OUTPUT / "curves.png", train_frames, "Self-Forcing: before and after were trained up to the line", SHOWN
    )
    pixels = {name.replace(" ", "_"): to_pixels(video) for name, video in videos.items()}
    with atomic(OUTPUT / "samples.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, prompts=np.array(prompts), **pixels)


def report(curves: dict, train_frames: int, num_frames: int, seconds: dict) -> None:
    """Say in words what changed; exit non-zero if it is less than promised."""
    past = slice(train_frames, num_frames)
    mean = {name: {key: float(np.mean(curve[past])) for key, curve in c.items()} for name, c in curves.items()}
    before, after, real = mean["before"], mean["after"], mean["real"]
    print(f"\nFrames {train_frames} to {num_frames}, past every clip that training ever saw ({NUM_VIDEOS} videos):")
    for metric, meaning in {
        "digit_accuracy": "frames that show the prompted digit",
        "motion_error": "pixels off the exact motion",
        "ink": "ink, of that of real digits",
    }.items():
        print(f"  {meaning:38} {before[metric]:5.2f} -> {after[metric]:5.2f}   (real digits {real[metric]:.2f})")
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"Look at {OUTPUT}/before_after.gif and {OUTPUT}/curves.png. Time: {spent}.")
    rise = after["digit_accuracy"] - before["digit_accuracy"]
    if rise < RISE or after["digit_accuracy"] < GOAL:
        sys.exit(
            f"Accuracy rose by {rise:.2f} to {after['digit_accuracy']:.2f}; {RISE:.2f} and {GOAL:.2f} were promised."
        )
    print(f"Self-Forcing worked: accuracy past the training length rose by {rise:.2f}.")


@contextmanager
def timed(name: str, seconds: dict[str, float]):
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"quickstart: {error}")
