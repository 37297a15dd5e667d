"""Train and measure what an experiment lists, one record for each row and seed: python -m experiments.run two_by_two

    python -m experiments.run two_by_two --only own_last --seeds 0 1 --workers 2 [--again]
    python -m experiments.run                    # what is missing of all experiments

An experiment is experiments/NAME.yaml. Its rows are overrides for train.py, on top of what they have in common, or name
shipped weights, or "real" held-out clips, that are only measured: their seeds are of noise alone. A run trains in
logs/experiments/NAME/ROW/seed_K, where it can be interrupted and goes on, and leaves a record,
experiments/records/NAME/ROW_K.json; what has one of these very settings is not run again. A worker has one thread.
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

import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from tqdm import tqdm

from checkpoint import atomic, fingerprint, load_weights, save_weights
from moving_mnist import WorldConfig
from run_folder import Evaluations, holds, machine

HERE = Path(__file__).parent
NOISE_SEED = 1000  # plus the training seed: no video of an experiment shares its noise with another
REAL = "real"  # the row of clips that nobody made: the ceiling of every metric
LEARNS_BY = ("model", "world", "training", "scheduler", "generator", "real_score", "fake_score", "data", "objective")
WITHOUT_EFFECT = [f"training.{x}" for x in ("output_dir", "device", "checkpoint_every", "sample_every", "num_previews")]
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

    def given(self, plan) -> str | None:
        """Which shipped weights this row is, or REAL, if it is only measured."""
        row = plan.rows[self.row]
        return row if isinstance(row, str) else None

    def overrides(self, plan) -> list[str]:
        if self.given(plan):
            return []
        own = [f"training.seed={self.seed}", f"training.output_dir={self.folder}"]
        return [*plan.common, *plan.rows[self.row], *own]

    def evaluation(self, plan) -> dict[str, dict]:
        """In which ways this row is sampled: name -> options of `measure_one`."""
        ways = OmegaConf.to_container(plan.evaluation)
        return {way: options for way, options in ways.items() if self.row in options.pop("rows", [self.row])}

    def prepare(self, plan) -> list[str]:
        """The commands that make what this row begins with."""
        return list(plan.get("prepare", {}).get(self.row, []))

    def is_done(self, plan) -> bool:
        """Whether there is a record of these settings and of the weights that ship now. An option that did not exist
        when the record was made was at its default."""
        if not self.record.exists():
            return False
        then = json.loads(self.record.read_text())
        wanted = {name: getattr(self, name)(plan) for name in ("weights", "evaluation", "prepare")}
        now = settings(tuple(self.overrides(plan)))
        return wanted.items() <= then.items() and all(now[key] == then["settings"].get(key, now[key]) for key in now)

    def weights(self, plan) -> dict[str, str]:
        """Fingerprints of the shipped weights that this row starts from, or is."""
        own = self.given(plan)
        named = ["checkpoints/teacher", "checkpoints/init"] if own is None else [own] if own != REAL else []
        return {name: shipped(name) for name in named}


@lru_cache
def shipped(name: str) -> str:
    return fingerprint(f"{name}.safetensors")


@lru_cache
def settings(overrides: tuple[str, ...]) -> dict:
    """Every option that train.py gets with them and that matters to what it learns: {"training.lr": 0.001, ...}."""
    from settings import load_config

    if not overrides:
        return {}
    config = OmegaConf.to_container(load_config(overrides), resolve=True)
    options = flat({group: config[group] for group in LEARNS_BY})
    # what a network or data set is told of sizes is in model and world already
    return {name: x for name, x in options.items() if name not in WITHOUT_EFFECT and ".config." not in name}


def flat(options: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    found = {}
    for name, x in options.items():
        found |= flat(x, f"{prefix}{name}.") if isinstance(x, dict) else {prefix + name: x}
    return found


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
    torch.set_num_threads(1)
    given = run.given(plan)
    checkpoint = trained(run, plan) if given is None else REAL if given == REAL else Path(f"{given}.safetensors")
    record = {
        "overrides": run.overrides(plan),
        "settings": settings(tuple(run.overrides(plan))),
        "prepare": run.prepare(plan),
        "weights": run.weights(plan),
        **({} if given else costs(run)),
        "machine": machine(),
        "noise_seed": NOISE_SEED + run.seed,
        "evaluation": run.evaluation(plan),
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

    for command in run.prepare(plan):
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
        "seconds": round(undisturbed(log), 1),
        "evaluations": sum(float(row["evaluations"]) for row in log),
        "log": {sign: [round(float(row[sign]), 5) if row.get(sign) else None for row in log] for sign in SIGNS},
    }


def undisturbed(log: list[dict]) -> float:
    """Seconds of a run if nothing else had wanted the processor. Steps differ in what they ask of the networks, so what
    counts is the time of one evaluation: nine in ten steps took longer for it."""
    ends, asked = [0.0, *(float(row["seconds"]) for row in log)], [float(row["evaluations"]) for row in log]
    each = sorted((end - begin) / n for (begin, end), n in zip(pairwise(ends), asked, strict=True))
    return each[len(log) // 10] * sum(asked)


def ship_row(checkpoint: Path, run: Run) -> None:
    """The row's weights in bfloat16, with what has to be known of them to measure them again."""
    loaded = load_weights(checkpoint)
    record = {"config": loaded.config, "record": run.record.name}
    save_weights(
        HERE / "weights" / run.experiment / f"{run.row}.safetensors", loaded.state_dict, record, torch.bfloat16
    )


def measure(checkpoint: Path | str, plan, run: Run) -> dict[str, dict]:
    """ "curves": every metric over the frame index, for each of the plan's ways to sample this row, and "sampling":
    what a frame costs in it; "stills": frames of the first videos, of the ways that the plan wants to show."""
    found, stills = {"curves": {}, "sampling": {}, "stills": {}}, plan.get("stills")
    for way, options in run.evaluation(plan).items():
        found["curves"][way], videos, found["sampling"][way] = measure_one(checkpoint, run.seed, **options)
        if stills and way in stills.of:
            found["stills"][way] = pack(videos[: stills.num_videos, :: stills.every])
    return found


def measure_one(checkpoint, seed, *, num_videos: int, num_frames: int, from_frame: int = 0, world=None, **options):
    """Metrics of videos of all prompts, the videos, and what one of their frames cost: network evaluations and seconds
    of the processor. from_frame: where the metrics begin. world: of REAL videos, options of WorldConfig; by default
    held-out digits of the default world. Other options are those of `sampler_of`."""
    import metrics

    if checkpoint == REAL:
        shown = WorldConfig(**{"split": "validation", **(world or {})})
        make_videos = partial(metrics.real_videos, world=replace(shown, num_frames=num_frames))
        world, evaluations = replace(shown, split="train"), Evaluations([])
    else:
        loaded, make = sampler_of(checkpoint, **options)
        world, make_videos = loaded.world, partial(make, loaded, num_frames=num_frames)
        evaluations = Evaluations([loaded.model])
    prompts, begin = metrics.uniform_prompts(num_videos, world.num_digits), time.process_time()
    videos = make_videos(prompts=prompts, seed=NOISE_SEED + seed)
    seconds, frames = time.process_time() - begin, num_videos * num_frames
    curves = metrics.examiner(world)(videos[:, from_frame:], prompts)
    curves = {name: [round(x, 4) for x in curve] for name, curve in curves.items()}
    return curves, videos, {"evaluations": evaluations.take() / frames, "seconds": round(seconds / frames, 5)}


def sampler_of(checkpoint, *, num_steps: int = 0, rollout=None, switch=None, weights="ema", network=None, **options):
    """A checkpoint's model and the function that makes its videos. num_steps: of an ODE, instead of the student's few.
    rollout: what to change of the RolloutConfig. switch: see switching.py, instead of sample_videos. weights: "raw" for
    those of the last step. network: the class to sample with, by default the one that was trained, with its fault if it
    has one."""
    from experiments.switching import switched_videos
    from generate import load_model, sample_videos
    from ode_pairs import grid

    if num_steps:
        options |= {"denoising_steps": grid(num_steps), "fresh_noise": 0.0}
    loaded = load_model(checkpoint, weights)
    model = get_class(network or trained_class(checkpoint))(loaded.model.config)
    model.load_state_dict(loaded.model.state_dict())
    sampling = replace(loaded.sampling, rollout=replace(loaded.sampling.rollout, **(rollout or {})))
    loaded = replace(loaded, model=model.eval().requires_grad_(False), sampling=sampling)
    return loaded, partial(switched_videos, **switch) if switch else partial(sample_videos, **options)


def trained_class(checkpoint) -> str:
    """Of experiments/sick.py, or the plain one."""
    named = load_weights(checkpoint).config.get("generator", {}).get("_target_", "")
    return named if named.startswith("experiments.sick.") else "tiny_causal_wan.TinyCausalWanModel"


def pack(videos) -> dict:
    """Videos as text, to draw them from a record."""
    from generate import to_pixels

    pixels = to_pixels(videos)
    return {"shape": list(pixels.shape), "zlib": base64.b64encode(zlib.compress(pixels.tobytes(), 9)).decode()}


def unpack(packed: dict):
    """What `pack` was given, in [-1, 1]."""
    pixels = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(packed["zlib"]))), dtype=torch.uint8)
    return pixels.view(packed["shape"]) / 127.5 - 1


def finished(run: Run) -> bool:
    """Whether training is done and only the measuring is missing."""
    if not (run.folder / "checkpoint_final.pt").exists():
        return False
    from settings import load_config

    config = load_config(run.overrides(load_plan(run.experiment)))
    return holds(run.folder, OmegaConf.to_yaml(config, resolve=True))


def begin_again(runs: list[Run]) -> Path:
    """Forget runs, to train them anew: once, so that after an interruption the same call goes on. Returns the note of
    what was begun, which is to be deleted in the end."""
    note = Path("logs/experiments") / runs[0].experiment / "again.json"
    names = [str(run.folder) for run in runs]
    if not note.exists() or json.loads(note.read_text()) != names:
        forget(runs)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(names))
    return note


def forget(runs: list[Run]) -> None:
    """Records are deleted, and finished folders moved aside."""
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
    if args.again and not args.experiment:
        raise ValueError("--again forgets records, of every experiment if none is named: say which.")
    for experiment, rows in wanted(args.experiment, args.only).items():
        plan = load_plan(experiment)
        runs = all_runs(experiment, plan, rows, args.seeds)
        note = begin_again(runs) if args.again else None
        run_all([run for run in runs if not run.is_done(plan)], plan, args.workers)
        if note:
            note.unlink()


def wanted(experiment: str | None, rows: list[str]) -> dict[str, list[str]]:
    """Experiment -> rows, none for all of them. A row that an experiment shows beside its own is run at home."""
    found = {}
    for name in [experiment] if experiment else experiments():
        for home, row in [home_of(name, row) for row in rows] or [(name, None)]:
            found.setdefault(home, []).extend([row] if row else [])
    return found


def home_of(experiment: str, row: str) -> tuple[str, str]:
    """The experiment that runs a row, and its name there."""
    beside = load_plan(experiment).get("beside", {})
    return home_of(*beside[row].split("/")) if row in beside else (experiment, row)


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
    except KeyboardInterrupt:
        sys.exit("Interrupted: the same command goes on.")
