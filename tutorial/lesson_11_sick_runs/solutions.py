"""Solutions of lesson 11: the core itself, where it has the function."""

import math

import numpy as np
import torch

from experiments.results import differ
from kv_cache import KVCache

__all__ = ["diagnose", "differ", "remembers_what_it_is_given", "smallest_update"]


def smallest_update(weight, dtype):
    """Half the gap to the next number: below it, rounding goes back; a tie goes to the number whose last bit is 0."""
    w = torch.tensor(weight, dtype=dtype)
    above = torch.nextafter(w, torch.tensor(math.inf, dtype=dtype))
    return (above.double() - w.double()).item() / 2


@torch.no_grad()
def remembers_what_it_is_given(model, cond, frame_shape):
    """Two calls that saw different noise, then the same block: only what was given may be in the cache."""
    torch.manual_seed(0)
    noise, other_noise, block, other_block = torch.randn(4, 1, 3, *frame_shape)

    def remembered(x_t, x):
        model(x_t, 0.9, cond, KVCache())
        return torch.cat([y.flatten() for pair in model.remember(x, 0.0, cond, KVCache()).layers for y in pair])

    first = remembered(noise, block)
    steady = torch.equal(first, remembered(other_noise, block))
    return steady and not torch.equal(first, remembered(noise, other_block))


def diagnose(log, real_ink):
    """Medians of the first and of the last third of every sign."""
    thirds = {name: known_thirds(values) for name, values in log.items()}
    (_, ink_end), (speed, speed_end) = thirds["sample_ink"], thirds["sample_speed"]
    if all(np.ptp(known(log[name])) < 1e-3 for name in ("sample_ink", "sample_speed")):
        return "nothing moves"
    if grown(thirds["generator_grad_norm"]) > 3:
        return "learning rate too high"
    if grown(thirds["critic_flow_error_t0.50"]) > 1.5:
        return "critic lags"
    if ink_end > 1.3 * real_ink:
        return "strokes swell"
    return "motion dies" if speed_end < 0.5 * speed else "healthy"


def known(values):
    return np.array([value for value in values if value is not None])


def known_thirds(values):
    """Medians of the first and the last third of what was logged."""
    found = known(values)
    size = max(1, len(found) // 3)
    return float(np.median(found[:size])), float(np.median(found[-size:]))


def grown(pair):
    return pair[1] / max(pair[0], 1e-12)
