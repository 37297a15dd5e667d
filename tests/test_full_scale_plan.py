"""The planner against what it plans: the models' parameters, PyTorch's FLOP counter, and the memory of real runs."""

import gc
import json
import re
import runpy
import sys
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import peak_mib
from checkpoint import EMA
from dynamic_video_sf import (
    RolloutConfig,
    SelfForcingConfig,
    dmd_loss,
    generate,
    rollout,
    self_forcing_step,
    sid_loss,
)
from flow_match import FlowMatchScheduler
from full_scale import plan
from full_scale.parallelize import FullySharded
from full_scale.pixels import WanVAE
from full_scale.plan import Block, Setup, parse_arguments, setup_of, work
from full_scale.wan import WAN_CONFIGS
from tiny_causal_wan import CLIP_DIM, TinyCausalWanModel, WanConfig, matmul_attention, sdpa_attention

REPOSITORY = Path(__file__).resolve().parents[1]
SHIFT, FEW_STEPS = FlowMatchScheduler(), RolloutConfig((1000, 500))
T2V = WanConfig(in_dim=4, out_dim=4, dim=64, ffn_dim=160, num_heads=2, num_layers=2, patch_size=(1, 2, 2), text_len=20)
I2V = replace(T2V, model_type="i2v", in_dim=24)
MIDDLE = replace(T2V, dim=192, ffn_dim=672, num_layers=3)
LARGER = replace(T2V, dim=256, ffn_dim=896, num_heads=4, num_layers=8)  # 10 million parameters
MODELS = tuple(WAN_CONFIGS)


def algorithm(num_frames=12, rollout=FEW_STEPS, **options):
    options = {"exit_rule": "last", "critic_steps": 1, "gradient_frames": num_frames} | options
    return SelfForcingConfig(rollout, min_num_frames=num_frames, max_num_frames=num_frames, **options)


def small_setup(student=T2V, teacher=None, latent=(4, 6), settings=None, **options):
    """One fp32 GPU without shards, for models that a test can run."""
    options = {"batch": 1, "gpus": 1, "precision": "fp32", "checkpointing": False} | options
    return Setup(student, teacher or student, settings or algorithm(), latent, **options)


def network(config, setup, attention=sdpa_attention):
    """A random model that computes as the setup says."""
    torch.manual_seed(0)
    model = TinyCausalWanModel(config).to(torch.float32 if setup.precision == "fp32" else torch.bfloat16)
    nn.init.normal_(model.head.head.weight, std=0.02)
    model.attention = attention
    for layer in model.blocks if setup.checkpointing else ():
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model


def networks(setup, attention=sdpa_attention):
    student, critic = (network(setup.student, setup, attention) for _ in range(2))
    for parameter in (*student.parameters(), *critic.parameters()):
        parameter.grad = torch.zeros_like(parameter)  # held all the time, as in the plan
    return student, network(setup.teacher, setup, attention).requires_grad_(False), critic


def inputs(setup, num_frames=None, batch=1):
    """Noise and what conditions it."""
    frames, config = num_frames or setup.num_frames, setup.student
    cond = {"prompt_embeds": torch.randn(batch, 7, config.text_dim)}
    if config.model_type == "i2v":
        cond["clip_features"] = torch.randn(batch, 257, 1280)
        cond["image_latents"] = torch.randn(batch, frames, 20, *setup.latent)
    return torch.randn(batch, frames, config.out_dim, *setup.latent), cond


def train(models, setup, noise, cond):
    """One step of Algorithm 1, as train.py takes it, but for the optimizers."""
    student, teacher, critic = models
    how = {"loss": {"dmd": dmd_loss, "sid": sid_loss}[setup.objective]}
    for name, loss in self_forcing_step(student, teacher, critic, SHIFT, noise, cond, cond, setup.algorithm, **how):
        loss.backward()
        (student if name == "generator" else critic).zero_grad(set_to_none=False)


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def live_bytes(function):
    """Bytes of what is allocated by `function` and not yet free when it returns, its result included."""
    gc.collect()  # what falls to it later would count as given back
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = profiler.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]"), result


def peak_bytes(function):
    gc.collect()
    return 2**20 * peak_mib(function)


def options(*arguments):
    return setup_of(parse_arguments(arguments))


# ----------------------------------------------------------------------------------------------------- parameters


def numel(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(
    "name, num_keys, total",
    [("t2v-1.3b", 825, 1_418_996_800), ("t2v-14b", 1095, 14_288_491_584), ("i2v-14b", 1303, 16_394_878_784)],
)
def test_parameters_are_those_of_the_model(name, num_keys, total):
    """Every part of every released size, counted on a model without memory; together the published totals."""
    with torch.device("meta"):
        model = TinyCausalWanModel(WAN_CONFIGS[name])
    parts = plan.parameters(model.config)
    real = {
        "layers": numel(model.blocks),
        "patch embedding": numel(model.patch_embedding),
        "text embedding": numel(model.text_embedding),
        "time embedding": numel(model.time_embedding, model.time_projection),
        "head": numel(model.head),
    }
    if name.startswith("i2v"):
        real["image embedding"] = numel(model.img_emb)
    assert parts == real
    assert plan.layer_parameters(model.config) == numel(model.blocks[0])
    assert plan.num_parameters(model.config) == sum(parts.values()) == total
    assert len(model.state_dict()) == num_keys


@pytest.mark.parametrize("options", [{"qk_norm": False}, {"cross_attn_norm": False}, {"patch_size": (1, 1, 3)}])
def test_parameters_follow_the_config(options):
    """Also of sizes that nobody released."""
    for config in (replace(T2V, **options), replace(I2V, **options)):
        assert plan.num_parameters(config) == numel(TinyCausalWanModel(config))


def test_the_text_encoder_is_umt5_xxl():
    """The shown sum is the parameter count of the released file."""
    assert plan.umt5_parameters() == 5_680_910_336


# ---------------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("name", MODELS)
def test_flops_of_a_full_size_call(name):
    """A whole clip of 21 frames at 480 x 832 through the released sizes, counted by PyTorch without memory."""
    setup = options("--model", name)
    with torch.device("meta"):
        model = TinyCausalWanModel(setup.student)
        model.attention = matmul_attention  # the counter does not see a CPU's fused kernel
        noise, cond = inputs(setup)
        counted = flops(torch.no_grad()(lambda: model(noise, torch.tensor([0.5]), cond)))
    assert plan.forward(plan.scored(setup, setup.student)) == counted


@pytest.mark.parametrize("config", [T2V, I2V], ids=["t2v", "i2v"])
def test_flops_of_each_way_to_call_the_model(config):
    """Bidirectional and cached, forward and backward, and the memory pass, equal to the counter's to the last one."""
    setup = small_setup(config)
    model = network(config, setup, matmul_attention)
    noise, cond = inputs(setup)
    with torch.no_grad():
        cache = model.remember(noise[:, :3], 0.0, cond, RolloutConfig().empty_cache())
    whole, block = work(setup, config, [Block(12)]), work(setup, config, [Block(2, past=3)])
    calls = {
        plan.forward(whole): torch.no_grad()(lambda: model(noise, 0.5, cond)),
        plan.forward(whole) + plan.backward(whole): lambda: model(noise, 0.5, cond).sum().backward(),
        plan.forward(block): torch.no_grad()(lambda: model(noise[:, 3:5], 0.5, cond, cache)),
        plan.forward(block) + plan.backward(block): lambda: model(noise[:, 3:5], 0.5, cond, cache).sum().backward(),
        plan.forward(block, head=False): torch.no_grad()(lambda: model.remember(noise[:, 3:5], 0.5, cond, cache)),
    }
    assert list(calls) == [flops(call) for call in calls.values()]


ROLLOUTS = {
    "blocks of three": FEW_STEPS,
    "uneven, sink and window": RolloutConfig((1000, 500), (1, 2, 3), sink_frames=1, window_frames=3),
    "one block": RolloutConfig((1000, 500), frames_per_block=12),
}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", ROLLOUTS)
def test_flops_of_a_training_step(name, checkpointing):
    """All calls, backward passes and recomputations of self_forcing_step, with another teacher and fewer scored
    frames than generated ones."""
    settings = algorithm(rollout=ROLLOUTS[name], gradient_frames=9)
    setup = small_setup(T2V, replace(T2V, dim=96, num_layers=3), settings=settings, checkpointing=checkpointing)
    models = networks(setup, matmul_attention)
    assert sum(plan.step_flops(setup).values()) == flops(lambda: train(models, setup, *inputs(setup)))


@pytest.mark.parametrize(
    "settings",
    [{"fresh_rollouts": False}, {"guidance_scale": 1.0}, {"fake_guidance_scale": 2.0, "critic_steps": 2}],
    ids=lambda settings: next(iter(settings)),
)
def test_flops_follow_the_settings_of_the_algorithm(settings):
    """Shared rollouts, a teacher without guidance and a critic with it; an image-to-video model."""
    setup = small_setup(I2V, settings=algorithm(6, **settings))
    models = networks(setup, matmul_attention)
    assert sum(plan.step_flops(setup).values()) == flops(lambda: train(models, setup, *inputs(setup)))


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("config", [T2V, I2V], ids=["t2v", "i2v"])
def test_flops_of_sid(config, checkpointing):
    """Backward through two calls of a larger, frozen teacher and two of the critic, and their recomputation."""
    settings = algorithm(6, fake_guidance_scale=2.0)
    teacher = replace(config, dim=96, num_layers=3)
    setup = small_setup(config, teacher, settings=settings, checkpointing=checkpointing, objective="sid")
    models = networks(setup, matmul_attention)
    real = flops(lambda: train(models, setup, *inputs(setup)))
    assert sum(plan.step_flops(setup).values()) == real
    assert sum(plan.step_flops(replace(setup, objective="dmd")).values()) < 0.9 * real


def test_flops_of_random_exits_are_their_mean():
    """The training rollouts left at each of the steps cost on average what the plan says."""
    setup = small_setup(settings=algorithm(exit_rule="random"))
    student, (noise, cond) = network(T2V, setup, matmul_attention), inputs(setup)

    def left_at(exit_step):
        steps = rollout(student, SHIFT, noise, cond, setup.algorithm.rollout, exit_step=exit_step)
        for _ in range(4):  # nobody asks for what comes after the last block
            next(steps)

    counted = [flops(torch.no_grad()(partial(left_at, exit_step))) for exit_step in range(2)]
    assert plan.training_rollout_flops(setup) == sum(counted) / 2
    assert counted[0] < counted[1]


@pytest.mark.parametrize("name", ROLLOUTS)
def test_flops_of_inference(name):
    """`generate` takes every step, and remembers every block."""
    setup = small_setup(settings=algorithm(rollout=ROLLOUTS[name]))
    student, (noise, cond) = network(T2V, setup, matmul_attention), inputs(setup)
    counted = flops(lambda: generate(student, SHIFT, noise, cond, setup.algorithm.rollout))
    assert plan.video_flops(setup) == counted


# --------------------------------------------------------------------------------------------------------- memory


def size(tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def test_states_are_what_training_holds():
    """Ten million parameters, their gradients, AdamW's state and the average, in bytes of the real tensors."""
    setup = small_setup(LARGER, latent=(8, 12))
    model = network(LARGER, setup)
    optimizer, ema = torch.optim.AdamW(model.parameters()), EMA(model, 0.99)
    noise, cond = inputs(setup)
    model(noise, 0.5, cond).square().mean().backward()
    optimizer.step()
    ema.update(1)
    held = plan.states(setup)
    assert 5e6 < numel(model) < 2e7
    for network_name in ("student", "critic"):
        assert held[f"{network_name}'s parameters"] == size(model.parameters())
        assert held[f"{network_name}'s gradients"] == size(p.grad for p in model.parameters())
        moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]  # not its step count
        assert held[f"{network_name}'s optimizer state"] == size(moments)
    assert held["student's EMA"] == size(ema.state_dict().values())
    assert held["frozen teacher"] == size(model.parameters())
    assert replace(setup, precision="bf16").wide * numel(model) == size(model.bfloat16().parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ROLLOUTS)
def test_kv_cache_is_as_large_as_the_real_one(name, precision):
    """Bytes of the keys and values after every block of a real rollout of two videos."""
    setup = small_setup(settings=algorithm(rollout=ROLLOUTS[name]), precision=precision, batch=2, micro_batch=2)
    student, (noise, cond) = network(T2V, setup), inputs(setup, batch=2)
    caches, remember = [], student.remember
    student.remember = lambda *arguments: caches.append(remember(*arguments)) or caches[-1]
    generate(student, SHIFT, noise, cond, setup.algorithm.rollout)
    real = [size(x for pair in cache.layers for x in pair) for cache in caches]
    assert [plan.cache(setup, block.held) for block in plan.blocks(setup)] == real
    assert [block.past for block in plan.blocks(setup)] == [0, *(len(cache.frames) for cache in caches[:-1])]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("past", [0, 6, None])
@pytest.mark.parametrize("config", [LARGER, replace(LARGER, model_type="i2v", in_dim=24)], ids=["t2v", "i2v"])
def test_activations_are_what_autograd_saves(config, past, precision):
    """Bytes of every storage but the parameters that a call saves for its backward pass, to 5 %; past None: of a frozen
    network, through which a gradient only passes."""
    setup, frozen, past = small_setup(config, latent=(16, 24), precision=precision), past is None, past or 0
    model = network(config, setup).requires_grad_(not frozen)
    noise, cond = inputs(setup, num_frames=9)
    noise.requires_grad_(frozen)
    with torch.no_grad():
        cache = RolloutConfig().empty_cache()
        cache = model.remember(noise[:, :past], 0.0, cond, cache) if past else cache
    own, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x  # held, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(noise[:, past : past + 3], 0.5, cond, cache).sum()
    saved = [x for address, x in saved.items() if address not in own and x.shape[-1] != CLIP_DIM]  # small if not here
    real = sum(x.untyped_storage().nbytes() for x in saved)
    planned = plan.saved(setup, work(setup, config, [Block(3, past)]), frozen)
    assert planned == pytest.approx(real, rel=0.05)
    assert loss.requires_grad


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_training_rollout_keeps_what_the_plan_says(checkpointing):
    """What is still allocated when the rollout of three blocks has been made with its gradient, to 10 %: with
    activation checkpointing the layers' inputs and, of every block, its cache."""
    setup = small_setup(MIDDLE, latent=(16, 24), settings=algorithm(9), checkpointing=checkpointing)
    student, (noise, cond) = network(MIDDLE, setup), inputs(setup)

    def roll():
        steps = rollout(student, SHIFT, noise, cond, setup.algorithm.rollout, exit_step=0)
        return [next(steps) for _ in range(3)]

    real, _ = live_bytes(roll)
    assert plan.saved(setup, plan.exit_calls(setup)) == pytest.approx(real, rel=0.1)


def frozen_bytes(rank, config, precision):
    """Of a model that was loaded in float32 and is shared out as a teacher is: what this process holds of it."""
    model = FullySharded("cpu", precision=precision).place(TinyCausalWanModel(config), trained=False)
    return size(p.to_local() for p in model.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_frozen_teacher_is_held_in_what_it_computes_in(tmp_path, precision):
    """The bytes of the shards of two processes, whatever the file's dtype was, are the plan's."""
    setup = small_setup(T2V, batch=2, gpus=2, precision=precision)
    held = on_ranks(2, frozen_bytes, T2V, precision, folder=tmp_path / "ranks")
    assert plan.states(setup)["frozen teacher"] == pytest.approx(sum(held) / 2)
    assert sum(held) == plan.BYTES[precision] * numel(TinyCausalWanModel(T2V))


def test_every_gpu_has_its_own_text_encoder_and_vae():
    """As the recipes do: UMT5 in bf16, unless it is sharded or prompts are read from disk; the VAE in float32. Offload
    moves shards alone."""
    whole, sharded, remembered = (options("--gpus", "8", "--text_encoder", way) for way in ("on", "sharded", "off"))
    assert plan.whole(whole) == {"text encoder": 2 * 5_680_910_336, "VAE": 4 * plan.VAE_PARAMETERS}
    assert plan.whole(sharded) == plan.whole(remembered) == {"VAE": 4 * plan.VAE_PARAMETERS}
    assert plan.states(sharded)["frozen text encoder"] == 2 * 5_680_910_336 / 8
    assert plan.states(whole) == plan.states(remembered)
    less = plan.training_memory(whole) - plan.training_memory(remembered)
    assert less == pytest.approx(2 * 5_680_910_336)
    less = plan.training_memory(replace(whole, offload=True)) - plan.training_memory(replace(remembered, offload=True))
    assert less == pytest.approx(2 * 5_680_910_336)


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that were made inside and still live, and their most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.seen:
                storage = x.untyped_storage()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        return result

    def forget(self, address, num_bytes):
        self.seen.discard(address)
        self.now -= num_bytes


@pytest.mark.slow
def test_a_decoding_stream_takes_what_the_plan_says():
    """The released VAE in float32, without memory: what its stream keeps, to the byte; what it takes besides while it
    decodes a block of three latent frames, to 5 %."""
    from diffusers import AutoencoderKLWan

    setup = small_setup(latent=(6, 8))
    with torch.device("meta"):
        vae = WanVAE(AutoencoderKLWan())
        assert plan.vae() == size(vae.parameters())
        with Live() as live, torch.no_grad():
            stream = vae.stream()
            for _ in range(2):
                stream(torch.zeros(1, 3, 16, *setup.latent))
        assert plan.decoder_memory(setup) == size(x for x in stream.memory if isinstance(x, torch.Tensor))
    assert plan.decoder_memory(setup) + plan.decoding(setup) == pytest.approx(live.most, rel=0.05)


def test_inference_is_planned_as_full_scale_generate_works():
    """Prompts first, without the transformer; then a call, or a block's decoding. With offload the layers come one at a
    time, and VAE and its memory only while it works."""
    setup = small_setup(T2V, precision="bf16")
    model, clip = network(T2V, setup), plan.blocks(setup)
    layer, all_layers, all_parts = (size(part.parameters()) for part in (model.blocks[0], model.blocks, model))
    text, decoder = 2 * 5_680_910_336, plan.vae() + plan.decoder_memory(setup)
    roll, held = plan.rollout_memory(setup, clip, clip), plan.cache(setup, 12)
    assert plan.inference_moments(setup) == {
        "prompts": text + plan.vae(),
        "a call of the transformer": all_parts + roll + decoder,
        "decoding": all_parts + held + decoder + plan.decoding(setup),
    }
    around = all_parts - all_layers
    assert plan.inference_moments(replace(setup, offload=True)) == {
        "prompts": text,
        "a call of the transformer": around + layer + roll,
        "decoding": around + held + decoder + plan.decoding(setup),
    }
    assert "prompts" not in plan.inference_moments(replace(setup, text_encoder=False))
    assert plan.inference_memory(setup) == text + plan.vae()


ONE_STEP = RolloutConfig((1000,))
SITUATIONS = {
    "checkpointing": {"checkpointing": True},
    "no checkpointing": {"checkpointing": False},
    "window": {"rollout": replace(ONE_STEP, window_frames=3)},
    "one block": {"rollout": replace(ONE_STEP, frames_per_block=9)},
    "bf16": {"precision": "bf16"},
    "SiD": {"objective": "sid"},
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_the_worst_moments_are_those_of_a_real_step(name):
    """The peak of all allocations in a step of Algorithm 1 with a larger teacher, and in a rollout, to 10 %."""
    situation = {"rollout": ONE_STEP, "checkpointing": True} | SITUATIONS[name]
    settings = algorithm(9, rollout=situation.pop("rollout"))
    setup = small_setup(MIDDLE, replace(MIDDLE, dim=256, num_layers=4), (16, 20), settings, **situation)
    models, (noise, cond), clip = networks(setup), inputs(setup), plan.blocks(setup)
    real = peak_bytes(lambda: train(models, setup, noise, cond))
    assert max(plan.moments(setup).values()) == pytest.approx(real, rel=0.1)
    real = peak_bytes(lambda: generate(models[0], SHIFT, noise, cond, settings.rollout))
    assert plan.rollout_memory(setup, clip, clip) == pytest.approx(real, rel=0.1)


# -------------------------------------------------------------------------------------------------------- sharding


def test_shards_divide_what_is_held():
    """Fully sharded over all GPUs, hybrid over those of a node; activations and cache are not divided."""
    alone = options("--gpus", "1", "--batch", "64")
    for arguments, shards in {
        ("--gpus", "64", "--sharding", "full"): 64,
        ("--gpus", "64", "--sharding", "hybrid"): 8,
        ("--gpus", "32", "--sharding", "hybrid", "--gpus_per_node", "4"): 4,
        ("--gpus", "4", "--sharding", "hybrid"): 4,
    }.items():
        setup = options(*arguments)
        held, whole = plan.states(setup), plan.states(alone)
        assert held == {name: pytest.approx(whole[name] / shards) for name in whole}
        assert plan.moments(setup) == plan.moments(alone)


def test_what_is_gathered_is_whole():
    """Two layers and all that is no layer in bf16, a layer's gradient in float32; on one GPU in fp32 nothing is."""
    setup = small_setup(T2V, precision="bf16", gpus=8, batch=8)
    model = network(T2V, setup)
    layer = size(model.blocks[0].parameters())
    around = size(model.parameters()) - size(model.blocks.parameters())
    assert plan.gathered(setup) == 2 * layer + around + 4 * numel(model.blocks[0])
    assert plan.gathered(replace(setup, gpus=1, precision="fp32")) == 0
    total = sum(plan.states(setup).values()) + sum(plan.whole(setup).values()) + plan.gathered(setup)
    total += max(plan.moments(setup).values())
    assert plan.training_memory(setup) == pytest.approx(total)


def test_what_costs_memory_costs_memory():
    """Two videos at once double a step's moments; offload leaves layers and activations; float32 takes more."""
    setup = options("--gpus", "8", "--gpu_memory", "200")
    twice = replace(setup, micro_batch=2)
    assert plan.moments(twice) == {name: pytest.approx(2 * x) for name, x in plan.moments(setup).items()}
    assert plan.inference_memory(twice) == plan.inference_memory(setup)
    held = sum(plan.states(setup).values())
    offloaded = plan.training_memory(setup) - plan.training_memory(replace(setup, offload=True))
    assert offloaded == pytest.approx(held)
    host = {row.label: row.number for row in plan.held(replace(setup, offload=True))}["host memory of a node"]
    assert host == pytest.approx(8 * held)
    assert plan.training_memory(replace(setup, precision="fp32")) > 1.3 * plan.training_memory(setup)
    assert plan.training_memory(replace(setup, checkpointing=False)) > 2 * plan.training_memory(setup)


# ---------------------------------------------------------------------------------------------------------- report

SECTIONS = """Sizes, parameters, gradients, optimizer state, EMA, frozen teacher, critic, text encoder, KV cache,
with checkpointing, without checkpointing, time of a step, GPU time of a latent frame, time of a latent frame,
time of a video frame, GPU hours, Training takes, Inference takes"""


def printed_lines(text):
    """label -> (formula, result) of every line that shows its arithmetic, as it stands on the page."""
    unwrapped = re.sub(r"\n {20,}", " ", text)
    rows = re.findall(r"^  (\S.*?) {2,}(.* = .*)$", unwrapped, flags=re.MULTILINE)
    return [(label, *row.rsplit(" = ", 1)) for label, row in rows]


def by_hand(formula):
    """The value of a printed formula, as a reader with a calculator gets it."""
    formula = formula.replace(",", "").replace("/s", "")
    for prefix, factor in {"G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}.items():
        formula = re.sub(rf" {prefix}(FLOP|B)\b", f" * {factor}", formula)
    formula = formula.replace(" x ", " * ")
    return eval(re.sub(r"[A-Za-z]{2,}|\b[A-Za-z]\b", "", formula))


@pytest.mark.parametrize("arguments", [[], ["--objective", "sid"], ["--offload", "on", "--gpu_memory", "24"]])
@pytest.mark.parametrize("name", MODELS)
def test_every_printed_line_can_be_checked_by_hand(name, arguments):
    """Defaults work for every model, every section is there, and each formula gives the result beside it."""
    text = plan.text(options("--model", name, *arguments))
    assert [section for section in re.split(r",\s", SECTIONS) if section not in text] == []
    assert max(map(len, text.splitlines())) <= 120
    rows = printed_lines(text)
    assert len(rows) > 50
    for label, formula, result in rows:
        assert by_hand(formula) == pytest.approx(by_hand(result), rel=2e-3), label


def test_a_number_shows_the_arithmetic_that_made_it():
    """Parentheses where they are needed, nothing for a zero, and the value of plain floats."""
    a, b = plan.n(12_000, "tokens"), plan.n(1, "calls")
    for shown, text, value in [
        (2 * (a + b) * 3, "2 x (12,000 tokens + 1 call) x 3", 72_006),
        (a - (b - 4), "12,000 tokens - (1 call - 4)", 12_003),
        (a / (b / 4), "12,000 tokens / (1 call / 4)", 48_000),
        (a * b + 0, "12,000 tokens x 1 call", 12_000),
        (sum([plan.n(0), b, a]), "1 call + 12,000 tokens", 12_001),
        (plan.n(0) - b, "0 - 1 call", -1),
        (plan.named(2.5e12, "FLOP") * 2.5, "2.5 TFLOP x 2.5", 6.25e12),
    ]:
        assert (shown.text, shown) == (text, value)


def test_published_configurations_are_the_defaults():
    """1.3B learns in blocks of three from 14B, sharded within nodes; 14B learns whole clips from itself."""
    small, large, image = (options("--model", name) for name in MODELS)
    assert (small.teacher, small.sharding) == (WAN_CONFIGS["t2v-14b"], "hybrid")
    assert (small.algorithm.rollout, small.batch, small.gpus) == (RolloutConfig(), 64, 64)
    assert small.algorithm == SelfForcingConfig()
    assert options("--objective", "sid").teacher == options("--objective", "sid").student == small.student
    for setup in (large, image):
        assert (setup.teacher, setup.sharding) == (setup.student, "full")
        assert [block.frames for block in plan.blocks(setup)] == [21]
    assert [block.frames for block in plan.blocks(options("--frames", "22", "--frames_per_block", "1", "3"))][:2] == [
        1,
        3,
    ]


def test_time_and_cost_are_flops_over_the_assumed_speed():
    """Half the utilisation or half the GPUs take twice the time; the cost in GPU hours does not know the GPUs."""

    def values(*arguments):
        return {row.label: float(row.number) for row in plan.training_time(options("--model", "t2v-14b", *arguments))}

    usual, slower, fewer = values(), values("--utilisation", "0.2"), values("--gpus", "32")
    flop = sum(plan.step_flops(options("--model", "t2v-14b")).values())
    assert usual["time of a step"] == pytest.approx(64 * flop / (64 * 989e12 * 0.4))
    assert slower["time of a step"] == fewer["time of a step"] == pytest.approx(2 * usual["time of a step"])
    assert fewer["cost of the training"] == pytest.approx(usual["cost of the training"])
    assert values("--steps", "240")["time of the training"] == pytest.approx(2 * usual["time of the training"])


def test_a_viewer_waits_for_the_first_block_only():
    """Its time is that of the calls until `rollout` yields; speed is that of 16 frames per second."""
    setup = small_setup(peak_tflops=1.0, utilisation=0.5)
    student, (noise, cond) = network(T2V, setup, matmul_attention), inputs(setup)
    rows = {row.label: float(row.number) for row in plan.inference_time(setup)}
    first = torch.no_grad()(lambda: next(rollout(student, SHIFT, noise, cond, setup.algorithm.rollout)))
    assert rows["time to the first block"] == pytest.approx(flops(first) / 0.5e12)
    assert rows["time of a video"] == pytest.approx(plan.video_flops(setup) / 0.5e12)
    assert rows["time of a latent frame"] == pytest.approx(rows["time of a video"] / 12)
    assert rows["times as fast as it is shown"] == pytest.approx((1 + 4 * 11) / 16 / rows["time of a video"])


def test_the_numbers_of_the_readme_are_the_plans():
    """Time and memory of a video, the time to its first block, and the hours of Self-Forcing's training."""
    readme = " ".join((REPOSITORY / "full_scale" / "README.md").read_text().split())
    setup = options("--model", "t2v-1.3b")
    video = {row.label: float(row.number) for row in plan.inference_time(setup)}
    training = {row.label: float(row.number) for row in plan.training_time(setup)}
    found = re.search(r"1.3B student at ([\d.]+) s and (\d+) GB on such a GPU, its first block at ([\d.]+) s", readme)
    expected = video["time of a video"], plan.inference_memory(setup) / 1e9, video["time to the first block"]
    assert [float(x) for x in found.groups()] == [round(x, 1) if x < 10 else round(x) for x in expected]
    (hours,) = re.search(r"the planner says ([\d.]+) hours on 64", readme).groups()
    assert float(hours) == round(training["time of the training"], 1)
    (offloaded,) = re.search(r"With `--offload_layers` (\d+) GB", readme).groups()
    assert float(offloaded) == round(plan.inference_memory(replace(setup, offload=True)) / 1e9)
    (encoder,) = re.search(r"UMT5's (\d+\.\d) GB", readme).groups()
    assert float(encoder) == round(plan.whole(setup)["text encoder"] / 1e9, 1)


def test_what_does_not_fit_is_told_what_would():
    """Each suggested option, typed as suggested, gives the memory that was promised for it."""
    arguments = ["--gpus", "8", "--gpu_memory", "60", "--checkpointing", "off", "--micro_batch", "2"]
    told = plan.verdict("Training", options(*arguments), plan.training_memory)
    assert "does not fit" in told
    rows = re.findall(r"^  (--.+?) {2,}(\S+ GB)(, fits)?$", told, flags=re.MULTILINE)
    suggested = " ".join(option for option, *_ in rows)
    expected = ("checkpointing on", "micro_batch 1", "offload on", "full --gpus 16", "teacher t2v-1.3b")
    assert [option for option in expected if option not in suggested] == []
    for option, promised, fits in rows:
        changed = options(*arguments, *option.split())
        assert plan.quantity(plan.training_memory(changed), "B") == promised
        assert plan.fits(changed, plan.training_memory(changed)) == bool(fits)
    assert "all of these" in told
    assert "it fits" in plan.verdict("Training", options("--gpu_memory", "200"), plan.training_memory)


def test_json_holds_the_numbers_of_the_page(tmp_path, capsys):
    """The same results, unrounded, with unit and formula, and whether training and inference fit."""
    plan.main(["--model", "t2v-14b", "--json", str(tmp_path / "plan.json"), "--gpu_memory", "65"])
    record, page = json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out
    assert record["fits"] == {"training": True, "inference": False}
    assert record["setup"]["gpus"] == 64
    numbers = [row for rows in record.values() for row in rows.values() if isinstance(row, dict) and "value" in row]
    assert len(numbers) > 50
    for row in numbers:
        assert plan.quantity(row["value"], row["unit"]) in " ".join(page.split())


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("--height 500", "--height must be a multiple of 16, got 500: use 496 or 512."),
        ("--width 0", "--width must be a multiple of 16, got 0: use 16 or 32."),
        ("--frames 20", "use 18 or 21 frames"),
        ("--frames 0", "--frames must be at least 1"),
        ("--gpus 12", "use 8 or 16"),
        ("--batch 60", "use --batch 64"),
        ("--batch 64 --micro_batch 3", "use --batch 192"),
        ("--gpus 0", "--gpus must be at least 1"),
        ("--utilisation 40", "--utilisation is a fraction"),
        ("--gpu_memory nan", "--gpu_memory must be above 0"),
        ("--peak_tflops 0", "--peak_tflops must be above 0"),
        ("--denoising_steps 0", "--denoising_steps must be at least 1"),
        ("--critic_steps 0", "critic_steps must be at least 1"),
        ("--window_frames -1", "window_frames count frames"),
        ("--model i2v-14b --teacher t2v-14b", "choose a --teacher whose name says i2v"),
        ("--frames_per_block 0", "frames_per_block must be a positive number"),
    ],
)
def test_bad_options_get_a_sentence(arguments, sentence):
    """Before anything is computed, and with the fix in it."""
    with pytest.raises(ValueError, match=re.escape(sentence)) as raised:
        options(*arguments.split())
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)


def test_settings_that_only_a_program_can_get_wrong():
    """The dataclass refuses what argparse refuses on the command line."""
    for wrong in ({"sharding": "half"}, {"precision": "fp8"}):
        with pytest.raises(ValueError, match=f"--{next(iter(wrong))} must be"):
            Setup(**wrong)


def test_the_command_line_ends_with_the_sentence(monkeypatch):
    """No traceback, and exit status 1."""
    monkeypatch.setattr(sys, "argv", ["full_scale/plan.py", "--gpus", "12"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(plan.__file__, run_name="__main__")
    assert stopped.value.code == "full_scale.plan: --gpus 12 is not a whole number of nodes: use 8 or 16."
