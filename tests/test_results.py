"""Experiments leave records, records make the page, and shipped weights can be held against them."""

import json
import runpy
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import TINY, make_weights

from checkpoint import load_weights, save_weights
from experiments import results, run
from experiments.run import Run, all_runs, execute, load_plan, measure_one
from experiments.sick import RoundedWeights, StaleCache
from experiments.switching import BEFORE, CACHES, another_digit, another_direction, switched_videos
from generate import load_model
from kv_cache import KVCache
from metrics import uniform_prompts
from moving_mnist import MovingMNIST, WorldConfig
from tiny_causal_wan import TinyCausalWanModel, WanConfig


@pytest.fixture
def laboratory(tmp_path, monkeypatch):
    """An experiment of two rows and three seeds, in a folder of its own."""
    make_weights(tmp_path)
    start = [f"training.pretrained_checkpoint={tmp_path}/start.safetensors", "training.num_steps=1"]
    start += [f"training.teacher_checkpoint={tmp_path}/teacher.safetensors", "training.max_num_frames=12"]
    plan = {
        "title": "Tiny",
        "asks": "Does it run?",
        "found": "It does.",
        "seeds": [0, 1, 2],
        "common": [*TINY, *start],
        "rows": {"own": ["objective=sf_dmd"], "data": ["objective=tf_dmd"]},
        "evaluation": {
            "four steps": {"num_videos": 4, "num_frames": 12},
            "many": {"num_videos": 2, "num_frames": 6, "num_steps": 2, "guidance_scale": 2.0, "rows": ["own"]},
        },
    }
    (tmp_path / "tiny.yaml").write_text(OmegaConf.to_yaml(plan))
    for module in (run, results):
        monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "shipped", lambda name: "a")
    return tmp_path


def test_a_run_leaves_a_record_once(laboratory, monkeypatch):
    """Overrides, cost and curves of every way to sample; what has a record is done until settings or weights change."""
    plan = load_plan("tiny")
    one = Run("tiny", "own", 1)
    execute(one, plan)
    record = json.loads(one.record.read_text())
    assert record["steps"] == 1 and record["evaluations"] == 450  # tests/test_objectives.py counts them
    assert record["noise_seed"] == 1001 and record["overrides"][-2] == "training.seed=1"
    assert {way: len(curves["ink"]) for way, curves in record["curves"].items()} == {"four steps": 12, "many": 6}
    # per frame: four guesses and a memory pass, which the last of four blocks does without; two steps, guided
    few, many = record["sampling"]["four steps"], record["sampling"]["many"]
    assert few["evaluations"] == 5 - 1 / 4 and many["evaluations"] == 2 * (3 - 1 / 2) and few["seconds"] > 0
    assert one.is_done(plan) and not Run("tiny", "own", 0).is_done(plan)
    other = OmegaConf.merge(plan, {"evaluation": {"four steps": {"num_videos": 8}}})
    assert not one.is_done(other)
    assert one.is_done(OmegaConf.merge(plan, {"evaluation": {"third": {"num_videos": 8, "rows": ["data"]}}}))
    assert not one.is_done(OmegaConf.merge(plan, {"prepare": {"own": ["ode_pairs.py --num_pairs 8"]}}))
    monkeypatch.setattr(run, "shipped", lambda name: "b")
    assert not one.is_done(plan)


def test_a_record_is_of_the_settings_and_not_of_the_command_line(laboratory):
    """Another default is another run; an option that came later is not, nor are those that change nothing learnt."""
    plan, one = load_plan("tiny"), Run("tiny", "own", 0)
    fake_record(one, plan, 0.5)
    record = json.loads(one.record.read_text())
    kept = record["settings"]
    assert kept["training.seed"] == 0 and kept["objective.loss"] == "dynamic_video_sf.dmd_loss"
    assert not {"training.output_dir", "training.device"} & set(kept)
    for name, value, done in (("training.lr", 0.5, False), ("training.gone", 1, True), ("model.dim", 32, False)):
        one.record.write_text(json.dumps(record | {"settings": kept | {name: value}}))
        assert one.is_done(plan) == done
    later = {name: x for name, x in kept.items() if name != "training.exit_rule"}
    one.record.write_text(json.dumps(record | {"settings": later}))
    assert one.is_done(plan)
    assert one.is_done(OmegaConf.merge(plan, {"common": [*plan.common, "training.sample_every=7"]}))
    assert not one.is_done(OmegaConf.merge(plan, {"common": [*plan.common, "training.critic_lr=0.5"]}))


def test_real_clips_are_a_row(laboratory):
    """Held-out ones, with nothing to train, nothing asked of a network, and all that can be reached in the metrics."""
    plan = OmegaConf.merge(load_plan("tiny"), {"rows": {"real": "real"}})
    one = Run("tiny", "real", 2)
    execute(one, plan)
    record = json.loads(one.record.read_text())
    assert record["weights"] == {} and record["settings"] == {} and list(record["curves"]) == ["four steps"]
    assert record["sampling"]["four steps"]["evaluations"] == 0 and "seconds" not in record
    curves = record["curves"]["four steps"]
    assert np.mean(curves["digit_accuracy"]) > 0.9 and np.nanmax(curves["motion_error"]) < 0.1
    assert one.is_done(plan)
    (found,) = results.load_records("tiny", OmegaConf.merge(plan, {"seeds": [2]})).values()
    records = {"real": found * 3, "again": found * 3}
    assert results.trained(records) == {} and "3 of noise" in results.brief(records)
    assert results.differences(records).startswith("Nothing was trained")


def test_real_clips_of_another_world():
    """Held-out digits unless the world says which; a world of several is judged by the tracker."""
    options, two = {"num_videos": 10, "num_frames": 12}, {"num_digits": 2, "canvas": 32, "sprites_per_class": 1}
    of = lambda **world: measure_one("real", 3, **options, world=world)  # noqa: E731
    (curves, own, _), held_out = of(**two, split="train"), of(**two)[1]
    assert own.shape == (10, 12, 1, 32, 32) and not own.equal(held_out)
    assert own.equal(
        MovingMNIST(WorldConfig(**two), seed=1003, prompts=uniform_prompts(10, 2)).batch(range(10))["video"]
    )
    assert "frechet_distance" not in curves and sum(curves["digit_accuracy"]) / 12 > 0.9


def test_a_network_is_measured_with_the_fault_that_it_was_trained_with(laboratory):
    """Unless the plan says which class is to sample; raw weights are not the averaged ones."""
    options = {"num_videos": 2, "num_frames": 6}
    stale = "generator._target_=experiments.sick.StaleCache"
    plan = OmegaConf.merge(load_plan("tiny"), {"rows": {"stale": [stale, "training.num_steps=3"]}})
    checkpoint = run.trained(Run("tiny", "stale", 0), plan)
    as_trained, right, raw = (
        measure_one(checkpoint, 0, **options, **more)[1]
        for more in ({}, {"network": "tiny_causal_wan.TinyCausalWanModel"}, {"weights": "raw"})
    )
    assert torch.equal(as_trained[:, :3], right[:, :3])  # the first block remembers nothing
    assert not torch.equal(as_trained[:, 3:], right[:, 3:])
    assert not torch.equal(as_trained, raw)


def test_measuring_does_not_train_again(laboratory, monkeypatch):
    """Killed between training and measuring, a run is only measured; killed in training, it resumes there."""
    plan, one = load_plan("tiny"), Run("tiny", "data", 0)
    execute(one, plan)
    before = one.record.read_text()
    one.record.unlink()
    import train

    monkeypatch.setattr(train, "main", lambda overrides: pytest.fail("trained again"))
    execute(one, plan)
    assert json.loads(one.record.read_text())["curves"] == json.loads(before)["curves"]


def test_a_checkpoint_is_only_measured(laboratory, monkeypatch):
    """A row that names one trains nothing; what it changes of the rollout changes the videos."""
    plan = load_plan("tiny")
    execute(Run("tiny", "own", 0), plan)
    weights = load_weights(Run("tiny", "own", 0).folder / "checkpoint_final.pt")
    save_weights(laboratory / "student.safetensors", weights.state_dict, {"config": weights.config})
    few = plan.evaluation["four steps"]
    ways = {"four steps": few, "twice": few, "no past": {**few, "rollout": {"window_frames": 0}}}
    rows = {"student": str(laboratory / "student")}
    plan = OmegaConf.create({"rows": rows, "evaluation": ways})
    import train

    monkeypatch.setattr(train, "main", lambda overrides: pytest.fail("trained"))
    one = Run("longer", "student", 0)
    execute(one, plan)
    record = json.loads(one.record.read_text())
    assert "steps" not in record and record["curves"]["four steps"] == record["curves"]["twice"]
    assert record["curves"]["four steps"]["ink"][:2] == record["curves"]["no past"]["ink"][:2]  # the first block
    assert record["curves"]["four steps"]["ink"] != record["curves"]["no past"]["ink"]
    assert one.is_done(plan) and list(record["weights"]) == [str(laboratory / "student")]


def test_a_switch_changes_the_prompt_and_what_is_done_about_the_cache(laboratory):
    """The same video up to the switch, whatever is done then; kept, new and empty caches all go on differently."""
    make_weights(laboratory)
    loaded = load_model(laboratory / "start.safetensors")
    prompts = ["a 3 moving right", "a 8 moving up"]
    assert [another_digit(prompt) for prompt in prompts] == ["a 6 moving right", "a 1 moving up"]
    seen = [switched_videos(loaded, prompts, 12, 5, at=6, cache=cache) for cache in CACHES]
    for video in seen:
        assert video.shape == (2, 12, 1, 24, 24) and torch.equal(video[:, :6], seen[0][:, :6])
    assert len({video[:, 6:].sum().item() for video in seen}) == 3
    with pytest.raises(ValueError, match="cache must be one of kept, anew, emptied, got 'lost'."):
        switched_videos(loaded, prompts, 12, 5, at=6, cache="lost")


def test_a_direction_changes_as_a_digit_does(laboratory):
    """The same video once the digit is another and once the way it goes; metrics may begin at the switch."""
    make_weights(laboratory)
    loaded = load_model(laboratory / "start.safetensors")
    prompts = ["a 3 moving right", "a 8 moving down-left"]
    assert [another_direction(prompt) for prompt in prompts] == ["a 3 moving down", "a 8 moving up"]
    digit, direction = (switched_videos(loaded, prompts, 9, 5, at=6, cache="kept", new=new) for new in BEFORE)
    assert not torch.equal(digit[:, :6], direction[:, :6])
    with pytest.raises(ValueError, match="new must be one of digit, direction, got 'speed'."):
        switched_videos(loaded, prompts, 9, 5, at=6, cache="kept", new="speed")
    options = {"num_videos": 2, "num_frames": 12, "switch": {"at": 6, "cache": "kept", "new": "direction"}}
    whole, after = (measure_one(laboratory / "start.safetensors", 0, **options, from_frame=at)[0] for at in (0, 6))
    assert len(whole["ink"]) == 12 and after["ink"] == whole["ink"][6:]


def test_what_a_row_needs_is_prepared_once(laboratory, monkeypatch):
    """Commands run in order before training; a finished run does not begin anew, unless its settings changed."""
    plan, called, final = load_plan("tiny"), [], laboratory / "init" / "checkpoint_final.pt"
    start = f"training.pretrained_checkpoint={laboratory}/start.safetensors training.num_steps=1"
    init = f"train.py stage=init {' '.join(TINY)} {start} training.output_dir={final.parent}"
    monkeypatch.setattr(run.subprocess, "run", lambda command, check: called.append(command[1]))
    monkeypatch.setattr(run, "finished", lambda one: True)
    written = []
    for more in ("", "", " training.seed=5"):
        ready = OmegaConf.merge(plan, {"prepare": {"own": ["ode_pairs.py --num_pairs 8", init + more]}})
        run.trained(Run("tiny", "own", 0), ready)
        written.append(final.stat().st_mtime_ns)
    assert called == ["ode_pairs.py"] * 3 and written[0] == written[1] < written[2]
    run.trained(Run("tiny", "data", 0), ready)
    assert called == ["ode_pairs.py"] * 3


def test_stills_and_signs_of_a_run_make_a_gallery(laboratory):
    """A record holds a few frames and its log: the page shows them without videos or weights at hand."""
    plan = OmegaConf.merge(
        load_plan("tiny"),
        {"stills": {"num_videos": 2, "every": 3, "of": ["four steps"]}, "signs": {"own": "It is fine."}},
    )
    plan.evaluation.pop("many")
    (laboratory / "tiny.yaml").write_text(OmegaConf.to_yaml(plan))
    for row in ("own", "data"):
        execute(Run("tiny", row, 0), plan)
    record = json.loads(Run("tiny", "own", 0).record.read_text())
    videos = run.unpack(record["stills"]["four steps"])
    assert videos.shape == (2, 4, 1, 24, 24) and -1 <= videos.min() < videos.max() <= 1
    assert torch.equal(run.unpack(run.pack(videos)), videos)
    assert set(record["log"]) == set(run.SIGNS) and len(record["log"]["score_distance"]) == 1
    results.write_page()
    page = (laboratory / "RESULTS.md").read_text()
    assert page.index("**own**: It is fine.") < page.index("**data**: ") < page.index("](docs/results/data.png)")
    picture = laboratory / "docs" / "results" / "data.png"
    assert picture.stat().st_size > 10_000 and Image.open(picture).mode == "P"


def test_one_seed_of_every_row_ships(laboratory):
    """In bfloat16, where the plan says so: measured again they are in the range of their record."""
    plan = OmegaConf.merge(load_plan("tiny"), {"ships": ["own"]})
    for seed in (0, 1):
        execute(Run("tiny", "own", seed), plan)
    (path,) = (laboratory / "weights").rglob("*.safetensors")
    assert path.stem == "own"
    shipped = load_weights(path)
    assert {x.dtype for x in load_file(path).values()} == {torch.bfloat16}
    for name, x in load_weights(Run("tiny", "own", 0).folder / "checkpoint_final.pt").state_dict.items():
        torch.testing.assert_close(shipped.state_dict[name].float(), x, rtol=2**-7, atol=1e-6)
    results.evaluate_again("tiny/own")


def test_rows_of_another_experiment_are_shown_beside(laboratory):
    """Under the name that this plan gives them, first, and without being run again."""
    plan = load_plan("tiny")
    fake_record(Run("tiny", "own", 0), plan, 0.5)
    other = OmegaConf.merge(plan, {"beside": {"base": "tiny/own"}, "title": "Other"})
    other.evaluation.pop("many")
    (laboratory / "other.yaml").write_text(OmegaConf.to_yaml(other))
    fake_record(Run("other", "data", 0), other, 0.7)
    assert list(results.load_records("other", other)) == ["base", "data"]  # and not "base, many": nobody asks here


def test_a_faulty_model_has_its_fault_and_no_other(laboratory):
    """Rounded weights are those of bfloat16 after every use; a stale cache holds the keys of the noisy last call."""
    torch.manual_seed(0)
    config = WanConfig("t2v", 1, 1, 64, 128, 2, 2, (1, 6, 6), 64, 4)
    rounded, stale, sound = RoundedWeights(config), StaleCache(config), TinyCausalWanModel(config)
    x, cond = torch.randn(1, 3, 1, 12, 12), {"prompt_embeds": torch.randn(1, 4, 64)}
    rounded(x, 0.5, cond).sum().backward()
    for p in rounded.parameters():
        assert p.dtype == torch.float32 and torch.equal(p, p.bfloat16().float())
    stale.load_state_dict(sound.state_dict())
    noisy = torch.randn_like(x)
    assert torch.equal(stale(noisy, 0.6, cond, KVCache()), sound(noisy, 0.6, cond, KVCache()))
    (kept,), (right,) = (
        [m.layers[0][0]] for m in (stale.remember(x, 0.0, cond, KVCache()), sound.remember(noisy, 0.6, cond, KVCache()))
    )
    assert torch.equal(kept, right)


def test_training_again_has_to_say_what(laboratory, monkeypatch):
    monkeypatch.setattr("sys.argv", ["experiments.run", "--again"])
    with pytest.raises(ValueError, match="of every experiment if none is named"):
        run.main()


def test_training_again_begins_anew_and_then_goes_on(laboratory):
    """--again forgets the record and moves the finished run aside, once: what it began is then resumed."""
    plan, one = load_plan("tiny"), Run("tiny", "own", 0)
    execute(one, plan)
    both = [one, Run("tiny", "data", 0)]
    note = run.begin_again(both)
    assert not one.record.exists() and not one.folder.exists()
    assert (one.folder.with_name("seed_0.1") / "checkpoint_final.pt").exists()
    execute(one, plan)  # and killed before the other: the same call keeps what is done
    assert run.begin_again(both) == note and one.is_done(plan)
    note.unlink()
    run.begin_again([one])
    assert not one.record.exists()
    one.folder.mkdir()
    (one.folder / "begun").touch()
    run.forget([one])
    assert (one.folder / "begun").exists()


def test_an_interruption_is_one_sentence(tmp_path, monkeypatch):
    """Not a traceback: nothing is lost."""

    def interrupted(*command, **options):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", interrupted)
    monkeypatch.setattr(sys, "argv", ["run", "main_table", "--only", "tf", "--seeds", "7"])
    with pytest.raises(SystemExit, match="Interrupted.*the same command goes on"):
        runpy.run_module("experiments.run", run_name="__main__")


def test_a_row_shown_beside_is_run_at_home(laboratory):
    """Under its own name there, whatever the other experiment calls it."""
    (laboratory / "other.yaml").write_text(OmegaConf.to_yaml({"rows": {"mine": []}, "beside": {"base": "tiny/own"}}))
    assert run.wanted("other", ["base", "mine"]) == {"tiny": ["own"], "other": ["mine"]}
    assert run.wanted("other", []) == {"other": []} and set(run.wanted(None, [])) == {"tiny", "other"}


def test_seeds_come_before_rows_and_mistakes_are_named(laboratory):
    plan = load_plan("tiny")
    assert [(r.row, r.seed) for r in all_runs("tiny", plan)][:3] == [("own", 0), ("data", 0), ("own", 1)]
    assert [(r.row, r.seed) for r in all_runs("tiny", plan, ["data"], [7])] == [("data", 7)]
    with pytest.raises(ValueError, match="tiny has no row mine; it has own, data."):
        all_runs("tiny", plan, ["mine"])
    with pytest.raises(ValueError, match="There is no experiment large; known are tiny."):
        load_plan("large")


def fake_record(one, plan, accuracy):
    curves = {name: [accuracy] * 96 for name in results.SHOWN}
    short = {"many": {name: curve[:24] for name, curve in curves.items()}} if one.row == "own" else {}
    record = {
        "overrides": one.overrides(plan), "weights": one.weights(plan), "seconds": 60, "evaluations": 1234.0,
        "settings": run.settings(tuple(one.overrides(plan))), "prepare": [],
        "evaluation": one.evaluation(plan), "machine": {"processor": "abacus", "vector_instructions": "beads"},
        "curves": {"four steps": curves} | short, "stills": {},
        "sampling": dict.fromkeys(("four steps", *short), {"evaluations": 4.75, "seconds": 0.0123}),
    }  # fmt: skip
    one.record.parent.mkdir(parents=True, exist_ok=True)
    one.record.write_text(json.dumps(record))


def tables(page):
    """Every table of a page: the first cell of a row -> the others."""
    blocks = [block for block in page.split("\n\n") if block.startswith("| ")]
    rows = [[[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()] for block in blocks]
    return [{row[0]: row[1:] for row in table if row[0] != "---"} for table in rows]


def test_the_page_says_what_the_records_say(laboratory):
    """A row per way to sample, means and spreads, blanks where videos are short, and which rows differ."""
    plan = load_plan("tiny")
    for seed, (own, data) in enumerate([(0.90, 0.70), (0.92, 0.74), (0.94, 0.72)]):
        fake_record(Run("tiny", "own", seed), plan, own)
        fake_record(Run("tiny", "data", seed), plan, data)
    results.write_page()
    page = (laboratory / "RESULTS.md").read_text()
    assert "## Tiny\n\nDoes it run?" in page and "It does." in page and "one thread of abacus" in page
    brief, accuracy, *_ = tables(page)
    assert list(brief) == ["", "own", "data", "own, many"]
    assert brief["own"][:2] == ["3", "0.92 ± 0.02"] and brief["data"][1] == "0.72 ± 0.02"
    assert brief["own, many"][1] == ""  # too short for the span that is compared
    assert brief["own"][-5:] == ["1,234", "1", "4.8", "12.3", "beads"]
    assert accuracy["digit accuracy"] == ["first block", "0-T", "T-2T", "3T-4T", "7T-8T"]
    assert accuracy["own, many"] == ["0.92 ± 0.02"] * 3 + ["", ""]
    assert "In digit accuracy over 3T-4T own is before data by 0.20." in page
    assert "In Frechet distance over 3T-4T data is before own by 0.2." in page  # less of it is better
    assert "from the first block to 3T-4T no two rows differ by that measure." in page
    assert (laboratory / "docs" / "results" / "tiny.png").stat().st_size > 10_000


def test_runs_without_a_record_are_named(laboratory, monkeypatch, capsys):
    """Counted per experiment, with the command that makes them; nothing is said where none is missing. What has
    not been run at all has a section, that says so and that can be linked to."""
    plan = load_plan("tiny")
    monkeypatch.setattr("sys.argv", ["results"])
    results.write_page()
    assert "## Tiny\n\nDoes it run?\n\nNothing of it has been run" in (laboratory / "RESULTS.md").read_text()
    for seed in plan.seeds:
        fake_record(Run("tiny", "own", seed), plan, 0.9)
    results.main()
    assert capsys.readouterr().out == "Runs without a record: 3 of tiny; `make results MISSING=1` does them.\n"
    assert "Not run yet, or not with all seeds: data." in (laboratory / "RESULTS.md").read_text()
    for seed in plan.seeds:
        fake_record(Run("tiny", "data", seed), plan, 0.8)
    results.main()
    assert capsys.readouterr().out == ""
    assert "Not run yet" not in (laboratory / "RESULTS.md").read_text()


def test_spans_and_drift_are_what_they_are_called():
    """Frames of a curve that counts them; what was lost since the first block is below zero."""
    record = {"curves": {"digit_accuracy": [float(frame) for frame in range(192)]}}
    means = {span: results.span_mean(record["curves"], "digit_accuracy", span) for span in results.SPANS}
    middles = {"first block": 1.0, "0-T": 5.5, "T-2T": 17.5, "3T-4T": 41.5, "7T-8T": 89.5, "15T-16T": 185.5}
    assert means == middles
    falling = {"curves": {"digit_accuracy": [1.0] * 3 + [0.75] * 93}}
    assert results.drift([falling], "digit_accuracy", "3T-4T") == -0.25


def test_a_spread_is_that_of_a_sample():
    """n - 1 in its denominator; none of a single seed, and a blank where videos are too short."""
    cells = [results.cell(np.array(values), 2) for values in ([0.0, 1.0, 2.0], [0.5], [0.5, float("nan")])]
    assert cells == ["1.00 ± 1.00", "0.50", ""]


def test_who_lost_less_is_before(laboratory):
    """Of accuracy and of its change, more is better: rows that begin alike, of which one falls."""
    plan = load_plan("tiny")
    for seed in plan.seeds:
        for row, late in (("own", 0.9), ("data", 0.5)):
            one = Run("tiny", row, seed)
            fake_record(one, plan, 0.9)
            record = json.loads(one.record.read_text())
            record["curves"]["four steps"]["digit_accuracy"][3:] = [late + 0.01 * seed] * 93
            one.record.write_text(json.dumps(record))
    results.write_page()
    page = (laboratory / "RESULTS.md").read_text()
    assert "In the change of digit accuracy from the first block to 3T-4T own is before data by 0.40" in page


def test_the_cost_of_a_run_is_that_of_all_its_steps(tmp_path, monkeypatch):
    """Evaluations are summed. Seconds are as if all of it had gone as fast as the fastest tenth of the steps."""
    monkeypatch.chdir(tmp_path)
    one = Run("tiny", "own", 0)
    one.folder.mkdir(parents=True)
    ends, rows = 0.0, ["step,evaluations,seconds"]
    for step in range(20):
        ends += 1.0 if step < 3 else 5.0  # nine in ten steps were disturbed
        rows.append(f"{step + 1},10,{ends}")
    (one.folder / "metrics.csv").write_text("\n".join(rows))
    found = run.costs(one)
    assert (found["steps"], found["evaluations"], found["seconds"]) == (20, 200.0, 20.0)


def test_many_steps_are_an_ode(laboratory):
    """No fresh noise between the steps of a teacher's ODE."""
    _, make = run.sampler_of(laboratory / "start.safetensors", num_steps=4)
    assert make.keywords == {"denoising_steps": [1000.0, 750.0, 500.0, 250.0], "fresh_noise": 0.0}


def test_what_counts_as_a_difference():
    """More than two pooled standard deviations, and three seeds."""
    near, far = np.array([0.70, 0.72, 0.74]), np.array([0.80, 0.82, 0.84])
    assert results.differ(near, far) and results.differ(far, near)
    assert not results.differ(near, near + 0.039)
    assert results.differ(near, near + 0.041)
    assert not results.differ(near[:2], far[:2])


def test_a_sentence_names_who_is_before_whom_once():
    """Grouped by the better row, which is the lower one of a distance; rows against which nobody asked are left out."""
    values = {row: np.array([0.70, 0.72, 0.74]) + more for row, more in {"a": 0, "b": 0.2, "c": 0.01, "d": 0.4}.items()}
    assert (
        results.differences_in(values, max, 2, "b") == "b is before a by 0.20, before c by 0.19; d is before b by 0.20"
    )
    assert (
        results.differences_in(values, min, 1, "d")
        == "a is before d by 0.4; b is before d by 0.2; c is before d by 0.4"
    )
    assert results.differences_in({"a": values["a"], "c": values["c"]}, max, 2, None).startswith("no two rows")


def test_shipped_weights_are_held_against_their_record(laboratory, capsys):
    """The same weights pass; a record of better ones than ship fails, by name."""
    plan, one = load_plan("tiny"), Run("tiny", "own", 0)
    execute(one, plan)
    weights = load_weights(one.folder / "checkpoint_final.pt")
    path, record = laboratory / "weights" / "tiny" / "own.safetensors", {"config": weights.config}
    save_weights(path, weights.state_dict, record, torch.float32)
    results.evaluate_again("tiny/own")
    assert "digit_accuracy" in capsys.readouterr().out
    record = json.loads(one.record.read_text())
    record["curves"]["four steps"]["ink"] = [x + 0.2 for x in record["curves"]["four steps"]["ink"]]
    one.record.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="tiny/own left its range in ink first block, ink 0-T"):
        results.evaluate_again("tiny/own")
    record["curves"]["four steps"]["ink"] = [x - 0.2 for x in record["curves"]["four steps"]["ink"]]
    far = record["curves"]["four steps"]["frechet_distance"]
    for factor, fails in ((1.2, nullcontext()), (2, pytest.raises(ValueError, match="left its range in frechet"))):
        record["curves"]["four steps"]["frechet_distance"] = [factor * x for x in far]
        one.record.write_text(json.dumps(record))
        with fails:
            results.evaluate_again("tiny/own")
    with pytest.raises(ValueError, match="tiny/data ships no weights, or has no record"):
        results.evaluate_again("tiny/data")
    with pytest.raises(ValueError, match="tiny has no row"):
        results.evaluate_again("tiny")


def test_the_page_begins_with_what_was_found(laboratory):
    """A line for each experiment that says it, with a link to its section."""
    (laboratory / "tiny.yaml").write_text((laboratory / "tiny.yaml").read_text() + "short: It holds out.\n")
    title = load_plan("tiny").title
    results.write_page()
    page = (laboratory / "RESULTS.md").read_text()
    assert f"- [{title}](#{results.anchor(title)}). It holds out." in page.split("## How to read")[0]
    assert results.anchor("Own past, or the data's: which?") == "own-past-or-the-datas-which"
