"""Wan's VAE in the files it comes in, whole and as a stream; the tiny decoder against its own definition."""

import pytest
import torch
import torch.nn.functional as F
from small_wan import VAE_FILE, VAE_NAMES, in_wan_names, write_tiny_decoder, write_vae

from full_scale.pixels import TinyDecoder, load_tiny_decoder, load_vae
from randomness import generator, rand, randn

CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A diffusers pipeline's folder with its VAE."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_vae(folder)
    return folder


@pytest.fixture(scope="module")
def vae(folder):
    return load_vae(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    """diffusers' own VAE from the same folder."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(folder / "vae")


def clip(num_frames, batch=2, height=16, width=24):
    """Random pixels in [-1, 1], smooth enough to have values in between."""
    return 2 * rand((batch, num_frames, 3, height, width), generator(0, "clip", num_frames)) - 1


def latents(num_frames, batch=2):
    """Normalised latents of clips of 16 x 24 pixels."""
    return randn((batch, num_frames, 16, 2, 3), generator(0, "latents", num_frames))


def in_blocks(stream, x, sizes):
    return torch.cat([stream(block) for block in x.split(list(sizes), dim=1)], dim=1)


# ------------------------------------------------------------------------------------------------ whole clips


def scale(theirs):
    """latents_mean and latents_std as diffusers' pipelines shape them."""
    shape = (1, theirs.config.z_dim, 1, 1, 1)
    return torch.tensor(theirs.config.latents_mean).view(shape), torch.tensor(theirs.config.latents_std).view(shape)


def test_encoding_is_diffusers_with_wans_normalisation(vae, theirs):
    """(mean of the posterior - latents_mean) / latents_std, frames and channels exchanged; 1 + 4 n -> n + 1 frames."""
    video = clip(9)
    with torch.no_grad():
        mode = theirs.encode(video.transpose(1, 2)).latent_dist.mode()
    mean, std = scale(theirs)
    z = vae.encode(video)
    assert z.shape == (2, 3, 16, 2, 3) and z.std() > 0.1
    torch.testing.assert_close(z, ((mode - mean) / std).transpose(1, 2), **CLOSE)


def test_decoding_is_diffusers_with_wans_normalisation(vae, theirs):
    """As WanPipeline decodes: latents * latents_std + latents_mean, clamped to [-1, 1]; T -> 1 + 4 (T - 1) frames."""
    z = latents(3)
    mean, std = scale(theirs)
    with torch.no_grad():
        expected = theirs.decode(z.transpose(1, 2) * std + mean).sample
    video = vae.decode(z)
    assert video.shape == (2, 9, 3, 16, 24) and video.abs().max() <= 1 and 0.1 < video.std() < 0.9
    torch.testing.assert_close(video, expected.transpose(1, 2), **CLOSE)


def test_wans_own_file_is_the_same_vae(vae, tmp_path):
    """Wan2.1_VAE.pth, by its folder or by its name, decodes and encodes as the diffusers folder."""
    write_vae(tmp_path, official=True)
    (tmp_path / "config.json").write_text('{"_class_name": "WanModel"}')
    for path in (tmp_path, tmp_path / VAE_FILE):
        own = load_vae(path)
        assert torch.equal(own.decode(latents(2)), vae.decode(latents(2)))
        assert torch.equal(own.encode(clip(5)), vae.encode(clip(5)))


def test_a_bare_folder_will_do(folder, vae):
    """The vae/ folder alone."""
    assert torch.equal(load_vae(folder / "vae").decode(latents(1)), vae.decode(latents(1)))


def test_the_released_vae_has_194_tensors():
    """Names and count of Wan's file, from diffusers' model of the released sizes, and back without a remainder."""
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    with torch.device("meta"):
        model = AutoencoderKLWan()
    wan = in_wan_names(model.state_dict(), VAE_NAMES)
    assert len(wan) == 194 and sum(x.numel() for x in wan.values()) == 126_892_531
    assert wan["conv1.weight"].shape == (32, 32, 1, 1, 1) and wan["conv2.weight"].shape == (16, 16, 1, 1, 1)
    assert sum("decoder." in name or "conv2" in name for name in wan if name.startswith(("decoder.", "conv2"))) == 108
    assert convert_wan_vae_to_diffusers(wan).keys() == model.state_dict().keys()


def test_precision_is_chosen(folder):
    """float32 by default, bfloat16 on request; frozen, and float32 at the interface in both."""
    for dtype in (torch.float32, torch.bfloat16):
        vae = load_vae(folder, dtype=dtype) if dtype != torch.float32 else load_vae(folder)
        assert {p.dtype for p in vae.parameters()} == {dtype} and not vae.training
        assert not any(p.requires_grad for p in vae.parameters())
        z = vae.encode(clip(1).requires_grad_())
        assert z.dtype == vae.decode(z).dtype == vae.stream()(z).dtype == torch.float32 and not z.requires_grad


def test_clips_are_taken_one_at_a_time(vae):
    """A batch needs the memory of one clip, and gives the same numbers."""
    sizes = []
    handle = vae.vae.decoder.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    batch = vae.decode(latents(2))
    handle.remove()
    assert sizes == [1] * 4
    torch.testing.assert_close(batch[1:], vae.decode(latents(2)[1:]), **CLOSE)


def test_tiling_is_close_and_smaller(folder):
    """Only with tiling=True is a large picture decoded in tiles: about the same pixels from smaller tensors."""
    z = randn((1, 1, 16, 36, 36), generator(0, "large"))
    whole, tiled = load_vae(folder), load_vae(folder, tiling=True)
    largest = []
    tiled.vae.decoder.register_forward_hook(lambda module, inputs, output: largest.append(output.shape[-1]))
    video, expected = tiled.decode(z), whole.decode(z)
    assert video.shape == expected.shape == (1, 1, 3, 288, 288) and max(largest) == 256
    assert 0 < (video - expected).abs().mean() < 0.1 * expected.abs().mean()
    assert tiled.encode(video).shape == z.shape


# ----------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("sizes", [(1, 2), (3, 3), (1, 3, 3), (2, 1, 1), (6,)])
def test_decoding_in_blocks_is_decoding_the_whole(vae, sizes):
    """To 1e-5, whatever the blocks: the first latent frame gives one picture, each later one four."""
    z = latents(sum(sizes))
    stream = vae.stream()
    blocks = [stream(block) for block in z.split(sizes, dim=1)]
    counts = [block.shape[1] for block in blocks]
    assert counts == [1 + 4 * (sizes[0] - 1), *(4 * size for size in sizes[1:])]
    whole = vae.decode(z)
    torch.testing.assert_close(torch.cat(blocks, dim=1), whole, **CLOSE)
    apart = torch.cat([vae.decode(block) for block in z.split(sizes, dim=1)], dim=1)
    assert len(sizes) == 1 or apart.shape != whole.shape  # without a memory it would not fit


def test_the_memory_of_a_stream_matters(vae):
    """The second block depends on the first, also on what came before its last frame."""
    z = latents(6)
    other = z.clone()
    other[:, 1] += 1
    kept, changed = (in_blocks(vae.stream(), x, (3, 3)) for x in (z, other))
    assert (kept[:, 9:] - changed[:, 9:]).abs().max() > 1e-3
    assert torch.equal(kept[:, :1], changed[:, :1])  # causal


def test_streams_do_not_disturb_each_other(vae):
    """Two videos decoded in turns, whole clips encoded and decoded in between: as if each were alone."""
    z = latents(4)
    one, two, blocks = vae.stream(), vae.stream(), {0: [], 1: []}
    for block in z.split(2, dim=1):
        blocks[0].append(one(block))
        vae.decode(z)
        vae.encode(clip(5))
        blocks[1].append(two(-block))
    torch.testing.assert_close(torch.cat(blocks[0], dim=1), vae.decode(z), **CLOSE)
    torch.testing.assert_close(torch.cat(blocks[1], dim=1), vae.decode(-z), **CLOSE)


@pytest.mark.parametrize("sizes", [(1, 8), (5, 4), (1, 4, 4)])
def test_encoding_in_blocks_is_encoding_the_whole(vae, sizes):
    """The first block has 1 + 4 n frames, later ones 4 n."""
    video = clip(sum(sizes))
    torch.testing.assert_close(in_blocks(vae.encoding_stream(), video, sizes), vae.encode(video), **CLOSE)


def test_the_memory_has_room_for_every_convolution(vae):
    """Wan's network numbers its causal convolutions itself: each has a slot, filled, and the rest stays empty."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    stream, encoding = vae.stream(), vae.encoding_stream()
    stream(latents(2))
    encoding(clip(5))
    for memory, network in ((stream.memory, vae.vae.decoder), (encoding.memory, vae.vae.encoder)):
        convolutions = [m for m in network.modules() if isinstance(m, WanCausalConv3d)]
        cached = [m for m in convolutions if m.kernel_size != (1, 1, 1)]
        filled = [slot is not None for slot in memory]
        assert sum(filled) == len(cached) and all(filled[: len(cached)]) and len(memory) > len(cached)


# ------------------------------------------------------------------------------------- Self-Forcing's first frame


def test_the_first_frame_of_a_gradient_window(vae):
    """decode all, take the last picture, encode it alone: one latent frame that scores take for a first one."""
    z = latents(4).requires_grad_()
    expected = vae.encode(vae.decode(z)[:, -1:])
    first = vae.reencode_last_frame(z)
    assert first.shape == (2, 1, 16, 2, 3) and not first.requires_grad
    torch.testing.assert_close(first, expected, **CLOSE)
    assert (first - z[:, -1:]).abs().max() > 0.1


def test_a_first_frame_is_encoded_alone(vae):
    """encode(first picture) is the first latent frame of the clip: the VAE is causal."""
    video = clip(9)
    torch.testing.assert_close(vae.encode(video[:, :1]), vae.encode(video)[:, :1], **CLOSE)


# ---------------------------------------------------------------------------------------------------- mistakes


def test_what_would_be_dropped_is_refused(vae):
    """diffusers ignores frames and pixels that do not fill a latent."""
    with pytest.raises(ValueError, match=r"1 \+ 4 n frames, not 8"):
        vae.encode(clip(8))
    with pytest.raises(ValueError, match="multiples of 8 pixels, not 20 x 24"):
        vae.encode(clip(5, height=20))
    stream = vae.encoding_stream()
    stream(clip(5))
    with pytest.raises(ValueError, match="4 n frames after the first, not 5"):
        stream(clip(5))


def test_mistakes_name_the_fix(tmp_path):
    """No VAE, another file, a file that lacks a weight."""
    with pytest.raises(ValueError, match="hf download Wan-AI/Wan2.1-T2V-1.3B --include 'Wan2.1_VAE.pth'"):
        load_vae(tmp_path)
    write_vae(tmp_path, official=True)
    tensors = torch.load(tmp_path / VAE_FILE, weights_only=True)
    del tensors["decoder.upsamples.7.time_conv.bias"]
    torch.save(tensors, tmp_path / VAE_FILE)
    with pytest.raises(ValueError, match="missing: decoder.up_blocks.1.upsamplers.0.time_conv.bias"):
        load_vae(tmp_path)
    torch.save({"token_embedding.weight": torch.ones(1)}, tmp_path / VAE_FILE)
    with pytest.raises(ValueError, match="no Wan VAE, it has token_embedding.weight"):
        load_vae(tmp_path)
    with pytest.raises(ValueError, match="curl -L .*taew2_1.pth"):
        load_tiny_decoder(tmp_path / "taew2_1.pth")


def test_a_folder_has_to_be_whole(tmp_path):
    """diffusers would make up a weight that is not there, and say so in passing."""
    from safetensors.torch import load_file, save_file

    write_vae(tmp_path)
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: x for name, x in tensors.items() if name != "quant_conv.bias"}, file)
    with pytest.raises(ValueError, match="no whole AutoencoderKLWan, it lacks quant_conv.bias: download it again"):
        load_vae(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be loaded as AutoencoderKLWan"):
        load_vae(tmp_path)


# ------------------------------------------------------------------------------------------------- tiny decoder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny decoder out of a file, and the file's tensors."""
    path = tmp_path_factory.mktemp("taehv") / "taew2_1.pth"
    tensors = write_tiny_decoder(path)
    return load_tiny_decoder(path), {name: x.float() for name, x in tensors.items()}


def tiny_frames(tensors, z):
    """TAEHV frame by frame, as its author describes it: every block keeps the frame that it saw before."""
    memory = {}

    def conv(x, name):
        weight = tensors[f"decoder.{name}.weight"]
        return F.conv2d(x, weight, tensors.get(f"decoder.{name}.bias"), padding=weight.shape[-1] // 2)

    def block(x, i):
        past = memory.get(i, torch.zeros_like(x))
        memory[i] = x
        y = F.relu(conv(torch.cat([x, past], dim=1), f"{i}.conv.0"))
        return F.relu(conv(F.relu(conv(y, f"{i}.conv.2")), f"{i}.conv.4") + x)

    def stage(x, first, num_frames):
        for i in range(first, first + 3):
            x = block(x, i)
        grown = conv(F.interpolate(x, scale_factor=2), f"{first + 4}.conv")
        return [conv(frame, f"{first + 5}") for frame in grown.chunk(num_frames, dim=1)]

    frames = []
    for x in z.unbind(1):
        x = F.relu(conv(3 * torch.tanh(x / 3), "1"))
        for small in stage(x, 3, 1):
            for middle in stage(small, 9, 2):
                frames += [conv(F.relu(frame), "22").clamp(0, 1) for frame in stage(middle, 15, 2)]
    return 2 * torch.stack(frames[3:], dim=1) - 1


def test_the_tiny_decoder_is_its_definition(tiny):
    """128 tensors, 11,315,539 parameters in the file; [-1, 1] and 1 + 4 (T - 1) frames out of it."""
    decoder, tensors = tiny
    assert len(tensors) == 128 and sum(x.numel() for x in tensors.values()) == 11_315_539
    z = 2 * latents(3)
    video = decoder.decode(z)
    assert video.shape == (2, 9, 3, 16, 24) and video.min() == -1 and 0.1 < video.std() < 0.9
    torch.testing.assert_close(video, tiny_frames(tensors, z), **CLOSE)


@pytest.mark.parametrize("sizes", [(1, 2), (3, 3), (2, 1, 1), (6,)])
def test_the_tiny_decoder_streams(tiny, sizes):
    """Blocks of any size join to the whole clip, each with a frame count of its own."""
    decoder, _ = tiny
    z = latents(sum(sizes))
    stream = decoder.stream()
    blocks = [stream(block) for block in z.split(sizes, dim=1)]
    assert [block.shape[1] for block in blocks] == [1 + 4 * (sizes[0] - 1), *(4 * size for size in sizes[1:])]
    torch.testing.assert_close(torch.cat(blocks, dim=1), decoder.decode(z), **CLOSE)


def test_the_tiny_decoder_of_more_frames_is_cut(tiny, tmp_path):
    """Files of a decoder that doubles the frames once more: the rows of the later frame are used, as by its author."""
    decoder, tensors = tiny
    longer = torch.cat([torch.ones(256, 256, 1, 1), tensors["decoder.7.conv.weight"]])
    torch.save(tensors | {"decoder.7.conv.weight": longer}, tmp_path / "taew2_1.pth")
    again = load_tiny_decoder(tmp_path / "taew2_1.pth")
    assert torch.equal(again.decode(latents(2)), decoder.decode(latents(2)))
    torch.save({"decoder.1.weight": torch.ones(1)}, tmp_path / "taew2_1.pth")
    with pytest.raises(ValueError, match="missing: decoder.1.bias"):
        load_tiny_decoder(tmp_path / "taew2_1.pth")


def test_the_tiny_decoder_is_frozen_and_halved(tiny, tmp_path):
    """float32 by default, another dtype on request; pixels are float32."""
    write_tiny_decoder(tmp_path / "taew2_1.pth")
    half = load_tiny_decoder(tmp_path / "taew2_1.pth", dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and not half.training
    assert not any(p.requires_grad for p in half.parameters())
    video = half.decode(latents(2))
    assert video.dtype == torch.float32
    torch.testing.assert_close(video, tiny[0].decode(latents(2)), atol=0.1, rtol=0)
    assert sum(p.numel() for p in TinyDecoder().parameters()) == 9_844_611
