"""Exercises of lesson 15. README.md says what each wants; `make grade LESSON=15` says how far you are."""

from tutorial.grading import todo


def direction_of(keys):
    """The direction that a set of pressed arrow keys means: one of moving_mnist.DIRECTIONS, or None for none.

    keys: any of "up", "down", "left", "right". Two neighbours are a diagonal, "up-left"; opposite ones cancel.
    """
    todo("turn pressed keys into a word of the prompt.")


def steer(live, digit, presses):
    """A video under arrow keys: yields its blocks, one for each press; it ends when the presses do.

    live: a live.Live, whose prompt names the digit already; `change` and `next` are all that it is asked for. presses:
    an iterable with the set of keys that is held down when a block begins, block after block. No key: it goes on as it
    was told last. The past is kept.
    """
    todo("tell the live video a new direction when the keys ask for one, and take its next block.")


def turned(cond, rng=None):
    """The same prompts with a random direction each: {"prompt_embeds": [B, L, D]} as before, but for one word.

    cond: what moving_mnist.PromptEncoder says of prompts with one digit. rng: one generator per sample. What else is in
    cond stays, and cond itself is left as it was.
    """
    todo("put the word of another direction in its place in the encoded prompts.")


def turning_rollout(generator, scheduler, noise, cond, config, *, data=None, rng=None, shared_rng=None):
    """A student's clip that is told another direction before the frames that count: those, and the exit step.

    As `dynamic_video_sf.training_rollout`: noise [B, max_num_frames, C, H, W], config a SelfForcingConfig; clip length,
    then the exit step, come from shared_rng. What lies before the last gradient_frames frames is made under `turned`
    prompts, as at inference and without a gradient; the cache is kept. gradient_frames is a whole number of blocks.
    """
    todo("roll out under turned prompts, then go on under the right ones from the cache that came back.")


def obeyed(centroid, at, headings, world):
    """The share of clips that take their first step after frame `at`, the first new one, as they are told: a float.

    centroid [B, F, 2]: of the ink, in pixels (y, x). headings [B, 2]: moving_mnist.DIRECTIONS of the new prompts. A
    step counts if it is closer to the told one, world.speed pixels along each axis of the heading, than half a
    world.speed. Where the wall is nearer than a whole step, within a pixel, nobody could obey: those are left out.
    """
    todo("compare the step from frame `at` to the next with the told one, where there is room for it.")
