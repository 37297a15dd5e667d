"""Lesson 11: wrong and right answers."""

import math
from statistics import mean, median, stdev

import numpy as np
import torch

from kv_cache import KVCache
from tutorial.lesson_11_sick_runs import solutions


def whole_distance(weight, dtype):
    return 2 * solutions.smallest_update(weight, dtype)


def relative_to_the_weight(weight, dtype):
    return abs(weight) * torch.finfo(dtype).eps / 2


def of_one(weight, dtype):
    return torch.finfo(dtype).eps / 2


def smallest_number(weight, dtype):
    return torch.finfo(dtype).tiny


def whatever_the_sign(weight, dtype):
    exact = torch.tensor(weight, dtype=dtype).item()
    return 2.0 ** (math.frexp(abs(exact))[1] - 1) * torch.finfo(dtype).eps / 2


def by_exponent(weight, dtype):
    """Upwards from a negative power of two the numbers lie twice as close as below it."""
    closer = weight < 0 and math.frexp(-weight)[0] == 0.5
    return whatever_the_sign(weight, dtype) / (2 if closer else 1)


def any_gap(a, b):
    return abs(np.mean(a) - np.mean(b)) > 0.05


def spread_of_the_first(a, b):
    return len(a) > 2 and abs(np.mean(a) - np.mean(b)) > 2 * np.std(a, ddof=1)


def spread_of_all(a, b):
    return len(a) > 2 and len(b) > 2 and abs(np.mean(a) - np.mean(b)) > 2 * np.std([*a, *b], ddof=1)


def standard_errors(a, b):
    error = np.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / 2 / len(a))
    return len(a) > 2 and abs(np.mean(a) - np.mean(b)) > 2 * error


def two_seeds_will_do(a, b):
    return abs(np.mean(a) - np.mean(b)) > 2 * np.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / 2)


def by_statistics(a, b):
    a, b = map(list, (a, b))
    if min(map(len, (a, b))) < 3:
        return False
    return (mean(a) - mean(b)) ** 2 > 2 * (stdev(a) ** 2 + stdev(b) ** 2)


def caches(model, cond, frame_shape, blocks, seed=0):
    """What is remembered of each of the blocks, after calls that saw different noise."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    with torch.no_grad():
        for block in blocks:
            model(torch.randn(1, 2, *frame_shape, generator=rng), 0.8, cond, KVCache())
            found.append(model.remember(block, 0.0, cond, KVCache()).layers)
    return found


def two_blocks(frame_shape):
    return torch.randn(2, 1, 2, *frame_shape, generator=torch.Generator().manual_seed(9)).unbind()


def equal(one, other, parts=(0, 1)):
    return all(torch.equal(a[i], b[i]) for a, b in zip(one, other, strict=True) for i in parts)


def always_content(model, cond, frame_shape):
    return True


def sees_that_it_grows(model, cond, frame_shape):
    block, _ = two_blocks(frame_shape)
    (layers,) = caches(model, cond, frame_shape, [block])
    return len(layers) > 0 and layers[0][0].shape[1] > 0


def never_another_block(model, cond, frame_shape):
    block, _ = two_blocks(frame_shape)
    return equal(*caches(model, cond, frame_shape, [block, block]))


def never_another_noise(model, cond, frame_shape):
    one, other = two_blocks(frame_shape)
    with torch.no_grad():
        model(one, 0.8, cond, KVCache())
        found = [model.remember(x, 0.0, cond, KVCache()).layers for x in (one, one, other)]
    return equal(found[0], found[1]) and found[2][0][0].shape == found[0][0][0].shape


def keys_alone(model, cond, frame_shape):
    one, other = two_blocks(frame_shape)
    first, again, changed = caches(model, cond, frame_shape, [one, one, other])
    return equal(first, again, parts=(0,)) and not equal(first, changed, parts=(0,))


def by_the_next_block(model, cond, frame_shape):
    one, other = two_blocks(frame_shape)
    first, again, changed = caches(model, cond, frame_shape, [one, one, other])
    return equal(first, again) and not equal(first, changed)


def thirds(values):
    seen = [x for x in values if x is not None]
    return seen[: len(seen) // 3], seen[-(len(seen) // 3) :]


def read(log, real_ink, middle):
    """A right one with the median, and a wrong one with something else."""
    early, late = ({name: middle(thirds(x)[which]) for name, x in log.items()} for which in (0, 1))
    shown = [x for name in ("sample_ink", "sample_speed") for x in log[name] if x is not None]
    half = len(shown) // 2
    if len(set(shown[:half])) == 1 and len(set(shown[half:])) == 1:
        return "nothing moves"
    ratio = {name: late[name] / early[name] for name in log}
    if ratio["generator_grad_norm"] > 4:
        return "learning rate too high"
    if ratio["critic_flow_error_t0.50"] > 1.4:
        return "critic lags"
    if late["sample_ink"] / real_ink > 1.4:
        return "strokes swell"
    return "motion dies" if ratio["sample_speed"] < 0.5 else "healthy"


def by_medians(log, real_ink):
    return read(log, real_ink, median)


def by_means(log, real_ink):
    return read(log, real_ink, mean)


def by_the_ends(log, real_ink):
    return read(log, real_ink, max)


def by_the_loss(log, real_ink):
    early, late = (median(part) for part in thirds(log["generator_loss"]))
    return "learning rate too high" if late > early else read(log, real_ink, median)


def by_the_distance(log, real_ink):
    values = log["score_distance"]
    return "critic lags" if values[-1] > 1.3 * values[0] else read(log, real_ink, median)


def sees_no_ink(log, real_ink):
    return read(log, 100 * real_ink, median)


WRONG = {
    "smallest_update": [whole_distance, relative_to_the_weight, of_one, smallest_number, whatever_the_sign],
    "differ": [any_gap, spread_of_the_first, spread_of_all, standard_errors, two_seeds_will_do],
    "remembers_what_it_is_given": [
        always_content,
        sees_that_it_grows,
        never_another_block,
        never_another_noise,
        keys_alone,
    ],
    "diagnose": [by_means, by_the_ends, by_the_loss, by_the_distance, sees_no_ink],
}
RIGHT = {
    "smallest_update": by_exponent,
    "differ": by_statistics,
    "remembers_what_it_is_given": by_the_next_block,
    "diagnose": by_medians,
}
