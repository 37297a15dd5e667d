"""Graders of lesson 3. `make grade LESSON=3`; each message says which idea is missing."""

from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import tiny_causal_wan as wan
from tiny_causal_wan import WanConfig, WanLayer, exact_attention


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coordinates(channels=2, height=4, width=6):
    """A frame [1, 1, C, H, W] whose entries say where they are: 100 channel + 10 row + column."""
    c, h, w = torch.meshgrid(torch.arange(channels), torch.arange(height), torch.arange(width), indexing="ij")
    return (100 * c + 10 * h + w)[None, None].float()


def test_a_patch_is_a_square_of_one_frame(patchify):
    patches = patchify(coordinates(), 2)
    assert [*patches.shape] == [1, 1, 6, 8], (
        f"A frame of 2 channels, 4 x 6, in patches of 2 x 2 is 6 patches of 8 numbers; yours is {[*patches.shape]}."
    )
    got = sorted(patches[0, 0, 1].tolist())
    assert got == [2, 3, 12, 13, 102, 103, 112, 113], (
        f"The second patch is rows 0 and 1, columns 2 and 3, of both channels; yours holds {got} (100 c + 10 row + "
        "column). A reshape alone does not cut squares: give height and width two axes each, then move them."
    )


def test_patches_run_row_by_row(patchify):
    first = patchify(coordinates(), 2)[0, 0].amin(-1).tolist()
    assert first == [0, 2, 4, 20, 22, 24], (
        f"Patches are counted along a row first, then down: their corners are 0, 2, 4, 20, 22, 24; yours {first}."
    )


def test_it_is_wans_convolution(patchify):
    convolution = nn.Conv3d(3, 5, (1, 2, 2), (1, 2, 2)).requires_grad_(False)
    video = draw(2, 4, 3, 6, 4)
    right = convolution(video.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)  # [b f s e]
    linear = F.linear(patchify(video, 2), convolution.weight.flatten(1), convolution.bias)
    assert torch.allclose(linear, right, atol=1e-5), (
        "With these patches a linear map with the weights of Wan's patch convolution gives another result than the "
        "convolution: inside of a patch the channel is the first factor, then row, then column."
    )


def test_squares_go_back_to_their_places(unpatchify):
    patches = torch.arange(6.0)[None, None, :, None].expand(1, 1, 6, 4)
    video = unpatchify(patches, 4, 6, 2)
    wanted = torch.tensor([[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2).float()
    assert [*video.shape] == [1, 1, 1, 4, 6], f"A video [1, 1, 1, 4, 6] was wanted, yours is {[*video.shape]}."
    assert torch.equal(video[0, 0, 0], wanted), (
        "Patch k should fill the k-th square of 2 x 2 pixels, row by row. Yours scatters it over the frame, and a "
        "network can even learn to live with that, but its patches no longer are patches."
    )


def test_the_channel_is_the_last_factor(unpatchify):
    video = coordinates()
    rows = video.reshape(1, 1, 2, 2, 2, 3, 2)  # b f c h ph w pw
    patches = rows.permute(0, 1, 3, 5, 4, 6, 2).reshape(1, 1, 6, 8)
    assert torch.equal(unpatchify(patches, 4, 6, 2), video), (
        "In what Wan's head predicts the channel is the last factor of a patch, after row and column; in the patch "
        "embedding it is the first. With one channel nobody notices."
    )


def test_frames_and_samples_stay_apart(unpatchify):
    patches = torch.arange(6.0).reshape(2, 3, 1, 1).expand(2, 3, 6, 4)
    got = unpatchify(patches, 4, 6, 2).mean((2, 3, 4))
    assert torch.equal(got, torch.arange(6.0).reshape(2, 3)), "Each frame of each sample comes from its own patches."


def test_zero_time_is_ones_and_zeros(sinusoid):
    got = sinusoid(torch.zeros(2, 3), 8)
    assert [*got.shape] == [2, 3, 8], f"For times [2, 3] the features are [2, 3, 8]; yours {[*got.shape]}."
    assert torch.equal(got.float(), torch.tensor([1.0] * 4 + [0.0] * 4).expand(2, 3, 8)), (
        "At t = 0 all cosines are 1 and all sines 0, cosines first. A network that was trained with the other order "
        "sees its features exchanged."
    )


def test_the_first_wave_counts_to_a_thousand(sinusoid):
    got = sinusoid(torch.tensor([0.001, 0.5]), 256).double()
    wanted = torch.tensor([1.0, 500.0], dtype=torch.float64)
    assert torch.allclose(got[:, 0], wanted.cos(), atol=1e-4) and torch.allclose(
        got[:, 128], wanted.sin(), atol=1e-4
    ), "The first angle is 1000 t: the model speaks t in [0, 1], the sinusoid wants 0 to 1000."


def test_wave_lengths_form_a_ladder(sinusoid):
    t = torch.tensor([0.01], dtype=torch.float64)  # 10 on Wan's scale
    angles = torch.atan2(*sinusoid(t, 8).double()[0].reshape(2, 4).flip(0))
    wanted = 10 * 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    assert torch.allclose(angles[1:], wanted[1:], atol=1e-9), (
        f"Angle i is 1000 t / 10000^(i / (dim / 2)), so here 1, 0.1, 0.01 after the first; yours "
        f"{angles[1:].tolist()}. Divide by half of dim, not by half minus one."
    )


def test_large_angles_are_exact(sinusoid):
    t = torch.tensor([0.987654321])  # in float32, as it comes to the model
    got, wanted = sinusoid(t, 4), (1000 * t.double()).cos()
    assert got.dtype == torch.float64 and (got[0, 0] - wanted).abs().item() < 1e-9, (
        "An angle of a thousand radians loses four digits in float32: compute it in float64, as Wan does."
    )


def unit(angles):
    return torch.polar(torch.ones_like(angles), angles)


def test_a_quarter_turn(rotate):
    x = torch.tensor([1.0, 0.0, 0.0, 2.0]).reshape(1, 1, 1, 4)
    got = rotate(x, unit(torch.full((1, 2), torch.pi / 2))).flatten().float()
    assert torch.allclose(got, torch.tensor([0.0, 1.0, -2.0, 0.0]), atol=1e-6), (
        f"A quarter turn makes of the pairs (1, 0), (0, 2) the pairs (0, 1), (-2, 0); yours {got.tolist()}. A pair is "
        "two adjacent channels (GPT-NeoX pairs channel i with i + d / 2: with Wan's weights that is another network)."
    )


def test_every_token_has_its_own_angle(rotate):
    x, angles = draw(2, 5, 3, 8), draw(5, 4, seed=1)
    got = rotate(x, unit(angles)).float()
    pairs, turned = x.reshape(2, 5, 3, 4, 2), got.reshape(2, 5, 3, 4, 2)
    cos, sin = (f(angles)[:, None] for f in (torch.cos, torch.sin))
    wanted = torch.stack([pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 0] * sin + pairs[..., 1] * cos], -1)
    assert torch.allclose(turned, wanted, atol=1e-5), (
        "rotations [l, d / 2] has a row for each token; samples and heads share it. (Row l must meet axis 1 of x.)"
    )


def test_lengths_stay(rotate):
    x = draw(1, 6, 2, 8)
    got = rotate(x, unit(draw(6, 4, seed=1))).float()
    assert torch.allclose(got.norm(dim=-1), x.norm(dim=-1), atol=1e-5), "A rotation changes no length."
    assert rotate(x.bfloat16(), unit(draw(6, 4))).dtype == torch.bfloat16, "The result has the dtype of x."


def table(rope_table, head_dim=24, start=0, frames=3, height=2, width=3):
    return rope_table(head_dim, start, frames, height, width, torch.device("cpu"))


def test_the_pairs_are_shared_out(rope_table):
    got = table(rope_table, head_dim=128, frames=2, height=3, width=2)
    assert [*got.shape] == [12, 64] and got.dtype == torch.complex64, (
        f"Wan: complex64 [12 tokens, 64 pairs]; yours {got.dtype} {[*got.shape]}."
    )
    grid = got.reshape(2, 3, 2, 64)
    moves = {
        "time": (grid[0, 0, 0] != grid[1, 0, 0]).nonzero()[:, 0],
        "height": (grid[0, 0, 0] != grid[0, 1, 0]).nonzero()[:, 0],
        "width": (grid[0, 0, 0] != grid[0, 0, 1]).nonzero()[:, 0],
    }
    spans = {axis: (pairs.min().item(), pairs.max().item()) for axis, pairs in moves.items() if len(pairs)}
    assert spans == {"time": (0, 21), "height": (22, 42), "width": (43, 63)}, (
        f"Of Wan's 64 pairs the first 22 turn with time, then 21 with height, 21 with width; yours: {spans}. Tokens "
        "run frame by frame, row by row, column by column."
    )


def test_each_axis_has_its_own_ladder(rope_table):
    got = table(rope_table, head_dim=24).angle().float().reshape(3, 2, 3, 12)
    ladder = 10000.0 ** -(torch.arange(4) / 4)
    for axis, angles in {"time": got[1, 0, 0, :4], "rows": got[0, 1, 0, 4:8], "columns": got[0, 0, 1, 8:]}.items():
        assert torch.allclose(angles, ladder, atol=1e-6), (
            f"One step along {axis} turns its pairs by 1, 0.1, 0.01, 0.001 (10000^(-i / 4)); yours {angles.tolist()}. "
            "Each axis begins its ladder anew."
        )


def test_frames_count_from_the_start(rope_table):
    late, early = table(rope_table, start=5), table(rope_table, frames=8)
    assert torch.allclose(late, early[-len(late) :], atol=1e-5), (
        "Three frames from `start` 5 on stand where frames 5 to 7 of a longer clip stand. Rows and columns do not move."
    )


def test_only_distances_count(rope_table):
    near, far = (table(rope_table, head_dim=32, start=start, frames=4) for start in (0, 100_000))
    q, k = draw(24, 32), draw(24, 32, seed=1)

    def products(rotations):
        q_turned, k_turned = (torch.view_as_complex(x.reshape(24, 16, 2)) * rotations for x in (q, k))
        return (q_turned @ k_turned.conj().T).real

    assert torch.allclose(products(near), products(far), atol=2e-3), (
        "The inner products of rotated queries and keys change when all frames move by 100,000. Angles must be linear "
        "in the position, and computed in float64."
    )
    assert not torch.allclose(near, far, atol=0.1), "At other frames the rotations themselves are others."


def modulations(value=None):
    """shift, scale and gate [2, 3, 8]: random, or one number each."""
    if value:
        return [torch.full((2, 3, 8), number) for number in value]
    return [draw(2, 3, 8, seed=seed) for seed in (1, 2, 3)]


def test_a_closed_gate_lets_nothing_through(modulated):
    x = draw(2, 3, 4, 8)
    got = modulated(x, lambda y: y + 5, *modulations((0.3, 0.2, 0.0)))
    assert torch.equal(got, x), "With a gate of 0 a layer adds nothing: the result is x, unchanged and unnormed."


def test_a_scale_of_zero_is_no_scaling(modulated):
    x = 3 + 2 * draw(2, 3, 4, 8)
    got = modulated(x, lambda y: y, *modulations((0.0, 0.0, 1.0))) - x
    assert torch.allclose(got, F.layer_norm(x, (8,), eps=1e-6), atol=1e-5), (
        "Shift 0, scale 0, gate 1: the sublayer gets the normed x, neither more nor less. It is (1 + scale): what the "
        "network predicts is a deviation from doing nothing. (And a layer norm's variance divides by e, not by e - 1.)"
    )


def test_every_frame_has_its_own_vectors(modulated):
    x, (shift, scale, gate) = draw(2, 3, 4, 8), modulations()
    got = modulated(x, lambda y: y.tanh(), shift, scale, gate)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    for b, f, s in [(0, 0, 0), (1, 2, 3), (0, 1, 2)]:
        inside = (normed[b, f, s] * (1 + scale[b, f]) + shift[b, f]).tanh()
        assert torch.allclose(got[b, f, s], x[b, f, s] + inside * gate[b, f], atol=1e-5), (
            "x + sublayer(norm(x) (1 + scale) + shift) gate, with the vectors of the token's own frame: all tokens of "
            "a frame share them, no two frames do."
        )


CONFIGS = [
    WanConfig(),
    WanConfig(dim=64, ffn_dim=100, num_heads=4, num_layers=3, in_dim=5, out_dim=3, patch_size=(1, 2, 3), text_dim=7),
    WanConfig(dim=32, ffn_dim=48, num_layers=2, freq_dim=16, qk_norm=False),
    WanConfig(dim=32, ffn_dim=48, num_layers=2, cross_attn_norm=False, text_len=3),
]


def counted(num_parameters, config):
    """The student's number, while no model can be built."""
    refuse = AssertionError("Count by arithmetic: this builds a model, which at 14B is what one wants to avoid.")
    with mock.patch.object(wan.TinyCausalWanModel, "__init__", side_effect=refuse):
        return num_parameters(config)


def built(config):
    return sum(parameter.numel() for parameter in wan.TinyCausalWanModel(config).parameters())


def test_it_counts_a_model_of_any_size(num_parameters):
    for config in CONFIGS:
        got, right = counted(num_parameters, config), built(config)
        assert got == right, (
            f"{config} has {right:,} parameters, yours says {got:,}, {got - right:+,.0f}. Look at "
            "model.named_parameters() of a small one: which part is off?"
        )


def test_it_counts_wan(num_parameters):
    shape = {"in_dim": 16, "out_dim": 16, "patch_size": (1, 2, 2), "text_dim": 4096, "text_len": 512}
    small = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, **shape)
    large = replace(small, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
    got = [counted(num_parameters, config) for config in (small, large)]
    assert got == [1_418_996_800, 14_288_491_584], (
        f"Wan 2.1 1.3B has 1,418,996,800 parameters and 14B 14,288,491,584; yours say {got}."
    )


def test_it_counts_the_image_branch(num_parameters):
    config = WanConfig(model_type="i2v", in_dim=25, dim=32, ffn_dim=64, num_layers=2)
    got, right = counted(num_parameters, config), built(config)
    assert got == right, (
        f"An image-to-video model has {right - got:+,.0f} parameters more than yours: a second key, value and norm in "
        "each cross-attention, and an embedding of CLIP's 1280 numbers (two norms, two linear maps)."
    )


LAYER = WanConfig(dim=24, ffn_dim=40, num_heads=2)


def layer_and_call(seed=0, frames=3, tokens=4):
    """A random layer's weights, what it is called with, and what it returns."""
    torch.manual_seed(seed)
    layer = WanLayer(LAYER).requires_grad_(False)
    for name, parameter in layer.named_parameters():
        noise = torch.randn_like(parameter)
        parameter.copy_(1 + noise / 5 if "norm" in name and name.endswith("weight") else noise / 5)
    rotations = unit(draw(frames * tokens, 6, seed=seed))
    given = (draw(2, frames, tokens, 24), draw(2, frames, 6, 24, seed=1), draw(2, 5, 24, seed=2))
    x, modulation, text = given
    return layer.state_dict(), (*given, rotations), layer(x, modulation, text, None, rotations, exact_attention)[0]


def without(weights, *parts):
    """The weights, with all of the named parts' last maps set to zero, so that they add nothing."""
    return {name: x * 0 if name.startswith(parts) else x for name, x in weights.items()}


PARTS = {
    "self-attention": (
        ("cross_attn.o", "ffn.2"),
        "q and k are normed (RMS over all heads together, times weight), split into heads, rotated; v is neither "
        "normed nor rotated; then softmax attention over all tokens of all frames, `o`, and the gate.",
    ),
    "cross-attention": (
        ("self_attn.o", "ffn.2"),
        "It reads norm3(x), a layer norm with weight and bias, has no rotation, no modulation and no gate, and "
        "attends to every text token.",
    ),
    "feed-forward": (
        ("self_attn.o", "cross_attn.o"),
        "It is linear, GELU in its tanh form, linear, with the last three of the six vectors.",
    ),
}


def test_each_part_is_right(wan_layer):
    for name, (others, hint) in PARTS.items():
        weights, given, _ = layer_and_call()
        alone = without(weights, *others)
        layer = WanLayer(LAYER)
        layer.load_state_dict(alone)
        x, modulation, text, rotations = given
        right = layer(x, modulation, text, None, rotations, exact_attention)[0]
        error = (wan_layer(alone, *given, LAYER.num_heads) - right).abs().max().item()
        assert error < 1e-4, f"With the {name} alone switched on, the result is off by {error:.2g}. {hint}"


def test_the_parts_follow_each_other(wan_layer):
    weights, given, right = layer_and_call(seed=4)
    error = (wan_layer(weights, *given, LAYER.num_heads) - right).abs().max().item()
    assert error < 1e-4, (
        f"Each part may be right, all together they are off by {error:.2g}: self-attention, cross-attention, "
        "feed-forward come one after the other, each reading what the one before has added."
    )


def test_the_layers_own_modulation_is_added(wan_layer):
    weights, (x, modulation, text, rotations), _ = layer_and_call()
    still = {**weights, "modulation": -modulation[:1, 0]}
    still = without(still, "cross_attn.o")
    got = wan_layer(still, x, modulation[:1, :1].expand_as(modulation), text, rotations, LAYER.num_heads)
    assert torch.allclose(got.float(), x, atol=1e-5), (
        "The six vectors are the time's plus the layer's own parameter `modulation`. Here their sum is zero, so that "
        "both gates are closed, and with the cross-attention off the layer should hand x on as it is."
    )
