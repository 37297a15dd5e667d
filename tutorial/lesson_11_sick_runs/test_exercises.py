"""Graders of lesson 11. `make grade LESSON=11`; each message says which idea is missing."""

import numpy as np
import torch
from torch import nn

from experiments.sick import StaleCache
from tiny_causal_wan import TinyCausalWanModel, WanConfig

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def moves(weight, update, dtype):
    """Whether the update survives being rounded."""
    exact = torch.tensor(weight, dtype=dtype).double()
    return (exact + update).to(dtype) != exact.to(dtype)


def test_a_weight_of_one(smallest_update):
    for dtype, digits in ((torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24)):
        got = smallest_update(1.0, dtype)
        assert 0.99 * 2.0**-digits <= got <= 1.01 * 2.0**-digits, (
            f"From 1 the next number in {dtype} is 2^-{digits - 1} away, and an update below half that gap always "
            f"vanishes. So the border is 2^-{digits} = {2.0**-digits:.3g}; yours is {got:.3g}."
        )


def test_it_is_the_border(smallest_update):
    for dtype in DTYPES:
        for weight in (0.75, 1.9, 3.0, 0.0123, 700.0):
            got = smallest_update(weight, dtype)
            assert moves(weight, 1.02 * got, dtype), (
                f"A weight of {weight} in {dtype} does not move by 1.02 times your {got:.3g}: the border is higher."
            )
            assert not moves(weight, 0.98 * got, dtype), (
                f"A weight of {weight} in {dtype} moves already by 0.98 times your {got:.3g}: the border is lower. The "
                "gap between neighbours is the same from one power of two to the next."
            )


def test_a_negative_weight(smallest_update):
    for weight in (-3.0, -4.0):
        got = smallest_update(weight, torch.bfloat16)
        enough, less = (moves(weight, factor * got, torch.bfloat16) for factor in (1.02, 0.98))
        assert got > 0 and enough and not less, (
            f"From {weight} a positive update goes up, towards 0: what counts is the next number above, and above -4 "
            f"it is half as far away as above 4. Yours is {got:.3g}."
        )


def seeds(mean, spread=0.01, count=5, seed=0):
    values = np.random.default_rng(seed).normal(size=count)
    return mean + spread * (values - values.mean()) / values.std(ddof=1)


def test_far_apart(differ):
    assert differ(seeds(0.5), seeds(0.6)) and differ(seeds(0.6), seeds(0.5)), (
        "0.5 and 0.6 with a standard deviation of 0.01 over five seeds: they differ, whichever comes first."
    )


def test_within_the_noise(differ):
    assert not differ(seeds(0.5, 0.05), seeds(0.55, 0.05, seed=1)), (
        "0.50 and 0.55, both with a standard deviation of 0.05, are one standard deviation apart: that may be chance."
    )


def test_two_pooled_standard_deviations(differ):
    for spread in (0.01, 0.2):
        a, near, far = seeds(0.5, spread), seeds(0.5 + 1.9 * spread, spread), seeds(0.5 + 2.1 * spread, spread)
        assert not differ(a, near), (
            f"1.9 standard deviations of {spread} apart: by the rule of RESULTS.md, two, this is no difference. The "
            "standard deviation is the sample's (ddof=1)."
        )
        assert differ(a, far), f"2.1 standard deviations of {spread} apart: by the rule, they differ."


def test_both_spreads_count(differ):
    assert not differ(seeds(0.5, 0.001), seeds(0.6, 0.1)), (
        "One setting is steady, the other scatters by 0.1: a gap of 0.1 may be the scatter of the second. Pool the "
        "variances of both: sqrt((var(a) + var(b)) / 2)."
    )


def test_two_seeds_are_none(differ):
    assert not differ(np.array([0.5, 0.51]), np.array([0.9, 0.91])), (
        "With two seeds one does not know the spread: say that they differ from three seeds each on."
    )
    assert differ(seeds(0.5, count=3), seeds(0.6, count=3)), "Three seeds each are enough, by the rule of RESULTS.md."


class NeverRefreshed(TinyCausalWanModel):
    """Keeps the keys of the first block that it ever remembered."""

    first = None

    def remember(self, x, t, cond, cache):
        fresh = super().remember(x, t, cond, cache)
        self.first = self.first or fresh.layers
        return cache.extend(
            [tuple(y[:, : k.shape[1]] for y in pair) for pair, (k, _) in zip(self.first, fresh.layers, strict=True)],
            x.shape[1],
        )


class StaleValues(TinyCausalWanModel):
    """Refreshes keys, but takes the values of the last denoising call."""

    def forward(self, x_t, t, cond, cache=None, **options):
        self.last_call = x_t.detach(), t
        return super().forward(x_t, t, cond, cache, **options)

    def remember(self, x, t, cond, cache):
        fresh, stale = super().remember(x, t, cond, cache), super().remember(*self.last_call, cond, cache)
        layers = [(k, v) for (k, _), (_, v) in zip(fresh.layers, stale.layers, strict=True)]
        return cache.extend(layers, x.shape[1])


def asked(remembers_what_it_is_given, kind):
    torch.manual_seed(1)
    model = kind(WanConfig(dim=24, num_heads=2, num_layers=2, ffn_dim=24))
    nn.init.normal_(model.head.head.weight, std=0.1)
    return remembers_what_it_is_given(model, {"prompt_embeds": torch.randn(1, 4, 32)}, (1, 8, 8))


def test_a_healthy_model(remembers_what_it_is_given):
    assert asked(remembers_what_it_is_given, TinyCausalWanModel) is True, (
        "A model whose cache holds what it was given is called sick. Compare two caches that were given the same "
        "block: they should be equal, bit for bit."
    )


def test_a_stale_cache_is_found(remembers_what_it_is_given):
    assert asked(remembers_what_it_is_given, StaleCache) is False, (
        "StaleCache remembers what its last denoising call saw. Change what the call before sees, give `remember` the "
        "same block, and compare: the caches should not differ."
    )


def test_stale_values_are_found(remembers_what_it_is_given):
    assert asked(remembers_what_it_is_given, StaleValues) is False, (
        "Here the keys are right and only the values are stale: compare both, in every layer."
    )


def test_a_cache_that_never_changes_is_found(remembers_what_it_is_given):
    assert asked(remembers_what_it_is_given, NeverRefreshed) is False, (
        "This one remembers the same whatever it is given, so it passes a test of equality. Give it another block, "
        "too: now the caches should differ."
    )


REAL_INK = 0.10
LENGTH = 60


def planted(fault, seed=0):
    """A made-up log of a run with one fault: plain shapes under multiplicative noise."""
    rng = np.random.default_rng([seed, *map(ord, fault)])
    rise = np.linspace(0, 1, LENGTH)
    signs = {
        "generator_loss": 0.5 + rng.choice([-0.3, 0.4]) * rise,  # up or down, which means nothing
        "score_distance": np.where(rise < 0.05, 0.03, 0.09 - 0.04 * rise),  # smallest while the critic is the teacher
        "generator_grad_norm": 0.12 - 0.05 * rise,
        "critic_flow_error_t0.50": 0.09 - 0.02 * rise,
        "sample_ink": REAL_INK * (0.7 + 0.35 * np.minimum(1, 2 * rise)),
        "sample_speed": 0.05 + 0.005 * rise,
    }
    if fault == "learning rate too high":
        signs["generator_grad_norm"] = 0.1 * 40**rise
    if fault == "critic lags":
        signs["critic_flow_error_t0.50"] = 0.08 * (1 + 1.5 * rise)
    if fault == "strokes swell":
        signs["sample_ink"] = REAL_INK * (0.8 + 1.2 * rise)
    if fault == "motion dies":
        signs["sample_speed"] = 0.05 * (1 - 0.9 * np.minimum(1, 1.5 * rise))
    log = {name: (values * rng.lognormal(0, 0.1, LENGTH)).tolist() for name, values in signs.items()}
    for name in ("sample_ink", "sample_speed"):
        values = np.full(LENGTH, signs[name][0]) if fault == "nothing moves" else signs[name]
        smooth = values * (1 if fault == "nothing moves" else rng.lognormal(0, 0.03, LENGTH))
        log[name] = [float(x) if (step + 1) % 5 == 0 else None for step, x in enumerate(smooth)]
    return log


HINTS = {
    "healthy": "Nothing is wrong here: the loss has no goal, and score_distance is smallest in the first steps.",
    "nothing moves": "sample_ink and sample_speed are the same at every step, though there is a gradient.",
    "learning rate too high": "generator_grad_norm grows to many times what it was.",
    "critic lags": "critic_flow_error_t0.50 rises: the critic gets worse at what the student makes.",
    "strokes swell": "sample_ink ends far above that of real videos.",
    "motion dies": "sample_speed falls to a fraction while the ink stays.",
}


def test_it_finds_each_fault(diagnose):
    for fault, sign in HINTS.items():
        for seed in range(4):
            got = diagnose(planted(fault, seed), REAL_INK)
            assert got == fault, f"A log of {fault!r} is called {got!r}. {sign}"


def test_one_spike_is_no_disease(diagnose):
    log = planted("healthy", 7)
    log["generator_grad_norm"][-3] *= 400
    log["critic_flow_error_t0.50"][-8] *= 100
    got = diagnose(log, REAL_INK)
    assert got == "healthy", (
        f"One step with a huge gradient, and one with a huge error, out of {LENGTH}: that happens in every run. Yours "
        f"says {got!r}. A median does not mind."
    )


def test_the_loss_is_no_sign(diagnose):
    for fault in HINTS:
        log = planted(fault, 5)
        log["generator_loss"] = [1000 * x for x in reversed(log["generator_loss"])]
        log["score_distance"] = [0.01 * x for x in log["score_distance"]]
        got = diagnose(log, REAL_INK)
        assert got == fault, (
            f"With another generator_loss and score_distance, {fault!r} has become {got!r}: neither is a sign of these "
            "diseases."
        )
