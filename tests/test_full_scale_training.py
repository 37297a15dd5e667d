"""The recipes of full_scale, through train.py, with small random models in the real files' formats."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from subprocess import PIPE, STDOUT

import pytest
import torch
from omegaconf import OmegaConf
from ranks import on_ranks
from small_wan import write_clip as write_image_encoder
from small_wan import write_text_encoder, write_vae
from test_full_scale_images import picture
from test_full_scale_parallelize import LOSSES, killed_after_two_steps, trained
from tiny_runs import REPOSITORY, rows, some_slow

import train
from full_scale import parallelize, plan, sharded_checkpoint
from full_scale.convert import save_transformer
from full_scale.data import Prompts, shuffled
from full_scale.parallelize import FullySharded
from full_scale.stored_clips import Clip, write_clip
from full_scale.wan import load_transformer
from randomness import generator, randn
from settings import load_config
from tiny_causal_wan import SelfAttention, TinyCausalWanModel, WanConfig

SMALL = WanConfig("t2v", 16, 16, 48, 96, 2, 2, (1, 2, 2), 64, 512, freq_dim=32)
SMALL_I2V = replace(SMALL, model_type="i2v", in_dim=36)
PROMPTS = ["a red ball rolls", "a cat sleeps", "rain on a window", "a boat far out", "two birds"]
QUICK = ["processes.precision=fp32", "data.frame_shape=[16,4,4]", "training.num_steps=3", "training.batch_size=2"]
QUICK += ["training.checkpoint_every=2", "training.sample_every=2", "training.device=cpu", "training.critic_steps=2"]
QUICK += ["training.lr=0.001", "training.critic_lr=0.001"]
SHORT = [f"training.{name}=6" for name in ("gradient_frames", "min_num_frames", "max_num_frames")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a user would have downloaded: networks in their formats, prompts, images; and ODE pairs."""
    folder = tmp_path_factory.mktemp("wan_models")
    write_networks(folder, SMALL)
    write_networks(folder / "i2v", SMALL_I2V)
    write_text_encoder(folder, official=True, dim=64)
    write_vae(folder, official=True)
    write_image_encoder(folder, official=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "images").mkdir()
    for i, prompt in enumerate(PROMPTS[:3]):
        picture(seed=i).save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text(prompt)
        pair = Clip(prompt, randn((5, 6, 16, 4, 4), generator(i)))
        write_clip(folder / "pairs" / f"{i}.safetensors", pair, {"shift": 5.0, "keep": [1000, 750, 500, 250]})
    return folder


def write_networks(folder, config):
    """Student, teacher and critic, in three formats."""
    for seed, name in enumerate(("student", "teacher", "critic")):
        model = random_network(config, seed)
        save_transformer(model, folder / name, "diffusers" if name == "critic" else "official")
        if name == "student":
            wrapped = {f"model._fsdp_wrapped_module.{key}": x for key, x in model.state_dict().items()}
            torch.save({"generator_ema": wrapped}, folder / "student.pt")


def random_network(config, seed):
    torch.manual_seed(seed)
    model = TinyCausalWanModel(config)
    for parameter in model.parameters():  # the head starts at zero, which would hide what comes before it
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def networks_of(name, folder):
    return folder / "i2v" if "i2v" in name else folder


def recipe(name, folder, out, *more):
    """The recipe with this folder's files for its weights, shrunken."""
    home = networks_of(name, folder)
    student = [f"training.pretrained_checkpoint={home}/student.pt", f"+generator.config={home}/student/config.json"]
    if "14b" in name:
        student = [f"training.pretrained_checkpoint={home}/student", "training.num_frames_per_block=6"]
    paths = [f"training.teacher_checkpoint={home}/teacher", f"fake_score.path={home}/critic"]
    paths += [f"encoder.path={folder}", f"encoder.cache={folder}/cache", f"codec.path={folder}"]
    data = {"wan_1_3b_ode_init": "pairs", "wan_14b_i2v_dmd": "images"}.get(name, "prompts.txt")
    if "i2v" in name:
        paths += [f"data.conditions.path={folder}", f"data.conditions.cache={folder}/image_cache"]
    return [
        f"experiment={name}", *student, *paths, f"data.path={folder}/{data}", *SHORT, *QUICK,
        f"training.output_dir={out}", *more,
    ]  # fmt: skip


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
STARTS_ANEW = [*TORCHRUN, "--max_restarts=1"]
SCRIPT = (REPOSITORY / "full_scale" / "train.sbatch").read_text()
ENVIRONMENT = os.environ | dict(re.findall(r"^export (\w+)=(\S+)", SCRIPT, re.M))
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "tests")}
RECIPES = ["wan_1_3b_dmd", "wan_1_3b_sid", "wan_14b_t2v_dmd", "wan_14b_i2v_dmd", "wan_1_3b_ode_init"]


@pytest.mark.parametrize("name", some_slow(RECIPES, {*RECIPES} - {"wan_1_3b_dmd"}))
def test_killed_on_two_and_resumed_on_one_it_ends_as_if_nothing_had_been(folder, tmp_path, name):
    """Every loss of generator and critic, and all final parameters, to 1e-5; the same global batch throughout."""
    on_ranks(1, trained, recipe(name, folder, tmp_path / "one"), folder=tmp_path / "ranks")
    many = recipe(name, folder, tmp_path / "many")
    on_ranks(2, killed_after_two_steps, many, folder=tmp_path / "first")
    runs = [tmp_path / run / "init" if name.endswith("init") else tmp_path / run for run in ("one", "many")]
    assert json.loads((runs[1] / "checkpoint_last" / "state.json").read_text())["step"] == 2
    on_ranks(1, trained, many, folder=tmp_path / "then")
    losses = LOSSES[:2] if name.endswith("init") else LOSSES  # it has no critic
    for a, b in zip(*map(rows, runs), strict=True):
        for loss in losses:
            assert float(b[loss]) == pytest.approx(float(a[loss]), rel=1e-5), loss
    one, other = (sharded_checkpoint.load(run / "checkpoint_final") for run in runs)
    for network in ("generator_state_dict", "critic_state_dict", "ema_state_dict"):
        for key, x in one[network].items() if one[network] else ():
            torch.testing.assert_close(other[network][key], x, rtol=1e-5, atol=1e-5)
    assert other["step"] == 3 == len(rows(runs[1]))
    moved = load_transformer(runs[1] / "checkpoint_final").state_dict()
    start = load_transformer(networks_of(name, folder) / "student").state_dict()
    assert any((moved[key] - x).abs().max() > 1e-3 for key, x in start.items())


def trained_watched(rank, overrides):
    """The run; in what the layers of its networks computed, and in what their gradients were summed."""
    computed, summed, forward, shard = set(), set(), SelfAttention.forward, parallelize.fully_shard

    def seen(self, x, *rest):
        computed.add(x.dtype)
        return forward(self, x, *rest)

    def sharded(module, **how):
        summed.add(how["mp_policy"].reduce_dtype)
        return shard(module, **how)

    SelfAttention.forward, parallelize.fully_shard = seen, sharded
    train.main(overrides)
    return computed, summed


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_in_bf16(folder, tmp_path, name):
    """A step as printed: layers compute in bf16, gradients are summed in fp32, masters, moments and averages are
    fp32, and what is trained moves."""
    more = ["processes.precision=bf16", "training.num_steps=1", "training.ema_start_step=0", "training.critic_steps=1"]
    run = recipe(name, folder, tmp_path / "run", *more)
    for computed, summed in on_ranks(2, trained_watched, run, folder=tmp_path / "ranks"):
        assert computed == {torch.bfloat16} and summed == {torch.float32}
    out = tmp_path / "run" / ("init" if name.endswith("init") else "")
    (row,), state = rows(out), sharded_checkpoint.load(out / "checkpoint_final")
    losses = [float(row[loss]) for loss in ("generator_loss", "critic_loss") if row[loss]]
    assert len(losses) == (1 if name.endswith("init") else 2) and all(map(math.isfinite, losses))
    start = load_transformer(networks_of(name, folder) / "student").state_dict()
    for network in filter(state.get, ("generator_state_dict", "critic_state_dict", "ema_state_dict")):
        assert {x.dtype for x in state[network].values()} == {torch.float32}
        assert any(not torch.equal(x, start[key]) for key, x in state[network].items())
    moments = state["optimizer_state_dict"][0]["state"].values()
    assert {x["exp_avg"].dtype for x in moments} == {torch.float32}


@pytest.mark.slow
def test_the_recipe_runs_as_printed(folder, tmp_path):
    """torchrun with two processes, bf16, the text encoder shared out as well, from a folder of files to a checkpoint
    that loads, converts and generates."""
    command = recipe("wan_1_3b_dmd", folder, tmp_path / "run", "processes.precision=bf16", "training.num_steps=1")
    command += ["training.ema_start_step=0", "encoder.sharded=true", "encoder.cache=null"]
    subprocess.run([*TORCHRUN, "train.py", *command], cwd=REPOSITORY, env=ENVIRONMENT, check=True, timeout=300)
    state = sharded_checkpoint.load(tmp_path / "run" / "checkpoint_final")
    assert {x.dtype for x in state["generator_state_dict"].values()} == {torch.float32}
    model = load_transformer(tmp_path / "run" / "checkpoint_final", dtype="bfloat16")
    assert model.config == SMALL
    average = state["ema_state_dict"]["blocks.0.ffn.0.weight"]
    assert torch.equal(model.blocks[0].ffn[0].weight, average.bfloat16())
    raw = load_transformer(tmp_path / "run" / "checkpoint_final", weights="raw")
    assert torch.equal(raw.blocks[0].ffn[0].weight, state["generator_state_dict"]["blocks.0.ffn.0.weight"])


@pytest.mark.slow
def test_torchrun_restarts_what_dies(folder, tmp_path):
    """A process that is killed in the third step takes the others with it; torchrun starts all anew, they go on from
    the last checkpoint, and end as if nothing had been."""
    on_ranks(2, trained, recipe("wan_1_3b_dmd", folder, tmp_path / "calm"), folder=tmp_path / "ranks")
    dying = ["data._target_=dying.DyingPrompts", f"+data.flag={tmp_path}/died", "+data.at=4"]
    command = [*STARTS_ANEW, "train.py", *recipe("wan_1_3b_dmd", folder, tmp_path / "run", *dying)]
    subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, check=True, timeout=500)
    assert (tmp_path / "died").exists()
    for a, b in zip(rows(tmp_path / "calm"), rows(tmp_path / "run"), strict=True):
        assert all(float(b[loss]) == pytest.approx(float(a[loss]), rel=1e-5) for loss in LOSSES)


@contextmanager
def waiting_in_a_step(folder, tmp_path, seconds, torchrun):
    """A run whose second step takes so many seconds: its command, torchrun's process, the number of the one that
    waits."""
    slow = ["data._target_=dying.SlowPrompts", f"+data.flag={tmp_path}/flag", "+data.at=3", f"+data.seconds={seconds}"]
    slow += ["training.checkpoint_every=9"]
    command = [*torchrun, "train.py", *recipe("wan_1_3b_dmd", folder, tmp_path / "run", *slow)]
    with subprocess.Popen(command, cwd=REPOSITORY, env=ENVIRONMENT, text=True, stdout=PIPE, stderr=STDOUT) as run:
        while not (tmp_path / "flag").exists():
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.1)
        yield command, run, int((tmp_path / "flag").read_text())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_stops_after_the_step_at_hand(folder, tmp_path):
    """SIGTERM to torchrun and to a worker, as Slurm sends it, in a step that outlasts the half minute after which
    torchrun would kill: the step is finished, logged and saved, and the same command goes on from it."""
    patience = re.search(r"--shutdown_timeout=\d+", SCRIPT)[0]
    with waiting_in_a_step(folder, tmp_path, 45, [*STARTS_ANEW, patience]) as (command, run, worker):
        os.kill(worker, signal.SIGTERM)
        run.terminate()
        said = run.communicate()[0]
    assert run.returncode and "Stopped at step 2; the same command goes on from there." in said
    last = tmp_path / "run" / "checkpoint_last"
    assert sharded_checkpoint.load(last)["step"] == 2 == len(rows(tmp_path / "run"))
    said = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, text=True, check=True, capture_output=True).stdout
    assert "at step 2." in said and sharded_checkpoint.load(last.with_name("checkpoint_final"))["step"] == 3
    assert [row["step"] for row in rows(tmp_path / "run")] == ["1", "2", "3"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_goes_on_where_a_process_alone_is_stopped(folder, tmp_path):
    """A machine that is taken away: all save after the step at hand, torchrun starts them anew, and no step is lost."""
    with waiting_in_a_step(folder, tmp_path, 3, STARTS_ANEW) as (_, run, worker):
        os.kill(worker, signal.SIGTERM)
        said = run.communicate()[0]
    assert run.returncode == 0, said
    assert "Stopped at step 2" in said and "at step 2." in said
    assert [row["step"] for row in rows(tmp_path / "run")] == ["1", "2", "3"]


def test_restarts_that_may_hang_are_refused(monkeypatch):
    """PyTorch's restarted processes read from the store that they share with torchrun where those before them were."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    parallelize.check_restarts()  # nothing is restarted
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, or leave out"):
        FullySharded("cpu")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    parallelize.check_restarts()


@pytest.mark.parametrize("gpus", ["8", "h100:8"])
def test_the_slurm_script_starts_torchrun_on_every_machine(tmp_path, gpus):
    """Machines, GPUs, cores and options reach it, and all meet at the first machine. Slurm's own commands are
    stand-ins."""
    for name, line in {"scontrol": "printf 'node%s\\n' 1 2", "srun": "printf '%s\\n' \"$@\""}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"NNODES": "2", "GPUS_PER_NODE": gpus, "CPUS_PER_TASK": "64", "JOB_ID": "7", "JOB_NODELIST": "node[1-2]"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    command = ["bash", REPOSITORY / "full_scale" / "train.sbatch", "experiment=wan_1_3b_dmd", "training.seed=1"]
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    assert said[:2] == ["--cpus-per-task=64", ".venv/bin/torchrun"] and said[-3:] == ["train.py", *command[-2:]]
    assert {"--nnodes=2", "--nproc_per_node=8", "--max_restarts=3", "--rdzv_endpoint=node1:29500"} < set(said)


def test_slurm_waits_longer_than_torchrun_and_torchrun_longer_than_a_step():
    """Signal, torchrun's patience and, with some to spare, the longest step that the planner has for 64 GPUs."""
    signalled = int(re.search(r"#SBATCH --signal=TERM@(\d+)", SCRIPT)[1])
    patience = int(re.search(r"--shutdown_timeout=(\d+)", SCRIPT)[1])
    record = plan.text(plan.setup_of(plan.parse_arguments(["--model", "i2v-14b", "--gpus", "64"])))
    step = float(re.search(r"time of a step .*= ([\d,.]+) s", record)[1])
    assert signalled > patience > 3 * step


# What self_forcing_dmd.yaml and self_forcing_sid.yaml of Self-Forcing say, self_forcing_14b_dmd.yaml and
# self_forcing_14b_i2v_dmd.yaml of Self-Forcing-Plus, their default_config.yaml and their trainer; of the first stage,
# CausVid's. Their guidance adds s (cond - uncond) to cond, which is w = s + 1 here. They count the critic's updates, of
# which every fifth comes with one of the generator.
WAN, CAUSAL = "wan_models/Wan2.1-", "wan_models/Self-Forcing/checkpoints/ode_init.pt"
ALL = {
    "scheduler.shift": 5.0, "data.frame_shape": [16, 60, 104], "processes.precision": "bf16",
    "processes.checkpoint_activations": True, "training.lr": 2e-6, "training.optimizer": "adamw",
    "training.denoising_steps": [1000, 750, 500, 250], "training.min_num_frames": 21, "training.max_num_frames": 21,
    "training.context_noise": 0, "training.sink_frames": 0, "training.window_frames": None,
    "training.max_grad_norm": 10.0, "training.micro_batch_size": 1, "training.warmup_steps": 0,
    "training.decay_fraction": 0.0,
}  # fmt: skip
DISTILLED = ALL | {
    "objective.step": "dynamic_video_sf.self_forcing_step", "training.critic_optimizer": "adamw",
    "training.batch_size": 1 * 64, "training.critic_steps": 5, "training.betas": [0.0, 0.999],
    "training.ema_decay": 0.99, "training.ema_start_step": 200 / 5, "training.num_steps": 600 / 5,
    "training.fresh_rollouts": True, "training.exit_rule": "random", "training.gradient_frames": 21,
    "training.fake_guidance_scale": None, "training.min_score_time": 0.0, "training.ts_schedule": False,
    "training.ts_schedule_max": False,
}  # fmt: skip
DMD = DISTILLED | {
    "objective.loss": "dynamic_video_sf.dmd_loss", "training.critic_lr": 4e-7, "training.weight_decay": 0.01,
}  # fmt: skip
PUBLISHED = {
    "wan_1_3b_dmd": DMD | {
        "training.guidance_scale": 3.0 + 1, "training.num_frames_per_block": 3,
        "training.pretrained_checkpoint": CAUSAL, "training.teacher_checkpoint": f"{WAN}T2V-14B",
        "fake_score.path": f"{WAN}T2V-1.3B",
    },
    "wan_1_3b_sid": DISTILLED | {
        "objective.loss._target_": "dynamic_video_sf.sid_loss", "objective.loss.alpha": 1.0,
        "training.critic_lr": 2e-6, "training.weight_decay": 0.0, "training.guidance_scale": 3.0 + 1,
        "training.num_frames_per_block": 3, "training.pretrained_checkpoint": CAUSAL,
        "training.teacher_checkpoint": f"{WAN}T2V-1.3B", "fake_score.path": f"{WAN}T2V-1.3B",
    },
    "wan_14b_t2v_dmd": DMD | {
        "training.guidance_scale": 5.0 + 1, "training.num_frames_per_block": 21,
        "training.pretrained_checkpoint": f"{WAN}T2V-14B", "training.teacher_checkpoint": f"{WAN}T2V-14B",
        "fake_score.path": f"{WAN}T2V-14B",
    },
    "wan_14b_i2v_dmd": DMD | {
        "training.guidance_scale": 6.0 + 1, "training.num_frames_per_block": 21,
        "training.pretrained_checkpoint": f"{WAN}I2V-14B-480P", "training.teacher_checkpoint": f"{WAN}I2V-14B-480P",
        "fake_score.path": f"{WAN}I2V-14B-480P",
    },
    "wan_1_3b_ode_init": ALL | {
        "training.init": "ode_pairs", "training.num_frames_per_block": 3, "training.num_steps": 3000,
        "training.batch_size": 2 * 64, "training.betas": [0.9, 0.999], "training.weight_decay": 0.01,
        "training.pretrained_checkpoint": f"{WAN}T2V-1.3B",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_published_settings(name):
    """Number by number, as the training run gets them; only how many processes hold a copy is left to the user."""
    cfg = load_config([f"experiment={name}", *(["stage=init"] if name.endswith("init") else [])])
    resolved = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert {option: OmegaConf.select(resolved, option) for option in PUBLISHED[name]} == PUBLISHED[name]


def test_prompts_come_round_by_round(tmp_path):
    """Every prompt once before any comes again, in another order each time, and the same for whoever asks."""
    (tmp_path / "prompts.txt").write_text("one\n\n  two  words\nthree\n")
    data = Prompts(tmp_path / "prompts.txt", (16, 60, 104), seed=3)
    rounds = [data.batch(range(3 * i, 3 * i + 3))["prompts"] for i in range(8)]
    assert all(sorted(one) == ["one", "three", "two words"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 2
    assert data.batch([7])["prompts"] == [rounds[2][1]] and data.frame_shape == (16, 60, 104)
    assert [shuffled(i, 3, 3) for i in range(9)] != [shuffled(i, 3, 4) for i in range(9)]
    for name, text in {"b.txt": "second\nline", "a.txt": "first"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "prompts.txt").unlink()
    assert Prompts(tmp_path).prompts == ["first", "second line"]


def test_without_prompts_one_sentence_says_so(tmp_path):
    with pytest.raises(ValueError, match="There are no prompts at .*none.txt: give a text file, one prompt per line"):
        Prompts(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="empty.txt holds no prompt"):
        Prompts(tmp_path / "empty.txt")
