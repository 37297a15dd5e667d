"""Solutions of lesson 13: the core itself, where it has the function."""

import torch

from attention_maps import attention_mass, mean_logits, sink_score

__all__ = [
    "attention_mass",
    "frame_map",
    "hidden_from",
    "mass_without",
    "mean_logits",
    "sink_score",
    "streamed_attention",
]


def frame_map(q, k, tokens_per_frame):
    scores = torch.einsum("blnd,bmnd->bnlm", q, k) / q.shape[-1] ** 0.5
    weights = scores.softmax(-1).unflatten(-1, (-1, tokens_per_frame)).unflatten(2, (-1, tokens_per_frame))
    return weights.sum(-1).mean((0, 3))  # [b n Q s K g] -> [n Q K]


def mass_without(mass, hidden):
    left = mass.clone()
    left[..., hidden] = 0
    return left / left.sum(-1, keepdim=True)


def hidden_from(attention, layer, head, num_tokens):
    wanted = layer

    def attend(q, k, v, *, mask=None, layer=None, kind=None):
        y = attention(q, k, v, mask=mask, layer=layer, kind=kind)
        if kind != "self" or layer != wanted or mask is not None or k.shape[1] <= num_tokens:
            return y
        part = [q[:, :, head, None], *(x[:, num_tokens:, head, None] for x in (k, v))]
        y = y.clone()
        y[:, :, head, None] = attention(*part, layer=layer, kind=kind)
        return y

    return attend


def streamed_attention(q, k, v, chunk):
    """What was summed under an old maximum is worth exp(old - new) under a new one."""
    highest = q.new_full(q.shape[:3], -torch.inf)  # [b l n]
    total, y = torch.zeros_like(highest), torch.zeros_like(q)
    for keys, values in zip(k.split(chunk, 1), v.split(chunk, 1), strict=True):
        scores = torch.einsum("blnd,bmnd->blnm", q, keys) / q.shape[-1] ** 0.5
        now = torch.maximum(highest, scores.amax(-1))
        weights, faded = (scores - now[..., None]).exp(), (highest - now).exp()
        total = total * faded + weights.sum(-1)
        y = y * faded[..., None] + torch.einsum("blnm,bmnd->blnd", weights, values)
        highest = now
    return y / total[..., None], highest + total.log()
