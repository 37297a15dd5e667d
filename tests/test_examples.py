"""The example programs run as a newcomer runs them, and show what they say."""

import os
import subprocess
import sys

import imageio.v3 as imageio
import pytest
from tiny_runs import REPOSITORY, make_weights

from tutorial.examples import algorithm_example

PICTURES = {
    *("1_algorithm.png", "2_data.png", "3_mask.png", "3_teacher_forcing_mask.png"),
    *("4_rollout.png", "5_denoising.png", "6_video.gif", "7_cache.png"),
}


def test_the_command_of_the_docs_finds_its_imports():
    """`python tutorial/examples/algorithm_example.py`: a script looks beside itself, not in the repository's root."""
    command = [sys.executable, "tutorial/examples/algorithm_example.py", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "--output_dir" in done.stdout, done.stderr


@pytest.fixture
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("shipped", [True, False], ids=["shipped weights", "no weights"])
def test_with_and_without_shipped_weights(shipped, weights, tmp_path, monkeypatch, capsys):
    """With weights it uses them as student and as teacher; without, it says so and goes on."""
    for name, file in (("STUDENT", "start"), ("TEACHER", "teacher")):
        monkeypatch.setattr(algorithm_example, name, f"{weights if shipped else 'checkpoints/none'}/{file}.safetensors")
    algorithm_example.main(["--output_dir", str(tmp_path)])
    said = capsys.readouterr().out
    assert ("a network at random stands in" in said) == (not shipped)
    assert {path.name for path in tmp_path.iterdir()} == PICTURES and all(name in said for name in PICTURES)
    assert said.count("critic    at t") == 3
    assert len(imageio.imread(tmp_path / "6_video.gif")) == 18
    assert "keeps all frames: 3, 6, 9, 12, 15, 18" in said
    assert "window of 6 frames: 3, 6, 6, 6, 6, 6" in said
