"""The schedule: how much noise, when, and how a flow prediction becomes a clean video.

Rectified flow as in Wan 2.1: x_t = (1 - t) x0 + t noise and flow = noise - x0, so x0 = x_t - t flow. Time t is in
[0, 1], 1 is pure noise. There are no tables: every formula is evaluated at the very t that the network is told.
Users speak of denoising steps in 0..1000 (`[1000, 750, 500, 250]`); `denoising_times` converts them, once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from randomness import Rng, rand

Time = float | Tensor


@dataclass(frozen=True)
class FlowMatchScheduler:
    """Rectified-flow schedule with a timestep shift (SD3, arXiv 2403.03206, eq. 23; Wan uses 5 for 480p)."""

    shift: float = 5.0

    def __post_init__(self):
        if self.shift <= 0:
            raise ValueError(f"shift must be positive, got {self.shift}; 1 leaves time unchanged, Wan uses 5.")

    def warp(self, t: Time) -> Time:
        """Spend more of [0, 1] at high noise: shift t / (1 + (shift - 1) t). Keeps 0 and 1."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """x_t = (1 - t) x0 + t noise for videos [B, F, C, H, W] and t a float, [B] or [B, F]."""
        t = _per_frame(t, x0)
        return ((1 - t) * _exact(x0) + t * _exact(noise)).to(x0.dtype)

    def to_x0(self, flow: Tensor, x_t: Tensor, t: Time) -> Tensor:
        """The clean video that a flow prediction implies: x0 = x_t - t flow, in the dtype of `x_t`."""
        return (_exact(x_t) - _per_frame(t, x_t) * _exact(flow)).to(x_t.dtype)

    def to_flow(self, x0: Tensor, x_t: Tensor, t: Time) -> Tensor:
        """The flow that a clean prediction implies: (x_t - x0) / t, for t > 0, in the dtype of `x_t`."""
        return ((_exact(x_t) - _exact(x0)) / _per_frame(t, x_t)).to(x_t.dtype)

    def denoising_times(self, denoising_steps: Sequence[float]) -> list[float]:
        """Warped times of the few denoising steps: [1000, 750, 500, 250] -> [1, .9375, .8333, .625] at shift 5."""
        return [self.warp(step / 1000) for step in check_denoising_steps(denoising_steps)]

    def sample_times(self, batch: int, rng: Rng = None, *, low=0.0, high=1.0, minimum=0.02, maximum=0.98) -> Tensor:
        """Times [B] at which scores are compared: uniform in [low, high], warped, then clamped (DMD, below eq. 8)."""
        u = low + (high - low) * rand((batch, 1), rng)[:, 0]
        return self.warp(u).clamp(minimum, maximum)


def check_denoising_steps(steps: Sequence[float]) -> tuple[float, ...]:
    """Steps in 0..1000, strictly decreasing from 1000; a trailing 0 (the clean video) is dropped."""
    steps = tuple(steps)
    if steps and steps[-1] == 0:
        steps = steps[:-1]
    falling = all(a > b for a, b in zip(steps, steps[1:], strict=False))
    if not steps or steps[0] != 1000 or steps[-1] <= 0 or not falling:
        raise ValueError(
            f"denoising_steps must fall strictly from 1000 and stay above 0, such as [1000, 750, 500, 250]; "
            f"got {list(steps)}."
        )
    return steps


def _per_frame(t: Time, video: Tensor) -> Time:
    """t as something that broadcasts over [B, F, C, H, W]."""
    if not isinstance(t, Tensor):
        if not 0 <= t <= 1:
            raise ValueError(f"t runs from 0 (clean) to 1 (noise), got {t}; divide Wan's 0..1000 by 1000.")
        return t
    if t.ndim == 0:
        return _exact(t)
    if t.ndim > 2 or t.shape[0] != video.shape[0] or (t.ndim == 2 and t.shape[1] not in (1, video.shape[1])):
        raise ValueError(
            f"t must be a float, [B] or [B, F] for a video of shape {tuple(video.shape)}; got {tuple(t.shape)}."
        )
    return _exact(t).reshape(*t.shape, *[1] * (video.ndim - t.ndim))


def _exact(x: Tensor) -> Tensor:
    """At least float32: these three-term formulas lose whole digits in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
