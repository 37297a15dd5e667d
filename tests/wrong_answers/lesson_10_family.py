"""Lesson 10: wrong and right answers."""

import torch
import torch.nn.functional as F

from dynamic_video_sf import Guided, dmd_loss, predict_x0
from dynamic_video_sf import sid_loss as core_sid_loss
from randomness import randn_like


def guesses(video, real_score, fake_score, scheduler, cond, uncond, guidance_scale, rng=None, t=None, noise=None):
    t = scheduler.sample_times(video.shape[0], rng) if t is None else t
    x_t = scheduler.add_noise(video, randn_like(video, rng) if noise is None else noise, t)
    real = predict_x0(Guided(real_score, uncond, guidance_scale), scheduler, x_t, t, cond)
    return real, predict_x0(fake_score, scheduler, x_t, t, cond)


def averaged(x, mask):
    if mask is None:
        return x.mean()
    return (x.flatten(2).mean(2) * mask).sum() / mask.sum()


def mean_abs(x):
    return x.abs().mean(dim=(1, 2, 3, 4), keepdim=True)


def scores_detached(video, *given, alpha=1.0, mask=None, observe=None, **options):
    """SiD's formula with DMD's habit."""
    with torch.no_grad():
        real, fake = guesses(video, *given, **options)
    return averaged((real - fake) * ((real - video) - alpha * (real - fake)) / mean_abs(video - real).detach(), mask)


def normaliser_differentiated(video, *given, alpha=1.0, mask=None, observe=None, **options):
    real, fake = guesses(video, *given, **options)
    return averaged((real - fake) * ((real - video) - alpha * (real - fake)) / mean_abs(video - real), mask)


def wrong_sign(video, *given, **options):
    return -core_sid_loss(video, *given, **options)


def alpha_elsewhere(video, *given, alpha=1.0, mask=None, observe=None, **options):
    real, fake = guesses(video, *given, **options)
    return averaged((real - fake) * (alpha * (real - video) - (real - fake)) / mean_abs(video - real).detach(), mask)


def only_the_critic_detached(video, *given, alpha=1.0, mask=None, observe=None, **options):
    real, fake = guesses(video, *given, **options)
    fake = fake.detach()
    return averaged((real - fake) * ((real - video) - alpha * (real - fake)) / mean_abs(video - real).detach(), mask)


def trains_dmd(video, *given, alpha=1.0, **options):
    """What the released SiD configuration does."""
    return dmd_loss(video, *given, **options)


def multiplied_out(video, *given, alpha=1.0, mask=None, observe=None, **options):
    real, fake = (guess.double() for guess in guesses(video, *given, **options))
    gap, norm = real - fake, mean_abs((video - real).detach())
    if observe:
        observe(t=options.get("t"), score_distance=mean_abs(gap).detach().flatten(), normaliser=norm.flatten())
    return averaged((gap * (real - video) - alpha * gap.square()) / norm, mask)


def saturating(fake_logits, real_logits=None):
    return -F.softplus(fake_logits if real_logits is None else fake_logits - real_logits).mean()


def pairs_the_wrong_way(fake_logits, real_logits=None):
    return F.softplus(-fake_logits if real_logits is None else fake_logits - real_logits).mean()


def forgets_the_pairs(fake_logits, real_logits=None):
    return F.softplus(-fake_logits).mean()


def sums(fake_logits, real_logits=None):
    return F.softplus(-fake_logits if real_logits is None else real_logits - fake_logits).sum()


def as_cross_entropy(fake_logits, real_logits=None):
    logits = fake_logits if real_logits is None else fake_logits - real_logits
    return F.binary_cross_entropy_with_logits(logits.double(), torch.ones_like(logits).double())


def labels_exchanged(real_logits, fake_logits, relativistic=False):
    if relativistic:
        return F.softplus(real_logits - fake_logits).mean()
    return F.softplus(real_logits).mean() + F.softplus(-fake_logits).mean()


def relativistic_forgotten(real_logits, fake_logits, relativistic=False):
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def fakes_forgotten(real_logits, fake_logits, relativistic=False):
    return F.softplus(-real_logits).mean()


def halved(real_logits, fake_logits, relativistic=False):
    if relativistic:
        return F.softplus(fake_logits - real_logits).mean()
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


def as_two_cross_entropies(real_logits, fake_logits, relativistic=False):
    if relativistic:
        return -F.logsigmoid(real_logits - fake_logits).mean()
    entropy = F.binary_cross_entropy_with_logits
    return entropy(real_logits, torch.ones_like(real_logits)) + entropy(fake_logits, torch.zeros_like(fake_logits))


def not_divided(discriminator, x, logits, sigma, rng=None):
    return (discriminator(x + sigma * randn_like(x, rng)) - logits).square().mean()


def divided_once(discriminator, x, logits, sigma, rng=None):
    return (discriminator(x + sigma * randn_like(x, rng)) - logits).square().mean() / sigma


def not_squared(discriminator, x, logits, sigma, rng=None):
    return ((discriminator(x + sigma * randn_like(x, rng)) - logits) / sigma).abs().mean()


def at_noise_alone(discriminator, x, logits, sigma, rng=None):
    return ((discriminator(sigma * randn_like(x, rng)) - logits) / sigma).square().mean()


def under_no_grad(discriminator, x, logits, sigma, rng=None):
    with torch.no_grad():
        moved = discriminator(x + sigma * randn_like(x, rng))
    return ((moved - logits.detach()) / sigma).square().mean()


def by_second_derivatives(discriminator, x, logits, sigma, rng=None):
    """R1 as it is defined."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return gradient.flatten(1).square().sum(1).mean()


def dmd_cost(num_frames, frames_per_block, num_denoising_steps, critic_steps):
    blocks = num_frames // frames_per_block
    rollout = blocks * num_denoising_steps * frames_per_block + (blocks - 1) * frames_per_block + 2 * num_frames
    return rollout + 3 * num_frames + critic_steps * 3 * num_frames


def all_cost_the_same(objective, **sizes):
    return dmd_cost(**sizes)


def remembers_the_last_block(objective, *, frames_per_block, **sizes):
    return frames_per_block + by_addition(objective, frames_per_block=frames_per_block, **sizes)


def guidance_is_free(objective, *, num_frames, **sizes):
    less = {"sf_gan": 0, "sf_sid": 3}.get(objective, 1)
    return by_addition(objective, num_frames=num_frames, **sizes) - less * num_frames


def forward_alone(objective, *, num_frames, frames_per_block, num_denoising_steps, critic_steps):
    return num_frames * (num_denoising_steps + 1 + 3 + critic_steps) - frames_per_block


def by_addition(objective, *, num_frames, frames_per_block, num_denoising_steps, critic_steps):
    dmd = dmd_cost(num_frames, frames_per_block, num_denoising_steps, critic_steps)
    return (
        dmd
        + {
            "sf_dmd": 0,
            "tf_dmd": 0,
            "sf_sid": 6 * num_frames,
            "sf_gan": num_frames + critic_steps * 9 * num_frames,
            "causvid": frames_per_block - num_denoising_steps * num_frames,
        }[objective]
    )


WRONG = {
    "sid_loss": [
        *(scores_detached, normaliser_differentiated, wrong_sign, alpha_elsewhere, only_the_critic_detached),
        trains_dmd,
    ],
    "gan_generator_loss": [saturating, pairs_the_wrong_way, forgets_the_pairs, sums],
    "gan_discriminator_loss": [labels_exchanged, relativistic_forgotten, fakes_forgotten, halved],
    "slope_penalty": [not_divided, divided_once, not_squared, at_noise_alone, under_no_grad],
    "step_evaluations": [all_cost_the_same, remembers_the_last_block, guidance_is_free, forward_alone],
}
RIGHT = {
    "sid_loss": multiplied_out,
    "gan_generator_loss": as_cross_entropy,
    "gan_discriminator_loss": as_two_cross_entropies,
    "slope_penalty": by_second_derivatives,
    "step_evaluations": by_addition,
}
