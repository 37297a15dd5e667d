"""In which precision a device computes: bfloat16 where it is faster, float32 where it is not."""

from contextlib import nullcontext
from functools import lru_cache

import torch
from torch.overrides import TorchFunctionMode

# Numbers below 1e-38 are zero, in this thread and those that it starts. A CPU takes many times as long for one of them,
# and the tanh of a GELU far from zero goes through them: a GELU took ten times as long, a whole step half as long again
# (docs/trials.md).
torch.set_flush_denormal(True)


@lru_cache
def computes_in_bf16(device: torch.device) -> bool:
    """Whether bf16 pays: a CPU that emulates it is slower than in fp32, so is Intel's without AMX (docs/trials.md)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16") or able.get("avx512_bf16") and "Intel" not in able.get("cpu_name", ""))


def autocast(kind: str | None, device: torch.device):
    """Networks under `kind` = "bf16", None, or "auto": bf16 where it pays."""
    if kind == "auto":
        kind = "bf16" if computes_in_bf16(device) else None
    return torch.autocast(device.type, torch.bfloat16) if kind else nullcontext()


def bf16_products(device: torch.device):
    """Muon, which multiplies in bf16 whatever the weights are: with Float32Products where bf16 does not pay."""
    return nullcontext() if computes_in_bf16(device) else Float32Products()


class Float32Products(TorchFunctionMode):
    """Products of bf16 matrices are computed in float32 and rounded to bf16, as hardware that has bf16 does it.

    A CPU that emulates bf16 takes many times as long for the same numbers, with Muon a quarter of a step of eight clips
    (docs/trials.md).
    """

    PRODUCTS = (torch.Tensor.__matmul__, torch.addmm)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        options = kwargs or {}
        if function not in self.PRODUCTS or args[0].dtype != torch.bfloat16:
            return function(*args, **options)
        return function(*(x.float() for x in args), **options).bfloat16()
