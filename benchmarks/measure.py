"""Clocks and counters: medians, FLOPs, the machine's own GEMM peak, peak memory."""

import statistics
import time
from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """The median of `repeats` runs, after one that is not counted."""
    work()
    return statistics.median(seconds(work) for _ in range(repeats))


def gemm_gflops(side: int, precision: str, repeats: int) -> float:
    """GFLOP/s of the best of `repeats` products of two square matrices: what this machine can do at all."""
    a, b = (torch.randn(side, side).to(PRECISIONS[precision]) for _ in range(2))
    torch.mm(a, b)
    return 2e-9 * side**3 / min(seconds(lambda: torch.mm(a, b)) for _ in range(repeats))


def count_gflop(work: Callable[[], object]) -> float:
    """GFLOP of every matrix product in `work`, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


def peak_mib(work: Callable[[], object]) -> float:
    """MiB that `work` holds at its worst moment beyond what was there before: the sum of every allocation and release.

    Unlike the resident set, it is the same number on a busy machine and on an idle one; the scratch memory of MKL and
    oneDNN is not in it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events)) / 2**20
