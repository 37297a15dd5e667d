"""The weights that ship belong together, say how they came about, and are what they say."""

import json
from itertools import pairwise

import pytest
from tiny_runs import REPOSITORY

from checkpoint import fingerprint

CHECKPOINTS = REPOSITORY / "checkpoints"
PARENTS = {
    "teacher": {},
    "init": {"pretrained_checkpoint": "teacher"},
    "student": {"pretrained_checkpoint": "init", "teacher_checkpoint": "teacher"},
}


def record(name):
    return json.loads((CHECKPOINTS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", PARENTS)
def test_weights_are_those_that_were_measured(name):
    assert fingerprint(CHECKPOINTS / f"{name}.safetensors") == record(name)["fingerprint"]


@pytest.mark.parametrize("name", PARENTS)
def test_weights_come_from_those_beside_them(name):
    """A student of another teacher than the one that ships would make the quickstart a different experiment."""
    parents = {option: record(parent)["fingerprint"] for option, parent in PARENTS[name].items()}
    runs = [*record(name).get("earlier_runs", []), record(name)]
    assert runs[0]["started_from"] == parents
    for before, run in pairwise(runs):
        assert run["started_from"] == parents | {"pretrained_checkpoint": before["fingerprint"]}


ROWS = {
    "frames that show the prompted digit": "digit_accuracy",
    "... as another classifier sees it": "second_opinion",
    "pixels off the exact motion": "motion_error",
    "speed, of the world's": "speed_kept",
    "ink, of that of real digits": "ink",
}


@pytest.mark.parametrize("row", ROWS)
def test_the_numbers_of_the_readme_are_the_measured_ones(row):
    """Mean and spread of every cell, teacher and student, as the records beside the weights have them."""
    (line,) = [line for line in (REPOSITORY / "README.md").read_text().splitlines() if line.startswith(f"| {row} |")]
    spans = [("teacher", "0-T"), *(("student", span) for span in ("first block", "0-T", "T-3T", "7T-8T"))]
    for shown, (name, span) in zip(line.split(" | ")[1:], spans, strict=False):
        measured = record(name)["metrics"][0]
        assert measured["num_videos"] == 256 and len(measured["seed"]) == 3
        value = measured["summary"][ROWS[row]][span]
        assert shown == f"{value['mean']:.2f} ± {value['std']:.2f}", (name, span)


@pytest.mark.parametrize("name", [*PARENTS, "classifier", "second_classifier", "tracker"])
def test_records_are_whole(name):
    """Command, seed, config, data, duration, machine and measured metrics, and a size that fits a repository."""
    assert {"command", "seed", "config", "data", "seconds", "machine"} <= record(name).keys()
    assert record(name)["metrics"], "nothing was measured"
    assert (CHECKPOINTS / f"{name}.safetensors").stat().st_size < 6e6
