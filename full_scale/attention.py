"""Kernels for the model's attention: faster ways to compute one formula, softmax(q k^T / sqrt(d)) v.

    model.attention = fastest_attention     # or, in a config, attention: full_scale.attention.fastest_attention

Every kernel has the signature of the model's own, attention(q, k, v, *, mask=None, layer=None, kind=None) on
[b l n d]. fastest_attention takes, call by call, the fastest that the GPU, the dtype, the mask and the packages at hand
allow, in the end the tiny model's own. A kernel that is chosen by its name and cannot compute a call says why.
`python -m full_scale.attention` lists what can be had on this machine.

mask=None means that every query sees every key. With a cache there are more keys than queries; a kernel's "causal"
would line up their ends and hide keys, so none is ever told to be causal. All compute in v's dtype: queries and keys
that autocast left in float32 follow v, and where v itself is float32 nothing is rounded to half precision.
"""

import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex

from tiny_causal_wan import Attention, FrameMask, exact_attention, sdpa_attention

Mask = FrameMask | None

TILE = 128  # flex_attention skips, takes whole or looks into squares of so many tokens
COMPILATIONS = 64  # of flex_attention in one process: PyTorch's limit of 8 is soon reached by lengths and grad modes

# ------------------------------------------------------------------------------------------------------- kernels


def fastest_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask = None, layer=None, kind=None) -> Tensor:
    """The fastest kernel that can compute this call."""
    return pick(*describe(q, k, v, mask))(q, k, v, mask=mask)


def flash3_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask = None, layer=None, kind=None) -> Tensor:
    """flash-attn 3, for Hopper GPUs: half precision, no mask."""
    check(flash3_attention, q, k, v, mask)
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q.to(v.dtype), k.to(v.dtype), v)
    return out[0] if isinstance(out, tuple) else out  # older versions return the logsumexp, too


def flash2_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask = None, layer=None, kind=None) -> Tensor:
    """flash-attn 2, for GPUs since Ampere: half precision, no mask."""
    check(flash2_attention, q, k, v, mask)
    from flash_attn import flash_attn_func

    return flash_attn_func(q.to(v.dtype), k.to(v.dtype), v)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask = None, layer=None, kind=None) -> Tensor:
    """The kernel of cuDNN, which comes with PyTorch, for GPUs since Hopper: half precision, no mask."""
    check(cudnn_attention, q, k, v, mask)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa_attention(q, k, v)


def torch_flash_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask = None, layer=None, kind=None) -> Tensor:
    """flash-attn 2 as it is built into PyTorch, for GPUs since Ampere: half precision, no mask."""
    check(torch_flash_attention, q, k, v, mask)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa_attention(q, k, v)


@torch.compiler.disable  # it is compiled by itself: PyTorch 2.13 cannot always build its masks in another graph
def flex_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask = None, layer=None, kind=None) -> Tensor:
    """PyTorch's flex_attention, compiled: skips what the mask hides and needs no table of all pairs of tokens."""
    check(flex_attention, q, k, v, mask)
    tiles = None if mask is None else block_mask(mask, v.device)
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))  # [b n l d]
    return compiled_flex()(q, k, v, block_mask=tiles).transpose(1, 2)


# ------------------------------------------------------------------------------------------------ flex_attention


@cache
def compiled_flex() -> Callable[..., Tensor]:
    # Past its limit torch.compile goes on uncompiled, with memory for all pairs of tokens; with fullgraph it raises.
    return torch.compile(flex.flex_attention, fullgraph=True, recompile_limit=COMPILATIONS)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a table made under inference_mode could not be used in training later
def block_mask(mask: FrameMask, device: torch.device) -> flex.BlockMask:
    """Which tiles of the mask are hidden, seen whole, or seen in part, with the rule for the tokens of the last kind.

    Counts frames; torch's create_block_mask, which counts pairs of tokens, would need a table of 4e9 for teacher
    forcing on 21 frames of Wan. A tile that reaches beyond the last token is seen in part.
    """
    sees = mask.frames().to(device)  # [query frame, key frame]
    tokens = len(sees) * mask.tokens_per_frame
    frame_of = torch.arange(tokens, device=device) // mask.tokens_per_frame

    def sees_token(batch, head, query, key):  # captures tensors alone: a new mask is new data, not a new kernel
        return sees[frame_of[query], frame_of[key]]

    first = torch.arange(0, tokens, TILE, device=device)[:, None]
    frame = torch.arange(len(sees), device=device)
    holds = (frame_of[first] <= frame) & (frame <= frame_of[(first + TILE - 1).clamp(max=tokens - 1)])  # [tile, frame]
    holds, inside = holds.float(), first + TILE <= tokens
    some = holds @ sees.float() @ holds.T > 0
    whole = (holds @ (~sees).float() @ holds.T == 0) & inside & inside.T
    lists = (*listed(some & ~whole), *listed(whole))
    return flex.BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=TILE, mask_mod=sees_token, seq_lengths=(tokens, tokens))


def listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of a bool [rows, columns] as the number of its True columns and their indices, which come first."""
    columns = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[None, None], columns.int()[None, None]


# --------------------------------------------------------------------------------------- which kernel computes what


@dataclass(frozen=True)
class Needs:
    """What a kernel asks of a call and of the machine; by default what all flash kernels ask."""

    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    head_dims: range = range(8, 129, 8)  # larger ones are not to be had on every GPU, nor always with a gradient
    masks: bool = False
    gpus: range = range(8, 100)  # majors of NVIDIA's compute capability: 8 is Ampere, 9 Hopper, 10 and 12 Blackwell
    package: str | None = None  # what has to be importable, module.name
    install: str = ""


# The order that their authors' figures suggest; not measured here.
FASTEST_FIRST = (flash3_attention, cudnn_attention, flash2_attention, torch_flash_attention)
NEEDS: dict[Attention, Needs] = {
    flash3_attention: Needs(
        gpus=range(9, 10),
        package="flash_attn_interface.flash_attn_func",
        install="build the folder hopper of github.com/Dao-AILab/flash-attention",
    ),
    cudnn_attention: Needs(gpus=range(9, 11)),
    flash2_attention: Needs(
        package="flash_attn.flash_attn_func", install="pip install flash-attn --no-build-isolation"
    ),
    torch_flash_attention: Needs(),
    flex_attention: Needs(
        devices=("cuda", "cpu"),
        dtypes=(torch.bfloat16, torch.float16, torch.float32),
        head_dims=range(16, 257),
        masks=True,
        gpus=range(100),  # Triton has its own say
        package="triton.jit",
        install="pip install triton",
    ),
}


def describe(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple:
    """What decides between kernels: device, dtype, head dim, whether there is a mask, whether a gradient is wanted."""
    return v.device, v.dtype, v.shape[-1], mask is not None, any(x.requires_grad for x in (q, k, v))


def pick(device: torch.device, dtype: torch.dtype, head_dim: int, masked: bool, gradient: bool) -> Attention:
    """The fastest kernel for such calls; on a CPU the exact one, since flex_attention would have to compile first."""
    kernels = () if device.type == "cpu" else (flex_attention,) if masked else FASTEST_FIRST
    for kernel in kernels:
        if obstacle(kernel, device, dtype, head_dim, masked, gradient) is None:
            return kernel
    return exact_attention


def check(kernel: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> None:
    """Raise ValueError where this kernel cannot compute this call."""
    found = obstacle(kernel, *describe(q, k, v, mask))
    if found:
        raise ValueError(f"{kernel.__name__} {found}; full_scale.attention.fastest_attention takes one that can.")


@cache
@torch.compiler.assume_constant_result
def obstacle(kernel: Attention, *call) -> str | None:
    """Why a kernel cannot compute a call as `describe` puts it: what comes after its name in a sentence. Else None."""
    return next(obstacles(NEEDS[kernel], *call), None)


def obstacles(needs: Needs, device, dtype, head_dim, masked, gradient) -> Iterator[str]:
    if device.type not in needs.devices:
        yield f"runs on {' and '.join(needs.devices)}, not on {device.type}"
    if masked and not needs.masks:
        yield "knows no masks; flex_attention does"
    if dtype not in needs.dtypes:
        yield f"does not compute in {dtype}; training.autocast makes it bfloat16"
    if head_dim not in needs.head_dims:
        yield f"is not for heads of width {head_dim}"
    if device.type == "cpu" and gradient:
        yield "has no backward pass on a CPU"
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        yield "is compiled with g++, which is not here: install it, or set CXX to another compiler"
    if device.type == "cuda" and (major := compute_capability(device)) not in needs.gpus:
        yield f"is not for GPUs of compute capability {major}.x"
    if device.type == "cuda" and needs.package and (error := import_error(needs.package)):
        yield f"needs {needs.package}, which cannot be imported ({error}): {needs.install}"


def compute_capability(device: torch.device) -> int:
    """Its major number; 0 for AMD's GPUs, whose numbers mean something else."""
    return 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]


def import_error(path: str) -> str | None:
    """Why module.name cannot be imported. A package that was built for another torch or CUDA is as good as none."""
    module, _, name = path.rpartition(".")
    try:
        getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError) as error:
        return str(error)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wan = device, torch.bfloat16, 128
    print(f"Wan's heads in bfloat16 on {torch.cuda.get_device_name() if device.type == 'cuda' else 'a CPU'}:")
    for kernel, needs in NEEDS.items():
        print(f"  {kernel.__name__} {obstacle(kernel, *wan, needs.masks, True) or 'can be used'}")
    for masked in (False, True):
        name = pick(*wan, masked, True).__name__
        print(f"fastest_attention {'with a mask' if masked else 'without mask'} is {name}")


if __name__ == "__main__":
    main()
