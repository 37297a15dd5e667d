"""The exact score of a small world, against sums over all of its clips."""

from dataclasses import replace

import pytest
import torch
from tiny_runs import REPOSITORY

from experiments import teacher_errors
from experiments.teacher_errors import exact_clean, possibilities, swapped
from moving_mnist import MovingMNIST, WorldConfig

ONE = WorldConfig(canvas=20, num_frames=6, sprites_per_class=3)
TWO = WorldConfig(canvas=20, num_frames=6, num_digits=2, sprites_per_class=1)
APART = replace(TWO, canvas=24, apart=4)
PROMPTS = {
    ONE: ["a 3 moving right", "a 7 moving up-left"],
    APART: ["a 3 moving right and a 7 moving up-left", "a 4 moving down and a 4 moving down"],
    TWO: ["a 3 moving right and a 7 moving up-left", "a 4 moving down and a 4 moving down"],
}
NUM_CLIPS = {  # of 4 x 4 places those whose first step stays inside
    ONE: [3 * 12, 3 * 9],
    TWO: [12 * 9, 12 * 12],
    APART: [12 * 9, 12 * 12],
}


def all_clips(world, prompt):
    frames, clips = possibilities(world, prompt)
    return frames[clips].movedim(1, 0)  # [m f pixels]


@pytest.mark.parametrize("world", (ONE, TWO, APART))
def test_every_clip_of_the_data_is_possible_and_every_possible_one_comes(world):
    """Sprites, places, bounces and overlaps: the clips of a prompt are those that the data set draws, and no others."""
    for prompt, count in zip(PROMPTS[world], NUM_CLIPS[world], strict=True):
        possible = {clip.numpy().round(3).tobytes() for clip in all_clips(world, prompt) + 0.0}
        drawn = MovingMNIST(world, prompts=[prompt]).batch(range(2000))["video"].flatten(2) + 0.0
        assert len(all_clips(world, prompt)) == count
        assert {clip.numpy().round(3).tobytes() for clip in drawn} == possible


@pytest.mark.parametrize("world", (ONE, TWO, APART))
@pytest.mark.parametrize("num_frames", (2, 6))
@pytest.mark.parametrize("t", (0.3, 0.8, 0.95))
def test_the_exact_mean_is_the_sum_over_all_clips(world, num_frames, t):
    """Bayes' rule, clip by clip in float64, for two prompts at once and for the beginning of a clip as well."""
    video = MovingMNIST(world, prompts=PROMPTS[world]).batch(range(2))["video"][:, :num_frames]
    x_t = (1 - t) * video + t * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    found = exact_clean(world, x_t, t, PROMPTS[world])
    for noisy, mean, prompt in zip(x_t.double(), found, PROMPTS[world], strict=True):
        clips = all_clips(world, prompt)[:, :num_frames].double()
        likelihood = torch.distributions.Normal((1 - t) * clips, t).log_prob(noisy.flatten(1)).sum((1, 2))
        expected = (likelihood.softmax(0)[:, None, None] * clips).sum(0)
        torch.testing.assert_close(mean.flatten(1).double(), expected, atol=2e-3, rtol=0)


def test_little_noise_hides_nothing():
    video = MovingMNIST(TWO, prompts=PROMPTS[TWO]).batch(range(2))["video"]
    torch.testing.assert_close(exact_clean(TWO, 0.99 * video, 0.01, PROMPTS[TWO]), video)


def test_swapped_digits_keep_the_directions():
    assert swapped("a 3 moving up and a 7 moving down") == "a 7 moving up and a 3 moving down"


@pytest.mark.parametrize(
    ("name", "sentence"),
    {"student": "it makes videos in blocks", "nothing": "There is no checkpoint"}.items(),
)
def test_what_has_no_score_is_refused_in_a_sentence(name, sentence, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["teacher_errors", f"{REPOSITORY}/checkpoints/{name}.safetensors"])
    with pytest.raises(SystemExit, match="2"):
        teacher_errors.main()
    assert sentence in capsys.readouterr().err


def test_the_teacher_of_two_digits_knows_which_moves_where(monkeypatch, capsys):
    """Its error grows under prompts with the digits swapped, and the exact one is below it."""
    path = f"{REPOSITORY}/checkpoints/two_digits_teacher.safetensors"
    monkeypatch.setattr("sys.argv", ["teacher_errors", path, "--num_clips", "16"])
    monkeypatch.setattr(teacher_errors, "TIMES", (0.8,))
    monkeypatch.setattr(teacher_errors, "NUM_FRAMES", (12,))
    teacher_errors.main()
    words = capsys.readouterr().out.split()
    found = {name: float(words[words.index(name) + 1]) for name in ("error", "swapped", "exact", "distance")}
    assert found["exact"] < 0.01 < found["error"] < 0.13 < found["swapped"] - 0.05
