"""Solutions of lesson 9: the core itself, where it has the function."""

from itertools import accumulate

from dynamic_video_sf import draw_exit, exits, rollout, self_forcing_step, training_rollout
from kv_cache import block_sizes

__all__ = ["blocks_with_gradient", "draw_exit", "exits", "rollout", "self_forcing_step", "training_rollout"]


def blocks_with_gradient(num_frames, frames_per_block, gradient_frames):
    """A block counts if its end lies behind the first frame of the window."""
    ends = accumulate(block_sizes(num_frames, frames_per_block))
    return [end > num_frames - gradient_frames for end in ends]
