"""The benchmarks run, count what they say they count, and compare equal work."""

import json

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.full_scale import main as full_scale
from benchmarks.measure import count_gflop, gemm_gflops, median_seconds, peak_mib
from benchmarks.plan import FAST
from benchmarks.report import growth, markdown, table
from benchmarks.steps import SCHEDULER, WORK, inputs, network, settings
from benchmarks.streaming import WAYS
from dynamic_video_sf import generate
from tiny_causal_wan import matmul_attention

MINIATURE = FAST.sizes[0]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return main(["--fast", "--json", str(tmp_path_factory.mktemp("benchmarks") / "deep" / "results.json")])


def test_the_fast_run_measures_everything(written):
    """One row per kind of work and precision, one time per block and way, one peak per clip length and rule."""
    results = json.loads(written.read_text())
    rows = {(step["work"], step["precision"]) for step in results["steps"]}
    assert rows == {(work, precision) for work in WORK for precision in ("fp32", "bf16")}
    assert results["seconds_per_block"].keys() == WAYS.keys()
    assert all(len(times) == FAST.num_blocks for times in results["seconds_per_block"].values())
    assert results["first_frame"] == [0, 3, 6, 9]
    assert results["memory_frames"] == list(FAST.memory_frames)
    assert len(results["peak_mib"]) == 2


def test_the_numbers_are_plausible(written):
    """Nothing is faster than the machine, nothing takes no time, rates and seconds agree."""
    results = json.loads(written.read_text())
    for step in results["steps"]:
        assert 0 < step["fraction_of_peak"] < 1.05
        assert step["tokens_per_second"] * step["seconds"] == pytest.approx(MINIATURE.tokens)
        rate = step["gflop"] / step["seconds"]
        assert step["fraction_of_peak"] == pytest.approx(rate / max(results["gemm_gflops"][step["precision"]].values()))
    assert all(seconds > 0 for times in results["seconds_per_block"].values() for seconds in times)


def test_memory_grows_only_with_the_frames_that_keep_a_gradient(written):
    """Twice the rollout with the same gradient costs far less than with twice the gradient."""
    windowed, whole = json.loads(written.read_text())["peak_mib"].values()
    assert windowed[0] == pytest.approx(whole[0], rel=0.01)
    assert whole[1] > 1.6 * whole[0]
    assert windowed[1] < 1.3 * windowed[0]


def test_the_record_names_no_machine(written):
    """Cores, threads and versions, but no host name and no path."""
    results = json.loads(written.read_text())
    assert {"cores", "threads", "torch"} <= results["machine"].keys()
    assert "/" not in written.read_text()


def test_the_tables_hold_the_numbers(written):
    """README.md beside the JSON is made of it, with every way and every kind of work in a row."""
    text = written.with_name("README.md").read_text()
    assert text == markdown(json.loads(written.read_text()))
    assert all(f"| {name} |" in text for name in (*WORK, *WAYS))


def test_flops_of_a_teacher_step_are_those_of_its_matrices(written):
    """Forward and backward of every linear map and of both attentions, counted by hand, whatever the kernel."""
    model, tokens = MINIATURE.model, MINIATURE.tokens
    e, per_clip = model.dim, tokens // MINIATURE.batch
    frames, text = MINIATURE.batch * MINIATURE.num_frames, MINIATURE.batch * model.text_len
    per_token = 6 * e * e + 2 * e * model.ffn_dim  # q, k, v, o of self-attention, q, o of cross-attention, ffn
    layer = tokens * per_token + 2 * text * e * e + 2 * tokens * e * (per_clip + model.text_len)
    around = tokens * e * 36 + text * e * e + frames * 7 * e * e  # head, text and time embeddings
    first = tokens * 36 * e + text * model.text_dim * e + frames * model.freq_dim * e  # their input needs no gradient
    flop = 2 * (3 * (model.num_layers * layer + around) + 2 * first)
    assert count_gflop(WORK["teacher step"](MINIATURE, "fp32", matmul_attention)) * 1e9 == flop
    steps = json.loads(written.read_text())["steps"]
    assert [step["gflop"] * 1e9 for step in steps if step["work"] == "teacher step"] == [flop, flop]


def test_peak_memory_counts_what_is_held_at_once():
    """Two tensors of 4 MiB after each other are 4 MiB, together 8; what is there before does not count."""
    before = torch.zeros(2**20)

    def one_after_another():
        for _ in range(2):
            torch.add(before, 1)

    assert peak_mib(one_after_another) == pytest.approx(4, abs=0.01)
    assert peak_mib(lambda: (before + 1, before + 2)) == pytest.approx(8, abs=0.01)


@torch.no_grad()
def test_all_ways_to_see_the_past_make_the_same_video():
    """The times per block compare equal work: recomputing the past equals the cache, and a window, while it is wide."""
    config = settings(MINIATURE.num_frames, MINIATURE.num_frames).rollout
    model, (noise, cond) = network(MINIATURE), inputs(MINIATURE, 9)
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    videos = {}
    for name, way in WAYS.items():
        generator, how, cache = way(model, config, noise)
        rng = torch.Generator().manual_seed(0)
        videos[name] = generate(generator, SCHEDULER, noise, cond, how, cache=cache, rng=rng)
    whole, windowed, recomputed = videos.values()
    assert (recomputed - noise).abs().max() > 0.1
    torch.testing.assert_close(recomputed, whole, rtol=0, atol=2e-4)
    torch.testing.assert_close(windowed, whole, rtol=0, atol=2e-4)


def test_growth_compares_the_end_with_a_full_window():
    """The first quarter, where every window is still filling, is left out."""
    assert growth([1, 1, 2, 2, 9, 9, 6, 6]) == 3


def test_clocks():
    """The median ignores one slow run and the warm-up; a rate is work over time."""
    runs = []
    median_seconds(lambda: runs.append(0), repeats=3)
    assert len(runs) == 4
    assert gemm_gflops(64, "fp32", repeats=2) > 0


def test_table_aligns_numbers_to_the_right():
    """A column of numbers gets a right rule."""
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |\n"


def test_full_scale_runs_shrunken(tmp_path):
    """Every way of the rollout and the training step, with the planner's FLOPs."""
    path = full_scale(["--shrunken", "--repeats", "1", "--device", "cpu", "--json", str(tmp_path / "results.json")])
    results = json.loads(path.read_text())
    rows = {row["work"]: row for row in results["rows"]}
    assert list(rows) == ["rollout, fastest", "rollout, plain SDPA", "training step"]
    assert rows["training step"]["teraflop"] > 5 * rows["rollout, fastest"]["teraflop"] > 0
    for row in rows.values():
        assert 0 < row["fraction_of_peak"] < 1 and row["latent_frames_per_second"] == pytest.approx(6 / row["seconds"])
