"""Exercises of lesson 0. README.md says what each wants; `make grade LESSON=0` says how far you are."""

import numpy as np
from torch import Tensor

from tutorial.grading import todo


def to_pixels(video: Tensor) -> np.ndarray:
    """Videos of any shape in [-1, 1], what lies outside clipped, as uint8 in 0 ... 255."""
    todo("turn numbers in [-1, 1] into bytes.")


def block_sizes(num_frames: int, frames_per_block, *, first_frame: int = 0) -> list[int]:
    """How `num_frames` frames from frame `first_frame` of the video on fall into blocks.

    frames_per_block: n, or a tuple whose last entry repeats: (1, 3) means blocks of 1, 3, 3, ... frames, counted from
    frame 0 of the video. Raises ValueError where a block would be cut, and names the frame counts that fit.
    """
    todo("split frames into whole blocks.")


def draw_noise(keys, num_frames: int, frame_shape, device=None):
    """The noise that videos start from, [B, F, C, H, W], and one torch.Generator per video for what is drawn later.

    keys: one tuple per video, such as (0, "generate", "a 3 moving right", 0). All numbers of a video, and all that its
    generator draws, follow from its key alone.
    """
    todo("draw noise that depends on a video's own key and on nothing else.")


def continue_video(loaded, video: Tensor, prompt: str, num_frames: int, seed: int = 0) -> Tensor:
    """A given video [1, F, C, H, W] and `num_frames` frames that go on from it: [1, F + num_frames, C, H, W].

    loaded: what generate.load_model returns, a causal model. F and num_frames are whole numbers of its blocks.
    """
    todo("let the student go on with a video that it did not make.")
