"""Exercises of lesson 9. README.md says what each wants; `make grade LESSON=9` says how far you are."""

from dynamic_video_sf import dmd_loss, renoise
from dynamic_video_sf import training_rollout as the_cores_rollout
from tutorial.grading import todo


def exits(exit_step, num_blocks, num_steps):
    """The denoising step at which each block is left: a list of num_blocks numbers. exit_step is one number for all, a
    list of one per block, or None for the last step. Raises ValueError for what no block or no step fits."""
    todo("say at which denoising step each block is left.")


def draw_exit(config, num_blocks, rng):
    """The exit step of a training rollout by config.exit_rule: an int, or for "per_block" a list. config: a
    SelfForcingConfig. Everything random comes from rng."""
    todo("draw the step at which a training rollout leaves its blocks.")


def blocks_with_gradient(num_frames, frames_per_block, gradient_frames):
    """Which blocks of a clip reach into its last gradient_frames frames: a list of bool, one per block."""
    todo("say which blocks of a clip keep a gradient.")


def rollout(
    generator, scheduler, noise, cond, config, *, cache=None, exit_step=None, rng=None, sampler=renoise, observe=None
):
    """A Python generator of clean blocks [B, n, C, H, W] that returns the cache in the end.

    noise [B, F, C, H, W]; config: a RolloutConfig; the rest as in dynamic_video_sf.rollout.
    """
    todo("make a video block by block, for training and for inference.")


def self_forcing_step(
    generator, real_score, fake_score, scheduler, noise, cond, uncond, config, *,
    loss=dmd_loss, student_video=the_cores_rollout, data=None, rng=None, shared_rng=None, observe=None,
):  # fmt: skip
    """A Python generator of ("generator", loss) once and ("critic", loss) config.critic_steps times.

    config: a SelfForcingConfig; the rest as in dynamic_video_sf.self_forcing_step.
    """
    todo("yield the losses of Algorithm 1 in their order.")


def training_rollout(generator, scheduler, noise, cond, config, *, data=None, rng=None, shared_rng=None, reencode=None):
    """The student's clip of random length (one of config.clip_lengths(), with probability config.shortest_share the
    shortest), left at random exits: its last config.gradient_frames frames [B, f, C, H, W], and the exit step.

    noise [B, max_num_frames, C, H, W]; config: a SelfForcingConfig; data and reencode are for others and None here.
    """
    todo("roll a student out as a training step needs it.")
