"""Lesson 0: wrong and right answers."""

import hashlib
from dataclasses import replace
from itertools import chain, repeat

import numpy as np
import torch

from dynamic_video_sf import generate, prefill
from generate import draw_noise, sample_keys


def forgets_the_shift(video):
    return (video.clamp(0, 1) * 255).round().byte().numpy()


def wraps_around(video):
    return np.rint((video.numpy() + 1) * 127.5).astype(np.int64).astype(np.uint8)


def cuts_off(video):
    return ((video + 1) / 2).clamp(0, 1).mul(255).byte().numpy()


def stretches(video):
    x = video - video.min()
    return (x / x.max().clamp(min=1e-6) * 255).round().byte().numpy()


def gives_floats(video):
    return ((video + 1) / 2).clamp(0, 1).numpy()


def with_numpy(video):
    return np.rint(np.clip(video.numpy() * 127.5 + 127.5, 0, 255)).astype(np.uint8)


def pattern_of(frames_per_block):
    pattern = (frames_per_block,) if isinstance(frames_per_block, int) else tuple(frames_per_block)
    return chain(pattern, repeat(pattern[-1]))


def cuts_the_last_block(num_frames, frames_per_block, *, first_frame=0):
    sizes = []
    for size in pattern_of(frames_per_block):
        if sum(sizes) >= num_frames:
            return sizes
        sizes.append(min(size, num_frames - sum(sizes)))


def adds_frames(num_frames, frames_per_block, *, first_frame=0):
    sizes = []
    for size in pattern_of(frames_per_block):
        if sum(sizes) >= num_frames:
            return sizes
        sizes.append(size)


def begins_the_pattern_anew(num_frames, frames_per_block, *, first_frame=0):
    sizes = adds_frames(num_frames, frames_per_block)
    if sum(sizes) != num_frames:
        raise ValueError(f"use {sum(sizes[:-1])} or {sum(sizes)} frames")
    return sizes


def complains_without_a_way_out(num_frames, frames_per_block, *, first_frame=0):
    try:
        return by_walking(num_frames, frames_per_block, first_frame=first_frame)
    except ValueError as error:
        raise ValueError("wrong number of frames") from error


def names_borders(num_frames, frames_per_block, *, first_frame=0):
    try:
        return by_walking(num_frames, frames_per_block, first_frame=first_frame)
    except ValueError:
        end = first_frame + num_frames
        size = frames_per_block if isinstance(frames_per_block, int) else frames_per_block[-1]
        raise ValueError(f"use {end // size * size} or {(end // size + 1) * size} frames") from None


def by_walking(num_frames, frames_per_block, *, first_frame=0):
    """Walk over the whole video, block after block, and keep those from first_frame on."""
    at, sizes = 0, []
    for size in pattern_of(frames_per_block):
        if at >= first_frame + num_frames:
            break
        if at >= first_frame:
            sizes.append(size)
        elif at + size > first_frame:
            raise ValueError(f"frame {first_frame} lies inside a block")
        at += size
    if sum(sizes) != num_frames:
        raise ValueError(f"give {sum(sizes[:-1])} or {sum(sizes)} frames, not {num_frames}")
    return sizes


def seeded(*key):
    digest = hashlib.sha256(str(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def one_stream_for_all(keys, num_frames, frame_shape, device=None):
    rng = seeded(keys[0])
    return torch.randn(len(keys), num_frames, *frame_shape, generator=rng), [seeded(key, "later") for key in keys]


def whole_clips_at_once(keys, num_frames, frame_shape, device=None):
    noise = [torch.randn(num_frames, *frame_shape, generator=seeded(key)) for key in keys]
    return torch.stack(noise), [seeded(key, "later") for key in keys]


def seed_alone(keys, num_frames, frame_shape, device=None):
    return by_hash([key[:1] for key in keys], num_frames, frame_shape)


def hash_of_python(keys, num_frames, frame_shape, device=None):
    streams = [torch.Generator().manual_seed(hash(key) % 2**32) for key in keys]
    frames = [torch.stack([torch.randn(frame_shape, generator=g) for g in streams]) for _ in range(num_frames)]
    return torch.stack(frames, dim=1), [seeded(key, "later") for key in keys]


def global_seed(keys, num_frames, frame_shape, device=None):
    noise = []
    for key in keys:
        torch.manual_seed(seeded(key).initial_seed())
        noise.append(torch.stack([torch.randn(frame_shape) for _ in range(num_frames)]))
    return torch.stack(noise), [seeded(key, "later") for key in keys]


def one_purpose(keys, num_frames, frame_shape, device=None):
    noise, _ = by_hash(keys, num_frames, frame_shape)
    return noise, [seeded(key, 0) for key in keys]


def uniform(keys, num_frames, frame_shape, device=None):
    noise, rng = by_hash(keys, num_frames, frame_shape)
    return torch.special.ndtr(noise), rng


def by_hash(keys, num_frames, frame_shape, device=None):
    """A generator for every frame of every video."""
    noise = [[torch.randn(frame_shape, generator=seeded(key, i)) for i in range(num_frames)] for key in keys]
    return torch.stack([torch.stack(frames) for frames in noise]), [seeded(key, "later") for key in keys]


def parts(loaded, prompt, num_frames, seed):
    noise, rng = draw_noise(sample_keys([prompt], seed), num_frames, loaded.frame_shape)
    return (loaded.model, loaded.scheduler), noise, loaded.encode([prompt])[0], loaded.sampling.rollout, rng


def starts_anew(loaded, video, prompt, num_frames, seed=0):
    given, noise, cond, config, rng = parts(loaded, prompt, num_frames, seed)
    return torch.cat([video, generate(*given, noise, cond, config, rng=rng)], dim=1)


def reads_it_in_one_block(loaded, video, prompt, num_frames, seed=0):
    given, noise, cond, config, rng = parts(loaded, prompt, num_frames, seed)
    cache = loaded.model.remember(video, 0.0, cond, config.empty_cache())
    return torch.cat([video, generate(*given, noise, cond, config, cache=cache, rng=rng)], dim=1)


def gives_the_new_frames_alone(loaded, video, prompt, num_frames, seed=0):
    return by_hand(loaded, video, prompt, num_frames, seed)[:, video.shape[1] :]


def forgets_where_it_is(loaded, video, prompt, num_frames, seed=0):
    given, noise, cond, config, rng = parts(loaded, prompt, num_frames, seed)
    cache = replace(prefill(*given, video, cond, config, rng=rng), next_frame=0)
    return torch.cat([video, generate(*given, noise, cond, config, cache=cache, rng=rng)], dim=1)


def draws_from_torchs_state(loaded, video, prompt, num_frames, seed=0):
    given, noise, cond, config, _ = parts(loaded, prompt, num_frames, seed)
    cache = prefill(*given, video, cond, config)
    return torch.cat([video, generate(*given, noise, cond, config, cache=cache)], dim=1)


def by_hand(loaded, video, prompt, num_frames, seed=0):
    given, noise, cond, config, rng = parts(loaded, prompt, num_frames, seed)
    cache, t = config.empty_cache(), config.context_noise / 1000
    for block in video.split(config.frames_per_block, dim=1):
        noisy = loaded.scheduler.add_noise(block, torch.randn(block.shape, generator=seeded(seed)), t)
        cache = loaded.model.remember(noisy, t, cond, cache)
    return torch.cat([video, generate(*given, noise, cond, config, cache=cache, rng=rng)], dim=1)


WRONG = {
    "to_pixels": [forgets_the_shift, wraps_around, cuts_off, stretches, gives_floats],
    "block_sizes": [
        cuts_the_last_block,
        adds_frames,
        begins_the_pattern_anew,
        complains_without_a_way_out,
        names_borders,
    ],
    "draw_noise": [
        one_stream_for_all,
        whole_clips_at_once,
        seed_alone,
        hash_of_python,
        global_seed,
        one_purpose,
        uniform,
    ],
    "continue_video": [
        starts_anew,
        reads_it_in_one_block,
        gives_the_new_frames_alone,
        forgets_where_it_is,
        draws_from_torchs_state,
    ],
}
RIGHT = {
    "to_pixels": with_numpy,
    "block_sizes": by_walking,
    "draw_noise": by_hash,
    "continue_video": by_hand,
}
