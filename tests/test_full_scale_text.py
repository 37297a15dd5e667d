"""UMT5 in the files it comes in, read and asked as Wan asks it; prompts that are remembered on disk."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from small_wan import T5_FILE, write_text_encoder, write_tokenizer

from full_scale import text
from full_scale.parallelize import FullySharded
from full_scale.pretrained import DOWNLOADS, fingerprint
from full_scale.text import NEGATIVE_PROMPT, NEGATIVE_PROMPT_I2V, TextEncoder, clean, load_tokenizer
from full_scale.wan import WAN_CONFIGS
from tiny_causal_wan import TinyCausalWanModel

REPOSITORY = Path(__file__).resolve().parents[1]
DIM = 24
PROMPTS = ["a cat walks on the grass", "the camera pans slowly  over a &amp; city ", "画面，色调"]
FLOAT = {"dtype": "float32"}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A diffusers pipeline's folder with its text encoder."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_text_encoder(folder, dim=DIM)
    return folder


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Wan's own folder with the same text encoder."""
    folder = tmp_path_factory.mktemp("Wan2.1-T2V-1.3B")
    write_text_encoder(folder, official=True, dim=DIM)
    (folder / "config.json").write_text('{"_class_name": "WanModel"}')  # the transformer's, not UMT5's
    return folder


@pytest.fixture(scope="module")
def expected(pipeline):
    """The prompts as diffusers' pipeline encodes them."""
    from diffusers import WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    theirs = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(pipeline / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(pipeline / "text_encoder"),
        vae=None,
        scheduler=None,
        transformer=None,
    )
    with torch.no_grad():
        return theirs._get_t5_prompt_embeds(PROMPTS, max_sequence_length=512, device=torch.device("cpu"))


def own_tokens(embeds):
    """How many tokens of each prompt are not zero."""
    return (embeds.abs().sum(-1) > 0).sum(1).tolist()


# ------------------------------------------------------------------------------------------------- same numbers


def test_embeddings_are_those_of_the_diffusers_pipeline(pipeline, expected):
    """[B, 512, d], equal although a prompt is encoded alone and unpadded here, in a padded batch there."""
    embeds = TextEncoder(pipeline, **FLOAT)(PROMPTS)["prompt_embeds"]
    assert embeds.shape == (3, 512, DIM) and not embeds.requires_grad
    torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=1e-5)
    assert embeds.std() > 0.01 and 3 < min(own_tokens(embeds)) < max(own_tokens(embeds)) < 60


@pytest.mark.parametrize("place", ["folder", "file", "safetensors"])
def test_wans_own_file_holds_the_same_encoder(official, expected, place, tmp_path):
    """Wan's folder, the .pth in it and a safetensors copy of it give the numbers of the diffusers pipeline."""
    path, options = official / T5_FILE, {}
    if place == "folder":
        path = official
    if place == "safetensors":
        from safetensors.torch import save_file

        tensors = torch.load(path, weights_only=True)
        path, options = tmp_path / "umt5.safetensors", {"tokenizer": official / "google" / "umt5-xxl"}
        save_file({name: x.clone() for name, x in tensors.items()}, path)
    embeds = TextEncoder(path, **FLOAT, **options)(PROMPTS)["prompt_embeds"]
    torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=1e-5)


def wan_t5(tensors, ids, num_heads=4):
    """UMT5's encoder written down from its description, on tensors in Wan's names and one prompt without padding."""

    def norm(x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * tensors[f"{name}.weight"]

    def linear(x, name):
        return x @ tensors[f"{name}.weight"].T

    distance = torch.arange(len(ids))[None] - torch.arange(len(ids))[:, None]  # key - query
    size = distance.abs()
    far = 8 + (torch.log(size.clamp(min=1) / 8) / math.log(128 / 8) * 8).long()
    bucket = 16 * (distance > 0) + torch.where(size < 8, size, far.clamp(max=15))
    x = tensors["token_embedding.weight"][ids]
    for i in range(2):
        name = f"blocks.{i}"
        h = norm(x, f"{name}.norm1")
        q, k, v = (linear(h, f"{name}.attn.{part}").unflatten(-1, (num_heads, -1)) for part in "qkv")
        logits = torch.einsum("qnd,knd->nqk", q, k)  # not divided by anything
        logits = logits + tensors[f"{name}.pos_embedding.embedding.weight"][bucket].permute(2, 0, 1)
        x = x + linear(torch.einsum("nqk,knd->qnd", logits.softmax(-1), v).flatten(1), f"{name}.attn.o")
        h = norm(x, f"{name}.norm2")
        gate = F.gelu(linear(h, f"{name}.ffn.gate.0"), approximate="tanh")
        x = x + linear(gate * linear(h, f"{name}.ffn.fc1"), f"{name}.ffn.fc2")
    return norm(x, "norm")


def test_every_weight_of_wans_file_is_where_wan_uses_it(official):
    """Against UMT5 as Wan computes it: a gate taken for its other half, or a bias shared by layers, would show."""
    encoder = TextEncoder(official, **FLOAT)
    prompt = " ".join(PROMPTS[:1] * 3)
    ids = torch.tensor(encoder.tokenize(prompt))
    assert len(ids) > 40  # positions in several buckets
    tensors = torch.load(official / T5_FILE, weights_only=True)
    torch.testing.assert_close(encoder.encode(prompt), wan_t5(tensors, ids), atol=1e-4, rtol=1e-4)


def test_the_released_encoder_has_242_tensors():
    """Names and count of Wan's file, from transformers' model of the published sizes, without memory for it."""
    from small_wan import T5_NAMES, in_wan_names
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**sizes))
    wan = in_wan_names(model.state_dict(), T5_NAMES)
    wan.pop("encoder.embed_tokens.weight")
    assert len(wan) == 242 and sum(x.numel() for x in wan.values()) == 5_680_910_336
    ours = text.in_transformers_names(wan)
    assert ours.keys() == model.state_dict().keys() - {"encoder.embed_tokens.weight"}
    assert text.umt5_sizes(ours) == sizes | {"relative_attention_num_buckets": 32}


def test_weights_stay_mapped_and_frozen(official, monkeypatch):
    """bfloat16 by default; in the stored dtype the parameters are what was read, mapped, and not a copy."""
    seen = {}
    read = text.read_file
    monkeypatch.setattr(text, "read_file", lambda path: seen.update(read(path)[0]) or (seen, {}))
    model = text.load_umt5(official / T5_FILE, torch.float32)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.data_ptr() for p in model.parameters()} == {x.data_ptr() for x in seen.values()}
    embeds = TextEncoder(official)(PROMPTS)["prompt_embeds"]
    assert embeds.dtype == torch.bfloat16 and embeds.isfinite().all()


# ------------------------------------------------------------------------------------------------- tokens, text


@pytest.mark.parametrize("fast", [True, False])
def test_tokens_are_sentencepieces(tmp_path, fast):
    """tokenizer.json and a lone spiece.model say what SentencePiece and transformers say, end of sequence last."""
    import sentencepiece
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, fast=fast)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    tokenize = load_tokenizer(tmp_path / ("tokenizer.json" if fast else "spiece.model"))
    for prompt in [*map(clean, PROMPTS), clean(NEGATIVE_PROMPT[:17]), ""]:
        assert tokenize(prompt) == [*pieces.encode(prompt), 1] == theirs(prompt).input_ids


def test_the_stored_tokenizer_is_not_rebuilt(tmp_path):
    """A tokenizer.json that falls back to bytes keeps doing so; its stored padding and truncation are not ours."""
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    stored = json.loads(file.read_text())
    stored["model"]["byte_fallback"] = True
    stored["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(stored))
    ids = load_tokenizer(file)("a cat \N{PANDA FACE}")
    assert ids == load_tokenizer(tmp_path / "spiece.model")("a cat \N{PANDA FACE}") and 2 not in ids and len(ids) > 4


def test_long_prompts_are_cut_before_their_end_token(pipeline):
    """text_len tokens, the last of them the end of sequence, as diffusers' truncation."""
    encoder = TextEncoder(pipeline, **FLOAT, text_len=8)
    embeds = encoder(["a cat walks on the grass " * 9, "a"])["prompt_embeds"]
    assert embeds.shape == (2, 8, DIM) and own_tokens(embeds)[0] == 8
    ids = encoder.tokenize("a cat walks on the grass " * 9)
    with torch.no_grad():
        expected = encoder.model(torch.tensor([ids[:7] + [1]])).last_hidden_state[0]
    torch.testing.assert_close(embeds[0], expected)


def test_prompts_are_cleaned_as_by_wan():
    """Entities twice escaped, broken Unicode, full-width signs, every kind of space: equal to diffusers' cleaning."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    messy = [
        "  a\tcat \n\u3000 walks ",
        "<i> &amp;lt;b&amp;gt;",
        "l\u00e2\u20ac\u2122oeil",
        "过曝，静态",
        "",
        NEGATIVE_PROMPT,
    ]
    for prompt in messy:
        assert clean(prompt) == prompt_clean(prompt)
    assert clean(messy[0]) == "a cat walks" and clean(messy[1]) == "<i> <b>" and "," in clean(messy[3])


def test_the_null_prompt_is_the_negative_prompt(pipeline, monkeypatch):
    """Wan's own by default, another on request; encoded once, however often it is asked for."""
    encoder = TextEncoder(pipeline, **FLOAT)
    expected = encoder([NEGATIVE_PROMPT])["prompt_embeds"]
    assert torch.equal(encoder.null(3)["prompt_embeds"], expected.expand(3, -1, -1))
    monkeypatch.setattr(encoder, "encode", None)
    assert encoder.null(2)["prompt_embeds"].shape == (2, 512, DIM)
    other = TextEncoder(pipeline, **FLOAT, negative_prompt="a cat")
    assert torch.equal(other.null(1)["prompt_embeds"], other(["a cat"])["prompt_embeds"])
    assert NEGATIVE_PROMPT_I2V.endswith(NEGATIVE_PROMPT) and NEGATIVE_PROMPT.count("，") == 27


def test_embeddings_fit_the_transformer(tmp_path):
    """What the encoder says goes into a Wan transformer, and its padding counts for nothing."""
    from dataclasses import replace

    write_text_encoder(tmp_path)
    cond = TextEncoder(tmp_path, **FLOAT)(["a cat"])
    config = replace(WAN_CONFIGS["t2v-1.3b"], dim=24, ffn_dim=48, num_heads=2, num_layers=1)
    model = TinyCausalWanModel(config)
    flow = model(torch.ones(1, 1, 16, 4, 4), torch.tensor([0.5]), cond)
    assert cond["prompt_embeds"].shape == (1, 512, 4096) and flow.isfinite().all()


# ------------------------------------------------------------------------------------------------ the cache


def test_a_remembered_prompt_needs_no_network(pipeline, tmp_path, monkeypatch):
    """The second encoder reads what the first one wrote, the same numbers, and never loads its own network."""
    first = TextEncoder(pipeline, **FLOAT, cache=tmp_path)(PROMPTS)["prompt_embeds"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3 and all(path.suffix == ".safetensors" for path in files)
    monkeypatch.setattr(text, "load_umt5", None)
    again = TextEncoder(pipeline, **FLOAT, cache=tmp_path)
    assert torch.equal(again(PROMPTS)["prompt_embeds"], first)
    assert torch.equal(again([f" {PROMPTS[0]}\n"])["prompt_embeds"], first[:1])  # the same prompt once it is clean
    with pytest.raises(TypeError):
        again(["another prompt"])


def encoded(rank, path):
    """One prompt of two by a network that is shared out, and what its parameters are."""
    encoder = TextEncoder(path, dtype=torch.float32, sharded=True)
    encoder.place = partial(FullySharded("cpu", precision="fp32").place, trained=False)
    return encoder(PROMPTS[rank : rank + 1])["prompt_embeds"], {type(p).__name__ for p in encoder.model.parameters()}


def test_the_network_can_be_shared_out(official, tmp_path):
    """Two processes with half of it each say of their own prompts what one says of both."""
    expected = TextEncoder(official, dtype=torch.float32)(PROMPTS[:2])["prompt_embeds"]
    both = on_ranks(2, encoded, official, folder=tmp_path / "ranks")
    assert [kinds for _, kinds in both] == [{"DTensor"}] * 2
    torch.testing.assert_close(torch.cat([embeds for embeds, _ in both]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("damage", [lambda x: b"", lambda x: x[:-9], lambda x: b"\xff" * 99])
def test_a_damaged_file_is_computed_again(pipeline, tmp_path, damage):
    """Empty, cut off or overwritten: the embeddings are right, and so is the file afterwards."""
    encoder = TextEncoder(pipeline, **FLOAT, cache=tmp_path)
    expected = encoder(PROMPTS[:1])["prompt_embeds"]
    (file,) = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert torch.equal(encoder(PROMPTS[:1])["prompt_embeds"], expected)
    assert file.read_bytes() == whole and not list(tmp_path.rglob(".*"))


def test_another_encoder_does_not_believe_the_cache(pipeline, official, tmp_path):
    """Other weights, dtype, length or tokenizer: another entry; the same in another place: the same entry."""
    write_text_encoder(tmp_path / "other", dim=DIM, seed=1)
    write_text_encoder(tmp_path / "same", dim=DIM)
    encoder = TextEncoder(pipeline, **FLOAT)
    assert TextEncoder(tmp_path / "same", **FLOAT).identity == encoder.identity
    others = [
        TextEncoder(tmp_path / "other", **FLOAT),
        TextEncoder(pipeline),
        TextEncoder(pipeline, **FLOAT, text_len=8),
        TextEncoder(official, **FLOAT),
    ]
    tokenizer = tmp_path / "same" / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    others.append(TextEncoder(tmp_path / "same", **FLOAT))
    assert len({encoder.identity, *(other.identity for other in others)}) == 6


def test_a_fingerprint_reads_little_and_sees_much(tmp_path):
    """Not the whole file, but its size and every part of it; the whole where it is small."""
    file = tmp_path / "weights.pth"
    file.write_bytes(bytes(1000))
    small = fingerprint(file, num_samples=4, sample_size=10)
    for place in (0, 250, 755, 999):
        content = bytearray(1000)
        content[place] = 1
        file.write_bytes(content)
        assert (fingerprint(file, num_samples=4, sample_size=10) == small) == (place == 999)
        assert fingerprint(file) != small
    file.write_bytes(bytes(1200))  # samples of as many zeros
    assert fingerprint(file, num_samples=4, sample_size=10) != small


def test_the_network_can_be_given_back(pipeline):
    """It is loaded when first needed, moved with `to`, and loaded again after `free`."""
    encoder = TextEncoder(pipeline, **FLOAT)
    assert "model" not in vars(encoder)
    expected = encoder(PROMPTS)["prompt_embeds"]
    assert encoder.to("cpu") is encoder and "model" in vars(encoder)
    encoder.free()
    encoder.free()
    assert "model" not in vars(encoder)
    assert torch.equal(encoder(PROMPTS)["prompt_embeds"], expected)


# --------------------------------------------------------------------------------------------------- mistakes


def test_mistakes_name_the_fix(official, pipeline, tmp_path):
    """A folder without UMT5 or tokenizer, a file that is something else, a file that lacks a weight."""
    with pytest.raises(ValueError, match="hf download Wan-AI/Wan2.1-T2V-1.3B --include 'models_t5"):
        TextEncoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "WanModel"}')
    with pytest.raises(ValueError, match=f"neither text_encoder/ nor {T5_FILE}"):
        TextEncoder(tmp_path)
    tensors = torch.load(official / T5_FILE, weights_only=True)
    torch.save(tensors, tmp_path / T5_FILE)
    with pytest.raises(ValueError, match="no tokenizer.json or spiece.model for .*hf download"):
        TextEncoder(tmp_path)
    del tensors["blocks.1.norm2.weight"]
    torch.save(tensors, tmp_path / T5_FILE)
    with pytest.raises(ValueError, match=r"lacks encoder.block.1.layer.1.layer_norm.weight: download it again"):
        TextEncoder(tmp_path, tokenizer=pipeline / "tokenizer")(PROMPTS)
    torch.save({"encoder.conv1.weight": torch.ones(1)}, tmp_path / T5_FILE)
    with pytest.raises(ValueError, match="no UMT5 encoder, it has encoder.conv1.weight"):
        TextEncoder(tmp_path, tokenizer=pipeline / "tokenizer")(PROMPTS)


def test_no_code_in_a_file_is_run(tmp_path, pipeline):
    """A pickle that would write a file is refused."""

    class Malice:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    torch.save({"token_embedding.weight": Malice()}, tmp_path / T5_FILE)
    with pytest.raises(ValueError, match="cannot be read"):
        TextEncoder(tmp_path, tokenizer=pipeline / "tokenizer")(PROMPTS)
    assert not (tmp_path / "run").exists()


def test_sizes_of_downloads_are_those_of_their_parameters():
    """GB are parameters times bytes: float32, but for UMT5 (bfloat16) and TAEHV (float16)."""
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in TinyCausalWanModel(c).parameters()) for name, c in WAN_CONFIGS.items()}
    umt5, vae, tiny, clip = 2 * 5_680_910_336, 4 * 126_892_531, 2 * 11_315_539, 4 * 1_193_014_785
    sizes = {name: 4 * count + umt5 + vae for name, count in counts.items()}
    sizes["i2v-14b"] += clip
    sizes |= {"text encoder": umt5, "VAE": vae, "image encoder": clip, "tiny decoder": tiny}
    sizes |= dict.fromkeys(["self-forcing", "ode init"], 4 * counts["t2v-1.3b"])
    for name, size in sizes.items():
        assert DOWNLOADS[name].gigabytes == pytest.approx(size / 1e9, abs=0.06), name


def test_importing_the_weights_loads_no_library():
    """full_scale.wan and the three adapters are imported without transformers and diffusers."""
    code = "import sys, full_scale.wan, full_scale.text, full_scale.pixels, full_scale.images; "
    code += "sys.exit(any(name in sys.modules for name in ('transformers', 'diffusers', 'torchvision')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
