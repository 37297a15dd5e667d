"""Exercises of lesson 13. README.md says what each wants; `make grade LESSON=13` says how far you are."""

from tutorial.grading import todo


def frame_map(q, k, tokens_per_frame):
    """How much each frame of queries looks at each frame of keys: softmax mass [n, Q, K], rows sum to 1.

    q [b l n d], k [b m n d], tokens frame by frame. A query's weights are summed over the tokens of a frame of keys;
    the sums are averaged over the queries of a frame and over samples. Every key is seen.
    """
    todo("sum attention weights over the frames that are looked at, and average over those that look.")


def mean_logits(q, k):
    """q k^T / sqrt(d), a mean over the pairs of a query of group i and a key of group j, and over samples: [n, Q, K].

    q [b, Q, s, n, d], k [b, K, g, n, d]. No table of queries by keys is made.
    """
    todo("average before you multiply.")


def attention_mass(q, k, sees):
    """The mass of `frame_map` without its table: [n, Q, K] of q [b, Q, s, n, d] and k [b, K, g, n, d].

    sees: bool [Q, K], which group sees which; what is not seen is exactly 0. Never more than one group of queries times
    one group of keys at a time.
    """
    todo("look at one frame of keys at a time, and remember only the logsumexp.")


def sink_score(last_block, block_sizes):
    """How much more the last block looks at the oldest past frame that it sees than, on average, at the other ones.

    last_block [n, F]: mass or mean logits; 0 or -inf where a frame is not seen. block_sizes: the last one is the
    block's own, which is no past. One number per head, [n]; NaN where it sees fewer than two past frames.
    """
    todo("compare the oldest frame with the rest of the past.")


def mass_without(mass, hidden):
    """The mass [..., F] that would be left if the frames `hidden` (a list of indices) were masked, by the map alone.

    Exact for the row of a single query; for rows that are means over queries, a prediction.
    """
    todo("share out what the hidden frames had.")


def hidden_from(attention, layer, head, num_tokens):
    """An attention function like `attention`, but one head of one self-attention does not see the first keys.

    attention(q, k, v, *, mask=None, layer=None, kind=None) -> [b l n d] is that of the model. In a call with kind
    "self", no mask and this layer, `head` sees keys num_tokens and later only; all else is as it was. A call with
    no key left after those is left alone too.
    """
    todo("put your own function between the model and its attention.")


def streamed_attention(q, k, v, chunk):
    """softmax(q k^T / sqrt(d)) v on [b l n d], and the logsumexp of each query's logits [b l n].

    One pass over the keys: takes `chunk` of them at a time (the last may be fewer), and never makes anything larger
    than queries times chunk or queries times d.
    """
    todo("keep a running maximum, a running sum and a running output.")
