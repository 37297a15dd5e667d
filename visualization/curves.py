"""Lines with bands: metrics over the frame index, one panel per metric, or any few labelled lines."""

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator

from visualization.style import LINES, SOFT, TITLE, finish, line_look, panels, styled, text_width

TRAINING_LENGTH = "training length"


@styled
def plot_metric_curves(curves, save_path=None, train_frames=None, title=None, metrics=None):
    """Figure with a panel per metric: the mean over seeds as a line, the range over seeds as a band.

    `curves`: run label -> metric name -> array [num_seeds, F] or [F] over the frame index; NaN leaves a gap;
    lengths may differ, and a run may lack a metric. `train_frames`: a vertical line where the training length
    ends. `metrics`: the names to show, in this order (None: all).
    """
    known = list(dict.fromkeys(name for run in curves.values() for name in run))
    metrics = known if metrics is None else list(metrics)
    unknown = [name for name in metrics if name not in known]
    if unknown or not metrics:
        missing = ", ".join(unknown) or "(none given)"
        raise ValueError(f"no run has the metric {missing}: choose from {', '.join(known) or 'an empty list'}")
    cols = 2 if len(metrics) == 4 else min(len(metrics), 3)
    rows = -(-len(metrics) // cols)
    fig, axes = panels(rows, cols, 1.6 + 3.4 * cols, 2.6 * rows + 0.3 * bool(title))
    axes = axes.ravel()
    for ax, name in zip(axes, metrics, strict=False):
        for run, (label, values) in enumerate(curves.items()):
            if name in values:
                draw_curve(ax, values[name], run, label, name)
        finish_panel(ax, name, train_frames)
    for ax in axes[len(metrics) :]:
        ax.remove()
    add_legend(fig, axes[: len(metrics)])
    if title:
        fig.suptitle(title, size=TITLE, weight="bold", x=0.02, ha="left")
    return finish(fig, save_path)


@styled
def plot_lines(lines, xlabel, ylabel, title=None, save_path=None, xs=None, log=""):
    """Figure of labelled lines over one axis: label -> [N], or [num_runs, N] for a mean with its range.

    `xs`: the N places, None for 0 ... N - 1. `log`: "x", "y" or "xy" for logarithmic axes.
    """
    if not lines:
        raise ValueError("lines is empty: give at least one label with its values")
    fig, axes = panels(1, 1, 6.4, 3.6)
    (ax,) = axes.ravel()
    for run, (label, values) in enumerate(lines.items()):
        draw_curve(ax, values, run, label, label, xs)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title or "")
    for axis in log:
        getattr(ax, f"set_{axis}scale")("log")
    add_legend(fig, [ax])
    return finish(fig, save_path)


def draw_curve(ax, values, run, label, name, xs=None):
    """Mean and range over seeds of `values` [num_seeds, F] or [F], over xs [F] or the frame index."""
    values = np.atleast_2d(torch.as_tensor(values).detach().float().cpu().numpy())
    if values.ndim != 2:
        raise ValueError(f"{label}: {name} must be [num_seeds, F] or [F], got {list(values.shape)}")
    values = np.ma.masked_invalid(values)
    color, line, marker = line_look(run)
    frames = np.arange(values.shape[1]) if xs is None else np.asarray(xs)
    stride = max(1, len(frames) // 8)
    first = run % len(LINES) * stride // len(LINES)  # markers of different runs do not sit on top of each other
    marks = {"marker": marker, "markersize": 4.5, "markevery": (first, stride)}
    style = {"color": color, "linestyle": line, "linewidth": 1.8, "zorder": 3}
    ax.plot(frames, values.mean(axis=0), label=label, **style, **marks)
    if len(values) > 1:
        ax.fill_between(frames, values.min(axis=0), values.max(axis=0), color=color, alpha=0.16, linewidth=0)


def finish_panel(ax, name, train_frames):
    ax.set(title=name.replace("_", " "), xlabel="frame")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.margins(x=0.02)
    if train_frames is not None:
        style = {"color": SOFT, "linewidth": 1.3, "linestyle": (0, (1, 1)), "zorder": 1}
        ax.axvline(train_frames - 0.5, label=f"{TRAINING_LENGTH}: {train_frames} frames", **style)


def add_legend(fig, axes):
    """One legend under all panels, the training length last."""
    entries = {}
    for ax in axes:
        handles, words = ax.get_legend_handles_labels()
        entries |= dict(zip(words, handles, strict=True))
    words = sorted(entries, key=lambda text: text.startswith(TRAINING_LENGTH))
    handles = [entries[text] for text in words]
    entry = max(map(text_width, words)) + 0.85  # a handle and its gaps
    cols = max(1, min(len(words), int(fig.get_figwidth() / entry)))
    fig.set_figheight(fig.get_figheight() + 0.3 + 0.2 * -(-len(words) // cols))
    fig.legend(handles, words, loc="outside lower center", ncols=cols, handlelength=3.2)
