"""Exercises of lesson 10. README.md says what each wants; `make grade LESSON=10` says how far you are."""

from tutorial.grading import todo


def sid_loss(
    video, real_score, fake_score, scheduler, cond, uncond, guidance_scale, *,
    alpha=1.0, rng=None, t=None, noise=None, mask=None, observe=None,
):  # fmt: skip
    """Score identity distillation of video [B, F, C, H, W]: a scalar,

        mean [(real - fake) ((real - video) - alpha (real - fake))] / mean |video - real|

    with the guesses `real` (guided) and `fake` at the same noised video. All but the normaliser is differentiated.
    t, noise, mask and observe: as in dmd_loss;
    without them t is scheduler.sample_times(B, rng) and the noise randomness.randn_like(video, rng).
    """
    todo("write SiD next to DMD: who gets a gradient?")


def gan_generator_loss(fake_logits, real_logits=None):
    """Non-saturating loss of the generator, of logits [B]: a scalar; with real_logits, relativistic."""
    todo("make the generator's videos look real to the discriminator.")


def gan_discriminator_loss(real_logits, fake_logits, relativistic=False):
    """Logistic loss of the discriminator, of logits [B]: a scalar; relativistic: of each real one against its fake."""
    todo("make the discriminator tell real from fake.")


def slope_penalty(discriminator, x, logits, sigma, rng=None):
    """How steep the discriminator is at x, without second derivatives: the mean over clips of the squared length of its
    gradient, from one more call near by. discriminator(x) -> logits [B]; logits: those at x. The step
    there: sigma * randomness.randn_like(x, rng). A scalar."""
    todo("measure a slope from two values.")


def step_evaluations(objective, *, num_frames, frames_per_block, num_denoising_steps, critic_steps):
    """What one training step costs for one clip, in network evaluations: a frame of a forward call counts 1, of a
    call that is differentiated 2 more.

    objective: "sf_dmd", "tf_dmd", "sf_sid", "sf_gan" or "causvid". The exit is always the last denoising step, the
    whole clip is scored, the teacher is guided, critic updates share the generator's clip, R1 and R2 are both on.
    """
    todo("go through the step with a pencil.")
