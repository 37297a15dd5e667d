"""Wan's weights in every file they come in: read into the tiny model's class, and written again for others to read."""

import json
import math
import os
import runpy
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoint import load_weights
from full_scale import convert
from full_scale.wan import WAN_CONFIGS, WanConfig, diffusers_name, load_transformer
from randomness import generator, randn
from tiny_causal_wan import TinyCausalWanModel, sinusoid

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = {
    "dim": 24,
    "ffn_dim": 48,
    "num_heads": 2,
    "num_layers": 2,
}  # 2 layers of Wan's own patches, prompts and channels
CONFIGS = {"t2v": replace(WAN_CONFIGS["t2v-1.3b"], **SMALL), "i2v": replace(WAN_CONFIGS["i2v-14b"], **SMALL)}
RELEASED = {  # keys and parameters
    "t2v-1.3b": (825, 1_418_996_800),
    "t2v-14b": (1095, 14_288_491_584),
    "i2v-14b": (1303, 16_394_878_784),
}


def build(config, seed=0):
    """A model whose every parameter is random, small enough for flows of order 1."""
    model = TinyCausalWanModel(config).requires_grad_(False)
    for i, (name, parameter) in enumerate(model.named_parameters()):
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        parameter.copy_(randn(parameter.shape, generator(seed, i)) / fan_in**0.5 + name.endswith("norm_q.weight"))
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return build(CONFIGS[request.param])


@pytest.fixture(scope="module")
def t2v():
    return build(CONFIGS["t2v"])


def call(config):
    """A clip, a time for each sample, and what it is conditioned on."""
    cond = {"prompt_embeds": randn((2, 5, config.text_dim), generator(0, "prompt"))}
    if config.model_type == "i2v":
        cond["clip_features"] = randn((2, 257, 1280), generator(0, "clip"))
        cond["image_latents"] = randn((2, 3, 20, 4, 6), generator(0, "image"))
    return randn((2, 3, 16, 4, 6), generator(0, "video")), torch.tensor([0.9375, 0.125]), cond


def assert_same(loaded, model):
    """The same config, names and numbers, bit for bit, in parameters that can be trained."""
    assert loaded.config == model.config
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())


# -------------------------------------------------------------------------------------------- files as others write


def official_config(config):
    """config.json as Wan publishes it: patch size, prompt width and norms are not in it."""
    names = (
        "model_type",
        "dim",
        "eps",
        "ffn_dim",
        "freq_dim",
        "in_dim",
        "num_heads",
        "num_layers",
        "out_dim",
        "text_len",
    )
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        **{name: getattr(config, name) for name in names},
    }


def write_official(folder, model, num_shards=1, dtype=torch.float32):
    """Wan's folder: config.json, and one file or several with an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(official_config(model.config)))
    tensors = {name: x.to(dtype) for name, x in model.state_dict().items()}
    if num_shards == 1:
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
        return folder
    files = [f"diffusion_pytorch_model-{i + 1:05d}-of-{num_shards:05d}.safetensors" for i in range(num_shards)]
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in list(tensors)[i::num_shards]}, folder / file)
    weight_map = {name: files[i % num_shards] for i, name in enumerate(tensors)}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_file(path, content):
    """A nested mapping as .pt; in .safetensors, which is flat, the outer names become prefixes."""
    if path.suffix == ".pt":
        torch.save(content, path)
        return path
    flat = {}
    for key, value in content.items():
        flat |= {f"{key}.{name}": x.clone() for name, x in value.items()} if isinstance(value, dict) else {key: value}
    save_file(flat, path)
    return path


def in_diffusers(config):
    """diffusers' own model of these sizes, with random weights."""
    from diffusers import WanTransformer3DModel

    i2v = config.model_type == "i2v"
    theirs = WanTransformer3DModel(
        in_channels=config.in_dim,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.dim // config.num_heads,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        image_dim=1280 if i2v else None,
        added_kv_proj_dim=config.dim if i2v else None,
    )
    for i, parameter in enumerate(theirs.requires_grad_(False).parameters()):
        parameter += randn(parameter.shape, generator(3, i)) / 5
    return theirs


class Float64Sinusoid(nn.Module):
    """Wan's sinusoid for diffusers' model, which computes its own in float32: that alone is worth 3e-5."""

    def forward(self, timestep):
        return sinusoid(timestep.double() / 1000, 256).float()


def assert_same_flow(model, theirs):
    """Our model and diffusers' predict the same flow, of order 1, to 1e-5."""
    x_t, t, cond = call(model.config)
    flow = flow_of_diffusers(theirs, x_t, t, cond)
    assert 0.1 < flow.std() < 10
    with torch.no_grad():
        torch.testing.assert_close(model(x_t, t, cond), flow, atol=1e-5 * flow.std().item(), rtol=0)


@torch.no_grad()
def flow_of_diffusers(theirs, x_t, t, cond):
    """What diffusers' model predicts of the same inputs, in its own dtype; frames first."""
    theirs.condition_embedder.timesteps_proj = Float64Sinusoid()
    x_in = torch.cat([x_t, cond["image_latents"]], dim=2) if "image_latents" in cond else x_t
    prompt, clip = nn.functional.pad(cond["prompt_embeds"], (0, 0, 0, 512 - 5)), cond.get("clip_features")
    dtype = theirs.patch_embedding.weight.dtype
    x_in, prompt, clip = (x if x is None else x.to(dtype) for x in (x_in, prompt, clip))
    return theirs(x_in.transpose(1, 2), 1000 * t, prompt, clip, return_dict=False)[0].transpose(1, 2)


# ------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("num_shards", [1, 3])
def test_official_folders_are_read(model, num_shards, tmp_path):
    """config.json leaves out what all of Wan share, and the model is the same, from one file or three."""
    assert_same(load_transformer(write_official(tmp_path / "Wan", model, num_shards)), model)


@pytest.mark.parametrize("place", ["transformer folder", "pipeline folder", "file"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_diffusers_weights_predict_the_same_flow_here(kind, place, tmp_path):
    """What diffusers itself has saved, in shards, becomes a model that predicts what diffusers' model predicts."""
    theirs = in_diffusers(CONFIGS[kind])
    folder = tmp_path / "transformer"
    theirs.save_pretrained(folder, max_shard_size="10GB" if place == "file" else "200KB")
    (file, *more) = sorted(folder.glob("*.safetensors"))
    assert bool(more) == (place != "file")
    path = {"transformer folder": folder, "pipeline folder": tmp_path, "file": file}[place]
    loaded = load_transformer(path, config=CONFIGS[kind] if place == "file" else None)
    assert loaded.config == CONFIGS[kind]
    assert_same_flow(loaded, theirs)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_bfloat16_strays_little_further_than_diffusers(kind, tmp_path):
    """Rounded throughout, as Self-Forcing does, against diffusers' model, which keeps time and modulation in float32:
    from the flow in float32 both are about one percent away."""
    from diffusers import WanTransformer3DModel

    in_diffusers(CONFIGS[kind]).save_pretrained(tmp_path)
    x_t, t, cond = call(CONFIGS[kind])
    t = torch.tensor([0.9371, 0.1234])  # which bfloat16 does not have
    flow = load_transformer(tmp_path)(x_t, t, cond)
    ours = load_transformer(tmp_path, dtype="bfloat16")(x_t, t, cond)
    theirs = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16, torch.float32}
    theirs = flow_of_diffusers(theirs, x_t, t, cond)
    errors = [((found.float() - flow).square().mean().sqrt() / flow.std()).item() for found in (ours, theirs)]
    assert 0.002 < errors[0] < 0.015 and errors[0] < 2 * errors[1]


def test_an_unused_norm_of_early_diffusers_files_is_passed_over(tmp_path):
    """diffusers ignores norm_added_q in its first image-to-video files; so does the loader, and nothing else."""
    theirs = in_diffusers(CONFIGS["i2v"])
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"blocks.0.attn2.norm_added_q.weight": torch.ones(24)}, file)
    assert_same_flow(load_transformer(tmp_path), theirs)
    save_file(tensors | {"blocks.0.attn2.norm_added_z.weight": torch.ones(24)}, file)
    with pytest.raises(ValueError, match="unexpected: blocks.0.attn2.norm_added_z.weight"):
        load_transformer(tmp_path)


WRAPPED = {
    "Self-Forcing, generator": lambda name: f"model.{name}",
    "Self-Forcing, EMA of 1.3B": lambda name: f"model._fsdp_wrapped_module.{name}",
    "Self-Forcing, EMA of 14B": lambda name: (
        "model._fsdp_wrapped_module." + name.replace("attn.", "attn._fsdp_wrapped_module.")
    ),
    "FSDP outside": lambda name: f"_fsdp_wrapped_module.model.{name}",
    "compile outside, checkpointing inside": lambda name: (
        "_orig_mod.model." + name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module.")
    ),
    "DDP, compile, FSDP and checkpointing": lambda name: (
        "module._orig_mod.model." + name.replace("ffn.", "_fsdp_wrapped_module._checkpoint_wrapped_module.ffn.")
    ),
    "bare": lambda name: name,
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("network", ["generator_ema", "generator", "model", None])
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_leave_the_names(wrap, network, suffix, t2v, tmp_path):
    """Every infix in every place, in each of the networks that a file may hold, and in both kinds of file."""
    tensors = {wrap(name): x for name, x in t2v.state_dict().items()}
    path = write_file(tmp_path / f"file{suffix}", {network: tensors} if network else tensors)
    assert_same(load_transformer(path, config=t2v.config), t2v)


def test_names_that_torch_makes(t2v, tmp_path):
    """Wrappers of torch itself, not our idea of their names: data parallelism around activation checkpointing."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    wrapped = build(t2v.config)
    wrapped.blocks[0] = checkpoint_wrapper(wrapped.blocks[0])
    tensors = {name: p.detach() for name, p in nn.DataParallel(wrapped).named_parameters()}
    assert all(name.startswith("module.") for name in tensors)
    assert sum("_checkpoint_wrapped_module" in name for name in tensors) == 27  # parameters of a layer
    path = write_file(tmp_path / "model.pt", {"generator": tensors})
    assert_same(load_transformer(path, config=t2v.config), t2v)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_best_network_of_a_file_is_taken(suffix, tmp_path):
    """generator_ema before generator before model, never the critic; weights="raw" passes the average over."""
    models = {
        name: build(CONFIGS["t2v"], seed) for seed, name in enumerate(["critic", "model", "generator", "generator_ema"])
    }
    content, found = {}, []
    for name, one in models.items():
        content[name] = {f"model.{key}": x for key, x in one.state_dict().items()}
        path = write_file(tmp_path / f"{name}{suffix}", content)
        if name != "critic":
            assert_same(load_transformer(path, config=one.config), one)
            found.append(name)
    assert found == ["model", "generator", "generator_ema"]
    assert_same(load_transformer(path, config=one.config, weights="raw"), models["generator"])


def test_the_course_own_checkpoints_are_read(t2v, tmp_path):
    """A shipped .safetensors and a .pt of train.py bring their config; the average comes first where there is one."""
    student = load_weights(REPOSITORY / "checkpoints/student.safetensors").state_dict
    loaded = load_transformer(REPOSITORY / "checkpoints/student.safetensors", dtype=torch.float32)
    assert loaded.config == WanConfig()
    assert all(torch.equal(x, student[name]) for name, x in loaded.state_dict().items())
    averaged, config = (
        build(t2v.config, seed=1),
        {"model": {"_target_": "tiny_causal_wan.WanConfig", **asdict(t2v.config)}},
    )
    content = {"generator_state_dict": t2v.state_dict(), "ema_state_dict": averaged.state_dict(), "config": config}
    path = write_file(tmp_path / "checkpoint_final.pt", content)
    assert_same(load_transformer(path), averaged)
    assert_same(load_transformer(path, weights="raw"), t2v)
    assert_same(load_transformer(write_file(path, content | {"ema_state_dict": None})), t2v)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_dtype_is_the_stored_one_or_the_chosen_one(suffix, t2v, tmp_path):
    """Self-Forcing-Plus' bf16 files stay bf16, or become what is asked for; a mixture becomes its widest dtype."""
    half = {name: x.bfloat16() for name, x in t2v.state_dict().items()}
    path = write_file(tmp_path / f"converted{suffix}", half)
    for given, expected in {None: torch.bfloat16, torch.float32: torch.float32, "float16": torch.float16}.items():
        loaded = load_transformer(path, config=t2v.config, dtype=given).state_dict()
        assert all(torch.equal(loaded[name], x.to(expected)) for name, x in half.items())
    write_file(path, half | {"head.modulation": half["head.modulation"].float()})
    assert {p.dtype for p in load_transformer(path, config=t2v.config).parameters()} == {torch.float32}
    write_file(path, {name: x.to(torch.float8_e4m3fn) for name, x in half.items()})  # nothing computes in it
    with pytest.raises(ValueError, match="dtype must be .* got torch.float8_e4m3fn: pass one"):
        load_transformer(path, config=t2v.config)
    assert {p.dtype for p in load_transformer(path, config=t2v.config, dtype="bfloat16").parameters()} == {
        torch.bfloat16
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("form", ["folder", ".pt", ".safetensors"])
def test_parameters_are_the_files_pages_and_training_spares_them(form, t2v, tmp_path):
    """On the CPU and in the stored dtype nothing is copied, and writing into a parameter does not reach the file."""
    if form == "folder":
        path = write_official(tmp_path / "Wan", t2v)
        file = path / "diffusion_pytorch_model.safetensors"
    else:
        path = file = write_file(tmp_path / f"file{form}", t2v.state_dict())
    before = file.read_bytes()
    loaded = load_transformer(path, config=t2v.config)
    ranges = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line
    ]
    ranges = [range(int(start, 16), int(end, 16)) for start, end in ranges]
    assert all(any(p.data_ptr() in pages for pages in ranges) for p in loaded.parameters())
    with torch.no_grad():
        for p in loaded.parameters():
            p += 1
    assert file.read_bytes() == before
    assert_same(load_transformer(path, config=t2v.config), t2v)


def on_meta(name):
    with torch.device("meta"):
        return TinyCausalWanModel(WAN_CONFIGS[name]).state_dict()


def sizes(model):
    """Number of keys and of parameters."""
    shapes = [x.shape for x in model.state_dict().values()]
    return len(shapes), sum(map(math.prod, shapes))


@pytest.mark.parametrize("rename", [WRAPPED["Self-Forcing, EMA of 14B"], diffusers_name], ids=["FSDP", "diffusers"])
@pytest.mark.parametrize("name", RELEASED)
def test_every_released_key_has_its_place(name, rename, tmp_path):
    """825 / 1095 / 1303 keys at full size: the names and shapes of a file tell the model, and fill it without a gap."""
    path = write_file(tmp_path / "model.pt", {rename(key): x for key, x in on_meta(name).items()})  # no data in it
    loaded = load_transformer(path)
    assert loaded.config == WAN_CONFIGS[name]
    assert sizes(loaded) == RELEASED[name]


def write_sparse(folder, name, num_shards):
    """A released model's official folder at its full size, in bf16: real headers, and holes in place of weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(official_config(WAN_CONFIGS[name])))
    shapes, weight_map = {key: list(x.shape) for key, x in on_meta(name).items()}, {}
    for i in range(num_shards):
        header, end = {}, 0
        file = folder / f"diffusion_pytorch_model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        for key in list(shapes)[i::num_shards]:
            start, end = end, end + 2 * math.prod(shapes[key])
            header[key] = {"dtype": "BF16", "shape": shapes[key], "data_offsets": [start, end]}
            weight_map[key] = file.name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(file, 8 + len(text) + end)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("name", ["t2v-1.3b", pytest.param("i2v-14b", marks=pytest.mark.slow)])
def test_released_sizes_are_loaded_from_shards(name, tmp_path):
    """Every parameter, mapped out of a folder of full size: 3 or 33 GB, sparse, whose pages nobody asks for."""
    folder = tmp_path / name
    write_sparse(folder, name, num_shards=16)
    loaded = load_transformer(folder)
    assert loaded.config == WAN_CONFIGS[name]
    assert sizes(loaded) == RELEASED[name]
    assert {(p.dtype, p.device.type) for p in loaded.parameters()} == {(torch.bfloat16, "cpu")}
    for file in folder.iterdir():
        file.unlink()


def test_config_may_be_given_by_name_or_file(t2v, tmp_path):
    """A name of WAN_CONFIGS, a config.json or a WanConfig, each before what is stored with the weights."""
    path = write_official(tmp_path / "Wan", t2v)
    (tmp_path / "config.json").write_text(json.dumps(official_config(replace(t2v.config, num_heads=4))))
    assert load_transformer(path, config=tmp_path / "config.json").config.num_heads == 4
    assert load_transformer(path, config=replace(t2v.config, eps=0.1)).config.eps == 0.1
    save_file(t2v.state_dict(), tmp_path / "noted.safetensors", {"config": "a note, not JSON"})
    assert_same(load_transformer(tmp_path / "noted.safetensors", config=t2v.config), t2v)
    with pytest.raises(ValueError, match=r"misshaped: patch_embedding.weight \(24, 16, 1, 2, 2\) for \(5120, 16"):
        load_transformer(path, config="t2v-14b")  # at once: a 14B model of real memory would not fit here


# --------------------------------------------------------------------------------------------------------- errors


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "code ran")


def test_code_in_a_file_is_never_run(t2v, tmp_path):
    """A pickle that would run code is refused, with a sentence that says what to do."""
    trap = tmp_path / "trap"
    path = write_file(tmp_path / "model.pt", {"generator": t2v.state_dict(), "extra": Bomb(trap)})
    with pytest.raises(ValueError, match="model.pt cannot be read .* never run here, save its tensors alone"):
        load_transformer(path)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # so the trap works


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def drop(path, *names):
    tensors = load_file(path)
    save_file({name: x for name, x in tensors.items() if name not in names}, path)


FILE, SHARD = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-00002-of-00003.safetensors"
INDEX = f"{FILE}.index.json"
DAMAGE = {  # what happens to an official folder (of three files where the second of them is meant) -> the message
    "truncated": (FILE, cut, f"{FILE} cannot be read as safetensors.*: download it again"),
    "git-lfs": (FILE, lambda p: p.write_text("version https://git-lfs.github.com/spec/v1"), "git-lfs pointer"),
    "empty": (FILE, lambda p: p.write_bytes(b""), f"{FILE} cannot be read as safetensors"),
    "gone": (FILE, Path.unlink, r"Wan holds no \*\.safetensors: pass"),
    "shard truncated": (SHARD, cut, f"{SHARD} cannot be read as safetensors"),
    "shard gone": (SHARD, Path.unlink, f"lacks {SHARD} of the 3 files in its index: download"),
    "index truncated": (INDEX, cut, f"{INDEX} cannot be read as JSON"),
    "index of something else": (INDEX, lambda p: p.write_text("{}"), "has no weight_map"),
    "two indices": (INDEX, lambda p: p.with_name(f"fp16.{INDEX}").write_text("{}"), "several models.*keep one index"),
    "a second copy": (FILE, lambda p: save_file(load_file(p), p.with_name("z.safetensors")), "both hold .*keep one"),
    "config truncated": ("config.json", cut, "config.json cannot be read as JSON"),
    "config a list": ("config.json", lambda p: p.write_text("[]"), "a list where an object should be"),
    "config of another model": ("config.json", lambda p: p.write_text('{"dim": 3}'), "it lacks model_type, in_dim"),
    "config unsupported": (
        "config.json",
        lambda p: p.write_text(p.read_text().replace("t2v", "vace")),
        "Wan describes no model that can be built here: model_type must be 't2v' or 'i2v', got 'vace'",
    ),
    "config wrong": (
        "config.json",
        lambda p: p.write_text(p.read_text().replace('"ffn_dim": 48', '"ffn_dim": 50')),
        r"Wan does not fit the model, misshaped: blocks.0.ffn.0.weight \(48, 24\) for \(50, 24\).*Check the model's",
    ),
    "config gone": ("config.json", Path.unlink, r"fits no released model.*\(24, 16, 1, 2, 2\): pass its config"),
    "key missing": (FILE, lambda p: drop(p, "blocks.1.ffn.0.bias"), "missing: blocks.1.ffn.0.bias. Check"),
    "key unexpected": (
        FILE,
        lambda p: save_file(load_file(p) | {"vace.bias": torch.ones(1)}, p),
        "unexpected: vace.bias. Check",
    ),
}  # fmt: skip


@pytest.mark.parametrize("file, damage, message", DAMAGE.values(), ids=DAMAGE)
def test_a_faulty_folder_gets_one_sentence(file, damage, message, t2v, tmp_path):
    """Each names the file and the fix."""
    folder = write_official(tmp_path / "Wan", t2v, num_shards=3 if file in (SHARD, INDEX) else 1)
    damage(folder / file)
    with pytest.raises(ValueError, match=message) as caught:
        load_transformer(folder)
    assert "\n" not in str(caught.value)


def write_old(path, content):
    """A file as torch wrote it before its zip format."""
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


WEIGHTS = {"a.bias": torch.ones(100)}
FILES = {
    "truncated": (lambda p: cut(write_file(p, WEIGHTS)), "model.pt cannot be read as a PyTorch file"),
    "old format, truncated": (lambda p: cut(write_old(p, WEIGHTS)), "model.pt cannot be read as a PyTorch file"),
    "text": (lambda p: p.write_text("hello"), "model.pt cannot be read as a PyTorch file"),
    "a tensor": (lambda p: torch.save(torch.ones(2), p), "holds a Tensor: pass a file with a state dict"),
    "no network": (lambda p: torch.save({"critic": {}, "step": 3}, p), "neither bare nor as .*: it holds critic, step"),
    "the VAE": (lambda p: torch.save(WEIGHTS, p), "is no Wan transformer, it has a.bias: pass the right file"),
    "the same key twice": (
        lambda p: torch.save(WEIGHTS | {"a._orig_mod.bias": torch.ones(100)}, p),
        "holds a.bias twice.*keep one copy",
    ),
    "nothing": (lambda p: None, "There is no .*model.pt.*hf download Wan-AI/Wan2.1-T2V-1.3B"),
}  # fmt: skip


@pytest.mark.parametrize("write, message", FILES.values(), ids=FILES)
def test_a_faulty_file_gets_one_sentence(write, message, tmp_path):
    """Each names the file and the fix."""
    write(tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message) as caught:
        load_transformer(tmp_path / "model.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"config": "t2v-2b"}, "There is no config t2v-2b: use t2v-1.3b, t2v-14b, i2v-14b or"),
        ({"dtype": "int8"}, "dtype must be float32"),
        ({"dtype": "half-ish"}, "dtype must be float32"),
        ({"weights": "best"}, "weights must be 'ema' or 'raw'"),
    ],
)
def test_a_wrong_option_gets_one_sentence(options, message, t2v, tmp_path):
    path = write_official(tmp_path / "Wan", t2v)
    with pytest.raises(ValueError, match=message):
        load_transformer(path, **options)


def test_old_torch_files_are_read_too(t2v, tmp_path):
    """Files from before torch's zip format cannot be mapped; they are read all the same."""
    assert_same(load_transformer(write_old(tmp_path / "old.pt", t2v.state_dict()), config=t2v.config), t2v)


# ------------------------------------------------------------------------------------------------------ exporting


@pytest.mark.parametrize("max_shard_size", ["10GB", "200KB"])
def test_diffusers_loads_the_export_and_predicts_the_same_flow(model, max_shard_size, tmp_path):
    """from_pretrained finds every key, none too many, in one file or in shards; the flow is ours to 1e-5."""
    from diffusers import WanTransformer3DModel

    folder = tmp_path / "Wan-Diffusers"
    convert.save_transformer(model, folder, max_shard_size=max_shard_size)
    assert len(list(folder.glob("*.safetensors"))) > 1 or max_shard_size == "10GB"
    theirs, report = WanTransformer3DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert_same_flow(model, theirs)


def test_the_official_export_is_wans_own_folder(model, tmp_path):
    """Files, index, keys and settings are those of the release; no setting that Wan's config leaves out is there."""
    convert.save_transformer(model, tmp_path / "one")
    convert.save_transformer(model, tmp_path / "many", max_shard_size="200KB")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"config.json", FILE}
    settings = json.loads((tmp_path / "one/config.json").read_text())
    assert settings.items() <= official_config(model.config).items()
    assert settings.keys() == official_config(model.config).keys() - {"_diffusers_version"}
    weight_map = json.loads((tmp_path / "many" / INDEX).read_text())["weight_map"]
    assert weight_map.keys() == model.state_dict().keys()
    for file in set(weight_map.values()):
        assert {name for name in weight_map if weight_map[name] == file} == load_file(tmp_path / "many" / file).keys()
    assert f"{FILE[:-12]}-00001-of-{len(set(weight_map.values())):05d}.safetensors" in weight_map.values()


def test_the_pt_export_is_self_forcings(model, tmp_path):
    """`generator` holds model.<key>, which Self-Forcing loads strictly into its wrapper around the network."""
    convert.save_transformer(model, tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    wrapper = nn.Module()
    wrapper.model = TinyCausalWanModel(model.config)
    wrapper.load_state_dict(content["generator"])
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in wrapper.model.state_dict().items())


def test_a_chain_of_conversions_ends_with_the_bytes_it_began_with(model, tmp_path, capsys):
    """official -> diffusers -> pt -> safetensors -> official by the command line, each format told by OUT's name."""
    first = tmp_path / "Wan2.1-T2V-1.3B"  # has a dot and is a folder all the same
    convert.save_transformer(model, first)
    names = ("Wan2.1-Diffusers", "wan.pt", "wan.safetensors", "again")
    for source, out in zip((first.name, *names), names, strict=False):
        convert.main([str(tmp_path / source), str(tmp_path / out)])
        assert_same(load_transformer(tmp_path / out), model)
    keys = len(model.state_dict())
    formats = [line.split(": ")[1].split(",")[:2] for line in capsys.readouterr().out.splitlines()]
    assert formats == [[name, f" {keys} keys"] for name in ("diffusers", "pt", "safetensors", "official")]
    for file in ("config.json", FILE):
        assert (tmp_path / "again" / file).read_bytes() == (first / file).read_bytes()


@pytest.mark.parametrize("out", ["official", "in-diffusers", "model.pt", "model.safetensors"])
def test_a_model_unlike_wan_comes_back_the_same(out, tmp_path):
    """The tiny world's own model survives each format: what Wan's settings leave out is written where it differs."""
    model = build(WanConfig(text_dim=8))
    convert.save_transformer(model, tmp_path / out)
    assert_same(load_transformer(tmp_path / out), model)


def test_convert_chooses_dtype_network_and_config(t2v, tmp_path):
    """--dtype, --weights, --config, --format and --max_shard_size reach the file."""
    averaged = build(t2v.config, seed=1)
    path = write_file(tmp_path / "in.pt", {"generator": t2v.state_dict(), "generator_ema": averaged.state_dict()})
    (tmp_path / "config.json").write_text(json.dumps(official_config(t2v.config)))
    options = ["--config", str(tmp_path / "config.json"), "--dtype", "bfloat16", "--max_shard_size", "100KB"]
    convert.main([str(path), str(tmp_path / "ema"), *options, "--format", "diffusers"])
    convert.main([str(path), str(tmp_path / "raw"), *options, "--weights", "raw"])
    for name, expected in {"ema": averaged, "raw": t2v}.items():
        assert_same(load_transformer(tmp_path / name), expected.bfloat16())
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
    tensors = load_file(min((tmp_path / "ema").glob("*.safetensors")))
    assert tensors.keys() <= {diffusers_name(name) for name in t2v.state_dict()}


@pytest.mark.parametrize(
    "out, options, message",
    [
        ("taken", [], "taken exists already: choose another OUT"),
        ("taken/file", [], "taken/file exists already"),
        ("model.pt", ["--format", "safetensors"], "--format safetensors does not go with .*model.pt"),
        ("folder", ["--format", "pt"], "--format pt does not go with .*folder"),
    ],
)
def test_convert_refuses_before_it_reads(out, options, message, tmp_path):
    """An OUT that exists is never written into, and a name must go with its format."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("precious")
    with pytest.raises(ValueError, match=message):
        convert.main([str(tmp_path / "absent"), str(tmp_path / out), *options])
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "file"]


def test_diffusers_cannot_be_without_its_norms(tmp_path):
    model = build(replace(CONFIGS["t2v"], qk_norm=False))
    with pytest.raises(ValueError, match="always has norm_q and norm_k: export qk_norm=False as official or pt"):
        convert.save_transformer(model, tmp_path / "in-diffusers")
    convert.save_transformer(model, tmp_path / "official")
    assert_same(load_transformer(tmp_path / "official"), model)


@pytest.mark.parametrize("out", ["folder", "model.pt", "model.safetensors"])
def test_an_interrupted_export_is_never_taken_for_a_whole_one(out, t2v, tmp_path, monkeypatch):
    """Killed in the middle, a file is not there and a folder has no config.json and names what it lacks."""
    save = {"model.pt": (torch, "save")}.get(out, (convert, "save_file"))
    original, calls = getattr(*save), []

    def interrupted(content, path, *rest):
        calls.append(path)
        if len(calls) == (2 if out == "folder" else 1):
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        original(content, path, *rest)

    monkeypatch.setattr(*save, interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert.save_transformer(t2v, tmp_path / out, max_shard_size="200KB")
    assert len(list(tmp_path.rglob("*"))) == (2 if out == "folder" else 0)
    with pytest.raises(ValueError, match="missing: " if out == "folder" else "There is no"):
        load_transformer(tmp_path / out, config=t2v.config)


def test_the_command_ends_with_one_line(tmp_path, monkeypatch, capsys):
    """python -m full_scale.convert: a user's mistake is one line and exit status 2, not a traceback."""
    monkeypatch.setattr(sys, "argv", ["convert", str(tmp_path / "absent"), str(tmp_path / "out")])
    monkeypatch.delitem(sys.modules, "full_scale.convert")  # runpy warns of a module that is already there
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("full_scale.convert", run_name="__main__")
    out, err = capsys.readouterr()
    assert err.startswith("full_scale.convert: There is no ") and err.count("\n") == 1 and not out
