"""Turn a finished run into shipped weights: python -m experiments.ship RUN NAME [--metrics METRICS.json ...]

RUN is a run's folder or one of its checkpoints; with weights that ship already, only their metrics are replaced.
Writes checkpoints/NAME.safetensors (the average, in half precision, with the config in its header) and NAME.json, which
records how it came about: command, seed, config, duration, machine, the weights and the runs it started from, and the
summaries that metrics.py measured of it.
"""

import argparse
import json
from pathlib import Path

from checkpoint import fingerprint, load_checkpoint, load_weights, locate, save_weights


def earlier_runs(training: dict) -> list[dict]:
    """The runs of the same stage that this one went on from, oldest first, as the records beside their weights say."""
    start = training["pretrained_checkpoint"]
    if not start:
        return []
    path = locate(start)
    before = json.loads(path.with_suffix(".json").read_text()) if path.suffix == ".safetensors" else describe(path)
    if before["config"]["training"]["stage"] != training["stage"]:
        return []
    told = ("command", "seed", "steps", "seconds", "machine", "fingerprint", "started_from")
    return [*before.get("earlier_runs", []), {key: before[key] for key in told}]


def describe(source: Path) -> dict:
    """How the weights in a training checkpoint came about."""
    state = load_checkpoint(source)
    training = state["config"]["training"]
    started_from = {name: training[name] for name in ("pretrained_checkpoint", "teacher_checkpoint") if training[name]}
    return {
        "command": state["command"],
        "seed": training["seed"],
        "data": state["config"]["world"],
        "steps": state["step"],
        "seconds": round(state["seconds"]),
        "machine": state["machine"],
        "fingerprint": fingerprint(source),
        "earlier_runs": earlier_runs(training),
        "started_from": {name: fingerprint(weights) for name, weights in started_from.items()},
        "config": state["config"],
    }


def ship(run: Path, name: str, metrics: list[Path], target: Path = Path("checkpoints")) -> Path:
    """Write target/NAME.safetensors and target/NAME.json; if those weights are there already, only their metrics."""
    source = run / "checkpoint_final.pt" if run.is_dir() else run
    path = target / f"{name}.safetensors"
    there = path.exists() and fingerprint(path) == fingerprint(source)
    record = json.loads(path.with_suffix(".json").read_text()) if there else describe(source)
    measured = [json.loads(path.read_text()) for path in metrics]
    summaries = [{key: value for key, value in each.items() if key != "curves"} for each in measured]
    record |= {"metrics": summaries or record.get("metrics", [])}
    save_weights(path, load_weights(source, "ema").state_dict, record)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--metrics", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    print(ship(args.run, args.name, args.metrics))
