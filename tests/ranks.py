"""Several processes for a test: `results = on_ranks(2, function, *arguments)`."""

import os
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

# Autograd decides at its first backward whether it needs threads, and with threads a copy of this process could not
# compute gradients. Later, when flex_attention has been compiled, it believes that it does.
torch.ones(1, requires_grad=True).sum().backward()


def on_ranks(count, function, *arguments, folder):
    """What function(rank, *arguments) returns in each of `count` processes of one gloo group, in their order.

    A process is a copy of this one: nothing is imported anew. folder: an empty one, for what they tell each other.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_child, args=(rank, count, function, arguments, folder)) for rank in range(count)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
        child.kill()
    told = [torch.load(path) if (path := folder / f"{rank}.pt").exists() else None for rank in range(count)]
    for rank, result in enumerate(told):
        assert result is not None, f"process {rank} of {count} ended without a word, code {children[rank].exitcode}"
        assert result.get("error") is None, f"process {rank} of {count}:\n{result['error']}"
    return [result["value"] for result in told]


def sharded_how():
    """A list that grows by what full_scale.parallelize gives to fully_shard; in a process of on_ranks alone."""
    from full_scale import parallelize

    given, shard = [], parallelize.fully_shard

    def watch(module, **how):
        given.append(how)
        return shard(module, **how)

    parallelize.fully_shard = watch
    return given


def _child(rank, count, function, arguments, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    result = {}
    try:
        dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), count), rank=rank, world_size=count)
        result["value"] = function(rank, *arguments)
    except BaseException:
        result["error"] = traceback.format_exc()
    torch.save(result, folder / f"{rank}.pt")
    os._exit(0)
