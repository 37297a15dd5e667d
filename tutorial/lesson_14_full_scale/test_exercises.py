"""Graders of lesson 14. `make grade LESSON=14`; each message says which idea is missing."""

import inspect
import re
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from full_scale.wan import WAN_CONFIGS
from kv_cache import KVCache
from tiny_causal_wan import FrameMask, TinyCausalWanModel, WanConfig, matmul_attention

PARAMETERS = 1_000_000


def test_five_numbers_for_every_parameter(training_bytes):
    got = training_bytes(PARAMETERS, gpus=1)
    assert got == 20 * PARAMETERS, (
        "On one GPU a float32 parameter comes with its gradient, AdamW's two moments and its place in the average: "
        f"five numbers of 4 bytes, 20 in all. Yours is {got / PARAMETERS:g} bytes."
    )


def test_full_sharding_divides_by_all(training_bytes):
    whole = training_bytes(PARAMETERS, gpus=1)
    got = training_bytes(PARAMETERS, gpus=64, gpus_per_node=8, sharding="full")
    assert got == whole / 64, (
        f"Full sharding gives each of the 64 GPUs one part in 64 of everything; yours has one in {whole / got:g}."
    )


def test_hybrid_sharding_divides_by_a_node(training_bytes):
    whole = training_bytes(PARAMETERS, gpus=1)
    got = training_bytes(PARAMETERS, gpus=64, gpus_per_node=8, sharding="hybrid")
    assert got == whole / 8, (
        "With hybrid sharding every node of 8 GPUs holds a whole model: one part in 8 each, however many nodes. "
        f"Yours has one in {whole / got:g}."
    )


def test_less_than_a_node(training_bytes):
    whole = training_bytes(PARAMETERS, gpus=1)
    got = training_bytes(PARAMETERS, gpus=2, gpus_per_node=8, sharding="hybrid")
    assert got == whole / 2, "With 2 GPUs of a node of 8 there are 2 to share the model, not 8."


SMALL = WanConfig(dim=24, num_heads=2, num_layers=2, ffn_dim=40, patch_size=(1, 2, 2))


def counted_flops(past_frames):
    """What PyTorch counts in SMALL's layers, in a call on 2 frames of 15 tokens: two models' difference."""
    totals = []
    for num_layers in (SMALL.num_layers, 2 * SMALL.num_layers):
        model = TinyCausalWanModel(replace(SMALL, num_layers=num_layers))
        cond = {"prompt_embeds": torch.zeros(1, 4, 32)}
        model.attention = matmul_attention  # whose products are seen one by one
        video = torch.randn(1, 2 + past_frames, 1, 6, 10)
        with torch.no_grad():
            cache = model.remember(video[:, 2:], 0.0, cond, KVCache()) if past_frames else KVCache()
            with FlopCounterMode(display=False) as counter:
                model(video[:, :2], 0.5, cond, cache)
        totals.append(counter.get_total_flops())
    return totals[1] - totals[0]


def test_it_is_what_pytorch_counts(call_flops):
    got, right = call_flops(SMALL, 30), counted_flops(0)
    assert got == right, (
        f"PyTorch counts {right:,} FLOPs in 2 layers of width 24 and feed-forward 40, on 30 tokens without a past and "
        f"{SMALL.text_len} of the prompt; you count {got:,.0f}. Eight maps of the width and two of the feed-forward "
        "(k and v of the cross-attention are of the prompt's tokens), and two products in each of the two attentions; "
        "a multiplication and an addition are two."
    )


def test_the_cache_is_seen_and_not_made_again(call_flops):
    got, right = call_flops(SMALL, 30, 60), counted_flops(4)
    assert got == right, (
        f"With 60 more tokens in the cache PyTorch counts {right:,}, you {got:,.0f}. Past tokens are keys and values "
        "only: they go through no map again, look at nothing, and each new token looks at them."
    )


def test_the_past_costs_in_proportion(call_flops):
    config = WAN_CONFIGS["t2v-1.3b"]
    none, once, twice = (call_flops(config, 4680, past) for past in (0, 4680, 9360))
    right = 4 * config.num_layers * 4680**2 * config.dim
    assert once - none == twice - once == right, (
        "Each further block of 4680 past tokens adds the same to a call of Wan 1.3B: 4 x 30 layers x 4680 queries x "
        f"4680 keys x 1536, {right / 1e12:.1f} TFLOP; yours adds {(once - none) / 1e12:.1f} and then "
        f"{(twice - once) / 1e12:.1f}. That is why a video costs more the longer it gets, and with a window does not."
    )


def test_heads_share_the_width(call_flops):
    config = WAN_CONFIGS["t2v-1.3b"]
    same = call_flops(replace(config, num_heads=24), 1560, 1560) == call_flops(config, 1560, 1560)
    assert same, "All heads together are as wide as the model, so their number does not matter."


def test_the_batch_is_shared_out(parts_per_gpu):
    got = [parts_per_gpu(64, gpus) for gpus in (1, 8, 64)]
    assert got == [64, 8, 1], (
        f"A batch of 64 is 64 parts for one GPU, 8 for each of 8, and 1 for each of 64; yours: {got}. It is the same "
        "step, whatever the number of GPUs."
    )
    got = parts_per_gpu(64, 8, micro_batch=2)
    assert got == 4, f"With two videos at a time, 8 GPUs take 16 at once and four rounds for 64, not {got}."


def test_neighbours_share_a_video(parts_per_gpu):
    got = parts_per_gpu(64, 8, sequence_parallel=4)
    assert got == 32, (
        "With sequence_parallel=4, eight GPUs are two groups, each working on one video at a time: 32 parts, not "
        f"{got}."
    )


def test_what_does_not_divide_is_refused(parts_per_gpu):
    parts_per_gpu(8, 8)
    for batch, gpus, more in ((64, 24, {}), (64, 8, {"micro_batch": 3}), (4, 8, {}), (64, 6, {"sequence_parallel": 4})):
        try:
            got = parts_per_gpu(batch, gpus, **more)
        except ValueError as error:
            named = {int(number) for number in re.findall(r"\d+", str(error))}
            groups, left = divmod(gpus, more.get("sequence_parallel", 1))
            at_once = groups * more.get("micro_batch", 1)
            fits = any(n and n % at_once == 0 and (n != gpus or batch < gpus) for n in named)
            assert named and (left or fits), (
                "The error should name a number that fits, here a batch that is a multiple of "
                f'{at_once}: somebody has to type something else now. Yours: "{error}".'
            )
            continue
        raise AssertionError(
            f"A batch of {batch} on {gpus} GPUs{f' with {more}' if more else ''} leaves some without "
            f"work, or a video cut: ValueError. You returned {got}."
        )


def named(*names):
    return {name: torch.full((1,), float(i)) for i, name in enumerate(names)}


def stripped(without_wrappers, *names):
    return list(without_wrappers(named(*names), "file.pt"))


def test_infixes_go_wherever_they_are(without_wrappers):
    got = stripped(
        without_wrappers,
        "_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.ffn.0.weight",
        "blocks.1._orig_mod.self_attn.q.weight",
        "module.head.head.bias",
    )
    wanted = ["blocks.0.ffn.0.weight", "blocks.1.self_attn.q.weight", "head.head.bias"]
    assert got == wanted, (
        f"Wrappers stand at the front or in the middle, alone or several in a row: _fsdp_wrapped_module (FSDP), "
        f"_checkpoint_wrapped_module, _orig_mod (torch.compile), module (DDP). Left over in yours: {got}."
    )


def test_the_prefix_goes_when_it_is_first(without_wrappers):
    got = stripped(without_wrappers, "model.patch_embedding.weight", "_fsdp_wrapped_module.model.head.modulation")
    assert got == ["patch_embedding.weight", "head.modulation"], (
        "Self-Forcing keeps its network as `model.`, and FSDP may stand before it: strip the infixes first, the "
        f"prefix then. Yours: {got}."
    )
    got = stripped(without_wrappers, "model._fsdp_wrapped_module.head.modulation")
    assert got == ["head.modulation"], (
        f"The other way round occurs as well (generator_ema of Self-Forcing). Yours: {got}."
    )


def test_a_part_of_a_word_stays(without_wrappers):
    got = stripped(without_wrappers, "my_module.weight", "blocks.0.submodel.weight", "supermodel.bias")
    assert got == ["my_module.weight", "blocks.0.submodel.weight", "supermodel.bias"], (
        f"Only whole parts between two points are wrappers: `my_module` is somebody's own name. Yours: {got}."
    )


def test_tensors_stay_with_their_names(without_wrappers):
    found = without_wrappers(named("_orig_mod.b", "model.a"), "file.pt")
    assert {name: x.item() for name, x in found.items()} == {"b": 0.0, "a": 1.0}, "Every tensor keeps its own name."


def test_a_name_twice_is_refused(without_wrappers):
    without_wrappers(named("model.a"), "file.pt")
    try:
        without_wrappers(named("model.a", "_orig_mod.a"), "file.pt")
    except ValueError as error:
        assert "file.pt" in str(error), "Say which file it was: the message should name the source."
        return
    raise AssertionError(
        "Two keys that become one name: whichever you keep, the other's weights are lost in silence. Raise ValueError."
    )


def random_qkv(queries=37, keys=50, dtype=torch.float32, scale=1.0):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, 3, 16, generator=rng) for length in (queries, keys, keys))
    return (scale * q).to(dtype), k.to(dtype), v.to(dtype)


def test_it_has_the_models_signature(online_attention):
    online_attention(*random_qkv(), mask=None, layer=0, kind="self")
    names = list(inspect.signature(online_attention).parameters)
    assert names[:6] == ["q", "k", "v", "mask", "layer", "kind"], (
        f"The model calls attend(q, k, v, mask=, layer=, kind=), not {names}."
    )


def test_it_is_softmax_attention(online_attention):
    q, k, v = random_qkv()
    for chunk in (500, 50, 7):
        got = online_attention(q, k, v, chunk=chunk)
        assert got.shape == q.shape, f"[b l n d] in, [b l n d] out, with the queries' l; yours is {tuple(got.shape)}."
        error = (got - matmul_attention(q, k, v)).abs().max().item()
        assert chunk < 50 or error < 1e-5, (
            f"With all 50 keys in one chunk it should be softmax(q k^T / sqrt(d)) v; it is off by {error:.2g}."
        )
        assert error < 1e-5, (
            f"With chunks of {chunk} of 50 keys it is off by {error:.2g}. When a new chunk has a larger score, both "
            "sums, of exponentials and of values, must be scaled down by exp(old maximum - new maximum)."
        )


def test_large_scores_do_not_overflow(online_attention):
    q, k, v = random_qkv(scale=300.0)
    got = online_attention(q, k, v, chunk=8)
    assert got.isfinite().all(), (
        "With large scores exp overflows: subtract the largest score so far before you take it."
    )
    error = (got - matmul_attention(q, k, v)).abs().max().item()
    assert error < 1e-4, (
        f"With large scores it is off by {error:.2g}: what was summed under a smaller maximum must fade."
    )


def test_a_mask_hides(online_attention):
    mask = FrameMask((2, 2, 1), tokens_per_frame=4, window_frames=1)
    q, k, v = random_qkv(20, 20)
    got, right = online_attention(q, k, v, mask=mask, chunk=4), matmul_attention(q, k, v, mask=mask)
    assert got.isfinite().all(), (
        "Of the first chunks some queries see nothing at all, and -inf minus -inf is nan: give them zeros until they "
        "see something."
    )
    assert (got - right).abs().max() < 1e-5, "mask.tokens(device) is True where a query (row) sees a key (column)."


def test_it_follows_v(online_attention):
    q, k, v = random_qkv()
    got = online_attention(q, k, v.bfloat16(), chunk=16)
    assert got.dtype == torch.bfloat16, (
        f"Under autocast q and k may come in float32 and v in bf16: all follow v, also what comes out ({got.dtype})."
    )


class Largest(TorchDispatchMode):
    """The most numbers that any tensor holds which is made inside."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else (made,):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return made


def test_all_scores_are_never_there(online_attention):
    q, k, v = random_qkv(256, 2048)
    with Largest() as seen:
        online_attention(q, k, v, chunk=64)
    everything, fair = 2 * 3 * 256 * 2048, 2 * 3 * 16 * 2048
    assert seen.numbers <= fair, (
        f"Some tensor in there has {seen.numbers:,} numbers; all scores together would be {everything:,}. With chunks "
        f"of 64 keys no tensor has to be larger than the keys themselves, {fair:,}. That is what flash attention is "
        "about."
    )


def test_a_model_runs_with_it(online_attention):
    torch.manual_seed(0)
    model = TinyCausalWanModel(WanConfig(dim=24, num_heads=2, num_layers=2, ffn_dim=24))
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    video, cond = torch.randn(1, 4, 1, 8, 8), {"prompt_embeds": torch.randn(1, 4, 32)}
    with torch.no_grad():
        before = model(video, 0.5, cond, frames_per_block=2)
        model.attention = online_attention
        after = model(video, 0.5, cond, frames_per_block=2)
    assert (before - after).abs().max() < 1e-4, "model.attention = yours should not change what the model says."
