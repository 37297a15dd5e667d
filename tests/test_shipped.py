"""The weights that ship belong together, say how they came about, and are what they say."""

import json
from itertools import pairwise

import pytest
from tiny_runs import REPOSITORY

from experiments.ship import fingerprint

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


@pytest.mark.parametrize("name", [*PARENTS, "classifier", "second_classifier"])
def test_records_are_whole(name):
    """Command, seed, config, data, duration, machine and measured metrics, and a size that fits a repository."""
    assert {"command", "seed", "config", "data", "seconds", "machine"} <= record(name).keys()
    assert record(name)["metrics"], "nothing was measured"
    assert (CHECKPOINTS / f"{name}.safetensors").stat().st_size < 6e6
