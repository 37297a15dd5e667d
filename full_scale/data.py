"""What training at full scale reads: prompts, alone or with images, and clips that were encoded beforehand."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np


class Prompts:
    """Prompts alone: all that a student needs that learns from its own videos.

    path: a text file with one prompt per line, or a folder of text files with one prompt each. frame_shape: (C, H, W)
    of the latents that the student makes. Sample i is prompt i of an endless row in which every prompt comes once
    before any comes again, in an order that the seed gives. Raises ValueError where there is no prompt.
    """

    def __init__(self, path: str | Path, frame_shape: Sequence[int] = (16, 60, 104), seed: int = 0):
        self.prompts, self.seed, self.frame_shape = read_prompts(Path(path)), seed, tuple(frame_shape)

    def batch(self, samples: Sequence[int]) -> dict:
        return {"prompts": [self.prompts[shuffled(sample, len(self.prompts), self.seed)] for sample in samples]}


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one per line, or of a folder's .txt files, one each, in the order of their names."""
    if path.is_dir():
        lines = [file.read_text(encoding="utf-8") for file in sorted(path.glob("*.txt"))]
    elif path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
    else:
        raise ValueError(f"There are no prompts at {path}: give a text file, one prompt per line, or a folder of them.")
    prompts = [" ".join(line.split()) for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt: give a text file, one prompt per line, or a folder of .txt files.")
    return prompts


def shuffled(sample: int, count: int, seed: int) -> int:
    """Which of `count` items the sample is: round after round of all of them, each in an order of its own."""
    turn, place = divmod(sample, count)
    return int(np.random.default_rng((seed, turn)).permutation(count)[place])
