"""Convert a Wan transformer between the files it comes in: `python -m full_scale.convert IN OUT`.

    OUT/               Wan's own layout, config.json and diffusion_pytorch_model*.safetensors      --format official
    OUT-Diffusers/     diffusers' layout, for WanTransformer3DModel.from_pretrained                --format diffusers
    OUT.pt             Self-Forcing's, {"generator": {"model.<key>": tensor}}                      --format pt
    OUT.safetensors    Self-Forcing-Plus', bare keys                                               --format safetensors

IN is whatever `load_transformer` reads. Every file is written whole or not at all; a folder's config.json comes last.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from checkpoint import StateDict, atomic, save_checkpoint
from full_scale.wan import (
    DIFFUSERS_FIELDS,
    NETWORKS,
    REQUIRED,
    T2V_1_3B,
    WAN_CONFIGS,
    diffusers_name,
    load_transformer,
)
from tiny_causal_wan import CLIP_DIM, TinyCausalWanModel, WanConfig

NAME = "diffusion_pytorch_model{suffix}.safetensors"
SUFFIXES = {".pt": "pt", ".pth": "pt", ".safetensors": "safetensors"}
SHARD_SIZE = "10GB"  # of the released 14B folders


def save_transformer(
    model: TinyCausalWanModel, out: str | Path, format: str | None = None, max_shard_size: int | str = SHARD_SIZE
) -> None:
    """Write the model in its own dtype. Raises ValueError where OUT exists or does not go with the format."""
    out = Path(out)
    format = check_out(out, format)
    tensors = {name: x.cpu().contiguous() for name, x in model.state_dict().items()}
    record = {"model": asdict(model.config)}  # read back by load_transformer, ignored by Self-Forcing
    if format == "pt":
        save_checkpoint(out, {"generator": {f"model.{name}": x for name, x in tensors.items()}, "config": record})
    elif format == "safetensors":
        write_tensors(out, tensors, {"config": json.dumps(record)})
    elif format == "diffusers":
        settings = diffusers_settings(model.config)
        write_folder(out, {diffusers_name(name): x for name, x in tensors.items()}, settings, max_shard_size)
    else:
        write_folder(out, tensors, official_settings(model.config), max_shard_size)


def check_out(out: Path, format: str | None = None) -> str:
    """The format asked for or, without one, told by the name of OUT."""
    fits_diffusers = out.name == "transformer" or "diffusers" in out.name.lower()
    inferred = SUFFIXES.get(out.suffix.lower(), "diffusers" if fits_diffusers else "official")
    format = format or inferred
    if format != inferred and not {format, inferred} <= {"official", "diffusers"}:
        raise ValueError(
            f"--format {format} does not go with {out}: name a file *.pt or *.safetensors, a folder neither."
        )
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} exists already: choose another OUT, or remove it first.")
    return format


# --------------------------------------------------------------------------------------------------------- folders


def write_folder(folder: Path, tensors: dict[str, Tensor], settings: dict, max_shard_size: int | str) -> None:
    """Safetensors files of at most `max_shard_size`, an index where there are several, and config.json."""
    plan = split_torch_state_dict_into_shards(tensors, filename_pattern=NAME, max_shard_size=max_shard_size)
    for file, names in tqdm(plan.filename_to_tensors.items(), unit="file", disable=None):
        write_tensors(folder / file, {name: tensors[name] for name in names})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / f"{NAME.format(suffix='')}.index.json", index)
    write_json(folder / "config.json", settings)


def write_tensors(path: Path, tensors: StateDict, metadata: dict[str, str] | None = None) -> None:
    with atomic(path) as temporary:
        save_file(dict(tensors), temporary, {"format": "pt"} | (metadata or {}))


def write_json(path: Path, content: dict) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def official_settings(config: WanConfig) -> dict:
    """Wan's config.json. It leaves out what all of Wan 2.1 share; a model that differs there has to say so."""
    stated = {*REQUIRED, "freq_dim", "text_len", "eps"}
    settings = {name: x for name, x in asdict(config).items() if name in stated or x != getattr(T2V_1_3B, name)}
    return {"_class_name": "WanModel", **settings}


def diffusers_settings(config: WanConfig) -> dict:
    """diffusers' config.json. Raises ValueError for a model that WanTransformer3DModel cannot be."""
    if not config.qk_norm:
        raise ValueError("diffusers' model always has norm_q and norm_k: export qk_norm=False as official or pt.")
    i2v = config.model_type == "i2v"
    settings = {
        "_class_name": "WanTransformer3DModel",
        **{theirs: getattr(config, ours) for ours, theirs in DIFFUSERS_FIELDS.items()},
        "attention_head_dim": config.dim // config.num_heads,
        "qk_norm": "rms_norm_across_heads",
        "image_dim": CLIP_DIM if i2v else None,
        "added_kv_proj_dim": config.dim if i2v else None,
    }
    # Not a word of theirs, who warn and go on; a shrunken model could not be read back without it.
    return settings | ({} if config.text_len == T2V_1_3B.text_len else {"text_len": config.text_len})


# ---------------------------------------------------------------------------------------------------- command line


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m full_scale.convert", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("source", metavar="IN", type=Path, help="a Wan or diffusers folder, or a .pt / .safetensors file")
    add("out", metavar="OUT", type=Path, help="a new folder, or a new file *.pt or *.safetensors")
    add("--format", choices=("official", "diffusers", "pt", "safetensors"), help="by default told by the name of OUT")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="by default as stored")
    add("--config", metavar="NAME", help=f"{', '.join(WAN_CONFIGS)} or a config.json; by default as stored, or by size")
    add("--weights", choices=tuple(NETWORKS), default="ema", help="averaged weights where there are any")
    add("--max_shard_size", default=SHARD_SIZE, help="of a file in a folder, such as 5GB")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    format = check_out(args.out, args.format)
    model = load_transformer(args.source, config=args.config, dtype=args.dtype, weights=args.weights)
    save_transformer(model, args.out, format, args.max_shard_size)
    num_parameters, dtype = sum(p.numel() for p in model.parameters()), model.patch_embedding.weight.dtype
    print(f"{args.out}: {format}, {len(model.state_dict())} keys, {num_parameters:,} parameters in {dtype}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"full_scale.convert: {error}", file=sys.stderr)
        sys.exit(2)
