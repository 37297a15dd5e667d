"""Exercises of lesson 2. README.md says what each wants; `make grade LESSON=2` says how far you are."""

from torch import Tensor

from tutorial.grading import todo


def warp(t, shift: float):
    """Where the noise level t in [0, 1] (a number or a tensor) is moved, to spend more of the way at high noise."""
    todo("multiply the odds of t by the shift.")


def add_noise(x0: Tensor, noise: Tensor, t) -> Tensor:
    """The noisy video x_t of clean videos [B, F, C, H, W]; t is a float, [B] or [B, F]. In the dtype of x0."""
    todo("mix video and noise, each frame at its own level.")


def euler(scheduler, x0: Tensor, x_t: Tensor, t, t_next, noise: Tensor) -> Tensor:
    """x at the level t_next: one straight step from x_t, given the guess x0 that the model has at t."""
    todo("take one step along the flow.")


def guided_flow(model, x_t: Tensor, t, cond, uncond, guidance_scale: float) -> Tensor:
    """The flow with classifier-free guidance in the convention of diffusers and Wan: 1 is none, 0 is unconditional."""
    todo("exaggerate what the prompt changes.")


def flow_matching_loss(
    model, scheduler, x0: Tensor, cond, *, rng=None, t=None, noise=None, parametrisation="flow", observe=None
) -> Tensor:
    """Mean squared error of the predicted flow on x0 [B, F, C, H, W]: a number.

    t: [B] or [B, F], by default uniform and warped, one per sample. noise: by default standard normal, from rng.
    parametrisation: what the error is measured in; parametrisation.loss_weight has the factor. observe(t=, error=[B]),
    if given, is told what each sample contributed.
    """
    todo("make a network a diffusion model of x0.")


def exact_flow(x: Tensor, t: float, means: Tensor, weights: Tensor, std: float) -> Tensor:
    """E[noise - x0 | x_t = x] where x0 comes from a mixture of Gaussians of one standard deviation in every direction.

    x [B, D], means [K, D], weights [K] (their sum is 1), 0 < t <= 1. Returns [B, D].
    """
    todo("derive the flow that a perfect network would predict.")
