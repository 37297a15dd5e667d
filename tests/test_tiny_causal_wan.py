"""The model is Wan's, and its cached, block-causal and teacher-forcing ways are one function."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from dynamic_video_sf import RolloutConfig, rollout
from flow_match import FlowMatchScheduler
from full_scale.wan import WAN_CONFIGS, diffusers_name
from kv_cache import KVCache, block_sizes
from randomness import generator, generators, rand, randn
from tiny_causal_wan import (
    FrameMask,
    TinyCausalWanModel,
    WanConfig,
    exact_attention,
    matmul_attention,
    rope_table,
    rotate,
    sdpa_attention,
    sinusoid,
)

TINY = {
    "dim": 24, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "patch_size": (1, 2, 2), "text_dim": 8, "text_len": 6,
}  # fmt: skip
I2V = {"model_type": "i2v", "in_dim": 21, "out_dim": 1}
SCHEDULER = FlowMatchScheduler()


def build(seed=0, **changes):
    """A model whose every parameter is random: a fresh one predicts zero, and zeros agree with everything."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TinyCausalWanModel(WanConfig(**{**TINY, **changes})).requires_grad_(False)
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
            parameter += torch.randn_like(parameter) / fan_in**0.5
    return model


def clip(frames=6, channels=1, size=(4, 4), batch=2, seed=0):
    return randn((batch, frames, channels, *size), generator(seed, "clip"))


def times(*shape, seed=0):
    return 0.05 + 0.95 * rand(shape, generator(seed, "times"))


def conditions(model, frames=6, size=(4, 4), batch=2, tokens=4):
    """Prompts, different for every sample; for i2v also CLIP tokens and the image channels of the whole clip."""
    config = model.config
    cond = {"prompt_embeds": randn((batch, tokens, config.text_dim), generator(0, "prompt"))}
    if config.model_type == "i2v":
        cond["clip_features"] = randn((batch, 257, 1280), generator(0, "clip features"))
        cond["image_latents"] = clip(frames, config.in_dim - config.out_dim, size, batch, seed=9)
    return cond


def assert_close(a, b, atol=1e-5):
    """Equal within atol, on numbers of order 1."""
    assert 0.1 < b.std() < 10 and a.shape == b.shape
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ------------------------------------------------------------------------------------------------ Wan's own numbers


def in_diffusers(model):
    """diffusers' WanTransformer3DModel with the weights of `model`."""
    from diffusers import WanTransformer3DModel

    config, i2v = model.config, model.config.model_type == "i2v"
    names = ("patch_size", "out_dim", "text_dim", "freq_dim", "ffn_dim", "num_layers", "cross_attn_norm", "eps")
    settings = {name.replace("out_dim", "out_channels"): getattr(config, name) for name in names}
    theirs = WanTransformer3DModel(
        **settings,
        in_channels=config.in_dim,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.dim // config.num_heads,
        image_dim=1280 if i2v else None,
        added_kv_proj_dim=config.dim if i2v else None,
    )
    theirs.load_state_dict({diffusers_name(name): x for name, x in model.state_dict().items()})
    return theirs


class Float64Sinusoid(nn.Module):
    """Wan's sinusoid for diffusers' model, which computes its own in float32: that alone is worth 3e-5."""

    def forward(self, timestep):
        return sinusoid(timestep.double() / 1000, 256).float()


def predict_in_diffusers(model, x_t, t, cond, float64_sinusoid):
    """The same call, in diffusers' layout: channels before frames, t in 0..1000, prompts padded by the caller."""
    theirs, prompt = in_diffusers(model), cond["prompt_embeds"]
    if float64_sinusoid:
        theirs.condition_embedder.timesteps_proj = Float64Sinusoid()
    if "image_latents" in cond:
        x_t = torch.cat([x_t, cond["image_latents"]], dim=2)
    prompt = nn.functional.pad(prompt, (0, 0, 0, model.config.text_len - prompt.shape[1]))
    with torch.no_grad():
        (flow,) = theirs(x_t.transpose(1, 2), 1000 * t, prompt, cond.get("clip_features"), return_dict=False)
    return flow.transpose(1, 2)


WAN_I2V = {"model_type": "i2v", "in_dim": 36, "out_dim": 16}
PARITY = {
    "tiny": {},
    "head 128": {"dim": 128, "num_heads": 1, "in_dim": 16, "out_dim": 16},
    "head 64, two heads": {"dim": 128, "num_heads": 2, "ffn_dim": 200},
    "head 32, RoPE 6/5/5": {"dim": 96, "num_heads": 3, "num_layers": 3},
    "head 16, RoPE 4/2/2": {"dim": 64, "num_heads": 4},
    "head 10, RoPE 3/1/1": {"dim": 20, "num_heads": 2, "text_dim": 5},
    "head 4, no spatial RoPE": {"dim": 8, "num_heads": 2},
    "patch 2x4, three channels": {"patch_size": (1, 2, 4), "in_dim": 3, "out_dim": 3},
    "patch 1x1": {"patch_size": (1, 1, 1), "num_layers": 1},
    "no cross-attention norm": {"cross_attn_norm": False},
    "large eps": {"eps": 0.1},
    "i2v": {**I2V, "text_len": 512},
    "i2v, Wan's 36 channels, head 128": {**WAN_I2V, "text_len": 512, "dim": 128, "num_heads": 1},
}


@pytest.mark.parametrize("changes", PARITY.values(), ids=PARITY)
def test_model_equals_diffusers(changes):
    """Same weights, same flow, to 1e-5: all sizes, a short prompt, another t and prompt for each sample."""
    model = build(**changes)
    size, channels = (4, 8), model.config.out_dim
    call = clip(5, channels, size), torch.tensor([0.9375, 0.125]), conditions(model, 5, size)
    flow = model(*call)
    assert_close(flow, predict_in_diffusers(model, *call, float64_sinusoid=True))
    assert_close(flow, predict_in_diffusers(model, *call, float64_sinusoid=False), atol=1e-4)
    assert (flow[0] - flow[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", WAN_CONFIGS)
def test_the_released_sizes_fit_into_diffusers(name):
    """Every key and shape at full size, on the meta device, has its place in diffusers' model of that size."""
    with torch.device("meta"):
        in_diffusers(TinyCausalWanModel(WAN_CONFIGS[name]))  # its load_state_dict is strict


def shapes_in_block(d, f, i2v):
    attentions = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"]
    attentions += ["cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o"]
    norms = ["self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k"]
    if i2v:
        attentions, norms = attentions + ["cross_attn.k_img", "cross_attn.v_img"], norms + ["cross_attn.norm_k_img"]
    linear = {**dict.fromkeys(attentions, (d, d)), "ffn.0": (f, d), "ffn.2": (d, f), "norm3": (d,)}
    return with_biases(linear) | {f"{name}.weight": (d,) for name in norms} | {"modulation": (1, 6, d)}


def with_biases(weights):
    shapes = {f"{name}.weight": shape for name, shape in weights.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in weights.items()}


def shapes_outside_blocks(d, in_dim):
    linear = {
        "text_embedding.0": (d, 4096), "text_embedding.2": (d, d), "time_embedding.0": (d, 256),
        "time_embedding.2": (d, d), "time_projection.1": (6 * d, d), "head.head": (64, d),
        "patch_embedding": (d, in_dim, 1, 2, 2),
    }  # fmt: skip
    if in_dim == 36:
        linear |= {"img_emb.proj.1": (1280, 1280), "img_emb.proj.3": (d, 1280)}
        linear |= {"img_emb.proj.0": (1280,), "img_emb.proj.4": (d,)}
    return with_biases(linear) | {"head.modulation": (1, 2, d)}


@pytest.mark.parametrize(
    "name, num_keys, num_parameters, num_per_block, d, f",
    [
        ("t2v-1.3b", 825, 1_418_996_800, 46_440_704, 1536, 8960),
        ("t2v-14b", 1095, 14_288_491_584, 351_394_304, 5120, 13824),
        ("i2v-14b", 1303, 16_394_878_784, 403_838_464, 5120, 13824),
    ],
)
def test_state_dict_is_wans(name, num_keys, num_parameters, num_per_block, d, f):
    """Number of keys and parameters, every key's name and shape, of the three released models."""
    with torch.device("meta"):
        model = TinyCausalWanModel(WAN_CONFIGS[name])
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (num_keys, num_parameters)
    outside = {key: shape for key, shape in shapes.items() if not key.startswith("blocks.")}
    assert outside == shapes_outside_blocks(d, model.config.in_dim)
    block = shapes_in_block(d, f, name == "i2v-14b")
    assert sum(map(math.prod, block.values())) == num_per_block
    for i in range(model.config.num_layers):
        prefix = f"blocks.{i}."
        assert {key.removeprefix(prefix): s for key, s in shapes.items() if key.startswith(prefix)} == block
    assert d // model.config.num_heads == 128


def test_a_fresh_model_predicts_zero():
    """The head starts at zero, the rest does not: the first prediction is a flow of exactly zero."""
    model = TinyCausalWanModel(WanConfig(**TINY))
    assert not model(clip(), 0.5, conditions(model)).any()
    assert not model.head.head.weight.any()
    assert all(p.any() for name, p in model.named_parameters() if name.endswith("weight") and "head" not in name)


def test_the_default_model_needs_no_argument():
    """TinyCausalWanModel() is the Moving MNIST model: 24x24 grey frames in 6x6 patches."""
    model = TinyCausalWanModel()
    assert model.config == WanConfig()
    assert model(clip(2, size=(24, 24)), 0.5, conditions(model)).shape == (2, 2, 1, 24, 24)


# ------------------------------------------------------------------------------------------------ position and time


@pytest.mark.parametrize("head_dim, split", [(128, (22, 21, 21)), (64, (12, 10, 10)), (32, (6, 5, 5)), (24, (4, 4, 4))])
def test_rope_shares_the_channels_as_wan_does(head_dim, split):
    """Pairs that turn with time, row and column, in this order, each axis with its own ladder from 1 down."""
    table = rope_table(head_dim, 0, 2, 2, 2, torch.device("cpu")).reshape(2, 2, 2, -1)
    steps = [table[1, 0, 0], table[0, 1, 0], table[0, 0, 1]]
    expected = torch.zeros(3, head_dim // 2, dtype=torch.float64)
    for axis, num in enumerate(split):
        first = sum(split[:axis])
        expected[axis, first : first + num] = 10000.0 ** -(torch.arange(num, dtype=torch.float64) / num)
    torch.testing.assert_close(torch.stack([step.angle() for step in steps]).double(), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("start", [1, 5, 2000])
def test_rope_counts_frames_of_the_whole_video(start):
    """A block that starts later has the rotations that it would have in one long clip; far out, too."""
    device = torch.device("cpu")
    whole = rope_table(12, 0, start + 3, 2, 3, device)
    assert torch.equal(rope_table(12, start, 3, 2, 3, device), whole[start * 6 :])
    torch.testing.assert_close(whole.abs(), torch.ones(whole.shape))


def test_rotate_turns_adjacent_channels():
    """Pair (x, y) becomes (x cos - y sin, x sin + y cos), in the dtype of its input."""
    x, angle = randn((1, 1, 1, 2), generator(0)), torch.tensor([[0.3]])
    turned = rotate(x, torch.polar(torch.ones(1, 1), angle))[0, 0, 0]
    a, b = x[0, 0, 0]
    c, s = math.cos(0.3), math.sin(0.3)
    torch.testing.assert_close(turned, torch.stack([a * c - b * s, a * s + b * c]))
    assert rotate(x.bfloat16(), torch.polar(torch.ones(1, 1), angle)).dtype == torch.bfloat16


def test_sinusoid_has_cosines_first_and_float64_accuracy():
    """Feature i of t is cos(1000 t / 10000^(i / half)), then the sines: Python's own maths says so."""
    t = torch.tensor([0.0, 0.8333333333333334, 1.0], dtype=torch.float64)
    features = sinusoid(t, 16)
    for row, time in zip(features, t.tolist(), strict=True):
        angles = [1000 * time / 10000 ** (i / 8) for i in range(8)]
        expected = [*map(math.cos, angles), *map(math.sin, angles)]
        assert row.tolist() == pytest.approx(expected, abs=1e-10)


def test_unpatchify_puts_every_token_into_its_own_patch():
    """Token (row, column) fills its patch and no other pixel; inside, rows, then columns, then channels."""
    model = build(patch_size=(1, 2, 3), in_dim=2, out_dim=2)
    video = clip(2, 2, (4, 9))
    patches = torch.arange(2 * 2 * 6 * 12.0).reshape(2, 2, 6, 12)  # [b f (h w) (ph pw c)]
    pixels = model.unpatchify(patches, video)
    assert pixels.shape == video.shape
    for row in range(2):
        for column in range(3):
            patch = pixels[:, :, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
            assert torch.equal(patch.permute(0, 1, 3, 4, 2).flatten(2), patches[:, :, 3 * row + column])


def test_patch_embedding_is_the_convolution():
    """The linear map over patches is nn.Conv3d with the same weights."""
    embedding = build(patch_size=(1, 2, 3), in_dim=2, out_dim=2).patch_embedding
    video = clip(2, 2, (4, 9))
    conv = nn.Conv3d.forward(embedding, video.transpose(1, 2))  # [b e f h w]
    assert_close(embedding(video), conv.permute(0, 2, 3, 4, 1).flatten(2, 3))


@pytest.mark.parametrize("way", [{}, {"frames_per_block": 3}, {"frames_per_block": 3, "clean": clip(seed=4)}])
def test_every_form_of_t_is_the_same_time(way):
    """float, scalar, [B], [B, 1] and [B, F] of one time give one flow, bit for bit."""
    model, t = build(), 0.625
    forms = [t, torch.tensor(t), *(torch.full(shape, t) for shape in ((2,), (2, 1), (2, 6)))]
    flows = [model(clip(), form, conditions(model), **way) for form in forms]
    assert all(torch.equal(flow, flows[0]) for flow in flows)
    assert not torch.equal(model(clip(), 0.7, conditions(model), **way), flows[0])


def test_each_sample_and_frame_has_its_own_time():
    """t [B] reaches the samples, t [B, F] the frames: the same numbers one sample at a time, and per frame at F = 1."""
    model, x_t, t = build(), clip(), times(2, 6)
    cond = conditions(model)
    alone = [{name: value[i : i + 1] for name, value in cond.items()} for i in range(2)]
    for form in (t, t[:, 0]):
        each = [model(x_t[i : i + 1], form[i : i + 1], alone[i]) for i in range(2)]
        assert_close(model(x_t, form, cond), torch.cat(each))
    blind = model(x_t, t, cond, frames_per_block=1, window_frames=0)
    frames = [model(x_t, t[:, [i]], cond, frames_per_block=1, window_frames=0)[:, i] for i in range(6)]
    assert_close(blind, torch.stack(frames, 1))


# ------------------------------------------------------------------------------- cached == block-causal == forced


def cached(model, x_t, t, cond, frames_per_block, context, context_t, sink=0, window=None):
    """The flow of every block, each with a cache of the `context` blocks before it at noise level context_t."""
    cache, flows = KVCache(sink, window), []
    sizes = block_sizes(x_t.shape[1], frames_per_block)
    for block, past, time, past_time in zip(*(x.split(sizes, 1) for x in (x_t, context, t, context_t)), strict=True):
        flows.append(model(block, time, cond, cache))
        cache = model.remember(past, past_time, cond, cache)
    return torch.cat(flows, dim=1)


MEMORIES = [(0, None), (2, None), (0, 0), (0, 2), (1, 0), (1, 2), (2, 4), (3, 1), (5, 2)]  # (sink, window)
BLOCKS = [(1, 6), (2, 6), (3, 9), (4, 8), (6, 6), ((1, 3, 3), 7), ((1, 3), 10), ((3, 1, 2), 8)]  # and clip length
memories = pytest.mark.parametrize("sink, window", MEMORIES)
blocks = pytest.mark.parametrize("frames_per_block, frames", BLOCKS)


@memories
@blocks
def test_cache_equals_teacher_forcing_mask(frames_per_block, frames, sink, window):
    """Blocks denoised with a cache of clean blocks == one call on [clean || noisy]; every frame at its own t."""
    model, x_t, clean, t = build(), clip(frames), clip(frames, seed=1), times(2, frames)
    cond = conditions(model)
    masked = model(x_t, t, cond, frames_per_block=frames_per_block, clean=clean, sink_frames=sink, window_frames=window)
    assert_close(cached(model, x_t, t, cond, frames_per_block, clean, 0 * t, sink, window), masked)


@memories
@blocks
def test_cache_equals_block_causal_mask(frames_per_block, frames, sink, window):
    """Diffusion forcing: a past remembered as noisy as it is == one block-causal call on the noisy clip."""
    model, x_t, t = build(), clip(frames), times(2, frames)
    cond = conditions(model)
    masked = model(x_t, t, cond, frames_per_block=frames_per_block, sink_frames=sink, window_frames=window)
    assert_close(cached(model, x_t, t, cond, frames_per_block, x_t, t, sink, window), masked)


@memories
def test_a_clean_clip_is_the_same_all_three_ways(sink, window):
    """At t = 0 the noisy half is the clean half: cache == block-causal == teacher forcing."""
    model, x0 = build(), clip(7)
    cond, memory = conditions(model), {"sink_frames": sink, "window_frames": window}
    causal = model(x0, 0.0, cond, frames_per_block=(1, 3), **memory)
    assert_close(model(x0, 0.0, cond, frames_per_block=(1, 3), clean=x0, **memory), causal)
    zeros = torch.zeros(2, 7)
    assert_close(cached(model, x0, zeros, cond, (1, 3), x0, zeros, sink, window), causal)


@pytest.mark.parametrize("frames_per_block, frames", [(1, 30), (3, 45), ((1, 3), 31)])
@pytest.mark.parametrize("sink, window", [(0, 2), (1, 3), (3, 0), (2, 6)])
def test_cache_equals_mask_long_after_eviction(frames_per_block, frames, sink, window):
    """Ten blocks and more after the first frame fell out, positions and pasts are still those of the mask."""
    model, x_t, clean, t = build(), clip(frames), clip(frames, seed=1), times(2, frames)
    cond, memory = conditions(model), {"sink_frames": sink, "window_frames": window}
    forced = model(x_t, t, cond, frames_per_block=frames_per_block, clean=clean, **memory)
    assert_close(cached(model, x_t, t, cond, frames_per_block, clean, 0 * t, sink, window), forced)
    causal = model(x_t, t, cond, frames_per_block=frames_per_block, **memory)
    assert_close(cached(model, x_t, t, cond, frames_per_block, x_t, t, sink, window), causal)
    assert (forced - causal).abs().max() > 0.01


@pytest.mark.parametrize("sink, window", [(0, None), (1, 2)])
def test_cache_equals_masks_of_an_image_to_video_model(sink, window):
    """The image's channels of the whole clip are sliced by where the cache stands."""
    model, x_t, clean, t = build(**I2V), clip(7), clip(7, seed=1), times(2, 7)
    cond, memory = conditions(model, 7), {"sink_frames": sink, "window_frames": window}
    forced = model(x_t, t, cond, frames_per_block=(1, 3), clean=clean, **memory)
    assert_close(cached(model, x_t, t, cond, (1, 3), clean, 0 * t, sink, window), forced)
    causal = model(x_t, t, cond, frames_per_block=(1, 3), **memory)
    assert_close(cached(model, x_t, t, cond, (1, 3), x_t, t, sink, window), causal)


@pytest.mark.parametrize("frames_per_block, sink, window", [(3, 0, None), ((1, 3, 3), 0, None), (3, 1, 2), (1, 2, 1)])
def test_every_guess_of_a_rollout_is_a_teacher_forced_one(frames_per_block, sink, window):
    """The real rollout: at each denoising step, all its guesses == one masked call with its own video as the past."""
    model, guesses = build(), []
    cond, config = conditions(model), RolloutConfig((1000, 750, 250), frames_per_block, 0, sink, window)
    frames = 9 if frames_per_block == 3 else 7
    noise, rng = clip(frames), generators(0, samples=range(2))
    video = rollout(model, SCHEDULER, noise, cond, config, rng=rng, observe=lambda **guess: guesses.append(guess))
    video = torch.cat(list(video), dim=1)
    memory = {"sink_frames": sink, "window_frames": window}
    for step, t in enumerate(SCHEDULER.denoising_times(config.denoising_steps)):
        x_t, x0 = (torch.cat([g[name] for g in guesses if g["step"] == step], 1) for name in ("x_t", "x0"))
        flow = model(x_t, t, cond, frames_per_block=frames_per_block, clean=video, **memory)
        assert_close(SCHEDULER.to_x0(flow, x_t, t), x0, atol=2e-5)
    assert torch.equal(x0, video)


def test_one_block_is_bidirectional():
    """Block-causal with one block over the clip, its teacher-forced twin, and the empty cache are the plain call."""
    model, x_t, t = build(), clip(), times(2, 6)
    cond = conditions(model)
    plain = model(x_t, t, cond)
    assert_close(model(x_t, t, cond, frames_per_block=6), plain)
    assert_close(model(x_t, t, cond, frames_per_block=6, clean=clip(seed=1)), plain)
    assert_close(model(x_t, t, cond, KVCache()), plain)
    assert (model(x_t, t, cond, frames_per_block=3) - plain).abs().max() > 0.01


# ------------------------------------------------------------------------------------------------ a sink that follows


def filled(model, blocks, cond, cache, first_frame=0):
    """The cache after clean blocks, the first of which stands at first_frame."""
    cache = replace(cache, next_frame=first_frame)
    with torch.no_grad():
        for block in blocks:
            cache = model.remember(block, 0.0, cond, cache)
    return cache


def test_a_sink_that_follows_stands_where_a_sink_made_there_would():
    """Its keys are those of the same block remembered right before the window, in the first layer, where keys depend on
    nothing else; without sink_follows they stay behind. Values and the window's keys are untouched."""
    model, video = build(), clip(frames=12)
    cond = conditions(model)
    blocks = video.split(2, dim=1)
    following = filled(model, blocks, cond, KVCache(2, 3, sink_follows=True))
    assert following.frames == (0, 1, 9, 10, 11) and following.gap == 7
    near = filled(model, blocks[:1], cond, KVCache(), first_frame=7)
    tokens = near.layers[0][0].shape[1]
    (keys, values), (held_keys, held_values) = model.past(following)[0], following.layers[0]
    assert_close(keys[:, :tokens], near.layers[0][0])
    assert (keys[:, :tokens] - held_keys[:, :tokens]).abs().max() > 0.1
    assert torch.equal(keys[:, tokens:], held_keys[:, tokens:]) and values is held_values
    for held in (filled(model, blocks, cond, KVCache(2, 3)), filled(model, blocks[:1], cond, KVCache(2, 3, True))):
        assert held.gap == 0 and model.past(held) is held.layers


def test_a_long_video_looks_like_a_short_one():
    """Window and block moved far down the video, content equal: with sink_follows the flow is that of a short video,
    in every layer; without it, it is not."""
    model, video, far = build(), clip(frames=8), 500
    cond = conditions(model)
    *past, block = video.split(2, dim=1)
    short = filled(model, past, cond, KVCache(2, 4, sink_follows=True))
    turned = rope_table(short.layers[0][0].shape[-1], far, 1, 1, 1, torch.device("cpu"))
    sink = short.layers[0][0].shape[1] // 6 * 2
    layers = tuple((torch.cat([k[:, :sink], rotate(k[:, sink:], turned)], 1), v) for k, v in short.layers)
    frames = (0, 1, *(frame + far for frame in short.frames[2:]))
    long = replace(short, layers=layers, frames=frames, next_frame=short.next_frame + far)
    with torch.no_grad():
        flow, distant = model(block, 0.5, cond, short), model(block, 0.5, cond, long)
        behind = model(block, 0.5, cond, replace(long, sink_follows=False))
    assert_close(distant, flow, atol=1e-4)
    assert (behind - flow).abs().max() > 1e-2


def test_forward_only_reads_the_cache():
    """Denoising a block any number of times leaves the cache as it was; remember returns another."""
    model = build()
    cond, block = conditions(model), clip(3)
    cache = model.remember(clip(3, seed=1), 0.0, cond, KVCache())
    before = [tuple(x.clone() for x in pair) for pair in cache.layers]
    flows = [model(block, 0.5, cond, cache) for _ in range(2)]
    assert torch.equal(*flows)
    longer = model.remember(block, 0.0, cond, cache)
    assert (cache.next_frame, longer.next_frame, longer.frames) == (3, 6, tuple(range(6)))
    for pair, copies in zip(cache.layers, before, strict=True):
        assert all(torch.equal(x, copy) for x, copy in zip(pair, copies, strict=True))


def test_remember_is_detached_and_forward_differentiates():
    """Gradients reach the weights and x_t through a cached call; none through what was remembered."""
    model = build().requires_grad_()
    cond, past, block = conditions(model), clip(3).requires_grad_(), clip(3, seed=1).requires_grad_()
    cache = model.remember(past, 0.0, cond, KVCache())
    assert not any(x.requires_grad for pair in cache.layers for x in pair)
    model(block, 0.5, cond, cache).square().sum().backward()
    assert past.grad is None and block.grad.any()
    assert all(parameter.grad is not None for parameter in model.parameters())


# ------------------------------------------------------------------------------------------- who depends on whom


def influence(output, source):
    """Bool [frame of output, frame of source]: whether any number of the one moves any number of the other."""
    rows = []
    for frame in range(output.shape[1]):
        (grad,) = torch.autograd.grad(output[:, frame].square().sum(), source, retain_graph=True)
        rows.append(grad.abs().sum((0, 2, 3, 4)) > 0)
    return torch.stack(rows)


@pytest.mark.parametrize("sink, window", [(0, None), (0, 0), (1, 2), (3, 1)])
@pytest.mark.parametrize("frames_per_block, frames", [(1, 6), (3, 9), ((1, 3), 7)])
def test_one_layer_sees_what_the_mask_says(frames_per_block, frames, sink, window):
    """The gradient of a one-layer model is zero, exactly, where FrameMask says no, and nowhere else."""
    model, sizes = build(num_layers=1), tuple(block_sizes(frames, frames_per_block))
    x_t, clean = clip(frames).requires_grad_(), clip(frames, seed=1).requires_grad_()
    cond, memory = conditions(model), {"sink_frames": sink, "window_frames": window}
    causal = model(x_t, 0.5, cond, frames_per_block=frames_per_block, **memory)
    assert torch.equal(influence(causal, x_t), FrameMask(sizes, 4, **memory).frames())
    forced = model(x_t, 0.5, cond, frames_per_block=frames_per_block, clean=clean, **memory)
    noisy = FrameMask(sizes, 4, **memory, clean_half=True).frames()[frames:]
    assert torch.equal(torch.cat([influence(forced, clean), influence(forced, x_t)], 1), noisy)


def test_later_frames_never_reach_earlier_blocks_in_a_deep_model():
    """Over several layers: a noisy block depends on its own noise and on strictly earlier clean blocks, all of them."""
    model = build(num_layers=3)
    x_t, clean = clip(7).requires_grad_(), clip(7, seed=1).requires_grad_()
    block = torch.tensor([0, 1, 1, 1, 2, 2, 2])
    earlier, own = block[:, None] > block, block[:, None] == block
    causal = model(x_t, 0.5, conditions(model), frames_per_block=(1, 3))
    assert torch.equal(influence(causal, x_t), earlier | own)
    forced = model(x_t, 0.5, conditions(model), frames_per_block=(1, 3), clean=clean)
    assert torch.equal(influence(forced, x_t), own) and torch.equal(influence(forced, clean), earlier)
    assert influence(model(x_t, 0.5, conditions(model)), x_t).all()


@pytest.mark.parametrize("changed", [0, 1, 2, 3])
def test_noise_of_a_block_changes_it_and_later_blocks_only(changed):
    """In a rollout with a cache: blocks before the changed one stay bit for bit, itself and all later ones move."""
    model, config = build(), RolloutConfig((1000, 500), frames_per_block=2)
    noise = clip(8)
    other = noise.clone()
    other[:, 2 * changed : 2 * changed + 2] += 1
    videos = [list(rollout(model, SCHEDULER, x, conditions(model), config, rng=generator(0))) for x in (noise, other)]
    moved = [(a - b).abs().max().item() for a, b in zip(*videos, strict=True)]
    assert moved[:changed] == [0.0] * changed
    assert min(moved[changed:]) > 1e-3


# ------------------------------------------------------------------------------------------------------ attention


def rows(text):
    """A bool matrix from lines such as "x x . ."."""
    return torch.tensor([[c == "x" for c in line.split()] for line in text.strip().splitlines()])


MASKS = {
    "two blocks": (
        FrameMask((2, 1), 1),
        """x x .
           x x .
           x x x""",
    ),
    "uneven": (
        FrameMask((1, 2, 1), 1),
        """x . . .
           x x x .
           x x x .
           x x x x""",
    ),
    "window 1": (
        FrameMask((1, 1, 1, 1), 1, window_frames=1),
        """x . . .
           x x . .
           . x x .
           . . x x""",
    ),
    "window 0": (
        FrameMask((1, 2), 1, window_frames=0),
        """x . .
           . x x
           . x x""",
    ),
    "sink 1, window 1": (
        FrameMask((1, 1, 1, 1), 1, sink_frames=1, window_frames=1),
        """x . . .
           x x . .
           x x x .
           x . x x""",
    ),
    "window smaller than the block": (
        FrameMask((2, 2), 1, window_frames=1),
        """x x . .
           x x . .
           . x x x
           . x x x""",
    ),
    "sink inside the block": (
        FrameMask((2, 2, 1), 1, sink_frames=3, window_frames=0),
        """x x . . .
           x x . . .
           x x x x .
           x x x x .
           x x x . x""",
    ),
    "teacher forcing": (
        FrameMask((1, 2), 1, clean_half=True),
        """x . . . . .
           x x x . . .
           x x x . . .
           . . . x . .
           x . . . x x
           x . . . x x""",
    ),
    "teacher forcing, sink 1, window 1": (
        FrameMask((1, 1, 1, 1), 1, 1, 1, clean_half=True),
        """x . . . . . . .
           x x . . . . . .
           x x x . . . . .
           x . x x . . . .
           . . . . x . . .
           x . . . . x . .
           x x . . . . x .
           x . x . . . . x""",
    ),
}
every_mask = pytest.mark.parametrize("mask, expected", MASKS.values(), ids=MASKS)


@every_mask
def test_frame_masks_by_hand(mask, expected):
    """Which frame sees which, written out; clean blocks never see noisy ones, noisy ones never their own clean half."""
    assert torch.equal(mask.frames(), rows(expected))


def test_a_frame_is_all_its_tokens():
    """tokens() repeats every frame's row and column by its number of tokens."""
    mask = FrameMask((1, 1), tokens_per_frame=2)
    expected = """x x . .
                  x x . .
                  x x x x
                  x x x x"""
    assert torch.equal(mask.tokens(), rows(expected))


@pytest.mark.parametrize("attention", [sdpa_attention, matmul_attention])
@every_mask
def test_attention_is_the_softmax_over_what_the_mask_allows(attention, mask, expected):
    """Query by query, head by head: softmax(q k / sqrt(d)) over the allowed keys, in float64."""
    length, head_dim = 2 * len(mask.frames()), 6
    mask = FrameMask(mask.block_sizes, 2, mask.sink_frames, mask.window_frames, mask.clean_half)
    q, k, v = (randn((2, length, 3, head_dim), generator(0, name)) for name in "qkv")
    result = attention(q, k, v, mask=mask, layer=0, kind="self")
    for query in range(length):
        seen = rows(expected).repeat_interleave(2, 1)[query // 2]
        scores = torch.einsum("bnd,bknd->bnk", q[:, query].double(), k[:, seen].double()) / head_dim**0.5
        y = torch.einsum("bnk,bknd->bnd", scores.softmax(-1), v[:, seen].double())
        torch.testing.assert_close(result[:, query].double(), y, atol=1e-6, rtol=0)


@every_mask
def test_both_attentions_agree_in_value_and_gradient(mask, expected):
    """sdpa_attention == matmul_attention to 1e-6, and so do their gradients."""
    inputs = [randn((2, len(mask.frames()), 3, 8), generator(0, name)).requires_grad_() for name in "qkv"]
    results = [attention(*inputs, mask=mask) for attention in (sdpa_attention, matmul_attention)]
    torch.testing.assert_close(*results, atol=1e-6, rtol=0)
    gradients = [torch.autograd.grad(result.square().sum(), inputs) for result in results]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_both_attentions_agree_without_a_mask_and_with_more_keys():
    """A cached call: fewer queries than keys, every query sees every key."""
    q, k, v = (randn((2, length, 3, 8), generator(0, length)) for length in (4, 10, 10))
    full = sdpa_attention(q, k, v)
    torch.testing.assert_close(full, matmul_attention(q, k, v), atol=1e-6, rtol=0)
    assert all(
        (sdpa_attention(q, k, v + 0.1 * (torch.arange(10) == i)[:, None, None]) != full).any() for i in range(10)
    )


def test_exact_attention_is_the_faster_of_the_two():
    """Bit for bit: matrix products in bf16 on a CPU, PyTorch's kernel in fp32; with the mask."""
    inputs, mask = [randn((2, 8, 3, 8), generator(0, name)) for name in "qkv"], FrameMask((1, 3), tokens_per_frame=2)
    for dtype, faster in {torch.float32: sdpa_attention, torch.bfloat16: matmul_attention}.items():
        cast = [x.to(dtype) for x in inputs]
        result = exact_attention(*cast, mask=mask, layer=0)
        for kernel in (sdpa_attention, matmul_attention):
            assert torch.equal(result, kernel(*cast, mask=mask)) == (kernel is faster)


def recorded(model):
    """The calls that `model` makes from now on, as (layer, kind, mask, query length, key length)."""
    calls = []

    def attention(q, k, v, *, mask=None, layer, kind):
        assert q.shape[::2] == k.shape[::2] == v.shape[::2] == (2, 2) and q.shape[3] == 12  # [b l n d]
        calls.append((layer, kind, mask, q.shape[1], k.shape[1]))
        return matmul_attention(q, k, v, mask=mask)

    model.attention = attention
    return calls


def both_layers(*calls):
    return [(layer, *call) for layer in range(2) for call in calls]


def test_attention_is_replaced_by_assignment():
    """The assigned function gets every call with its layer, kind, mask and shapes; other models keep theirs."""
    model, other = build(), build()
    calls, cond = recorded(model), conditions(model)
    cross = ("cross", None, 24, 6)
    flow = model(clip(), 0.5, cond)
    assert calls == both_layers(("self", None, 24, 24), cross)
    assert_close(flow, other(clip(), 0.5, cond))
    assert len(calls) == 4 and other.attention is exact_attention

    calls.clear()
    model(clip(), 0.5, cond, frames_per_block=(1, 5), sink_frames=1, window_frames=2)
    assert calls == both_layers(("self", FrameMask((1, 5), 4, 1, 2), 24, 24), cross)

    calls.clear()
    model(clip(), 0.5, cond, frames_per_block=3, clean=clip())
    assert calls == both_layers(("self", FrameMask((3, 3), 4, clean_half=True), 48, 48), ("cross", None, 48, 6))


def test_a_replaced_attention_sees_the_cache():
    """In cached calls there is no mask, and the keys are those of the frames held and of the block itself."""
    model = build()
    cond, cache = conditions(model), KVCache(sink_frames=1, window_frames=2)
    calls, cross = recorded(model), ("cross", None, 8, 6)
    for held in (0, 2, 3, 3):
        model(clip(2), 0.5, cond, cache)
        cache = model.remember(clip(2), 0.0, cond, cache)
        assert calls == 2 * both_layers(("self", None, 8, 8 + 4 * held), cross)
        calls.clear()


def test_a_replaced_attention_sees_the_image_tokens():
    """Image-to-video models attend to the prompt, then to the CLIP tokens."""
    model = build(**I2V)
    calls = recorded(model)
    model(clip(), 0.5, conditions(model))
    assert calls == both_layers(("self", None, 24, 24), ("cross", None, 24, 6), ("cross", None, 24, 257))


# ------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("changes", [{}, I2V], ids=["t2v", "i2v"])
@pytest.mark.parametrize("attention", [sdpa_attention, matmul_attention])
def test_the_bf16_model_runs_every_way(attention, changes):
    """All parameters in bf16: each way gives a bf16 flow within a few percent of fp32's, the cache is bf16 too."""
    model = build(**changes)
    cond, x_t = conditions(model), clip()
    ways = {"bidirectional": {}, "causal": {"frames_per_block": 3}, "forced": {"frames_per_block": 3, "clean": x_t}}
    exact = {name: model(x_t, 0.5, cond, **way) for name, way in ways.items()}
    model.to(torch.bfloat16).attention = attention
    for name, way in ways.items():
        flow = model(x_t.bfloat16(), 0.5, cond, **way)
        assert flow.dtype == torch.bfloat16
        assert (flow.float() - exact[name]).norm() < 0.05 * exact[name].norm()
    cache = model.remember(x_t[:, :3].bfloat16(), 0.5, cond, KVCache())
    assert all(x.dtype == torch.bfloat16 for pair in cache.layers for x in pair)
    second = model(x_t[:, 3:].bfloat16(), 0.5, cond, cache)
    assert (second.float() - exact["causal"][:, 3:]).norm() < 0.05 * exact["causal"][:, 3:].norm()


# ------------------------------------------------------------------------------------------------------- mistakes


def call(**options):
    model = build()
    x_t, t = options.pop("x_t", clip()), options.pop("t", 0.5)
    cond = options.pop("cond", conditions(model, tokens=options.pop("tokens", 4)))
    return model(x_t, t, cond, **options)


MISTAKES = {
    "model type": (lambda: WanConfig(model_type="v2v"), "model_type must be 't2v' or 'i2v', got 'v2v'"),
    "heads": (lambda: WanConfig(dim=24, num_heads=5), "dim=24 must split into num_heads=5 heads of even width"),
    "odd head": (lambda: WanConfig(dim=6, num_heads=2), "heads of even width"),
    "patch over time": (lambda: WanConfig(patch_size=(2, 2, 2)), r"patch_size must be \(1, height, width\)"),
    "patch of two": (lambda: WanConfig(patch_size=(2, 2)), r"patch_size must be \(1, height, width\)"),
    "empty patch": (lambda: WanConfig(patch_size=(1, 0, 2)), r"patch_size must be \(1, height, width\)"),
    "clean alone": (lambda: call(clean=clip()), "pass frames_per_block too"),
    "sink alone": (lambda: call(sink_frames=1), "pass frames_per_block too"),
    "window alone": (lambda: call(window_frames=0), "pass frames_per_block too"),
    "cache and mask": (lambda: call(cache=KVCache(), frames_per_block=3), "either cache or frames_per_block, not both"),
    "clean of other length": (lambda: call(frames_per_block=3, clean=clip(3)), "must have the same shape"),
    "blocks": (lambda: call(frames_per_block=4), "6 frames are not a whole number of blocks .*; use 4 or 8 frames"),
    "frame size": (lambda: call(x_t=clip(size=(4, 5))), "4x5 do not divide into patches of 2x2; change patch_size"),
    "frames first": (lambda: call(x_t=clip().transpose(1, 2)), r"A video is \[B, F, C, H, W\] with C = \d+ .*; got"),
    "time of Wan": (lambda: call(t=750.0), r"t runs from 0 \(clean\) to 1 \(noise\), got 750.0"),
    "no prompt": (lambda: call(cond={}), r"cond\['prompt_embeds'\] must be \[\d, L, \d+\] .*; got None"),
    "one prompt": (lambda: call(cond={"prompt_embeds": torch.zeros(1, 4, 5)}), r"must be \[\d, L, \d+\]"),
    "prompt": (lambda: call(tokens=7), "The prompt has 7 tokens, the model reads 6: shorten the prompt"),
}


@pytest.mark.parametrize("mistake, sentence", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named_with_their_fix(mistake, sentence):
    """Every ValueError of the file says what was wrong and what to do."""
    with pytest.raises(ValueError, match=sentence):
        mistake()


def test_patch_size_may_be_a_list():
    """YAML has no tuples."""
    assert WanConfig(patch_size=[1, 2, 2]) == WanConfig(patch_size=(1, 2, 2))
