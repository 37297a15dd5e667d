"""Train and measure what an experiment lists, one record for each row and seed: python -m experiments.run two_by_two

    python -m experiments.run two_by_two --only own_last --seeds 0 1 --workers 2 [--again]

An experiment is experiments/NAME.yaml: rows of overrides for train.py, on top of what they have in common. A run
trains in logs/experiments/NAME/ROW/seed_K, where it can be interrupted and goes on, and leaves
experiments/records/NAME/ROW_K.json; what has a record of these very settings is not run again. A worker has one thread.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from omegaconf import OmegaConf
from tqdm import tqdm

from experiments.ship import fingerprint

HERE = Path(__file__).parent
NOISE_SEED = 1000  # plus the training seed: no video of an experiment shares its noise with another


@dataclass(frozen=True)
class Run:
    """One row of an experiment with one training seed."""

    experiment: str
    row: str
    seed: int

    @property
    def folder(self) -> Path:
        return Path("logs/experiments") / self.experiment / self.row / f"seed_{self.seed}"

    @property
    def record(self) -> Path:
        return HERE / "records" / self.experiment / f"{self.row}_{self.seed}.json"

    def overrides(self, plan) -> list[str]:
        own = [f"training.seed={self.seed}", f"training.output_dir={self.folder}"]
        return [*plan.common, *plan.rows[self.row], *own]

    def is_done(self, plan) -> bool:
        """Whether there is a record of these settings and of the weights that ship now."""
        evaluation = OmegaConf.to_container(plan.evaluation)
        wanted = {"overrides": self.overrides(plan), "weights": weights(), "evaluation": evaluation}
        return self.record.exists() and wanted.items() <= json.loads(self.record.read_text()).items()


@lru_cache
def weights() -> dict[str, str]:
    """Which weights the rows start from."""
    return {name: fingerprint(f"checkpoints/{name}.safetensors") for name in ("teacher", "init")}


def load_plan(experiment: str):
    """experiments/NAME.yaml. Raises ValueError for a name that is none."""
    path = HERE / f"{experiment}.yaml"
    if not path.exists():
        known = ", ".join(sorted(each.stem for each in HERE.glob("*.yaml")))
        raise ValueError(f"There is no experiment {experiment}; known are {known}.")
    return OmegaConf.load(path)


def all_runs(experiment: str, plan, rows=(), seeds=()) -> list[Run]:
    """Seed by seed, so that an interrupted experiment has whole comparisons. Raises ValueError for an unknown row."""
    if unknown := set(rows) - set(plan.rows):
        raise ValueError(f"{experiment} has no row {', '.join(sorted(unknown))}; it has {', '.join(plan.rows)}.")
    return [Run(experiment, row, seed) for seed in seeds or plan.seeds for row in rows or plan.rows]


def execute(run: Run, plan) -> None:
    """Train, measure and write the record of one run, in this process."""
    import csv

    import torch

    from checkpoint import atomic, load_checkpoint
    from run_folder import machine
    from train import main as train

    torch.set_num_threads(1)
    overrides = run.overrides(plan)
    checkpoint = train(overrides) if not finished(run) else run.folder / "checkpoint_final.pt"
    state = load_checkpoint(checkpoint)
    with (run.folder / "metrics.csv").open(newline="") as file:
        evaluations = sum(float(row["evaluations"]) for row in csv.DictReader(file))

    record = {
        "overrides": overrides,
        "weights": weights(),
        "steps": state["step"],
        "seconds": round(state["seconds"]),
        "evaluations": evaluations,
        "machine": machine(),
        "noise_seed": NOISE_SEED + run.seed,
        "evaluation": OmegaConf.to_container(plan.evaluation),
        "curves": measure(checkpoint, plan, run),
    }
    with atomic(run.record) as temporary:
        temporary.write_text(json.dumps(record) + "\n")


def measure(checkpoint: Path, plan, run: Run) -> dict[str, dict[str, list[float]]]:
    """Every metric over the frame index, for each of the plan's ways to sample this row."""
    ways = {way: dict(options) for way, options in plan.evaluation.items()}
    return {
        way: measure_one(checkpoint, run.seed, **options)
        for way, options in ways.items()
        if run.row in options.pop("rows", plan.rows)
    }


def measure_one(checkpoint: Path, seed: int, *, num_videos: int, num_frames: int, num_steps: int = 0, **options):
    """Metrics of videos of all prompts; num_steps: of an ODE, instead of the student's few."""
    import metrics
    from generate import load_model, sample_videos
    from ode_pairs import grid

    if num_steps:
        options |= {"denoising_steps": grid(num_steps), "fresh_noise": 0.0}
    loaded, prompts = load_model(checkpoint), metrics.uniform_prompts(num_videos)
    judge, other = (metrics.load_classifier(second=second) for second in (False, True))
    videos = sample_videos(loaded, prompts, num_frames, seed=NOISE_SEED + seed, **options)
    curves = metrics.evaluate(videos, prompts, world=loaded.world, classifier=judge)
    seen = metrics.digit_accuracy(metrics.measure(videos, other), metrics.one_digit(prompts)[0])
    curves["second_opinion"] = seen.mean(0).tolist()
    return {name: [round(x, 4) for x in curve] for name, curve in curves.items()}


def finished(run: Run) -> bool:
    """Whether training is done and only the measuring is missing."""
    config = run.folder / "config.yaml"
    if not (run.folder / "checkpoint_final.pt").exists() or not config.exists():
        return False
    from settings import load_config

    plan = load_plan(run.experiment)
    return config.read_text() == OmegaConf.to_yaml(load_config(run.overrides(plan)), resolve=True)


def forget(runs: list[Run], plan) -> None:
    """What has a record is to be trained anew: without its record, and its finished folder moved aside."""
    for run in runs:
        if run.record.exists():
            run.record.unlink()
            if finished(run):
                number = 1
                while (aside := run.folder.with_name(f"{run.folder.name}.{number}")).exists():
                    number += 1
                run.folder.rename(aside)


def in_process(run: Run) -> int:
    """The same in a process of its own with one thread; its output goes to the run's log."""
    run.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "experiments.run", run.experiment, "--only", run.row, "--seeds", str(run.seed)]
    with run.folder.with_suffix(".log").open("a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run([*command, "--workers", "0"], stdout=log, stderr=log, env=environment).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("experiment")
    parser.add_argument("--only", nargs="*", default=[], metavar="ROW")
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time; 0: one, in here")
    parser.add_argument("--again", action="store_true", help="train anew what has a record")
    args = parser.parse_args()
    plan = load_plan(args.experiment)
    runs = all_runs(args.experiment, plan, args.only, args.seeds)
    if args.again:
        forget(runs, plan)
    missing = [run for run in runs if not run.is_done(plan)]
    if args.workers == 0:
        for run in missing:
            execute(run, plan)
        return
    with ThreadPoolExecutor(args.workers) as pool:
        codes = list(tqdm(pool.map(in_process, missing), total=len(missing), desc=args.experiment, unit="run"))
    if failed := [run for run, code in zip(missing, codes, strict=True) if code]:
        sys.exit("Failed: " + ", ".join(f"{run.folder}.log" for run in failed))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"experiments.run: {error}")
