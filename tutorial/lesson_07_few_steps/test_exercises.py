"""Graders of lesson 7. `make grade LESSON=7`; each message says which idea is missing."""

import math

import torch
from torch import nn

from dynamic_video_sf import RolloutConfig
from flow_match import FlowMatchScheduler
from randomness import generator

SCHEDULER = FlowMatchScheduler(5.0)

# --------------------------------------------------------------------------------------------------- smallest_grid


def test_four_equal_steps(smallest_grid):
    got = smallest_grid((1000, 750, 500, 250))
    assert got == 4, f"1000, 750, 500, 250 are themselves a grid of four steps; yours says {got}."


def test_every_step_counts(smallest_grid):
    got = smallest_grid((1000, 500, 200))
    assert got == 10, (
        f"500 needs an even number of steps and 200 a multiple of 5: the smallest is 10, yours {got}. It is the least "
        "common multiple of what the steps need."
    )
    got = smallest_grid((1000, 937.5))
    assert got == 16, f"937.5 is 15/16 of 1000, so it takes 16 steps; yours says {got}. A step need not be whole."


def test_at_least_so_many(smallest_grid):
    got = smallest_grid((1000, 750, 500, 250), at_least=50)
    assert got == 52, (
        f"A teacher of 50 steps misses 750: 50 * 0.75 is no whole number. The next that works is 52; yours says {got}."
    )
    assert smallest_grid((1000, 750, 500, 250), at_least=48) == 48, "48 steps hold all four, so 48 is enough."


def test_the_clean_end_needs_no_step(smallest_grid):
    got = smallest_grid((1000, 500, 0))
    assert got == 2, f"0 is the end of every grid: it asks for nothing, so two steps will do; yours says {got}."


# ------------------------------------------------------------------------------------------------ conditional_mean


def test_zero_noise_decides_nothing(conditional_mean):
    got = float(conditional_mean(torch.zeros(1))[0])
    assert abs(got) < 1e-6, (
        f"Where the first noise is 0, the second decides, half of the time either way: the mean is 0, yours {got:.3f}."
    )


def test_a_large_noise_decides_alone(conditional_mean):
    got = torch.as_tensor(conditional_mean(torch.tensor([-8.0, 8.0]))).tolist()
    assert abs(got[0] + 1) < 1e-4 and abs(got[1] - 1) < 1e-4, (
        f"Where the first noise is -8 or 8 the second cannot turn the sum: -1 and 1, yours {got}."
    )


def test_it_averages_over_what_is_not_seen(conditional_mean):
    first = torch.tensor([-1.5, -0.3, 0.4, 1.0])
    second = torch.randn(200_000, 1, generator=generator(0, "second"))
    right = (first + second).sign().mean(0)
    got = torch.as_tensor(conditional_mean(first)).float()
    assert torch.allclose(got, right, atol=0.01), (
        f"Averaged over 200,000 second noises the teacher's answers are {[round(x, 2) for x in right.tolist()]}, yours "
        f"{[round(x, 2) for x in got.tolist()]}. P(second > -first) is the normal distribution function at first; "
        "answers are +1 and -1, not 1 and 0; and the mean of a sign is not the sign of a mean."
    )


# --------------------------------------------------------------------------------------- what both losses are given


class Linear(nn.Module):
    """Its flow is a x_t + b t, whatever else it is given; it writes down how it was called."""

    def __init__(self, a=0.0, b=0.0):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))
        self.calls = []

    def forward(self, x_t, t, cond, cache=None, **options):
        self.calls.append({"x_t": x_t.detach(), "t": torch.as_tensor(t).detach(), "cond": cond, **options})
        return self.a * x_t + self.b * torch.as_tensor(t).reshape(*t.shape, 1, 1, 1)


def short(x):
    """A tensor for a message."""
    return (x.double() * 1e4).round().div(1e4).tolist()


def per_block(index, size):
    return index.repeat_interleave(size, dim=1)


CONFIG = RolloutConfig(frames_per_block=2, window_frames=4)
TIMES = [1.0, 0.8, 0.0]


def states(batch=2, num_frames=6):
    """Trajectories [batch, 3, num_frames, 1, 2, 2] whose entries say where they are: 100 frame + state."""
    frame = 100.0 * torch.arange(num_frames).reshape(1, 1, -1, 1, 1, 1)
    state = torch.arange(3.0).reshape(1, -1, 1, 1, 1, 1)
    return (frame + state).expand(batch, -1, -1, 1, 2, 2).clone()


# --------------------------------------------------------------------------------------------- ode_regression_loss


def test_every_block_starts_at_its_own_state(ode_regression_loss):
    model, index = Linear(), torch.tensor([[0, 1, 2], [1, 1, 0]])
    ode_regression_loss(model, SCHEDULER, states(), TIMES, {}, CONFIG, index=index)
    assert len(model.calls) == 1, f"One call of the model on the whole clips is enough, yours makes {len(model.calls)}."
    call, right = model.calls[0], 100.0 * torch.arange(6) + per_block(index, 2)
    assert torch.equal(call["x_t"][..., 0, 0, 0].float(), right), (
        "Frame by frame the model should be given the state that its block's index names: expected "
        f"{right.tolist()}, got {call['x_t'][..., 0, 0, 0].tolist()} (hundreds are frames, ones are states)."
    )


def test_the_model_is_told_the_time_of_its_state(ode_regression_loss):
    model, index = Linear(), torch.tensor([[0, 1, 2], [1, 1, 0]])
    ode_regression_loss(model, SCHEDULER, states(), TIMES, {}, CONFIG, index=index)
    right = torch.tensor(TIMES)[per_block(index, 2)]
    assert model.calls[0]["t"].shape == (2, 6) and torch.allclose(model.calls[0]["t"].float(), right), (
        f"State and time belong together, per frame [B, F]: expected {short(right)}, got {short(model.calls[0]['t'])}."
    )


def test_it_is_the_error_of_the_clean_end(ode_regression_loss):
    model, index = Linear(b=0.5), torch.tensor([[0, 1, 0]])
    got = torch.as_tensor(ode_regression_loss(model, SCHEDULER, states(1), TIMES, {}, CONFIG, index=index))
    t = torch.tensor(TIMES)[per_block(index, 2)]
    guess = 100.0 * torch.arange(6) + per_block(index, 2) - t * 0.5 * t  # x_t - t flow
    right = (guess - (100.0 * torch.arange(6) + 2)).square().mean()
    assert torch.allclose(got.float(), right, rtol=1e-4), (
        f"Expected mean squared (x0 - end) = {right:.3f}, got {got.item():.3f}: compare the clean guess x_t - t flow "
        "with the last state of the trajectory, not the flows, and not with the next state."
    )
    assert got.requires_grad, (
        "The model learns from this loss: its call must keep its gradient, and no .item() at the end."
    )


def test_blocks_that_start_clean_are_not_counted(ode_regression_loss):
    model = Linear(b=0.5)
    mixed = ode_regression_loss(model, SCHEDULER, states(1), TIMES, {}, CONFIG, index=torch.tensor([[0, 2, 2]])).item()
    alone = ode_regression_loss(
        model, SCHEDULER, states(1)[:, :, :2], TIMES, {}, CONFIG, index=torch.tensor([[0]])
    ).item()
    assert math.isclose(mixed, alone, rel_tol=1e-4), (
        "A block that starts at t = 0 is already the answer: its error is zero for every model. Counted, it only makes "
        f"the mean smaller. Take the mean over frames with t > 0: expected {alone:.3f}, got {mixed:.3f}."
    )


def test_all_clean_is_zero(ode_regression_loss):
    index = torch.full((1, 3), 2)
    got = torch.as_tensor(ode_regression_loss(Linear(b=0.5), SCHEDULER, states(1), TIMES, {}, CONFIG, index=index))
    assert got == 0, f"If chance draws only clean starts, the loss is 0, not {got.item()}."


def test_teacher_forcing_shows_clean_ends(ode_regression_loss):
    model, index = Linear(), torch.tensor([[0, 1, 2], [1, 1, 0]])
    for forced in (False, True):
        ode_regression_loss(model, SCHEDULER, states(), TIMES, {}, CONFIG, teacher_forcing=forced, index=index)
    plain, shown = (call.get("clean") for call in model.calls)
    assert plain is None, "Without teacher_forcing blocks see each other as noisy as they are: no clean=."
    assert shown is not None and torch.equal(
        shown[..., 0, 0, 0].float(), (100.0 * torch.arange(6) + 2).expand(2, -1)
    ), "With teacher_forcing a block sees the clean *ends* of the blocks before it: clean= is the last state."


def test_it_is_block_causal_with_the_configs_window(ode_regression_loss):
    model = Linear()
    ode_regression_loss(model, SCHEDULER, states(), TIMES, {}, CONFIG, index=torch.zeros(2, 3, dtype=torch.long))
    call = model.calls[0]
    assert call.get("frames_per_block") == 2 and call.get("window_frames") == 4, (
        "The student is causal: call the model through block_causal(model, config, ...), which passes "
        "frames_per_block, sink_frames and window_frames. A plain call would be bidirectional, and silently."
    )


def test_states_are_drawn_at_random_per_block(ode_regression_loss):
    model = Linear()
    for _ in range(40):
        rng = generator(len(model.calls), "states")
        ode_regression_loss(model, SCHEDULER, states(), TIMES, {}, CONFIG, rng=rng)
    t = torch.stack([call["t"].float() for call in model.calls])  # [n b f]
    assert t.unique().numel() == 3, "Without an index every one of the K states, the clean one too, must occur."
    assert torch.equal(t[..., 0], t[..., 1]), "The frames of a block start at the same state."
    assert (t[..., 0] != t[..., 2]).any() and (t[:, 0] != t[:, 1]).any(), (
        "Every block of every sample draws a state of its own: index [B, num_blocks]."
    )


# ------------------------------------------------------------------------------------------------ consistency_loss


def clips(batch=2, num_frames=4):
    return torch.randn(batch, num_frames, 1, 4, 4, generator=generator(0, "clips"))


ONE = RolloutConfig(frames_per_block=2)


def consistency(loss, model, target, teacher, index, scale=1.0, seed=0, **options):
    given = {"num_steps": 4, "rng": generator(seed, "noise"), "index": index}
    cond, uncond = {"is": "cond"}, {"is": "uncond"}
    return loss(model, target, teacher, SCHEDULER, clips(), cond, uncond, scale, ONE, **given | options)


INDEX = torch.tensor([[0, 2], [1, 3]])


def test_model_and_target_stand_one_step_apart(consistency_loss):
    model, target, teacher = Linear(), Linear(), Linear()
    consistency(consistency_loss, model, target, teacher, INDEX)
    grid = SCHEDULER.warp(1 - torch.arange(5) / 4)
    here, there = grid[per_block(INDEX, 2)], grid[per_block(INDEX + 1, 2)]
    assert torch.allclose(model.calls[0]["t"].float(), here), (
        f"The model starts at the warped time of the grid that index names, per frame: {short(here)}, got "
        f"{short(model.calls[0]['t'])}."
    )
    assert torch.allclose(target.calls[0]["t"].float(), there), (
        f"The target starts one step further on: {short(there)}, got {short(target.calls[0]['t'])}."
    )


def test_the_teacher_takes_one_euler_step(consistency_loss):
    model, target, teacher = Linear(), Linear(), Linear(a=0.7, b=-0.4)
    consistency(consistency_loss, model, target, teacher, INDEX)
    t, t_next = (m.calls[0]["t"].float()[:, :, None, None, None] for m in (model, target))
    x_t = model.calls[0]["x_t"]
    right = x_t + (t_next - t) * (0.7 * x_t - 0.4 * t)
    assert torch.allclose(target.calls[0]["x_t"].float(), right, atol=1e-5), (
        "Between them lies one Euler step of the teacher's flow, from the very x_t that the model gets: "
        "x_next = x_t + (t_next - t) flow. (t falls, so t_next - t is below 0.)"
    )


def test_every_block_draws_its_own_step(consistency_loss):
    model = Linear()
    for seed in range(40):
        consistency(consistency_loss, model, Linear(), Linear(), None, seed=seed)
    t = torch.stack([call["t"].float() for call in model.calls])  # [n b f]
    assert t.unique().numel() == 4 and t.min() > 0, (
        f"Without an index each of the num_steps=4 starting times must occur, and no other; yours: {short(t.unique())}."
    )
    assert torch.equal(t[..., 0], t[..., 1]), "The frames of a block start at the same time."
    assert (t[..., 0] != t[..., 2]).any(), "Every block of every sample draws a step of its own: index [B, num_blocks]."


def test_noise_is_put_on_the_data(consistency_loss):
    model = Linear()
    consistency(consistency_loss, model, Linear(), Linear(), torch.full((2, 2), 3), num_steps=1000)
    near = SCHEDULER.warp(torch.tensor(1 - 3 / 1000))
    assert torch.allclose(model.calls[0]["t"].float(), near.expand(2, 4)), (
        "num_steps is the number of steps of the grid."
    )
    consistency(consistency_loss, model, Linear(), Linear(), torch.full((2, 2), 999), num_steps=1000)
    t = model.calls[1]["t"].float()[:, :, None, None, None]
    rest = model.calls[1]["x_t"] - (1 - t) * clips()
    assert 0 < rest.std() < 2 * t.max(), (
        "x_t is the data noised to t, add_noise(x0, noise, t): at the last step of a long grid it is almost the data."
    )


def test_the_loss_compares_two_clean_guesses(consistency_loss):
    model, target, teacher = Linear(b=0.3), Linear(a=0.2), Linear(a=0.7, b=-0.4)
    got = torch.as_tensor(consistency(consistency_loss, model, target, teacher, INDEX)).float()
    x_t, x_next = model.calls[0]["x_t"], target.calls[0]["x_t"]
    t, t_next = (m.calls[0]["t"].float()[:, :, None, None, None] for m in (model, target))
    right = ((x_t - t * 0.3 * t) - (x_next - t_next * 0.2 * x_next)).square().mean()
    assert torch.allclose(got, right, rtol=1e-4), (
        f"Expected the mean square of model's x0 minus target's x0, {right:.4f}, got {got.item():.4f}: both are clean "
        "guesses, x - t flow, each from its own point."
    )


def test_no_gradient_reaches_target_and_teacher(consistency_loss):
    model, target, teacher = Linear(b=0.3), Linear(a=0.2), Linear(a=0.7, b=-0.4)
    consistency(consistency_loss, model, target, teacher, INDEX).backward()
    assert model.b.grad is not None and model.b.grad != 0, "The model learns: its guess keeps its gradient."
    assert all(p.grad is None or p.grad == 0 for m in (target, teacher) for p in m.parameters()), (
        "Target and teacher stand still: compute them under torch.no_grad(). Otherwise the two guesses meet halfway, "
        "and the shortest way to agree is to say nothing."
    )


def test_a_model_that_is_its_own_target_is_detached_there(consistency_loss):
    one, teacher = Linear(b=0.3), Linear(a=0.7)
    consistency(consistency_loss, one, one, teacher, INDEX).backward()
    here, there = sorted(one.calls, key=lambda call: -call["t"][0, 0])
    (x_t, t), (x_next, t_next) = ((call["x_t"], call["t"].float()[:, :, None, None, None]) for call in (here, there))
    difference = (x_t - 0.3 * t**2) - (x_next - 0.3 * t_next**2)
    right = (2 * difference * -(t**2)).mean()
    assert torch.allclose(one.b.grad, right, rtol=1e-3, atol=1e-6), (
        f"model and target may be the same network: then only the first guess has a gradient, {right:.4f} here, yours "
        f"is {one.b.grad.item():.4f}. Calling the target outside of no_grad is not seen by looking at other networks."
    )


def test_the_teacher_is_guided(consistency_loss):
    model, target, teacher = Linear(), Linear(), Linear(a=0.5)
    consistency(consistency_loss, model, target, teacher, INDEX, scale=2.0)
    asked = sorted(call["cond"]["is"] for call in teacher.calls)
    assert asked == ["cond", "uncond"], (
        f"With guidance the teacher is asked twice, with the prompt and without (Guided), yours asked for {asked}."
    )
    assert [call["cond"]["is"] for m in (model, target) for call in m.calls] == ["cond", "cond"], (
        "Model and target learn the guided answer in one call each, with the prompt: guidance is the teacher's alone."
    )


def test_all_three_see_a_clean_past(consistency_loss):
    networks = Linear(), Linear(), Linear()
    consistency(consistency_loss, *networks, INDEX)
    for name, network in zip(("model", "target", "teacher"), networks, strict=True):
        call = network.calls[0] if network.calls else {}
        right = (
            call.get("frames_per_block") == 2 and call.get("clean") is not None and torch.equal(call["clean"], clips())
        )
        assert right, f"The {name} is called block-causally with the data as a clean past: block_causal(..., clean=x0)."
