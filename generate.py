"""Make videos with a trained model: python generate.py [--checkpoint C] [--prompts "a 3 moving right" ...]

The default is the shipped four-step student, one prompt per digit. A teacher makes clips of its training length, all
frames at once, in many guided steps; every other model makes any whole number of blocks, one after another, through
the rollout that trained it. Sample k of a prompt and a seed is the same video whatever else is asked for.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import precision  # noqa: F401  (what it says of very small numbers holds here too)
from checkpoint import atomic, fill, load_weights, locate
from dynamic_video_sf import Guided, RolloutConfig, rollout, stochastic
from flow_match import FlowMatchScheduler
from kv_cache import block_sizes
from moving_mnist import DIRECTIONS, Digit, PromptEncoder, WorldConfig, format_prompt, parse_prompt
from randomness import generator, randn
from simplified import (  # noqa: F401  (names of older documents, promised here)
    SelfForcingLoss,
    SimpleKVCache,
    SimplifiedSelfForcingPipeline,
    explain_self_forcing,
)
from tiny_causal_wan import TinyCausalWanModel, WanConfig
from visualization import save_video_grid

TEACHER_STEPS, TEACHER_FRESH_NOISE = 32, 0.5  # an ODE made worse clips: docs/trials.md


@dataclass(frozen=True)
class SamplingConfig:
    """How a model is sampled: whole clips (bidirectional) in many steps with guidance, or block by block in few.

    fresh_noise: see dynamic_video_sf.stochastic.
    """

    rollout: RolloutConfig
    guidance_scale: float = 1.0
    fresh_noise: float = 1.0
    whole_clip: bool = False

    @classmethod
    def of(cls, training, num_frames: int) -> "SamplingConfig":
        """As the model was trained to be sampled: `training` has the fields of settings.TrainingConfig, num_frames is
        the length of the clips."""
        if training["stage"] == "teacher":
            steps = [1000 * (1 - i / TEACHER_STEPS) for i in range(TEACHER_STEPS)]
            whole = RolloutConfig(steps, frames_per_block=num_frames)
            return cls(whole, training["guidance_scale"], TEACHER_FRESH_NOISE, whole_clip=True)
        names = {f.name for f in fields(RolloutConfig)}
        settings = {name: value for name, value in training.items() if name in names}
        return cls(RolloutConfig(frames_per_block=training["num_frames_per_block"], **settings))


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be sampled, with what its checkpoint says of it."""

    model: TinyCausalWanModel
    scheduler: FlowMatchScheduler
    encoder: PromptEncoder
    sampling: SamplingConfig
    world: WorldConfig

    @property
    def num_frames(self) -> int:
        return self.world.num_frames

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        return self.world.frame_shape

    def encode(self, prompts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the model reads of the prompts, and of none, on its device."""
        device = next(self.model.parameters()).device
        both = self.encoder(prompts), self.encoder.null(len(prompts))
        return tuple({name: x.to(device) for name, x in cond.items()} for cond in both)


def load_model(path: str | Path, weights: str = "ema", device="cpu") -> LoadedModel:
    """Build the model that a checkpoint of train.py, or a shipped file, describes."""
    path = locate(path)
    loaded = load_weights(path, weights)
    config = loaded.config
    if not {"model", "world", "training", "scheduler"} <= config.keys():
        raise ValueError(f"{path} carries no config: it was not written by train.py.")
    try:
        model = WanConfig(**pick(WanConfig, config["model"]))
        world = WorldConfig.of(config["world"])
        sampling = SamplingConfig.of(config["training"], world.num_frames)
    except KeyError as error:
        raise ValueError(f"{path} was written by another version: its config has no {error}.") from error
    network = TinyCausalWanModel(model)
    fill(network, loaded.state_dict, path)
    return LoadedModel(
        network.to(device).eval().requires_grad_(False),
        FlowMatchScheduler(config["scheduler"]["shift"]),
        PromptEncoder(model.text_dim, model.text_len),
        sampling,
        world,
    )


def pick(kind, settings) -> dict:
    """The settings that a dataclass has a field for; KeyError if one is missing."""
    return {f.name: settings[f.name] for f in fields(kind)}


def sample_blocks(
    model, scheduler, cond, uncond, sampling: SamplingConfig, shape: Sequence[int], keys
) -> Iterator[Tensor]:
    """Yield the clean blocks [B, n, C, H, W] of one video per sample, as soon as they exist.

    cond, uncond: on the model's device. shape: (F, C, H, W). keys: see `sample_keys`.
    """
    device = next(model.parameters()).device
    guided = Guided(model, uncond, sampling.guidance_scale) if sampling.guidance_scale != 1 else model
    sampler = stochastic(sampling.fresh_noise)
    frames, *frame_shape = shape
    noise, rng = draw_noise(keys, frames, frame_shape, device)
    blocks = rollout(guided, scheduler, noise, cond, sampling.rollout, rng=rng, sampler=sampler)
    remaining = frames
    while remaining:  # never ask beyond the last block: what it would remember is of no use
        with torch.no_grad():
            block = next(blocks)
        remaining -= block.shape[1]
        yield block


def draw_noise(keys, num_frames: int, frame_shape, device=None) -> tuple[Tensor, list[torch.Generator]]:
    """Where videos start, [B, F, C, H, W], and the generators of what is drawn on the way.

    Noise is drawn frame by frame, so that a longer video begins with the shorter one.
    """
    first, rng = ([generator(*key, purpose) for key in keys] for purpose in ("noise", "renoise"))
    frames = [randn((len(keys), *frame_shape), first, device=device) for _ in range(num_frames)]
    return torch.stack(frames, dim=1), rng


def sample_keys(prompts: Sequence[str], seed: int) -> list[tuple]:
    """What fixes each video's numbers: the seed, the prompt, and how often the prompt stood before; no neighbour."""
    seen = Counter()
    keys = []
    for prompt in prompts:
        keys.append((seed, "generate", prompt, seen[prompt]))
        seen[prompt] += 1
    return keys


def sample_videos(
    checkpoint,
    prompts,
    num_frames=None,
    seed=0,
    denoising_steps=None,
    guidance_scale=None,
    fresh_noise=None,
    batch_size=64,
    weights="ema",
) -> Tensor:
    """One video [B, F, C, H, W] per prompt, from a checkpoint (a path or a LoadedModel), in batches.

    num_frames, denoising_steps, guidance_scale and fresh_noise default to those of the checkpoint. Raises ValueError
    for prompts outside the grammar and for frame counts that the model cannot make.
    """
    loaded = checkpoint if isinstance(checkpoint, LoadedModel) else load_model(checkpoint, weights)
    prompts = [checked(prompt, loaded.world) for prompt in prompts]
    sampling = adapt(loaded, num_frames, denoising_steps, guidance_scale, fresh_noise)
    shape = (num_frames or loaded.num_frames, *loaded.frame_shape)
    sizes = block_sizes(shape[0], sampling.rollout.frames_per_block)
    keys = sample_keys(prompts, seed)
    videos = []
    with tqdm(total=len(prompts) * len(sizes), desc="blocks", unit="block", leave=False) as bar:
        for part in (slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)):
            blocks = []
            conditions = loaded.encode(prompts[part])
            for block in sample_blocks(loaded.model, loaded.scheduler, *conditions, sampling, shape, keys[part]):
                blocks.append(block.float().cpu())
                bar.update(len(block))
            videos.append(torch.cat(blocks, dim=1))
    return torch.cat(videos)


def checked(prompt: str, world: WorldConfig) -> str:
    """The prompt as the encoder knows it. Raises ValueError for one that this model was not trained on."""
    digits = parse_prompt(prompt)
    if len(digits) != world.num_digits:
        raise ValueError(f'This model shows {world.num_digits} digit(s) at a time, "{prompt}" names {len(digits)}.')
    return format_prompt(digits)


def adapt(loaded: LoadedModel, num_frames, denoising_steps, guidance_scale, fresh_noise) -> SamplingConfig:
    """The checkpoint's own way of sampling with what the user asked to change."""
    sampling = loaded.sampling
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"--num_frames must be at least 1, got {num_frames}.")
    if sampling.whole_clip and num_frames not in (None, loaded.num_frames):
        raise ValueError(
            f"This model makes clips of {loaded.num_frames} frames at once: use --num_frames {loaded.num_frames}."
        )
    if denoising_steps:
        sampling = replace(sampling, rollout=replace(sampling.rollout, denoising_steps=tuple(denoising_steps)))
    changes = {"guidance_scale": guidance_scale, "fresh_noise": fresh_noise}
    return replace(sampling, **{name: value for name, value in changes.items() if value is not None})


# ------------------------------------------------------------------------------------------------- command line


def to_pixels(video: Tensor) -> np.ndarray:
    """Videos of any shape in [-1, 1], what lies outside clipped, as uint8."""
    return ((video + 1) / 2).clamp(0, 1).mul(255).round().byte().cpu().numpy()


def save(video: Tensor, prompt: str, seed: int, stem: Path, formats: Sequence[str]) -> list[Path]:
    """Write the K samples [K, F, C, H, W] of one prompt in every format; pictures show them side by side."""
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in formats]
    for path in paths:
        if path.suffix == ".npz":
            with atomic(path) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, video=to_pixels(video), prompt=prompt, seed=seed)
        else:
            save_video_grid(video, path, columns=len(video), scale=6)
    return paths


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    directions = list(DIRECTIONS)
    prompts = [format_prompt([Digit(label, directions[label % 8])]) for label in range(10)]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", default="checkpoints/student.safetensors", help=".safetensors, or train.py's .pt")
    add("--prompts", nargs="+", default=prompts, metavar="PROMPT", help='such as "a 3 moving up-left"')
    add("--num_frames", type=int, help="a whole number of blocks; by default the training length")
    add("--output_dir", type=Path, default=Path("outputs"))
    add("--seed", type=int, default=0)
    add("--num_samples", type=int, default=1, help="videos per prompt, shown side by side")
    add("--denoising_steps", type=float, nargs="+", help="0..1000, falling from 1000")
    add("--guidance_scale", type=float, help="1 for none; by default the checkpoint's")
    add("--fresh_noise", type=float, help="0 for an ODE, 1 for few-step models; by default the checkpoint's")
    add("--format", nargs="+", choices=("gif", "mp4", "npz"), default=["gif", "mp4", "npz"])
    add("--weights", choices=("ema", "raw"), default="ema", help="averaged weights where there are any")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    args = parse_arguments(arguments)
    if args.num_samples < 1:
        raise ValueError("--num_samples must be at least 1.")
    repeated = [prompt for prompt in args.prompts for _ in range(args.num_samples)]
    videos = sample_videos(
        args.checkpoint,
        repeated,
        args.num_frames,
        args.seed,
        args.denoising_steps,
        args.guidance_scale,
        args.fresh_noise,
        weights=args.weights,
    )
    paths = []
    for index, (prompt, video) in enumerate(zip(args.prompts, videos.split(args.num_samples), strict=True)):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
        paths += save(video, prompt, args.seed, args.output_dir / f"{index:03d}_{slug}", args.format)
    print(f"{len(paths)} files in {args.output_dir}: {videos.shape[1]} frames each, {len(args.prompts)} prompts")
    return paths


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        sys.exit(2)
