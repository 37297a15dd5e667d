"""Solutions of lesson 8: the core itself, where it has the function."""

from dynamic_video_sf import dmd_loss, flow_matching_loss

__all__ = ["critic_loss", "diagnose", "dmd_loss", "gaussian_gap", "weighted_dmd_loss"]


def gaussian_gap(mean, t):
    """x_t is N((1 - t) mean, v) and N(0, v) with v = (1 - t)^2 + t^2; a guess goes by regression on x_t."""
    v = (1 - t) ** 2 + t**2
    return mean * t**2 / v, mean * (1 - t) ** 2 / v


def critic_loss(fake_score, scheduler, video, cond, *, t, noise):
    return flow_matching_loss(fake_score, scheduler, video.detach(), cond, t=t, noise=noise)


def diagnose(log):
    """From what nothing else can explain to what is left."""
    first, last = ({name: sum(values) / len(values) for name, values in part.items()} for part in ends(log))
    if last["generator_grad_norm"] == 0:
        return "no_gradient"
    if first["score_distance"] < 0.1 * first["normaliser"]:
        return "critic_on_data"  # it says what the teacher says, though the videos are bad
    if last["critic_loss"] > 1.5 * first["critic_loss"]:
        return "critic_frozen"
    if last["score_distance"] > first["score_distance"]:
        return "wrong_sign"
    return "healthy"


def ends(log, num_steps=10):
    """The beginning and the end of every column."""
    yield {name: values[:num_steps] for name, values in log.items()}
    yield {name: values[-num_steps:] for name, values in log.items()}


def weighted_dmd_loss(
    video, real_score, fake_score, scheduler, cond, uncond, guidance_scale, *,
    rng=None, t=None, noise=None, mask=None, observe=None,
):  # fmt: skip
    """More of the low noise levels, which the warp makes rare. The core gets the very same video, of which only so much
    of the gradient comes back."""
    if t is None:
        t = scheduler.sample_times(video.shape[0], rng).to(video.device)
    weight, fixed = 0.3 + 2.5 * (1 - t).reshape(-1, 1, 1, 1, 1), video.detach()
    options = {"rng": rng, "t": t, "noise": noise, "mask": mask, "observe": observe}
    same = fixed + weight * (video - fixed)
    return dmd_loss(same, real_score, fake_score, scheduler, cond, uncond, guidance_scale, **options)
