"""Videos whose prompt changes in the middle, with three things that one can do about the cache."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from digit_classifiers import NUM_CLASSES
from dynamic_video_sf import recache, rollout
from generate import LoadedModel, draw_noise, sample_keys
from live import CACHES
from moving_mnist import DIRECTIONS, format_prompt, parse_prompt


def another_digit(prompt: str) -> str:
    """The prompt with every digit replaced by the third after it, moving as before."""
    return format_prompt([replace(digit, label=(digit.label + 3) % NUM_CLASSES) for digit in parse_prompt(prompt)])


def another_direction(prompt: str) -> str:
    """The prompt with every direction replaced by the third after it, of the same digits."""
    words = [*DIRECTIONS] * 2
    digits = parse_prompt(prompt)
    return format_prompt([replace(digit, direction=words[words.index(digit.direction) + 3]) for digit in digits])


BEFORE = {"digit": another_digit, "direction": another_direction}


@torch.no_grad()
def switched_videos(
    loaded: LoadedModel, prompts: Sequence[str], num_frames: int, seed: int, *, at: int, cache: str, new: str = "digit"
):
    """Videos [B, F, C, H, W] that are told another digit (or direction: new) until frame `at`, then the prompts.

    cache: "kept", as the old prompt left it; "anew", the same frames read under the new prompt; or "emptied". Raises
    ValueError for another word.
    """
    for name, value, known in (("cache", cache, CACHES), ("new", new, BEFORE)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
    config = loaded.sampling.rollout
    noise, rng = draw_noise(sample_keys(prompts, seed), num_frames, loaded.frame_shape)
    first, then = loaded.encoder([BEFORE[new](prompt) for prompt in prompts]), loaded.encoder(prompts)
    model = (loaded.model, loaded.scheduler)
    before, memory = run_to_end(rollout(*model, noise[:, :at], first, config, rng=rng))
    if cache == "anew":
        memory = recache(*model, before[:, list(memory.frames)], then, config, memory, rng=rng)
    elif cache == "emptied":
        memory = config.empty_cache()
    after, _ = run_to_end(rollout(*model, noise[:, at:], then, config, rng=rng, cache=memory))
    return torch.cat([before, after], dim=1)


def run_to_end(blocks) -> tuple[Tensor, object]:
    """All blocks of a rollout as one video, and the cache that it returns."""
    seen = []
    while True:
        try:
            seen.append(next(blocks))
        except StopIteration as end:
            return torch.cat(seen, dim=1), end.value
