"""full_scale.live: Wan's networks in their real formats behind live.Live and demo.py, and what they refuse."""

from itertools import islice

import pytest
import torch
from small_wan import write_tiny_decoder
from test_full_scale_generate import HEIGHT, PROMPTS, SIZE, WIDTH, student, wan, wan_i2v  # noqa: F401  (fixtures)

import demo
from dynamic_video_sf import Guided
from full_scale.generate import Models, choose_sampling, stream_video
from full_scale.live import load_live
from full_scale.text import TextEncoder
from live import Live


def options(checkpoint, wan, *more):  # noqa: F811
    own = ["--checkpoint", checkpoint, "--model_path", wan, "--config", wan / "config.json", *SIZE, "--device", "cpu"]
    return [str(option) for option in (*own, *more)]


def pixels(blocks):
    return torch.cat([block.pixels.cpu() for block in blocks], dim=1)


def test_a_student_streams_the_video_of_full_scale_generate(student, wan):  # noqa: F811
    """The same pixels, bit for bit: text, blocks, eviction and VAE, though nobody knows how long it will be."""
    live = Live(load_live(options(student, wan, "--window_frames", "3")), PROMPTS[0], seed=7)
    blocks = list(islice(live, 4))
    models = Models(student, wan, wan / "config.json")
    sampling = choose_sampling(models, window_frames=3)
    shape = {"num_frames": 12, "height": HEIGHT, "width": WIDTH}
    expected = stream_video(models, PROMPTS[:1], sampling, keys=[(7, "live")], **shape)
    assert torch.equal(pixels(blocks), torch.cat(list(expected), dim=1))
    assert [block.pixels.shape[1] for block in blocks] == [9, 12, 12, 12] and blocks[3].held == (6, 7, 8)
    assert torch.equal(blocks[1].stills, blocks[1].pixels[0, 3::4])


def test_prompts_change_in_mid_video(student, wan):  # noqa: F811
    """Kept and read anew differ, from each other and from no change, and only after the change."""
    seen = []
    for wish in ({}, {"prompt": PROMPTS[1]}, {"prompt": PROMPTS[1], "cache": "anew"}):
        live = Live(load_live(options(student, wan)), PROMPTS[0])
        before = next(live)
        live.change(**wish)
        seen.append((before.pixels, next(live).pixels))
    assert all(torch.equal(before, seen[0][0]) for before, _ in seen)
    assert all((a - b).abs().max() > 1e-3 for i, (_, a) in enumerate(seen) for _, b in seen[:i])


def test_wan_itself_in_guided_blocks(wan):  # noqa: F811
    """A folder made block by block: UniPC, guidance, two caches; a smaller window evicts in both."""
    model = load_live(options(wan, wan, "--no-bidirectional", "--num_steps", "3"))
    assert isinstance(model.generator, Guided) and model.rollout.window_frames == 18 and not model.whole_clip
    live = Live(model, PROMPTS[0])
    list(islice(live, 2))
    live.change(window_frames=1, prompt=PROMPTS[1], cache="anew")
    assert next(live).held == (5,) and live.cache.cond.frames == live.cache.uncond.frames == (5,)


def test_wan_itself_clip_after_clip(wan):  # noqa: F811
    """A folder as it is: whole clips, each decoded from its own beginning."""
    model = load_live(options(wan, wan, "--num_output_frames", "3", "--num_steps", "2"))
    first, second = islice(Live(model, PROMPTS[0]), 2)
    assert model.whole_clip and first.pixels.shape == second.pixels.shape == (1, 9, 3, HEIGHT, WIDTH)
    assert second.frames == range(3, 6) and not torch.equal(first.pixels, second.pixels)


def test_less_memory_is_the_same_video(student, wan, tmp_path, monkeypatch):  # noqa: F811
    """Offloaded layers and a visiting decoder change no pixel, and the text encoder is gone when it has read."""
    write_tiny_decoder(tmp_path / "taew2_1.pth")
    small = ["--tiny_decoder", tmp_path / "taew2_1.pth"]
    plain = list(islice(Live(load_live(options(student, wan, *small)), PROMPTS[0]), 2))
    freed, free = [], TextEncoder.free
    monkeypatch.setattr(TextEncoder, "free", lambda encoder: freed.append(free(encoder)))
    live = Live(load_live(options(student, wan, *small, "--offload_layers")), PROMPTS[0])
    assert torch.equal(pixels(plain), pixels(islice(live, 2))) and len(freed) == 1


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--prompts", "a cat"], "--prompts means nothing here"),
        (["--format", "gif"], "--format means nothing here"),
        (["--image", "a.png"], "--i2v means nothing here"),
        (["--height", "30"], "--height must be a multiple of 16, got 30: use 16 or 32"),
        (["--mode", "few-step", "--num_steps", "3"], "num_steps are those of many-step sampling"),
    ],
)
def test_options_that_mean_nothing_are_refused(student, wan, more, sentence):  # noqa: F811
    """What full_scale.generate shows or writes is not asked for here; what does not fit is its own sentence."""
    with pytest.raises(ValueError, match=sentence):
        load_live(options(student, wan, *more))


def test_image_to_video_is_refused(wan_i2v):  # noqa: F811
    """Its conditions are those of a clip, not of a stream."""
    with pytest.raises(ValueError, match="image-to-video model sees the image of a whole clip"):
        load_live(options(wan_i2v, wan_i2v))


def test_an_empty_prompt_is_refused(student, wan):  # noqa: F811
    """Anything else is a prompt, as the text encoder reads it."""
    model = load_live(options(student, wan))
    assert model.check("  a  cat ") == "a cat"
    with pytest.raises(ValueError, match="The prompt is empty"):
        Live(model, " ")


def test_the_demo_takes_wans_options(student, wan, monkeypatch):  # noqa: F811
    """demo.py hands on what it does not know itself, once there is a --model_path."""
    served = []
    monkeypatch.setattr(demo, "serve", lambda model, door: served.append((model, *door.getsockname())))
    demo.main([*options(student, wan, "--sink_frames", "2"), "--port", "0"])
    model, host, port = served[0]
    assert (model.rollout.sink_frames, model.fps, host) == (2, 16, "127.0.0.1") and port
