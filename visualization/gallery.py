"""Training runs side by side: what each makes, and what its log says."""

import numpy as np
from matplotlib.ticker import MaxNLocator

from visualization.frames import to_clips
from visualization.style import FAINT, LINES, TITLE, finish, panels, styled

STRIP, SIGN = 0.95, 2.2  # inches: height of the film strips, width of a panel with a sign


@styled
def plot_sick_runs(runs, save_path=None, every=1, title=None):
    """Figure with a row per run: its first videos as film strips, then each entry of its log over the steps, with that
    of the first run behind it in grey.

    `runs`: label -> (videos [B, F, C, H, W], log: name -> one number per step, None where there is none). `every`: the
    distance between two frames of the videos.
    """
    signs = list(next(iter(runs.values()))[1])
    healthy = next(iter(runs.values()))[1]
    strip = STRIP * aspect(next(iter(runs.values()))[0])
    widths = [strip] + [SIGN] * len(signs)
    fig, axes = panels(len(runs), len(widths), sum(widths), 1.75 * len(runs), width_ratios=widths)
    for row, (label, (videos, log)) in zip(axes, runs.items(), strict=True):
        draw_stills(row[0], to_clips(videos), label, every)
        for ax, sign in zip(row[1:], signs, strict=True):
            draw_log(ax, healthy[sign], {"color": FAINT, "linewidth": 3})
            draw_log(ax, log[sign], {"color": LINES[0][0], "linewidth": 1.5})
            ax.set(title=sign.replace("_", " "), xlabel="step", yscale=scale(healthy[sign], log[sign]))
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if title:
        fig.suptitle(title, size=TITLE, weight="bold", x=0.02, ha="left")
    return finish(fig, save_path)


def aspect(videos) -> float:
    """Width over height of film strips below each other."""
    count, frames, _, height, width = videos.shape
    return frames * width / (count * height)


def draw_stills(ax, clips, label, every):
    """Clips [F, H, W, C] below each other, frames from left to right, a pixel apart."""
    rows = [
        np.concatenate([np.pad(frame, ((1, 0), (1, 0), (0, 0)), constant_values=0.5) for frame in clip], axis=1)
        for clip in clips
    ]
    image = np.concatenate(rows)
    ax.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set(title=f"{label}: frames 0, {every}, {2 * every} ...", xticks=[], yticks=[])


def scale(*logs) -> str:
    """Logarithmic for what is positive and spans a power of ten."""
    values = [value for log in logs for value in log if value is not None]
    return "log" if min(values, default=0) > 0 and max(values) > 10 * min(values) else "linear"


def draw_log(ax, values, style):
    steps = [i + 1 for i, value in enumerate(values) if value is not None]
    ax.plot(steps, [value for value in values if value is not None], **style)
