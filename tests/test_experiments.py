"""The quickstart in small, and how a run becomes shipped weights."""

import json
import re

import numpy as np
import pytest
from tiny_runs import SIZES, make_weights, names, options

import train
from checkpoint import fingerprint
from experiments import quickstart
from experiments.ship import ship

SMALL = [*SIZES, "training.num_steps=1", "training.batch_size=2", "training.critic_steps=1"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights"))


def test_quickstart(weights, tmp_path, monkeypatch, capsys):
    """One step teaches nothing: everything is written, and the command says so and fails."""
    monkeypatch.setattr(quickstart, "OUTPUT", tmp_path)
    monkeypatch.setattr(quickstart, "NUM_VIDEOS", 20)
    start = [f"training.pretrained_checkpoint={weights}/start.safetensors"]
    start += [f"training.teacher_checkpoint={weights}/teacher.safetensors", f"training.output_dir={tmp_path}/training"]
    with pytest.raises(SystemExit, match=r"Accuracy rose by -?0.\d\d to 0.\d\d; 0.30 and 0.85 were promised."):
        quickstart.main([*SMALL, *start])
    said = capsys.readouterr().out
    assert re.search(r"frames that show the prompted digit +0\.\d\d -> +0\.\d\d +\(real digits (0\.9\d|1\.00)\)", said)
    assert names(tmp_path) == {"training", "before_after.gif", "curves.png", "metrics.json", "samples.npz"}
    kinds = {"before", "after", "shipped student", "real"}
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["curves"].keys() == kinds and record["seeds"] == {"training": 0, "evaluation": 1}
    assert record["seconds"].keys() == {"training", "sampling", "measuring", "drawing"}
    assert all(len(curves["digit_accuracy"]) == 36 for curves in record["curves"].values())
    with np.load(tmp_path / "samples.npz") as arrays:
        assert set(arrays) == {"prompts", *(kind.replace(" ", "_") for kind in kinds)}
        assert arrays["after"].shape == (20, 36, 1, 24, 24) and arrays["after"].dtype == np.uint8


def test_shipping_tells_the_whole_story(weights, tmp_path):
    """A stage that was trained twice names both runs; to measure it again replaces the metrics and nothing else."""
    folders = [tmp_path / "one", tmp_path / "two"]
    train.main(options("teacher", folders[0]))
    first = folders[0] / "checkpoint_final.pt"
    train.main(options("teacher", folders[1], None, f"training.pretrained_checkpoint={first}", "training.seed=1"))
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps({"summary": 1, "curves": [0] * 99}))
    path = ship(folders[1], "teacher", [metrics], tmp_path / "shipped")
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["fingerprint"] == fingerprint(path) == fingerprint(folders[1] / "checkpoint_final.pt")
    assert record["started_from"] == {"pretrained_checkpoint": fingerprint(first)}
    assert [run["fingerprint"] for run in record["earlier_runs"]] == [fingerprint(first)]
    assert [run["seed"] for run in (*record["earlier_runs"], record)] == [0, 1]
    assert record["metrics"] == [{"summary": 1}]

    weights_before = path.read_bytes()
    metrics.write_text(json.dumps({"summary": 2}))
    assert ship(path, "teacher", [metrics], path.parent) == path
    assert json.loads(path.with_suffix(".json").read_text()) == {**record, "metrics": [{"summary": 2}]}
    assert path.read_bytes() == weights_before
