"""Which frame looks at which, in Wan: what attention_maps.py does when it is given a --model_path."""

from collections.abc import Sequence

import torch

from attention_maps import Capture
from dynamic_video_sf import Guided, prefill
from full_scale.generate import Models, choose_sampling, parse_arguments, pick_models, stream_latents
from full_scale.pixels import STRIDE, check_size
from generate import sample_keys
from randomness import generator


def pick_wan(**options) -> Models:
    """The networks that these options of full_scale.generate choose; None stands for its default."""
    return pick_models(parse_arguments([f"--{name}={x}" for name, x in options.items() if x is not None]))


@torch.no_grad()
def capture_wan(
    models: Models, prompts: Sequence[str], names=None, *, num_frames=21, height=480, width=832, seed=0, step="first",
    logits=False,
) -> Capture:  # fmt: skip
    """A capture while full_scale.generate's latents of these prompts and this seed are made; maps are means over them.

    Raises ValueError for image-to-video models, whole clips' context, and sizes and layers that do not fit.
    """
    check_size(height, width, models.sizes.patch_size)
    if models.sizes.model_type == "i2v":
        raise ValueError("Attention of image-to-video models is not captured: pass a text-to-video --checkpoint.")
    sampling = choose_sampling(models, num_frames)
    if step == "context" and sampling.rollout.frames_per_block == num_frames:
        raise ValueError("This model makes whole clips and keeps no context: use --step first.")
    cond, keys, guided = models.text(prompts), sample_keys(prompts, seed), sampling.guidance_scale != 1
    uncond = models.text.null(len(prompts)) if guided else None
    models.text.free()  # it is larger than what comes now
    shape = (models.sizes.out_dim, height // STRIDE, width // STRIDE)
    with Capture(models.transformer, names, step, logits) as watched:
        model = Guided(watched, uncond, sampling.guidance_scale) if guided else watched
        blocks = stream_latents(model, sampling, cond, keys, num_frames, shape, device=models.device)
        latents = torch.cat(list(blocks), dim=1)
        if step == "context":  # what the last block would leave in the cache is otherwise not computed
            rng = [generator(*key, "context") for key in keys]
            prefill(watched, sampling.scheduler, latents, cond, sampling.rollout, rng=rng)
    return watched
