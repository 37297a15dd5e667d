"""Solutions of lesson 2: the core itself, where it has the function."""

import torch

from dynamic_video_sf import Guided, euler, flow_matching_loss
from experiments.gaussian_mixture import Mixture
from flow_match import FlowMatchScheduler

__all__ = ["add_noise", "euler", "exact_flow", "flow_matching_loss", "guided_flow", "warp"]


def warp(t, shift):
    return FlowMatchScheduler(shift).warp(t)


def add_noise(x0, noise, t):
    return FlowMatchScheduler().add_noise(x0, noise, t)


def guided_flow(model, x_t, t, cond, uncond, guidance_scale):
    return Guided(model, uncond, guidance_scale)(x_t, t, cond)


def exact_flow(x, t, means, weights, std):
    """Each component says which x0 it would mean; they are weighed by how likely they made x."""
    return Mixture(means.tolist(), weights.tolist(), std).flow(x, torch.full((len(x), 1), t), weights.log())
