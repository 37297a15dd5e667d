"""Graders of lesson 4. `make grade LESSON=4`; each message says which idea is missing."""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dynamic_video_sf import RolloutConfig
from flow_match import FlowMatchScheduler
from randomness import generators
from tiny_causal_wan import FrameMask, TinyCausalWanModel, WanConfig


def seen(mask, frame):
    """The frames that a row of a mask sees."""
    return mask[frame].nonzero()[:, 0].tolist()


def table(frame_mask, *given, **options):
    """The mask as a tensor, whatever library made it."""
    return torch.as_tensor(frame_mask(*given, **options))


def test_a_block_sees_all_of_itself_and_its_past(frame_mask):
    mask = table(frame_mask, (3, 3))
    assert list(mask.shape) == [6, 6] and mask.dtype == torch.bool, "Six frames look at six frames: bool [6, 6]."
    assert seen(mask, 0) == [0, 1, 2], (
        f"Frame 0 sees its whole block, 0 to 2, yours {seen(mask, 0)}: the frames of a block are denoised together, "
        "none of them comes first."
    )
    assert seen(mask, 4) == [0, 1, 2, 3, 4, 5], (
        f"Frame 4 sees its own block and the one before, 0 to 5; yours {seen(mask, 4)}."
    )


def test_blocks_may_differ_in_size(frame_mask):
    got = [seen(table(frame_mask, (1, 3, 3)), frame) for frame in (0, 2, 5)]
    assert got == [[0], [0, 1, 2, 3], list(range(7))], (
        f"With blocks of 1, 3 and 3, frames 0, 2 and 5 see up to frame 0, 3 and 6; yours see {got}. Where a block "
        "begins is the sum of the sizes before it."
    )


def test_window_and_sink_are_the_blocks_own(frame_mask):
    mask = table(frame_mask, (1, 3, 3, 3), sink_frames=1, window_frames=3)
    got = [seen(mask, frame) for frame in (7, 9)]
    assert got == [[0, 4, 5, 6, 7, 8, 9]] * 2, (
        "The block of frames 7 to 9, with a sink of 1 and a window of 3, sees 0, then 4 to 6, and itself, in each of "
        f"its frames alike; yours sees {got[0]} from frame 7 and {got[1]} from frame 9. The window counts back from "
        "the block's first frame, and the sink stays whatever the window says."
    )


def test_a_sink_is_past_before_it_is_seen(frame_mask):
    forced = table(frame_mask, (2, 2, 2), sink_frames=3, window_frames=0, clean_half=True)
    got = [seen(forced, frame) for frame in (0, 4, 6, 8)]
    assert got == [[0, 1], [0, 1, 2, 4, 5], [6, 7], [0, 1, 8, 9]], (
        f"With a sink of 3 and no window, clean frames 0 and 4 and noisy frames 0 and 2 see {got}. A sink frame that "
        "is not past yet is not seen: in the noisy half it would be the block's own clean copy."
    )


def test_in_teacher_forcing_the_clean_half_knows_nothing_of_the_noisy_one(frame_mask):
    mask = table(frame_mask, (2, 2, 2), clean_half=True)
    assert list(mask.shape) == [12, 12], "[clean || noisy] is twice as long: bool [2F, 2F]."
    assert not mask[:6, 6:].any() and torch.equal(mask[:6, :6], table(frame_mask, (2, 2, 2))), (
        "A clean block sees clean blocks up to itself, block-causally, and nothing of the noisy half."
    )


def test_a_noisy_block_sees_clean_blocks_before_it_and_itself(frame_mask):
    mask = table(frame_mask, (2, 2, 2), clean_half=True)
    got = seen(mask, 6 + 2)
    assert got == [0, 1, 8, 9], (
        f"The second noisy block sees clean frames 0 and 1, and itself (8 and 9); yours {got}. Its own clean copy is "
        "the answer, and other noisy blocks are not what it will find at inference."
    )


def test_teacher_forcing_has_the_same_window(frame_mask):
    got = seen(table(frame_mask, (1, 2, 2, 2), sink_frames=1, window_frames=2, clean_half=True), 7 + 5)
    assert got == [0, 3, 4, 12, 13], (
        f"The last noisy block, with a sink of 1 and a window of 2, sees clean 0, 3, 4 and itself; yours {got}. A "
        "window that holds in the clean half alone lets training see more than inference."
    )


def chain(num_frames, window):
    """Every frame a block, with a window."""
    return FrameMask((1,) * num_frames, 1, 0, window).frames()


def knows(reach, mask, num_layers):
    """The answer as a tensor of bools; a number of paths counts as one."""
    return torch.as_tensor(reach(mask, num_layers)).bool()


def test_one_layer_is_the_mask(reach):
    mask = FrameMask((1, 3, 3), 1, 1, 2).frames()
    assert torch.equal(knows(reach, mask, 1), mask), (
        "After one layer an output depends on what its frame sees, no more."
    )
    assert torch.equal(knows(reach, mask, 0), torch.eye(7, dtype=torch.bool)), (
        "Without a layer every frame is by itself."
    )


def test_layers_hand_on(reach):
    got = seen(knows(reach, chain(8, 1), 3), 6)
    assert got == [3, 4, 5, 6], (
        f"With a window of 1, three layers carry news of frame 3 to frame 6, step by step, and none of frame 2; yours "
        f"{got}. What a frame saw in one layer, others see in it in the next."
    )


def test_deep_networks_are_counted_too(reach):
    mask = FrameMask((3,) * 7, 1).frames()
    assert torch.equal(knows(reach, mask, 200), mask), (
        "A block-causal mask without a window reaches the same however deep the network is. The number of paths grows "
        "beyond every integer: only whether there is one counts."
    )


def test_it_is_what_a_network_does(reach):
    torch.manual_seed(0)
    model = random_model(num_layers=2)
    options = {"frames_per_block": 2, "window_frames": 2, "sink_frames": 1}
    mask = FrameMask((2,) * 5, 1, 1, 2).frames()
    wanted = knows(reach, mask, 2)
    video = torch.randn(1, 10, 1, 4, 4)
    disturbed = video.repeat(10, 1, 1, 1, 1)
    disturbed[range(10), range(10)] += torch.randn(10, 1, 4, 4)
    with torch.no_grad():
        moved = [call(model, x, **options) - call(model, video, **options) for x in disturbed.split(1)]
    moves = torch.cat(moved).abs().amax((2, 3, 4)).T > 1e-7  # [output frame, input frame]
    assert torch.equal(wanted, moves), (
        "A network of two layers with blocks of 2, a sink of 1 and a window of 2 was disturbed frame by frame: the "
        "outputs that moved are not those that yours predicts."
    )


def random_model(num_layers=1):
    model = TinyCausalWanModel(WanConfig(dim=16, ffn_dim=16, num_heads=1, num_layers=num_layers, text_dim=4)).double()
    nn.init.normal_(model.head.head.weight, std=0.5)
    return model.requires_grad_(False)


def call(model, video, **options):
    cond = {"prompt_embeds": torch.ones(len(video), 2, 4, dtype=torch.double)}
    return model(video.double(), 0.5, cond, **options).float()


VIDEO = torch.randn(2, 7, 1, 4, 4, generator=torch.Generator().manual_seed(1))
PAIRS = [(0, 1), (0, 2), (1, 2)]


def block_means(video, sizes, coming=0.0):
    """Each frame plus the mean of its block and of those before and, times `coming`, of those after it."""
    means = [block.mean(1, keepdim=True) for block in video.split(list(sizes), 1)]
    blocks = []
    for i, block in enumerate(video.split(list(sizes), 1)):
        ahead = [coming * mean for mean in means[i + 1 :]]
        blocks.append(block + sum(means[: i + 1]) + sum(ahead))
    return torch.cat(blocks, dim=1)


def test_a_causal_model_has_no_leak(leaks):
    torch.manual_seed(0)
    model = random_model()
    got = leaks(lambda x: call(model, x, frames_per_block=(1, 3)), VIDEO, (1, 3, 3))
    assert list(got) == [], (
        f"A block-causal model was accused of {got}. Frames of one block may see each other, in both directions: that "
        "is no leak."
    )


def test_a_bidirectional_model_leaks_everywhere(leaks):
    torch.manual_seed(0)
    model = random_model()
    got = leaks(lambda x: call(model, x), VIDEO, (1, 3, 3))
    assert [tuple(pair) for pair in got] == PAIRS, (
        f"In a bidirectional model every block sees every later one, {PAIRS}; yours found {got}."
    )


def test_one_pixel_is_enough(leaks):
    def model(x):
        y = block_means(x, (1, 3, 3))
        y[-1, 0, 0, 2, 2] += 0.01 * x[-1, 4, 0, 1, 3]
        return y

    got = [tuple(pair) for pair in leaks(model, VIDEO, (1, 3, 3))]
    assert got == [(0, 2)], (
        f"One pixel of the last sample's frame 0 depends a little on one pixel of frame 4: (0, 2). Yours found {got}. "
        "Take the largest change over samples, channels and pixels, not a mean, and disturb every frame of a block."
    )


def test_a_norm_hides_nothing(leaks):
    def model(x):
        x = x.double() - x.double().mean((2, 3, 4), keepdim=True)
        normed = x / (x.square().mean((2, 3, 4), keepdim=True) + 1e-6).sqrt()
        y = block_means(normed, (1, 3, 3), coming=0.1)
        return (
            y + (y.round(decimals=3) - y).detach()
        ).float()  # what float32 loses moves nothing, and y has a gradient

    got = [tuple(pair) for pair in leaks(model, VIDEO, (1, 3, 3))]
    assert got == PAIRS, (
        f"This model norms every frame first, so that one that is brighter everywhere, or scaled, is the same to it. "
        f"It leaks all the same; yours found {got}. Disturb with noise."
    )


def test_another_partition_is_a_leak(leaks):
    got = [tuple(pair) for pair in leaks(lambda x: block_means(x, (3, 4)), VIDEO, (1, 3, 3))]
    assert got == [(0, 1), (1, 2)], (
        "A model in blocks of 3 and 4 frames is not causal in blocks of 1, 3 and 3: frames 0 to 2 see each other, and "
        f"so do 3 to 6, which makes (0, 1) and (1, 2). Yours found {got}."
    )


def test_a_dead_model_proves_nothing(leaks):
    try:
        leaks(lambda x: x * 0, VIDEO, (1, 3, 3))
    except ValueError:
        return
    raise AssertionError(
        "This model's output is zero whatever it gets, as is that of a fresh Wan, whose head starts at zero. A test "
        "that finds no leak in it can find none anywhere: raise ValueError where a block does not move itself."
    )


def test_the_video_stays_as_it_was(leaks):
    video = torch.zeros(1, 4, 1, 4, 4)
    got = [tuple(pair) for pair in leaks(lambda x: block_means(x, (2, 2), coming=1.0), video, (2, 2))]
    assert not video.any(), "Work on a clone: the video that was given has been changed."
    assert got == [(0, 1)], "In a video of zeros a factor changes nothing: add noise, or put noise in its place."


class Spy:
    """A model that notes how it is called and predicts a flow of its own."""

    def __init__(self, flow=None):
        self.flow = flow

    def __call__(self, x_t, t, cond, cache=None, **options):
        self.x_t, self.t, self.cond, self.options = x_t, torch.as_tensor(t), cond, options
        return torch.zeros_like(x_t) if self.flow is None else self.flow


SCHEDULER = FlowMatchScheduler(5.0)
CONFIG = RolloutConfig(frames_per_block=(1, 3), sink_frames=1, window_frames=3)


def clips(batch=3, num_frames=7):
    rng = torch.Generator().manual_seed(2)
    return torch.randn(2, batch, num_frames, 1, 4, 4, generator=rng).unbind()


def levels(spy, batch, num_frames=7):
    """The times that a spy was told, [B, F]."""
    return spy.t.reshape(-1, spy.t.shape[-1] if spy.t.ndim == 2 else 1).expand(batch, num_frames)


def test_a_perfect_flow_costs_nothing(causal_forcing_loss):
    x0, noise = clips()
    right = causal_forcing_loss(Spy(noise - x0), SCHEDULER, x0, {}, CONFIG, noise=noise).item()
    assert right < 1e-8, (
        f"A model that predicts noise - x0 exactly has no loss, yours says {right:.3g}. The target is the flow."
    )
    loss, wanted = causal_forcing_loss(Spy(), SCHEDULER, x0, {}, CONFIG, noise=noise), (noise - x0).square().mean()
    assert torch.isclose(loss, wanted), "For a flow of zero the loss is the mean square of noise - x0, over all frames."


def test_every_block_has_a_level_of_its_own(causal_forcing_loss):
    x0, noise = clips(batch=4)
    spy = Spy()
    causal_forcing_loss(spy, SCHEDULER, x0, {}, CONFIG, noise=noise)
    assert spy.t.shape == (4, 7), (
        f"The model is told the level of every frame, [B, F] = [4, 7]; yours {[*spy.t.shape]}."
    )
    assert all(torch.equal(part.amin(1), part.amax(1)) for part in spy.t.split([1, 3, 3], 1)), (
        "The frames of a block are denoised together: they have one level. Yours differ within a block."
    )
    assert len(spy.t[:, [0, 1, 4]].unique()) == 12, "Blocks and samples have levels of their own; some of yours agree."


def test_all_chance_comes_from_rng(causal_forcing_loss):
    (x0, _), given = clips(), []
    for _ in range(2):
        spy = Spy()
        causal_forcing_loss(spy, SCHEDULER, x0, {}, CONFIG, rng=generators(0, "grader", samples=range(3)))
        given.append((spy.t, spy.x_t))
    assert all(map(torch.equal, *given)), (
        "From the same rng, levels or noise are others the second time: draw both from rng (randomness.rand and "
        "randn_like), or a resumed training differs from one that was never interrupted."
    )


def test_levels_are_warped(causal_forcing_loss):
    x0, noise = clips(batch=400)
    spy = Spy()
    causal_forcing_loss(spy, SCHEDULER, x0, {}, CONFIG, noise=noise)
    share = (levels(spy, 400) > 5 / 6).float().mean().item()
    assert 0.4 < share < 0.6, (
        f"Half of uniform times, warped with shift 5, lie above 5/6; of yours {share:.0%}. The scheduler's warp spends "
        "more of training on high noise."
    )


def test_the_input_is_noised_to_those_levels(causal_forcing_loss):
    x0, noise = clips()
    t = torch.tensor([0.2, 0.7, 0.4]).repeat_interleave(torch.tensor([1, 3, 3])).expand(3, 7)
    spy = Spy()
    causal_forcing_loss(spy, SCHEDULER, x0, {}, CONFIG, noise=noise, t=t)
    wanted = (1 - t)[:, :, None, None, None] * x0 + t[:, :, None, None, None] * noise
    assert torch.allclose(spy.x_t, wanted, atol=1e-6), "x_t = (1 - t) x0 + t noise, with the t of each frame."
    assert torch.allclose(levels(spy, 3), t), "A given t is used as it is: neither drawn anew nor warped again."


def test_teacher_forcing_shows_the_past_clean(causal_forcing_loss):
    x0, noise = clips()
    spy = Spy()
    causal_forcing_loss(spy, SCHEDULER, x0, {}, CONFIG, noise=noise)
    clean = spy.options.get("clean")
    assert clean is not None and torch.equal(clean, x0), "Teacher forcing: the model is given clean=x0 beside x_t."
    causal_forcing_loss(spy, SCHEDULER, x0, {}, CONFIG, noise=noise, teacher_forcing=False)
    assert spy.options.get("clean") is None, "Diffusion forcing: there is no clean half, the past is as noisy as it is."


def test_it_sees_what_inference_will_see(causal_forcing_loss):
    x0, noise = clips()
    spy = Spy()
    causal_forcing_loss(spy, SCHEDULER, x0, {}, CONFIG, noise=noise)
    wanted = {"frames_per_block": (1, 3), "sink_frames": 1, "window_frames": 3}
    got = {name: spy.options.get(name) for name in wanted}
    assert got == wanted, (
        f"The model must be called with {wanted}, from the config; yours with {got}. Without frames_per_block it is "
        "bidirectional, and nothing warns."
    )


MASKS = [
    FrameMask((2, 2, 2), 4),
    FrameMask((1, 3, 3), 3, 1, 2),
    FrameMask((2, 2, 2), 2, clean_half=True),
    FrameMask((1, 2, 2, 2), 2, 1, 2, clean_half=True),
]


def qkv(mask, heads=2):
    tokens = len(mask.frames()) * mask.tokens_per_frame
    return torch.randn(3, 2, tokens, heads, 4, generator=torch.Generator().manual_seed(3)).unbind()


def test_it_is_masked_attention(attend_without_mask):
    for mask in MASKS:
        q, k, v = qkv(mask)
        weights = torch.einsum("blnd,bmnd->bnlm", q, k) / 2
        weights = weights.masked_fill(~mask.tokens(), -torch.inf).softmax(-1)
        error = (attend_without_mask(q, k, v, mask=mask) - torch.einsum("bnlm,bmnd->blnd", weights, v)).abs().max()
        assert error < 1e-5, (
            f"For {mask} the result is off by {error:.2g}. Take the frames that a block sees from mask.frames(), in "
            "the order of the tokens: frame after frame."
        )


def test_without_a_mask_everything_is_seen(attend_without_mask):
    q, k, v = qkv(MASKS[0])
    weights = (torch.einsum("blnd,bmnd->bnlm", q, k[:, :5]) / 2).softmax(-1)
    right = torch.einsum("bnlm,bmnd->blnd", weights, v[:, :5])
    assert torch.allclose(attend_without_mask(q, k[:, :5], v[:, :5], kind="cross"), right, atol=1e-5), (
        "The same function serves cross-attention and the teacher: mask=None, any number of keys, all of them seen."
    )


class Largest(TorchFunctionMode):
    """The number of entries of the largest tensor that a function of torch was given or made inside."""

    entries = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in (made, *args, *(kwargs or {}).values()):
            if isinstance(x, torch.Tensor):
                self.entries = max(self.entries, x.numel())
        return made


def test_no_table_of_all_tokens_is_made(attend_without_mask):
    mask = FrameMask((2,) * 10, 5, 0, 4)
    q, k, v = (x[:1] for x in qkv(mask, heads=1))
    with Largest() as largest:
        attend_without_mask(q, k, v, mask=mask)
    share = largest.entries / q.shape[1] ** 2
    assert share <= 0.3, (
        f"A tensor of {share:.0%} of all tokens times all tokens was made. Ten blocks with a window of two: each needs "
        "a table of its own tokens times those that it sees, one block at a time."
    )


def test_it_works_inside_the_model(attend_without_mask):
    torch.manual_seed(0)
    model = random_model(num_layers=2)
    video, clean = torch.randn(2, 1, 7, 1, 4, 8)
    options = {"frames_per_block": (1, 3), "clean": clean.double(), "window_frames": 3}
    right = call(model, video, **options)
    model.attention = attend_without_mask
    error = (call(model, video, **options) - right).abs().max()
    assert error < 1e-5, f"As model.attention in a teacher-forced call it is off by {error:.2g}."
