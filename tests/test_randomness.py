"""A sample's random numbers depend on its key alone: not on batch-mates, order, processes or interruptions."""

from itertools import combinations

import pytest
import torch

from randomness import generator, generators, rand, randint, randn, randn_like

DRAWS = {
    "randn": lambda batch, rng: randn((batch, 3, 4), rng),
    "randn_like": lambda batch, rng: randn_like(torch.empty(batch, 3, 4, dtype=torch.float64), rng),
    "rand": lambda batch, rng: rand((batch, 5), rng),
    "randint": lambda batch, rng: randint(1000, (batch, 5), rng),
}
every_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


@every_draw
def test_a_sample_does_not_depend_on_its_batch_mates(draw):
    """Sample 7 draws the same numbers alone, first, or last in a batch; its mates draw others."""
    alone = draw(1, generators(0, "noise", samples=[7]))[0]
    first, other = draw(2, generators(0, "noise", samples=[7, 2]))
    last = draw(3, generators(0, "noise", samples=[9, 4, 7]))[2]
    assert torch.equal(first, alone) and torch.equal(last, alone)
    assert not torch.equal(other, alone)


@every_draw
def test_a_batch_split_over_processes_is_the_same_batch(draw):
    """Two halves with the global indices of their samples, joined, are the whole batch."""
    whole = draw(4, generators(0, 5, samples=range(4)))
    halves = [draw(2, generators(0, 5, samples=half)) for half in ((0, 1), (2, 3))]
    assert torch.equal(torch.cat(halves), whole)


def test_the_second_draw_of_a_sample_goes_on_where_its_first_ended():
    """The generators of a batch advance, each on its own: later draws differ from earlier ones, and repeat."""
    first, second = (generators(0, samples=[1, 2]) for _ in range(2))
    draws = [randn((2, 4), first) for _ in range(2)]
    assert not torch.equal(*draws)
    assert torch.equal(torch.cat(draws, 1)[1], torch.cat([randn((2, 4), second) for _ in range(2)], 1)[1])


def test_every_part_of_the_key_counts():
    """Seed, step, purpose, sample, and how the parts are cut and typed: each change gives another stream."""
    keys = [(0,), (1,), (0, 1), (0, 0), (0, 1, "exit"), (0, 1, "noise"), (0, 2, "exit"), (1, 1, "exit")]
    keys += [(0, 1, "exit", 0), (0, "exit", 1), (0, 12, 3), (0, 1, 23), (0, "1"), (0, 1.0), (-1,)]
    streams = [generator(*key) for key in keys]
    for (key, a), (other, b) in combinations(zip(keys, streams, strict=True), 2):
        assert a.initial_seed() != b.initial_seed(), f"{key} and {other} share a stream"
    draws = torch.stack([randn((8,), stream) for stream in streams])
    assert len(draws.unique(dim=0)) == len(keys)


def test_a_key_means_the_same_on_every_machine():
    """The stream is a fixed function of the key: it survives a new process, Python's salted hash, and a release."""
    assert generator(0, 3, "exit").initial_seed() == 5390523197908024438
    assert [g.initial_seed() for g in generators(0, 3, samples=[5])] == [generator(0, 3, 5).initial_seed()]


def test_samples_may_be_tensors_or_any_iterable():
    """Indices from a data loader's tensor and from a range give the same generators."""
    tensor = generators(0, samples=torch.arange(3))
    assert [g.initial_seed() for g in tensor] == [g.initial_seed() for g in generators(0, samples=range(3))]


def test_one_generator_and_none():
    """One generator draws what torch would draw from it; None draws from torch's global state."""
    expected = torch.randn(2, 3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(randn((2, 3), torch.Generator().manual_seed(5)), expected)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        assert torch.equal(randn((2, 3)), expected)


def test_a_sample_may_be_a_single_number():
    """Shapes of one axis, each sample's number from its own stream, and the one that a longer draw begins with."""
    many = randn((3, 2), generators(0, "noise", samples=range(3)))
    assert torch.equal(randn((3,), generators(0, "noise", samples=range(3))), many[:, 0])
    assert rand((2,), generator(0)).shape == randint(4, (2,), None).shape == (2,)


def test_drawing_leaves_the_global_state_alone():
    """Keyed draws neither read nor advance torch's global generator."""
    before = torch.get_rng_state()
    randn((2, 3), generators(0, samples=range(2)))
    randint(5, (2,), generator(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_randn_like_takes_shape_and_dtype_from_its_model(dtype):
    """Noise fits the video it is for, with one generator per sample as with one for all."""
    x = torch.empty(2, 3, dtype=dtype)
    for rng in (None, generator(0), generators(0, samples=range(2))):
        noise = randn_like(x, rng)
        assert (noise.shape, noise.dtype) == (x.shape, dtype)


def test_distributions():
    """randn is standard normal, rand uniform on [0, 1), over many samples with a generator each."""
    rng = generators(0, samples=range(50))
    normal, uniform = randn((50, 400), rng), rand((50, 400), rng)
    assert normal.mean().abs() < 0.03 and (normal.std() - 1).abs() < 0.03
    assert uniform.min() >= 0 and uniform.max() < 1
    assert (uniform.mean() - 0.5).abs() < 0.01 and (uniform.std() - 12**-0.5).abs() < 0.01


@pytest.mark.parametrize("high", [1, 2, 4, 7])
def test_randint_covers_its_range_evenly(high):
    """Whole numbers from 0 to high - 1, all of them about equally often, never high itself."""
    draws = randint(high, (7_000,), generator(0, high))
    assert draws.dtype == torch.int64
    counts = draws.bincount()
    assert len(counts) == high
    assert (counts - 7_000 / high).abs().max() < 5 * (7_000 / high) ** 0.5


@every_draw
def test_a_wrong_number_of_generators_is_refused(draw):
    """Two generators for a batch of three: the sentence says how many are wanted."""
    with pytest.raises(ValueError, match="rng holds 2 generators for a batch of 3; pass one per sample"):
        draw(3, generators(0, samples=range(2)))
