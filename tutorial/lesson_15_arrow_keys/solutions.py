"""Solutions of lesson 15. Nothing of this is in the core: it is what you make of it."""

import torch

from dynamic_video_sf import draw_exit, draw_length, rollout
from experiments.switching import run_to_end
from kv_cache import block_sizes
from moving_mnist import DIRECTIONS, Digit, PromptEncoder, format_prompt
from randomness import randint

__all__ = ["direction_of", "obeyed", "steer", "turned", "turning_rollout"]

WORD = 3  # of "a 7 moving left": where the direction stands
OPPOSITE = {"up": "down", "down": "up", "left": "right", "right": "left"}


def direction_of(keys):
    """Rows before columns, as the words of the world have it."""
    held = [key for key in ("up", "down", "left", "right") if key in keys and OPPOSITE[key] not in keys]
    return "-".join(held) or None


def steer(live, digit, presses):
    told = None
    for keys in presses:
        direction = direction_of(keys)
        if direction not in (None, told):
            live.change(prompt=format_prompt([Digit(digit, direction)]), cache="kept")
            told = direction
        yield next(live)


def turned(cond, rng=None):
    """The encoder is frozen, a word's vector plus its place, so that a word can be exchanged in the code itself."""
    embeds = cond["prompt_embeds"].clone()
    encoder = PromptEncoder(embeds.shape[-1])
    words = torch.stack([encoder.vectors[word] for word in DIRECTIONS]) + encoder.places[WORD]
    embeds[:, WORD] = words[randint(len(words), (len(embeds), 1), rng)[:, 0]].to(embeds)
    return {**cond, "prompt_embeds": embeds}


def turning_rollout(generator, scheduler, noise, cond, config, *, data=None, rng=None, shared_rng=None):
    """After LongLive's training (arXiv 2509.22622): the teacher, who knows clips of one prompt alone, judges what comes
    after the turn, and the student learns that its past may tell another story. LongLive reads its cache anew at the
    switch; here it is kept, because a digit's direction is told by what was read under the old prompt."""
    num_frames = draw_length(config, shared_rng)
    turn, cache, settings = max(0, num_frames - config.gradient_frames), None, config.rollout
    if turn:
        with torch.no_grad():
            blocks = rollout(generator, scheduler, noise[:, :turn], turned(cond, rng), settings, rng=rng)
            _, cache = run_to_end(blocks)
    sizes = block_sizes(num_frames - turn, settings.frames_per_block, first_frame=turn)
    exit_step = draw_exit(config, len(sizes), shared_rng)
    options = {"cache": cache, "exit_step": exit_step, "rng": rng}
    blocks = rollout(generator, scheduler, noise[:, turn:num_frames], cond, settings, **options)
    return torch.cat([next(blocks) for _ in sizes], dim=1), exit_step  # nobody needs the last block remembered


def obeyed(centroid, at, headings, world):
    """A box's middle stands half a digit from its corner, and its ink at most about a pixel from there."""
    told = world.speed * headings
    corner = centroid[:, at] - (world.digit_size - 1) / 2 + told
    roomy = ((corner > -1) & (corner < world.reach + 1)).all(-1)
    off = (centroid[:, at + 1] - centroid[:, at] - told).norm(dim=-1)
    return (off[roomy] < world.speed / 2).float().mean().item()
