"""Lesson 2: wrong and right answers."""

import torch

from parametrisation import loss_weight
from randomness import rand, randn_like


def the_wrong_way(t, shift):
    return t / (shift - (shift - 1) * t)


def a_power(t, shift):
    return t ** (1 / shift)


def only_scaled(t, shift):
    return torch.as_tensor(shift * t).clamp(max=1.0)


def in_thousands(t, shift):
    return 1000 * by_odds(t, shift)


def by_odds(t, shift):
    """1 / (1 + (1/t - 1) / shift), with 0 left alone."""
    t = torch.as_tensor(t, dtype=torch.float64)
    return torch.where(t > 0, 1 / (1 + (1 / t.clamp(min=1e-300) - 1) / shift), t)


def level(t, x):
    t = torch.as_tensor(t, dtype=torch.float32)
    return t.reshape(*t.shape, *[1] * (x.ndim - t.ndim)) if t.ndim else t


def turned_round(x0, noise, t):
    return with_lerp(noise, x0, t)


def variance_preserving(x0, noise, t):
    return ((1 - level(t, x0)).sqrt() * x0 + level(t, x0).sqrt() * noise).to(x0.dtype)


def along_the_last_axis(x0, noise, t):
    if isinstance(t, torch.Tensor) and t.ndim == 1:
        return (1 - t) * x0 + t * noise
    return with_lerp(x0, noise, t)


def one_level_for_all_frames(x0, noise, t):
    return with_lerp(x0, noise, t[:, 0] if isinstance(t, torch.Tensor) and t.ndim == 2 else t)


def in_half_precision(x0, noise, t):
    t = level(t, x0).to(x0.dtype)
    return (1 - t) * x0 + t * noise


def with_lerp(x0, noise, t):
    return torch.lerp(x0.float(), noise.float(), level(t, x0).expand(x0.shape).contiguous()).to(x0.dtype)


def all_new(scheduler, x0, x_t, t, t_next, noise):
    return scheduler.add_noise(x0, noise, t_next)


def backwards(scheduler, x0, x_t, t, t_next, noise):
    return x_t - (t_next - t) * (x_t - x0) / t


def too_far(scheduler, x0, x_t, t, t_next, noise):
    return x_t - t_next * (x_t - x0) / t


def with_a_little_noise(scheduler, x0, x_t, t, t_next, noise):
    return with_the_noise_that_is_seen(scheduler, x0, x_t, t, t_next, noise) + 0.1 * t_next * noise


def with_the_noise_that_is_seen(scheduler, x0, x_t, t, t_next, noise):
    """Keep the noise that the model sees in x_t, at the next level."""
    seen = (x_t - (1 - t) * x0) / t
    return (1 - t_next) * x0 + t_next * seen


def of_the_reference(model, x_t, t, cond, uncond, guidance_scale):
    flow = model(x_t, t, cond)
    return flow + guidance_scale * (flow - model(x_t, t, uncond))


def swapped(model, x_t, t, cond, uncond, guidance_scale):
    return as_a_mean(model, x_t, t, uncond, cond, guidance_scale)


def only_louder(model, x_t, t, cond, uncond, guidance_scale):
    return guidance_scale * model(x_t, t, cond)


def always_twice(model, x_t, t, cond, uncond, guidance_scale):
    flow, without = model(x_t, t, cond), model(x_t, t, uncond)
    return without + guidance_scale * (flow - without)


def as_a_mean(model, x_t, t, cond, uncond, guidance_scale):
    """A weighted mean of the two, with a weight beyond 1."""
    flow = model(x_t, t, cond)
    if guidance_scale == 1:
        return flow
    return guidance_scale * flow + (1 - guidance_scale) * model(x_t, t, uncond)


def loss_of(target, *, warped=True, shared=False, told=lambda t: t, reduce=torch.mean, weighed=True, own_noise=False):
    """Variations of the loss: target(x0, noise), and what goes wrong around it."""

    def loss(model, scheduler, x0, cond, *, rng=None, t=None, noise=None, parametrisation="flow", observe=None):
        if t is None:
            u = rand((len(x0), 1), rng)[:, 0]
            u = u[:1].expand(len(x0)) if shared else u
            t = scheduler.warp(u) if warped else u
        noise = randn_like(x0, None if own_noise else rng) if noise is None else noise
        off = model(scheduler.add_noise(x0, noise, t), told(t), cond) - target(x0, noise)
        weight = loss_weight(parametrisation if weighed else "flow", level(t, x0))
        if observe:
            observe(t=t, error=(weight * off.square()).detach().flatten(1).mean(1))
        return reduce(weight * off.square())

    return loss


def right_target(x0, noise):
    return noise - x0


points_to_the_video = loss_of(lambda x0, noise: x0 - noise)
predicts_the_noise = loss_of(lambda x0, noise: noise)
forgets_to_warp = loss_of(right_target, warped=False)
one_level_for_the_batch = loss_of(right_target, shared=True)
a_sum = loss_of(right_target, reduce=torch.sum)
told_in_thousands = loss_of(right_target, told=lambda t: 1000 * t)
knows_one_parametrisation = loss_of(right_target, weighed=False)
forgets_the_rng = loss_of(right_target, own_noise=True)
spelled_out = loss_of(right_target)


def knows_one_level_per_sample(model, scheduler, x0, cond, *, t=None, **options):
    """Spreads t over the entries of a sample, [B, F] or not."""
    if t is not None and t.ndim == 2:
        t = t[:, 0]
    return spelled_out(model, scheduler, x0, cond, t=t, **options)


def parts(x, t, means, std):
    variance = ((1 - t) * std) ** 2 + t**2
    off = x[:, None] - (1 - t) * means
    return variance, off, means + (1 - t) * std**2 / variance * off


def nearest_mean(x, t, means, weights, std):
    _, off, guesses = parts(x, t, means, std)
    best = off.square().sum(-1).argmin(1)
    return (x - guesses[torch.arange(len(x)), best]) / t


def by_their_shares(x, t, means, weights, std):
    _, _, guesses = parts(x, t, means, std)
    return (x - (weights[:, None] * guesses).sum(1)) / t


def means_where_they_were(x, t, means, weights, std):
    variance = ((1 - t) * std) ** 2 + t**2
    share = (weights.log() - (x[:, None] - means).square().sum(-1) / (2 * variance)).softmax(-1)
    return (x - (share[..., None] * parts(x, t, means, std)[2]).sum(1)) / t


def points_without_width(x, t, means, weights, std):
    return by_tweedie(x, t, means, weights, 0.0)


def the_score(x, t, means, weights, std):
    variance, off, _ = parts(x, t, means, std)
    share = (weights.log() - off.square().sum(-1) / (2 * variance)).softmax(-1)[..., None]
    return -(share * off).sum(1) / variance


def by_tweedie(x, t, means, weights, std):
    """From the score of x_t: E[noise | x_t] = -t score, and x0 from it; at t = 1 from the noise and the mean."""
    x = x.double()  # an answer need not be in float32
    noise = -t * the_score(x, t, means, weights, std)
    if t == 1:
        return noise - (weights[:, None] * means).sum(0)
    return noise - (x - t * noise) / (1 - t)


WRONG = {
    "warp": [the_wrong_way, a_power, only_scaled, in_thousands],
    "add_noise": [
        turned_round,
        variance_preserving,
        along_the_last_axis,
        one_level_for_all_frames,
        in_half_precision,
    ],
    "euler": [all_new, backwards, too_far, with_a_little_noise],
    "guided_flow": [of_the_reference, swapped, only_louder, always_twice],
    "flow_matching_loss": [
        points_to_the_video,
        predicts_the_noise,
        forgets_to_warp,
        one_level_for_the_batch,
        a_sum,
        told_in_thousands,
        knows_one_parametrisation,
        forgets_the_rng,
        knows_one_level_per_sample,
    ],
    "exact_flow": [nearest_mean, by_their_shares, means_where_they_were, points_without_width, the_score],
}
RIGHT = {
    "warp": by_odds,
    "add_noise": with_lerp,
    "euler": with_the_noise_that_is_seen,
    "guided_flow": as_a_mean,
    "flow_matching_loss": spelled_out,
    "exact_flow": by_tweedie,
}
