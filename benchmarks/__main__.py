"""Measure speed and memory: python -m benchmarks [--fast] [--json PATH]

Writes the numbers to PATH and the tables to README.md beside it. They mean something on a machine that does nothing
else; --fast only shows that everything runs.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.measure import PRECISIONS, gemm_gflops
from benchmarks.memory import measure_memory
from benchmarks.plan import FAST, FULL, Plan
from benchmarks.report import markdown
from benchmarks.steps import WORK, measure_steps, settings
from benchmarks.streaming import WAYS, measure_stream
from checkpoint import atomic
from run_folder import keep_freed_memory, machine

FOLDER = Path(__file__).parent


def measure(plan: Plan) -> dict:
    """All results; report.py says what they mean."""
    keep_freed_memory()  # as train.py does
    small = plan.sizes[0]
    course = settings(small.num_frames, small.num_frames)
    frames_per_block = course.rollout.frames_per_block
    gemms = [(precision, side) for precision in PRECISIONS for side in plan.gemm_sizes]
    gflops = {precision: {} for precision in PRECISIONS}
    for precision, side in tqdm(gemms, desc="GEMM peak"):
        gflops[precision][str(side)] = gemm_gflops(side, precision, plan.repeats)
    compiled = plan.compiled and bool(shutil.which("c++"))
    rows = (row for size in plan.sizes for row in measure_steps(size, plan.repeats, compiled))
    steps = list(tqdm(rows, total=len(plan.sizes) * (len(WORK) + compiled) * len(PRECISIONS), desc="steps"))
    for step in steps:
        step["fraction_of_peak"] = step["gflop"] / step["seconds"] / max(gflops[step["precision"]].values())
    stream = measure_stream(small, plan.num_blocks, plan.stream_batch, plan.repeats)
    memory = measure_memory(small, plan.memory_frames, plan.gradient_frames)
    return {
        "machine": machine(),
        "sizes": [size.describe() for size in plan.sizes],
        "repeats": plan.repeats,
        "critic_steps": course.critic_steps,
        "frames_per_block": frames_per_block,
        "stream_batch": plan.stream_batch,
        "gemm_gflops": gflops,
        "steps": steps,
        "first_frame": [block * frames_per_block for block in range(plan.num_blocks)],
        "seconds_per_block": dict(tqdm(stream, total=len(WAYS), desc="time per block")),
        "memory_frames": list(plan.memory_frames),
        "peak_mib": dict(tqdm(memory, total=2, desc="peak memory")),
    }


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="miniature sizes, some seconds: does it run?")
    parser.add_argument("--json", type=Path, help="where results go; by default benchmarks/, outputs/ with --fast")
    args = parser.parse_args(arguments)
    path = args.json or (Path("outputs/benchmarks") if args.fast else FOLDER) / "results.json"
    results = measure(FAST if args.fast else FULL)
    text = markdown(results)
    for target, content in {path: json.dumps(results, indent=1) + "\n", path.with_name("README.md"): text}.items():
        with atomic(target) as temporary:
            temporary.write_text(content)
    print(text)
    return path


if __name__ == "__main__":
    main()
