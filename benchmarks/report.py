"""Results as Markdown."""

from collections.abc import Iterable, Sequence

TITLE = """# Benchmarks

Written by `make bench`; `results.json` holds the same numbers. Machine: {cores} cores, {threads} threads, \
torch {torch}, {processor}. Seconds are medians and mean something only next to this machine's own peak; on a busy \
machine all of them are too large.
"""
PEAK = """## The machine's own peak

GFLOP/s of the product of two square matrices, the best of a few. The best of a row is the 100 % of the next table.
"""
STEPS = """## Steps

Tokens per second count the tokens of the clips that a step trains on or makes, once. FLOPs are those of the matrix \
products, counted by `torch.utils.flop_counter` with attention spelled out. Everything else that a step does \
(norms, rotations, softmax, optimizer) costs time and counts for nothing. bf16 is autocast with fp32 master weights, \
held against the bf16 peak. Sizes: {sizes}. A Self-Forcing step is one generator update and {critic_steps} critic \
updates.
"""
STREAM = """## Time per block

Milliseconds per block of {frames_per_block} frames, {stream_batch} videos at once, against the index of its first \
frame; the last column is the last quarter of the blocks over the second. Without a cache, the past is computed again \
at every denoising step.
"""
MEMORY = """## Peak memory of a Self-Forcing step

MiB allocated at the worst moment, beyond weights and optimizer state, against the length of the rollout. A gradient \
through the last frames only, which is how the course trains, should not cost more when the rollout is longer.
"""


def markdown(results: dict) -> str:
    """The whole report."""
    facts = results | {"sizes": "; ".join(results["sizes"])}
    sections = [
        (TITLE.format(**results["machine"]), ""),
        (PEAK, peak_table(results["gemm_gflops"])),
        (STEPS.format(**facts), step_table(results["steps"])),
        (STREAM.format(**facts), stream_table(results["first_frame"], results["seconds_per_block"])),
        (MEMORY, memory_table(results["memory_frames"], results["peak_mib"])),
    ]
    return "\n".join(text + ("\n" + rows if rows else "") for text, rows in sections)


def peak_table(gflops: dict) -> str:
    sides = next(iter(gflops.values()))
    return table(["", *sides], [[name, *(f"{x:.0f}" for x in row.values())] for name, row in gflops.items()])


def step_table(steps: Iterable[dict]) -> str:
    header = ["work", "size", "precision", "ms", "tokens/s", "GFLOP", "of peak"]
    rows = [
        [
            *(step["work"], step["size"], step["precision"], f"{1000 * step['seconds']:.0f}"),
            *(f"{step['tokens_per_second']:.0f}", f"{step['gflop']:.1f}", f"{step['fraction_of_peak']:.0%}"),
        ]
        for step in steps
    ]
    return table(header, rows)


def stream_table(first_frame: Sequence[int], seconds: dict) -> str:
    shown = range(0, len(first_frame), max(1, len(first_frame) // 7))
    rows = [
        [way, *(f"{1000 * times[i]:.0f}" for i in shown), f"{growth(times):.2f}x"] for way, times in seconds.items()
    ]
    return table(["first frame", *(str(first_frame[i]) for i in shown), "growth"], rows)


def growth(times: Sequence[float]) -> float:
    """The last quarter of the blocks over the second, where a window is already full."""
    quarter = len(times) // 4
    return sum(times[-quarter:]) / sum(times[quarter : 2 * quarter])


def memory_table(num_frames: Sequence[int], peak_mib: dict) -> str:
    rows = [[rule, *(f"{mib:.0f}" for mib in peaks)] for rule, peaks in peak_mib.items()]
    return table(["frames", *map(str, num_frames)], rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: words to the left, numbers to the right."""
    rows = [list(row) for row in rows]
    numeric = [all(row[i][:1].isdigit() for row in rows) for i in range(len(header))]
    rule = ["---:" if right else "---" for right in numeric]
    return "".join("| " + " | ".join(row) + " |\n" for row in (header, rule, *rows))
