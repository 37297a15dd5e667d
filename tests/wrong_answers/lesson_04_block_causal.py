"""Lesson 4: wrong and right answers."""

from itertools import accumulate

import torch

from dynamic_video_sf import causal_forcing_loss as core_loss
from dynamic_video_sf import flow_matching_loss
from randomness import rand, randn_like
from tiny_causal_wan import FrameMask, matmul_attention, sdpa_attention

# ------------------------------------------------------------------------------------------------------- frame_mask


def masked(block_sizes, sink_frames=0, window_frames=None, clean_half=False):
    return FrameMask(tuple(block_sizes), 1, sink_frames, window_frames, clean_half).frames()


def causal_by_frames(block_sizes, sink_frames=0, window_frames=None, clean_half=False):
    """A language model's triangle, inside of blocks too."""
    return masked((1,) * sum(block_sizes), sink_frames, window_frames, clean_half)


def window_of_each_frame(block_sizes, sink_frames=0, window_frames=None, clean_half=False):
    """Counts the window back from the frame that looks, not from its block."""
    mask = masked(block_sizes, sink_frames, None, clean_half)
    if window_frames is None:
        return mask
    n = sum(block_sizes)
    q, k = torch.meshgrid(torch.arange(len(mask)) % n, torch.arange(len(mask)) % n, indexing="ij")
    return mask & ((k >= q - window_frames) | (k < sink_frames))


def sees_the_answer(block_sizes, sink_frames=0, window_frames=None, clean_half=False):
    """A noisy block also sees its own clean copy."""
    mask = masked(block_sizes, sink_frames, window_frames, clean_half)
    n = sum(block_sizes)
    if clean_half:
        mask[n:, :n] |= masked(block_sizes, sink_frames, window_frames)
    return mask


def noisy_past_too(block_sizes, sink_frames=0, window_frames=None, clean_half=False):
    mask = masked(block_sizes, sink_frames, window_frames, clean_half)
    n = sum(block_sizes)
    if clean_half:
        mask[n:, n:] |= masked(block_sizes, sink_frames, window_frames)
    return mask


def equal_blocks(block_sizes, sink_frames=0, window_frames=None, clean_half=False):
    """Integer division by the size of a block."""
    size, n = max(block_sizes), sum(block_sizes)
    whole = masked((size,) * -(-n // size), sink_frames, window_frames)[:n, :n]
    return masked(block_sizes, sink_frames, window_frames, True) if clean_half else whole


def loses_the_sink(block_sizes, sink_frames=0, window_frames=None, clean_half=False):
    return masked(block_sizes, 0, window_frames, clean_half)


def no_window_in_the_clean_half(block_sizes, sink_frames=0, window_frames=None, clean_half=False):
    """As in the reference: the window holds without teacher forcing alone."""
    return masked(block_sizes, sink_frames, None if clean_half else window_frames, clean_half)


def sees_a_sink_to_come(block_sizes, sink_frames=0, window_frames=None, clean_half=False):
    """The sink is seen from the first block on, also where it has not been made yet."""
    mask = masked(block_sizes, sink_frames, window_frames, clean_half)
    mask[:, :sink_frames] = True
    return mask


def by_loops(block_sizes, sink_frames=0, window_frames=None, clean_half=False):
    block = [i for i, size in enumerate(block_sizes) for _ in range(size)]
    first = [0, *accumulate(block_sizes)]
    n = len(block)
    past = torch.zeros(n, n, dtype=torch.bool)
    own = torch.zeros(n, n, dtype=torch.bool)
    for q in range(n):
        start = first[block[q]]
        back = start if window_frames is None else window_frames
        for k in range(n):
            own[q, k] = block[q] == block[k]
            past[q, k] = k < start and (k < sink_frames or start - k <= back)
    if not clean_half:
        return past + own
    whole = torch.zeros(2 * n, 2 * n, dtype=torch.bool)
    whole[:n, :n], whole[n:, :n], whole[n:, n:] = past + own, past, own
    return whole


# ------------------------------------------------------------------------------------------------------------ reach


def no_chain(mask, num_layers):
    return mask if num_layers else torch.eye(len(mask), dtype=torch.bool)


def the_other_way_round(mask, num_layers):
    return breadth_first(mask, num_layers).T


def counts_paths(mask, num_layers):
    return torch.linalg.matrix_power(mask.long(), num_layers) > 0


def one_layer_too_many(mask, num_layers):
    return breadth_first(mask, num_layers + 1)


def breadth_first(mask, num_layers):
    found = torch.zeros_like(mask)
    for frame in range(len(mask)):
        known = {frame}
        for _ in range(num_layers):
            known |= {k for q in known for k in mask[q].nonzero()[:, 0].tolist()}
        found[frame, list(known)] = True
    return found


# ------------------------------------------------------------------------------------------------------------ leaks


def search(model, video, block_sizes, disturb, change, dead=True):
    """What all answers share: disturb(block) -> another block, change(y) -> [f]."""
    starts = [0, *accumulate(block_sizes)]
    before, found = model(video), []
    for j, size in enumerate(block_sizes):
        other = video.clone()
        other[:, starts[j] : starts[j] + size] = disturb(other[:, starts[j] : starts[j] + size])
        moved = change(model(other) - before)
        if dead and not moved[starts[j] : starts[j] + size].any():
            raise ValueError("a dead block")
        found += [(i, j) for i in range(j) if moved[starts[i] : starts[i + 1]].max() > 1e-6]
    return sorted(found)


def largest(y):
    return y.abs().amax((0, 2, 3, 4))


def noisy(x):
    return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(7))


def brighter(model, video, block_sizes):
    return search(model, video, block_sizes, lambda x: x + 1, largest, dead=False)


def scaled(model, video, block_sizes):
    return search(model, video, block_sizes, lambda x: 2 * x, largest, dead=False)


def mean_change(model, video, block_sizes):
    return search(model, video, block_sizes, noisy, lambda y: 1e-3 * y.mean((0, 2, 3, 4)).abs())


def believes_the_dead(model, video, block_sizes):
    return search(model, video, block_sizes, noisy, largest, dead=False)


def frames_for_blocks(model, video, block_sizes):
    """Any later frame counts, also one of the same block."""
    return search(model, video, (1,) * sum(block_sizes), noisy, largest)


def spoils_the_video(model, video, block_sizes):
    found = search(model, video, block_sizes, noisy, largest)
    video += 1
    return found


def by_gradient(model, video, block_sizes):
    """Where one can differentiate: the gradient of a random projection of each block's output."""
    rng, found = torch.Generator().manual_seed(3), set()
    for i, size in enumerate(block_sizes):
        start, x = sum(block_sizes[:i]), noisy(video).requires_grad_()
        y = model(x)[:, start : start + size]
        (slope,) = torch.autograd.grad((y * torch.randn(y.shape, generator=rng)).sum(), x)
        moved = [part.abs().max().item() for part in slope.split(list(block_sizes), 1)]
        if not moved[i]:
            raise ValueError("This block has no influence on itself.")
        found |= {(i, j) for j in range(i + 1, len(block_sizes)) if moved[j] > 1e-8}
    return sorted(found)


# ---------------------------------------------------------------------------------------------- causal_forcing_loss


def one_level_per_clip(model, scheduler, x0, cond, config, *, teacher_forcing=True, rng=None, t=None, **options):
    t = scheduler.warp(torch.rand(len(x0), 1)).expand(-1, x0.shape[1]) if t is None else t
    return core_loss(model, scheduler, x0, cond, config, teacher_forcing=teacher_forcing, t=t, **options)


def one_level_per_frame(model, scheduler, x0, cond, config, *, teacher_forcing=True, rng=None, t=None, **options):
    t = scheduler.warp(torch.rand(x0.shape[:2])) if t is None else t
    return core_loss(model, scheduler, x0, cond, config, teacher_forcing=teacher_forcing, t=t, **options)


def not_warped(model, scheduler, x0, cond, config, *, teacher_forcing=True, rng=None, t=None, **options):
    t = torch.rand(len(x0), 3).repeat_interleave(torch.tensor([1, 3, 3]), 1) if t is None else t
    return core_loss(model, scheduler, x0, cond, config, teacher_forcing=teacher_forcing, t=t, **options)


def forgets_the_mask(model, scheduler, x0, cond, config, *, teacher_forcing=True, rng=None, t=None, **options):
    """Trains a bidirectional model, which learns well and cannot be used."""

    def plain(x_t, t, cond, **ways):
        return model(x_t, t, cond)

    return core_loss(plain, scheduler, x0, cond, config, teacher_forcing=teacher_forcing, rng=rng, t=t, **options)


def forgets_the_window(model, scheduler, x0, cond, config, *, teacher_forcing=True, rng=None, t=None, **options):
    def wide(x_t, t, cond, *, frames_per_block, clean, **memory):
        return model(x_t, t, cond, frames_per_block=frames_per_block, clean=clean)

    return core_loss(wide, scheduler, x0, cond, config, teacher_forcing=teacher_forcing, rng=rng, t=t, **options)


def the_other_sign(model, scheduler, x0, cond, config, *, teacher_forcing=True, rng=None, t=None, **options):
    def negative(*given, **ways):
        return -model(*given, **ways)

    return core_loss(negative, scheduler, x0, cond, config, teacher_forcing=teacher_forcing, rng=rng, t=t, **options)


def spelled_out(model, scheduler, x0, cond, config, *, teacher_forcing=True, rng=None, t=None, noise=None):
    if t is None:
        block, sizes = [], [1, 3] if config.frames_per_block == (1, 3) else [config.frames_per_block] * 2
        while len(block) < x0.shape[1]:
            block += [len(set(block))] * sizes[min(len(set(block)), 1)]
        t = scheduler.warp(rand((len(x0), max(block) + 1), rng))[:, block]
    noise = randn_like(x0, rng) if noise is None else noise
    weight = t[:, :, None, None, None]
    flow = model(
        (1 - weight) * x0 + weight * noise,
        t,
        cond,
        frames_per_block=config.frames_per_block,
        clean=x0 if teacher_forcing else None,
        sink_frames=config.sink_frames,
        window_frames=config.window_frames,
    )
    return (flow - (noise - x0)).pow(2).mean()


def from_the_global_state(model, scheduler, x0, cond, config, *, teacher_forcing=True, rng=None, t=None, **options):
    return core_loss(model, scheduler, x0, cond, config, teacher_forcing=teacher_forcing, t=t, **options)


def always_diffusion(model, scheduler, x0, cond, config, *, teacher_forcing=True, rng=None, t=None, **options):
    def call(x_t, t, cond):
        memory = {"sink_frames": config.sink_frames, "window_frames": config.window_frames}
        return model(x_t, t, cond, frames_per_block=config.frames_per_block, **memory)

    if t is None:
        t = scheduler.warp(torch.rand(len(x0), 3)).repeat_interleave(torch.tensor([1, 3, 3]), 1)
    return flow_matching_loss(call, scheduler, x0, cond, t=t, **options)


# ---------------------------------------------------------------------------------------------- attend_without_mask


def ignores_the_mask(q, k, v, *, mask=None, layer=None, kind=None):
    return sdpa_attention(q, k, v)


def makes_the_table(q, k, v, *, mask=None, layer=None, kind=None):
    """Right, but it is the dense kernel."""
    return matmul_attention(q, k, v, mask=mask)


def token_causal(q, k, v, *, mask=None, layer=None, kind=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=mask is not None).transpose(1, 2)


def everything_before(q, k, v, *, mask=None, layer=None, kind=None):
    """Forgets that a window has a beginning."""
    if mask is None:
        return sdpa_attention(q, k, v)
    ends = [s * mask.tokens_per_frame for s in accumulate(mask.block_sizes)]
    ends += [ends[-1] + end for end in ends] if mask.clean_half else []
    parts, start = [], 0
    for end in ends:
        parts.append(sdpa_attention(q[:, start:end], k[:, :end], v[:, :end]))
        start = end
    return torch.cat(parts, dim=1)


def frame_by_frame(q, k, v, *, mask=None, layer=None, kind=None):
    """One softmax per frame that looks, written out."""
    if mask is None:
        return sdpa_attention(q, k, v)
    s, parts = mask.tokens_per_frame, []
    for i, row in enumerate(mask.frames()):
        tokens = row.repeat_interleave(s)
        scores = torch.einsum("blnd,bmnd->bnlm", q[:, i * s : (i + 1) * s], k[:, tokens]) / q.shape[-1] ** 0.5
        parts.append(torch.einsum("bnlm,bmnd->blnd", scores.softmax(-1), v[:, tokens]))
    return torch.cat(parts, dim=1)


WRONG = {
    "frame_mask": [
        causal_by_frames,
        window_of_each_frame,
        sees_the_answer,
        noisy_past_too,
        equal_blocks,
        loses_the_sink,
        no_window_in_the_clean_half,
        sees_a_sink_to_come,
    ],
    "reach": [no_chain, the_other_way_round, counts_paths, one_layer_too_many],
    "leaks": [brighter, scaled, mean_change, believes_the_dead, frames_for_blocks, spoils_the_video],
    "causal_forcing_loss": [
        one_level_per_clip,
        one_level_per_frame,
        not_warped,
        forgets_the_mask,
        forgets_the_window,
        the_other_sign,
        from_the_global_state,
        always_diffusion,
    ],
    "attend_without_mask": [ignores_the_mask, makes_the_table, token_causal, everything_before],
}
RIGHT = {
    "frame_mask": by_loops,
    "reach": breadth_first,
    "leaks": by_gradient,
    "causal_forcing_loss": spelled_out,
    "attend_without_mask": frame_by_frame,
}
