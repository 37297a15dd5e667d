"""The exact metrics of Moving MNIST: which digit, where, how fast, how much ink, how varied.

Every metric is one function, and its docstring is its definition. `evaluate` returns each of them as a curve over the
frame index, far past the training length if the videos are. The digits that train the two classifiers here are
disjoint from those of the videos that they judge.

    python metrics.py --checkpoint checkpoints/student.safetensors --num_frames 96 --seed 0 1 2 --json student.json
    python metrics.py --checkpoint real --num_frames 96 --json real.json       # the ceiling: held-out real digits
    python metrics.py --train_classifier first                                 # the instrument itself, 3 minutes
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from moving_mnist import DIRECTIONS, MovingMNIST, WorldConfig, one_digit_prompts, parse_prompt, sprites

CHECKPOINTS = Path(__file__).parent / "checkpoints"
NUM_CLASSES = 10
NUM_FEATURES = 64
FAINT = 0.1  # pixels darker than this are not ink: a grey haze must not pull the centroid to the middle
EMPTY_MASS = 3.0  # a frame with less ink than three white pixels is empty; the thinnest real digit has several times that
WINDOW = 6  # frames of a motion window: five steps cross the default canvas once
TRAINING = {  # steps of each classifier, about 2.5 minutes on one core
    "first": {"num_steps": 1600, "batch_size": 64, "lr": 4e-3, "seed": 0},
    "second": {"num_steps": 5000, "batch_size": 128, "lr": 2e-3, "seed": 0},
}
MAX_OFFSET = 0.5  # pixels between a sprite's centre of mass and its box's centre that motion_error forgives


# The instrument: two classifiers that share neither digits nor architecture


def conv(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


class Classifier(nn.Module):
    """Convolutions and a global maximum: [N, C, H, W] in [-1, 1], any canvas -> logits [N, 10].

    `features` [N, 64] are the space of the Frechet distance, of identity and of diversity.
    """

    split = "classifier"

    def __init__(self):
        super().__init__()
        pool = nn.MaxPool2d(2)
        self.body = nn.Sequential(
            conv(1, 24), conv(24, 24), pool, conv(24, 48), conv(48, 48), pool, conv(48, 96), conv(96, 96),
            nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(96, NUM_FEATURES),
        )  # fmt: skip
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def features(self, frames: torch.Tensor) -> torch.Tensor:
        return self.body((frames.mean(1, keepdim=True) + 1) / 2)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.features(frames)))


class Residual(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class SecondClassifier(nn.Module):
    """No convolution: a residual MLP on a window around the ink's centre of mass. Used like `Classifier`.

    A model that learned to please one of the two does not please the other.
    """

    split = "second_classifier"
    window, dim, num_layers = 18, 224, 3

    def __init__(self):
        super().__init__()
        layers = [Residual(self.dim) for _ in range(self.num_layers)]
        self.body = nn.Sequential(nn.Linear(self.window**2, self.dim), *layers, nn.Linear(self.dim, NUM_FEATURES))
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def centred(self, ink: torch.Tensor) -> torch.Tensor:
        """Ink [N, H, W] -> the window around each centre of mass [N, window, window], bilinear."""
        side = torch.arange(self.window, device=ink.device) - (self.window - 1) / 2
        y, x = (centre_of_mass(ink)[:, None] + side[:, None]).unbind(-1)  # [n window] in pixels
        grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
        grid = (2 * grid + 1) / torch.tensor(ink.shape[:0:-1], device=ink.device) - 1  # (x, y) in [-1, 1]
        return F.grid_sample(ink[:, None], grid, align_corners=False)[:, 0]

    def features(self, frames: torch.Tensor) -> torch.Tensor:
        return self.body(self.centred((frames.mean(1) + 1) / 2).flatten(1))

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.features(frames)))


def load_classifier(path: str | Path | None = None, second: bool = False) -> nn.Module:
    """The first (or second) classifier, frozen; by default the one that ships with the repository."""
    name = "second" if second else "first"
    path = Path(path or CHECKPOINTS / ("second_classifier.safetensors" if second else "classifier.safetensors"))
    if not path.exists():
        raise ValueError(f"{path.name} does not exist; `python metrics.py --train_classifier {name}` makes it")
    model = SecondClassifier() if second else Classifier()
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)


def distorted(digits: torch.Tensor, digit_size: int) -> torch.Tensor:
    """Digits [n, 20, 20] in [0, 1] -> [n, s, s], each drawn by another hand: shape, stroke and ink vary."""
    n, size = len(digits), digits.shape[-1]

    def draw(low: float, high: float) -> torch.Tensor:
        return torch.rand(n).mul(high - low).add(low)

    angle, shear, shift = draw(-0.26, 0.26), draw(-0.25, 0.25), draw(-0.08, 0.08)
    zoom_y, zoom_x = draw(0.87, 1.15), draw(0.87, 1.15)
    rows = [zoom_x * angle.cos(), shear - angle.sin(), shift, angle.sin(), zoom_y * angle.cos(), draw(-0.08, 0.08)]
    grid = F.affine_grid(torch.stack(rows, dim=-1).view(n, 2, 3), (n, 1, size, size), align_corners=False)
    wobble = F.interpolate(torch.randn(n, 2, 5, 5) * 0.05, size=(size, size), mode="bicubic", align_corners=True)
    image = F.grid_sample(digits[:, None], grid + wobble.permute(0, 2, 3, 1), align_corners=False)

    thickness = draw(-0.5, 0.6).view(n, 1, 1, 1)
    thick, thin = F.max_pool2d(image, 3, 1, 1), -F.max_pool2d(-image, 3, 1, 1)
    image = image + thickness.clamp(min=0) * (thick - image) - thickness.clamp(max=0) * (thin - image)
    blurred = F.avg_pool2d(image, 3, 1, 1)
    image = torch.lerp(image, blurred, draw(-0.3, 0.5).clamp(min=0).view(n, 1, 1, 1)) * draw(0.7, 1.1).view(n, 1, 1, 1)
    image = F.interpolate(image, size=(digit_size, digit_size), mode="bilinear", antialias=True)
    return image[:, 0].clamp(0, 1)


def placed(digits: torch.Tensor, canvas: int) -> torch.Tensor:
    """Digits [n, s, s] in [0, 1] -> frames [n, 1, canvas, canvas] in [-1, 1], each at a random place."""
    n, size = digits.shape[:2]
    corner = torch.randint(canvas - size + 1, (n, 2, 1)) + torch.arange(size)  # [n 2 s]
    frames = torch.full((n, canvas, canvas), -1.0)
    frames[torch.arange(n)[:, None, None], corner[:, 0, :, None], corner[:, 1, None, :]] = digits * 2 - 1
    return frames[:, None]


def train_classifier(second=False, *, world=None, num_steps=2500, batch_size=96, lr=4e-3, seed=0) -> nn.Module:
    """Train the first or the second classifier on its own 200 digits per class, distorted and anywhere."""
    world = world or WorldConfig()
    kind = SecondClassifier if second else Classifier
    digits, labels = sprites(replace(world, split=kind.split, sprites_per_class=200, digit_size=20))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind().to(memory_format=torch.channels_last)  # a third faster on a CPU
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_steps, pct_start=0.1)
        for _ in tqdm(range(num_steps), desc=f"train {kind.__name__}"):
            index = torch.randint(len(digits), (batch_size,))
            frames = placed(distorted(digits[index], world.digit_size), world.canvas)
            loss = F.cross_entropy(model(frames), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def held_out_accuracy(model: nn.Module, split: str, world: WorldConfig) -> float:
    """Share of the split's undistorted digits, each at 8 random places, that the model names."""
    digits, labels = sprites(replace(world, split=split))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        frames = placed(digits.repeat(8, 1, 1), world.canvas)
    return (model(frames).argmax(-1) == labels.repeat(8)).float().mean().item()


# What the metrics read off videos and prompts, once


def centre_of_mass(ink: torch.Tensor) -> torch.Tensor:
    """Ink [..., H, W] -> (y, x) [..., 2] in pixels; the middle of the canvas where there is no ink."""
    mass = ink.sum((-2, -1)).clamp(min=1e-6)
    middle = (torch.tensor(ink.shape[-2:], device=ink.device) - 1) / 2
    y, x = (torch.arange(n, device=ink.device) - m for n, m in zip(ink.shape[-2:], middle, strict=True))
    return torch.stack([ink.sum(-1) @ y, ink.sum(-2) @ x], dim=-1) / mass[..., None] + middle


@dataclass(frozen=True)
class Measured:
    """Videos [B, F, C, H, W] reduced to numbers: mass [B, F] in white pixels, centroid [B, F, 2] (y, x) in pixels,
    features [B, F, 64], classes [B, F] as the classifier sees them, -1 for an empty frame; empty [B, F]."""

    mass: torch.Tensor
    centroid: torch.Tensor
    features: torch.Tensor
    classes: torch.Tensor

    @property
    def empty(self) -> torch.Tensor:
        return self.classes < 0


@torch.no_grad()
def measure(videos: torch.Tensor, classifier: nn.Module) -> Measured:
    frames = videos.flatten(0, 1)
    ink = (frames.mean(1) + 1) / 2
    ink = ink * (ink > FAINT)
    mass = ink.sum((-2, -1))
    features = torch.cat([classifier.features(chunk) for chunk in frames.split(512)])
    classes = classifier.head(F.relu(features)).argmax(-1).masked_fill(mass < EMPTY_MASS, -1)
    values = (mass, centre_of_mass(ink), features, classes)
    return Measured(*(value.unflatten(0, videos.shape[:2]) for value in values))


def one_digit(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels [B] and headings [B, 2] in {-1, 0, 1} (y, x) of prompts that name one digit; ValueError for others."""
    digits = [parse_prompt(prompt) for prompt in prompts]
    for prompt, named in zip(prompts, digits, strict=True):
        if len(named) != 1:
            raise ValueError(f'the metrics follow one digit, but "{prompt}" names {len(named)}: use one-digit prompts')
    headings = [DIRECTIONS[digit.direction] for (digit,) in digits]
    return torch.tensor([digit.label for (digit,) in digits]), torch.tensor(headings)


def uniform_prompts(count: int) -> list[str]:
    """`count` of the 80 one-digit prompts; any ten neighbours hold each digit about once, any 80 each prompt once."""
    prompts = one_digit_prompts()
    return [prompts[9 * i % len(prompts)] for i in range(count)]  # digits are eight apart; 9 and 80 are coprime


@dataclass(frozen=True)
class Reference:
    """What real clips of a world look like: the features' mean [64] and covariance [64, 64] in float64, and, per
    class, the mean ink mass [10] and the mean pairwise distance of features [10]."""

    mean: torch.Tensor
    covariance: torch.Tensor
    mass: torch.Tensor
    distance: torch.Tensor
    num_clips: int


def make_reference(world: WorldConfig, classifier: nn.Module, num_clips: int = 800, seed: int = 1_000_000) -> Reference:
    real = MovingMNIST(world, seed=seed, prompts=uniform_prompts(num_clips)).batch(range(num_clips))
    seen, labels = measure(real["video"], classifier), real["labels"][:, 0]
    groups = [labels == k for k in range(NUM_CLASSES)]
    return Reference(
        *moments(seen.features.flatten(0, 1)),
        mass=torch.stack([seen.mass[group].mean() for group in groups]),
        distance=torch.stack([pairwise_distance(seen.features[group]).mean() for group in groups]),
        num_clips=num_clips,
    )


# The metrics. A curve is [B, F], or [F] where it is a statistic of the whole set.


def digit_accuracy(seen: Measured, labels: torch.Tensor) -> torch.Tensor:
    """1 where the classifier names the prompted digit, else 0; an empty frame is wrong. [B, F]. Real: the
    classifier's own accuracy."""
    return (seen.classes == labels[:, None]).float()


def identity_consistency(seen: Measured, frames_per_block: int = 3) -> torch.Tensor:
    """Cosine similarity of a frame's features with the clip's own first block (the sum over its frames); 0 for an
    empty frame. [B, F]. Real: near 1. The first block contains itself: read the later ones."""
    features = seen.features.masked_fill(seen.empty[..., None], 0)
    return F.cosine_similarity(features, features[:, :frames_per_block].sum(1, keepdim=True), dim=-1)


def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [D] and covariance [D, D] of features [N, D], in float64."""
    features = features.double()
    return features.mean(0), features.T.cov()


def frechet_distance(seen: Measured, reference: Reference, frames_per_block: int = 3) -> torch.Tensor:
    """Squared Frechet (2-Wasserstein) distance between Gaussians fitted to the features of each block's frames and of
    all real frames: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), Heusel et al. 2017, eq. 6. [F], constant
    within a block. A block has B * frames_per_block samples; few samples bias it upwards, so real clips are not at 0:
    compare with real clips of the same count."""
    values, vectors = torch.linalg.eigh(reference.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    curve = []
    for block in seen.features.split(frames_per_block, dim=1):
        mean, covariance = moments(block.flatten(0, 1))
        cross = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
        gap = (mean - reference.mean).square().sum()
        distance = gap + covariance.trace() + reference.covariance.trace() - 2 * cross
        curve += [distance] * block.shape[1]
    return torch.stack(curve).float()


def motion_error(seen: Measured, headings: torch.Tensor, world: WorldConfig) -> torch.Tensor:
    """RMSE, in pixels, of the ink centroid over six frames against the best path of the world's physics. [B, F].

    A path is, on an axis of the prompted direction, a box that moves at the world's speed and bounces exactly in
    [0, reach], at the best of all phases (steps of 0.25 px), plus one constant of at most 0.5 px, because a digit's
    centre of mass is not quite its box's centre; on the other axis it stays at the best constant. The first window's
    first step goes fully in the prompted direction. The value at frame f belongs to the window that starts at f, the
    last window's to all its frames; a window with an empty frame scores `reach`. Real: 0 or a little more; a frozen
    digit or a wrong axis scores above 1.5 in every window, a reversed direction in the first.
    """
    num_frames = seen.centroid.shape[1]
    if num_frames < WINDOW:
        raise ValueError(f"motion_error needs at least {WINDOW} frames, not {num_frames}: make longer videos")
    track = torch.where(headings[:, None] < 0, world.canvas - 1 - seen.centroid, seen.centroid)  # all go forward
    windows = track.unfold(1, WINDOW, 1)  # [b w 2 WINDOW]
    phases = torch.arange(0, 2 * world.reach, 0.25)
    road = (phases[:, None] + world.speed * torch.arange(WINDOW)) % (2 * world.reach)
    paths = world.reach - (road - world.reach).abs() + (world.digit_size - 1) / 2  # [phases WINDOW]
    moving = best_fit(windows, paths)
    moving[:, :1] = best_fit(windows[:, :1], paths[phases <= world.reach - world.speed])
    still = windows.var(-1, correction=0)
    error = torch.where(headings[:, None] != 0, moving, still).sum(-1).sqrt()  # [b w]
    error = error.masked_fill(seen.empty.unfold(1, WINDOW, 1).any(-1), float(world.reach))
    return torch.cat([error, error[:, -1:].expand(-1, WINDOW - 1)], dim=1)


def best_fit(windows: torch.Tensor, paths: torch.Tensor) -> torch.Tensor:
    """Least mean square distance of each window [..., n] to a path of [P, n] plus a bounded constant: [...]."""
    residual = windows[..., None, :] - paths
    offset = residual.mean(-1, keepdim=True).clamp(-MAX_OFFSET, MAX_OFFSET)
    return (residual - offset).square().mean(-1).amin(-1)


def speed_kept(seen: Measured, headings: torch.Tensor, world: WorldConfig) -> torch.Tensor:
    """Distance that the centroid moves per frame on the prompted axes, divided by the world's speed. [B, F].

    Of the steps into and out of a frame the larger counts, because a bounce between two frames shortens one of them;
    a step from or to an empty frame is 0. Real: 1; a frozen digit: 0.
    """
    steps = seen.centroid.diff(dim=1).abs() / world.speed
    steps = steps.masked_fill((seen.empty[:, 1:] | seen.empty[:, :-1])[..., None], 0)
    steps = F.pad(steps, (0, 0, 1, 1))
    moving = headings[:, None] != 0
    return (torch.maximum(steps[:, 1:], steps[:, :-1]) * moving).sum(-1) / moving.sum(-1)


def ink(seen: Measured, labels: torch.Tensor, reference: Reference) -> torch.Tensor:
    """Mass of ink divided by the mean mass of real clips of that digit. [B, F]. Real: 1 in the mean; below, the
    video fades, above, it saturates."""
    return seen.mass / reference.mass[labels][:, None]


def block_jump(videos: torch.Tensor, frames_per_block: int = 3) -> torch.Tensor:
    """Change of the pixels into a block's first frame, divided by the mean change inside this and the previous block.

    Change is the mean absolute difference of successive frames (plus 0.001, so that a frozen clip gives 1). [B, F],
    constant within a block, 1 in the first. Real: about 1. Needs blocks of at least two frames.
    """
    if frames_per_block < 2:
        raise ValueError(f"block_jump needs frames_per_block of at least 2, not {frames_per_block}")
    change = F.pad(videos.diff(dim=1).abs().mean((2, 3, 4)), (1, 0)) + 1e-3  # [b f], the change into a frame
    curve = torch.ones_like(change)
    for start in range(frames_per_block, videos.shape[1], frames_per_block):
        end = start + frames_per_block
        inside = torch.cat([change[:, start - frames_per_block + 1 : start], change[:, start + 1 : end]], dim=1)
        curve[:, start:end] = change[:, start : start + 1] / inside.mean(1, keepdim=True)
    return curve


def class_entropy(seen: Measured) -> torch.Tensor:
    """Entropy of the classes seen in a frame over a set of uniform prompts, divided by log 10. [F]. Empty frames do
    not count. Real: 1; one class whatever the prompt: 0."""
    counts = torch.stack([(seen.classes == k).sum(0) for k in range(NUM_CLASSES)]).float()
    share = counts / counts.sum(0).clamp(min=1)
    return torch.special.entr(share).sum(0) / np.log(NUM_CLASSES)


def pairwise_distance(features: torch.Tensor) -> torch.Tensor:
    """Mean Euclidean distance between different samples of [n, F, D], per frame: [F]."""
    n = len(features)
    return torch.cdist(features.transpose(0, 1), features.transpose(0, 1)).sum((-2, -1)) / (n * (n - 1))


def diversity(seen: Measured, labels: torch.Tensor, reference: Reference) -> torch.Tensor:
    """Mean distance between the features of two samples of the same digit, divided by that of two real ones; the mean
    over all digits that occur at least twice. [F]. Real: about 1; every sample the same: near 0."""
    repeated = [k for k in labels.unique().tolist() if (labels == k).sum() > 1]
    if not repeated:
        raise ValueError("diversity needs at least two videos of the same digit")
    ratios = [pairwise_distance(seen.features[labels == k]) / reference.distance[k] for k in repeated]
    return torch.stack(ratios).mean(0)


def evaluate(
    videos: torch.Tensor,
    prompts: list[str],
    *,
    world: WorldConfig,
    classifier: nn.Module,
    frames_per_block: int = 3,
    reference: Reference | None = None,
) -> dict[str, list[float]]:
    """Every metric of videos [B, F, C, H, W] as a curve of F floats, the mean over the videos.

    Without a `reference`, real clips of `world` are made. Raises ValueError for prompts that do not name one digit,
    and for videos that do not fit the prompts, the world's canvas or a metric's needs.
    """
    labels, headings = one_digit(prompts)
    expected = (len(prompts), world.canvas, world.canvas)
    if (videos.shape[0], *videos.shape[-2:]) != expected:
        raise ValueError(f"expected {expected[0]} videos of {world.canvas} x {world.canvas}, not {tuple(videos.shape)}")
    reference = reference or make_reference(world, classifier)
    seen = measure(videos, classifier)
    curves = {
        "digit_accuracy": digit_accuracy(seen, labels),
        "identity_consistency": identity_consistency(seen, frames_per_block),
        "frechet_distance": frechet_distance(seen, reference, frames_per_block),
        "motion_error": motion_error(seen, headings, world),
        "speed_kept": speed_kept(seen, headings, world),
        "ink": ink(seen, labels, reference),
        "block_jump": block_jump(videos, frames_per_block),
        "class_entropy": class_entropy(seen),
        "diversity": diversity(seen, labels, reference),
    }
    return {name: (curve.mean(0) if curve.dim() == 2 else curve).tolist() for name, curve in curves.items()}


def summarise(curves: dict[str, list[float]], train_frames: int, frames_per_block: int = 3) -> dict[str, dict]:
    """Each curve's mean over the first block, the training length T, T to 3T, 7T to 8T, and each third of the clip;
    spans that the curve does not cover are left out."""
    num_frames, t = len(next(iter(curves.values()))), train_frames
    spans = {"first block": (0, frames_per_block), "0-T": (0, t), "T-3T": (t, 3 * t), "7T-8T": (7 * t, 8 * t)}
    spans |= {f"third {i + 1}": (i * num_frames // 3, (i + 1) * num_frames // 3) for i in range(3)}
    spans = {name: span for name, span in spans.items() if span[1] <= num_frames}
    return {
        metric: {name: float(np.mean(curve[slice(*span)])) for name, span in spans.items()}
        for metric, curve in curves.items()
    }


# The command line


def machine() -> dict:
    return {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def make_classifier(name: str) -> None:
    """Train and save a classifier, with a .json that says how it was made and what it scores."""
    second, world, settings = name == "second", WorldConfig(), TRAINING[name]
    start = time.monotonic()
    model = train_classifier(second, world=world, **settings)
    record = {
        "command": f"python metrics.py --train_classifier {name}",
        "config": {"world": asdict(world), **settings},
        "split": model.split,
        "digits_per_class": 200,
        "seconds": round(time.monotonic() - start),
        "machine": machine(),
        "accuracy": {split: held_out_accuracy(model, split, world) for split in ("validation", "train")},
    }
    path = CHECKPOINTS / f"{model.split}.safetensors"
    CHECKPOINTS.mkdir(exist_ok=True)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)
    path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["accuracy"]))


def videos_of(args: argparse.Namespace, prompts: list[str], world: WorldConfig, seed: int) -> torch.Tensor:
    if args.checkpoint == "real":
        real = replace(world, split="validation", num_frames=args.num_frames)
        return MovingMNIST(real, seed=seed, prompts=prompts).batch(range(len(prompts)))["video"]
    from generate import sample_videos  # only the command line imports upward

    return sample_videos(args.checkpoint, prompts, args.num_frames, seed=seed, denoising_steps=args.denoising_steps,
                         guidance_scale=args.guidance_scale)  # fmt: skip


def run(args: argparse.Namespace) -> dict:
    """Evaluate a checkpoint, or real clips, with several seeds: the record that --json writes."""
    world, prompts = WorldConfig(), uniform_prompts(args.num_videos)
    classifier = load_classifier(second=args.classifier == "second")
    reference = make_reference(world, classifier)
    options = {"world": world, "classifier": classifier, "reference": reference}
    options["frames_per_block"] = args.frames_per_block
    curves = {seed: evaluate(videos_of(args, prompts, world, seed), prompts, **options)
              for seed in tqdm(args.seed, desc="seeds")}  # fmt: skip
    real = MovingMNIST(world, seed=2_000_000, prompts=prompts).batch(range(len(prompts)))["video"]
    summaries = [summarise(c, world.num_frames, args.frames_per_block) for c in curves.values()]
    return {
        **vars(args),
        "frechet": {
            "samples_per_block": args.num_videos * args.frames_per_block,
            "real_clips": reference.num_clips,
            "real_against_real": float(np.mean(evaluate(real, prompts, **options)["frechet_distance"])),
        },
        "curves": curves,
        "summary": {
            metric: {span: mean_and_spread([s[metric][span] for s in summaries]) for span in spans}
            for metric, spans in summaries[0].items()
        },
    }


def mean_and_spread(values: list[float]) -> dict[str, float]:
    """Mean and sample standard deviation over seeds; the latter is 0 for one seed."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}


def show(record: dict) -> None:
    spans = list(next(iter(record["summary"].values())))
    print(f"{'':21}" + "".join(f"{span:>15}" for span in spans))
    for metric, row in record["summary"].items():
        print(f"{metric:21}" + "".join(f"{row[s]['mean']:8.3f} +-{row[s]['std']:5.3f}" for s in spans))
    frechet = record["frechet"]
    print(f"frechet_distance of real clips with as many samples ({frechet['samples_per_block']} per block): "
          f"{frechet['real_against_real']:.3f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure videos of moving digits, frame by frame.")
    parser.add_argument("--checkpoint", default="real", help='a checkpoint, or "real" for held-out real digits')
    parser.add_argument("--num_videos", type=int, default=160)
    parser.add_argument("--num_frames", type=int, default=96)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--denoising_steps", type=int, nargs="+")
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--frames_per_block", type=int, default=3)
    parser.add_argument("--classifier", choices=TRAINING, default="first", help="which of the two judges")
    parser.add_argument("--train_classifier", choices=TRAINING, help="train one of the two, and save it")
    args = parser.parse_args()
    try:
        if args.train_classifier:
            return make_classifier(args.train_classifier)
        record = run(args)
        if args.json:
            Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
        show(record)
    except (ValueError, OSError) as error:
        print(f"metrics.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
