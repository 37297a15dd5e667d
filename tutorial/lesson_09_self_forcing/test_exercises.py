"""Graders of lesson 9. `make grade LESSON=9`; each message says which idea is missing."""

from collections import Counter
from functools import partial
from numbers import Integral

import torch
from torch import nn

import dynamic_video_sf as core
from dynamic_video_sf import RolloutConfig, SelfForcingConfig
from flow_match import FlowMatchScheduler
from kv_cache import KVCache
from randomness import generator, generators, randn
from settings import load_config
from train import build, training_loop

SCHEDULER = FlowMatchScheduler(3.0)
BATCH, FRAME = 2, (1, 2, 2)


class Standin(nn.Module):
    """A generator and score in a few lines: what it guesses depends on everything that it is given, and it notes every
    call. gain: one number per call, 1, whose gradient says whether the call is part of a loss."""

    def __init__(self, stride=0.5):
        super().__init__()
        self.stride = nn.Parameter(torch.tensor(stride))
        self.calls, self.memories = [], []

    def note(self, calls, x, t, cond, cache):
        gain = torch.ones((), requires_grad=True)
        seen = {"x": x, "t": t, "cond": cond, "cache": cache, "gain": gain, "graph": torch.is_grad_enabled()}
        calls.append(seen | {"frame": cache.next_frame if cache else 0})
        return gain

    def forward(self, x_t, t, cond, cache=None):
        gain = self.note(self.calls, x_t, t, cond, cache)
        past = torch.zeros(())
        if cache is not None and cache.layers:
            keys = cache.layers[0][0][:, :, 0]  # [b l d]
            past = (keys[:, -1] + 0.1 * keys.mean(1)).reshape(len(x_t), 1, *FRAME)
        steps = torch.arange(1, x_t.shape[1] + 1).reshape(-1, 1, 1, 1)
        return gain * (x_t - 0.5 * past - 0.2 * x_t.square() - self.stride * steps)

    def remember(self, x, t, cond, cache):
        gain = self.note(self.memories, x, t, cond, cache)
        return cache.extend([((gain * x).flatten(2)[:, :, None],) * 2], x.shape[1])


def start(num_frames, seed=0):
    return randn((BATCH, num_frames, *FRAME), generators(seed, "start", samples=range(BATCH)))


def rng():
    return generators(0, "rollout", samples=range(BATCH))


def collect(blocks):
    """The blocks that a rollout yields, and the cache that it returns."""
    made = []
    while True:
        try:
            made.append(next(blocks))
        except StopIteration as end:
            return made, end.value


def test_none_is_the_last_step(exits):
    got = list(exits(None, 3, 4))
    assert got == [3, 3, 3], f"None means that every block takes all steps: it is left at step 3 of 0 to 3, not {got}."


def test_one_number_is_for_all_blocks(exits):
    got = list(exits(1, 3, 4))
    assert got == [1, 1, 1], f"One number is the exit of every block; of three blocks that is [1, 1, 1], not {got}."
    got = list(exits(0, 2, 4))
    assert got == [0, 0], f"Step 0 is a step as well, the first call; 0 is not None. You have {got}."


def test_a_list_has_one_for_each_block(exits):
    got = list(exits([2, 0, 3], 3, 4))
    assert got == [2, 0, 3], f"A list says it block by block; yours became {got}."


def test_what_does_not_fit_is_refused(exits):
    exits(0, 2, 4)
    for exit_step, why in (
        (4, "there is no step 4 of four"),
        (-1, "-1 is no step"),
        ([0, 1], "two exits, three blocks"),
        ([0, 4, 1], "there is no step 4 of four"),
        ([0, -1, 2], "-1 is no step"),
    ):
        try:
            got = exits(exit_step, 3, 4)
        except ValueError:
            continue
        raise AssertionError(f"exit_step={exit_step} should raise ValueError, for {why}; you returned {got}.")


def drawn(draw_exit, rule, times=300, num_blocks=3, steps=(1000, 750, 500, 250)):
    config = SelfForcingConfig(RolloutConfig(steps), exit_rule=rule)
    return [as_taken(draw_exit(config, num_blocks, generator(0, "exit", i))) for i in range(times)]


def as_taken(exit_step):
    """As a rollout takes it: a tuple or tensor of steps is as good as a list."""
    several = isinstance(exit_step, list | tuple) or getattr(exit_step, "ndim", 0)
    return [int(step) for step in exit_step] if several else exit_step


def test_the_last_rule_is_the_last_step(draw_exit):
    got = drawn(draw_exit, "last", times=5)
    assert got == [3] * 5, f"With four denoising steps the last one is step 3, counted from 0, an int; yours: {got[0]}."


def test_random_is_one_step_for_all_blocks(draw_exit):
    got = drawn(draw_exit, "random")
    assert all(isinstance(one, Integral) for one in got), (
        f"exit_rule='random' draws ONE step for all blocks of the clip, an int; yours is {got[0]!r}."
    )
    counts = Counter(got)
    assert set(counts) == {0, 1, 2, 3} and min(counts.values()) > 45, (
        f"Each of the steps 0, 1, 2, 3 should come up about equally often; in 300 draws yours came {dict(counts)}."
    )


def test_per_block_is_one_step_for_each(draw_exit):
    got = drawn(draw_exit, "per_block")
    assert all(isinstance(one, list) and len(one) == 3 for one in got), (
        f"exit_rule='per_block' draws a list with a step for each of the three blocks; yours is {got[0]!r}."
    )
    assert {step for one in got for step in one} == {0, 1, 2, 3}, "Every step from 0 to 3 should come up."
    assert any(len(set(one)) > 1 for one in got), "The blocks of a clip draw for themselves: their steps should differ."


def test_everything_random_comes_from_rng(draw_exit):
    for rule in ("random", "per_block"):
        torch.manual_seed(0)
        first = drawn(draw_exit, rule, times=20)
        torch.manual_seed(1)
        assert first == drawn(draw_exit, rule, times=20), (
            "The same rng should give the same exits, whatever torch's global state: all processes of a run have to "
            "leave at the same step, and a resumed run at the step that it had."
        )


def test_all_blocks_of_a_short_clip(blocks_with_gradient):
    got = list(blocks_with_gradient(12, 3, 12))
    assert got == [True] * 4, f"A clip no longer than gradient_frames keeps all its gradients; yours: {got}."
    got = list(blocks_with_gradient(6, 3, 21))
    assert got == [True] * 2, f"Nor is it a mistake to allow more frames than there are; yours: {got}."


def test_the_last_blocks_of_a_long_clip(blocks_with_gradient):
    got = list(blocks_with_gradient(24, 3, 12))
    assert got == [False] * 4 + [True] * 4, (
        f"Of 24 frames in blocks of 3 the last 12 are scored: four blocks without a gradient, four with; yours: {got}."
    )


def test_a_block_that_reaches_in_counts(blocks_with_gradient):
    got = list(blocks_with_gradient(12, 4, 6))
    assert got == [False, True, True], (
        "Of 12 frames in blocks of 4 the last six are 6 to 11. Frames 6 and 7 are in the second block: it is scored "
        f"in part, so its call needs its gradient. Yours: {got}."
    )


def test_blocks_may_differ_in_size(blocks_with_gradient):
    got = list(blocks_with_gradient(10, (1, 3), 6))
    assert got == [False, False, True, True], (
        "frames_per_block=(1, 3) makes blocks of 1, 3, 3, 3 frames (kv_cache.block_sizes); the last six frames are "
        f"the last two of them. Yours: {got}."
    )


CONFIG = RolloutConfig(frames_per_block=(1, 2), context_noise=100, sink_frames=1, window_frames=3)


def test_inference_is_the_cores_bit_for_bit(rollout):
    mine, _ = collect(rollout(Standin(), SCHEDULER, start(7), {}, CONFIG, rng=rng()))
    right, _ = collect(core.rollout(Standin(), SCHEDULER, start(7), {}, CONFIG, rng=rng()))
    sizes = [block.shape[1] for block in mine]
    assert sizes == [1, 2, 2, 2], f"frames_per_block=(1, 2) makes blocks of 1, 2, 2, 2 frames of 7; yours are {sizes}."
    for i, (a, b) in enumerate(zip(mine, right, strict=True)):
        assert torch.equal(a, b), (
            f"Block {i} is not that of the core's rollout (off by {(a - b).abs().max():.2g}). Between two steps the "
            "guess gets fresh noise of the next level; finished blocks are remembered with context_noise. Draw with "
            "randn_like(x0, rng) once per renoising and once before remembering, in this order."
        )


def test_a_block_comes_before_it_is_remembered(rollout):
    student = Standin()
    for i, _ in enumerate(rollout(student, SCHEDULER, start(5), {}, CONFIG, rng=rng())):
        seen = (len(student.calls), len(student.memories))
        assert seen == (4 * (i + 1), i), (
            f"When block {i} comes, the generator should have been called {4 * (i + 1)} times and have remembered {i} "
            f"blocks, not {seen}: yield every block as soon as it exists, remember it afterwards."
        )


def test_every_block_is_left_at_its_exit(rollout):
    student = Standin()
    collect(rollout(student, SCHEDULER, start(5), {}, CONFIG, exit_step=[2, 0, 1], rng=rng()))
    counts = Counter(call["frame"] for call in student.calls)
    assert [counts[frame] for frame in (0, 1, 3)] == [3, 1, 2], (
        f"With exit_step=[2, 0, 1] the blocks take 3, 1 and 2 calls: what lies behind the exit is not run. Yours took "
        f"{[counts[frame] for frame in (0, 1, 3)]}."
    )
    times = [call["t"] for call in student.calls[:3]]
    right = SCHEDULER.denoising_times(CONFIG.denoising_steps)[:3]
    assert all(abs(float(a) - b) < 1e-6 for a, b in zip(times, right, strict=True)), (
        f"The calls walk down the warped times, scheduler.denoising_times(...), from 1; yours are {times}."
    )


def test_the_exit_call_alone_keeps_its_gradient(rollout):
    student = Standin()
    blocks, _ = collect(rollout(student, SCHEDULER, start(5), {}, CONFIG, exit_step=[2, 0, 1], rng=rng()))
    assert torch.cat(blocks, dim=1).requires_grad, "No gradient reaches the generator: keep that of the exit call."
    every = student.calls + student.memories
    found = torch.autograd.grad(torch.cat(blocks, 1).sum(), [call["gain"] for call in every], allow_unused=True)
    kept = [index for index, gradient in enumerate(found) if gradient is not None]
    assert not [index for index in kept if index >= len(student.calls)], (
        "The loss of a block reaches the call that remembered an earlier one: what is in the cache must be cut off "
        "from the graph."
    )
    assert kept == [2, 3, 5], (
        f"Of the six denoising calls (three of block 0, one of block 1, two of block 2) the last of each block should "
        f"keep its gradient, calls 2, 3 and 5; in yours it is {kept}."
    )
    assert not any(call["graph"] for index, call in enumerate(every) if index not in (2, 3, 5)), (
        "All other calls should run under torch.no_grad(): a graph that nobody uses still costs memory."
    )


def test_cache_gradient_lets_it_through(rollout):
    student, config = Standin(), RolloutConfig(frames_per_block=2, cache_gradient=True)
    blocks, _ = collect(rollout(student, SCHEDULER, start(6), {}, config, exit_step=1, rng=rng()))
    gains = [memory["gain"] for memory in student.memories]
    found = torch.autograd.grad(torch.cat(blocks, 1).sum(), gains, allow_unused=True)
    assert [gradient is not None for gradient in found] == [True, True, False], (
        "With config.cache_gradient the calls that remember are part of the graph; nobody reads what the last one "
        "remembered."
    )


def test_it_remembers_what_it_made(rollout):
    student, config = Standin(), RolloutConfig(frames_per_block=2)
    blocks, _ = collect(rollout(student, SCHEDULER, start(6), {}, config, exit_step=1, rng=rng()))
    assert len(student.memories) == 3, f"Each of the three blocks is remembered once; yours: {len(student.memories)}."
    for block, memory in zip(blocks, student.memories, strict=True):
        assert torch.equal(memory["x"], block.detach()) and memory["t"] == 0, (
            "What is remembered is the block as it was yielded, the exit call's guess, clean, at time context_noise / "
            "1000 (0 here): neither the noisy x_t nor anything else."
        )


def test_it_returns_the_cache(rollout):
    _, cache = collect(rollout(Standin(), SCHEDULER, start(7), {}, CONFIG, rng=rng()))
    assert isinstance(cache, KVCache), (
        "A rollout returns its cache (`return cache` at the end of the Python generator), with the last block in it: "
        "`cache = yield from rollout(...)` continues a stream."
    )
    got = (cache.next_frame, cache.frames)
    assert got == (7, (0, 4, 5, 6)), f"After 7 frames, with a sink of 1 and a window of 3, it holds {got}."


def test_it_goes_on_from_a_cache(rollout):
    config = RolloutConfig(frames_per_block=2, window_frames=3)
    whole, _ = collect(rollout(Standin(), SCHEDULER, start(8), {}, config, rng=rng()))
    draws = rng()
    first, cache = collect(rollout(Standin(), SCHEDULER, start(8)[:, :4], {}, config, rng=draws))
    second, _ = collect(rollout(Standin(), SCHEDULER, start(8)[:, 4:], {}, config, rng=draws, cache=cache))
    assert torch.equal(torch.cat([*first, *second], dim=1), torch.cat(whole, dim=1)), (
        "Two halves, the second with cache= of the first, should be the whole, bit for bit. Without a cache begin with "
        "config.empty_cache()."
    )


def test_observe_and_sampler_are_used(rollout):
    seen = []
    config = RolloutConfig(frames_per_block=2)
    watched = {"observe": lambda **guess: seen.append(guess), "sampler": core.euler, "exit_step": 2}
    blocks, _ = collect(rollout(Standin(), SCHEDULER, start(4), {}, config, rng=rng(), **watched))
    right, _ = collect(core.rollout(Standin(), SCHEDULER, start(4), {}, config, exit_step=2, sampler=core.euler))
    assert [(guess["frame"], guess["step"]) for guess in seen] == [(f, s) for f in (0, 2) for s in (0, 1, 2)], (
        "observe(frame=, step=, t=, x_t=, x0=) is told of every guess."
    )
    assert torch.equal(torch.cat(blocks, dim=1), torch.cat(right, dim=1)), (
        "sampler(scheduler, x0, x_t, t, t_next, noise) says how x_t of the next step is made of the guess; renoise is "
        "only its default."
    )


def algorithm(self_forcing_step, student=None, *, observe=None, loss=core.dmd_loss, given=None, **settings):
    """The losses of a step for small stand-ins, and the three networks. given: more arguments for the step."""
    student, teacher, critic = student or Standin(0.5), Standin(0.2), Standin(0.4)
    settings = {"critic_steps": 3, "fresh_rollouts": True} | settings
    frames = dict.fromkeys(("gradient_frames", "min_num_frames", "max_num_frames"), 4)
    config = SelfForcingConfig(RolloutConfig(frames_per_block=2), 3.0, exit_rule="last", **frames, **settings)
    draws = {"rng": rng(), "shared_rng": generator(0, "shared"), "observe": observe, "loss": loss} | (given or {})
    losses = self_forcing_step(student, teacher, critic, SCHEDULER, start(4), {"c": 1}, {"c": 0}, config, **draws)
    return losses, (student, teacher, critic)


def test_the_order_of_losses(self_forcing_step):
    for critic_steps in (1, 4):
        losses, _ = algorithm(self_forcing_step, critic_steps=critic_steps)
        names = [name for name, _ in losses]
        assert names == ["generator"] + ["critic"] * critic_steps, (
            f"With critic_steps={critic_steps}: the generator's loss once, then the critic's {critic_steps} times; "
            f"yours is {names}."
        )


def test_every_loss_has_its_own_network(self_forcing_step):
    for fresh in (True, False):
        losses, networks = algorithm(self_forcing_step, fresh_rollouts=fresh)
        for name, loss in losses:
            found = torch.autograd.grad(loss, [n.stride for n in networks], allow_unused=True, retain_graph=True)
            reached = [who for who, g in zip(("student", "teacher", "critic"), found, strict=True) if g is not None]
            wanted = ["student"] if name == "generator" else ["critic"]
            assert reached == wanted, (
                f"The loss {name!r} should reach the {wanted[0]} alone, yours reaches {reached} (with "
                f"fresh_rollouts={fresh}). The critic learns the student's video, detached: no pull at who made it."
            )


def test_nothing_is_computed_ahead(self_forcing_step):
    losses, (student, *_) = algorithm(self_forcing_step)
    counts = []
    for _, _ in losses:
        counts.append(len(student.calls) // 8)  # calls of a rollout of two blocks
    assert counts == [1, 2, 3, 4], (
        "Between two losses the caller updates a network, so the next rollout may start only when the next loss is "
        f"asked for: after each of the four losses 1, 2, 3, 4 rollouts should have been made, yours were {counts}."
    )


def test_the_critic_follows_the_updated_student(self_forcing_step):
    losses, (student, _, critic) = algorithm(self_forcing_step)
    next(losses)
    kept = len(critic.calls)
    with torch.no_grad():
        student.stride += 100
    next(losses)
    assert critic.calls[kept]["x"].abs().max() > 10, (
        "After the generator's update the critic is trained on what the student makes NOW, with fresh noise; yours saw "
        "the video of before."
    )


def test_an_old_rollout_is_used_again(self_forcing_step):
    losses, (student, _, critic) = algorithm(self_forcing_step, fresh_rollouts=False)
    next(losses)
    calls = len(student.calls)
    list(losses)
    assert len(student.calls) == calls, (
        "With fresh_rollouts=False the critic's updates share the generator's rollout; yours asked the student again."
    )
    times = [float(call["t"][0]) for call in critic.calls[-3:]]
    assert len(set(times)) == 3, f"Each critic update draws noise and time t anew; yours were at t = {times}."


def test_student_video_makes_every_clip(self_forcing_step):
    asked, data = [], start(4, seed=1)

    def student_video(generator, scheduler, noise, cond, config, *, data, rng, shared_rng):
        asked.append(data)
        return core.training_rollout(generator, scheduler, noise, cond, config, rng=rng, shared_rng=shared_rng)

    losses, _ = algorithm(self_forcing_step, given={"student_video": student_video, "data": data})
    list(losses)
    assert len(asked) == 4 and all(one is data for one in asked), (
        "Every clip, also each of the critic's, is made by student_video, which is given data: other objectives put "
        "another function there."
    )


def test_loss_and_observer_are_passed_on(self_forcing_step):
    given, heard = {}, []

    def loss(video, real_score, fake_score, scheduler, cond, uncond, guidance_scale, **options):
        given.update(scale=guidance_scale, cond=cond, uncond=uncond, options=options, shape=tuple(video.shape))
        return video.sum()

    losses, _ = algorithm(self_forcing_step, loss=loss, observe=lambda name, **values: heard.append(name))
    list(losses)
    assert given.get("scale") == 3.0 and (given["cond"], given["uncond"]) == ({"c": 1}, {"c": 0}), (
        "The loss is given cond, uncond and config.guidance_scale; yours got "
        f"{given.get('scale')} and {given.get('cond')}."
    )
    assert given["shape"] == (BATCH, 4, *FRAME), f"It scores the whole clip [B, 4, ...], yours is {given['shape']}."
    t = given["options"].get("t")
    assert t is not None and t.shape == (BATCH,) and t.min() >= 0.02 and t.max() <= 0.98, (
        "The loss is given times t [B] from score_times(scheduler, config, exit_step, batch, rng)."
    )
    assert heard.count("critic") == 3, "observe(network, **values) hears what flow_matching_loss says of the critic."
    tell = given["options"].get("observe")
    assert tell is not None, "The generator's loss is given an observe, too: it tells score_distance and normaliser."
    tell(normaliser=torch.ones(BATCH))
    assert heard.count("generator") == 1, 'What it says is passed on under the name "generator".'


def test_the_generators_loss_may_guide_the_critic(self_forcing_step):
    for scale, wanted in ((None, [{"c": 1}]), (2.0, [{"c": 1}, {"c": 0}])):
        losses, (_, _, critic) = algorithm(self_forcing_step, fake_guidance_scale=scale)
        next(losses)
        asked = [call["cond"] for call in critic.calls]
        assert len(asked) == len(wanted) and all(cond in asked for cond in wanted), (
            f"With fake_guidance_scale={scale} the generator's loss should ask the critic under {wanted}, yours asked "
            f"under {asked}: give the loss Guided(fake_score, uncond, config.fake_guidance_scale), or the bare critic "
            "where that is None."
        )
        before = len(critic.calls)
        list(losses)
        trained = [call["cond"] for call in critic.calls[before:]]
        assert trained == [{"c": 1}] * 3, (
            f"The critic itself is trained under the prompt alone, three times here; yours was asked under {trained}."
        )


def test_all_noise_of_a_step_comes_from_rng(self_forcing_step):
    def values(seed):
        torch.manual_seed(seed)
        return [float(loss.detach()) for _, loss in algorithm(self_forcing_step)[0]]

    first, again = values(0), values(1)
    for i, (a, b) in enumerate(zip(first, again, strict=True)):
        assert a == b, (
            f"Loss {i} changes with torch's global state: draw times, the noise of fresh rollouts (randn_like(noise, "
            "rng)) and that of the losses from the rng that you are given, or a resumed run goes another way."
        )


def long_config(**settings):
    lengths = {"gradient_frames": 4, "min_num_frames": 4, "max_num_frames": 8}
    return SelfForcingConfig(RolloutConfig(frames_per_block=2), **(lengths | settings))


def test_the_last_frames_are_scored(training_rollout):
    lengths = set()
    for i in range(12):
        student, config = Standin(), long_config(exit_rule="last")
        draws = {"rng": rng(), "shared_rng": generator(0, "shared", i)}
        video, exit_step = training_rollout(student, SCHEDULER, start(8), {}, config, **draws)
        made = len({call["frame"] for call in student.calls}) * 2
        lengths.add(made)
        assert tuple(video.shape) == (BATCH, 4, *FRAME), (
            f"Of a clip of {made} frames the last gradient_frames=4 are returned, yours has shape {tuple(video.shape)}."
        )
        right = core.generate(Standin(), SCHEDULER, start(8)[:, :made], {}, config.rollout, rng=rng())
        assert torch.equal(video.detach(), right[:, -4:]), (
            "They should be the very frames that inference makes of the same noise: same noise, same rng, last frames."
        )
        assert exit_step == 3, f"The exit step is returned beside them, 3 for exit_rule='last', not {exit_step!r}."
    assert lengths == {4, 6, 8}, (
        f"The clip's length is drawn from config.clip_lengths(), here 4, 6 or 8 frames; in twelve tries yours "
        f"had {lengths}."
    )


def test_some_clips_are_the_shortest(training_rollout):
    for i in range(6):
        student = Standin()
        draws = {"rng": rng(), "shared_rng": generator(0, "short", i)}
        training_rollout(student, SCHEDULER, start(8), {}, long_config(shortest_share=1.0), **draws)
        assert max(call["frame"] for call in student.calls) == 2, (
            "With shortest_share=1 every clip has the shortest length, 4 frames here."
        )


def test_only_their_blocks_are_differentiated(training_rollout):
    for i in range(8):
        student = Standin()
        draws = {"rng": rng(), "shared_rng": generator(0, "shared", i)}
        video, _ = training_rollout(student, SCHEDULER, start(8), {}, long_config(exit_rule="random"), **draws)
        assert video.requires_grad, "The returned frames have no gradient: their exit calls must keep it."
        last = max(call["frame"] for call in student.calls)
        graphs = sorted(call["frame"] for call in student.calls if call["graph"])
        assert graphs == [last - 2, last], (
            f"The returned frames are in the blocks at frames {last - 2} and {last}; one call of each should build a "
            f"graph, and no other. In yours it is blocks {graphs}: with longer clips memory would grow."
        )


def test_length_and_exit_are_shared(training_rollout):
    def drawn(seed, shared):
        student = Standin()
        draws = {"rng": generators(seed, "own", samples=range(BATCH)), "shared_rng": generator(0, "shared", shared)}
        _, exit_step = training_rollout(student, SCHEDULER, start(8, seed), {}, long_config(), **draws)
        return exit_step, max(call["frame"] for call in student.calls)

    pairs = [(drawn(0, i), drawn(1, i)) for i in range(10)]
    assert all(a == b for a, b in pairs), (
        "Clip length and exit step are drawn from shared_rng alone, so that all processes of a run agree on them; "
        "yours change with the sample's own rng."
    )
    assert len({a for a, _ in pairs}) > 3, "Both should change from one step of training to the next."


def test_under_no_grad_it_keeps_none(training_rollout):
    student = Standin()
    with torch.no_grad():
        video, _ = training_rollout(student, SCHEDULER, start(8), {}, long_config(), rng=rng(), shared_rng=rng()[0])
    assert not video.requires_grad and not any(call["graph"] for call in student.calls), (
        "The critic's rollouts are made under torch.no_grad(): do not switch gradients on there "
        "(torch.is_grad_enabled() says what the caller wants)."
    )


def test_it_drives_real_training(training_rollout):
    small = ["num_steps=1", "batch_size=1", "min_num_frames=3", "max_num_frames=6", "gradient_frames=3"]
    cfg = load_config([f"training.{option}" for option in [*small, "critic_steps=1", "device=cpu"]])
    run = build(cfg)
    run.algorithm = partial(core.self_forcing_step, student_video=training_rollout)
    before = {name: model.head.head.weight.detach().clone() for name, model in run.networks.items()}
    (report,) = training_loop(run)
    for name, model in run.networks.items():
        assert not torch.equal(model.head.head.weight, before[name]), (
            f"One step of train.py with your rollout as student_video left the {name} where it was."
        )
    assert report["generator_grad_norm"] > 0, "The student's gradient is zero."
