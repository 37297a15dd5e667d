"""Lesson 3: wrong and right answers."""

import math

import torch
import torch.nn.functional as F

from full_scale.plan import layer_parameters, parameters
from tiny_causal_wan import rope_table as core_table
from tiny_causal_wan import rotate as core_rotate
from tutorial.lesson_03_wan_inside import solutions

# ---------------------------------------------------------------------------------------------------------- patches


def reshape_alone(video, patch):
    b, f, c, h, w = video.shape
    return video.reshape(b, f, (h // patch) * (w // patch), c * patch * patch)


def columns_first(video, patch):
    return solutions.patchify(video.mT, patch).reshape(*video.shape[:2], -1, video.shape[2] * patch**2)


def channel_last(video, patch):
    patches = solutions.patchify(video, patch).unflatten(-1, (video.shape[2], -1))
    return patches.transpose(-1, -2).flatten(-2)


def unfolded(video, patch):
    """torch's own im2col."""
    columns = F.unfold(video.flatten(0, 1), patch, stride=patch)  # [(b f), (c ph pw), s]
    return columns.mT.unflatten(0, video.shape[:2])


def scrambled(patches, height, width, patch):
    """A view where the squares should have been moved."""
    b, f, _, numbers = patches.shape
    return patches.reshape(b, f, numbers // patch**2, height, width)


def channel_first(patches, height, width, patch):
    channels = patches.shape[-1] // patch**2
    moved = patches.unflatten(-1, (channels, -1)).transpose(-1, -2).flatten(-2)
    return solutions.unpatchify(moved, height, width, patch)


def patches_down_the_columns(patches, height, width, patch):
    h, w = height // patch, width // patch
    moved = patches.unflatten(2, (w, h)).transpose(2, 3).flatten(2, 3)
    return solutions.unpatchify(moved, height, width, patch)


def mixes_frames(patches, height, width, patch):
    video = solutions.unpatchify(patches, height, width, patch)
    return video.transpose(0, 1).reshape(video.shape)


def pixel_shuffle(patches, height, width, patch):
    b, f, _, numbers = patches.shape
    channels = numbers // patch**2
    x = patches.reshape(b * f, height // patch, width // patch, patch * patch, channels)
    x = x.permute(0, 4, 3, 1, 2).flatten(1, 2)  # channels, then the place inside a patch
    return F.pixel_shuffle(x, patch).unflatten(0, (b, f))


# --------------------------------------------------------------------------------------------------------- sinusoid


def angles(t, dim, scale=1000.0, divisor=None):
    half = dim // 2
    rates = [10000 ** -(i / (divisor or half)) for i in range(half)]
    return scale * t.double()[..., None] * torch.tensor(rates, dtype=torch.float64, device=t.device)


def sines_first(t, dim):
    return torch.cat([angles(t, dim).sin(), angles(t, dim).cos()], dim=-1)


def no_thousand(t, dim):
    return torch.cat([angles(t, dim, 1.0).cos(), angles(t, dim, 1.0).sin()], dim=-1)


def half_minus_one(t, dim):
    found = angles(t, dim, divisor=dim // 2 - 1)
    return torch.cat([found.cos(), found.sin()], dim=-1)


def in_float32(t, dim):
    rates = 10000 ** -(torch.arange(dim // 2) / (dim // 2))
    found = 1000 * t.float()[..., None] * rates
    return torch.cat([found.cos(), found.sin()], dim=-1).double()


def interleaved(t, dim):
    found = angles(t, dim)
    return torch.stack([found.cos(), found.sin()], dim=-1).flatten(-2)


def by_complex_numbers(t, dim):
    waves = torch.exp(1j * angles(t, dim))
    return torch.cat([waves.real, waves.imag], dim=-1)


# ------------------------------------------------------------------------------------------------------------- rope


def halves_are_pairs(x, rotations):
    half = x.shape[-1] // 2
    pairs = torch.stack([x[..., :half], x[..., half:]], dim=-1).flatten(-2)
    turned = core_rotate(pairs, rotations).unflatten(-1, (-1, 2))
    return torch.cat([turned[..., 0], turned[..., 1]], dim=-1)


def turns_back(x, rotations):
    return core_rotate(x, rotations.conj())


def first_token_for_all(x, rotations):
    return core_rotate(x, rotations[:1].expand_as(rotations))


def adds_the_position(x, rotations):
    return x + torch.view_as_real(rotations).flatten(-2)[:, None].type_as(x)


def loses_the_dtype(x, rotations):
    return core_rotate(x.float(), rotations)


def by_cosines(x, rotations):
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    cos, sin = rotations.real[None, :, None], rotations.imag[None, :, None]
    turned = torch.empty_like(x, dtype=torch.float32)
    turned[..., 0::2], turned[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos
    return turned.to(x.dtype)


def one_axis(head_dim, start, frames, height, width, device):
    """Tokens counted through, as in a language model."""
    return core_table(head_dim, start, frames * height * width, 1, 1, device)


def width_gets_the_rest(head_dim, start, frames, height, width, device):
    grid = core_table(head_dim, start, frames, height, width, device).reshape(frames, height, width, -1)
    third = head_dim // 2 // 3
    axes = [(third, start, frames), (third, 0, height), (head_dim // 2 - 2 * third, 0, width)]
    return joined(axes, grid.shape, device)


def one_ladder(head_dim, start, frames, height, width, device):
    """The frequencies run on from axis to axis."""
    pairs, third = head_dim // 2, head_dim // 2 // 3
    rates = 10000.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    spans = rates.split([pairs - 2 * third, third, third])
    places = torch.arange(start, start + frames), torch.arange(height), torch.arange(width)
    found = [torch.outer(place.double(), rate) for place, rate in zip(places, spans, strict=True)]
    return spread(found, (frames, height, width), device)


def forgets_the_start(head_dim, start, frames, height, width, device):
    return core_table(head_dim, 0, frames, height, width, device)


def columns_before_rows(head_dim, start, frames, height, width, device):
    grid = core_table(head_dim, start, frames, width, height, device).reshape(frames, width, height, -1)
    return grid.flatten(0, 2)


def joined(axes, shape, device):
    found = []
    for pairs, first, length in axes:
        rates = torch.tensor([math.exp(-math.log(10000) * i / pairs) for i in range(pairs)], dtype=torch.float64)
        found.append(torch.arange(first, first + length).double()[:, None] * rates)
    return spread(found, shape[:3], device)


def spread(found, shape, device):
    time, row, column = found
    rows = []
    for f in range(shape[0]):
        for h in range(shape[1]):
            for w in range(shape[2]):
                rows.append(torch.cat([time[f], row[h], column[w]]))
    return torch.exp(1j * torch.stack(rows)).to(device, torch.complex64)


def token_by_token(head_dim, start, frames, height, width, device):
    third = head_dim // 2 // 3
    axes = [(head_dim // 2 - 2 * third, start, frames), (third, 0, height), (third, 0, width)]
    return joined(axes, (frames, height, width), device)


# ------------------------------------------------------------------------------------------------------- modulation


def scale_without_one(x, sublayer, shift, scale, gate):
    return solutions.modulated(x, sublayer, shift, scale - 1, gate)


def gate_on_everything(x, sublayer, shift, scale, gate):
    y = sublayer(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, :, None]) + shift[:, :, None])
    return (x + y) * gate[:, :, None]


def first_frame_for_all(x, sublayer, shift, scale, gate):
    vectors = (vector[:, :1].expand_as(vector) for vector in (shift, scale, gate))
    return solutions.modulated(x, sublayer, *vectors)


def no_norm(x, sublayer, shift, scale, gate):
    return x + sublayer(x * (1 + scale[:, :, None]) + shift[:, :, None]) * gate[:, :, None]


def shift_and_scale_exchanged(x, sublayer, shift, scale, gate):
    return solutions.modulated(x, sublayer, scale, shift, gate)


def frame_by_frame(x, sublayer, shift, scale, gate):
    mean, std = x.mean(-1, keepdim=True), (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    inside = torch.einsum("bfse,bfe->bfse", (x - mean) / std, 1 + scale) + shift.unsqueeze(2)
    return x + torch.einsum("bfse,bfe->bfse", sublayer(inside), gate)


# ------------------------------------------------------------------------------------------------------- parameters


def no_biases(config):
    e, f, layers = config.dim, config.ffn_dim, config.num_layers
    _, ph, pw = config.patch_size
    return layers * (8 * e * e + 2 * e * f + 12 * e) + e * (config.in_dim + config.out_dim) * ph * pw + 9 * e * e


def without_modulation(config):
    return sum(parameters(config).values()) - 6 * config.dim * config.num_layers


def norms_of_one_head(config):
    """As if q and k were normed head by head."""
    unused = 4 * (config.dim - config.dim // config.num_heads) * config.num_layers
    return sum(parameters(config).values()) - unused


def layers_alone(config):
    return config.num_layers * layer_parameters(config)


def part_by_part(config):
    """Linear maps with biases, then the rest."""

    def linear(a, b):
        return a * b + b

    e, i2v = config.dim, config.model_type == "i2v"
    _, ph, pw = config.patch_size
    layer = (8 + 2 * i2v) * linear(e, e) + linear(e, config.ffn_dim) + linear(config.ffn_dim, e) + 6 * e
    layer += (2 * e if config.cross_attn_norm else 0) + ((4 + i2v) * e if config.qk_norm else 0)
    total = config.num_layers * layer + linear(config.in_dim * ph * pw, e)
    total += linear(config.text_dim, e) + linear(e, e)
    total += linear(config.freq_dim, e) + linear(e, e) + linear(e, 6 * e)
    total += linear(e, config.out_dim * ph * pw) + 2 * e
    return total + (2 * 1280 + linear(1280, 1280) + linear(1280, e) + 2 * e if i2v else 0)


# ------------------------------------------------------------------------------------------------------------ layer


def written_out(
    weights,
    x,
    modulation,
    text,
    rotations,
    num_heads,
    *,
    norm_heads=False,
    turn=True,
    gelu="tanh",
    order="sca",
    own=True,
):
    """The layer from its parameters alone; the options are what one gets wrong."""

    def linear(name, y):
        return y @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def heads(y):
        return y.unflatten(-1, (num_heads, -1))

    def rms(name, y):
        if norm_heads:
            y = heads(y)
            return (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(-2) * weights[f"{name}.weight"]
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]

    def attend(name, y, source, rotated):
        q, k = (
            heads(rms(f"{name}.norm_q", linear(f"{name}.q", y))),
            heads(rms(f"{name}.norm_k", linear(f"{name}.k", source))),
        )
        if rotated:
            q, k = by_cosines(q, rotations), by_cosines(k, rotations)
        scores = torch.einsum("blnd,bmnd->bnlm", q, k) / q.shape[-1] ** 0.5
        mixed = torch.einsum("bnlm,bmnd->blnd", scores.softmax(-1), heads(linear(f"{name}.v", source)))
        return linear(f"{name}.o", mixed.flatten(2))

    def norm(y):
        return F.layer_norm(y, y.shape[-1:], eps=1e-6)

    shape, vectors = x.shape, modulation + (weights["modulation"] if own else 0)
    a, b, c, d, e, f = (vectors[:, :, i, None] for i in range(6))
    for part in order:
        if part == "s":
            y = (norm(x) * (1 + b) + a).flatten(1, 2)
            x = x + attend("self_attn", y, y, turn).reshape(shape) * c
        elif part == "c":
            y = norm(x) * weights["norm3.weight"] + weights["norm3.bias"]
            x = x + attend("cross_attn", y.flatten(1, 2), text, False).reshape(shape)
        else:
            y = linear("ffn.0", norm(x) * (1 + e) + d)
            x = x + linear("ffn.2", F.gelu(y, approximate=gelu)) * f
    return x


def norms_each_head(weights, x, modulation, text, rotations, num_heads):
    return written_out(weights, x, modulation, text, rotations, num_heads, norm_heads=True)


def forgets_positions(weights, x, modulation, text, rotations, num_heads):
    return written_out(weights, x, modulation, text, rotations, num_heads, turn=False)


def the_other_gelu(weights, x, modulation, text, rotations, num_heads):
    return written_out(weights, x * 3, modulation, text, rotations, num_heads, gelu="none") / 3


def another_order(weights, x, modulation, text, rotations, num_heads):
    return written_out(weights, x, modulation, text, rotations, num_heads, order="sac")


def forgets_its_own_modulation(weights, x, modulation, text, rotations, num_heads):
    return written_out(weights, x, modulation, text, rotations, num_heads, own=False)


def from_scratch(weights, x, modulation, text, rotations, num_heads):
    return written_out(weights, x, modulation, text, rotations, num_heads)


WRONG = {
    "patchify": [reshape_alone, columns_first, channel_last],
    "unpatchify": [scrambled, channel_first, patches_down_the_columns, mixes_frames],
    "sinusoid": [sines_first, no_thousand, half_minus_one, in_float32, interleaved],
    "rotate": [halves_are_pairs, turns_back, first_token_for_all, adds_the_position, loses_the_dtype],
    "rope_table": [one_axis, width_gets_the_rest, one_ladder, forgets_the_start, columns_before_rows],
    "modulated": [scale_without_one, gate_on_everything, first_frame_for_all, no_norm, shift_and_scale_exchanged],
    "num_parameters": [no_biases, without_modulation, norms_of_one_head, layers_alone],
    "wan_layer": [norms_each_head, forgets_positions, the_other_gelu, another_order, forgets_its_own_modulation],
}
RIGHT = {
    "patchify": unfolded,
    "unpatchify": pixel_shuffle,
    "sinusoid": by_complex_numbers,
    "rotate": by_cosines,
    "rope_table": token_by_token,
    "modulated": frame_by_frame,
    "num_parameters": part_by_part,
    "wan_layer": from_scratch,
}
