"""The instrument for several digits in one frame: where each of the ten digits is, if it is there at all.

A small network draws a map of the canvas for every digit, bright where its middle is (CenterNet, arXiv 1904.07850). It
is trained on the real digits of both classifiers, that no model of this course ever sees, one to three at a time,
overlapping by `max`: `python metrics.py --train_classifier tracker`. Of the one that ships, its .json says how often it
is right about real clips, voted on as in `metrics.evaluate_several`.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import fill, load_weights, save_weights
from digit_classifiers import CHECKPOINTS, NUM_CLASSES, brightness, distorted, optimise
from moving_mnist import WorldConfig, sprites

TRAINING = {"num_steps": 3500, "batch_size": 48, "lr": 4e-3, "seed": 0}  # half an hour of one core
SPREAD = 1.0  # pixels: the width of a digit's mark on its map


class DigitTracker(nn.Module):
    """Frames [N, C, H, W] in [-1, 1] -> maps [N, 10, H, W], logits; knows digits of one size, on any canvas.

    It looks at squares of 2 x 2 pixels as one place: four times less to compute, and a layer sees twice as far.
    """

    splits = ("classifier", "second_classifier")
    dim, dilations = 80, (1, 1, 2, 1, 2, 1)

    def __init__(self):
        super().__init__()
        sizes = [4, *[self.dim] * len(self.dilations)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=d, dilation=d, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b, d in zip(sizes, sizes[1:], self.dilations, strict=False)
        )
        self.head = nn.Conv2d(self.dim, 4 * NUM_CLASSES, 1)
        nn.init.constant_(self.head.bias, -4.0)  # most places are no digit's middle

    def forward(self, frames: Tensor) -> Tensor:
        height, width = frames.shape[-2:]
        even = F.pad(brightness(frames)[:, None], (0, width % 2, 0, height % 2))
        x = self.layers[0](F.pixel_unshuffle(even, 2))
        for layer in self.layers[1:]:
            x = x + layer(x)
        return F.pixel_shuffle(self.head(x), 2)[..., :height, :width]


@torch.no_grad()
def track(tracker: DigitTracker, videos: Tensor) -> tuple[Tensor, Tensor]:
    """How sure the tracker is of each digit, [B, F, 10] in [0, 1], and where its middle would be, [B, F, 10, 2] (y, x)
    in pixels: the highest place of its map, moved to the mean of the map around it."""
    maps = torch.cat([tracker(chunk).sigmoid() for chunk in videos.flatten(0, 1).split(512)])  # [n 10 h w]
    n, _, _, width = maps.shape
    sure, at = maps.flatten(2).max(-1)
    peak = torch.stack([at // width, at % width], dim=-1)  # [n 10 2]
    side = torch.arange(-2, 3)
    around = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1).flatten(0, 1)  # [25 2]
    y, x = (peak[:, :, None] + around + 2).unbind(-1)  # [n 10 25], on maps with a margin of two
    rows, digits = torch.arange(n)[:, None, None], torch.arange(NUM_CLASSES)[:, None]
    weight = F.pad(maps, (2, 2, 2, 2))[rows, digits, y, x]
    shift = (weight[..., None] * around).sum(2) / weight.sum(2)[..., None]
    return sure.unflatten(0, videos.shape[:2]), (peak + shift).unflatten(0, videos.shape[:2])


def load_tracker(path: str | Path | None = None, digit_size: int = WorldConfig.digit_size) -> DigitTracker:
    """The tracker, frozen; by default the one that ships. Raises ValueError where there is none, and where it knows
    digits of another size than digit_size, in pixels."""
    path = Path(path or CHECKPOINTS / "tracker.safetensors")
    if not path.exists():
        raise ValueError(f"no {path.name}: `python metrics.py --train_classifier tracker` makes it")
    weights, model = load_weights(path), DigitTracker()
    knows = weights.config.get("digit_size", WorldConfig.digit_size)
    if knows != digit_size:
        again = f"python metrics.py --train_classifier tracker --digit_size {digit_size}"
        raise ValueError(f"{path.name} knows digits of {knows} pixels, not of {digit_size}: `{again}` makes another")
    fill(model, weights.state_dict, path)
    return model.eval().requires_grad_(False)


def scene(digits: Tensor, labels: Tensor, canvas: int) -> tuple[Tensor, Tensor]:
    """Digits [B, n, s, s] in [0, 1] with labels [B, n], each at a random place of its frame: frames [B, 1, H, W] in
    [-1, 1], overlaps blended with max, and the maps [B, 10, H, W] in [0, 1] that a perfect tracker draws."""
    batch, count, size = digits.shape[:3]
    place = torch.randint(canvas - size + 1, (batch, count, 2))
    frames = torch.zeros(batch, canvas, canvas)
    rows = torch.arange(batch)[:, None, None]
    for i in range(count):
        y, x = (place[:, i, axis, None] + torch.arange(size) for axis in (0, 1))
        seen = frames[rows, y[:, :, None], x[:, None, :]]
        frames[rows, y[:, :, None], x[:, None, :]] = torch.maximum(seen, digits[:, i])
    middle = place + (size - 1) / 2
    off = torch.arange(canvas) - middle[..., None]  # [b n 2 canvas]
    across = (-off.square() / (2 * SPREAD**2)).exp()
    marks = across[:, :, 0, :, None] * across[:, :, 1, None, :]  # [b n h w]
    maps = torch.zeros(batch, NUM_CLASSES, canvas, canvas)
    for i in range(count):
        maps[torch.arange(batch), labels[:, i]] = torch.maximum(maps[torch.arange(batch), labels[:, i]], marks[:, i])
    return frames[:, None] * 2 - 1, maps


def focal_loss(logits: Tensor, maps: Tensor) -> Tensor:
    """CenterNet's (arXiv 1904.07850, eq. 1), per digit: near a middle, being too sure costs little."""
    sure = logits.sigmoid()
    peaks = maps > 0.75  # middles lie between pixels: the four around one
    at = (1 - sure).square() * F.logsigmoid(logits)
    off = (1 - maps) ** 4 * sure.square() * F.logsigmoid(-logits)
    return -(torch.where(peaks, at, off)).sum() / peaks.sum().clamp(min=1)


def train_tracker(world: WorldConfig, *, num_steps: int, batch_size: int, lr: float, seed: int) -> DigitTracker:
    """On one to three digits at a time, distorted and anywhere; the same seed gives the same weights."""
    large = replace(world, sprites_per_class=200, digit_size=20, apart=0)
    real = [sprites(replace(large, split=split)) for split in DigitTracker.splits]
    digits, labels = (torch.cat(parts) for parts in zip(*real, strict=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitTracker().to(memory_format=torch.channels_last)

        def loss(step):
            count = (2, 2, 1, 2, 3)[step % 5]
            index = torch.randint(len(digits), (batch_size, count))
            drawn = distorted(digits[index.flatten()], world.digit_size).unflatten(0, index.shape)
            frames, maps = scene(drawn, labels[index], world.canvas)
            return focal_loss(model(frames), maps)

        return optimise(model, loss, num_steps=num_steps, lr=lr)


def make_tracker(world: WorldConfig, measure: Callable[[DigitTracker], dict[str, float]]) -> None:
    """Train it on the digits and the canvas of a world, and save it, with a .json beside it that says how it was made
    and what it scores: whatever `measure` says of it."""
    from run_folder import machine

    start = time.monotonic()
    model = train_tracker(world, **TRAINING)
    own = {name: getattr(world, name) for name in ("num_digits", "canvas", "digit_size", "apart")}
    words = [f"--{name} {value}" for name, value in own.items()]
    record = {
        "command": " ".join(["python metrics.py --train_classifier tracker", *words]),
        "seed": TRAINING["seed"],
        "data": {**asdict(world), "split": " and ".join(model.splits), "sprites_per_class": 200},
        "config": TRAINING | own,
        "seconds": round(time.monotonic() - start),
        "machine": machine(),
        "metrics": measure(model),
    }
    path = CHECKPOINTS / "tracker.safetensors"
    save_weights(path, model.state_dict(), record, dtype=torch.float32)
    print(f"{path.name}: {record['metrics']}")
