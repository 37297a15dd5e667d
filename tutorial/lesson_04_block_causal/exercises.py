"""Exercises of lesson 4. README.md says what each wants; `make grade LESSON=4` says how far you are."""

from tutorial.grading import todo


def frame_mask(block_sizes, sink_frames=0, window_frames=None, clean_half=False):
    """Which frame sees which: bool [query frame, key frame].

    A block sees itself, the first sink_frames and the window_frames before its own first frame (None: all of the past).
    With clean_half both axes are [clean || noisy], as teacher forcing has them: [2F, 2F].
    """
    todo("say for every frame which frames it may look at.")


def reach(mask, num_layers):
    """Whose input can move whose output: bool [output frame, input frame] of a network of num_layers layers.

    mask: bool [query frame, key frame], the same in every layer. Each layer adds to a frame what it saw there.
    """
    todo("follow what a frame knows through the layers.")


def leaks(model, video, block_sizes):
    """Pairs (i, j), i < j: the output of block i moves when the input of block j is another one. A list, in order.

    model: video [B, F, C, H, W] -> [B, F, C, H, W], a black box. video stays as it is. Raises ValueError where a block
    does not even move its own output: then nothing can be told.
    """
    todo("disturb one block after the other and see whose output moves.")


def causal_forcing_loss(model, scheduler, x0, cond, config, *, teacher_forcing=True, rng=None, t=None, **options):
    """Flow matching of a block-causal model on data x0 [B, F, C, H, W], every block at its own noise level.

    model: called as TinyCausalWanModel is. config: a RolloutConfig. With teacher_forcing a block sees its past clean,
    else each past block at that block's own level. t: [B, F], by default one uniform, warped time per block, from rng.
    options: of flow_matching_loss, such as noise=[B, F, C, H, W].
    """
    todo("noise every block to a level of its own, and compare the flow.")


def attend_without_mask(q, k, v, *, mask=None, layer=None, kind=None):
    """The attention of a masked call on [b l n d] without a table of tokens by tokens. mask: a FrameMask or None."""
    todo("give every block only those keys and values that it may see.")
