"""The names of older documents work, and do exactly what the core does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import dynamic_video_sf
import generate as command
import kv_cache
import simplified
from dynamic_video_sf import RolloutConfig, SelfForcingEngine, dmd_loss, generate, rollout
from flow_match import FlowMatchScheduler
from generate import SelfForcingLoss, SimpleKVCache, SimplifiedSelfForcingPipeline, explain_self_forcing
from randomness import generator, randn

ROOT = Path(command.__file__).parent
SCHEDULER = FlowMatchScheduler()
COND, UNCOND = {"shift": 0.5}, {"shift": -0.2}


class Walk(nn.Module):
    """Generator and score in one: a frame is a function of what it is seen in and of the last remembered frame."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x_t, t, cond, cache=None):
        past = cache.layers[0][0][:, -1:].reshape(-1, 1, *x_t.shape[2:]) if cache and cache.frames else 0.0
        x0 = torch.tanh(self.weight * x_t + 0.5 * past) + cond["shift"]
        return SCHEDULER.to_flow(x0, x_t, t)

    def remember(self, x, t, cond, cache):
        return cache.extend([(x.flatten(2)[:, :, None],) * 2], x.shape[1])


@pytest.fixture
def noise():
    return randn((2, 6, 1, 2, 2), generator(0, "noise"))


# ------------------------------------------------------------------------------------------------------- the names


def test_generate_carries_the_names():
    """`from generate import ...` gives the very objects of simplified.py."""
    names = ("SimplifiedSelfForcingPipeline", "SimpleKVCache", "SelfForcingLoss", "explain_self_forcing")
    assert all(getattr(command, name) is getattr(simplified, name) for name in names)


@pytest.mark.parametrize(
    "options, config",
    [
        ((), RolloutConfig((1000, 750, 500, 250), 3)),
        ((2, [1000, 500, 0]), RolloutConfig((1000, 500), 2)),
    ],
)
def test_pipeline_is_an_inference_rollout(noise, options, config):
    """simulate_inference(noise, conditional_dict) is `generate` with three frames per block and four steps."""
    pipeline = SimplifiedSelfForcingPipeline(Walk(0.9), SCHEDULER, *options)
    torch.manual_seed(0)
    video = pipeline.simulate_inference(noise, COND)
    torch.manual_seed(0)
    assert torch.equal(video, generate(Walk(0.9), SCHEDULER, noise, COND, config))
    assert video.shape == noise.shape and not video.requires_grad


def test_pipeline_keywords(noise):
    """The keywords that older documents show."""
    pipeline = SimplifiedSelfForcingPipeline(
        generator=Walk(0.9), scheduler=SCHEDULER, num_frames_per_block=2, denoising_steps=[1000, 500]
    )
    assert pipeline.simulate_inference(noise=noise, conditional_dict=COND).shape == noise.shape


def test_engine_simulates_and_generates(noise):
    """simulate is a training rollout with its gradient, generate an inference one; at the last step they are one."""
    student, config = Walk(0.9), RolloutConfig(frames_per_block=2, context_noise=100)
    engine = SelfForcingEngine(student, SCHEDULER, config)
    for exit_step in (1, [0, 3, 2], None):
        video = engine.simulate(noise, COND, exit_step, generator(0, "rng"))
        options = {"exit_step": exit_step, "rng": generator(0, "rng")}
        expected = torch.cat(list(rollout(student, SCHEDULER, noise, COND, config, **options)), dim=1)
        found, wanted = (torch.autograd.grad(x.square().sum(), student.weight)[0] for x in (video, expected))
        assert torch.equal(video, expected) and torch.equal(found, wanted)
    generated = engine.generate(noise, COND, generator(0, "rng"))
    assert torch.equal(generated, video) and not generated.requires_grad


def test_engine_has_the_default_rollout(noise):
    """Without a config an engine rolls out as RolloutConfig() says."""
    engine = SelfForcingEngine(Walk(0.9), SCHEDULER)
    assert engine.config == RolloutConfig()
    expected = generate(Walk(0.9), SCHEDULER, noise, COND, RolloutConfig(), rng=generator(0, "rng"))
    assert torch.equal(engine.generate(noise, COND, generator(0, "rng")), expected)


def test_loss_module_is_dmd_loss(noise):
    """loss(video, cond, uncond) has the value and the gradient of dmd_loss; the scores get none."""
    real, fake = Walk(0.5), Walk(0.8)
    module = SelfForcingLoss(real, fake, SCHEDULER, guidance_scale=3.0)
    assert isinstance(module, nn.Module)
    videos = [noise.clone().requires_grad_() for _ in range(2)]
    loss = module(videos[0], COND, UNCOND, rng=generator(0, "loss"))
    expected = dmd_loss(videos[1], real, fake, SCHEDULER, COND, UNCOND, 3.0, rng=generator(0, "loss"))
    (loss + expected).backward()
    assert torch.equal(loss, expected) and torch.equal(videos[0].grad, videos[1].grad) and videos[0].grad.any()
    assert real.weight.grad is None and fake.weight.grad is None


# -------------------------------------------------------------------------------------------------------- the cache


def tokens(first, count):
    """Keys and values [2, l, 3, 4] that say their token's number."""
    keys = torch.arange(first, first + count, dtype=torch.float32).reshape(1, -1, 1, 1).expand(2, -1, 3, 4)
    return keys, -keys


def held(cache):
    keys, values = cache.get_cache()
    assert torch.equal(keys, -values) and keys.shape == (2, keys.shape[1], 3, 4)
    return keys[0, :, 0, 0].tolist()


def test_simple_kv_cache_keeps_the_newest_tokens():
    """update appends and drops the oldest beyond max_length, get_cache shows oldest first, reset forgets."""
    cache = SimpleKVCache(batch_size=2, max_length=5, num_heads=3, head_dim=4)
    assert held(cache) == []
    for first, count, expected in (
        (0, 2, [0, 1]),
        (2, 3, [0, 1, 2, 3, 4]),
        (5, 1, [1, 2, 3, 4, 5]),
        (6, 7, [8, 9, 10, 11, 12]),
    ):
        cache.update(*tokens(first, count))
        assert held(cache) == expected
    cache.reset()
    assert held(cache) == []
    cache.update(*tokens(3, 1))
    assert held(cache) == [3]


def test_simple_kv_cache_leaves_what_it_handed_out():
    """Tensors that get_cache gave do not change when more comes in, and no gradient is kept."""
    cache = SimpleKVCache(2, 4, 3, 4)
    keys, values = (x.clone().requires_grad_() for x in tokens(0, 3))
    cache.update(keys, values)
    before = cache.get_cache()[0]
    cache.update(*tokens(3, 3))
    assert before[0, :, 0, 0].tolist() == [0, 1, 2] and not before.requires_grad


@pytest.mark.parametrize("shape", [(1, 2, 3, 4), (2, 2, 4, 3), (2, 2, 3, 5)])
def test_simple_kv_cache_refuses_other_shapes(shape):
    """Another batch size or other heads are named, with what was expected."""
    cache = SimpleKVCache(2, 5, 3, 4)
    with pytest.raises(ValueError, match=r"\(B, n, d\) = \(2, 3, 4\), got"):
        cache.update(torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(ValueError, match=r"\(B, n, d\) = \(2, 3, 4\), got"):
        cache.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 2, 3, 4))
    assert held(cache) == []


# -------------------------------------------------------------------------------------------------- words and scripts


def test_explanation_is_markdown_that_names_real_functions():
    """A title, four numbered steps, and every name in backticks is one that can be imported."""
    text = explain_self_forcing()
    lines = text.splitlines()
    assert lines[0].startswith("# ")
    assert [line[:3] for line in lines if line[:1].isdigit()] == ["1. ", "2. ", "3. ", "4. "]
    for name in text.split("`")[1::2]:
        assert any(hasattr(module, name.split(".")[-1]) for module in (dynamic_video_sf, kv_cache)), name


def run(script):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([sys.executable, script], **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_dynamic_video_sf_checks_itself():
    """Its own generator climbs by one, has the gradient 9, and Algorithm 1 brings its stride to the teacher's 0.5."""
    stairs, gradient, learned = run("dynamic_video_sf.py")
    assert json.loads(stairs.split(": ")[1]) == pytest.approx([1, 2, 3, 4, 5, 6], abs=1e-5)
    assert float(gradient.split()[4]) == pytest.approx(9)
    stride = float(learned.split("is ")[1].split(";")[0])
    assert stride == pytest.approx(0.5, abs=0.2)  # it starts at 1


def test_tiny_causal_wan_checks_itself():
    """It prints its size, and that mask and cache agree."""
    size, agreement = run("tiny_causal_wan.py")
    assert size == "1,004,848 parameters in 6 layers"
    assert agreement.startswith("flow (2, 6, 1, 24, 24); block-causal mask and KV cache differ by ")
    assert float(agreement.split()[-1]) < 1e-5
