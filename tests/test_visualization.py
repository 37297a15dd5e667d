"""Pictures and video files: right content, right size, readable text, nothing left open."""

import ast
import sys
from itertools import combinations
from pathlib import Path

import imageio.v3 as iio
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

import visualization as viz
from visualization import style
from visualization.frames import block_starts, to_clips
from visualization.memory import mask_kinds

STEPS = (1.0, 0.9375, 0.8333, 0.625)
SHAPES = [(6, 1, 8, 8), (6, 3, 8, 10), (2, 6, 1, 8, 8), (2, 6, 3, 8, 10)]


def video(*shape, seed=0):
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 1


def curves(num_frames=24):
    ramp = np.linspace(1, 0.5, num_frames)
    seeds = ramp + np.array([[-0.1], [0.0], [0.1]])
    names = ("digit_accuracy", "motion_error", "ink_mass", "speed")
    return {label: dict.fromkeys(names, seeds) for label in ("teacher forcing", "self-forcing", "real data")}


def pixels(path):
    """Frames of a GIF, uint8 [F, H, W, 3]."""
    return iio.imread(path, mode="RGB", index=None)


FILM = video(3, 24, 1, 8, 8)
PAST = np.tri(4, dtype=bool).repeat(3, 0).repeat(3, 1)
FORCING = np.block([[PAST, np.zeros_like(PAST)], [PAST & ~np.eye(4, dtype=bool).repeat(3, 0).repeat(3, 1), PAST]])
HELD = [range(3), range(6), range(9), [0, 1, 2, *range(6, 12)]]
MOMENTS = [
    viz.Moment(range(3), (), 1, 0, 1.0, noisy=FILM[0, :3], guess=FILM[1, :3]),
    viz.Moment(range(3), (), 1, guess=FILM[1, :3], after=(0, 1, 2)),
    viz.Moment(range(3, 6), (0, 1, 2), 1, 0, 1.0, noisy=FILM[0, 3:6], guess=FILM[1, 3:6]),
    viz.Moment(range(3, 6), (0, 1, 2), 1, guess=FILM[1, 3:6], after=(0, 4, 5)),
]
UNEVEN = [viz.Moment(range(f, f + 1), tuple(range(f)), guess=FILM[1, f : f + 1], after=(f,)) for f in range(14)]
LOG = {"critic_error": [0.2, None, 0.1], "score_distance": [1e-3, 10.0, 0.5]}
PICTURES = {
    "film": lambda path=None: viz.film_strip(
        FILM, path, labels=["a 3 moving right", "teacher", "real"], train_frames=12, frames_per_block=3
    ),
    "long film": lambda path=None: viz.film_strip(video(60, 1, 8, 8), path, train_frames=12),
    "growth": lambda path=None: viz.visualize_autoregressive_generation(FILM[:, :12].split(3, dim=1), path),
    "denoising": lambda path=None: viz.visualize_denoising_process([FILM[:, :3]] * 4, [FILM[:, :3]] * 4, STEPS, path),
    "one step": lambda path=None: viz.visualize_denoising_process([FILM[:, :1]], [FILM[:, :1]], [1000], path),
    "cache": lambda path=None: viz.visualize_kv_cache_growth([3, 6, 9, 9], path),
    "caches": lambda path=None: viz.visualize_kv_cache_growth({"all": range(3, 40, 3), "6": [3, 6, 6]}, path),
    "tokens": lambda path=None: viz.visualize_kv_cache_growth([4680 * (i + 1) for i in range(7)], path),
    "held": lambda path=None: viz.show_cache(HELD, path, sink_frames=3),
    "mask": lambda path=None: viz.show_mask(PAST, path, frames_per_block=3, sink_frames=3),
    "halves": lambda path=None: viz.show_mask(FORCING, path, frames_per_block=3, halves=("clean", "noisy")),
    "query": lambda path=None: viz.show_mask(PAST[-3:], path, frames_per_block=3),
    "metrics": lambda path=None: viz.plot_metric_curves(curves(), path, train_frames=12, title="Long videos"),
    "metric": lambda path=None: viz.plot_metric_curves(curves(), path, train_frames=12, metrics=["speed"]),
    "maps": lambda path=None: viz.show_frame_attention(torch.rand(4, 9, 9).tril(), path, block_sizes=[1, 4, 4]),
    "bars": lambda path=None: viz.plot_last_block(torch.rand(4, 9), path, block_sizes=[1, 4, 4]),
    "sinks": lambda path=None: viz.plot_sink_scores(torch.rand(6, 4), path),
    "sick": lambda path=None: viz.plot_sick_runs({"healthy": (FILM, LOG), "sick": (FILM, LOG)}, path, 3, "Sick runs"),
    "diagram": lambda path=None: viz.create_algorithm_diagram(path),
    "denoising call": lambda path=None: style.finish(list(viz.draw_moments(MOMENTS))[2], path),
    "uneven blocks": lambda path=None: style.finish(list(viz.draw_moments(UNEVEN))[-1], path),
    "memory pass": lambda path=None: style.finish(list(viz.draw_moments(MOMENTS))[3], path),
}


@pytest.fixture(scope="module", params=PICTURES)
def picture(request, tmp_path_factory):
    """A picture, the file that it was saved to, and the words in it with their boxes in units of the page."""
    path = tmp_path_factory.mktemp("pictures") / "new" / "folder" / "picture.png"
    boxes, draw = {}, Text.draw

    def draw_and_note(text, renderer):
        draw(text, renderer)
        if text.get_visible() and text.get_text().strip():
            page = text.get_figure().transFigure.inverted()
            boxes[text] = text.get_text(), text.get_window_extent(renderer).transformed(page)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", draw_and_note)
        fig = PICTURES[request.param](path)
    return fig, path, list(boxes.values())


def test_picture_is_a_saved_figure_that_pyplot_does_not_hold(picture):
    """Every picture is a Figure, is written into a new folder, and leaves pyplot empty."""
    fig, path, _ = picture
    assert isinstance(fig, Figure)
    assert Image.open(path).size[0] > 300
    assert plt.get_fignums() == []


def test_text_is_inside_the_page_and_overlaps_no_other_text(picture):
    """All words of every picture can be read."""
    _, _, boxes = picture
    assert len(boxes) > 2
    for words, box in boxes:
        assert min(box.x0, box.y0) >= 0 and max(box.x1, box.y1) <= 1, words
    for (one, a), (other, b) in combinations(boxes, 2):
        assert not a.padded(-1e-3).overlaps(b.padded(-1e-3)), (one, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_picture_takes_both_ranks_and_both_colour_modes(shape):
    """[F, C, H, W] and [B, F, C, H, W], C = 1 or 3, show the expected number of images."""
    x = video(*shape)
    clips = 1 if x.ndim == 4 else len(x)
    assert num_images(viz.film_strip(x)) == 6 * clips
    assert num_images(viz.film_strip(x, every=4)) == 2 * clips
    blocks = list(x.split(2, dim=-4))
    assert num_images(viz.visualize_autoregressive_generation(blocks)) == 18 + 1  # one in the key
    assert num_images(viz.visualize_denoising_process(blocks, blocks, [1, 0.9, 0.6])) == 12
    assert num_images(viz.visualize_denoising_process(x, x, range(6))) == 12


def num_images(fig):
    return len(fig.findobj(AxesImage))


def test_growth_shows_the_past_and_hides_the_future():
    """Row i holds the true pixels of blocks 0..i of the first sample, and noise behind them."""
    x = video(2, 6, 1, 8, 8)
    images = viz.visualize_autoregressive_generation(block for block in x.split(2, dim=1)).findobj(AxesImage)[1:]
    shown = {(i, k): image.get_array() for (i, k), image in zip(np.ndindex(3, 6), images, strict=True)}
    for (block, frame), image in shown.items():
        truth = (x[0, frame, 0] + 1).numpy() / 2
        assert (image.shape == truth.shape and np.allclose(image, truth)) == (frame < 2 * (block + 1))


def test_film_marks_blocks_and_the_training_length():
    """Gaps widen at block borders only, and the line stands between the last trained frame and the next."""
    fig = viz.film_strip(video(8, 1, 8, 8), train_frames=6, frames_per_block=(1, 3))
    left, right, *_ = np.array([image.get_extent() for image in fig.findobj(AxesImage)]).T
    gaps = left[1:] - right[:-1]
    assert np.flatnonzero(gaps > 1.5 * gaps.min()).tolist() == [0, 3, 6]
    (line,) = fig.axes[0].lines
    assert right[5] < line.get_xdata()[0] < left[6]
    assert not viz.film_strip(video(6, 1, 8, 8), train_frames=6).axes[0].lines


def test_pixels_are_shown_as_half_x_plus_one():
    """-1 is black, 0 is middle grey, 1 is white, and what lies outside is clipped."""
    (clip,) = to_clips(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).reshape(5, 1, 1, 1))
    assert clip.ravel().tolist() == [0, 0, 0.5, 1, 1]


@pytest.mark.parametrize("channels", [1, 3])
def test_gif_round_trip_is_exact(channels, tmp_path):
    """A GIF has every frame, also of a frozen video, the enlarged size, exact pixels and the frame rate."""
    x = video(7, channels, 6, 9)
    x[3] = x[4] = x[2]
    path = viz.create_video_gif(x.requires_grad_(), tmp_path / "new" / "x.gif", fps=10, scale=2)
    expected = np.rint(255 * (x.detach() + 1).numpy() / 2).astype(np.uint8)
    expected = expected.repeat(2, axis=2).repeat(2, axis=3).transpose(0, 2, 3, 1)
    assert (pixels(path) == expected).all()
    assert pixels(path).shape == (7, 12, 18, 3)
    assert Image.open(path).info["duration"] == 100
    assert Image.open(path).info["loop"] == 0


def test_batches_play_side_by_side(tmp_path):
    """Two samples become one wider GIF, first sample on the left."""
    x = torch.stack([torch.full((4, 1, 8, 8), -1.0), torch.full((4, 1, 8, 8), 0.0)])
    frames = pixels(viz.create_video_gif(x, tmp_path / "x.gif", scale=2))
    assert len(frames) == 4
    assert (frames[:, :, :16] == 0).all() and (frames[:, :, -16:] == 128).all()
    assert frames.shape[2] == 16 + 4 + 16


@pytest.mark.parametrize("shape", SHAPES)
def test_mp4_has_every_frame_at_an_even_size(shape, tmp_path):
    """MP4 pads to even sizes, which H.264 needs, and keeps brightness."""
    x = torch.full(shape, 0.5)[..., :7, :7]
    frames = iio.imread(viz.save_video(x, tmp_path / "x.mp4", scale=3))
    assert len(frames) == 6
    assert frames.shape[1] == 22 and frames.shape[2] % 2 == 0
    assert abs(frames[:, 5:15, 5:15].mean() - 191) < 6


@pytest.mark.parametrize("shape", SHAPES)
def test_grid_by_suffix(shape, tmp_path):
    """GIF and MP4 play the clips together; PNG is rows x time with exact pixels."""
    x = video(*shape)
    clips, height, width = to_clips(x), 4 * shape[-2], 4 * shape[-1]
    assert len(pixels(viz.save_video_grid(x, tmp_path / "x.gif"))) == 6
    assert len(iio.imread(viz.save_video_grid(x, tmp_path / "x.mp4"))) == 6
    sheet = iio.imread(viz.save_video_grid(x, tmp_path / "x.png"))
    assert sheet.shape == (len(clips) * (height + 4) - 4, 6 * (width + 4) - 4, 3)
    last = np.broadcast_to(np.rint(255 * clips[-1][-1]), (*shape[-2:], 3))
    assert (sheet[-height:, -width:][::4, ::4] == last).all()


def test_grid_layout_and_labels(tmp_path):
    """Columns are obeyed, an incomplete last row is white, and labels add room above the pictures only."""
    x = torch.full((3, 2, 1, 8, 8), -1.0)
    plain = pixels(viz.save_video_grid(x, tmp_path / "plain.gif", columns=2))
    assert plain.shape[1:3] == (68, 68) and (plain[:, -32:, -32:] == 255).all()
    labels = ["a 3 moving right", "a 7 moving down and on and on", ""]
    labelled = pixels(viz.save_video_grid(x, tmp_path / "labelled.gif", columns=3, labels=labels))
    assert (labelled[:, -32:, :32] == 0).all() and (labelled[:, -32:, 72:] == 0).all()
    assert (labelled[:, :-32, :32] < 128).any() and (labelled[:, :-32, 72:] == 255).all()


def test_metric_curves_show_mean_band_and_training_length():
    """Line = mean over seeds, band = their range, dotted line behind the last trained frame; NaN is a gap."""
    values = np.stack([np.arange(6.0), np.arange(6.0) + 2])
    values[:, 3] = np.nan
    data = {"ours": {"a": torch.tensor(values), "b": torch.ones(4)}, "theirs": {"b": np.zeros(6)}}
    fig = viz.plot_metric_curves(data, train_frames=4)
    first, second = fig.axes
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["a", "b"]
    assert np.ma.allequal(first.lines[0].get_ydata(), np.ma.masked_invalid(np.arange(6.0) + 1))
    assert np.ma.is_masked(first.lines[0].get_ydata()[3])
    vertices = np.concatenate([path.vertices for path in first.collections[0].get_paths()])
    assert (vertices[:, 1].min(), vertices[:, 1].max()) == (0, 7)
    assert first.lines[-1].get_xdata()[0] == 3.5
    assert len(second.lines) == 3 and not second.collections
    styles = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in second.lines}
    assert len(styles) == 3


def test_no_two_curves_look_alike():
    """Nor do those that follow when all colours are used up."""
    fig = viz.plot_metric_curves({str(run): {"a": np.zeros(9)} for run in range(20)})
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in fig.axes[0].lines}) == 20


def test_chosen_metrics_keep_their_order():
    """`metrics` selects and orders the panels."""
    fig = viz.plot_metric_curves(curves(), metrics=["speed", "ink_mass"])
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["speed", "ink mass"]


def test_cache_growth_bars_add_up():
    """Light and dark bars together are the sizes, and dark is the growth; panels share one scale."""
    fig = viz.visualize_kv_cache_growth({"all": [3, 6, 9], "window": [3, 6, 5]})
    kept, grown = (np.array([bar.get_height() for bar in bars]) for bars in fig.axes[1].containers)
    assert (kept + grown).tolist() == [3, 6, 5] and grown.tolist() == [3, 3, 0]
    assert fig.axes[0].get_ylim() == fig.axes[1].get_ylim()


def test_mask_colours_tell_why_a_frame_is_seen():
    """Own block, sink and past are told apart; a look at the future or at another noisy block stands out."""
    mask = PAST.copy()
    mask[0, 5] = True
    kinds = mask_kinds(mask, 3, 3, 1)
    assert [kinds[0, 0], kinds[4, 1], kinds[7, 4], kinds[0, 5], kinds[0, 6]] == [
        "clean",
        "sink",
        "cached",
        "leak",
        "",
    ]
    assert mask_kinds(PAST[-3:], 3, 0, 1).tolist() == mask_kinds(PAST, 3, 0, 1)[-3:].tolist()
    halves = mask_kinds(FORCING, 3, 0, 2)
    assert [halves[20, 4], halves[20, 20], halves[20, 17]] == ["cached", "clean", "leak"]


def test_block_starts():
    """A tuple's last entry repeats; no blocks, no borders."""
    assert block_starts(8, 3) == [0, 3, 6]
    assert block_starts(8, (1, 3)) == [0, 1, 4, 7]
    assert block_starts(8, None) == []


BAD_VIDEOS = {
    "rank 3": (torch.zeros(1, 8, 8), "got shape"),
    "two channels": (torch.zeros(4, 2, 8, 8), "C = 1 or 3"),
    "no frames": (torch.zeros(0, 1, 8, 8), "got shape"),
    "bytes": (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), "x / 127.5 - 1"),
    "NaN": (torch.full((4, 1, 8, 8), torch.nan), "diverged"),
    "nothing": ([], "at least one"),
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_bad_videos_get_one_sentence(name, tmp_path):
    """Whatever is not a video is refused with the fix, and no file is left behind."""
    bad, words = BAD_VIDEOS[name]
    calls = [
        lambda: viz.film_strip(bad),
        lambda: viz.create_video_gif(bad, tmp_path / "x.gif"),
        lambda: viz.save_video_grid(bad, tmp_path / "x.png"),
        lambda: viz.visualize_autoregressive_generation([bad]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


X = video(4, 1, 8, 8)
MISTAKES = {
    "gif suffix": (lambda: viz.create_video_gif(X, "x.mp4"), r"end its name in \.gif"),
    "video suffix": (lambda: viz.save_video(X, "x.avi"), r"\.gif or \.mp4"),
    "grid suffix": (lambda: viz.save_video_grid(X, "x"), r"\.gif or \.mp4 or \.png"),
    "picture suffix": (lambda: viz.create_algorithm_diagram("x.mp4"), r"\.png, \.svg or \.pdf"),
    "scale": (lambda: viz.save_video(X, "x.gif", scale=0), "whole number"),
    "fps": (lambda: viz.save_video(X, "x.gif", fps=0), "fps"),
    "lengths": (lambda: viz.save_video_grid([X, X[:2]], "x.gif"), "cut the longer"),
    "film labels": (lambda: viz.film_strip(X, labels=["a", "b"]), "2 labels for 1 clips"),
    "every": (lambda: viz.film_strip(X, every=0), "every"),
    "unsplit": (lambda: viz.visualize_autoregressive_generation(X), "split"),
    "no blocks": (lambda: viz.visualize_autoregressive_generation([]), "empty"),
    "steps": (
        lambda: viz.visualize_denoising_process([X], [X], STEPS),
        "1 noisy, 1 denoised and 4 timesteps",
    ),
    "no sizes": (lambda: viz.visualize_kv_cache_growth([]), "empty"),
    "no frames held": (lambda: viz.show_cache([]), "cache.frames"),
    "metric": (lambda: viz.plot_metric_curves(curves(), metrics=["fid"]), "fid: choose from digit_accuracy"),
    "no curves": (lambda: viz.plot_metric_curves({}), "no run"),
    "curve shape": (lambda: viz.plot_metric_curves({"a": {"b": np.zeros((1, 2, 3))}}), "num_seeds"),
    "mask": (lambda: viz.show_mask(np.zeros((3, 3))), "bool"),
    "halves": (lambda: viz.show_mask(PAST[:9, :9], halves=("a", "b")), "even square"),
    "blocks": (lambda: viz.film_strip(X, frames_per_block=0), "frames_per_block"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_one_sentence(name, tmp_path, monkeypatch):
    """A user's mistake is a ValueError of one line that names the fix, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    call, words = MISTAKES[name]
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_pictures_ignore_and_keep_the_users_settings():
    """A dark user theme changes nothing in our pictures, and our look does not leak into the user's."""
    with plt.style.context("dark_background"):
        before = dict(plt.rcParams)
        fig = viz.film_strip(X)
        assert dict(plt.rcParams) == before
    assert fig.get_facecolor() == (1, 1, 1, 1)
    assert fig.axes[0].texts[-1].get_color() == style.SOFT


def test_a_notebook_shows_the_picture():
    """Jupyter asks for _repr_png_; the answer is a PNG."""
    assert viz.film_strip(X)._repr_png_().startswith(b"\x89PNG")


def test_the_package_is_a_leaf_without_pyplot():
    """It imports no other module of this repository, not pyplot, which would choose a backend, and widgets only to show
    them."""
    allowed = {"torch", "numpy", "matplotlib", "imageio", "PIL", "visualization", *sys.stdlib_module_names}
    allowed |= {"ipywidgets", "IPython"}
    files = list(Path(viz.__file__).parent.glob("*.py"))
    assert len(files) > 5
    for file in files:
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert {name.split(".")[0] for name in names} <= allowed, file
        assert "matplotlib.pyplot" not in names, file
        at_top = [ast.unparse(node) for node in nodes[0].body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not any("ipywidgets" in line or "IPython" in line for line in at_top), file


def cells_of(fig):
    """Frames that the last row of the mask of a moment sees, by colour: columns of its cells."""
    cells = [p for p in fig.axes[0].patches if isinstance(p, Rectangle) and p.get_x() > 9 and p.get_linewidth() == 0.6]
    last = max(round(p.get_y(), 3) for p in cells)
    row = sorted((p for p in cells if round(p.get_y(), 3) == last), key=lambda p: p.get_x())
    return [to_hex(p.get_facecolor()).upper() for p in row]


def test_a_moment_shows_what_is_held_and_who_is_seen():
    """Three past frames, one of them a sink, and the block itself; evicted in the memory pass is what `after` lacks."""
    figures = list(viz.draw_moments(MOMENTS))
    assert len(figures) == 4
    sink, cached, own = (style.LOOKS[kind].edge for kind in ("sink", "cached", "clean"))
    assert cells_of(figures[2]) == [sink, cached, cached, own, own, own] == cells_of(figures[3])
    evicted = [line for line in figures[3].axes[0].lines if line.get_color() == style.LOOKS["evicted"].edge]
    assert len(evicted) == 4  # frames 1 to 3, and the one of the legend
    with pytest.raises(ValueError, match="no moments: give one for every call of the network"):
        list(viz.draw_moments([]))


def test_figures_become_a_film(tmp_path):
    """As many pictures as figures, of one size, in order, in a folder that was not there."""
    path = viz.animate(viz.draw_moments(MOMENTS), tmp_path / "new" / "moments.gif", fps=2, dpi=40)
    frames = pixels(path)
    assert len(frames) == 4 and frames[0].std() > 5
    assert all((frames[i] != frames[i + 1]).any() for i in range(3))
    assert iio.immeta(path, index=0)["duration"] == 500
    with pytest.raises(ValueError, match="no figures to animate"):
        viz.animate([], tmp_path / "none.gif")


def test_a_figure_says_its_words():
    """Title, labels and legend once each and no numbers, cut at a word; what a screen reader gets."""
    figure = viz.plot_lines({"kept": [1, 2], "anew": [2, 3]}, "frame", "error, pixels", "Two caches")
    assert set(style.words_in(figure).split("; ")) == {"Two caches", "frame", "error, pixels", "kept", "anew"}
    assert not set("$\\{") & set(style.words_in(viz.create_algorithm_diagram(), most=9999))
    short = style.words_in(viz.create_algorithm_diagram(), most=60)
    assert len(short) <= 60 and short.startswith("Self-Forcing: train as you infer;") and short.endswith("\u2026")


def test_signs_of_a_run_have_a_fitting_scale():
    """Powers of ten where there are some, and straight where a value is not above 0, which a log scale would hide."""
    log = {"error": [0.1, 30.0], "ink": [0.11, 0.12], "signed": [-0.3, 20.0]}
    figure = viz.plot_sick_runs({"healthy": (FILM, log)})
    assert [ax.get_yscale() for ax in figure.axes[1:]] == ["log", "linear", "linear"]
