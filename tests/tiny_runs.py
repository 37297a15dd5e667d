"""Training runs small enough for tests: one layer, two patches by two, two clips per step, some milliseconds a step."""

import csv
from pathlib import Path

import pytest
import torch

import checkpoint
import train
from tiny_causal_wan import TinyCausalWanModel

REPOSITORY = Path(__file__).resolve().parents[1]
SIZES = ["model.dim=24", "model.ffn_dim=48", "model.num_heads=2", "model.num_layers=1", "model.patch_size=[1,12,12]"]
TINY = [*SIZES, "world.sprites_per_class=2", "training.batch_size=2", "training.num_steps=4"]
TINY += ["training.autocast=null", "training.device=cpu", "training.sample_every=100", "training.checkpoint_every=2"]
TINY += ["training.warmup_steps=0"]


def some_slow(names, slow):
    """Parameters for a test, of which some run only with --run-slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def options(stage, folder, weights=None, *more):
    """Overrides of a tiny run of a stage in a folder; weights: the folder that make_weights filled."""
    starts = []
    if weights:
        starts = [f"training.pretrained_checkpoint={weights}/start.safetensors"]
        starts += [f"training.teacher_checkpoint={weights}/teacher.safetensors"] * (stage == "self_forcing")
    return [f"stage={stage}", *TINY, f"training.output_dir={folder}", *starts, *more]


def make_weights(folder, *more):
    """Two shipped networks, start and teacher, with every parameter, the zero head included, at random."""
    for seed, (name, stage) in enumerate({"start": "self_forcing", "teacher": "teacher"}.items()):
        cfg = train.load_config([f"stage={stage}", *TINY, *more])
        record = {"config": train.OmegaConf.to_container(cfg, resolve=True)}
        torch.manual_seed(seed)
        model = train.make(cfg.generator)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        checkpoint.save_weights(folder / f"{name}.safetensors", model.state_dict(), record, dtype=torch.float32)
    return folder


def final_state(folder):
    """checkpoint_final.pt without what may differ between two equal runs: time, place and command line."""
    state = checkpoint.load_checkpoint(Path(folder) / "checkpoint_final.pt")
    state["config"]["training"].pop("output_dir")
    return {name: value for name, value in state.items() if name not in ("seconds", "command", "machine")}


def assert_same(one, other, where="state"):
    """Two nests of mappings, lists and tensors are equal, tensors bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}.{i}")
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, where


def rows(folder):
    """metrics.csv as a list of mappings."""
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def names(folder):
    """What lies in a folder, hidden files included."""
    return {path.name for path in Path(folder).iterdir()}


def half_model(config):
    """A builder that breaks the rule of float32 master weights."""
    return TinyCausalWanModel(config).bfloat16()
