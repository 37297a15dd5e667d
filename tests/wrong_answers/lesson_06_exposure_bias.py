"""Lesson 6: wrong and right answers."""

import numpy as np
import torch

from dynamic_video_sf import DataPast as Right
from experiments.results import SPANS, span_means
from randomness import rand, randn_like
from tutorial.lesson_06_exposure_bias.solutions import MixedPast as RightMix


def adds_standard_deviations(slope, noise, num_frames):
    return noise * (torch.tensor(float(slope)) ** torch.arange(num_frames)).cumsum(0)


def slope_not_squared(slope, noise, num_frames):
    return noise**2 * (torch.tensor(float(slope)) ** torch.arange(num_frames)).cumsum(0)


def begins_with_zero(slope, noise, num_frames):
    return noise**2 * (torch.tensor(float(slope)) ** (2 * torch.arange(num_frames))).cumsum(0) - noise**2


def divides_by_zero(slope, noise, num_frames):
    f = torch.arange(1, num_frames + 1)
    return noise**2 * (1 - torch.tensor(float(slope)) ** (2 * f)) / (1 - slope**2 + 1e-12)


def by_recursion(slope, noise, num_frames):
    variance = [noise**2]
    for _ in range(num_frames - 1):
        variance.append(slope**2 * variance[-1] + noise**2)
    return torch.tensor(variance)


def mean(curve):
    return np.atleast_2d(np.asarray(curve)).mean(0)


def always_high(own, true, better="high"):
    return mean(true) - mean(own)


def absolute_gap(own, true, better="high"):
    return np.abs(mean(true) - mean(own))


def ratio_as_high(own, true, better="high"):
    return mean(own) - mean(true) if better == "low" else mean(true) - mean(own)


def distance_before_the_mean(own, true, better="high"):
    if better == "one":
        own, true = (np.abs(np.atleast_2d(np.asarray(x)) - 1) for x in (own, true))
    return mean(own) - mean(true) if better != "high" else mean(true) - mean(own)


def keeps_the_seeds(own, true, better="high"):
    sign = -1 if better == "high" else 1
    own, true = (np.asarray(x) if better != "one" else np.abs(np.asarray(x) - 1) for x in (own, true))
    return sign * (own - true)


def spelled_out(own, true, better="high"):
    own, true = mean(own), mean(true)
    if better == "high":
        return true - own
    return own - true if better == "low" else abs(own - 1) - abs(true - 1)


def level_alone(records, metric, span):
    return span_means(records, metric, span)


def since_the_first_frame(records, metric, span):
    return span_means(records, metric, span) - np.array([record["curves"][metric][0] for record in records])


def since_the_training_length(records, metric, span):
    return span_means(records, metric, span) - span_means(records, metric, "0-T")


def what_was_lost(records, metric, span):
    return span_means(records, metric, "first block") - span_means(records, metric, span)


def as_a_share(records, metric, span):
    return span_means(records, metric, span) / span_means(records, metric, "first block") - 1


def over_all_seeds(records, metric, span):
    return (span_means(records, metric, span) - span_means(records, metric, "first block")).mean()


def whatever_is_there(records, metric, span):
    begin, end = SPANS[span]
    curves = [np.array(record["curves"][metric]) for record in records]
    return np.array([curve[min(begin, len(curve) - 1) : end].mean() - curve[:3].mean() for curve in curves])


def seed_by_seed(records, metric, span):
    changes = []
    for record in records:
        curve, (begin, end) = record["curves"][metric], SPANS[span]
        there = sum(curve[begin:end]) / (end - begin) if end <= len(curve) else float("nan")
        changes.append(there - sum(curve[:3]) / 3)
    return np.array(changes)


class RemembersItsOwn(Right):
    def remember(self, x, t, cond, cache):
        return self.generator.remember(x, t, cond, cache)


class AlwaysTheBeginning(Right):
    def remember(self, x, t, cond, cache):
        return self.generator.remember(self.data[:, : x.shape[1]], t, cond, cache)


class OneBlockLate(Right):
    def remember(self, x, t, cond, cache):
        start = max(0, cache.next_frame - x.shape[1])
        return self.generator.remember(self.data[:, start : start + x.shape[1]], t, cond, cache)


class AlwaysClean(Right):
    def remember(self, x, t, cond, cache):
        past = self.data[:, cache.next_frame : cache.next_frame + x.shape[1]]
        return self.generator.remember(past, t, cond, cache)


class OneLevelForAll(Right):
    """Draws its level once, for the whole video."""

    def __init__(self, generator, scheduler, data, noisy=False, rng=None):
        super().__init__(generator, scheduler, data, noisy, rng)
        self.level = scheduler.warp(rand((len(data), 1), rng)[:, 0]) if noisy else None

    def remember(self, x, t, cond, cache):
        past = self.data[:, cache.next_frame : cache.next_frame + x.shape[1]]
        if past.shape != x.shape:
            raise ValueError("The data end here.")
        t = self.level if self.noisy else t
        return self.generator.remember(self.scheduler.add_noise(past, randn_like(past, self.rng), t), t, cond, cache)


class TellsAnotherLevel(Right):
    """Noises to one level and tells the model another."""

    def remember(self, x, t, cond, cache):
        past = self.data[:, cache.next_frame : cache.next_frame + x.shape[1]]
        if past.shape != x.shape:
            raise ValueError("The data end here.")
        if self.noisy:
            t = rand((len(x), 1), self.rng)[:, 0]
        past = self.scheduler.add_noise(past, randn_like(past, self.rng), t)
        return self.generator.remember(past, 0.0, cond, cache)


class TakesWhatIsLeft(Right):
    def remember(self, x, t, cond, cache):
        past = self.data[:, cache.next_frame : cache.next_frame + x.shape[1]]
        if self.noisy:
            t = self.scheduler.warp(rand((len(x), 1), self.rng)[:, 0])
        return self.generator.remember(self.scheduler.add_noise(past, randn_like(past, self.rng), t), t, cond, cache)


class SpelledOut:
    def __init__(self, generator, scheduler, data, noisy=False, rng=None):
        self.blocks, self.generator, self.warp = data, generator, scheduler.warp
        self.noisy, self.rng = noisy, rng

    def __call__(self, x_t, t, cond, cache=None):
        return self.generator(x_t, t, cond, cache)

    def remember(self, x, t, cond, cache):
        first, last = cache.next_frame, cache.next_frame + x.shape[1]
        if last > self.blocks.shape[1]:
            raise ValueError(f"The data have no frame {last - 1}.")
        clean = self.blocks[:, first:last]
        level = t
        if self.noisy:
            level = self.warp(rand((len(x),), self.rng if isinstance(self.rng, torch.Generator) else None))
        scale = torch.as_tensor(level, dtype=torch.float32).reshape(-1, 1, 1, 1, 1)
        return self.generator.remember((1 - scale) * clean + scale * randn_like(clean, self.rng), level, cond, cache)


class OneCoinForAll(RightMix):
    """Decides once per video."""

    def __init__(self, generator, scheduler, data, data_share, rng=None):
        super().__init__(generator, scheduler, data, data_share, rng)
        self.data_share = float(rand((1,), rng).item() < data_share)


class OtherWayRound(RightMix):
    def __init__(self, generator, scheduler, data, data_share, rng=None):
        super().__init__(generator, scheduler, data, 1 - data_share, rng)


class GlobalCoin(RightMix):
    def remember(self, x, t, cond, cache):
        chosen = self.true if torch.rand(1).item() < self.data_share else self.own
        return chosen.remember(x, t, cond, cache)


class MixesPixels:
    """A blend of both pasts is a third one, in which every frame shows two digits."""

    def __init__(self, generator, scheduler, data, data_share, rng=None):
        self.generator, self.data, self.share = generator, data, data_share

    def __call__(self, x_t, t, cond, cache=None):
        return self.generator(x_t, t, cond, cache)

    def remember(self, x, t, cond, cache):
        past = self.data[:, cache.next_frame : cache.next_frame + x.shape[1]]
        return self.generator.remember(self.share * past + (1 - self.share) * x, t, cond, cache)


class OneRemember:
    """Chooses the frames and then remembers them in one place."""

    def __init__(self, generator, scheduler, data, data_share, rng=None):
        self.generator, self.scheduler, self.data = generator, scheduler, data
        self.data_share, self.rng = data_share, rng

    def __call__(self, x_t, t, cond, cache=None):
        return self.generator(x_t, t, cond, cache)

    def remember(self, x, t, cond, cache):
        if float(rand((1, 1), self.rng)) < self.data_share:
            x = self.data[:, cache.next_frame : cache.next_frame + x.shape[1]]
            x = self.scheduler.add_noise(x, randn_like(x, self.rng), t)
        return self.generator.remember(x, t, cond, cache)


WRONG = {
    "error_growth": [adds_standard_deviations, slope_not_squared, begins_with_zero, divides_by_zero],
    "gap": [always_high, absolute_gap, ratio_as_high, distance_before_the_mean, keeps_the_seeds],
    "drift": [
        level_alone,
        since_the_first_frame,
        since_the_training_length,
        what_was_lost,
        as_a_share,
        over_all_seeds,
        whatever_is_there,
    ],
    "DataPast": [
        RemembersItsOwn,
        AlwaysTheBeginning,
        OneBlockLate,
        AlwaysClean,
        OneLevelForAll,
        TellsAnotherLevel,
        TakesWhatIsLeft,
    ],
    "MixedPast": [OneCoinForAll, OtherWayRound, GlobalCoin, MixesPixels],
}
RIGHT = {
    "error_growth": by_recursion,
    "gap": spelled_out,
    "drift": seed_by_seed,
    "DataPast": SpelledOut,
    "MixedPast": OneRemember,
}
