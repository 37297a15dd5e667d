"""Real videos with one planted fault move the metric that is meant to see it, and real videos are near the
ideal.

"Spread" is the standard deviation, over independent real batches, of a curve's mean: what a reader would
mistake for a difference. A fault must move the metric by more than three times that.
"""

import json
import sys
from dataclasses import replace

import pytest
import torch

import digit_classifiers
import metrics
from digit_classifiers import Classifier, SecondClassifier
from metrics import (
    evaluate,
    load_classifier,
    measure,
    summarise,
    uniform_prompts,
)
from moving_mnist import MovingMNIST, WorldConfig, bounce, parse_prompt, render, sprites

WORLD = WorldConfig()
HELD_OUT = replace(WORLD, split="validation")
PROMPTS = uniform_prompts(80)
LABELS, HEADINGS = metrics.one_digit(PROMPTS)
IDEAL = {  # and how far the mean over real, unseen digits may lie from it
    "digit_accuracy": (1, 0.03),
    "identity_consistency": (1, 0.1),
    "motion_error": (0, 0.1),
    "speed_kept": (1, 0.02),
    "ink": (1, 0.1),
    "block_jump": (1, 0.05),
    "class_entropy": (1, 0.02),
    "diversity": (1, 0.15),
}


def real_clips(seed, prompts=PROMPTS):
    return MovingMNIST(HELD_OUT, seed=seed, prompts=prompts).batch(range(len(prompts)))


@pytest.fixture(scope="module")
def options():
    classifier = load_classifier()
    reference = metrics.make_reference(WORLD, classifier, 400)
    return {"world": WORLD, "classifier": classifier, "reference": reference}


@pytest.fixture(scope="module")
def real(options):
    """Per metric the mean [4] of each of four independent batches of real held-out clips."""
    curves = [evaluate(real_clips(seed)["video"], PROMPTS, **options) for seed in range(4)]
    return {name: torch.tensor([c[name] for c in curves]).mean(1) for name in curves[0]}


def still(clips):
    return clips["video"][:, :1].expand_as(clips["video"])


def faded(clips):
    return (clips["video"] + 1) * torch.linspace(1, 0.4, WORLD.num_frames).view(-1, 1, 1, 1) - 1


def over_inked(clips):
    return torch.nn.functional.max_pool2d(clips["video"].flatten(0, 1), 3, 1, 1).view_as(clips["video"])


def swapped(clips, frame=6):
    """From `frame` on, a digit of the next class follows the same path."""
    ids = (clips["sprite_ids"] + HELD_OUT.sprites_per_class) % (10 * HELD_OUT.sprites_per_class)
    other = render(sprites(HELD_OUT)[0][ids], clips["positions"], WORLD.canvas)[:, :, None] * 2 - 1
    return torch.cat([clips["video"][:, :frame], other[:, frame:]], dim=1)


def jumping(clips):
    """Every other block lies four pixels further."""
    video = clips["video"].clone()
    for start in range(3, WORLD.num_frames, 6):
        video[:, start : start + 3] = video[:, start : start + 3].roll((4, 4), dims=(-2, -1))
    return video


def one_class(clips):
    headings = [parse_prompt(prompt)[0].direction for prompt in PROMPTS]
    return real_clips(9, [f"a 3 moving {heading}" for heading in headings])["video"]


def one_sample(clips):
    """Every prompt of a digit gets the same video."""
    first = [(label == LABELS).nonzero()[0, 0] for label in LABELS]
    return clips["video"][torch.stack(first)]


FAULTS = [
    (still, "speed_kept", -1),
    (still, "motion_error", 1),
    (faded, "ink", -1),
    (over_inked, "ink", 1),
    (over_inked, "frechet_distance", 1),
    (swapped, "digit_accuracy", -1),
    (swapped, "identity_consistency", -1),
    (jumping, "block_jump", 1),
    (jumping, "motion_error", 1),
    (one_class, "class_entropy", -1),
    (one_class, "digit_accuracy", -1),
    (one_class, "frechet_distance", 1),
    (one_sample, "diversity", -1),
]


@pytest.mark.parametrize(("fault", "metric", "sign"), FAULTS)
def test_fault_moves_its_metric(fault, metric, sign, options, real, cache={}):  # noqa: B006
    """A single planted fault shifts the metric in the named direction by more than three spreads."""
    if fault not in cache:
        cache[fault] = evaluate(fault(real_clips(0)), PROMPTS, **options)
    shift = torch.tensor(cache[fault][metric]).mean() - real[metric].mean()
    assert sign * shift > 3 * real[metric].std()


@pytest.mark.parametrize("metric", IDEAL)
def test_real_clips_are_near_the_ideal(metric, real):
    """Digits that neither model nor classifier saw score what a perfect model would."""
    ideal, tolerance = IDEAL[metric]
    assert (real[metric].mean() - ideal).abs() < tolerance


def test_identity_swap_is_dated(options):
    """Accuracy and identity hold before the swapped frame and fall at it, not earlier or later."""
    curves = evaluate(swapped(real_clips(0), frame=7), PROMPTS, **options)
    for name, above, below in (("digit_accuracy", 0.9, 0.1), ("identity_consistency", 0.8, 0.6)):
        assert min(curves[name][:7]) > above and max(curves[name][7:]) < below


def test_wrong_motion_scores_above_1_5(options):
    """Frozen and wrong-axis clips in every window, reversed ones in the first, one by one and not in the
    mean."""
    clips, classifier = real_clips(1), options["classifier"]
    seen = measure(clips["video"], classifier)
    assert metrics.motion_error(seen, HEADINGS, WORLD).max() < 0.5
    assert metrics.motion_error(measure(still(clips), classifier), HEADINGS, WORLD).min() > 1.5
    assert metrics.motion_error(seen, -HEADINGS, WORLD)[:, 0].min() > 1.5
    straight = HEADINGS.abs().sum(1) == 1
    assert metrics.motion_error(seen, HEADINGS.flip(1), WORLD)[straight].min() > 1.5


@pytest.mark.parametrize("heading", [(0, 1), (0, -1), (-1, 0), (1, 1), (-1, 1)])
def test_exact_physics_scores_zero(heading):
    """A symmetric digit on a sub-pixel path between the walls has no motion error and full speed."""
    world, heading = replace(WORLD, sub_pixel=True, speed=1.5), torch.tensor([heading])
    path, _ = bounce(torch.tensor([[4.25, 5.5]]), heading * 1.5, 30, world.reach)
    video = render(torch.ones(1, 1, 14, 14), path[None].float(), world.canvas)[:, :, None] * 2 - 1
    seen = measure(video, Classifier().eval())
    assert metrics.motion_error(seen, heading, world).max() < 1e-3
    assert (metrics.speed_kept(seen, heading, world) - 1).abs().max() < 1e-3


def test_empty_frames_are_the_worst(options):
    """A black video is wrong, keeps no identity, does not move, and has no ink and no classes."""
    curves = evaluate(torch.full((80, 12, 1, 24, 24), -1.0), PROMPTS, **options)
    for name in ("digit_accuracy", "identity_consistency", "speed_kept", "ink", "class_entropy"):
        assert max(curves[name]) == 0
    assert min(curves["motion_error"]) == WORLD.reach


def test_frechet_distance_is_exact():
    """Between Gaussians that differ by a mean and a scale it is the closed form, and 0 for the same set."""
    features = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0)) @ torch.randn(5, 5)
    mean, covariance = metrics.moments(features)
    reference = metrics.Reference(mean, covariance, None, None)
    other = metrics.Measured(None, None, (2 * features + 1).view(2000, 1, 5), None)
    expected = (mean + 1).square().sum() + covariance.trace()  # |2m + 1 - m|^2 + (2 - 1)^2 tr S
    assert torch.allclose(metrics.frechet_distance(other, reference), expected.float(), rtol=1e-5)
    same = metrics.Measured(None, None, features.view(2000, 1, 5), None)
    assert metrics.frechet_distance(same, reference).abs() < 1e-4


@pytest.mark.parametrize("second", [False, True])
def test_shipped_classifier(second):
    """The weights that ship name at least 98 % of the held-out digits, as the file beside them says."""
    model, name = load_classifier(second=second), "second_classifier" if second else "classifier"
    record = json.loads((digit_classifiers.CHECKPOINTS / f"{name}.json").read_text())
    assert record["data"]["split"] == name
    accuracy = digit_classifiers.held_out_accuracy(model, "validation", WorldConfig())
    assert accuracy >= 0.98
    assert accuracy == pytest.approx(record["metrics"]["validation_accuracy"], abs=2e-3)


@pytest.mark.parametrize("kind", [Classifier, SecondClassifier])
def test_classifier_takes_any_canvas(kind):
    """Canvas and channels may differ from training, and the whole video is not needed for a frame."""
    model = kind().eval()
    assert model(torch.randn(3, 1, 24, 24)).shape == (3, 10)
    assert model.features(torch.randn(2, 3, 40, 32)).shape == (2, 64)


def test_training_is_reproducible():
    """The same seed gives the same weights, and the caller's random numbers stay untouched."""
    settings = {"world": WORLD, "num_steps": 2, "batch_size": 8, "lr": 1e-3, "seed": 0}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again = (digit_classifiers.train_classifier(True, **settings) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("videos", "prompts", "message"),
    [
        ((1, 12, 1, 24, 24), ["a 3 moving up and a 4 moving down"], "one digit"),
        ((2, 12, 1, 24, 24), ["a 3 moving up"], r"\[1, F, C, 24, 24\]"),
        ((1, 12, 1, 32, 32), ["a 3 moving up"], r"\[1, 12, 1, 32, 32\]"),
        ((2, 4, 1, 24, 24), ["a 3 moving up"] * 2, "at least 6 frames"),
    ],
)
def test_wrong_input_gets_a_sentence(videos, prompts, message, options):
    """What cannot be measured is refused with the way out."""
    with pytest.raises(ValueError, match=message):
        evaluate(torch.zeros(videos), prompts, **options)


def test_summary_spans():
    """Each span is the mean of its frames, and a span beyond the clip is left out."""
    spans = {"first block": 1, "0-T": 3.5, "T-3T": 15.5, "third 1": 3.5, "third 2": 11.5, "third 3": 19.5}
    assert summarise({"x": list(range(24))}, train_frames=8)["x"] == spans


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["metrics.py", *arguments])
    metrics.main()


def test_command_line_on_real_clips(monkeypatch, tmp_path, capsys):
    """The record holds one curve of F floats per metric and seed, the spread over seeds, and the Frechet
    floor."""
    path = tmp_path / "real.json"
    run_main(monkeypatch, *f"--num_videos 20 --num_frames 12 --seed 0 1 --json {path}".split())
    record = json.loads(path.read_text())
    assert set(record["curves"]) == {"0", "1"}
    assert all(len(curve) == 12 for curve in record["curves"]["1"].values())
    assert record["summary"]["speed_kept"]["0-T"]["mean"] == pytest.approx(1, abs=0.02)
    assert record["frechet"]["samples_per_block"] == 60
    assert all(record["summary"][name]["0-T"]["mean"] > 0.95 for name in ("digit_accuracy", "second_opinion"))
    assert "motion_error" in capsys.readouterr().out


def test_command_line_on_few_videos_of_given_prompts(monkeypatch, tmp_path):
    """Any number will do, only diversity needs a digit twice; given prompts are taken in turn; one seed: no spread."""
    path = tmp_path / "real.json"
    prompts = ["a 3 moving up", "a 4 moving left"]
    run_main(monkeypatch, "--num_videos", "2", "--num_frames", "6", "--prompts", *prompts, "--json", str(path))
    record = json.loads(path.read_text())
    assert record["prompts"] == prompts and "diversity" not in record["summary"]
    assert record["summary"]["motion_error"]["third 1"] == {"mean": pytest.approx(0, abs=0.3), "std": None}
    run_main(monkeypatch, "--num_videos", "4", "--num_frames", "6", "--prompts", *prompts, "--json", str(path))
    assert len(json.loads(path.read_text())["summary"]["diversity"]) == 4


def test_brighter_than_white_is_white(options):
    """What no screen shows moves no metric."""
    real = real_clips(0)["video"]
    bright = torch.where(real > 0.9, real + 1, real) - (real < -0.9).float()
    clean = torch.where(real > 0.9, 1.0, real).where(real >= -0.9, -1.0)
    assert evaluate(bright, PROMPTS, **options) == evaluate(clean, PROMPTS, **options)


def test_command_line_refuses_in_one_line(monkeypatch, capsys):
    """Wrong input ends with code 2 and one sentence, no traceback."""
    with pytest.raises(SystemExit) as exit_info:
        run_main(monkeypatch, "--num_videos", "20", "--num_frames", "4")
    assert exit_info.value.code == 2
    assert "--num_frames must be at least 6, not 4" in capsys.readouterr().err.splitlines()[-1]
