"""A walk through Self-Forcing in a minute: python tutorial/examples/algorithm_example.py

Data, mask, rollout, denoising, cache, and one step of Algorithm 1, each as a picture in outputs/algorithm_example/ and
a few words on the terminal. It uses the shipped student where there is one, else a small network at random, whose
videos are noise but which goes through the very same motions.
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import locate
from dynamic_video_sf import RolloutConfig, SelfForcingConfig, rollout, self_forcing_step
from flow_match import FlowMatchScheduler
from generate import LoadedModel, SamplingConfig, load_model, sample_keys
from moving_mnist import MovingMNIST, PromptEncoder, WorldConfig
from randomness import generator, randn
from tiny_causal_wan import FrameMask, TinyCausalWanModel, WanConfig
from visualization import (
    create_algorithm_diagram,
    create_video_gif,
    film_strip,
    show_mask,
    visualize_autoregressive_generation,
    visualize_denoising_process,
    visualize_kv_cache_growth,
)

STUDENT, TEACHER = "checkpoints/student.safetensors", "checkpoints/teacher.safetensors"
PROMPT = "a 3 moving up-left"
NUM_BLOCKS = 6


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/algorithm_example"))
    folder = parser.parse_args(arguments).output_dir
    folder.mkdir(parents=True, exist_ok=True)
    loaded = load_or_make()
    create_algorithm_diagram(folder / "1_algorithm.png")
    say("1_algorithm.png", "The whole of Self-Forcing: the rollout above, distribution matching below.")
    show_data(folder)
    show_masks(loaded, folder)
    show_rollout(loaded, folder)
    show_growth(loaded, folder)
    take_a_step(loaded)
    print(f"\nThe pictures are in {folder}.")


def load_or_make() -> LoadedModel:
    """The shipped student, or a small network at random if it is not there."""
    if locate(STUDENT).exists():
        return load_model(STUDENT)
    print(f"There is no {STUDENT} yet: a network at random stands in, and its videos are noise.")
    torch.manual_seed(0)
    config, world = WanConfig(dim=64, ffn_dim=128, num_layers=2), WorldConfig()
    model = TinyCausalWanModel(config).eval().requires_grad_(False)
    nn.init.normal_(model.head.head.weight, std=0.02)
    return LoadedModel(
        model,
        FlowMatchScheduler(3.0),
        PromptEncoder(config.text_dim, config.text_len),
        SamplingConfig(RolloutConfig(frames_per_block=3, window_frames=6)),
        world,
    )


def say(name: str, words: str) -> None:
    print(f"\n{name}\n    {words}")


def show_data(folder: Path) -> None:
    """What real videos look like."""
    batch = MovingMNIST(WorldConfig(), prompts=[PROMPT, "a 7 moving down", "a 0 moving right"]).batch(range(3))
    film_strip(batch["video"], folder / "2_data.png", labels=batch["prompts"])
    corner = [f"({y:.0f}, {x:.0f})" for y, x in batch["positions"][0, :3, 0]]
    say(
        "2_data.png",
        f"Real digits that keep their speed and bounce off the walls. The prompt says which digit and which way; the\n"
        f"    world knows the exact place, here of the first one: {', '.join(corner)}, ...",
    )


def show_masks(loaded: LoadedModel, folder: Path) -> None:
    """Which frame sees which when a whole clip is computed at once."""
    config = loaded.sampling.rollout
    sizes = (config.frames_per_block,) * 4
    mask = FrameMask(sizes, tokens_per_frame=1, sink_frames=config.sink_frames, window_frames=config.window_frames)
    options = {"frames_per_block": config.frames_per_block, "sink_frames": config.sink_frames}
    show_mask(mask.frames(), folder / "3_mask.png", **options)
    forced = replace(mask, clean_half=True).frames()
    show_mask(forced, folder / "3_teacher_forcing_mask.png", halves=("clean", "noisy"), **options)
    say(
        "3_mask.png, 3_teacher_forcing_mask.png",
        "A frame sees its whole block and the past, never the future; with a window, only the recent past. Teacher\n"
        "    forcing, the usual training, lets noisy blocks see a *real* past. Self-Forcing lets them see their own.",
    )


def show_rollout(loaded: LoadedModel, folder: Path) -> None:
    """Block by block, as `rollout` yields them, with what the generator saw on the way."""
    config, guesses = loaded.sampling.rollout, []
    noise, cond, rng = start(loaded, NUM_BLOCKS)
    observe = {"observe": lambda **seen: guesses.append(seen)}
    with torch.no_grad():
        stream = rollout(loaded.model, loaded.scheduler, noise, cond, config, rng=rng, **observe)
        blocks = list(tqdm(stream, total=NUM_BLOCKS, desc="rollout", unit="block", leave=False))
    visualize_autoregressive_generation(blocks, folder / "4_rollout.png")
    say("4_rollout.png", f'"{PROMPT}": every block starts from noise and is made in sight of what was made before.')
    second = [seen for seen in guesses if seen["frame"] == config.frames_per_block]
    noisy, clean, times = ([seen[key] for seen in second] for key in ("x_t", "x0", "t"))
    visualize_denoising_process(noisy, clean, times, folder / "5_denoising.png")
    say(
        "5_denoising.png",
        f"One block in {len(times)} calls: guess the clean frames, put less noise on the guess, guess again. Training "
        "keeps\n    the gradient of one of these calls only.",
    )
    create_video_gif(torch.cat(blocks, dim=1), folder / "6_video.gif")
    say("6_video.gif", f"The same {NUM_BLOCKS * config.frames_per_block} frames in motion.")


def start(loaded: LoadedModel, num_blocks: int) -> tuple[Tensor, dict[str, Tensor], list[torch.Generator]]:
    """Noise for so many blocks, the encoded prompt, and the sample's own random numbers."""
    rng = [generator(*key) for key in sample_keys([PROMPT], seed=0)]
    num_frames = num_blocks * loaded.sampling.rollout.frames_per_block
    return randn((1, num_frames, *loaded.frame_shape), rng), loaded.encoder([PROMPT]), rng


class Watched:
    """A generator that writes down how many frames its cache holds after each block."""

    def __init__(self, model):
        self.model, self.sizes = model, []

    def __call__(self, *inputs):
        return self.model(*inputs)

    def remember(self, *inputs):
        cache = self.model.remember(*inputs)
        self.sizes.append(len(cache.frames))
        return cache


@torch.no_grad()
def show_growth(loaded: LoadedModel, folder: Path) -> None:
    """The cache with and without a window."""
    sizes = {}
    for label, window in (("keeps all frames", None), ("window of 6 frames", 6)):
        config = replace(loaded.sampling.rollout, denoising_steps=(1000,), sink_frames=0, window_frames=window)
        noise, cond, rng = start(loaded, NUM_BLOCKS)
        watched = Watched(loaded.model)
        for _ in rollout(watched, loaded.scheduler, noise, cond, config, rng=rng):
            pass
        sizes[label] = watched.sizes
    visualize_kv_cache_growth(sizes, folder / "7_cache.png")
    say(
        "7_cache.png",
        "Frames that the cache holds after each block:\n"
        + "".join(f"    {label}: {', '.join(map(str, held))}\n" for label, held in sizes.items())
        + "    With a window, a video can go on for ever: time and memory per block stay the same.",
    )


def take_a_step(loaded: LoadedModel) -> None:
    """Algorithm 1 once: a generator update, then the critic's."""
    length = 4 * loaded.sampling.rollout.frames_per_block
    lengths = {"gradient_frames": length, "min_num_frames": length, "max_num_frames": length}
    config = SelfForcingConfig(loaded.sampling.rollout, guidance_scale=2.0, critic_steps=3, **lengths)
    student = copy.deepcopy(loaded.model).requires_grad_(True)
    teacher = load_model(TEACHER).model if locate(TEACHER).exists() else copy.deepcopy(loaded.model)
    critic = copy.deepcopy(teacher).requires_grad_(True)  # the critic starts as the teacher
    optimizers = {
        name: torch.optim.AdamW(network.parameters(), lr=1e-5)
        for name, network in (("generator", student), ("critic", critic))
    }
    noise, cond, rng = start(loaded, 4)
    seen = {}
    print("\nOne step of Algorithm 1:")
    for name, loss in self_forcing_step(
        student, teacher, critic, loaded.scheduler, noise, cond, loaded.encoder.null(1), config,
        rng=rng, shared_rng=generator(0, "example"), observe=lambda network, **values: seen.update(values),
    ):  # fmt: skip
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()
        print(f"    {name:9} at t = {seen['t'].item():.2f}: loss {loss.item():.4g}")
    print(
        "    The generator's loss has no meaning of its own. Its gradient is what the teacher, guided by the prompt,\n"
        f"    and the critic see differently in the student's video: {seen['score_distance'].item():.2g} per pixel.\n"
        "    The critic's loss is flow matching on that video: it learns what the student makes now."
    )


if __name__ == "__main__":
    main()
