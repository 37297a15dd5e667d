"""Every python command of the README runs as printed, only smaller; every other one that documents show exists.

What the make targets run has tests of its own: test_experiments.py, test_benchmarks.py, and this suite itself.
"""

import re
import runpy
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "docs/testing.md"]
DOCUMENTS += ["docs/attention_extraction.md", "docs/attention_visualization.md"]
SMALL = {  # what is added to a printed command, so that it takes seconds
    "train.py": "training.num_steps=1 training.batch_size=2 training.critic_steps=1 training.num_previews=1 "
    "training.max_num_frames=15",
    "generate.py": "--format npz --num_frames 3",
    "metrics.py": "--num_videos 20 --num_frames 12 --seed 0",
    "moving_mnist.py": "",
    "attention_maps.py": "--num_frames 6",
    "tutorial/examples/algorithm_example.py": "",
}
REASON = "not run in CI: "


def commands(document):
    """The command lines in a document's bash blocks, with their comments."""
    text = (REPOSITORY / document).read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    return [re.fullmatch(r"(.*?)(?:\s+#\s*(.*))?", line).groups(default="") for line in lines if line.strip()]


def targets():
    return set(re.findall(r"^([a-z]+):.*## ", (REPOSITORY / "Makefile").read_text(), re.M))


@pytest.fixture
def checkout(tmp_path):
    """The repository as a user has just cloned it: what runs write lands beside it."""
    for path in REPOSITORY.iterdir():
        if path.name not in ("logs", "outputs"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_known(document):
    """A make target that exists, tests that exist, a script that the next test runs, or a reason."""
    for command, comment in commands(document):
        program, *arguments = shlex.split(command)
        if program == "make":
            assert set(arguments) <= targets(), command
            recipe = subprocess.run([*command.split(), "--dry-run"], cwd=REPOSITORY, capture_output=True, text=True)
            modules = re.findall(r"-m ([a-z.]+)", recipe.stdout)
            assert recipe.returncode == 0 and all(find_spec(module) for module in modules), recipe
        elif command.startswith(".venv/bin/python -m pytest "):
            assert (REPOSITORY / arguments[2]).exists(), command
        elif comment.startswith(REASON):
            assert len(comment) > len(REASON), command
        else:
            assert program == "python" and arguments[0] in SMALL, f"{document}: {command}"


def test_the_code_of_the_readme_is_the_code():
    """Its excerpt of the rollout is that of dynamic_video_sf.py, line by line, without what only looks on."""
    shown = re.search(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.S)[1]
    source = (REPOSITORY / "dynamic_video_sf.py").read_text()
    body = re.search(r"( +for x_t, last in zip.*?)\n    return cache", source, re.S)[1]
    body = re.sub(r" +if observe:\n.*\n", "", body)
    assert shown.split() == body.split()


def test_the_commands_of_the_readme_run(checkout, monkeypatch):
    """In their order, each from what the ones before left behind. In this process: each imports torch for seconds."""
    monkeypatch.chdir(checkout)
    ran = 0
    for command, comment in commands("README.md"):
        program, *arguments = shlex.split(command)
        if program == "make" or comment.startswith(REASON):
            continue
        monkeypatch.setattr(sys, "argv", [*arguments, *SMALL[arguments[0]].split()])
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{command}: {end.code}"
        ran += 1
    assert ran >= 10
