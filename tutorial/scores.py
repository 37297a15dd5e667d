"""Scores whose answers are known, and clips to show them: what the graders of lessons 8 and 10 hold a loss against."""

import torch
from torch import nn

from randomness import generator, randn

SHAPE = (3, 4, 1, 2, 2)
TIMES = torch.tensor([0.2, 0.5, 0.9])
COND, UNCOND = {"shift": 0.5}, {"shift": -0.2}


class Sees(nn.Module):
    """A score that sees the clean video gain * x_t + shift in x_t, the shift being its prompt; it notes its inputs."""

    def __init__(self, gain):
        super().__init__()
        self.gain, self.asked = nn.Parameter(torch.tensor(gain)), []

    def forward(self, x_t, t, cond):
        self.asked.append((x_t, t, cond))
        return (x_t - self.gain * x_t - cond["shift"]) / wide(t)


def wide(t):
    """[B] -> [B, 1, 1, 1, 1]"""
    return t.reshape(-1, 1, 1, 1, 1)


def draw(name, shape=SHAPE):
    """Noise that is always the same under a name."""
    return randn(shape, generator(0, name))


def the_video():
    """Three clips, each with a contrast of its own."""
    return (wide(torch.tensor([0.3, 1.0, 5.0])) * draw("video")).requires_grad_()
