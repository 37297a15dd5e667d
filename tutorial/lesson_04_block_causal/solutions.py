"""Solutions of lesson 4: the core itself, where it has the function."""

from itertools import accumulate, groupby, pairwise

import torch

from dynamic_video_sf import causal_forcing_loss
from tiny_causal_wan import FrameMask, sdpa_attention

__all__ = ["attend_without_mask", "causal_forcing_loss", "frame_mask", "leaks", "reach"]


def frame_mask(block_sizes, sink_frames=0, window_frames=None, clean_half=False):
    return FrameMask(tuple(block_sizes), 1, sink_frames, window_frames, clean_half).frames()


def reach(mask, num_layers):
    """One more layer: a frame knows what the frames know that it sees. Its residual stream keeps what it knew."""
    knows = torch.eye(len(mask))
    for _ in range(num_layers):
        knows = ((mask.float() @ knows + knows) > 0).float()
    return knows > 0


@torch.no_grad()
def leaks(model, video, block_sizes):
    """Disturbed with noise, not with a constant: a norm would take a constant out again."""
    before, rng = model(video), torch.Generator().manual_seed(0)
    spans = [slice(*ends) for ends in pairwise(accumulate(block_sizes, initial=0))]
    found = []
    for later, span in enumerate(spans):
        changed = video.clone()
        changed[:, span] += torch.randn(changed[:, span].shape, generator=rng)
        moved = (model(changed) - before).abs().amax((0, 2, 3, 4))  # [f]: a mean would hide a single pixel
        if not moved[span].any():
            raise ValueError(f"Block {later} does not move its own output: give the model weights that do something.")
        found += [(block, later) for block in range(later) if moved[spans[block]].max() > 1e-6 * moved[span].max()]
    return sorted(found)


def attend_without_mask(q, k, v, *, mask=None, layer=None, kind=None):
    """Frames of a block see the same: one plain attention for all of them, over the keys that they see."""
    if mask is None:
        return sdpa_attention(q, k, v)
    sees = mask.frames()
    q, k, v = (x.unflatten(1, (len(sees), -1)) for x in (q, k, v))  # [b f s n d]
    blocks = [list(rows) for _, rows in groupby(range(len(sees)), lambda row: sees[row].tolist())]
    seen = [sees[rows[0]].nonzero()[:, 0] for rows in blocks]
    parts = [
        sdpa_attention(*(x.flatten(1, 2) for x in (q[:, rows], k[:, keys], v[:, keys])))
        for rows, keys in zip(blocks, seen, strict=True)
    ]
    return torch.cat(parts, dim=1)
