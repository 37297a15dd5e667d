"""Checkpoints: whole or not at all, safe to read, faults named, averages exact."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint
from checkpoint import (
    EMA,
    atomic,
    fill,
    load_checkpoint,
    load_weights,
    locate,
    save_checkpoint,
    save_weights,
)

OLD = {"generator_state_dict": {"w": torch.zeros(3)}, "step": 1}
NEW = {"generator_state_dict": {"w": torch.ones(3)}, "step": 2}


def one_sentence(error):
    """The message of an exception, which has to be one line a user can read."""
    message = str(error.value)
    assert "\n" not in message and 20 < len(message) < 300
    return message


def in_child(action):
    """Run an action in a forked process; its exit status, negative for a signal."""
    process = os.fork()
    if process == 0:
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


# -------------------------------------------------------------------------------------------------- writing


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def write_half_and_die(state, path):
    path.write_bytes(b"PK half a zip")
    die()


@pytest.mark.parametrize(
    ("owner", "name", "replacement", "step"),
    [(torch, "save", write_half_and_die, 1), (os, "fsync", die, 1), (os, "replace", die, 1)],
    ids=["in the middle", "before the flush", "before the rename"],
)
def test_a_kill_during_a_write_leaves_the_old_file(tmp_path, monkeypatch, owner, name, replacement, step):
    """SIGKILL at any point of a write: the file of before is still whole, and the next write succeeds."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, OLD)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, replacement)
        assert in_child(lambda: save_checkpoint(path, NEW)) == -signal.SIGKILL
    assert load_checkpoint(path)["step"] == step
    save_checkpoint(path, NEW)
    assert load_checkpoint(path)["step"] == 2


def test_a_kill_after_the_rename_leaves_the_new_file(tmp_path, monkeypatch):
    """Once the name has changed hands the new file is whole."""
    path, replace = tmp_path / "last.pt", os.replace
    save_checkpoint(path, OLD)
    monkeypatch.setattr(os, "replace", lambda *names: (replace(*names), die()))
    assert in_child(lambda: save_checkpoint(path, NEW)) == -signal.SIGKILL
    assert load_checkpoint(path)["step"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_data_reaches_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    """The order that survives a power cut: flush the file, rename it, flush the folder."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    save_checkpoint(tmp_path / "last.pt", OLD)
    assert calls == ["fsync", "replace", "fsync"]


def test_an_error_during_a_write_leaves_the_old_file_and_nothing_else(tmp_path):
    """What cannot be saved raises, after half of it was written: old file intact, no temporary file."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, OLD)
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, NEW | {"extra": lambda: None})
    with pytest.raises(KeyboardInterrupt), atomic(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert load_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_writers_with_the_same_process_number_do_not_meet(tmp_path, monkeypatch):
    """Two machines write the same file on a shared disk, one within the other's time: each has a file of its own, of
    the kind that train.py clears away, and the last to end is what is read."""
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in every container
    with atomic(tmp_path / "state.json") as first:
        first.write_text("first")
        with atomic(tmp_path / "state.json") as second:
            second.write_text("second")
            assert {first, second} == {*tmp_path.glob(".*.tmp")} and first != second
        assert (tmp_path / "state.json").read_text() == "second"
    assert (tmp_path / "state.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_folders_are_made_on_the_way(tmp_path):
    """A checkpoint may be the first thing in a new folder."""
    save_checkpoint(tmp_path / "a" / "b" / "last.pt", OLD)
    assert (tmp_path / "a" / "b" / "last.pt").is_file()


# -------------------------------------------------------------------------------------------------- reading


class Code:
    """An object whose pickle runs a command when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    """Reading a pickle that would run a command says so in one sentence and runs nothing."""
    torch.save(OLD | {"config": Code(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt cannot be read") as error:
        load_checkpoint(tmp_path / "evil.pt")
    one_sentence(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_truncated_files_are_named(tmp_path, share):
    """A .pt and a .safetensors cut anywhere give one sentence with the path."""
    save_checkpoint(tmp_path / "cut.pt", OLD)
    save_weights(tmp_path / "cut.safetensors", {"w": torch.randn(100)}, {})
    for path in (tmp_path / "cut.pt", tmp_path / "cut.safetensors"):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=f"{path.name} cannot be read.*truncated") as error:
            load_weights(path)
        one_sentence(error)


@pytest.mark.parametrize("name", ["noise.pt", "noise.safetensors", "text.pt", "text.safetensors"])
def test_corrupt_files_are_named(tmp_path, name):
    """Bytes that are no checkpoint at all give one sentence with the path."""
    (tmp_path / name).write_bytes(b"What a lovely day.\n" * 9 if "text" in name else os.urandom(500))
    with pytest.raises(ValueError, match=f"{name} cannot be read") as error:
        load_weights(tmp_path / name)
    one_sentence(error)


def test_what_is_no_checkpoint_of_ours_is_named(tmp_path):
    """Missing files, folders and foreign .pt files: one sentence each."""
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, reason in {
        "missing.pt": "There is no checkpoint",
        "missing.safetensors": "There is no checkpoint",
        "": "There is no checkpoint",
        "foreign.pt": "holds no generator_state_dict",
        "list.pt": "holds no generator_state_dict",
    }.items():
        with pytest.raises(ValueError, match=reason) as error:
            load_weights(tmp_path / name)
        one_sentence(error)
    with pytest.raises(ValueError, match="'ema' or 'raw'"):
        load_weights(tmp_path / "foreign.pt", "average")


def test_average_or_raw_weights(tmp_path):
    """A .pt gives its average by default, its raw weights on request and where there is no average."""
    average = {"w": torch.full((3,), 0.5)}
    save_checkpoint(tmp_path / "both.pt", NEW | {"ema_state_dict": average, "config": {"a": 1}})
    save_checkpoint(tmp_path / "early.pt", NEW | {"ema_state_dict": None})
    assert load_weights(tmp_path / "both.pt").state_dict["w"].tolist() == [0.5] * 3
    assert load_weights(tmp_path / "both.pt").config == {"a": 1}
    assert load_weights(tmp_path / "both.pt", "raw").state_dict["w"].tolist() == [1] * 3
    assert load_weights(tmp_path / "early.pt").state_dict["w"].tolist() == [1] * 3


def test_shipped_weights_round_trip(tmp_path):
    """save_weights -> load_weights: halved on disk, float32 in memory, config in the header, record for people."""
    model = nn.Linear(7, 5)
    record = {"command": "python train.py", "config": {"model": {"dim": 7}, "text": 'quote " and umlaut \u00fc'}}
    save_weights(tmp_path / "student.safetensors", model.state_dict(), record)
    loaded = load_weights(tmp_path / "student.safetensors")
    assert {x.dtype for x in load_file(tmp_path / "student.safetensors").values()} == {torch.float16}
    assert {x.dtype for x in loaded.state_dict.values()} == {torch.float32}
    assert loaded.config == record["config"]
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # who may read one may read the other
    assert json.loads((tmp_path / "student.json").read_text()) == record
    for name, x in model.state_dict().items():
        assert torch.equal(loaded.state_dict[name], x.half().float())
    save_file({"w": torch.ones(1)}, tmp_path / "bare.safetensors")
    assert load_weights(tmp_path / "bare.safetensors").config == {}


def test_a_path_is_also_looked_up_in_the_repository(tmp_path, monkeypatch):
    """Shipped weights are found from any folder; what the user has there comes first."""
    monkeypatch.chdir(tmp_path)
    home = locate("checkpoint.py")
    assert home.is_absolute() and home.samefile(checkpoint.__file__)
    (tmp_path / "checkpoint.py").touch()
    assert not locate("checkpoint.py").is_absolute()
    assert str(locate("nowhere/x.pt")) == "nowhere/x.pt"


# -------------------------------------------------------------------------------------------------- filling


def test_keys_that_do_not_fit_are_named():
    """Missing, unexpected and misshaped keys are all named, long lists cut; the model is left as it was."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = {
        "0.weight": torch.zeros(3, 5),
        "0.bias": torch.zeros(3),
        "1.weight": torch.zeros(4, 3),
        "head": torch.ones(1),
    }
    with pytest.raises(ValueError) as error:
        fill(model, state, "some.pt")
    assert one_sentence(error) == (
        "some.pt does not fit the model, missing: 1.bias; unexpected: head; misshaped: 0.weight (3, 5) for (3, 2). "
        "Check the model's config."
    )
    with pytest.raises(ValueError, match="missing: 0.weight, 0.bias, 1.weight and 1 more"):
        fill(model, {}, "empty.pt")
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_filling_widens():
    """Half-precision weights become the model's float32."""
    model = nn.Linear(2, 3)
    half = {name: x.half() for name, x in model.state_dict().items()}
    fill(model, half, "half.pt")
    assert model.weight.dtype == torch.float32 and torch.equal(model.weight, half["weight"].float())


# -------------------------------------------------------------------------------------------------- average


def run_average(decay, start_step, num_steps, dtype=torch.float32, ema=None, first=1):
    """An EMA over the parameter values 1, 2, 3, ... of steps 1, 2, 3, ..."""
    model = nn.Linear(1, 1, bias=False).to(dtype)
    ema = ema or EMA(model, decay, start_step)
    for step in range(first, num_steps + 1):
        ema.model.weight.data.fill_(step)
        ema.update(step)
    return ema


def test_average_follows_its_formula():
    """shadow_s = theta_s at the start step, then d shadow + (1 - d) theta; nothing before the start."""
    assert run_average(0.9, 4, 3).state_dict() is None
    assert run_average(0.9, 4, 4).state_dict()["weight"].item() == 4
    expected = 4.0
    for value in range(5, 20):
        expected = 0.9 * expected + 0.1 * value
    assert run_average(0.9, 4, 19).state_dict()["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert run_average(0.0, 0, 19).state_dict()["weight"].item() == 19
    assert run_average(1.0, 0, 19).state_dict()["weight"].item() == 1


def test_average_is_float32_and_moves_at_a_tiny_rate():
    """A bfloat16 model has a float32 average, which moves by steps that bfloat16 cannot hold."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    model.weight.data.fill_(1.0)
    ema = EMA(model, decay=0.999)
    ema.update(1)
    model.weight.data.fill_(1.0078125)  # the next bfloat16
    for step in range(2, 102):
        ema.update(step)
    shadow = ema.state_dict()["weight"]
    assert shadow.dtype == torch.float32
    assert shadow.item() - 1 == pytest.approx(0.0078125 * (1 - 0.999**100), rel=0.01)


def test_average_lives_where_its_model_lives():
    """A checkpoint is read on the CPU; the average of a model elsewhere goes there."""
    ema = EMA(nn.Linear(1, 1, device="meta"), 0.9)
    ema.load_state_dict(nn.Linear(1, 1).state_dict())
    assert {x.device.type for x in ema.state_dict().values()} == {"meta"}


def test_average_goes_on_where_it_was_saved():
    """state_dict -> load_state_dict continues bit for bit, also from before the start, and shares no memory."""
    for pause in (2, 10):
        saved = run_average(0.9, 4, pause).state_dict()
        other = EMA(nn.Linear(1, 1, bias=False), 0.9, 4)
        other.load_state_dict(saved)
        kept = saved and saved["weight"].clone()
        run_average(0.9, 4, 19, ema=other, first=pause + 1)
        assert torch.equal(other.state_dict()["weight"], run_average(0.9, 4, 19).state_dict()["weight"])
        assert saved is None or torch.equal(saved["weight"], kept)
