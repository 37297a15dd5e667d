"""What the frames of a video looked at: heat maps and bars over the heads, and how much the oldest frame stands out."""

from copy import copy
from itertools import accumulate

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from visualization.frames import matching_labels
from visualization.style import BLUE, INK, LINES, LOOKS, PAPER, SOFT, TITLE, finish, panels, styled

# White to ink through the course's blue: darker is more, on a grey printer too.
SHADES = LinearSegmentedColormap.from_list("attention", [PAPER, "#BFDDF2", BLUE, "#06182B"])
UNSEEN = {"facecolor": "#F1F1EC", "edgecolor": "#C9C9C2", "hatch": "////"}


PAST, OWN = {"facecolor": LOOKS["cached"].edge}, {"facecolor": LOOKS["clean"].edge, "hatch": "...."}


@styled
def show_frame_attention(attention, save_path=None, *, block_sizes=(), title=None, labels=None):
    """Figure with a heat map per head: which frame (row) looks how much at which frame (column).

    `attention`: softmax mass or mean logits [heads, F, F], as attention_maps.py measures them. All heads share one
    scale, which for mass follows the square root, so that small shares show. Hatched: not seen. `block_sizes`: lines
    between blocks. `labels`: one per head.
    """
    maps, shown, labels = by_head(attention, labels, ndim=3)
    scale = Normalize(shown.min(), shown.max()) if is_logits(maps) else PowerNorm(0.5, 0, shown.max())
    fig, axes = head_panels(len(maps), "frame that looks", aspect=1.0, room=0.75)
    for ax, values, label in zip(axes, shown, labels, strict=True):
        ax.patch.set(**UNSEEN)
        image = ax.imshow(values, cmap=SHADES, norm=scale, interpolation="nearest")
        for border in accumulate(block_sizes[:-1]):
            ax.axhline(border - 0.5, color=SOFT, linewidth=0.7)
            ax.axvline(border - 0.5, color=SOFT, linewidth=0.7)
        ax.set_title(label)
        ax.grid(False)
    axes[0].yaxis.set_major_locator(copy(axes[0].xaxis.get_major_locator()))
    fig.colorbar(image, ax=list(axes), label=unit(maps), aspect=30)
    return finish_page(fig, title, [Patch(label="not seen", **UNSEEN)], save_path)


@styled
def plot_last_block(attention, save_path=None, *, block_sizes, title=None, labels=None):
    """Figure with bars per head: how much the last block looks at each frame, its own in another colour.

    `attention`: softmax mass or mean logits [heads, F]. Hatched: not seen. `block_sizes`: frames per block; those of
    the last are the ones that look. `labels`: one per head.
    """
    bars, shown, labels = by_head(attention, labels, ndim=2)
    num_frames = bars.shape[1]
    frames, past = np.arange(num_frames), num_frames - int(block_sizes[-1])
    fig, axes = head_panels(len(bars), unit(bars), aspect=0.62)
    for ax, values, label in zip(axes, shown, labels, strict=True):
        for frame in frames[np.ma.getmaskarray(values)]:
            ax.axvspan(frame - 0.5, frame + 0.5, linewidth=0, zorder=1, **UNSEEN)
        for part, look in ((frames < past, PAST), (frames >= past, OWN)):
            ax.bar(frames[part], values[part].filled(0), edgecolor=PAPER, linewidth=0.5, zorder=3, **look)
        ax.set(title=label, xlim=(-0.5, num_frames - 0.5))
        ax.grid(False, axis="x")
    key = [Patch(label="the past", **PAST), Patch(label="the last block itself", **OWN)]
    return finish_page(fig, title, [*key, Patch(label="not seen", **UNSEEN)], save_path)


@styled
def plot_sink_scores(scores, save_path=None, *, title=None):
    """Figure of the sink score of every head (dots) and their mean (line) over the layers; above 0 is a sink.

    `scores`: [layers, heads].
    """
    scores = np.asarray(torch.as_tensor(scores).detach().cpu(), dtype=float)
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"scores must be [layers, heads], got {list(scores.shape)}")
    layers = np.arange(len(scores))
    (color, _, marker), (other, line, _) = LINES[:2]
    fig, axes = panels(1, 1, max(4.5, 2.2 + 0.3 * len(layers)), 3.4)
    ax = axes[0, 0]
    ax.axhline(0, color=INK, linewidth=1)
    dots = ax.scatter(layers.repeat(scores.shape[1]), scores, s=26, color=color, marker=marker, zorder=3)
    (mean,) = ax.plot(layers, scores.mean(1), color=other, linestyle=line, linewidth=1.6, zorder=4)
    dots.set_label("a head")
    mean.set_label("mean of the heads")
    ax.set(xlabel="layer", ylabel="sink score", xlim=(-0.5, len(layers) - 0.5))
    ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    return finish_page(fig, title, [dots, mean], save_path)


def by_head(attention, labels, ndim):
    """The numbers as an array, the same with what was not seen masked, and one label per head."""
    values = np.asarray(torch.as_tensor(attention).detach().float().cpu())
    if values.ndim != ndim or not values.size or len({*values.shape[1:]}) > 1:
        raise ValueError(f"attention must be [heads{', F' * (ndim - 1)}], got {list(values.shape)}")
    labels = labels or [f"head {i}" for i in range(len(values))]
    seen_not = np.isneginf(values) if is_logits(values) else values == 0
    return values, np.ma.masked_where(seen_not, values), matching_labels(labels, len(values), "heads")


def is_logits(values):
    """Mass is never negative; of logits some are, or at least the -inf of a frame that was not seen."""
    return values.min() < 0


def unit(values):
    return "mean logit" if is_logits(values) else "share of the attention"


def head_panels(num_heads, ylabel, aspect, room=0.0):
    """One panel over frames per head, smaller where there are many, `room` inches wider -> (figure, axes [heads])."""
    cols = next(n for n in (1, 2, 3, 4, 6, 8, num_heads) if n * n * 0.75 >= num_heads or n == num_heads)
    rows, side = -(-num_heads // cols), {1: 3.6, 2: 3.4, 3: 3.0, 4: 2.6, 6: 2.0}.get(cols, 1.7)
    fig, axes = panels(rows, cols, side * cols + 0.6 + room, side * aspect * rows + 1.3, sharex=True, sharey=True)
    axes = axes.ravel()
    for ax in axes[num_heads:]:
        ax.remove()
    axes[0].xaxis.set_major_locator(MaxNLocator(round(2 * side), integer=True))  # the axis is shared by all
    for ax in axes[max(0, num_heads - cols) : num_heads]:  # nothing below it, in an incomplete last row too
        ax.tick_params(labelbottom=True)
    axes[(rows - 1) * cols].set_xlabel("frame that is looked at", loc="left")  # once: there may be many small panels
    axes[rows // 2 * cols].set_ylabel(ylabel)
    return fig, axes[:num_heads]


def finish_page(fig, title, key, save_path):
    if title:
        fig.suptitle(title, size=TITLE, weight="bold", x=0.02, ha="left")
    fig.legend(handles=key, loc="outside lower center", ncols=len(key))
    return finish(fig, save_path)
