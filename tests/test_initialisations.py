"""Three ways to a few-step causal student before Self-Forcing: ODE pairs of two teachers, and consistency."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save
from test_rollout import BATCH, SCHEDULER, prompt, shaped, start, tiny_model
from tiny_runs import TINY, make_weights, options

import ode_pairs
import train
from checkpoint import load_weights, save_weights
from dynamic_video_sf import (
    Guided,
    RolloutConfig,
    block_causal,
    causal_forcing_loss,
    consistency_loss,
    euler,
    flow_matching_loss,
    generate,
    ode_regression_loss,
    ode_trajectory,
    predict_x0,
)
from metrics import uniform_prompts
from moving_mnist import WorldConfig
from randomness import generator, generators, randn

KEEP = (1000, 750, 500, 250)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """start.safetensors, teacher.safetensors and a causal teacher made by stage=init."""
    folder = make_weights(tmp_path_factory.mktemp("weights"))
    cfg = train.load_config(["stage=init", *TINY])
    state = load_weights(folder / "start.safetensors").state_dict
    record = {"config": train.OmegaConf.to_container(cfg, resolve=True)}
    save_weights(folder / "init.safetensors", state, record, dtype=torch.float32)
    return folder


# ------------------------------------------------------------------------------------------------------ trajectories


def test_the_students_steps_lie_on_the_grid():
    """Steps are kept before the warp, so whatever the shift, a student's times are among those of a 48-step ODE."""
    config = RolloutConfig(ode_pairs.grid(48), frames_per_block=3)
    assert len(config.denoising_steps) == 48 and set(KEEP) <= set(config.denoising_steps)
    times = SCHEDULER.denoising_times(config.denoising_steps)
    for step, time in zip(KEEP, SCHEDULER.denoising_times(KEEP), strict=True):
        assert times[config.denoising_steps.index(step)] == time
    assert [config.denoising_steps.index(step) for step in KEEP] == [0, 12, 24, 36]  # as in the reference


def test_a_trajectory_is_the_ode_of_the_whole_clip(model):
    """Bidirectional: its states are those of a plain Euler integration with guidance, written out here."""
    noise, uncond = start(4), prompt()
    config = RolloutConfig(ode_pairs.grid(8), frames_per_block=4)
    states = ode_trajectory(Guided(model, uncond, 3.0), SCHEDULER, noise, prompt(), config, KEEP)
    times, x, expected = [*SCHEDULER.denoising_times(config.denoising_steps), 0.0], noise, []
    with torch.no_grad():
        for i in range(8):
            if i % 2 == 0:
                expected.append(x)
            flow, free = model(x, times[i], prompt()), model(x, times[i], uncond)
            x = x + (times[i + 1] - times[i]) * (free + 3.0 * (flow - free))
    torch.testing.assert_close(states, torch.stack([*expected, x], dim=1), atol=1e-4, rtol=1e-4)


def test_a_causal_trajectory_is_a_rollout_that_is_watched(model):
    """Its end is the many-step video; each block's states start at its own noise and depend on the blocks before."""
    num_frames, _ = shaped("even")
    config = RolloutConfig(ode_pairs.grid(8), frames_per_block=3)
    noise, other = start(num_frames), start(num_frames)
    other[:, :3] += 1
    states, moved = (ode_trajectory(model, SCHEDULER, x, prompt(), config, KEEP) for x in (noise, other))
    assert states.shape == (BATCH, 5, *noise.shape[1:])
    assert torch.equal(states[:, 0], noise)
    torch.testing.assert_close(states[:, -1], generate(model, SCHEDULER, noise, prompt(), config, sampler=euler))
    assert torch.equal(states[:, 0, 3:], moved[:, 0, 3:]) and not torch.allclose(states[:, 2, 3:], moved[:, 2, 3:])


def test_a_step_off_the_grid_is_refused(model):
    with pytest.raises(ValueError, match=r"The ODE takes no step at \[750, 250\]: choose a number"):
        ode_trajectory(model, SCHEDULER, start(3), prompt(), RolloutConfig(ode_pairs.grid(6)), KEEP)


def test_a_causal_teachers_pairs_need_its_clean_past(model):
    """With the clean past that it saw, the causal teacher itself in one small step has no error at its last state."""
    config = RolloutConfig(ode_pairs.grid(8), frames_per_block=3)
    states = ode_trajectory(model, SCHEDULER, start(6), prompt(), config, (125,))
    times, last = [*SCHEDULER.denoising_times([1000, 125])[1:], 0.0], torch.zeros(BATCH, 2, dtype=torch.long)
    forced, free = (
        ode_regression_loss(
            model, SCHEDULER, states, times, prompt(), config, teacher_forcing=forcing, index=last
        ).item()
        for forcing in (True, False)
    )
    assert forced < 1e-9 < 1e-5 < free


@pytest.mark.parametrize("teacher, frames_per_block", [("teacher", 12), ("init", 3)])
def test_pairs_are_the_guided_ode_of_their_teacher(teacher, frames_per_block, weights):
    """Of every prompt against none, from the samples' own noise, in the blocks that the teacher knows."""
    loaded, prompts = ode_pairs.load_model(weights / f"{teacher}.safetensors"), uniform_prompts(2)
    pairs = ode_pairs.make_pairs(loaded, prompts, range(5, 7), 4, 3.0, KEEP, seed=1)
    window = loaded.sampling.rollout.window_frames
    config = RolloutConfig(KEEP, frames_per_block, window_frames=window)
    noise = randn((2, 12, 1, 24, 24), [generator(1, "ode pairs", i) for i in (5, 6)])
    guided = Guided(loaded.model, loaded.encoder.null(2), 3.0)
    expected = ode_trajectory(guided, loaded.scheduler, noise, loaded.encoder(prompts), config, KEEP)
    torch.testing.assert_close(pairs, expected)


def test_pairs_of_a_causal_teacher_keep_its_memory(weights):
    """Sink and window are those that it was trained with; its past is as clean as the frames of its ODE."""
    loaded, prompts = ode_pairs.load_model(weights / "init.safetensors"), uniform_prompts(2)
    memory = {"sink_frames": 3, "window_frames": 3, "sink_follows": True}
    own = replace(loaded.sampling.rollout, **memory, context_noise=150)
    loaded = replace(loaded, sampling=replace(loaded.sampling, rollout=own))
    pairs = ode_pairs.make_pairs(loaded, prompts, range(5, 7), 4, 3.0, KEEP, seed=1)
    config = RolloutConfig(KEEP, 3, **memory)
    noise = randn((2, 12, 1, 24, 24), [generator(1, "ode pairs", i) for i in (5, 6)])
    guided = Guided(loaded.model, loaded.encoder.null(2), 3.0)
    expected = ode_trajectory(guided, loaded.scheduler, noise, loaded.encoder(prompts), config, KEEP)
    torch.testing.assert_close(pairs, expected)


# ------------------------------------------------------------------------------------------------------- consistency


def consistency(model, target, teacher, x0, config=RolloutConfig(frames_per_block=3), **options):  # noqa: B008
    rng = generators(0, "consistency", samples=range(BATCH))
    return consistency_loss(model, target, teacher, SCHEDULER, x0, prompt(), prompt(), 1.0, config, rng=rng, **options)


def test_consistency_is_its_formula(model):
    """One Euler step of the teacher with the clean past, the target from there, the model from where it was."""
    other, x0 = tiny_model(), start(6).tanh()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    index = torch.tensor([[0, 5], [11, 7]])
    loss = consistency(model, other, model, x0, num_steps=12, index=index)
    frames = index.repeat_interleave(3, dim=1)
    grid = SCHEDULER.warp(1 - torch.arange(13) / 12)
    t, t_next = grid[frames], grid[frames + 1]
    x_t = SCHEDULER.add_noise(x0, randn(x0.shape, generators(0, "consistency", samples=range(BATCH))), t)
    config = RolloutConfig(frames_per_block=3)
    with torch.no_grad():
        flow = block_causal(model, config, x0)(x_t, t, prompt())
        x_next = x_t + (t_next - t)[:, :, None, None, None] * flow
        end = predict_x0(block_causal(other, config, x0), SCHEDULER, x_next, t_next, prompt())
        guess = predict_x0(block_causal(model, config, x0), SCHEDULER, x_t, t, prompt())
    torch.testing.assert_close(loss, (guess - end).square().mean())
    assert torch.equal(end[1, :3], x_next[1, :3])  # the last step ends at time 0, where the guess is the state itself


def test_consistency_teaches_the_model_alone(model):
    """Neither the target nor the teacher gets a gradient."""
    networks = [tiny_model() for _ in range(3)]
    consistency(*networks, start(6)).backward()
    assert [any(p.grad is not None for p in network.parameters()) for network in networks] == [True, False, False]


def test_a_perfect_student_is_consistent():
    """For data that is one clip, the ODE is a straight line and its true end has no loss; off by 0.1 has 0.01."""
    x0 = start(6).tanh()

    def oracle(x_t, t, cond, **options):
        return (x_t - x0) / t.reshape(*t.shape, 1, 1, 1).clamp_min(1e-6)

    def jump(x_t, t, cond, **options):
        return oracle(x_t, t, cond) + 0.1 / t.reshape(*t.shape, 1, 1, 1)

    index = torch.zeros(BATCH, 2, dtype=torch.long)
    assert consistency(oracle, oracle, oracle, x0) < 1e-9
    assert consistency(jump, oracle, oracle, x0, index=index).item() == pytest.approx(0.01, rel=1e-3)


def test_the_consistency_teacher_alone_is_guided():
    """For flows that are one number everywhere, the loss is the step times (g - model) + t_next (target - model),
    squared, with g = uncond + w (cond - uncond)."""

    def network(gain):
        return lambda x_t, t, cond, **options: torch.full_like(x_t, gain * cond)

    x0, index, w = start(6), torch.tensor([[0, 5], [11, 7]]), 3.0
    for target, flow in ((network(1.0), 1.0), (network(0.6), 0.6)):
        given = network(1.0), target, network(2.0), SCHEDULER, x0, 0.5, -0.2, w, RolloutConfig(frames_per_block=3)
        loss = consistency_loss(*given, num_steps=12, index=index)
        grid = SCHEDULER.warp(1 - torch.arange(13) / 12)
        t, t_next = grid[index], grid[index + 1]
        guided = 2.0 * (-0.2 + w * (0.5 - -0.2))
        miss = (t - t_next) * (guided - 0.5) + t_next * 0.5 * (flow - 1)
        torch.testing.assert_close(loss, miss.square().mean())


def test_consistency_sees_as_far_as_the_student_will():
    """Model, average and teacher alike: blocks, sink and window are those of the rollout."""
    seen = []

    def network(x_t, t, cond, **options):
        seen.append({name: value for name, value in options.items() if name != "clean"})
        return x_t

    config = RolloutConfig(frames_per_block=3, sink_frames=1, window_frames=3)
    consistency_loss(network, network, network, SCHEDULER, start(6), {}, {}, 1.0, config, num_steps=4,
                     rng=generator(0, "index"))  # fmt: skip
    assert len(seen) == 3 and all(options == {"frames_per_block": 3, "sink_frames": 1, "window_frames": 3}
                                  for options in seen)  # fmt: skip


def test_consistency_draws_every_step_for_every_block():
    """Times are those of the grid that a step begins at, pure noise among them, each block's its own."""
    seen = []

    def model(x_t, t, cond, **options):
        seen.append(t)
        return x_t

    x0, config = torch.zeros(2000, 4, 1, 1, 1), RolloutConfig(frames_per_block=2)
    consistency_loss(model, model, model, SCHEDULER, x0, {}, {}, 1.0, config, num_steps=4, rng=generator(0, "index"))
    teacher, target, student = seen
    assert torch.equal(teacher, student) and (target < student).all()
    assert torch.equal(student[:, ::2], student[:, 1::2])
    index = (student[:, ::2, None] - torch.tensor(SCHEDULER.denoising_times(KEEP))).abs().argmin(2)
    for block in (0, 1):
        torch.testing.assert_close(index[:, block].bincount() / 2000, torch.full((4,), 0.25), atol=0.05, rtol=0)
    assert abs(torch.corrcoef(index.T.float())[0, 1]) < 0.1
    assert student.max() == 1 and target.min() == 0


# ---------------------------------------------------------------------------------------------- storage and train.py


def arguments(monkeypatch, folder, weights, checkpoint="teacher", **changed):
    values = {"num_pairs": 70, "num_steps": 4, "output_dir": folder} | changed
    words = ["ode_pairs.py", "--checkpoint", f"{weights}/{checkpoint}.safetensors"]
    for name, value in values.items():
        words += [f"--{name}", str(value)]
    monkeypatch.setattr("sys.argv", words)


def test_pairs_are_stored_safely_and_go_on(weights, tmp_path, monkeypatch, capsys):
    """Two shards; a lost one is made again to the same bytes, a finished one is left alone, other settings refused."""
    arguments(monkeypatch, tmp_path, weights)
    ode_pairs.main()
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == ["pairs_00000.safetensors", "pairs_00001.safetensors"]
    before, made = [path.read_bytes() for path in paths], paths[0].stat().st_mtime_ns
    paths[1].unlink()
    ode_pairs.main()
    assert [path.read_bytes() for path in paths] == before and paths[0].stat().st_mtime_ns == made

    arguments(monkeypatch, tmp_path, weights, guidance_scale=3.0)
    with pytest.raises(SystemExit):
        ode_pairs.main()
    assert "holds pairs of other settings: choose another --output_dir." in capsys.readouterr().err

    pairs = ode_pairs.StoredPairs(tmp_path, WorldConfig(sprites_per_class=2))
    batch = pairs.batch([0, 69, 70])
    assert batch["trajectory"].shape == (3, 5, 12, 1, 24, 24) and batch["trajectory"].dtype == torch.float32
    assert torch.equal(batch["trajectory"][0], batch["trajectory"][2])  # from the start again
    assert batch["prompts"] == [uniform_prompts(70)[i] for i in (0, 69, 0)]
    assert (batch["steps"], batch["causal"]) == ([1000.0, 750.0, 500.0, 250.0], False)
    assert torch.equal(batch["video"], batch["trajectory"][:, -1])
    noise = randn((1, 12, 1, 24, 24), [generator(0, "ode pairs", 0)])
    torch.testing.assert_close(batch["trajectory"][:1, 0], noise.half().float())


def test_pairs_of_other_weights_are_refused(weights, tmp_path, monkeypatch, capsys):
    """Known by what the weights are: the same ones under another name go on, others under the same name are refused
    before anything is made, and so is what does not say whose it is; that can still be learned from."""
    folder, teacher = tmp_path / "pairs", tmp_path / "teacher.safetensors"
    teacher.write_bytes((weights / "teacher.safetensors").read_bytes())
    arguments(monkeypatch, folder, weights)
    ode_pairs.main()
    before = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    arguments(monkeypatch, folder, tmp_path)
    ode_pairs.main()
    assert {path: path.read_bytes() for path in sorted(folder.iterdir())} == before

    shipped = load_weights(teacher)
    moved = {name: x + 0.01 for name, x in shipped.state_dict.items()}
    save_weights(teacher, moved, {"config": shipped.config}, dtype=torch.float32)
    first, second = before
    first.unlink()
    with pytest.raises(SystemExit):
        ode_pairs.main()
    said = f"{second} holds pairs of other weights than {teacher}: delete it or choose another --output_dir."
    assert said in capsys.readouterr().err and not first.exists()

    header = ode_pairs.read_header(second)
    del header["settings"]["fingerprint"]
    second.write_bytes(save({"trajectory": torch.zeros(6, 5, 12, 1, 24, 24).half()}, {"header": json.dumps(header)}))
    with pytest.raises(SystemExit):
        ode_pairs.main()
    assert "holds pairs of an earlier version, perhaps of other weights than" in capsys.readouterr().err
    assert ode_pairs.StoredPairs(folder, WorldConfig(sprites_per_class=2)).batch([0])["video"].shape[1] == 12


def test_a_damaged_shard_is_named(weights, tmp_path, monkeypatch, capsys):
    """Neither made over in silence nor read: a sentence says what to do. Nor is nothing made of nothing."""
    arguments(monkeypatch, tmp_path, weights, num_pairs=2)
    ode_pairs.main()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(SystemExit):
        ode_pairs.main()
    assert "pairs_00000.safetensors is damaged, or no shard of pairs: delete it" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is damaged"):
        ode_pairs.StoredPairs(tmp_path, WorldConfig())
    arguments(monkeypatch, tmp_path, weights, num_pairs=0)
    with pytest.raises(SystemExit):
        ode_pairs.main()
    assert "must be at least 1" in capsys.readouterr().err


def test_whole_clips_have_no_sink_that_follows(model):
    with pytest.raises(ValueError, match="sink_follows moves the sink of a rollout"):
        block_causal(model, RolloutConfig(sink_frames=3, window_frames=3, sink_follows=True))


def test_pairs_of_another_world_are_refused(weights, tmp_path, monkeypatch):
    arguments(monkeypatch, tmp_path, weights, num_pairs=2)
    ode_pairs.main()
    with pytest.raises(ValueError, match="show another world"):
        ode_pairs.StoredPairs(tmp_path, WorldConfig(canvas=32))
    with pytest.raises(ValueError, match="There are no pairs in .*nothing: python ode_pairs.py"):
        ode_pairs.StoredPairs(tmp_path / "nothing", WorldConfig())


def test_pairs_from_before_there_were_rooms_are_kept(weights, tmp_path, monkeypatch):
    """A shard whose world has no `apart` is of a world without: it is used, and neither refused nor made again."""
    arguments(monkeypatch, tmp_path, weights, num_pairs=2)
    ode_pairs.main()
    (path,) = tmp_path.iterdir()
    header = ode_pairs.read_header(path)
    world = WorldConfig(**header["settings"]["world"])
    assert header["settings"]["world"].pop("apart") == 0
    path.write_bytes(save(load_file(path), {"header": json.dumps(header)}))
    old = path.read_bytes()
    ode_pairs.main()
    assert path.read_bytes() == old and len(ode_pairs.StoredPairs(tmp_path, world).prompts) == 2
    with pytest.raises(ValueError, match="show another world"):
        ode_pairs.StoredPairs(tmp_path, replace(world, apart=8))


@pytest.mark.parametrize("teacher, causal", [("teacher", False), ("init", True)])
def test_a_student_starts_from_stored_pairs(teacher, causal, weights, tmp_path, monkeypatch):
    """stage=init init=ode_pairs trains on what is stored; whether blocks see a clean past follows from the teacher."""
    arguments(monkeypatch, tmp_path / "pairs", weights, teacher, num_pairs=4)
    ode_pairs.main()
    told = []
    monkeypatch.setattr(
        train, "ode_regression_loss",
        lambda *a, teacher_forcing, **k: told.append(teacher_forcing) or ode_regression_loss(
            *a, teacher_forcing=teacher_forcing, **k),
    )  # fmt: skip
    more = ["init=ode_pairs", f"data.folder={tmp_path}/pairs", "training.num_steps=2"]
    final = train.main(options("init", tmp_path / "run", weights, *more))
    assert final.exists() and told == [causal] * 2


def test_a_student_starts_by_consistency(weights, tmp_path):
    """init=consistency needs a causal teacher; a bidirectional one is refused."""
    more = ["init=consistency", "training.num_steps=2"]
    causal = f"training.teacher_checkpoint={weights}/init.safetensors"
    assert train.main(options("init", tmp_path / "run", weights, *more, causal)).exists()
    with pytest.raises(ValueError, match="made by stage=teacher; .* needs one of stage=init"):
        train.main(
            options(
                "init", tmp_path / "b", weights, *more, f"training.teacher_checkpoint={weights}/teacher.safetensors"
            )
        )


@pytest.mark.parametrize("init", [None, "teacher_forcing", "diffusion_forcing", "ode_pairs", "consistency"])
def test_what_a_first_step_minimises(init, weights, tmp_path, monkeypatch):
    """stage=teacher and each init= of stage=init: its loss, of the run's own data, with the run's own settings."""
    stage = "init" if init else "teacher"
    more = ["training.guidance_scale=3.0", *([f"init={init}"] if init else [])]
    if init == "ode_pairs":
        arguments(monkeypatch, tmp_path, weights, num_pairs=2)
        ode_pairs.main()
        more.append(f"data.folder={tmp_path}")
    elif init == "consistency":
        more.append(f"training.teacher_checkpoint={weights}/init.safetensors")
    else:
        more.append("training.parametrisation=x0")
    run = train.build(train.load_config(options(stage, "unused", weights, *more)))
    student = run.networks["generator"]
    with torch.no_grad():
        for parameter in student.parameters():  # another than its teacher
            parameter.mul_(1.1)
    rng, again = (generators(0, samples=range(2)) for _ in range(2))
    ((network, loss),) = train.LOSSES[stage](run, range(2), rng, None)

    settings = {"config": RolloutConfig(frames_per_block=3, window_frames=6), "rng": again}
    if init == "ode_pairs":
        batch, times = run.data.batch(range(2)), [*run.scheduler.denoising_times(KEEP), 0.0]
        cond = run.encoder(batch["prompts"])
        expected = ode_regression_loss(student, run.scheduler, batch["trajectory"], times, cond, **settings)
    else:
        video, cond = train.clips(run, range(2), again)
        if init == "consistency":
            teacher, none = run.teacher, run.encoder.null(2)
            expected = consistency_loss(student, student, teacher, run.scheduler, video, cond, none, 3.0, **settings)
        elif init:
            settings |= {"teacher_forcing": init == "teacher_forcing", "parametrisation": "x0"}
            expected = causal_forcing_loss(student, run.scheduler, video, cond, **settings)
        else:
            expected = flow_matching_loss(student, run.scheduler, video, cond, rng=again, parametrisation="x0")
    assert network == "generator"
    torch.testing.assert_close(loss, expected)
