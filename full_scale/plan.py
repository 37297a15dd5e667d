"""What training and inference will cost: `python -m full_scale.plan --model t2v-14b --gpus 64`

Counts parameters, bytes per GPU, FLOPs, time and GPU hours of what `rollout` and `self_forcing_step` do with a Wan
model, before any GPU is rented, and prints the arithmetic: every line can be checked by hand.

FLOPs are those of the matrix products, a product of [a, b] and [b, c] being 2 a b c. Time is FLOPs divided by the
GPU's peak and by an assumed utilisation: replace it with one that you measured. Memory is what the tensors of the
worst moment take, with an attention kernel that keeps no scores (flash, SDPA); GB are 10^9 bytes. bf16 means that
networks compute in it; what is trained stays float32: weights, gradients, optimizer and average. Not counted: the
communication, the optimizer's arithmetic, the time of VAE and text encoder, what the VAE encodes with, and CLIP.
"""

import argparse
import json
import operator
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partialmethod
from itertools import accumulate
from pathlib import Path

from checkpoint import atomic
from dynamic_video_sf import RolloutConfig, SelfForcingConfig
from full_scale.pixels import FPS, STRIDE, TIME_STRIDE, check_size
from full_scale.wan import WAN_CONFIGS
from kv_cache import block_sizes, remembers
from ode_pairs import grid
from tiny_causal_wan import CLIP_DIM, WanConfig

VAE_PARAMETERS = 126_892_531  # of Wan2.1_VAE.pth
DECODER_MEMORY, DECODER_WORKING = 151_328, 161_600  # numbers for each pixel of a latent: kept, and at the worst moment
UMT5 = {"vocabulary": 256_384, "layers": 24, "dim": 4096, "ffn_dim": 10_240, "position_biases": 32 * 64}
IMAGE_TOKENS = 257  # of CLIP, which i2v models read besides the prompt
PEAK_TFLOPS = {"bf16": 989.0, "fp32": 67.0}  # of an H100 SXM, dense
BYTES = {"bf16": 2, "fp32": 4}
CHOICES = {"sharding": ("full", "hybrid"), "precision": tuple(BYTES), "objective": ("dmd", "sid")}
WORDS = {"dmd": "DMD", "sid": "SiD"}
SPARE = 0.1  # of a GPU's memory, left to CUDA, NCCL and fragmentation

NAMES = {config: name for name, config in WAN_CONFIGS.items()}
# What the released configurations of Self-Forcing (1.3B) and Self-Forcing-Plus (14B, whole clips) differ in.
PUBLISHED = {
    "t2v-1.3b": {"teacher": "t2v-14b", "sharding": "hybrid", "frames_per_block": RolloutConfig.frames_per_block},
    "t2v-14b": {"teacher": "t2v-14b", "sharding": "full", "frames_per_block": None},
    "i2v-14b": {"teacher": "i2v-14b", "sharding": "full", "frames_per_block": None},
}


# ------------------------------------------------------------------------------------- numbers that show themselves

SUM, PRODUCT, ATOM = range(3)
OPERATIONS = {"+": operator.add, "-": operator.sub, "x": operator.mul, "/": operator.truediv}


class Shown(float):
    """A number whose text is the arithmetic that made it: what is printed is what was computed."""

    def __new__(cls, value: float, text: str = "", rank: int = ATOM):
        self = super().__new__(cls, value)
        self.text, self.rank = text or count(value), rank
        return self

    def within(self, rank: int) -> str:
        return self.text if self.rank >= rank else f"({self.text})"

    def before(self, sign: str, rank: int, other: float) -> "Shown":
        other = other if isinstance(other, Shown) else Shown(other)
        if rank == SUM and 0 in (self, other) and (sign == "+" or other == 0):  # nothing to show
            return self if other == 0 else other
        text = f"{self.within(rank)} {sign} {other.within(rank + (sign in '-/'))}"
        return Shown(OPERATIONS[sign](float(self), float(other)), text, rank)

    def after(self, sign: str, rank: int, other: float) -> "Shown":
        return Shown(other).before(sign, rank, self)

    __add__, __radd__ = partialmethod(before, "+", SUM), partialmethod(after, "+", SUM)
    __mul__, __rmul__ = partialmethod(before, "x", PRODUCT), partialmethod(after, "x", PRODUCT)
    __sub__, __truediv__ = partialmethod(before, "-", SUM), partialmethod(before, "/", PRODUCT)


def n(value: float, words: str = "") -> Shown:
    """A number to begin with, and what it counts."""
    words = words[:-1] if value == 1 and words.endswith("s") else words
    return Shown(value, f"{count(value)} {words}".strip())


def named(value: float, unit: str) -> Shown:
    """A result by itself: its own arithmetic is shown elsewhere."""
    return Shown(value, quantity(value, unit))


def count(value: float) -> str:
    whole = float(value).is_integer() or abs(value) >= 1000
    return f"{value:,.0f}" if whole else f"{value:.4g}"


def quantity(value: float, unit: str) -> str:
    """Bytes in GB and FLOPs with the prefix that suits them, to four digits; the rest as it is."""
    prefixes = {"B": ["G"], "FLOP": ["G", "T", "P", "E"]}.get(unit)
    if not prefixes:
        return f"{count(value)} {unit}".strip()
    scales = {prefix: 10.0 ** (9 + 3 * i) for i, prefix in enumerate(prefixes)}
    prefix = max((p for p in prefixes if scales[p] <= value), key=scales.get, default="G")
    return f"{value / scales[prefix]:.4g} {prefix}{unit}"


@dataclass(frozen=True)
class Line:
    """A result, what it is, and its unit."""

    label: str
    number: Shown
    unit: str = ""

    def __str__(self) -> str:
        result = quantity(self.number, self.unit)
        shown = result if self.number.rank == ATOM else f"{self.number.text} = {result}"
        kept = re.sub(r"(?<=\d) (?=[A-Za-z]{2}|[Bsh]\b)", "\xa0", f"  {self.label:<30}  {shown}")  # number and unit
        return textwrap.fill(kept, 120, subsequent_indent=" " * 34).replace("\xa0", " ")


# ----------------------------------------------------------------------------------------------------- the setup


@dataclass(frozen=True)
class Setup:
    """What is planned. The critic is as large as the student, as published.

    Clips have algorithm.max_num_frames, of latent [height, width]. batch is global; a GPU works on micro_batch videos
    at once, and gradients accumulate. sharding: "full", over all GPUs, or "hybrid", over those of a node. offload:
    shards (at inference, layers and VAE) wait in the host's memory. text_encoder: on every GPU too, whole or sharded;
    else, prompts are read from disk. objective: "dmd", or "sid", whose gradient passes through both scores.
    utilisation: the fraction of peak_tflops (None: an H100's) that is reached. gpu_memory: GB. A cache that keeps
    gradients or whose sink follows is counted as one that does not.
    """

    student: WanConfig = WAN_CONFIGS["t2v-1.3b"]
    teacher: WanConfig = WAN_CONFIGS["t2v-14b"]
    algorithm: SelfForcingConfig = SelfForcingConfig()
    latent: tuple[int, int] = (60, 104)
    batch: int = 64
    micro_batch: int = 1
    steps: int = 120
    gpus: int = 64
    gpus_per_node: int = 8
    sharding: str = "hybrid"
    checkpointing: bool = True
    precision: str = "bf16"
    offload: bool = False
    text_encoder: bool = True
    sharded_text_encoder: bool = False
    objective: str = "dmd"
    utilisation: float = 0.4
    peak_tflops: float | None = None
    gpu_memory: float = 80.0

    def __post_init__(self):
        for name in ("batch", "micro_batch", "steps", "gpus", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("gpu_memory", "peak_tflops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"--{name} must be above 0, got {value}.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} must be {' or '.join(choices)}, got {getattr(self, name)}.")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"--utilisation is a fraction of the peak, above 0 and up to 1, got {self.utilisation}.")
        kind = self.student.model_type
        if kind != self.teacher.model_type:
            raise ValueError(
                f"A {kind} student learns from a {kind} teacher: choose a --teacher whose name says {kind}."
            )
        self.check_division()

    def check_division(self) -> None:
        """Whole nodes, and as many videos on each GPU. Raises ValueError."""
        node, at_once = self.gpus_per_node, self.gpus * self.micro_batch
        if self.gpus > node and self.gpus % node:
            below = self.gpus // node * node
            raise ValueError(f"--gpus {self.gpus} is not a whole number of nodes: use {below} or {below + node}.")
        if self.batch % at_once:
            fitting = -(-self.batch // at_once) * at_once
            raise ValueError(
                f"--batch {self.batch} does not divide over {self.gpus} GPUs with {self.micro_batch} each: "
                f"use --batch {fitting}, or other --gpus."
            )

    @property
    def peak(self) -> float:
        """FLOP per second of a GPU."""
        return 1e12 * (self.peak_tflops or PEAK_TFLOPS[self.precision])

    @property
    def shards(self) -> int:
        return self.gpus if self.sharding == "full" else min(self.gpus, self.gpus_per_node)

    @property
    def num_frames(self) -> int:
        return self.algorithm.max_num_frames

    @property
    def tokens_per_frame(self) -> int:
        _, height, width = self.student.patch_size
        return (self.latent[0] // height) * (self.latent[1] // width)

    @property
    def wide(self) -> Shown:
        """Bytes of a number that is computed with."""
        return n(BYTES[self.precision], "B")


@dataclass(frozen=True)
class Block:
    """The frames of a block, the past ones it sees, those that the cache holds after it; whether it has a gradient."""

    frames: int
    past: int = 0
    held: int = 0
    learns: bool = True


def blocks(setup: Setup) -> list[Block]:
    """The blocks of a training rollout, by the cache's own rule."""
    rollout = setup.algorithm.rollout
    sizes = block_sizes(setup.num_frames, rollout.frames_per_block)
    unscored = setup.num_frames - setup.algorithm.gradient_frames

    def remembered(start):
        return sum(remembers(frame, start, rollout.sink_frames, rollout.window_frames) for frame in range(start))

    borders = zip(sizes, accumulate(sizes), strict=True)
    return [Block(size, remembered(end - size), remembered(end), end > unscored) for size, end in borders]


@dataclass(frozen=True)
class Work:
    """What calls of a network on one video add up to: their new tokens, the past tokens that they see, and the pairs
    of a query and a key that meet in self-attention."""

    config: WanConfig
    calls: int
    frames: int
    tokens: int
    past: int
    pairs: int


def work(setup: Setup, config: WanConfig, some: Sequence[Block]) -> Work:
    """One call for each of the blocks."""
    frames, past = sum(block.frames for block in some), sum(block.past for block in some)
    pairs = sum(block.frames * (block.past + block.frames) for block in some)
    each = setup.tokens_per_frame
    return Work(config, len(some), frames, frames * each, past * each, pairs * each**2)


def exit_calls(setup: Setup) -> Work:
    """The student's calls that keep a gradient: one for each block of which frames are scored."""
    return work(setup, setup.student, [block for block in blocks(setup) if block.learns])


def scored(setup: Setup, config: WanConfig) -> Work:
    """A score's call: all frames that it is shown see each other."""
    return work(setup, config, [Block(min(setup.num_frames, setup.algorithm.gradient_frames))])


# ----------------------------------------------------------------------------------------------------- parameters


def parameters(config: WanConfig) -> dict[str, Shown]:
    """How many parameters the parts of a Wan transformer have."""
    e, text, freq = n(config.dim), n(config.text_dim), n(config.freq_dim)
    _, height, width = config.patch_size
    parts = {
        "layers": n(config.num_layers, "layers") * n(layer_parameters(config)),
        "patch embedding": (n(config.in_dim * height * width) + 1) * e,
        "text embedding": (text + 1 + e + 1) * e,
        "time embedding": (freq + 1 + e + 1) * e + (e + 1) * 6 * e,
        "head": (e + 1) * n(config.out_dim * height * width) + 2 * e,
    }
    if config.model_type == "i2v":
        clip = n(CLIP_DIM)
        parts["image embedding"] = 2 * clip + (clip + 1) * clip + (clip + 1) * e + 2 * e
    return parts


def layer_parameters(config: WanConfig) -> Shown:
    """Two attentions of four maps each (two more for an image), feed-forward, modulation and norms."""
    e, f = n(config.dim), n(config.ffn_dim)
    i2v = config.model_type == "i2v"
    norms = (4 + i2v) * config.qk_norm + 2 * config.cross_attn_norm
    return (8 + 2 * i2v) * (e + 1) * e + 2 * e * f + f + e + 6 * e + norms * e


def num_parameters(config: WanConfig) -> Shown:
    return sum(n(part) for part in parameters(config).values())


def umt5_parameters() -> Shown:
    """The text encoder: attention, gated feed-forward, two norms and its own position biases in every layer."""
    e, f = n(UMT5["dim"]), n(UMT5["ffn_dim"])
    layer = 4 * e * e + 3 * e * f + 2 * e + UMT5["position_biases"]
    return n(UMT5["layers"], "layers") * layer + n(UMT5["vocabulary"], "words") * e + e


# ---------------------------------------------------------------------------------------------------------- FLOPs


def forward_flops(task: Work, head: bool = True) -> dict[str, Shown]:
    """FLOPs of calls on one video, by part; a memory pass has no head. Every call reads the prompt anew; that
    full_scale.generate reads it once saves half a percent of a video."""
    config, calls = task.config, n(task.calls, "calls")
    e, layers, tokens = n(config.dim), n(config.num_layers, "layers"), n(task.tokens, "tokens")
    prompt, text = n(prompt_tokens(config), "prompt tokens"), n(config.text_len, "text tokens")
    embeddings = first_maps(task) + 2 * calls * text * e * e + 14 * n(task.frames, "frames") * e * e
    if config.model_type == "i2v":
        embeddings += 2 * calls * n(IMAGE_TOKENS, "image tokens") * n(CLIP_DIM) * (n(CLIP_DIM) + e)
    parts = {
        "linear layers": 2 * layers * tokens * e * (6 * e + 2 * n(config.ffn_dim)),
        "self-attention": 4 * layers * n(task.pairs, "pairs") * e,
        "cross-attention": 4 * layers * prompt * e * (tokens + calls * e),
        "embeddings": embeddings,
    }
    _, height, width = config.patch_size
    return parts | ({"head": 2 * tokens * e * n(config.out_dim * height * width)} if head else {})


def prompt_tokens(config: WanConfig) -> int:
    """What cross-attention reads."""
    return config.text_len + (IMAGE_TOKENS if config.model_type == "i2v" else 0)


def first_maps(task: Work) -> Shown:
    """FLOPs of the maps of patches, text and time into the model: their inputs want no gradient."""
    config = task.config
    text = n(task.calls * config.text_len, "text tokens") * n(config.text_dim)
    return patch_map(task) + 2 * n(config.dim) * (text + n(task.frames, "frames") * n(config.freq_dim))


def patch_map(task: Work) -> Shown:
    config, (_, height, width) = task.config, task.config.patch_size
    return 2 * n(config.dim) * (n(task.tokens, "tokens") * n(config.in_dim * height * width))


def forward(task: Work, head: bool = True) -> Shown:
    return named(sum(forward_flops(task, head).values()), "FLOP")


def backward(task: Work) -> Shown:
    """Two products for each of the forward pass: by the weights, and by the inputs where these want a gradient."""
    return 2 * forward(task) - first_maps(task)


def backward_to_input(task: Work) -> Shown:
    """Of a frozen network, the products that lead to the video: one for each map of its tokens, two for each product of
    self-attention; keys and values of the prompt want no gradient."""
    config, flops = task.config, forward_flops(task)
    read = 4 * n(config.num_layers, "layers") * n(prompt_tokens(config)) * n(config.dim) * n(task.tokens, "tokens")
    maps = named(flops["linear layers"] + flops["head"], "FLOP")
    return maps + 2 * named(flops["self-attention"], "FLOP") + read + named(patch_map(task), "FLOP")


def recomputed(setup: Setup, task: Work) -> Shown:
    """Activation checkpointing runs the layers a second time."""
    if not setup.checkpointing:
        return n(0)
    flops = forward_flops(task)
    return sum(named(flops[name], "FLOP") for name in ("linear layers", "self-attention", "cross-attention"))


def rollout_flops(setup: Setup, calls: Shown, some: Sequence[Block], remembered: Sequence[Block]) -> Shown:
    """`calls` denoising calls for some blocks, and the memory passes of others, of one video."""
    memory = forward(work(setup, setup.student, remembered), head=False)
    return calls * forward(work(setup, setup.student, some)) + memory


def training_rollout_flops(setup: Setup) -> Shown:
    """Left at the last step or at a random one; nobody waits for what the last block leaves in the cache."""
    calls, clip = all_calls(setup), blocks(setup)
    mean = calls if setup.algorithm.exit_rule == "last" else n((float(calls) + 1) / 2, "calls")
    return rollout_flops(setup, mean, clip, clip[:-1])


def step_flops(setup: Setup) -> dict[str, Shown]:
    """One video in one training step: the calls of self_forcing_step, and what the backward passes add to them."""
    algorithm, learning = setup.algorithm, exit_calls(setup)
    critic, teacher = scored(setup, setup.student), scored(setup, setup.teacher)
    rollout, updates = training_rollout_flops(setup), n(algorithm.critic_steps, "updates")
    return {
        "rollout": rollout,
        "teacher in the loss": guided_calls(algorithm.guidance_scale) * forward(teacher),
        "critic in the loss": guided_calls(algorithm.fake_guidance_scale) * forward(critic),
        **(sid_flops(setup, critic, teacher) if setup.objective == "sid" else {}),
        "backward of exit calls": backward(learning),
        "recomputed exit calls": recomputed(setup, learning),
        "critic's rollouts": (updates if algorithm.fresh_rollouts else n(0)) * named(rollout, "FLOP"),
        "critic's forward passes": updates * forward(critic),
        "critic's backward passes": updates * backward(critic),
        "critic's recomputation": updates * recomputed(setup, critic),
    }


def sid_flops(setup: Setup, critic: Work, teacher: Work) -> dict[str, Shown]:
    """What SiD adds to the loss: both scores are differentiated, the critic, which is trained, by its weights too."""
    teachers, critics = (guided_calls(getattr(setup.algorithm, f"{who}guidance_scale")) for who in ("", "fake_"))
    return {
        "backward through the teacher": teachers * backward_to_input(teacher),
        "backward through the critic": critics * (backward(critic) + named(patch_map(critic), "FLOP")),
        "recomputed scores": teachers * recomputed(setup, teacher) + critics * recomputed(setup, critic),
    }


def guided_calls(guidance_scale: float | None) -> Shown:
    """A guided score is asked with the prompt and without."""
    return n(1 if guidance_scale in (None, 1) else 2, "calls")


def video_flops(setup: Setup) -> Shown:
    """A video at inference: every denoising step, and a memory pass after every block."""
    return rollout_flops(setup, all_calls(setup), blocks(setup), blocks(setup))


def all_calls(setup: Setup) -> Shown:
    return n(len(setup.algorithm.rollout.denoising_steps), "calls")


def seconds(setup: Setup, flops: Shown, gpus: int) -> Shown:
    peak = Shown(setup.peak, f"{quantity(setup.peak, 'FLOP')}/s")
    return flops / (n(gpus, "GPUs") * peak * n(setup.utilisation))


# --------------------------------------------------------------------------------------------------------- memory


def states(setup: Setup) -> dict[str, Shown]:
    """Bytes per GPU of what training holds all the time, in shards. Adam has two moments."""
    student, shards = n(num_parameters(setup.student), "parameters"), n(setup.shards, "GPUs")
    one, two = student * n(4, "B") / shards, 2 * student * n(4, "B") / shards
    trained = {"parameters": one, "gradients": one, "optimizer state": two}
    frozen = {"teacher": num_parameters(setup.teacher)}
    if setup.text_encoder and setup.sharded_text_encoder:
        frozen["text encoder"] = umt5_parameters()
    return {
        **{f"student's {name}": number for name, number in trained.items()},
        "student's EMA": one,
        **{f"critic's {name}": number for name, number in trained.items()},
        **{f"frozen {name}": n(number, "parameters") * setup.wide / shards for name, number in frozen.items()},
    }


def whole(setup: Setup) -> dict[str, Shown]:
    """Bytes of what every GPU holds for itself all the time, offload or not. The text encoder is loaded in bf16."""
    own = {"text encoder": n(umt5_parameters(), "parameters") * n(BYTES["bf16"], "B"), "VAE": vae()}
    return own if setup.text_encoder and not setup.sharded_text_encoder else {"VAE": vae()}


def vae() -> Shown:
    return n(VAE_PARAMETERS, "parameters") * n(4, "B")


def gathered(setup: Setup) -> Shown:
    """Bytes of what FSDP has whole at a time: two layers, what is around the layers, and one layer's gradient."""
    if setup.shards == 1 and setup.precision == "fp32" and not setup.offload:
        return n(0)
    largest = max((setup.student, setup.teacher), key=num_parameters)
    return whole_at_a_time(setup, largest) + n(layer_parameters(setup.student), "gradients") * n(4, "B")


def whole_at_a_time(setup: Setup, config: WanConfig) -> Shown:
    layer, around = layer_parameters(config), num_parameters(config) - parameters(config)["layers"]
    return (2 * n(layer, "parameters") + n(around, "parameters")) * setup.wide


def keys_values(setup: Setup, config: WanConfig, tokens: int) -> Shown:
    """Bytes of all layers' keys and values: of a cache, and of what a call holds of its own until it ends."""
    if not tokens:
        return n(0)
    return 2 * n(config.num_layers, "layers") * on_gpu(setup, tokens) * n(config.dim) * setup.wide


def on_gpu(setup: Setup, tokens: int) -> Shown:
    """Of all videos that a GPU works on."""
    return n(setup.micro_batch * tokens, "tokens")


def working(setup: Setup, task: Work) -> Shown:
    """Bytes that a call takes without a graph, those of one layer: in its feed-forward or, with a long past, where keys
    are put together."""
    e, f = n(task.config.dim), n(task.config.ffn_dim)
    tokens, past = on_gpu(setup, task.tokens), on_gpu(setup, task.past)
    return max(tokens * (5 * e + 2 * f) * setup.wide, (6 * tokens + 2 * past) * e * setup.wide)


def saved_layer(setup: Setup, task: Work, frozen: bool = False) -> Shown:
    """Bytes of the activations that a layer keeps for its backward pass.

    Of the width of the model: in float32 the inputs of three layer norms and of three RMS norms; besides, two products
    of each modulated norm, what q, k and v are before and after they are turned, what attention gives, and what a gate
    scales. Of the width of the feed-forward: two. Past keys and values are copied next to the new ones. A frozen layer
    keeps no inputs of its maps: beside those of the norms what attention takes and gives, and one of the feed-forward.
    """
    e, f, tokens = n(task.config.dim), n(task.config.ffn_dim), on_gpu(setup, task.tokens)
    i2v, norms = task.config.model_type == "i2v", 6 * n(4, "B")
    prompt = on_gpu(setup, task.calls * prompt_tokens(task.config))
    if frozen:
        return tokens * (e * (norms + (6 + i2v) * setup.wide) + f * setup.wide) + 2 * prompt * e * setup.wide
    own = tokens * (e * (norms + (16 + 2 * i2v) * setup.wide) + 2 * f * setup.wide)
    past = 2 * on_gpu(setup, task.past) * e * setup.wide if task.past else 0
    return own + prompt * e * (n(4, "B") + 3 * setup.wide) + past


def saved(setup: Setup, task: Work, frozen: bool = False) -> Shown:
    """Bytes of the activations that calls keep: all or, with activation checkpointing, what the layers start from.

    To that belong the caches, one for each block: a cache is a value, the next one is a copy.
    """
    layers = n(task.config.num_layers, "layers")
    if not setup.checkpointing:
        return layers * named(saved_layer(setup, task, frozen), "B") + saved_around(setup, task, frozen)
    starts = layers * on_gpu(setup, task.tokens) * n(task.config.dim) * setup.wide
    return starts + keys_values(setup, task.config, task.past) + saved_around(setup, task, frozen)


def saved_around(setup: Setup, task: Work, frozen: bool = False) -> Shown:
    """Bytes of what the head and the text embedding keep."""
    e, text = n(task.config.dim), on_gpu(setup, task.calls * task.config.text_len)
    if frozen:
        return on_gpu(setup, task.tokens) * e * n(4, "B")
    return on_gpu(setup, task.tokens) * e * (n(4, "B") + 2 * setup.wide) + 3 * text * e * setup.wide


def remember_memory(setup: Setup, task: Work) -> Shown:
    """Bytes of a memory pass: beside one layer, the new keys and values of all."""
    return keys_values(setup, task.config, task.tokens) + working(setup, task)


def backward_memory(setup: Setup, task: Work, frozen: bool = False) -> Shown:
    """Bytes that a backward pass takes beside what was kept: gradients and, recomputed, one layer's activations. Those
    of the head are gone by then."""
    gradients = n(task.config.ffn_dim) * setup.wide + 2 * n(task.config.dim) * n(4, "B")
    own = on_gpu(setup, task.tokens) * gradients
    if not setup.checkpointing:
        return own
    return own + named(saved_layer(setup, task, frozen), "B") - saved_around(setup, task, frozen)


def rollout_memory(setup: Setup, clip: Sequence[Block], remembered: Sequence[Block]) -> Shown:
    """Bytes of a rollout without a graph at its worst: in a call, or where the next cache is made beside the last."""
    calls = [cache(setup, block.past) + working(setup, work(setup, setup.student, [block])) for block in clip]
    for block in remembered:
        calls.append(cache(setup, block.past) + remember_memory(setup, work(setup, setup.student, [block])))
    made = [[block.past, block.frames, block.held] for block in remembered if block.past]
    return max(calls + [sum(cache(setup, frames) for frames in beside) for beside in made])


def cache(setup: Setup, frames: int) -> Shown:
    return keys_values(setup, setup.student, frames * setup.tokens_per_frame)


def moments(setup: Setup) -> dict[str, Shown]:
    """Bytes per GPU, beside the states, at the moments of a training step that may be its worst."""
    clip, critic, teacher = blocks(setup), scored(setup, setup.student), scored(setup, setup.teacher)
    last = work(setup, setup.student, clip[-1:])
    graph, fitted = (named(saved(setup, task), "B") for task in (exit_calls(setup), critic))
    found = {
        "generator, scores": graph + max(working(setup, critic), working(setup, teacher)),
        "generator, backward": graph + backward_memory(setup, last),
        "critic, backward": fitted + backward_memory(setup, critic),
    }
    if setup.checkpointing:
        found["generator, last call"] = graph + working(setup, last)
        found["critic, forward"] = fitted + working(setup, critic)
    else:  # what a call takes is in its graph, but the cache is not
        found["generator, last call"] = graph + cache(setup, clip[-1].past)
    if setup.objective == "sid":
        found |= sid_moments(setup, graph, critic, teacher)
    if setup.algorithm.fresh_rollouts:
        found["critic, rollout"] = rollout_memory(setup, clip, clip[:-1])
    return found


def sid_moments(setup: Setup, graph: Shown, critic: Work, teacher: Work) -> dict[str, Shown]:
    """SiD keeps the graphs of all calls of the scores beside the rollout's; backward goes through the teacher first."""
    teachers, critics = (guided_calls(getattr(setup.algorithm, f"{who}guidance_scale")) for who in ("", "fake_"))
    judged = graph + critics * named(saved(setup, critic), "B")
    taught = judged + teachers * named(saved(setup, teacher, frozen=True), "B")
    return {
        "generator, scores": taught + (working(setup, teacher) if setup.checkpointing else 0),
        "generator, backward of teacher": taught + backward_memory(setup, teacher, frozen=True),
        "generator, backward of critic": judged + backward_memory(setup, critic),
    }


def training_memory(setup: Setup) -> Shown:
    """Bytes on a GPU at the worst moment of a step."""
    resident = 0 if setup.offload else named(sum(states(setup).values()), "B")
    own = named(sum(whole(setup).values()), "B")
    return named(gathered(setup), "B") + own + resident + named(max(moments(setup).values()), "B")


def inference_moments(setup: Setup) -> dict[str, Shown]:
    """Bytes on a GPU that makes one video, at the moments that may be its worst. The text encoder leaves before the
    transformer comes; when they wait in the host's memory, layers come one at a time, and the VAE while it works."""
    one, clip, layers = replace(setup, micro_batch=1), blocks(setup), layer_parameters(setup.student)
    around = num_parameters(setup.student) - parameters(setup.student)["layers"]
    held = n(around, "parameters") + (0 if setup.offload else parameters(setup.student)["layers"])
    decoder = vae() + decoder_memory(setup)
    waiting = 0 if setup.offload else decoder
    transformer = held + (n(layers, "parameters") if setup.offload else 0)
    found = {
        "a call of the transformer": transformer * setup.wide + rollout_memory(one, clip, clip) + waiting,
        "decoding": held * setup.wide + max(cache(one, block.held) for block in clip) + decoder + decoding(setup),
    }
    if setup.text_encoder:
        found = {"prompts": n(umt5_parameters(), "parameters") * setup.wide + (0 if setup.offload else vae())} | found
    return found


def decoder_memory(setup: Setup) -> Shown:
    """Bytes of what the VAE's decoder remembers of the frames before."""
    return n(DECODER_MEMORY, "numbers") * n(setup.latent[0] * setup.latent[1], "latent pixels") * n(4, "B")


def decoding(setup: Setup) -> Shown:
    """Bytes that the decoder takes for itself at its worst."""
    return n(DECODER_WORKING, "numbers") * n(setup.latent[0] * setup.latent[1], "latent pixels") * n(4, "B")


def inference_memory(setup: Setup) -> Shown:
    return max(inference_moments(setup).values())


def fits(setup: Setup, needed: float) -> bool:
    return needed <= 1e9 * setup.gpu_memory * (1 - SPARE)


def changes(setup: Setup) -> dict[str, dict]:
    """What a user can change to need less memory: options, and the fields of the setup that they set."""
    rollout = setup.algorithm.rollout
    window = 3 * blocks(setup)[-1].frames
    windowed = replace(setup.algorithm, rollout=replace(rollout, window_frames=window))
    options = {
        "--checkpointing on": {"checkpointing": True},
        "--micro_batch 1": {"micro_batch": 1},
        "--text_encoder off": {"text_encoder": False},
        "--sharding full": {"sharding": "full"},
        "--offload on": {"offload": True},
    }
    if rollout.window_frames is None or rollout.window_frames > window:
        options[f"--window_frames {window}"] = {"algorithm": windowed}
    if setup.teacher != setup.student and setup.student in NAMES:
        options[f"--teacher {NAMES[setup.student]}"] = {"teacher": setup.student}
    if setup.batch % (2 * setup.gpus * setup.micro_batch) == 0 and 2 * setup.gpus % setup.gpus_per_node == 0:
        options[f"--sharding full --gpus {2 * setup.gpus}"] = {"sharding": "full", "gpus": 2 * setup.gpus}
    return options


# --------------------------------------------------------------------------------------------------------- report

Report = dict[str, list[Line]]


def report(setup: Setup) -> Report:
    """All results, by section."""
    where = "in the host's memory, for each GPU" if setup.offload else "per GPU"
    worst = Line("the worst, and all that is held", training_memory(setup), "B")
    return {
        "Sizes": sizes(setup),
        **parameter_lines(setup),
        f"Training: held all the time, {where}": held(setup),
        "Training: whole on every GPU": lines("B", {"gathered of the shards": gathered(setup), **whole(setup)}),
        "Training: KV cache and activations, per GPU": activations(setup),
        "Training: moments of a step, per GPU": [*lines("B", moments(setup)), worst],
        **call_lines(setup),
        "Training: FLOPs of one video in a step": lines("FLOP", step_flops(setup), "together"),
        "Training: time and cost": training_time(setup),
        "Inference: moments of a GPU that makes one video": lines("B", inference_moments(setup)),
        "Inference: time and cost of one video on one GPU": inference_time(setup),
    }


def lines(unit: str, numbers: dict[str, Shown], total: str = "") -> list[Line]:
    """A line for each number and, if it has a name, one for their sum."""
    rows = [Line(label, number, unit) for label, number in numbers.items()]
    return rows + ([Line(total, sum(named(row.number, unit) for row in rows), unit)] if total else [])


def distinct(things: dict) -> dict:
    """Equal things once, under all their names."""
    return {", ".join(name for name in things if things[name] == thing): thing for thing in things.values()}


def video_frames(setup: Setup) -> Shown:
    return 1 + TIME_STRIDE * (n(setup.num_frames, "frames") - 1)


def sizes(setup: Setup) -> list[Line]:
    clip = blocks(setup)
    sides = zip(setup.latent, setup.student.patch_size[1:], strict=True)
    height, width = (n(STRIDE * side) / STRIDE / patch for side, patch in sides)
    pairs = sum(n(block.frames) * n(block.past + block.frames) for block in clip)
    return [
        Line("video frames", video_frames(setup)),
        Line("tokens of a latent frame", height * width),
        Line("tokens of a clip", n(setup.num_frames, "frames") * n(setup.tokens_per_frame)),
        Line("blocks", n(len(clip))),
        Line("frames times frames they see", pairs if len(clip) <= 10 else n(pairs)),
        Line("pairs of tokens", n(pairs) * n(setup.tokens_per_frame) * n(setup.tokens_per_frame)),
        Line("videos of a GPU in a step", n(setup.batch, "videos") / n(setup.gpus, "GPUs")),
    ]


def parameter_lines(setup: Setup) -> Report:
    networks = distinct({"student": setup.student, "critic": setup.student, "teacher": setup.teacher})
    found = {
        f"Parameters: {name}": [Line("a layer", layer_parameters(config)), *lines("", parameters(config), "together")]
        for name, config in networks.items()
    }
    return found | {"Parameters: text encoder": [Line("UMT5-XXL", umt5_parameters())]}


def held(setup: Setup) -> list[Line]:
    rows = lines("B", states(setup), "together")
    node = n(min(setup.gpus, setup.gpus_per_node), "GPUs")
    host = [Line("host memory of a node", node * named(rows[-1].number, "B"), "B")] if setup.offload else []
    return [*rows, *host]


def activations(setup: Setup) -> list[Line]:
    """What moments() adds up, and what activation checkpointing does to it."""
    last = blocks(setup)[-1]
    held = {n(frames, "frames").text: cache(setup, frames) for frames in (last.past, last.held) if frames}
    whole = {"exits": exit_calls(setup), "critic": scored(setup, setup.student)}
    each = {"last block": work(setup, setup.student, [last]), **whole}
    rows = {f"KV cache, {frames}": size for frames, size in held.items()}
    rows |= {f"a layer: {name}": saved_layer(setup, task) for name, task in each.items()}
    for state, chosen in {"with": True, "without": False}.items():
        way = replace(setup, checkpointing=chosen)
        rows |= {f"{state} checkpointing: {name}": saved(way, task) for name, task in whole.items()}
    return lines("B", rows)


def call_lines(setup: Setup) -> Report:
    """The calls that step_flops() and video_flops() count; equal ones once."""
    clip = blocks(setup)
    tasks = {
        "each block of the student": (work(setup, setup.student, clip), True),
        "each block that learns": (exit_calls(setup), True),
        "the critic's clip": (scored(setup, setup.student), True),
        "the teacher's clip": (scored(setup, setup.teacher), True),
        "memory passes in training": (work(setup, setup.student, clip[:-1]), False),
        "memory passes at inference": (work(setup, setup.student, clip), False),
    }
    return {
        f"FLOPs of one video: {name}": lines("FLOP", forward_flops(*task), "together")
        for name, task in distinct(tasks).items()
        if task[0].calls
    }


def training_time(setup: Setup) -> list[Line]:
    video = named(sum(step_flops(setup).values()), "FLOP")
    step = n(setup.batch, "videos") * video
    time = seconds(setup, named(step, "FLOP"), setup.gpus)
    hours = n(setup.steps, "steps") * named(time, "s") / n(3600, "s")
    return [
        Line("a step", step, "FLOP"),
        Line("time of a step", time, "s"),
        Line("GPU time of a latent frame", seconds(setup, video, 1) / n(setup.num_frames, "frames"), "s"),
        Line("time of the training", hours, "h"),
        Line("cost of the training", named(hours, "h") * n(setup.gpus, "GPUs"), "GPU hours"),
    ]


def inference_time(setup: Setup) -> list[Line]:
    flops, first = video_flops(setup), rollout_flops(setup, all_calls(setup), blocks(setup)[:1], [])
    time = seconds(setup, named(flops, "FLOP"), 1)
    video, frames = named(time, "s"), n(video_frames(setup), "frames")
    return [
        Line("a video", flops, "FLOP"),
        Line("time of a video", time, "s"),
        Line("time to the first block", seconds(setup, first, 1), "s"),
        Line("time of a latent frame", video / n(setup.num_frames, "frames"), "s"),
        Line("time of a video frame", video / frames, "s"),
        Line("times as fast as it is shown", frames / n(FPS, "fps") / video),
        Line("videos per hour, all GPUs", n(setup.gpus, "GPUs") * n(3600, "s") / video),
        Line("cost of 1,000 videos", n(1000, "videos") * video / n(3600, "s"), "GPU hours"),
    ]


def verdict(kind: str, setup: Setup, memory: Callable[[Setup], float]) -> str:
    """Whether it fits and, where it does not, what each option would change."""
    needed = memory(setup)
    of = f"{setup.gpu_memory:g}, {SPARE:.0%} of which stay free for CUDA and NCCL"
    start = f"{kind} takes {quantity(needed, 'B')} of {of}"
    if fits(setup, needed):
        return f"{start}: it fits."
    ways = {option: values for option, values in changes(setup).items() if memory(replace(setup, **values)) < needed}
    if len(ways) > 1:
        ways["all of these"] = {name: value for values in ways.values() for name, value in values.items()}
    after = {option: memory(replace(setup, **values)) for option, values in ways.items()}
    rows = [f"  {option:<30}  {quantity(x, 'B')}{', fits' * fits(setup, x)}" for option, x in after.items()]
    return "\n".join([f"{start}: it does not fit. What would help:", *rows])


def heading(setup: Setup) -> str:
    who = [NAMES.get(config, f"a model of width {config.dim}") for config in (setup.student, setup.teacher)]
    height, width = (STRIDE * side for side in setup.latent)
    checkpointing, given = "on" if setup.checkpointing else "off", "" if setup.peak_tflops else ", an H100's"
    return (
        f"{who[0]}, taught by {who[1]} with {WORDS[setup.objective]}: {setup.num_frames} latent frames of {height} x "
        f"{width} pixels in {n(len(blocks(setup)), 'blocks').text}, {setup.precision}, checkpointing {checkpointing}.\n"
        f"{n(setup.gpus, 'GPUs').text}, {setup.sharding} sharding over {setup.shards}. Time assumes "
        f"{setup.utilisation:.0%} of {quantity(setup.peak, 'FLOP')}/s{given}."
    )


def text(setup: Setup) -> str:
    """The whole plan."""
    sections = [f"{title}\n" + "\n".join(map(str, rows)) for title, rows in report(setup).items()]
    verdicts = [verdict("Training", setup, training_memory), verdict("Inference", setup, inference_memory)]
    return "\n\n".join([heading(setup), *sections, *verdicts, __doc__.split("\n\n")[2].strip()])


def record(setup: Setup) -> dict:
    """The plan for a program: values in bytes, FLOP, seconds and hours."""
    found = {
        title: {row.label: {"value": float(row.number), "unit": row.unit, "formula": row.number.text} for row in rows}
        for title, rows in report(setup).items()
    }
    needed = {"training": training_memory(setup), "inference": inference_memory(setup)}
    return {"setup": asdict(setup), "fits": {kind: fits(setup, x) for kind, x in needed.items()}, **found}


# ---------------------------------------------------------------------------------------------------- command line


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m full_scale.plan", description=__doc__.split("\n")[0])
    add, switch = parser.add_argument, {"choices": ("on", "off")}
    algorithm, rollout = SelfForcingConfig(), RolloutConfig()
    add("--model", choices=tuple(WAN_CONFIGS), default="t2v-1.3b", help="student and critic")
    add("--teacher", choices=tuple(WAN_CONFIGS), help="by default as published: t2v-14b, for i2v-14b and sid itself")
    add("--objective", choices=CHOICES["objective"], default=Setup.objective)
    add("--gpus", type=int, default=Setup.gpus)
    add("--gpus_per_node", type=int, default=Setup.gpus_per_node)
    add("--gpu_memory", type=float, default=Setup.gpu_memory, help="GB")
    add("--sharding", choices=CHOICES["sharding"], help="by default as published: hybrid for 1.3B, full for 14B")
    add("--offload", default="off", help="weights and trained states wait in the host's memory", **switch)
    add("--checkpointing", default="on", help="layers run again in the backward pass", **switch)
    add("--text_encoder", choices=("on", "sharded", "off"), default="on", help="off: prompts are all in encoder.cache")
    add("--precision", choices=CHOICES["precision"], default=Setup.precision)
    add("--batch", type=int, default=Setup.batch, help="videos of a step, on all GPUs together")
    add("--micro_batch", type=int, default=Setup.micro_batch, help="videos that a GPU works on at once")
    add("--steps", type=int, default=Setup.steps, help="generator updates, each with its critic updates")
    add("--frames", type=int, default=algorithm.max_num_frames, help="latent frames of a clip")
    add("--gradient_frames", type=int, default=algorithm.gradient_frames, help="last frames that are learnt from")
    add("--height", type=int, default=480, help="pixels")
    add("--width", type=int, default=832, help="pixels")
    add("--frames_per_block", type=int, nargs="+", help="by default as published: 3 for 1.3B, whole clips for 14B")
    add("--denoising_steps", type=int, default=len(rollout.denoising_steps), help="how many")
    add("--window_frames", type=int, default=rollout.window_frames, help="past frames in the cache; by default all")
    add("--sink_frames", type=int, default=rollout.sink_frames, help="first frames that stay in it besides")
    add("--exit", choices=("random", "last"), default=algorithm.exit_rule, help="where training leaves a block")
    add("--critic_steps", type=int, default=algorithm.critic_steps, help="critic updates for a generator update")
    add("--fresh_rollouts", default="on", help="a rollout for every critic update", **switch)
    add("--guidance_scale", type=float, default=algorithm.guidance_scale, help="of the teacher; 1 asks it once")
    add("--utilisation", type=float, default=Setup.utilisation, help="assumed fraction of the GPU's peak")
    add("--peak_tflops", type=float, help=f"of a GPU; by default an H100's, {PEAK_TFLOPS}")
    add("--json", type=Path, help="write the numbers here, too")
    return parser.parse_args(arguments)


def setup_of(args: argparse.Namespace) -> Setup:
    """The setup that the options describe. Raises ValueError for options that do not go together."""
    published, chosen = PUBLISHED[args.model], vars(args)
    own = {field.name: chosen[field.name] for field in fields(Setup) if field.name in chosen}
    switches = {name: chosen[name] == "on" for name in ("checkpointing", "offload")}
    switches |= {"text_encoder": args.text_encoder != "off", "sharded_text_encoder": args.text_encoder == "sharded"}
    teacher = args.teacher or (args.model if args.objective == "sid" else published["teacher"])
    fitted = {
        "student": WAN_CONFIGS[args.model],
        "teacher": WAN_CONFIGS[teacher],
        "algorithm": algorithm_of(args, args.frames_per_block or [published["frames_per_block"] or args.frames]),
        "latent": latent_of(args, WAN_CONFIGS[args.model]),
        "sharding": args.sharding or published["sharding"],
    }
    return Setup(**own | switches | fitted)


def algorithm_of(args: argparse.Namespace, frames_per_block: list[int]) -> SelfForcingConfig:
    for name in ("frames", "denoising_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    pattern = tuple(frames_per_block) if len(frames_per_block) > 1 else frames_per_block[0]
    block_sizes(args.frames, pattern)  # says which numbers of frames fit
    return SelfForcingConfig(
        RolloutConfig(
            grid(args.denoising_steps), pattern, sink_frames=args.sink_frames, window_frames=args.window_frames
        ),
        guidance_scale=args.guidance_scale,
        critic_steps=args.critic_steps,
        fresh_rollouts=args.fresh_rollouts == "on",
        exit_rule=args.exit,
        gradient_frames=args.gradient_frames,
        min_num_frames=args.frames,
        max_num_frames=args.frames,
    )


def latent_of(args: argparse.Namespace, config: WanConfig) -> tuple[int, int]:
    """Height and width of a latent frame. Raises ValueError for pixels that are no whole number of patches."""
    check_size(args.height, args.width, config.patch_size)
    return args.height // STRIDE, args.width // STRIDE


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    setup = setup_of(args)
    if args.json:
        with atomic(args.json) as temporary:
            temporary.write_text(json.dumps(record(setup), indent=1) + "\n")
    print(text(setup))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"full_scale.plan: {error}")
