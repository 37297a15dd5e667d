"""The GAN's judge: a diffusion transformer whose features are read by one learned token per chosen layer.

As in the reference code's GAN objective: the backbone starts from the teacher's weights and sees noised clips; the
readers and the head are new.
"""

from functools import partial

import torch
from torch import Tensor, nn

from tiny_causal_wan import CrossAttention, LayerNorm, TinyCausalWanModel, WanConfig


class Reader(nn.Module):
    """One register token reads a layer's hidden states: [b l e] -> [b e]."""

    def __init__(self, config: WanConfig):
        super().__init__()
        dim = config.dim
        self.register = nn.Parameter(torch.randn(1, 1, dim))
        self.norm = LayerNorm(dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.norm_ffn = LayerNorm(dim, config.eps)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim))

    def forward(self, hidden: Tensor, attend) -> Tensor:
        token = self.register.expand(len(hidden), -1, -1)
        token = token + self.cross_attn(token, self.norm(hidden), None, attend)
        return (token + self.ffn(self.norm_ffn(token)))[:, 0]


class Discriminator(nn.Module):
    """discriminator(x_t, t, cond) -> logits [B]: above 0, the noised clip x_t [B, F, C, H, W] looks like data.

    layers: after which layers of the backbone to read, counted from 0; by default three, the reference's 13, 21 and 29
    of 30 scaled to the depth at hand. Raises ValueError for layers that the backbone does not have.
    """

    def __init__(self, backbone: TinyCausalWanModel, layers: tuple[int, ...] | None = None):
        super().__init__()
        self.backbone = backbone
        self.config = config = backbone.config
        depth = config.num_layers
        self.layers = tuple(layers) if layers else tuple(sorted({depth * n // 30 - 1 for n in (14, 22, 30)} - {-1}))
        if not all(0 <= layer < depth for layer in self.layers):
            raise ValueError(f"layers must lie between 0 and {depth - 1}, got {list(self.layers)}.")
        reader = WanConfig(**{**vars(config), "model_type": "t2v"})  # it reads tokens, whatever they were made of
        self.readers = nn.ModuleList(Reader(reader) for _ in self.layers)
        width, dim = len(self.layers) * config.dim, config.dim
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, 1))
        self.hidden: dict[int, Tensor] = {}
        for layer in self.layers:
            backbone.blocks[layer].register_forward_hook(partial(self._keep, layer))

    def _keep(self, layer: int, module, inputs, outputs) -> None:
        self.hidden[layer] = outputs[0].flatten(1, 2)  # [b f s e] -> [b l e]

    def forward(self, x_t: Tensor, t: float | Tensor, cond) -> Tensor:
        self.backbone(x_t, t, cond)
        attend = partial(self.backbone.attention, layer=None)
        tokens = [reader(self.hidden.pop(i), attend) for i, reader in zip(self.layers, self.readers, strict=True)]
        return self.head(torch.cat(tokens, dim=-1))[:, 0].float()
