"""Lesson 14: wrong and right answers."""

import torch

from full_scale.wan import WRAPPERS
from tiny_causal_wan import matmul_attention
from tutorial.lesson_14_full_scale import solutions


def weights_alone(parameters, gpus, gpus_per_node=8, sharding="full"):
    return solutions.training_bytes(parameters, gpus, gpus_per_node, sharding) / 5


def forgets_the_average(parameters, gpus, gpus_per_node=8, sharding="full"):
    return solutions.training_bytes(parameters, gpus, gpus_per_node, sharding) * 4 / 5


def hybrid_over_nodes(parameters, gpus, gpus_per_node=8, sharding="full"):
    return 20 * parameters / (gpus if sharding == "full" else max(1, gpus // gpus_per_node))


def always_a_whole_node(parameters, gpus, gpus_per_node=8, sharding="full"):
    return 20 * parameters / (gpus if sharding == "full" else gpus_per_node)


def line_by_line(parameters, gpus, gpus_per_node=8, sharding="full"):
    held = {"weights": 4, "gradients": 4, "first moments": 4, "second moments": 4, "average": 4}
    owners = {"full": gpus, "hybrid": gpus_per_node if gpus > gpus_per_node else gpus}[sharding]
    return sum(parameters * size / owners for size in held.values())


def multiplications_alone(config, tokens, past_tokens=0):
    return solutions.call_flops(config, tokens, past_tokens) / 2


def forgets_the_past(config, tokens, past_tokens=0):
    return solutions.call_flops(config, tokens)


def makes_the_past_again(config, tokens, past_tokens=0):
    return solutions.call_flops(config, tokens + past_tokens)


def forgets_the_prompt(config, tokens, past_tokens=0):
    e = config.dim
    layer = 2 * tokens * e * (6 * e + 2 * config.ffn_dim) + 4 * tokens * (tokens + past_tokens) * e
    return config.num_layers * layer


def prompt_as_long_as_the_video(config, tokens, past_tokens=0):
    """Sends the video's tokens through all four maps of the cross-attention."""
    e = config.dim
    layer = 2 * tokens * e * (8 * e + 2 * config.ffn_dim) + 4 * tokens * (tokens + past_tokens + config.text_len) * e
    return config.num_layers * layer


def times_heads(config, tokens, past_tokens=0):
    pairs = 4 * config.num_layers * tokens * (tokens + past_tokens) * config.dim
    return solutions.call_flops(config, tokens, past_tokens) + (config.num_heads - 1) * pairs


def one_layer(config, tokens, past_tokens=0):
    return solutions.call_flops(config, tokens, past_tokens) / config.num_layers


def map_by_map(config, tokens, past_tokens=0):
    width, prompt, head = config.dim, config.text_len, config.dim // config.num_heads

    def product(a, b, c):
        return 2 * a * b * c

    maps = {"q": tokens, "k": tokens, "v": tokens, "o": tokens, "cross q": tokens, "cross o": tokens}
    maps |= {"cross k": prompt, "cross v": prompt}
    total = sum(product(rows, width, width) for rows in maps.values())
    total += product(tokens, width, config.ffn_dim) + product(tokens, config.ffn_dim, width)
    for keys in (tokens + past_tokens, prompt):
        scores, weighted = product(tokens, head, keys), product(tokens, keys, head)
        total += config.num_heads * (scores + weighted)
    return total * config.num_layers


def rounds_up(batch, gpus, micro_batch=1, sequence_parallel=1):
    return -(-batch * sequence_parallel // (gpus * micro_batch))


def forgets_neighbours(batch, gpus, micro_batch=1, sequence_parallel=1):
    return solutions.parts_per_gpu(batch, gpus, micro_batch)


def says_no_more(batch, gpus, micro_batch=1, sequence_parallel=1):
    groups = gpus // sequence_parallel
    if batch % (groups * micro_batch) or gpus % sequence_parallel:
        raise ValueError("does not divide")
    return batch // (groups * micro_batch)


def names_what_was_given(batch, gpus, micro_batch=1, sequence_parallel=1):
    try:
        return says_no_more(batch, gpus, micro_batch, sequence_parallel)
    except ValueError:
        raise ValueError(f"a batch of {batch} does not divide among {gpus} GPUs") from None


def videos_of_a_gpu(batch, gpus, micro_batch=1, sequence_parallel=1):
    return micro_batch * solutions.parts_per_gpu(batch, gpus, micro_batch, sequence_parallel)


def by_division(batch, gpus, micro_batch=1, sequence_parallel=1):
    groups, left = divmod(gpus, sequence_parallel)
    if left:
        raise ValueError(f"use {gpus - left} GPUs")
    rounds, over = divmod(batch, groups * micro_batch)
    if over:
        raise ValueError(f"use a batch of {batch - over + groups * micro_batch}")
    return rounds


def prefixes_alone(state_dict, source):
    found = {}
    for name, x in state_dict.items():
        while name.split(".")[0] in {*WRAPPERS, "model"}:
            name = name.partition(".")[2]
        if name in found:
            raise ValueError(f"{source}: {name} twice")
        found[name] = x
    return found


def replaces_anywhere(state_dict, source):
    found = {}
    for name, x in state_dict.items():
        for wrapper in (*WRAPPERS, "model"):
            name = name.replace(f"{wrapper}.", "")
        if name in found:
            raise ValueError(f"{source}: {name} twice")
        found[name] = x
    return found


def prefix_before_infixes(state_dict, source):
    found = {}
    for name, x in state_dict.items():
        name = ".".join(part for part in name.removeprefix("model.").split(".") if part not in WRAPPERS)
        if name in found:
            raise ValueError(f"{source}: {name} twice")
        found[name] = x
    return found


def last_one_wins(state_dict, source):
    names = (".".join(part for part in name.split(".") if part not in WRAPPERS) for name in state_dict)
    return {name.removeprefix("model."): x for name, x in zip(names, state_dict.values(), strict=True)}


def word_by_word(state_dict, source):
    found = {}
    for key in state_dict:
        words = [word for word in key.split(".") if word not in ("module", "_orig_mod")]
        words = [word for word in words if not (word.startswith("_") and word.endswith("_wrapped_module"))]
        name = ".".join(words[1:] if words[0] == "model" else words)
        if name in found:
            raise ValueError(f"In {source}, {name} occurs twice.")
        found[name] = state_dict[key]
    return found


def own_online(q, k, v, mask, chunk, *, rescales=True, subtracts=True, scales=True, follows=True):
    """A right one, two passes over the chunks, and with a switch turned a wrong one."""
    kind = v.dtype if follows else q.dtype
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    allowed = None if mask is None else mask.tokens(q.device)
    spans = [slice(first, first + chunk) for first in range(0, k.shape[2], chunk)]

    def scores(span):
        s = q @ k[:, :, span].mT * (q.shape[-1] ** -0.5 if scales else 1)
        return s if allowed is None else s.masked_fill(~allowed[:, span], float("-inf"))

    first = torch.stack([scores(span).amax(-1) for span in spans])
    largest = first.amax(0) if rescales else first[0]
    if not subtracts:
        largest = torch.zeros_like(largest)
    total = out = 0
    for number, span in enumerate(spans):
        at = largest if rescales or not subtracts else first[number]
        weights = (scores(span) - at[..., None]).exp()
        total, out = total + weights.sum(-1, keepdim=True), out + weights @ v[:, :, span]
    return (out / total).transpose(1, 2).to(kind)


def in_two_passes(q, k, v, *, mask=None, layer=None, kind=None, chunk=128):
    return own_online(q, k, v, mask, chunk)


def never_rescales(q, k, v, *, mask=None, layer=None, kind=None, chunk=128):
    return own_online(q, k, v, mask, chunk, rescales=False)


def never_subtracts(q, k, v, *, mask=None, layer=None, kind=None, chunk=128):
    return own_online(q, k, v, mask, chunk, subtracts=False)


def forgets_the_width(q, k, v, *, mask=None, layer=None, kind=None, chunk=128):
    return own_online(q, k, v, mask, chunk, scales=False)


def follows_q(q, k, v, *, mask=None, layer=None, kind=None, chunk=128):
    return own_online(q, k, v, mask, chunk, follows=False)


def all_at_once(q, k, v, *, mask=None, layer=None, kind=None, chunk=128):
    return matmul_attention(q.to(v.dtype), k.to(v.dtype), v, mask=mask)


def no_mask(q, k, v, *, mask=None, layer=None, kind=None, chunk=128):
    return own_online(q, k, v, None, chunk)


WRONG = {
    "training_bytes": [weights_alone, forgets_the_average, hybrid_over_nodes, always_a_whole_node],
    "call_flops": [
        multiplications_alone,
        forgets_the_past,
        makes_the_past_again,
        forgets_the_prompt,
        prompt_as_long_as_the_video,
        times_heads,
        one_layer,
    ],
    "parts_per_gpu": [rounds_up, forgets_neighbours, says_no_more, names_what_was_given, videos_of_a_gpu],
    "without_wrappers": [prefixes_alone, replaces_anywhere, prefix_before_infixes, last_one_wins],
    "online_attention": [never_rescales, never_subtracts, forgets_the_width, follows_q, all_at_once, no_mask],
}
RIGHT = {
    "training_bytes": line_by_line,
    "call_flops": map_by_map,
    "parts_per_gpu": by_division,
    "without_wrappers": word_by_word,
    "online_attention": in_two_passes,
}
