"""Graders of lesson 13. `make grade LESSON=13`; each message says which idea is missing."""

import torch
from torch.overrides import TorchFunctionMode

from tiny_causal_wan import FrameMask, sdpa_attention


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def queries_and_keys(frames=3, seen=5, tokens=4, heads=2, width=8, batch=2):
    """q [b (F s) n d] and k [b (K s) n d], peaked enough for mass to differ from means."""
    q, k = draw(batch, frames * tokens, heads, width), draw(batch, seen * tokens, heads, width, seed=1)
    return 2 * q, 2 * k


def weights_of(q, k):
    """Attention weights [b n l m] by their definition."""
    return (torch.einsum("blnd,bmnd->bnlm", q, k) / q.shape[-1] ** 0.5).softmax(-1)


class Largest(TorchFunctionMode):
    """The number of entries of the largest tensor that a function of torch made inside."""

    entries = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else (made,):
            if isinstance(x, torch.Tensor):
                self.entries = max(self.entries, x.numel())
        return made


def test_rows_sum_to_one(frame_map):
    q, k = queries_and_keys()
    mass = frame_map(q, k, 4).float()
    assert [*mass.shape] == [2, 3, 5], f"Three frames look at five, two heads: [2, 3, 5]; yours is {[*mass.shape]}."
    assert torch.allclose(mass.sum(-1), torch.ones(2, 3), atol=1e-5), (
        "Every frame that looks shares out a mass of 1. Sum over the tokens that are looked at, average over those "
        "that look; a mean over both loses a factor of the tokens per frame."
    )


def test_it_is_the_softmax_over_all_tokens(frame_map):
    q, k = queries_and_keys()
    mass, weights = frame_map(q, k, 4).float(), weights_of(q, k)
    for head, i, j in [(0, 0, 0), (1, 2, 4), (0, 1, 3)]:
        right = weights[:, head, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].sum(-1).mean()
        assert torch.isclose(mass[head, i, j], right, atol=1e-5), (
            "A query's softmax of q k / sqrt(d) runs over all tokens of all frames; its weights are then "
            "summed over a frame. A softmax of the frames' mean logits is something else: inside a frame a few tokens "
            "can take it all."
        )


def test_one_loud_token_draws_all(frame_map):
    q, k = torch.ones(1, 4, 1, 4), torch.zeros(1, 8, 1, 4)
    k[:, 5] = 20.0
    got = [round(x, 3) for x in frame_map(q, k, 4)[0, 0].tolist()]
    assert got[1] > 0.99, (
        f"One token of the second frame matches every query, so that frame has all the mass; yours is {got}."
    )


def groups(frames=3, seen=4, tokens=5, heads=2, width=8, batch=2):
    return 2 * draw(batch, frames, tokens, heads, width), 2 * draw(batch, seen, tokens + 1, heads, width, seed=1)


def test_it_is_a_mean_over_pairs(mean_logits):
    q, k = groups()
    logits = torch.einsum("bisnd,bjgnd->nbijsg", q, k) / 8**0.5
    got = mean_logits(q, k).float()
    assert [*got.shape] == [2, 3, 4], f"[n, Q, K] = [2, 3, 4], yours is {[*got.shape]}."
    assert torch.allclose(got, logits.mean((1, 4, 5)), atol=1e-5), (
        "The mean of q k / sqrt(d) over samples and over all pairs of a query and a key token. Samples stay apart "
        "until the products are made: a mean over the batch before that mixes clips."
    )


def test_a_mean_needs_no_table(mean_logits):
    q, k = draw(1, 4, 50, 1, 4), draw(1, 4, 50, 1, 4, seed=1)
    with Largest() as largest:
        mean_logits(q, k)
    assert largest.entries <= 50 * 50, (
        f"A tensor of {largest.entries:,} entries was made of 200 x 200 tokens. The mean over all pairs of a product "
        "is the product of the means: average queries and keys over their frames first."
    )


def naive_mass(q, k, sees):
    scores = torch.einsum("bisnd,bjgnd->bnisjg", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~sees[:, None, :, None], -torch.inf)
    weights = scores.flatten(-2).softmax(-1).unflatten(-1, scores.shape[-2:])
    return weights.sum(-1).mean((0, 3))


def test_it_is_the_naive_mass(attention_mass):
    q, k = groups()
    sees = torch.ones(3, 4, dtype=torch.bool)
    got = attention_mass(q, k, sees).float()
    assert torch.allclose(got, naive_mass(q, k, sees), atol=1e-5), (
        "Where all is seen this is the map of `frame_map`. A frame's share for one query is exp(logsumexp of its "
        "logits - logsumexp of all), so a softmax over the frames' logsumexps, query by query; then "
        "average over queries."
    )


def test_what_is_not_seen_takes_no_part(attention_mass):
    q, k = groups()
    sees = torch.tensor([[True, False, False, False], [True, False, True, False], [True, True, True, True]])
    got = attention_mass(q, k, sees).float()
    assert not got[:, ~sees].any(), "What is not seen has a mass of exactly 0."
    assert torch.allclose(got, naive_mass(q, k, sees), atol=1e-5), (
        "What is not seen must be left out before the softmax: the others share its mass, and every row sums to 1."
    )


def test_large_logits_do_no_harm(attention_mass):
    q, k = groups()
    sees = torch.ones(3, 4, dtype=torch.bool)
    got = attention_mass(30 * q, 30 * k, sees).float()
    assert got.isfinite().all() and torch.allclose(got.sum(-1), torch.ones(2, 3), atol=1e-4), (
        "With large logits yours overflows. exp of a sum of exps is what logsumexp is for: take the maximum out first."
    )


def test_its_memory_does_not_grow_with_the_keys(attention_mass):
    q, k = draw(1, 2, 40, 1, 4), draw(1, 12, 40, 1, 4, seed=1)
    sees = torch.ones(2, 12, dtype=torch.bool)
    with Largest() as largest:
        attention_mass(q, k, sees)
    assert largest.entries <= 2 * 40 * 40, (
        f"A tensor of {largest.entries:,} entries was made; one frame of queries times one frame of keys is 1,600. "
        "Look at the frames of keys one after the other and keep one number per query and frame."
    )


SIZES = [2, 2, 2]


def test_it_is_oldest_minus_the_others(sink_score):
    rows = torch.tensor([[0.4, 0.1, 0.1, 0.1, 0.15, 0.15], [0.1, 0.1, 0.1, 0.1, 0.3, 0.3]])
    got = torch.as_tensor(sink_score(rows, SIZES)).float()
    assert [*got.shape] == [2], f"One number per head, [2]; yours is {[*got.shape]}."
    assert torch.allclose(got, torch.tensor([0.3, 0.0]), atol=1e-6), (
        f"Frame 0 minus the mean of frames 1 to 3: 0.3 and 0 here, yours {[round(x, 3) for x in got.tolist()]}. The "
        "last block's own frames, 4 and 5, are no past."
    )


def test_the_evicted_do_not_count(sink_score):
    rows = torch.tensor([[0.0, 0.0, 0.3, 0.1, 0.3, 0.3]])
    got = sink_score(rows, SIZES).item()
    assert abs(got - 0.2) < 1e-6, (
        f"Frames 0 and 1 were evicted: the oldest that is seen is 2, the only other one 3, so 0.2; yours {got:.3g}. "
        "Zeros of frames that nobody sees would draw the mean down."
    )
    gap = sink_score(torch.tensor([[0.4, 0.0, 0.2, 0.1, 0.15, 0.15]]), SIZES).item()
    assert abs(gap - 0.25) < 1e-6, f"With a sink, frame 1 alone may be missing: 0.4 - (0.2 + 0.1) / 2, yours {gap:.3g}."


def test_logits_are_compared_too(sink_score):
    rows = torch.tensor([[-torch.inf, 1.0, -2.0, 0.5, 5.0, 5.0]])
    got = sink_score(rows, SIZES).item()
    assert abs(got - 1.75) < 1e-6, f"In logits -inf is what is not seen: 1 - (-2 + 0.5) / 2 = 1.75, yours {got:.3g}."


def test_one_frame_is_no_comparison(sink_score):
    got = torch.as_tensor(sink_score(torch.tensor([[0.0, 0.0, 0.0, 0.4, 0.3, 0.3]]), SIZES))
    assert got.isnan().all(), "With one past frame there is nothing to compare with: NaN, not 0, not the frame itself."


def test_the_rest_shares_what_was_hidden(mass_without):
    got = mass_without(torch.tensor([0.5, 0.3, 0.2]), [0]).float()
    assert got.shape == (3,), "Hidden frames keep their column, with a mass of 0: the others stay where they are."
    assert torch.allclose(got, torch.tensor([0.0, 0.6, 0.4])), (
        f"With the first of 0.5, 0.3, 0.2 hidden, the others become 0.6 and 0.4: in proportion, not in equal parts; "
        f"yours {[round(x, 3) for x in got.tolist()]}."
    )


def test_it_is_exact_for_one_query(mass_without):
    q, k = draw(1, 1, 1, 8), draw(1, 24, 1, 8, seed=1)
    whole = weights_of(q, k)[0, 0, 0].reshape(6, 4).sum(-1)
    kept = torch.cat([k[:, :4], k[:, 12:]], dim=1)
    right = weights_of(q, kept)[0, 0, 0].reshape(4, 4).sum(-1)
    got = mass_without(whole, [1, 2]).float()
    assert got.shape == (6,) and torch.allclose(got[[0, 3, 4, 5]], right, atol=1e-5) and not got[[1, 2]].any(), (
        "For one query, a softmax without some keys is the old one divided by what is left of its sum."
    )


def test_every_row_by_itself(mass_without):
    mass = draw(2, 3, 5).softmax(-1)
    kept = mass.clone()
    got = mass_without(mass, [0, 4]).float()
    assert [*got.shape] == [2, 3, 5] and torch.allclose(got.sum(-1), torch.ones(2, 3), atol=1e-6), (
        "A map [heads, F, F] works too: each row sums to 1 again."
    )
    assert torch.equal(mass, kept), "The map that was given has been changed: work on a copy."


def reference(q, k, v, *, mask=None, layer=None, kind=None):
    return sdpa_attention(q, k, v, mask=mask)


def qkv(tokens=6, keys=10, heads=3):
    q = draw(2, tokens, heads, 4)
    k, v = draw(2, 2, keys, heads, 4, seed=1)
    return q, k, v


def test_that_head_does_not_see_them(hidden_from):
    q, k, v = qkv()
    got = hidden_from(reference, 4, 1, 3)(q, k, v, layer=4, kind="self")
    weights = weights_of(q[:, :, 1:2], k[:, 3:, 1:2])
    right = torch.einsum("bnlm,bmnd->blnd", weights, v[:, 3:, 1:2])
    assert torch.allclose(got[:, :, 1:2], right, atol=1e-5), (
        "Head 1 of layer 4 should attend to keys 3 to 9 alone. Its softmax is over those: setting values, or what "
        "comes out, to zero is another intervention."
    )


def test_nobody_else_notices(hidden_from):
    q, k, v = qkv()
    changed, right = hidden_from(reference, 4, 1, 3), reference(q, k, v)
    for options in ({"layer": 3, "kind": "self"}, {"layer": 4, "kind": "cross"}):
        assert torch.equal(changed(q, k, v, **options), right), f"A call with {options} is not meant: leave it alone."
    got = changed(q, k, v, layer=4, kind="self")
    assert torch.equal(got[:, :, [0, 2]], right[:, :, [0, 2]]), "The other heads of that layer see what they saw."


def test_masked_and_short_calls_are_left_alone(hidden_from):
    mask = FrameMask((1, 2), 2)
    q, k, v = qkv(keys=6)
    changed = hidden_from(reference, 4, 1, 2)
    got = changed(q, k, v, mask=mask, layer=4, kind="self")
    assert torch.equal(got, reference(q, k, v, mask=mask)), (
        "A masked call goes through as it is, with its mask: hand `mask` on."
    )
    whole = hidden_from(reference, 4, 1, 6)(q, k, v, layer=4, kind="self")
    assert torch.equal(whole, reference(q, k, v)), (
        "If no key would be left, as in the first block, that has no past, the call is left alone; a softmax over "
        "nothing is NaN."
    )


def test_it_calls_the_attention_that_it_was_given(hidden_from):
    calls = []

    def noted(q, k, v, *, mask=None, layer=None, kind=None):
        calls.append((layer, kind))
        return reference(q, k, v, mask=mask)

    hidden_from(noted, 4, 1, 3)(*qkv(), layer=2, kind="cross")
    assert calls == [(2, "cross")], (
        "Other calls go to the function that was given, with layer and kind: it may be a fast kernel, or somebody who "
        f"looks on. It was called {len(calls)} times, with {calls}."
    )


def test_it_is_attention(streamed_attention):
    q, k, v = qkv(keys=11)
    right = torch.einsum("bnlm,bmnd->blnd", weights_of(q, k), v)
    for chunk in (50, 11, 4, 1):
        got = streamed_attention(q, k, v, chunk)[0].float()
        assert chunk < 11 or torch.allclose(got, right, atol=1e-5), (
            f"With all 11 keys in one chunk it should be softmax(q k^T / sqrt(d)) v; it is off by "
            f"{(got - right).abs().max():.2g}."
        )
        assert torch.allclose(got, right, atol=1e-5), (
            f"With chunks of {chunk} the output is off by {(got - right).abs().max():.2g}. When a new chunk brings a "
            "new maximum, sum and output so far are worth exp(old maximum - new maximum) of what they were."
        )


def test_it_returns_the_logsumexp(streamed_attention):
    q, k, v = qkv(keys=11)
    right = (torch.einsum("blnd,bmnd->blnm", q, k) / 2).logsumexp(-1)
    got = streamed_attention(q, k, v, 4)[1].float()
    assert [*got.shape] == [2, 6, 3] and torch.allclose(got, right, atol=1e-5), (
        "The logsumexp of a query's logits, [b l n], is the running maximum plus the log of the running sum."
    )


def test_it_is_stable(streamed_attention):
    q, k, v = qkv(keys=11)
    order = torch.einsum("blnd,bmnd->bmln", q, k).mean((0, 2, 3)).argsort()
    got, total = (x.float() for x in streamed_attention(60 * q, 60 * k[:, order], v[:, order], 3))
    right = torch.einsum("bnlm,bmnd->blnd", weights_of(60 * q, 60 * k[:, order]), v[:, order])
    assert got.isfinite().all() and total.isfinite().all() and torch.allclose(got, right, atol=1e-3), (
        "With logits in the thousands yours overflows or loses its sum: subtract the largest logit so far before exp."
    )


def test_no_chunk_is_kept(streamed_attention):
    q, k, v = draw(1, 10, 1, 4), draw(1, 400, 1, 4, seed=1), draw(1, 400, 1, 4, seed=2)
    with Largest() as largest:
        streamed_attention(q, k, v, 20)
    assert largest.entries <= 10 * 20 * 2 or largest.entries == 400 * 4, (
        f"A tensor of {largest.entries:,} entries was made; ten queries times a chunk of 20 keys are 200. Do not "
        "collect the chunks' logits, use them up."
    )
