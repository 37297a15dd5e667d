"""Graders of lesson 8. `make grade LESSON=8`; each message says which idea is missing."""

import torch
from torch.distributions import Normal, kl_divergence

from dynamic_video_sf import dmd_loss as core
from experiments.gaussian_mixture import Mixture, judge
from flow_match import FlowMatchScheduler
from randomness import generator, randn, randn_like
from tutorial.lesson_08_dmd.worlds import FAULTS, SCHEDULER, TARGET, crowded, exact_critic, log_of, move_points
from tutorial.scores import COND, TIMES, UNCOND, Sees, draw, the_video, wide


def noised(video):
    return (1 - wide(TIMES)) * video.detach() + wide(TIMES) * draw("noise")


def slope_of(value, x):
    """The gradient of a loss by x: zero where the loss, or x in it, has none."""
    reached = torch.is_tensor(value) and value.requires_grad
    (gradient,) = torch.autograd.grad(value, x, allow_unused=True) if reached else (None,)
    return torch.zeros_like(x) if gradient is None else gradient


def pull(loss, video, real=None, fake=None, guidance_scale=3.0, **options):
    """The gradient of the loss by the video, times the number of its entries."""
    given = {"t": TIMES, "noise": draw("noise")} | options
    scores = real or Sees(0.7), fake or Sees(0.4)
    gradient = slope_of(loss(video, *scores, FlowMatchScheduler(), COND, UNCOND, guidance_scale, **given), video)
    assert gradient.any(), (
        "No gradient reaches the video. Only the scores are asked under no_grad; and in half a squared distance to "
        "`video - gradient` that target must be held fixed (detached), or the video cancels against itself."
    )
    return gradient * video.numel()


def test_it_moves_the_video_towards_the_teachers_guess(dmd_loss):
    video = the_video()
    gradient = pull(dmd_loss, video, guidance_scale=1.0)
    towards = (0.7 - 0.4) * noised(video)  # from the critic's guess to the teacher's
    assert (gradient * towards).sum() < 0, (
        "Gradient descent subtracts the gradient: it must be critic minus teacher, so that the video goes towards the "
        "teacher's guess. Yours drives it away."
    )


def test_the_gradient_is_its_closed_form(dmd_loss):
    video = the_video()
    gradient, x_t = pull(dmd_loss, video, guidance_scale=1.0), noised(video)
    real = 0.7 * x_t + COND["shift"]
    norm = (video.detach() - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    right = (0.4 - 0.7) * x_t / norm
    assert torch.allclose(gradient, right, atol=1e-4, rtol=1e-3), (
        "For each sample it should be (x0_fake - x0_real) / mean|video - x0_real|, divided by the number of all "
        "entries; both guesses are made from the same noised video, the mean is over frames and pixels of one sample."
    )


def test_a_sample_is_normalised_by_itself(dmd_loss):
    def first_sample(others):
        video = the_video().detach()
        video[1:] *= others
        return pull(dmd_loss, video.requires_grad_(), guidance_scale=1.0)[0]

    assert torch.allclose(first_sample(1.0), first_sample(100.0), atol=1e-4, rtol=1e-3), (
        "The gradient of one sample depends on how bad the others are: the normaliser must be a mean per sample, not "
        "over the batch."
    )


def test_the_teacher_is_guided_and_the_critic_is_not(dmd_loss):
    fake, teacher = Sees(0.4), Sees(0.7)
    exaggerated = {"shift": UNCOND["shift"] + 3 * (COND["shift"] - UNCOND["shift"])}
    guided = pull(dmd_loss, the_video(), teacher, fake, guidance_scale=3.0)
    assert all(cond is COND for _, _, cond in fake.asked), (
        "The critic was asked without the prompt. Guidance belongs to the teacher alone."
    )
    right = pull(dmd_loss, the_video(), lambda x_t, t, cond: teacher(x_t, t, exaggerated), fake, guidance_scale=1.0)
    assert torch.allclose(guided, right, atol=1e-4, rtol=1e-3), (
        "Guidance is uncond + w (cond - uncond): w = 1 is none. `Guided(real_score, uncond, guidance_scale)` does it."
    )


def test_nothing_else_gets_a_gradient(dmd_loss):
    real, fake, video = Sees(0.7), Sees(0.4), the_video()
    options = {"t": TIMES, "noise": draw("noise")}
    dmd_loss(video, real, fake, FlowMatchScheduler(), COND, UNCOND, 3.0, **options).backward()
    assert real.gain.grad is None and fake.gain.grad is None, (
        "Teacher or critic got a gradient. DMD uses what they say as it is: ask them under torch.no_grad()."
    )
    assert not any(x_t.requires_grad for x_t, _, _ in real.asked + fake.asked), (
        "The scores were asked with a graph behind x_t: that costs their activations and gives a gradient that is not "
        "DMD's. Ask them under torch.no_grad()."
    )


def test_no_pull_where_teacher_and_critic_agree(dmd_loss):
    video = the_video()
    options = {"t": TIMES, "noise": draw("noise")}
    loss = dmd_loss(video, Sees(0.7), Sees(0.7), FlowMatchScheduler(), COND, UNCOND, 1.0, **options)
    assert slope_of(loss, video).abs().max() < 1e-6, (
        "Where both see the same clean video, nothing should move: the gradient is the difference of their guesses."
    )


def test_times_and_noise_are_drawn_from_rng(dmd_loss):
    scheduler, rng = FlowMatchScheduler(), generator(0, "loss")
    t = scheduler.sample_times(3, rng)
    noise = randn_like(the_video(), rng)
    given, drawn = (
        pull(dmd_loss, the_video(), **options)
        for options in ({"t": t, "noise": noise}, {"t": None, "noise": None, "rng": generator(0, "loss")})
    )
    assert torch.allclose(given, drawn, atol=1e-5), (
        "Without t and noise, draw first scheduler.sample_times(batch, rng), then randn_like(video, rng)."
    )


def test_masked_frames_stay(dmd_loss):
    mask = torch.tensor([[True, False, True, True]] * 3)
    gradient = pull(dmd_loss, the_video(), mask=mask)
    assert not gradient[:, 1].any() and gradient[:, 0].any(), (
        "mask [B, F] names the frames that count: where it is False there should be no gradient."
    )
    whole = pull(dmd_loss, the_video())
    assert torch.allclose(gradient[:, 0], whole[:, 0] * 4 / 3, atol=1e-5, rtol=1e-3), (
        "Three frames of four count: take the mean over their entries, not over all."
    )


def test_observe_is_told(dmd_loss):
    seen = []
    pull(dmd_loss, the_video(), observe=lambda **values: seen.append(values))
    assert seen and {"score_distance", "normaliser"} <= seen[0].keys() and seen[0]["score_distance"].shape == (3,), (
        "Call observe(t=, score_distance=, normaliser=) with a number per sample: it is what one watches in training."
    )


def test_the_gap_is_what_the_guesses_say(gaussian_gap):
    mean, t = torch.tensor([3.0, -1.0, 2.0]), TIMES
    gap = torch.as_tensor(gaussian_gap(mean, t)[0]).float()
    for i in range(3):
        x_t = torch.linspace(-4, 4, 5).view(5, 1, 1, 1, 1)
        student, teacher = (Mixture([[m]], [1.0], 1.0) for m in (mean[i].item(), 0.0))
        guesses = [x_t - t[i] * score(x_t, t[i], {}) for score in (student, teacher)]
        right = (guesses[0] - guesses[1]).flatten()
        assert torch.allclose(gap[i].expand(5), right, atol=1e-4), (
            f"At mean {mean[i]:g} and t = {t[i]:.1f} the guesses of the exact scores differ by {right[0]:.3f}, yours "
            f"by {gap[i]:.3f}. A guess is E[x0 | x_t] = mean + (1 - t) / v (x_t - (1 - t) mean); the gap is the "
            "student's minus the teacher's."
        )


def test_the_slope_is_that_of_the_divergence(gaussian_gap):
    mean, t = torch.tensor([3.0, -1.0, 2.0], requires_grad=True), TIMES
    std = ((1 - t) ** 2 + t**2).sqrt()
    divergence = kl_divergence(Normal((1 - t) * mean, std), Normal(torch.zeros(3), std))
    (right,) = torch.autograd.grad(divergence.sum(), mean)
    slope = torch.as_tensor(gaussian_gap(mean.detach(), t)[1]).float()
    assert torch.allclose(slope, right, atol=1e-4), (
        f"The slope of KL(N((1 - t) mean, v) || N(0, v)) is {[round(x, 3) for x in right.tolist()]}, yours "
        f"{[round(x, 3) for x in slope.tolist()]}. Both have the same variance v = (1 - t)^2 + t^2; the divergence is "
        "half the squared distance of the means over v. Its derivative is by `mean`, not by (1 - t) mean."
    )


def test_both_say_the_same_up_to_a_weight(gaussian_gap):
    mean, t = torch.full((3,), 2.0), TIMES
    gap, slope = map(torch.as_tensor, gaussian_gap(mean, t))
    assert torch.allclose(slope, ((1 - t) / t) ** 2 * gap, atol=1e-4), (
        "Slope and gap should differ by the factor ((1 - t) / t)^2: that is why a difference of guesses is a gradient "
        "of the divergence, up to a weight of the noise level."
    )


def test_its_value_is_flow_matching(critic_loss):
    video, noise, critic = the_video().detach(), draw("noise"), Sees(0.4)
    loss = torch.as_tensor(critic_loss(critic, SCHEDULER, video, COND, t=TIMES, noise=noise)).float()
    x_t = noised(video)
    right = ((0.6 * x_t - COND["shift"]) / wide(TIMES) - (noise - video)).square().mean()
    assert torch.allclose(loss, right, rtol=1e-4), (
        "It should be the mean squared distance of the critic's flow, at the noised video, to noise - video."
    )


def test_it_trains_the_critic_and_not_the_student(critic_loss):
    video, critic = the_video(), Sees(0.4)
    critic_loss(critic, SCHEDULER, video, COND, t=TIMES, noise=draw("noise")).backward()
    assert critic.gain.grad is not None and critic.gain.grad != 0, "No gradient reaches the critic."
    assert video.grad is None, (
        "The critic's loss also pulls at the student: it would learn videos that are easy for the critic. Detach them."
    )


def test_its_minimum_believes_in_the_students_videos(critic_loss):
    video = 2 + randn((4000, 1, 1, 1, 1), generator(0, "student"))
    best, worst = (Mixture([[mean]], [1.0], 1.0) for mean in (2.0, 0.0))
    options = {"t": torch.full((4000,), 0.6), "noise": randn_like(video, generator(0, "n"))}
    losses = [critic_loss(score, SCHEDULER, video, {}, **options) for score in (best, worst)]
    assert losses[0] < losses[1], (
        "A critic that knows where the student's videos are should have a smaller loss than one that knows the "
        "teacher's: is the target's sign right?"
    )


def diagnosed(diagnose, fault):
    for seed in (11, 12):
        got = diagnose(log_of(fault, seed))
        assert got in FAULTS, f"diagnose should return one of {', '.join(FAULTS)}, not {got!r}."
        yield got


def test_it_leaves_a_healthy_run_alone(diagnose):
    assert {*diagnosed(diagnose, "healthy")} == {"healthy"}, (
        "It names a fault in a healthy run. There the critic follows, the distance of the scores shrinks with the "
        "student's error, and the value of the generator's loss says nothing at all."
    )


def test_it_sees_a_critic_that_stands_still(diagnose):
    assert {*diagnosed(diagnose, "critic_frozen")} == {"critic_frozen"}, (
        "A frozen critic was not seen. The student leaves the videos that the critic knows: its error grows, step by "
        "step, which nothing else here does."
    )


def test_it_sees_a_critic_of_the_wrong_videos(diagnose):
    assert {*diagnosed(diagnose, "critic_on_data")} == {"critic_on_data"}, (
        "A critic on the teacher's videos was not seen. Its loss is fine, and it agrees with the teacher from the "
        "first step: hardly any score distance, while the normaliser says that the videos are bad."
    )


def test_it_sees_a_wrong_sign(diagnose):
    assert {*diagnosed(diagnose, "wrong_sign")} == {"wrong_sign"}, (
        "A wrong sign was not seen. The critic follows the student well, but the distance of the scores only grows."
    )


def test_it_sees_that_nothing_moves(diagnose):
    assert {*diagnosed(diagnose, "no_gradient")} == {"no_gradient"}, (
        "A target that was not detached was not seen. The loss has a value, the scores differ, the gradient is zero."
    )


def pulls(loss, t):
    """The gradient of a loss and that of the core's, for points at one time."""
    videos = draw("points", (64, 1, 1, 1, 2))
    scores = TARGET, exact_critic(videos.flatten(1))
    options = {"t": torch.full((64,), t), "noise": draw("their noise", (64, 1, 1, 1, 2))}
    for one in (loss, core):
        x = videos.clone().requires_grad_()
        yield slope_of(one(x, *scores, SCHEDULER, {}, {}, 1.0, **options), x) * x.numel()


def weights(loss):
    """Own gradient, measured along the core's, over the times that are drawn."""
    times = SCHEDULER.sample_times(40, generator(0, "times")).tolist()
    for t in times:
        own, right = pulls(loss, t)
        weight = ((own * right).sum() / right.square().sum()).item()
        yield t, weight, (own - weight * right).norm() / right.norm()


def test_it_goes_where_dmd_goes(weighted_dmd_loss):
    found = list(weights(weighted_dmd_loss))
    assert max(rest for _, _, rest in found) < 1e-2, (
        "At one time, your gradient should be DMD's times one number: a weight changes how far, not where to."
    )
    assert min(weight for _, weight, _ in found) > -1e-4, "A negative weight drives the video away from the teacher."


def test_the_weight_depends_on_the_time_and_is_about_one(weighted_dmd_loss):
    found = [weight for _, weight, _ in weights(weighted_dmd_loss)]
    spread, mean = max(found) - min(found), sum(found) / len(found)
    assert spread > 0.1, "The weight is the same at all times: this is the core's loss. Choose one that depends on t."
    assert 0.5 < mean < 2, (
        f"On average over the times that are drawn your weight is {mean:.2g}. Scale it to about 1, so that the "
        "learning rate means what it meant."
    )


def test_masks_go_on_working(weighted_dmd_loss):
    mask = torch.tensor([[True, False, True, True]] * 3)
    gradient = pull(weighted_dmd_loss, the_video(), mask=mask)
    assert not gradient[:, 1].any() and gradient[:, 0].any(), "The mask of the caller is to be kept, too."


def test_it_brings_points_to_their_shares(weighted_dmd_loss):
    *_, (points, _) = move_points(crowded(250), weighted_dmd_loss)
    found = judge(points, TARGET)
    assert found["on_target"] > 0.85, (
        f"{found['on_target']:.0%} of the points end near one of the four means; it should be nearly all. The low "
        "noise levels, which know the details, count too little, or all of them too much."
    )
    assert found["share_error"] < 0.12, (
        f"The shares of the four means are off by {found['share_error']:.2f}. Only the high noise levels see from one "
        "mean to the next: they count too little."
    )
