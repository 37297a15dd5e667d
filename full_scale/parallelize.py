"""A run shared out among processes with FSDP2: what train.py asks of OneProcess, for many.

The algorithm knows nothing of it. Every process computes its part of the global batch with the whole model, of which it
keeps a shard and gathers a layer at a time; gradients are averaged. Neighbours may share the tokens of a sample, too.
All randomness is a function of the sample's number in the global batch, so that any number of processes trains the same
model, up to rounding.
"""

import atexit
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from full_scale import sharded_checkpoint
from full_scale.sharded_checkpoint import ShardedWriter
from full_scale.ulysses import share_sequence
from processes import pick_device
from tiny_causal_wan import TinyCausalWanModel

T = TypeVar("T")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
METHODS = ("remember",)  # besides forward, what is called on a model and needs its parameters
COMPILATIONS = 64  # of the layers: PyTorch's limit of 8, for all networks together, is passed in the first step


class FullySharded:
    """One of the processes that torchrun starts (or the only one).

    precision: what the networks compute in, "bf16" or "fp32"; what is trained, its average and the sum of gradients are
    fp32. processes_per_replica: shards are shared out among so many neighbours, such as the GPUs of one machine, and
    each such group holds a whole model (hybrid sharding); None: among all. checkpoint_activations keeps of a layer only
    its input and computes it again for the gradient; of frozen networks too, since SiD's passes through the teacher.
    offload keeps parameters, gradients and optimizer in the memory of the CPU. compile: each layer, with torch.compile.
    sequence_parallel: so many neighbours work on the same samples, each on a share of the tokens
    (full_scale/ulysses.py); a network that is no Wan transformer, such as a text encoder or a discriminator, is
    computed whole by each. Raises ValueError for what does not fit together.
    """

    def __init__(
        self,
        device: str = "auto",
        *,
        precision: str = "bf16",
        processes_per_replica: int | None = None,
        checkpoint_activations: bool = True,
        offload: bool = False,
        compile: bool = False,
        sequence_parallel: int = 1,
    ):
        if precision not in PRECISIONS:
            raise ValueError(f"processes.precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
        self.device = join(device)
        self.rank, self.world_size, self.sequence_parallel = dist.get_rank(), dist.get_world_size(), sequence_parallel
        self.is_first = self.rank == 0
        self.checkpoint_activations, self.compile = checkpoint_activations, compile
        self.mesh = make_mesh(self.device.type, self.world_size, processes_per_replica)
        self.neighbours = make_neighbours(self.device.type, self.world_size, sequence_parallel)
        self.count = self.world_size // sequence_parallel  # among so many a batch is shared out
        # Inputs are not cast: the model does it where it wants to, and a time in bf16 would be another time. What a
        # model keeps beside its layers would by default stay whole after a call; zero_grad between a call without
        # gradient and the next would then clear the gradient of the copy, and the old one would be added to the new.
        self.sharding = {
            "mesh": self.mesh,
            "reshard_after_forward": True,
            "mp_policy": MixedPrecisionPolicy(PRECISIONS[precision], torch.float32, cast_forward_inputs=False),
            **({"offload_policy": CPUOffloadPolicy(pin_memory=self.device.type == "cuda")} if offload else {}),
        }
        self.writer = ShardedWriter()
        self.group = dist.new_group(backend="gloo")  # not the writer's, whose thread sends messages of its own

    def place(self, model: nn.Module, *, trained: bool) -> nn.Module:
        """The same model, every layer of it and what is left sharded. What is trained becomes float32 on the way; what
        is frozen the dtype that it computes in, for float32 would take twice the memory and say the same.

        In this order, from the layers up: compilation, sequence, recomputation, sharding. Recomputation inside what is
        compiled, as is usual, would leave a layer uncompiled as soon as anything in it cannot be: flex_attention, or
        the noting of how tokens lie. Layers are wrapped at their forward, so that no parameter changes its name.
        """
        dtype = torch.float32 if trained else self.sharding["mp_policy"].param_dtype
        for layer in layers(model) if self.compile else ():
            layer.forward = torch.compile(layer.forward, recompile_limit=COMPILATIONS)
        if self.neighbours and isinstance(model, TinyCausalWanModel):
            share_sequence(model, self.neighbours)
        for layer in layers(model):
            if self.checkpoint_activations:  # without a gradient it is a plain call
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
            layer.compile = compiled_before_sharded
            fully_shard(layer.to(dtype), **self.sharding)
        fully_shard(model.to(dtype), **self.sharding)
        for method in METHODS:
            if hasattr(model, method):
                register_fsdp_forward_method(model, method)
        return model

    def share(self, parts: Sequence[T]) -> Sequence[T]:
        """Every count-th part of a global batch, from this process's own number on: all have equally many.

        Neighbours that share their sequences have one number, and the same parts.
        """
        if len(parts) % self.count:
            several = f"groups of {self.sequence_parallel} processes" if self.sequence_parallel > 1 else "processes"
            raise ValueError(
                f"A batch in {len(parts)} parts cannot be shared out among {self.count} {several}: "
                "set training.batch_size or training.micro_batch_size so that the number of parts is a multiple of it."
            )
        return parts[self.rank // self.sequence_parallel :: self.count]

    def gather(self, value: T) -> list[T]:
        """What every process has at this point, in their order; all wait for each other.

        Of neighbours that share their sequences only the first is heard: what they report is the same, and is one
        report.
        """
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values[:: self.sequence_parallel]

    def clip_gradients(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale the whole gradient down to max_norm if it is longer; its length before."""
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm).full_tensor()

    def path(self, folder: Path, name: str) -> Path:
        """Where the checkpoint of that name lies in a run's folder: a link to a folder."""
        return folder / name

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """Begin to write; training goes on meanwhile."""
        self.writer.save(path, state)

    def load(self, path: Path, like: dict[str, Any]) -> dict[str, Any]:
        """The saved state, shared out as `like`, the state that the run has, is."""
        return sharded_checkpoint.load(path, dict(shared_out(like)))

    def remove(self, path: Path) -> None:
        """Forget a checkpoint, if there is one."""
        if self.is_first:
            sharded_checkpoint.remove(path)

    def finish(self) -> None:
        """Wait until what is being written is on disk."""
        self.writer.wait()


def compiled_before_sharded(**options) -> None:
    """What a placed layer's own `compile` says, which training.compile calls."""
    raise ValueError(
        "Layers that are shared out among processes are compiled before that: leave training.compile=false and set "
        "processes.compile=true."
    )


def join(device: str) -> torch.device:
    """Become one of the processes that torchrun started; without it, a group of one. The device that is this one's."""
    if ":" in device and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"training.device={device} is one for all processes: leave the number away.")
    found = pick_device(device)
    kind = found.type
    if kind == "cuda":
        torch.cuda.set_device(found)
    if not dist.is_initialized():
        check_restarts()
        alone = {} if "RANK" in os.environ else {"rank": 0, "world_size": 1, "store": dist.HashStore()}
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", **alone)
        atexit.register(leave)
    return found


def check_restarts() -> None:
    """Raise ValueError where torchrun would start anew processes that then meet the addresses of those before them, and
    hang (PyTorch's issue 135712)."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            "Processes that torchrun restarts may hang while all share its store: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, or leave out --max_restarts."
        )


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def make_mesh(kind: str, count: int, processes_per_replica: int | None) -> DeviceMesh:
    """All processes in one row, or in rows that each hold a whole model."""
    own = processes_per_replica or count
    if own < 1 or count % own:
        raise ValueError(f"processes.processes_per_replica={own} must divide the number of processes, {count}.")
    if own == count:
        return init_device_mesh(kind, (count,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (count // own, own), mesh_dim_names=("replicate", "shard"))


def make_neighbours(kind: str, count: int, together: int) -> ProcessGroup | None:
    """Of all processes, in groups of so many neighbours, the group of this one; None if it is alone."""
    if together < 1 or count % together:
        raise ValueError(f"processes.sequence_parallel={together} must divide the number of processes, {count}.")
    if together == 1:
        return None
    mesh = init_device_mesh(kind, (count // together, together), mesh_dim_names=("samples", "sequence"))
    return mesh.get_group("sequence")


def layers(model: nn.Module) -> Sequence[nn.Module]:
    """The model's longest list of modules: what is gathered one at a time."""
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len, default=())


def shared_out(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """For every tensor that a checkpoint may have, by its name in there, the parameter that it is shared out like."""
    for model, average, optimizers in (
        ("generator_state_dict", "ema_state_dict", "optimizer_state_dict"),
        ("critic_state_dict", None, "critic_optimizer_state_dict"),
    ):
        parameters = state[model] or {}
        for kind in filter(None, (model, average)):
            yield from ((f"{kind}/{name}", x) for name, x in parameters.items())
        for i, optimizer in enumerate(state[optimizers]):
            for group in optimizer["param_groups"]:
                for number, name in zip(group["params"], group["param_names"], strict=True):
                    yield f"{optimizers}/{i}/state/{number}", parameters[name]
