"""Exercises of lesson 7. README.md says what each wants; `make grade LESSON=7` says how far you are."""

from tutorial.grading import todo


def smallest_grid(denoising_steps, at_least=1):
    """The smallest number N >= at_least of a teacher's steps whose grid 1000, 1000 (N - 1) / N, ... holds all of the
    student's denoising_steps (0..1000, a trailing 0 allowed): int."""
    todo("find a number of teacher steps on whose grid the student's steps lie.")


def conditional_mean(noise):
    """The first frame that squared error teaches a causal student, for each first-frame noise [N]: tensor [N].

    The data: both frames are exactly -1, or both exactly +1, equally often. The teacher is bidirectional; its ODE ends
    at +1 where the two frames' noises add up to more than 0, else at -1. The student sees the first frame's noise
    alone; the second's is standard normal, too.
    """
    todo("average the teacher's answer over what the student cannot see.")


def ode_regression_loss(
    model, scheduler, trajectory, times, cond, config, *, teacher_forcing=False, rng=None, index=None
):
    """Teach a few-step student the end of a teacher's ODE from any point on it: a scalar.

    trajectory [B, K, F, C, H, W]: states at `times` (K numbers, falling from 1), the last one clean at time 0. Every
    block of every sample starts at a random state, or at index [B, num_blocks]; blocks that start clean are not
    counted. With teacher_forcing a block sees the clean ends of those before it. The model is called as
    dynamic_video_sf.block_causal calls it. Helpers: kv_cache.block_sizes, randomness.randint,
    dynamic_video_sf.predict_x0.
    """
    todo("predict the end of the trajectory from a random state of every block.")


def consistency_loss(
    model, target, teacher, scheduler, x0, cond, uncond, guidance_scale, config, *, num_steps=48, rng=None, index=None
):
    """Few steps without stored trajectories, block-causal, on a clean past: a scalar.

    Every block of the data x0 [B, F, C, H, W] is noised to a time of the grid scheduler.warp(1 - i / num_steps); index
    [B, num_blocks] says which i, by default random below num_steps. The teacher, guided, takes one Euler step to the
    next time; from there `target` says where the block ends, and the model must say so from where it was. More
    helpers: dynamic_video_sf.Guided, randomness.randn_like.
    """
    todo("make the model say from here what the target says from one step further on.")
