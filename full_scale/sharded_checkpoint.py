"""Training checkpoints that many processes write together, each its own part: PyTorch's distributed checkpoints (DCP).

A checkpoint is a folder such as checkpoint_last.000200, with one safetensors file per process and state.json, which
holds everything that is no tensor and says where each tensor belongs. `checkpoint_last` itself is a symbolic link to
the newest whole folder, moved in one step: a kill at any moment leaves it on a whole one. Nothing is pickled, and any
number of processes can read what any other number wrote.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from checkpoint import atomic

STATE = "state.json"


class ShardedWriter:
    """Writes checkpoints in the background, one at a time. All processes make one and call it together."""

    def __init__(self):
        self.group = dist.new_group(backend="gloo")  # of its own: the messages of training go on meanwhile
        self.thread = ThreadPoolExecutor(1)
        self.writing: Future | None = None

    def save(self, link: Path, state: Mapping[str, Any]) -> None:
        """Copy the state and begin to write it; until it is whole, `link` points to the one before."""
        self.wait()
        folder = link.with_name(f"{link.name}.{state['step']:06d}")
        if link.exists() and link.resolve() == folder.resolve():
            return
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)  # a write that was cut short
        dist.barrier(self.group)
        tensors: dict[str, Tensor] = {}
        rest = take_apart(state, tensors)
        storage = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        written = dcp.async_save(tensors, storage_writer=storage, process_group=self.group)
        self.writing = self.thread.submit(publish, written, folder, link, rest)

    def wait(self) -> None:
        """Until nothing is being written any more. Raises what went wrong in the background."""
        if self.writing:
            writing, self.writing = self.writing, None
            writing.result()
        dist.barrier(self.group)  # the first process has moved the link


def publish(written: Future, folder: Path, link: Path, rest: Any) -> None:
    """When all parts are on disk, let the first process point the link to them and delete what it pointed to."""
    written.result()
    if dist.get_rank() != 0:
        return
    with atomic(folder / STATE) as temporary:
        temporary.write_text(json.dumps(rest) + "\n")
    with atomic(link) as temporary:
        temporary.symlink_to(folder.name)
    for older in link.parent.glob(f"{link.name}.[0-9]*"):
        if older != folder:
            shutil.rmtree(older)


def remove(link: Path) -> None:
    """Delete a checkpoint, if there is one."""
    if link.is_symlink():
        folder = link.resolve()
        link.unlink()
        shutil.rmtree(folder, ignore_errors=True)


def load(
    path: Path, like: Mapping[str, Tensor] | None = None, wanted: Callable[[str], bool] = lambda name: True
) -> dict:
    """A run's state. A tensor of the size of `like`[its name], or of that of the folder it is in, is shared out among
    the processes in the same way; all others are whole.

    wanted: which tensors to read. Raises ValueError for a folder that is no checkpoint or not whole.
    """
    if not (path / STATE).is_file():
        raise ValueError(f"{path} is no whole checkpoint, it has no {STATE}: take an earlier one.")
    skeleton = json.loads((path / STATE).read_text())
    storage = HuggingFaceStorageReader(str(path))
    stored = storage.read_metadata().state_dict_metadata
    tensors, like = {}, like or {}
    for name in filter(wanted, stored):
        size, dtype = stored[name].size, stored[name].properties.dtype
        model = like.get(name, like.get(name.rpartition("/")[0]))
        whole = model is None or model.shape != size
        tensors[name] = torch.empty(size, dtype=dtype) if whole else torch.empty_like(model, dtype=dtype)
    dcp.load(tensors, storage_reader=storage, no_dist=not dist.is_initialized())
    return put_together(skeleton, tensors)


def take_apart(state: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """The state, as JSON can hold it, with {"tensor": its name} for every tensor; they themselves go into `tensors`."""
    if isinstance(state, Tensor):
        tensors[name] = state
        return {"tensor": name}
    if isinstance(state, Mapping):
        return {key: take_apart(value, tensors, f"{name}/{key}" if name else str(key)) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [take_apart(value, tensors, f"{name}/{i}") for i, value in enumerate(state)]
    return state


def put_together(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `take_apart`; tensors that were not read are left out."""
    if isinstance(skeleton, list):
        return [put_together(value, tensors) for value in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    if set(skeleton) == {"tensor"}:
        return tensors.get(skeleton["tensor"])
    # JSON has no numbers for keys; parameters of an optimizer are numbered, and no other key is a number
    return {int(key) if key.isdigit() else key: put_together(value, tensors) for key, value in skeleton.items()}
