"""Less work for a transformer that is only used: prompts read once, layers compiled, weights and products in 8 bits.

What is computed stays the same, to rounding; with `quantise`, to that of 8 bits.
"""

from functools import lru_cache

import torch

from tiny_causal_wan import TinyCausalWanModel

PROMPTS_AT_ONCE = 2  # guidance reads two in turns; all layers' keys and values of one take 94 MB (1.3B) or 419 (14B)


def read_prompts_once(model: TinyCausalWanModel) -> TinyCausalWanModel:
    """The model, which from now on keeps its cross-attention's keys and values of a prompt, and of an image.

    A prompt is known by its tensor: pass the same cond to every call. For inference alone, since weights must not
    change any more; and not together with compile_layers, for the compiler looks through what is kept.
    """
    once = lru_cache(PROMPTS_AT_ONCE)  # a tensor's hash is its identity
    model.embed_text = once(model.embed_text)
    if model.config.model_type == "i2v":
        embed_image = model.embed_image
        image = once(lambda features: embed_image({"clip_features": features}))
        model.embed_image = lambda cond: image(cond["clip_features"])
    for layer in model.blocks:
        read_once(layer.cross_attn, once, "k", "norm_k", "v")
        if model.config.model_type == "i2v":
            read_once(layer.cross_attn, once, "k_img", "norm_k_img", "v_img")
    return model


def read_once(attention, once, *names: str) -> None:
    k, norm, v = (getattr(attention, name) for name in names)
    map_keys, normalise = k.forward, norm.forward
    k.forward = once(lambda x: normalise(map_keys(x)))  # together, so that only what is used is kept
    norm.forward = lambda x: x
    v.forward = once(v.forward)


def compile_layers(model: TinyCausalWanModel) -> TinyCausalWanModel:
    """The model with compiled layers: three times, for a block without a past, with one, and with a longer one."""
    for layer in model.blocks:
        layer.forward = torch.compile(layer.forward)
    return model


# -------------------------------------------------------------------------------------------------------- 8 bits

QUANTISED = ("float8", "float8-weights")


def quantise(model: TinyCausalWanModel, way: str, device=None) -> TinyCausalWanModel:
    """The model with the linear maps of its layers in float8, through torchao, a map at a time on `device`.

    "float8" also rounds what comes in and multiplies in float8, with a scale for each tensor, as Self-Forcing's demo
    does. "float8-weights" multiplies in the model's own dtype: half the memory of bfloat16, and no faster.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8WeightOnlyConfig, quantize_

    both = way == "float8"
    quantize_(
        model.blocks, Float8DynamicActivationFloat8WeightConfig() if both else Float8WeightOnlyConfig(), device=device
    )
    return model


def check_quantised(way: str | None, device: torch.device) -> None:
    """Raise ValueError where a device cannot multiply in float8."""
    if way == "float8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise ValueError(
            f"{device} does not multiply in float8, as GPUs since Ada and Hopper do: use --quantise float8-weights."
        )
