"""Lesson 13: wrong and right answers."""

import torch

from attention_maps import attention_mass as core_mass
from tiny_causal_wan import sdpa_attention
from tutorial.lesson_13_attention import solutions

# ------------------------------------------------------------------------------------------------------------- maps


def framed(x, tokens):
    return x.unflatten(1, (-1, tokens))


def softmax_of_means(q, k, tokens_per_frame):
    logits = solutions.mean_logits(framed(q, tokens_per_frame), framed(k, tokens_per_frame))
    return logits.softmax(-1)


def mean_of_everything(q, k, tokens_per_frame):
    return solutions.frame_map(q, k, tokens_per_frame) / tokens_per_frame


def unscaled(q, k, tokens_per_frame):
    return solutions.frame_map(q * q.shape[-1] ** 0.5, k, tokens_per_frame)


def softmax_over_queries(q, k, tokens_per_frame):
    return solutions.frame_map(k, q, tokens_per_frame).mT


def through_the_values(q, k, tokens_per_frame):
    """Attention to values that say from which frame they are is the mass."""
    frames = k.shape[1] // tokens_per_frame
    values = torch.eye(frames).repeat_interleave(tokens_per_frame, 0)[None, :, None].expand(len(k), -1, k.shape[2], -1)
    y = sdpa_attention(q, k, values.contiguous())  # [b l n K]
    return framed(y, tokens_per_frame).mean((0, 2)).movedim(1, 0)


# ------------------------------------------------------------------------------------------------------ mean logits


def makes_the_table(q, k):
    return torch.einsum("bisnd,bjgnd->nijbsg", q, k).mean((3, 4, 5)) / q.shape[-1] ** 0.5


def forgets_the_width(q, k):
    return solutions.mean_logits(q, k) * q.shape[-1] ** 0.5


def means_over_samples_first(q, k):
    return solutions.mean_logits(q.mean(0, keepdim=True), k.mean(0, keepdim=True))


def sums(q, k):
    return solutions.mean_logits(q, k) * q.shape[2] * k.shape[2]


def head_by_head(q, k):
    q, k = q.double().mean(2) / q.shape[-1] ** 0.5, k.double().mean(2)
    return torch.stack([(q[:, :, n] @ k[:, :, n].mT).mean(0) for n in range(q.shape[2])])


# -------------------------------------------------------------------------------------------------------- streaming


def collects_all_logits(q, k, sees):
    scores = torch.einsum("bisnd,bjgnd->bnisjg", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~sees[:, None, :, None], -torch.inf)
    return scores.logsumexp(-1).softmax(-1).mean((0, 3))


def masks_afterwards(q, k, sees):
    return core_mass(q, k, torch.ones_like(sees)) * sees


def averages_too_early(q, k, sees):
    """Logsumexps averaged over queries, and one softmax for all of them."""
    totals = torch.stack([frame_totals(q, k[:, j]).mean((0, 3)) for j in range(k.shape[1])], dim=-1)  # [n Q K]
    return totals.masked_fill(~sees, -torch.inf).softmax(-1)


def no_maximum(q, k, sees):
    sums = torch.stack([frame_logits(q, k[:, j]).exp().sum(-1) for j in range(k.shape[1])], dim=-1)  # [b n Q s K]
    sums = sums * sees[:, None]
    return (sums / sums.sum(-1, keepdim=True)).mean((0, 3))


def frame_logits(q, keys):
    """[b n Q s g] of q [b Q s n d] and one frame's keys [b g n d]."""
    return torch.einsum("bisnd,bgnd->bnisg", q, keys) / q.shape[-1] ** 0.5


def frame_totals(q, keys):
    return frame_logits(q, keys).logsumexp(-1)


def running_sums(q, k, sees):
    """One frame of queries and one of keys at a time, with a maximum that is carried along."""
    rows = []
    for i, row in enumerate(sees):
        totals = [frame_totals(q[:, i, None], k[:, j])[:, :, 0] for j in range(k.shape[1]) if row[j]]  # [b n s]
        highest = torch.stack(totals).amax(0)
        parts = [(total - highest).exp() for total in totals]
        whole = sum(parts)
        shares = iter([(part / whole).mean((0, 2)) for part in parts])
        rows.append(torch.stack([next(shares) if seen else torch.zeros(q.shape[3]) for seen in row], dim=-1))
    return torch.stack(rows, dim=1)


# -------------------------------------------------------------------------------------------------------- sink score


def counts_its_own_block(last_block, block_sizes):
    return last_block[:, 0] - last_block[:, 1:].mean(1)


def counts_the_evicted(last_block, block_sizes):
    past = last_block[:, : sum(block_sizes[:-1])]
    return past[:, 0] - past[:, 1:].mean(1)


def share_of_the_oldest(last_block, block_sizes):
    past = last_block[:, : sum(block_sizes[:-1])]
    return past[:, (past != 0).any(0)][:, 0]


def nothing_for_nan(last_block, block_sizes):
    return solutions.sink_score(last_block, block_sizes).nan_to_num(0.0)


def row_by_row(last_block, block_sizes):
    scores = []
    for row in last_block:
        past = [x for x in row[: len(row) - block_sizes[-1]].tolist() if x not in (0.0, float("-inf"))]
        others = past[1:]
        scores.append(past[0] - sum(others) / len(others) if others else float("nan"))
    return torch.tensor(scores)


# ------------------------------------------------------------------------------------------------------- prediction


def equal_parts(mass, hidden):
    left = mass.clone()
    left[..., hidden] = 0
    others = [i for i in range(mass.shape[-1]) if i not in hidden]
    left[..., others] += mass[..., hidden].sum(-1, keepdim=True) / len(others)
    return left


def only_zeros(mass, hidden):
    left = mass.clone()
    left[..., hidden] = 0
    return left


def takes_them_out(mass, hidden):
    kept = [i for i in range(mass.shape[-1]) if i not in hidden]
    return mass[..., kept] / mass[..., kept].sum(-1, keepdim=True)


def in_place(mass, hidden):
    mass[..., hidden] = 0
    mass /= mass.sum(-1, keepdim=True)
    return mass


def by_logits(mass, hidden):
    logits = mass.log()
    keep = torch.ones(mass.shape[-1], dtype=torch.bool)
    keep[list(hidden)] = False
    return logits.where(keep, -torch.inf).softmax(-1)


# ------------------------------------------------------------------------------------------------------ intervention


def hides_from_all_heads(attention, layer, head, num_tokens):
    def attend(q, k, v, *, mask=None, **where):
        if where == {"layer": layer, "kind": "self"} and mask is None and k.shape[1] > num_tokens:
            k, v = k[:, num_tokens:], v[:, num_tokens:]
        return attention(q, k, v, mask=mask, **where)

    return attend


def silences(attention, layer, head, num_tokens):
    """Sets what the head says to zero."""

    def attend(q, k, v, *, mask=None, **where):
        y = attention(q, k, v, mask=mask, **where).clone()
        if where == {"layer": layer, "kind": "self"} and mask is None and k.shape[1] > num_tokens:
            y[:, :, head] = 0
        return y

    return attend


def zero_keys(attention, layer, head, num_tokens):
    """A key of zeros has a logit of zero, which is no mask."""

    def attend(q, k, v, *, mask=None, **where):
        if where == {"layer": layer, "kind": "self"} and mask is None and k.shape[1] > num_tokens:
            k, v = k.clone(), v.clone()
            k[:, :num_tokens, head] = v[:, :num_tokens, head] = 0
        return attention(q, k, v, mask=mask, **where)

    return attend


def in_every_layer(attention, layer, head, num_tokens):
    def attend(q, k, v, *, mask=None, **where):
        return solutions.hidden_from(attention, where.get("layer"), head, num_tokens)(q, k, v, mask=mask, **where)

    return attend


def forgets_the_first_block(attention, layer, head, num_tokens):
    def attend(q, k, v, *, mask=None, **where):
        y = attention(q, k, v, mask=mask, **where)
        if where == {"layer": layer, "kind": "self"} and mask is None:
            y = y.clone()
            y[:, :, head, None] = attention(
                q[:, :, head, None], k[:, num_tokens:, head, None], v[:, num_tokens:, head, None]
            )
        return y

    return attend


def with_a_bias(attention, layer, head, num_tokens):
    def attend(q, k, v, *, mask=None, **where):
        usual = attention(q, k, v, mask=mask, **where)
        if where.get("layer") != layer or where.get("kind") != "self" or mask is not None or k.shape[1] <= num_tokens:
            return usual
        bias = torch.zeros(k.shape[1])
        bias[:num_tokens] = -torch.inf
        scores = torch.einsum("bld,bmd->blm", q[:, :, head], k[:, :, head]) / q.shape[-1] ** 0.5 + bias
        heads = list(usual.unbind(2))
        heads[head] = scores.softmax(-1) @ v[:, :, head]
        return torch.stack(heads, dim=2)

    return attend


# -------------------------------------------------------------------------------------------------- streamed attention


def last_chunk_wins(q, k, v, chunk):
    """Each chunk's own softmax, and the mean of the results."""
    parts = [sdpa_attention(q, a, b) for a, b in zip(k.split(chunk, 1), v.split(chunk, 1), strict=True)]
    return sum(parts) / len(parts), (torch.einsum("blnd,bmnd->blnm", q, k) / q.shape[-1] ** 0.5).logsumexp(-1)


def without_a_maximum(q, k, v, chunk):
    total, y = 0, 0
    for a, b in zip(k.split(chunk, 1), v.split(chunk, 1), strict=True):
        weights = (torch.einsum("blnd,bmnd->blnm", q, a) / q.shape[-1] ** 0.5).exp()
        total, y = total + weights.sum(-1), y + torch.einsum("blnm,bmnd->blnd", weights, b)
    return y / total[..., None], total.log()


def forgets_to_fade(q, k, v, chunk):
    """A new maximum, and the old sums as they were."""
    highest, total, y = torch.full(q.shape[:3], -torch.inf), 0, 0
    for a, b in zip(k.split(chunk, 1), v.split(chunk, 1), strict=True):
        scores = torch.einsum("blnd,bmnd->blnm", q, a) / q.shape[-1] ** 0.5
        highest = torch.maximum(highest, scores.amax(-1))
        weights = (scores - highest[..., None]).exp()
        total, y = total + weights.sum(-1), y + torch.einsum("blnm,bmnd->blnd", weights, b)
    return y / total[..., None], highest + total.log()


def all_at_once(q, k, v, chunk):
    scores = torch.einsum("blnd,bmnd->blnm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("blnm,bmnd->blnd", scores.softmax(-1), v), scores.logsumexp(-1)


def merged_softmaxes(q, k, v, chunk):
    """Two finished parts are merged by their logsumexps, in float64."""
    q, k, v, y, total = q.double(), k.double(), v.double(), None, None
    for a, b in zip(k.split(chunk, 1), v.split(chunk, 1), strict=True):
        part, own = all_at_once(q, a, b, chunk)
        if y is None:
            y, total = part, own
            continue
        whole = torch.logaddexp(total, own)
        y = y * (total - whole).exp()[..., None] + part * (own - whole).exp()[..., None]
        total = whole
    return y, total


WRONG = {
    "frame_map": [softmax_of_means, mean_of_everything, unscaled, softmax_over_queries],
    "mean_logits": [makes_the_table, forgets_the_width, means_over_samples_first, sums],
    "attention_mass": [collects_all_logits, masks_afterwards, averages_too_early, no_maximum],
    "sink_score": [counts_its_own_block, counts_the_evicted, share_of_the_oldest, nothing_for_nan],
    "mass_without": [equal_parts, only_zeros, takes_them_out, in_place],
    "hidden_from": [hides_from_all_heads, silences, zero_keys, in_every_layer, forgets_the_first_block],
    "streamed_attention": [last_chunk_wins, without_a_maximum, forgets_to_fade, all_at_once],
}
RIGHT = {
    "frame_map": through_the_values,
    "mean_logits": head_by_head,
    "attention_mass": running_sums,
    "sink_score": row_by_row,
    "mass_without": by_logits,
    "hidden_from": with_a_bias,
    "streamed_attention": merged_softmaxes,
}
