"""Training: stages in a row, output, exact resumption, nothing lost, accumulation, and errors in one sentence."""

import os
import re
import runpy
import signal
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import imageio.v3 as imageio
import pytest
import torch
from omegaconf import OmegaConf
from tiny_runs import REPOSITORY, SIZES, TINY, assert_same, final_state, make_weights, names, options, rows, some_slow
from torch import nn

import run_folder
import settings
import train
from checkpoint import load_checkpoint, load_weights
from processes import OneProcess
from tiny_causal_wan import TinyCausalWanModel
from visualization import film_strip

# What makes resuming hard: everything that changes with the step, or has a state of its own.
RICH = {
    "teacher": ["training.optimizer=muon", "training.short_clip_steps=3", "training.ema_start_step=2"],
    "init": ["training.optimizer=muon", "training.warmup_steps=2", "training.decay_fraction=0.5"],
    "self_forcing": ["training.fresh_rollouts=true", "training.exit_rule=random", "training.min_num_frames=3"],
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    """A stage -> the folder of an uninterrupted run of six steps with the options of RICH, made once."""
    folder = tmp_path_factory.mktemp("finished")

    def of(stage):
        if not (folder / stage).exists():
            train.main(options(stage, folder / stage, weights, *RICH[stage], "training.num_steps=6"))
        return folder / stage

    return of


@pytest.fixture(autouse=True)
def plain_strips(monkeypatch):
    """Drawing takes longer than the tiny runs: leave a file where the picture would be."""

    def mark(video, path, labels, every=1):
        path.parent.mkdir(exist_ok=True)
        path.touch()

    monkeypatch.setattr(train, "film_strip", mark)


class Crash(Exception):
    """Not an error that train.py knows."""


@contextmanager
def after_step(number, action):
    """Run an action when step `number` of every run has been done but not yet logged."""
    with pytest.MonkeyPatch.context() as patch:
        loop = train.training_loop

        def acting(run):
            for values in loop(run):
                if run.step == number:
                    action()
                yield values

        patch.setattr(train, "training_loop", acting)
        yield


def crash():
    raise Crash


def crash_at(step, overrides):
    with after_step(step, crash), pytest.raises(Crash):
        train.main(overrides)


def run_for(cfg_overrides, num_steps=1):
    """A run that took a few steps, without any folder, and what the last one reported."""
    run = train.build(train.load_config(cfg_overrides))
    loop = train.training_loop(run)
    return run, [next(loop) for _ in range(num_steps)][-1]


# ---------------------------------------------------------------------------------------------- stages and output


def test_a_finished_run_leaves_what_was_promised(finished):
    """config.yaml, metrics.csv with its columns, sample strips and one checkpoint with the keys of the contract."""
    folder = finished("self_forcing")
    assert names(folder) == {"config.yaml", "metrics.csv", "samples", "checkpoint_final.pt"}
    assert names(folder / "samples") == {"step_000006.png"}
    state = load_checkpoint(folder / "checkpoint_final.pt")
    assert {"generator_state_dict", "optimizer_state_dict", "step", "training_type", "config"} <= state.keys()
    assert (state["step"], state["training_type"]) == (6, "dmd2")
    assert state["config"] == train.OmegaConf.to_container(train.OmegaConf.load(folder / "config.yaml"))
    header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert header == run_folder.COLUMNS
    assert {"critic_loss", "score_distance", "generator_grad_norm", "critic_flow_error_t0.75"} < set(header)


def test_every_row_says_what_is_informative(finished):
    """Each stage logs its losses and gradient norms at every step, and ink and speed with every strip."""
    for stage in settings.STAGES:
        table = rows(finished(stage))
        logged = ["critic_loss", "score_distance", "normaliser"] if stage == "self_forcing" else []
        assert [row["step"] for row in table] == ["1", "2", "3", "4", "5", "6"]
        for name in ["seconds", "generator_loss", "generator_grad_norm", *logged]:
            assert all(float(row[name]) > 0 for row in table), name
        assert [bool(row["sample_ink"] and row["sample_speed"]) for row in table] == [False] * 5 + [True]
        assert stage == "init" or any(row[f"{'critic' if logged else 'generator'}_flow_error_t0.75"] for row in table)


def test_while_it_runs_there_is_a_last_checkpoint(weights, tmp_path):
    """checkpoint_last.pt every checkpoint_every steps, and no final one before the end."""
    crash_at(3, options("teacher", tmp_path / "run", weights))
    assert names(tmp_path / "run") == {"config.yaml", "metrics.csv", "checkpoint_last.pt"}
    assert load_checkpoint(tmp_path / "run" / "checkpoint_last.pt")["step"] == 2


FROM_SCRATCH = ["experiment=from_scratch_cpu", *TINY, "training.max_num_frames=15", "training.num_previews=1"]


def test_stages_in_a_row_and_only_once(tmp_path, capsys):
    """An experiment trains each stage from the one before; again, nothing is done; a new teacher renews the rest."""
    command = [*FROM_SCRATCH, f"training.output_dir={tmp_path}", "training.num_steps=2"]
    final = train.main(command)
    stages = list(train.load_config(command).stages)
    assert stages[:4] == ["teacher", "teacher_2", "init", "self_forcing"]
    students = stages[3:]
    finals = {stage: tmp_path / stage / "checkpoint_final.pt" for stage in stages}
    assert final == finals[stages[-1]] and names(tmp_path) == set(stages)
    records = {stage: load_checkpoint(path)["config"]["training"] for stage, path in finals.items()}
    assert records["teacher"]["pretrained_checkpoint"] is None
    assert records["teacher_2"]["pretrained_checkpoint"] == str(finals["teacher"])
    assert records["init"]["pretrained_checkpoint"] == str(finals["teacher_2"])
    for before, stage in pairwise(["init", *students]):
        assert records[stage]["pretrained_checkpoint"] == str(finals[before])
        assert records[stage]["teacher_checkpoint"] == str(finals["teacher_2"])

    written = {stage: path.stat().st_mtime_ns for stage, path in finals.items()}
    capsys.readouterr()
    assert train.main(command) == final
    assert written == {stage: path.stat().st_mtime_ns for stage, path in finals.items()}
    assert capsys.readouterr().out.count("is there already") == len(stages)

    os.utime(finals["teacher_2"])  # as if it had been trained anew
    train.main(command)
    assert names(tmp_path) == {*stages, "init.1", *(f"{stage}.1" for stage in students)}


def test_an_interrupted_row_goes_on_in_its_stage(tmp_path):
    """Killed in the second stage, an experiment skips the first, resumes the second, and ends as if uninterrupted."""
    command = [*FROM_SCRATCH, "training.num_steps=3", "training.checkpoint_every=1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train.main([*command, f"training.output_dir={whole}"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "LOSSES", train.LOSSES | {"init": lambda *_: crash()})
        with pytest.raises(Crash):
            train.main([*command, f"training.output_dir={broken}"])
    assert names(broken) == {"teacher", "teacher_2", "init"}
    train.main([*command, f"training.output_dir={broken}"])
    states = [load_checkpoint(folder / "self_forcing" / "checkpoint_final.pt") for folder in (whole, broken)]
    for key in ("generator_state_dict", "critic_state_dict", "ema_state_dict"):
        assert_same(states[0][key], states[1][key])


def test_a_stage_starts_from_the_weights_it_is_given(weights):
    """Generator from pretrained_checkpoint; teacher, frozen, and critic from teacher_checkpoint."""
    run = train.build(train.load_config(options("self_forcing", "unused", weights)))
    start, teacher = (load_weights(weights / f"{name}.safetensors").state_dict for name in ("start", "teacher"))
    assert_same(dict(run.networks["generator"].state_dict()), start)
    assert_same(dict(run.networks["critic"].state_dict()), teacher)
    assert_same(dict(run.teacher.state_dict()), teacher)
    assert not any(p.requires_grad for p in run.teacher.parameters())


def test_weights_come_averaged(weights, tmp_path):
    """A stage that starts from a training checkpoint takes its average, not its last weights."""
    path = train.main(options("teacher", tmp_path / "teacher", weights, "training.lr=0.1"))
    run = train.build(train.load_config(options("init", "unused", None, f"training.pretrained_checkpoint={path}")))
    state = load_checkpoint(path)
    assert_same(dict(run.networks["generator"].state_dict()), state["ema_state_dict"])
    average, last = (state[f"{name}_state_dict"]["head.head.weight"] for name in ("ema", "generator"))
    assert not torch.equal(average, last)


def test_the_trainer_of_older_documents(weights, tmp_path):
    """SimplifiedTrainer(*overrides).train() is main."""
    final = train.SimplifiedTrainer(*options("teacher", tmp_path / "run", weights)).train()
    assert final == tmp_path / "run" / "checkpoint_final.pt" and final.exists()


# ---------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("stage", settings.STAGES)
def test_resumed_equals_uninterrupted(stage, weights, finished, tmp_path):
    """Two crashes, a logged step past the last checkpoint, then the end: all equal, every step logged once."""
    command = options(stage, tmp_path / "run", weights, *RICH[stage], "training.num_steps=6")
    crash_at(4, command)
    assert len(rows(tmp_path / "run")) == 3
    crash_at(6, command)
    train.main(command)
    assert_same(final_state(tmp_path / "run"), final_state(finished(stage)))
    states = final_state(tmp_path / "run")
    assert states["optimizer_state_dict"] and states["ema_state_dict"]
    assert stage != "self_forcing" or (states["critic_state_dict"] and len(states["critic_optimizer_state_dict"]) == 2)
    once, twice = rows(finished(stage)), rows(tmp_path / "run")
    assert [row["step"] for row in twice] == ["1", "2", "3", "4", "5", "6"]
    for one, other in zip(once, twice, strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_at_hand(number, weights, finished, tmp_path):
    """SIGTERM and Ctrl-C: the step is logged and saved, the exit status is not 0, and the run resumes exactly."""
    before = signal.getsignal(number)
    command = options("teacher", tmp_path / "run", weights, *RICH["teacher"], "training.num_steps=6")
    with after_step(3, lambda: os.kill(os.getpid(), number)), pytest.raises(SystemExit, match="Stopped at step 3"):
        train.main(command)
    assert signal.getsignal(number) is before
    assert load_checkpoint(tmp_path / "run" / "checkpoint_last.pt")["step"] == 3 == len(rows(tmp_path / "run"))
    train.main(command)
    assert_same(final_state(tmp_path / "run"), final_state(finished("teacher")))


@pytest.mark.parametrize(("numbers", "repeat"), [((signal.SIGINT,) * 2, 0.0), ((signal.SIGINT, signal.SIGTERM), 5.0)])
def test_a_second_signal_stops_at_once(numbers, repeat, weights, tmp_path, monkeypatch):
    """Asked twice, by the same signal some time later or by another, the run does not finish its step."""
    monkeypatch.setattr(run_folder.Interrupt, "REPEAT", repeat)

    def ask_twice():
        for number in numbers:
            os.kill(os.getpid(), number)

    with after_step(3, ask_twice), pytest.raises(KeyboardInterrupt):
        train.main(options("teacher", tmp_path / "run", weights))
    assert len(rows(tmp_path / "run")) == 2


def test_the_same_signal_again_is_the_same_request(weights, tmp_path):
    """A cluster signals all processes of a job, and torchrun a moment later its workers again: the step is finished."""

    def ask_twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    with after_step(3, ask_twice), pytest.raises((SystemExit, KeyboardInterrupt), match="Stopped at step 3"):
        train.main(options("teacher", tmp_path / "run", weights))
    assert load_checkpoint(tmp_path / "run" / "checkpoint_last.pt")["step"] == 3


def test_looking_does_not_change_training(weights, finished, tmp_path):
    """Strips at every step draw the average, and leave the trained weights and every later draw as they were."""
    more = ["training.num_steps=6", "training.sample_every=1"]
    train.main(options("teacher", tmp_path / "run", weights, *RICH["teacher"], *more))
    assert len(names(tmp_path / "run" / "samples")) == 6
    often, once = final_state(tmp_path / "run"), final_state(finished("teacher"))
    assert_same({**often, "config": None}, {**once, "config": None})


@pytest.mark.parametrize("stage", ["teacher", "self_forcing"])
def test_strips_show_the_average(stage, weights, tmp_path, monkeypatch):
    """samples/*.png is a picture of what the averaged weights make; its ink and speed are logged."""
    run = train.build(train.load_config(options(stage, "unused", weights)))
    raw = train.preview(run, tmp_path)
    run.ema.update(1)
    assert train.preview(run, tmp_path) == raw  # an average of one
    for shadow in run.ema.shadow.values():
        shadow += 0.1 * torch.randn_like(shadow)
    monkeypatch.setattr(train, "film_strip", film_strip)
    average = train.preview(run, tmp_path)
    assert average.keys() == {"sample_ink", "sample_speed"} and average != raw
    assert imageio.imread(tmp_path / "samples" / "step_000000.png").std() > 10


def test_a_damaged_last_checkpoint_is_named(weights, tmp_path):
    """A run does not start over in silence when its checkpoint cannot be read."""
    command = options("teacher", tmp_path / "run", weights)
    crash_at(3, command)
    (tmp_path / "run" / "checkpoint_last.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="checkpoint_last.pt cannot be read"):
        train.main(command)


# ---------------------------------------------------------------------------------------------- nothing is lost


def tree(folder):
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["foreign", "another config", "damaged config", "newer weights", "finished"])
def occupied(request, weights, tmp_path):
    """A folder that cannot be resumed, and the command that meets it."""
    folder = tmp_path / "run"
    own = tmp_path / "weights"
    own.mkdir()
    for path in weights.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    command = options("teacher", folder, own)
    if request.param == "foreign":
        (folder / "thesis").mkdir(parents=True)
        (folder / "thesis" / "chapter.tex").write_text("years of work")
        (folder / ".draft.tmp").write_text("more work")
    elif request.param == "finished":
        train.main(command)
    else:
        crash_at(3, command + ["training.seed=1"] * (request.param == "another config"))
        if request.param == "damaged config":
            (folder / "config.yaml").write_text("training: {seed: [")
        os.utime(own / "start.safetensors")
    return folder, command


def test_what_cannot_be_resumed_is_moved_aside(occupied, capsys, request):
    """Foreign files, another config's run or one that cannot be read, one that started from older weights, a finished
    one: all kept, all whole."""
    folder, command = occupied
    folder.with_name("run.1").mkdir()
    before = tree(folder)
    train.main(command)
    assert tree(folder.with_name("run.2")) == before
    reason = {"foreign": "other files", "another config": "a run with other settings", "finished": "a finished run"}
    reason["damaged config"] = reason["another config"]
    held = reason.get(request.node.callspec.params["occupied"], "a run from older weights")
    assert f"{folder} held {held}: moved to" in capsys.readouterr().out
    assert len(rows(folder)) == 4


def test_an_unfinished_run_is_not_moved(weights, tmp_path, capsys):
    """The same command goes on in place, and clears away writes that a kill cut short; in a config order is nothing."""
    command = options("teacher", tmp_path / "run", weights)
    crash_at(3, command)
    written = tmp_path / "run" / "config.yaml"
    config = OmegaConf.to_container(OmegaConf.load(written))
    written.write_text(OmegaConf.to_yaml(OmegaConf.create(dict(reversed(config.items())))))
    (tmp_path / "run" / ".checkpoint_last.pt.123.tmp").write_bytes(b"half")
    train.main(command)
    assert names(tmp_path) == {"run"}
    assert names(tmp_path / "run") == {"config.yaml", "metrics.csv", "samples", "checkpoint_final.pt"}
    assert "Resuming" in capsys.readouterr().out


def test_a_stage_may_start_from_the_run_that_it_moves_aside(tmp_path):
    """The natural mistake, the same folder for both: the source is moved with its run, and the same command resumes."""
    folder = tmp_path / "run"
    train.main(options("teacher", folder))
    command = options("init", folder, None, f"training.pretrained_checkpoint={folder}/checkpoint_final.pt")
    crash_at(3, command)
    train.main(command)
    assert names(tmp_path) == {"run", "run.1"}
    again = options("init", tmp_path / "own", None, f"training.pretrained_checkpoint={folder}.1/checkpoint_final.pt")
    train.main(again)
    states = [load_checkpoint(tmp_path / name / "checkpoint_final.pt") for name in ("run", "own")]
    assert_same(states[0]["ema_state_dict"], states[1]["ema_state_dict"])


@pytest.mark.parametrize("place", [".", "..", ""])
def test_the_current_folder_is_never_moved(place, weights, tmp_path, monkeypatch):
    """An output_dir that holds the user's current folder is refused, not moved aside."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "thesis.tex").touch()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="a folder of its own"):
        train.main(options("teacher", place, weights))
    assert names(tmp_path) == {"here"} and names(tmp_path / "here") == {"thesis.tex"}


# ---------------------------------------------------------------------------------------------- one step


@pytest.mark.parametrize("stage", settings.STAGES)
@pytest.mark.parametrize("micro", [1, 2])
def test_accumulated_gradients_equal_those_of_the_full_batch(stage, micro, weights):
    """Four samples in four, two or one backward passes: gradients of every network and reports agree to 1e-6."""
    still = ["training.lr=0.0", "training.critic_lr=0.0", "training.max_grad_norm=1e9", "training.batch_size=4"]
    command = options(stage, "unused", weights, *still, *RICH[stage], "training.critic_optimizer=adamw")
    whole, said = run_for(command)
    parts, said_in_parts = run_for([*command, f"training.micro_batch_size={micro}"])
    for name, network in whole.networks.items():
        for one, other in zip(network.parameters(), parts.networks[name].parameters(), strict=True):
            assert (one.grad - other.grad).abs().max() <= 1e-6 * max(1, one.grad.abs().max())
    assert said.keys() == said_in_parts.keys()
    for name in said.keys() - {"seconds"}:
        assert said[name] == pytest.approx(said_in_parts[name], rel=1e-5)


@pytest.mark.parametrize("stage", settings.STAGES)
def test_master_weights_stay_float32_under_autocast(stage, weights, tmp_path):
    """bf16 autocast really computes in bf16, close to fp32; weights, average and optimizer states are float32."""
    still = ["training.lr=0.0", "training.critic_lr=0.0", "training.max_grad_norm=1e9"]
    command = options(stage, tmp_path, weights, *still)
    exact, _ = run_for(command)
    mixed, _ = run_for([*command, "training.autocast=bf16"])
    state = mixed.state_dict()
    for key in ("generator_state_dict", "critic_state_dict", "ema_state_dict"):
        assert {x.dtype for x in (state[key] or {}).values()} <= {torch.float32}
    kept = [x for saved in state["optimizer_state_dict"] for each in saved["state"].values() for x in each.values()]
    assert kept and {x.dtype for x in kept} == {torch.float32}
    for name, network in exact.networks.items():
        for one, other in zip(network.parameters(), mixed.networks[name].parameters(), strict=True):
            assert not torch.equal(one.grad, other.grad)
            assert nn.functional.cosine_similarity(one.grad.flatten(), other.grad.flatten(), dim=0) > 0.99


def test_half_precision_masters_are_refused():
    """A builder that gives bf16 parameters is told to use autocast."""
    cfg = train.load_config(SIZES)
    builder = {"_target_": "tiny_runs.half_model", "config": cfg.model}
    with pytest.raises(ValueError, match="must be float32.*autocast"):
        train.place(train.network(builder, cfg, None), OneProcess("cpu"))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizers_share_the_parameters_out(kind):
    """Muon takes the matrices inside the layers and everything else gets a tenth; AdamW takes all at the full lr."""
    cfg = train.load_config(SIZES)
    model = train.make(cfg.generator)
    optimizers = train.make_optimizers(model, kind, 0.5, train.make(cfg.training))
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    if kind == "adamw":
        assert [type(o) for o in optimizers] == [torch.optim.AdamW] and optimizers[0].param_groups[0]["lr"] == 0.5
        return
    adamw, muon = optimizers
    assert isinstance(muon, torch.optim.Muon) and muon.param_groups[0]["lr"] == 0.5
    assert adamw.param_groups[0]["lr"] == pytest.approx(0.05)
    block = model.blocks[0]
    assert {id(block.self_attn.q.weight), id(block.ffn[0].weight)} <= {id(p) for p in muon.param_groups[0]["params"]}
    assert all(p.ndim == 2 for p in muon.param_groups[0]["params"])
    assert {id(model.head.head.weight), id(block.modulation)} <= {id(p) for p in adamw.param_groups[0]["params"]}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_both_optimizers_move_every_parameter(kind, weights):
    """One step changes each parameter of generator and critic, whichever optimizer holds it."""
    kinds = [f"training.optimizer={kind}", f"training.critic_optimizer={kind}"]
    command = options("self_forcing", "unused", weights, *kinds)
    before = train.build(train.load_config(command))
    after, _ = run_for(command)
    for name, network in after.networks.items():
        for (key, new), old in zip(network.named_parameters(), before.networks[name].parameters(), strict=True):
            assert not torch.equal(new, old), f"{name} {key}"


def test_max_steps_ends_a_run_early(weights, tmp_path):
    """Its steps are the first ones of the longer run, whose learning rate already falls; the end is a whole one."""
    more = [*RICH["teacher"], "training.num_steps=6", "training.decay_fraction=1.0"]
    train.main(options("teacher", tmp_path / "whole", weights, *more))
    train.main(options("teacher", tmp_path / "short", weights, *more, "training.max_steps=2"))
    assert final_state(tmp_path / "short")["step"] == 2
    for one, other in zip(rows(tmp_path / "short"), rows(tmp_path / "whole"), strict=False):
        assert one["generator_loss"] == other["generator_loss"]
    assert settings.TrainingConfig(num_steps=6, max_steps=9).last_step == 6


def test_learning_rate_rises_stays_and_falls():
    """Linear warm-up, a plateau, and a linear end over the last decay_fraction of the run."""
    config = settings.TrainingConfig(num_steps=100, warmup_steps=10, decay_fraction=0.2)
    scale = [train.lr_scale(step, config) for step in range(100)]
    assert scale[0] == pytest.approx(0.1) and scale[4] == pytest.approx(0.5)
    assert scale[9:81] == [1.0] * 72
    assert scale[90] == pytest.approx(0.5) and scale[99] == pytest.approx(0.05)
    assert {train.lr_scale(step, settings.TrainingConfig()) for step in range(300)} == {1.0}


def test_the_learning_rate_reaches_the_optimizer(weights):
    """The schedule scales each group's own lr, also after several steps."""
    more = ["training.optimizer=muon", "training.lr=0.08", "training.decay_fraction=1.0"]
    run, _ = run_for(options("teacher", "unused", weights, *more), 3)
    rates = [group["lr"] for optimizer in run.optimizers["generator"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.004, 0.04])


def test_gradients_are_clipped_after_they_are_measured(weights):
    """The log shows the norm as it was; the optimizer sees max_grad_norm at most."""
    run, said = run_for(options("teacher", "unused", weights, "training.max_grad_norm=1e-3"))
    norm = torch.stack([p.grad.norm() for p in run.networks["generator"].parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3) and said["generator_grad_norm"] > 2e-3


def test_a_gradient_that_is_not_finite_stops_the_run(weights):
    """Better one sentence than hours of NaN."""
    run = train.build(train.load_config(options("teacher", "unused", weights)))
    run.networks["generator"].head.head.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="gradient of the generator is not finite at step 0; lower"):
        next(train.training_loop(run))


def test_short_clips_come_first(weights):
    """Until short_clip_steps only the first frames are trained on, then all of them."""
    first = ["training.short_clip_steps=3", "training.short_clip_share=0"]
    run = train.build(train.load_config(options("teacher", "unused", weights, *first)))
    lengths = []
    for run.step in range(5):
        lengths.append(train.clips(run, range(2), train.generators(0, run.step, samples=range(2)))[0].shape[1])
    assert lengths == [3, 3, 3, 12, 12]


@pytest.mark.parametrize(("share", "low", "high"), [(0.25, 15, 35), (1.0, 100, 100)])
def test_a_share_of_steps_keeps_to_short_clips(share, low, high, weights):
    """Which steps they are depends on seed and step alone: the same on every process and after a resume."""
    mixed = [f"training.short_clip_share={share}", "training.short_clip_steps=0"]
    run = train.build(train.load_config(options("teacher", "unused", weights, *mixed)))

    def short():
        steps = []
        for run.step in range(100):
            rng = train.generators(0, run.step, samples=range(1))
            steps += [run.step] * (train.clips(run, range(1), rng)[0].shape[1] == 3)
        return steps

    first = short()
    assert low <= len(first) <= high
    assert short() == first


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.3, 20, 40), (1.0, 100, 100)])
def test_prompts_are_dropped_at_the_given_rate(share, low, high, weights):
    """A dropped prompt is the null prompt: all zeros."""
    run = train.build(train.load_config(options("teacher", "unused", weights, f"training.prompt_dropout={share}")))
    cond = train.clips(run, range(100), train.generators(0, samples=range(100)))[1]
    assert low <= sum(not prompt.any() for prompt in cond["prompt_embeds"]) <= high


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("stage", settings.STAGES)
def test_stages_compose(stage):
    """configs/stage/*.yaml make a valid run of that stage with the shipped weights of the stage before."""
    cfg = train.load_config([f"stage={stage}"])
    config = train.make(cfg.training)
    assert config.stage == stage and config.output_dir == "logs/training"
    before = {"teacher": (None, None), "init": ("teacher", None), "self_forcing": ("init", "teacher")}[stage]
    paths = [name and f"checkpoints/{name}.safetensors" for name in before]
    assert [config.pretrained_checkpoint, config.teacher_checkpoint] == paths
    assert isinstance(train.make(cfg.generator), TinyCausalWanModel)
    assert train.load_config([]).training.stage == "self_forcing"


EXPERIMENTS = sorted(path.stem for path in (REPOSITORY / "configs" / "experiment").glob("*.yaml"))
SMALL_EXPERIMENTS = [name for name in EXPERIMENTS if not name.startswith("wan")]  # the others: test_full_scale_training


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_compose(name, monkeypatch):
    """Every experiment, and every stage that it lists, is a valid config that uses what the file says."""
    seen = []
    for function in ("fit", "fit_once"):
        monkeypatch.setattr(train, function, lambda cfg: seen.append(cfg) or Path("made") / f"{cfg.training.stage}.pt")
    train.main([f"experiment={name}"])
    stated = train.OmegaConf.load(REPOSITORY / "configs" / "experiment" / f"{name}.yaml")
    listed = stated.get("stages") or {"self_forcing": []}
    assert [cfg.training.stage for cfg in seen] == [train.stage_of(stage) for stage in listed]
    for cfg, overrides in zip(seen, listed.values(), strict=True):
        train.make(cfg.training)
        if name in SMALL_EXPERIMENTS:
            train.make(cfg.generator), train.make(cfg.data)
        for group in ("model", "world"):
            assert stated.get(group, {}).items() <= cfg[group].items()
        for setting in overrides:
            option, value = setting.split("=")
            assert str(train.OmegaConf.select(cfg, option)).lower() == value
    assert len({cfg.training.output_dir for cfg in seen}) == len(seen)


def test_the_command_line_comes_last(monkeypatch):
    """Options of the user win over those that an experiment gives to its stages."""
    seen = []
    monkeypatch.setattr(train, "fit_once", lambda cfg: seen.append(cfg) or Path("made"))
    train.main(["experiment=from_scratch_cpu", "training.num_steps=7", "model.dim=64"])
    assert len(seen) > 4 and {(cfg.training.num_steps, cfg.model.dim) for cfg in seen} == {(7, 64)}


@pytest.mark.parametrize("name", some_slow(SMALL_EXPERIMENTS, {"one_gpu"}))
def test_an_experiment_fits_itself(name, tmp_path, monkeypatch):
    """Real sizes, canvas, patches and prompts go together: its first stage takes a step, of two digits every stage."""
    monkeypatch.chdir(tmp_path)
    shipped = {"teacher": "teacher", "init": "init", "self_forcing": "student"}
    taken = []

    def one_step(cfg):
        assert next(train.training_loop(train.build(cfg)))["generator_loss"] >= 0
        taken.append(cfg.training.stage)
        if name != "two_digits":
            raise Crash
        return REPOSITORY / "checkpoints" / f"{shipped[cfg.training.stage]}.safetensors"

    for entry in ("fit", "fit_once"):
        monkeypatch.setattr(train, entry, one_step)
    with nullcontext() if name == "two_digits" else pytest.raises(Crash):
        train.main([f"experiment={name}", "training.batch_size=1", "training.device=cpu", "training.max_num_frames=12"])
    assert list(dict.fromkeys(taken)) == (list(shipped) if name == "two_digits" else taken[:1])


MISTAKES = {
    "training.nmu_steps=3": "There is no option training.nmu_steps; did you mean training.num_steps.",
    "+training.nmu_steps=3": "There is no option training.nmu_steps; did you mean training.num_steps.",
    "lr=3": "There is no option lr; known are .*training.*",
    "num_steps": "'num_steps' cannot be read; options are written group.name=value.*",
    "model.patch_size=[1,6": ".*cannot be read; options are written group.name=value.*",
    "stage=student": "There is no stage/student; known are init, self_forcing, teacher.",
    "experiment=nothing": "There is no experiment/nothing; known are .*from_scratch_cpu.*",
    "training.num_steps=many": "training.num_steps must be int, got 'many'.",
    "training.num_steps=1e3": "training.num_steps must be int, got 1000.0.",
    "training.num_steps=0": "training.num_steps must be at least 1, got 0.",
    "training.seed=true": "training.seed must be int, got True.",
    "training.betas=[0.9]": r"training.betas must be list\[float, float\], got \[0.9\].",
    "training.denoising_steps=[a,b]": r"training.denoising_steps must be list\[float, ...\], got .*",
    "training.denoising_steps=[250,500]": "denoising_steps must fall strictly from 1000.*",
    "training.window_frames=x": "training.window_frames must be int or null, got 'x'.",
    "training.warmup_steps=-5": "training.warmup_steps must be at least 0, got -5.",
    "training.seed=-1": "training.seed must be at least 0, got -1.",
    "training.max_grad_norm=0": "training.max_grad_norm must be above 0, got 0.",
    "training.lr=nan": "training.lr must be at least 0, got nan.",
    "world.split=validation": "world.split must be train, got validation: the other digits are kept for measuring.",
    "world.num_digits=3": ".* has 14 words, but this encoder takes 10.*",
    "encoder.text_dim=16": "Prompts are encoded with 16 numbers per word: set model.text_dim to 16.",
    "training.ema_decay=2": "training.ema_decay must lie between 0 and 1, got 2.",
    "training.optimizer=sgd": "training.optimizer must be one of adamw, muon; got 'sgd'.",
    "training.autocast=fp8": "training.autocast must be one of auto, null, bf16; got 'fp8'.",
    "training.lr=-1": "training.lr must be at least 0, got -1.",
    "training.device=gpu": "training.device=gpu is not to be had on this machine; use .*cpu.",
    "training.micro_batch_size=3": ".*micro batches of 3; choose a micro_batch_size that divides it.",
    "training.min_num_frames=25": "No whole number of blocks .* widen the range.",
    "training.exit_rule=per_block training.ts_schedule=true": "ts_schedule .* needs exit_rule 'random' or 'last'.",
    "training.critic_steps=0": "critic_steps must be at least 1.*",
    "training.gradient_frames=0": "training.gradient_frames must be at least 1, got 0.",
    "world.num_frames=8": "8 frames are not a whole number of blocks .*; use 6 or 9 frames.",
    "stage=init training.short_clip_steps=9 training.short_clip_frames=4": "4 frames are not .*; use 3 or 6 frames.",
    "world.channels=3": "Videos have 3 channels: set model.in_dim and model.out_dim to 3.",
    "world.canvas=wide": "world.canvas must be int, got 'wide'.",
    "world.split=tset": 'unknown split "tset"; choose one of train, .*',
    "model.dim=25": "dim=25 must split into num_heads=2 heads of even width.",
    "model.dim=wide": "model.dim must be int, got 'wide'.",
    "model.dim=32": ".*start.safetensors does not fit the model, misshaped: patch_embedding.weight .*",
    "model.num_layers=2": ".*does not fit the model, missing: blocks.1.*",
    "model.patch_size=6": r"model.patch_size must be list\[int, int, int\], got 6.",
    "scheduler.shift=0": "shift must be positive, got 0.*",
    "scheduler.shift=much": "Error in call to target 'flow_match.FlowMatchScheduler'.*",
    "attention=foo.bar": ".*Error loading .*foo.bar.*",
    "wandb.mode=maybe": "wandb.mode must be one of disabled, offline, online; got 'maybe'.",
    "training.pretrained_checkpoint=null": ".*needs training.pretrained_checkpoint and training.teacher_checkpoint.",
    "training.pretrained_checkpoint=nope.pt": "There is no checkpoint nope.pt.*",
    "training.teacher_checkpoint=nope.pt": "There is no checkpoint nope.pt.*",
    "training.teacher_checkpoint=checkpoints/init.safetensors": ".*was made by stage=init; .* one of stage=teacher.",
    "stages={teacher:[]} stage=init": "This experiment lists its stages: leave out stage=.*",
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence(mistake, weights, tmp_path):
    """Unknown, mistyped, contradictory and impossible options: a ValueError of one line that says what to do."""
    command = [o for o in options("self_forcing", tmp_path / "run", weights) if not o.startswith("stage=")]
    with pytest.raises(ValueError) as error:
        train.main([*command, *mistake.split()])
    assert re.fullmatch(MISTAKES[mistake], str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


def test_int_will_do_for_float_and_lists_for_tuples():
    """YAML spells numbers and tuples its own way; what fits is taken."""
    given = ["training.lr=1", "training.denoising_steps=[1000,500]", "training.num_frames_per_block=[2,1]"]
    given += ["training.window_frames=null", "training.context_noise=5", "world.speed=1"]
    config = train.make(train.load_config(given).training)
    assert config.rollout.denoising_steps == (1000, 500) and config.rollout.frames_per_block == (2, 1)


def command_line(monkeypatch, *arguments):
    """train.py as __main__, in this process: the exit status or message."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")
    return stop.value.code


def test_the_command_line_prints_sentences(weights, tmp_path, monkeypatch):
    """Wrong options, values, paths and diverging runs end with a message for sys.exit, never with a traceback."""
    assert command_line(monkeypatch, "training.num_steps=x") == "train.py: training.num_steps must be int, got 'x'."
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        message = command_line(monkeypatch, *options("teacher", place, weights))
        assert message.startswith("train.py: ") and str(tmp_path / "file") in message
    diverging = options("teacher", tmp_path / "run", weights, "training.lr=1e30", "training.max_grad_norm=1e30")
    assert "not finite" in command_line(monkeypatch, *diverging)


def test_the_real_command_line(tmp_path):
    """As a user types it, from another folder: exit status 1, one line on stderr."""
    command = [sys.executable, REPOSITORY / "train.py", "training.nmu_steps=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "train.py: There is no option training.nmu_steps; did you mean training.num_steps?\n"


@pytest.mark.gpu
@pytest.mark.parametrize("stage", settings.STAGES)
def test_a_gpu_trains_what_a_cpu_trains(stage, weights, tmp_path):
    """The same numbers are drawn on both: three steps, broken off and resumed on the GPU, end close to the CPU's."""
    states = []
    for device in ("cpu", "cuda"):
        command = options(stage, tmp_path / device, weights, f"training.device={device}", "training.num_steps=3")
        if device == "cuda":
            crash_at(3, command)
        train.main(command)
        states.append(load_checkpoint(tmp_path / device / "checkpoint_final.pt")["ema_state_dict"])
    for name, x in states[0].items():
        torch.testing.assert_close(states[1][name].cpu(), x, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", settings.STAGES)
def test_compiled_layers_train_the_same_networks(stage, weights):
    """training.compile changes the speed: not what two steps report, beyond rounding, and no parameter's name. (In the
    third step rounding has grown by Adam's first ones: matmul_attention, not compiled, is then off by as much.)"""
    for num_steps, off in ((1, 2e-5), (2, 1e-3)):
        (plain, reported), (compiled, said) = (
            run_for(options(stage, "unused", weights, f"training.compile={flag}"), num_steps)
            for flag in ("false", "true")
        )
        name = "critic" if stage == "self_forcing" else "generator"
        assert compiled.networks[name].blocks[0]._compiled_call_impl
        assert not plain.networks[name].blocks[0]._compiled_call_impl
        for name, network in plain.networks.items():
            assert compiled.networks[name].state_dict().keys() == network.state_dict().keys()
        assert said.pop("seconds") and reported.pop("seconds")
        assert said == pytest.approx(reported, rel=off)


# ---------------------------------------------------------------------------------------------- wandb


def test_wandb_offline_writes_into_the_folder(weights, tmp_path, monkeypatch):
    """Without any network every run gets its own offline record; off, wandb is not even imported."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("one", "two"):
        train.main(options("teacher", tmp_path / name, weights, "wandb.mode=offline"))
        (record,) = (tmp_path / name / "wandb").glob("offline-run-*/*.wandb")
        assert record.stat().st_size > 500


def test_wandb_is_off_by_default(weights, tmp_path, monkeypatch):
    """A default run works where wandb is not installed; asking for it there gets a sentence."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    train.main(options("teacher", tmp_path / "off", weights))
    with pytest.raises(ValueError, match="pip install wandb"):
        train.main(options("teacher", tmp_path / "on", weights, "wandb.mode=offline"))


def test_every_setting_of_the_algorithm_reaches_it():
    """A field that RolloutConfig or SelfForcingConfig has and TrainingConfig sets is that of the run."""
    given = {
        "denoising_steps": (1000, 500), "context_noise": 100, "sink_frames": 2, "window_frames": 4,
        "sink_follows": True, "cache_gradient": True, "guidance_scale": 3.5, "fake_guidance_scale": 1.5,
        "critic_steps": 2, "fresh_rollouts": True, "exit_rule": "random", "gradient_frames": 4,
        "min_num_frames": 6, "max_num_frames": 8, "shortest_share": 0.5, "min_score_time": 0.1,
        "ts_schedule": True, "ts_schedule_max": True,
    }  # fmt: skip
    default, config = settings.TrainingConfig(), settings.TrainingConfig(num_frames_per_block=2, **given)
    assert config.rollout.frames_per_block == 2
    reached = {}
    for one in (config.self_forcing, config.rollout):
        reached |= {field.name: getattr(one, field.name) for field in fields(one)}
    assert given == {name: value for name, value in reached.items() if name not in ("rollout", "frames_per_block")}
    unset = {name for name, value in given.items() if getattr(default, name) == value}
    assert not unset, "a default proves nothing"


def test_what_samples_share_is_drawn_anew_in_every_step(weights, tmp_path, monkeypatch):
    """Exit and length come from a stream of the seed and the step."""
    named, real = [], train.generator
    monkeypatch.setattr(train, "generator", lambda *names: named.append(names) or real(*names))
    train.main(options("self_forcing", tmp_path / "run", weights, "training.num_steps=3"))
    shared = [names for names in named if names[-1] == "shared"]
    assert len(shared) == len({*shared}) == 3
