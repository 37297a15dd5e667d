"""Turn a finished run into shipped weights: python -m experiments.ship RUN_FOLDER NAME [--metrics METRICS.json ...]

Writes checkpoints/NAME.safetensors (the average, in half precision, with the config in its header) and NAME.json, which
records how it came about: command, seed, config, duration, machine, and the summaries that metrics.py measured of it.
"""

import argparse
import json
from pathlib import Path

from checkpoint import load_checkpoint, load_weights, save_weights


def ship(run: Path, name: str, metrics: list[Path], target: Path = Path("checkpoints")) -> Path:
    """Write target/NAME.safetensors and target/NAME.json from RUN/checkpoint_final.pt."""
    source = run / "checkpoint_final.pt"
    state = load_checkpoint(source)
    measured = [json.loads(path.read_text()) for path in metrics]
    record = {
        "command": state["command"],
        "seed": state["config"]["training"]["seed"],
        "data": state["config"]["world"],
        "steps": state["step"],
        "seconds": round(state["seconds"]),
        "machine": state["machine"],
        "metrics": [{key: value for key, value in each.items() if key != "curves"} for each in measured],
        "config": state["config"],
    }
    path = target / f"{name}.safetensors"
    save_weights(path, load_weights(source, "ema").state_dict, record)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--metrics", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    print(ship(args.run, args.name, args.metrics))
