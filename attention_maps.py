"""Which frame looks at which: python attention_maps.py --layer_index 3 --output_path outputs/attention/layer3.pt

A `Capture` stands in for the generator during a rollout, or for a model that is called on a whole clip. It puts its own
function in the place of the model's attention, looks at the queries and keys of the layers it was asked for, and hands
them on to the kernel: the video stays the same, bit for bit, and so it works for the tiny model and for Wan alike
(--model_path).

    with Capture(model) as watched:
        video = generate(watched, scheduler, noise, cond, config)
    watched.maps("blocks.3.self_attn")      # [heads, F, F]: row i, what frame i looks at

Frames are counted from the beginning of the video, whatever the cache has evicted by then.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from checkpoint import atomic
from dynamic_video_sf import RolloutConfig, prefill
from flow_match import FlowMatchScheduler
from generate import LoadedModel, SamplingConfig, adapt, checked, load_model, sample_blocks, sample_keys
from kv_cache import block_sizes
from moving_mnist import PromptEncoder, WorldConfig
from randomness import generator
from tiny_causal_wan import FrameMask, TinyCausalWanModel, WanConfig
from visualization import show_frame_attention

QUERIES = 256  # looked at together: the largest table is [b, heads, QUERIES, tokens of a frame]


# ------------------------------------------------------------------------------------------------- the arithmetic


def attention_mass(q: Tensor, k: Tensor, sees: Tensor) -> Tensor:
    """The softmax mass that queries of group i put on keys of group j, a mean over queries and samples: [n, Q, K].

    q [b, Q, s, n, d], k [b, K, g, n, d]; sees: bool [Q, K]. Rows sum to 1; what is not seen is exactly 0. A group's
    share needs no more than the logsumexp of its logits, so one group of keys is looked at at a time.
    """
    q, k = rearrange(q, "b f s n d -> f b n s d"), rearrange(k, "b f g n d -> f b n d g")
    mass = q.new_zeros((q.shape[2], *sees.shape), dtype=torch.float32)
    for i, row in enumerate(sees):
        seen = row.nonzero()[:, 0].tolist()
        chunks = (q.shape[-1] ** -0.5 * chunk.float() for chunk in q[i].split(QUERIES, dim=2))
        totals = [torch.stack([(chunk @ k[j].float()).logsumexp(-1) for j in seen], -1) for chunk in chunks]
        mass[:, i, seen] = torch.cat(totals, dim=2).softmax(-1).mean((0, 2))  # [b n s K] -> [n K]
    return mass


def mean_logits(q: Tensor, k: Tensor) -> Tensor:
    """q k^T / sqrt(d), a mean over the pairs of a query of group i and a key of group j, and over samples: [n, Q, K].

    Shapes as above. A mean over all pairs of a product is the product of the means: no table is needed at all.
    """
    q, k = q.float().mean(2), k.float().mean(2)  # [b f n d]
    return q.shape[-1] ** -0.5 * torch.einsum("b i n d, b j n d -> b n i j", q, k).mean(0)


def sink_score(last_block: Tensor, block_sizes: Sequence[int]) -> Tensor:
    """How much more the last block [n, F] looks at the oldest past frame that it sees than, on average, at the others.

    In mass or in logits, one number per head; NaN where it sees fewer than two past frames.
    """
    past = last_block[:, : sum(block_sizes[:-1])]
    past = past[:, (past.isfinite() & (past != 0)).any(0)]  # the cache may have evicted the others
    return past[:, :1].mean(1) - past[:, 1:].mean(1)


# ---------------------------------------------------------------------------------------------------- the capture


@dataclass
class Call:
    """One watched call of the model: its frames, those in its cache, and what its layers looked at."""

    frames: range
    past: tuple[int, ...]
    tokens_per_frame: int
    t: float | Tensor
    block_sizes: list[int]
    maps: dict[str, Tensor] = field(default_factory=dict)  # [n, len(frames), frames.stop or text tokens]


class Capture:
    """A generator that is `model`, looked at: use it in the model's place inside `with`, for one video.

    names: the layers, as the model names them, by default every self-attention. In "blocks.3.self_attn" frames look at
    frames, in "blocks.3.cross_attn" at the tokens of the prompt. step: "first" looks at the first denoising call of
    every block, "context" at its memory pass. logits: mean logits in place of softmax mass. What is kept grows with
    the square of the frames, never of the tokens. Raises ValueError for a layer that is not there.
    """

    def __init__(
        self, model: TinyCausalWanModel, names: Sequence[str] | None = None, step: str = "first", logits: bool = False
    ):
        self.model, self.step, self.logits = model, step, logits
        self.names = layer_names(model) if names is None else list(names)
        known = {*layer_names(model), *layer_names(model, "cross")}
        if not known.issuperset(self.names):
            raise ValueError(f"No layer {min({*self.names} - known)}: the model's are 0 to {len(model.blocks) - 1}.")
        if step not in ("first", "context"):
            raise ValueError(f"step must be 'first' or 'context', got {step!r}.")
        self.empty = -torch.inf if logits else 0.0  # of what is not seen
        self.calls: list[Call] = []
        self.now: Call | None = None

    def __enter__(self) -> "Capture":
        self.kernel, self.model.attention = self.model.attention, self.attend
        return self

    def __exit__(self, *error) -> None:
        self.model.attention = self.kernel

    # ------------------------------------------------------------------------------------------ as a generator

    def __call__(self, x_t: Tensor, t, cond, cache=None, **ways) -> Tensor:
        self.begin("first", x_t, t, cache, ways.get("frames_per_block"))
        return self.model(x_t, t, cond, cache, **ways)

    def remember(self, x: Tensor, t, cond, cache):
        self.begin("context", x, t, cache)
        return self.model.remember(x, t, cond, cache)

    def parameters(self):  # generate.py asks them where they are
        return self.model.parameters()

    # -------------------------------------------------------------------------------------------- looking on

    def begin(self, step: str, x: Tensor, t, cache, frames_per_block=None) -> None:
        """Look at this call if it is its block's first of the kind; with guidance, that is the one with the prompt."""
        start, num_frames = cache.next_frame if cache else 0, x.shape[1]
        frames = range(start, start + num_frames)
        self.now = None
        if step == self.step and frames not in [call.frames for call in self.calls]:
            _, ph, pw = self.model.config.patch_size
            tokens = (x.shape[3] // ph) * (x.shape[4] // pw)
            sizes = block_sizes(num_frames, frames_per_block or num_frames)
            self.now = Call(frames, cache.frames if cache else (), tokens, t, sizes)
            self.calls.append(self.now)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask=None, layer=None, kind=None) -> Tensor:
        """The model's attention function while it is watched."""
        name = f"blocks.{layer}.{kind}_attn"
        # Image-to-video models cross twice, text first: the second, the image, is left out.
        if self.now and name in self.names and name not in self.now.maps:
            with torch.no_grad():
                self.now.maps[name] = self.look(q, k, mask, kind == "cross").cpu()
        return self.kernel(q, k, v, mask=mask, layer=layer, kind=kind)

    def look(self, q: Tensor, k: Tensor, mask: FrameMask | None, cross: bool) -> Tensor:
        """One layer's map [n, f, frames so far or text tokens]; q, k [b l n d]."""
        frames, past, tokens = self.now.frames, self.now.past, self.now.tokens_per_frame
        q = q.unflatten(1, (-1, tokens))[:, -len(frames) :]  # of [clean || noisy] the noisy half
        k = k.unflatten(1, (-1, 1 if cross else tokens))
        sees = mask.frames()[-len(frames) :] if mask else torch.ones(len(frames), k.shape[1], dtype=torch.bool)
        values = mean_logits(q, k) if self.logits else attention_mass(q, k, sees)
        if cross:
            return values
        # Both halves of [clean || noisy] are the same frames, but no query sees a frame in both.
        held = torch.tensor([*past, *frames] if mask is None else [*frames] * (k.shape[1] // len(frames)))
        placed = values.new_full((len(values), len(frames), frames.stop), self.empty)
        for i, row in enumerate(sees):
            placed[:, i, held[row]] = values[:, i, row]
        return placed

    # ----------------------------------------------------------------------------------------- what was seen

    @property
    def block_sizes(self) -> list[int]:
        """Frames per block; frames that were given, not made, come first and count as one block."""
        given = self._calls()[0].frames.start
        return [given] * (given > 0) + [size for call in self.calls for size in call.block_sizes]

    @property
    def t(self) -> float | Tensor:
        """The time at which the model was called."""
        return self._calls()[0].t

    def maps(self, name: str) -> Tensor:
        """Row i: what frame i's queries looked at, [n, F, F]; for a cross-attention [n, F, text tokens].

        What was not seen, as the future, is exactly 0, or -inf for logits; so are the rows of frames that were given.
        """
        calls = self._calls()
        seen = calls[-1].maps[name]  # the last call saw the most
        full = seen.new_full((len(seen), calls[-1].frames.stop, seen.shape[2]), self.empty)
        for call in calls:
            full[:, call.frames.start : call.frames.stop, : call.maps[name].shape[2]] = call.maps[name]
        return full

    def last_block(self, name: str) -> Tensor:
        """What the last block looked at, [n, F]: the mean of its frames' rows."""
        return self.maps(name)[:, -self.block_sizes[-1] :].mean(1)

    def sink_scores(self) -> Tensor:
        """The sink score of every head of every watched self-attention, [layers, n]."""
        names = [name for name in self.names if "self" in name]
        return torch.stack([sink_score(self.last_block(name), self.block_sizes) for name in names])

    def _calls(self) -> list[Call]:
        if not self.calls:
            raise ValueError("Nothing was captured: make a video through the capture, inside its `with`.")
        return self.calls


def layer_names(model: TinyCausalWanModel, kind: str = "self") -> list[str]:
    """The model's own names of its attention layers of a kind, "self" or "cross"."""
    return [f"blocks.{i}.{kind}_attn" for i in range(len(model.blocks))]


# ------------------------------------------------------------------------------------------------- command line


def capture_video(
    loaded: LoadedModel, prompts: Sequence[str], names=None, *, num_frames=None, seed=0, step="first", logits=False
) -> Capture:
    """A capture of the very videos that generate.py makes of these prompts with this seed; maps are means over them.

    Raises ValueError for prompts, frame counts and layers that do not fit the model.
    """
    sampling = adapt(loaded, num_frames, None, None, None)
    if step == "context" and sampling.whole_clip:
        raise ValueError("This model makes whole clips and keeps no context: use --step first.")
    prompts = [checked(prompt, loaded.world) for prompt in prompts]
    shape, keys = (num_frames or loaded.num_frames, *loaded.frame_shape), sample_keys(prompts, seed)
    with Capture(loaded.model, names, step, logits) as watched:
        blocks = sample_blocks(watched, loaded.scheduler, *loaded.encode(prompts), sampling, shape, keys)
        video = torch.cat(list(blocks), dim=1)
        if step == "context":  # sample_blocks leaves the last block's memory pass out; the others are known by now
            cond = {name: x.to(video.device) for name, x in loaded.encoder(prompts).items()}
            rng = [generator(*key, "context") for key in keys]
            prefill(watched, loaded.scheduler, video, cond, sampling.rollout, rng=rng)
    return watched


def save_layer(watched: Capture, layer_index: int, path: str | Path, prompts: Sequence[str], **about) -> dict:
    """Write what one layer's self-attention looked at, readable with torch.load(path, weights_only=True).

    about: anything plain that is worth keeping, such as the seed. Several prompts stand one on a line.
    """
    name = f"blocks.{layer_index}.self_attn"
    record = {
        "full_frame_attention": watched.maps(name),
        "last_block_frame_attention": watched.last_block(name),
        "block_sizes": watched.block_sizes,
        "layer": layer_index,
        "t": float(watched.t),
        "prompt": "\n".join(prompts),
        "step": watched.step,
        "logits": watched.logits,
        **about,
    }
    with atomic(path) as temporary, temporary.open("wb") as file:
        torch.save(record, file)
    return record


def random_model(seed: int) -> LoadedModel:
    """The tiny model before any training: what a trained one is compared with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyCausalWanModel(WanConfig()).eval().requires_grad_(False)
    encoder = PromptEncoder(model.config.text_dim, model.config.text_len)
    return LoadedModel(model, FlowMatchScheduler(), encoder, SamplingConfig(RolloutConfig()), WorldConfig())


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", help=".safetensors, or train.py's .pt; by default the shipped student, or the released of Wan")
    add("--no_checkpoint", action="store_true", help="the tiny model at random instead")
    add("--layer_index", type=int, default=0, help="counted from 0")
    add("--output_path", type=Path, help="by default outputs/attention/layer{layer_index}.pt")
    add(
        "--step", choices=("first", "context"), default="first", help="each block's first denoising call or memory pass"
    )
    add("--logits", action="store_true", help="mean logits in place of softmax mass")
    add("--prompts", nargs="+", default=["a 3 moving right"], metavar="PROMPT", help="maps are means over them")
    add("--num_frames", type=int, help="a whole number of blocks; by default the training length")
    add("--seed", type=int, default=0)
    add("--model_path", type=Path, help="folder of Wan's text encoder: the checkpoint is then one of Wan's size")
    add("--height", type=int, default=480, help="pixels; this and the next four with --model_path")
    add("--width", type=int, default=832)
    add("--config", help="of a checkpoint that does not tell its sizes, as in full_scale.generate")
    add("--device", help="by default this process's GPU, else the CPU")
    add("--dtype", help="by default bfloat16, on a CPU float32")
    add("--picture", type=Path, help="also draw the heat maps: .png, .svg or .pdf")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> Path:
    args = parse_arguments(arguments)
    if args.model_path and args.no_checkpoint:
        raise ValueError("--no_checkpoint is the tiny model at random, --model_path is for Wan: leave one of them out.")
    name = f"blocks.{args.layer_index}.self_attn"
    options = {"num_frames": args.num_frames, "seed": args.seed, "step": args.step, "logits": args.logits}
    if args.model_path:
        from full_scale.attention_capture import capture_wan, pick_wan

        which = ("checkpoint", "model_path", "config", "device", "dtype")
        models = pick_wan(**{option: getattr(args, option) for option in which})
        args.checkpoint = str(models.checkpoint)
        sizes = {"num_frames": args.num_frames or 21, "height": args.height, "width": args.width}
        watched = capture_wan(models, args.prompts, [name], **options | sizes)
    else:
        args.checkpoint = args.checkpoint or "checkpoints/student.safetensors"
        loaded = random_model(args.seed) if args.no_checkpoint else load_model(args.checkpoint)
        watched = capture_video(loaded, args.prompts, [name], **options)
    path = args.output_path or Path(f"outputs/attention/layer{args.layer_index}.pt")
    checkpoint = None if args.no_checkpoint else args.checkpoint
    save_layer(watched, args.layer_index, path, args.prompts, seed=args.seed, checkpoint=checkpoint)
    if args.picture:
        show_frame_attention(watched.maps(name), args.picture, block_sizes=watched.block_sizes)
    scores = ", ".join(f"{score:.3f}" for score in watched.sink_scores()[0])
    print(f"{path}: {name} at t = {watched.t:g}, {sum(watched.block_sizes)} frames; sink score by head: {scores}")
    return path


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"attention_maps.py: {error}", file=sys.stderr)
        sys.exit(2)
