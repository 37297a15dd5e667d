"""Solutions of lesson 10: the core itself, where it has the function."""

from dynamic_video_sf import gan_discriminator_loss, gan_generator_loss, sid_loss, slope_penalty

__all__ = ["gan_discriminator_loss", "gan_generator_loss", "sid_loss", "slope_penalty", "step_evaluations"]


def step_evaluations(objective, *, num_frames, frames_per_block, num_denoising_steps, critic_steps):
    """Forward 1, backward 2, in calls of a whole clip."""
    remembered = 1 - frames_per_block / num_frames  # every block but the last
    clip = 3 if objective == "causvid" else num_denoising_steps + remembered + 2
    scores = 1 + 2  # the critic, and the teacher with and without the prompt
    generator = {"sf_sid": scores + 2 * scores, "sf_gan": 1 + 3}.get(objective, scores)
    critic = 4 * 3 if objective == "sf_gan" else 3  # real, fake, and both moved a little
    return round((clip + generator + critic_steps * critic) * num_frames)
