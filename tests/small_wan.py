"""Small random models in the files that Wan's networks really come in, for tests that load them as a user would.

    write_text_encoder(folder)   UMT5 and its tokenizer
    write_vae(folder)            Wan's VAE
    write_clip(folder)           the image encoder of image-to-video, and how it wants its images
    write_tiny_decoder(path)     TAEHV

The first three write what belongs into a diffusers pipeline (text_encoder/, tokenizer/, vae/, ...) or, with
`official=True`, into Wan's own folder (.pth files in Wan's own names), and return the model that they wrote. What the
transformer reads has Wan's widths by default: embeddings 4096, CLIP tokens 257 x 1280, 16 latent channels.
"""

import io
import json
import re
from pathlib import Path

import torch
from torch import nn

from randomness import generator, randn

T5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
VAE_FILE = "Wan2.1_VAE.pth"
SENTENCES = (  # what the tokenizer learns its pieces from
    "a cat walks on the grass",
    "two dogs run over a red bridge at night, cinematic light",
    "the camera pans slowly over a city & the snow",
    "a panda eats bamboo, realistic style, high quality",
    "色调艳丽，过曝，静态，细节模糊不清",
    "静止不动的画面，杂乱的背景，三条腿",
)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, norms around 1, so that no weight can be forgotten or exchanged unseen."""
    for i, (name, parameter) in enumerate(model.named_parameters()):
        fan_in = parameter[0].numel() if parameter.ndim > 1 and parameter.shape[0] > 1 else 25
        is_norm = name.endswith("gamma") or ("norm" in name and name.endswith("weight")) or "layrnorm.weight" in name
        noise = randn(parameter.shape, generator(seed, i))
        parameter.copy_(1 + noise / 5 if is_norm else noise / max(fan_in, 1) ** 0.5)
    return model.eval().requires_grad_(False)


def in_wan_names(state_dict, renames):
    """The same tensors under the names that Wan gave them; renames: (pattern, replacement) in order."""
    renamed = {}
    for name, x in state_dict.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        renamed[name] = x
    return renamed


# ----------------------------------------------------------------------------------------------------------- text


def write_tokenizer(folder: Path, fast: bool = True) -> None:
    """UMT5's files: spiece.model, tokenizer_config.json and, with fast, the tokenizer.json made of them."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 10),
        model_writer=model,
        vocab_size=380,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=3,
        pad_piece="<pad>",
        character_coverage=1.0,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    extra = {"extra_ids": 300, "additional_special_tokens": [f"<extra_id_{i}>" for i in range(300)]}
    settings = {"tokenizer_class": "T5Tokenizer", "model_max_length": 10**30, "sp_model_kwargs": {}, **special, **extra}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if fast:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer.save(f"{folder}/tokenizer.json")


def write_text_encoder(folder: Path, *, official: bool = False, dim: int = 4096, seed: int = 0) -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(vocab_size=700, d_model=dim, d_kv=6, d_ff=40, num_layers=2, num_heads=4)
    model = randomise(UMT5EncoderModel(config), seed)
    if official:
        tensors = in_wan_names(model.state_dict(), T5_NAMES)
        tensors.pop("encoder.embed_tokens.weight")  # the same as token_embedding
        write_tokenizer(folder / "google" / "umt5-xxl")
        torch.save(tensors, folder / T5_FILE)
    else:
        write_tokenizer(folder / "tokenizer")
        model.save_pretrained(folder / "text_encoder")
    return model


T5_NAMES = (
    (r"^shared", "token_embedding"),
    (r"^encoder\.final_layer_norm", "norm"),
    (r"^encoder\.block\.(\d+)\.layer\.0\.layer_norm", r"blocks.\1.norm1"),
    (r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias", r"blocks.\1.pos_embedding.embedding"),
    (r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention", r"blocks.\1.attn"),
    (r"^encoder\.block\.(\d+)\.layer\.1\.layer_norm", r"blocks.\1.norm2"),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0", r"blocks.\1.ffn.gate.0"),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1", r"blocks.\1.ffn.fc1"),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo", r"blocks.\1.ffn.fc2"),
)

# ------------------------------------------------------------------------------------------------------------ VAE


def write_vae(folder: Path, *, official: bool = False, seed: int = 0) -> nn.Module:
    from diffusers import AutoencoderKLWan

    model = randomise(AutoencoderKLWan(base_dim=8), seed)
    folder.mkdir(parents=True, exist_ok=True)
    if official:
        torch.save(in_wan_names(model.state_dict(), VAE_NAMES), folder / VAE_FILE)
    else:
        model.save_pretrained(folder / "vae")
    return model


def upsample(match) -> str:
    """A block of diffusers' decoder, three residual blocks and an upsampler, is four in a row of Wan's."""
    block, kind, i = int(match[1]), match[2], int(match[3])
    return f"decoder.upsamples.{4 * block + (3 if kind == 'upsamplers' else i)}"


VAE_NAMES = (
    (r"^quant_conv", "conv1"),
    (r"^post_quant_conv", "conv2"),
    (r"\.conv_in", ".conv1"),
    (r"\.norm_out", ".head.0"),
    (r"\.conv_out", ".head.2"),
    (r"\.down_blocks", ".downsamples"),
    (r"\.mid_block\.resnets\.0", ".middle.0"),
    (r"\.mid_block\.attentions\.0", ".middle.1"),
    (r"\.mid_block\.resnets\.1", ".middle.2"),
    (r"^decoder\.up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)", upsample),
    (r"(\.(?:middle|downsamples|upsamples)\.\d+)\.norm1", r"\1.residual.0"),
    (r"(\.(?:middle|downsamples|upsamples)\.\d+)\.conv1", r"\1.residual.2"),
    (r"(\.(?:middle|downsamples|upsamples)\.\d+)\.norm2", r"\1.residual.3"),
    (r"(\.(?:middle|downsamples|upsamples)\.\d+)\.conv2", r"\1.residual.6"),
    (r"\.conv_shortcut", ".shortcut"),
)


def write_tiny_decoder(path: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """All 128 tensors of taew2_1.pth, encoder included, in their real shapes, as float16; returns them."""
    shapes = {}

    def layer(name, dim, next_dim, kernel=3, bias=True):
        shapes[f"{name}.weight"] = (next_dim, dim, kernel, kernel)
        if bias:
            shapes[f"{name}.bias"] = (next_dim,)

    def blocks(network, first, dim):
        for i in range(first, first + 3):
            for j, width in ((0, 2 * dim), (2, dim), (4, dim)):
                layer(f"{network}.{i}.conv.{j}", width, dim)

    layer("encoder.0", 3, 64)
    for i, stride in ((2, 2), (7, 2), (12, 1)):
        layer(f"encoder.{i}.conv", 64 * stride, 64, kernel=1, bias=False)
        layer(f"encoder.{i + 1}", 64, 64, bias=False)
        blocks("encoder", i + 2, 64)
    layer("encoder.17", 64, 16)
    layer("decoder.1", 16, 256)
    for i, dim, next_dim, stride in ((3, 256, 128, 1), (9, 128, 64, 2), (15, 64, 64, 2)):
        blocks("decoder", i, dim)
        layer(f"decoder.{i + 4}.conv", dim, dim * stride, kernel=1, bias=False)
        layer(f"decoder.{i + 5}", dim, next_dim, bias=False)
    layer("decoder.22", 64, 3)
    tensors = {}
    for i, (name, shape) in enumerate(shapes.items()):
        scale = 0.5 if name.endswith("bias") else (shape[1] * shape[2] * shape[3]) ** -0.5
        tensors[name] = (scale * randn(shape, generator(seed, i))).half()
    torch.save(tensors, path)
    return tensors


# ----------------------------------------------------------------------------------------------------------- CLIP


def write_clip(folder: Path, *, official: bool = False, dim: int = 1280, seed: int = 0) -> nn.Module:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    heads = {"num_attention_heads": dim // 80, "num_hidden_layers": 2}
    config = CLIPVisionConfig(hidden_size=dim, intermediate_size=96, patch_size=14, hidden_act="gelu", **heads)
    model = randomise(CLIPVisionModel(config), seed)
    folder.mkdir(parents=True, exist_ok=True)
    if official:
        torch.save(official_clip(model.state_dict(), dim), folder / CLIP_FILE)
    else:
        model.save_pretrained(folder / "image_encoder")
        CLIPImageProcessor().save_pretrained(folder / "image_processor")
    return model


def official_clip(state_dict, dim):
    """Wan's file holds q, k and v in one, embeddings with a batch axis, and a text half that nobody asks for."""
    tensors = in_wan_names(state_dict, CLIP_NAMES)
    for part in ("weight", "bias"):
        for i in range(2):
            attention = f"visual.transformer.{i}.attn"
            qkv = [tensors.pop(f"{attention}.{name}_proj.{part}") for name in "qkv"]
            tensors[f"{attention}.to_qkv.{part}"] = torch.cat(qkv)
    tensors["visual.cls_embedding"] = tensors["visual.cls_embedding"][None, None]
    tensors["visual.pos_embedding"] = tensors["visual.pos_embedding"][None]
    others = {"visual.head": torch.zeros(dim, 8), "textual.token_embedding.weight": torch.zeros(9, 8)}
    return tensors | others | {"log_scale": torch.tensor(2.66)}


CLIP_NAMES = (
    (r"^embeddings\.class_embedding", "visual.cls_embedding"),
    (r"^embeddings\.patch_embedding", "visual.patch_embedding"),
    (r"^embeddings\.position_embedding\.weight", "visual.pos_embedding"),
    (r"^pre_layrnorm", "visual.pre_norm"),
    (r"^post_layernorm", "visual.post_norm"),
    (r"^encoder\.layers", "visual.transformer"),
    (r"\.layer_norm", ".norm"),
    (r"\.self_attn\.out_proj", ".attn.proj"),
    (r"\.self_attn", ".attn"),
    (r"\.mlp\.fc1", ".mlp.0"),
    (r"\.mlp\.fc2", ".mlp.2"),
)
