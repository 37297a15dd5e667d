"""Lesson 8: wrong and right answers."""

import torch

from dynamic_video_sf import Guided, dmd_loss, flow_matching_loss, predict_x0
from randomness import randn_like


def mean_abs(x, dims=(1, 2, 3, 4)):
    return x.abs().mean(dim=dims, keepdim=True)


def guesses(video, real_score, fake_score, scheduler, cond, uncond, guidance_scale, rng=None, t=None, noise=None):
    t = scheduler.sample_times(video.shape[0], rng) if t is None else t
    x_t = scheduler.add_noise(video, randn_like(video, rng) if noise is None else noise, t)
    real = predict_x0(Guided(real_score, uncond, guidance_scale), scheduler, x_t, t, cond)
    return predict_x0(fake_score, scheduler, x_t, t, cond), real


def moved(video, gradient, mask=None):
    """Half the squared distance to where the video should go."""
    error = (video - (video - gradient).detach()).square()
    if mask is None:
        return 0.5 * error.mean()
    mask = mask[:, :, None, None, None].expand_as(error)
    return 0.5 * (error * mask).sum() / mask.sum()


def wrong_sign(video, real_score, fake_score, *rest, mask=None, observe=None, **options):
    with torch.no_grad():
        fake, real = guesses(video, real_score, fake_score, *rest, **options)
    return moved(video, (real - fake) / mean_abs(video.detach() - real), mask)


def target_not_detached(video, real_score, fake_score, *rest, mask=None, observe=None, **options):
    with torch.no_grad():
        fake, real = guesses(video, real_score, fake_score, *rest, **options)
        gradient = (fake - real) / mean_abs(video - real)
    return 0.5 * (video - (video - gradient)).square().mean()


def through_the_scores(video, real_score, fake_score, *rest, mask=None, observe=None, **options):
    fake, real = guesses(video, real_score, fake_score, *rest, **options)
    return 0.5 * ((fake - real) / mean_abs(video - real).detach()).square().mean()


def guides_the_critic(video, real_score, fake_score, scheduler, cond, uncond, guidance_scale, **options):
    critic = Guided(fake_score, uncond, guidance_scale)
    return dmd_loss(video, real_score, critic, scheduler, cond, uncond, 1.0, **options)


def guides_as_the_reference(video, real_score, fake_score, scheduler, cond, uncond, guidance_scale, **options):
    return dmd_loss(video, real_score, fake_score, scheduler, cond, uncond, 1 + guidance_scale, **options)


def normalises_over_the_batch(video, real_score, fake_score, *rest, mask=None, observe=None, **options):
    with torch.no_grad():
        fake, real = guesses(video, real_score, fake_score, *rest, **options)
    return moved(video, (fake - real) / (video.detach() - real).abs().mean(), mask)


def averages_over_what_is_masked(video, real_score, fake_score, *rest, mask=None, observe=None, **options):
    with torch.no_grad():
        fake, real = guesses(video, real_score, fake_score, *rest, **options)
    error = video - (video - (fake - real) / mean_abs(video - real)).detach()
    counts = 1.0 if mask is None else mask[:, :, None, None, None]
    return 0.5 * (error.square() * counts).mean()


def normalises_by_the_critic(video, real_score, fake_score, *rest, mask=None, observe=None, **options):
    with torch.no_grad():
        fake, real = guesses(video, real_score, fake_score, *rest, **options)
    return moved(video, (fake - real) / mean_abs(video.detach() - fake), mask)


def surrogate(video, real_score, fake_score, *rest, mask=None, observe=None, t=None, noise=None, rng=None):
    """The inner product with a fixed gradient: another value, the same derivative."""
    scheduler = rest[0]
    t = scheduler.sample_times(video.shape[0], rng) if t is None else t
    with torch.no_grad():
        fake, real = guesses(video, real_score, fake_score, *rest, t=t, noise=noise, rng=rng)
        norm = mean_abs(video - real)
    if observe:
        observe(t=t, score_distance=mean_abs(fake - real).flatten(), normaliser=norm.flatten())
    product = (video * (fake - real) / norm).flatten(2).mean(2)  # [b f]
    return product.mean() if mask is None else (product * mask).sum() / mask.sum()


def no_noise_in_the_guesses(mean, t):
    return mean + 0 * t, mean + 0 * t


def slope_and_gap_swapped(mean, t):
    v = (1 - t) ** 2 + t**2
    return mean * (1 - t) ** 2 / v, mean * t**2 / v


def forgets_the_chain_rule(mean, t):
    """The score difference itself, not the derivative by the mean."""
    v = (1 - t) ** 2 + t**2
    return mean * t**2 / v, mean * (1 - t) / v


def wrong_way(mean, t):
    v = (1 - t) ** 2 + t**2
    return -mean * t**2 / v, mean * (1 - t) ** 2 / v


def by_regression(mean, t):
    """Guess of x0 from the covariance of x0 and x_t, slope from the integral, in float64."""
    mean, t = mean.double(), t.double()
    variance = (1 - t) ** 2 + t**2
    ours = mean - (1 - t) / variance * (1 - t) * mean
    return ours, (1 - t) * ((1 - t) * mean) / variance


def keeps_the_graph(fake_score, scheduler, video, cond, *, t, noise):
    return flow_matching_loss(fake_score, scheduler, video, cond, t=t, noise=noise)


def other_sign(fake_score, scheduler, video, cond, *, t, noise):
    video = video.detach()
    return (fake_score(scheduler.add_noise(video, noise, t), t, cond) - (video - noise)).square().mean()


def regresses_the_video(fake_score, scheduler, video, cond, *, t, noise):
    video = video.detach()
    return (fake_score(scheduler.add_noise(video, noise, t), t, cond) - video).square().mean()


def without_noise(fake_score, scheduler, video, cond, *, t, noise):
    video = video.detach()
    return (fake_score(video, t, cond) - (noise - video)).square().mean()


def spelled_out(fake_score, scheduler, video, cond, *, t, noise):
    x0 = video.detach()
    at = t.reshape(-1, 1, 1, 1, 1)
    flow = fake_score(x0 + at * (noise - x0), t, cond)
    return torch.nn.functional.mse_loss(flow.double(), (noise - x0).double())


def by_the_loss(log):
    """The most natural mistake: to read the generator's loss."""
    return "healthy" if log["generator_loss"][-1] < log["generator_loss"][0] else "wrong_sign"


def all_is_well(log):
    return "healthy"


def by_the_critic_alone(log):
    return "critic_frozen" if log["critic_loss"][-1] > log["critic_loss"][0] else "healthy"


def by_ratios(log):
    """Compares halves instead of ends."""
    middle = len(log["score_distance"]) // 2

    def mean(name, part):
        return sum(log[name][part]) / len(log[name][part])

    early, late = slice(0, middle), slice(middle, None)
    if max(log["generator_grad_norm"]) < 1e-12:
        return "no_gradient"
    if mean("critic_loss", late) > 1.3 * mean("critic_loss", early):
        return "critic_frozen"
    if max(log["score_distance"]) < 0.2 * min(log["normaliser"]):
        return "critic_on_data"
    return "wrong_sign" if mean("score_distance", late) > mean("score_distance", early) else "healthy"


def weighted(weight, loss=dmd_loss):
    """DMD with a weight that depends on t."""

    def weighted_loss(video, real, fake, scheduler, *rest, t=None, rng=None, **options):
        t = scheduler.sample_times(video.shape[0], rng) if t is None else t
        w, fixed = weight(t).reshape(-1, 1, 1, 1, 1), video.detach()
        return loss(fixed + w * (video - fixed), real, fake, scheduler, *rest, t=t, rng=rng, **options)

    return weighted_loss


details_only = weighted(lambda t: 12.0 * (t < 0.25))
layout_only = weighted(lambda t: 2.2 * (t > 0.85))
falls_below_zero = weighted(lambda t: 4 * t - 2)
far_too_strong = weighted(lambda t: 20 * t)
for name in ("details_only", "layout_only", "falls_below_zero", "far_too_strong"):
    globals()[name].__name__ = name


def bell(video, real, fake, scheduler, cond, uncond, guidance_scale, *, rng=None, t=None, noise=None, mask=None,
         observe=None):  # fmt: skip
    """Most weight in the middle, put on by hand."""
    t = scheduler.sample_times(video.shape[0], rng) if t is None else t
    with torch.no_grad():
        seen = guesses(video, real, fake, scheduler, cond, uncond, guidance_scale, rng=rng, t=t, noise=noise)
        weight = (0.6 + 2.5 * t * (1 - t)).reshape(-1, 1, 1, 1, 1)
        gradient = weight * (seen[0] - seen[1]) / mean_abs(video - seen[1])
    return moved(video, gradient, mask)


WRONG = {
    "dmd_loss": [
        *(wrong_sign, target_not_detached, through_the_scores, guides_the_critic, guides_as_the_reference),
        *(normalises_over_the_batch, normalises_by_the_critic, averages_over_what_is_masked),
    ],
    "gaussian_gap": [no_noise_in_the_guesses, slope_and_gap_swapped, forgets_the_chain_rule, wrong_way],
    "critic_loss": [keeps_the_graph, other_sign, regresses_the_video, without_noise],
    "diagnose": [by_the_loss, all_is_well, by_the_critic_alone],
    "weighted_dmd_loss": [details_only, layout_only, falls_below_zero, far_too_strong, dmd_loss],
}
RIGHT = {
    "dmd_loss": surrogate,
    "gaussian_gap": by_regression,
    "critic_loss": spelled_out,
    "diagnose": by_ratios,
    "weighted_dmd_loss": bell,
}
