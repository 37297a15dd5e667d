"""The names of older documents, as thin doors to the core. New code, lessons and tests use the core itself."""

from functools import partial

import torch
from torch import Tensor, nn

from dynamic_video_sf import RolloutConfig, SelfForcingEngine, dmd_loss
from kv_cache import KVCache


class SimplifiedSelfForcingPipeline:
    """`rollout` under an older name: noise [B, F, C, H, W] in, video [B, F, C, H, W] out."""

    def __init__(self, generator, scheduler, num_frames_per_block=3, denoising_steps=(1000, 750, 500, 250)):
        config = RolloutConfig(denoising_steps=denoising_steps, frames_per_block=num_frames_per_block)
        self.engine = SelfForcingEngine(generator, scheduler, config)

    def simulate_inference(self, noise: Tensor, conditional_dict) -> Tensor:
        """The video of an inference rollout."""
        return self.engine.generate(noise, conditional_dict)


class SimpleKVCache:
    """One layer's `KVCache` as an object with state: the last max_length tokens [B, l, num_heads, head_dim]."""

    def __init__(self, batch_size: int, max_length: int, num_heads: int, head_dim: int):
        self.shape = (batch_size, num_heads, head_dim)
        self.max_length = max_length
        self.reset()

    def update(self, key: Tensor, value: Tensor) -> None:
        """Remember the keys and values [B, l, num_heads, head_dim] of l more tokens; the oldest fall out."""
        batch, tokens, *heads = key.shape
        if (batch, *heads) != self.shape or value.shape != key.shape:
            raise ValueError(
                f"keys and values must be [B, l, n, d] with (B, n, d) = {self.shape}, got {tuple(key.shape)}."
            )
        self.cache = self.cache.extend([(key, value)], tokens)

    def get_cache(self) -> tuple[Tensor, Tensor]:
        """Keys and values held, oldest first."""
        batch, *heads = self.shape
        return self.cache.layers[0] if self.cache.layers else (torch.zeros(batch, 0, *heads),) * 2

    def reset(self) -> None:
        """Forget everything."""
        self.cache = KVCache(window_frames=self.max_length)  # a token stands for a frame here


class SelfForcingLoss(nn.Module):
    """`dmd_loss` as a module: loss(video, cond, uncond) -> scalar."""

    def __init__(self, real_score, fake_score, scheduler, guidance_scale: float):
        super().__init__()
        self.loss = partial(
            dmd_loss, real_score=real_score, fake_score=fake_score, scheduler=scheduler, guidance_scale=guidance_scale
        )

    def forward(self, video: Tensor, cond, uncond, **options) -> Tensor:
        return self.loss(video, cond=cond, uncond=uncond, **options)


def explain_self_forcing() -> str:
    """Self-Forcing in a page of Markdown, with the functions that do it."""
    return EXPLANATION


EXPLANATION = """\
# Self-Forcing

A video model that works block by block is usually trained on *real* pasts and used on *its own*. The first mistake
puts it where it has never been, and it drifts: exposure bias. Self-Forcing trains on the model's own past.

1. **Roll out** (`dynamic_video_sf.rollout`). Each block starts from noise and is cleaned in a few denoising steps, and
   sees its past through a KV cache (`kv_cache.KVCache`). Training and inference run the same function.
2. **Keep one call's gradient.** A block is left at one step, random or the last; only that call is differentiated, and
   the cache is detached, so memory does not grow with the number of steps.
3. **Score the whole video** (`dmd_loss`). A frozen teacher says what real video it sees in the noised clip, an online
   critic says what the student would have made; their difference is the gradient.
4. **Train the critic** (`flow_matching_loss`) on the student's videos, several times for each step of the student.

`self_forcing_step` is 1 to 4 in a row: Algorithm 1 of the paper (arXiv 2506.08009).
"""
