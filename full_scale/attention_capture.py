"""Which frame looks at which, in Wan: what attention_maps.py does when it is given a --model_path."""

from collections.abc import Sequence

import torch

from attention_maps import Capture
from dynamic_video_sf import Guided, prefill
from full_scale.generate import Models, check_size, choose_sampling, stream_latents
from full_scale.pixels import STRIDE
from generate import sample_keys
from randomness import generator


@torch.no_grad()
def capture_wan(
    models: Models, prompts: Sequence[str], names=None, *, num_frames=21, height=480, width=832, seed=0, step="first",
    logits=False,
) -> Capture:  # fmt: skip
    """A capture while full_scale.generate's latents of these prompts and this seed are made; maps are means over them.

    Raises ValueError for image-to-video models, whole clips' context, and sizes and layers that do not fit.
    """
    check_size(models.sizes, height, width)
    if models.sizes.model_type == "i2v":
        raise ValueError("Attention is captured while a text-to-video model works: pass such a --checkpoint.")
    sampling = choose_sampling(models, num_frames)
    if step == "context" and sampling.rollout.frames_per_block == num_frames:
        raise ValueError("This model makes whole clips and keeps no context: use --step first.")
    cond, keys = models.text(prompts), sample_keys(prompts, seed)
    shape = (models.sizes.out_dim, height // STRIDE, width // STRIDE)
    with Capture(models.transformer, names, step, logits) as watched:
        model = watched
        if sampling.guidance_scale != 1:
            model = Guided(watched, models.text.null(len(prompts)), sampling.guidance_scale)
        blocks = stream_latents(model, sampling, cond, keys, num_frames, shape, device=models.device)
        latents = torch.cat(list(blocks), dim=1)
        if step == "context":  # what the last block would leave in the cache is otherwise not computed
            rng = [generator(*key, "context") for key in keys]
            prefill(watched, sampling.scheduler, latents, cond, sampling.rollout, rng=rng)
    return watched
