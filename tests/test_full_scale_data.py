"""What full scale trains on: read from every form, made by the builders, the same for any number of processes."""

import json
import runpy
import sys
from functools import partial

import imageio.v3 as imageio
import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from ranks import on_ranks
from safetensors.torch import save_file
from small_wan import write_clip as write_image_encoder
from small_wan import write_text_encoder, write_vae
from test_full_scale_images import picture
from test_full_scale_training import PROMPTS, SMALL, random_network, recipe
from tiny_runs import names

import train
from dynamic_video_sf import Guided, RolloutConfig, ode_regression_loss, ode_trajectory
from flow_match import FlowMatchScheduler
from full_scale import build_data, stored_clips
from full_scale import data as sources
from full_scale.convert import save_transformer
from full_scale.data import ImageConditions, ImagePrompts, Latents, OdePairs, Prompts, shuffled
from full_scale.images import image_conditioning, image_pixels, load_image_encoder
from full_scale.pixels import load_vae
from full_scale.stored_clips import Clip, Clips, write_clip
from full_scale.text import NEGATIVE_PROMPT, TextEncoder, clean
from full_scale.wan import load_transformer
from ode_pairs import grid
from randomness import generator, generators, rand, randn

SIZE = ["--height", "32", "--width", "48", "--num_frames", "9"]
SETTINGS = {"shift": 5.0, "keep": [1000.0, 500.0], "causal": True}


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """Wan's own folder: transformer, text encoder, VAE and CLIP."""
    folder = tmp_path_factory.mktemp("Wan2.1")
    save_transformer(random_network(SMALL, 0), folder, "official")
    write_text_encoder(folder, official=True, dim=64)
    write_vae(folder, official=True)
    write_image_encoder(folder, official=True, dim=160)
    return folder


def build(command, *arguments):
    build_data.main([command, *map(str, arguments)])


@pytest.fixture
def as_process(monkeypatch):
    """as_process(rank, count): what is built from now on is built by that process of a torchrun."""

    def become(rank, count):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(count))

    return become


def interrupted_at(monkeypatch, owner, name, call):
    """Press Ctrl-C when owner.name is called for that time, the first being 1. Returns its calls."""
    original, calls = getattr(owner, name), []

    def counted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)
    return calls


def random_clip(i, shape=(3, 2, 4, 6), image=False):
    """What float16 can hold exactly."""
    size = (8 * shape[-2], 8 * shape[-1], 3)
    pixels = (256 * rand(size, generator(i))).byte() if image else None
    return Clip(f"prompt {i}, 红", randn(shape, generator(0, i)).half(), pixels)


def folder_of(path, count=5, settings=SETTINGS, **options):
    clips = [random_clip(i, **options) for i in range(count)]
    for i, clip in enumerate(clips):
        write_clip(path / f"{i}.safetensors", clip, settings)
    return clips


def assert_clips(found, expected):
    assert [clip.prompt for clip in found] == [clip.prompt for clip in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.latents.dtype == other.latents.dtype and torch.equal(one.latents, other.latents)
        assert (one.image is None) == (other.image is None)
        assert one.image is None or torch.equal(one.image, other.image)


# ------------------------------------------------------------------------------------------------------------- storage

TRAJECTORY = (3, 3, 2, 4, 6)
FORMS = {
    "safetensors": ["--output_folder"],
    "npz": ["--format", "npz", "--output_folder"],
    "lmdb": ["--lmdb_path"],
    "lmdbs": ["--num_shards", "2", "--lmdb_path"],
}


@pytest.mark.parametrize("options", [{"shape": TRAJECTORY}, {"image": True}], ids=["trajectories", "clips and images"])
@pytest.mark.parametrize("form", FORMS)
def test_clips_come_back_from_every_form(tmp_path, form, options):
    """Folder -> that form -> folder: prompts, numbers, pictures and settings are what they were."""
    clips = folder_of(tmp_path / "clips", **options)
    build("lmdb", "--data_path", tmp_path / "clips", *FORMS[form], tmp_path / form)
    build("lmdb", "--data_path", tmp_path / form, "--output_folder", tmp_path / "back")
    order = [0, 2, 4, 1, 3] if form == "lmdbs" else range(5)
    for path in (form, "back"):
        assert Clips(tmp_path / path).settings == SETTINGS
        assert_clips(Clips(tmp_path / path), [clips[i] for i in order])


def test_float32_stays_float32(tmp_path):
    clip = Clip("p", randn((3, 2, 4, 6)))
    write_clip(tmp_path / "in" / "0.safetensors", clip, {}, torch.float32)
    for form in ("npz", "lmdb"):
        build("lmdb", "--dtype", "float32", "--data_path", tmp_path / "in", *FORMS[form], tmp_path / form)
        assert_clips(Clips(tmp_path / form), [clip])


def rows_of(path):
    """An LMDB read the way that Self-Forcing does."""
    with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin() as stored:
        shape = tuple(map(int, stored.get(b"latents_shape").decode().split()))
        for i in range(shape[0]):
            latents = np.frombuffer(stored.get(f"latents_{i}_data".encode()), dtype=np.float16).reshape(shape[1:])
            img = np.frombuffer(stored.get(f"img_{i}_data".encode()), dtype=np.uint8).reshape(32, 48, 3)
            yield stored.get(f"prompts_{i}_data".encode()).decode(), latents.copy(), img.copy()


def test_self_forcing_can_read_our_lmdb(tmp_path):
    clips = folder_of(tmp_path / "clips", image=True)
    build("lmdb", "--data_path", tmp_path / "clips", "--lmdb_path", tmp_path / "lmdb")
    found = [Clip(prompt, *map(torch.from_numpy, arrays)) for prompt, *arrays in rows_of(tmp_path / "lmdb")]
    assert_clips(found, clips)


def write_theirs(path, shape=b"2 3 2 4 6", dtype=np.float16, img_shape=b"2 3 2 4 6", rows=2, image=True):
    """An LMDB as the scripts of Self-Forcing and its descendants write it, wrong img_shape included."""
    path.mkdir(parents=True)
    clips = [random_clip(i, image=image) for i in range(2)]
    with lmdb.open(str(path), map_size=2**24) as env, env.begin(write=True) as stored:
        for i, clip in enumerate(clips[:rows]):
            stored.put(f"latents_{i}_data".encode(), clip.latents.numpy().astype(dtype).tobytes())
            stored.put(f"prompts_{i}_data".encode(), clip.prompt.encode())
            if image:
                stored.put(f"img_{i}_data".encode(), clip.image.numpy().tobytes())
        for name, value in (("latents", shape), ("img", img_shape)):
            if value:
                stored.put(f"{name}_shape".encode(), value)
    return clips


def test_lmdbs_of_others_are_read(tmp_path):
    """One, or a folder of shards; in float16 and float32."""
    clips = write_theirs(tmp_path / "one")
    assert_clips(Clips(tmp_path / "one"), clips)
    write_theirs(tmp_path / "shards" / "shard_0"), write_theirs(tmp_path / "shards" / "shard_1")
    assert_clips(Clips(tmp_path / "shards"), clips * 2)
    write_theirs(tmp_path / "wide", dtype=np.float32)
    assert_clips(Clips(tmp_path / "wide"), [Clip(clip.prompt, clip.latents.float(), clip.image) for clip in clips])


FAULTS = {
    "no latents_shape, its making was cut short: run that command again": {"shape": None},
    "its latents_shape is '2': write it anew, such as '2 21 16 60 104'": {"shape": b"2"},
    "holds 288 bytes where 3 x 2 x 4 x 7 numbers should be": {"shape": b"2 3 2 4 7", "image": False},
    "has no clip 1 of 2": {"rows": 1},
}


@pytest.mark.parametrize("sentence", FAULTS)
def test_a_damaged_lmdb_is_refused_in_one_sentence(tmp_path, sentence):
    """Among them what their script leaves when its last file brings nothing new: a count without a shape."""
    write_theirs(tmp_path / "lmdb", **FAULTS[sentence])
    with pytest.raises(ValueError, match=f"lmdb .*{sentence}"):
        list(Clips(tmp_path / "lmdb"))


def test_an_lmdb_that_is_none_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "data.mdb").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="cannot be read as an LMDB .*: make it anew"):
        Clips(tmp_path)


def test_the_small_worlds_pairs_and_others_pt_files_are_read(tmp_path):
    """Several clips in a shard, as ode_pairs.py writes them; a dict in each file, as the scripts of CausVid do."""
    clips = [random_clip(i, TRAJECTORY) for i in range(3)]
    stacked = torch.stack([clip.latents for clip in clips])
    header = json.dumps({"settings": SETTINGS, "prompts": [clip.prompt for clip in clips]})
    (tmp_path / "ours").mkdir(), (tmp_path / "theirs").mkdir()
    save_file({"trajectory": stacked}, tmp_path / "ours" / "pairs_00000.safetensors", {"header": header})
    for i, clip in enumerate(clips):
        torch.save({clip.prompt: clip.latents[None]}, tmp_path / "theirs" / f"{i:05d}.pt")
    assert_clips(Clips(tmp_path / "ours"), clips)
    assert_clips(Clips(tmp_path / "theirs"), clips)
    assert OdePairs(tmp_path / "ours").causal and not OdePairs(tmp_path / "theirs", steps=[1000, 500]).causal


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


def test_no_code_is_run(tmp_path, monkeypatch):
    """Pickles in .npz and .pt are refused, not executed."""
    monkeypatch.chdir(tmp_path)
    np.savez("clips.npz", prompts=np.array([Bomb()], dtype=object))
    torch.save({"prompt": Bomb()}, "clips.pt")
    for name, sentence in {"clips.npz": "none pickled", "clips.pt": "whose code is never run here"}.items():
        with pytest.raises(ValueError, match=f"{name} cannot be read .*{sentence}"):
            Clips(name)
    assert names(tmp_path) == {"clips.npz", "clips.pt"}


def test_an_interrupted_lmdb_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """And is not taken for a whole one meanwhile; a whole one is not written again, nor one of something else."""
    clips = folder_of(tmp_path / "clips", shape=TRAJECTORY)
    command = ["lmdb", "--data_path", tmp_path / "clips", "--lmdb_path", tmp_path / "lmdb"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, stored_clips, "put_clip", 4)
        build(*command)
    with pytest.raises(ValueError, match="cut short: run that command again"):
        Clips(tmp_path / "lmdb")
    puts = interrupted_at(monkeypatch, stored_clips, "put_clip", None)
    build(*command), build(*command)
    assert [arguments[1] for arguments in puts] == [3, 4]
    assert_clips(Clips(tmp_path / "lmdb"), clips)
    with pytest.raises(ValueError, match=r"differ in dtype, torch.float16 and torch.float32: choose another path"):
        build(*command, "--dtype", "float32")
    write_theirs(tmp_path / "theirs")
    with pytest.raises(ValueError, match="is an LMDB that another program made"):
        build("lmdb", "--data_path", tmp_path / "clips", "--lmdb_path", tmp_path / "theirs")


@pytest.mark.parametrize("other", ["prompts", "numbers"])
def test_an_lmdb_is_not_gone_on_with_from_other_clips(tmp_path, monkeypatch, other):
    """As many others, made with the same settings; the same clips out of an LMDB are the same."""
    clips = folder_of(tmp_path / "clips")
    for i, clip in enumerate(clips):
        prompt = f"other {i}" if other == "prompts" else clip.prompt
        write_clip(tmp_path / "others" / f"{i}.npz", Clip(prompt, clip.latents + (other == "numbers")), SETTINGS)
    build("lmdb", "--data_path", tmp_path / "clips", "--lmdb_path", tmp_path / "whole")
    command = ["lmdb", "--lmdb_path", tmp_path / "lmdb", "--data_path"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, stored_clips, "put_clip", 4)
        build(*command, tmp_path / "clips")
    with pytest.raises(ValueError, match="lmdb and this command differ in contents, .*: choose another path"):
        build(*command, tmp_path / "others")
    build(*command, tmp_path / "whole")
    assert_clips(Clips(tmp_path / "lmdb"), clips)


def test_processes_share_out_lmdbs_and_files(tmp_path, as_process):
    """Every process writes its own, and none of the others'."""
    clips = folder_of(tmp_path / "clips")
    expected = [{"shard_0", "shard_2"}, {"shard_0", "shard_1", "shard_2"}]
    for rank in range(2):
        as_process(rank, 2)
        build("lmdb", "--data_path", tmp_path / "clips", "--num_shards", 3, "--lmdb_path", tmp_path / "lmdbs")
        build("lmdb", "--data_path", tmp_path / "clips", "--output_folder", tmp_path / "files")
        assert names(tmp_path / "lmdbs") == expected[rank]
        assert len(names(tmp_path / "files")) == [3, 5][rank]
    assert_clips(Clips(tmp_path / "files"), clips)
    assert {clip.prompt for clip in Clips(tmp_path / "lmdbs")} == {clip.prompt for clip in clips}


# ------------------------------------------------------------------------------------------------- sources of training


def test_every_source_goes_round_and_round_alike(tmp_path):
    """As Prompts does: a sample is an item, whoever asks and for whatever else."""
    folder_of(tmp_path / "pairs", shape=TRAJECTORY, image=True)
    clips = Clips(tmp_path / "pairs")
    (tmp_path / "prompts.txt").write_text("\n".join(clip.prompt for clip in clips))
    prompts = Prompts(tmp_path / "prompts.txt", seed=3)
    pairs, latents = OdePairs(tmp_path / "pairs", seed=3), Latents(tmp_path / "pairs", (2, 4, 6), 3)
    images = ImagePrompts(tmp_path / "pairs", lambda image, *shape: {"seen": torch.tensor([[image.width]])}, seed=3)
    for source in (pairs, latents, images):
        assert source.batch(range(13))["prompts"] == prompts.batch(range(13))["prompts"]
        assert source.batch([7])["prompts"] == [clips[shuffled(7, 5, 3)].prompt]
    batch, clip = pairs.batch([7, 8]), clips[shuffled(7, 5, 3)]
    assert torch.equal(batch["trajectory"][0], clip.latents.float()) and batch["trajectory"].shape == (2, *TRAJECTORY)
    assert torch.equal(batch["video"], batch["trajectory"][:, -1]) and batch["steps"] == [1000, 500] and batch["causal"]
    assert torch.equal(latents.batch([7, 8])["video"], batch["video"])
    assert images.batch([7, 8])["cond"]["seen"].tolist() == [[48], [48]]
    assert pairs.frame_shape == latents.frame_shape == (2, 4, 6)


def test_clips_that_do_not_fit_are_refused_in_one_sentence(tmp_path):
    folder_of(tmp_path / "clips", settings={}, shape=(3, 2, 4, 6))
    write_clip(tmp_path / "clips" / "short.safetensors", random_clip(9, (2, 2, 4, 6)), {})
    folder_of(tmp_path / "pairs", shape=TRAJECTORY)
    folder_of(tmp_path / "mixed", count=1), write_clip(tmp_path / "mixed" / "a.npz", random_clip(1), {"shift": 8.0})
    (tmp_path / "empty").mkdir()
    mistakes = {
        "holds clips of 2 and 3 frames: set data.num_frames": lambda path: Latents(path / "clips").batch(range(6)),
        r"latents of \[2, 4, 6\], this run expects \[16, 4, 4\]": lambda path: Latents(path / "clips", (16, 4, 4)),
        "holds videos, which is not one for each": lambda path: OdePairs(path / "clips", steps=[1000]),
        "made with shift 5.0, this run has 8.0: set scheduler.shift": lambda path: OdePairs(path / "pairs", shift=8.0),
        r"made with steps .*, this run has \[1000\]: set train": lambda path: OdePairs(path / "pairs", steps=[1000]),
        "differ in causal, None and True: keep them in folders": lambda path: Clips(path / "mixed"),
        "There are no clips at .*empty": lambda path: Clips(path / "empty"),
        "There are no clips at .*nowhere": lambda path: Clips(path / "nowhere"),
        "The clip of 'prompt .*' has no picture": lambda path: ImagePrompts(path / "clips", None).batch([0]),
        "one of --lmdb_path and --output_folder": lambda path: build("lmdb", "--data_path", path / "clips"),
        "an LMDB holds one shape, keep them apart": lambda path: build(
            "lmdb", "--data_path", path / "clips", "--lmdb_path", path / "lmdb"
        ),
    }
    for sentence, mistake in mistakes.items():
        with pytest.raises(ValueError, match=sentence):
            mistake(tmp_path)
    assert Latents(tmp_path / "clips", num_frames=2).batch(range(6))["video"].shape == (6, 2, 2, 4, 6)
    assert OdePairs(tmp_path / "pairs", shift=5.0, steps=[1000, 500, 0]).steps == [1000, 500]


# -------------------------------------------------------------------------------------------------------------- images


def test_conditions_are_those_of_images_py(wan, tmp_path):
    """Of an image with other proportions, the middle part; computed once, then read, by networks that are not there."""
    vae, clip = load_vae(wan), load_image_encoder(wan)
    whole, wide = picture(64, 96), picture(64, 120, seed=1)
    conditions = ImageConditions(wan, cache=tmp_path)
    for image, part in ((whole, whole), (wide, wide.crop((12, 0, 108, 64)))):
        expected = image_conditioning([part], 3, vae, clip, height=32, width=48)
        seen = conditions(image, 3, 32, 48)
        assert seen.keys() == expected.keys()
        assert all(torch.equal(seen[name], x) for name, x in expected.items())
    again = ImageConditions(wan, cache=tmp_path)
    again.__dict__ |= {"vae": None, "clip": None}
    assert torch.equal(again(wide, 3, 32, 48)["image_latents"], expected["image_latents"])
    with pytest.raises(AttributeError):  # of another size it was never seen
        again(wide, 2, 32, 48)
    assert ImageConditions(wan)(wide, 2, 32, 48)["image_latents"].shape == (1, 2, 20, 4, 6)


def test_a_damaged_memory_of_an_image_is_made_anew(wan, tmp_path):
    conditions = ImageConditions(wan, cache=tmp_path)
    first = conditions(picture(), 2, 32, 48)
    (file,) = tmp_path.glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(conditions(picture(), 2, 32, 48)["clip_features"], first["clip_features"])
    assert names(file.parent) == {file.name} and file.stat().st_size > 100


def test_images_of_folders_and_lists(wan, tmp_path, as_process):
    """A folder of pairs, a list, CausVid's list: the same items; the builder fills what training reads."""
    inside = tmp_path / "26-15"
    inside.mkdir()
    for i in range(3):
        picture(seed=i).save(inside / f"{i}.png")
        (inside / f"{i}.txt").write_text(f"prompt\n {i}\n")
    lines = [{"image": f"26-15/{i}.png", "prompt": f"prompt {i}"} for i in range(3)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    theirs = [{"file_name": f"{i}.png", "caption": f"prompt {i}", "type": "animal"} for i in range(3)]
    (tmp_path / "target_crop_info_26-15.json").write_text(json.dumps(theirs))
    for rank in range(2):
        as_process(rank, 2)
        build("images", "--images", inside, "--cache", tmp_path / "cache", "--model_path", wan, *SIZE)
        assert len([*(tmp_path / "cache").glob("*/*")]) == [2, 3][rank]
    conditions = ImageConditions(wan, cache=tmp_path / "cache")
    conditions.__dict__ |= {"vae": None, "clip": None}
    read = partial(ImagePrompts, conditions=conditions, frame_shape=(16, 4, 6), num_frames=3)
    batches = [read(tmp_path / path).batch(range(4)) for path in ("26-15", "list.jsonl", "target_crop_info_26-15.json")]
    assert sorted(batches[0]["prompts"][:3]) == ["prompt 0", "prompt 1", "prompt 2"]
    assert all(batch["prompts"] == batches[0]["prompts"] for batch in batches)
    assert batches[0]["cond"]["image_latents"].shape == (4, 3, 20, 4, 6)
    assert batches[0]["cond"]["clip_features"].shape == (4, 257, 160)
    assert torch.equal(batches[0]["cond"]["image_latents"], batches[2]["cond"]["image_latents"])


def test_images_that_lack_something_are_refused_in_one_sentence(tmp_path):
    picture().save(tmp_path / "alone.JPG", format="jpeg")
    (tmp_path / "list.json").write_text('[{"image": "lost.png", "prompt": "p"}]')
    (tmp_path / "odd.jsonl").write_text('{"picture": "lost.png", "prompt": "p"}')
    for path, sentence in {
        "": "There is no prompt for .*alone.JPG: write it to .*alone.txt",
        "list.json": "list.json names lost.png, and there is none",
        "odd.jsonl": r'must be a list of \{"image": ..., "prompt": ...\}; found KeyError',
    }.items():
        with pytest.raises(ValueError, match=sentence):
            sources.read_image_prompts(tmp_path / path)


# ------------------------------------------------------------------------------------------------------------- prompts


def test_prompts_are_encoded_once_by_two_processes(wan, tmp_path, as_process, monkeypatch):
    """Then training finds them, and the negative one, without the network; nothing is encoded twice."""
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, PROMPTS[0]]))
    encoded = interrupted_at(monkeypatch, TextEncoder, "encode", None)
    command = ["prompts", "--prompts", tmp_path / "prompts.txt", "--cache", tmp_path / "cache", "--model_path", wan]
    for rank in (0, 1, 0):
        as_process(rank, 2)
        build(*command)
    assert len(encoded) == len(PROMPTS) + 1 == len([*(tmp_path / "cache").glob("*/*")])
    encoder = TextEncoder(wan, cache=tmp_path / "cache", device="cpu")
    encoder(PROMPTS), encoder.null(1)
    assert len(encoded) == len(PROMPTS) + 1


def test_the_prompts_of_a_run_alone_are_encoded(wan, tmp_path, monkeypatch):
    """--num_samples: the first of the row that training reads with that seed, and the negative one; no others."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    encoded = interrupted_at(monkeypatch, TextEncoder, "encode", None)
    paths = ["--prompts", tmp_path / "prompts.txt", "--cache", tmp_path / "cache", "--model_path", wan]
    build("prompts", *paths, "--num_samples", 2, "--seed", 5)
    run, other = ({*Prompts(tmp_path / "prompts.txt", seed=seed).batch(range(2))["prompts"]} for seed in (5, 0))
    assert run != other and {*PROMPTS[:2]} not in (run, other)
    assert {arguments[1] for arguments in encoded} == {clean(prompt) for prompt in (*run, NEGATIVE_PROMPT)}
    assert len(encoded) == 3


# ------------------------------------------------------------------------------------------------------------- latents


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three videos of 60 x 72 pixels, one of them at 32 frames a second, with a prompt each."""
    folder = tmp_path_factory.mktemp("videos")
    for i, fps in enumerate((16, 16, 32)):
        still = np.asarray(picture(60, 72, seed=i))
        frames = np.stack([np.roll(still, 3 * frame, axis=1) for frame in range(12 * fps // 16)])
        imageio.imwrite(folder / f"{i}.mp4", frames, plugin="FFMPEG", fps=fps, macro_block_size=1)
        (folder / f"{i}.txt").write_text(f"video {i}")
    return folder


def latents_command(wan, videos, out):
    return ["latents", "--videos", videos, "--prompts", videos, "--model_path", wan, "--output_folder", out, *SIZE]


def test_latents_equal_a_direct_encode(wan, videos, tmp_path, as_process):
    """Of the whole clip at once, cut and resized by hand; two processes make them all, each its own."""
    made = []
    for rank in (0, 1):
        as_process(rank, 2)
        build(*latents_command(wan, videos, tmp_path), "--first_frames")
        made.append(names(tmp_path))
    assert made == [{"0.safetensors", "2.safetensors"}, {f"{i}.safetensors" for i in range(3)}]
    vae = load_vae(wan)
    for i, clip in enumerate(Clips(tmp_path)):
        frames = [*imageio.imiter(videos / f"{i}.mp4", plugin="FFMPEG", fps=16)][:9]
        whole = image_pixels([Image.fromarray(frame).crop((0, 6, 72, 54)) for frame in frames], 32, 48)
        torch.testing.assert_close(clip.latents, vae.encode(whole[None])[0].half(), atol=2e-3, rtol=2e-3)
        assert clip.latents.shape == (3, 16, 4, 6) and clip.prompt == f"video {i}"
        assert torch.equal(clip.image, ((whole[0] + 1) * 127.5).round().byte().permute(1, 2, 0))
    assert ImagePrompts(tmp_path, lambda image, *shape: {"size": torch.tensor([image.size])}).batch([0])["cond"]


def test_interrupted_latents_go_on(wan, videos, tmp_path, monkeypatch):
    """What is there is not encoded again, nothing half written stays, other settings need another folder."""
    command = latents_command(wan, videos, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, build_data, "encode_video", 2)
        build(*command)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # the file is open
        interrupted_at(patch, stored_clips, "save_file", 1)
        build(*command)
    assert names(tmp_path) == {"0.safetensors"}
    encoded = interrupted_at(monkeypatch, build_data, "encode_video", None)
    build(*command), build(*command)
    assert [arguments[1].name for arguments in encoded] == ["1.mp4", "2.mp4"]
    with pytest.raises(ValueError, match="differ in fps, 16 and 8.0: choose another output folder"):
        build(*command, "--fps", 8)


def test_faulty_videos_do_not_keep_the_others_from_being_made(wan, videos, tmp_path):
    """They are named in the end, in one message."""
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes((videos / "0.mp4").read_bytes())
        (tmp_path / name).with_suffix(".txt").write_text("p")
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="^1 of 2 videos could not be made: .*a.mp4 cannot be read as a video"):
        build(*latents_command(wan, tmp_path, tmp_path / "out"))
    assert names(tmp_path / "out") == {"b.safetensors"}
    long = [*latents_command(wan, tmp_path, tmp_path / "long"), "--num_frames", 21]
    with pytest.raises(ValueError, match="b.mp4 has 12 frames at 16 a second: take it out, or lower --num_frames"):
        build(*long)
    mistakes = {
        "There are no videos in .*nowhere": ["--videos", tmp_path / "nowhere"],
        "There is no prompt for .*a.mp4: write it to .*out/a.txt": ["--prompts", tmp_path / "out"],
        "--num_frames must be 1 . 4 n, got 8: use 5 or 9": ["--num_frames", 8],
        "--height must be a multiple of 16, got 40: use 32 or 48": ["--height", 40],
    }
    for sentence, options in mistakes.items():
        with pytest.raises(ValueError, match=sentence):
            build(*latents_command(wan, tmp_path, tmp_path / "out"), *options)
    (tmp_path / "a.mov").write_bytes(b"")
    with pytest.raises(ValueError, match="a.mov and .*a.mp4 would share their prompt and their latents"):
        build(*latents_command(wan, tmp_path, tmp_path / "out"))


# ----------------------------------------------------------------------------------------------------------- ODE pairs


def pairs_command(wan, folder, *more):
    (folder / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    paths = ["--prompts", folder / "prompts.txt", "--cache", folder / "cache", "--model_path", wan]
    sampling = ["--output_folder", folder / "pairs", "--num_frames", 21, "--height", 32, "--width", 32]
    return ["ode_pairs", *paths, *sampling, "--num_steps", 8, "--num_pairs", 3, "--device", "cpu", *more]


@pytest.mark.parametrize("blocks", [[], ["--frames_per_block", 3]], ids=["bidirectional", "causal"])
def test_pairs_are_the_teachers_ode(wan, tmp_path, as_process, blocks):
    """What ode_trajectory makes of the same noise, with guidance, whoever makes which pair in batches of whatever."""
    for rank in (0, 1):
        as_process(rank, 2)
        build(*pairs_command(wan, tmp_path, "--batch_size", 1 + rank, *blocks))
        assert len(names(tmp_path / "pairs")) == [2, 3][rank]
    model, encoder = load_transformer(wan), TextEncoder(wan, cache=tmp_path / "cache")
    noise = randn((3, 6, 16, 4, 4), generators(0, "ode pairs", samples=range(3)))
    prompts, guided = [*PROMPTS[:2], PROMPTS[0]], Guided(model, encoder.null(3), 6.0)
    config = RolloutConfig(grid(8), frames_per_block=3 if blocks else 6)
    keep = (1000, 750, 500, 250)
    states = ode_trajectory(guided, FlowMatchScheduler(5.0), noise, encoder(prompts), config, keep)
    for clip, prompt, trajectory in zip(Clips(tmp_path / "pairs"), prompts, states, strict=True):
        torch.testing.assert_close(clip.latents, trajectory.half(), atol=2e-3, rtol=2e-3)
        assert clip.prompt == prompt
    data = OdePairs(tmp_path / "pairs", (16, 4, 4), shift=5.0, steps=keep)
    assert data.causal == bool(blocks) and data.batch([0])["steps"] == [*keep]


def test_interrupted_pairs_go_on(wan, tmp_path, monkeypatch):
    """Whole pairs only, none of them made again, and none of other settings beside them."""
    command = pairs_command(wan, tmp_path, "--keep", 1000, 500)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, build_data.Teacher, "trajectories", 2)
        build(*command)
    assert names(tmp_path / "pairs") == {"pairs_000000.safetensors"}
    made = interrupted_at(monkeypatch, build_data.Teacher, "trajectories", None)
    build(*command), build(*command)
    assert [[*arguments[2]] for arguments in made] == [[1], [2]]
    with pytest.raises(ValueError, match="differ in guidance_scale, 6.0 and 5.0: choose another output folder"):
        build(*command, "--guidance_scale", 5)
    with pytest.raises(ValueError, match=r"The ODE takes no step at \[750.0\]: choose a number of steps"):
        build(*command, "--num_steps", 6, "--keep", 1000, 750, "--output_folder", tmp_path / "others")
    (tmp_path / "prompts.txt").write_text("another\n")
    with pytest.raises(ValueError, match="was made for another prompt, 'a red ball rolls'"):
        build("ode_pairs", *command[1:], "--prompts", tmp_path / "prompts.txt")


def trained_on(rank, overrides):
    """The loss of the first step, and what it was computed from."""
    run = train.build(train.load_config(["stage=init", *overrides]))
    batch = run.data.batch(range(run.config.batch_size))
    rng = generators(run.config.seed, 0, "train", samples=range(run.config.batch_size))
    expected = None
    if run.config.init == "ode_pairs":
        times, cond = [1.0, 0.9375, 5 / 6, 0.625, 0.0], run.encoder(batch["prompts"])
        given = run.networks["generator"], run.scheduler, batch["trajectory"], times, cond, run.config.rollout
        with torch.no_grad():
            expected = ode_regression_loss(*given, rng=rng).item()
    return next(train.training_loop(run))["generator_loss"], expected


def test_a_student_is_initialised_with_pairs_and_with_latents(wan, tmp_path):
    """Through train.py, by the recipe: its loss is ode_regression_loss of the batch; Latents do for teacher forcing."""
    build(*pairs_command(wan, tmp_path))
    more = [f"data.path={tmp_path}/pairs", "encoder.device=cpu", f"training.pretrained_checkpoint={wan}"]
    overrides = [*recipe("wan_1_3b_ode_init", wan, tmp_path / "run", *more), "training.micro_batch_size=2"]
    overrides = [option for option in overrides if "generator.config" not in option]
    loss, expected = on_ranks(1, trained_on, overrides, folder=tmp_path / "ranks")[0]
    assert loss == pytest.approx(expected, rel=1e-5) and 0 < loss < 1e6
    forced = ["training.init=teacher_forcing", "data._target_=full_scale.data.Latents", "~data.shift", "~data.steps"]
    loss, _ = on_ranks(1, trained_on, [*overrides, *forced], folder=tmp_path / "others")[0]
    assert 0 < loss < 1e6


# --------------------------------------------------------------------------------------------------------- command line


def test_a_mistake_on_the_command_line_is_one_sentence(tmp_path, monkeypatch, capsys):
    """python -m full_scale.data ends with code 2 and says what is wrong, Ctrl-C with what to do."""

    def ended(*arguments):
        monkeypatch.setattr(sys, "argv", ["full_scale.data", *map(str, arguments)])
        monkeypatch.delitem(sys.modules, "full_scale.data", raising=False)  # it runs as __main__
        with pytest.raises(SystemExit) as error:
            runpy.run_module("full_scale.data", run_name="__main__")
        return error.value.code

    assert ended("lmdb", "--data_path", tmp_path, "--lmdb_path", tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith(f"full_scale.data: There are no clips at {tmp_path}: ")
    folder_of(tmp_path / "clips")
    interrupted_at(monkeypatch, stored_clips, "put_clip", 2)
    command = ["lmdb", "--data_path", tmp_path / "clips", "--lmdb_path", tmp_path / "out"]
    assert ended(*command) == "Stopped; the same command goes on from there."
