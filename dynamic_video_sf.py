"""Self-Forcing (Huang et al. 2025, arXiv 2506.08009), read from top to bottom.

An autoregressive video diffusion model makes a video block by block, each from noise in a few denoising steps, each
seeing its past through a KV cache. Trained on real pasts, it meets its own imperfect past only when it is used, and
drifts. Self-Forcing trains it on its own past instead:

    1. rollout            make a video exactly as at inference; keep the gradient of one denoising call per block
    2. dmd_loss           move the video to where the teacher's score and the critic's score agree
    3. flow_matching_loss keep the critic a diffusion model of what the student makes now
    4. self_forcing_step  the three above in a row: Algorithm 1

The losses of the models before (causal initialisation) and of the alternatives to DMD (SiD, GAN) come last.

Everything here is tensors in, tensors out. A *generator* is anything with two methods, of which tiny_causal_wan.py
has one implementation and the self-check at the end of this file another:

    generator(x_t, t, cond, cache) -> flow        the next block [B, n, C, H, W], seen with its past
    generator.remember(x, t, cond, cache) -> cache    a new cache that holds this block too

A *score* needs the first alone, without a cache: model(x_t, t, cond) -> flow of a whole clip. `cond` is looked into
by the model only. The loops are Python generators: who iterates them decides what to log, draw, differentiate or
stop.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from flow_match import FlowMatchScheduler, Time, check_denoising_steps
from kv_cache import FramesPerBlock, KVCache, block_borders, block_sizes
from parametrisation import loss_weight
from randomness import Rng, rand, randint, randn_like

# ------------------------------------------------------------------------------------------------- 1. the rollout


@dataclass(frozen=True)
class RolloutConfig:
    """How a video is made: the same for training and for inference.

    denoising_steps: 0..1000, falling from 1000; a trailing 0 is dropped. frames_per_block: n, or a tuple whose last
    entry repeats. context_noise: 0..1000 (not warped), the noise level at which finished blocks are remembered.
    sink_frames, window_frames and sink_follows: see KVCache. cache_gradient lets a block's gradient reach the blocks
    that it remembers, for comparison: the paper cuts it off.
    """

    denoising_steps: tuple[float, ...] = (1000, 750, 500, 250)
    frames_per_block: FramesPerBlock = 3
    context_noise: float = 0
    sink_frames: int = 0
    window_frames: int | None = None
    sink_follows: bool = False
    cache_gradient: bool = False

    def __post_init__(self):
        object.__setattr__(self, "denoising_steps", check_denoising_steps(self.denoising_steps))
        if not isinstance(self.frames_per_block, int):
            object.__setattr__(self, "frames_per_block", tuple(self.frames_per_block))
        if not 0 <= self.context_noise <= 1000:
            raise ValueError(f"context_noise is a noise level between 0 and 1000, got {self.context_noise}.")
        self.empty_cache()  # has its own say about sink and window

    def empty_cache(self) -> KVCache:
        """What a rollout begins with."""
        return KVCache(self.sink_frames, self.window_frames, self.sink_follows, self.cache_gradient)


def predict_x0(model, scheduler: FlowMatchScheduler, x_t: Tensor, t: Time, cond, *cache) -> Tensor:
    """The clean video that the model sees in x_t."""
    return scheduler.to_x0(model(x_t, t, cond, *cache), x_t, t)


def renoise(scheduler, x0: Tensor, x_t: Tensor, t: Time, t_next: Time, noise: Tensor) -> Tensor:
    """The few-step sampler: trust the guess x0, put fresh noise of the next level on it (consistency sampling)."""
    return scheduler.add_noise(x0, noise, t_next)


def euler(scheduler, x0: Tensor, x_t: Tensor, t: Time, t_next: Time, noise: Tensor) -> Tensor:
    """The many-step sampler: one Euler step of the probability-flow ODE from t to t_next; draws nothing."""
    return x_t + (t_next - t) * scheduler.to_flow(x0, x_t, t)


def stochastic(fresh_noise: float):
    """A sampler between the two: `euler` at 0, `renoise` at 1. With variance fresh_noise^2 the next noise is new.

    New noise lets later steps correct the errors of earlier ones; DDIM's eta (arXiv 2010.02502, eq. 12) does the same.
    """
    if not 0 <= fresh_noise <= 1:
        raise ValueError(f"fresh_noise must lie between 0 (an ODE) and 1 (all noise new), got {fresh_noise}.")

    def sampler(scheduler, x0: Tensor, x_t: Tensor, t: Time, t_next: Time, noise: Tensor) -> Tensor:
        kept = x0 + scheduler.to_flow(x0, x_t, t)  # the noise that the model sees in x_t
        return scheduler.add_noise(x0, (1 - fresh_noise**2) ** 0.5 * kept + fresh_noise * noise, t_next)

    return sampler


def rollout(
    generator, scheduler, noise, cond, config, *, cache=None, exit_step=None, rng=None, sampler=renoise, observe=None
):
    """Generate a video block by block, yielding every clean block [B, n, C, H, W] as soon as it exists.

    Training and inference run this same code. Inference takes every denoising step (exit_step=None), under no_grad.
    Training leaves each block at a random exit_step (an int, or one per block) and keeps the gradient of that one
    call. noise [B, F, C, H, W] is where the blocks start; F must be a whole number of blocks. In the end the iterator
    returns its cache: `cache = yield from rollout(...)` continues a stream, with the sink and window it has.
    observe(frame=, step=, t=, x_t=, x0=) sees every guess. Raises ValueError for an F that cuts a block and for an
    exit_step that no denoising step has.
    """
    if cache is None:
        cache = config.empty_cache()
    times = scheduler.denoising_times(config.denoising_steps)
    sizes = block_sizes(noise.shape[1], config.frames_per_block, first_frame=cache.next_frame)
    for x_t, last in zip(noise.split(sizes, dim=1), exits(exit_step, len(sizes), len(times)), strict=True):
        for i, t in enumerate(times[: last + 1]):  # guess the clean block, re-noise less, guess again
            with nullcontext() if i == last else torch.no_grad():
                x0 = predict_x0(generator, scheduler, x_t, t, cond, cache)
            if observe:
                observe(frame=cache.next_frame, step=i, t=t, x_t=x_t, x0=x0)
            if i < last:
                x_t = sampler(scheduler, x0, x_t, t, times[i + 1], randn_like(x0, rng))
        yield x0  # a viewer does not wait for the memory pass
        with nullcontext() if config.cache_gradient else torch.no_grad():
            # remember what was *generated*, never the data
            t = config.context_noise / 1000
            cache = generator.remember(scheduler.add_noise(x0, randn_like(x0, rng), t), t, cond, cache)
    return cache


def exits(exit_step: int | Sequence[int] | None, num_blocks: int, num_steps: int) -> list[int]:
    """The denoising step at which each block is left; None means the last."""
    if exit_step is None:
        exit_step = num_steps - 1
    each = [exit_step] * num_blocks if isinstance(exit_step, Integral) else [int(step) for step in exit_step]
    if len(each) != num_blocks or not all(0 <= step < num_steps for step in each):
        raise ValueError(f"exit_step must be one or {num_blocks} numbers from 0 to {num_steps - 1}, got {exit_step}.")
    return each


@torch.no_grad()
def generate(generator, scheduler, noise, cond, config, **options) -> Tensor:
    """The whole video [B, F, C, H, W] of an inference rollout; options as in `rollout`."""
    return torch.cat(list(rollout(generator, scheduler, noise, cond, config, **options)), dim=1)


@torch.no_grad()
def prefill(generator, scheduler, video, cond, config: RolloutConfig, *, cache=None, rng: Rng = None):
    """The cache of a generator that was given a video [B, F, C, H, W] instead of making it, block by block.

    `rollout(..., cache=prefill(...))` continues it: one frame, with frames_per_block=(1, n), is image-to-video. Raises
    ValueError for an F that cuts a block.
    """
    if cache is None:
        cache = config.empty_cache()
    t = config.context_noise / 1000
    sizes = block_sizes(video.shape[1], config.frames_per_block, first_frame=cache.next_frame)
    for block in video.split(sizes, dim=1):
        cache = generator.remember(scheduler.add_noise(block, randn_like(block, rng), t), t, cond, cache)
    return cache


@torch.no_grad()
def recache(generator, scheduler, past, cond, config: RolloutConfig, cache, *, rng: Rng = None):
    """The same past seen anew, under another prompt: what a rollout needs whose prompt changes in mid-video (LongLive,
    arXiv 2509.22622); the old cache would go on telling the old prompt.

    past [B, F, C, H, W]: the frames that the cache holds, `cache.frames`, in their order.
    """
    if past.shape[1] != len(cache.frames):
        raise ValueError(f"past must be the {len(cache.frames)} frames {list(cache.frames)}, got {past.shape[1]}.")
    frames, borders = cache.frames, {*block_borders(cache.next_frame, config.frames_per_block)}
    starts = [i for i, frame in enumerate(frames) if frame in borders or frame - 1 not in frames]
    fresh, t = replace(cache, frames=(), layers=()), config.context_noise / 1000
    for begin, end in pairwise([*starts, len(frames)]):
        block = scheduler.add_noise(past[:, begin:end], randn_like(past[:, begin:end], rng), t)
        fresh = generator.remember(block, t, cond, replace(fresh, next_frame=frames[begin]))
    return replace(fresh, next_frame=cache.next_frame)


@dataclass(frozen=True)
class CachePair:
    """What a guided generator remembers: its past read with the prompt, and without."""

    cond: KVCache
    uncond: KVCache

    @property
    def next_frame(self) -> int:
        return self.cond.next_frame


class Guided:
    """A generator or score with classifier-free guidance: uncond + w (cond - uncond), as in diffusers and Wan.

    (The reference's training code writes cond + s (cond - uncond); its s = 3 is w = 4 here.)
    """

    def __init__(self, generator, uncond, guidance_scale: float):
        self.generator, self.uncond, self.guidance_scale = generator, uncond, guidance_scale

    def __call__(self, x_t: Tensor, t: Time, cond, cache=None) -> Tensor:
        past, past_uncond = ((), ()) if cache is None else ((self._pair(cache).cond,), (self._pair(cache).uncond,))
        flow = self.generator(x_t, t, cond, *past)
        if self.guidance_scale == 1:
            return flow
        flow_uncond = self.generator(x_t, t, self.uncond, *past_uncond)
        return flow_uncond + self.guidance_scale * (flow - flow_uncond)

    def remember(self, x: Tensor, t: Time, cond, cache) -> CachePair:
        pair = self._pair(cache)
        return CachePair(
            self.generator.remember(x, t, cond, pair.cond), self.generator.remember(x, t, self.uncond, pair.uncond)
        )

    @staticmethod
    def _pair(cache) -> CachePair:
        if isinstance(cache, CachePair):
            return cache
        if cache.frames:
            raise ValueError(
                "A guided rollout cannot continue an unguided cache: fill it through the same Guided generator."
            )
        return CachePair(cache, cache)


# -------------------------------------------------------------------------------------------------- 2. the losses


def dmd_loss(
    video, real_score, fake_score, scheduler, cond, uncond, guidance_scale, *,
    rng: Rng = None, t=None, noise=None, mask=None, observe=None,
) -> Tensor:  # fmt: skip
    """Distribution matching (DMD, arXiv 2311.18828, eq. 7-8): a loss whose gradient moves the video, and nothing else.

    The video [B, F, C, H, W] is noised to a random t, and two networks say what clean video they see in it: the
    teacher (guided), who knows real videos, and the critic, who knows the student's. Where they agree, nothing moves;
    elsewhere the video goes from the critic's guess towards the teacher's:

        gradient = (x0_fake - x0_real) / mean |video - x0_real|      per sample

    The loss is half the squared distance to `video - gradient`, held fixed, so that d loss / d video = gradient / N.
    Its value is no measure of progress. t: [B], by default `scheduler.sample_times`. mask: bool [B, F], the frames
    that count. observe(t=, score_distance=[B], normaliser=[B]).
    """
    with torch.no_grad():
        t = scheduler.sample_times(video.shape[0], rng).to(video.device) if t is None else t
        x_t = scheduler.add_noise(video, randn_like(video, rng) if noise is None else noise, t)
        x0_fake = predict_x0(fake_score, scheduler, x_t, t, cond)
        x0_real = predict_x0(Guided(real_score, uncond, guidance_scale), scheduler, x_t, t, cond)
        normaliser = _mean_abs(video - x0_real)
        gradient = (x0_fake - x0_real).float() / normaliser
    if observe:
        observe(t=t, score_distance=_mean_abs(x0_fake - x0_real).flatten(), normaliser=normaliser.flatten())
    target = video.detach().float() - gradient
    return 0.5 * _mean((video.float() - target).square(), mask)


def flow_matching_loss(
    model, scheduler, x0, cond, *, rng: Rng = None, t=None, noise=None, parametrisation="flow", observe=None
) -> Tensor:
    """Mean squared error of the predicted flow on x0 [B, F, C, H, W]: what makes a network a diffusion model of x0.

    On data it trains the teacher; on the student's videos it trains the critic; on data with a block-causal `model`
    it is diffusion or teacher forcing. t: [B] or [B, F], by default uniform and warped. parametrisation: what the error
    is measured in, see parametrisation.py. observe(t=, error=[B]).
    """
    if t is None:
        t = scheduler.warp(rand((x0.shape[0], 1), rng, device=x0.device)[:, 0])
    noise = randn_like(x0, rng) if noise is None else noise
    flow = model(scheduler.add_noise(x0, noise, t), t, cond)
    error = (flow.float() - (noise - x0).float()).square().flatten(2).mean(2)  # [b f]
    error = (loss_weight(parametrisation, t.reshape(len(error), -1)) * error).mean(1)
    if observe:
        observe(t=t, error=error.detach())
    return error.mean()


def _mean_abs(x: Tensor) -> Tensor:
    """Mean absolute value of each sample, [B, 1, 1, 1, 1]; the floor only guards the exact zero."""
    return x.float().abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp_min(1e-8)


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of x [B, F, C, H, W] over the frames where mask [B, F] is True."""
    if mask is None:
        return x.mean()
    mask = mask[:, :, None, None, None].expand_as(x)
    return x.where(mask, 0).sum() / mask.sum().clamp_min(1)


# ---------------------------------------------------------------------------------------------- 3. Algorithm 1


@dataclass(frozen=True)
class SelfForcingConfig:
    """Settings of Algorithm 1; the defaults are the paper's.

    guidance_scale: of the teacher (uncond + w (cond - uncond)); fake_guidance_scale: of the critic inside the loss,
    None for none. critic_steps: critic updates per generator update, on fresh_rollouts or on the generator's own.
    exit_rule: "random" (one step for all blocks), "per_block", or "last". gradient_frames: gradient, teacher and critic
    see only so many last frames, the teacher's clip length. Clips have min_num_frames to max_num_frames frames, but a
    shortest_share of them exactly min_num_frames: of long clips the first block is never scored. Score
    times are drawn from [min_score_time, 1], warped, and kept within [0.02, 0.98]; ts_schedule raises the lower bound
    to the step after the exit, ts_schedule_max lowers the upper one to the exit.
    """

    rollout: RolloutConfig = RolloutConfig()
    guidance_scale: float = 4.0
    fake_guidance_scale: float | None = None
    critic_steps: int = 5
    fresh_rollouts: bool = True
    exit_rule: str = "random"
    gradient_frames: int = 21
    min_num_frames: int = 21
    max_num_frames: int = 21
    shortest_share: float = 0.0
    min_score_time: float = 0.0
    ts_schedule: bool = False
    ts_schedule_max: bool = False

    def __post_init__(self):
        if self.exit_rule not in ("random", "per_block", "last"):
            raise ValueError(f"exit_rule must be 'random', 'per_block' or 'last', got {self.exit_rule!r}.")
        if self.exit_rule == "per_block" and (self.ts_schedule or self.ts_schedule_max):
            raise ValueError(
                "ts_schedule bounds the score times by the exit step: it needs exit_rule 'random' or 'last'."
            )
        if self.gradient_frames < 1:
            raise ValueError(
                f"gradient_frames must be at least 1, got {self.gradient_frames}; the teacher's clip length is usual."
            )
        if self.critic_steps < 1:
            raise ValueError(
                "critic_steps must be at least 1: without a critic that follows the student DMD is not DMD."
            )
        if not self.clip_lengths():
            raise ValueError(
                f"No whole number of blocks (frames_per_block={self.rollout.frames_per_block}) lies between "
                f"min_num_frames={self.min_num_frames} and max_num_frames={self.max_num_frames}; widen the range."
            )

    def clip_lengths(self) -> list[int]:
        """The clip lengths that are whole numbers of blocks."""
        borders = block_borders(self.max_num_frames, self.rollout.frames_per_block)
        return [end for end in borders[1:] if self.min_num_frames <= end <= self.max_num_frames]


def training_rollout(
    generator, scheduler, noise, cond, config: SelfForcingConfig, *, data=None, rng=None, shared_rng=None, reencode=None
):
    """A student's clip of random length, left at random exits: its last `gradient_frames` frames, and the exit step.

    noise [B, max_num_frames, C, H, W]. Only the exit call of a block that reaches into the returned frames keeps a
    gradient. Clip length and exits come from shared_rng: they are the same for every sample and every process. data is
    not looked at: a student that learns from its own videos needs none.

    reencode(video) -> [B, 1, C, H, W]: the last frame of latents, through pixels and back. A codec that codes a clip's
    first frame on its own (Wan's) has no such latent in the middle of a clip, but the scores know no other beginning:
    of longer clips, the first returned frame is that one. Pixels, which are their own code, need none.
    """
    num_frames = draw_length(config, shared_rng)
    if noise.shape[1] < num_frames:
        raise ValueError(f"noise has {noise.shape[1]} frames, the clip {num_frames}: give max_num_frames of noise.")
    sizes = block_sizes(num_frames, config.rollout.frames_per_block)
    exit_step = draw_exit(config, len(sizes), shared_rng)
    blocks = rollout(generator, scheduler, noise[:, :num_frames], cond, config.rollout, exit_step=exit_step, rng=rng)
    video = []
    for end in accumulate(sizes):
        counts = end > num_frames - config.gradient_frames
        with torch.set_grad_enabled(counts and torch.is_grad_enabled()):
            video.append(next(blocks))
    video, first = torch.cat(video, dim=1), max(0, num_frames - config.gradient_frames)
    if reencode and first:
        with torch.no_grad():
            beginning = reencode(video[:, : first + 1])
        return torch.cat([beginning, video[:, first + 1 :]], dim=1), exit_step
    return video[:, first:], exit_step


def draw_length(config: SelfForcingConfig, rng: Rng) -> int:
    lengths = config.clip_lengths()
    if config.shortest_share and rand((1,), rng) < config.shortest_share:
        lengths = lengths[:1]
    return lengths[int(randint(len(lengths), (1,), rng))]


def draw_exit(config: SelfForcingConfig, num_blocks: int, rng: Rng) -> int | list[int]:
    num_steps = len(config.rollout.denoising_steps)
    if config.exit_rule == "last":
        return num_steps - 1
    if config.exit_rule == "per_block":
        return randint(num_steps, (num_blocks,), rng).tolist()
    return int(randint(num_steps, (1,), rng))


def score_times(scheduler, config: SelfForcingConfig, exit_step, batch: int, rng: Rng) -> Tensor:
    """Times [B] at which the scores are compared, bounded by the exit step where the config says so."""
    if exit_step is None and (config.ts_schedule or config.ts_schedule_max):
        raise ValueError("ts_schedule bounds the score times by the exit step: this objective has none.")
    steps = (*config.rollout.denoising_steps, 0)
    low = steps[exit_step + 1] / 1000 if config.ts_schedule else 0.0
    high = steps[exit_step] / 1000 if config.ts_schedule_max else 1.0
    low = max(low, config.min_score_time)
    return scheduler.sample_times(batch, rng, low=low, high=max(low, high))


def self_forcing_step(
    generator, real_score, fake_score, scheduler, noise, cond, uncond, config: SelfForcingConfig, *,
    loss=dmd_loss, student_video=training_rollout, data=None, rng: Rng = None, shared_rng: Rng = None,
    observe: Callable | None = None,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """Algorithm 1, as a generator of losses: ("generator", loss) once, then ("critic", loss) `critic_steps` times.

    The caller backpropagates each loss and steps that network's optimizer before it asks for the next; nothing else
    is left to do. noise [B, max_num_frames, C, H, W]; rng: one generator per sample; shared_rng: for what all samples
    share. observe(network, **values) sees what the losses report. loss and student_video make the other members of the
    family: `sid_loss` for dmd_loss, `data_past_rollout` or `one_call_video`, which start from data [B, F, C, H, W], for
    the student's own rollout.
    """
    watch = {name: observe and partial(observe, name) for name in ("generator", "critic")}
    critic = (
        fake_score if config.fake_guidance_scale is None else Guided(fake_score, uncond, config.fake_guidance_scale)
    )
    given = {"cond": cond, "config": config, "data": data, "rng": rng, "shared_rng": shared_rng}
    roll = partial(student_video, generator, scheduler, **given)
    times = partial(score_times, scheduler, config, batch=noise.shape[0], rng=rng)

    video, exit_step = roll(noise)
    t = times(exit_step).to(video.device)
    yield (
        "generator",
        loss(
            video,
            real_score,
            critic,
            scheduler,
            cond,
            uncond,
            config.guidance_scale,
            t=t,
            rng=rng,
            observe=watch["generator"],
        ),
    )
    for _ in range(config.critic_steps):
        if config.fresh_rollouts:
            with torch.no_grad():
                video, exit_step = roll(randn_like(noise, rng))
        t = times(exit_step).to(video.device)
        yield (
            "critic",
            flow_matching_loss(fake_score, scheduler, video.detach(), cond, t=t, rng=rng, observe=watch["critic"]),
        )


# -------------------------------------------------------------------------------------------- 4. the rest of the family


def causal_forcing_loss(
    model, scheduler, x0, cond, config: RolloutConfig, *, teacher_forcing=True, rng: Rng = None, t=None, **options
) -> Tensor:
    """Flow matching of a block-causal model on data, every block at its own noise level.

    Teacher forcing: a block sees its past clean. Diffusion forcing (Chen et al. 2024): it sees
    each past block at that block's own noise level. options: as in flow_matching_loss.
    """
    sizes = torch.tensor(block_sizes(x0.shape[1], config.frames_per_block))
    if t is None:
        t = scheduler.warp(rand((x0.shape[0], len(sizes)), rng)).repeat_interleave(sizes, dim=1).to(x0.device)
    causal = block_causal(model, config, clean=x0 if teacher_forcing else None)
    return flow_matching_loss(causal, scheduler, x0, cond, t=t, rng=rng, **options)


def block_causal(model, config: RolloutConfig, clean: Tensor | None = None):
    """The model on a whole clip at once, every block seeing of the others what it would see in a rollout: as noisy as
    they are or, with clean [B, F, C, H, W], clean. Raises ValueError for a sink that follows."""
    if config.sink_follows:
        raise ValueError("sink_follows moves the sink of a rollout; in a whole clip it stays: leave it false here.")
    return partial(
        model,
        frames_per_block=config.frames_per_block,
        clean=clean,
        sink_frames=config.sink_frames,
        window_frames=config.window_frames,
    )


class DataPast:
    """A generator that remembers the data instead of what it made: its past is right, whatever it makes of it.

    With noisy=True every block of the past is remembered at a noise level of its own, as in diffusion forcing.
    """

    def __init__(self, generator, scheduler, data: Tensor, noisy: bool = False, rng: Rng = None):
        self.generator, self.scheduler, self.data, self.noisy, self.rng = generator, scheduler, data, noisy, rng

    def __call__(self, x_t: Tensor, t: Time, cond, cache=None) -> Tensor:
        return self.generator(x_t, t, cond, cache)

    def remember(self, x: Tensor, t: Time, cond, cache):
        past = self.data[:, cache.next_frame : cache.next_frame + x.shape[1]]
        if past.shape != x.shape:
            raise ValueError(f"The data end before frame {cache.next_frame + x.shape[1]}: set max_num_frames to less.")
        if self.noisy:
            t = self.scheduler.warp(rand((len(x), 1), self.rng, device=x.device)[:, 0])
        past = self.scheduler.add_noise(past, randn_like(past, self.rng), t)
        return self.generator.remember(past, t, cond, cache)


def data_past_rollout(generator, scheduler, noise, cond, config: SelfForcingConfig, *, data, noisy=False, rng=None,
                      shared_rng=None):  # fmt: skip
    """`training_rollout` on the data's past instead of the student's: few-step teacher forcing (noisy: diffusion
    forcing). Every block continues the data [B, F, C, H, W], so the blocks together are no video that anybody made."""
    forced = DataPast(generator, scheduler, data, noisy, rng)
    return training_rollout(forced, scheduler, noise, cond, config, rng=rng, shared_rng=shared_rng)


def one_call_video(generator, scheduler, noise, cond, config: SelfForcingConfig, *, data, rng=None, shared_rng=None):
    """CausVid's clip (arXiv 2412.07772, Alg. 1): every block of the data noised to one of the few levels or, as likely
    as to each of them, left clean, and all of it cleaned in one block-causal call. No rollout, no cache; a block sees
    the others as noisy as they are."""
    noise = noise[:, : data.shape[1]]
    sizes = torch.tensor(block_sizes(data.shape[1], config.rollout.frames_per_block))
    times = torch.tensor([*scheduler.denoising_times(config.rollout.denoising_steps), 0.0])
    index = randint(len(times), (data.shape[0], len(sizes)), rng).repeat_interleave(sizes, dim=1)  # [b f]
    t = times[index].to(data.device)
    causal = block_causal(generator, config.rollout)
    return predict_x0(causal, scheduler, scheduler.add_noise(data, noise, t), t, cond), None


@torch.no_grad()
def ode_trajectory(generator, scheduler, noise, cond, config: RolloutConfig, keep: Sequence[float]) -> Tensor:
    """A teacher's ODE from noise to video, as its states [B, K + 1, F, C, H, W] at the denoising steps `keep` and at
    the end: a many-step rollout that is watched.

    One block of all frames for a bidirectional teacher, the usual blocks for a causal one. Raises ValueError for a kept
    step that is none of config.denoising_steps.
    """
    if missing := [step for step in keep if step not in config.denoising_steps]:
        raise ValueError(f"The ODE takes no step at {missing}: choose a number of steps on whose grid they lie.")
    kept = {config.denoising_steps.index(step): [] for step in keep}

    def watch(frame, step, t, x_t, x0):
        if step in kept:
            kept[step].append(x_t)

    video = generate(generator, scheduler, noise, cond, config, sampler=euler, observe=watch)
    return torch.stack([*(torch.cat(blocks, dim=1) for blocks in kept.values()), video], dim=1)


def ode_regression_loss(
    model, scheduler, trajectory, times, cond, config: RolloutConfig, *, teacher_forcing=False, rng: Rng = None,
    index=None,
) -> Tensor:  # fmt: skip
    """Teach a few-step student the end of a teacher's ODE from any point on it (CausVid, arXiv 2412.07772, sec. 4.3).

    trajectory [B, K, F, C, H, W]: states at `times` (K numbers, falling from 1), the last one clean at time 0. Every
    block of every sample starts at a random state, or at index [B, num_blocks]; blocks that start clean are not
    counted. With teacher_forcing a block sees the clean ends of those before it, as the blocks of a causal teacher did.
    """
    batch, num_states, num_frames = trajectory.shape[:3]
    sizes = torch.tensor(block_sizes(num_frames, config.frames_per_block))
    if index is None:
        index = randint(num_states, (batch, len(sizes)), rng)
    index = index.repeat_interleave(sizes.to(index.device), dim=1).to(trajectory.device)  # [b f]
    t = torch.as_tensor(times, dtype=torch.float32, device=trajectory.device)[index]
    x_t = trajectory.take_along_dim(index[:, None, :, None, None, None], dim=1)[:, 0]
    causal = block_causal(model, config, clean=trajectory[:, -1] if teacher_forcing else None)
    x0 = predict_x0(causal, scheduler, x_t, t, cond)
    return _mean((x0.float() - trajectory[:, -1].float()).square(), t > 0)


def consistency_loss(
    model, target, teacher, scheduler, x0, cond, uncond, guidance_scale, config: RolloutConfig, *,
    num_steps: int = 48, rng: Rng = None, index=None,
) -> Tensor:  # fmt: skip
    """Few steps without stored trajectories (consistency distillation, arXiv 2303.01469, Alg. 2), block-causal.

    Every block of the data x0 [B, F, C, H, W] is noised to a time of a grid of num_steps. The causal teacher, guided,
    takes one Euler step to the next time; from there `target`, the model itself or an average of it, says where the
    block ends, and the model must say so from where it was. The past is clean. index: [B, num_blocks], by default
    random.
    """
    sizes = torch.tensor(block_sizes(x0.shape[1], config.frames_per_block))
    if index is None:
        index = randint(num_steps, (x0.shape[0], len(sizes)), rng)
    index = index.repeat_interleave(sizes.to(index.device), dim=1)  # [b f]
    grid = scheduler.warp(1 - torch.arange(num_steps + 1) / num_steps)
    t, t_next = (grid[i].to(x0.device) for i in (index, index + 1))
    x_t = scheduler.add_noise(x0, randn_like(x0, rng), t)
    with torch.no_grad():
        guided = Guided(block_causal(teacher, config, clean=x0), uncond, guidance_scale)
        x_next = x_t + (t_next - t)[:, :, None, None, None] * guided(x_t, t, cond)
        end = predict_x0(block_causal(target, config, clean=x0), scheduler, x_next, t_next, cond)
    guess = predict_x0(block_causal(model, config, clean=x0), scheduler, x_t, t, cond)
    return (guess.float() - end.float()).square().mean()


def sid_loss(
    video, real_score, fake_score, scheduler, cond, uncond, guidance_scale, *,
    alpha: float = 1.0, rng: Rng = None, t=None, noise=None, mask=None, observe=None,
) -> Tensor:  # fmt: skip
    """Score identity distillation (SiD, arXiv 2404.04057, eq. 23): like DMD, with the gradient through both scores too.

    mean [(real - fake) ((real - video) - alpha (real - fake))] / mean |video - real|, normaliser held fixed. Clear
    the critic's gradients before its own update: this loss leaves some there.
    """
    t = scheduler.sample_times(video.shape[0], rng).to(video.device) if t is None else t
    x_t = scheduler.add_noise(video, randn_like(video, rng) if noise is None else noise, t)
    fake = predict_x0(fake_score, scheduler, x_t, t, cond).float()
    real = predict_x0(Guided(real_score, uncond, guidance_scale), scheduler, x_t, t, cond).float()
    normaliser = _mean_abs(video - real).detach()
    if observe:
        observe(t=t, score_distance=_mean_abs(fake - real).detach().flatten(), normaliser=normaliser.flatten())
    return _mean((real - fake) * ((real - video) - alpha * (real - fake)) / normaliser, mask)


def gan_generator_loss(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """Non-saturating GAN loss of the generator; with real_logits, relativistic (R3GAN, arXiv 2501.05441)."""
    return F.softplus(-fake_logits if real_logits is None else real_logits - fake_logits).mean()


def gan_discriminator_loss(real_logits: Tensor, fake_logits: Tensor, relativistic: bool = False) -> Tensor:
    """Logistic GAN loss of the discriminator."""
    if relativistic:
        return F.softplus(fake_logits - real_logits).mean()
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def gan_step(
    generator, real_score, discriminator, scheduler, noise, cond, uncond, config: SelfForcingConfig, *, data,
    relativistic=True, r1_weight=1.0, r2_weight=1.0, sigma=0.1, student_video=training_rollout, rng: Rng = None,
    shared_rng: Rng = None, observe: Callable | None = None,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """Self-Forcing with a GAN: `self_forcing_step` with a discriminator(x_t, t, cond) -> logits [B] for the scores.

    It compares the student's clip with data [B, F, C, H, W], both noised alike; neither teacher nor guidance takes
    part. r1_weight and r2_weight penalise its slope at the data and at the student's videos (`slope_penalty`).
    """
    given = {"cond": cond, "config": config, "data": data, "rng": rng, "shared_rng": shared_rng}
    roll = partial(student_video, generator, scheduler, **given)
    video, exit_step = roll(noise)
    data = data[:, -video.shape[1] :]

    def noised(*clips):
        t = score_times(scheduler, config, exit_step, len(data), rng).to(data.device)
        noise = randn_like(data, rng)
        return [scheduler.add_noise(clip, noise, t) for clip in clips], partial(discriminator, t=t, cond=cond)

    (fake, real), judge = noised(video, data)
    with torch.no_grad():
        real_logits = judge(real) if relativistic else None
    fake_logits = judge(fake)
    if fake_logits.shape != (len(data),):
        raise ValueError(f"A discriminator gives a logit per clip, not {list(fake_logits.shape)}; see discriminator.py")
    yield "generator", gan_generator_loss(fake_logits, real_logits)
    for _ in range(config.critic_steps):
        if config.fresh_rollouts:
            with torch.no_grad():
                video, exit_step = roll(randn_like(noise, rng))
        (fake, real), judge = noised(video.detach(), data)
        real_logits, fake_logits = judge(real), judge(fake)
        loss = gan_discriminator_loss(real_logits, fake_logits, relativistic)
        for weight, x, logits in ((r1_weight, real, real_logits), (r2_weight, fake, fake_logits)):
            if weight:
                loss = loss + 0.5 * weight * slope_penalty(judge, x, logits, sigma, rng)
        if observe:
            observe("critic", real_logit=real_logits.detach(), fake_logit=fake_logits.detach())
        yield "critic", loss


def slope_penalty(discriminator, x, logits, sigma: float, rng: Rng = None) -> Tensor:
    """R1 and R2 without second derivatives: the mean of ((D(x + sigma e) - D(x)) / sigma)^2, e standard normal, which
    is the squared length of D's gradient where D is straight within sigma."""
    moved = discriminator(x + sigma * randn_like(x, rng))
    return ((moved - logits) / sigma).square().mean()


class SelfForcingEngine:
    """The two uses of `rollout` under the names of older documents: simulate (training) and generate (inference)."""

    def __init__(self, generator, scheduler, config: RolloutConfig | None = None):
        self.generator, self.scheduler, self.config = generator, scheduler, config or RolloutConfig()

    def simulate(self, noise: Tensor, cond, exit_step: int | Sequence[int] | None = None, rng: Rng = None) -> Tensor:
        """A training rollout [B, F, C, H, W]: the exit call of every block keeps its gradient."""
        blocks = rollout(self.generator, self.scheduler, noise, cond, self.config, exit_step=exit_step, rng=rng)
        return torch.cat(list(blocks), dim=1)

    def generate(self, noise: Tensor, cond, rng: Rng = None) -> Tensor:
        """An inference rollout [B, F, C, H, W]."""
        return generate(self.generator, self.scheduler, noise, cond, self.config, rng=rng)


def _self_check():
    """Run everything above on a ten-line generator whose next frame is its last remembered frame plus `stride`."""

    class Stairs(torch.nn.Module):
        def __init__(self, stride):
            super().__init__()
            self.stride = torch.nn.Parameter(torch.tensor(stride))

        def forward(self, x_t, t, cond, cache=None):
            past = cache.layers[0][0][:, -1:, 0] if cache and cache.frames else torch.zeros(())  # [b 1 d]
            x0 = past.reshape(-1, 1, 1, 1, 1) + self.stride * torch.arange(1, x_t.shape[1] + 1).reshape(-1, 1, 1, 1)
            return FlowMatchScheduler().to_flow(x0.expand_as(x_t), x_t, t)

        def remember(self, x, t, cond, cache):
            return cache.extend([(x.flatten(2)[:, :, None],) * 2], x.shape[1])  # one token per frame

    torch.manual_seed(0)
    scheduler, config = FlowMatchScheduler(), RolloutConfig(frames_per_block=2, window_frames=3)
    student, noise = Stairs(1.0), torch.randn(1, 6, 1, 1, 1)
    video = torch.cat(list(rollout(student, scheduler, noise, {}, config, exit_step=1)), dim=1)
    print(
        "rollout of three blocks, each left at its second denoising step:",
        [round(x, 3) for x in video.flatten().tolist()],
    )
    video.sum().backward()
    print("gradient of its sum:", student.stride.grad.item(), "= 3 blocks x (1 + 2); the cache passes none on")

    settings = SelfForcingConfig(config, 1.0, critic_steps=5, gradient_frames=6, min_num_frames=6, max_num_frames=6)
    teacher, critic = Stairs(0.5), Stairs(1.0)
    networks = {"generator": student, "critic": critic}
    optimizers = {
        name: torch.optim.Adam(network.parameters(), 0.02, betas=(0.0, 0.9)) for name, network in networks.items()
    }
    for _ in range(100):
        for name, loss in self_forcing_step(student, teacher, critic, scheduler, noise, {}, {}, settings):
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
    print(f"a hundred steps of Algorithm 1: stride 1 became {student.stride.item():.2f}, the teacher's is 0.5")


if __name__ == "__main__":
    _self_check()
