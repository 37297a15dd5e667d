"""Solutions of lesson 0: the core itself, where it has the function."""

import torch

from dynamic_video_sf import generate, prefill
from generate import draw_noise, sample_keys, to_pixels
from kv_cache import block_sizes

__all__ = ["block_sizes", "continue_video", "draw_noise", "to_pixels"]


def continue_video(loaded, video, prompt, num_frames, seed=0):
    """The past need not be the model's own: read the given frames into the cache, block by block, and go on."""
    cond, _ = loaded.encode([prompt])
    noise, rng = draw_noise(sample_keys([prompt], seed), num_frames, loaded.frame_shape)
    given = (loaded.model, loaded.scheduler)
    cache = prefill(*given, video, cond, loaded.sampling.rollout, rng=rng)
    return torch.cat([video, generate(*given, noise, cond, loaded.sampling.rollout, cache=cache, rng=rng)], dim=1)
