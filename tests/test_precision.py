"""Precision: bf16 where the device has it, and the same numbers through float32 where it does not."""

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from tiny_runs import REPOSITORY
from torch import nn
from torch.overrides import TorchFunctionMode

import precision
import settings


class Watch(TorchFunctionMode):
    """Notes in which dtype matrices are multiplied."""

    def __init__(self, multiplied: list):
        super().__init__()
        self.multiplied = multiplied

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in precision.Float32Products.PRODUCTS:
            self.multiplied.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


def test_autocast_is_bf16_only_where_the_cpu_computes_in_it(monkeypatch):
    """autocast=auto, the default, is that of the processor's instructions; null and bf16 stay what they are."""
    assert settings.TrainingConfig().autocast == "auto"
    for able, expected in (
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, False),
        ({"amx_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"avx2": True}, False),
        ({}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        precision.computes_in_bf16.cache_clear()
        for kind, lowers in {"auto": expected, None: False, "bf16": True}.items():
            with precision.autocast(kind, torch.device("cpu")):
                assert torch.is_autocast_enabled("cpu") == lowers
    precision.computes_in_bf16.cache_clear()


@pytest.mark.parametrize("shape", [(48, 48), (48, 96), (96, 48)])
def test_muon_without_bf16_computes_what_hardware_with_it_does(shape):
    """Its products go through float32, and its update differs from the emulated one by roundings of bf16 alone."""
    updates = {}
    for name, products in {"emulated": nullcontext(), "float32": precision.Float32Products()}.items():
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        multiplied = []
        with Watch(multiplied), products:
            torch.optim.Muon([weight], lr=1.0).step()
        assert {*multiplied} == {torch.float32 if name == "float32" else torch.bfloat16}
        updates[name] = weight.detach()
    assert (updates["float32"] - updates["emulated"]).norm() < 0.02 * updates["emulated"].norm()


def test_very_small_numbers_are_zero():
    """Also for whoever only generates, and in every thread: a GELU far from zero takes as long as one near it."""
    script = (
        "import torch; import generate; torch.set_num_threads(2); many = torch.ones(1_000_000); "
        "print((many * 1e-20 * 1e-19).max().item(), (many * 1e-20 * 1e-17).min().item())"
    )
    said = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    below, above = map(float, said.stdout.split())
    assert below == 0 < above
