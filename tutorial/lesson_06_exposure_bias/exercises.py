"""Exercises of lesson 6. README.md says what each wants; `make grade LESSON=6` says how far you are."""

from tutorial.grading import todo


def error_growth(slope, noise, num_frames):
    """Variance [num_frames] of the error of an autoregressive model after 1, 2, ... frames, as a tensor.

    A frame's error is slope times the last frame's plus new noise of standard deviation `noise`; the first frame
    continues a true one.
    """
    todo("add up what is left of every frame's noise.")


def gap(own, true, better="high"):
    """How much worse a metric is on a model's own past than on the true past, per frame: [F], above 0 where worse.

    own, true: curves [num_seeds, F] or [F], as arrays or tensors. better: "high" for a metric such as accuracy, "low"
    for an error, "one" for a ratio such as ink, whose best value is 1.
    """
    todo("compare two curves, so that above 0 always means worse on the own past.")


def drift(records, metric, span):
    """What a metric has changed since the first block: an array [num_seeds], one number per record.

    records: one dict per training seed, whose ["curves"][metric] are numbers over the frame index. span: a key of
    experiments.results.SPANS, such as "3T-4T" or "first block". NaN where the videos are shorter than the span.
    """
    todo("tell what was lost on the way from how good it was at first.")


class DataPast:
    """A generator that remembers the data instead of what it made. The methods are those that `rollout` asks for:

    __call__(x_t, t, cond, cache=None) -> flow, and remember(x, t, cond, cache) -> the cache with the data's frames in
    the place of x, noised to t, or with noisy=True to a level of its own per sample and block (uniform, then warped).
    data [B, F, C, H, W]; remember raises ValueError where the data end too early.
    """

    def __init__(self, generator, scheduler, data, noisy=False, rng=None):
        todo("make a generator whose past is right, whatever it makes of it.")


class MixedPast:
    """Between the two pasts: every block is remembered from the data with probability data_share, else as it was made.

    The methods are those of DataPast. All samples of a batch share the coin, drawn from rng with randomness.rand.
    """

    def __init__(self, generator, scheduler, data, data_share, rng=None):
        todo("mix the data's past with the model's own.")
