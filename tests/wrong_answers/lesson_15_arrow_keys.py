"""Lesson 15: wrong and right answers."""

import torch

from dynamic_video_sf import draw_exit, draw_length, generate, prefill, rollout, training_rollout
from experiments.switching import run_to_end
from moving_mnist import DIRECTIONS, PromptEncoder
from randomness import randint
from tutorial.lesson_15_arrow_keys import solutions

ORDER = ("up", "down", "left", "right")


def in_any_order(keys):
    return "-".join(sorted(keys, reverse=True)) or None


def columns_first(keys):
    word = solutions.direction_of(keys)
    return "-".join(reversed(word.split("-"))) if word else None


def never_cancels(keys):
    return "-".join(key for key in ORDER if key in keys) or None


def empty_word(keys):
    return solutions.direction_of(keys) or ""


def first_key_alone(keys):
    return next((key for key in ORDER if key in keys), None)


def by_vectors(keys):
    """Arrows add up."""
    total = tuple(sum(DIRECTIONS[key][axis] for key in keys) for axis in (0, 1))
    return next((word for word, heading in DIRECTIONS.items() if heading == total), None)


def too_late(live, digit, presses):
    for keys in presses:
        block = next(live)
        if direction := solutions.direction_of(keys):
            live.change(prompt=f"a {digit} moving {direction}", cache="kept")
        yield block


def with_the_past(treatment):
    """Steers rightly, but for what it does about the cache."""

    def steer(live, digit, presses):
        told = None
        for keys in presses:
            direction = solutions.direction_of(keys)
            if direction and direction != told:
                live.change(prompt=f"a {digit} moving {direction}", cache=treatment)
                told = direction
            yield next(live)

    steer.__name__ = f"past_{treatment}"
    return steer


def at_every_block(live, digit, presses):
    for keys in presses:
        live.change(prompt=f"a {digit} moving {solutions.direction_of(keys)}", cache="kept")
        yield next(live)


def forgets_what_it_told(live, digit, presses):
    """After a pause the same direction is told again."""
    told = None
    for keys in presses:
        direction = solutions.direction_of(keys)
        if direction and direction != told:
            live.change(prompt=f"a {digit} moving {direction}", cache="kept")
        told = direction
        yield next(live)


def all_at_once(live, digit, presses):
    return iter(list(solutions.steer(live, digit, presses)))


def with_a_comparison(live, digit, presses):
    prompt = ""
    for keys in presses:
        wanted = by_vectors(keys)
        new = f"a {digit} moving {wanted}" if wanted else prompt
        if new != prompt:
            live.change(prompt=new)
        prompt = new
        yield next(live)


def vectors(embeds, place=True):
    encoder = PromptEncoder(embeds.shape[-1])
    return torch.stack([encoder.vectors[word] for word in DIRECTIONS]) + (encoder.places[3] if place else 0)


def in_place(cond, rng=None):
    embeds = cond["prompt_embeds"]
    embeds[:, 3] = vectors(embeds)[randint(8, (len(embeds), 1), rng)[:, 0]]
    return cond


def without_the_place(cond, rng=None):
    embeds = cond["prompt_embeds"].clone()
    embeds[:, 3] = vectors(embeds, place=False)[randint(8, (len(embeds), 1), rng)[:, 0]]
    return {**cond, "prompt_embeds": embeds}


def one_for_all(cond, rng=None):
    embeds = cond["prompt_embeds"].clone()
    embeds[:, 3] = vectors(embeds)[randint(8, (1,), rng[0])[0]]
    return {**cond, "prompt_embeds": embeds}


def from_anywhere(cond, rng=None):
    embeds = cond["prompt_embeds"].clone()
    embeds[:, 3] = vectors(embeds)[torch.randint(8, (len(embeds),))]
    return {**cond, "prompt_embeds": embeds}


def from_the_neighbour(cond, rng=None):
    """Another sample's direction depends on the batch."""
    embeds = cond["prompt_embeds"].clone()
    embeds[:, 3] = embeds[:, 3].roll(1, 0)
    return {**cond, "prompt_embeds": embeds}


def whole_prompts(cond, rng=None):
    return {**cond, "prompt_embeds": cond["prompt_embeds"].roll(1, 0)}


def loses_the_image(cond, rng=None):
    return {"prompt_embeds": solutions.turned(cond, rng)["prompt_embeds"]}


def by_encoding(cond, rng=None):
    """Reads the digit back out of the code, and encodes a new prompt."""
    embeds = cond["prompt_embeds"]
    encoder = PromptEncoder(embeds.shape[-1])
    digits = torch.stack([encoder.vectors[str(digit)] + encoder.places[1] for digit in range(10)])
    shown = torch.cdist(embeds[:, 1].contiguous(), digits).argmin(1).tolist()
    drawn = randint(8, (len(embeds), 1), rng)[:, 0].tolist()
    prompts = [f"a {digit} moving {[*DIRECTIONS][word]}" for digit, word in zip(shown, drawn, strict=True)]
    return {**cond, **encoder(prompts)}


def never_turns(generator, scheduler, noise, cond, config, *, data=None, rng=None, shared_rng=None):
    return training_rollout(generator, scheduler, noise, cond, config, rng=rng, shared_rng=shared_rng)


def turned_throughout(generator, scheduler, noise, cond, config, *, data=None, rng=None, shared_rng=None):
    told = solutions.turned(cond, rng)
    return training_rollout(generator, scheduler, noise, told, config, rng=rng, shared_rng=shared_rng)


def drawn(config, shared_rng):
    """Clip length, frames before the turn, exit step."""
    num_frames = draw_length(config, shared_rng)
    turn = max(0, num_frames - config.gradient_frames)
    return num_frames, turn, draw_exit(config, (num_frames - turn) // config.rollout.frames_per_block, shared_rng)


def the_past(generator, scheduler, noise, cond, config, rng):
    if not noise.shape[1]:
        return None
    with torch.no_grad():
        return run_to_end(rollout(generator, scheduler, noise, solutions.turned(cond, rng), config, rng=rng))[1]


def the_rest(generator, scheduler, noise, cond, config, exit_step, rng, cache):
    options = {"cache": cache, "exit_step": exit_step, "rng": rng}
    return torch.cat(list(rollout(generator, scheduler, noise, cond, config, **options)), dim=1)


def forgets_the_past(generator, scheduler, noise, cond, config, *, data=None, rng=None, shared_rng=None):
    num_frames, turn, exit_step = drawn(config, shared_rng)
    the_past(generator, scheduler, noise[:, :turn], cond, config.rollout, rng)
    rest = noise[:, turn:num_frames]
    return the_rest(generator, scheduler, rest, cond, config.rollout, exit_step, rng, None), exit_step


def past_read_anew(generator, scheduler, noise, cond, config, *, data=None, rng=None, shared_rng=None):
    num_frames, turn, exit_step = drawn(config, shared_rng)
    cache = None
    if turn:
        told = solutions.turned(cond, rng)
        before = generate(generator, scheduler, noise[:, :turn], told, config.rollout, rng=rng)
        cache = prefill(generator, scheduler, before, cond, config.rollout, rng=rng)
    rest = noise[:, turn:num_frames]
    return the_rest(generator, scheduler, rest, cond, config.rollout, exit_step, rng, cache), exit_step


def turns_too_late(generator, scheduler, noise, cond, config, *, data=None, rng=None, shared_rng=None):
    """A block of the frames that count is still made under the old prompt."""
    num_frames, turn, exit_step = drawn(config, shared_rng)
    rollout_config = config.rollout
    turn += rollout_config.frames_per_block
    told = solutions.turned(cond, rng)
    before, cache = run_to_end(rollout(generator, scheduler, noise[:, :turn], told, rollout_config, rng=rng))
    rest = noise[:, turn:num_frames]
    video = the_rest(generator, scheduler, rest, cond, rollout_config, exit_step, rng, cache)
    return torch.cat([before, video], dim=1)[:, -config.gradient_frames :], exit_step


def keeps_the_whole_graph(generator, scheduler, noise, cond, config, *, data=None, rng=None, shared_rng=None):
    num_frames, turn, exit_step = drawn(config, shared_rng)
    cache = None
    if turn:
        told = solutions.turned(cond, rng)
        _, cache = run_to_end(rollout(generator, scheduler, noise[:, :turn], told, config.rollout, rng=rng))
    rest = noise[:, turn:num_frames]
    return the_rest(generator, scheduler, rest, cond, config.rollout, exit_step, rng, cache), exit_step


def exit_before_length(generator, scheduler, noise, cond, config, *, data=None, rng=None, shared_rng=None):
    exit_step = draw_exit(config, config.gradient_frames // config.rollout.frames_per_block, shared_rng)
    num_frames, turn, _ = drawn(config, shared_rng)
    cache = the_past(generator, scheduler, noise[:, :turn], cond, config.rollout, rng)
    rest = noise[:, turn:num_frames]
    return the_rest(generator, scheduler, rest, cond, config.rollout, exit_step, rng, cache), exit_step


class TwoPrompts:
    """A generator that is told something else before a frame than after it."""

    def __init__(self, generator, turn, told):
        self.generator, self.turn, self.told = generator, turn, told

    def told_at(self, cond, cache):
        return self.told if cache.next_frame < self.turn else cond

    def __call__(self, x_t, t, cond, cache):
        return self.generator(x_t, t, self.told_at(cond, cache), cache)

    def remember(self, x, t, cond, cache):
        return self.generator.remember(x, t, self.told_at(cond, cache), cache)


def in_one_rollout(generator, scheduler, noise, cond, config, *, data=None, rng=None, shared_rng=None):
    """One rollout, whose blocks before the turn take all steps, have no gradient, and are told something else."""
    num_frames, turn, exit_step = drawn(config, shared_rng)
    size, last = config.rollout.frames_per_block, len(config.rollout.denoising_steps) - 1
    exits = [exit_step if start >= turn else last for start in range(0, num_frames, size)]
    told = TwoPrompts(generator, turn, solutions.turned(cond, rng))
    blocks = rollout(told, scheduler, noise[:, :num_frames], cond, config.rollout, exit_step=exits, rng=rng)
    video = []
    for start in range(0, num_frames, size):
        with torch.set_grad_enabled(start >= turn):
            video.append(next(blocks))
    return torch.cat(video, dim=1)[:, turn:], exit_step


def room(centroid, at, headings, world):
    corner = centroid[:, at] - (world.digit_size - 1) / 2 + world.speed * headings
    return ((corner > -1) & (corner < world.reach + 1)).all(-1)


def step(centroid, at):
    return centroid[:, at + 1] - centroid[:, at]


def walls_count(centroid, at, headings, world):
    off = (step(centroid, at) - world.speed * headings).norm(dim=-1)
    return (off < world.speed / 2).float().mean().item()


def along_the_heading(centroid, at, headings, world):
    """Any step with a part in the told direction."""
    along = (step(centroid, at) * headings).sum(-1)
    return (along > 0)[room(centroid, at, headings, world)].float().mean().item()


def axes_swapped(centroid, at, headings, world):
    return solutions.obeyed(centroid, at, headings.flip(-1), world)


def either_way(centroid, at, headings, world):
    off = (step(centroid, at).abs() - world.speed * headings.abs()).norm(dim=-1)
    return (off < world.speed / 2)[room(centroid, at, headings, world)].float().mean().item()


def the_step_before(centroid, at, headings, world):
    return solutions.obeyed(centroid, at - 1, headings, world)


def one_by_one(centroid, at, headings, world):
    """In a loop over clips, and axes."""
    counted = []
    for path, heading in zip(centroid.tolist(), headings.tolist(), strict=True):
        told = [world.speed * part for part in heading]
        corner = [x - (world.digit_size - 1) / 2 + part for x, part in zip(path[at], told, strict=True)]
        if all(-1 < x < world.reach + 1 for x in corner):
            off = sum((path[at + 1][axis] - path[at][axis] - told[axis]) ** 2 for axis in (0, 1)) ** 0.5
            counted.append(off < world.speed / 2)
    return sum(counted) / len(counted)


WRONG = {
    "direction_of": [in_any_order, columns_first, never_cancels, empty_word, first_key_alone],
    "steer": [
        too_late,
        with_the_past("emptied"),
        with_the_past("anew"),
        at_every_block,
        forgets_what_it_told,
        all_at_once,
    ],
    "turned": [
        in_place,
        without_the_place,
        one_for_all,
        from_anywhere,
        from_the_neighbour,
        whole_prompts,
        loses_the_image,
    ],
    "turning_rollout": [
        never_turns,
        turned_throughout,
        forgets_the_past,
        past_read_anew,
        turns_too_late,
        keeps_the_whole_graph,
        exit_before_length,
    ],
    "obeyed": [walls_count, along_the_heading, axes_swapped, either_way, the_step_before],
}
RIGHT = {
    "direction_of": by_vectors,
    "steer": with_a_comparison,
    "turned": by_encoding,
    "turning_rollout": in_one_rollout,
    "obeyed": one_by_one,
}
