"""A video that goes on as long as somebody watches, and that listens: between two blocks, its prompt, what it remembers
and its numbers may change.

    live = Live(live_model(load_model("checkpoints/student.safetensors")), "a 3 moving right")
    next(live).pixels                                    # [1, f, C, H, W] in [-1, 1]; and so on, without end
    live.change(prompt="a 7 moving down", cache="anew")  # from the next block on

It is `rollout`, block after block, each continuing the cache that the last one returned. Memory stays the same however
long it runs: of the frames that were made, only those are kept that the cache holds. Noise is a function of the seed
and the block, so the same seed and the same changes at the same blocks are the same video. The notebook's player
(visualization/live.py) and the web page (demo.py) show this source and add nothing to it.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from dynamic_video_sf import CachePair, Guided, RolloutConfig, recache, renoise, rollout, stochastic
from flow_match import FlowMatchScheduler
from generate import LoadedModel, checked, draw_noise
from kv_cache import KVCache, block_borders
from moving_mnist import DIRECTIONS, Digit, format_prompt
from randomness import generator

CACHES = ("kept", "anew", "emptied")  # what to do about the past when the prompt changes
MOST_FRAMES = 48  # that a user may have remembered, of the sink and of the window each


@dataclass(frozen=True)
class LiveModel:
    """What a live video needs of a model that makes videos block by block, on Moving MNIST or on Wan's latents.

    generator: with the two methods that `rollout` asks for. frame_shape: (C, H, W) of a frame. check(prompt): the
    prompt as the model knows it, or a ValueError. read(prompt): its cond. decoder(): a new function from the next
    frames [1, n, C, H, W] to their pixels, pictures_per_frame of each; it may remember the frames before. whole_clip:
    the model makes all frames of a clip at once, and what is shown is one clip after another. fps: at which pictures
    are meant to be seen. The rest is for who types prompts: their grammar, some of them, and, for prompts of one
    pattern, the words that fill it.
    """

    generator: object
    scheduler: FlowMatchScheduler
    rollout: RolloutConfig
    frame_shape: tuple[int, int, int]
    check: Callable[[str], str]
    read: Callable[[str], Mapping[str, Tensor]]
    decoder: Callable[[], Callable[[Tensor], Tensor]] = lambda: torch.Tensor.float  # frames that are pixels already
    sampler: Callable = renoise
    device: torch.device | str | None = None
    whole_clip: bool = False
    pictures_per_frame: int = 1
    fps: int = 8
    most_frames: int = MOST_FRAMES
    grammar: str = ""
    examples: Sequence[str] = ()
    pattern: str = ""
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)


def live_model(loaded: LoadedModel) -> LiveModel:
    """A trained model of Moving MNIST, sampled as generate.py samples it."""
    sampling, one_digit = loaded.sampling, [Digit("{digit}", "{direction}")]
    guided, uncond = sampling.guidance_scale != 1, loaded.encode([""])[1]
    more = "" if loaded.world.num_digits == 1 else f', {loaded.world.num_digits} of them joined by " and "'
    return LiveModel(
        generator=Guided(loaded.model, uncond, sampling.guidance_scale) if guided else loaded.model,
        scheduler=loaded.scheduler,
        rollout=bounded(sampling.rollout, loaded.num_frames),
        frame_shape=loaded.frame_shape,
        check=partial(checked, world=loaded.world),
        read=lambda prompt: loaded.encode([prompt])[0],
        sampler=stochastic(sampling.fresh_noise),
        device=next(loaded.model.parameters()).device,
        whole_clip=sampling.whole_clip,
        grammar=f"a DIGIT moving DIRECTION{more}, with DIGIT 0 to 9 and DIRECTION one of {', '.join(DIRECTIONS)}",
        examples=[format_prompt(digits_of(loaded.world.num_digits, first)) for first in (3, 7, 0)],
        pattern=format_prompt(one_digit) if loaded.world.num_digits == 1 else "",
        words={"digit": [*map(str, range(10))], "direction": [*DIRECTIONS]} if loaded.world.num_digits == 1 else {},
    )


def digits_of(num_digits: int, first: int) -> list[Digit]:
    directions = list(DIRECTIONS)
    return [Digit((first + 4 * i) % 10, directions[(first + 3 * i) % 8]) for i in range(num_digits)]


def bounded(config: RolloutConfig, num_frames: int) -> RolloutConfig:
    """The same with a window, since nobody can remember an endless video: where there is none, a block and its past
    are as many frames as a clip of training."""
    if config.window_frames is not None:
        return config
    sizes = config.frames_per_block
    return replace(config, window_frames=max(0, num_frames - (sizes if isinstance(sizes, int) else sizes[-1])))


@dataclass(frozen=True)
class Block:
    """A block of a live video. Frames are counted from the beginning of the video, whatever the cache has forgotten.

    video: the clean frames [1, n, C, H, W]. pixels [1, f, 1 or 3, H, W] in [-1, 1]; stills [n, 1 or 3, H, W], the last
    picture of each frame. held: the past frames that the block saw, the sink first, num_sink of them. seconds: what it
    took, with what the block before still had to be remembered.
    """

    index: int
    frames: range
    video: Tensor
    pixels: Tensor
    stills: Tensor
    held: tuple[int, ...]
    num_sink: int
    window_frames: int
    prompt: str
    seed: int
    seconds: float

    @property
    def fps(self) -> float:
        """Pictures made per second."""
        return self.pixels.shape[1] / self.seconds


@dataclass(frozen=True)
class Change:
    """What is to be different from the next block on; None leaves it. cache: one of CACHES. seed: begins anew."""

    prompt: str | None = None
    cache: str = "kept"
    sink_frames: int | None = None
    window_frames: int | None = None
    seed: int | None = None


class Live(Iterator[Block]):
    """An endless iterator of blocks; `change` may be called at any time, from any thread."""

    def __init__(
        self, model: LiveModel, prompt: str, *, seed: int = 0, sink_frames: int | None = None,
        window_frames: int | None = None,
    ):  # fmt: skip
        self.model, self.config = model, model.rollout
        self.changes: deque[Change] = deque()
        self.change(prompt=prompt, seed=seed, sink_frames=sink_frames, window_frames=window_frames)
        self.latents = self._latents()

    def change(self, **wanted) -> None:
        """Take a Change, given by its fields, at the next border of blocks.

        Raises ValueError, and changes nothing, for prompts and numbers that the model does not take.
        """
        change = Change(**wanted)
        if change.cache not in CACHES:
            raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {change.cache!r}.")
        for name in ("sink_frames", "window_frames"):
            count, most = getattr(change, name), self.model.most_frames
            if count is not None and not 0 <= count <= most:
                raise ValueError(f"{name} must be between 0 and {most}, got {count}.")
        if change.prompt is not None:
            change = replace(change, prompt=self.model.check(change.prompt))
        self.changes.append(change)

    @torch.no_grad()
    def __next__(self) -> Block:
        begin = perf_counter()
        self.newest = next(self.latents)
        pixels = self.decode(self.newest)
        cache, step = one_of(self.cache), self.model.pictures_per_frame
        first = self.origin + cache.next_frame
        return Block(
            index=self.num_blocks,
            frames=range(first, first + self.newest.shape[1]),
            video=self.newest,
            pixels=pixels,
            stills=pixels[0, (pixels.shape[1] - 1) % step :: step],
            held=tuple(self.origin + frame for frame in cache.frames),
            num_sink=sum(frame < cache.sink_frames for frame in cache.frames),
            window_frames=cache.window_frames,
            prompt=self.prompt,
            seed=self.seed,
            seconds=perf_counter() - begin,
        )

    def _latents(self) -> Iterator[Tensor]:
        """The clean blocks [1, n, C, H, W]; what was asked for while one was shown is done before the next."""
        while True:
            while self.changes:
                self._apply(self.changes.popleft())
            yield from self._block()
            self.num_blocks += 1
            if self.model.whole_clip:
                self._empty(next_frame=self.origin + self.newest.shape[1])
                self.decode = self.model.decoder()

    def _block(self) -> Iterator[Tensor]:
        """One block, and what the cache remembers of it."""
        model, start = self.model, self.cache.next_frame
        size = block_borders(start + 1, self.config.frames_per_block)[-1] - start
        noise, rng = draw_noise([self._key()], size, model.frame_shape, model.device)
        settings = {"cache": self.cache, "rng": rng, "sampler": model.sampler}
        blocks = rollout(model.generator, model.scheduler, noise, self.cond, self.config, **settings)
        if model.whole_clip:  # what it would remember is of no use
            yield next(blocks)
            return
        self.cache = yield from blocks
        self.past |= zip(range(start, start + size), self.newest.split(1, dim=1), strict=True)
        self._forget()

    def _key(self) -> tuple:
        """What fixes the numbers of the next block: the seed and its first frame, whatever came before."""
        return self.seed, "live", self.origin + self.cache.next_frame

    def _forget(self) -> None:
        """Keep only the frames that the cache holds: to see them anew, under another prompt, nothing else is needed."""
        self.past = {frame: self.past[frame] for frame in one_of(self.cache).frames}

    # ------------------------------------------------------------------------------------------ between two blocks

    def _apply(self, change: Change) -> None:
        sizes = {name: getattr(change, name) for name in ("sink_frames", "window_frames")}
        self.config = replace(self.config, **{name: count for name, count in sizes.items() if count is not None})
        if change.seed is not None:
            self._begin(change.seed)
        if change.prompt is not None:
            self.prompt, self.cond = change.prompt, self.model.read(change.prompt)
        self.cache = each(self.cache, partial(resized, config=self.config))
        self._forget()
        if change.cache == "anew":
            self._see_anew()
        elif change.cache == "emptied":
            self._empty(next_frame=self.origin + self.cache.next_frame)

    def _begin(self, seed: int) -> None:
        self.seed, self.num_blocks, self.decode = seed, 0, self.model.decoder()
        self._empty(next_frame=0)

    def _empty(self, next_frame: int) -> None:
        """Forget everything. For the cache the next frame is the first; in the video it has the number next_frame."""
        self.cache, self.past, self.origin = self.config.empty_cache(), {}, next_frame

    def _see_anew(self) -> None:
        """Read the frames that the cache holds under the new prompt; what is read without a prompt stays as it is."""
        model, config, guided = self.model, self.config, isinstance(self.cache, CachePair)
        if not self.past:
            return
        plain = model.generator.generator if guided else model.generator
        rng = [generator(*self._key(), "recache")]
        past = torch.cat([*self.past.values()], dim=1)
        fresh = recache(plain, model.scheduler, past, self.cond, config, one_of(self.cache), rng=rng)
        self.cache = replace(self.cache, cond=fresh) if guided else fresh


def resized(cache: KVCache, config: RolloutConfig) -> KVCache:
    """The cache with the sink and window of `config`, at once and as far as that is still possible.

    A frame that was evicted cannot come back: a larger window fills up with the frames to come, and of a larger sink
    only those frames count that are still held, or have not been made yet. (A KVCache takes its oldest `sink_frames`
    frames for the sink and, with sink_follows, turns their keys: it must never count a frame that is none.)
    """
    lost = [frame for frame in range(min(config.sink_frames, cache.next_frame)) if frame not in cache.frames]
    sink_frames = min(lost, default=config.sink_frames)
    cache = replace(cache, sink_frames=sink_frames, window_frames=config.window_frames)
    return cache.extend([(k[:, :0], v[:, :0]) for k, v in cache.layers], 0)  # no new frames: evicts by its own rule


def each(cache: KVCache | CachePair, change: Callable[[KVCache], KVCache]) -> KVCache | CachePair:
    """A changed cache, or both of a guided generator's."""
    if isinstance(cache, CachePair):
        return CachePair(change(cache.cond), change(cache.uncond))
    return change(cache)


def one_of(cache: KVCache | CachePair) -> KVCache:
    """The cache that says which frames are held; a guided generator's two hold the same."""
    return cache.cond if isinstance(cache, CachePair) else cache
