"""Clips and their prompts on disk: latents of videos, or whole trajectories of a teacher's ODE.

    folder of .safetensors      "latents" or "trajectory" [n, ...]; in the header prompts and settings, as ode_pairs.py
    folder of .npz              the same names; "prompts" as text, "settings" as JSON
    folder of .pt               {prompt: tensor}, what the scripts of CausVid and Self-Forcing leave behind; only read
    LMDB, or a folder of them   Self-Forcing's: latents_{i}_data, prompts_{i}_data, img_{i}_data and latents_shape

All of them are read clip by clip, and no code in them is ever run.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from zipfile import BadZipFile

import lmdb
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from checkpoint import atomic
from full_scale.pixels import STRIDE
from full_scale.wan import read_pickle
from ode_pairs import read_header


@dataclass(frozen=True)
class Clip:
    """A prompt, its latents [F, C, H, W] or trajectory [K + 1, F, C, H, W], and its first picture, uint8 [h, w, 3]."""

    prompt: str
    latents: Tensor
    image: Tensor | None = None

    @property
    def video(self) -> Tensor:
        """The latents; of a trajectory, its end."""
        return self.latents if self.latents.ndim == 4 else self.latents[-1]


class Clips:
    """All clips at a path, in a fixed order, and the settings they were made with, as far as they are recorded.

    Raises ValueError where there are none, and where some were made with other settings than the rest.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        parts = self.parts = open_parts(self.path)
        self.settings = parts[0].settings
        if odd := next((part for part in parts if part.settings != self.settings), None):
            differ = differing(odd.settings, self.settings)
            raise ValueError(f"{parts[0].path} and {odd.path} {differ}: keep them in folders of their own.")
        self.ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> Clip:
        part, place = self.locate(i)
        return part[place]

    def prompt(self, i: int) -> str:
        """A clip's prompt, without its numbers."""
        part, place = self.locate(i)
        return part.prompt(place)

    def locate(self, i: int) -> tuple["Part", int]:
        part = bisect_right(self.ends, i)
        return self.parts[part], i - (self.ends[part - 1] if part else 0)


def differing(settings: Mapping, others: Mapping) -> str:
    """In words, the first setting in which two clips differ."""
    name = next(name for name in sorted({*settings, *others}) if settings.get(name) != others.get(name))
    return f"differ in {name}, {settings.get(name)} and {others.get(name)}"


# -------------------------------------------------------------------------------------------------------- reading


def open_parts(path: Path) -> list["Part"]:
    """The files or LMDBs at a path, in the order of their names."""
    if path.is_file() or is_lmdb(path):
        return [open_part(path)]
    inside = sorted(path.iterdir()) if path.is_dir() else []
    parts = [open_part(place) for place in inside if place.suffix in FILES or is_lmdb(place)]
    if not any(map(len, parts)):
        raise ValueError(f"There are no clips at {path}: `python -m full_scale.data --help` says how to make some.")
    return parts


def open_part(path: Path) -> "Part":
    if is_lmdb(path):
        return LmdbPart(path)
    if path.suffix not in FILES:
        raise ValueError(f"{path} holds no clips: give one of {', '.join(FILES)}, an LMDB, or a folder of them.")
    return FILES[path.suffix](path)


def is_lmdb(path: Path) -> bool:
    return (path / "data.mdb").is_file()


class Part:
    """A file of clips, or an LMDB of them: a row of clips that are read when they are asked for."""

    def __init__(self, path: Path, prompts: Sequence[str], settings: Mapping):
        self.path, self.prompts, self.settings = path, prompts, settings

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, i: int) -> Clip:
        raise NotImplementedError

    def prompt(self, i: int) -> str:
        return self.prompts[i]


class SafetensorsPart(Part):
    def __init__(self, path: Path):
        header = read_header(path)
        super().__init__(path, header["prompts"], header["settings"])

    def __getitem__(self, i: int) -> Clip:
        with safe_open(self.path, framework="pt") as file:
            return clip_of(self.prompts[i], {name: file.get_slice(name)[i] for name in file.keys()})  # noqa: SIM118


def clip_of(prompt: str, rows: Mapping[str, Tensor]) -> Clip:
    return Clip(prompt, rows["trajectory"] if "trajectory" in rows else rows["latents"], rows.get("image"))


class NpzPart(Part):
    def __init__(self, path: Path):
        with open_npz(path) as file:
            settings = json.loads(file["settings"].item()) if "settings" in file else {}
            super().__init__(path, file["prompts"].tolist(), settings)

    def __getitem__(self, i: int) -> Clip:
        with open_npz(self.path) as file:
            names = {"latents", "trajectory", "image"} & {*file}
            return clip_of(self.prompts[i], {name: torch.from_numpy(file[name][i]) for name in names})


@contextmanager
def open_npz(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except (ValueError, KeyError, OSError, BadZipFile) as error:
        raise ValueError(
            f"{path} cannot be read as clips ({error}): it needs prompts, and latents or trajectory, none pickled."
        ) from error


class PtPart(Part):
    """Tensors that were stored as {prompt: [1, ...]}."""

    def __init__(self, path: Path):
        content = read_pickle(path)
        if not all(isinstance(prompt, str) and isinstance(x, Tensor) for prompt, x in content.items()):
            raise ValueError(f"{path} does not hold a tensor for each prompt: move it out of the folder of clips.")
        super().__init__(path, list(content), {})

    def __getitem__(self, i: int) -> Clip:
        return Clip(self.prompts[i], read_pickle(self.path)[self.prompts[i]][0])


class LmdbPart(Part):
    """Self-Forcing's keys. Numbers are float16 there; float32 is told by the bytes of a clip."""

    def __init__(self, path: Path):
        with open_lmdb(path) as stored:
            shape, settings = stored.get(b"latents_shape"), stored.get(b"settings")
        super().__init__(path, (), json.loads(settings) if settings else {})
        if shape is None:
            raise ValueError(f"{path} has no latents_shape, its making was cut short: run that command again.")
        self.count, *self.shape = map(int, shape.split())
        if len(self.shape) not in (4, 5):  # written by scripts whose last file brought nothing new
            raise ValueError(
                f"{path} does not say of what shape a clip is, its latents_shape is '{shape.decode()}': "
                f"write it anew, such as '{self.count} 21 16 60 104'."
            )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Clip:
        prompt, latents, image = self.read(i, "prompts", "latents", "img")
        dtype = {2: np.float16, 4: np.float32}.get(len(latents) // prod(self.shape))
        if image is not None:  # its shape is recorded wrongly, if at all; the VAE tells
            image = self.tensor(image, np.uint8, [STRIDE * self.shape[-2], STRIDE * self.shape[-1], 3])
        return Clip(prompt.decode(), self.tensor(latents, dtype, self.shape), image)

    def prompt(self, i: int) -> str:
        return self.read(i, "prompts")[0].decode()

    def read(self, i: int, *names: str) -> list[bytes | None]:
        with open_lmdb(self.path) as stored:
            found = {name: stored.get(f"{name}_{i}_data".encode()) for name in names}
        if any(found[name] is None for name in {*names} - {"img"}):
            raise ValueError(f"{self.path} has no clip {i} of {self.count}: make it anew.")
        return list(found.values())

    def tensor(self, content: bytes, dtype, shape: Sequence[int]) -> Tensor:
        if dtype is None or len(content) != prod(shape) * np.dtype(dtype).itemsize:
            size = " x ".join(map(str, shape))
            raise ValueError(f"{self.path} holds {len(content)} bytes where {size} numbers should be: make it anew.")
        return torch.from_numpy(np.frombuffer(content, dtype).reshape(shape).copy())


@contextmanager
def open_lmdb(path: Path) -> Iterator[lmdb.Transaction]:
    """A read transaction. Opened for each use: an environment must not be shared with a forked process."""
    try:
        with lmdb.open(str(path), readonly=True, lock=False, readahead=False) as env, env.begin() as stored:
            yield stored
    except lmdb.Error as error:
        raise ValueError(f"{path} cannot be read as an LMDB ({error}): make it anew.") from error


FILES = {".safetensors": SafetensorsPart, ".npz": NpzPart, ".pt": PtPart}


# -------------------------------------------------------------------------------------------------------- writing


def is_written(path: Path, prompt: str, settings: Mapping) -> bool:
    """Whether this clip, made with these settings, lies in this file already. Raises ValueError if another one does."""
    if not path.exists():
        return False
    part = open_part(path)
    if part.settings != settings:
        raise ValueError(f"{path} and this command {differing(part.settings, settings)}: choose another output folder.")
    if part.prompts != [prompt]:
        raise ValueError(f"{path} was made for another prompt, {part.prompts[0]!r}: choose another output folder.")
    return True


def write_clip(path: Path, clip: Clip, settings: Mapping, dtype: torch.dtype = torch.float16) -> None:
    """One clip into a file of its own, .safetensors or .npz: whole, or not at all."""
    name = "trajectory" if clip.latents.ndim == 5 else "latents"
    rows = {name: clip.latents.to("cpu", dtype)[None].contiguous()}
    if clip.image is not None:
        rows["image"] = clip.image[None].contiguous()
    with atomic(path) as temporary:
        if path.suffix == ".npz":
            arrays = {name: x.numpy() for name, x in rows.items()}
            with temporary.open("wb") as file:
                np.savez(file, **arrays, prompts=np.array([clip.prompt]), settings=np.array(json.dumps(settings)))
        else:
            header = json.dumps({"settings": settings, "prompts": [clip.prompt]})
            save_file(rows, temporary, {"header": header})


def write_lmdb(path: Path, clips: Clips, rows: Sequence[int], dtype: torch.dtype = torch.float16) -> None:
    """These rows of the clips as an LMDB in Self-Forcing's keys, and a few more, which others pass over.

    Every clip is a transaction: what was cut short goes on where it stopped, and cannot be read before it is whole.
    Raises ValueError for clips of several shapes, and for an LMDB of other clips.
    """
    first = clips[rows[0]]
    num_bytes = first.latents.numel() * dtype.itemsize + (0 if first.image is None else first.image.numel())
    path.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=len(rows) * (2 * num_bytes + 2**17) + 2**24) as env:  # room; a file only grows
        about = {"clips": len(rows), "contents": digest(clips, rows, first), "dtype": str(dtype)}
        done = begin_lmdb(env, path, about | clips.settings)
        for i in tqdm(range(done, len(rows)), desc=path.name, unit="clip", disable=None):
            clip = clips[rows[i]]
            if clip.latents.shape != first.latents.shape:
                shapes = " and ".join(str(tuple(x.latents.shape)) for x in (first, clip))
                raise ValueError(f"{clips.path} holds clips of {shapes}: an LMDB holds one shape, keep them apart.")
            with env.begin(write=True) as stored:
                put_clip(stored, i, clip, dtype)
        end_lmdb(env, len(rows), first, clips.settings)


def digest(clips: Clips, rows: Sequence[int], first: Clip) -> str:
    """Tells clips from others that were made with the same settings, by their prompts and the first one's numbers."""
    seen = hashlib.sha256(first.latents.float().numpy().tobytes())
    for row in rows:
        seen.update(f"{clips.prompt(row)}\n".encode())
    return seen.hexdigest()[:16]


def begin_lmdb(env: lmdb.Environment, path: Path, plan: Mapping) -> int:
    """How many clips an earlier call with the same plan has written."""
    with env.begin(write=True) as stored:
        before = json.loads(stored.get(b"plan", b"null"))
        if before is None and stored.stat()["entries"]:
            raise ValueError(f"{path} is an LMDB that another program made: choose another path.")
        if before not in (None, plan):
            raise ValueError(f"{path} and this command {differing(before, plan)}: choose another path.")
        stored.put(b"plan", json.dumps(plan).encode())
        return int(stored.get(b"written", b"0"))


def put_clip(stored: lmdb.Transaction, i: int, clip: Clip, dtype: torch.dtype) -> None:
    stored.put(f"prompts_{i}_data".encode(), clip.prompt.encode())
    stored.put(f"latents_{i}_data".encode(), clip.latents.to(dtype).numpy().tobytes())
    if clip.image is not None:
        stored.put(f"img_{i}_data".encode(), clip.image.numpy().tobytes())
    stored.put(b"written", str(i + 1).encode())


def end_lmdb(env: lmdb.Environment, count: int, like: Clip, settings: Mapping) -> None:
    """Record the shapes: now it can be read."""
    shapes = {"latents": like.latents.shape, "prompts": ()}
    if like.image is not None:
        shapes["img"] = like.image.shape
    with env.begin(write=True) as stored:
        for name, shape in shapes.items():
            stored.put(f"{name}_shape".encode(), " ".join(map(str, (count, *shape))).encode())
        stored.put(b"settings", json.dumps(settings).encode())
