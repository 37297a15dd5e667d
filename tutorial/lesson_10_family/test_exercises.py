"""Graders of lesson 10. `make grade LESSON=10`; each message says which idea is missing."""

import torch
from torch import nn

from discriminator import Discriminator
from dynamic_video_sf import (
    RolloutConfig,
    SelfForcingConfig,
    data_past_rollout,
    gan_step,
    one_call_video,
    self_forcing_step,
)
from dynamic_video_sf import sid_loss as core_sid_loss
from flow_match import FlowMatchScheduler
from randomness import generator, generators, randn
from run_folder import Evaluations
from tiny_causal_wan import TinyCausalWanModel, WanConfig
from tutorial.scores import COND, TIMES, UNCOND, Sees, draw, the_video, wide

SCHEDULER = FlowMatchScheduler()


def sid(loss, video, real=None, fake=None, guidance_scale=1.0, **options):
    scores = real or Sees(0.7), fake or Sees(0.4)
    given = {"t": TIMES, "noise": draw("noise")} | options
    return loss(video, *scores, SCHEDULER, COND, UNCOND, guidance_scale, **given)


def by_hand(video, guidance_scale=1.0, alpha=1.0, a=0.7, b=0.4):
    """The formula, with the normaliser held fixed."""
    x_t = (1 - wide(TIMES)) * video + wide(TIMES) * draw("noise")
    shift = UNCOND["shift"] + guidance_scale * (COND["shift"] - UNCOND["shift"])
    real, fake = a * x_t + shift, b * x_t + COND["shift"]
    norm = (video - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True).detach()
    return ((real - fake) * ((real - video) - alpha * (real - fake)) / norm).mean()


def near(got, right, **tolerance):
    """Whether an answer is the right number, in whatever floating type it comes."""
    return torch.allclose(torch.as_tensor(got).double(), right.double(), **tolerance)


def test_its_value_is_the_formula(sid_loss):
    video = the_video()
    for alpha in (0.5, 1.0):
        assert near(sid(sid_loss, video, alpha=alpha), by_hand(video, alpha=alpha), rtol=1e-3), (
            f"With alpha = {alpha} the value is not that of the formula: check the two differences, what alpha "
            "multiplies, and that the normaliser is a mean per sample."
        )


def test_alpha_is_one_unless_said_otherwise(sid_loss):
    video = the_video()
    one, default = sid(sid_loss, video, alpha=1.0), torch.as_tensor(sid(sid_loss, video))
    assert near(one, default, rtol=1e-3), "By default alpha is 1."


def test_the_gradient_also_flows_through_both_scores(sid_loss):
    video = the_video()
    (gradient,) = torch.autograd.grad(sid(sid_loss, video), video, allow_unused=True)
    (right,) = torch.autograd.grad(by_hand(video), video)
    assert gradient is not None and torch.allclose(gradient, right, atol=1e-5, rtol=1e-3), (
        "The video gets another gradient than that of the formula. In SiD the video counts three times: as it is, "
        "inside of the teacher's guess and inside of the critic's. Only the normaliser is held fixed: no no_grad, no "
        "detach anywhere else."
    )


def test_the_critic_gets_a_gradient_too(sid_loss):
    fake = Sees(0.4)
    sid(sid_loss, the_video(), fake=fake).backward()
    assert fake.gain.grad is not None and fake.gain.grad != 0, (
        "The loss should reach the critic's parameters: it is differentiated through the critic. (That is why the "
        "critic's gradients are cleared before its own update.)"
    )


def test_the_teacher_is_guided(sid_loss):
    video = the_video()
    assert near(sid(sid_loss, video, guidance_scale=4.0), by_hand(video, 4.0), rtol=1e-3), (
        "The teacher's guess is uncond + w (cond - uncond), as in DMD; the critic's is plain."
    )


def test_nothing_to_do_where_both_agree(sid_loss):
    video = the_video()
    loss = sid(sid_loss, video, Sees(0.7), Sees(0.7))
    (gradient,) = torch.autograd.grad(loss, video)
    assert loss.abs() < 1e-6 and gradient.abs().max() < 1e-6, (
        "Where both scores agree, real - fake is zero and so are loss and gradient."
    )


def test_masked_frames_do_not_count(sid_loss):
    mask = torch.tensor([[True, False, True, True]] * 3)
    video = the_video()
    (gradient,) = torch.autograd.grad(sid(sid_loss, video, mask=mask), video)
    assert not gradient[:, 1].any() and gradient[:, 0].any(), (
        "mask [B, F] names the frames that count: where it is False there should be no gradient."
    )


def test_it_draws_what_it_is_not_given(sid_loss):
    video = the_video()
    given = (video, Sees(0.7), Sees(0.4), SCHEDULER, COND, UNCOND, 1.0)
    loss, again = (sid_loss(*given, rng=generators(0, "sid", samples=range(len(video)))) for _ in range(2))
    assert torch.as_tensor(loss).isfinite() and torch.equal(torch.as_tensor(loss), torch.as_tensor(again)), (
        "Without t and noise, as in training, it should draw both from rng."
    )


LOGITS = torch.tensor([2.0, -1.0, 0.5])
OTHERS = torch.tensor([-0.5, 1.5, 0.0])


def test_it_is_minus_log_of_the_probability_of_real(gan_generator_loss):
    right = -torch.sigmoid(LOGITS).log().mean()
    got = gan_generator_loss(LOGITS)
    assert near(got, right, atol=1e-5), (
        f"It should be the mean of -log sigmoid(D(fake)), here {right:.3f}; yours is {got:.3f}. The sigmoid is the "
        "probability that the student's clip is taken for real. softplus(-x) is the stable way to write it."
    )


def test_it_still_pulls_where_the_discriminator_is_sure(gan_generator_loss):
    logits = torch.tensor([-20.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(gan_generator_loss(logits), logits)
    assert gradient.item() < -0.9, (
        "At a logit of -20 hardly any gradient is left: that is the saturating loss, log(1 - sigmoid(D)). Maximise the "
        "probability of real instead of minimising that of fake."
    )


def test_a_relativistic_generator_wants_to_beat_its_partner(gan_generator_loss):
    right = -torch.sigmoid(LOGITS - OTHERS).log().mean()
    got = gan_generator_loss(LOGITS, OTHERS)
    assert near(got, right, atol=1e-5), (
        f"With real logits it should be the mean of -log sigmoid(D(fake) - D(real)), pair by pair, here {right:.3f}; "
        f"yours is {got:.3f}."
    )


def test_both_probabilities_count(gan_discriminator_loss):
    right = -(torch.sigmoid(LOGITS).log() + torch.sigmoid(-OTHERS).log()).mean()
    got = gan_discriminator_loss(LOGITS, OTHERS)
    assert near(got, right, atol=1e-5), (
        f"It should be -log sigmoid(D(real)) - log sigmoid(-D(fake)), each a mean, here {right:.3f}; yours is "
        f"{got:.3f}."
    )


def test_a_relativistic_judge_compares_pairs(gan_discriminator_loss):
    right = -torch.sigmoid(LOGITS - OTHERS).log().mean()
    got = gan_discriminator_loss(LOGITS, OTHERS, relativistic=True)
    assert near(got, right, atol=1e-5), (
        "Relativistic: the real clip of each pair should look more real than its fake, "
        f"-log sigmoid(D(real) - D(fake)), here {right:.3f}; yours is {got:.3f}."
    )


def test_a_relativistic_judge_has_no_zero_of_its_own(gan_discriminator_loss):
    losses = [gan_discriminator_loss(LOGITS + shift, OTHERS + shift, relativistic=True) for shift in (0.0, 7.0)]
    assert near(*losses, atol=1e-5), (
        "Adding the same number to all logits changes the relativistic loss: only differences should count."
    )


WEIGHT = torch.tensor([1.0, -2.0, 0.5, 3.0])


def straight(x):
    """D(x) = w x, whose gradient is w everywhere."""
    return x.flatten(1) @ WEIGHT.to(x)


def slope(penalty, sigma, judge=straight, count=20000):
    x = draw("clips", (count, 1, 1, 2, 2))
    return penalty(judge, x, judge(x), sigma, generator(1, "slope"))


def test_a_straight_judge_has_the_squared_length_of_its_weight(slope_penalty):
    right = WEIGHT.square().sum().item()
    got = slope(slope_penalty, 0.1).item()
    assert abs(got / right - 1) < 0.1, (
        f"For D(x) = w x the gradient is w everywhere, so the penalty is |w|^2 = {right:g}; yours is {got:.3g}. Move x "
        "by sigma times standard normal noise, and take the mean over clips of the squared difference quotient."
    )


def test_sigma_does_not_matter_to_a_straight_judge(slope_penalty):
    right = WEIGHT.square().sum().item()
    for sigma in (0.01, 1.0):
        got = slope(slope_penalty, sigma).item()
        assert abs(got / right - 1) < 0.1, (
            f"At sigma {sigma:g} it is {got:.3g} instead of {right:g}: a difference quotient is divided by the "
            "distance, before it is squared."
        )


def test_it_can_be_minimised(slope_penalty):
    judge = nn.Linear(4, 1)
    loss = slope(slope_penalty, 0.1, lambda x: judge(x.flatten(1))[:, 0], count=500)
    assert loss.requires_grad, "The penalty has no gradient: it is meant to make the discriminator flatter."
    loss.backward()
    towards = (judge.weight.grad * judge.weight).sum()
    assert towards > 0, "Descending on the penalty should make the weights of a straight judge smaller."


def test_a_curved_judge_is_measured_where_it_is(slope_penalty):
    x = 2 + 0.1 * draw("near two", (20000, 1, 1, 1, 1))

    def judge(x):
        return 0.5 * x.flatten(1).square()[:, 0]

    got, right = slope_penalty(judge, x, judge(x), 0.05, generator(2, "slope")).item(), x.square().mean().item()
    assert abs(got / right - 1) < 0.1, (
        f"D(x) = x^2 / 2 has the slope x, so near x = 2 the penalty should be about {right:.2f}, yours is {got:.2f}."
    )


def counted(objective, *, num_frames, frames_per_block, num_denoising_steps, critic_steps):
    """A real step of tiny networks, with a hook that counts."""
    torch.manual_seed(0)
    sizes = WanConfig(dim=24, ffn_dim=24, num_heads=2, num_layers=1, patch_size=(1, 4, 4), text_dim=8, text_len=4)
    student, teacher, critic = (TinyCausalWanModel(sizes) for _ in range(3))
    teacher.requires_grad_(False)
    if objective == "sf_gan":
        critic = Discriminator(critic)
    steps = tuple(1000 * (1 - i / num_denoising_steps) for i in range(num_denoising_steps))
    lengths = {name: num_frames for name in ("gradient_frames", "min_num_frames", "max_num_frames")}
    options = {"critic_steps": critic_steps, "exit_rule": "last", "fresh_rollouts": False}
    config = SelfForcingConfig(RolloutConfig(steps, frames_per_block), 2.0, **options, **lengths)
    noise, data = randn((2, 1, num_frames, 1, 4, 4), generator(0, "clips")).unbind()
    cond, uncond = ({"prompt_embeds": draw(name, (1, 4, 8))} for name in ("cond", "uncond"))
    evaluations = Evaluations([student, teacher, critic])
    special = {
        "sf_sid": {"loss": core_sid_loss},
        "tf_dmd": {"student_video": data_past_rollout},
        "causvid": {"student_video": one_call_video},
    }.get(objective, {})
    step = gan_step if objective == "sf_gan" else self_forcing_step
    randomness = {"rng": generators(0, "step", samples=[0]), "shared_rng": generator(0, "shared")}
    given = {"data": data} | randomness | special
    for _, loss in step(student, teacher, critic, SCHEDULER, noise, cond, uncond, config, **given):
        loss.backward()
    return evaluations.take()


SMALL = {"num_frames": 6, "frames_per_block": 3, "num_denoising_steps": 4, "critic_steps": 3}
OTHER = {"num_frames": 8, "frames_per_block": 2, "num_denoising_steps": 2, "critic_steps": 5}


def compare(step_evaluations, objective, hint):
    for sizes in (SMALL, OTHER):
        got = step_evaluations(objective, **sizes)
        right = counted(objective, **sizes)
        assert got == right, f"{objective} with {sizes}: a hook counts {right:g} per clip, you say {got}. {hint}"


def test_self_forcing_with_dmd(step_evaluations):
    hint = (
        "The rollout: every denoising step, a memory pass for every block but the last, 2 more for the exits. The "
        "loss: critic once, guided teacher twice, no gradient. Each critic update: one call with gradient."
    )
    compare(step_evaluations, "sf_dmd", hint)
    compare(step_evaluations, "tf_dmd", "It remembers data instead of its own blocks, by as many calls.")


def test_sid(step_evaluations):
    compare(step_evaluations, "sf_sid", "Like DMD, and back through all three calls of the scores.")


def test_gan(step_evaluations):
    hint = (
        "No teacher. For the generator the discriminator reads the data (no gradient) and the student's clip (with); "
        "in each update of its own it reads both, and both moved a little for R1 and R2, all with gradient."
    )
    compare(step_evaluations, "sf_gan", hint)


def test_causvid(step_evaluations):
    compare(step_evaluations, "causvid", "No rollout and no memory: one call with gradient makes the clip.")
