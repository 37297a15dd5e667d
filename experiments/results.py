"""Write RESULTS.md and its figures from the records of all experiments: python -m experiments.results

    python -m experiments.results --evaluate --only main_table/sf_dmd    # measure its shipped weights again

Nothing is trained: experiments.run does that, and leaves one record per row and seed. An experiment's config says what
is asked; what was found is said in its `found`, and of single rows in `signs`, by people who looked.
"""

import argparse
import json
import re
import sys
from itertools import combinations
from pathlib import Path

import numpy as np

from experiments.gaussian_mixture import draw as draw_mixture
from experiments.run import HERE, Run, all_runs, experiments, home_of, load_plan, measure_one, unpack
from visualization import plot_metric_curves, plot_sick_runs
from visualization.style import reduce_colours

PAGE, FIGURES = Path("RESULTS.md"), Path("docs/results")
T, FEW = 12, "four steps"
SPANS = {
    "first block": (0, 3),
    "0-T": (0, T),
    "T-2T": (T, 2 * T),
    "3T-4T": (3 * T, 4 * T),
    "7T-8T": (7 * T, 8 * T),
    "15T-16T": (15 * T, 16 * T),
}
# digits after the point
SHOWN = {"digit_accuracy": 2, "frechet_distance": 1, "motion_error": 2, "speed_kept": 2, "ink": 2}
# of the same noise and weights, rounded to bfloat16, on another machine
TOLERANCE = {"digit_accuracy": 0.05, "frechet_distance": 2, "motion_error": 0.15, "speed_kept": 0.05, "ink": 0.05}
SHARE = {"frechet_distance": 0.25}  # of what it was, where that is more: far out a few videos decide

COSTS = ("evaluations to train, in frames", "minutes to train", "evaluations per frame", "ms per frame", "timed with")

HEAD = """\
# Results

Written by `make results` from the records of the runs in `experiments/records/`. T is the length of the teacher's \
clips, {T} frames.

## In short

{short}

## How to read the tables

- **±**: mean and standard deviation over training seeds; over seeds of noise for what was only measured.
- **Before**: rows that were trained are said to differ where their means, over at least three seeds each, are \
further apart than two pooled standard deviations. By chance alone that happens to one pair of equal rows in fourteen \
with three seeds each, to one in seventy-five with five. Rows that are not said to differ may still do so.
- **Evaluations** are counted by a hook on the networks, in frames: forward 1, backward 2, teacher and critic included.
- **Minutes** of training are those of one core that nothing else wants (as long as the fastest tenth of the steps \
took), **ms per frame** processor time of one thread, many videos at a time. Compare them where they were timed with \
the same instructions of the processor, and both or neither without denormals: flushing numbers below 1e-38 to zero \
made a step of training up to a third shorter ([docs/trials.md](docs/trials.md#very-small-numbers)).
- **In range**: weights that ship, measured anew (`make results EVALUATE=1`), move in no span by more than {ranges}."""

Records = dict[str, list[dict]]  # row -> one record per seed, each with the curves of one way to sample


def load_records(experiment: str, plan) -> Records:
    """What has been run with the settings that the plan has now; a row that is sampled in two ways is two rows. Rows of
    other experiments that are shown beside come first, sampled in the ways that both have."""
    runs = {}
    for name, row in plan.get("beside", {}).items():
        elsewhere, _, row = row.partition("/")
        runs |= dict.fromkeys(all_runs(elsewhere, load_plan(elsewhere), [row]), name)
    runs |= {run: run.row for run in all_runs(experiment, plan)}
    found: Records = {}
    for run, name in runs.items():
        if run.is_done(plan if run.experiment == experiment else load_plan(run.experiment)):
            record = json.loads(run.record.read_text())
            for way in [way for way in record["curves"] if way in plan.evaluation]:
                one_way = {part: record.get(part, {}).get(way) for part in ("curves", "sampling", "stills")}
                found.setdefault(name if way == FEW else f"{name}, {way}", []).append(record | one_way)
    return {name: found[name] for name in sorted(found, key=lambda name: (", " in name, list(found).index(name)))}


def span_means(records: list[dict], metric: str, span: str) -> np.ndarray:
    """A metric's mean over a span of frames, one number per seed."""
    return np.array([span_mean(record["curves"], metric, span) for record in records])


def span_mean(curves: dict, metric: str, span: str) -> float:
    """NaN where the videos are shorter."""
    begin, end = SPANS[span]
    return float(np.mean(curves[metric][begin:end])) if len(curves[metric]) >= end else float("nan")


def drift(records: list[dict], metric: str, span: str) -> np.ndarray:
    """What has changed since the first block, where no past is behind a frame; one number per seed."""
    return span_means(records, metric, span) - span_means(records, metric, "first block")


def shown(records: Records) -> dict[str, int]:
    """The metrics that all of them have: those of several digits are fewer."""
    return {name: digits for name, digits in SHOWN.items() if all(name in own[0]["curves"] for own in records.values())}


def trained(records: Records) -> Records:
    """Without rows that were only measured: their seeds are of noise, and say nothing about training again."""
    return {row: own for row, own in records.items() if "evaluations" in own[0]}


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


def brief(records: Records) -> str:
    """Every shown metric, mean and spread over seeds, over the span that rows are compared on; and what a row costs."""
    span, metrics = compared_span(records), shown(records)
    lost = "change of accuracy since the first block"
    heads = ["", "seeds", *(metric.replace("_", " ") for metric in metrics), lost, *COSTS]
    rows = [
        [
            row,
            f"{len(own)}{'' if row in trained(records) else ' of noise'}",
            *(cell(span_means(own, metric, span), digits) for metric, digits in metrics.items()),
            cell(drift(own, "digit_accuracy", span), 2),
            *costs(own),
        ]
        for row, own in records.items()
    ]
    return f"Frames {span}:\n\n{markdown(heads, rows)}"


def every_span(records: Records) -> str:
    """A table per metric: rows over the spans of the video, folded."""
    spans = spans_of(records)
    tables = []
    for metric, digits in shown(records).items():
        rows = [[row, *(cell(span_means(own, metric, span), digits) for span in spans)] for row, own in records.items()]
        tables.append(markdown([metric.replace("_", " "), *spans], rows))
    return "\n\n".join(["<details><summary>Over the whole video</summary>", *tables, "</details>"])


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *rows])


def compared_span(records: Records) -> str:
    """Four times the training length, or within it if no video is that long."""
    return "3T-4T" if "3T-4T" in spans_of(records) else "0-T"


def spans_of(records: Records) -> list[str]:
    """The spans that the longest videos reach."""
    longest = max(len(record["curves"]["ink"]) for own in records.values() for record in own)
    return [span for span, (_, end) in SPANS.items() if end <= longest]


def costs(records: list[dict]) -> list[str]:
    """Means of what training took and what a frame takes to make, and by which instructions; blanks for what was not
    trained here."""
    trained = [record for record in records if "evaluations" in record]
    evaluations, minutes = mean_of(trained, "evaluations"), mean_of(trained, "seconds") / 60
    sampling = [record["sampling"] for record in records]
    per_frame = [f"{mean_of(sampling, 'evaluations'):.1f}", f"{1000 * mean_of(sampling, 'seconds'):.1f}"]
    machines = [record["machine"] for record in records]
    kinds = {m["vector_instructions"] + (", no denormals" if "denormals" in m else "") for m in machines}
    instructions = " and ".join(sorted(kinds))
    return [*([f"{evaluations:,.0f}", f"{minutes:.0f}"] if trained else ["", ""]), *per_frame, instructions]


def mean_of(found: list[dict], name: str) -> float:
    return sum(each[name] for each in found) / max(len(found), 1)


def differences(records: Records, against: str | None = None) -> str:
    """Every pair of trained rows, or only those with one of them, that differs in what they show, in how well it is
    drawn, or in what was lost since the first block; the better one first."""
    records, span, sentences = trained(records), compared_span(records), []
    if not records:
        return "Nothing was trained: the spreads are of noise alone."
    if sum(len(own) >= 3 for own in records.values()) < 2:
        return "No two rows were trained with three seeds, so no difference between them counts."
    for what, of, metric, best in (
        (f"digit accuracy over {span}", span_means, "digit_accuracy", max),
        (f"Frechet distance over {span}", span_means, "frechet_distance", min),
        (f"the change of digit accuracy from the first block to {span}", drift, "digit_accuracy", max),
    ):
        if metric in shown(records):
            values = {row: of(own, metric, span) for row, own in records.items()}
            sentences.append(f"In {what} {differences_in(values, best, SHOWN[metric], against)}.")
    if few := [row for row, own in records.items() if len(own) < 3]:
        sentences.append(f"Not compared, for they have fewer than three seeds: {', '.join(few)}.")
    return " ".join(sentences)


def differences_in(values: dict[str, np.ndarray], best, digits: int, against: str | None) -> str:
    found = {}  # better row -> by how much it is before which others
    for a, b in combinations(values, 2):
        if against in (a, b, None) and differ(values[a], values[b]):
            better = best((a, b), key=lambda row: values[row].mean())
            worse = b if better == a else a
            lead = abs(values[a].mean() - values[b].mean())
            found.setdefault(better, []).append(f"before {worse} by {lead:.{digits}f}")
    sentences = (f"{better} is {', '.join(others)}" for better, others in found.items())
    return "; ".join(sentences) or "no two rows differ by that measure"


def section(experiment: str) -> str:
    """One experiment: what is asked, the table, the figure, what was found; the first alone if nothing has been run."""
    plan = load_plan(experiment)
    records = load_records(experiment, plan)
    head = f"## {plan.title}\n\n{' '.join(plan.asks.split())}"
    if set(records) <= set(plan.get("beside", {})):
        return f"{head}\n\nNothing of it has been run with these settings: `python -m experiments.run {experiment}`."
    machines = sorted({record["machine"]["processor"] for own in records.values() for record in own})
    return "\n\n".join(
        [
            head,
            *([] if "stills" in plan else [curves_figure(experiment, plan, records)]),
            brief(records),
            *unfinished(experiment, plan),
            differences(records, plan.get("against")),
            every_span(records),
            " ".join(plan.get("found", "").split()),
            *(gallery(plan, records) if "stills" in plan else []),
            f"`python -m experiments.run {experiment}`; {plan.evaluation[FEW].num_videos} videos per run, noise seed "
            f"1000 plus the training seed; one thread of {', '.join(machines)}. Settings: "
            f"`experiments/{experiment}.yaml`.",
        ]
    )


def curves_figure(experiment: str, plan, records: Records) -> str:
    """Every metric over the frame index; of all rows, or those that the plan wants to be seen."""
    curves = {
        row: {name: np.array([record["curves"][name] for record in own]) for name in own[0]["curves"]}
        for row, own in records.items()
        if row in plan.get("figure", records)
    }
    path = FIGURES / f"{experiment}.png"
    metrics = list(shown(records))
    if "frechet_distance" in metrics:
        metrics.remove("speed_kept")  # four panels
    plot_metric_curves(curves, path, T, plan.title, metrics)
    return f"![{plan.title}: metrics over the frame index]({path})"


def gallery(plan, records: Records) -> list[str]:
    """Of every row but the healthy first one: the sign, and what its first seed makes and its log shows beside that of
    the first row."""
    seen = {row: (unpack(own[0]["stills"]), own[0]["log"]) for row, own in records.items() if own[0]["stills"]}
    healthy, *others = plan.rows
    worst = {each.partition(", ")[0]: each for each in seen}  # of two ways to sample a row, the second
    signs = {row: " ".join(plan.get("signs", {}).get(row, "").split()) for row in plan.rows}
    found = [f"**{healthy}**: {signs[healthy]}"]
    for row in others:
        if {healthy, row} <= {*worst}:
            path = FIGURES / f"{row}.png"
            plot_sick_runs({each: seen[each] for each in (healthy, worst[row])}, path, plan.stills.every)
            found += [f"**{row}**: {signs[row]}", f"![{row} beside {healthy}: videos, and signs in the log]({path})"]
    return found


def mixture_section() -> str:
    """The two-dimensional experiment, which has a record and a figure of its own."""
    path = HERE / "records" / "gaussian_mixture.json"
    if not path.exists():
        return ""
    record = json.loads(path.read_text())
    draw_mixture(record, FIGURES / "gaussian_mixture.png")
    rows = [[row, f"{x['on_target']:.2f}", f"{x['share_error']:.2f}"] for row, x in record["distilled"].items()]
    between = [f"{share:.2f} after those of a {name}" for name, share in record["between_the_modes"].items()]
    return "\n\n".join(
        [
            "## In two dimensions, where every teacher is exact",
            "The same loss functions on a mixture of four Gaussians, whose score is a formula. A one-step student is "
            "trained with DMD, SiD and a GAN, and with DMD whose critic stands still. Below: a causal student's first "
            "frame after regression on ODE pairs, of data whose two frames are both -1 or both 1.",
            f"![Points of each student as training goes on, and first frames]({FIGURES}/gaussian_mixture.png)",
            markdown(["", "within 3 sigma of a mean", "shares off by"], rows),
            f"Share of first frames that lie between the two values: {', '.join(between)}.",
            f"`{record['command']}`, one seed, on {record['machine']['processor']}.",
        ]
    )


def write_page() -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    sections = [*(section(name) for name in experiments()), mixture_section()]
    head = HEAD.format(T=T, ranges=ranges(), short=in_short())
    PAGE.write_text("\n\n".join([head, *filter(None, sections)]) + "\n")
    for figure in FIGURES.glob("*.png"):
        reduce_colours(figure)


def in_short() -> str:
    """What was found, a line for each experiment that says it."""
    plans = [plan for plan in map(load_plan, experiments()) if "short" in plan]
    return "\n".join(f"- [{plan.title}](#{anchor(plan.title)}). {' '.join(plan.short.split())}" for plan in plans)


def anchor(title: str) -> str:
    """Of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def ranges() -> str:
    more = {metric: f" (or {share:.0%} of it)" for metric, share in SHARE.items()}
    return ", ".join(f"{x} in {metric.replace('_', ' ')}{more.get(metric, '')}" for metric, x in TOLERANCE.items())


def missing(experiment: str, plan) -> list[Run]:
    """Its runs that have no record with the settings of now."""
    return [run for run in all_runs(experiment, plan) if not run.is_done(plan)]


def unfinished(experiment: str, plan) -> list[str]:
    """A sentence that names the rows that are not there yet, with all their seeds."""
    rows = dict.fromkeys(run.row for run in missing(experiment, plan))
    return [f"Not run yet, or not with all seeds: {', '.join(rows)}."] if rows else []


def evaluate_again(name: str) -> None:
    """Roll a row out from its shipped weights; exit with an error where it leaves the range of its record."""
    experiment, _, row = name.partition("/")
    experiment, row = home_of(experiment, row)
    plan = load_plan(experiment)
    (run, *_) = all_runs(experiment, plan, [row], plan.seeds[:1])
    weights = HERE / "weights" / experiment / f"{row}.safetensors"
    if not weights.exists() or not run.record.exists():
        raise ValueError(
            f"{experiment}/{row} ships no weights, or has no record: run experiments.run {experiment} --only {row}."
        )
    then = json.loads(run.record.read_text())["curves"][FEW]
    now, _, _ = measure_one(weights, run.seed, **run.evaluation(plan)[FEW])
    off = []
    for metric, tolerance in TOLERANCE.items():
        for span in SPANS if metric in then else ():
            before, after = (span_mean(curves, metric, span) for curves in (then, now))
            if np.isnan(before):
                continue
            print(f"{metric:16} {span:6} {before:6.3f} in the record, {after:6.3f} now")
            off += [f"{metric} {span}"] * (abs(before - after) > max(tolerance, SHARE.get(metric, 0) * before))
    if off:
        raise ValueError(f"{experiment}/{row} left its range in {', '.join(off)}.")


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
    runs = {name: missing(name, load_plan(name)) for name in experiments()}
    if left := [f"{len(own)} of {name}" for name, own in runs.items() if own]:
        print(f"Runs without a record: {', '.join(left)}; `make results MISSING=1` does them.")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"experiments.results: {error}")
