"""Many processes train what one trains: the tiny world through full_scale/parallelize.py, on gloo and the CPU."""

import json
import os
import threading
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks, sharded_how
from tiny_runs import assert_same, final_state, make_weights, options, rows, some_slow
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import train
from dynamic_video_sf import RolloutConfig, dmd_loss, flow_matching_loss, rollout, sid_loss
from flow_match import FlowMatchScheduler
from full_scale import sharded_checkpoint
from full_scale.parallelize import FullySharded
from tiny_causal_wan import TinyCausalWanModel, WanConfig, sdpa_attention

SHARDED = ["processes._target_=full_scale.parallelize.FullySharded", "+processes.precision=fp32"]
LAYERS = "model.num_layers=2"
RUN = [
    LAYERS,
    "training.batch_size=2",
    "training.micro_batch_size=1",
    "training.num_steps=3",
    "training.num_previews=2",
]
RUN += ["training.critic_optimizer=adamw", "training.critic_lr=0.001", "training.critic_steps=2"]
RUN += ["training.max_num_frames=12", "training.sample_every=2", "training.ema_decay=0.9"]
LOSSES = ("generator_loss", "generator_grad_norm", "critic_loss", "critic_grad_norm", "score_distance", "evaluations")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights"), LAYERS)


def trained(rank, overrides):
    train.main(overrides)


def command(folder, weights, *more):
    return options("self_forcing", folder, weights, *RUN, *more)


def assert_same_run(one, many, steps=3, rel=1e-5):
    """Losses of every step and all that was trained, to rounding; `many` was written by several processes."""
    for a, b in zip(rows(one), rows(many), strict=True):
        assert {name: float(a[name]) for name in LOSSES if a[name]} == pytest.approx(
            {name: float(b[name]) for name in LOSSES if b[name]}, rel=rel
        )
    assert len(rows(one)) == steps
    expected, state = final_state(one), sharded_checkpoint.load(many / "checkpoint_final")
    for network in ("generator_state_dict", "critic_state_dict", "ema_state_dict"):
        assert state[network].keys() == expected[network].keys()
        for name, x in expected[network].items():
            torch.testing.assert_close(state[network][name], x, rtol=1e-4, atol=1e-5, msg=f"{network} {name}")
    assert state["step"] == expected["step"] == steps


# A relativistic discriminator's last bias has no gradient but rounding, which Adam makes steps of.
RUNS = {
    "sf_dmd": ["training.batch_size=4", "training.max_num_frames=15"],  # two parts each, rollouts of several lengths
    "sf_sid": ["objective=sf_sid"],
    "sf_gan": ["objective=sf_gan", "objective.relativistic=false"],
}


@pytest.mark.parametrize("name", some_slow(RUNS, {"sf_gan"}))
def test_two_processes_train_what_one_trains(weights, tmp_path, name):
    """The same losses, parameters and averages after three steps of the same global batch; only one of them logs."""
    more = RUNS[name]
    train.main(command(tmp_path / "one", weights, *more))
    on_ranks(2, trained, command(tmp_path / "two", weights, *more, *SHARDED), folder=tmp_path / "ranks")
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "samples" / "step_000002.png").exists()
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "checkpoint_final", "checkpoint_final.000003", "config.yaml", "metrics.csv", "samples"
    ]  # fmt: skip


def killed_after_two_steps(rank, overrides):
    """The run, cut off hard in its third step."""
    loop = train.training_loop

    def cut(run):
        for values in loop(run):
            if run.step == 3:
                run.processes.finish()  # what was begun at step 2 is on disk
                return
            yield values

    train.training_loop = cut
    train.Run.state_dict = (lambda before: lambda run: stop() if run.step == 3 else before(run))(train.Run.state_dict)
    with pytest.raises(KeyboardInterrupt):
        train.main(overrides)


def stop():
    raise KeyboardInterrupt


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_in_another_number_of_processes(weights, tmp_path, before, after):
    """Killed and resumed, it ends as if one process had done it all; a kill leaves no half checkpoint behind."""
    train.main(command(tmp_path / "one", weights))
    many = command(tmp_path / "many", weights, *SHARDED)
    on_ranks(before, killed_after_two_steps, many, folder=tmp_path / "first")
    assert json.loads((tmp_path / "many" / "checkpoint_last" / "state.json").read_text())["step"] == 2
    on_ranks(after, trained, many, folder=tmp_path / "then")
    assert_same_run(tmp_path / "one", tmp_path / "many")
    assert not list((tmp_path / "many").glob("checkpoint_last*"))


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["+processes.processes_per_replica=1"], id="hybrid"),
        pytest.param(["+processes.checkpoint_activations=false"], id="activations kept", marks=pytest.mark.slow),
        pytest.param(["+processes.offload=true"], id="offload"),
    ],
)
def test_other_ways_to_share_out_change_nothing(weights, tmp_path, more):
    """Whole models in each process, activations kept, parameters in the memory of the CPU."""
    train.main(command(tmp_path / "one", weights))
    on_ranks(2, trained, command(tmp_path / "two", weights, *more, *SHARDED), folder=tmp_path / "ranks")
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_muon_sees_whole_matrices(weights, tmp_path):
    """It orthogonalises the whole gradient of a matrix, not a shard's; in bf16, which rounds more than the rest."""
    muon = ["training.critic_optimizer=muon", "training.critic_lr=0.01"]
    train.main(command(tmp_path / "one", weights, *muon))
    on_ranks(2, trained, command(tmp_path / "two", weights, *muon, *SHARDED), folder=tmp_path / "ranks")
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert float(b["critic_loss"]) == pytest.approx(float(a["critic_loss"]), rel=1e-3)


def test_the_bf16_recipe_trains(weights, tmp_path):
    """Networks compute in bf16, masters and averages stay fp32, and the losses are near those of fp32."""
    train.main(command(tmp_path / "one", weights))
    sharded = [SHARDED[0], "+processes.precision=bf16"]
    on_ranks(2, trained, command(tmp_path / "two", weights, *sharded), folder=tmp_path / "ranks")
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert float(b["critic_loss"]) == pytest.approx(float(a["critic_loss"]), rel=0.05)
        assert a["critic_loss"] != b["critic_loss"]
    state = sharded_checkpoint.load(tmp_path / "two" / "checkpoint_final")
    for network in ("generator_state_dict", "critic_state_dict", "ema_state_dict"):
        assert {x.dtype for x in state[network].values()} == {torch.float32}


# ------------------------------------------------------------------------------------------------------- one by one


def small_wan(seed=0, num_layers=2):
    """A network whose every parameter is random, and a list that grows by the layer's number with each self-attention
    that Python computes."""
    torch.manual_seed(seed)
    model, calls = TinyCausalWanModel(WanConfig("t2v", 4, 4, 16, 16, 2, num_layers, (1, 2, 2), 8, 4, 16)), []
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)

    def count(q, k, v, *, mask=None, layer=None, kind=None):
        if kind == "self":
            calls.append(layer)
        return sdpa_attention(q, k, v, mask=mask)

    model.attention = count
    return model, calls


def clip():
    """A clip of small_wan's that wants a gradient, its time and its prompt."""
    torch.manual_seed(1)
    return torch.randn(1, 3, 4, 4, 4, requires_grad=True), 0.5, {"prompt_embeds": torch.randn(1, 3, 8)}


def seen(rank, options):
    """What becomes of a network: what fully_shard is given, how a parameter lies, how often layers are computed."""
    given, (model, calls) = sharded_how(), small_wan()
    model = FullySharded("cpu", **options).place(model, trained=True)
    y, forward = model(*clip()), len(calls)
    y.square().mean().backward()
    weight, policies = model.blocks[1].ffn[0].weight, [how["mp_policy"] for how in given]
    return {
        "units": len(given),
        "mesh": {tuple(how["mesh"].shape) for how in given},
        "lies": [f"{type(way).__name__}" for way in weight.placements],
        "resharded": {how["reshard_after_forward"] for how in given},
        "computes": {policy.param_dtype for policy in policies},
        "sums": {policy.reduce_dtype for policy in policies},
        "inputs cast": {policy.cast_forward_inputs for policy in policies},
        "offload": {type(how.get("offload_policy")).__name__ for how in given},
        "computed": (forward, len(calls) - forward),
    }


PLAIN = {
    "units": 3, "mesh": {(2,)}, "lies": ["Shard"], "resharded": {True}, "computes": {torch.bfloat16},
    "sums": {torch.float32}, "inputs cast": {False}, "offload": {"NoneType"}, "computed": (2, 2),
}  # fmt: skip
OPTIONS = {
    "as it is": ({}, {}),
    "fp32": ({"precision": "fp32"}, {"computes": {torch.float32}}),
    "hybrid": ({"processes_per_replica": 1}, {"mesh": {(2, 1)}, "lies": ["Replicate", "Shard"]}),
    "activations kept": ({"checkpoint_activations": False}, {"computed": (2, 0)}),
    "offload": ({"offload": True}, {"offload": {"CPUOffloadPolicy"}}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_does_what_it_says(tmp_path, name):
    """Each changes what it is there for, and that alone: sharding of every layer, precision, recomputation, offload."""
    options, changed = OPTIONS[name]
    assert on_ranks(2, seen, options, folder=tmp_path / "ranks") == [PLAIN | changed] * 2


def summed(rank):
    """The gradient of a bias that is 1 in one process and 2^-10 in the other."""
    model = FullySharded("cpu", precision="bf16", checkpoint_activations=False).place(Net(), trained=True)
    (model(torch.zeros(1, 3, dtype=torch.bfloat16)) * (1.0, 2**-10)[rank]).sum().backward()
    bias = model.blocks[1].bias  # what comes out
    return bias.grad.full_tensor(), bias.dtype


def test_gradients_are_summed_in_float32(tmp_path):
    """The mean of what bf16 holds is more than bf16 holds."""
    for gradient, master in on_ranks(2, summed, folder=tmp_path / "ranks"):
        assert gradient.tolist() == [(1 + 2**-10) / 2] * 3 and master == torch.float32


def scored(rank):
    """How often the layers of a frozen teacher are computed by SiD's loss, and by its gradient."""
    processes, (teacher, calls), (critic, _) = FullySharded("cpu", precision="fp32"), small_wan(0), small_wan(1)
    teacher = processes.place(teacher.requires_grad_(False), trained=False)
    critic, (video, _, cond) = processes.place(critic, trained=True), clip()
    loss = sid_loss(video, teacher, critic, FlowMatchScheduler(), cond, {"prompt_embeds": torch.zeros(1, 1, 8)}, 3.0)
    forward = list(calls)
    loss.backward()
    with torch.no_grad():
        before = len(calls)
        teacher(*clip())
    return forward, calls[len(forward) : before], len(calls) - before, video.grad.abs().sum().item()


def test_the_frozen_teacher_is_computed_again_for_the_gradient_of_sid(tmp_path):
    """Of its layers only the inputs are kept: with and without the prompt, the last one first. A call without a
    gradient computes each once."""
    for forward, backward, without, gradient in on_ranks(2, scored, folder=tmp_path / "ranks"):
        assert forward == [0, 1, 0, 1] and sorted(backward) == [0, 0, 1, 1] and backward[0] == 1
        assert without == 2 and gradient > 0


def rolled_out_and_back(networks):
    """A rollout of three blocks, DMD's loss and the critic's, with all gradients."""
    student, teacher, critic = networks
    noise, cond, scheduler, rng = torch.ones(1, 9, 4, 4, 4), clip()[2], FlowMatchScheduler(), torch.Generator()
    given = {"scheduler": scheduler, "cond": cond, "rng": rng}
    video = torch.cat(list(rollout(student, noise=noise, config=RolloutConfig((1000, 500)), exit_step=1, **given)), 1)
    dmd_loss(video, teacher, critic, uncond=cond, guidance_scale=3.0, **given).backward()
    flow_matching_loss(critic, x0=video.detach(), **given).backward()
    gradients = [p.grad for model in (student, critic) for p in model.parameters()]
    return [gradient.full_tensor().clone() for gradient in gradients if gradient is not None]


def compiled_together(rank):
    """Gradients without and with compiled layers, and how many graphs there were after each and after another step."""
    counter, gradients, counts = CompileCounterWithBackend("aot_eager"), [], []
    torch.compile = partial(torch.compile, backend=counter)
    for compiled in (False, True):
        processes, networks = FullySharded("cpu", precision="fp32", compile=compiled), []
        for seed, trained in enumerate((True, False, True)):
            model = small_wan(seed, num_layers=9)[0].requires_grad_(trained)
            model.attention = sdpa_attention
            networks.append(processes.place(model, trained=trained))
        gradients.append(rolled_out_and_back(networks))
        counts.append(counter.frame_count)
    rolled_out_and_back(networks)
    return gradients, [*counts, counter.frame_count], dict(torch._dynamo.utils.counters["frames"])


@pytest.mark.slow
def test_the_layers_of_all_networks_are_compiled_together(tmp_path):
    """Not once for each of nine layers, nor in a later step; more often than PyTorch's limit, after which layers would
    go on uncompiled; and gradients are those of the uncompiled layers."""
    gradients, (none, first, then), frames = on_ranks(1, compiled_together, folder=tmp_path / "rank")[0]
    assert none == 0 and 8 < first < 2 * 9 and then == first
    assert frames["ok"] == frames["total"] == first
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def compiled_around(rank):
    """How many graphs are made of layers with a kernel that cannot be in one, and which layers' kernels run."""
    counter, (model, calls) = CompileCounter(), small_wan()
    torch.compile = partial(torch.compile, backend=counter)
    model.attention = torch.compiler.disable(model.attention)
    model = FullySharded("cpu", precision="fp32", compile=True).place(model, trained=True)
    model(*clip()).square().mean().backward()
    return counter.frame_count, sorted(calls)


@pytest.mark.slow
def test_a_layer_is_compiled_around_a_kernel_that_cannot_be(tmp_path):
    """As flex_attention is under a mask: the rest of the layer is compiled, and computed again for the gradient."""
    count, calls = on_ranks(1, compiled_around, folder=tmp_path / "rank")[0]
    assert count > 1 and calls == [0, 0, 1, 1]


def refused_to_compile(rank):
    model = FullySharded("cpu").place(small_wan()[0], trained=True)
    with pytest.raises(ValueError) as refusal:
        model.blocks[0].compile(dynamic=False)  # as train.py does
    return str(refusal.value)


def test_layers_that_are_shared_out_are_compiled_by_a_switch_of_their_own(tmp_path):
    """training.compile, which would compile them as they are called, says which one that is."""
    said = on_ranks(1, refused_to_compile, folder=tmp_path / "rank")[0]
    assert said.endswith("leave training.compile=false and set processes.compile=true.")


class Net(nn.Module):
    """Two layers in a list, and a weight beside them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.first = nn.Linear(3, 3)

    def forward(self, x):
        for layer in (self.first, *self.blocks):
            x = layer(x)
        return x


def net_and_state(steps=1):
    """A sharded network after some steps of AdamW, and its state as train.py has it."""
    processes = FullySharded("cpu", precision="fp32", checkpoint_activations=False)
    torch.manual_seed(0)
    model = processes.place(Net(), trained=True)
    optimizer = torch.optim.AdamW(model.named_parameters())
    for _ in range(steps):
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()
    state = {"generator_state_dict": model.state_dict(), "critic_state_dict": None, "ema_state_dict": None}
    state |= {"optimizer_state_dict": [optimizer.state_dict()], "critic_optimizer_state_dict": [], "step": steps}
    return processes, model, state


def whole(tree):
    """The same with whole tensors, copied."""
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value) for value in tree]
    if isinstance(tree, torch.Tensor):
        return (tree.full_tensor() if hasattr(tree, "full_tensor") else tree).clone()
    return tree


def save_while_training(rank, link):
    processes, model, state = net_and_state()
    processes.save(link, state)
    processes.finish()
    wait, begun = threading.Event(), threading.Event()
    write = sharded_checkpoint.HuggingFaceStorageWriter.write_data

    def blocked(*arguments):
        begun.set()
        assert wait.wait(60)
        return write(*arguments)

    sharded_checkpoint.HuggingFaceStorageWriter.write_data = blocked
    before = whole(state | {"step": 2})
    processes.save(link, state | {"step": 2})
    assert begun.wait(60)
    meanwhile = sharded_checkpoint.load(link)["step"]  # nothing of it is on disk yet, and save has returned
    for parameter in model.parameters():  # training goes on
        parameter.data.mul_(0)
    wait.set()
    processes.finish()
    loaded = processes.load(link, state)
    kinds = [type(loaded[name]["first.weight"]) for name in ("generator_state_dict",)]
    moments = [type(x["exp_avg"]) for x in loaded["optimizer_state_dict"][0]["state"].values()]
    return before, whole(loaded), {kind.__name__ for kind in kinds + moments}, meanwhile


def test_what_is_saved_is_the_state_of_that_moment(tmp_path):
    """Written in the background while training goes on, it is not what training has made of it since; until it is
    whole, the one before is what is loaded. Loaded, it is shared out again."""
    told = on_ranks(2, save_while_training, tmp_path / "last", folder=tmp_path / "ranks")
    before, loaded, kinds, _ = told[0]
    assert [meanwhile for *_, meanwhile in told] == [1, 1]
    assert_same(loaded, json_types(before))
    assert kinds == {"DTensor"}
    read = sharded_checkpoint.load(tmp_path / "last", wanted=lambda name: name.startswith("generator_state_dict"))
    assert_same(read["generator_state_dict"], before["generator_state_dict"])
    assert read["optimizer_state_dict"][0]["state"][0]["exp_avg"] is None


def json_types(state):
    """Tuples as lists, as JSON has them."""
    if isinstance(state, dict):
        return {key: json_types(value) for key, value in state.items()}
    return [json_types(value) for value in state] if isinstance(state, list | tuple) else state


def die_while_saving(rank, link, where):
    processes, _, state = net_and_state()
    processes.save(link, state)
    processes.finish()
    if where == "parts":
        sharded_checkpoint.HuggingFaceStorageWriter.write_data = lambda *_: os._exit(9)
    else:
        sharded_checkpoint.atomic = lambda path: os._exit(9)
    processes.save(link, state | {"step": 2})
    processes.finish()


@pytest.mark.parametrize("where", ["parts", "state.json"])
def test_a_save_that_is_cut_short_leaves_the_one_before(tmp_path, where):
    """Killed while the parts are written, or before the link moves, a run goes on from its last whole checkpoint."""
    with pytest.raises(AssertionError, match="ended without a word"):
        on_ranks(2, die_while_saving, tmp_path / "last", where, folder=tmp_path / "ranks")
    assert sharded_checkpoint.load(tmp_path / "last")["step"] == 1
    assert (tmp_path / "last.000002").exists()
    _, loaded, _ = on_ranks(2, save_again, tmp_path / "last", folder=tmp_path / "again")[0]
    assert loaded["step"] == 2
    assert {path.name for path in tmp_path.glob("last*")} == {"last", "last.000002"}


def save_again(rank, link):
    processes, _, state = net_and_state()
    processes.save(link, state | {"step": 2})
    processes.finish()
    return None, whole(processes.load(link, state)), None


def test_a_folder_without_its_end_is_refused(tmp_path):
    (tmp_path / "half").mkdir()
    with pytest.raises(ValueError, match="half is no whole checkpoint, it has no state.json: take an earlier one."):
        sharded_checkpoint.load(tmp_path / "half")


def refusals(rank):
    processes = FullySharded("cpu", precision="fp32")
    said = []
    for attempt in (
        lambda: processes.share([1, 2, 3]),
        lambda: FullySharded("cpu", processes_per_replica=3),
        lambda: FullySharded("cpu", precision="fp16"),
    ):
        try:
            attempt()
        except ValueError as error:
            said.append(str(error))
    return said, processes.share(list("abcd")), processes.gather(rank), processes.count, processes.is_first


def test_shares_and_refusals(tmp_path):
    """Parts of a batch are dealt out in turn; what does not fit is said in one sentence."""
    first, second = on_ranks(2, refusals, folder=tmp_path / "ranks")
    assert first[1:] == (["a", "c"], [0, 1], 2, True) and second[1:] == (["b", "d"], [0, 1], 2, False)
    assert first[0] == [
        "A batch in 3 parts cannot be shared out among 2 processes: set training.batch_size or "
        "training.micro_batch_size so that the number of parts is a multiple of it.",
        "processes.processes_per_replica=3 must divide the number of processes, 2.",
        "processes.precision must be one of fp32, bf16, got 'fp16'.",
    ]


def alone(rank):
    dist.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
    processes, model, _ = net_and_state()
    return processes.count, processes.gather("x"), type(model.first.weight).__name__


def test_without_torchrun_it_is_alone(tmp_path):
    assert on_ranks(1, alone, folder=tmp_path / "rank") == [(1, ["x"], "DTensor")]
