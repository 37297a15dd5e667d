"""Time per block against the frame index: with the whole past in the cache, with a window, and without a cache."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.plan import Size
from benchmarks.steps import SCHEDULER, inputs, network, settings
from dynamic_video_sf import rollout


@dataclass(frozen=True)
class Clip:
    """The memory of a model that has none: the clean video so far."""

    video: Tensor

    @property
    def next_frame(self) -> int:
        return self.video.shape[1]


class Recomputing:
    """A generator that computes its whole past again at every denoising step, under the block-causal mask."""

    def __init__(self, model, frames_per_block: int):
        self.model, self.frames_per_block = model, frames_per_block

    def __call__(self, x_t: Tensor, t: float, cond, cache: Clip) -> Tensor:
        past, new = cache.next_frame, x_t.shape[1]
        video, times = torch.cat([cache.video, x_t], dim=1), torch.tensor([[0.0] * past + [t] * new] * len(x_t))
        return self.model(video, times, cond, frames_per_block=self.frames_per_block)[:, past:]

    def remember(self, x: Tensor, t: float, cond, cache: Clip) -> Clip:
        return Clip(torch.cat([cache.video, x], dim=1))


# Name -> (generator, config, empty cache) of the ways to see the past, given the model and the course's config.
WAYS = {
    "cache of the whole past": lambda model, config, noise: (model, replace(config, window_frames=None), None),
    "cache with a window": lambda model, config, noise: (model, config, None),
    "no cache": lambda model, config, noise: (Recomputing(model, config.frames_per_block), config, Clip(noise[:, :0])),
}


@torch.no_grad()
def block_seconds(generator, noise, cond, config, cache) -> Iterator[float]:
    """Seconds of every block of one rollout: remembering the block before it, and making it."""
    start = time.perf_counter()
    for _ in rollout(generator, SCHEDULER, noise, cond, config, cache=cache):
        yield time.perf_counter() - start
        start = time.perf_counter()


def measure_stream(size: Size, num_blocks: int, batch: int, repeats: int) -> Iterator[tuple[str, list[float]]]:
    """Median seconds of each of num_blocks blocks, for every way to see the past."""
    config = settings(size.num_frames, size.num_frames).rollout
    noise, cond = inputs(replace(size, batch=batch), num_blocks * config.frames_per_block)
    model = network(size)
    for name, way in WAYS.items():
        generator, how, cache = way(model, config, noise)
        runs = [list(block_seconds(generator, noise, cond, how, cache)) for _ in range(repeats)]
        yield name, [statistics.median(times) for times in zip(*runs, strict=True)]
