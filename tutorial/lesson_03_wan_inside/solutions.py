"""Solutions of lesson 3: the core itself, where it has the function."""

import torch
import torch.nn.functional as F
from einops import rearrange

from full_scale.plan import num_parameters
from tiny_causal_wan import WanConfig, WanLayer, exact_attention, rope_table, rotate, sinusoid

__all__ = [
    "modulated",
    "num_parameters",
    "patchify",
    "rope_table",
    "rotate",
    "sinusoid",
    "unpatchify",
    "wan_layer",
]


def patchify(video, patch):
    return rearrange(video, "b f c (h ph) (w pw) -> b f (h w) (c ph pw)", ph=patch, pw=patch)


def unpatchify(patches, height, width, patch):
    h = height // patch
    return rearrange(patches, "b f (h w) (ph pw c) -> b f c (h ph) (w pw)", h=h, ph=patch, pw=patch)


def modulated(x, sublayer, shift, scale, gate):
    shift, scale, gate = (vector[:, :, None] for vector in (shift, scale, gate))  # the same for all tokens of a frame
    y = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x + sublayer(y * (1 + scale) + shift) * gate


def wan_layer(weights, x, modulation, text, rotations, num_heads):
    """The core's own layer, filled with the weights."""
    ffn_dim, dim = weights["ffn.0.weight"].shape
    layer = WanLayer(WanConfig(dim=dim, ffn_dim=ffn_dim, num_heads=num_heads))
    return torch.func.functional_call(layer, weights, (x, modulation, text, None, rotations, exact_attention))[0]
