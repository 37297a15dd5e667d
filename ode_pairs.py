"""Make, store and read trajectories of a teacher's ODE: what few-step initialisation learns from.

    python ode_pairs.py --num_pairs 1024                                      # of the bidirectional teacher, as CausVid
    python ode_pairs.py --checkpoint checkpoints/init.safetensors --output_dir logs/causal_ode_pairs
    python train.py stage=init init=ode_pairs data.folder=logs/ode_pairs

Pairs lie in shards of 64, `pairs_00000.safetensors`: "trajectory" [n, K + 1, F, C, H, W] in half precision and, in the
header, prompts, settings and the fingerprint of the teacher's weights. The same command goes on where it was
interrupted.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from checkpoint import atomic, fingerprint
from dynamic_video_sf import Guided, ode_trajectory
from generate import LoadedModel, load_model
from metrics import uniform_prompts
from moving_mnist import WorldConfig
from randomness import generators, randn

STUDENT_STEPS, SHARD = (1000, 750, 500, 250), 64


def grid(num_steps: int) -> list[float]:
    """Denoising steps of an ODE in num_steps equal parts of 1000 (the schedule warps them)."""
    return [1000 * (num_steps - i) / num_steps for i in range(num_steps)]


@torch.no_grad()
def make_pairs(loaded: LoadedModel, prompts, samples, num_steps, guidance_scale, keep, seed=0) -> torch.Tensor:
    """Trajectories [B, K + 1, F, C, H, W] of one clip per prompt; samples: their indices, which fix their noise.

    Raises ValueError where a kept step does not lie on the grid.
    """
    config = replace(loaded.sampling.rollout, denoising_steps=grid(num_steps), context_noise=0)
    shape = (len(prompts), loaded.num_frames, *loaded.frame_shape)
    noise = randn(shape, generators(seed, "ode pairs", samples=samples))
    guided = Guided(loaded.model, loaded.encoder.null(len(prompts)), guidance_scale)
    return ode_trajectory(guided, loaded.scheduler, noise, loaded.encoder(prompts), config, keep)


def write_pairs(args) -> None:
    """Every shard that is not there yet. Raises ValueError for a folder with pairs of other weights or settings."""
    if args.num_pairs < 1 or args.num_steps < 1:
        raise ValueError("--num_pairs and --num_steps must be at least 1.")
    loaded, prompts = load_model(args.checkpoint), uniform_prompts(args.num_pairs)
    names = ("checkpoint", "num_steps", "guidance_scale", "keep", "seed")
    settings = {name: getattr(args, name) for name in names} | {"fingerprint": fingerprint(args.checkpoint)}
    settings |= {"causal": not loaded.sampling.whole_clip, "world": asdict(loaded.world)}
    there = {path: read_header(path) for path in sorted(args.output_dir.glob("pairs_*.safetensors"))}
    for path, header in there.items():
        check_origin(path, header["settings"], json.loads(json.dumps(settings)))
    for first in tqdm(range(0, args.num_pairs, SHARD), desc="shards", unit="shard"):
        path = args.output_dir / f"pairs_{first // SHARD:05d}.safetensors"
        samples = range(first, min(first + SHARD, args.num_pairs))
        own = [prompts[i] for i in samples]
        if path in there and there[path]["prompts"] == own:
            continue
        pairs = make_pairs(loaded, own, samples, args.num_steps, args.guidance_scale, args.keep, args.seed)
        metadata = {"header": json.dumps({"settings": settings, "prompts": own})}
        with atomic(path) as temporary:
            temporary.write_bytes(save({"trajectory": pairs.half().contiguous()}, metadata))


def check_origin(path: Path, then: dict, now: dict) -> None:
    """Raises ValueError where a shard's settings are not those of now; where the same weights lay does not matter."""
    differs = {name for name in now if then.get(name) != now[name]} - {"checkpoint"}
    if differs == {"fingerprint"}:
        made = (
            "of other weights than" if "fingerprint" in then else "of an earlier version, perhaps of other weights than"
        )
        raise ValueError(f"{path} holds pairs {made} {now['checkpoint']}: delete it or choose another --output_dir.")
    if differs:
        raise ValueError(f"{path} holds pairs of other settings: choose another --output_dir.")


def read_header(path: Path) -> dict:
    """Prompts and settings of a shard. Raises ValueError for a file that is none."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["header"])
            settings = header["settings"]
            if "world" in settings:  # a large model's pairs show no world of ours
                settings["world"] = asdict(WorldConfig.of(settings["world"]))
            return header
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or no shard of pairs: delete it and make it again.") from error


class StoredPairs:
    """The pairs in a folder, as data for stage=init init=ode_pairs.

    Raises ValueError where there are none, and where they show another world than config.
    """

    def __init__(self, folder: str | Path, config: WorldConfig, seed: int = 0):
        self.frame_shape = config.frame_shape
        self.paths = sorted(Path(folder).glob("pairs_*.safetensors"))
        if not self.paths:
            raise ValueError(f"There are no pairs in {folder}: python ode_pairs.py --output_dir {folder} makes some.")
        headers = [read_header(path) for path in self.paths]
        self.settings = headers[0]["settings"]
        if self.settings.get("world") != asdict(config):
            raise ValueError(f"The pairs in {folder} show another world than this run: make them anew.")
        self.prompts = [prompt for header in headers for prompt in header["prompts"]]

    @cached_property
    def trajectories(self) -> torch.Tensor:
        """All of them, in half precision."""
        parts = []
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                parts.append(file.get_tensor("trajectory"))
        return torch.cat(parts)

    def batch(self, samples) -> dict:
        """ "trajectory" [B, K + 1, F, C, H, W], its end as "video", "prompts", "steps" (K numbers) and "causal"."""
        chosen = [i % len(self.prompts) for i in samples]
        trajectory = self.trajectories[chosen].float()
        return {
            "trajectory": trajectory,
            "video": trajectory[:, -1],
            "prompts": [self.prompts[i] for i in chosen],
            "steps": self.settings["keep"],
            "causal": self.settings["causal"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default="checkpoints/teacher.safetensors", help="bidirectional or causal")
    parser.add_argument("--num_pairs", type=int, default=1024)
    parser.add_argument("--num_steps", type=int, default=48, help="of the ODE")
    parser.add_argument("--keep", type=float, nargs="+", default=list(STUDENT_STEPS), help="the student's steps")
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("logs/ode_pairs"))
    try:
        write_pairs(parser.parse_args())
    except ValueError as error:
        print(f"ode_pairs.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
