"""Less memory on the device: networks that wait at home, on the CPU, and visit it when they are called.

What is computed does not change, only where parameters lie before and after. device and home may be whatever
`Tensor.to` takes; where both are the same, nothing moves.
"""

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from full_scale.text import TextEncoder
from tiny_causal_wan import TinyCausalWanModel


@contextmanager
def visiting(device, home, *networks: nn.Module) -> Iterator[None]:
    """The networks are on the device inside the block, and at home after it."""
    for network in networks:
        network.to(device)
    try:
        yield
    finally:
        for network in networks:
            network.to(home)


class VisitingStream:
    """A codec's decoding stream, of which nothing is on the device between two calls.

    What it remembers goes home with the network: of Wan's VAE at 480 x 832 that is 3.8 GB, the weights are 0.5.
    """

    def __init__(self, codec: nn.Module, device, home):
        self.codec, self.device, self.home, self.stream = codec, device, home, codec.stream()

    def __call__(self, latents: Tensor) -> Tensor:
        self.stream.memory = moved(self.stream.memory, self.device)
        with visiting(self.device, self.home, self.codec):
            pixels = self.stream(latents)
        self.stream.memory = moved(self.stream.memory, self.home)
        return pixels


def moved(memory, place):
    """The tensors of a list or mapping moved; other values as they are."""
    if isinstance(memory, dict):
        return {key: moved(x, place) for key, x in memory.items()}
    if isinstance(memory, list):
        return [moved(x, place) for x in memory]
    return memory.to(place) if isinstance(memory, Tensor) else memory


class OffloadedLayer(nn.Module):
    """A layer whose parameters stay where they are; copies on the device live for one call. For inference."""

    def __init__(self, layer: nn.Module, device):
        super().__init__()
        self.layer, self.device = layer, device

    def forward(self, *inputs, **options):
        visitors = {name: p.to(self.device) for name, p in self.layer.named_parameters()}
        return functional_call(self.layer, visitors, inputs, options)


def offload_layers(model: TinyCausalWanModel, device) -> TinyCausalWanModel:
    """The model with all but its layers on the device: of those, one at a time is there, while it computes."""
    for name, part in model.named_children():
        if name != "blocks":
            part.to(device)
    model.blocks = nn.ModuleList(OffloadedLayer(layer, device) for layer in model.blocks)
    return model


def release() -> None:
    """Give the memory of networks that nobody holds any longer back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


class KnownPrompts:
    """A text encoder that keeps what it said, for a model on `device`. Once all prompts are known, it may be freed."""

    def __init__(self, encoder: TextEncoder, device):
        self.encoder, self.device, self.known = encoder, device, {}

    def learn(self, prompts: Iterable[str]) -> None:
        unknown = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        for prompt in tqdm(unknown, desc="prompts", disable=None if unknown else True, leave=False):
            self.known[prompt] = self.encoder.embed(prompt).cpu()  # [l text_dim], without padding

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.learn(prompts)
        embeds = pad_sequence([self.known[prompt] for prompt in prompts], batch_first=True)
        return {"prompt_embeds": embeds.to(self.device)}

    def null(self, batch: int) -> dict[str, Tensor]:
        return self([self.encoder.negative_prompt] * batch)

    def free(self) -> None:
        self.encoder.free()
        release()
