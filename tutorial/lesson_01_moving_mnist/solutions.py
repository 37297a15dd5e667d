"""Solutions of lesson 1: the core itself, where it has the function."""

import torch

from digit_classifiers import centre_of_mass
from metrics import total_mass
from moving_mnist import bounce

__all__ = ["bounce", "centre_of_mass", "flicker", "frechet_between"]


def frechet_between(mean, covariance, other_mean, other_covariance):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2): the inner product is symmetric, so eigh will do."""
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt().sum()
    return (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * overlap


def flicker(videos):
    """A straight line through three frames' masses has no second difference, whatever its slope: fading is none."""
    mass = total_mass(videos.clamp(-1, 1))
    return mass.diff(n=2, dim=1).abs().mean(1) / 2 / mass.mean(1).clamp(min=1e-3)
