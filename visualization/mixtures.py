"""Students in two dimensions: where their points are as training goes on, and what a first frame becomes."""

import numpy as np
from torch import Tensor

from visualization.style import BLUE, FAINT, HEADING, TITLE, VERMILLION, finish, panels, styled


@styled
def plot_mixtures(data: Tensor, points: dict[str, list[Tensor]], steps, firsts: dict[str, Tensor], save_path=None):
    """Figure: a row of scatter plots per student, one for each of the steps, over the data's points [N, 2]; in the last
    row, the histogram of each entry of firsts [N]."""
    cols = len(steps)
    fig, axes = panels(len(points) + 1, cols, 2.5 * cols, 2.4 * (len(points) + 1))
    for row, (name, snapshots) in zip(axes, points.items(), strict=False):
        for ax, step, seen in zip(row, steps, snapshots, strict=True):
            ax.scatter(*data.T.numpy(), s=2, color=FAINT, linewidths=0, label="data")
            ax.scatter(*seen.T.numpy(), s=2, color=BLUE, linewidths=0, label="student")
            ax.set(title=f"step {step}", xlim=(-2, 2), ylim=(-2, 2), aspect="equal", xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=HEADING, fontweight="bold")
    for ax, (name, values), color in zip(axes[-1], firsts.items(), (VERMILLION, BLUE), strict=False):
        ax.hist(values.numpy(), bins=np.linspace(-1.5, 1.5, 41), color=color)
        ax.set(title=name, xlabel="first frame", yticks=[])
    axes[-1][0].set_ylabel("ODE pairs", fontsize=HEADING, fontweight="bold")
    for ax in axes[-1][len(firsts) :]:
        ax.remove()
    fig.suptitle("One-step students of an exact teacher, and first frames of a causal one", size=TITLE, weight="bold")
    return finish(fig, save_path)
