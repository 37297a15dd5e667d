"""Exercises of lesson 14. README.md says what each wants; `make grade LESSON=14` says how far you are."""

from tutorial.grading import todo


def training_bytes(parameters, gpus, gpus_per_node=8, sharding="full"):
    """Bytes on each GPU of a network that is trained with AdamW and averaged, everything in float32. sharding: "full",
    over all GPUs, or "hybrid", over those of a node."""
    todo("count what a trained network holds on each GPU.")


def call_flops(config, tokens, past_tokens=0):
    """FLOPs of the matrix products in all layers, in one call without gradient on `tokens` new tokens of one video,
    with the keys and values of past_tokens in the cache. config: a WanConfig of a text-to-video model. Embeddings and
    the head are not counted."""
    todo("count the matrix products of a call.")


def parts_per_gpu(batch, gpus, micro_batch=1, sequence_parallel=1):
    """How many micro batches a GPU works through for one step. sequence_parallel: so many GPUs work on one video.
    Raises ValueError for GPUs that do not split into groups of sequence_parallel, and for a batch that does not divide,
    and then names one that does."""
    todo("say how many micro batches are accumulated.")


def without_wrappers(state_dict, source):
    """The same tensors under the names that the model has: without what FSDP, compile, checkpointing, DDP and the
    wrapper `model.` put in. Raises ValueError, naming the source, where two tensors would have one name."""
    todo("strip the names of wrappers from the keys.")


def online_attention(q, k, v, *, mask=None, layer=None, kind=None, chunk=128):
    """softmax(q k^T / sqrt(d)) v on [b l n d], in v's dtype, looking at `chunk` keys at a time. mask: None, or a
    FrameMask, whose tokens(device) is a bool [query, key]."""
    todo("compute attention without ever having all scores.")
