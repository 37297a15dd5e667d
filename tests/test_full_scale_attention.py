"""Attention kernels: all that this machine has compute one formula; which is taken where, and what a refusal says.

flash-attn 2 and 3 are replaced by modules of the same signature; cuDNN and the GPU's own kernels run where CUDA is.
"""

import ast
import os
import re
import shutil
import sys
from inspect import getsource
from types import ModuleType

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as flex

from full_scale import attention
from full_scale.attention import (
    FASTEST_FIRST,
    NEEDS,
    block_mask,
    cudnn_attention,
    fastest_attention,
    flash2_attention,
    flash3_attention,
    flex_attention,
    pick,
    torch_flash_attention,
)
from randomness import generator, randn
from settings import function
from tiny_causal_wan import FrameMask, exact_attention, matmul_attention, sdpa_attention

CASES = {  # mask, or numbers of queries and keys
    "as many keys as queries": (130, 130),
    "more keys than queries": (60, 300),
    "block-causal": FrameMask((2, 2, 2, 1), 60),
    "uneven blocks": FrameMask((1, 3, 3), 60),
    "sink and window": FrameMask((1, 2, 2, 2), 60, sink_frames=1, window_frames=2),
    "teacher forcing": FrameMask((1, 3, 3), 60, clean_half=True),
    "teacher forcing, sink and window": FrameMask((1, 2, 2, 2), 60, 1, 2, clean_half=True),
}
MASKS = [case for case in CASES.values() if isinstance(case, FrameMask)]
ODD_MASKS = [
    FrameMask((1,), 5),  # one small tile
    FrameMask((2, 2), 64),  # ends with a tile
    FrameMask((2, 1), 128),  # frames are tiles
    FrameMask((3, 3, 3), 36, 0, 0, clean_half=True),  # nothing of the past, several frames in a tile
    FrameMask((1, 4, 4), 300, 2, 3),  # several tiles in a frame
]
HAS_COMPILER, NO_COMPILER = shutil.which(os.environ.get("CXX", "g++")), "flex_attention on a CPU needs a C++ compiler"
COMPILED = pytest.param(flex_attention, marks=pytest.mark.skipif(not HAS_COMPILER, reason=NO_COMPILER))


def call(case, head_dim=32, dtype=torch.float32, device="cpu", gradient=False):
    """Queries, keys and values [b l n d] of a case, and its mask."""
    mask = case if isinstance(case, FrameMask) else None
    lengths = [len(mask.frames()) * mask.tokens_per_frame] * 2 if mask else case
    shapes = [(2, length, 2, head_dim) for length in (lengths[0], lengths[1], lengths[1])]
    x = [randn(shape, generator(0, name)).to(device, dtype) for name, shape in zip("qkv", shapes, strict=True)]
    return [x.requires_grad_(gradient) for x in x], mask


def formula(q, k, v, *, mask=None, causal=False):
    """softmax(q k^T / sqrt(d)) v, in float64 and spelled out. causal: as kernels understand it, ends lined up."""
    q, k, v = (x.double() for x in (q, k, v))
    scores = torch.einsum("b i n d, b j n d -> b n i j", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask.tokens(q.device), -torch.inf)
    if causal:
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("b n i j, b j n d -> b i n d", scores.softmax(-1), v)


# ------------------------------------------------------------------------------------------------ one formula


def assert_formula(kernel, name):
    """One case in float32, without gradient."""
    (q, k, v), mask = call(CASES[name])
    with torch.no_grad():
        out = kernel(q, k, v, mask=mask, layer=0, kind="self")
    assert (out - formula(q, k, v, mask=mask)).abs().max() < 2e-6
    assert out.dtype == torch.float32 and out.shape == q.shape
    assert kernel is matmul_attention or out.is_contiguous()  # else joining the heads would copy


@pytest.mark.parametrize("kernel", [exact_attention, sdpa_attention, matmul_attention, fastest_attention, COMPILED])
@pytest.mark.parametrize("name", CASES)
def test_all_kernels_compute_one_formula(kernel, name, monkeypatch):
    """Without mask, with a cache, block-causal, with sink and window, teacher forcing: all that runs on a CPU."""
    if kernel is flex_attention and not isinstance(CASES[name], FrameMask):
        monkeypatch.setattr(attention, "compiled_flex", lambda: flex.flex_attention)  # the test below compiles
    assert_formula(kernel, name)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason=NO_COMPILER)
@pytest.mark.parametrize("name", ["as many keys as queries", "more keys than queries"])
def test_flex_attention_compiled_without_mask(name):
    """Each of the two is a compilation of its own."""
    assert_formula(flex_attention, name)


def test_the_cases_can_tell_formulas_apart():
    """Dropping a mask, or a causal one where there is none, is a difference that the test above would see."""
    for case in CASES.values():
        (q, k, v), mask = call(case)
        right, wrong = formula(q, k, v, mask=mask), formula(q, k, v, causal=mask is None)
        assert (right - wrong).abs().max() > 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [*NEEDS, fastest_attention])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float32, 1e-4)])
def test_all_kernels_of_the_gpu_compute_one_formula(kernel, dtype, tolerance):
    """Values and gradients of all cases at Wan's head width; without mask no kernel waits for the GPU."""
    if kernel in NEEDS:
        reason = attention.obstacle(kernel, torch.device("cuda", 0), dtype, 128, False, True)
        if reason:
            pytest.skip(f"{kernel.__name__} {reason}")
    for case in CASES.values():
        (q, k, v), mask = call(case, 128, dtype, "cuda", gradient=True)
        if mask is None or kernel is fastest_attention or NEEDS[kernel].masks:
            assert_formula_and_gradient(kernel, q, k, v, mask, tolerance)


def assert_formula_and_gradient(kernel, q, k, v, mask, tolerance):
    out, expected = kernel(q, k, v, mask=mask), formula(q, k, v, mask=mask)
    direction = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), direction)
    right = torch.autograd.grad(expected, (q, k, v), direction.double())
    for x, y in zip((out, *found), (expected, *right), strict=True):
        assert x.dtype == q.dtype and (x - y).norm() < tolerance * y.norm()
    if mask is None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            kernel(q, k, v)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ----------------------------------------------------------------------------------------- flex_attention's masks


def tokens(tiles, length):
    """Bool [query, key] of what flex_attention computes: whole tiles, and the others token by token."""

    def spread(counts, columns):
        dense = torch.zeros(counts.shape[-1], columns.shape[-1], dtype=torch.bool)
        for row, (count, order) in enumerate(zip(counts[0, 0], columns[0, 0], strict=True)):
            dense[row, order[:count]] = True
        return dense.repeat_interleave(attention.TILE, 0).repeat_interleave(attention.TILE, 1)[:length, :length]

    whole, part = (
        spread(tiles.full_kv_num_blocks, tiles.full_kv_indices),
        spread(tiles.kv_num_blocks, tiles.kv_indices),
    )
    assert not (whole & part).any()
    query, key = torch.arange(length)[:, None], torch.arange(length)
    return whole | part & tiles.mask_mod(0, 0, query, key)


@pytest.mark.parametrize("mask", [*MASKS, *ODD_MASKS], ids=str)
def test_block_mask_is_the_frame_mask(mask):
    """Token by token; and the same tiles, for the backward pass too, that torch finds by looking at every pair."""
    dense = mask.tokens()
    tiles = block_mask(mask, torch.device("cpu"))
    assert torch.equal(tokens(tiles, len(dense)), dense)
    expected = flex.create_block_mask(tiles.mask_mod, None, None, *dense.shape, device="cpu")
    assert tiles.shape == expected.shape and tiles.BLOCK_SIZE == expected.BLOCK_SIZE
    for field in ("kv", "full_kv", "q", "full_q"):
        assert torch.equal(getattr(tiles, f"{field}_num_blocks"), getattr(expected, f"{field}_num_blocks"))
        assert torch.equal(getattr(tiles, f"{field}_indices"), getattr(expected, f"{field}_indices"))


def test_block_masks_are_made_once_and_never_mixed_up():
    """Equal masks share one table, another sink, window, length or half has its own; inference first does no harm."""
    with torch.inference_mode():
        first = block_mask(FrameMask((1, 2), 7), torch.device("cpu"))
    assert not first.kv_indices.is_inference()
    assert block_mask(FrameMask((1, 2), 7), torch.device("cpu")) is first
    others = [
        FrameMask((2, 1), 7),
        FrameMask((1, 2), 8),
        FrameMask((1, 2), 7, 1, 0),
        FrameMask((1, 2), 7, 0, None, True),
    ]
    for mask in others:
        tiles = block_mask(mask, torch.device("cpu"))
        assert torch.equal(tokens(tiles, len(mask.tokens())), mask.tokens())


# ------------------------------------------------------------------------------------------- which one is taken where


@pytest.fixture
def hopper(monkeypatch):
    """CPU tensors pass for those of a Hopper GPU, so that what a kernel is given can be looked at without one."""
    describe = attention.describe
    monkeypatch.setattr(attention, "describe", lambda *call: (torch.device("cuda"), *describe(*call)[1:]))
    monkeypatch.setattr(attention, "compute_capability", lambda device: 9)
    attention.obstacle.cache_clear()
    yield
    attention.obstacle.cache_clear()


def flash3_signature(answer):
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False
    ):  # fmt: skip
        assert softmax_scale is None and window_size == (-1, -1)
        return answer(q, k, v, causal)

    return flash_attn_func


def flash2_signature(answer):
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False
    ):  # fmt: skip
        assert dropout_p == 0 and softmax_scale is None and window_size == (-1, -1)
        return answer(q, k, v, causal)

    return flash_attn_func


def install(monkeypatch, name, signature, *more):
    """Put a flash-attn of our own making where Python looks for modules; returns the calls that it gets."""
    calls = []

    def answer(q, k, v, causal):
        calls.append((q, k, v))
        out = formula(q, k, v, causal=causal).to(q.dtype)
        return (out, *more) if more else out

    module = ModuleType(name)
    module.flash_attn_func = signature(answer)
    monkeypatch.setitem(sys.modules, name, module)
    return calls


FLASH = {
    "3": (flash3_attention, "flash_attn_interface", flash3_signature),
    "3, with logsumexp": (flash3_attention, "flash_attn_interface", flash3_signature, torch.zeros(())),
    "2": (flash2_attention, "flash_attn", flash2_signature),
}


@pytest.mark.parametrize("version", FLASH)
@pytest.mark.parametrize("name", ["as many keys as queries", "more keys than queries"])
def test_flash_attn_gets_what_it_expects(hopper, monkeypatch, version, name):
    """[b l n d] as it is, no copy, never causal; the kernel by its name and fastest_attention alike."""
    kernel, *module = FLASH[version]
    calls = install(monkeypatch, *module)
    monkeypatch.setattr(attention, "FASTEST_FIRST", (kernel,))
    (q, k, v), _ = call(CASES[name], 64, torch.bfloat16)
    for attend in (kernel, fastest_attention):
        out = attend(q, k, v, layer=0, kind="cross")
        assert out.dtype == torch.bfloat16 and (out - formula(q, k, v)).abs().max() < 0.02
    assert len(calls) == 2 and all(x is y for seen in calls for x, y in zip(seen, (q, k, v), strict=True))


def test_under_autocast_queries_and_keys_follow_v(hopper, monkeypatch):
    """Norms and rotations leave them in float32, as the tiny model's own function knows."""
    calls = install(monkeypatch, *FLASH["3"][1:])
    (q, k, v), _ = call((20, 30), 64)
    out = fastest_attention(q, k, v.bfloat16())
    assert [x.dtype for x in calls[0]] == [torch.bfloat16] * 3
    assert (out - formula(q, k, v)).abs().max() < 0.02


@pytest.mark.parametrize("kernel", [cudnn_attention, torch_flash_attention], ids=lambda k: k.__name__)
def test_pytorchs_kernels_are_named_to_pytorch(hopper, monkeypatch, kernel):
    """SDPA is called with this one backend allowed, and with all that were allowed before, afterwards."""
    backends = ("flash", "cudnn", "mem_efficient", "math")

    def allowed():
        return {name for name in backends if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()}

    seen, before = [], allowed()
    monkeypatch.setattr(attention, "sdpa_attention", lambda q, k, v: seen.append(allowed()) or sdpa_attention(q, k, v))
    (q, k, v), _ = call(CASES["more keys than queries"], 64, torch.bfloat16)
    if kernel is cudnn_attention:  # there is none for CPU tensors
        with pytest.raises(RuntimeError, match="scaled_dot_product_attention"):
            kernel(q, k, v)
    else:
        assert (kernel(q, k, v) - formula(q, k, v)).abs().max() < 0.02
    assert seen == [{"cudnn" if kernel is cudnn_attention else "flash"}] and allowed() == before


ALL = {"flash_attn_interface.flash_attn_func", "flash_attn.flash_attn_func", "triton.jit"}
BF16, FP32 = torch.bfloat16, torch.float32
CHOICES = [  # compute capability, importable, dtype, head width, mask -> kernel
    (9, ALL, BF16, 128, False, flash3_attention),
    (9, ALL, torch.float16, 64, False, flash3_attention),
    (9, ALL - {"flash_attn_interface.flash_attn_func"}, BF16, 128, False, cudnn_attention),
    (10, ALL, BF16, 128, False, cudnn_attention),
    (8, ALL, BF16, 128, False, flash2_attention),
    (12, ALL, BF16, 128, False, flash2_attention),
    (8, {"triton.jit"}, BF16, 128, False, torch_flash_attention),
    (7, ALL, torch.float16, 128, False, exact_attention),
    (9, ALL, FP32, 128, False, exact_attention),  # nothing is rounded in silence
    (9, ALL, torch.float64, 128, True, exact_attention),
    (9, ALL, BF16, 20, False, exact_attention),
    (9, ALL, BF16, 256, False, exact_attention),
    (9, ALL, BF16, 128, True, flex_attention),
    (9, ALL, FP32, 48, True, flex_attention),
    (9, ALL, BF16, 8, True, exact_attention),
    (9, set(), BF16, 128, True, exact_attention),
]


@pytest.mark.parametrize("capability, importable, dtype, width, masked, expected", CHOICES)
def test_the_fastest_that_can(hopper, monkeypatch, capability, importable, dtype, width, masked, expected):
    """By GPU, packages, dtype, head width and mask; on a CPU always the exact one, which has a backward pass."""
    monkeypatch.setattr(attention, "compute_capability", lambda device: capability)
    monkeypatch.setattr(attention, "import_error", lambda path: None if path in importable else "no such module")
    for gradient in (False, True):
        assert pick(torch.device("cuda:0"), dtype, width, masked, gradient) is expected
        assert pick(torch.device("cpu"), dtype, width, masked, gradient) is exact_attention


def test_amd_gpus_are_left_to_pytorch(hopper, monkeypatch):
    """Their compute capabilities look like NVIDIA's and mean something else."""
    monkeypatch.undo()
    monkeypatch.setattr(attention, "import_error", lambda path: "no such module")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    attention.obstacle.cache_clear()
    assert pick(torch.device("cuda"), BF16, 128, False, False) is exact_attention
    monkeypatch.setattr(torch.version, "hip", None)
    attention.obstacle.cache_clear()
    assert pick(torch.device("cuda"), BF16, 128, False, False) is cudnn_attention


REFUSALS = [  # kernel, dtype, head width, mask, what is said
    (flash3_attention, FP32, 64, None, "float32; training.autocast makes it bfloat16"),
    (flash2_attention, BF16, 64, MASKS[0], "knows no masks; flex_attention does"),
    (cudnn_attention, BF16, 20, None, "not for heads of width 20"),
    (flash3_attention, BF16, 64, None, r"cannot be imported \(.*\): build the folder hopper of github.com/Dao-AILab"),
    (flash2_attention, BF16, 64, None, r"cannot be imported \(.*\): pip install flash-attn --no-build-isolation"),
]


@pytest.mark.parametrize("kernel, dtype, width, mask, words", REFUSALS)
def test_a_kernel_that_was_chosen_and_cannot_says_why(hopper, monkeypatch, kernel, dtype, width, mask, words):
    """One sentence, with what to do about it: never another formula, never another dtype, never another kernel."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))  # as if broken
    (q, k, v), _ = call(mask or (8, 8), width, dtype)
    with pytest.raises(ValueError, match=f"^{kernel.__name__} .*{words}.*; .*fastest_attention") as error:
        kernel(q, k, v, mask=mask)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kernel", FASTEST_FIRST, ids=lambda k: k.__name__)
def test_kernels_of_the_gpu_refuse_a_cpu(kernel):
    """... in a sentence."""
    with pytest.raises(ValueError, match="runs on cuda, not on cpu"):
        kernel(*call((8, 8), 64, BF16)[0])


def test_an_older_gpu_is_named(hopper, monkeypatch):
    """flash-attn 3 is for Hopper alone."""
    monkeypatch.setattr(attention, "compute_capability", lambda device: 8)
    with pytest.raises(ValueError, match="flash3_attention is not for GPUs of compute capability 8.x"):
        flash3_attention(*call((8, 8), 64, BF16)[0])


def test_flex_attention_on_a_cpu_has_no_gradient_and_needs_a_compiler(monkeypatch):
    """It says so, and fastest_attention has the gradient of the formula all the same."""
    (q, k, v), mask = call(CASES["uneven blocks"], gradient=True)
    with pytest.raises(ValueError, match="flex_attention has no backward pass on a CPU"):
        flex_attention(q, k, v, mask=mask)
    found = torch.autograd.grad(fastest_attention(q, k, v, mask=mask).square().sum(), (q, k, v))
    right = torch.autograd.grad(formula(q, k, v, mask=mask).square().sum(), (q, k, v))
    assert all((x - y).abs().max() < 1e-5 for x, y in zip(found, right, strict=True))
    monkeypatch.setenv("CXX", "no-such-compiler")
    attention.obstacle.cache_clear()
    with pytest.raises(ValueError, match="flex_attention is compiled with g"):
        flex_attention(*call((8, 8))[0])
    attention.obstacle.cache_clear()


# ------------------------------------------------------------------------------------------------------- from outside


def test_a_compiled_layer_has_the_kernel_inside(hopper, monkeypatch):
    """As one graph, chosen as it is outside; a cache that grows compiles once more, not once per block."""
    monkeypatch.setattr(attention, "FASTEST_FIRST", (flash3_attention, torch_flash_attention))
    counter = CompileCounter()
    compiled = torch.compile(fastest_attention, backend=counter, fullgraph=True)
    with torch.no_grad():
        for past in range(1, 6):
            (q, k, v), _ = call((30, 30 * past), 32, BF16)
            assert (compiled(q, k, v, kind="self") - formula(q, k, v)).abs().max() < 0.02
    assert counter.frame_count == 2  # for the first length, then for all


def test_a_compiled_layer_never_uses_an_old_mask(hopper, monkeypatch):
    """flex_attention interrupts it; equal masks, of which the model makes one per call, compile nothing anew."""

    def uncompiled():
        assert not torch.compiler.is_compiling(), "flex_attention became a part of the layer"
        return flex.flex_attention

    monkeypatch.setattr(attention, "import_error", lambda path: None)
    monkeypatch.setattr(attention, "compiled_flex", uncompiled)
    counter, compilations = CompileCounter(), []
    compiled = torch.compile(lambda q, k, v, mask: 2 * fastest_attention(q + 0, k, v, mask=mask), backend=counter)
    with torch.no_grad():
        for mask in MASKS[:3] * 2:
            (q, k, v), _ = call(mask)
            out = compiled(q, k, v, FrameMask(**vars(mask)))
            assert (out - 2 * formula(q, k, v, mask=mask)).abs().max() < 4e-6
            compilations.append(counter.frame_count)
    assert compilations[0] > 0 and compilations == compilations[:1] * 6


@pytest.mark.parametrize("kernel", [fastest_attention, *NEEDS], ids=lambda k: k.__name__)
def test_configs_can_name_every_kernel(kernel):
    """`attention: full_scale.attention.NAME`, as train.py reads it."""
    assert function(f"full_scale.attention.{kernel.__name__}") is kernel


def test_flash_attn_is_never_needed_to_import():
    """Nothing at module level asks for it, so the module imports where it is not installed."""
    top = [node for node in ast.parse(getsource(attention)).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(top) > 5 and "flash_attn" not in "".join(ast.unparse(node) for node in top)


def test_the_list_of_kernels(capsys):
    """`python -m full_scale.attention` has a line for each, and what is taken with and without a mask."""
    attention.main()
    said = capsys.readouterr().out
    assert re.findall(r"^  (\w+)", said, re.M) == [kernel.__name__ for kernel in NEEDS]
    assert len(re.findall(r"^fastest_attention with.* is \w+_attention$", said, re.M)) == 2
