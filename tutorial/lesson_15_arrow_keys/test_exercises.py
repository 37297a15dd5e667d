"""Graders of lesson 15. `make grade LESSON=15`; each message says which idea is missing."""

from dataclasses import dataclass, replace
from itertools import chain, combinations

import torch

from dynamic_video_sf import RolloutConfig, SelfForcingConfig, training_rollout
from flow_match import FlowMatchScheduler
from moving_mnist import DIRECTIONS, PromptEncoder, WorldConfig
from randomness import generator, generators

KEYS = ("up", "down", "left", "right")
PROMPTS = [f"a {digit} moving {direction}" for digit, direction in zip(range(8), DIRECTIONS, strict=True)]

# ---------------------------------------------------------------------------------------------------- direction_of


def test_one_key_is_its_direction(direction_of):
    for key in KEYS:
        got = direction_of({key})
        assert got == key, f"The {key} key alone means {key!r}, yours says {got!r}."


def test_two_neighbours_are_a_diagonal(direction_of):
    for row, column in (("up", "left"), ("up", "right"), ("down", "left"), ("down", "right")):
        got = direction_of({column, row})
        assert got == f"{row}-{column}", (
            f"{row} and {column} together mean {row}-{column}, yours says {got!r}: the row comes first, in whatever "
            "order a set has them."
        )


def test_opposite_keys_cancel(direction_of):
    assert direction_of({"up", "down"}) is None, "Up and down together are no direction: None."
    got = direction_of({"left", "right", "up"})
    assert got == "up", f"Left and right cancel, up is left over; yours says {got!r}."
    assert direction_of(set(KEYS)) is None, "All four keys together are no direction: None."


def test_no_key_is_no_direction(direction_of):
    got = direction_of(set())
    assert got is None, f"No key means None, which is not a word of the prompt; yours says {got!r}."


def test_whatever_is_pressed_is_a_word_or_none(direction_of):
    for keys in chain.from_iterable(combinations(KEYS, n) for n in range(5)):
        got = direction_of(frozenset(keys))
        assert got is None or got in DIRECTIONS, f"{set(keys)} gave {got!r}, which the prompts do not know."


# ----------------------------------------------------------------------------------------------------------- steer


class Recorder:
    """A live video that writes down in which order it was asked for what."""

    def __init__(self):
        self.asked = []

    def change(self, **wanted):
        self.asked.append(wanted)

    def __iter__(self):
        return self

    def __next__(self):
        self.asked.append("block")
        return f"block {self.asked.count('block')}"


def driven(steer, *presses):
    live = Recorder()
    return list(steer(live, 7, presses)), live.asked


def prompts_in(asked):
    return [wanted if wanted == "block" else wanted.get("prompt") for wanted in asked]


def test_every_press_is_one_block(steer):
    blocks, _ = driven(steer, {"up"}, set(), {"left"})
    assert blocks == ["block 1", "block 2", "block 3"], (
        f"Three looks at the keys are three blocks, yielded as live makes them; yours yielded {blocks}."
    )


def test_a_key_holds_for_the_very_next_block(steer):
    _, asked = driven(steer, {"up"}, {"left"})
    assert prompts_in(asked) == ["a 7 moving up", "block", "a 7 moving left", "block"], (
        f"Tell it first, then take the block: a change holds from the next block on. Yours did {prompts_in(asked)}."
    )


def test_the_past_is_kept(steer):
    _, asked = driven(steer, {"up"}, {"left"})
    treated = {wanted.get("cache", "kept") for wanted in asked if wanted != "block"}
    assert treated == {"kept"}, (
        f"The cache was {treated}: without its past the digit is made anew somewhere else, and one that is read anew "
        "tells another story. Keep it."
    )


def test_no_key_lets_it_go_on(steer):
    _, asked = driven(steer, {"down"}, set(), {"left", "right"})
    assert prompts_in(asked) == ["a 7 moving down", "block", "block", "block"], (
        f"Nobody presses, or two keys cancel: it goes on as it was told. Yours did {prompts_in(asked)}."
    )


def test_a_held_key_is_one_change(steer):
    _, asked = driven(steer, {"up"}, {"up"}, set(), {"up"}, {"down"})
    assert prompts_in(asked) == ["a 7 moving up", "block", "block", "block", "block", "a 7 moving down", "block"], (
        f"The same direction again is no change, not even after a pause. Yours did {prompts_in(asked)}."
    )


def test_it_looks_at_the_keys_block_by_block(steer):
    live, looked = Recorder(), []

    def presses():
        for keys in ({"up"}, {"left"}, {"down"}):
            looked.append(keys)
            yield keys

    game = steer(live, 7, presses())
    next(iter(game))
    assert len(looked) == 1, (
        f"After the first block it had looked at the keys {len(looked)} times: they are pressed while the video goes "
        "on. Make it a generator."
    )


# ---------------------------------------------------------------------------------------------------------- turned


def encoded(prompts=PROMPTS):
    return {**PromptEncoder()(prompts), "image": torch.arange(len(prompts))}


def rngs(seed=0):
    return generators(seed, "turned", samples=range(8))


CODES = encoded([f"a 0 moving {direction}" for direction in DIRECTIONS])["prompt_embeds"][:, 3]


def words_of(embeds):
    """The directions that the encoded prompts name, "" where it is none."""
    far = (embeds[:, 3, None] - CODES).abs().amax(-1)  # [b 8]
    return [[*DIRECTIONS][row.argmin()] if row.min() < 1e-5 else "" for row in far]


def test_only_the_direction_changes(turned):
    cond = encoded()
    got = turned(cond, rngs())["prompt_embeds"]
    assert got.shape == cond["prompt_embeds"].shape, "As many words as before, and as wide."
    rest = [0, 1, 2]
    assert torch.equal(got[:, rest], cond["prompt_embeds"][:, rest]), (
        'In "a 7 moving left" only the fourth word is the direction; another one changed.'
    )


def test_it_becomes_a_real_direction(turned):
    words = words_of(turned(encoded(), rngs())["prompt_embeds"])
    assert all(words), (
        "The new token is none that the encoder would write. A token is the word's vector plus the code of its place, "
        "and the direction stands at place 3."
    )


def test_every_sample_has_its_own(turned):
    drawn = [words_of(turned(encoded(), rngs(seed))["prompt_embeds"]) for seed in range(20)]
    assert any(len(set(words)) > 1 for words in drawn), "All samples of a batch were told the same: draw one for each."
    seen = {word for words in drawn for word in words}
    assert seen == set(DIRECTIONS), f"After 160 draws only {sorted(seen)} were seen: all eight must be possible."


def test_a_sample_does_not_depend_on_its_batch(turned):
    whole = turned(encoded(), rngs())["prompt_embeds"]
    alone = turned(encoded(PROMPTS[5:6]), rngs()[5:6])["prompt_embeds"]
    again = turned(encoded(), rngs())["prompt_embeds"]
    assert torch.equal(whole, again), "The same generators drew another direction: draw from rng, not from anywhere."
    assert torch.equal(whole[5], alone[0]), (
        "Alone in its batch, a sample was told another direction: draw with its own generator, randint(..., rng)."
    )


def test_the_right_prompts_stay(turned):
    cond = encoded()
    got = turned(cond, rngs())
    assert torch.equal(cond["prompt_embeds"], encoded()["prompt_embeds"]), (
        "cond was changed in place. The teacher is given it too, and would judge by the wrong prompt: work on a clone."
    )
    assert "image" in got, "What else is in cond, such as a given image, belongs to the turned prompts as well."


# -------------------------------------------------------------------------------------------------- turning_rollout


class Storyteller(torch.nn.Module):
    """A generator whose frames say what direction it is told; its cache says what it was told when it read them."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.calls, self.remembered = [], []

    def told(self, cond):
        return torch.tensor([[*DIRECTIONS].index(word) for word in words_of(cond["prompt_embeds"])]).float()

    def forward(self, x_t, t, cond, cache=None):
        end = cache.next_frame + x_t.shape[1]
        self.calls.append({"told": self.told(cond), "cache": cache, "grad": torch.is_grad_enabled(), "end": end})
        x0 = self.weight * self.told(cond).reshape(-1, 1, 1, 1, 1).expand_as(x_t)
        return FlowMatchScheduler().to_flow(x0, x_t, t)

    @property
    def length(self):
        """Frames that were made."""
        return max(call["end"] for call in self.calls)

    def remember(self, x, t, cond, cache):
        told = self.told(cond)
        self.remembered.append({"x": x, "told": told})
        read = told.reshape(-1, 1, 1, 1).expand(-1, x.shape[1], 1, 1)  # one token per frame
        return cache.extend([(x.flatten(2)[:, :, None], read)], x.shape[1])


ROLLOUT = RolloutConfig(frames_per_block=3, window_frames=6)
CONFIG = SelfForcingConfig(ROLLOUT, critic_steps=1, gradient_frames=6, min_num_frames=6, max_num_frames=15)


def turning(turning_rollout, config=CONFIG, step=0):
    teller = Storyteller()
    noise = torch.randn(8, config.max_num_frames, 1, 2, 2, generator=generator(0, "noise"))
    options = {"rng": rngs(), "shared_rng": generator(0, step, "shared")}
    video, exit_step = turning_rollout(teller, FlowMatchScheduler(), noise, encoded(), config, data=None, **options)
    return video, exit_step, teller


def length_and_exit(config, step):
    """What training_rollout would draw from the same shared_rng."""
    teller, noise = Storyteller(), torch.zeros(8, config.max_num_frames, 1, 2, 2)
    _, exit_step = training_rollout(
        teller, FlowMatchScheduler(), noise, encoded(), config, rng=rngs(), shared_rng=generator(0, step, "shared")
    )
    return teller.length, exit_step


def long_step(config=CONFIG):
    """A step whose clip is as long as they come."""
    return next(step for step in range(100) if length_and_exit(config, step)[0] == config.max_num_frames)


RIGHT = torch.arange(8).float()


def test_it_returns_the_frames_that_count(turning_rollout):
    for step in range(4):
        video, _, _ = turning(turning_rollout, step=step)
        assert video.shape == (8, 6, 1, 2, 2), (
            f"The last gradient_frames = 6 frames count, whatever the clip's length; yours are {tuple(video.shape)}."
        )


def test_those_frames_obey_the_right_prompt(turning_rollout):
    video, _, _ = turning(turning_rollout, step=long_step())
    told = video.mean((2, 3, 4)).round()
    assert torch.equal(told, RIGHT[:, None].expand(8, 6)), (
        "Frames that the teacher is shown were made under another prompt than the one it judges by."
    )


def test_what_came_before_was_told_otherwise(turning_rollout):
    _, _, teller = turning(turning_rollout, step=long_step())
    before = [one["told"] for one in teller.remembered[:3]]
    assert teller.length == CONFIG.max_num_frames, (
        f"This clip has {CONFIG.max_num_frames} frames, nine of them before the turn; yours has {teller.length}."
    )
    assert not any(torch.equal(told, RIGHT) for told in before), "Before the turn, prompts are turned; yours were not."
    assert all(torch.equal(told, before[0]) for told in before), (
        "The prompt turns once. Yours changed from block to block before the turn: call `turned` a single time."
    )


def test_the_cache_is_kept(turning_rollout):
    _, _, teller = turning(turning_rollout, step=long_step())
    first = next((call for call in teller.calls if torch.equal(call["told"], RIGHT)), {"cache": None})
    held = () if first["cache"] is None else first["cache"].frames
    assert held == (3, 4, 5, 6, 7, 8), (
        f"After nine frames the first block under the right prompt must see frames 3 to 8, its window; it saw {held}. "
        "rollout returns its cache: hand it on."
    )
    read = first["cache"].layers[0][1].flatten(1)[:, 0]
    assert torch.equal(read, teller.remembered[0]["told"]) and not torch.equal(read, RIGHT), (
        "The past was read anew under the right prompt, so nothing tells that the prompt has turned: keep the cache."
    )


def test_short_clips_do_not_turn(turning_rollout):
    step = next(step for step in range(100) if length_and_exit(CONFIG, step)[0] == 6)
    _, _, teller = turning(turning_rollout, step=step)
    assert all(torch.equal(call["told"], RIGHT) for call in teller.calls), (
        "A clip of gradient_frames frames has nothing before the frames that count, and so no turn."
    )


def test_gradient_comes_from_one_call_of_each_block(turning_rollout):
    video, exit_step, teller = turning(turning_rollout, step=long_step())
    assert video.requires_grad, "The frames that count have no gradient: only what lies before the turn has none."
    with_gradient = [call for call in teller.calls if call["grad"]]
    assert all(torch.equal(call["told"], RIGHT) for call in with_gradient), (
        "A call before the turn kept its graph: memory would grow with the clip. Put that rollout under no_grad."
    )
    assert len(with_gradient) == 2, (
        f"Two blocks count, so two calls keep a gradient, those at the exit; yours kept {len(with_gradient)}."
    )


def test_length_and_exit_are_those_of_training_rollout(turning_rollout):
    config = replace(CONFIG, shortest_share=0.5)
    for step in range(8):
        length, exit_step = length_and_exit(config, step)
        _, got, teller = turning(turning_rollout, config, step)
        assert teller.length == length and got == exit_step, (
            f"From the same shared_rng training_rollout draws {length} frames and exit {exit_step}, yours "
            f"{teller.length} and {got}: first the length, then the exit, both from shared_rng. All processes must "
            "agree."
        )


def test_before_the_turn_it_is_inference(turning_rollout):
    config = replace(CONFIG, exit_rule="random")
    for step in range(12):
        length, _ = length_and_exit(config, step)
        _, _, teller = turning(turning_rollout, config, step)
        calls = sum(not torch.equal(call["told"], RIGHT) for call in teller.calls)
        assert calls == 4 * (length - 6) // 3, (
            f"Before the turn {(length - 6) // 3} blocks take all four denoising steps, as at inference; yours took "
            f"{calls} calls."
        )


# ---------------------------------------------------------------------------------------------------------- obeyed

WORLD = WorldConfig()
MIDDLE = (WORLD.digit_size - 1) / 2


@dataclass(frozen=True)
class Clips:
    """Centroids of clips of four frames whose digits stand at corners and take steps after frame 1."""

    corners: list
    steps: list
    told: list

    @property
    def centroid(self):
        path = torch.tensor(self.corners).float()[:, None].repeat(1, 4, 1)
        path[:, 2:] += torch.tensor(self.steps).float()[:, None]
        return path + MIDDLE

    def score(self, obeyed):
        return obeyed(self.centroid, 1, torch.tensor(self.told), WORLD)


def test_obedience_is_one(obeyed):
    got = Clips([(4, 4), (6, 2)], [(0, 2), (-2, -2)], [(0, 1), (-1, -1)]).score(obeyed)
    assert got == 1.0, (
        f"Both digits took the told step, one to the right, one up-left, and the share is {got}. Centroids are (y, x), "
        "and the step is world.speed times the heading."
    )


def test_the_opposite_and_the_wrong_axis_are_not(obeyed):
    got = Clips([(4, 4)] * 4, [(0, -2), (2, 0), (0, 0), (0, 2)], [(0, 1)] * 4).score(obeyed)
    assert got == 0.25, f"One in four moved to the right: back, down and not at all are no obedience; yours says {got}."


def test_half_a_diagonal_is_not(obeyed):
    got = Clips([(4, 4)] * 2, [(2, 0), (2, 2)], [(1, 1)] * 2).score(obeyed)
    assert got == 0.5, f"Down is not down-right: both axes count. Yours says {got}, right is 0.5."


def test_it_is_the_step_after_that_frame(obeyed):
    clips = Clips([(4, 4)], [(0, 2)], [(0, 1)])
    early = obeyed(clips.centroid, 0, torch.tensor(clips.told), WORLD)
    assert early == 0.0, "From frame 0 to 1 nothing moves in this clip: compare frame `at` with the one after it."


def test_who_stands_at_the_wall_is_left_out(obeyed):
    reach = WORLD.reach
    got = Clips([(4, reach), (4, 4), (0, 4)], [(0, -2), (0, 2), (2, 0)], [(0, 1), (0, 1), (-1, 0)]).score(obeyed)
    assert got == 1.0, (
        f"Two digits stand at the wall that they are sent into, and bounce; the third obeys. Yours says {got}: the box "
        f"moves in [0, {reach}], its middle half a digit further, and who has no room is left out."
    )


def test_nearly_a_step_of_room_is_enough(obeyed):
    got = Clips([(4, WORLD.reach - 1.5), (4, 4)], [(0, 2), (0, -2)], [(0, 1), (0, 1)]).score(obeyed)
    assert got == 0.5, (
        f"The ink's middle may be a pixel off the box's: room is asked for within a pixel. Yours says {got}, right is "
        "0.5."
    )


def test_a_pixel_off_is_too_far(obeyed):
    got = Clips([(4, 4)] * 2, [(0, 1.3), (0, 0.7)], [(0, 1)] * 2).score(obeyed)
    assert got == 0.5, f"Closer than half a step counts: 1.3 for 2 pixels does, 0.7 does not; yours says {got}."


def test_the_answer_is_a_number(obeyed):
    got = Clips([(4, 4)], [(0, 2)], [(0, 1)]).score(obeyed)
    assert isinstance(got, float), f"Give a float, not {type(got).__name__}."
