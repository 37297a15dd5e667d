"""Make what training at full scale reads: python -m full_scale.data COMMAND

    prompts      encode prompts, all or those of a run, into the cache that training reads
    images       the same for the images of image-to-video
    latents      encode videos with Wan's VAE, a file for each
    ode_pairs    a Wan teacher's guided ODE from noise to video, its states at the student's steps, a file for each
    lmdb         clips and pairs from one form into another: folder of files <-> LMDB

Under torchrun, each process takes every so many-th item. Whatever is interrupted goes on with the same command; what is
finished is not made again, and nothing half made is left behind.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import imageio.v3 as imageio
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dynamic_video_sf import Guided, RolloutConfig, ode_trajectory
from flow_match import FlowMatchScheduler
from full_scale.attention import fastest_attention
from full_scale.data import ImageConditions, ImagePrompts, Prompts, prompt_beside, read_prompts
from full_scale.images import image_pixels
from full_scale.pixels import FPS, STRIDE, TIME_STRIDE, WanVAE, check_size, load_vae, num_latents
from full_scale.pretrained import find, fingerprint
from full_scale.stored_clips import Clip, Clips, is_written, write_clip, write_lmdb
from full_scale.text import TextEncoder
from full_scale.wan import load_transformer, place_of
from generate import to_pixels
from ode_pairs import STUDENT_STEPS, grid
from processes import pick_device
from randomness import generators, randn
from tiny_causal_wan import TinyCausalWanModel

T = TypeVar("T")
VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm"}


# ----------------------------------------------------------------------------------------------------- the processes


def process_number() -> tuple[int, int]:
    """Which of how many processes torchrun says that this one is."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_share(items: Sequence[T]) -> Sequence[T]:
    """What this process has to make of all items, finished ones included: so no two ever make the same."""
    rank, count = process_number()
    return items[rank::count]


def make_all(items: Sequence[T], make: Callable[[T], None], unit: str) -> None:
    """Make every item. A ValueError, somebody's faulty file, does not keep the others from being made; in the end all
    of them are raised as one."""
    faults = []
    for item in tqdm(items, desc=f"{unit}s", unit=unit, disable=None):
        try:
            make(item)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise ValueError(f"{len(faults)} of {len(items)} {unit}s could not be made: {' '.join(faults[:3])}{more}")


# ------------------------------------------------------------------------------------------------- prompts and images


def cache_prompts(args: argparse.Namespace) -> None:
    encoder = TextEncoder(args.model_path, cache=args.cache, device=pick_device(args.device, "--device "))
    source = Prompts(args.prompts, seed=args.seed)
    prompts = source.batch(range(args.num_samples))["prompts"] if args.num_samples else source.prompts
    for prompt in tqdm(own_share([encoder.negative_prompt, *dict.fromkeys(prompts)]), unit="prompt", disable=None):
        encoder.embed(prompt)


def cache_images(args: argparse.Namespace) -> None:
    check_options(args)
    conditions = ImageConditions(args.model_path, cache=args.cache, device=pick_device(args.device, "--device "))
    frame_shape = (16, args.height // STRIDE, args.width // STRIDE)
    data = ImagePrompts(args.images, conditions, frame_shape, num_frames=num_latents(args.num_frames))
    make_all(own_share(range(len(data.items))), lambda i: data.see(data.items[i]), "image")


def check_options(args: argparse.Namespace) -> None:
    check_size(args.height, args.width)
    if args.num_frames % TIME_STRIDE != 1:
        below = 1 + TIME_STRIDE * (num_latents(args.num_frames) - 1)
        raise ValueError(f"--num_frames must be 1 + 4 n, got {args.num_frames}: use {below} or {below + TIME_STRIDE}.")


# ------------------------------------------------------------------------------------------------------------ latents


def make_latents(args: argparse.Namespace) -> None:
    """Every video into {its name}.safetensors, with its prompt."""
    check_options(args)
    videos = [(video, prompt_beside(video, args.prompts)) for video in find_videos(args.videos)]
    names = ("num_frames", "height", "width", "fps", "first_frames")
    settings = {"vae": fingerprint(find("VAE", args.model_path))} | {name: getattr(args, name) for name in names}
    outputs = {video: args.output_folder / f"{video.stem}.safetensors" for video, _ in videos}
    todo = [one for one in own_share(videos) if not is_written(outputs[one[0]], one[1], settings)]
    if not todo:
        return
    vae = load_vae(args.model_path, device=pick_device(args.device, "--device "))

    def make(one: tuple[Path, str]) -> None:
        video, prompt = one
        latents, image = encode_video(vae, video, args.num_frames, args.height, args.width, args.fps)
        write_clip(outputs[video], Clip(prompt, latents, image if args.first_frames else None), settings)

    make_all(todo, make, "video")


def find_videos(folder: Path) -> list[Path]:
    """The folder's videos, in the order of their names. Raises ValueError for none, and for two of one name."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    videos = {}
    for video in (file for file in inside if file.suffix.lower() in VIDEOS):
        if twin := videos.get(video.stem):
            raise ValueError(f"{twin} and {video} would share their prompt and their latents: rename one of them.")
        videos[video.stem] = video
    if not videos:
        raise ValueError(f"There are no videos in {folder}: give a folder of {', '.join(sorted(VIDEOS))}.")
    return list(videos.values())


def encode_video(
    vae: WanVAE, path: Path, num_frames: int, height: int, width: int, fps: float = FPS
) -> tuple[Tensor, Tensor]:
    """Latents [1 + (num_frames - 1) / 4, 16, H/8, W/8] of a video's beginning, and its first picture, uint8 [H, W, 3].

    Four pictures at a time, so that a long clip needs no more memory than a short one. Raises ValueError for a video
    that is too short or cannot be read.
    """
    stream, latents, image = vae.encoding_stream(), [], None
    with closing(read_pictures(path, num_frames, fps)) as pictures:
        for size in [1] + [TIME_STRIDE] * (num_latents(num_frames) - 1):
            pixels = image_pixels([*islice(pictures, size)], height, width)
            image = to_pixels(pixels[0]) if image is None else image
            latents.append(stream(pixels[None].to(vae.latents_mean.device)).cpu())
    return torch.cat(latents, dim=1)[0], torch.from_numpy(image.transpose(1, 2, 0).copy())


def read_pictures(path: Path, num_frames: int, fps: float) -> Iterator[Image.Image]:
    """The first pictures of a video at so many a second. Raises ValueError where they are fewer than num_frames."""
    count = 0
    try:
        for frame in islice(imageio.imiter(path, plugin="FFMPEG", fps=fps), num_frames):
            yield Image.fromarray(frame)
            count += 1
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a video: mend it, or take it out of the folder.") from error
    if count < num_frames:
        raise ValueError(f"{path} has {count} frames at {fps:g} a second: take it out, or lower --num_frames or --fps.")


# ---------------------------------------------------------------------------------------------------------- ODE pairs


@dataclass(frozen=True)
class Teacher:
    """What a pair depends on besides its prompt and its number.

    shape: (F, C, H, W). config: the steps of the ODE, and its blocks, a single one for a bidirectional model.
    """

    model: TinyCausalWanModel
    encoder: TextEncoder
    scheduler: FlowMatchScheduler
    config: RolloutConfig
    guidance_scale: float
    shape: Sequence[int]
    seed: int = 0

    def trajectories(self, prompts: Sequence[str], samples: Sequence[int], keep: Sequence[float]) -> Tensor:
        """[B, K + 1, F, C, H, W], a clip per prompt; samples: their numbers, which fix their noise.

        Raises ValueError where a kept step is none of the ODE's.
        """
        device = next(self.model.parameters()).device
        rng = generators(self.seed, "ode pairs", samples=samples)
        noise = randn((len(prompts), *self.shape), rng, device=device)
        guided = Guided(self.model, self.encoder.null(len(prompts)), self.guidance_scale)
        return ode_trajectory(guided, self.scheduler, noise, self.encoder(prompts), self.config, keep)


def make_ode_pairs(args: argparse.Namespace) -> None:
    """Pair after pair into pairs_{number}.safetensors; the number fixes the noise, and in turn the prompt."""
    check_options(args)
    prompts, settings = read_prompts(args.prompts), pair_settings(args)

    def output(sample: int) -> tuple[Path, str]:
        return args.output_folder / f"pairs_{sample:06d}.safetensors", prompts[sample % len(prompts)]

    samples = own_share(range(args.num_pairs or len(prompts)))
    todo = [sample for sample in samples if not is_written(*output(sample), settings)]
    if not todo:
        return
    teacher = load_teacher(args)
    for first in tqdm(range(0, len(todo), args.batch_size), desc="pairs", unit="batch", disable=None):
        batch = todo[first : first + args.batch_size]
        paths, own = zip(*map(output, batch), strict=True)
        for path, prompt, states in zip(paths, own, teacher.trajectories(own, batch, args.keep), strict=True):
            write_clip(path, Clip(prompt, states), settings)


def pair_settings(args: argparse.Namespace) -> dict:
    names = ("shift", "num_steps", "guidance_scale", "keep", "seed")
    names += ("frames_per_block", "num_frames", "height", "width")
    settings = {"weights": fingerprint(place_of(args.checkpoint or args.model_path))}
    settings["causal"] = args.frames_per_block is not None
    return settings | {name: getattr(args, name) for name in names}


def load_teacher(args: argparse.Namespace) -> Teacher:
    device, checkpoint = pick_device(args.device, "--device "), args.checkpoint or args.model_path
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    model = load_transformer(checkpoint, config=args.config, dtype=dtype, device=device).eval().requires_grad_(False)
    if model.config.model_type != "t2v":
        raise ValueError(f"{checkpoint} makes videos of images: give a text-to-video teacher, which needs none.")
    model.attention = fastest_attention
    encoder = TextEncoder(args.model_path, cache=args.cache, device=device)
    num_frames = num_latents(args.num_frames)
    config = RolloutConfig(grid(args.num_steps), args.frames_per_block or num_frames)
    shape = (num_frames, model.config.out_dim, args.height // STRIDE, args.width // STRIDE)
    return Teacher(model, encoder, FlowMatchScheduler(args.shift), config, args.guidance_scale, shape, args.seed)


# --------------------------------------------------------------------------------------------------- from form to form


def convert(args: argparse.Namespace) -> None:
    """Clips of any form into one LMDB or several, or into a folder with a file for each."""
    if (args.lmdb_path is None) == (args.output_folder is None):
        raise ValueError("Say where to, with one of --lmdb_path and --output_folder.")
    clips, dtype = Clips(args.data_path), getattr(torch, args.dtype)
    if args.output_folder:
        return write_files(clips, args.output_folder, args.format, dtype)
    if not 1 <= args.num_shards <= len(clips):
        raise ValueError(f"--num_shards must lie between 1 and the number of clips, {len(clips)}.")
    for shard in own_share(range(args.num_shards)):
        path = args.lmdb_path / f"shard_{shard}" if args.num_shards > 1 else args.lmdb_path
        write_lmdb(path, clips, range(shard, len(clips), args.num_shards), dtype)


def write_files(clips: Clips, folder: Path, ending: str, dtype: torch.dtype) -> None:
    for i in tqdm(own_share(range(len(clips))), desc=folder.name, unit="clip", disable=None):
        path, clip = folder / f"clip_{i:06d}.{ending}", clips[i]
        if not is_written(path, clip.prompt, clips.settings):
            write_clip(path, clip, clips.settings, dtype)


# -------------------------------------------------------------------------------------------------------- command line


def count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}.")
    return int(text)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m full_scale.data", description=__doc__, **raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (build, describe) in COMMANDS.items():
        command = commands.add_parser(name, description=describe.__doc__)
        command.set_defaults(build=build)
        describe(command.add_argument)
    return parser.parse_args(arguments)


def add_networks(add, model_path: str, parts: str) -> None:
    add("--model_path", type=Path, default=Path(model_path), help=f"the folder of {parts}: Wan's or diffusers'")
    add("--device", default="auto", help="by default this process's GPU, else the CPU")


def add_size(add) -> None:
    add("--num_frames", type=count, default=81, help="pictures of a clip, 1 + 4 n")
    add("--height", type=count, default=480, help="in pixels")
    add("--width", type=count, default=832, help="in pixels")


T2V, I2V = "wan_models/Wan2.1-T2V-1.3B", "wan_models/Wan2.1-I2V-14B-480P"
A_PROMPT_FILE = "a text file with a prompt on each line, or a folder of text files"


def describe_prompts(add) -> None:
    """Encode prompts, and the negative prompt, into the cache that training reads: 8 KB for each token, which is 1 to 4
    MB for a long prompt, and hundreds of GB for all of Self-Forcing's."""
    add("--prompts", type=Path, required=True, help=A_PROMPT_FILE)
    add("--num_samples", type=count, help="those of a run alone: its num_steps times its batch_size; by default all")
    add("--seed", type=int, default=0, help="of that run, which gives the order")
    add("--cache", type=Path, default=Path("cache/prompts"), help="training's is encoder.cache")
    add_networks(add, T2V, "the text encoder")


def describe_images(add) -> None:
    """Encode the images of image-to-video into the cache that training reads, 12 MB each at the default size."""
    add("--images", type=Path, required=True, help="a folder of image-text pairs, a list, or clips; see data.py")
    add("--cache", type=Path, default=Path("cache/images"), help="training's is data.conditions.cache")
    add_networks(add, I2V, "VAE and image encoder")
    add_size(add)


def describe_latents(add) -> None:
    """Encode videos with Wan's VAE: the first frames of each, cut to the proportions and resized."""
    add("--videos", type=Path, required=True, help="a folder of videos")
    add("--prompts", type=Path, required=True, help="a folder with a text file for each, of the same name")
    add("--output_folder", type=Path, required=True)
    add("--fps", type=float, default=FPS, help=f"pictures a second to take, by default {FPS}, Wan's")
    add("--first_frames", action="store_true", help="keep the first picture too, for image-to-video")
    add_networks(add, T2V, "the VAE")
    add_size(add)


def describe_ode_pairs(add) -> None:
    """Follow a teacher's guided ODE from noise to video, and keep its states at the student's steps."""
    add("--prompts", type=Path, required=True, help=A_PROMPT_FILE)
    add("--output_folder", type=Path, required=True)
    add("--num_pairs", type=count, help="by default one for each prompt; prompts come round again, or are left over")
    add("--checkpoint", type=Path, help="the teacher, a folder or file; by default the one in --model_path")
    add("--config", help="of a teacher whose file does not tell its sizes")
    add("--frames_per_block", type=count, help="of a causal teacher; by default it is bidirectional: one block")
    add("--num_steps", type=count, default=48, help="of the ODE")
    add("--keep", type=float, nargs="+", default=list(STUDENT_STEPS), help="the student's steps, 0..1000, not warped")
    add("--shift", type=float, default=5.0, help="of the student's schedule")
    add("--guidance_scale", type=float, default=6.0)
    add("--seed", type=int, default=0)
    add("--batch_size", type=count, default=1, help="pairs that are made together")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="by default bfloat16, on a CPU float32")
    add("--cache", type=Path, default=Path("cache/prompts"), help="of encoded prompts")
    add_networks(add, T2V, "the text encoder and, by default, the teacher")
    add_size(add)


def describe_lmdb(add) -> None:
    """Bring clips or pairs into another form. Read are folders of .safetensors, .npz or .pt, and LMDBs."""
    add("--data_path", type=Path, required=True, help="a folder, file or LMDB of clips")
    add("--lmdb_path", type=Path, help="to write an LMDB in Self-Forcing's keys, or a folder of them")
    add("--num_shards", type=count, default=1, help="LMDBs; several processes write several")
    add("--output_folder", type=Path, help="to write a folder with a file for each clip")
    add("--format", choices=("safetensors", "npz"), default="safetensors", help="of these files")
    add("--dtype", choices=("float16", "float32"), default="float16", help="others read float16 alone")


COMMANDS = {
    "prompts": (cache_prompts, describe_prompts),
    "images": (cache_images, describe_images),
    "latents": (make_latents, describe_latents),
    "ode_pairs": (make_ode_pairs, describe_ode_pairs),
    "lmdb": (convert, describe_lmdb),
}


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    args.build(args)


def run() -> None:
    """The command line, with a user's mistake as one sentence."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"full_scale.data: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("Stopped; the same command goes on from there.")
