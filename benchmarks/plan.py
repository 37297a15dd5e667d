"""What is measured: model sizes, and how often."""

from dataclasses import dataclass

from tiny_causal_wan import WanConfig


@dataclass(frozen=True)
class Size:
    """A model and the clips it works on: batch x num_frames frames of canvas x canvas pixels."""

    name: str
    model: WanConfig
    batch: int
    num_frames: int = 12
    canvas: int = 24

    @property
    def tokens(self) -> int:
        """Tokens of one batch of clips."""
        _, height, width = self.model.patch_size
        return self.batch * self.num_frames * (self.canvas // height) * (self.canvas // width)

    def describe(self) -> str:
        return (
            f"{self.name}: {self.batch} clips of {self.num_frames} frames ({self.tokens} tokens) "
            f"through {self.model.num_layers} layers of width {self.model.dim}"
        )


@dataclass(frozen=True)
class Plan:
    """gemm_sizes: sides of the square matrices. Time per block: over num_blocks blocks of stream_batch videos. Memory:
    at every clip length of memory_frames, of which the last gradient_frames, or all, keep a gradient. compiled: also
    what torch.compile makes of the teacher's step, where there is a C++ compiler."""

    sizes: tuple[Size, ...]
    gemm_sizes: tuple[int, ...]
    repeats: int
    num_blocks: int
    stream_batch: int
    memory_frames: tuple[int, ...]
    gradient_frames: int = 12
    compiled: bool = False


WIDE = WanConfig(dim=512, ffn_dim=2048, num_heads=4, num_layers=4, patch_size=(1, 6, 6))
MINIATURE = WanConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=2, patch_size=(1, 6, 6))

FULL = Plan(
    sizes=(Size("shipped", WanConfig(), batch=16), Size("wide", WIDE, batch=8)),
    gemm_sizes=(1024, 2048, 4096),
    repeats=5,
    num_blocks=20,
    stream_batch=4,
    memory_frames=(12, 24, 36, 48),
    compiled=True,
)
FAST = Plan(
    sizes=(Size("miniature", MINIATURE, batch=2, num_frames=6, canvas=12),),
    gemm_sizes=(256,),
    repeats=2,
    num_blocks=4,
    stream_batch=1,
    memory_frames=(6, 12),
    gradient_frames=6,
)
