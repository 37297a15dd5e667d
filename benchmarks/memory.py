"""Peak memory of a Self-Forcing step against the length of the rollout."""

from collections.abc import Iterator

from benchmarks.measure import peak_mib
from benchmarks.plan import Size
from benchmarks.steps import self_forcing, settings
from tiny_causal_wan import exact_attention


def measure_memory(size: Size, lengths: tuple[int, ...], gradient_frames: int) -> Iterator[tuple[str, list[float]]]:
    """Peak MiB at every length, with a gradient through the last gradient_frames frames, and through all of them."""
    rules = {
        f"gradient of the last {gradient_frames} frames": [gradient_frames] * len(lengths),
        "gradient of all frames": lengths,
    }
    for name, counts in rules.items():
        configs = [settings(length, count) for length, count in zip(lengths, counts, strict=True)]
        yield name, [step_peak_mib(size, config) for config in configs]


def step_peak_mib(size: Size, config) -> float:
    step = self_forcing(size, "fp32", exact_attention, config)
    step()  # the optimizers allocate their state once
    return peak_mib(step)
