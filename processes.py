"""Who trains: one process, alone. full_scale/parallelize.py has the same methods for many, and train.py sees no other
difference between a laptop and a cluster."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from checkpoint import load_checkpoint, save_checkpoint

T = TypeVar("T")


class OneProcess:
    """A run in one process, on the device of that name; "auto" takes the GPU if there is one."""

    is_first, count = True, 1  # the first logs, draws and prints

    def __init__(self, device: str = "auto"):
        self.device = pick_device(device)

    def place(self, model: nn.Module, *, trained: bool) -> nn.Module:
        """The model where it is to compute."""
        return model.to(self.device)

    def share(self, parts: Sequence[T]) -> Sequence[T]:
        """The parts of a global batch that are this process's work."""
        return parts

    def gather(self, value: T) -> list[T]:
        """What every process has at this point, in their order; all wait for each other."""
        return [value]

    def clip_gradients(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale the gradient down to max_norm if it is longer; its length before."""
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    def path(self, folder: Path, name: str) -> Path:
        """Where the checkpoint of that name lies in a run's folder."""
        return folder / f"{name}.pt"

    def save(self, path: Path, state: dict[str, Any]) -> None:
        save_checkpoint(path, state)

    def load(self, path: Path, like: dict[str, Any]) -> dict[str, Any]:
        """The saved state; `like` is what the run has in its place."""
        return load_checkpoint(path)

    def remove(self, path: Path) -> None:
        """Forget a checkpoint, if there is one."""
        path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Wait until what is being written is on disk."""


def pick_device(name: str = "auto", option: str = "training.device=") -> torch.device:
    """The device of that name; "auto" takes a GPU if there is one. Of several GPUs, where the name has no number, the
    one that is this process's among those that torchrun started. Raises ValueError, which names the option."""
    found = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    if name == "auto":
        name = found[0]
    try:
        return torch.zeros((), device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name).device
    except (RuntimeError, AssertionError) as error:
        message = f"{option}{name} is not to be had on this machine; use {' or '.join(found)}."
        raise ValueError(message) from error
