"""Wan 2.1's released sizes, and its weights out of every file that they come in.

The class is the tiny model's own. A checkpoint is read (memory-mapped; no code in it is ever run), its tensors get
Wan's names, and a model that was built without memory takes them over as its parameters.
"""

import json
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoint import StateDict, Weights, fill
from full_scale import sharded_checkpoint
from tiny_causal_wan import TinyCausalWanModel, WanConfig

T2V_1_3B = WanConfig(
    model_type="t2v",
    in_dim=16,
    out_dim=16,
    dim=1536,
    ffn_dim=8960,
    num_heads=12,
    num_layers=30,
    patch_size=(1, 2, 2),
    text_dim=4096,
    text_len=512,
)
T2V_14B = replace(T2V_1_3B, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
I2V_14B = replace(T2V_14B, model_type="i2v", in_dim=36)  # 16 noise + 4 mask + 16 image latent channels

WAN_CONFIGS = {"t2v-1.3b": T2V_1_3B, "t2v-14b": T2V_14B, "i2v-14b": I2V_14B}


def load_transformer(
    path: str | Path,
    *,
    config: WanConfig | str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    weights: str = "ema",
) -> TinyCausalWanModel:
    """The Wan transformer stored at `path`, in `dtype` (by default the widest stored one) on `device` (the CPU).

    path: an official folder (config.json and *.safetensors, sharded or not), a diffusers transformer folder or the
    pipeline folder around it, a .pt / .safetensors file of Self-Forcing, Self-Forcing-Plus, train.py or convert.py, or
    a checkpoint that train.py wrote in many processes.
    config: a WanConfig, a name in WAN_CONFIGS or the path of a config.json; by default the one stored with the
    weights, else the released model of their width. weights: "ema" prefers averaged weights, "raw" passes them over.

    On the CPU and in the stored dtype the parameters are the file's own pages, mapped copy-on-write: nothing is read
    before it is used, all processes of a machine share one copy, and training does not reach the file. Do not write
    into that file meanwhile. Raises ValueError for a path, file, config or key that does not fit, naming it.
    """
    found = read(path, weights)
    with torch.device("meta"):
        model = TinyCausalWanModel(pick_config(config, found))
    tensors = in_wan_names(found.state_dict, model.state_dict())
    fill(model, {name: x.to("meta") for name, x in tensors.items()}, found.path)  # compares names and shapes, no more
    dtype = pick_dtype(dtype, tensors.values())
    model.load_state_dict({name: x.to(device=device, dtype=dtype) for name, x in tensors.items()}, assign=True)
    return model


def pick_dtype(dtype: torch.dtype | str | None, tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype asked for, such as "bfloat16", or the widest of the tensors': a model computes in one."""
    if dtype is None:
        dtype = max((x.dtype for x in tensors), key=lambda stored: stored.itemsize)
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):  # float8 is stored, not computed in
        raise ValueError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}: pass one of them.")
    return found


# ------------------------------------------------------------------------------------------------------- reading


def place_of(path: str | Path) -> Path:
    """Where the transformer lies: at the path or, in a whole diffusers pipeline, in a folder of it. Raises ValueError
    where there is nothing."""
    path = Path(path)
    if (path / "transformer" / "config.json").is_file():
        path = path / "transformer"
    if not path.exists():
        example = "hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir wan_models/Wan2.1-T2V-1.3B"
        raise ValueError(
            f"There is no {path}: give a folder or file of weights, downloaded for example by `{example}`."
        )
    return path


def read(path: str | Path, weights: str = "ema") -> Weights:
    """One network of a folder or file, with wrappers gone from its names, and the config stored with it, if any."""
    path = place_of(path)
    if (path / sharded_checkpoint.STATE).is_file():
        content, settings = read_sharded(path, weights)
    else:
        content, settings = read_folder(path) if path.is_dir() else read_file(path)
    return Weights(without_wrappers(pick_network(content, weights, path), path), settings, path)


def read_sharded(folder: Path, weights: str) -> tuple[Mapping, Mapping]:
    """The best network that is asked for in a training checkpoint of many processes, and its sizes."""
    kept = read_json(folder / sharded_checkpoint.STATE)
    best = next((name for name in NETWORKS.get(weights, ()) if kept.get(name)), "")
    state = sharded_checkpoint.load(folder, wanted=lambda name: name.startswith(f"{best}/"))
    return state, state["config"]["model"]


def read_folder(folder: Path) -> tuple[StateDict, Mapping]:
    """All tensors of the folder's safetensors files, and its config.json."""
    tensors, origin = {}, {}
    for file in weight_files(folder):
        part, _ = read_safetensors(file)
        twice = tensors.keys() & part.keys()
        if twice:
            other = origin[min(twice)]
            raise ValueError(f"{other} and {file} both hold {min(twice)}: keep one of them, or pass it as the path.")
        tensors |= part
        origin |= dict.fromkeys(part, file)
    config = folder / "config.json"
    return tensors, read_json(config) if config.exists() else {}


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files: those that its index names, or simply all."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise ValueError(f"{folder} holds several models, {', '.join(path.name for path in indices)}: keep one index.")
    if not indices:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder} holds no *.safetensors: pass the folder or file that has the transformer.")
        return files
    shards = read_json(indices[0]).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{indices[0]} has no weight_map: download it again.")
    files = [folder / name for name in sorted(set(shards.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ValueError(f"{folder} lacks {', '.join(absent)} of the {len(files)} files in its index: download them.")
    return files


def read_file(path: Path) -> tuple[Mapping, Mapping]:
    """What a single file holds, networks maybe side by side, and the sizes it says that they have (else nothing)."""
    if path.suffix == ".safetensors":
        content, metadata = read_safetensors(path)
        record = parsed(metadata.get("config", ""))
    else:
        content = read_pickle(path)
        record = content.get("config")
    model = record.get("model") if isinstance(record, dict) else None
    return content, model if isinstance(model, dict) and "dim" in model else {}


def parsed(note: str):
    """A header's note as JSON; None for what somebody else may have written there."""
    try:
        return json.loads(note)
    except ValueError:
        return None


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:  # maps the file copy-on-write
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(damaged(path, "safetensors", error)) from error


def read_pickle(path: Path) -> dict:
    try:
        content = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:  # zip, pickle and torch each fail in their own way
        raise ValueError(
            f"{path} cannot be read as a PyTorch file: download it again if it is truncated; if it holds "
            "Python objects, whose code is never run here, save its tensors alone."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: pass a file with a state dict.")
    return content


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(damaged(path, "JSON", error)) from error
    if not isinstance(content, dict):
        raise ValueError(damaged(path, "JSON", f"a {type(content).__name__} where an object should be"))
    return content


def damaged(path: Path, form: str, cause) -> str:
    return f"{path} cannot be read as {form} ({cause}): download it again if it is truncated or a mere git-lfs pointer."


# ------------------------------------------------------------------------------------------------------- networks

NETWORKS = {  # where training runs keep the generator, the best first: Self-Forcing's names, then train.py's
    "ema": ("generator_ema", "generator", "model", "ema_state_dict", "generator_state_dict"),
    "raw": ("generator", "model", "generator_state_dict"),
}
WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"}  # FSDP, AC, compile, DDP


def pick_network(content: Mapping, weights: str, source: Path) -> StateDict:
    """The generator among a file's networks: nested dicts in a .pt, prefixes in a .safetensors, or all there is."""
    if weights not in NETWORKS:
        raise ValueError(f"weights must be 'ema' or 'raw', got {weights!r}.")
    bare = {str(key): x for key, x in content.items() if isinstance(x, Tensor)}
    for name in NETWORKS[weights]:
        nested = content.get(name)
        if isinstance(nested, Mapping) and nested:
            return {key: x for key, x in nested.items() if isinstance(x, Tensor)}
        prefixed = {key.removeprefix(f"{name}."): x for key, x in bare.items() if key.startswith(f"{name}.")}
        if prefixed:
            return prefixed
    if not bare:
        names = ", ".join(NETWORKS[weights])
        raise ValueError(f"{source} has no network, neither bare nor as {names}: it holds {first(content)}.")
    return bare


def without_wrappers(state_dict: StateDict, source: Path) -> dict[str, Tensor]:
    """The same tensors under the names that they had before FSDP, compile, checkpointing and the model.* wrapper."""
    tensors = {}
    for wrapped, x in state_dict.items():
        # Wrappers first, wherever they are: `_fsdp_wrapped_module.model.` occurs as well as its reverse.
        name = ".".join(part for part in wrapped.split(".") if part not in WRAPPERS).removeprefix("model.")
        if name in tensors:
            raise ValueError(f"{source} holds {name} twice, with and without the names of wrappers: keep one copy.")
        tensors[name] = x
    return tensors


def first(names: Iterable) -> str:
    return ", ".join(str(name) for name in list(names)[:3]) or "nothing"


# ---------------------------------------------------------------------------------------------- names of diffusers

RENAMES = {  # Wan's -> diffusers', in this order
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm_k_img": "norm_added_k",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "self_attn": "attn1",
    "cross_attn": "attn2",
    **{f".{name}.": f".to_{name}." for name in "qkv"},
    ".o.": ".to_out.0.",
}
DIFFUSERS_FIELDS = {
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "num_heads": "num_attention_heads",
    **{
        name: name for name in ("ffn_dim", "num_layers", "patch_size", "text_dim", "freq_dim", "cross_attn_norm", "eps")
    },
}


def diffusers_name(name: str) -> str:
    """A parameter's name in diffusers' WanTransformer3DModel."""
    for ours, theirs in RENAMES.items():
        name = name.replace(ours, theirs)
    return name


def in_wan_names(tensors: StateDict, names: Iterable[str]) -> StateDict:
    """Tensors under Wan's names, if they came under diffusers'; `names` are those of the model."""
    if not any(name.startswith("condition_embedder.") for name in tensors):
        return tensors
    ours = {diffusers_name(name): name for name in names}
    # Early files of diffusers store a norm_added_q that no version of the model reads.
    return {ours.get(name, name): x for name, x in tensors.items() if "norm_added_q" not in name}


# -------------------------------------------------------------------------------------------------------- configs

REQUIRED = ("model_type", "in_dim", "out_dim", "dim", "ffn_dim", "num_heads", "num_layers")


def stored_config(path: str | Path, config: WanConfig | str | Path | None = None, weights: str = "ema") -> WanConfig:
    """The sizes of what `load_transformer` would load. Of a training checkpoint of many processes no weight is read:
    all others are mapped."""
    state = place_of(path) / sharded_checkpoint.STATE
    sizes = Weights({}, read_json(state)["config"]["model"], state.parent) if state.is_file() else read(path, weights)
    return pick_config(config, sizes)


def pick_config(config: WanConfig | str | Path | None, found: Weights) -> WanConfig:
    """The config asked for, else the stored one, else that of the released model whose width the weights have."""
    if isinstance(config, WanConfig):
        return config
    if config in WAN_CONFIGS:
        return WAN_CONFIGS[config]
    if config is not None:
        if not Path(config).is_file():
            raise ValueError(f"There is no config {config}: use {', '.join(WAN_CONFIGS)} or the path of a config.json.")
        return config_from(read_json(Path(config)), config)
    return config_from(found.config, found.path) if found.config else released_config(found)


def released_config(found: Weights) -> WanConfig:
    patch = found.state_dict.get("patch_embedding.weight")
    if patch is None:
        raise ValueError(f"{found.path} is no Wan transformer, it has {first(found.state_dict)}: pass the right file.")
    for config in WAN_CONFIGS.values():
        if patch.shape == (config.dim, config.in_dim, *config.patch_size):
            return config
    raise ValueError(
        f"{found.path} fits no released model, its patch_embedding.weight is {tuple(patch.shape)}: pass its config."
    )


def config_from(settings: Mapping, source: str | Path) -> WanConfig:
    """The sizes in a config.json, official or diffusers'. What it leaves out is the same in all of Wan 2.1."""
    if "num_attention_heads" in settings:
        settings = from_diffusers(settings)
    lacking = [name for name in REQUIRED if name not in settings]
    if lacking:
        raise ValueError(f"{source} describes no Wan transformer, it lacks {', '.join(lacking)}: pass its config.")
    known = {field.name: settings[field.name] for field in fields(WanConfig) if field.name in settings}
    try:
        return replace(T2V_1_3B, **known)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} describes no model that can be built here: {error}") from error


def from_diffusers(settings: Mapping) -> dict:
    """diffusers' settings in Wan's words; text_len is not among theirs."""
    ours = {name: settings[theirs] for name, theirs in DIFFUSERS_FIELDS.items() if theirs in settings}
    ours["dim"] = settings["num_attention_heads"] * settings.get("attention_head_dim", 128)
    ours["model_type"] = "t2v" if settings.get("image_dim") is None else "i2v"
    return ours | {name: settings[name] for name in ("text_len",) if name in settings}
