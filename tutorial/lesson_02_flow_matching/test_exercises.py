"""Graders of lesson 2. `make grade LESSON=2`; each message says which idea is missing."""

import torch

from flow_match import FlowMatchScheduler
from randomness import generators


def test_the_steps_of_wan(warp):
    got = [round(float(warp(t, 5.0)), 4) for t in (1.0, 0.75, 0.5, 0.25)]
    assert got == [1.0, 0.9375, 0.8333, 0.625], (
        f"At shift 5 the levels 1, 0.75, 0.5, 0.25 become 1, 0.9375, 0.8333, 0.625; yours {got}. More noise, not less."
    )


def test_the_ends_stay(warp):
    got = [float(warp(t, shift)) for shift in (0.5, 3.0, 8.0) for t in (0.0, 1.0)]
    assert got == [0.0, 1.0] * 3, f"Clean stays clean and noise stays noise, whatever the shift; yours end at {got}."


def test_a_shift_of_one_changes_nothing(warp):
    t = torch.linspace(0, 1, 7)
    assert torch.allclose(torch.as_tensor(warp(t, 1.0)).double(), t.double()), "A shift of 1 leaves t where it is."


def test_odds_are_multiplied(warp):
    t = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    there = torch.as_tensor(warp(t, 3.0))
    assert torch.allclose(there / (1 - there), 3 * t / (1 - t)), (
        "The odds of noise against video, t / (1 - t), are multiplied by the shift: that is what it means."
    )
    assert torch.allclose(torch.as_tensor(warp(there, 1 / 3)), t), "A shift of 1/3 takes a shift of 3 back."


def pair(*shape, dtype=torch.float32):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()


def test_clean_noise_and_between(add_noise):
    x0, noise = pair(2, 3, 1, 4, 4)
    assert torch.allclose(add_noise(x0, noise, 0.0), x0), "At t = 0 there is no noise."
    assert torch.allclose(add_noise(x0, noise, 1.0), noise), "At t = 1 there is nothing but noise."
    got = add_noise(x0, noise, 0.25)
    assert torch.allclose(got, 0.75 * x0 + 0.25 * noise, atol=1e-6), (
        "At t = 0.25 it is 0.75 x0 + 0.25 noise: a straight line from video to noise. (The variance-preserving "
        "schedules of "
        "older diffusion models have square roots; rectified flow has none.)"
    )


def test_every_video_at_its_own_level(add_noise):
    x0, noise = pair(4, 4, 1, 4, 4)
    t = torch.tensor([0.0, 0.2, 0.7, 1.0])
    got = add_noise(x0, noise, t)
    right = torch.stack([(1 - s) * x + s * e for s, x, e in zip(t, x0, noise, strict=True)])
    assert torch.allclose(got, right, atol=1e-6), (
        "t [B] has a level for each video. Here frames, rows and columns are as many as videos, so a t that lines up "
        "with the "
        "wrong axis raises no error: reshape it to [B, 1, 1, 1, 1]."
    )


def test_every_frame_at_its_own_level(add_noise):
    x0, noise = pair(3, 4, 1, 4, 4)
    t = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))
    got = add_noise(x0, noise, t)
    s = t[:, :, None, None, None]
    assert torch.allclose(got, (1 - s) * x0 + s * noise, atol=1e-6), (
        "t [B, F] has a level for each frame: teacher and diffusion forcing need them (lesson 4)."
    )


def test_little_digits_survive(add_noise):
    x0, noise = pair(1, 2, 1, 8, 8, dtype=torch.bfloat16)
    got = add_noise(x0, noise, 0.007)
    assert got.dtype == torch.bfloat16, f"The result has the dtype of x0, bfloat16, not {got.dtype}."
    right = (0.993 * x0.float() + 0.007 * noise.float()).bfloat16()
    assert (got == right).float().mean() > 0.99, (
        "In bfloat16 the three terms lose whole digits (1 - 0.007 becomes 0.992). Compute in float32, then convert."
    )


def test_to_zero_it_is_the_guess(euler):
    x0, x_t = pair(2, 3, 1, 4, 4)
    got = euler(FlowMatchScheduler(), x0, x_t, 0.6, 0.0, torch.zeros_like(x0))
    assert torch.allclose(got, x0, atol=1e-5), (
        "A step to t = 0 ends at the guess of x0 itself, as the straight line through x_t and x0 does."
    )


def test_it_stays_on_the_line(euler):
    scheduler, (x0, eps) = FlowMatchScheduler(), pair(2, 3, 1, 4, 4)
    x_t = scheduler.add_noise(x0, eps, 0.8)
    got = euler(scheduler, x0, x_t, 0.8, 0.3, torch.zeros_like(x0))
    assert torch.allclose(got, scheduler.add_noise(x0, eps, 0.3), atol=1e-5), (
        "If x_t is 0.2 x0 + 0.8 noise, then at 0.3 there is 0.3 of the *same* noise: the step is t_next - t, which is "
        "negative, "
        "along noise - x0."
    )


def test_it_draws_nothing(euler):
    x0, x_t = pair(1, 2, 1, 4, 4)
    calls = [euler(FlowMatchScheduler(), x0, x_t, 0.8, 0.3, torch.full_like(x0, value)) for value in (0.0, 5.0)]
    assert torch.equal(*calls), (
        "The result depends on the fresh noise. An ODE has none; a sampler that replaces the noise is `renoise`."
    )


class Spoken:
    """A model whose flow is what cond says; counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x_t, t, cond):
        self.calls += 1
        return cond["flow"].expand_as(x_t)


def guided(guided_flow, scale, with_prompt=2.0, without=0.5):
    model, x = Spoken(), torch.zeros(1, 2, 1, 2, 2)
    cond, uncond = ({"flow": torch.tensor(value)} for value in (with_prompt, without))
    return guided_flow(model, x, 0.5, cond, uncond, scale).mean().item(), model.calls


def test_one_is_no_guidance_and_zero_no_prompt(guided_flow):
    got = [guided(guided_flow, scale)[0] for scale in (1.0, 0.0)]
    assert got == [2.0, 0.5], (
        "With the prompt the model says 2, without 0.5. A scale of 1 should give 2 and 0 should give 0.5; yours "
        f"{got}. "
        "(The reference's training code writes cond + s (cond - uncond): there 0 is no guidance, and its 3 is 4 here.)"
    )


def test_it_goes_beyond_the_prompt(guided_flow):
    got, _ = guided(guided_flow, 4.0)
    assert abs(got - 6.5) < 1e-5, (
        f"uncond + 4 (cond - uncond) = 0.5 + 4 x 1.5 = 6.5, yours {got:g}: what the prompt changes, four times."
    )


def test_no_guidance_costs_one_call(guided_flow):
    calls = [guided(guided_flow, scale)[1] for scale in (3.0, 1.0)]
    assert calls == [2, 1], (
        f"Guided, the network is called twice; with a scale of 1 once is enough; yours are called {calls} times. A "
        "student "
        "without guidance is twice as fast."
    )


class Knows(torch.nn.Module):
    """Predicts the right flow plus `off`, because it has been told video and noise; keeps what it was given."""

    def __init__(self, x0, noise, off=0.0):
        super().__init__()
        self.off, self.flow = torch.nn.Parameter(torch.tensor(off)), noise - x0

    def forward(self, x_t, t, cond):
        self.given = x_t, t, cond
        return self.flow + self.off


def test_the_right_flow_costs_nothing(flow_matching_loss):
    x0, noise = pair(3, 2, 1, 4, 4)
    loss = flow_matching_loss(Knows(x0, noise), FlowMatchScheduler(), x0, {}, t=torch.rand(3), noise=noise)
    assert loss.ndim == 0 and abs(loss.item()) < 1e-6, (
        f"A model that predicts noise - x0 should have no loss, yours is {loss.mean().item():.3g}. Mind the sign: "
        "Wan's flow points "
        "from video to noise."
    )


def test_it_is_the_mean_square(flow_matching_loss):
    x0, noise = pair(3, 2, 1, 4, 4)
    model = Knows(x0, noise, off=0.5)
    loss = flow_matching_loss(model, FlowMatchScheduler(), x0, {}, t=torch.tensor([0.1, 0.5, 0.9]), noise=noise)
    assert abs(loss.item() - 0.25) < 1e-5, (
        f"A flow that is 0.5 off everywhere costs 0.5^2 = 0.25 at every noise level, yours {loss.item():.3g}: a plain "
        "mean over all "
        "entries."
    )
    loss.backward()
    assert model.off.grad is not None and abs(model.off.grad.item() - 1) < 1e-4, "The gradient should reach the model."


def test_the_model_sees_x_t_its_level_and_the_prompt(flow_matching_loss):
    x0, noise = pair(3, 2, 1, 4, 4)
    model, t, cond = Knows(x0, noise), torch.tensor([0.1, 0.5, 0.9]), {"prompt": 1}
    flow_matching_loss(model, FlowMatchScheduler(), x0, cond, t=t, noise=noise)
    x_t, told, heard = model.given
    assert torch.allclose(x_t, FlowMatchScheduler().add_noise(x0, noise, t), atol=1e-6), (
        "The model should be shown x_t, at the very t that is given: only a t that you draw yourself is warped."
    )
    assert torch.allclose(told, t) and heard is cond, (
        "Tell the model the very t at which the video was noised, and the prompt. A t that is given is not warped "
        "again."
    )


def levels(flow_matching_loss, shift=5.0, samples=400):
    """The times that are drawn by default."""
    x0 = torch.zeros(samples, 1, 1, 1, 1)
    model = Knows(x0, x0)
    rng = generators(0, "grader", samples=range(samples))
    flow_matching_loss(model, FlowMatchScheduler(shift), x0, {}, rng=rng)
    return model.given[1].flatten()


def test_times_are_uniform_and_warped(flow_matching_loss):
    t = levels(flow_matching_loss)
    assert len(t.unique()) > 300, "Every sample has a noise level of its own."
    middle = t.median().item()
    assert abs(middle - 5 / 6) < 0.05, (
        f"Uniform and warped at shift 5, half of the times lie above 0.833; half of yours above {middle:.2f}."
    )


def test_all_chance_comes_from_rng(flow_matching_loss):
    x0, given = torch.zeros(3, 2, 1, 4, 4), []
    for _ in range(2):
        model = Knows(x0, x0)
        flow_matching_loss(model, FlowMatchScheduler(), x0, {}, rng=generators(0, "grader", samples=range(3)))
        given.append(model.given)
    (x_t, t, _), (x_again, t_again, _) = given
    assert torch.equal(t, t_again) and torch.equal(x_t, x_again), (
        "From the same rng, times or noise are others the second time: draw both from rng (randomness.rand and "
        "randn_like), or a resumed training differs from one that was never interrupted."
    )


def test_observe_hears_of_every_sample(flow_matching_loss):
    (x0, noise), heard = pair(3, 2, 1, 4, 4), {}
    options = {"t": torch.tensor([0.1, 0.5, 0.9]), "noise": noise, "parametrisation": "x0"}
    flow_matching_loss(Knows(x0, noise, off=0.5), FlowMatchScheduler(), x0, {}, observe=heard.update, **options)
    assert heard.keys() == {"t", "error"} and heard["error"].shape == (3,), (
        f"observe, if given, is called as observe(t=, error=) with one error per sample, [B]; yours heard {[*heard]}."
    )
    assert torch.allclose(heard["error"], 0.25 * options["t"] ** 2, atol=1e-5), (
        "A sample's error is the mean over its entries, weighed as in the loss: here 0.25 t^2."
    )


def test_other_quantities_weigh_otherwise(flow_matching_loss):
    x0, noise = pair(2, 2, 1, 4, 4)
    options = {"t": torch.tensor([0.5, 0.5]), "noise": noise, "parametrisation": "x0"}
    loss = flow_matching_loss(Knows(x0, noise, off=0.5), FlowMatchScheduler(), x0, {}, **options)
    assert abs(loss.item() - 0.25 * 0.25) < 1e-5, (
        f"Measured in x0, an error of the flow counts t^2 as much: 0.25 x 0.25 here, yours {loss.item():.3g}. See "
        "loss_weight."
    )


def test_frames_may_have_levels_of_their_own(flow_matching_loss):
    x0, noise = pair(3, 2, 1, 4, 4)
    options = {"t": torch.tensor([[0.2, 0.8]] * 3), "noise": noise, "parametrisation": "x0"}
    loss = flow_matching_loss(Knows(x0, noise, off=0.5), FlowMatchScheduler(), x0, {}, **options)
    assert abs(loss.item() - 0.25 * 0.34) < 1e-5, (
        "t [B, F]: each frame's error counts with its own weight, here 0.25 x (0.04 + 0.64) / 2 in all, yours "
        f"{loss.item():.3g}."
    )


CORNERS = torch.tensor([[-1.0, 0.6], [1.0, 0.6], [0.0, -1.1]])
SHARES = torch.tensor([0.5, 0.3, 0.2])


def asked(exact_flow, *given):
    """The answer in float32, whatever it was computed in."""
    return torch.as_tensor(exact_flow(*given)).float()


def test_one_gaussian(exact_flow):
    x = torch.tensor([[0.3, -0.8], [2.0, 1.0]])
    mean, t, s = CORNERS[:1], 0.6, 0.5
    x0 = mean + (1 - t) * s**2 / (((1 - t) * s) ** 2 + t**2) * (x - (1 - t) * mean)
    got = asked(exact_flow, x, t, mean, torch.ones(1), s)
    assert torch.allclose(got, (x - x0) / t, atol=1e-4), (
        "For a single Gaussian, x_t and x0 are jointly Gaussian: E[x0 | x_t] is its mean, corrected by how far x_t is "
        "from "
        "(1 - t) mean. The flow is (x_t - E[x0 | x_t]) / t."
    )


def test_two_points_are_told_apart_softly(exact_flow):
    means = torch.tensor([[-1.0], [1.0]])
    x, t = torch.linspace(-1, 1, 9)[:, None], 0.7
    x0 = torch.tanh((1 - t) * x / t**2)
    got = asked(exact_flow, x, t, means, torch.tensor([0.5, 0.5]), 1e-4)
    assert torch.allclose(x - t * got, x0, atol=1e-3), (
        "Between two points -1 and 1 the best guess is tanh((1 - t) x / t^2): each mean counts by how likely it made "
        "this x_t. "
        "Neither the nearer one alone, nor both by their shares."
    )


def test_from_pure_noise_it_is_the_mean_of_all(exact_flow):
    x = torch.tensor([[0.4, -2.0], [1.5, 0.1]])
    got = x - asked(exact_flow, x, 1.0, CORNERS, SHARES, 0.15)
    right = (SHARES[:, None] * CORNERS).sum(0).expand(2, -1)
    assert torch.allclose(got, right, atol=1e-4), (
        f"At t = 1 nothing is known of x0, so the guess is the mean of the data, {right[0].tolist()}, wherever x is; "
        "yours "
        f"{got[0].tolist()}."
    )


def test_no_other_flow_has_a_smaller_loss(exact_flow):
    rng, t, std = torch.Generator().manual_seed(0), 0.6, 0.3
    chosen = torch.multinomial(SHARES, 40_000, replacement=True, generator=rng)
    x0 = CORNERS[chosen] + std * torch.randn(40_000, 2, generator=rng)
    noise = torch.randn(40_000, 2, generator=rng)
    x_t = (1 - t) * x0 + t * noise
    left = noise - x0 - asked(exact_flow, x_t, t, CORNERS, SHARES, std)
    hints = torch.stack([torch.ones(40_000), x_t[:, 0], x_t[:, 1], x_t[:, 0] * x_t[:, 1], (3 * x_t[:, 0]).sin()])
    correlation = (hints @ left / 40_000).abs().max().item()
    assert correlation < 0.04, (
        f"What is left of noise - x0 can still be foretold from x_t (correlation {correlation:.2f}), so another flow "
        "would have "
        "a smaller loss. The minimum of a squared error is the conditional mean."
    )
