"""Wan 2.1's released sizes, as configurations of the class that the tiny model is built from.

Loading weights (`load_transformer`) comes with the full-scale chapter.
"""

from dataclasses import replace

from tiny_causal_wan import WanConfig

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
