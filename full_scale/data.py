"""What training at full scale reads: prompts, alone or with images, clips that were encoded beforehand, ODE pairs.

A source of data has the `frame_shape` (C, H, W) of its latents and `batch(samples)`, a dict with "prompts" and whatever
it has besides. Sample i is item i of an endless row in which every item comes once before any comes again, in an order
that the seed gives: however many processes ask, they see one and the same row.

    python -m full_scale.data prompts | images | latents | ode_pairs | lmdb     makes what is read here: build_data.py
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from checkpoint import atomic
from full_scale.images import cut, image_conditioning, load_image_encoder, pictures
from full_scale.pixels import STRIDE, WanVAE, load_vae
from full_scale.pretrained import find, fingerprint
from full_scale.stored_clips import Clip, Clips
from processes import pick_device

T = TypeVar("T")
FRAME_SHAPE = (16, 60, 104)  # latents of 480 x 832 pixels


class Prompts:
    """Prompts alone: all that a student needs that learns from its own videos.

    path: a text file with one prompt per line, or a folder of text files with one prompt each. frame_shape: of the
    latents that the student makes. Raises ValueError where there is no prompt.
    """

    def __init__(self, path: str | Path, frame_shape: Sequence[int] = FRAME_SHAPE, seed: int = 0):
        self.prompts, self.seed, self.frame_shape = read_prompts(Path(path)), seed, tuple(frame_shape)

    def batch(self, samples: Sequence[int]) -> dict:
        return {"prompts": drawn(self.prompts, samples, self.seed)}


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one per line, or of a folder's .txt files, one each, in the order of their names."""
    if path.is_dir():
        lines = [file.read_text(encoding="utf-8") for file in sorted(path.glob("*.txt"))]
    elif path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
    else:
        raise ValueError(f"There are no prompts at {path}: give a text file, one prompt per line, or a folder of them.")
    prompts = [one_line(line) for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt: give a text file, one prompt per line, or a folder of .txt files.")
    return prompts


def one_line(text: str) -> str:
    return " ".join(text.split())


def drawn(items: Sequence[T], samples: Sequence[int], seed: int) -> list[T]:
    """The items that the samples are."""
    return [items[shuffled(sample, len(items), seed)] for sample in samples]


def shuffled(sample: int, count: int, seed: int) -> int:
    """Which of `count` items the sample is: round after round of all of them, each in an order of its own."""
    turn, place = divmod(sample, count)
    return int(order(seed, turn, count)[place])


@lru_cache(2)
def order(seed: int, turn: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, turn)).permutation(count)


# ---------------------------------------------------------------------------------------------- clips and trajectories


class Latents:
    """Videos that the VAE encoded beforehand, for whatever learns from data: teacher, init, and some objectives.

    path: see stored_clips.py; of a trajectory the end is taken. frame_shape, if given, is what the clips must have.
    num_frames: so many of each clip, from its beginning; None: all. Raises ValueError where clips do not fit.
    """

    def __init__(
        self, path: str | Path, frame_shape: Sequence[int] | None = None, seed: int = 0,
        *, num_frames: int | None = None,
    ):  # fmt: skip
        self.clips, self.seed, self.num_frames = Clips(path), seed, num_frames
        self.frame_shape = check_frames(self.clips, frame_shape)

    def batch(self, samples: Sequence[int]) -> dict:
        clips = drawn(self.clips, samples, self.seed)
        videos = [clip.video[: self.num_frames] for clip in clips]
        lengths = {len(video) for video in videos}
        if lengths != {self.num_frames or len(videos[0])}:
            found = " and ".join(map(str, sorted(lengths)))
            raise ValueError(f"{self.clips.path} holds clips of {found} frames: set data.num_frames to what all have.")
        return {"prompts": [clip.prompt for clip in clips], "video": torch.stack(videos).float()}


class OdePairs:
    """Stored trajectories of a teacher's ODE, for stage=init with training.init=ode_pairs.

    path: see stored_clips.py. shift, steps: of the student's schedule, which the stored states must lie on; what is
    recorded with them is compared, and an LMDB of others records nothing. Self-Forcing's script has shift 8 and steps
    [1000, 750, 500, 250], CausVid's shift 8 and steps [1000, 280, 120]. causal: whether the teacher was, if that is not
    recorded. Raises ValueError for what does not fit.
    """

    def __init__(
        self, path: str | Path, frame_shape: Sequence[int] | None = None, seed: int = 0, *,
        shift: float | None = None, steps: Sequence[float] | None = None, causal: bool = False,
    ):  # fmt: skip
        self.clips, self.seed = Clips(path), seed
        self.frame_shape = check_frames(self.clips, frame_shape)
        recorded = self.clips.settings
        self.check("shift", recorded.get("shift"), shift, "scheduler.shift")
        steps = steps and [step for step in steps if step]  # a trailing 0 is the video
        self.check("steps", recorded.get("keep"), steps, "training.denoising_steps")
        self.steps, self.causal = recorded.get("keep", steps), recorded.get("causal", causal)
        states = self.clips[0].latents
        if states.ndim != 5 or not self.steps or len(states) != len(self.steps) + 1:
            found = "videos" if states.ndim == 4 else f"{len(states)} states of each video"
            raise ValueError(
                f"{path} holds {found}, which is not one for each of the steps {self.steps} and the video itself: "
                "make pairs with `python -m full_scale.data ode_pairs`, or set data.steps."
            )

    def check(self, name: str, recorded, given, option: str) -> None:
        if None not in (recorded, given) and recorded != given:
            raise ValueError(
                f"The pairs in {self.clips.path} were made with {name} {recorded}, this run has {given}: "
                f"set {option} to that, or make other pairs."
            )

    def batch(self, samples: Sequence[int]) -> dict:
        """ "trajectory" [B, K + 1, F, C, H, W], its end as "video", "prompts", "steps" (K numbers) and "causal"."""
        clips = drawn(self.clips, samples, self.seed)
        trajectory = torch.stack([clip.latents for clip in clips]).float()
        return {
            "trajectory": trajectory,
            "video": trajectory[:, -1],
            "prompts": [clip.prompt for clip in clips],
            "steps": self.steps,
            "causal": self.causal,
        }


def check_frames(clips: Clips, frame_shape: Sequence[int] | None) -> tuple[int, ...]:
    """(C, H, W) of the clips. Raises ValueError if that is not what was expected."""
    found = tuple(clips[0].latents.shape[-3:])
    if frame_shape is not None and found != tuple(frame_shape):
        raise ValueError(
            f"{clips.path} holds latents of {list(found)}, this run expects {list(frame_shape)}: "
            "set data.frame_shape, or make clips of that size."
        )
    return found


# -------------------------------------------------------------------------------------------------------------- images


class ImagePrompts:
    """Prompts, each with the image that its video begins with: for image-to-video.

    path: what `read_image_prompts` reads. conditions: what the model sees of an image. num_frames: of the longest video
    that the student makes, in latent frames.
    """

    def __init__(
        self, path: str | Path, conditions: "ImageConditions", frame_shape: Sequence[int] = FRAME_SHAPE, seed: int = 0,
        *, num_frames: int = 21,
    ):  # fmt: skip
        self.items, self.conditions, self.seed = read_image_prompts(Path(path)), conditions, seed
        self.frame_shape, self.num_frames = tuple(frame_shape), num_frames

    def batch(self, samples: Sequence[int]) -> dict:
        """ "prompts" and, as "cond", "image_latents" [B, F, 20, H, W] and "clip_features" [B, 257, 1280]."""
        items = drawn(self.items, samples, self.seed)
        seen = [self.see(item) for item in items]
        return {
            "prompts": [item.prompt for item in items],
            "cond": {name: torch.cat([each[name] for each in seen]) for name in seen[0]},
        }

    def see(self, item: "ImagePrompt | Clip") -> dict[str, Tensor]:
        """What the model sees of an item's image, computed now or remembered."""
        height, width = (STRIDE * size for size in self.frame_shape[1:])
        return self.conditions(picture(item), self.num_frames, height, width)


@dataclass(frozen=True)
class ImagePrompt:
    prompt: str
    image: Path


def picture(item: ImagePrompt | Clip) -> Image.Image:
    if isinstance(item.image, Path):
        with Image.open(item.image) as image:
            return pictures(image)[0]
    if item.image is None:
        raise ValueError(f"The clip of {item.prompt!r} has no picture: make the clips with --first_frames.")
    return Image.fromarray(item.image.numpy())


PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def read_image_prompts(path: Path) -> Sequence[ImagePrompt | Clip]:
    """Images with prompts: what `image_pairs` reads, or clips that have their first pictures."""
    return image_pairs(path) or Clips(path)


def image_pairs(path: Path) -> list[ImagePrompt]:
    """A folder of name.jpg (or .png, ...) and name.txt each, or a .json or .jsonl list with "image" and "prompt", or
    "file_name" and "caption", for each; nothing for whatever else there is."""
    if path.suffix in (".json", ".jsonl"):
        return read_image_list(path)
    images = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES) if path.is_dir() else []
    return [ImagePrompt(prompt_beside(image), image) for image in images]


def prompt_beside(file: Path, folder: Path | None = None) -> str:
    """The prompt of an image or a video: the text of the same name, beside it or in a folder of prompts."""
    text = (folder or file.parent) / f"{file.stem}.txt"
    if not text.is_file():
        raise ValueError(f"There is no prompt for {file}: write it to {text}.")
    return one_line(text.read_text(encoding="utf-8"))


def read_image_list(path: Path) -> list[ImagePrompt]:
    """Paths in the list begin at its own folder, or at the folder inside that its name ends with, as CausVid's do."""
    text = path.read_text(encoding="utf-8")
    lists = [text] if path.suffix == ".json" else [f"[{line}]" for line in text.split("\n")]
    try:
        entries = [one for part in lists for one in json.loads(part)]
        pairs = [(one.get("image") or one["file_name"], one.get("prompt") or one["caption"]) for one in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} must be a list of {{"image": ..., "prompt": ...}}; found {error!r}.') from error
    folders = path.parent, path.parent / path.stem.rpartition("_")[2]
    items = []
    for name, prompt in pairs:
        image = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if image is None:
            raise ValueError(f"{path} names {name}, and there is none in {folders[0]}: write where it lies.")
        items.append(ImagePrompt(one_line(prompt), image))
    return items


class ImageConditions:
    """An image -> what an image-to-video model sees of it (full_scale/images.py), and a folder that remembers it.

    path: Wan's folder or a diffusers pipeline, with VAE and image encoder; they are loaded when an image is first
    missed. cache: one file per image, 12 MB for 21 frames of 480 x 832 pixels; None: nothing is remembered. The cache
    may be shared by processes and left behind by an interrupted one. device may be "auto".
    """

    def __init__(self, path: str | Path, *, cache: str | Path | None = None, device: torch.device | str = "cpu"):
        self.vae_path, self.clip_path = find("VAE", path), find("image encoder", path)
        self.cache, self.device = Path(cache) if cache else None, pick_device(str(device))

    def __call__(self, image: Image.Image, num_frames: int, height: int, width: int) -> dict[str, Tensor]:
        """{"image_latents": [1, F, 20, H/8, W/8], "clip_features": [1, 257, 1280]} of an image cut to that shape."""
        image = cut(pictures(image)[0], height, width)
        if self.cache is None:
            return self.compute(image, num_frames, height, width)
        path = self.cache_file(image, f"{num_frames} {height} {width} {image.size}")
        cond = remembered(path)
        if cond is None:
            cond = self.compute(image, num_frames, height, width)
            with atomic(path) as temporary:
                save_file(cond, temporary)
        return cond

    def compute(self, image: Image.Image, num_frames: int, height: int, width: int) -> dict[str, Tensor]:
        cond = image_conditioning([image], num_frames, self.vae, self.clip, height=height, width=width)
        return {name: x.cpu().contiguous() for name, x in cond.items()}

    @cached_property
    def vae(self) -> WanVAE:
        return load_vae(self.vae_path, device=self.device)

    @cached_property
    def clip(self) -> nn.Module:
        return load_image_encoder(self.clip_path, device=self.device)

    @cached_property
    def identity(self) -> str:
        """The networks, as far as what they say depends on them."""
        return f"{fingerprint(self.vae_path)} {fingerprint(self.clip_path)}"

    def cache_file(self, image: Image.Image, shape: str) -> Path:
        key = hashlib.sha256(f"{self.identity}\n{shape}\n".encode() + image.tobytes()).hexdigest()
        return self.cache / key[:2] / f"{key}.safetensors"


def remembered(path: Path) -> dict[str, Tensor] | None:
    """None if there is nothing, or the file is damaged: it can be computed again."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


if __name__ == "__main__":
    from full_scale.build_data import run

    run()
