"""Lesson 7: wrong and right answers."""

from fractions import Fraction
from functools import partial

import torch

from dynamic_video_sf import Guided, block_causal, predict_x0
from kv_cache import block_sizes
from randomness import randint, randn_like


def counts_the_steps(denoising_steps, at_least=1):
    return max(at_least, len([step for step in denoising_steps if step]))


def multiplies(denoising_steps, at_least=1):
    """A common multiple, but not the least one."""
    one = 1
    for step in denoising_steps:
        one *= (Fraction(step) / 1000).denominator
    return one * max(1, -(-at_least // one))


def whole_steps_only(denoising_steps, at_least=1):
    return next(n for n in range(at_least, 2000) if all(int(step) * n % 1000 == 0 for step in denoising_steps))


def takes_the_number_asked_for(denoising_steps, at_least=1):
    return max(at_least, 4)


def tries_one_after_the_other(denoising_steps, at_least=1):
    number = at_least
    while any(abs(step / 1000 * number - round(step / 1000 * number)) > 1e-9 for step in denoising_steps):
        number += 1
    return number


def sign_of_the_mean(noise):
    return torch.as_tensor(noise).sign()


def probability(noise):
    return torch.distributions.Normal(0.0, 1.0).cdf(torch.as_tensor(noise))


def another_s_curve(noise):
    return torch.tanh(torch.as_tensor(noise))


def of_a_wider_normal(noise):
    return torch.erf(torch.as_tensor(noise) / 2)


def error_function(noise):
    return torch.erf(torch.as_tensor(noise) / 2**0.5)


def regression(
    model, scheduler, trajectory, times, cond, config, *, teacher_forcing=False, rng=None, index=None, fault=None
):
    """The regression, frame by frame and in float64, with room for a fault."""
    batch, num_states, num_frames = trajectory.shape[:3]
    sizes = block_sizes(num_frames, config.frames_per_block)
    if index is None:
        index = randint(num_states - (fault == "never clean"), (batch, len(sizes)), rng)
    if fault == "one state per sample":
        index = index[:, :1].expand(-1, len(sizes))
    columns = [index[:, block] for block, size in enumerate(sizes) for _ in range(size)]
    x_t = torch.stack([trajectory[torch.arange(batch), k, f] for f, k in enumerate(columns)], dim=1)
    t = torch.tensor(times, dtype=torch.float64)[torch.stack(columns, dim=1)]
    if fault == "next time":
        t = torch.tensor([*times[1:], 0.0], dtype=torch.float64)[torch.stack(columns, dim=1)]
    past = {"clean": x_t if fault == "noisy past" else trajectory[:, -1]} if teacher_forcing else {}
    causal = model if fault == "bidirectional" else block_causal(model, config, **past)
    if fault == "bidirectional" and past:
        causal = partial(model, **past)
    with torch.set_grad_enabled(fault != "no gradient"):
        error = (x_t - t[..., None, None, None] * causal(x_t, t, cond) - trajectory[:, -1]).square().mean((2, 3, 4))
    if fault == "counts clean":
        return error.mean()
    if fault == "divides by zero":
        return error[t > 0].mean()
    return (error * (t > 0)).sum() / max(1, int((t > 0).sum()))


def with_signature(function, fault):
    def answer(model, scheduler, trajectory, times, cond, config, *, teacher_forcing=False, rng=None, index=None):
        return function(
            model, scheduler, trajectory, times, cond, config,
            teacher_forcing=teacher_forcing, rng=rng, index=index, fault=fault,
        )  # fmt: skip

    answer.__name__ = f"{function.__name__}_{(fault or 'right').replace(' ', '_')}"
    return answer


def consistency(
    model, target, teacher, scheduler, x0, cond, uncond, guidance_scale, config, *, num_steps=48, rng=None,
    index=None, fault=None,
):  # fmt: skip
    """Consistency distillation, block by block of the index, with room for a fault."""
    sizes = block_sizes(x0.shape[1], config.frames_per_block)
    if index is None:
        index = randint(num_steps + (fault == "off the grid"), (len(x0), len(sizes)), rng)
    step = torch.cat([index[:, [block]].expand(-1, size) for block, size in enumerate(sizes)], dim=1)
    linear = 1 - step / num_steps
    t, t_next = (u if fault == "not warped" else scheduler.warp(u) for u in (linear, linear - 1 / num_steps))
    if fault == "same time":
        t_next = t
    x_t = scheduler.add_noise(x0, randn_like(x0, rng), t)
    past = {} if fault == "noisy past" else {"clean": x0}
    with torch.set_grad_enabled(fault == "gradient in the target"):
        if fault == "data for a teacher":
            x_next = scheduler.add_noise(x0, randn_like(x0, rng), t_next)
        else:
            scale = 1.0 if fault == "no guidance" else guidance_scale
            flow = Guided(block_causal(teacher, config, **past), uncond, scale)(x_t, t, cond)
            x_next = x_t + (t - t_next if fault == "wrong way" else t_next - t)[..., None, None, None] * flow
        end = predict_x0(block_causal(target, config, **past), scheduler, x_next, t_next, cond)
    here = predict_x0(block_causal(model, config, **past), scheduler, x_t, t, cond)
    return ((here - end) ** 2).mean()


def consistency_answer(fault):
    def answer(
        model,
        target,
        teacher,
        scheduler,
        x0,
        cond,
        uncond,
        guidance_scale,
        config,
        *,
        num_steps=48,
        rng=None,
        index=None,
    ):
        given = (model, target, teacher, scheduler, x0, cond, uncond, guidance_scale, config)
        return consistency(*given, num_steps=num_steps, rng=rng, index=index, fault=fault)

    answer.__name__ = f"consistency_{(fault or 'right').replace(' ', '_')}"
    return answer


REGRESSION = (
    "one state per sample",
    "next time",
    "noisy past",
    "bidirectional",
    "counts clean",
    "divides by zero",
    "never clean",
    "no gradient",
)
CONSISTENCY = (
    "gradient in the target",
    "not warped",
    "off the grid",
    "same time",
    "noisy past",
    "data for a teacher",
    "no guidance",
    "wrong way",
)
WRONG = {
    "smallest_grid": [counts_the_steps, multiplies, whole_steps_only, takes_the_number_asked_for],
    "conditional_mean": [sign_of_the_mean, probability, another_s_curve, of_a_wider_normal],
    "ode_regression_loss": [with_signature(regression, fault) for fault in REGRESSION],
    "consistency_loss": [consistency_answer(fault) for fault in CONSISTENCY],
}
RIGHT = {
    "smallest_grid": tries_one_after_the_other,
    "conditional_mean": error_function,
    "ode_regression_loss": with_signature(regression, None),
    "consistency_loss": consistency_answer(None),
}
