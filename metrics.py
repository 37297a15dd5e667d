"""The exact metrics of Moving MNIST: which digit, where, how fast, how much ink, how varied.

Each metric is one function whose docstring is its definition; `evaluate` returns all of them as curves over
the frame index, as far as the videos go. The two classifiers that judge were trained on digits of their own; the
command line has one of them judge everything, and the accuracy that the other sees is the `second_opinion`.

    python metrics.py --checkpoint checkpoints/student.safetensors --seed 0 1 2 --json student.json
    python metrics.py --checkpoint real --json real.json     # the ceiling: held-out real digits
    python metrics.py --train_classifier first               # the instrument itself, 3 minutes
    python metrics.py --train_classifier tracker             # for two digits; --canvas and --digit_size say which

Where a world shows several digits at a time, a tracker (digit_tracker.py) says which are where, and `evaluate_several`
returns those metrics that need no more.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from digit_classifiers import (
    NUM_CLASSES,
    TRAINING,
    brightness,
    centre_of_mass,
    load_classifier,
    make_classifier,
)
from digit_tracker import load_tracker, make_tracker, track
from moving_mnist import DIRECTIONS, Digit, MovingMNIST, WorldConfig, format_prompt, parse_prompt

FAINT = 0.1  # darker pixels are not ink: a grey haze must not pull the centroid to the middle
EMPTY_MASS = 3.0  # a frame with less ink than three white pixels is empty; the thinnest real digit has 13
NUM_REFERENCE_CLIPS = 800  # real ones, from which the moments of their features come
VOTE = 7  # frames that say together which of several digits are seen
NUM_HELD_OUT_CLIPS = 160  # real ones, that the tracker is measured on
WORLDS = {1: {}, 2: {"canvas": 32, "apart": 8}}  # that models of this course are trained in, by the number of digits
WINDOW = 6  # frames of a motion window: its five steps cross the default canvas once
MAX_OFFSET = 1.0  # pixels per axis from a box's middle to its ink's: in real digits 0.3, rarely above 1


# What the metrics read off videos, prompts and the world


@dataclass(frozen=True)
class Measured:
    """Videos [B, F, C, H, W] as numbers: mass [B, F] of the ink in white pixels, its centroid [B, F, 2] in
    pixels (y, x), features [B, F, 64], classes [B, F]: the digit that the classifier sees, -1 if empty."""

    mass: Tensor
    centroid: Tensor
    features: Tensor
    classes: Tensor

    @property
    def empty(self):
        return self.classes < 0


@torch.no_grad()
def measure(videos, classifier):
    frames = videos.flatten(0, 1)
    marks = visible(frames)
    mass = marks.sum((-2, -1))
    features = torch.cat([classifier.features(chunk) for chunk in frames.split(512)])
    classes = classifier.head(F.relu(features)).argmax(-1).masked_fill(mass < EMPTY_MASS, -1)
    values = (mass, centre_of_mass(marks), features, classes)
    return Measured(*(value.unflatten(0, videos.shape[:2]) for value in values))


def visible(frames):
    """The brightness [N, H, W] of frames [N, C, H, W] where it is ink, 0 elsewhere."""
    light = brightness(frames)
    return light * (light > FAINT)


def total_mass(videos):
    """Mass [B, F] of the ink, in white pixels."""
    return visible(videos.flatten(0, 1)).sum((-2, -1)).unflatten(0, videos.shape[:2])


def one_digit(prompts):
    """Labels [B] and headings [B, 2], (y, x) in {-1, 0, 1}; ValueError for a prompt with several digits."""
    digits = [parse_prompt(prompt) for prompt in prompts]
    for prompt, named in zip(prompts, digits, strict=True):
        if len(named) != 1:
            raise ValueError(f'the metrics follow one digit, so name one in each prompt, unlike "{prompt}"')
    headings = [DIRECTIONS[digit.direction] for (digit,) in digits]
    return torch.tensor([digit.label for (digit,) in digits]), torch.tensor(headings)


def uniform_prompts(count, num_digits=1):
    """`count` prompts; about every ten hold each digit once, and every 80 each one-digit prompt once. Of several digits
    in a prompt, no two are alike."""
    directions = list(DIRECTIONS)

    def digit(i, k):
        label, heading = divmod(9 * i % 80, 8)  # 9 and 80 are coprime
        return Digit((label + k * (1 + i % 4)) % 10, directions[(heading + k * (3 * (i // 10) + i % 7)) % 8])

    return [format_prompt([digit(i, k) for k in range(num_digits)]) for i in range(count)]


@dataclass(frozen=True)
class Reference:
    """Real clips of a world: mean [64] and covariance [64, 64] of their features in float64 and, per class,
    the mean mass of ink [10] and the mean distance between the features of two samples [10]."""

    mean: Tensor
    covariance: Tensor
    mass: Tensor
    distance: Tensor


def make_reference(world, classifier, num_clips=NUM_REFERENCE_CLIPS, seed=1_000_000):
    real = MovingMNIST(world, seed=seed, prompts=uniform_prompts(num_clips)).batch(range(num_clips))
    seen = measure(real["video"][:, ::4], classifier)  # successive frames look alike
    groups = [real["labels"][:, 0] == k for k in range(NUM_CLASSES)]
    return Reference(
        *moments(seen.features.flatten(0, 1)),
        mass=torch.stack([seen.mass[group].mean() for group in groups]),
        distance=torch.stack([pairwise_distance(seen.features[group]).mean() for group in groups]),
    )


def moments(features):
    """Mean [D] and covariance [D, D] of features [N, D], in float64."""
    features = features.double()
    return features.mean(0), features.T.cov()


def pairwise_distance(features):
    """Mean Euclidean distance between two different samples of features [n, F, D], per frame: [F]."""
    n = len(features)
    return torch.cdist(features.transpose(0, 1), features.transpose(0, 1)).sum((-2, -1)) / (n * (n - 1))


# The metrics. A curve is [B, F], or [F] where it is a statistic of the whole set.


def digit_accuracy(seen, labels):
    """1 where the classifier sees the prompted digit, else 0; an empty frame is wrong. [B, F].

    Real: the classifier's own accuracy.
    """
    return (seen.classes == labels[:, None]).float()


def identity_consistency(seen, frames_per_block=3):
    """Cosine similarity of a frame's features to the sum of those of the clip's own first block. [B, F].

    An empty frame scores 0. Real: near 1. The first block is compared with itself: read the later ones.
    """
    features = seen.features.masked_fill(seen.empty[..., None], 0)
    return F.cosine_similarity(features, features[:, :frames_per_block].sum(1, keepdim=True), dim=-1)


def frechet_distance(seen, reference, frames_per_block=3):
    """Squared Frechet distance of Gaussians fitted to the features of a block's frames and of real frames.
    [F].

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), Heusel et al. 2017, from B * frames_per_block
    samples, the same value for all frames of a block. Few samples bias it upwards: compare with as many real
    clips, not with 0.
    """
    values, vectors = torch.linalg.eigh(reference.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    curve = []
    for block in seen.features.split(frames_per_block, dim=1):
        mean, covariance = moments(block.flatten(0, 1))
        overlap = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
        spread = covariance.trace() + reference.covariance.trace() - 2 * overlap
        curve += [(mean - reference.mean).square().sum() + spread] * block.shape[1]
    return torch.stack(curve).float()


def motion_error(seen, headings, world):
    """RMSE, in pixels, of the ink's centroid over six frames against the best path that physics allows. [B,
    F].

    On an axis of the prompted direction, a path is a box that moves at the world's speed and bounces exactly
    in [0, reach], at the best of all phases (0.25 px apart), plus the best constant of at most 1 px, because
    the middle of the ink is not quite the middle of the box; on another axis, it is the best constant. The
    first window starts with a full step in the prompted direction, and scores at least what its first two
    frames alone would (half the distance from their step to the prompted one), as a quick bounce can hide a
    wrong start. The value at frame f is that of the window that starts there; the last window's goes to all
    its frames. A window with an empty frame scores `reach`. Real: 0. A frozen digit or a wrong axis scores
    above 1.5 in every window, the opposite direction in the first.
    """
    if (num_frames := seen.centroid.shape[1]) < WINDOW:
        raise ValueError(f"motion_error needs at least {WINDOW} frames, not {num_frames}: make longer videos")
    room = world.reach + world.digit_size
    forward = torch.where(headings[:, None] < 0, room - 1 - seen.centroid, seen.centroid)
    windows = forward.unfold(1, WINDOW, 1)  # [b w 2 WINDOW]
    phases = torch.arange(0, 2 * world.reach, 0.25)
    road = (phases[:, None] + world.speed * torch.arange(WINDOW)) % (2 * world.reach)
    paths = world.reach - (road - world.reach).abs() + (world.digit_size - 1) / 2  # [phases WINDOW]
    moving = best_fit(windows, paths)
    moving[:, :1] = best_fit(windows[:, :1], paths[phases <= world.reach - world.speed])
    axes = headings[:, None].abs()
    error = torch.where(axes == 1, moving, windows.var(-1, correction=0)).sum(-1).sqrt()  # [b w]
    first_step = (windows[:, 0, :, 1] - windows[:, 0, :, 0] - world.speed * axes[:, 0]) / 2
    error[:, 0] = torch.maximum(error[:, 0], first_step.norm(dim=-1))
    error = error.masked_fill(seen.empty.unfold(1, WINDOW, 1).any(-1), float(world.reach))
    return torch.cat([error, error[:, -1:].expand(-1, WINDOW - 1)], dim=1)


def best_fit(windows, paths):
    """Least mean squared distance of windows [..., n] to one of the paths [P, n] plus a bounded constant:
    [...]."""
    residual = windows[..., None, :] - paths
    offset = residual.mean(-1, keepdim=True).clamp(-MAX_OFFSET, MAX_OFFSET)
    return (residual - offset).square().mean(-1).amin(-1)


def speed_kept(seen, headings, world):
    """Distance that the centroid moves per frame and prompted axis, divided by the world's speed. [B, F].

    Of the steps into and out of a frame the larger counts, as a bounce between two frames shortens one of
    them; the last frame repeats the one before. A step from or to an empty frame is 0. Real: 1. Frozen: 0.
    """
    steps = seen.centroid.diff(dim=1).abs() / world.speed
    steps = steps.masked_fill((seen.empty[:, 1:] | seen.empty[:, :-1])[..., None], 0)
    larger = torch.maximum(steps[:, 1:], steps[:, :-1])
    larger = torch.cat([steps[:, :1], larger, larger[:, -1:]], dim=1)  # [b f 2]
    axes = headings[:, None].abs()
    return (larger * axes).sum(-1) / axes.sum(-1)


def ink(seen, labels, reference):
    """Mass of the ink divided by the mean mass of real clips of that digit. [B, F].

    Real: 1 on average. Below it the video fades, above it saturates.
    """
    return seen.mass / reference.mass[labels][:, None]


def block_jump(videos, frames_per_block=3):
    """Change into a block's first frame divided by the mean change inside this and the previous block. [B,
    F].

    Change is the mean absolute difference of successive frames, plus 0.001, so that a frozen clip scores 1.
    One value for all frames of a block, 1 in the first. Real: about 1.
    """
    if frames_per_block < 2:
        raise ValueError(f"block_jump needs frames_per_block of at least 2, not {frames_per_block}")
    change = F.pad(videos.diff(dim=1).abs().mean((2, 3, 4)), (1, 0)) + 1e-3  # [b f], the change into a frame
    curve = torch.ones_like(change)
    for start in range(frames_per_block, videos.shape[1], frames_per_block):
        before, end = start - frames_per_block, start + frames_per_block
        inside = torch.cat([change[:, before + 1 : start], change[:, start + 1 : end]], dim=1)
        curve[:, start:end] = change[:, start : start + 1] / inside.mean(1, keepdim=True)
    return curve


def class_entropy(seen):
    """Entropy of the classes seen in a frame of a set with uniform prompts, divided by log 10. [F].

    Empty frames do not count. Real: 1. One class whatever the prompt: 0.
    """
    counts = torch.stack([(seen.classes == k).sum(0) for k in range(NUM_CLASSES)]).float()
    return torch.special.entr(counts / counts.sum(0).clamp(min=1)).sum(0) / np.log(NUM_CLASSES)


def diversity(seen, labels, reference):
    """Mean distance between the features of two samples of a digit, divided by that of two real ones. [F].

    The mean over all digits that occur at least twice; NaN if none does. Real: about 1. Every sample the same: 0.
    """
    repeated = [k for k in labels.unique().tolist() if (labels == k).sum() > 1]
    if not repeated:
        return torch.full(seen.classes.shape[1:], torch.nan)
    ratios = [pairwise_distance(seen.features[labels == k]) / reference.distance[k] for k in repeated]
    return torch.stack(ratios).mean(0)


def evaluate(videos, prompts, *, world, classifier, frames_per_block=3, reference=None):
    """Every metric of videos [B, F, C, H, W], averaged over them: a mapping from its name to a list of F
    floats. Diversity is left out where no digit occurs twice.

    Without a `reference`, `make_reference` is called on `world`. Raises ValueError for prompts that do not
    name one digit, and for videos that do not fit the prompts, the world's canvas or a metric's needs.
    """
    labels, headings = one_digit(prompts)
    if videos.dim() != 5 or len(videos) != len(prompts) or videos.shape[-2:] != 2 * (world.canvas,):
        expected = f"[{len(prompts)}, F, C, {world.canvas}, {world.canvas}]"
        raise ValueError(f"videos must be {expected} for these prompts and this world, not {list(videos.shape)}")
    if world.digit_size != WorldConfig.digit_size:
        raise ValueError(f"the classifiers know digits of {WorldConfig.digit_size} pixels, not of {world.digit_size}")
    reference = reference or make_reference(world, classifier)
    videos = videos.clamp(-1, 1)  # as they are shown: nobody sees brighter than white
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
    means = {name: curve.mean(0) if curve.dim() == 2 else curve for name, curve in curves.items()}
    return {name: curve.tolist() for name, curve in means.items() if not curve.isnan().all()}


def evaluate_several(videos, prompts, *, world, tracker, frames_per_block=3):
    """The metrics of videos [B, F, C, H, W] in which each prompt names several digits, no two alike: digit_accuracy,
    motion_error and speed_kept, each the mean over a video's digits as the tracker sees them, ink, and block_jump.

    A digit counts as seen where it is among the surest, as many as the prompt names, and sure by a third, on average
    over VOTE frames around this one, because digits that overlap can often not be told apart in a single one. Some
    never can: compare with real clips. Ink is the mass of a frame divided by the mean one of real clips.
    """
    digits = [parse_prompt(prompt) for prompt in prompts]
    if any(len({digit.label for digit in row}) != world.num_digits or len(row) != world.num_digits for row in digits):
        raise ValueError(f"name {world.num_digits} different digits in each prompt: a tracker cannot tell twins apart")
    labels = torch.tensor([[digit.label for digit in row] for row in digits])  # [b n]
    headings = torch.tensor([[DIRECTIONS[digit.direction] for digit in row] for row in digits]).flatten(0, 1)
    videos = videos.clamp(-1, 1)
    sure, place = track(tracker, videos)  # [b f 10], [b f 10 2]
    sure = F.avg_pool1d(sure.mT, VOTE, stride=1, padding=VOTE // 2, count_include_pad=False).mT
    one_each = labels[:, None].expand(-1, videos.shape[1], -1)  # [b f n]
    least = sure.topk(world.num_digits, dim=-1).values[..., -1:].clamp(min=1 / 3)
    found = sure.gather(-1, one_each) >= least
    where = place.gather(2, one_each[..., None].expand(*one_each.shape, 2))  # [b f n 2]
    mass = total_mass(videos)
    real = MovingMNIST(world, seed=1_000_000, prompts=prompts).batch(range(NUM_REFERENCE_CLIPS))["video"]
    seen = Measured(
        mass=mass.repeat_interleave(world.num_digits, dim=0),
        centroid=(where - world.corners).movedim(2, 1).flatten(0, 1),  # each in its room
        features=None,
        classes=torch.where(found, one_each, -1).movedim(2, 1).flatten(0, 1),
    )
    curves = {
        "digit_accuracy": digit_accuracy(seen, labels.flatten()),
        "motion_error": motion_error(seen, headings, world),
        "speed_kept": speed_kept(seen, headings, world),
        "ink": mass / total_mass(real).mean(),
        "block_jump": block_jump(videos, frames_per_block),
    }
    return {name: curve.mean(0).tolist() for name, curve in curves.items()}


@lru_cache
def examiner(world, frames_per_block=3, judge="first"):
    """All that can be measured in a world, as a function (videos, prompts) -> curves: where it shows one digit, by one
    of the classifiers, with the accuracy that the other sees as the `second_opinion`; else by the tracker."""
    if world.num_digits > 1:
        tracker = load_tracker(digit_size=world.digit_size)
        return lambda videos, prompts: evaluate_several(
            videos, prompts, world=world, tracker=tracker, frames_per_block=frames_per_block
        )
    classifier, other = (load_classifier(second=judge == name) for name in ("second", "first"))
    options = {"world": world, "classifier": classifier, "frames_per_block": frames_per_block}
    options["reference"] = make_reference(world, classifier)

    def examine(videos, prompts):
        seen_by_other = digit_accuracy(measure(videos, other), one_digit(prompts)[0])
        return {**evaluate(videos, prompts, **options), "second_opinion": seen_by_other.mean(0).tolist()}

    return examine


def summarise(curves, train_frames, frames_per_block=3):
    """The means of each curve over the first block, the training length T, T to 3T, 7T to 8T, and each third
    of the clip; spans that the curves do not cover are left out."""
    num_frames, t = len(next(iter(curves.values()))), train_frames
    spans = {"first block": (0, frames_per_block), "0-T": (0, t), "T-3T": (t, 3 * t), "7T-8T": (7 * t, 8 * t)}
    spans |= {f"third {i + 1}": (i * num_frames // 3, (i + 1) * num_frames // 3) for i in range(3)}
    spans = {name: slice(*span) for name, span in spans.items() if span[1] <= num_frames}
    return {
        metric: {name: float(np.mean(curve[span])) for name, span in spans.items()} for metric, curve in curves.items()
    }


# The command line


def real_videos(prompts, world, seed):
    return MovingMNIST(world, seed=seed, prompts=prompts).batch(range(len(prompts)))["video"]


def held_out_tracking(tracker, world):
    """What `evaluate_several` says of real clips, whose digits a tracker never saw and a model's own: means over the
    frames of digit_accuracy and motion_error, as {split}_{metric}."""
    prompts, found = uniform_prompts(NUM_HELD_OUT_CLIPS, world.num_digits), {}
    for split in ("validation", "train"):
        videos = real_videos(prompts, replace(world, split=split), seed=0)
        curves = evaluate_several(videos, prompts, world=world, tracker=tracker)
        found |= {f"{split}_{name}": float(np.mean(curves[name])) for name in ("digit_accuracy", "motion_error")}
    return found


def asked_world(args):
    """What the command line says of the world of real clips, as far as given."""
    asked = {name: getattr(args, name) for name in ("num_digits", "canvas", "digit_size", "apart")}
    return {name: value for name, value in asked.items() if value is not None}


def real_world(args, num_digits):
    """The world that is asked for; what is not said is as in the worlds that models of this course are trained in."""
    asked = {"num_digits": num_digits} | asked_world(args)
    return WorldConfig(**(WORLDS[asked["num_digits"]] | asked))


def train_instrument(args):
    """--train_classifier: one of the two classifiers, or the tracker of a world, by default one of two digits."""
    if args.train_classifier == "tracker":
        world = real_world(args, num_digits=2)
        return make_tracker(world, partial(held_out_tracking, world=world))
    if asked := asked_world(args):
        raise ValueError(f"--{next(iter(asked))} is for the tracker: the classifiers are trained in one world")
    make_classifier(args.train_classifier)


def source(args):
    """What --checkpoint was trained with, world and frames per block, and a function (prompts, seed) -> videos."""
    if args.checkpoint == "real":
        world = real_world(args, num_digits=1)
        held_out = replace(world, split="validation", num_frames=args.num_frames)
        return world, 3, lambda prompts, seed: real_videos(prompts, held_out, seed)
    if asked := asked_world(args):
        raise ValueError(f"--{next(iter(asked))} is for --checkpoint real: a model shows the world it was trained in")
    from generate import load_model, sample_videos  # the module itself stays a leaf; only its command line looks up

    loaded = load_model(args.checkpoint)
    frames_per_block = loaded.sampling.rollout.frames_per_block
    if loaded.sampling.whole_clip:  # nothing is made in blocks: judge it by those of its students
        frames_per_block = 3
    options = {name: getattr(args, name) for name in ("denoising_steps", "guidance_scale", "fresh_noise")}

    def make_videos(prompts, seed):
        return sample_videos(loaded, prompts, args.num_frames, seed=seed, **options)

    return loaded.world, frames_per_block, make_videos


def run(args):
    """Evaluate a checkpoint, or real clips, with every seed: the record that --json writes."""
    world, frames_per_block, make_videos = source(args)
    args.frames_per_block = args.frames_per_block or frames_per_block
    if not isinstance(args.frames_per_block, int):
        raise ValueError(f"blocks of {args.frames_per_block} frames: say with --frames_per_block which to measure by")
    for name, least in (("num_videos", 1), ("num_frames", WINDOW), ("frames_per_block", 2)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    for name in ("num_digits", "canvas", "digit_size", "apart"):
        setattr(args, name, getattr(world, name))
    prompts = uniform_prompts(args.num_videos, world.num_digits)
    if args.prompts:
        prompts = [args.prompts[i % len(args.prompts)] for i in range(args.num_videos)]
    examine = examiner(world, args.frames_per_block, args.classifier)
    curves = {seed: examine(make_videos(prompts, seed), prompts) for seed in tqdm(args.seed, desc="seeds")}
    summaries = [summarise(c, world.num_frames, args.frames_per_block) for c in curves.values()]
    frechet = {}
    if world.num_digits == 1:
        floor = examine(real_videos(prompts, world, seed=2_000_000), prompts)["frechet_distance"]
        frechet = {
            "samples_per_block": args.num_videos * args.frames_per_block,
            "reference_clips": NUM_REFERENCE_CLIPS,
            "real_against_real": float(np.mean(floor)),
        }
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "train_classifier")}
    return {**settings, "frechet": frechet, "summary": over_seeds(summaries), "curves": curves}


def over_seeds(summaries):
    """Summaries of several seeds -> one, each number replaced by its mean and sample standard deviation, if any."""
    if isinstance(summaries[0], dict):
        return {name: over_seeds([summary[name] for summary in summaries]) for name in summaries[0]}
    std = float(np.std(summaries, ddof=1)) if len(summaries) > 1 else None
    return {"mean": float(np.mean(summaries)), "std": std}


def spread(std):
    return " " * 8 if std is None else f"+-{std:6.3f}"


def show(record):
    rows, frechet = record["summary"], record["frechet"]
    print(" " * 21 + "".join(f"{span:>16}" for span in rows["ink"]))
    for metric, row in rows.items():
        print(f"{metric:21}" + "".join(f"{v['mean']:8.3f} {spread(v['std'])}" for v in row.values()))
    print(f"mean +- standard deviation over seeds {record['seed']}, {record['num_videos']} videos each")
    if frechet:
        print(f"frechet_distance of as many real clips: {frechet['real_against_real']:.3f}")


def main():
    parser = argparse.ArgumentParser(description="Measure videos of moving digits, frame by frame.")
    parser.add_argument("--checkpoint", default="real", help='a checkpoint, or "real": held-out real digits')
    parser.add_argument("--num_videos", type=int, default=160)
    parser.add_argument("--prompts", nargs="+", metavar="PROMPT", help="in turn, one digit each; by default all 80")
    parser.add_argument("--num_frames", type=int, default=96)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--json", help="write the curves and their summary here")
    parser.add_argument("--denoising_steps", type=float, nargs="+")
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--fresh_noise", type=float, help="see generate.py")
    parser.add_argument("--frames_per_block", type=int, help="by default the checkpoint's")
    parser.add_argument(
        "--classifier", choices=TRAINING, default="first", help="who judges; the other has a second_opinion"
    )
    parser.add_argument("--num_digits", type=int, choices=WORLDS, help="of real clips, by default 1")
    parser.add_argument("--canvas", type=int, help="of real clips, in pixels, by default 24, and 32 for two digits")
    parser.add_argument("--digit_size", type=int, help="of real clips, in pixels, by default 14")
    parser.add_argument("--apart", type=int, help="of the rooms of two digits, in pixels, by default 8")
    parser.add_argument(
        "--train_classifier", choices=(*TRAINING, "tracker"), help="train and save one of these instead"
    )
    args = parser.parse_args()
    try:
        if args.train_classifier:
            return train_instrument(args)
        record = run(args)
        if args.json:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
        show(record)
    except (ValueError, OSError) as error:
        print(f"metrics.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
