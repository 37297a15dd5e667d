"""Latents and pixels: Wan's VAE, and a tiny decoder that is cheaper and less exact. Whole clips, or block by block.

Pixels are [B, F, 3, H, W] in [-1, 1]; latents are [B, T, 16, H/8, W/8] as the transformer knows them, normalised with
the VAE's latents_mean and latents_std. F = 1 + 4 (T - 1): the first latent frame is one picture, each later one four.
A stream remembers what every causal layer saw last, so that pieces of a video join without a seam:

    stream = vae.stream()
    for block in rollout(...):
        show(stream(block))
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from checkpoint import StateDict, fill
from full_scale.pretrained import DOWNLOADS, find, load_frozen
from full_scale.wan import first, pick_dtype, read_file
from processes import pick_device

STRIDE, TIME_STRIDE = 8, 4  # pixels per latent in height and width, pictures per latent in time
FPS = 16  # pictures a second of Wan's videos


def num_latents(num_frames: int) -> int:
    """Latent frames of so many pictures."""
    return 1 + (num_frames - 1) // TIME_STRIDE


def check_size(height: int, width: int, patch_size: Sequence[int] = (1, 2, 2)) -> None:
    """Raises ValueError for pixels that are no whole number of the transformer's patches."""
    for name, pixels, patch in (("height", height, patch_size[1]), ("width", width, patch_size[2])):
        unit = STRIDE * patch
        if pixels < unit or pixels % unit:
            below = max(1, pixels // unit) * unit
            raise ValueError(f"--{name} must be a multiple of {unit}, got {pixels}: use {below} or {below + unit}.")


def load_vae(
    path: str | Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str | None = None,
    tiling: bool = False,
) -> "WanVAE":
    """Wan's VAE, frozen, from a diffusers pipeline or vae folder, Wan's folder, or a Wan2.1_VAE.pth.

    float32 is what Wan uses. tiling: `encode` and `decode` work in overlapping tiles of 256 pixels, with less memory
    and not quite the same result at the seams; a stream does not, it holds one latent frame at a time as it is.
    """
    path, dtype = find("VAE", path), pick_dtype(dtype, ())
    from diffusers import AutoencoderKLWan

    vae = load_frozen(AutoencoderKLWan, path, dtype=dtype) if path.is_dir() else read_wan_vae(path).to(dtype)
    vae.enable_slicing()  # one clip of a batch at a time: the same numbers in less memory
    if tiling:
        vae.enable_tiling()
    return WanVAE(vae).to(pick_device(str(device or "cpu"))).eval().requires_grad_(False)


def read_wan_vae(path: Path) -> nn.Module:
    """Wan's own file, in the names of diffusers. Raises ValueError for any other file, and names what is wrong."""
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    tensors = convert_wan_vae_to_diffusers(read_file(path)[0])
    if "encoder.conv_in.weight" not in tensors:
        raise ValueError(f"{path} is no Wan VAE, it has {first(tensors)}: pass the right file.")
    with torch.device("meta"):
        vae = AutoencoderKLWan(base_dim=len(tensors["encoder.conv_in.weight"]))
    vae.to_empty(device="cpu")
    fill(vae, tensors, path)
    return vae


class WanVAE(nn.Module):
    """diffusers' AutoencoderKLWan behind this repository's shapes. Nothing here has a gradient."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae
        for name in ("latents_mean", "latents_std"):
            values = torch.tensor(getattr(vae.config, name), dtype=torch.float32)
            self.register_buffer(name, values[:, None, None], persistent=False)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Pixels of 1 + 4 n frames to n + 1 latent frames, in float32: the mean that the VAE predicts, as Wan does."""
        check_clip(video)
        posterior = self.vae.encode(channels_first(video).to(self.vae.dtype)).latent_dist
        return self.normalise(posterior.mode())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents of a whole clip to pixels, in float32."""
        return frames_first(self.vae.decode(self.denormalise(latents)).sample).float()

    def stream(self) -> "DecodingStream":
        """A function from the next latents of a video to their pixels."""
        return DecodingStream(self)

    def encoding_stream(self) -> "EncodingStream":
        """A function from the next pixels of a video, 1 + 4 n frames and later 4 n, to their latents."""
        return EncodingStream(self)

    def reencode_last_frame(self, latents: Tensor) -> Tensor:
        """[B, T, 16, h, w] to [B, 1, 16, h, w]: their last picture, as the first frame of a video.

        Self-Forcing scores only the last frames of a long rollout. The VAE encodes a first frame on its own and the
        scores know none other, so what came before is replaced by its last picture, encoded that way.
        """
        stream = self.stream()
        for latent in latents.split(1, dim=1):
            frames = stream(latent)
        return self.encode(frames[:, -1:])

    def normalise(self, z: Tensor) -> Tensor:
        return (frames_first(z).float() - self.latents_mean) / self.latents_std

    def denormalise(self, latents: Tensor) -> Tensor:
        return channels_first(latents.float() * self.latents_std + self.latents_mean).to(self.vae.dtype)


class DecodingStream:
    """Decodes a video piece by piece to the pixels of the whole."""

    def __init__(self, codec: WanVAE):
        self.codec, self.memory, self.started = codec, empty_memory(codec.vae.decoder), False

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        vae, frames = self.codec.vae, []
        for z in vae.post_quant_conv(self.codec.denormalise(latents)).split(1, dim=2):
            frames.append(vae.decoder(z, feat_cache=self.memory, feat_idx=[0], first_chunk=not self.started))
            self.started = True
        return frames_first(torch.cat(frames, dim=2)).float().clamp(-1, 1)


class EncodingStream:
    """Encodes a video piece by piece to the latents of the whole."""

    def __init__(self, codec: WanVAE):
        self.codec, self.memory, self.started = codec, empty_memory(codec.vae.encoder), False

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        vae, num_first = self.codec.vae, 0 if self.started else 1
        check_clip(video, num_first)
        x = channels_first(video).to(vae.dtype)
        sizes = [1] * num_first + [4] * (video.shape[1] // 4)
        z = [vae.encoder(part, feat_cache=self.memory, feat_idx=[0]) for part in x.split(sizes, dim=2)]
        self.started = True
        mean, _ = vae.quant_conv(torch.cat(z, dim=2)).chunk(2, dim=1)
        return self.codec.normalise(mean)


def empty_memory(network: nn.Module) -> list:
    """A slot per causal convolution of Wan's encoder or decoder, which number themselves; the rest stays empty."""
    return [None] * len(list(network.modules()))


def check_clip(video: Tensor, num_first: int = 1) -> None:
    """The VAE would drop what is left over, frames and pixels, without a word."""
    num_frames, (height, width) = video.shape[1], video.shape[-2:]
    if num_frames % 4 != num_first:
        expected = "1 + 4 n frames" if num_first else "4 n frames after the first"
        raise ValueError(f"Wan's VAE encodes {expected}, not {num_frames}: cut or extend the clip.")
    if height % STRIDE or width % STRIDE:
        raise ValueError(f"Wan's VAE encodes multiples of {STRIDE} pixels, not {height} x {width}: resize the clip.")


def channels_first(video: Tensor) -> Tensor:
    return rearrange(video, "b f c h w -> b c f h w")


def frames_first(video: Tensor) -> Tensor:
    return rearrange(video, "b c f h w -> b f c h w")


# --------------------------------------------------------------------------------------------------- tiny decoder


def load_tiny_decoder(
    path: str | Path, *, dtype: torch.dtype | str = torch.float32, device: torch.device | str | None = None
) -> "TinyDecoder":
    """TAEHV's decoder for Wan 2.1 (taew2_1.pth or .safetensors), frozen."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no {path}: download it with `{DOWNLOADS['tiny decoder'].command}`.")
    with torch.device("meta"):
        decoder = TinyDecoder()
    decoder.to_empty(device="cpu")
    tensors = {name: x for name, x in read_file(path)[0].items() if not name.startswith("encoder.")}
    fill(decoder, last_time_steps(tensors, decoder.state_dict()), path)
    return decoder.to(device, pick_dtype(dtype, ())).eval().requires_grad_(False)


def last_time_steps(tensors: StateDict, own: StateDict) -> dict[str, Tensor]:
    """Weights of a decoder that makes more frames than this one: of each layer the last frames' rows are kept."""
    grown = [name for name, x in own.items() if name in tensors and x.shape[-2:] == (1, 1)]
    return dict(tensors) | {name: tensors[name][-len(own[name]) :] for name in grown}


class TinyDecoder(nn.Module):
    """TAEHV (madebyollin/taehv) for Wan 2.1: 9.8 million weights for the VAE decoder's 73, and about its pixels.

    It reads latents as the transformer makes them. In time it is causal with one frame of memory per block; it makes
    four frames of every latent, of which the first latent's first three are dropped.
    """

    def __init__(self):
        super().__init__()
        layers = [SoftClamp(), conv(16, 256), nn.ReLU()]
        for dim, next_dim, num_frames in ((256, 128, 1), (128, 64, 2), (64, 64, 2)):
            layers += [MemoryBlock(dim) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), Grow(dim, num_frames), conv(dim, next_dim, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), conv(64, 3))  # numbered as in the file

    def decode(self, latents: Tensor) -> Tensor:
        """Latents of a whole clip to pixels, in float32, a latent frame at a time."""
        stream = self.stream()
        return torch.cat([stream(latent) for latent in latents.split(1, dim=1)], dim=1)

    def stream(self) -> "TinyStream":
        """A function from the next latents of a video to their pixels."""
        return TinyStream(self)

    def forward(self, latents: Tensor, memory: dict[int, Tensor]) -> Tensor:
        """Pixels in [0, 1], all four frames of each latent. memory: the last frame that each block saw, replaced."""
        x = latents
        for i, layer in enumerate(self.decoder):
            if isinstance(layer, MemoryBlock):
                past = torch.cat([memory.get(i, torch.zeros_like(x[:, :1])), x[:, :-1]], dim=1)
                memory[i], x = x[:, -1:], layer(x, past)
            else:
                x = rearrange(layer(x.flatten(0, 1)), "(b f) c h w -> b f c h w", b=len(x))
        return x.clamp(0, 1)


class TinyStream:
    """Decodes a video piece by piece to the pixels of the whole."""

    def __init__(self, model: TinyDecoder):
        self.model, self.memory = model, {}

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        dropped = 0 if self.memory else 3
        dtype = self.model.decoder[1].weight.dtype
        return 2 * self.model(latents.to(dtype), self.memory)[:, dropped:].float() - 1


class MemoryBlock(nn.Module):
    """A residual block that sees each frame beside the one before it."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Sequential(conv(2 * dim, dim), nn.ReLU(), conv(dim, dim), nn.ReLU(), conv(dim, dim))

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        both = torch.cat([x, past], dim=2).flatten(0, 1)
        return F.relu(self.conv(both).unflatten(0, x.shape[:2]) + x)


class Grow(nn.Module):
    """`num_frames` frames out of one, by a 1 x 1 convolution to as many times the channels."""

    def __init__(self, dim: int, num_frames: int):
        super().__init__()
        self.num_frames, self.conv = num_frames, nn.Conv2d(dim, num_frames * dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.conv(x), "n (f c) h w -> (n f) c h w", f=self.num_frames)


class SoftClamp(nn.Module):
    """Latents that a model drives beyond 3 standard deviations are bent back."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


def conv(dim: int, next_dim: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(dim, next_dim, 3, padding=1, bias=bias)
