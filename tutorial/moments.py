"""Watch a real rollout, call by call, for visualization.animation."""

import torch

from dynamic_video_sf import rollout
from visualization.animation import Moment


@torch.no_grad()
def watch(generator, scheduler, noise, cond, config, *, rng=None, **options) -> list[Moment]:
    """Every call that `rollout` makes of the network, in order: of the first video of the batch."""
    moments, cache = [], config.empty_cache()

    def see(frame, step, t, x_t, x0):
        frames = range(frame, frame + x_t.shape[1])
        moments.append(Moment(frames, cache.frames, config.sink_frames, step, float(t), x_t[0].cpu(), x0[0].cpu()))

    for block in rollout(generator, scheduler, noise, cond, config, rng=rng, observe=see, **options):
        held, num_frames = cache.frames, block.shape[1]
        frames = range(cache.next_frame, cache.next_frame + num_frames)
        cache = cache.extend([], num_frames)
        moments.append(Moment(frames, held, config.sink_frames, guess=block[0].cpu(), after=cache.frames))
    return moments
