"""What image-to-video sees of an image: its place in the clip, latents with a mask, and its content through CLIP."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from full_scale.pixels import WanVAE
from full_scale.pretrained import find, load_frozen
from full_scale.wan import first, pick_dtype, read_file

Images = Image.Image | Sequence[Image.Image] | Tensor  # tensors are pixels, [B, 3, H, W] in [-1, 1]


@torch.no_grad()
def image_conditioning(
    images: Images, num_latent_frames: int, vae: WanVAE, clip: "ImageEncoder", *, height: int = 480, width: int = 832
) -> dict[str, Tensor]:
    """{"image_latents": [B, F, 20, H/8, W/8], "clip_features": [B, 257, 1280]} of videos that begin with `images`.

    image_latents: 4 channels of mask, one per picture of a latent frame, 1 where it is given; then the 16 latent
    channels of a clip that goes on in grey (0) after the image. PIL images are cut to the proportions height : width.
    The VAE sees them resized to that; CLIP has a size of its own.
    """
    images = images if isinstance(images, Tensor) else [cut(image, height, width) for image in pictures(images)]
    pixels = image_pixels(images, height, width).to(vae.latents_mean.device)
    video = F.pad(pixels[:, None], (0, 0, 0, 0, 0, 0, 0, 4 * (num_latent_frames - 1)))
    latents = vae.encode(video)
    mask = torch.zeros_like(latents[:, :, :4])
    mask[:, 0] = 1
    return {"image_latents": torch.cat([mask, latents], dim=2), "clip_features": clip(images)}


def image_pixels(images: Images, height: int, width: int) -> Tensor:
    """[B, 3, height, width] in [-1, 1] of pictures that are cut to these proportions; tensors pass as they are."""
    if isinstance(images, Tensor):
        return images
    from diffusers.video_processor import VideoProcessor

    fitting = [cut(image, height, width) for image in pictures(images)]
    return VideoProcessor(vae_scale_factor=8).preprocess(fitting, height=height, width=width)


def pictures(images: Image.Image | Sequence[Image.Image]) -> list[Image.Image]:
    """The images in colour and upright: cameras store how they were held instead of turning what they store."""
    images = [images] if isinstance(images, Image.Image) else images
    return [ImageOps.exif_transpose(image).convert("RGB") for image in images]


def cut(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest part around the middle of an image that has the proportions height : width, to a pixel. Of such a
    part, all."""
    scale = min(image.height / height, image.width / width)
    if image.width == round(image.height / height * width) or image.height == round(image.width / width * height):
        return image
    size = round(scale * width), round(scale * height)
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))


# ----------------------------------------------------------------------------------------------------------- CLIP


def load_image_encoder(
    path: str | Path, *, dtype: torch.dtype | str = torch.float32, device: torch.device | str | None = None
) -> "ImageEncoder":
    """Wan's image encoder, frozen, from a diffusers pipeline or image_encoder folder, Wan's folder, or its .pth."""
    path, dtype = find("image encoder", path), pick_dtype(dtype, ())
    from transformers import CLIPVisionConfig, CLIPVisionModel

    if path.is_dir():
        model, preprocess = load_frozen(CLIPVisionModel, path, dtype=dtype), load_processor(path)
    else:
        tensors = in_transformers_names(read_file(path)[0], path)
        config = CLIPVisionConfig(**clip_sizes(tensors))
        model = load_frozen(CLIPVisionModel, path, config=config, state_dict=tensors, dtype=dtype)
        preprocess = preprocess_as_wan
    return ImageEncoder(model, preprocess).to(device).eval()


class ImageEncoder(nn.Module):
    """Images -> [B, 257, 1280]: what the last layer but one of CLIP's vision transformer says, in float32."""

    def __init__(self, model: nn.Module, preprocess: Callable[[Images], Tensor]):
        super().__init__()
        self.model, self.preprocess = model, preprocess

    @torch.no_grad()
    def forward(self, images: Images) -> Tensor:
        pixels = self.preprocess(images).to(self.model.device, self.model.dtype)
        return self.model(pixels, output_hidden_states=True).hidden_states[-2].float()


def load_processor(path: Path) -> Callable[[Images], Tensor]:
    """The preprocessing that a diffusers pipeline keeps in image_processor/ (transformers: beside the weights)."""
    from transformers import CLIPImageProcessor

    folders = [folder for folder in (path.parent / "image_processor", path) if (folder / PROCESSOR_FILE).is_file()]
    if not folders:
        raise ValueError(f"There is no {PROCESSOR_FILE} in {path} or image_processor/ beside it: download it as well.")
    processor = CLIPImageProcessor.from_pretrained(folders[0], local_files_only=True)

    def preprocess(images: Images) -> Tensor:
        if isinstance(images, Tensor):
            return processor((images + 1) / 2, do_rescale=False, return_tensors="pt").pixel_values
        return processor(pictures(images), return_tensors="pt").pixel_values

    return preprocess


PROCESSOR_FILE = "preprocessor_config.json"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def preprocess_as_wan(images: Images, size: int = 224) -> Tensor:
    """Wan's own way: the whole image squeezed to a square. (diffusers' settings cut a square out of its middle.)"""
    from torchvision.transforms.functional import normalize, to_tensor

    whole = (images + 1) / 2 if isinstance(images, Tensor) else map(to_tensor, pictures(images))
    squeezed = [F.interpolate(x[None], (size, size), mode="bicubic", align_corners=False) for x in whole]
    return normalize(torch.cat(squeezed), CLIP_MEAN, CLIP_STD)


RENAMES = {  # Wan's -> transformers', in this order
    "cls_embedding": "embeddings.class_embedding",
    "patch_embedding": "embeddings.patch_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "pre_norm": "pre_layrnorm",
    "post_norm": "post_layernorm",
    "transformer.": "encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.proj.": ".self_attn.out_proj.",
    ".attn.to_qkv.": ".self_attn.to_qkv.",
    ".mlp.0.": ".mlp.fc1.",
    ".mlp.2.": ".mlp.fc2.",
}


def in_transformers_names(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The vision transformer of Wan's file; the text half, and the projection that joins them, are left behind."""
    renamed = {}
    for wan, x in tensors.items():
        if not wan.startswith("visual.") or wan == "visual.head":
            continue
        name = wan.removeprefix("visual.")
        for ours, theirs in RENAMES.items():
            name = name.replace(ours, theirs)
        if "to_qkv" in name:
            renamed |= {name.replace("to_qkv", f"{part}_proj"): y for part, y in zip("qkv", x.chunk(3), strict=True)}
        else:
            renamed[name] = x.squeeze() if x.ndim == 3 else x  # the two embeddings
    if POSITIONS not in renamed:
        raise ValueError(f"{source} is no CLIP of Wan's, it has {first(tensors)}: pass the right file.")
    return renamed


POSITIONS = "embeddings.position_embedding.weight"


def clip_sizes(tensors: Mapping[str, Tensor]) -> dict:
    """CLIPVisionConfig's sizes, from the shapes and from what all ViT-H share."""
    patch = tensors["embeddings.patch_embedding.weight"]  # [d 3 p p]
    dim, patch_size = len(patch), patch.shape[-1]
    return {
        "hidden_size": dim,
        "intermediate_size": len(tensors["encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": sum(name.endswith(".mlp.fc1.weight") for name in tensors),
        "num_attention_heads": dim // 80,
        "patch_size": patch_size,
        "image_size": patch_size * math.isqrt(len(tensors[POSITIONS]) - 1),
        "hidden_act": "gelu",
    }
