"""full_scale.generate: prompts, images and videos to files through networks in their real formats, in every way."""

import gc
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from safetensors.torch import save_file
from small_wan import write_clip, write_text_encoder, write_tiny_decoder, write_vae
from torch import nn
from torch._dynamo.testing import CompileCounter

import attention_maps
from checkpoint import save_checkpoint
from dynamic_video_sf import RolloutConfig
from flow_match import FlowMatchScheduler
from full_scale import attention_capture, generate, parallelize, sharded_checkpoint
from full_scale.convert import save_transformer
from full_scale.generate import Models, Sampling, choose_sampling, stream_latents, stream_video
from full_scale.images import image_pixels
from full_scale.memory import KnownPrompts, VisitingStream, moved, offload_layers
from full_scale.pixels import WanVAE, load_vae
from full_scale.pretrained import DOWNLOADS
from full_scale.sharded_checkpoint import STATE
from full_scale.speed import quantise
from full_scale.text import TextEncoder
from full_scale.wan import WAN_CONFIGS, load_transformer, stored_config
from generate import sample_keys
from kv_cache import KVCache
from ode_pairs import grid
from randomness import generator, rand, randn
from tiny_causal_wan import TinyCausalWanModel, exact_attention

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = {"dim": 24, "ffn_dim": 48, "num_heads": 2, "num_layers": 2}  # Wan's own patches, prompts and channels
CONFIGS = {"t2v": replace(WAN_CONFIGS["t2v-1.3b"], **SMALL), "i2v": replace(WAN_CONFIGS["i2v-14b"], **SMALL)}
HEIGHT, WIDTH, LATENT = 32, 48, (16, 4, 6)
SIZE = ["--height", str(HEIGHT), "--width", str(WIDTH)]
PROMPTS = ["a cat walks on the grass", "two dogs run over a red bridge at night"]
STEPS = (1000, 750, 500, 250)
FEW = Sampling(RolloutConfig())


def build(kind="t2v", seed=0, dtype=torch.float32):
    """A model whose every parameter is random, small enough for flows of order 1."""
    model = TinyCausalWanModel(CONFIGS[kind]).requires_grad_(False).eval()
    for i, (name, parameter) in enumerate(model.named_parameters()):
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        parameter.copy_(randn(parameter.shape, generator(seed, i)) / fan_in**0.5 + name.endswith("norm_q.weight"))
    return model.to(dtype)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """Wan's own folder: transformer, UMT5 with its tokenizer, VAE."""
    folder = tmp_path_factory.mktemp("wan") / "Wan2.1-T2V-1.3B"
    save_transformer(build(), folder)
    write_text_encoder(folder, official=True)
    write_vae(folder, official=True)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A file as Self-Forcing writes them: the generator and, with other weights, its average."""
    path = tmp_path_factory.mktemp("student") / "self_forcing_dmd.pt"
    networks = {"generator": build(seed=1), "generator_ema": build(seed=2)}
    content = {name: {f"model.{key}": x for key, x in model.state_dict().items()} for name, model in networks.items()}
    save_checkpoint(path, content)
    return path


@pytest.fixture(scope="module")
def wan_i2v(wan, tmp_path_factory):
    """A diffusers pipeline for images: its own transformer and image encoder, the text encoder and VAE from above."""
    folder = tmp_path_factory.mktemp("i2v") / "Wan2.1-I2V-14B-480P"
    save_transformer(build("i2v"), folder)
    write_clip(folder, official=True)
    for file in [*wan.glob("*.pth"), wan / "google"]:
        (folder / file.name).symlink_to(file)
    return folder


def picture(folder, name, seed=0):
    """A smooth picture in a file."""
    pixels = nn.functional.interpolate(rand((1, 3, 3, 4), generator(seed, "picture")), (40, 60), mode="bilinear")[0]
    Image.fromarray((255 * pixels).byte().permute(1, 2, 0).numpy()).save(folder / name)
    return folder / name


def run(out, checkpoint, wan, *arguments, frames=3, format=("npz",)):
    """main() on small videos; npz holds exact pixels."""
    own = ["--checkpoint", checkpoint, "--model_path", wan, "--output_folder", out, "--num_output_frames", frames]
    own += ["--config", wan / "config.json", *SIZE, "--format", *format]
    return generate.main([str(argument) for argument in (*own, *arguments)])


def pixels(path):
    """uint8 [F, 3, H, W] of an npz."""
    with np.load(path) as file:
        return file["video"][0]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------- to a file


def test_text_to_mp4_in_one_command(wan, tmp_path):
    """As a user types it, on Wan's own folder: tokenizer, UMT5, many guided steps on a whole clip, VAE, H.264."""
    command = [sys.executable, "-m", "full_scale.generate", "--checkpoint", wan, "--prompts", PROMPTS[0], *SIZE]
    command += ["--num_output_frames", "3", "--num_steps", "3", "--output_folder", tmp_path]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == [f"{PROMPTS[0]}-0.json", f"{PROMPTS[0]}-0.mp4"]
    frames = imageio.imread(tmp_path / f"{PROMPTS[0]}-0.mp4")
    assert frames.shape == (1 + 4 * (3 - 1), HEIGHT, WIDTH, 3) and frames.std() > 5
    assert imageio.immeta(tmp_path / f"{PROMPTS[0]}-0.mp4")["fps"] == 16
    record = json.loads((tmp_path / f"{PROMPTS[0]}-0.json").read_text())
    assert record["prompt"] == PROMPTS[0] and record["many_step"] and record["guidance_scale"] == 5
    assert record["frames_per_block"] == 3 and record["denoising_steps"] == pytest.approx([1000, 2000 / 3, 1000 / 3])


def test_every_format_shows_the_same_frames(student, wan, tmp_path):
    """npz to the bit, gif in 256 colours, mp4 as H.264 does; 16 frames a second."""
    npz, gif, mp4 = run(tmp_path, student, wan, "--prompts", PROMPTS[0], format=("npz", "gif", "mp4"))
    exact = pixels(npz).transpose(0, 2, 3, 1).astype(float)
    assert exact.shape == (9, HEIGHT, WIDTH, 3) and exact.std() > 5
    with np.load(npz) as file:
        assert (str(file["prompt"]), int(file["seed"])) == (PROMPTS[0], 0)
    for path in (gif, mp4):
        frames = imageio.imread(path, mode="RGB") if path is gif else imageio.imread(path)
        assert frames.shape == exact.shape and abs(frames - exact).mean() < 0.3 * exact.std()  # noise
    assert 60 <= imageio.immeta(gif)["duration"] <= 63
    models = Models(student, wan, config=wan / "config.json")
    whole = torch.cat(list(stream_video(models, PROMPTS[:1], FEW, num_frames=3, height=HEIGHT, width=WIDTH)), dim=1)
    assert np.array_equal(exact[0], ((whole[0, 0] + 1) / 2 * 255).round().permute(1, 2, 0).numpy())


def test_an_interrupted_video_leaves_no_file(student, wan, tmp_path, monkeypatch):
    """A file has its name when it is whole; what was begun is taken away."""

    def broken(*_, **__):
        yield torch.zeros(1, 1, 3, HEIGHT, WIDTH)
        raise ValueError("the device is gone")

    monkeypatch.setattr(generate, "stream_video", broken)
    with pytest.raises(ValueError, match="the device is gone"):
        run(tmp_path, student, wan, "--prompts", PROMPTS[0], format=("npz", "gif", "mp4"))
    assert names(tmp_path) == []


# --------------------------------------------------------------------------------------------------- the four ways


def cond_for(model, batch=1, seed=0):
    cond = {"prompt_embeds": randn((batch, 5, 4096), generator(seed, "prompt"))}
    if model.config.model_type == "i2v":
        cond["clip_features"] = randn((batch, 257, 1280), generator(seed, "clip"))
        cond["image_latents"] = randn((batch, 6, 20, *LATENT[1:]), generator(seed, "image"))
    return cond


def latents(model, sampling, num_frames=6, cond=None, key=(0, "x", 0), **options):
    """All latents [1, F, 16, h, w] of one stream."""
    cond = cond or cond_for(model)
    return torch.cat(list(stream_latents(model, sampling, cond, [key], num_frames, LATENT, **options)), dim=1)


def block_noise(key, frame, size):
    """What a block that begins at `frame` starts from, and the numbers of what is drawn on the way."""
    first, later = (generator(*key, frame, purpose) for purpose in ("noise", "renoise"))
    return torch.stack([randn(LATENT, first) for _ in range(size)])[None], later


def test_few_steps_block_by_block():
    """A loop written out: four guesses, fresh noise between them, the block remembered at t = 0."""
    model, scheduler, key, cond = build(), FlowMatchScheduler(), (0, "x", 0), cond_for(build())
    cache, expected = KVCache(), []
    for frame in (0, 3):
        x, rng = block_noise(key, frame, 3)
        for t, t_next in zip((1, 0.9375, 5 / 6, 0.625), (0.9375, 5 / 6, 0.625, None), strict=True):
            x0 = x - t * model(x, t, cond, cache)
            x = None if t_next is None else (1 - t_next) * x0 + t_next * randn(x0.shape, [rng])
        expected.append(x0)
        cache = model.remember(x0, 0.0, cond, cache)
    found = latents(model, FEW)
    torch.testing.assert_close(found, torch.cat(expected, dim=1), atol=1e-5, rtol=0)
    assert scheduler == FEW.scheduler and found.std() > 0.5


@pytest.mark.parametrize("kind, guidance_scale, num_steps", [("t2v", 1.0, 50), ("t2v", 4.0, 50), ("i2v", 4.0, 20)])
def test_many_steps_on_whole_clips_are_the_loop_of_diffusers(kind, guidance_scale, num_steps):
    """diffusers' UniPC around the same model, cond and uncond, equal to 1e-5 of the latents' spread, in float32."""
    from diffusers import UniPCMultistepScheduler

    model, key = build(kind), (0, "x", 0)
    cond, steps = cond_for(model), [1000 * (1 - i / num_steps) for i in range(num_steps)]
    uncond = cond | {"prompt_embeds": randn((1, 7, 4096), generator(1, "negative"))}
    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    solver.set_timesteps(sigmas=np.array(steps) / 1000)
    x, _ = block_noise(key, 0, 4)
    for t, time_step in zip(FlowMatchScheduler(5.0).denoising_times(steps), solver.timesteps, strict=True):
        flow = model(x, t, cond)
        if guidance_scale != 1:
            free = model(x, t, uncond)
            flow = free + guidance_scale * (flow - free)
        x = solver.step(flow, time_step, x, return_dict=False)[0]
    sampling = Sampling(RolloutConfig(steps, frames_per_block=4), 5.0, guidance_scale, many_step=True)
    guided = generate.Guided(model, uncond, guidance_scale) if guidance_scale != 1 else model
    found = latents(guided, sampling, 4, cond, key)
    torch.testing.assert_close(found, x, atol=1e-5 * x.std().item(), rtol=0)


def test_many_steps_block_by_block(student, wan, tmp_path):
    """Guided UniPC through a cache: a block depends on what was made before it, and on nothing that comes later."""
    ways = ["--mode", "many-step", "--num_steps", "3", "--guidance_scale", "3"]
    six, three, whole = (
        pixels(run(tmp_path / name, student, wan, "--prompts", PROMPTS[0], *ways, *more, frames=frames)[0])
        for name, frames, more in (("six", 6, []), ("three", 3, []), ("whole", 6, ["--bidirectional"]))
    )
    assert np.array_equal(six[:9], three) and not np.array_equal(six[:9], whole[:9])
    record = json.loads((tmp_path / "six" / f"{PROMPTS[0]}-0.json").read_text())
    assert record["frames_per_block"] == 3 and len(record["denoising_steps"]) == 3 and record["guidance_scale"] == 3
    negative = ["--negative_prompt", "grey, still"]
    other = run(tmp_path / "negative", student, wan, "--prompts", PROMPTS[0], *ways, *negative)
    assert not np.array_equal(pixels(other[0]), three)


def sampling_of(path, kind=None, **options):
    """(blocks, number of steps, many steps?, guidance, shift) that a checkpoint of such a model gets."""
    found = choose_sampling(Models(path, path, config=kind), 21, **options)
    rollout = found.rollout
    return rollout.frames_per_block, len(rollout.denoising_steps), found.many_step, found.guidance_scale, found.shift


def test_how_a_checkpoint_is_sampled_follows_from_what_it_is(wan, student):
    """The table at the top of generate.py, and each of its columns by option."""
    assert sampling_of(wan) == (21, 50, True, 5.0, 5.0)
    for kind, frames in {"t2v-1.3b": 3, "t2v-14b": 21, "i2v-14b": 21}.items():
        assert sampling_of(student, kind) == (frames, 4, False, 1.0, 5.0)
    assert sampling_of(wan, mode="few-step") == (21, 4, False, 1.0, 5.0)
    assert sampling_of(wan, bidirectional=False) == (3, 50, True, 5.0, 5.0)
    assert sampling_of(wan, frames_per_block=[1, 4], num_steps=9) == ((1, 4), 9, True, 5.0, 5.0)
    assert sampling_of(student, "t2v-1.3b", bidirectional=True, guidance_scale=2.0) == (21, 4, False, 2.0, 5.0)
    options = {"given": "image", "mode": "many-step", "shift": 8.0}
    assert sampling_of(student, "t2v-1.3b", **options) == ((1, 3), 50, True, 5.0, 8.0)
    assert sampling_of(student, "t2v-1.3b", denoising_steps=[1000, 500]) == (3, 2, False, 1.0, 5.0)
    config = choose_sampling(Models(student, wan, config="t2v-1.3b"), sink_frames=3, window_frames=9).rollout
    assert (config.sink_frames, config.window_frames, config.denoising_steps) == (3, 9, STEPS)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
def test_what_was_trained_here_is_sampled_as_it_was_trained(suffix, tmp_path):
    """A checkpoint of train.py says how: steps, blocks, noise on the memory, sink, window, shift; options go first."""
    training = {"stage": "self_forcing", "num_frames_per_block": 2, "max_num_frames": 8, "denoising_steps": [1000, 400]}
    training |= {"context_noise": 30, "sink_frames": 2, "window_frames": 4, "sink_follows": True, "guidance_scale": 3.0}
    path = tmp_path / f"checkpoint{suffix}"

    def found(given=None, **changes):
        record = {"training": training | changes, "scheduler": {"shift": 3.0}}
        if suffix == ".pt":
            save_checkpoint(path, {"generator_state_dict": {"x": torch.zeros(1)}, "config": record})
        elif suffix == ".safetensors":
            save_file({"x": torch.zeros(1)}, path, {"config": json.dumps(record)})
        else:  # of many processes
            path.mkdir(exist_ok=True)
            (path / STATE).write_text(json.dumps({"config": record}))
        models = Models(path, path)
        vars(models)["sizes"] = WAN_CONFIGS["t2v-1.3b"]
        return choose_sampling(models, 21, **(given or {}))

    own = RolloutConfig((1000, 400), 2, context_noise=30, sink_frames=2, window_frames=4, sink_follows=True)
    assert found() == Sampling(own, 3.0, 1.0, False)
    assert found({"window_frames": 8}).rollout == replace(own, window_frames=8)
    assert found(num_frames_per_block=8).rollout.frames_per_block == 21  # it made whole clips
    teacher = found(stage="teacher")
    assert teacher.many_step and teacher.guidance_scale == 3 and teacher.rollout.frames_per_block == 21


# ------------------------------------------------------------------------------------------------------ streaming


@pytest.fixture(scope="module")
def models(student, wan):
    return Models(student, wan, config=wan / "config.json")


SHAPE = {"height": HEIGHT, "width": WIDTH}


@pytest.mark.parametrize("decoder", ["VAE", "tiny decoder"])
def test_streamed_frames_are_those_of_the_whole_clip(decoder, models, tmp_path):
    """Three blocks decoded one after another equal the clip decoded at once, in batches too; 9, then 12 frames each."""
    if decoder == "tiny decoder":
        write_tiny_decoder(tmp_path / "taew2_1.pth")
        models = replace(models, tiny_decoder=tmp_path / "taew2_1.pth")
    pieces = list(stream_video(models, PROMPTS, FEW, num_frames=9, seed=3, **SHAPE))
    assert [list(piece.shape) for piece in pieces] == [[2, frames, 3, HEIGHT, WIDTH] for frames in (9, 12, 12)]
    clean = stream_latents(models.transformer, FEW, models.text(PROMPTS), sample_keys(PROMPTS, 3), 9, LATENT)
    whole = models.decoder.decode(torch.cat(list(clean), dim=1))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole.clamp(-1, 1), atol=1e-5, rtol=0)


class Watched:
    """A generator that counts its calls and keeps the frames that it remembers."""

    def __init__(self, model):
        self.model, self.calls, self.remembered = model, 0, []

    def __call__(self, *inputs):
        self.calls += 1
        return self.model(*inputs)

    def remember(self, *inputs):
        cache = self.model.remember(*inputs)
        self.remembered.append(cache.frames)
        return cache


def test_a_block_is_shown_before_the_next_is_begun(models):
    """The first pixels need four calls of the network and not even the pass that remembers them."""
    watched = Watched(models.transformer)
    models = replace(models)
    models.__dict__.update(transformer=watched)
    stream = stream_video(models, PROMPTS[:1], FEW, num_frames=6, **SHAPE)
    assert next(stream).shape[1] == 9 and (watched.calls, watched.remembered) == (4, [])
    assert next(stream).shape[1] == 12 and (watched.calls, watched.remembered) == (8, [(0, 1, 2)])
    assert next(stream, None) is None and len(watched.remembered) == 1


def test_the_next_block_is_computed_while_one_is_shown():
    """Who holds the first item sees the second being made, without asking for it; the order stays, and so do errors."""
    begun = [False] * 3

    def items():
        for i in range(3):
            begun[i] = True
            yield i
        raise ValueError("the last")

    shown = generate.ahead(items())
    assert next(shown) == 0
    deadline = time.monotonic() + 20
    while not begun[1] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert begun == [True, True, False]
    assert list(islice(shown, 2)) == [1, 2]
    with pytest.raises(ValueError, match="the last"):
        next(shown)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_long_video_needs_no_more_memory(guidance_scale, monkeypatch):
    """With a sink and a window the cache stays at their size, and noise is drawn for a block at a time."""
    drawn = []
    draw = generate.draw_noise
    monkeypatch.setattr(generate, "draw_noise", lambda keys, n, *rest: drawn.append(n) or draw(keys, n, *rest))
    watched = Watched(build())
    model = generate.Guided(watched, cond_for(build(), seed=1), guidance_scale) if guidance_scale != 1 else watched
    sampling = Sampling(RolloutConfig((1000, 500), 3, sink_frames=3, window_frames=3))
    video = latents(model, sampling, num_frames=18, cond=cond_for(build()))
    assert video.shape[1] == 18 and drawn == [3] * 6
    passes = 2 if guidance_scale != 1 else 1
    assert [len(frames) for frames in watched.remembered] == passes * [3] + 4 * passes * [6]
    assert watched.remembered[-1] == (0, 1, 2, 12, 13, 14)


def test_samples_do_not_depend_on_each_other(student, wan, tmp_path):
    """Sample k of a prompt is the same alone, among other prompts, in a batch (to rounding), and from the iterator."""
    many = ["--prompts", *PROMPTS, "--num_samples", "2"]
    batched = run(tmp_path / "batched", student, wan, *many, "--batch_size", "3")
    single = run(tmp_path / "single", student, wan, *many)
    alone = run(tmp_path / "alone", student, wan, "--prompts", PROMPTS[1], "--num_samples", "2")
    assert [path.name for path in single] == [f"{prompt}-{k}.npz" for prompt in PROMPTS for k in range(2)]
    for one, other in zip(batched, single, strict=True):
        assert abs(pixels(one).astype(int) - pixels(other)).max() <= 1
    for one, other in zip(alone, single[2:], strict=True):
        assert one.read_bytes() == other.read_bytes()
    repeated = run(tmp_path / "repeated", student, wan, "--prompts", PROMPTS[1], PROMPTS[0], PROMPTS[1])
    assert [path.name for path in repeated] == [f"{PROMPTS[1]}-0.npz", f"{PROMPTS[0]}-0.npz", f"{PROMPTS[1]}-1.npz"]
    assert [path.read_bytes() for path in repeated] == [single[i].read_bytes() for i in (2, 0, 3)]
    videos = np.stack([pixels(path) for path in single]).astype(int)
    other_seed = run(tmp_path / "seed", student, wan, "--prompts", PROMPTS[0], "--seed", "1")
    videos = np.concatenate([videos, pixels(other_seed[0])[None]])
    assert all(abs(videos[i] - videos[j]).mean() > 1 for i in range(5) for j in range(i))


# ------------------------------------------------------------------------------------------- images and videos


@pytest.mark.parametrize("window_frames", [None, 3])
@pytest.mark.parametrize("many_step", [False, True])
def test_a_continued_video_goes_on_as_it_would_have(many_step, window_frames):
    """Its first blocks given back, a rollout makes the very latents of one that was never interrupted."""
    model, steps = build(), (1000, 700, 300) if many_step else STEPS
    config = RolloutConfig(steps, (1, 2), sink_frames=1, window_frames=window_frames)
    sampling = Sampling(config, guidance_scale=3.0, many_step=many_step)
    if many_step:
        model = generate.Guided(model, cond_for(build(), seed=1), 3.0)
    whole = latents(model, sampling, 9, cond_for(build()))
    for given in (1, 5):
        rest = latents(model, sampling, 9 - given, cond_for(build()), past=whole[:, :given])
        assert torch.equal(rest, whole[:, given:])
    other = latents(model, sampling, 4, cond_for(build()), past=whole[:, :5] + 0.1)
    assert not torch.allclose(other, whole[:, 5:], atol=1e-2)


def test_a_given_video_comes_first_and_is_continued(student, wan, models, tmp_path, monkeypatch):
    """All its frames, as they were given; then what follows its last whole blocks, decoded without a seam. It is held
    as bytes, and shown and encoded a few pictures at a time."""
    monkeypatch.setattr(generate, "PIECE", 4)
    (made,) = run(tmp_path, student, wan, "--prompts", PROMPTS[0], format=("mp4",))
    given = generate.read_video(made, HEIGHT, WIDTH)
    longer = tmp_path / "longer.mp4"
    shown = given[0, [0, 0, *range(9)]].permute(0, 2, 3, 1).numpy()
    imageio.imwrite(longer, shown, fps=16, codec="libx264", quality=10, macro_block_size=1)
    video = generate.read_video(longer, HEIGHT, WIDTH)
    assert given.shape[1] == 9 and video.shape[1] == 11 and video.dtype == torch.uint8
    shown = stream_video(models, PROMPTS[:1], FEW, num_frames=3, height=HEIGHT, width=WIDTH, video=video)
    assert [piece.shape[1] for piece in islice(shown, 3)] == [4, 4, 3]
    (path,) = run(tmp_path / "out", student, wan, "--prompts", PROMPTS[1], "--video", longer, "--seed", 4)
    found = torch.from_numpy(pixels(path))
    assert len(found) == 11 + 4 * 3
    assert torch.equal(found[:11], video[0])
    past = models.vae.encode(video[:, 2:] / 127.5 - 1)
    (key,) = sample_keys(PROMPTS[1:], 4)
    new = torch.cat([*stream_latents(models.transformer, FEW, models.text(PROMPTS[1:]), [key], 3, LATENT, past=past)])
    expected = models.vae.decode(torch.cat([past, new], dim=1))[0, 9:]
    assert (found[11:] - (expected + 1) * 127.5).abs().max() <= 1


def test_frames_are_read_at_sixteen_a_second(tmp_path):
    """A video of another speed is thinned out, not slowed down; one of other proportions loses its margins, white."""
    frames = np.broadcast_to(np.linspace(0, 250, 33)[:, None, None, None], (33, 64, 128, 3)).astype(np.uint8)
    frames[:, :, :12] = frames[:, :, -12:] = 255  # 64 x 96 of it are left
    imageio.imwrite(tmp_path / "fast.mp4", frames, fps=32, macro_block_size=1)
    video = generate.read_video(tmp_path / "fast.mp4", HEIGHT, WIDTH)
    assert video.shape == (1, 17, 3, HEIGHT, WIDTH)
    brightness = video[0].float().mean((1, 2, 3))
    assert (brightness - torch.linspace(0, 250, 17)).abs().max() < 4


def test_an_image_is_the_first_frame_of_a_text_to_video_model(student, wan, models, tmp_path):
    """Blocks of 1, 3, 3: the image's latent fills the cache, its pixels come first, 1 + 4 F frames in all."""
    image = picture(tmp_path, "red.png")
    (path,) = run(tmp_path / "out", student, wan, "--prompts", PROMPTS[0], "--image", image, frames=6)
    found = torch.from_numpy(pixels(path))
    first = image_pixels(Image.open(image), HEIGHT, WIDTH)
    assert len(found) == 1 + 4 * 6 and torch.equal(found[0], ((first[0] + 1) / 2 * 255).round().byte())
    record = json.loads(path.with_name(f"{PROMPTS[0]}-0.json").read_text())
    assert record["frames_per_block"] == [1, 3]
    key = record["prompt"], record["image"]
    sampling, past = Sampling(RolloutConfig(frames_per_block=(1, 3))), models.vae.encode(first[:, None])
    cond = models.text(PROMPTS[:1])
    keys = sample_keys([key], 0)
    new = torch.cat([*stream_latents(models.transformer, sampling, cond, keys, 6, LATENT, past=past)], dim=1)
    expected = models.vae.decode(torch.cat([past, new], dim=1))[0, 1:]
    assert (found[1:] - (expected + 1) * 127.5).abs().max() <= 1


def test_image_text_pairs(student, wan, tmp_path):
    """Each video begins with its own image, in the order of the files' names, named by its own text; or by a list."""
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    images = [picture(pairs, name, seed) for seed, name in enumerate(("b.jpg", "a.png"))]
    for image, prompt in zip(images, PROMPTS, strict=True):
        image.with_suffix(".txt").write_text(f"{prompt}\n")
    paths = run(tmp_path / "out", student, wan, "--i2v", "--data_path", pairs)
    assert [path.name for path in paths] == [f"{PROMPTS[1]}-0.npz", f"{PROMPTS[0]}-0.npz"]
    for path, image in zip(paths, images[::-1], strict=True):
        first = image_pixels(Image.open(image), HEIGHT, WIDTH)[0]
        assert torch.equal(torch.from_numpy(pixels(path)[0]), ((first + 1) / 2 * 255).round().byte())
    listed = [{"file_name": image.name, "caption": text} for image, text in zip(images, PROMPTS, strict=True)]
    (tmp_path / "target_crop_info_pairs.json").write_text(json.dumps(listed))  # CausVid's
    again = run(tmp_path / "list", student, wan, "--i2v", "--data_path", tmp_path / "target_crop_info_pairs.json")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths[::-1]]


def test_an_image_to_video_model(wan_i2v, tmp_path):
    """Whole clips, guided, conditioned on mask, latents and CLIP tokens of the image; both branches see it."""
    from full_scale.images import image_conditioning, load_image_encoder

    image = picture(tmp_path, "red.png")
    ways = ["--num_steps", "3", "--prompts", PROMPTS[0], "--image", image]
    (path,) = run(tmp_path / "out", wan_i2v, wan_i2v, *ways)
    found = torch.from_numpy(pixels(path))
    assert len(found) == 1 + 4 * (3 - 1)
    models, record = Models(wan_i2v, wan_i2v), json.loads(path.with_name(f"{PROMPTS[0]}-0.json").read_text())
    assert record["negative_prompt"].startswith("镜头晃动") and record["frames_per_block"] == 3
    seen = image_conditioning(Image.open(image), 3, models.vae, load_image_encoder(wan_i2v), height=HEIGHT, width=WIDTH)
    cond, uncond = models.text(PROMPTS[:1]) | seen, models.text([record["negative_prompt"]]) | seen
    sampling = choose_sampling(models, 3, num_steps=3)
    guided = generate.Guided(models.transformer, uncond, 5.0)
    keys = sample_keys([(PROMPTS[0], record["image"])], 0)
    (new,) = stream_latents(guided, sampling, cond, keys, 3, LATENT)
    assert (found - (models.vae.decode(new)[0].clamp(-1, 1) + 1) * 127.5).abs().max() <= 1


# ------------------------------------------------------------------------------------------------ what is asked for


def test_averaged_weights_by_default(student, wan, tmp_path):
    """--use_ema, the default, is the average, --no-use_ema the generator; index names say which."""
    assert generate.parse_arguments([]).use_ema and generate.parse_arguments(["--use_ema"]).use_ema
    ways = {"ema": [], "raw": ["--no-use_ema"]}
    paths = {
        name: run(tmp_path / name, student, wan, "--prompts", PROMPTS[0], "--save_with_index", *way)[0]
        for name, way in ways.items()
    }
    assert [path.name for path in paths.values()] == ["0-0_ema.npz", "0-0_regular.npz"]
    for name, seed in {"ema": 2, "raw": 1}.items():
        save_transformer(build(seed=seed), tmp_path / f"{name}.safetensors")
        (only,) = run(tmp_path / f"only {name}", tmp_path / f"{name}.safetensors", wan, "--prompts", PROMPTS[0])
        assert np.array_equal(pixels(only), pixels(paths[name]))
    assert not np.array_equal(pixels(paths["raw"]), pixels(paths["ema"]))


def test_prompts_from_a_folder(student, wan, tmp_path):
    """Every .txt is one prompt, in the order of their names. (Files of lines: below, with extended prompts.)"""
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "2.txt").write_text(PROMPTS[0].replace(" on", "\non"))
    (folder / "10.txt").write_text(PROMPTS[1])
    paths = run(tmp_path / "out", student, wan, "--data_path", folder)
    assert [path.name for path in paths] == [f"{PROMPTS[1]}-0.npz", f"{PROMPTS[0]}-0.npz"]


def test_extended_prompts_are_read_and_short_ones_name_the_files(student, wan, tmp_path):
    """The video is that of the long prompt, the name that of the short one; by index with --save_with_index."""
    (tmp_path / "short.txt").write_text("\n".join(PROMPTS))
    long = [f"{prompt}, cinematic light, high quality" for prompt in PROMPTS]
    (tmp_path / "long.txt").write_text("\n".join(long))
    from_files = ["--data_path", tmp_path / "short.txt", "--extended_prompt_path", tmp_path / "long.txt"]
    paths = run(tmp_path / "names", student, wan, *from_files)
    expected = run(tmp_path / "expected", student, wan, "--prompts", *long)
    assert [path.name for path in paths] == [f"{prompt}-0.npz" for prompt in PROMPTS]
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in expected]
    paths = run(tmp_path / "numbers", student, wan, *from_files, "--save_with_index")
    assert [path.name for path in paths] == ["0-0_ema.npz", "1-0_ema.npz"]


def test_names_of_files():
    """100 characters, fewer where they take many bytes; nothing that a file system refuses, and never nothing."""
    assert generate.file_name("a/b: what?\n") == "a_b_ what_"
    assert generate.file_name("x" * 300) == "x" * 100
    assert generate.file_name("静" * 100) == "静" * 66
    assert generate.file_name("..") == "video"


def test_a_second_run_makes_only_what_is_missing(student, wan, tmp_path, monkeypatch, capsys):
    """Finished videos stay untouched and no network is loaded for them; other settings in one folder are refused."""
    paths = run(tmp_path, student, wan, "--prompts", *PROMPTS)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
    with monkeypatch.context() as patched:
        patched.setattr(generate, "load_transformer", None)
        patched.setattr(generate, "load_vae", None)
        assert run(tmp_path, student, wan, "--prompts", *PROMPTS) == paths
    assert "0 videos made, 2 were there already" in capsys.readouterr().out
    paths[1].unlink()
    run(tmp_path, student, wan, "--prompts", *PROMPTS)
    assert paths[0].stat().st_mtime_ns == before[paths[0]][1] and paths[1].read_bytes() == before[paths[1]][0]
    with pytest.raises(ValueError, match=r"a cat.*-0.json records seed 0, not 1: choose another --output_folder"):
        run(tmp_path, student, wan, "--prompts", *PROMPTS, "--seed", 1)
    other = tmp_path / student.name
    save_transformer(build(seed=3), other)
    with pytest.raises(ValueError, match="records weights"):
        run(tmp_path, other, wan, "--prompts", *PROMPTS)


def test_several_processes_share_the_prompts(student, wan, tmp_path, monkeypatch):
    """Two ranks of torchrun make each video once, byte by byte as one process does, and need no process group."""
    arguments = ["--prompts", *PROMPTS, "snow", "--num_samples", "2"]
    alone = run(tmp_path / "alone", student, wan, *arguments, format=("mp4",))
    shared = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        shared += run(tmp_path / "shared", student, wan, *arguments, format=("mp4",))
    assert [path.name for path in shared] == [alone[i].name for i in (0, 1, 4, 5, 2, 3)]
    assert names(tmp_path / "shared") == names(tmp_path / "alone")
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "shared" / path.name).read_bytes() == path.read_bytes()
    assert not torch.distributed.is_initialized()


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    """Without a number, a device is the one that torchrun counts, for whoever asks; a number is obeyed, but not by
    several processes that train together. The GPUs are stand-ins."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda shape, device: SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for name, number in {"auto": 3, "cuda": 3, "cuda:1": 1}.items():
        assert generate.pick_device(name) == parallelize.join(name) == chosen.pop() == torch.device("cuda", number)
    assert generate.pick_device("cpu") == parallelize.join("cpu") == torch.device("cpu") and not chosen
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parallelize.join("cuda") == torch.device("cuda:3")
    with pytest.raises(ValueError, match="training.device=cuda:1 is one for all processes: leave the number away"):
        parallelize.join("cuda:1")


def write_sharded(folder, networks, config):
    """A training checkpoint of many processes with these networks; the tensors of an optimizer besides."""
    state = {name: network and network.state_dict() for name, network in networks.items()}
    record = {"model": asdict(config), "training": {"stage": "self_forcing", "num_frames_per_block": 3}}
    state |= {"optimizer_state_dict": [{"state": {0: {"exp_avg": torch.ones(4)}}}], "config": record}
    tensors = {}
    rest = sharded_checkpoint.take_apart(state, tensors)
    dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True), no_dist=True)
    (folder / STATE).write_text(json.dumps(rest))
    return folder


def test_of_a_training_checkpoint_is_read_what_is_needed(wan, tmp_path, monkeypatch):
    """The average alone, once, in a whole command; the raw weights where they are asked for, or where there is no
    average; for its sizes nothing. The video is that of the same weights in a file."""
    average, raw = build(seed=2), build(seed=1)
    networks = {"generator_state_dict": raw, "critic_state_dict": build(seed=3), "ema_state_dict": average}
    folder = write_sharded(tmp_path / "checkpoint_final", networks, CONFIGS["t2v"])
    young = write_sharded(tmp_path / "young", networks | {"ema_state_dict": None}, CONFIGS["t2v"])
    load, reads = dcp.load, []
    monkeypatch.setattr(
        dcp, "load", lambda x, **options: reads.append({name.split("/")[0] for name in x}) or load(x, **options)
    )
    (path,) = run(tmp_path / "sharded", folder, wan, "--prompts", PROMPTS[0])
    assert reads == [{"ema_state_dict"}]
    save_transformer(average, tmp_path / "same.safetensors")
    (other,) = run(tmp_path / "file", tmp_path / "same.safetensors", wan, "--prompts", PROMPTS[0])
    assert np.array_equal(pixels(path), pixels(other))
    assert stored_config(folder) == CONFIGS["t2v"] and len(reads) == 1
    for place, weights in ((folder, "raw"), (young, "ema")):
        assert torch.equal(load_transformer(place, weights=weights).head.modulation, raw.head.modulation)
    assert reads[1:] == [{"generator_state_dict"}] * 2


# ---------------------------------------------------------------------------------------------------- low memory


def test_low_memory_changes_no_output(wan_i2v, tmp_path, monkeypatch):
    """Byte for byte, with text encoder, VAE, image encoder and guided steps."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--prompts", PROMPTS[0], "--image", picture(tmp_path, "red.png"), "--num_steps", "2"]
    ways = ("", "--low_memory", "--offload_layers", "--prompt_cache prompts --text_device cpu")
    paths = [run(f"out{i}", wan_i2v, wan_i2v, *arguments, *way.split())[0] for i, way in enumerate(ways)]
    assert len({path.read_bytes() for path in paths}) == 1 and any(Path("prompts").rglob("*.safetensors"))


def test_where_networks_live(student, wan, monkeypatch):
    """On the device, here meta; VAE and layers on the CPU as far as the options say so. The kernel is as chosen."""
    monkeypatch.setattr(generate, "pick_device", lambda name, option: torch.device(name))
    monkeypatch.setattr(generate, "load_vae", lambda path, device: nn.Linear(1, 1, device=device))
    own = ["--checkpoint", student, "--model_path", wan, "--config", wan / "config.json", "--attention", "exact"]
    places = {}
    for way in ("", "--low_memory", "--offload_layers"):
        args = generate.parse_arguments([str(argument) for argument in (*own, "--device", "meta", *way.split())])
        models = generate.pick_models(args)
        assert models.transformer.attention is exact_attention
        networks = models.decoder, models.transformer.blocks, models.transformer.head
        places[way] = [next(network.parameters()).device.type for network in networks]
    assert places[""] == ["meta", "meta", "meta"]
    assert places["--low_memory"] == ["cpu", "meta", "meta"]
    assert places["--offload_layers"] == ["cpu", "cpu", "meta"]


def test_the_text_encoder_is_gone_before_the_transformer_comes(student, wan, tmp_path, monkeypatch):
    """No UMT5 is alive in the process when the transformer is loaded, however many batches there are."""
    from transformers import UMT5EncoderModel

    load = generate.load_transformer

    def num_alive():
        return sum(type(x) is UMT5EncoderModel for x in gc.get_objects())

    def watched(*inputs, **options):
        alive.append(num_alive())
        return load(*inputs, **options)

    gc.collect()
    alive = [num_alive()]  # other tests'
    monkeypatch.setattr(generate, "load_transformer", watched)
    run(tmp_path, student, wan, "--prompts", *PROMPTS)
    assert alive == alive[:1] * 2


def test_prompts_are_encoded_once_and_outlive_the_network(wan):
    """What a text encoder said, padded to the longest of a batch and on the model's device, without a second call."""
    encoder = TextEncoder(wan, dtype=torch.float32, negative_prompt="grey")
    expected = encoder([*PROMPTS, "grey"])["prompt_embeds"]
    known = KnownPrompts(encoder, torch.float64)
    known.learn([*PROMPTS, "grey", PROMPTS[0]])
    known.free()
    assert "model" not in vars(encoder) and len(known.known) == 3
    embeds = known(PROMPTS[::-1])["prompt_embeds"]
    length = embeds.shape[1]
    assert embeds.dtype == torch.float64 and torch.equal(embeds.float(), expected[[1, 0], :length])
    assert not expected[:2, length:].any() and expected[:2, length - 1].any()
    assert torch.equal(known.null(2)["prompt_embeds"][1].float(), expected[2, : known.known["grey"].shape[0]])
    assert "model" not in vars(encoder)


# A stand-in for the device. Without a GPU all tensors are on one device, and a network that was never moved would go
# unnoticed. `Tensor.to` moves to a dtype just as well: what waits in float64 and computes in float32 must have been
# moved, for the two do not mix any more than two devices do, and float32 survives the way there and back bit for bit.
DEVICE, HOME = torch.float32, torch.float64


def test_layers_visit_the_device_one_at_a_time():
    """Equal latents, bit for bit; a layer's parameters come for its call, alone, and wait at home otherwise."""
    expected = latents(build(), FEW)
    model = offload_layers(build(dtype=HOME), DEVICE)
    assert torch.equal(latents(model, FEW), expected)
    layers = {name.startswith("blocks."): p.dtype for name, p in model.named_parameters()}
    assert layers == {True: HOME, False: DEVICE}
    with pytest.raises(RuntimeError, match="dtype"):
        model.blocks[0].layer(*layer_inputs(model))
    attend, counts = model.attention, [count_visitors(model)]

    def counting(*inputs, **options):
        counts.append(count_visitors(model))
        return attend(*inputs, **options)

    model.attention = counting
    model(torch.zeros(1, 1, *LATENT), 0.5, cond_for(model))
    assert counts[1:] == [counts[0] + 1] * 4  # self- and cross-attention of two layers


def count_visitors(model):
    """Weights on the device that look like one of a layer's; those of other tests are among them."""
    shape, kinds = model.blocks[0].layer.ffn[0].weight.shape, (torch.Tensor, nn.Parameter)
    return sum(type(x) in kinds and x.dtype == DEVICE and x.shape == shape for x in gc.get_objects())


def layer_inputs(model):
    x = torch.zeros(1, 1, 6, 24)
    return x, torch.zeros(1, 1, 6, 24), x[0], None, torch.ones(6, 6, dtype=torch.complex64), model.attention


def test_the_decoder_visits_the_device_for_each_block(wan):
    """Equal pixels, bit for bit; between the calls network and memory are at home, after a failed one as well."""
    blocks = randn((1, 4, *LATENT), generator(0)).split(2, dim=1)
    expected = [stream(block) for stream in [load_vae(wan).stream()] for block in blocks]
    vae = load_vae(wan).to(HOME)
    stream = VisitingStream(vae, DEVICE, HOME)
    for block, pixels in zip(blocks, expected, strict=True):
        assert torch.equal(stream(block), pixels)
        held = [x.dtype for x in stream.stream.memory if isinstance(x, torch.Tensor)]
        assert {p.dtype for p in vae.parameters()} == {*held} == {HOME} and len(held) > 20
    with pytest.raises(RuntimeError):
        stream(blocks[0][..., :1, :1, :1])
    assert {p.dtype for p in vae.parameters()} == {HOME}
    assert moved({"x": [torch.ones(1), "Rep", None]}, HOME) == {"x": [torch.ones(1, dtype=HOME), "Rep", None]}


def test_what_a_stream_remembers_is_larger_than_the_vae():
    """3.8 GB against 0.5 at 480 x 832, as memory.py says: counted on the meta device with the released sizes."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        vae = WanVAE(AutoencoderKLWan())
        stream = vae.stream()
        stream(torch.zeros(1, 2, 16, 60, 104))
    memory = sum(4 * x.numel() for x in stream.memory if isinstance(x, torch.Tensor))
    assert round(memory / 1e9, 1) == 3.8 and round(4 * sum(p.numel() for p in vae.parameters()) / 1e9, 1) == 0.5


# ---------------------------------------------------------------------------------------------------------- speed


@pytest.mark.parametrize("kind", CONFIGS)
def test_prompts_are_read_once(kind, wan, wan_i2v, monkeypatch):
    """Keys and values of prompt, negative prompt and image are computed in the first call alone, for equal latents, bit
    for bit; another prompt is not taken for the one before."""
    folder, plain, lengths, linear = wan_i2v if kind == "i2v" else wan, build(kind), [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: lengths.append(x.shape[1]) or linear(self, x))
    model = Models(folder, folder).transformer
    for seed in range(3):
        cond = cond_for(plain, seed=seed)
        uncond = cond | {"prompt_embeds": cond_for(plain, seed=9)["prompt_embeds"]}
        expected = latents(generate.Guided(plain, uncond, 3.0), FEW, cond=cond)
        lengths.clear()
        assert torch.equal(latents(generate.Guided(model, uncond, 3.0), FEW, cond=cond), expected)
        each = 2 + 2 * 2  # two maps into the model, keys and values of two layers
        assert lengths.count(512) == 2 * each and lengths.count(257) == (each if kind == "i2v" else 0)


@pytest.mark.parametrize("window", [{}, {"sink_frames": 3, "window_frames": 3}], ids=["all", "window"])
def test_compiled_layers_are_compiled_three_times(student, wan, monkeypatch, window):
    """For all layers together: without a past, with one, with a longer one; then never again, whatever the block."""
    torch._dynamo.reset()
    counter, counts, sampling = CompileCounter(), [], Sampling(RolloutConfig((1000, 500), 3, **window))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    options = {"config": wan / "config.json", "compile": True}
    model, cond = Models(student, wan, **options).transformer, cond_for(build())
    blocks = []
    for block in stream_latents(model, sampling, cond, [(0, "x", 0)], 15, LATENT):
        blocks.append(block)
        counts.append(counter.frame_count)
    assert counts == [1, 2, 3, 3, 3]
    expected = latents(build(seed=2), sampling, 15, cond)
    torch.testing.assert_close(torch.cat(blocks, dim=1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("guidance_scale, many_step", [(1.0, False), (3.0, True)])
def test_nothing_waits_for_the_device(guidance_scale, many_step):
    """A whole stream without data: on the meta device, a number that is read back, or asked whether it is true, is an
    error, as a planted one shows. Cache, window, sink and continuation included."""
    model = build().to("meta")
    cond, uncond, past = (
        {"prompt_embeds": torch.zeros(1, 5, 4096, device="meta")},
        {"prompt_embeds": torch.zeros(1, 7, 4096, device="meta")},
        torch.zeros(1, 3, *LATENT, device="meta"),
    )
    model.attention = generate.fastest_attention
    guided = generate.Guided(model, uncond, guidance_scale) if guidance_scale != 1 else model
    rollout = RolloutConfig(grid(4), sink_frames=1, window_frames=3)
    sampling = Sampling(rollout, guidance_scale=guidance_scale, many_step=many_step)
    video = latents(guided, sampling, 12, cond, past=past, device="meta")
    assert video.device.type == "meta" and video.shape[1] == 12
    model.attention = lambda q, k, v, **options: v[:, : q.shape[1]] if q.sum() > 0 else q
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        latents(guided, sampling, 12, cond, past=past, device="meta")


def test_weights_in_eight_bits(student, wan, tmp_path):
    """A byte for each weight of the layers' maps, close pixels, also with layers that visit the device; the record of a
    video says it."""
    ways = ("", "--quantise float8-weights", "--quantise float8-weights --offload_layers")
    paths = [run(tmp_path / str(i), student, wan, "--prompts", *PROMPTS, *way.split()) for i, way in enumerate(ways)]
    for exact, eight, visiting in zip(*paths, strict=True):
        assert 0 < abs(pixels(exact).astype(int) - pixels(eight)).mean() < 3
        assert eight.read_bytes() == visiting.read_bytes()
    with pytest.raises(ValueError, match="records quantise float8-weights, not None"):
        run(tmp_path / "1", student, wan, "--prompts", PROMPTS[0])
    model = Models(student, wan, config=wan / "config.json", dtype="bfloat16", quantise="float8-weights").transformer
    weight = model.blocks[0].ffn[0].weight
    parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]  # numbers, and a scale for each row
    assert sum(part.nbytes for part in parts) == weight.numel() + 4 * len(weight)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 0.05), (torch.bfloat16, 0.05)])
def test_products_in_eight_bits(monkeypatch, dtype, error):
    """Close to the model's own flow. The CPU's product stands in for a GPU's, whose absence torchao must not see."""
    from torchao.quantization import quant_api

    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularities: None)
    config = replace(CONFIGS["t2v"], dim=32, ffn_dim=64)  # multiples of 16: others stay as they are
    torch.manual_seed(0)
    model = TinyCausalWanModel(config).requires_grad_(False).to(dtype)
    model.head.head.weight.normal_(0, 0.1)
    x, cond = randn((1, 3, *LATENT), generator(0)), cond_for(model)
    exact, product, calls = model(x, 0.5, cond).float(), torch._scaled_mm, []
    monkeypatch.setattr(torch, "_scaled_mm", lambda *inputs, **options: calls.append(1) or product(*inputs, **options))
    found = quantise(model, "float8")(x, 0.5, cond).float()
    assert 0 < (found - exact).norm() < error * exact.norm() and len(calls) == 2 * 10


# ------------------------------------------------------------------------------------------------------ mistakes

MISTAKES = {
    "": "Say what to show, with one of --prompts .* and --data_path PATH.",
    "--prompts cat --data_path prompts.txt": "Say what to show, with one of .*",
    "--data_path nowhere.txt": "There are no prompts at nowhere.txt: give a text file, one prompt per line, or .*",
    "--data_path empty.txt": "empty.txt holds no prompt: give .*",
    "--data_path two.txt --extended_prompt_path one.txt": "one.txt holds 1 prompts for 2: give one each, in order.",
    "--prompts cat --i2v": "--i2v needs images: add --data_path with a folder of image-text pairs, or --image FILE.",
    "--i2v --data_path one.txt": "one.txt holds no image-text pairs: give a folder of name.jpg and name.txt each, .*",
    "--i2v --data_path pairs": "There is no prompt for pairs/a.png: write it to pairs/a.txt.",
    "--prompts cat --image nowhere.png": "There is no image nowhere.png: check --image.",
    "--prompts cat --video nowhere.mp4": "There is no video nowhere.mp4: check --video.",
    "--prompts cat --video one.txt": "one.txt cannot be read as a video: give --video a file that ffmpeg can read.",
    "--prompts cat --video short.mp4": "The given video has 8 frames at 16 a second, less than a block: .* least 9.",
    "--prompts cat --image pairs/a.png --video short.mp4": "A video continues a video or begins with an image: use .*",
    "--prompts cat --image pairs/a.png --bidirectional": "This makes all frames at once, .*: use --no-bidirectional.",
    "--prompts cat --bidirectional --frames_per_block 3": "This makes all frames at once, .*: use --no-bidirectional.",
    "--prompts cat --num_output_frames 4": r"4 frames are not a whole number of blocks .* use 3 or 6 frames.",
    "--prompts cat --image pairs/a.png --num_output_frames 4": r"4 frames are not a whole .*; use 3 or 6 frames.",
    "--prompts cat --height 40": "--height must be a multiple of 16, got 40: use 32 or 48.",
    "--prompts cat --denoising_steps 250 1000": "denoising_steps must fall strictly from 1000.*",
    "--prompts cat --num_steps 9": "num_steps are those of many-step sampling: use --mode many-step, or .*",
    "--prompts cat --shift 0": "shift must be positive, got 0.*",
    "--prompts cat --window_frames -1": "sink_frames and window_frames count frames: 0 or more .*",
    "--prompts cat --checkpoint nowhere.pt": "There is no nowhere.pt: download Self-Forcing's with `hf download .*",
    "--prompts cat --model_path pairs": "pairs holds neither .*: download the VAE with `hf download .*",
    "--prompts cat --tiny_decoder taew2_1.pth": "There is no taew2_1.pth: download it with `curl .*",
    "--prompts cat --quantise float8": "cpu does not multiply in float8, .*: use --quantise float8-weights.",
    "--prompts cat --device cuda:99": "--device cuda:99 is not to be had on this machine; use .*cpu.",
    "--prompts a/b a?b": "Several videos would be out/a_b-0.npz: use --save_with_index.",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the files that the mistakes name, as the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, lines in {"empty": 0, "one": 1, "two": 2}.items():
        Path(f"{name}.txt").write_text("\n".join(PROMPTS[:lines]))
    Path("pairs").mkdir()
    picture(Path("pairs"), "a.png")
    imageio.imwrite("short.mp4", np.zeros((8, HEIGHT, WIDTH, 3), np.uint8), fps=16, macro_block_size=1)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence(mistake, student, wan, here):
    """What is wrong and what would be right, before anything is made."""
    with pytest.raises(ValueError) as error:
        run("out", student, wan, *mistake.split())
    assert re.fullmatch(MISTAKES[mistake], str(error.value)), str(error.value)
    assert not Path("out").exists()


def test_an_image_to_video_model_asks_for_its_image(wan_i2v, tmp_path):
    """On the command line and from the iterator."""
    with pytest.raises(ValueError, match="image-to-video model: give it images, with --image FILE"):
        run(tmp_path, wan_i2v, wan_i2v, "--prompts", PROMPTS[0])
    models = Models(wan_i2v, wan_i2v)
    with pytest.raises(ValueError, match="image-to-video model"):
        next(stream_video(models, PROMPTS[:1], FEW, num_frames=3, **SHAPE))


def test_exit_status_two(here, monkeypatch, capsys):
    """As a user sees a mistake: one line, no traceback. Counts and choices are argparse's, with the same status."""
    import runpy

    for arguments in (["--prompts", "cat"], ["--num_samples", "0"], ["--mode", "quick"]):
        monkeypatch.setattr(sys, "argv", ["generate", *arguments])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(REPOSITORY / "full_scale" / "generate.py"), run_name="__main__")
        assert stop.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.fullmatch(
            "full_scale.generate: There is no wan_models.*`hf download.*`.|.*--num_samples: must be at least 1, got 0.|"
            ".*--mode: invalid choice: 'quick'.*",
            error,
        ), error


def test_the_default_folders_are_where_the_downloads_go():
    """--checkpoint and --model_path begin with the folders of full_scale.pretrained's commands."""
    assert DOWNLOADS["self-forcing"].command.endswith(f"--local-dir {generate.STUDENT.parents[1]}")
    assert f" {generate.STUDENT.relative_to(generate.STUDENT.parents[1])} " in DOWNLOADS["self-forcing"].command
    for kind, name in {"t2v": "t2v-1.3b", "i2v": "i2v-14b"}.items():
        assert DOWNLOADS[name].command.endswith(f"--local-dir {generate.WAN[kind]}")


# ------------------------------------------------------------------------------------------------ attention maps


@pytest.mark.parametrize("step", ["first", "context"])
def test_attention_of_wan_is_that_of_the_video(wan, tmp_path, monkeypatch, capsys, step):
    """The latents are those of full_scale.generate, every frame is looked at, the future exactly 0."""
    checkpoint = tmp_path / "student.safetensors"
    save_transformer(build(seed=2), checkpoint)
    seen = []
    monkeypatch.setattr(
        attention_capture, "stream_latents", lambda *a, **o: (seen.append(x) or x for x in stream_latents(*a, **o))
    )
    command = [
        "--checkpoint",
        checkpoint,
        "--model_path",
        wan,
        "--layer_index",
        1,
        "--output_path",
        tmp_path / "maps.pt",
    ]
    command += ["--prompts", PROMPTS[0], "--num_frames", 6, "--step", step, *SIZE]
    attention_maps.main([str(word) for word in command])
    record = torch.load(tmp_path / "maps.pt", weights_only=True)
    full, last = record["full_frame_attention"], record["last_block_frame_attention"]
    assert full.shape == (2, 6, 6) and record["block_sizes"] == [3, 3] and record["t"] == (step == "first")
    torch.testing.assert_close(full.sum(-1), torch.ones(2, 6))
    assert (full[:, :3, 3:] == 0).all() and (full[:, 3:] > 0).all()
    assert torch.equal(last, full[:, 3:].mean(1))
    models = Models(checkpoint, wan)
    latents = torch.cat(list(stream_latents(
        models.transformer, choose_sampling(models, 6), models.text(PROMPTS[:1]), sample_keys(PROMPTS[:1], 0), 6,
        seen[0].shape[2:],
    )), dim=1)  # fmt: skip
    assert torch.equal(torch.cat(seen, dim=1), latents)


def test_attention_is_captured_where_and_how_full_scale_generate_works(student, wan, monkeypatch):
    """--config, --device and --dtype are its options, the released student its default; UMT5 has left by then."""
    monkeypatch.setattr(generate, "STUDENT", student)
    chosen, loaded = [], []
    load, capture = generate.load_transformer, attention_capture.capture_wan

    def watched(path, **options):
        loaded.append((path, "model" in vars(chosen[0].text.encoder)))
        return load(path, **options)

    monkeypatch.setattr(generate, "load_transformer", watched)
    monkeypatch.setattr(
        attention_capture, "capture_wan", lambda models, *a, **o: chosen.append(models) or capture(models, *a, **o)
    )
    monkeypatch.setattr(attention_maps, "save_layer", lambda *_, **about: chosen.append(about))
    command = ["--model_path", wan, "--config", wan / "config.json", "--dtype", "bfloat16", "--num_frames", 3, *SIZE]
    attention_maps.main([str(word) for word in (*command, "--device", "cpu")])
    models, about = chosen
    assert (models.device.type, models.dtype, models.sizes) == ("cpu", "bfloat16", CONFIGS["t2v"])
    assert loaded == [(student, False)] and about["checkpoint"] == str(student)
    with pytest.raises(ValueError, match="--device cuda:99 is not to be had"):
        attention_maps.main([str(word) for word in (*command, "--device", "cuda:99")])


def test_attention_of_whole_clips_has_no_context(wan, wan_i2v):
    with pytest.raises(ValueError, match="keeps no context: use --step first"):
        attention_capture.capture_wan(Models(wan, wan), PROMPTS[:1], num_frames=3, height=32, width=48, step="context")
    with pytest.raises(ValueError, match="image-to-video models is not captured"):
        attention_capture.capture_wan(Models(wan_i2v, wan_i2v), PROMPTS[:1], num_frames=3, height=32, width=48)
