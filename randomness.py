"""Where a sample's random numbers come from.

Every draw is a function of (seed, step, purpose, index of the sample in the global batch), so a sample does not
depend on its batch-mates, on the number of processes, on gradient accumulation, or on whether a run was interrupted.
An `rng` is a `torch.Generator`, a sequence with one generator per sample, or None (torch's global state). Numbers are
drawn on the generator's device, then moved: a CPU and a GPU see the same ones.
"""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Rng = torch.Generator | Sequence[torch.Generator] | None


def generator(seed: int, *key) -> torch.Generator:
    """A CPU generator whose stream is fixed by `seed` and `key`, for example `generator(0, step, "exit")`."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def generators(seed: int, *key, samples: Iterable[int]) -> list[torch.Generator]:
    """One generator per sample, each fixed by `seed`, `key` and the sample's global index."""
    return [generator(seed, *key, int(sample)) for sample in samples]


def randn(shape: Sequence[int], rng: Rng = None, *, device=None, dtype=torch.float32) -> Tensor:
    """Standard normal numbers of `shape`; with one generator per sample, `shape[0]` counts the samples."""
    return _draw(torch.randn, shape, rng, device, dtype)


def randn_like(x: Tensor, rng: Rng = None) -> Tensor:
    """Standard normal numbers in the shape, device and dtype of `x`."""
    return randn(x.shape, rng, device=x.device, dtype=x.dtype)


def rand(shape: Sequence[int], rng: Rng = None, *, device=None, dtype=torch.float32) -> Tensor:
    """Uniform numbers in [0, 1) of `shape`; with one generator per sample, `shape[0]` counts the samples."""
    return _draw(torch.rand, shape, rng, device, dtype)


def randint(high: int, shape: Sequence[int], rng: Rng = None, *, device=None) -> Tensor:
    """Whole numbers in [0, high) of `shape`, int64."""
    return (rand(shape, rng, device=device, dtype=torch.float64) * high).long()


def _draw(kind, shape, rng, device, dtype):
    if rng is None:
        return kind(shape, device=device, dtype=dtype)
    if isinstance(rng, torch.Generator):
        return kind(shape, generator=rng, device=rng.device, dtype=dtype).to(device)
    if len(rng) != shape[0]:
        raise ValueError(f"rng holds {len(rng)} generators for a batch of {shape[0]}; pass one per sample.")
    return torch.stack([kind(shape[1:], generator=g, device=g.device, dtype=dtype) for g in rng]).to(device)
