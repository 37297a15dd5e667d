"""What a denoiser may predict: flow, x0, noise or v are one prediction in four coordinates, and four losses.

With x_t = (1 - t) x0 + t noise, each is a linear function of x_t and any other, so a network that predicts one predicts
all. Their squared errors differ by a factor that depends on t alone (`loss_weight`): to choose what is regressed is to
choose which noise levels count.

    flow    noise - x0, what Wan predicts
    x0      the clean video
    noise   epsilon
    v       a noise - b x0 with a = (1 - t) / s, b = t / s, s^2 = (1 - t)^2 + t^2 (arXiv 2202.00512)
"""

import torch
from torch import Tensor

KINDS = ("flow", "x0", "noise", "v")


def from_flow(kind: str, flow: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The prediction `kind` that a flow implies. t broadcasts over the videos. Raises ValueError for another kind."""
    clean, noise = x_t - t * flow, x_t + (1 - t) * flow
    if kind == "v":
        return ((1 - t) * noise - t * clean) / _norm(t)
    return {"flow": flow, "x0": clean, "noise": noise}[_known(kind)]


def to_flow(kind: str, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The flow that a prediction implies; x0 has none at t = 0 and noise none at t = 1, where they say nothing."""
    if kind == "x0":
        return (x_t - prediction) / t
    if kind == "noise":
        return (prediction - x_t) / (1 - t)
    if kind == "v":
        return ((2 * t - 1) * x_t / _norm(t) + prediction) / _norm(t)
    return {"flow": prediction}[_known(kind)]


def loss_weight(kind: str, t: Tensor) -> Tensor:
    """The squared error of a prediction, divided by that of the flow that it implies."""
    return {"flow": torch.ones_like(t), "x0": t**2, "noise": (1 - t) ** 2, "v": _norm(t) ** 2}[_known(kind)]


def _norm(t: Tensor) -> Tensor:
    return ((1 - t) ** 2 + t**2).sqrt()


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"A network predicts one of {', '.join(KINDS)}; got {kind!r}.")
    return kind
