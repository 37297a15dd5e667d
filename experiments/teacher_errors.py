"""How far a teacher is from the exact score: python -m experiments.teacher_errors checkpoints/teacher.safetensors

A prompt allows a number of clips that can be counted, and what a noisy clip tells of the clean one is a weighted mean
over all of them. Prints, for clips that training did not draw and for each noise level, the teacher's error of flow,
with two digits also under prompts that swap them; the error of the exact flow, below which nobody can go; and the mean
square distance between the two flows.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from generate import load_model
from moving_mnist import (
    DIRECTIONS,
    Digit,
    MovingMNIST,
    WorldConfig,
    bounce,
    format_prompt,
    parse_prompt,
    render,
    sprites,
)

TIMES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
NUM_FRAMES = (3, 12)
CHUNK = 8  # clips that a network sees at a time


@cache
def motions(world: WorldConfig, digit: Digit, corner: int) -> tuple[Tensor, Tensor]:
    """All that one digit may do in a room that begins at a corner: ink [N, H, W] of every sprite at every place, and
    which of these N a clip of it shows, frame by frame, [F, M]."""
    side, heading = torch.arange(0, world.reach + 1, world.speed), torch.tensor(DIRECTIONS[digit.direction])
    places = torch.cartesian_prod(side, side)  # [p 2]
    first = places + world.speed * heading
    starts = places[((first >= 0) & (first <= world.reach)).all(1)].double()
    steps = (heading * world.speed).double().expand_as(starts)
    grid = (bounce(starts, steps, world.num_frames, world.reach)[0] / world.speed).long()  # [f m 2]
    at = grid[..., 0] * len(side) + grid[..., 1]
    pictures, labels = sprites(world)
    own = pictures[labels == digit.label]
    shown = (places + corner).float().expand(len(own), 1, -1, 2).movedim(2, 1)
    ink = render(own[:, None], shown, world.canvas)  # [k p h w]
    kinds = torch.arange(len(own)) * len(places)
    return ink.flatten(0, 1), (kinds[:, None] + at[:, None]).flatten(1)


def possibilities(world: WorldConfig, prompt: str) -> tuple[Tensor, Tensor]:
    """Every frame that a prompt allows, pixels [N, C * H * W] in [-1, 1], and every clip as rows of it, [F, M]."""
    ink, clips = torch.zeros(1, world.canvas, world.canvas), torch.zeros(world.num_frames, 1, dtype=torch.long)
    for k, digit in enumerate(parse_prompt(prompt)):
        more, paths = motions(world, digit, k * world.apart)
        ink = torch.maximum(ink[:, None], more).flatten(0, 1)
        clips = (clips[:, :, None] * len(more) + paths[:, None]).flatten(1)
    return (ink * 2 - 1).flatten(1).repeat(1, world.channels), clips


def exact_clean(world: WorldConfig, x_t: Tensor, t: float, prompts: Sequence[str]) -> Tensor:
    """E[x_0 | x_t, prompt] of clips x_t [B, F, C, H, W] from a world's beginning, F up to its num_frames.

    x_t is Gaussian around (1 - t) x_0, so a clip weighs exp(-|x_t - (1 - t) x_0|^2 / 2 t^2).
    """
    means = []
    for video, prompt in zip(x_t.flatten(2), prompts, strict=True):
        frames, clips = possibilities(world, prompt)
        clips = clips[: len(video)]
        fits = ((1 - t) * video @ frames.mT - (1 - t) ** 2 / 2 * frames.square().sum(1)) / t**2  # [f n]
        weights = fits.gather(1, clips).sum(0).softmax(0)
        shown = torch.zeros_like(fits).scatter_add_(1, clips, weights.expand(len(clips), -1))
        means.append(shown @ frames)
    return torch.stack(means).view_as(x_t)


def swapped(prompt: str) -> str:
    """The prompt with the digits of its two clauses exchanged, and not their directions."""
    first, second = parse_prompt(prompt)
    return format_prompt([replace(first, label=second.label), replace(second, label=first.label)])


@torch.no_grad()
def measure(loaded, num_clips: int, seed: int, num_frames: int, t: float) -> dict[str, float]:
    """Mean square errors of flow at noise level t."""
    batch = MovingMNIST(loaded.world, seed=seed).batch(range(num_clips))
    video, prompts = batch["video"][:, :num_frames], batch["prompts"]
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(seed))
    x_t = loaded.scheduler.add_noise(video, noise, t)
    flow, exact = flows(loaded, x_t, t, prompts), (x_t - exact_clean(loaded.world, x_t, t, prompts)) / t

    def error(a: Tensor, b: Tensor) -> float:
        return (a - b).square().mean().item()

    found = {"error": error(flow, noise - video)}
    if loaded.world.num_digits == 2:
        found["swapped"] = error(flows(loaded, x_t, t, [swapped(prompt) for prompt in prompts]), noise - video)
    return found | {"exact": error(exact, noise - video), "distance": error(flow, exact)}


def check(loaded) -> None:
    """Raises ValueError for what has no exact score to be compared with."""
    world = loaded.world
    if not loaded.sampling.whole_clip:
        raise ValueError("it makes videos in blocks; a score sees whole clips: give a checkpoint of stage=teacher.")
    if world.sub_pixel or world.reach % world.speed:
        raise ValueError("its digits are not on a grid: that needs sub_pixel=False and a speed that divides the reach.")
    if world.sprites_per_class**world.num_digits > 100 or world.num_digits > 2:
        raise ValueError("its prompts allow too many clips to add them all up.")


def flows(loaded, x_t: Tensor, t: float, prompts: Sequence[str]) -> Tensor:
    chunks = [slice(i, i + CHUNK) for i in range(0, len(x_t), CHUNK)]
    return torch.cat([loaded.model(x_t[chunk], t, loaded.encoder(prompts[chunk])) for chunk in chunks])


def main() -> None:
    parser = argparse.ArgumentParser(description="A teacher's error beside the exact one.")
    parser.add_argument("checkpoint")
    parser.add_argument("--num_clips", type=int, default=48)
    parser.add_argument("--seed", type=int, default=123)
    args = parser.parse_args()
    try:
        loaded = load_model(args.checkpoint)
        check(loaded)
    except (ValueError, OSError) as error:
        parser.exit(2, f"teacher_errors: {args.checkpoint}: {error}\n")
    for num_frames in NUM_FRAMES:
        for t in TIMES:
            found = measure(loaded, args.num_clips, args.seed, num_frames, t)
            print(f"{num_frames:2} frames, t = {t:4}", *(f"{name} {x:.4f}" for name, x in found.items()), sep="  ")


if __name__ == "__main__":
    main()
