"""Solutions of lesson 6: the core itself, where it has the function."""

import numpy as np
import torch

from dynamic_video_sf import DataPast
from experiments.results import drift
from randomness import rand

__all__ = ["DataPast", "MixedPast", "drift", "error_growth", "gap"]


def error_growth(slope, noise, num_frames):
    """What frame k added has been multiplied f - k times: a geometric sum of squares."""
    left = torch.tensor(float(slope), dtype=torch.float64) ** (2 * torch.arange(num_frames))
    return noise**2 * left.cumsum(0)


def gap(own, true, better="high"):
    """Seeds are averaged first, then the distance from the best value is compared."""
    worse = {"high": lambda x: -x, "low": lambda x: x, "one": lambda x: np.abs(x - 1)}[better]
    own, true = (worse(np.atleast_2d(np.asarray(curve)).mean(0)) for curve in (own, true))
    return own - true


class MixedPast:
    """Scheduled sampling: the same coin for the whole batch, since a cache holds a block of every sample."""

    def __init__(self, generator, scheduler, data, data_share, rng=None):
        self.own, self.true = generator, DataPast(generator, scheduler, data, rng=rng)
        self.data_share, self.rng = data_share, rng

    def __call__(self, x_t, t, cond, cache=None):
        return self.own(x_t, t, cond, cache)

    def remember(self, x, t, cond, cache):
        from_data = rand((1,), self.rng).item() < self.data_share
        return (self.true if from_data else self.own).remember(x, t, cond, cache)
