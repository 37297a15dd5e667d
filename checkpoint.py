"""Checkpoints: one schema, written whole or not at all, read without running any code in them.

Two forms hold the same things. A training checkpoint (`.pt`) can be resumed:

    generator_state_dict, critic_state_dict, ema_state_dict, optimizer_state_dict, critic_optimizer_state_dict,
    rng_state, step, seconds, training_type, config, command, machine

Shipped weights (`.safetensors`) are one network, with the config in the file's header and, for people, in a `.json`
beside it. Half-precision weights are widened on loading: master weights are float32.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

StateDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class Weights:
    """One network out of a checkpoint: its parameters, the config it was trained with, and the file."""

    state_dict: StateDict
    config: dict = field(default_factory=dict)
    path: Path | None = None


@contextmanager
def atomic(path: str | Path):
    """A temporary path that takes the place of `path`, flushed to disk, when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid4().hex  # a process's number is not: on a shared disk, another machine's or container's has it too
    temporary = path.with_name(f".{path.name}.{unique}.tmp")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: str | Path, state: Mapping) -> None:
    """Write a training checkpoint so that a kill at any moment leaves either the old file or the new one."""
    with atomic(path) as temporary:
        torch.save(dict(state), temporary)


def load_checkpoint(path: str | Path) -> dict:
    """Read a training checkpoint on the CPU. Raises ValueError for a missing, truncated or foreign file."""
    path = _existing(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each fail in their own way on a damaged file
        raise ValueError(f"{path} cannot be read: it is truncated, or no checkpoint of train.py.") from error
    if not isinstance(state, dict) or "generator_state_dict" not in state:
        raise ValueError(f"{path} holds no generator_state_dict: it is not a checkpoint of train.py.")
    return state


def load_weights(path: str | Path, which: str = "ema") -> Weights:
    """The generator in a `.safetensors` or `.pt` file; "ema" falls to "raw" where the file has no average.

    Raises ValueError for a missing, damaged or foreign file.
    """
    if which not in ("ema", "raw"):
        raise ValueError(f"weights must be 'ema' or 'raw', got {which!r}.")
    if Path(path).suffix == ".safetensors":
        return _load_safetensors(_existing(path))
    state = load_checkpoint(path)
    averaged = state.get("ema_state_dict") if which == "ema" else None
    return Weights(averaged or state["generator_state_dict"], state.get("config", {}), Path(path))


def fingerprint(path: str | Path) -> str:
    """A name for weights, whatever file holds them: a hash of the averaged parameters in half precision."""
    digest = hashlib.sha256()
    for name, x in sorted(load_weights(locate(path), "ema").state_dict.items()):
        digest.update(name.encode() + x.half().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_weights(path: str | Path, state_dict: StateDict, record: Mapping, dtype=torch.float16) -> None:
    """Ship one network: `.safetensors` with record["config"] in its header, and the record as `.json` beside it."""
    path = Path(path)
    tensors = {name: x.detach().to(dtype).contiguous() for name, x in state_dict.items()}
    with atomic(path) as temporary:
        temporary.write_bytes(to_bytes(tensors, metadata={"config": json.dumps(record.get("config", {}))}))
    with atomic(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")


def fill(model: nn.Module, state_dict: StateDict, source: str | Path) -> None:
    """Copy parameters into the model. Raises ValueError that names missing, unexpected and misshaped keys."""
    own = model.state_dict()
    faults = {
        "missing": [name for name in own if name not in state_dict],
        "unexpected": [name for name in state_dict if name not in own],
        "misshaped": [
            f"{name} {tuple(state_dict[name].shape)} for {tuple(x.shape)}"
            for name, x in own.items()
            if name in state_dict and state_dict[name].shape != x.shape
        ],
    }
    found = [f"{kind}: {_few(names)}" for kind, names in faults.items() if names]
    if found:
        raise ValueError(f"{source} does not fit the model, {'; '.join(found)}. Check the model's config.")
    model.load_state_dict(state_dict)


class EMA:
    """Exponential moving average of a model's parameters, in float32: from `start_step` on, decay d.

    Before the start there is no average, and `state_dict` is None.
    """

    def __init__(self, model: nn.Module, decay: float, start_step: int = 0):
        self.model, self.decay, self.start_step = model, decay, start_step
        self.shadow: dict[str, Tensor] | None = None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after `step` updates."""
        if step < self.start_step:
            return
        now = {name: p.detach().float() for name, p in self.model.named_parameters()}
        if self.shadow is None:
            self.shadow = {name: p.clone() for name, p in now.items()}
        else:
            torch._foreach_lerp_(list(self.shadow.values()), list(now.values()), 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor] | None:
        return self.shadow

    def load_state_dict(self, shadow: StateDict | None) -> None:
        device = next(self.model.parameters()).device
        self.shadow = shadow and {name: x.to(device, copy=True) for name, x in shadow.items()}


def _load_safetensors(path: Path) -> Weights:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors (truncated or corrupt): {error}") from error
    return Weights({name: x.float() for name, x in tensors.items()}, json.loads(metadata.get("config", "{}")), path)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        moved = list(path.parent.parent.glob(f"{path.parent.name}.[0-9]*/{path.name}"))  # see run_folder.py
        latest = max(moved, key=lambda found: found.stat().st_mtime, default=None)
        hint = f"an earlier run's is {latest}" if latest else "train.py writes logs/training/checkpoint_final.pt"
        raise ValueError(f"There is no checkpoint {path}; {hint}.")
    return path


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _flush(path: Path) -> None:
    """Wait until the file, or the folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def locate(path: str | Path) -> Path:
    """A path as the user gave it or, if there is nothing there, the same path inside this repository."""
    here = Path(__file__).parent / path
    return here if not Path(path).exists() and here.exists() else Path(path)
