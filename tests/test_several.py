"""Several digits in one frame: prompts, the tracker, and what is measured with it."""

import json
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

import digit_tracker
import metrics
from digit_tracker import DigitTracker, focal_loss, load_tracker, scene, track
from metrics import evaluate_several, uniform_prompts
from moving_mnist import MovingMNIST, WorldConfig, parse_prompt

WORLD = WorldConfig(num_digits=2, canvas=30, sprites_per_class=4)
SPLITS = ("validation", "train")
PROMPTS = uniform_prompts(40, 2)


class Oracle(nn.Module):
    """A tracker that knows the truth: it draws the maps of labels [B, n] at middles [B, F, n, 2]."""

    def __init__(self, labels, middles, canvas=30):
        super().__init__()
        off = torch.arange(canvas) - middles[..., None]  # [b f n 2 canvas]
        across = (-off.square() / 2).exp()
        marks = across[:, :, :, 0, :, None] * across[:, :, :, 1, None, :]
        self.maps = torch.zeros(*middles.shape[:2], 10, canvas, canvas)
        for b, row in enumerate(labels):
            for i, label in enumerate(row):
                self.maps[b, :, label] = torch.maximum(self.maps[b, :, label], marks[b, :, i])

    def forward(self, frames):
        return self.maps.flatten(0, 1).clamp(1e-6, 1 - 1e-6).logit()


@pytest.fixture(scope="module")
def clips():
    return MovingMNIST(WORLD, prompts=PROMPTS).batch(range(40))


def measured(clips, labels=None, middles=None, videos=None):
    middles = clips["positions"] + 6.5 if middles is None else middles
    oracle = Oracle(clips["labels"] if labels is None else labels, middles)
    video = clips["video"] if videos is None else videos
    curves = evaluate_several(video, PROMPTS, world=WORLD, tracker=oracle)
    return {name: sum(curve) / len(curve) for name, curve in curves.items()}


def test_prompts_of_several_digits():
    """No twins, all different, every label and direction as often, for either digit; with one digit all 80 prompts."""
    named = [parse_prompt(prompt) for prompt in uniform_prompts(160, 2)]
    assert len(set(named)) == 160 and all(a.label != b.label for a, b in named)
    for k in (0, 1):
        assert set(Counter(digits[k].label for digits in named).values()) == {16}
        directions = Counter(digits[k].direction for digits in named).values()
        assert len(directions) == 8 and max(directions) - min(directions) <= 4
    assert len(set(uniform_prompts(80))) == 80


def test_a_place_is_found_between_pixels(clips):
    """To a fifth of a pixel, wherever the middle lies, also at the border."""
    middles = torch.rand(6, 5, 2, 2) * 29
    sure, place = track(Oracle(torch.tensor([[3, 7]] * 6), middles), torch.zeros(6, 5, 1, 30, 30))
    assert (sure[..., [3, 7]] > 0.7).all() and (sure[..., [0, 1, 2, 4, 5, 6, 8, 9]] < 1e-4).all()
    inside = (middles > 2).all(-1) & (middles < 27).all(-1)
    error = (place[:, :, [3, 7]] - middles).norm(dim=-1)
    assert error[inside].max() < 0.2 and error.max() < 1


def test_a_scene_and_its_maps():
    """Digits lie where their marks say, overlaps are the brighter of two, and twins share a map."""
    torch.manual_seed(0)
    digits = torch.rand(8, 2, 14, 14)
    labels = torch.tensor([[1, 2]] * 4 + [[5, 5]] * 4)
    frames, maps = scene(digits, labels, 30)
    assert frames.shape == (8, 1, 30, 30) and maps.shape == (8, 10, 30, 30)
    sure, place = track(lambda x: maps.clamp(1e-6, 1 - 1e-6).logit(), frames[:, None])
    for b in range(4):
        canvas = torch.zeros(30, 30)
        for i in range(2):
            y, x = (place[b, 0, labels[b, i]] - 6.5).round().long().tolist()
            canvas[y : y + 14, x : x + 14] = torch.maximum(canvas[y : y + 14, x : x + 14], digits[b, i])
        torch.testing.assert_close(frames[b, 0], canvas * 2 - 1)
    assert (maps[4:, 5] > 0.75).sum((1, 2)).tolist() != [0] * 4 and not maps[4:, :5].any()


def test_the_loss_of_a_tracker_is_least_for_the_truth():
    """The true maps cost least; a missing, a doubled and a misplaced mark cost more."""
    torch.manual_seed(0)
    _, maps = scene(torch.rand(4, 2, 14, 14), torch.tensor([[1, 2]] * 4), 30)
    logits = (maps.clamp(1e-3, 1 - 1e-3)).logit()
    empty, moved, doubled = (
        torch.full_like(logits, -6),
        logits.roll(4, dims=-1),
        torch.maximum(logits, logits.roll(9, 2)),
    )
    assert all(focal_loss(wrong, maps) > 2 * focal_loss(logits, maps) for wrong in (empty, moved, doubled))


def test_real_clips_are_right(clips):
    """What the tracker sees rightly is at its ideal."""
    found = measured(clips)
    assert found["digit_accuracy"] == 1 and found["motion_error"] < 0.15 and 0.97 < found["speed_kept"] < 1.03
    assert 0.9 < found["ink"] < 1.1 and 0.8 < found["block_jump"] < 1.3


def test_a_digit_is_measured_in_its_own_room():
    """In rooms eight apart its walls are elsewhere; without knowing, half of the bounces would be errors."""
    world = replace(WORLD, canvas=32, apart=8)
    clips = MovingMNIST(world, prompts=PROMPTS).batch(range(40))
    oracle = Oracle(clips["labels"], clips["positions"] + 6.5, canvas=32)
    error = {
        apart: sum(evaluate_several(clips["video"], PROMPTS, world=known, tracker=oracle)["motion_error"]) / 12
        for apart, known in ((8, world), (0, replace(world, apart=0)))
    }
    assert error[8] < 0.15 and error[0] > 1


@pytest.mark.parametrize("kept", [0, 1])
def test_one_wrong_digit_of_two_is_half_wrong(clips, kept):
    """Each digit counts for itself: in the accuracy, and as an empty frame in motion and speed."""
    labels = clips["labels"].clone()
    for row in labels:
        row[1 - kept] = next(k for k in range(10) if k not in row)
    found = measured(clips, labels=labels)
    assert found["digit_accuracy"] == 0.5 and found["motion_error"] > 5 and 0.45 < found["speed_kept"] < 0.55


@pytest.mark.parametrize(("missed", "right"), [(3, 1.0), (6, 0.75)])
def test_the_frames_around_say_what_one_cannot(clips, missed, right):
    """The tracker takes a digit for another in three frames of twelve, that are outvoted, or in six, that are not."""
    frame_labels = clips["labels"][:, None].repeat(1, 12, 1)
    frame_labels[:, 3 : 3 + missed, 0] = torch.tensor(
        [next(k for k in range(10) if k not in row) for row in clips["labels"]]
    )[:, None]
    maps = [Oracle(frame_labels[:, f], (clips["positions"] + 6.5)[:, f : f + 1]).maps for f in range(12)]
    oracle = Oracle(clips["labels"], clips["positions"] + 6.5)
    oracle.maps = torch.cat(maps, dim=1)
    curve = evaluate_several(clips["video"], PROMPTS, world=WORLD, tracker=oracle)["digit_accuracy"]
    assert sum(curve) / 12 == pytest.approx(right, abs=0.01)


def test_planted_defects_are_seen(clips):
    """Frozen digits, swapped motion, more ink."""
    middles = clips["positions"] + 6.5
    frozen = measured(clips, middles=middles[:, :1].expand_as(middles))
    assert frozen["speed_kept"] == 0 and frozen["motion_error"] > 1.5
    swapped = measured(clips, middles=middles.flip(2))
    assert swapped["digit_accuracy"] == 1 and swapped["motion_error"] > 1
    bright = measured(clips, videos=((clips["video"] + 1) * 1.3 - 1).clamp(max=1) + 0.15)
    assert bright["ink"] > 1.15


def test_prompts_that_cannot_be_told_apart_are_refused(clips):
    twins = ["a 3 moving up and a 3 moving down"] * 40
    for prompts in (twins, ["a 3 moving up"] * 40, [*PROMPTS[:39], "a 3 moving up"]):
        with pytest.raises(ValueError, match="name 2 different digits in each prompt"):
            evaluate_several(clips["video"], prompts, world=WORLD, tracker=DigitTracker())


def test_the_tracker_fits_any_canvas():
    for canvas in (24, 30, 31):
        sure, place = track(DigitTracker().eval(), torch.zeros(2, 3, 1, canvas, canvas) - 1)
        assert sure.shape == (2, 3, 10) and place.shape == (2, 3, 10, 2) and place.max() < canvas
    assert replace(WORLD, canvas=24).num_digits == 2


def test_the_shipped_tracker_knows_real_digits():
    """Of the split for validation, on the canvas of configs/experiment/two_digits.yaml: where they are, nearly always,
    and which they are, as far as overlaps can be told apart."""
    world, prompts = WorldConfig(num_digits=2, canvas=32, split="validation", num_frames=24), uniform_prompts(20, 2)
    clips = MovingMNIST(world, prompts=prompts).batch(range(20))
    curves = evaluate_several(clips["video"], prompts, world=world, tracker=load_tracker())
    assert sum(curves["digit_accuracy"]) / 24 > 0.9 and 0.9 < sum(curves["speed_kept"]) / 24 < 1.1
    _, place = track(load_tracker(), clips["video"])
    labels = clips["labels"][:, None, :, None].expand(-1, 24, -1, 2)
    off = (place.gather(2, labels) - clips["positions"] - 6.5).norm(dim=-1)
    assert off.median() < 0.7 and (off > 3).float().mean() < 0.05


@pytest.fixture
def command(monkeypatch, tmp_path):
    """metrics.py with arguments; what it trains takes two steps and lies in tmp_path, what it measures is little."""
    monkeypatch.setattr(digit_tracker, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(digit_tracker, "TRAINING", {"num_steps": 2, "batch_size": 4, "lr": 1e-3, "seed": 0})
    monkeypatch.setattr(metrics, "NUM_REFERENCE_CLIPS", 4)
    monkeypatch.setattr(metrics, "NUM_HELD_OUT_CLIPS", 8)

    def run(arguments):
        monkeypatch.setattr(sys, "argv", ["metrics.py", *arguments.split()])
        metrics.main()

    return run


def test_a_tracker_is_measured_and_its_world_is_chosen(command, tmp_path, capsys):
    """Weights that serve digits of the size that they were trained on and no others, and a record: in which world, by
    which command, and what was measured of them."""
    command("--train_classifier tracker --canvas 28 --digit_size 10")
    record = json.loads((tmp_path / "tracker.json").read_text())
    assert record["command"].endswith("tracker --num_digits 2 --canvas 28 --digit_size 10 --apart 8")
    world = WorldConfig(num_digits=2, canvas=28, digit_size=10, apart=8)
    assert (record["data"]["canvas"], record["data"]["digit_size"]) == (28, 10)
    assert record["data"]["split"] == "classifier and second_classifier"
    assert record["metrics"] == metrics.held_out_tracking(load_tracker(digit_size=10), world)

    command("--num_digits 2 --canvas 28 --digit_size 10 --num_videos 4 --num_frames 6")
    with pytest.raises(SystemExit):
        command("--num_digits 2 --num_videos 4 --num_frames 6")
    again = "`python metrics.py --train_classifier tracker --digit_size 14` makes another"
    assert f"tracker.safetensors knows digits of 10 pixels, not of 14: {again}" in capsys.readouterr().err


def test_what_is_measured_of_a_perfect_tracker(monkeypatch):
    """It is shown real clips of the split for validation and of a model's own, and finds every digit of theirs."""
    monkeypatch.setattr(metrics, "NUM_HELD_OUT_CLIPS", 40)
    truth = (MovingMNIST(replace(WORLD, split=split), prompts=PROMPTS).batch(range(40)) for split in SPLITS)

    def oracle(frames):
        clips = next(truth)
        torch.testing.assert_close(frames, clips["video"].flatten(0, 1))
        return Oracle(clips["labels"], clips["positions"] + 6.5)(frames)

    found = metrics.held_out_tracking(oracle, WORLD)
    assert found.keys() == {f"{split}_{name}" for split in SPLITS for name in ("digit_accuracy", "motion_error")}
    assert found["validation_digit_accuracy"] == found["train_digit_accuracy"] == 1
    assert max(found["validation_motion_error"], found["train_motion_error"]) < 0.15


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--train_classifier first --canvas 30", "--canvas is for the tracker: the classifiers are trained in one"),
        ("--checkpoint x.pt --digit_size 10", "--digit_size is for --checkpoint real: a model shows the world it was"),
        ("--train_classifier tracker --canvas 31", "(num_digits - 1) * apart = 9 is no multiple of a whole"),
    ],
)
def test_a_world_where_none_is_chosen(command, arguments, sentence, capsys):
    """One sentence for a canvas or a size that the classifiers and a model cannot have, or that no world has."""
    with pytest.raises(SystemExit):
        command(arguments)
    assert sentence in capsys.readouterr().err
