"""Graders of lesson 0. `make grade LESSON=0`; each message says which idea is missing."""

import re
from dataclasses import replace
from functools import cache
from unittest import mock

import numpy as np
import torch

from generate import load_model
from moving_mnist import MovingMNIST, WorldConfig


def test_black_grey_and_white(to_pixels):
    got = np.asarray(to_pixels(torch.tensor([-1.0, 0.0, 1.0]))).tolist()
    assert got[0] == 0 and got[2] == 255, f"-1 is black (0) and 1 is white (255); yours are {got[0]} and {got[2]}."
    assert got[1] in (127, 128), f"0 is the grey in the middle, 127 or 128, not {got[1]}: shown is (x + 1) / 2."


def test_it_is_bytes_of_the_same_shape(to_pixels):
    video = torch.zeros(2, 3, 1, 4, 5)
    pixels = to_pixels(video)
    assert isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8, "Pictures are numpy arrays of uint8."
    assert pixels.shape == video.shape, f"The shape should stay {tuple(video.shape)}, yours is {pixels.shape}."
    assert (video == 0).all(), "The video that was given has been changed: to_pixels should leave it as it was."


def test_what_lies_outside_is_clipped(to_pixels):
    got = np.asarray(to_pixels(torch.tensor([-1.3, 1.2, 5.0]))).tolist()
    assert got == [0, 255, 255], (
        f"Networks overshoot: -1.3, 1.2 and 5 should become 0, 255, 255, not {got}. Clip before you convert; uint8 "
        "wraps around, and white becomes black."
    )


def test_it_rounds_to_the_nearest(to_pixels):
    values = torch.linspace(-1, 1, 1001)
    error = np.abs(np.asarray(to_pixels(values)).astype(float) / 127.5 - 1 - values.numpy()).max()
    assert error < 1.01 / 255, (
        f"A byte should be at most half a step from the number, which is 1/255 here; yours is off by {error:.4f}. "
        "Round before you convert: astype cuts off. And do not stretch a video to its own darkest and brightest pixel."
    )


def test_a_number_means_equal_blocks(block_sizes):
    got = list(block_sizes(12, 3))
    assert got == [3, 3, 3, 3], f"12 frames in blocks of 3 are [3, 3, 3, 3], not {got}."
    assert list(block_sizes(4, 1)) == [1, 1, 1, 1], "Blocks of one frame are blocks, too."


def test_the_last_entry_repeats(block_sizes):
    got = list(block_sizes(7, (1, 3)))
    assert got == [1, 3, 3], f"(1, 3) means 1, 3, 3, 3, ... frames: of 7 frames [1, 3, 3], not {got}."


def test_blocks_are_counted_from_the_videos_first_frame(block_sizes):
    got = list(block_sizes(6, (1, 3), first_frame=4))
    assert got == [3, 3], (
        f"From frame 4 on, (1, 3) goes on with blocks of 3, so 6 frames are [3, 3], not {got}: the pattern "
        "begins where the video begins, not where this call begins."
    )


def complaint(block_sizes, *args, **options):
    try:
        sizes = block_sizes(*args, **options)
    except ValueError as error:
        return str(error)
    given = ", ".join([*map(str, args), *(f"{name}={value}" for name, value in options.items())])
    raise AssertionError(
        f"block_sizes({given}) gave {sizes}. A block is never cut and no frame is added in silence: the model was "
        "trained on whole blocks. Raise ValueError."
    )


def test_a_cut_block_is_refused_with_the_way_out(block_sizes):
    words = complaint(block_sizes, 13, 3)
    assert "12" in words and "15" in words, (
        f'Your sentence is "{words}". Name the frame counts next to 13 that do fit, 12 and 15: an error should say how '
        "to mend it."
    )
    complaint(block_sizes, 6, 3, first_frame=4)


def test_the_way_out_counts_from_this_call(block_sizes):
    words = complaint(block_sizes, 5, 3, first_frame=30)
    assert "6" in re.findall(r"\d+", words), (
        f'From frame 30 on, 3 or 6 frames fit, not 33 or 36: num_frames is counted from first_frame. Yours: "{words}".'
    )


KEYS = [
    (0, "generate", "a 3 moving right", 0),
    (0, "generate", "a 3 moving right", 1),
    (0, "generate", "a 7 moving up", 0),
]
SHAPE = (1, 5, 5)


def test_shape_and_distribution(draw_noise):
    noise, rng = draw_noise(KEYS, 60, SHAPE)
    assert tuple(noise.shape) == (3, 60, *SHAPE), f"[B, F, C, H, W] is [3, 60, 1, 5, 5], yours {list(noise.shape)}."
    assert len(rng) == 3, "One generator per video, for what is drawn on the way."
    assert noise.mean().abs() < 0.1 and (noise.std() - 1).abs() < 0.1, "Noise is standard normal: mean 0, variance 1."


def test_the_same_key_is_the_same_noise(draw_noise):
    first, _ = draw_noise(KEYS, 3, SHAPE)
    again, _ = draw_noise(KEYS, 3, SHAPE)
    assert torch.equal(first, again), "The same keys should give the same noise, call after call."


def test_another_process_draws_the_same(draw_noise):
    here, _ = draw_noise(KEYS, 3, SHAPE)
    with mock.patch("builtins.hash", lambda key: 7):  # of strings, it is another number in every process
        there, _ = draw_noise(KEYS, 3, SHAPE)
    assert torch.equal(here, there), (
        "Python's hash() of a string is another number each time that Python starts, so tomorrow's video would be "
        "another. Seed from what never changes: randomness.generator(*key)."
    )


def test_neighbours_do_not_matter(draw_noise):
    together, rngs = draw_noise(KEYS, 3, SHAPE)
    alone, (rng,) = draw_noise(KEYS[2:], 3, SHAPE)
    assert torch.equal(together[2:], alone), (
        "The third video has other noise when it is made alone. Numbers drawn for the whole batch from one stream "
        "depend on who else is in it: give every video a generator of its own."
    )
    later = [torch.randn(8, generator=g) for g in (rngs[2], rng)]
    assert torch.equal(*later), "So should what its generator draws later."


def test_every_part_of_the_key_counts(draw_noise):
    noise, _ = draw_noise([*KEYS, (1, "generate", "a 3 moving right", 0)], 3, SHAPE)
    same = [(i, j) for i in range(4) for j in range(i) if torch.equal(noise[i], noise[j])]
    assert not same, f"Videos {same[0]} start from the same noise, though seed, prompt or number of the sample differ."
    assert not torch.equal(noise[0, 0], noise[0, 1]), "Two frames of a video start from the same noise."


def test_a_longer_video_begins_with_the_shorter_one(draw_noise):
    short, _ = draw_noise(KEYS, 3, SHAPE)
    long, _ = draw_noise(KEYS, 7, SHAPE)
    assert torch.equal(short, long[:, :3]), (
        "With 7 frames the first 3 start from other noise than with 3. torch.randn gives other numbers for another "
        "shape: draw frame by frame."
    )


def test_what_comes_later_is_new(draw_noise):
    noise, (rng,) = draw_noise(KEYS[:1], 1, SHAPE)
    later = torch.randn(SHAPE, generator=rng)
    assert not torch.equal(noise[0, 0], later), (
        "The generator draws the very noise that the video started from: noise of the denoising steps would repeat it. "
        "Two purposes, two streams."
    )
    longer, (other,) = draw_noise(KEYS[:1], 4, SHAPE)
    assert torch.equal(later, torch.randn(SHAPE, generator=other)), (
        "What is drawn later depends on the length of the video: keep the two streams apart."
    )


def test_the_global_state_is_left_alone(draw_noise):
    before = torch.get_rng_state()
    draw_noise(KEYS, 2, SHAPE)
    assert torch.equal(before, torch.get_rng_state()), (
        "torch's global random state has moved. Use generators of your own; others may count on theirs."
    )


@cache
def student():
    return load_model("checkpoints/student.safetensors")


PROMPT = "a 3 moving right"


@cache
def real(index):
    """A real clip [1, F, C, H, W] of digits that no model has seen."""
    world = MovingMNIST(WorldConfig(split="validation"), seed=3, prompts=[PROMPT])
    return world.batch([index])["video"]


def test_it_begins_with_what_was_given(continue_video):
    video = continue_video(student(), real(0)[:, :3], PROMPT, 3)
    assert video.shape[1] == 6, f"3 given frames and 3 new ones are 6, yours are {video.shape[1]}."
    assert torch.equal(video[:, :3], real(0)[:, :3]), "The given frames should come first, untouched."


def test_it_goes_on_with_that_digit_on_its_path(continue_video):
    video = continue_video(student(), real(2)[:, :6], PROMPT, 3)
    off, far = ((x[:, 6:9] - real(2)[:, 6:9]).abs().mean().item() for x in (video, real(0)))
    assert off < 0.6 * far, (
        f"The new frames are {off:.2f} per pixel from how this digit really moves on; another digit is {far:.2f} away. "
        "Has the model seen the given frames? Their keys and values must be in the cache before it begins."
    )


class Watched(torch.nn.Module):
    """A model that notes where it is called and what it is given to remember."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls, self.remembered = model, [], []

    def forward(self, x_t, t, cond, cache):
        self.calls.append(cache.next_frame)
        return self.model(x_t, t, cond, cache)

    def remember(self, x, t, cond, cache):
        self.remembered.append((cache.next_frame, x.shape[1]))
        return self.model.remember(x, t, cond, cache)


def test_the_past_is_read_block_by_block(continue_video):
    watched = Watched(student().model)
    continue_video(replace(student(), model=watched), real(0)[:, :6], PROMPT, 3)
    assert watched.remembered[:2] == [(0, 3), (3, 3)], (
        f"Remembered were (first frame, frames): {watched.remembered}. In training every block was read by itself, "
        "seeing only those before it: read the given frames in blocks of 3, from frame 0."
    )
    assert set(watched.calls) == {6}, (
        f"The new block was made as if it began at frame {watched.calls[:1]}; it begins at frame 6, after "
        "what was given."
    )


def test_the_seed_fixes_what_follows(continue_video):
    first, again, other = (continue_video(student(), real(0)[:, :3], PROMPT, 3, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again), "The same seed should give the same video: hand rng to prefill and to generate."
    assert not torch.equal(first, other), "Another seed should give another video."
