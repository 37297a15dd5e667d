"""Attention maps are a naive softmax summed over frames, for every model and way of calling it; files and pictures."""

import ast
import json
import re
import shlex
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import AxesImage
from torch.utils._python_dispatch import TorchDispatchMode

import attention_maps
import visualization as viz
from attention_maps import Capture, attention_mass, capture_video, layer_names, mean_logits, sink_score
from dynamic_video_sf import Guided, RolloutConfig, generate, prefill, rollout
from flow_match import FlowMatchScheduler
from generate import load_model, sample_videos
from randomness import generator, randn
from tiny_causal_wan import TinyCausalWanModel, WanConfig

REPOSITORY = Path(__file__).resolve().parents[1]
SCHEDULER = FlowMatchScheduler()
STEPS = (1000, 500)
SHRUNK = {"ffn_dim": 48, "num_layers": 2, "text_dim": 8, "text_len": 6}
MODELS = {  # config and frame size: the Moving MNIST model with fewer layers; Wan's latents, patches and head counts
    "tiny": (WanConfig(num_layers=2), (24, 24)),
    "wan t2v": (WanConfig(**SHRUNK, in_dim=16, out_dim=16, dim=72, num_heads=12, patch_size=(1, 2, 2)), (4, 6)),
    "wan i2v": (
        WanConfig(**SHRUNK, model_type="i2v", in_dim=36, out_dim=16, dim=30, num_heads=5, patch_size=(1, 2, 2)),
        (4, 6),
    ),
}
# What each block sees of its past, written by hand: the sink and the window of the cache.
WAYS = {
    "blocks of 3": ({"frames_per_block": 3}, [(), (0, 1, 2), (0, 1, 2, 3, 4, 5)]),
    "blocks 1, 3, 3": ({"frames_per_block": (1, 3)}, [(), (0,), (0, 1, 2, 3)]),
    "sink and window": (
        {"frames_per_block": (1, 3), "sink_frames": 1, "window_frames": 3},
        [(), (0,), (0, 1, 2, 3), (0, 4, 5, 6)],
    ),
}


def build(name="wan t2v", seed=0):
    """A model whose every parameter is random, sharp enough to tell frames apart; noise; conditions."""
    config, size = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TinyCausalWanModel(config).requires_grad_(False)
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model, size


def inputs(model, size, frames, batch=2):
    """Noise [b f c h w] and conditions, different for every sample."""
    config = model.config
    rng = [generator(i, "attention") for i in range(batch)]
    cond = {"prompt_embeds": randn((batch, 4, config.text_dim), rng)}
    if config.model_type == "i2v":
        cond["clip_features"] = randn((batch, 257, 1280), rng)
        cond["image_latents"] = randn((batch, frames, 20, *size), rng)
    return randn((batch, frames, config.out_dim, *size), rng), cond


class Spy:
    """An attention function that keeps what it was given."""

    def __init__(self, kernel):
        self.kernel, self.seen = kernel, []

    def __call__(self, q, k, v, **options):
        self.seen.append((options["layer"], options["kind"], q.double(), k.double()))
        return self.kernel(q, k, v, **options)

    def of(self, layer, kind="self"):
        return [(q, k) for *where, q, k in self.seen if where == [layer, kind]]


def naive(q, k, num_groups, logits):
    """Over all tokens at once: [n, queries, key groups], a mean over samples."""
    table = torch.einsum("bqnd, bknd -> bnqk", q, k) / q.shape[-1] ** 0.5
    table = (table if logits else table.softmax(-1)).unflatten(-1, (num_groups, -1))
    return (table.mean(-1) if logits else table.sum(-1)).mean(0)


def naive_maps(calls, pasts, sizes, logits):
    """Self-attention over frames, [n, F, F], from the queries and keys of one call per block."""
    num_frames = sum(sizes)
    full = torch.full((calls[0][0].shape[2], num_frames, num_frames), -torch.inf if logits else 0.0).double()
    for (q, k), past, size, end in zip(calls, pasts, sizes, accumulate(sizes), strict=True):
        frames = [*range(end - size, end)]
        tokens = naive(q, k, len(past) + size, logits)
        full[:, end - size : end, [*past, *frames]] = tokens.unflatten(1, (size, -1)).mean(2)
    return full


@pytest.mark.parametrize("step, logits", [("first", False), ("first", True), ("context", False)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_rollout_maps_are_a_naive_softmax(name, way, step, logits, monkeypatch):
    """Every layer, with several heads, 3-D patches, uneven blocks, sink and window; what is not seen is exact."""
    monkeypatch.setattr(attention_maps, "QUERIES", 5)  # a frame's queries in several parts, the last one smaller
    settings, pasts = WAYS[way]
    sizes = [3] * len(pasts) if settings["frames_per_block"] == 3 else [1] + [3] * (len(pasts) - 1)
    model, size = build(name)
    noise, cond = inputs(model, size, sum(sizes))
    model.attention = spy = Spy(model.attention)
    with Capture(model, step=step, logits=logits) as watched:
        generate(watched, SCHEDULER, noise, cond, RolloutConfig(STEPS, **settings))
    assert watched.block_sizes == sizes
    assert watched.t == (1 if step == "first" else 0)
    for layer, layer_name in enumerate(layer_names(model)):
        per_block = len(STEPS) + 1
        calls = spy.of(layer)[0 if step == "first" else len(STEPS) :: per_block]
        expected = naive_maps(calls, pasts, sizes, logits)
        maps = watched.maps(layer_name)
        assert (maps == watched.empty).equal(expected == watched.empty)  # the future and the evicted: exactly 0
        torch.testing.assert_close(maps.double(), expected, rtol=1e-4, atol=1e-5)
        assert logits or torch.allclose(maps.sum(-1), torch.ones(()))
        torch.testing.assert_close(
            watched.last_block(layer_name).double(), expected[:, -sizes[-1] :].mean(1), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("step", ["first", "context"])
@pytest.mark.parametrize("way", WAYS)
def test_cached_maps_are_those_of_the_masks(way, step):
    """Memory passes are the block-causal call on the clean clip, first calls the noisy half of teacher forcing."""
    settings, pasts = WAYS[way]
    config = RolloutConfig(STEPS, **settings)
    model, size = build()
    noise, cond = inputs(model, size, 9 if len(pasts) == 3 and way == "blocks of 3" else 3 * len(pasts) - 2)
    names = [*layer_names(model), *layer_names(model, "cross")]
    with Capture(model, names, step=step) as cached:
        video = generate(cached, SCHEDULER, noise, cond, config)
    with Capture(model, names) as masked:
        if step == "context":
            masked(video, 0.0, cond, **settings)
        else:
            masked(noise, 1.0, cond, clean=video, **settings)
    assert masked.block_sizes == cached.block_sizes
    for name in names:
        torch.testing.assert_close(masked.maps(name), cached.maps(name), rtol=1e-4, atol=1e-5)
        assert (masked.maps(name) == 0).equal(cached.maps(name) == 0)


def test_bidirectional_maps_see_every_frame():
    """A teacher's call is one block without a past, and has no sink."""
    model, size = build()
    noise, cond = inputs(model, size, 5)
    with Capture(model) as watched:
        watched(noise, 1.0, cond)
    assert watched.block_sizes == [5]
    assert (watched.maps("blocks.0.self_attn") > 0).all()
    assert watched.sink_scores().isnan().all()


@pytest.mark.parametrize("name", ["wan t2v", "wan i2v"])
def test_cross_attention_is_kept_apart(name):
    """Its columns are the prompt's tokens, padding included; an image that is crossed too is left out."""
    model, size = build(name)
    noise, cond = inputs(model, size, 7)
    model.attention = spy = Spy(model.attention)
    names = ["blocks.1.cross_attn", "blocks.1.self_attn"]
    with Capture(model, names) as watched:
        generate(watched, SCHEDULER, noise, cond, RolloutConfig((1000,), frames_per_block=(1, 3)))
    each = 2 if model.config.model_type == "i2v" else 1
    calls = spy.of(1, "cross")[:: 2 * each]  # one denoising call and one memory pass per block
    expected = torch.cat([naive(q, k, 6, False).unflatten(1, (-1, 6)).mean(2) for q, k in calls], dim=1)
    torch.testing.assert_close(watched.maps(names[0]).double(), expected, rtol=1e-4, atol=1e-5)
    assert watched.maps(names[1]).shape == (model.config.num_heads, 7, 7)
    assert watched.sink_scores().shape == (1, model.config.num_heads)


def test_frames_that_were_given_count_as_one_block():
    """A rollout that continues a video: columns keep their absolute index, rows of given frames stay empty."""
    model, size = build()
    noise, cond = inputs(model, size, 7)
    config = RolloutConfig((1000,), frames_per_block=(1, 3))
    cache = prefill(model, SCHEDULER, noise[:, :1], cond, config)
    with Capture(model) as watched:
        generate(watched, SCHEDULER, noise[:, 1:], cond, config, cache=cache)
    maps = watched.maps("blocks.0.self_attn")
    assert watched.block_sizes == [1, 3, 3]
    assert (maps[:, 0] == 0).all() and (maps[:, 1:, 0] > 0).all()


def test_watching_changes_nothing_and_ends():
    """The video is the same bit for bit, and the model gets its attention back, also when the rollout fails."""
    model, size = build()
    kernel = model.attention
    noise, cond = inputs(model, size, 6)
    plain = generate(model, SCHEDULER, noise, cond, RolloutConfig(STEPS), rng=generator(0))
    with Capture(model, [*layer_names(model), *layer_names(model, "cross")]) as watched:
        video = generate(watched, SCHEDULER, noise, cond, RolloutConfig(STEPS), rng=generator(0))
    assert torch.equal(video, plain)
    assert model.attention is kernel
    with pytest.raises(ValueError, match="whole number of blocks"), Capture(model) as watched:
        next(rollout(watched, SCHEDULER, noise[:, :4], cond, RolloutConfig(STEPS)))
    assert model.attention is kernel
    with pytest.raises(ValueError, match="Nothing was captured"):
        watched.maps("blocks.0.self_attn")


@pytest.mark.parametrize("step", ["first", "context"])
def test_of_a_guided_rollout_the_prompted_call_is_seen(step):
    """Guidance calls the model twice; the map is the one with the prompt."""
    model, size = build()
    noise, cond = inputs(model, size, 6)
    uncond = {"prompt_embeds": torch.zeros_like(cond["prompt_embeds"])}
    maps = []
    for scale in (1.0, 1.0 + 1e-7):  # the same video, made with one call and with two
        with Capture(model, step=step) as watched:
            generate(Guided(watched, uncond, scale), SCHEDULER, noise, cond, RolloutConfig((1000,)))
        maps.append(watched.maps("blocks.1.self_attn"))
    torch.testing.assert_close(*maps, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """Counts the entries of the largest tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.entries = max(self.entries, made.numel())
        return made


def test_memory_grows_with_tokens_not_with_their_square(monkeypatch):
    """Four times the tokens of a frame: four times the largest table, one frame's keys wide; logits need none."""
    monkeypatch.setattr(attention_maps, "QUERIES", 16)
    for tokens in (50, 200):
        q, k = randn((2, 1, 3, tokens, 1, 4), generator(0))
        sees = torch.ones(3, 3, dtype=torch.bool)
        with Largest() as largest:
            attention_mass(q, k, sees)
        assert largest.entries == 16 * tokens
        with Largest() as largest:
            mean_logits(q, k)
        assert largest.entries < q.numel()


def test_sink_score_by_hand():
    """The oldest seen past frame against the mean of the other seen ones; the block's own frames do not count."""
    mass = torch.tensor([[0.0, 0.3, 0.1, 0.2, 0.4], [0.0, 0.1, 0.2, 0.4, 0.3]])
    assert sink_score(mass, [1, 3, 1]).tolist() == pytest.approx([0.15, -0.2])
    assert sink_score(mass.log(), [1, 3, 1]).tolist() == pytest.approx(
        [np.log(0.3) - np.log(0.02) / 2, np.log(0.1) - np.log(0.08) / 2], rel=1e-5
    )
    assert sink_score(mass, [2, 3]).isnan().all()


# ------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def student():
    return load_model("checkpoints/student.safetensors")


@pytest.mark.parametrize("step", ["first", "context"])
def test_the_video_is_that_of_the_generator(student, step, monkeypatch):
    """The attention comes from the very video that generate.py makes of prompt and seed."""
    seen = []
    prompts = ["a 3 moving right", "a 7 moving up"]
    for make in (
        lambda: sample_videos(student, prompts, num_frames=6, seed=5),
        lambda: capture_video(student, prompts, num_frames=6, seed=5, step=step),
    ):
        spy = Spy(student.model.attention)
        with monkeypatch.context() as patch:
            patch.setattr(student.model, "attention", spy)
            made = make()
        seen.append(spy.of(5))
    assert len(seen[0]) == 2 * 4 + 1
    for (q, k), (other_q, other_k) in zip(seen[0], seen[1], strict=False):  # the memory pass of the last block is extra
        assert q.equal(other_q) and k.equal(other_k)
    last_q, last_k = seen[1][-1] if step == "context" else seen[1][5]
    expected = naive(last_q, last_k, 6, False).unflatten(1, (3, -1)).mean(2)
    torch.testing.assert_close(made.maps("blocks.5.self_attn")[:, 3:].double(), expected, rtol=1e-4, atol=1e-5)


COMMANDS = {
    "student": ([], 1.0),
    "context": (["--step", "context", "--prompts", "a 3 moving right", "a 5 moving up"], 0.15),
    "untrained": (["--no_checkpoint", "--checkpoint", "none.pt"], 1.0),
    "teacher": (["--checkpoint", "checkpoints/teacher.safetensors", "--num_frames", "12", "--logits"], 1.0),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_file(name, tmp_path, monkeypatch, capsys):
    """Everything that was promised, readable without running code; the same command writes the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("generate.TEACHER_STEPS", 1)
    options, t = COMMANDS[name]
    path = tmp_path / "cache" / "layer3.pt"
    arguments = ["--layer_index", "3", "--num_frames", "6", "--output_path", str(path), *options]
    attention_maps.main(arguments)
    data = torch.load(path, weights_only=True)
    num_frames = 12 if name == "teacher" else 6
    assert data["full_frame_attention"].shape == (2, num_frames, num_frames)
    assert data["block_sizes"] == ([12] if name == "teacher" else [3, 3])
    last = data["full_frame_attention"][:, -data["block_sizes"][-1] :].mean(1)
    assert data["last_block_frame_attention"].equal(last)
    assert (data["layer"], data["t"], data["logits"]) == (3, t, name == "teacher")
    assert data["prompt"] == "a 3 moving right" + ("\na 5 moving up" if name == "context" else "")
    assert name == "teacher" or (data["full_frame_attention"][:, :3, 3:] == 0).all()
    assert f"{path}: blocks.3.self_attn at t = {t:g}, {num_frames} frames" in capsys.readouterr().out
    if name == "untrained":
        again = torch.load(attention_maps.main(arguments), weights_only=True)
        assert again["full_frame_attention"].equal(data["full_frame_attention"])


MISTAKES = {
    "layer": (["--layer_index", "6"], "No layer blocks.6.self_attn: the model's are 0 to 5"),
    "negative layer": (["--layer_index", "-1"], "the model's are 0 to 5"),
    "frames": (["--num_frames", "7"], "use 6 or 9 frames"),
    "prompt": (["--prompts", "a cat"], "a cat"),
    "checkpoint": (["--checkpoint", "none.pt"], "There is no checkpoint none.pt"),
    "whole clips": (["--checkpoint", "checkpoints/teacher.safetensors", "--step", "context"], "use --step first"),
    "output": (["--num_frames", "3", "--output_path", "/proc/x/y.pt"], "/proc/x"),
    "picture": (["--num_frames", "3", "--picture", "x.txt"], "end its name in .png"),
    "random Wan": (["--no_checkpoint", "--model_path", "x"], "--model_path is for Wan: leave one of them out"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_one_sentence(name, tmp_path, monkeypatch):
    """What a user gets wrong is an error that names it, of a kind that main shows as one line; no picture is left."""
    monkeypatch.chdir(tmp_path)
    arguments, words = MISTAKES[name]
    with pytest.raises((ValueError, OSError)) as error:
        attention_maps.main(arguments)
    assert words in str(error.value)
    assert not list(tmp_path.glob("x*"))


def test_a_step_that_does_not_exist():
    model, _ = build()
    with pytest.raises(ValueError, match="'first' or 'context'"):
        Capture(model, step="last")


# ----------------------------------------------------------------------------------------------------- pictures


def test_heat_maps_show_the_numbers_and_hatch_what_was_not_seen(tmp_path):
    """One image per head on one scale; cells of exactly 0, or -inf, stay empty; lines lie between blocks."""
    mass = torch.tensor([[[1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [0.1, 0.0, 0.9]]]).repeat(5, 1, 1)
    for maps in (mass, mass.log()):
        fig = viz.show_frame_attention(maps, tmp_path / "new" / "maps.png", block_sizes=[1, 2])
        images = [image for ax in fig.axes[:5] for image in ax.findobj(AxesImage)]
        assert len(images) == 5 and len({image.get_clim() for image in images}) == 1
        shown = images[0].get_array()
        assert (shown.mask == (mass[0] == 0).numpy()).all()
        assert np.allclose(shown.compressed(), maps[0][mass[0] > 0])
        assert [line.get_xdata()[0] for line in fig.axes[0].lines[1::2]] == [0.5]
    assert (tmp_path / "new" / "maps.png").exists()


def test_bars_tell_the_last_block_from_the_past():
    """Heights are the numbers, the last block's own frames look different, unseen frames are hatched."""
    fig = viz.plot_last_block(torch.tensor([[0.0, 0.3, 0.2, 0.5]]), block_sizes=[2, 1, 1])
    past, own = fig.axes[0].containers
    assert [bar.get_height() for bar in [*past, *own]] == pytest.approx([0, 0.3, 0.2, 0.5])
    assert len(own) == 1 and own[0].get_hatch() != past[0].get_hatch()
    hatched = [patch for patch in fig.axes[0].patches if patch.get_hatch() == "////"]
    assert [patch.get_x() for patch in hatched] == [-0.5]


def test_sink_scores_have_a_dot_per_head():
    """All heads of all layers, and their mean."""
    fig = viz.plot_sink_scores(torch.tensor([[0.1, 0.3], [0.0, -0.2], [0.2, 0.2]]))
    (dots,) = fig.axes[0].collections
    points = [[0, 0.1], [0, 0.3], [1, 0], [1, -0.2], [2, 0.2], [2, 0.2]]
    assert np.allclose(dots.get_offsets(), points)
    assert fig.axes[0].lines[1].get_ydata() == pytest.approx([0.2, -0.1, 0.2])


@pytest.mark.parametrize(
    "draw",
    [
        lambda: viz.show_frame_attention(torch.ones(3, 3)),
        lambda: viz.show_frame_attention(torch.ones(1, 2, 3)),
        lambda: viz.plot_last_block(torch.ones(3), block_sizes=[3]),
        lambda: viz.plot_sink_scores([0.1]),
    ],
)
def test_wrong_shapes_get_one_sentence(draw):
    with pytest.raises(ValueError, match=r"must be \[.*got \["):
        draw()


# ------------------------------------------------------------------------------------------- documents, notebook


DOCUMENTS = ("attention_extraction.md", "attention_visualization.md")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_documents_say_what_happens(document, tmp_path, monkeypatch, capsys):
    """Every command and every piece of Python runs as printed, and the sink scores beside commands are theirs."""
    monkeypatch.chdir(tmp_path)
    text = (REPOSITORY / "docs" / document).read_text()
    for line in re.findall(r"^python attention_maps.py.*", text, re.M):
        command, _, comment = line.partition("#")
        attention_maps.main(shlex.split(command)[2:])
        said = capsys.readouterr().out.rpartition("by head: ")[2]
        if "by head: " in comment:
            scores = [[float(score) for score in words.split(", ")] for words in (said, comment.rpartition(": ")[2])]
            assert scores[0] == pytest.approx(scores[1], abs=0.01), line
    space = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(code, document, "exec"), space)
    assert space and list(tmp_path.rglob("*.pt"))


def test_the_notebook_runs_and_defines_nothing(tmp_path, monkeypatch):
    """Cell by cell, in a folder beside outputs/; it is saved without outputs."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    notebook = json.loads((REPOSITORY / "notebooks" / "extract_all_attention.ipynb").read_text())
    space = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            tree = ast.parse("".join(cell["source"]))
            assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda) for node in ast.walk(tree))
            exec(compile(tree, "notebook", "exec"), space)
    assert len(list((tmp_path / "outputs").rglob("*.pt"))) == 6
