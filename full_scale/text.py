"""Prompts to embeddings: Wan's frozen text encoder, UMT5-XXL, and a folder that remembers what it said.

A prompt is encoded alone and without padding. Wan pads to 512 tokens, masks the padding out of the attention and sets
its embeddings to zero afterwards; what is left is the same, and does not depend on the other prompts of a batch.
"""

import hashlib
import html
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import ftfy
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from checkpoint import StateDict, atomic
from full_scale.pretrained import DOWNLOADS, TOKENIZER, find, fingerprint, load_frozen
from full_scale.wan import first, pick_dtype, read_file
from processes import pick_device

NEGATIVE_PROMPT = (  # Wan's own, for text to video
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
NEGATIVE_PROMPT_I2V = f"镜头晃动，{NEGATIVE_PROMPT}"  # Wan's for image to video; Self-Forcing keeps the other one


class TextEncoder:
    """prompts -> {"prompt_embeds": [B, text_len, text_dim]}, zeros beyond each prompt's own tokens.

    path: Wan's folder, a diffusers pipeline, a folder of transformers, or the .pth of UMT5; tokenizer: the folder of
    the tokenizer, where it is not in its usual place beside it. cache: a folder for embeddings, one file per prompt; a
    prompt found there needs no network, which is loaded when it is first missed. Results are in `dtype` on `device`.

    The cache may be shared by processes and left behind by an interrupted one. sharded: the network is shared out among
    the processes of a training run, each of which then has to compute the same number of prompts: no cache. device may
    be "auto". Raises ValueError for both at once and for files that are not there.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        tokenizer: str | Path | None = None,
        text_len: int = 512,
        negative_prompt: str = NEGATIVE_PROMPT,
        cache: str | Path | None = None,
        dtype: torch.dtype | str = torch.bfloat16,
        device: torch.device | str = "cpu",
        sharded: bool = False,
    ):
        if sharded and cache:
            raise ValueError(
                "A sharded text encoder cannot have a cache: set encoder.cache=null or encoder.sharded=false."
            )
        self.path = find("text encoder", path)
        self.tokenizer_file = find_tokenizer(Path(tokenizer) if tokenizer else self.path)
        self.text_len, self.negative_prompt = text_len, negative_prompt
        self.cache = Path(cache) if cache else None
        self.dtype, self.device = pick_dtype(dtype, ()), pick_device(str(device))
        self.sharded, self.place = sharded, None  # who shares it out says how

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Always text_len tokens, so that shapes never change."""
        embeds = [self.embed(prompt) for prompt in prompts]
        return {"prompt_embeds": torch.stack([F.pad(x, (0, 0, 0, self.text_len - len(x))) for x in embeds])}

    def null(self, batch: int) -> dict[str, Tensor]:
        """The negative prompt `batch` times: what guidance leads away from."""
        return {"prompt_embeds": self.negative.expand(batch, -1, -1)}

    def embed(self, prompt: str) -> Tensor:
        """The embeddings of one prompt's own tokens, [l, text_dim], l <= text_len: remembered or computed."""
        prompt = clean(prompt)
        if self.cache is None:
            return self.encode(prompt)
        path = self.cache_file(prompt)
        embeds = read_embeds(path)
        if embeds is None:
            embeds = self.encode(prompt)
            write_embeds(path, embeds, prompt)
        return embeds.to(self.device)

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        tokens = self.tokenize(prompt)
        if len(tokens) > self.text_len:
            tokens = tokens[: self.text_len - 1] + tokens[-1:]  # keeps the end-of-sequence token
        ids = torch.tensor([tokens], device=self.device)
        return self.model(ids).last_hidden_state[0].to(self.dtype)

    @cached_property
    def model(self) -> nn.Module:
        model = load_umt5(self.path, self.dtype)
        return self.place(model) if self.place else model.to(self.device)

    @cached_property
    def tokenize(self) -> Callable[[str], list[int]]:
        return load_tokenizer(self.tokenizer_file)

    @cached_property
    def negative(self) -> Tensor:
        return self([self.negative_prompt])["prompt_embeds"]

    def free(self) -> None:
        """Give the network's memory back. It is loaded again for the next prompt that the cache does not know."""
        self.__dict__.pop("model", None)

    def to(self, device: torch.device | str) -> "TextEncoder":
        """Move the network, if it is loaded, and later results."""
        self.device = torch.device(device)
        if "model" in self.__dict__:
            self.model.to(self.device)
        self.__dict__.pop("negative", None)
        return self

    def cache_file(self, prompt: str) -> Path:
        key = hashlib.sha256(f"{self.identity}\n{prompt}".encode()).hexdigest()
        return self.cache / key[:2] / f"{key}.safetensors"

    @cached_property
    def identity(self) -> str:
        """All that embeddings depend on besides the prompt."""
        parts = (fingerprint(self.path), fingerprint(self.tokenizer_file), self.dtype, self.text_len)
        return " ".join(map(str, parts))


def clean(prompt: str) -> str:
    """The prompt as Wan reads it: broken Unicode and full-width signs mended, HTML entities read, single spaces."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def read_embeds(path: Path) -> Tensor | None:
    """Remembered embeddings; None if there are none, or the file is damaged: they can be computed again."""
    try:
        return load_file(path)["prompt_embeds"]
    except (OSError, SafetensorError, KeyError):
        return None


def write_embeds(path: Path, embeds: Tensor, prompt: str) -> None:
    with atomic(path) as temporary:
        save_file({"prompt_embeds": embeds.cpu().contiguous()}, temporary, {"prompt": prompt})


# ------------------------------------------------------------------------------------------------------ tokenizer


def find_tokenizer(path: Path) -> Path:
    """tokenizer.json or spiece.model, in the folder `path` or where it lies beside the weights `path`."""
    for folder in (path, path.parent / TOKENIZER, path.parent / "tokenizer"):
        for name in ("tokenizer.json", "spiece.model"):
            if (folder / name).is_file():
                return folder / name
    command = DOWNLOADS["text encoder"].command
    raise ValueError(f"There is no tokenizer.json or spiece.model for {path}: download them with `{command}`.")


def load_tokenizer(file: Path) -> Callable[[str], list[int]]:
    """prompt -> token ids, end of sequence last.

    tokenizer.json is obeyed as it stands; transformers 5 would rebuild it as a T5 tokenizer, which has no fallback to
    bytes. spiece.model is UMT5's vocabulary itself.
    """
    if file.suffix == ".json":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return lambda prompt: tokenizer.encode(prompt).ids
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(file))
    return lambda prompt: [*pieces.encode(prompt), pieces.eos_id()]


# -------------------------------------------------------------------------------------------------------- network


def load_umt5(path: Path, dtype: torch.dtype) -> nn.Module:
    """transformers' UMT5EncoderModel, from a folder of transformers or from Wan's file, which stays memory-mapped."""
    from transformers import UMT5Config, UMT5EncoderModel

    if path.is_dir():
        return load_frozen(UMT5EncoderModel, path, dtype=dtype)
    tensors = in_transformers_names(read_file(path)[0])
    if EMBEDDING not in tensors or BIAS not in tensors:
        raise ValueError(f"{path} is no UMT5 encoder, it has {first(tensors)}: pass the right file.")
    config = UMT5Config(**umt5_sizes(tensors))
    return load_frozen(UMT5EncoderModel, path, config=config, state_dict=tensors, dtype=dtype)


EMBEDDING = "shared.weight"
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
RENAMES = {  # Wan's -> transformers'
    r"^token_embedding\.": "shared.",
    r"^norm\.": "encoder.final_layer_norm.",
    r"^blocks\.": "encoder.block.",
    r"\.norm1\.": ".layer.0.layer_norm.",
    r"\.attn\.": ".layer.0.SelfAttention.",
    r"\.pos_embedding\.embedding\.": ".layer.0.SelfAttention.relative_attention_bias.",
    r"\.norm2\.": ".layer.1.layer_norm.",
    r"\.ffn\.gate\.0\.": ".layer.1.DenseReluDense.wi_0.",
    r"\.ffn\.fc1\.": ".layer.1.DenseReluDense.wi_1.",
    r"\.ffn\.fc2\.": ".layer.1.DenseReluDense.wo.",
}


def in_transformers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, x in tensors.items():
        for wan, theirs in RENAMES.items():
            name = re.sub(wan, theirs, name)
        renamed[name] = x
    return renamed


def umt5_sizes(tensors: StateDict) -> dict[str, int]:
    """UMT5Config's sizes, all of which the weights' shapes tell."""
    layer = "encoder.block.0.layer.{}.weight".format
    num_buckets, num_heads = tensors[BIAS].shape
    return {
        "vocab_size": len(tensors[EMBEDDING]),
        "d_model": tensors[EMBEDDING].shape[1],
        "d_kv": len(tensors[layer("0.SelfAttention.q")]) // num_heads,
        "d_ff": len(tensors[layer("1.DenseReluDense.wi_0")]),
        "num_layers": sum(name.endswith(".SelfAttention.q.weight") for name in tensors),
        "num_heads": num_heads,
        "relative_attention_num_buckets": num_buckets,
    }
