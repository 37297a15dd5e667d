"""A run killed with SIGKILL at random moments, also in the middle of a write, ends as if nothing had happened.

A fork server imports train.py once; every run is a process of its own, forked from it.
"""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import assert_same, final_state, make_weights, names, options, rows

import train
from checkpoint import load_checkpoint

FILES = {"config.yaml", "metrics.csv", "samples", "checkpoint_final.pt"}
MORE = ["training.checkpoint_every=1", "training.fresh_rollouts=true", "training.exit_rule=random"]


@pytest.fixture(scope="module")
def start():
    """start(function, *arguments) -> a process that has begun it."""
    context = multiprocessing.get_context("forkserver")
    # The last two are what torch's optimizers and the first strip would import: seconds, in every process.
    context.set_forkserver_preload(["train", "torch._dynamo", "matplotlib.backends.backend_agg"])

    def begin(function, *arguments):
        process = context.Process(target=function, args=arguments)
        process.start()
        return process

    return begin


def finish(process):
    """The exit status of a process, negative for a signal."""
    process.join()
    return process.exitcode


def logged(folder):
    """Rows in metrics.csv, the half-written one included."""
    path = Path(folder) / "metrics.csv"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


def kill_somewhere(process, folder, dice):
    """SIGKILL after up to four more steps and a moment; False if the run was done before."""
    goal = logged(folder) + dice.randrange(5)
    while logged(folder) < goal and process.is_alive():
        time.sleep(0.0005)
    time.sleep(dice.uniform(0, 0.1))
    process.kill()
    return finish(process) == -signal.SIGKILL


def kill_and_resume(start, tmp_path, kills, num_steps):
    """Train once undisturbed, once killed so many times; the two runs must be the same."""
    weights = make_weights(tmp_path)
    whole, killed = (
        options("self_forcing", tmp_path / name, weights, *MORE, f"training.num_steps={num_steps}")
        for name in ("whole", "killed")
    )
    assert finish(start(train.main, whole)) == 0
    dice = random.Random(0)
    for _ in range(kills):
        assert kill_somewhere(start(train.main, killed), tmp_path / "killed", dice), "done too early: raise num_steps"
    assert finish(start(train.main, killed)) == 0
    assert_same(final_state(tmp_path / "killed"), final_state(tmp_path / "whole"))
    assert [row["step"] for row in rows(tmp_path / "killed")] == [str(step + 1) for step in range(num_steps)]
    assert names(tmp_path / "killed") == FILES


@pytest.mark.slow
def test_killed_twice(start, tmp_path):
    """Two kills at random moments, then the end: all tensors of the final checkpoint equal, every step logged once."""
    kill_and_resume(start, tmp_path, kills=2, num_steps=14)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_ten_times(start, tmp_path):
    """Ten kills at random moments, then the end: all tensors of the final checkpoint equal, every step logged once."""
    kill_and_resume(start, tmp_path, kills=10, num_steps=70)


def train_and_die(overrides, number, moment):
    """A run that kills itself in its so manieth write of a checkpoint: in the middle, or just before the rename."""
    save, replace, written = torch.save, os.replace, []

    def deadly_save(state, path):
        written.append(path)
        save(state, path)
        if len(written) == number and moment == "write":
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def deadly_replace(one, other):
        if len(written) == number and moment == "rename":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(one, other)

    torch.save, os.replace = deadly_save, deadly_replace
    train.main(overrides)


def test_killed_while_a_checkpoint_is_written(start, tmp_path):
    """Killed in the first write, in a later one, and in that of the final checkpoint: nothing is lost or left over."""
    weights = make_weights(tmp_path)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    command = options("teacher", folder, weights, "training.checkpoint_every=1")
    assert finish(start(train.main, options("teacher", whole, weights, "training.checkpoint_every=1"))) == 0
    for number, moment, steps_saved in ((1, "write", 0), (3, "rename", 2), (3, "write", 4)):
        assert finish(start(train_and_die, command, number, moment)) == -signal.SIGKILL
        assert any(name.endswith(".tmp") for name in names(folder))
        if steps_saved:
            assert load_checkpoint(folder / "checkpoint_last.pt")["step"] == steps_saved
    assert not (folder / "checkpoint_final.pt").exists()
    assert finish(start(train.main, command)) == 0
    assert_same(final_state(folder), final_state(whole))
    assert names(folder) == FILES


def test_sigterm_stops_a_real_process(start, tmp_path):
    """What a cluster sends before it takes the machine away: the run stops by itself and resumes exactly."""
    weights = make_weights(tmp_path)
    whole, stopped = (
        options("teacher", tmp_path / name, weights, "training.num_steps=40", "training.checkpoint_every=1000")
        for name in ("whole", "stopped")
    )
    assert finish(start(train.main, whole)) == 0
    process = start(train.main, stopped)
    while logged(tmp_path / "stopped") < 2 and process.is_alive():
        time.sleep(0.001)
    process.terminate()
    assert finish(process) == 1
    assert 2 <= load_checkpoint(tmp_path / "stopped" / "checkpoint_last.pt")["step"] < 40
    assert finish(start(train.main, stopped)) == 0
    assert_same(final_state(tmp_path / "stopped"), final_state(tmp_path / "whole"))
