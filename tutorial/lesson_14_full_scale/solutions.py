"""Solutions of lesson 14: the core itself, where it has the function."""

import torch

from full_scale.plan import Work, forward_flops
from full_scale.wan import without_wrappers

__all__ = ["call_flops", "online_attention", "parts_per_gpu", "training_bytes", "without_wrappers"]


def training_bytes(parameters, gpus, gpus_per_node=8, sharding="full"):
    """Weight, gradient, two moments and the average: five float32 numbers for every parameter."""
    shards = gpus if sharding == "full" else min(gpus, gpus_per_node)
    return 5 * 4 * parameters / shards


def call_flops(config, tokens, past_tokens=0):
    """The planner's count, without what is around the layers."""
    task = Work(config, calls=1, frames=1, tokens=tokens, past=past_tokens, pairs=tokens * (tokens + past_tokens))
    parts = forward_flops(task)
    return float(parts["linear layers"] + parts["self-attention"] + parts["cross-attention"])


def parts_per_gpu(batch, gpus, micro_batch=1, sequence_parallel=1):
    if gpus % sequence_parallel:
        raise ValueError(f"{gpus} GPUs do not split into groups of {sequence_parallel}.")
    at_once = gpus // sequence_parallel * micro_batch
    if batch % at_once:
        below = batch // at_once * at_once
        raise ValueError(f"A batch of {batch} is not a whole number of {at_once}: use {below or at_once}.")
    return batch // at_once


def online_attention(q, k, v, *, mask=None, layer=None, kind=None, chunk=128):
    """Keys come in chunks. Of those seen so far it keeps, for every query, the largest score, the sum of exponentials
    and the weighted sum of values; a larger score scales the two sums down."""
    dtype = v.dtype
    q, k, v = (x.to(dtype).transpose(1, 2).float() for x in (q, k, v))  # [b n l d]
    allowed = None if mask is None else mask.tokens(q.device)
    largest = q.new_full((*q.shape[:-1], 1), float("-inf"))
    total, out = torch.zeros_like(largest), torch.zeros_like(q)
    for first in range(0, k.shape[2], chunk):
        part = slice(first, first + chunk)
        scores = q @ k[:, :, part].mT / q.shape[-1] ** 0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, part], float("-inf"))
        new = torch.maximum(largest, scores.amax(-1, keepdim=True))
        safe = new.masked_fill(new == float("-inf"), 0)  # a query that has seen nothing yet
        weights, keep = (scores - safe).exp(), (largest - safe).exp()
        total, out = keep * total + weights.sum(-1, keepdim=True), keep * out + weights @ v[:, :, part]
        largest = new
    return (out / total).transpose(1, 2).to(dtype)
