"""Several processes compute one sample: full_scale/ulysses.py on gloo and the CPU, held against one process."""

import os
import shutil
from functools import partial

import pytest
import torch
import torch._dynamo  # which PyTorch loads at the first exchange: once here, not in every process
from ranks import on_ranks, sharded_how
from test_full_scale_parallelize import LAYERS, SHARDED, assert_same_run, command, trained
from tiny_runs import make_weights, some_slow
from torch._dynamo.testing import CompileCounterWithBackend

import train
from discriminator import Discriminator
from dynamic_video_sf import RolloutConfig, rollout
from flow_match import FlowMatchScheduler
from full_scale.parallelize import FullySharded
from full_scale.ulysses import share_sequence
from tiny_causal_wan import CLIP_DIM, TinyCausalWanModel, WanConfig, matmul_attention, sdpa_attention

SIZES = {"dim": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 2, "patch_size": (1, 8, 8)}  # 9 tokens: 4 and 5
FRAMES = 7
WINDOW = RolloutConfig((1000, 500), (1, 3), 50, sink_frames=1, window_frames=2, sink_follows=True, cache_gradient=True)


def make_model(model_type="t2v", **sizes):
    """A network whose every parameter is random, the head and the norms included."""
    torch.manual_seed(0)
    in_dim = 21 if model_type == "i2v" else 1
    model = TinyCausalWanModel(WanConfig(model_type, in_dim, 1, **{**SIZES, **sizes}))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def make_inputs(size=24):
    """Two clips, times per frame and all that an i2v model looks into, alike in all processes."""
    torch.manual_seed(1)
    cond = {"prompt_embeds": torch.randn(2, 5, 32), "clip_features": torch.randn(2, 257, CLIP_DIM)}
    cond["image_latents"] = torch.randn(2, FRAMES, 20, size, size)
    return torch.randn(2, FRAMES, 1, size, size, requires_grad=True), torch.rand(2, FRAMES), cond


def bidirectional(model, x, t, cond):
    return model(x, t, cond)


def block_causal(model, x, t, cond):
    return model(x, t, cond, frames_per_block=(1, 3), sink_frames=1, window_frames=3)


def teacher_forcing(model, x, t, cond):
    return model(x, t, cond, frames_per_block=(1, 3), clean=x.flip(0))


def cached(model, x, t, cond):
    """A training rollout with window and sink, with the gradient through what it remembers."""
    blocks = rollout(model, FlowMatchScheduler(), x, cond, WINDOW, exit_step=(0, 1, 1), rng=torch.Generator())
    return torch.cat(list(blocks), dim=1)


def one_frame(model, x, t, cond):
    return model(x[:, :1], t[:, :1], cond)


WAYS = {
    "bidirectional": (bidirectional, "t2v"),
    "block-causal": (block_causal, "t2v"),
    "teacher forcing": (teacher_forcing, "t2v"),
    "cached": (cached, "t2v"),
    "one frame": (one_frame, "t2v"),
    "image to video": (bidirectional, "i2v"),
    "image to video, cached": (cached, "i2v"),
}


def whole(model):
    """Instead of share_sequence: one process has it all."""
    return model


def results(way, model_type, share=whole, kernel=sdpa_attention):
    """What a model predicts, and the gradients of its input and of every parameter."""
    model, (x, t, cond) = make_model(model_type), make_inputs()
    model.attention = kernel
    share(model)
    y = way(model, x, t, cond)
    (y.square().mean() + (y * y.detach().roll(1, -1)).mean()).backward()
    return y.detach(), {"input": x.grad} | {name: p.grad for name, p in model.named_parameters()}


def every_way(rank):
    """The kernel is another than in the one process: any will do."""
    return {name: results(*way, share_sequence, matmul_attention) for name, way in WAYS.items()}


@pytest.fixture(scope="module", params=[2, 4], ids=["2 processes", "4 processes"])
def many(request, tmp_path_factory):
    return on_ranks(request.param, every_way, folder=tmp_path_factory.mktemp("ways") / "ranks")


@pytest.mark.parametrize("name", WAYS)
def test_several_processes_compute_what_one_does(many, name):
    """The same prediction, whole, in each; the mean of their gradients is the gradient, of every parameter."""
    expected, gradients = results(*WAYS[name])
    assert expected.std() > 0.1
    for rank in many:
        torch.testing.assert_close(rank[name][0], expected, rtol=1e-5, atol=1e-5)
    assert {*gradients} == {*many[0][name][1]}
    for parameter, gradient in gradients.items():
        if gradient is None:
            assert all(rank[name][1][parameter] is None for rank in many), parameter
            continue
        mean = torch.stack([rank[name][1][parameter] for rank in many]).mean(0)
        torch.testing.assert_close(mean, gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item(), msg=parameter)


@torch.inference_mode()
def rolled_out(rank=None, share=share_sequence):
    """An inference rollout, the cache that it leaves, and what the kernel was given."""
    model, (x, _, cond), seen, left = share(make_model()), make_inputs(), [], []

    def watch(q, k, v, *, kind, mask=None, layer=None):
        seen.append((kind, *q.shape[1:3]))
        return sdpa_attention(q, k, v, mask=mask)

    def blocks():
        left.append((yield from rollout(model, FlowMatchScheduler(), x, cond, WINDOW, rng=torch.Generator())))

    model.attention = watch
    return torch.cat(list(blocks()), dim=1), left[0].frames, left[0].layers, seen


def num_bytes(layers):
    return sum(x.untyped_storage().nbytes() for keys_values in layers for x in keys_values)


def test_a_cache_holds_the_tokens_of_its_own_heads(tmp_path):
    """Half the bytes in each of two processes, the same frames, and together the same keys and values."""
    video, frames, layers, seen = rolled_out(share=whole)
    two = on_ranks(2, rolled_out, folder=tmp_path / "ranks")
    for other, other_frames, other_layers, _ in two:
        torch.testing.assert_close(other, video, rtol=1e-5, atol=1e-5)
        assert other_frames == frames == (0, 5, 6)
        assert num_bytes(other_layers) == num_bytes(layers) / 2
    for i, pair in enumerate(layers):
        for j, expected in enumerate(pair):
            together = torch.cat([rank[2][i][j] for rank in two], dim=2)  # [b l n d]
            torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-5)
    # Of the queries and of the heads; a frame's 9 tokens are 4 and 5.
    shares = {"self": (1, 1 / 2), "cross": (5 / 9, 1)}
    for (kind, *alone), shared in zip(seen, two[1][3], strict=True):
        assert shared == (kind, *(pytest.approx(share * n) for share, n in zip(shares[kind], alone, strict=True)))


# ---------------------------------------------------------------------------------------------- with FullySharded


def placed(rank, options):
    """Gradients of a sharded model that between forward and backward is called for smaller frames; how it is sharded,
    how many products of queries and keys the backward pass computes, and how many graphs are compiled."""
    given, calls, counter = sharded_how(), [], CompileCounterWithBackend("inductor")
    torch.compile = partial(torch.compile, backend=counter)
    model, (x, t, cond) = make_model(), make_inputs()
    names = [name for name, _ in model.named_parameters()]
    if not options.get("compile"):  # a graph would count once
        model.attention = lambda *qkv, **how: calls.append(how["kind"]) or sdpa_attention(*qkv, **how)
    model = FullySharded("cpu", **{"precision": "fp32", "sequence_parallel": 2, **options}).place(model, trained=True)
    y = teacher_forcing(model, x, t, cond)
    with torch.no_grad():
        model(torch.zeros(2, 2 * FRAMES, 1, 16, 16), 0.5, cond)  # 4 tokens, 2 and 2
    forward = calls.count("self")
    y.square().mean().backward()
    assert [name for name, _ in model.named_parameters()] == names
    found = {
        "mesh": tuple(given[0]["mesh"].shape),
        "offload": "offload_policy" in given[0],
        "computes": given[0]["mp_policy"].param_dtype,
        "again": calls.count("self") - forward,
        "compiled": counter.frame_count > 0,
    }
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}, found


PLAIN = {"mesh": (2,), "offload": False, "computes": torch.float32, "again": 2, "compiled": False}
WITH = {
    "sharded": (2, {}, {}),
    "two groups": (4, {}, {"mesh": (4,)}),
    "two groups, hybrid": (4, {"processes_per_replica": 2}, {"mesh": (2, 2)}),
    "activations kept": (2, {"checkpoint_activations": False}, {"again": 0}),
    "offload": (2, {"offload": True}, {"offload": True}),
    "bf16": (2, {"precision": "bf16"}, {"computes": torch.bfloat16}),
    "compiled": (2, {"compile": True}, {"compiled": True, "again": 0}),
}


NO_COMPILER = not shutil.which(os.environ.get("CXX", "g++"))
COMPILED = [pytest.mark.slow, pytest.mark.skipif(NO_COMPILER, reason="torch.compile on a CPU needs a C++ compiler")]


@pytest.mark.parametrize("name", [pytest.param(x, marks=COMPILED if x == "compiled" else []) for x in WITH])
def test_with_all_else_that_is_shared_out_the_gradient_is_the_same(tmp_path, name):
    """FSDP's mean needs no factor, and a layer that is computed again knows how its own tokens lay. Each option does
    what it says."""
    count, options, changed = WITH[name]
    model, (x, t, cond) = make_model(), make_inputs()
    teacher_forcing(model, x, t, cond).square().mean().backward()
    error = 0.05 if name == "bf16" else 1e-5
    for gradients, found in on_ranks(count, placed, options, folder=tmp_path / "ranks"):
        assert found == PLAIN | changed
        for key, parameter in model.named_parameters():
            assert (gradients[key] - parameter.grad).norm() <= error * parameter.grad.norm(), key


def judged(rank):
    """Logits of a discriminator, placed, which looks into its backbone, and their gradient."""
    torch.manual_seed(2)
    judge = Discriminator(make_model())
    if rank is not None:
        judge = FullySharded("cpu", precision="fp32", sequence_parallel=2).place(judge, trained=True)
    logits = judge(*make_inputs())
    logits.square().sum().backward()
    gradient = judge.backbone.patch_embedding.weight.grad
    return logits.detach(), gradient if rank is None else gradient.full_tensor()


def test_a_discriminator_stays_whole(tmp_path):
    """It reads the hidden states of layers, of which a share would be another clip."""
    for logits, gradient in on_ranks(2, judged, folder=tmp_path / "ranks"):
        torch.testing.assert_close(logits, judged(None)[0])
        torch.testing.assert_close(gradient, judged(None)[1])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights"), LAYERS)


TOGETHER = [*SHARDED, "+processes.sequence_parallel=2"]
RUNS = {
    "sf_dmd": (2, []),  # both parts of the batch are the work of one group
    "sf_sid": (2, ["objective=sf_sid", "training.batch_size=1"]),  # its gradient goes through the scores to the student
    "sf_dmd, two groups": (4, []),
}
SHORT = ["training.num_steps=2", "training.critic_steps=1", "training.num_previews=1", "training.checkpoint_every=9"]


@pytest.mark.parametrize("name", some_slow(RUNS, {"sf_sid", "sf_dmd, two groups"}))
def test_groups_train_what_one_process_trains(weights, tmp_path, name):
    """The same losses, evaluations, parameters and averages after two steps of the same global batch."""
    count, more = RUNS[name]
    train.main(command(tmp_path / "one", weights, *more, *SHORT))
    on_ranks(count, trained, command(tmp_path / "many", weights, *more, *SHORT, *TOGETHER), folder=tmp_path / "ranks")
    assert_same_run(tmp_path / "one", tmp_path / "many", steps=2)


# ------------------------------------------------------------------------------------------------------ one by one


def said(attempt):
    """What it is refused with."""
    with pytest.raises(ValueError) as refusal:
        attempt()
    return str(refusal.value)


def refusals(rank):
    processes = FullySharded("cpu", precision="fp32", sequence_parallel=2)
    small, (x, t, cond) = share_sequence(make_model(patch_size=(1, 24, 24))), make_inputs()
    messages = [
        said(lambda: share_sequence(make_model(dim=36, num_heads=3))),
        said(lambda: small(x, t, cond)),
        said(lambda: processes.share([1])),
        said(lambda: FullySharded("cpu", sequence_parallel=3)),
        said(lambda: FullySharded("cpu", sequence_parallel=0)),
    ]
    return messages, processes.share(list("abcd")), processes.gather(rank), processes.count


def test_shares_and_refusals(tmp_path):
    """Neighbours get the same parts and are heard once; what does not fit is said in one sentence."""
    told = on_ranks(4, refusals, folder=tmp_path / "ranks")
    assert [share for _, share, *_ in told] == [["a", "c"], ["a", "c"], ["b", "d"], ["b", "d"]]
    assert [(heard, count) for *_, heard, count in told] == [([0, 2], 2)] * 4
    assert told[0][0] == [
        "The model's 3 heads cannot be shared out evenly among 4 processes: "
        "set processes.sequence_parallel to a divisor of 3.",
        "Frames of 1 tokens cannot be shared out among 4 processes: "
        "set processes.sequence_parallel to less, or make larger videos.",
        "A batch in 1 parts cannot be shared out among 2 groups of 2 processes: set training.batch_size or "
        "training.micro_batch_size so that the number of parts is a multiple of it.",
        "processes.sequence_parallel=3 must divide the number of processes, 4.",
        "processes.sequence_parallel=0 must divide the number of processes, 4.",
    ]
