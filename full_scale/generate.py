"""Videos from Wan 2.1 and its students: python -m full_scale.generate --prompts "a cat walks on the grass"

Text to video, image to video (--i2v, --image) and the continuation of a given video (--video), through the rollout of
the tiny model. How a checkpoint is sampled follows from what it is, as far as options do not say otherwise:

    a folder, Wan's own or diffusers'     whole clips, 50 guided UniPC steps     --mode many-step --bidirectional
    a file of 1.3B, Self-Forcing          blocks of 3 frames, 4 steps            --mode few-step --no-bidirectional
    a file of 14B, Self-Forcing-Plus      whole clips, 4 steps                   --mode few-step --bidirectional
    what train.py wrote                   the way it was trained to be sampled

Frames are latent frames: F of them are 1 + 4 (F - 1) pictures, 16 a second. What is given, a video or the image of a
text-to-video model, fills the cache, is shown as it was given, and comes on top of the F frames that are made; an
image-to-video model makes its image's frame itself.

A video depends on its prompt, image, seed and number, and on what its .json records, not on what else is made, nor
on the process that makes it: under torchrun, each takes every so many-th prompt. A finished video is not made again.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import islice, product
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from checkpoint import atomic
from dynamic_video_sf import Guided, RolloutConfig, prefill, renoise, rollout
from flow_match import FlowMatchScheduler
from full_scale.attention import NEEDS, fastest_attention
from full_scale.build_data import count, process_number
from full_scale.data import image_pairs, read_prompts
from full_scale.images import ImageEncoder, Images, image_conditioning, image_pixels, load_image_encoder
from full_scale.memory import KnownPrompts, VisitingStream, offload_layers, visiting
from full_scale.pixels import (
    FPS,
    STRIDE,
    TIME_STRIDE,
    TinyDecoder,
    WanVAE,
    check_size,
    load_tiny_decoder,
    load_vae,
    num_latents,
)
from full_scale.pretrained import DOWNLOADS, PLACES, fingerprint
from full_scale.sharded_checkpoint import STATE
from full_scale.speed import QUANTISED, check_quantised, compile_layers, quantise, read_prompts_once
from full_scale.text import NEGATIVE_PROMPT, NEGATIVE_PROMPT_I2V, TextEncoder
from full_scale.wan import (
    T2V_14B,
    WAN_CONFIGS,
    load_transformer,
    parsed,
    place_of,
    read_json,
    read_pickle,
    read_safetensors,
    stored_config,
)
from generate import draw_noise, sample_keys, to_pixels
from kv_cache import FramesPerBlock, block_borders, block_sizes
from ode_pairs import grid
from processes import pick_device
from randomness import generator
from samplers import UniPC
from tiny_causal_wan import Attention, TinyCausalWanModel, WanConfig, exact_attention
from visualization.video_files import write_gif

NUM_STEPS, GUIDANCE_SCALE = 50, 5.0  # of many-step sampling, as Wan does it
PIECE = 16  # pictures of a given video that are shown together: as bytes it fits into memory, not as numbers
STUDENT = Path("wan_models/Self-Forcing/checkpoints/self_forcing_dmd.pt")  # where DOWNLOADS puts them
WAN = {"t2v": Path("wan_models/Wan2.1-T2V-1.3B"), "i2v": Path("wan_models/Wan2.1-I2V-14B-480P")}
KERNELS = {
    kernel.__name__.removesuffix("_attention"): kernel for kernel in (fastest_attention, exact_attention, *NEEDS)
}

ALL_AT_ONCE = (
    "This makes all frames at once, and neither --frames_per_block nor what is given, a video or image, goes with "
    "that: use --no-bidirectional."
)
PAIRS = "a folder of name.jpg and name.txt each, or a list, see read_image_list of full_scale/data.py"
NEEDS_IMAGE = "This is an image-to-video model: give it images, with --image FILE or --i2v --data_path FOLDER."

# ------------------------------------------------------------------------------------------------------- networks


@dataclass(frozen=True)
class Models:
    """The networks that make a video, each loaded when it is first needed.

    checkpoint, config, weights: see `load_transformer`. model_path: where text encoder, VAE and image encoder lie.
    negative_prompt: by default Wan's own. prompt_cache: see TextEncoder. With low_memory, VAE and image encoder are on
    the device only while they work; with offload_layers, so is every layer of the transformer. compile, quantise: see
    full_scale/speed.py.
    """

    checkpoint: Path
    model_path: Path
    config: WanConfig | str | Path | None = None
    weights: str = "ema"
    device: torch.device | str = "cpu"
    dtype: torch.dtype | str = torch.float32
    attention: Attention = fastest_attention
    negative_prompt: str | None = None
    prompt_cache: Path | None = None
    tiny_decoder: Path | None = None
    text_device: torch.device | str | None = None
    low_memory: bool = False
    offload_layers: bool = False
    compile: bool = False
    quantise: str | None = None

    @cached_property
    def sizes(self) -> WanConfig:
        return stored_config(self.checkpoint, self.config, self.weights)

    @property
    def home(self) -> torch.device | str:
        """Where VAE and image encoder are between two calls."""
        return "cpu" if self.low_memory else self.device

    @cached_property
    def transformer(self) -> TinyCausalWanModel:
        device = None if self.offload_layers else self.device
        first_on = None if self.quantise else device  # it may only fit once it is small
        load = {"config": self.sizes, "dtype": self.dtype, "device": first_on, "weights": self.weights}
        model = load_transformer(self.checkpoint, **load).eval().requires_grad_(False)
        model.attention = self.attention
        model = compile_layers(model) if self.compile else read_prompts_once(model)
        if self.quantise:
            model = quantise(model, self.quantise, device).to(device)
        return offload_layers(model, self.device) if self.offload_layers else model

    @cached_property
    def text(self) -> KnownPrompts:
        negative = self.negative_prompt
        if negative is None:
            negative = NEGATIVE_PROMPT_I2V if self.sizes.model_type == "i2v" else NEGATIVE_PROMPT
        settings = {"text_len": self.sizes.text_len, "negative_prompt": negative, "cache": self.prompt_cache}
        place = {"dtype": self.dtype, "device": self.text_device or self.device}
        return KnownPrompts(TextEncoder(self.model_path, **place, **settings), self.device)

    @cached_property
    def vae(self) -> WanVAE:
        return load_vae(self.model_path, device=self.home)

    @cached_property
    def decoder(self) -> WanVAE | TinyDecoder:
        return load_tiny_decoder(self.tiny_decoder, device=self.home) if self.tiny_decoder else self.vae

    @cached_property
    def clip(self) -> ImageEncoder:
        return load_image_encoder(self.model_path, device=self.home)

    def encode(self, video: Tensor) -> Tensor:
        """Latents of a video's pictures, as `numbers` takes them, a few at a time."""
        sizes = [1] + [TIME_STRIDE] * (num_latents(video.shape[1]) - 1)
        with visiting(self.device, self.home, self.vae):
            stream = self.vae.encoding_stream()
            return torch.cat([stream(numbers(part.to(self.device))) for part in video.split(sizes, dim=1)], dim=1)

    def condition(self, images: Images, num_frames: int, height: int, width: int) -> dict[str, Tensor]:
        """What an image-to-video model sees of its images."""
        with visiting(self.device, self.home, self.vae, self.clip):
            cond = image_conditioning(images, num_frames, self.vae, self.clip, height=height, width=width)
        return {name: x.to(self.device) for name, x in cond.items()}


# ------------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Sampling:
    """How a video is sampled: the rollout, along the ODE with UniPC (many_step) or with fresh noise in few steps."""

    rollout: RolloutConfig
    shift: float = 5.0
    guidance_scale: float = 1.0
    many_step: bool = False

    @property
    def scheduler(self) -> FlowMatchScheduler:
        return FlowMatchScheduler(self.shift)

    @property
    def sampler(self) -> Callable:
        return UniPC(self.scheduler, self.rollout.denoising_steps) if self.many_step else renoise


SAMPLING_OPTIONS = ("mode", "bidirectional", "num_steps", "denoising_steps", "frames_per_block", "guidance_scale")
SAMPLING_OPTIONS += ("shift", "sink_frames", "window_frames")


def choose_sampling(
    models: Models, num_frames: int = 21, *, given=None, mode=None, bidirectional=None, num_steps=None,
    denoising_steps=None, frames_per_block=None, guidance_scale=None, shift=None, sink_frames=None, window_frames=None,
) -> Sampling:  # fmt: skip
    """What the options say and, where they are None, what the checkpoint is: the table at the top of this file.

    given: "image" or "video", what the frames are to continue. Raises ValueError for options that exclude each other.
    """
    record = training_record(models.checkpoint)
    training = record.get("training", {})
    plain = training.get("stage", "teacher" if models.checkpoint.is_dir() else None) == "teacher"
    many_step = plain if mode is None else mode == "many-step"
    if bidirectional is None:
        bidirectional = not frames_per_block and makes_whole_clips(models.sizes, plain, training)
    blocks = num_frames if bidirectional else frames_per_block or training.get("num_frames_per_block", 3)
    if bidirectional and (given or frames_per_block):
        raise ValueError(ALL_AT_ONCE)
    if num_steps is not None and not many_step:
        raise ValueError("num_steps are those of many-step sampling: use --mode many-step, or --denoising_steps.")
    trained = {f.name: training[f.name] for f in fields(RolloutConfig) if f.name in training}
    if many_step:
        trained["denoising_steps"] = grid(NUM_STEPS if num_steps is None else num_steps)
    options = {"denoising_steps": denoising_steps, "sink_frames": sink_frames, "window_frames": window_frames}
    options = {name: value for name, value in options.items() if value is not None}
    if shift is None:
        shift = record.get("scheduler", {}).get("shift", Sampling.shift)
    if guidance_scale is None:
        guidance_scale = training.get("guidance_scale", GUIDANCE_SCALE) if many_step else 1.0
    config = RolloutConfig(frames_per_block=first_alone(blocks) if given == "image" else blocks, **trained | options)
    return Sampling(config, shift, guidance_scale, many_step)


def training_record(path: Path) -> Mapping:
    """What train.py wrote into its checkpoint about the run; nothing for a file or folder of others."""
    if path.suffix == ".safetensors":
        record = parsed(read_safetensors(path)[1].get("config", ""))
    elif path.is_file():
        record = read_pickle(path).get("config")
    else:
        record = read_json(path / STATE).get("config") if (path / STATE).is_file() else None
    return record if isinstance(record, Mapping) else {}


def makes_whole_clips(sizes: WanConfig, plain: bool, training: Mapping) -> bool:
    """Whether a model makes all frames at once: Wan itself does, and of the published students those of 14B do."""
    frames = training.get("num_frames_per_block")
    if frames is None or plain:
        return plain or sizes.model_type == "i2v" or sizes.num_layers >= T2V_14B.num_layers
    return frames == training.get("max_num_frames")


def first_alone(frames_per_block: FramesPerBlock) -> tuple[int, ...]:
    """Blocks for a video whose first frame is given."""
    sizes = (frames_per_block,) if isinstance(frames_per_block, int) else tuple(frames_per_block)
    return sizes if sizes[0] == 1 else (1, *sizes)


@torch.no_grad()
def stream_latents(
    model, sampling: Sampling, cond, keys: Sequence[tuple], num_frames: int, frame_shape, *, past=None, device=None
) -> Iterator[Tensor]:
    """Yield the clean blocks [B, n, C, H, W] of num_frames latent frames, as soon as they exist.

    keys: what fixes each sample's numbers. past [B, P, C, H, W]: frames to continue. Noise is drawn for each block with
    a key of its own: a stream needs no more memory the longer it gets, and a continued video sees the noise that it
    would have seen. Raises ValueError for frames that cut a block.
    """
    config, scheduler, sampler = sampling.rollout, sampling.scheduler, sampling.sampler
    cache = config.empty_cache()
    if past is not None:
        rng = [generator(*key, "context") for key in keys]
        cache = prefill(model, scheduler, past, cond, config, rng=rng)
    sizes = block_sizes(num_frames, config.frames_per_block, first_frame=cache.next_frame)

    def blocks(cache):
        for size in sizes:
            noise, rng = draw_noise([(*key, cache.next_frame) for key in keys], size, frame_shape, device)
            cache = yield from rollout(model, scheduler, noise, cond, config, cache=cache, rng=rng, sampler=sampler)

    yield from islice(blocks(cache), len(sizes))  # what the last block would remember is of no use


@torch.no_grad()
def stream_video(
    models: Models, prompts: Sequence[str], sampling: Sampling, *, num_frames=21, height=480, width=832, seed=0,
    keys=None, images: Images | None = None, video: Tensor | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield the pixels [B, f, 3, H, W] of one video per prompt, on the CPU in [-1, 1], block by block.

    images: one per prompt, the first frames. video [B or 1, F, 3, H, W], in [-1, 1] or uint8: what is to be continued.
    What is given, the image of an image-to-video model excepted, is yielded first. keys: by default `sample_keys`.
    Close the iterator to stop. Raises ValueError for sizes that do not fit.
    """
    check_size(height, width, models.sizes.patch_size)
    keys = sample_keys(prompts, seed) if keys is None else keys
    model, cond = conditioned(models, prompts, sampling, images, num_frames, height, width)
    if images is not None and models.sizes.model_type == "t2v":
        video = image_pixels(images, height, width)[:, None]
    decode, past = VisitingStream(models.decoder, models.device, models.home), None
    if video is not None:
        for piece in video.split(PIECE, dim=1):
            yield numbers(piece).expand(len(prompts), -1, -1, -1, -1)
        past = models.encode(usable(video, sampling.rollout.frames_per_block)).expand(len(prompts), -1, -1, -1, -1)
        for latents in past.split(1, dim=1):  # for the decoder's memory; what was given has been shown
            decode(latents)
    shape = (models.sizes.out_dim, height // STRIDE, width // STRIDE)
    for block in stream_latents(model, sampling, cond, keys, num_frames, shape, past=past, device=models.device):
        yield decode(block).cpu()


def conditioned(models: Models, prompts, sampling, images, num_frames, height, width):
    """The generator, guided if it is to be, and its cond. Prompts come first: without memory for all, they have to."""
    cond, guided = models.text(prompts), sampling.guidance_scale != 1
    uncond = models.text.null(len(prompts)) if guided else {}
    if models.sizes.model_type == "i2v":
        if images is None:
            raise ValueError(NEEDS_IMAGE)
        seen = models.condition(images, num_frames, height, width)
        cond, uncond = cond | seen, uncond | seen
    model = models.transformer
    return (Guided(model, uncond, sampling.guidance_scale) if guided else model), cond


def usable(video: Tensor, frames_per_block: FramesPerBlock) -> Tensor:
    """The end of a video [B, F, 3, H, W], as many frames as are a whole number of blocks of latents."""
    num_frames = num_latents(video.shape[1])
    borders = block_borders(num_frames, frames_per_block)
    fitting = max(border for border in borders if border <= num_frames)
    if not fitting:
        raise ValueError(
            f"The given video has {video.shape[1]} frames at {FPS} a second, less than a block: "
            f"give at least {1 + 4 * (borders[1] - 1)}."
        )
    return video[:, -(1 + 4 * (fitting - 1)) :]


def numbers(video: Tensor) -> Tensor:
    """Pixels in [-1, 1], if need be from uint8."""
    return video if video.is_floating_point() else video / 127.5 - 1


def ahead(items: Iterator) -> Iterator:
    """The same items; the next is computed, in a thread of its own, while one is shown or written."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


# ---------------------------------------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Request:
    """What the model reads, what names the file, and the image that the video begins with."""

    prompt: str
    title: str
    image: Path | None = None

    @property
    def source(self):
        """What fixes the numbers of its videos, besides the seed."""
        return self.prompt if self.image is None else (self.prompt, fingerprint(self.image))


def read_requests(args: argparse.Namespace) -> list[Request]:
    """One per prompt: of the command line, of a text file or folder, or of images with their prompts."""
    if (args.prompts is None) == (args.data_path is None):
        raise ValueError('Say what to show, with one of --prompts "a cat walks on the grass" and --data_path PATH.')
    if args.image and not args.image.is_file():
        raise ValueError(f"There is no image {args.image}: check --image.")
    if args.i2v and not args.image:
        if not args.data_path:
            raise ValueError("--i2v needs images: add --data_path with a folder of image-text pairs, or --image FILE.")
        requests = [Request(pair.prompt, pair.prompt, pair.image) for pair in image_pairs(args.data_path)]
        if not requests:
            raise ValueError(f"{args.data_path} holds no image-text pairs: give {PAIRS}.")
    else:
        requests = [Request(prompt, prompt, args.image) for prompt in args.prompts or read_prompts(args.data_path)]
    if args.extended_prompt_path is None:
        return requests
    extended = read_prompts(args.extended_prompt_path)
    if len(extended) != len(requests):
        raise ValueError(
            f"{args.extended_prompt_path} holds {len(extended)} prompts for {len(requests)}: give one each, in order."
        )
    return [replace(request, prompt=prompt) for request, prompt in zip(requests, extended, strict=True)]


def read_video(path: Path, height: int, width: int) -> Tensor:
    """Its pictures, uint8 [1, F, 3, H, W], at 16 a second, cut to the proportions and resized."""
    if not path.is_file():
        raise ValueError(f"There is no video {path}: check --video.")
    try:
        frames = imageio_ffmpeg.read_frames(path, output_params=["-vf", f"fps={FPS}"])
        size = next(frames)["size"]
        pictures = (image_pixels(Image.frombytes("RGB", size, frame), height, width) for frame in frames)
        pixels = [torch.from_numpy(to_pixels(picture)) for picture in pictures]
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as a video: give --video a file that ffmpeg can read.") from error
    return torch.stack(pixels, dim=1)


# -------------------------------------------------------------------------------------------------- what is made


@dataclass(frozen=True)
class Output:
    """A video to be made: the how-many-th prompt it shows, what fixes its numbers, its files, all it depends on."""

    index: int
    request: Request
    key: tuple
    stem: Path
    record: dict

    def file(self, ending: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}.{ending}")

    def is_finished(self, formats: Sequence[str]) -> bool:
        """Whether its files are there, the record as the last of them. Raises ValueError for those of another."""
        path = self.file("json")
        if not path.exists():
            return False
        found, record = read_json(path), json.loads(json.dumps(self.record))
        differ = sorted(name for name in {*found, *record} if found.get(name) != record.get(name))
        if differ:
            then, now = (content.get(differ[0]) for content in (found, record))
            raise ValueError(
                f"{path} records {differ[0]} {then}, not {now}: choose another --output_folder, or remove it."
            )
        return all(self.file(ending).exists() for ending in formats)


def plan_outputs(args: argparse.Namespace, requests: Sequence[Request], settings: Mapping) -> list[Output]:
    """The videos of all processes. Raises ValueError where two would have one name."""
    repeated = [(i, request) for i, request in enumerate(requests) for _ in range(args.num_samples)]
    keys = sample_keys([request.source for _, request in repeated], args.seed)
    outputs = []
    for (index, request), key in zip(repeated, keys, strict=True):
        kind = "ema" if args.use_ema else "regular"
        name = f"{index}-{key[-1]}_{kind}" if args.save_with_index else f"{file_name(request.title)}-{key[-1]}"
        image = {} if request.image is None else {"image": fingerprint(request.image)}
        record = {"prompt": request.prompt, **image, "seed": args.seed, "sample": key[-1], **settings}
        outputs.append(Output(index, request, key, args.output_folder / name, record))
    twice = [stem for stem, count in Counter(output.stem for output in outputs).items() if count > 1]
    if twice:
        raise ValueError(f"Several videos would be {twice[0]}.{args.format[0]}: use --save_with_index.")
    return outputs


def file_name(prompt: str) -> str:
    """The first 100 characters of a prompt, less what file systems refuse, and no more than 200 bytes."""
    name = re.sub(r'[\x00-\x1f/\\:*?"<>|]+', "_", prompt[:100]).strip(" .")
    return name.encode()[:200].decode(errors="ignore") or "video"


def settings_of(args: argparse.Namespace, models: Models, sampling: Sampling) -> dict:
    """What all videos of a command depend on."""
    settings = {
        "checkpoint": models.checkpoint.name,
        "weights": fingerprint(place_of(models.checkpoint)),
        "use_ema": args.use_ema,
        "dtype": models.dtype,
        "decoder": models.tiny_decoder.name if models.tiny_decoder else "VAE",
        **asdict(sampling.rollout),
        **{name: getattr(sampling, name) for name in ("shift", "guidance_scale", "many_step")},
        **{name: getattr(args, name) for name in ("num_output_frames", "height", "width", "quantise")},
    }
    if sampling.guidance_scale != 1:
        settings["negative_prompt"] = models.text.encoder.negative_prompt
    return settings | ({"video": fingerprint(args.video)} if args.video else {})


# ---------------------------------------------------------------------------------------------------------- files


@contextmanager
def mp4_writer(path: Path, record: Mapping) -> Iterator[Callable]:
    """Takes frames [H, W, 3] as they come; the file is there when it is whole."""
    with atomic(path) as temporary:
        size, ending = (record["width"], record["height"]), ["-f", "mp4"]  # the temporary name has none
        options = {"fps": FPS, "codec": "libx264", "quality": 9, "macro_block_size": 1, "output_params": ending}
        frames = imageio_ffmpeg.write_frames(temporary, size, **options)
        frames.send(None)
        try:
            yield frames.send
        finally:
            frames.close()


@contextmanager
def gif_writer(path: Path, record: Mapping) -> Iterator[Callable]:
    frames = []
    yield frames.append
    with atomic(path) as temporary:
        write_gif(temporary, frames, FPS)


@contextmanager
def npz_writer(path: Path, record: Mapping) -> Iterator[Callable]:
    """As generate.py's files, with one sample: video [1, F, C, H, W]."""
    frames = []
    yield frames.append
    video = np.stack(frames).transpose(0, 3, 1, 2)[None]
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, video=video, prompt=record["prompt"], seed=record["seed"])


WRITERS = {"mp4": mp4_writer, "gif": gif_writer, "npz": npz_writer}


def write_videos(pieces: Iterable[Tensor], outputs: Sequence[Output], formats: Sequence[str]) -> None:
    """Write a batch as its pieces [B, f, 3, H, W] come; a record beside each video says that it is finished."""
    with ExitStack() as files:
        writers = [
            [files.enter_context(WRITERS[ending](output.file(ending), output.record)) for ending in formats]
            for output in outputs
        ]
        for piece in pieces:
            pixels = to_pixels(piece.movedim(2, -1).contiguous())  # [b f h w 3]
            for video, own in zip(pixels, writers, strict=True):
                for frame, write in product(video, own):
                    write(frame)
    for output in outputs:
        with atomic(output.file("json")) as temporary:
            temporary.write_text(json.dumps(output.record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------- command line


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m full_scale.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    yes_or_no = {"action": argparse.BooleanOptionalAction}

    add = parser.add_argument_group("what to show").add_argument
    add("--prompts", nargs="+", metavar="PROMPT")
    add("--data_path", type=Path, help="a text file with a prompt on each line, a folder of them, or image-text pairs")
    add("--extended_prompt_path", type=Path, help="longer prompts, which the model reads; the short ones name files")
    add("--i2v", action="store_true", help=f"--data_path has images, too: {PAIRS}")
    add("--image", type=Path, help="the first frame of every video, cut to its proportions")
    add("--video", type=Path, help="a video to be continued, cut likewise")
    add("--negative_prompt", help="what guidance leads away from; by default Wan's own")
    add("--num_samples", type=count, default=1, help="videos per prompt")
    add("--seed", type=int, default=0)
    add("--num_output_frames", type=count, default=21, help="latent frames to make")
    add("--height", type=int, default=480, help="in pixels")
    add("--width", type=int, default=832, help="in pixels")

    add = parser.add_argument_group("the model").add_argument
    add("--checkpoint", type=Path, default=STUDENT, help="the transformer: a folder or file, by default Self-Forcing's")
    add("--model_path", type=Path, help="the folder of text encoder, VAE and CLIP: Wan's own or a diffusers pipeline")
    add("--config", help=f"{', '.join(WAN_CONFIGS)} or a config.json; by default as stored, or by size")
    add("--use_ema", default=True, help="averaged weights, where the file has them", **yes_or_no)
    add("--tiny_decoder", type=Path, help="taew2_1.pth, to decode quickly and less exactly")

    add = parser.add_argument_group("how it is sampled").add_argument
    add("--mode", choices=("few-step", "many-step"), help="by default what the checkpoint was made for")
    add("--bidirectional", help="all frames at once; by default as the checkpoint was made for", **yes_or_no)
    add("--frames_per_block", type=int, nargs="+", help="latent frames; the last number repeats; by default 3")
    add("--denoising_steps", type=float, nargs="+", help="0..1000, falling from 1000; by default 1000 750 500 250")
    add("--num_steps", type=count, help=f"of many-step sampling, evenly spaced; by default {NUM_STEPS}")
    add("--guidance_scale", type=float, help=f"1 for none; by default {GUIDANCE_SCALE:g} in many steps, 1 in few")
    add("--shift", type=float, help="of the schedule, by default 5")
    add("--sink_frames", type=int, help="of the video's first frames, remembered for ever")
    add("--window_frames", type=int, help="past frames remembered besides the sink; by default all")

    add = parser.add_argument_group("where and how").add_argument
    add("--output_folder", type=Path, default=Path("outputs"))
    add("--save_with_index", action="store_true", help="name files by the prompt's number")
    add("--format", nargs="+", choices=tuple(WRITERS), default=["mp4"], help="gif and npz hold a video in memory")
    add("--batch_size", type=count, default=1, help="videos that are made together")
    add("--device", default="auto", help="by default this process's GPU, else the CPU")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="by default bfloat16, on a CPU float32")
    add(
        "--compile",
        action="store_true",
        help="the transformer's layers; takes minutes, and is worth it for many videos",
    )
    add("--quantise", choices=QUANTISED, help="8 bits for weights, or for products as well (GPUs since Ada and Hopper)")
    add("--attention", choices=tuple(KERNELS), default="fastest", help="see python -m full_scale.attention")
    add("--prompt_cache", type=Path, help="a folder that remembers what the text encoder said")
    add("--text_device", help="of the text encoder, 11.4 GB in bfloat16; by default the same")
    add("--low_memory", action="store_true", help="VAE and image encoder on the device only while they work")
    add("--offload_layers", action="store_true", help="the transformer's layers too, one at a time")
    args = parser.parse_args(arguments)
    args.i2v |= args.image is not None
    return args


def pick_models(args: argparse.Namespace) -> Models:
    """What to load, and from where. Raises ValueError where it has not been downloaded."""
    if not args.checkpoint.exists():
        student, wan = (DOWNLOADS[name].command for name in ("self-forcing", "t2v-1.3b"))
        raise ValueError(
            f"There is no {args.checkpoint}: download Self-Forcing's with `{student}` or Wan's with `{wan}`."
        )
    device = pick_device(args.device, "--device ")
    check_quantised(args.quantise, device)
    names = ("checkpoint", "config", "negative_prompt", "prompt_cache", "tiny_decoder", "text_device", "offload_layers")
    names += ("compile", "quantise")
    models = Models(
        **{name: getattr(args, name) for name in names},
        model_path=args.model_path or args.checkpoint,
        weights="ema" if args.use_ema else "raw",
        device=device,
        dtype=args.dtype or ("float32" if device.type == "cpu" else "bfloat16"),
        attention=KERNELS[args.attention],
        low_memory=args.low_memory or args.offload_layers,
    )
    if args.model_path or any((args.checkpoint / name).exists() for name in PLACES["text encoder"][:2]):
        return models
    return replace(models, model_path=WAN[models.sizes.model_type])


def what_is_given(args: argparse.Namespace, sizes: WanConfig) -> str | None:
    """What fills the cache and is continued: a "video", or the "image" of a text-to-video model."""
    if args.video and args.i2v:
        raise ValueError("A video continues a video or begins with an image: use --video, or --image or --i2v.")
    if sizes.model_type == "i2v" and not args.i2v:
        raise ValueError(NEEDS_IMAGE)
    return "video" if args.video else "image" if args.i2v and sizes.model_type == "t2v" else None


def count_blocks(num_frames: int, frames_per_block: FramesPerBlock, given: str | None, video: Tensor | None) -> int:
    """How many blocks there are to make. Raises ValueError where they cannot be whole."""
    start = num_latents(usable(video, frames_per_block).shape[1]) if given == "video" else int(given == "image")
    return len(block_sizes(num_frames, frames_per_block, first_frame=start))


def make_videos(models: Models, sampling: Sampling, outputs: Sequence[Output], args, video, num_blocks: int) -> None:
    """Batch after batch. All prompts are encoded first: the text encoder is larger than what comes after it."""
    models.decoder  # noqa: B018  (small; if it cannot be loaded, nobody should wait for the prompts)
    negative = [models.text.encoder.negative_prompt] * (sampling.guidance_scale != 1)
    models.text.learn([*(output.request.prompt for output in outputs), *negative])
    models.text.free()
    batches = [outputs[i : i + args.batch_size] for i in range(0, len(outputs), args.batch_size)]
    shape = {"num_frames": args.num_output_frames, "height": args.height, "width": args.width}
    with tqdm(desc="blocks", unit="block", total=len(batches) * num_blocks, disable=None) as bar:
        for batch in batches:
            prompts, keys = zip(*((output.request.prompt, output.key) for output in batch), strict=True)
            images = [Image.open(output.request.image) for output in batch] if args.i2v else None
            pieces = stream_video(models, prompts, sampling, keys=keys, images=images, video=video, **shape)
            write_videos(counted(ahead(pieces), bar), batch, args.format)


def counted(pieces: Iterator[Tensor], bar: tqdm) -> Iterator[Tensor]:
    for piece in pieces:
        yield piece
        bar.update()


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    args = parse_arguments(arguments)
    requests, models = read_requests(args), pick_models(args)
    check_size(args.height, args.width, models.sizes.patch_size)
    given = what_is_given(args, models.sizes)
    options = {name: getattr(args, name) for name in SAMPLING_OPTIONS}
    sampling = choose_sampling(models, args.num_output_frames, given=given, **options)
    video = read_video(args.video, args.height, args.width) if args.video else None
    num_blocks = count_blocks(args.num_output_frames, sampling.rollout.frames_per_block, given, video)
    rank, world_size = process_number()
    outputs = plan_outputs(args, requests, settings_of(args, models, sampling))
    outputs = [output for output in outputs if output.index % world_size == rank]
    todo = [output for output in outputs if not output.is_finished(args.format)]
    if todo:
        shown_first = int(given == "image") if video is None else -(-video.shape[1] // PIECE)
        make_videos(models, sampling, todo, args, video, num_blocks + shown_first)
    print(f"{args.output_folder}: {len(todo)} videos made, {len(outputs) - len(todo)} were there already")
    return [output.file(ending) for output in outputs for ending in args.format]


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"full_scale.generate: {error}", file=sys.stderr)
        sys.exit(2)
