"""Lesson 9: wrong and right answers."""

from contextlib import nullcontext
from functools import partial
from itertools import accumulate

import torch

import dynamic_video_sf as core
from dynamic_video_sf import dmd_loss, flow_matching_loss, predict_x0, renoise, score_times
from kv_cache import block_borders, block_sizes
from randomness import rand, randint, randn_like


def zero_is_none(exit_step, num_blocks, num_steps):
    return core.exits(exit_step or None, num_blocks, num_steps)


def counts_from_one(exit_step, num_blocks, num_steps):
    each = exit_step if isinstance(exit_step, list) else [exit_step or num_steps] * num_blocks
    if len(each) != num_blocks or not all(1 <= step <= num_steps for step in each):
        raise ValueError("exit_step")
    return each


def refuses_nothing(exit_step, num_blocks, num_steps):
    if exit_step is None:
        exit_step = num_steps - 1
    return exit_step if isinstance(exit_step, list) else [exit_step] * num_blocks


def first_for_all(exit_step, num_blocks, num_steps):
    return core.exits(exit_step[0] if isinstance(exit_step, list) else exit_step, num_blocks, num_steps)


def exits_spelled_out(exit_step, num_blocks, num_steps):
    if exit_step is None:
        exit_step = num_steps - 1
    if not isinstance(exit_step, list):
        exit_step = num_blocks * [exit_step]
    if len(exit_step) != num_blocks:
        raise ValueError(f"{len(exit_step)} exits for {num_blocks} blocks")
    for step in exit_step:
        if step not in range(num_steps):
            raise ValueError(f"no step {step}")
    return exit_step


def never_the_last(config, num_blocks, rng):
    steps = len(config.rollout.denoising_steps)
    if config.exit_rule == "last":
        return steps - 1
    shape = (num_blocks,) if config.exit_rule == "per_block" else (1,)
    drawn = randint(steps - 1, shape, rng).tolist()
    return drawn if config.exit_rule == "per_block" else drawn[0]


def from_torchs_state(config, num_blocks, rng):
    return core.draw_exit(config, num_blocks, None)


def each_block_for_itself(config, num_blocks, rng):
    steps = len(config.rollout.denoising_steps)
    return steps - 1 if config.exit_rule == "last" else randint(steps, (num_blocks,), rng).tolist()


def last_counts_steps(config, num_blocks, rng):
    exit_step = core.draw_exit(config, num_blocks, rng)
    return exit_step + 1 if config.exit_rule == "last" else exit_step


def by_torch_randint(config, num_blocks, rng):
    steps = len(config.rollout.denoising_steps)
    if config.exit_rule == "last":
        return steps - 1
    drawn = [int(torch.randint(steps, (), generator=rng)) for _ in range(num_blocks)]
    return drawn if config.exit_rule == "per_block" else drawn[0]


def whole_blocks_only(num_frames, frames_per_block, gradient_frames):
    borders = block_borders(num_frames, frames_per_block)
    return [start >= num_frames - gradient_frames for start in borders[:-1]]


def the_first_frames(num_frames, frames_per_block, gradient_frames):
    return [start < gradient_frames for start in block_borders(num_frames, frames_per_block)[:-1]]


def one_block_more(num_frames, frames_per_block, gradient_frames):
    return [end >= num_frames - gradient_frames for end in accumulate(block_sizes(num_frames, frames_per_block))]


def all_blocks_alike(num_frames, frames_per_block, gradient_frames):
    size = frames_per_block if isinstance(frames_per_block, int) else frames_per_block[0]
    return [(i + 1) * size > num_frames - gradient_frames for i in range(num_frames // size)]


def frame_by_frame(num_frames, frames_per_block, gradient_frames):
    scored = range(max(0, num_frames - gradient_frames), num_frames)
    first, found = 0, []
    for size in block_sizes(num_frames, frames_per_block):
        found.append(any(frame in scored for frame in range(first, first + size)))
        first += size
    return found


def own_rollout(generator, scheduler, noise, cond, config, *, cache=None, exit_step=None, rng=None, sampler=renoise,
                observe=None, all_gradients=False, cuts_memory=True, noisy_memory=False, ends=True,
                fresh=True, lets_through=True):  # fmt: skip
    """A right one, and with a switch turned a wrong one."""
    cache = config.empty_cache() if cache is None else cache
    times = scheduler.denoising_times(config.denoising_steps)
    first = 0
    sizes = block_sizes(noise.shape[1], config.frames_per_block, first_frame=cache.next_frame)
    for size, last in zip(sizes, exits_spelled_out(exit_step, len(sizes), len(times)), strict=True):
        begun = x_t = noise[:, first : first + size]
        first += size
        for i in range(last + 1):
            wanted = torch.is_grad_enabled() and (i == last or all_gradients)
            with torch.set_grad_enabled(wanted):
                x0 = predict_x0(generator, scheduler, x_t, times[i], cond, cache)
                if observe:
                    observe(frame=cache.next_frame, step=i, t=times[i], x_t=x_t, x0=x0)
                if i < last:
                    new = randn_like(x0, rng)
                    x_t = sampler(scheduler, x0, x_t, times[i], times[i + 1], new if fresh else begun)
        yield x0
        level = config.context_noise / 1000
        kept = scheduler.add_noise(x_t if noisy_memory else x0, randn_like(x0, rng), level)
        with nullcontext() if config.cache_gradient and lets_through or not cuts_memory else torch.no_grad():
            cache = generator.remember(kept, level, cond, cache)
    return cache if ends else None


def keeps_every_gradient(generator, scheduler, noise, cond, config, **options):
    return own_rollout(generator, scheduler, noise, cond, config, all_gradients=True, **options)


def remembers_what_was_noisy(generator, scheduler, noise, cond, config, **options):
    return own_rollout(generator, scheduler, noise, cond, config, noisy_memory=True, **options)


def builds_a_graph_for_memory(generator, scheduler, noise, cond, config, **options):
    return own_rollout(generator, scheduler, noise, cond, config, cuts_memory=False, **options)


def always_cuts_memory(generator, scheduler, noise, cond, config, **options):
    return own_rollout(generator, scheduler, noise, cond, config, lets_through=False, **options)


def loses_the_cache(generator, scheduler, noise, cond, config, **options):
    return own_rollout(generator, scheduler, noise, cond, config, ends=False, **options)


def renoises_with_old_noise(generator, scheduler, noise, cond, config, **options):
    return own_rollout(generator, scheduler, noise, cond, config, fresh=False, **options)


def takes_every_step(generator, scheduler, noise, cond, config, *, exit_step=None, **options):
    return own_rollout(generator, scheduler, noise, cond, config, **options)


def makes_all_blocks_first(generator, scheduler, noise, cond, config, **options):
    blocks, made = own_rollout(generator, scheduler, noise, cond, config, **options), []
    while True:
        try:
            made.append(next(blocks))
        except StopIteration as end:
            yield from made
            return end.value


def own_step(generator, real_score, fake_score, scheduler, noise, cond, uncond, config, *, loss=dmd_loss,
             student_video=core.training_rollout, data=None, rng=None, shared_rng=None, observe=None,
             critic_first=False, detached=True, ahead=False, always_fresh=False, one_time=False,
             scale=None, guided=True, seeded=True, asks_student_video=True, tells=True):  # fmt: skip
    """A right one, and with a switch turned a wrong one."""
    if not asks_student_video:
        student_video = core.training_rollout

    def roll(noise):
        return student_video(
            generator, scheduler, noise, cond=cond, config=config, data=data, rng=rng, shared_rng=shared_rng
        )

    def tell(network):
        return None if observe is None else lambda **values: observe(network, **values)

    def when(exit_step):
        return score_times(scheduler, config, exit_step, len(noise), rng)

    critic = fake_score
    if config.fake_guidance_scale is not None and guided:
        critic = core.Guided(fake_score, uncond, config.fake_guidance_scale)
    video, exit_step = roll(noise)
    first_time = when(exit_step)
    later = []
    if ahead:
        with torch.no_grad():
            later = [roll(randn_like(noise, rng)) for _ in range(config.critic_steps)]
    weight = config.guidance_scale if scale is None else scale
    generator_loss = partial(
        loss, video, real_score, critic, scheduler, cond, uncond, weight, t=first_time, rng=rng,
        observe=tell("generator") if tells else None,
    )  # fmt: skip
    if not critic_first:
        yield "generator", generator_loss()
    for i in range(config.critic_steps):
        if config.fresh_rollouts or always_fresh:
            with torch.no_grad():
                video, exit_step = later[i] if ahead else roll(randn_like(noise, rng if seeded else None))
        t = first_time if one_time else when(exit_step)
        x0 = video.detach() if detached else video
        yield "critic", flow_matching_loss(fake_score, scheduler, x0, cond, t=t, rng=rng, observe=tell("critic"))
    if critic_first:
        yield "generator", generator_loss()


def critic_first(*args, **options):
    return own_step(*args, critic_first=True, **options)


def critic_pulls_at_the_student(*args, **options):
    return own_step(*args, detached=False, **options)


def rolls_ahead(*args, **options):
    return own_step(*args, ahead=True, **options)


def always_rolls_anew(*args, **options):
    return own_step(*args, always_fresh=True, **options)


def one_noise_level(*args, **options):
    return own_step(*args, one_time=True, **options)


def forgets_guidance(*args, **options):
    return own_step(*args, scale=1.0, **options)


def never_guides_the_critic(*args, **options):
    return own_step(*args, guided=False, **options)


def fresh_noise_from_torchs_state(*args, **options):
    return own_step(*args, seeded=False, **options)


def always_on_its_own_past(*args, **options):
    return own_step(*args, asks_student_video=False, **options)


def generator_says_nothing(*args, **options):
    return own_step(*args, tells=False, **options)


def own_training_rollout(generator, scheduler, noise, cond, config, *, data=None, rng=None, shared_rng=None,
                         reencode=None, every_gradient=False, first_frames=False, own_exit=False,
                         cut=False, shortens=True):  # fmt: skip
    """A right one, and with a switch turned a wrong one."""
    lengths = config.clip_lengths()
    short = shortens and config.shortest_share and rand((1,), shared_rng) < config.shortest_share
    num_frames = lengths[0] if short else lengths[int(randint(len(lengths), (1,), shared_rng))]
    sizes = block_sizes(num_frames, config.rollout.frames_per_block)
    exit_step = core.draw_exit(config, len(sizes), None if own_exit else shared_rng)
    count = frame_by_frame(num_frames, config.rollout.frames_per_block, config.gradient_frames)
    blocks = core.rollout(
        generator, scheduler, noise[:, :num_frames], cond, config.rollout, exit_step=exit_step, rng=rng
    )
    video = []
    for counts in count:
        with nullcontext() if counts or every_gradient else torch.no_grad():
            video.append(next(blocks))
    video = torch.cat(video, dim=1)
    scored = video[:, : config.gradient_frames] if first_frames else video[:, -config.gradient_frames :]
    return scored.detach() if cut else scored, exit_step


def gradient_everywhere(*args, **options):
    return own_training_rollout(*args, every_gradient=True, **options)


def scores_the_beginning(*args, **options):
    return own_training_rollout(*args, first_frames=True, **options)


def every_process_for_itself(*args, **options):
    return own_training_rollout(*args, own_exit=True, **options)


def cut_from_the_student(*args, **options):
    return own_training_rollout(*args, cut=True, **options)


def any_length_alike(*args, **options):
    return own_training_rollout(*args, shortens=False, **options)


def always_the_longest(generator, scheduler, noise, cond, config, *, shared_rng=None, rng=None, **options):
    sizes = block_sizes(noise.shape[1], config.rollout.frames_per_block)
    exit_step = core.draw_exit(config, len(sizes), shared_rng)
    blocks = core.rollout(generator, scheduler, noise, cond, config.rollout, exit_step=exit_step, rng=rng)
    return torch.cat(list(blocks), dim=1)[:, -config.gradient_frames :], exit_step


WRONG = {
    "exits": [zero_is_none, counts_from_one, refuses_nothing, first_for_all],
    "draw_exit": [never_the_last, from_torchs_state, each_block_for_itself, last_counts_steps],
    "blocks_with_gradient": [whole_blocks_only, the_first_frames, one_block_more, all_blocks_alike],
    "rollout": [
        keeps_every_gradient,
        remembers_what_was_noisy,
        builds_a_graph_for_memory,
        always_cuts_memory,
        loses_the_cache,
        renoises_with_old_noise,
        takes_every_step,
        makes_all_blocks_first,
    ],
    "self_forcing_step": [
        critic_first,
        critic_pulls_at_the_student,
        rolls_ahead,
        always_rolls_anew,
        one_noise_level,
        forgets_guidance,
        never_guides_the_critic,
        fresh_noise_from_torchs_state,
        always_on_its_own_past,
        generator_says_nothing,
    ],
    "training_rollout": [
        gradient_everywhere,
        scores_the_beginning,
        every_process_for_itself,
        cut_from_the_student,
        any_length_alike,
        always_the_longest,
    ],
}
RIGHT = {
    "exits": exits_spelled_out,
    "draw_exit": by_torch_randint,
    "blocks_with_gradient": frame_by_frame,
    "rollout": own_rollout,
    "self_forcing_step": own_step,
    "training_rollout": own_training_rollout,
}
