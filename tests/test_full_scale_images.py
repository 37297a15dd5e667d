"""Image-to-video conditioning: equal to what diffusers' pipeline and Wan's own code make of an image."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_wan import CLIP_FILE, CLIP_NAMES, in_wan_names, write_clip, write_vae

from full_scale import images
from full_scale.data import ImageConditions, ImagePrompt
from full_scale.data import picture as picture_of
from full_scale.images import cut, image_conditioning, image_pixels, load_image_encoder
from full_scale.pixels import load_vae
from full_scale.wan import WAN_CONFIGS
from randomness import generator, rand, randn
from tiny_causal_wan import TinyCausalWanModel

DIM = 160  # two heads of 80
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def picture(height=60, width=90, seed=0, mode="RGB"):
    """Colours that change smoothly over the picture, differently in its two halves."""
    pixels = F.interpolate(rand((1, 3, 5, 8), generator(seed, "picture")), (height, width), mode="bilinear")[0]
    return Image.fromarray((255 * pixels).byte().permute(1, 2, 0).numpy()).convert(mode)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A diffusers pipeline's folder with its VAE, image encoder and image processor."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_vae(folder)
    write_clip(folder, dim=DIM)
    return folder


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Wan's own folder with the same image encoder."""
    folder = tmp_path_factory.mktemp("Wan2.1-I2V-14B-480P")
    write_clip(folder, official=True, dim=DIM)
    (folder / "config.json").write_text('{"_class_name": "WanModel"}')
    return folder


@pytest.fixture(scope="module")
def theirs(pipeline):
    """diffusers' image-to-video pipeline around the same models."""
    from diffusers import AutoencoderKLWan, WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionModel

    return WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        scheduler=None,
        vae=AutoencoderKLWan.from_pretrained(pipeline / "vae"),
        image_encoder=CLIPVisionModel.from_pretrained(pipeline / "image_encoder"),
        image_processor=CLIPImageProcessor.from_pretrained(pipeline / "image_processor"),
    )


@pytest.fixture(scope="module")
def vae(pipeline):
    return load_vae(pipeline)


@pytest.fixture(scope="module")
def clip(pipeline):
    return load_image_encoder(pipeline)


# ---------------------------------------------------------------------------------------------- conditioning


def test_conditioning_is_that_of_the_diffusers_pipeline(theirs, vae, clip):
    """image_latents and clip_features in their numbers, to 1e-5; frames first, channels second."""
    image, cpu = picture(), torch.device("cpu")
    with torch.no_grad():
        pixels = theirs.video_processor.preprocess(image, height=32, width=48)
        size = {"height": 32, "width": 48, "num_frames": 9}
        _, condition = theirs.prepare_latents(pixels, 1, **size, dtype=torch.float32, device=cpu)
        features = theirs.encode_image(image, cpu)
    ours = image_conditioning(image, 3, vae, clip, height=32, width=48)
    assert ours["image_latents"].shape == (1, 3, 20, 4, 6) and ours["clip_features"].shape == (1, 257, DIM)
    torch.testing.assert_close(ours["image_latents"], condition.transpose(1, 2), **CLOSE)
    torch.testing.assert_close(ours["clip_features"], features, **CLOSE)


def test_the_image_is_the_first_frame_and_grey_follows(vae, clip):
    """Four channels of mask, 1 in the first latent frame alone; behind them the latents of image, 0, 0, 0, ..."""
    image = picture()
    latents = image_conditioning(image, 3, vae, clip, height=16, width=24)["image_latents"]
    assert latents[:, 0, :4].eq(1).all() and latents[:, 1:, :4].eq(0).all()
    video = torch.zeros(1, 9, 3, 16, 24)
    video[:, 0] = image_pixels(image, 16, 24)
    assert torch.equal(latents[:, :, 4:], vae.encode(video))
    assert (latents[:, 1, 4:] - latents[:, 2, 4:]).abs().max() > 1e-3  # the image is remembered in later frames


def test_a_batch_is_its_images(vae, clip):
    """Several pictures, of several sizes and modes, are conditioned as one by one; one latent frame suffices."""
    batch = [picture(), picture(50, 40, seed=1), picture(30, 30, seed=2, mode="L")]
    ours = image_conditioning(batch, 1, vae, clip, height=16, width=16)
    assert ours["image_latents"].shape == (3, 1, 20, 2, 2)
    for i, image in enumerate(batch):
        alone = image_conditioning(image, 1, vae, clip, height=16, width=16)
        for name, x in alone.items():
            torch.testing.assert_close(ours[name][i : i + 1], x, **CLOSE)


def test_pixels_of_a_dataset_will_do(vae, clip):
    """A tensor in [-1, 1] is taken as it is; a picture of that size means the same, but for rounding to 8 bits."""
    image = picture(64, 96)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    ours = image_conditioning(pixels, 2, vae, clip)
    expected = image_conditioning(image, 2, vae, clip, height=64, width=96)
    torch.testing.assert_close(ours["image_latents"], expected["image_latents"], **CLOSE)
    difference = (ours["clip_features"] - expected["clip_features"]).abs().mean()
    assert difference < 0.02 * expected["clip_features"].std()


def test_images_are_cut_and_never_squeezed(vae, clip):
    """Of other proportions, the middle part is what VAE and CLIP see; cutting it again takes nothing more away."""
    wide, tall = picture(64, 120), picture(75, 60, seed=1)
    for image, box in ((wide, (12, 0, 108, 64)), (tall, (0, 18, 60, 58))):  # with bars of 12 and about 18 pixels
        part = image.crop(box)
        assert cut(image, 32, 48).size == part.size and cut(part, 32, 48).size == part.size
        assert torch.equal(image_pixels(image, 32, 48), image_pixels(cut(image, 32, 48), 32, 48))
    expected = image_conditioning(wide.crop((12, 0, 108, 64)), 1, vae, clip, height=32, width=48)
    for name, x in image_conditioning(wide, 1, vae, clip, height=32, width=48).items():
        assert torch.equal(x, expected[name])
    for size in ((97, 58), (103, 200), (333, 517), (48, 32), (31, 31), (1000, 999)):
        once = cut(Image.new("RGB", size), 480, 832)
        assert cut(once, 480, 832).size == once.size
        assert abs(once.width - once.height * 832 / 480) <= 1 + 832 / 480 / 2 and 0 in (
            size[0] - once.width,
            size[1] - once.height,
        )


def test_images_are_upright(pipeline, vae, clip, tmp_path):
    """A camera that was turned stores the picture lying and says so: read by a user, and by training's data."""
    upright, exif = picture(96, 64), Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    lying = Image.open(tmp_path / "lying.png")
    assert lying.size == (96, 64) and picture_of(ImagePrompt("p", tmp_path / "lying.png")).size == (64, 96)
    assert torch.equal(image_pixels(lying, 48, 32), image_pixels(upright, 48, 32))
    expected = image_conditioning(upright, 1, vae, clip, height=48, width=32)
    for seen in (
        image_conditioning(lying, 1, vae, clip, height=48, width=32),
        ImageConditions(pipeline)(lying, 1, 48, 32),
    ):
        assert all(torch.equal(seen[name], x) for name, x in expected.items())


def test_conditioning_fits_the_transformer(pipeline, tmp_path, vae):
    """Image latents and CLIP tokens of Wan's width go into an image-to-video transformer, and both matter."""
    from dataclasses import replace

    write_clip(tmp_path)
    config = replace(WAN_CONFIGS["i2v-14b"], dim=24, ffn_dim=48, num_heads=2, num_layers=1, text_dim=8)
    model = TinyCausalWanModel(config).requires_grad_(False)
    for i, parameter in enumerate(model.parameters()):
        parameter.copy_(randn(parameter.shape, generator(0, i)) / 5)
    clip = load_image_encoder(tmp_path)
    conds = [image_conditioning(picture(seed=i), 2, vae, clip, height=32, width=32) for i in range(2)]
    flows = []
    for latents, features in ((0, 0), (1, 0), (0, 1)):
        cond = {"image_latents": conds[latents]["image_latents"], "clip_features": conds[features]["clip_features"]}
        cond["prompt_embeds"] = torch.ones(1, 2, 8)
        flows.append(model(torch.ones(1, 2, 16, 4, 4), torch.tensor([0.5]), cond))
    assert all((flow - flows[0]).abs().max() > 1e-4 for flow in flows[1:])


# ----------------------------------------------------------------------------------------------------- CLIP


def wan_clip(tensors, pixels, num_layers):
    """Wan's vision transformer written down from its description, on tensors in Wan's names."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], tensors[f"visual.{name}.weight"], tensors[f"visual.{name}.bias"], 1e-5)

    def linear(x, name):
        return F.linear(x, tensors[f"visual.{name}.weight"], tensors[f"visual.{name}.bias"])

    x = F.conv2d(pixels, tensors["visual.patch_embedding.weight"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([tensors["visual.cls_embedding"].expand(len(x), -1, -1), x], dim=1) + tensors["visual.pos_embedding"]
    x = norm(x, "pre_norm")
    for i in range(num_layers):
        name = f"transformer.{i}"
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.to_qkv").unflatten(-1, (3, -1, 80))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / math.sqrt(80)).softmax(-1) @ v
        x = x + linear(attention.transpose(1, 2).flatten(2), f"{name}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.0")), f"{name}.mlp.2")
    return x


@pytest.mark.parametrize("place", ["folder", "file"])
def test_wans_own_file_is_clip_as_wan_computes_it(official, place):
    """All layers but the last, every weight where Wan uses it, on images preprocessed in Wan's way."""
    clip = load_image_encoder(official if place == "folder" else official / CLIP_FILE)
    image = picture()
    unit = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
    squeezed = F.interpolate(2 * unit - 1, (224, 224), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (images.CLIP_MEAN, images.CLIP_STD))
    pixels = (squeezed * 0.5 + 0.5 - mean) / std
    tensors = torch.load(official / CLIP_FILE, weights_only=True)
    expected = wan_clip(tensors, pixels, num_layers=1)  # of two
    assert expected.shape == (1, 257, DIM)
    torch.testing.assert_close(clip(image), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(clip(2 * unit - 1), expected, atol=1e-4, rtol=1e-4)


def test_both_layouts_hold_the_same_network(official, clip):
    """The same weights come out of Wan's file and of the diffusers folder; only the preprocessing differs."""
    own, other = load_image_encoder(official), clip
    expected = other.model.state_dict()
    assert own.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in own.model.state_dict().items())
    assert (own(picture()) - other(picture())).abs().max() > 1e-2  # squeezed, cut


def test_the_released_image_encoder(tmp_path):
    """Sizes of ViT-H/14 are read off the shapes; names and count are those of transformers' model."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    sizes |= {"patch_size": 14, "image_size": 224, "hidden_act": "gelu"}
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(**sizes))
        tensors = {name: torch.empty_like(x) for name, x in model.state_dict().items()}
    assert images.clip_sizes(tensors) == sizes and sum(x.numel() for x in tensors.values()) == 630_766_080
    wan = in_wan_names(tensors, CLIP_NAMES)
    assert "visual.transformer.31.mlp.2.weight" in wan and all(name.startswith("visual.") for name in wan)


def test_precision_is_chosen(pipeline, official):
    """float32 by default, bfloat16 on request, from both layouts; frozen, and float32 at the interface."""
    for path in (pipeline, official):
        for clip in (load_image_encoder(path), load_image_encoder(path, dtype="bfloat16")):
            assert not clip.training and not any(p.requires_grad for p in clip.parameters())
            features = clip(picture())
            assert features.dtype == torch.float32 and features.isfinite().all()
    assert clip.model.dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------------- mistakes


def test_mistakes_name_the_fix(pipeline, official, tmp_path):
    """No CLIP, another file, a file that lacks a weight, a folder without its preprocessing."""
    with pytest.raises(ValueError, match="hf download Wan-AI/Wan2.1-I2V-14B-480P --include 'models_clip"):
        load_image_encoder(tmp_path)
    tensors = torch.load(official / CLIP_FILE, weights_only=True)
    del tensors["visual.transformer.1.norm2.weight"]
    torch.save(tensors, tmp_path / CLIP_FILE)
    with pytest.raises(ValueError, match="lacks encoder.layers.1.layer_norm2.weight: download it again"):
        load_image_encoder(tmp_path)
    torch.save({"token_embedding.weight": torch.ones(1)}, tmp_path / CLIP_FILE)
    with pytest.raises(ValueError, match="no CLIP of Wan's, it has token_embedding.weight"):
        load_image_encoder(tmp_path)
    bare = tmp_path / "bare"
    write_clip(bare, dim=DIM)
    (bare / "image_processor").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="no preprocessor_config.json"):
        load_image_encoder(bare)
    settings = json.loads((tmp_path / "elsewhere" / "preprocessor_config.json").read_text())
    (bare / "image_encoder" / "preprocessor_config.json").write_text(json.dumps(settings))
    loaded = load_image_encoder(bare / "image_encoder")
    assert torch.equal(loaded(picture()), load_image_encoder(pipeline)(picture()))
