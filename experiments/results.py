"""Write RESULTS.md and its figures from the records of all experiments: python -m experiments.results

    python -m experiments.results --evaluate --only main_table/sf_dmd    # measure its shipped weights again

Nothing is trained: experiments.run does that, and leaves one record per row and seed. An experiment's config says what
is asked; what was found is said in its `found`, by people who looked.
"""

import argparse
import json
import sys
from itertools import combinations
from pathlib import Path

import numpy as np

from experiments.run import HERE, all_runs, load_plan, measure
from visualization import plot_metric_curves

PAGE, FIGURES = Path("RESULTS.md"), Path("docs/results")
T, FEW = 12, "four steps"
SPANS = {"0-T": (0, T), "T-2T": (T, 2 * T), "3T-4T": (3 * T, 4 * T), "7T-8T": (7 * T, 8 * T)}
SHOWN = {"digit_accuracy": 2, "frechet_distance": 1, "motion_error": 2, "ink": 2}  # digits after the point
TOLERANCE = {"digit_accuracy": 0.05, "motion_error": 0.15, "ink": 0.05}  # other noise of arithmetic, same weights

Records = dict[str, list[dict]]  # row -> one record per seed, each with the curves of one way to sample


def load_records(experiment: str, plan) -> Records:
    """What has been run with the settings that the plan has now; a row that is sampled in two ways is two rows."""
    found: Records = {}
    for run in all_runs(experiment, plan):
        if run.is_done(plan):
            record = json.loads(run.record.read_text())
            for way, curves in record["curves"].items():
                name = run.row if way == FEW else f"{run.row}, {way}"
                found.setdefault(name, []).append(record | {"curves": curves})
    return {name: found[name] for name in sorted(found, key=lambda name: (", " in name, list(found).index(name)))}


def span_means(records: list[dict], metric: str, span: str) -> np.ndarray:
    """A metric's mean over a span of frames, one number per seed."""
    return np.array([span_mean(record["curves"], metric, span) for record in records])


def span_mean(curves: dict, metric: str, span: str) -> float:
    """NaN where the videos are shorter."""
    begin, end = SPANS[span]
    return float(np.mean(curves[metric][begin:end])) if len(curves[metric]) >= end else float("nan")


def differ(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the means of at least three seeds each are further apart than two pooled standard deviations."""
    if min(len(a), len(b)) < 3:
        return False
    return bool(abs(a.mean() - b.mean()) > 2 * np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2))


def cell(values: np.ndarray, digits: int) -> str:
    if np.isnan(values).any():
        return ""
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def table(records: Records) -> str:
    """Mean and standard deviation over seeds: every shown metric over every span, and what a run cost."""
    heads = [f"{metric.replace('_', ' ')} {span}" for metric in SHOWN for span in SPANS]
    lines = ["| | seeds | " + " | ".join(heads) + " | evaluations | minutes |", "|---" * (len(heads) + 4) + "|"]
    for row, own in records.items():
        cells = [cell(span_means(own, metric, span), SHOWN[metric]) for metric in SHOWN for span in SPANS]
        cost = np.mean([record["evaluations"] for record in own])
        minutes = np.mean([record["seconds"] for record in own]) / 60
        lines.append(f"| {row} | {len(own)} | " + " | ".join(cells) + f" | {cost:,.0f} | {minutes:.0f} |")
    return "\n".join(lines)


def differences(records: Records, metric: str = "digit_accuracy", span: str = "3T-4T") -> str:
    """Every pair of rows that differs, the better one first."""
    values = {row: span_means(own, metric, span) for row, own in records.items()}
    found = []
    for a, b in combinations(values, 2):
        if differ(values[a], values[b]):
            better, worse = sorted((a, b), key=lambda row: -values[row].mean())
            found.append(f"{better} above {worse} by {values[better].mean() - values[worse].mean():.2f}")
    what = f"In {metric.replace('_', ' ')} over {span}"
    return f"{what}: {'; '.join(found)}." if found else f"{what} no two rows differ by that measure."


def section(experiment: str) -> str:
    """One experiment: what is asked, the table, the figure, what was found. Empty if nothing has been run."""
    plan = load_plan(experiment)
    records = load_records(experiment, plan)
    if not records:
        return ""
    FIGURES.mkdir(parents=True, exist_ok=True)
    curves = {
        row: {name: np.array([record["curves"][name] for record in own]) for name in own[0]["curves"]}
        for row, own in records.items()
    }
    figure = FIGURES / f"{experiment}.png"
    plot_metric_curves(curves, figure, T, plan.title, ["digit_accuracy", "frechet_distance", "motion_error", "ink"])
    machines = sorted({record["machine"]["processor"] for own in records.values() for record in own})
    return "\n\n".join(
        [
            f"## {plan.title}",
            " ".join(plan.asks.split()),
            f"![{plan.title}: metrics over the frame index]({figure})",
            table(records),
            differences(records),
            " ".join(plan.get("found", "").split()),
            f"`python -m experiments.run {experiment}`; {plan.evaluation[FEW].num_videos} videos per run, noise seed "
            f"1000 plus the training seed; one thread of {', '.join(machines)}. Settings: "
            f"`experiments/{experiment}.yaml`.",
        ]
    )


def write_page() -> None:
    sections = [section(path.stem) for path in sorted(HERE.glob("*.yaml"))]
    head = (
        "# Results\n\nWritten by `make results` from the records of the runs in `experiments/records/`. T is the "
        f"training length, {T} frames. Numbers are means over training seeds ± their standard deviation; rows are said "
        "to differ where their means, over at least three seeds each, are further apart than two pooled standard "
        "deviations. Evaluations count what the networks computed in training, in frames: forward 1, backward 2, "
        "teacher and critic included. Minutes are those of one core."
    )
    PAGE.write_text("\n\n".join([head, *filter(None, sections)]) + "\n")


def evaluate_again(name: str) -> None:
    """Roll a row out from its shipped weights; exit with an error where it leaves the range of its record."""
    experiment, _, row = name.partition("/")
    plan = load_plan(experiment)
    (run, *_) = all_runs(experiment, plan, [row])
    weights = HERE / "weights" / experiment / f"{row}.safetensors"
    if not weights.exists() or not run.record.exists():
        raise ValueError(f"{name} ships no weights, or has no record: run experiments.run {experiment} --only {row}.")
    then, now = json.loads(run.record.read_text())["curves"][FEW], measure(weights, plan, run)[FEW]
    off = []
    for metric, tolerance in TOLERANCE.items():
        for span in SPANS:
            before, after = (span_mean(curves, metric, span) for curves in (then, now))
            if np.isnan(before):
                continue
            print(f"{metric:16} {span:6} {before:6.3f} in the record, {after:6.3f} now")
            off += [f"{metric} {span}"] * (abs(before - after) > tolerance)
    if off:
        raise ValueError(f"{name} left its range in {', '.join(off)}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--evaluate", action="store_true", help="measure the shipped weights of a row again")
    parser.add_argument("--only", metavar="EXPERIMENT/ROW")
    args = parser.parse_args()
    if args.evaluate:
        if not args.only:
            raise ValueError("--evaluate needs --only EXPERIMENT/ROW, such as main_table/sf_dmd.")
        return evaluate_again(args.only)
    write_page()


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"experiments.results: {error}")
