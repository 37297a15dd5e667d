"""Exercises of lesson 3. README.md says what each wants; `make grade LESSON=3` says how far you are."""

from tutorial.grading import todo


def patchify(video, patch):
    """Video [B, F, C, H, W] -> patches [B, F, s, C * patch * patch], s = (H / patch) (W / patch), rows first.

    Inside of a patch the channel comes first, then its rows, then its columns, as in Wan's patch convolution.
    """
    todo("cut every frame into squares and lay each one out as a row of numbers.")


def unpatchify(patches, height, width, patch):
    """Patches [B, F, s, patch * patch * C] of frames of height x width *pixels* -> video [B, F, C, H, W].

    Inside of a patch the rows come first, then the columns, then the channel, as in what Wan's head predicts.
    """
    todo("put the squares back where they were.")


def sinusoid(t, dim):
    """Features [..., dim] of times t [...] in [0, 1], dim even, in float64: cosines first, then sines.

    Angle i is 1000 t 10000^(-i / (dim / 2)).
    """
    todo("turn a time into waves of many lengths.")


def rotate(x, rotations):
    """Rotate the channel pairs of x [b l n d] by rotations [l, d / 2], complex numbers of length 1; x's dtype.

    A pair is two adjacent channels: the first is the real, the second the imaginary part.
    """
    todo("multiply pairs of channels by complex numbers.")


def rope_table(head_dim, start, frames, height, width, device):
    """Rotations [frames * height * width, head_dim / 2], complex64, of tokens frame by frame, row by row.

    Of the head_dim / 2 pairs a third (rounded down) goes to the columns, as many to the rows before them, and the rest,
    which comes first, to time. Pair i of an axis with p pairs turns by position times 10000^(-i / p). Frames count from
    `start`, rows and columns from 0.
    """
    todo("give every token an angle for each of its pairs.")


def modulated(x, sublayer, shift, scale, gate):
    """A part of a layer on x [b f s e], modulated by time: x plus what sublayer, [b f s e] -> [b f s e], adds to it.

    shift, scale, gate: [b f e], a vector for each frame. The norm before is a layer norm over e without weights, eps
    1e-6.
    """
    todo("norm, shift and scale what goes in, gate what comes out.")


def num_parameters(config):
    """How many parameters a TinyCausalWanModel of this WanConfig has, by arithmetic alone: no model is built."""
    todo("count weights and biases of every part.")


def wan_layer(weights, x, modulation, text, rotations, num_heads):
    """One layer of a text-to-video Wan, from its parameters alone: x [b f s e] -> [b f s e], all frames see all.

    weights: a WanLayer's state_dict. modulation [b f 6 e]: of the time, in the order shift, scale, gate of the
    self-attention, then of the feed-forward. text [b L e]. rotations [f s, d / 2]. All eps are 1e-6. The feed-forward
    is linear, GELU in its tanh form, linear; norms without an entry in weights have none.
    """
    todo("write Wan's transformer block.")
