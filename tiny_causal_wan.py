"""Wan 2.1's diffusion transformer, run three ways: bidirectional, block-causal, and with a KV cache.

One class, whatever the size: `WanConfig` makes it the tiny Moving MNIST model or Wan 2.1 1.3B / 14B, with Wan's own
parameter names and shapes. The network predicts the flow (noise - x0) of a video [B, F, C, H, W] at time t in [0, 1].

    bidirectional   model(x_t, t, cond)                               teacher and critic: every frame sees every frame
    block-causal    model(x_t, t, cond, frames_per_block=3)           a block sees itself and the blocks before it
    teacher forcing model(x_t, t, cond, frames_per_block=3, clean=x0) a noisy block sees itself and *clean* past blocks
    cached          model(x_t, t, cond, cache)                        the next block sees the cache and itself

The last three are one function computed in different ways; tests hold them against each other.

Shapes: b batch, f frames, c channels, h w height and width in patches, s = h w tokens per frame, l tokens, n heads,
d head dim, e model width. Hidden states keep their frame axis, [b f s e], because modulation is per frame.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from kv_cache import FramesPerBlock, KeysValues, KVCache, block_sizes, remembers

CLIP_DIM = 1280  # width of the CLIP vision tokens that image-to-video models read
TIME_SCALE = 1000  # the sinusoid wants 0..1000; everything outside of it speaks t in [0, 1]


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan transformer. The defaults are the shipped Moving MNIST model."""

    model_type: str = "t2v"
    in_dim: int = 1
    out_dim: int = 1
    dim: int = 96
    ffn_dim: int = 384
    num_heads: int = 2
    num_layers: int = 6
    patch_size: tuple[int, int, int] = (1, 4, 4)
    text_dim: int = 32
    text_len: int = 10
    freq_dim: int = 256
    qk_norm: bool = True
    cross_attn_norm: bool = True
    eps: float = 1e-6

    def __post_init__(self):
        object.__setattr__(self, "patch_size", tuple(self.patch_size))  # YAML brings lists
        if self.model_type not in ("t2v", "i2v"):
            raise ValueError(f"model_type must be 't2v' or 'i2v', got {self.model_type!r}.")
        if min(self.num_heads, self.num_layers, self.dim) < 1:
            raise ValueError("dim, num_heads and num_layers must be at least 1.")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim={self.dim} must split into num_heads={self.num_heads} heads of even width.")
        if len(self.patch_size) != 3 or self.patch_size[0] != 1 or min(self.patch_size) < 1:
            raise ValueError(
                f"patch_size must be (1, height, width): a patch of Wan lies in one frame; got {self.patch_size}."
            )


# ---------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class FrameMask:
    """Which frame sees which when a whole clip is computed at once; each kernel turns it into what it needs.

    With `clean_half`, the sequence is [clean || noisy], both halves over the same frames: clean blocks see clean
    blocks up to themselves, a noisy block sees itself and the clean blocks before it.
    """

    block_sizes: tuple[int, ...]
    tokens_per_frame: int
    sink_frames: int = 0
    window_frames: int | None = None
    clean_half: bool = False

    def __post_init__(self):
        KVCache(self.sink_frames, self.window_frames)  # has its own say about both

    def frames(self) -> Tensor:
        """Bool [query frame, key frame], True where the query sees the key."""
        starts = [sum(self.block_sizes[:i]) for i, size in enumerate(self.block_sizes) for _ in range(size)]
        num_frames = len(starts)
        past = torch.tensor(
            [[remembers(k, start, self.sink_frames, self.window_frames) for k in range(num_frames)] for start in starts]
        )
        start = torch.tensor(starts)
        own = start[:, None] == start[None]
        if not self.clean_half:
            return past | own
        clean = torch.cat([past | own, torch.zeros_like(own)], dim=1)
        noisy = torch.cat([past, own], dim=1)
        return torch.cat([clean, noisy])

    def tokens(self, device=None) -> Tensor:
        """Bool [query token, key token] for a dense kernel."""
        return _dense_mask(self, torch.device(device or "cpu"))


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # a table made under inference_mode could not be used in training later
def _dense_mask(mask: FrameMask, device: torch.device) -> Tensor:
    frames = mask.frames().to(device)
    return frames.repeat_interleave(mask.tokens_per_frame, 0).repeat_interleave(mask.tokens_per_frame, 1)


@lru_cache(maxsize=16)
def _views(mask: FrameMask) -> list[tuple[slice, list[slice]]]:
    """Tokens that see the same, and what they see."""

    def runs(values):
        start = 0
        for value, equal in groupby(values):
            end = start + len(list(equal)) * mask.tokens_per_frame
            yield value, slice(start, end)
            start = end

    return [(own, [keys for seen, keys in runs(row) if seen]) for row, own in runs(mask.frames().tolist())]


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: FrameMask | None = None, layer=None, kind=None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v on [b l n d] with PyTorch's kernel for the device. `kind` is "self" or "cross".

    With a mask, block by block, each with the keys that it sees: what is masked is not computed.
    """
    if mask is not None:
        parts = []
        for own, seen in _views(mask):
            keys, values = (torch.cat([x[:, span] for span in seen], dim=1) for x in (k, v))
            parts.append(sdpa_attention(q[:, own], keys, values))
        return torch.cat(parts, dim=1)
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))  # [b n l d]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def matmul_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: FrameMask | None = None, layer=None, kind=None
) -> Tensor:
    """The same function spelled out as matrix products."""
    batch, *_, width = q.shape
    q, k, v = (rearrange(x, "b l n d -> (b n) l d") for x in (q, k, v))
    scores = torch.baddbmm(q.new_zeros(()), q, k.mT, beta=0, alpha=width**-0.5)
    if mask is not None:
        scores = scores.masked_fill(~mask.tokens(q.device), float("-inf"))
    return rearrange(scores.softmax(-1) @ v, "(b n) l d -> b l n d", b=batch)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """The faster of the two for what it is given: PyTorch's kernel is slow in bf16 on a CPU."""
    slow = v.device.type == "cpu" and v.dtype == torch.bfloat16
    return (matmul_attention if slow else sdpa_attention)(q, k, v, **options)


Attention = Callable[..., Tensor]


# ------------------------------------------------------------------------------------------------ position and time


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def rope_table(head_dim: int, start: int, frames: int, height: int, width: int, device: torch.device) -> Tensor:
    """Complex rotations [f h w, head_dim / 2] of 3-D rotary positions; frames count from `start` of the video.

    Each head's channel pairs are shared out to time, height and width, and every axis has its own ladder of
    frequencies.
    """
    pairs = head_dim // 2
    spatial = pairs // 3
    axes = [(pairs - 2 * spatial, start, frames), (spatial, 0, height), (spatial, 0, width)]
    angles = []
    for num_pairs, first, length in axes:
        frequencies = 10000.0 ** -(torch.arange(num_pairs, dtype=torch.float64) / num_pairs)
        angles.append(torch.outer(torch.arange(first, first + length, dtype=torch.float64), frequencies))
    time, row, column = angles
    grid = torch.cat(
        [
            repeat(time, "f p -> f h w p", h=height, w=width),
            repeat(row, "h p -> f h w p", f=frames, w=width),
            repeat(column, "w p -> f h w p", f=frames, h=height),
        ],
        dim=-1,
    )
    grid = rearrange(grid, "f h w p -> (f h w) p")
    return torch.polar(torch.ones_like(grid), grid).to(device, torch.complex64)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate the channel pairs (two adjacent channels) of x [b l n d] by their positions' angles [l, d / 2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations[:, None]).flatten(-2).type_as(x)


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal features [..., dim], cosines first, of t in [0, 1]; in float64 as Wan does."""
    half = dim // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angles = (t.double() * TIME_SCALE)[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# ------------------------------------------------------------------------------------------------------- modules


class PatchEmbedding(nn.Conv3d):
    """Wan's patch convolution, computed as the linear map that it is: [b f c H W] -> [b f s e]."""

    def forward(self, video: Tensor) -> Tensor:
        _, ph, pw = self.kernel_size
        patches = rearrange(video, "b f c (h ph) (w pw) -> b f (h w) (c ph pw)", ph=ph, pw=pw)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis (all heads jointly), computed in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32, whatever the model's precision."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).type_as(x)


class SelfAttention(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.heads = config.num_heads
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(config.dim, config.dim))
        for name in ("norm_q", "norm_k"):
            setattr(self, name, RMSNorm(config.dim, config.eps) if config.qk_norm else nn.Identity())

    def split_heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b l (n d) -> b l n d", n=self.heads)

    def keys_values(self, x: Tensor, rotations: Tensor) -> KeysValues:
        """What a cache keeps of the tokens x [b l e]: rotated keys and values, [b l n d] each."""
        return rotate(self.split_heads(self.norm_k(self.k(x))), rotations), self.split_heads(self.v(x))

    def forward(self, x: Tensor, rotations: Tensor, attend: Attention, mask, past: KeysValues | None):
        q = rotate(self.split_heads(self.norm_q(self.q(x))), rotations)
        new = k, v = self.keys_values(x, rotations)
        if past is not None:
            k, v = (torch.cat([old, now.type_as(old)], dim=1) for old, now in zip(past, (k, v), strict=True))
        return self.o(attend(q, k, v, mask=mask, kind="self").flatten(2)), new


class CrossAttention(SelfAttention):
    """Video tokens read the prompt and, in image-to-video models, the image's CLIP tokens, with one shared query."""

    def __init__(self, config: WanConfig):
        super().__init__(config)
        if config.model_type == "i2v":
            self.k_img = nn.Linear(config.dim, config.dim)
            self.v_img = nn.Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim, config.eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, text: Tensor, image: Tensor | None, attend: Attention) -> Tensor:
        q = self.split_heads(self.norm_q(self.q(x)))
        k, v = self.split_heads(self.norm_k(self.k(text))), self.split_heads(self.v(text))
        y = attend(q, k, v, kind="cross")
        if image is not None:
            k, v = self.split_heads(self.norm_k_img(self.k_img(image))), self.split_heads(self.v_img(image))
            y = y + attend(q, k, v, kind="cross")
        return self.o(y.flatten(2))


class WanLayer(nn.Module):
    """One transformer block: self-attention, cross-attention and feed-forward, modulated by the time of each frame."""

    def __init__(self, config: WanConfig):
        super().__init__()
        dim = config.dim
        self.norm1 = LayerNorm(dim, config.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = LayerNorm(dim, config.eps) if config.cross_attn_norm else nn.Identity()
        self.cross_attn = CrossAttention(config)
        self.norm2 = LayerNorm(dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x, modulation, text, image, rotations, attend, mask=None, past=None):
        """x [b f s e], modulation [b f 6 e] -> x after the layer, and this clip's keys and values."""
        frames = x.shape[1]
        shift0, scale0, gate0, shift1, scale1, gate1 = (self.modulation + modulation)[..., None, :].unbind(
            2
        )  # [b f 1 e]
        y = self.norm1(x) * (1 + scale0) + shift0
        y, new = self.self_attn(y.flatten(1, 2), rotations, attend, mask, past)
        x = x + y.unflatten(1, (frames, -1)) * gate0
        y = self.cross_attn(self.norm3(x).flatten(1, 2), text, image, attend)
        x = x + y.unflatten(1, (frames, -1))
        return x + self.ffn(self.norm2(x) * (1 + scale1) + shift1) * gate1, new


class Head(nn.Module):
    """Tokens back to patches: [b f s e] -> [b f s (ph pw c)], modulated by the time embedding itself."""

    def __init__(self, config: WanConfig):
        super().__init__()
        _, ph, pw = config.patch_size
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, ph * pw * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation + time[:, :, None])[..., None, :].unbind(2)  # [b f 1 e]
        return self.head(self.norm(x) * (1 + scale) + shift)


class ImageEmbedding(nn.Module):
    """CLIP vision tokens [B, 257, 1280] to the model's width."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(CLIP_DIM),
            nn.Linear(CLIP_DIM, CLIP_DIM),
            nn.GELU(),
            nn.Linear(CLIP_DIM, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, clip_features: Tensor) -> Tensor:
        return self.proj(clip_features)


# --------------------------------------------------------------------------------------------------------- model


class TinyCausalWanModel(nn.Module):
    """The Wan 2.1 transformer; see the top of this file for the ways to call it."""

    def __init__(self, config: WanConfig | None = None):
        super().__init__()
        self.config = config = config or WanConfig()
        self.attention: Attention = exact_attention  # replaced by assignment: kernels, capture, sequence parallelism
        dim = config.dim
        self.patch_embedding = PatchEmbedding(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanLayer(config) for _ in range(config.num_layers))
        self.head = Head(config)
        if config.model_type == "i2v":
            self.img_emb = ImageEmbedding(dim)
        self.init_weights()

    def init_weights(self):
        """Wan's initialisation; the head starts at zero, so a fresh model predicts a flow of exactly zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for module in (*self.text_embedding, *self.time_embedding):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def forward(
        self,
        x_t: Tensor,
        t: float | Tensor,
        cond: Mapping[str, Tensor],
        cache: KVCache | None = None,
        *,
        frames_per_block: FramesPerBlock | None = None,
        clean: Tensor | None = None,
        sink_frames: int = 0,
        window_frames: int | None = None,
    ) -> Tensor:
        """Predict the flow [B, F, C, H, W] of x_t [B, F, C, H, W] at time t (float, [B] or [B, F]).

        cond: "prompt_embeds" [B, L, text_dim]; image-to-video also "clip_features" [B, 257, 1280] and "image_latents"
        [B, F, 20, H, W] of the whole clip, sliced by the cache's position. cache is read, never written.
        frames_per_block, clean, sink_frames and window_frames choose a masked way; a block then sees itself, the
        first sink_frames and the window_frames before its own first frame. Raises ValueError where the ways are
        mixed.
        """
        mask = self.frame_mask(x_t, cache, frames_per_block, clean, sink_frames, window_frames)
        x, time = self.embed(x_t, t, cond, cache)
        if clean is not None:
            x_clean, time_clean = self.embed(clean, 0.0, cond, cache)
            x, time = torch.cat([x_clean, x], 1), torch.cat([time_clean.expand_as(time), time], 1)
        x = self.run_layers(x, time, cond, cache, mask, grid=x_t)
        frames = x_t.shape[1]
        return self.unpatchify(self.head(x[:, -frames:], time[:, -frames:]), x_t)

    def remember(self, x: Tensor, t: float | Tensor, cond: Mapping[str, Tensor], cache: KVCache) -> KVCache:
        """The cache extended by this block's keys and values at noise level t: a new one."""
        tokens, time = self.embed(x, t, cond, cache)
        layers: list[KeysValues] = []
        self.run_layers(tokens, time, cond, cache, mask=None, grid=x, remembered=layers)
        return cache.extend(layers, num_frames=x.shape[1])

    # ------------------------------------------------------------------------------------------ steps of the above

    def frame_mask(self, x_t, cache, frames_per_block, clean, sink_frames, window_frames) -> FrameMask | None:
        if frames_per_block is None:
            if clean is not None or sink_frames or window_frames is not None:
                raise ValueError(
                    "clean, sink_frames and window_frames describe block-causal calls: pass frames_per_block too."
                )
            return None
        if cache is not None:
            raise ValueError("A cached call sees one block: give either cache or frames_per_block, not both.")
        if clean is not None and clean.shape != x_t.shape:
            raise ValueError(f"clean {tuple(clean.shape)} and x_t {tuple(x_t.shape)} must have the same shape.")
        _, ph, pw = self.config.patch_size
        tokens_per_frame = (x_t.shape[3] // ph) * (x_t.shape[4] // pw)
        sizes = tuple(block_sizes(x_t.shape[1], frames_per_block))
        return FrameMask(sizes, tokens_per_frame, sink_frames, window_frames, clean_half=clean is not None)

    def embed(self, x_t: Tensor, t: float | Tensor, cond, cache: KVCache | None) -> tuple[Tensor, Tensor]:
        """Tokens [b f s e] of the frames and their time embedding [b f e]."""
        self.check_input(x_t, t, cond)
        batch, frames, _, height, width = x_t.shape
        _, ph, pw = self.config.patch_size
        if height % ph or width % pw:
            raise ValueError(f"Frames of {height}x{width} do not divide into patches of {ph}x{pw}; change patch_size.")
        if self.config.model_type == "i2v":
            x_t = torch.cat([x_t, self.image_latents(cond, cache, frames).type_as(x_t)], dim=2)
        if not isinstance(t, Tensor):
            t = x_t.new_full((), t, dtype=torch.float64)  # filled where it is needed: a copy there would wait
        t = t.to(x_t.device, torch.float64)
        if t.shape not in ((), (batch,), (batch, 1), (batch, frames)):
            raise ValueError(f"t must be a float, [{batch}] or [{batch}, {frames}] for this clip; got {list(t.shape)}.")
        t = t.reshape(-1, t.shape[-1] if t.ndim == 2 else 1).expand(batch, frames)
        dtype = self.patch_embedding.weight.dtype
        return self.patch_embedding(x_t.to(dtype)), self.time_embedding(sinusoid(t, self.config.freq_dim).to(dtype))

    def check_input(self, x_t: Tensor, t: float | Tensor, cond) -> None:
        """What a newcomer gets wrong first: the order of the axes, the scale of t, the prompt."""
        channels = self.config.out_dim if self.config.model_type == "i2v" else self.config.in_dim
        if x_t.ndim != 5 or x_t.shape[2] != channels:
            raise ValueError(f"A video is [B, F, C, H, W] with C = {channels} for this model; got {list(x_t.shape)}.")
        if not isinstance(t, Tensor) and not 0 <= t <= 1:
            raise ValueError(f"t runs from 0 (clean) to 1 (noise), got {t}; the scale 0..1000 is the config's alone.")
        shape = list(cond["prompt_embeds"].shape) if "prompt_embeds" in cond else None
        if shape is None or [shape[0], shape[-1]] != [len(x_t), self.config.text_dim]:
            expected = f"[{len(x_t)}, L, {self.config.text_dim}]"
            raise ValueError(f"cond['prompt_embeds'] must be {expected} for this model and batch; got {shape}.")

    def image_latents(self, cond, cache: KVCache | None, frames: int) -> Tensor:
        """The given image's latents for the frames at hand, out of those of the whole clip."""
        if not {"image_latents", "clip_features"} <= cond.keys():
            raise ValueError("An i2v model needs cond['image_latents'] and cond['clip_features'] besides the prompt.")
        start = cache.next_frame if cache else 0
        latents = cond["image_latents"][:, start : start + frames]
        if latents.shape[1] < frames:
            raise ValueError(f"cond['image_latents'] end before frame {start + frames}: give them for the whole clip.")
        return latents

    def run_layers(self, x, time, cond, cache, mask, grid, remembered: list[KeysValues] | None = None) -> Tensor:
        """All layers over tokens x [b f s e]; every layer's new keys and values are added to `remembered`, if given."""
        _, ph, pw = self.config.patch_size
        start, frames = cache.next_frame if cache else 0, grid.shape[1]
        head_dim = self.config.dim // self.config.num_heads
        rotations = rope_table(head_dim, start, frames, grid.shape[3] // ph, grid.shape[4] // pw, x.device)
        if x.shape[1] > frames:  # [clean || noisy]: both halves stand at the same positions
            rotations = torch.cat([rotations, rotations])
        modulation = self.time_projection(time).unflatten(-1, (6, -1))  # [b f 6 e]
        text, image = self.embed_text(cond["prompt_embeds"]), self.embed_image(cond)
        past = self.past(cache) if cache and cache.layers else [None] * len(self.blocks)
        for i, layer in enumerate(self.blocks):
            attend = partial(self.attention, layer=i)
            x, keys_values = layer(x, modulation, text, image, rotations, attend, mask, past[i])
            if remembered is not None:
                remembered.append(keys_values)
        return x

    def past(self, cache: KVCache) -> Sequence[KeysValues]:
        """Every layer's cached keys and values, the sink's keys moved up to the window if the cache says so.

        Rotary positions add up: a key turned by its own time and then by the gap stands `gap` frames later.
        """
        if not cache.gap:
            return cache.layers
        keys = cache.layers[0][0]
        end = keys.shape[1] // len(cache.frames) * cache.sink_frames
        later = rope_table(keys.shape[-1], cache.gap, 1, 1, 1, keys.device)
        return [(torch.cat([rotate(k[:, :end], later), k[:, end:]], dim=1), v) for k, v in cache.layers]

    def embed_text(self, prompt_embeds: Tensor) -> Tensor:
        """Prompt tokens [b text_len e]. Padding is zeros before the embedding and is attended, as in Wan."""
        length = prompt_embeds.shape[1]
        if length > self.config.text_len:
            raise ValueError(
                f"The prompt has {length} tokens, the model reads {self.config.text_len}: shorten the prompt."
            )
        padded = F.pad(prompt_embeds, (0, 0, 0, self.config.text_len - length))
        return self.text_embedding(padded.to(self.text_embedding[0].weight.dtype))

    def embed_image(self, cond) -> Tensor | None:
        if self.config.model_type != "i2v":
            return None
        return self.img_emb(cond["clip_features"].to(self.patch_embedding.weight.dtype))

    def unpatchify(self, patches: Tensor, like: Tensor) -> Tensor:
        _, ph, pw = self.config.patch_size
        height = like.shape[3] // ph
        return rearrange(patches, "b f (h w) (ph pw c) -> b f c (h ph) (w pw)", h=height, ph=ph, pw=pw)


if __name__ == "__main__":
    model = TinyCausalWanModel()
    video = torch.randn(2, 6, 1, 24, 24)
    prompt = {"prompt_embeds": torch.randn(2, 4, model.config.text_dim)}
    nn.init.normal_(model.head.head.weight, std=0.02)
    with torch.no_grad():
        masked = model(video, 0.5, prompt, frames_per_block=3)
        memory = KVCache()
        cached = []
        for block in video.split(3, dim=1):
            cached.append(model(block, 0.5, prompt, memory))
            memory = model.remember(block, 0.5, prompt, memory)
    difference = (torch.cat(cached, dim=1) - masked).abs().max().item()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {len(model.blocks)} layers")
    print(f"flow {tuple(masked.shape)}; block-causal mask and KV cache differ by {difference:.1e}")
