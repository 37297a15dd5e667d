"""generate.py: files and their content, samples that do not depend on their neighbours, errors in one sentence."""

import json
import re
import runpy
import subprocess
import sys

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from tiny_runs import REPOSITORY, make_weights, names, options

import generate
import settings
import train
from checkpoint import load_checkpoint, load_weights, save_checkpoint, save_weights
from generate import load_model, sample_videos

PROMPTS = ["a 3 moving right", "a 7 moving up-left"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """start.safetensors is a student with random weights, teacher.safetensors a teacher."""
    folder = make_weights(tmp_path_factory.mktemp("weights"))
    loaded = load_weights(folder / "teacher.safetensors")
    loaded.config["training"]["stage"] = "teacher"
    save_weights(folder / "teacher.safetensors", loaded.state_dict, {"config": loaded.config}, torch.float32)
    return folder


@pytest.fixture(scope="module")
def student(folder):
    return load_model(folder / "start.safetensors")


@pytest.fixture(scope="module")
def teacher(folder):
    return load_model(folder / "teacher.safetensors")


def run(folder, output, *arguments, format=("npz",)):
    """main() with the tiny student, writing only npz unless told otherwise."""
    own = ["--checkpoint", str(folder / "start.safetensors"), "--output_dir", str(output), "--format", *format]
    return generate.main([*own, *arguments])


def video_of(path):
    with np.load(path) as file:
        return file["video"]


# ---------------------------------------------------------------------------------------------- files


def test_default_prompts_show_every_digit_and_direction():
    """Without arguments: the shipped student, one prompt per digit, all formats, seed 0."""
    args = generate.parse_arguments([])
    digits = [generate.parse_prompt(prompt)[0] for prompt in args.prompts]
    assert [digit.label for digit in digits] == list(range(10)) and len({digit.direction for digit in digits}) == 8
    assert (args.checkpoint, str(args.output_dir)) == ("checkpoints/student.safetensors", "outputs")
    assert (args.seed, args.num_samples, args.num_frames, args.weights) == (0, 1, None, "ema")
    assert args.format == ["gif", "mp4", "npz"]


def test_one_file_per_prompt_and_format(folder, tmp_path, capsys):
    """{index:03d}_{slug}.{gif,mp4,npz}; pictures hold the training length and the samples side by side."""
    prompts = ["--prompts", "a 3 moving right", "A 7 moving  UP-LEFT"]
    paths = run(folder, tmp_path / "new" / "out", *prompts, "--num_samples", "2", format=("gif", "mp4", "npz"))
    stems = ["000_a-3-moving-right", "001_a-7-moving-up-left"]
    assert [path.name for path in paths] == [f"{stem}.{kind}" for stem in stems for kind in ("gif", "mp4", "npz")]
    assert names(tmp_path / "new" / "out") == {path.name for path in paths}
    for path in paths:
        if path.suffix != ".npz":
            frames = imageio.imread(path)
            assert len(frames) == 12 and frames.shape[2] > 1.5 * frames.shape[1]
    assert "6 files" in capsys.readouterr().out


def test_npz_holds_pixels_prompt_and_seed(folder, tmp_path):
    """video uint8 [K, F, C, H, W], the very samples of sample_videos; the prompt as it was given; the seed."""
    path, _ = run(folder, tmp_path, "--prompts", *PROMPTS, "--num_samples", "3", "--seed", "5")
    with np.load(path) as file:
        assert set(file.files) == {"video", "prompt", "seed"}
        assert (str(file["prompt"]), int(file["seed"])) == (PROMPTS[0], 5)
        assert file["video"].dtype == np.uint8 and file["video"].shape == (3, 12, 1, 24, 24)
        exact = sample_videos(folder / "start.safetensors", PROMPTS[:1] * 3, seed=5)
        shown = ((exact + 1) / 2).clamp(0, 1).numpy() * 255
        assert np.abs(file["video"] - shown).max() <= 0.51
        assert len(np.unique(file["video"])) > 20


def test_only_the_formats_asked_for(folder, tmp_path):
    """--format gif writes nothing else."""
    run(folder, tmp_path, "--prompts", PROMPTS[0], format=("gif",))
    assert names(tmp_path) == {"000_a-3-moving-right.gif"}


# ---------------------------------------------------------------------------------------------- samples


def test_a_sample_does_not_depend_on_its_neighbours(student):
    """Sample k of a prompt is the same with other prompts around it, in other batches, and among more samples."""
    alone = sample_videos(student, [PROMPTS[0]] * 2, seed=1)
    among = sample_videos(student, [PROMPTS[1], PROMPTS[0], "a 1 moving down", PROMPTS[0], PROMPTS[0]], seed=1)
    assert torch.allclose(among[[1, 3]], alone, atol=1e-5)
    for batch_size in (1, 2, 4):
        again = sample_videos(student, [PROMPTS[1], *[PROMPTS[0]] * 3], seed=1, batch_size=batch_size)
        assert torch.allclose(again[1:3], alone, atol=1e-5)
    assert torch.equal(sample_videos(student, [" A 3  moving RIGHT "] * 2, seed=1), alone)  # spelling is forgiven


def test_samples_differ(student):
    """Other sample, other seed, other prompt: another video each time."""
    videos = sample_videos(student, [PROMPTS[0], PROMPTS[0], PROMPTS[1]], seed=1)
    other = sample_videos(student, PROMPTS[:1], seed=2)
    four = torch.cat([videos, other])
    distances = (four[:, None] - four[None]).abs().flatten(2).mean(2)
    assert distances.fill_diagonal_(1).min() > 0.05


def test_the_command_line_gives_the_same_samples(folder, tmp_path):
    """More prompts or more samples on the command line leave a prompt's samples as they were."""
    few = video_of(run(folder, tmp_path / "few", "--prompts", PROMPTS[1])[0])
    many = video_of(run(folder, tmp_path / "many", "--prompts", *PROMPTS, "--num_samples", "3")[1])
    assert np.abs(many[:1].astype(int) - few.astype(int)).max() <= 1


def test_videos_may_be_much_longer_than_training_clips(student):
    """Any whole number of blocks: five times the training length, with a memory of constant size."""
    video = sample_videos(student, PROMPTS, num_frames=60, seed=3)
    assert video.shape == (2, 60, 1, 24, 24) and video.isfinite().all()
    assert sample_videos(student, PROMPTS, num_frames=3).shape[1] == 3


def test_average_or_raw(folder, tmp_path):
    """--weights ema takes the average, raw the last weights; a file without an average has only one kind."""
    start, other = (load_weights(folder / f"{name}.safetensors") for name in ("start", "teacher"))
    state = {"generator_state_dict": start.state_dict, "ema_state_dict": other.state_dict, "config": start.config}
    save_checkpoint(tmp_path / "run.pt", state)
    save_checkpoint(tmp_path / "early.pt", state | {"ema_state_dict": None})
    for weights, expected in {"ema": other, "raw": start}.items():
        model = load_model(tmp_path / "run.pt", weights).model
        assert all(torch.equal(x, expected.state_dict[name]) for name, x in model.state_dict().items())
        early = load_model(tmp_path / "early.pt", weights).model
        assert all(torch.equal(x, start.state_dict[name]) for name, x in early.state_dict().items())
    own = ["--checkpoint", str(tmp_path / "run.pt"), "--prompts", PROMPTS[0], "--format", "npz"]
    ema, raw = (
        video_of(generate.main([*own, "--output_dir", str(tmp_path / kind), "--weights", kind])[0])
        for kind in ("ema", "raw")
    )
    assert np.abs(ema.astype(int) - raw.astype(int)).mean() > 5


def test_steps_and_guidance_are_those_of_the_checkpoint_unless_given(student):
    """--denoising_steps, --guidance_scale and --fresh_noise change the video; the checkpoint's own settings do not."""
    plain = sample_videos(student, PROMPTS)
    assert torch.equal(sample_videos(student, PROMPTS, denoising_steps=[1000, 750, 500, 250]), plain)
    assert torch.equal(sample_videos(student, PROMPTS, guidance_scale=1.0), plain)
    assert (sample_videos(student, PROMPTS, denoising_steps=[1000, 500]) - plain).abs().mean() > 0.01
    assert (sample_videos(student, PROMPTS, guidance_scale=3.0) - plain).abs().mean() > 0.01
    assert torch.equal(sample_videos(student, PROMPTS, fresh_noise=1.0), plain)
    assert (sample_videos(student, PROMPTS, fresh_noise=0.5) - plain).abs().mean() > 0.01


def test_a_checkpoint_of_every_stage_can_be_sampled(folder, tmp_path, monkeypatch):
    """What train.py writes generate.py reads, with the sampler that the stage was trained for, also in odd worlds."""
    monkeypatch.setattr(train, "film_strip", lambda *_, **__: None)
    more = ["world.num_frames=6", "training.num_steps=1", "training.num_frames_per_block=[2,1]"]
    for stage in settings.STAGES:
        path = train.main(options(stage, tmp_path / stage, folder, *more))
        loaded = load_model(path)
        assert loaded.sampling.whole_clip == (stage == "teacher")
        assert sample_videos(loaded, PROMPTS[:1]).shape == (1, 6, 1, 24, 24)
        assert load_checkpoint(path)["step"] == 1


# ---------------------------------------------------------------------------------------------- teacher


def test_a_teacher_makes_whole_clips(teacher):
    """All frames at once, guided, in 32 steps; no other length."""
    calls = []
    teacher.model.register_forward_pre_hook(lambda model, inputs: calls.append(inputs[0].shape[1]))
    assert sample_videos(teacher, PROMPTS).shape == (2, 12, 1, 24, 24)
    assert calls == [12] * 64
    for num_frames in (3, 24):
        with pytest.raises(ValueError, match="clips of 12 frames at once: use --num_frames 12"):
            sample_videos(teacher, PROMPTS, num_frames=num_frames)
    assert sample_videos(teacher, PROMPTS, num_frames=12).shape[1] == 12


def test_a_teachers_clip_without_fresh_noise_is_the_end_of_its_ode(teacher):
    """The clip equals a plain Euler integration with guidance, written out here; half fresh noise is the default."""
    prompts = PROMPTS[:1]
    (key,) = generate.sample_keys(prompts, 4)
    noise = generate.generator(*key, "noise")
    x = torch.stack([torch.randn(1, 24, 24, generator=noise) for _ in range(12)])[None]
    cond, uncond = teacher.encoder(prompts), teacher.encoder.null(1)
    times = [teacher.scheduler.warp(1 - i / 32) for i in range(33)]
    with torch.no_grad():
        for t, t_next in zip(times, times[1:], strict=False):
            flow, free = teacher.model(x, t, cond), teacher.model(x, t, uncond)
            x = x + (t_next - t) * (free + teacher.sampling.guidance_scale * (flow - free))
    assert teacher.sampling.guidance_scale == 2
    assert torch.allclose(sample_videos(teacher, prompts, seed=4, fresh_noise=0.0), x, atol=1e-4)
    assert teacher.sampling.fresh_noise == 0.5
    assert not torch.allclose(sample_videos(teacher, prompts, seed=4), x, atol=1e-2)


def test_a_longer_video_begins_with_the_shorter_one(student):
    """Frame f is the same whatever number of frames is asked for."""
    short, long = (sample_videos(student, PROMPTS[:2], num_frames=n) for n in (6, 15))
    assert torch.equal(long[:, :6], short)


# ---------------------------------------------------------------------------------------------- mistakes

MISTAKES = {
    "--num_frames 13": r"13 frames are not a whole number of blocks \(frames_per_block=3\); use 12 or 15 frames.",
    "--num_frames 2": r"2 frames are not .*; use 3 frames.",
    "--num_frames 0": "--num_frames must be at least 1, got 0.",
    "--num_frames -3": "--num_frames must be at least 1, got -3.",
    "--fresh_noise 1.5": r"fresh_noise must lie between 0 \(an ODE\) and 1 \(all noise new\), got 1.5.",
    "--num_samples 0": "--num_samples must be at least 1.",
    "--denoising_steps 250 1000": "denoising_steps must fall strictly from 1000.*",
    "--checkpoint nowhere.pt": "There is no checkpoint nowhere.pt.*",
    "--checkpoint nowhere.safetensors": "There is no checkpoint nowhere.safetensors.*",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence(mistake, folder, tmp_path):
    """Frame counts, counts, steps and paths that cannot be: one line that names what would fit; nothing written."""
    with pytest.raises(ValueError) as error:
        run(folder, tmp_path / "out", "--prompts", PROMPTS[0], *mistake.split())
    assert re.fullmatch(MISTAKES[mistake], str(error.value)), str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_wrong_prompt_gets_the_grammar_and_the_nearest(folder, tmp_path):
    """What a learner types first: an unknown direction, free text, nothing."""
    with pytest.raises(ValueError, match="a 3 moving right") as error:
        run(folder, tmp_path, "--prompts", "a 3 moving rigth")
    assert "rigth" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r'shows 1 digit\(s\) at a time, "a 3 moving up and a 4 moving up" names 2'):
        run(folder, tmp_path, "--prompts", "a 3 moving up and a 4 moving up")
    for prompt in ("a cat playing the piano", ""):
        with pytest.raises(ValueError, match="moving"):
            run(folder, tmp_path, "--prompts", prompt)


def test_a_checkpoint_that_cannot_be_used_is_named(folder, tmp_path):
    """Corrupt, without a config, or of another model: one sentence with the path."""
    corrupt, bare, misfit = (tmp_path / f"{name}.safetensors" for name in ("corrupt", "bare", "misfit"))
    corrupt.write_bytes((folder / "start.safetensors").read_bytes()[:1000])
    loaded = load_weights(folder / "start.safetensors")
    save_weights(bare, loaded.state_dict, {})
    config = json.loads(json.dumps(loaded.config))
    config["model"]["num_layers"] = 2
    save_weights(misfit, loaded.state_dict, {"config": config})
    old = tmp_path / "old.safetensors"
    del config["model"]["freq_dim"]
    save_weights(old, loaded.state_dict, {"config": config})
    reasons = {
        old: "was written by another version: its config has no 'freq_dim'",
        corrupt: "cannot be read",
        bare: "carries no config",
        misfit: "does not fit the model, missing: blocks.1",
    }
    for path, reason in reasons.items():
        with pytest.raises(ValueError, match=f"{path.name} {reason}") as error:
            run(folder, tmp_path / "out", "--checkpoint", str(path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", ["--lenght 3", "--format avi", "--seed x", "--weights best", "--num_frames many"])
def test_options_that_do_not_exist(arguments, capsys):
    """argparse refuses unknown options and values with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        generate.parse_arguments(arguments.split())
    assert stop.value.code == 2 and arguments.split()[0] in capsys.readouterr().err


def test_the_real_command_line(folder, tmp_path):
    """As a user types it, from another folder: exit status 2 and one line on stderr."""
    command = [sys.executable, REPOSITORY / "generate.py", "--num_frames", "13"]
    command += ["--checkpoint", folder / "start.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("generate.py: 13 frames are not .*; use 12 or 15 frames.\n", done.stderr)
    assert names(tmp_path) == set()


def test_an_output_folder_that_is_a_file(folder, tmp_path, monkeypatch, capsys):
    """A path that cannot be written to is named on the command line, without a traceback."""
    (tmp_path / "file").touch()
    arguments = ["--checkpoint", str(folder / "start.safetensors"), "--prompts", PROMPTS[0], "--format", "npz"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments, "--output_dir", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / "generate.py"), run_name="__main__")
    assert stop.value.code == 2 and str(tmp_path / "file") in capsys.readouterr().err
