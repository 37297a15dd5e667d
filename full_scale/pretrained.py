"""Networks that are only used, never trained: where to download them, where they lie in a folder, and how they load.

Text encoder, VAE and image encoder come in Wan's own folders and, for diffusers, in a folder each; both are read.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from full_scale.wan import first


@dataclass(frozen=True)
class Download:
    """Something to fetch, how large it is in GB (1e9 bytes), and the command that puts it where examples expect it."""

    what: str
    gigabytes: float
    command: str


def wan_download(what: str, gigabytes: float, repository: str, *files: str) -> Download:
    chosen = "".join(f" --include '{file}'" for file in files)
    folder = f"wan_models/{repository.partition('/')[2]}"
    return Download(what, gigabytes, f"hf download {repository}{chosen} --local-dir {folder}")


T5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
VAE_FILE = "Wan2.1_VAE.pth"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER = "google/umt5-xxl"  # a folder within Wan's

T2V_1_3B, I2V_14B = "Wan-AI/Wan2.1-T2V-1.3B", "Wan-AI/Wan2.1-I2V-14B-480P"
TINY_URL = "https://github.com/madebyollin/taehv/raw/main/taew2_1.pth"

DOWNLOADS = {
    "t2v-1.3b": wan_download("Wan 2.1 T2V 1.3B, with text encoder and VAE", 17.6, T2V_1_3B),
    "t2v-14b": wan_download("Wan 2.1 T2V 14B, with text encoder and VAE", 69.0, "Wan-AI/Wan2.1-T2V-14B"),
    "i2v-14b": wan_download("Wan 2.1 I2V 14B, with text encoder, VAE and CLIP", 82.2, I2V_14B),
    "text encoder": wan_download("UMT5-XXL and its tokenizer alone", 11.4, T2V_1_3B, T5_FILE, f"{TOKENIZER}/*"),
    "VAE": wan_download("the VAE alone", 0.5, T2V_1_3B, VAE_FILE),
    "image encoder": wan_download("CLIP alone", 4.8, I2V_14B, CLIP_FILE),
    "tiny decoder": Download("TAEHV for Wan 2.1", 0.02, f"curl -L --create-dirs -o wan_models/taew2_1.pth {TINY_URL}"),
    "self-forcing": Download(
        "Self-Forcing's 1.3B student (DMD)",
        5.7,
        "hf download gdhe17/Self-Forcing checkpoints/self_forcing_dmd.pt --local-dir wan_models/Self-Forcing",
    ),
    "ode init": Download(
        "the causal 1.3B model that Self-Forcing starts from",
        5.7,
        "hf download gdhe17/Self-Forcing checkpoints/ode_init.pt --local-dir wan_models/Self-Forcing",
    ),
    "prompts": Download(
        "Self-Forcing's training prompts",
        0.1,
        "hf download gdhe17/Self-Forcing vidprom_filtered_extended.txt --local-dir wan_models/Self-Forcing",
    ),
}

PLACES = {  # folder of a diffusers pipeline, file in Wan's folder, and what a folder of its own says in config.json
    "text encoder": ("text_encoder", T5_FILE, '"umt5"'),
    "VAE": ("vae", VAE_FILE, '"AutoencoderKLWan"'),
    "image encoder": ("image_encoder", CLIP_FILE, '"clip_vision_model"'),
}


def find(part: str, path: str | Path) -> Path:
    """The folder or file of one part: in a diffusers pipeline, in Wan's own folder, or `path` itself."""
    path = Path(path)
    folder, file, name = PLACES[part]
    for place in (path / folder, path / file):
        if place.exists():
            return place
    config = path / "config.json"
    if path.is_file() or (config.is_file() and name in config.read_text()):
        return path
    raise ValueError(
        f"{path} holds neither {folder}/ nor {file}: download the {part} with `{DOWNLOADS[part].command}`."
    )


def load_frozen(model_class, path: Path, **settings) -> nn.Module:
    """A library's model with all of its weights from `path`, in evaluation mode and without gradients.

    The libraries invent what they do not find, and warn; here it is an error. settings: of `from_pretrained`; where
    they hold a state_dict, `path` only names it. Pickles are read without running code in them, the libraries' default.
    """
    try:
        model, report = model_class.from_pretrained(
            None if "state_dict" in settings else path, output_loading_info=True, local_files_only=True, **settings
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be loaded as {model_class.__name__}: {error}") from error
    if report["missing_keys"]:
        lacking = first(sorted(report["missing_keys"]))
        raise ValueError(f"{path} is no whole {model_class.__name__}, it lacks {lacking}: download it again.")
    return model.eval().requires_grad_(False)


def fingerprint(path: Path, num_samples: int = 256, sample_size: int = 4096) -> str:
    """Tells weights apart without reading gigabytes: sizes, and samples spread evenly over the file or files."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(filter(Path.is_file, path.iterdir())):
        size = file.stat().st_size
        digest.update(f"{size}\n".encode())
        with file.open("rb") as content:
            for start in range(0, size, max(sample_size, size // num_samples)):
                content.seek(start)
                digest.update(content.read(sample_size))
    return digest.hexdigest()
