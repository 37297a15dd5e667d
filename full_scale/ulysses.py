"""Several processes compute one sample: sequence parallelism after DeepSpeed-Ulysses (arXiv 2309.14509).

    share_sequence(model, group)     # sequence_parallel of full_scale/parallelize.py does it for training

The processes of a group make the same calls with the same inputs. Each takes its own share of every frame's tokens
through all layers. Only self-attention looks from one token at another: for it a process gives away the other heads of
its tokens, gets its own heads of all tokens, and afterwards gives back what became of them. P processes:

    patch_embedding    [b f s e]   -> [b f s/P e]      a share of each frame: modulation is per frame
    queries, keys,     [b l/P n d] -> [b l n/P d]      whole clips in their order: rotations, masks, caches and kernels
    values                                             are those of one process, with fewer heads
    o                  [b l n/P d] -> [b l/P n d]
    head               [b f s/P c] -> [b f s c]        whole again, in each process

So a KV cache holds all tokens of n/P heads. Frames need not divide evenly, heads must.

Gradients pass through every exchange. What reaches a parameter or an input in one process is the gradient of the sum of
all P losses, which are equal, as far as that process's own share leads there. The mean over the processes, which FSDP
takes anyhow, is therefore the gradient of the loss: there is no factor anywhere.
"""

from collections.abc import Callable
from functools import partial

import torch.distributed as dist
from einops import rearrange, repeat
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor

from tiny_causal_wan import TinyCausalWanModel


def share_sequence(model: TinyCausalWanModel, group: ProcessGroup | None = None) -> TinyCausalWanModel:
    """The same model, of which each call is from now on the common work of a group of processes, by default of all.

    Parameters keep their names, and model.attention may be any kernel. To be called before recomputation, compilation
    and sharding. Raises ValueError for heads that cannot be shared out evenly.
    """
    neighbours = Neighbours(group or dist.group.WORLD)
    num_heads = model.config.num_heads
    if num_heads % neighbours.count:
        raise ValueError(
            f"The model's {num_heads} heads cannot be shared out evenly among {neighbours.count} processes: "
            f"set processes.sequence_parallel to a divisor of {num_heads}."
        )
    model.patch_embedding.register_forward_hook(neighbours.take_share)
    model.head.register_forward_hook(neighbours.make_whole)
    for layer in model.blocks:
        layer.forward = partial(neighbours.run_layer, layer.forward)
        layer.self_attn.split_heads = partial(neighbours.to_heads, num_heads // neighbours.count)
        layer.self_attn.o.register_forward_pre_hook(neighbours.to_tokens)
    return model


class Neighbours:
    """The processes that share a model's sequences, and how the sequence at hand lies among them."""

    def __init__(self, group: ProcessGroup):
        self.group, self.rank, self.count = group, dist.get_rank(group), dist.get_world_size(group)
        self.frames, self.sizes = 0, []

    def shares(self, tokens: int) -> list[int]:
        """How many of a frame's tokens each process has. Raises ValueError where one would have none."""
        if tokens < self.count:
            raise ValueError(
                f"Frames of {tokens} tokens cannot be shared out among {self.count} processes: "
                "set processes.sequence_parallel to less, or make larger videos."
            )
        return [(tokens + i) // self.count for i in range(self.count)]

    # ------------------------------------------------------------------------------- where the model calls them

    def take_share(self, module, inputs, x: Tensor) -> Tensor:
        """Of the tokens that enter, this process's own: [b f s e] -> [b f s/P e]."""
        return x.split(self.shares(x.shape[2]), dim=2)[self.rank].contiguous()  # a view would keep them all

    def run_layer(self, forward: Callable, x: Tensor, modulation, text, image, rotations: Tensor, *rest):
        """A layer's forward, for which it is noted how tokens lie: frame by frame, a share of each.

        In every layer anew, since one may be computed again, for its gradient, after a call with clips of another size.
        """
        self.frames = x.shape[1]
        self.sizes = self.shares(len(rotations) // self.frames)
        return forward(x, modulation, text, image, rotations, *rest)

    def to_heads(self, num_heads: int, x: Tensor) -> Tensor:
        """Own tokens of all heads to all tokens of own heads: [b l/P (n d)] -> [b l n/P d]."""
        own = rearrange(x, "b (f s) (p e) -> (p s) b f e", f=self.frames, p=self.count)
        return rearrange(self.gather_tokens(own), "s b f (n d) -> b (f s) n d", n=num_heads)

    def to_tokens(self, module, inputs: tuple[Tensor]) -> Tensor:
        """All tokens of own heads to own tokens of all heads: [b l (n/P d)] -> [b l/P (n d)]."""
        every = rearrange(inputs[0], "b (f s) e -> s b f e", f=self.frames)
        return rearrange(self.scatter_tokens(every), "(p s) b f e -> b (f s) (p e)", p=self.count)

    def make_whole(self, module, inputs, x: Tensor) -> Tensor:
        """Of the tokens that leave, everybody's: [b f s/P c] -> [b f s c]."""
        copies = repeat(x, "b f s c -> (p s) b f c", p=self.count)
        return rearrange(self.gather_tokens(copies), "s b f c -> b f s c")

    # ----------------------------------------------------------------------------------------- what they exchange

    def gather_tokens(self, x: Tensor) -> Tensor:
        """x has own tokens once for each process, [(p s/P) ...]; what all have for this one, [s ...]."""
        return self.exchange(x, [self.sizes[self.rank]] * self.count, self.sizes)

    def scatter_tokens(self, x: Tensor) -> Tensor:
        """The other way: x has all tokens [s ...]; what each process has for the own ones, [(p s/P) ...]."""
        return self.exchange(x, self.sizes, [self.sizes[self.rank]] * self.count)

    def exchange(self, x: Tensor, given: list[int], taken: list[int]) -> Tensor:
        """given[i] rows of x go to process i, taken[i] come from it; waited for, since kernels want plain tensors."""
        return wait_tensor(all_to_all_single_autograd(x.contiguous(), taken, given, self.group))
