"""Exercises of lesson 8. README.md says what each wants; `make grade LESSON=8` says how far you are."""

from tutorial.grading import todo


def dmd_loss(
    video, real_score, fake_score, scheduler, cond, uncond, guidance_scale, *,
    rng=None, t=None, noise=None, mask=None, observe=None,
):  # fmt: skip
    """A loss whose gradient moves video [B, F, C, H, W] from the critic's guess towards the guided teacher's, and
    nothing else: a scalar. Its gradient by the video is (x0_fake - x0_real) / normaliser / N, N the number of entries
    that count; the normaliser is mean |video - x0_real| of each sample.

    real_score, fake_score: score(x_t, t, cond) -> flow. t: [B], by default scheduler.sample_times(B, rng); noise: like
    video, by default randn_like(video, rng). mask: bool [B, F], the frames that count, None for all.
    observe(t=, score_distance=[B], normaliser=[B]), if given, is called once; the distance is mean |x0_fake - x0_real|.
    """
    todo("make a loss whose gradient is the normalised difference of two guesses.")


def gaussian_gap(mean, t):
    """The student makes N(mean, 1), the teacher knows N(0, 1), both scores are exact. A video is a single number here;
    mean and t are floats or tensors of one shape.

    Returns (gap, slope) of that shape: x0_fake - x0_real at time t, which is the same wherever x_t is; and the
    derivative by `mean` of the KL divergence of the two distributions of x_t.
    """
    todo("write down both guesses and both distributions of x_t.")


def critic_loss(fake_score, scheduler, video, cond, *, t, noise):
    """What the critic minimises, given the student's video [B, F, C, H, W] as it comes out of the rollout, times t [B]
    and noise like video: a scalar."""
    todo("make the critic a diffusion model of what the student makes.")


def diagnose(log):
    """Which of worlds.FAULTS a run has: "healthy", "critic_frozen", "critic_on_data", "wrong_sign" or "no_gradient".

    log: "generator_loss", "generator_grad_norm", "score_distance", "normaliser", "critic_loss", "critic_grad_norm" ->
    one number per step, as in metrics.csv.
    """
    todo("name the fault from the log alone.")


def weighted_dmd_loss(
    video, real_score, fake_score, scheduler, cond, uncond, guidance_scale, *,
    rng=None, t=None, noise=None, mask=None, observe=None,
):  # fmt: skip
    """DMD with a weight of your own that depends on t, at least 0 and on average about 1; all else as in dmd_loss."""
    todo("choose how much each noise level counts.")
