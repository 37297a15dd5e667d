"""Train and measure what an experiment lists, one record for each row and seed: python -m experiments.run two_by_two

    python -m experiments.run two_by_two --only own_last --seeds 0 1 --workers 2 [--again]
    python -m experiments.run                    # what is missing of all experiments

An experiment is experiments/NAME.yaml. Its rows are overrides for train.py, on top of what they have in common, or name
shipped weights that are only measured. A run trains in logs/experiments/NAME/ROW/seed_K, where it can be interrupted
and goes on, and leaves experiments/records/NAME/ROW_K.json; what has a record of these very settings is not run again.
A worker has one thread.
"""

import argparse
import base64
import csv
import json
import os
import shlex
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

from omegaconf import OmegaConf
from tqdm import tqdm

from experiments.ship import fingerprint

HERE = Path(__file__).parent
NOISE_SEED = 1000  # plus the training seed: no video of an experiment shares its noise with another
SIGNS = ("critic_flow_error_t0.50", "score_distance", "generator_grad_norm", "sample_ink")  # kept of a run's log


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

    def checkpoint(self, plan) -> str | None:
        """Which shipped weights this row is, if it is only measured."""
        row = plan.rows[self.row]
        return row if isinstance(row, str) else None

    def overrides(self, plan) -> list[str]:
        if self.checkpoint(plan):
            return []
        own = [f"training.seed={self.seed}", f"training.output_dir={self.folder}"]
        return [*plan.common, *plan.rows[self.row], *own]

    def is_done(self, plan) -> bool:
        """Whether there is a record of these settings and of the weights that ship now."""
        evaluation = OmegaConf.to_container(plan.evaluation)
        wanted = {"overrides": self.overrides(plan), "weights": self.weights(plan), "evaluation": evaluation}
        return self.record.exists() and wanted.items() <= json.loads(self.record.read_text()).items()

    def weights(self, plan) -> dict[str, str]:
        """Fingerprints of the shipped weights that this row starts from, or is."""
        own = self.checkpoint(plan)
        return {name: shipped(name) for name in ([own] if own else ["checkpoints/teacher", "checkpoints/init"])}


@lru_cache
def shipped(name: str) -> str:
    return fingerprint(f"{name}.safetensors")


def experiments() -> list[str]:
    """All of them, in the order in which the page shows them."""
    plans = {path.stem: OmegaConf.load(path) for path in sorted(HERE.glob("*.yaml"))}
    return sorted(plans, key=lambda name: plans[name].get("place", len(plans)))


def load_plan(experiment: str):
    """experiments/NAME.yaml. Raises ValueError for a name that is none."""
    path = HERE / f"{experiment}.yaml"
    if not path.exists():
        raise ValueError(f"There is no experiment {experiment}; known are {', '.join(experiments())}.")
    return OmegaConf.load(path)


def all_runs(experiment: str, plan, rows=(), seeds=()) -> list[Run]:
    """Seed by seed, so that an interrupted experiment has whole comparisons. Raises ValueError for an unknown row."""
    if unknown := set(rows) - set(plan.rows):
        raise ValueError(f"{experiment} has no row {', '.join(sorted(unknown))}; it has {', '.join(plan.rows)}.")
    return [Run(experiment, row, seed) for seed in seeds or plan.seeds for row in rows or plan.rows]


def execute(run: Run, plan) -> None:
    """Train, measure and write the record of one run, in this process."""
    import torch

    from checkpoint import atomic
    from run_folder import machine

    torch.set_num_threads(1)
    given = run.checkpoint(plan)
    checkpoint = Path(f"{given}.safetensors") if given else trained(run, plan)
    record = {
        "overrides": run.overrides(plan),
        "weights": run.weights(plan),
        **({} if given else costs(run)),
        "machine": machine(),
        "noise_seed": NOISE_SEED + run.seed,
        "evaluation": OmegaConf.to_container(plan.evaluation),
        **measure(checkpoint, plan, run),
    }
    with atomic(run.record) as temporary:
        temporary.write_text(json.dumps(record) + "\n")
    if run.row in plan.get("ships", []) and run.seed == plan.seeds[0]:
        ship_row(checkpoint, run)


def trained(run: Run, plan) -> Path:
    """The checkpoint of a run, after what its row has to prepare."""
    from settings import load_config
    from train import fit_once
    from train import main as train

    for command in plan.get("prepare", {}).get(run.row, []):
        script, *arguments = shlex.split(command)
        if script == "train.py":
            fit_once(load_config(arguments))
        else:
            subprocess.run([sys.executable, script, *arguments], check=True)
    return run.folder / "checkpoint_final.pt" if finished(run) else train(run.overrides(plan))


def costs(run: Run) -> dict:
    """Steps, seconds and network evaluations of a run, without what was prepared, and the signs that its log shows."""
    with (run.folder / "metrics.csv").open(newline="") as file:
        log = list(csv.DictReader(file))
    return {
        "steps": int(log[-1]["step"]),
        "seconds": round(len(log) * undisturbed(log), 1),
        "evaluations": sum(float(row["evaluations"]) for row in log),
        "log": {sign: [round(float(row[sign]), 5) if row.get(sign) else None for row in log] for sign in SIGNS},
    }


def undisturbed(log: list[dict]) -> float:
    """Seconds of a step while nothing else wanted the processor: nine in ten took longer."""
    ends = [0.0, *(float(row["seconds"]) for row in log)]
    return sorted(end - begin for begin, end in pairwise(ends))[len(log) // 10]


def ship_row(checkpoint: Path, run: Run) -> None:
    """The row's weights in bfloat16, with what has to be known of them to measure them again."""
    import torch

    from checkpoint import load_weights, save_weights

    loaded = load_weights(checkpoint)
    record = {"config": loaded.config, "record": run.record.name}
    save_weights(
        HERE / "weights" / run.experiment / f"{run.row}.safetensors", loaded.state_dict, record, torch.bfloat16
    )


def measure(checkpoint: Path, plan, run: Run) -> dict[str, dict]:
    """ "curves": every metric over the frame index, for each of the plan's ways to sample this row, and "sampling":
    what a frame costs in it; where the plan asks for stills, "stills" too: frames of the first videos."""
    found = {"curves": {}, "sampling": {}}
    for way, options in plan.evaluation.items():
        options = dict(options)
        if run.row in options.pop("rows", plan.rows):
            found["curves"][way], videos, found["sampling"][way] = measure_one(checkpoint, run.seed, **options)
            if "stills" in plan:
                found.setdefault("stills", pack(videos[: plan.stills.num_videos, :: plan.stills.every]))
    return found


def measure_one(
    checkpoint, seed, *, num_videos: int, num_frames: int, num_steps: int = 0, rollout=None, switch=None,
    from_frame: int = 0, **options,
):  # fmt: skip
    """Metrics of videos of all prompts, the videos, and what one of their frames cost: network evaluations and seconds
    of the processor. num_steps: of an ODE, instead of the student's few. rollout: what to change of the RolloutConfig.
    switch: see switching.py, instead of sample_videos. from_frame: where the metrics begin."""
    import metrics
    from experiments.switching import switched_videos
    from generate import load_model, sample_videos
    from ode_pairs import grid
    from run_folder import Evaluations

    if num_steps:
        options |= {"denoising_steps": grid(num_steps), "fresh_noise": 0.0}
    loaded = load_model(checkpoint)
    prompts = metrics.uniform_prompts(num_videos, loaded.world.num_digits)
    sampling = replace(loaded.sampling, rollout=replace(loaded.sampling.rollout, **(rollout or {})))
    loaded = replace(loaded, sampling=sampling)
    make_videos = partial(switched_videos, **switch) if switch else partial(sample_videos, **options)
    evaluations, begin = Evaluations([loaded.model]), time.process_time()
    videos = make_videos(loaded, prompts, num_frames, seed=NOISE_SEED + seed)
    seconds, frames = time.process_time() - begin, num_videos * num_frames
    curves = metrics.examiner(loaded.world)(videos[:, from_frame:], prompts)
    curves = {name: [round(x, 4) for x in curve] for name, curve in curves.items()}
    return curves, videos, {"evaluations": evaluations.take() / frames, "seconds": round(seconds / frames, 5)}


def pack(videos) -> dict:
    """Videos as text, to draw them from a record."""
    from generate import to_pixels

    pixels = to_pixels(videos)
    return {"shape": list(pixels.shape), "zlib": base64.b64encode(zlib.compress(pixels.tobytes(), 9)).decode()}


def unpack(packed: dict):
    """What `pack` was given, in [-1, 1]."""
    import torch

    pixels = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(packed["zlib"]))), dtype=torch.uint8)
    return pixels.view(packed["shape"]) / 127.5 - 1


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
    parser.add_argument("experiment", nargs="?", help="by default all")
    parser.add_argument("--only", nargs="*", default=[], metavar="ROW")
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time; 0: one, in here")
    parser.add_argument("--again", action="store_true", help="train anew what has a record")
    args = parser.parse_args()
    for experiment in [args.experiment] if args.experiment else experiments():
        plan = load_plan(experiment)
        runs = all_runs(experiment, plan, args.only, args.seeds)
        if args.again:
            forget(runs, plan)
        run_all([run for run in runs if not run.is_done(plan)], plan, args.workers)


def run_all(missing: list[Run], plan, workers: int) -> None:
    """Exits with an error if a run fails, when the others are done."""
    if not missing:
        return
    if workers == 0:
        for run in missing:
            execute(run, plan)
        return
    with ThreadPoolExecutor(workers) as pool:
        codes = list(tqdm(pool.map(in_process, missing), total=len(missing), desc=missing[0].experiment, unit="run"))
    if failed := [run for run, code in zip(missing, codes, strict=True) if code]:
        sys.exit("Failed: " + ", ".join(f"{run.folder}.log" for run in failed))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"experiments.run: {error}")
