"""The recipes of full_scale, through train.py, with small random models in the real files' formats."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from ranks import on_ranks
from small_wan import write_clip as write_image_encoder
from small_wan import write_text_encoder, write_vae
from test_full_scale_images import picture
from test_full_scale_parallelize import LOSSES, killed_after_two_steps, trained
from tiny_runs import REPOSITORY, rows

from full_scale import sharded_checkpoint
from full_scale.convert import save_transformer
from full_scale.data import Prompts, shuffled
from full_scale.stored_clips import Clip, write_clip
from full_scale.wan import load_transformer
from randomness import generator, randn
from tiny_causal_wan import TinyCausalWanModel, WanConfig

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


RECIPES = ["wan_1_3b_dmd", "wan_1_3b_sid", "wan_14b_t2v_dmd", "wan_14b_i2v_dmd", "wan_1_3b_ode_init"]


@pytest.mark.parametrize("name", RECIPES)
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


@pytest.mark.slow
def test_the_recipe_runs_as_printed(folder, tmp_path):
    """torchrun with two processes, bf16, the text encoder shared out as well, from a folder of files to a checkpoint
    that loads, converts and generates."""
    command = recipe("wan_1_3b_dmd", folder, tmp_path / "run", "processes.precision=bf16", "training.num_steps=1")
    command += ["training.ema_start_step=0", "encoder.sharded=true", "encoder.cache=null"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, *command], cwd=REPOSITORY, env=environment, check=True, timeout=300)
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
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "tests")}
    command = [*torchrun, "train.py", *recipe("wan_1_3b_dmd", folder, tmp_path / "run", *dying)]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, timeout=500)
    assert (tmp_path / "died").exists()
    for a, b in zip(rows(tmp_path / "calm"), rows(tmp_path / "run"), strict=True):
        assert all(float(b[loss]) == pytest.approx(float(a[loss]), rel=1e-5) for loss in LOSSES)


def test_the_slurm_script_starts_torchrun_on_every_machine(tmp_path):
    """Machines, GPUs and options reach it, and all meet at the first machine. Slurm's own commands are stand-ins."""
    for name, line in {"scontrol": "printf 'node%s\\n' 1 2", "srun": "printf '%s\\n' \"$@\""}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"NNODES": "2", "GPUS_PER_NODE": "8", "JOB_ID": "7", "JOB_NODELIST": "node[1-2]"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    command = ["bash", REPOSITORY / "full_scale" / "train.sbatch", "experiment=wan_1_3b_dmd", "training.seed=1"]
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    assert said[0] == ".venv/bin/torchrun" and said[-3:] == ["train.py", *command[-2:]]
    assert {"--nnodes=2", "--nproc_per_node=8", "--max_restarts=3", "--rdzv_endpoint=node1:29500"} < set(said)


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
