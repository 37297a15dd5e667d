"""Exercises of lesson 12. README.md says what each wants; `make grade LESSON=12` says how far you are."""

from tutorial.grading import todo


def cache_bytes(config, height, width, num_frames, sink_frames=0, window_frames=None, bytes_per_number=4):
    """What the cache of one video weighs after num_frames frames of height x width pixels (or latents), in bytes: int.

    config: a WanConfig, of which patch_size, dim and num_layers count. window_frames=None keeps all frames.
    """
    todo("count the numbers that keys and values of all held frames have.")


def never_seen(trained_frames, num_frames, frames_per_block, sink_frames=0, window_frames=None, sink_follows=False):
    """The distances in frames, sorted, that occur in a rollout of num_frames but in none of trained_frames: a list.

    A distance is the position of a frame that sees minus that of a frame that it sees, of the past or of its own block,
    if that is 0 or more; where sink_follows, the sink stands right before the window. Both counts are whole numbers of
    blocks.
    """
    todo("list the distances that every block meets, and take away those that training had.")


def move_later(keys, num_frames):
    """Cached keys [b l n d], rotated to their own frames already, as if they stood num_frames frames later (earlier,
    if that is below 0)."""
    todo("turn the keys on by the angles of that many frames.")


def recache(generator, scheduler, past, cond, config, cache, *, rng=None):
    """The same past seen anew under another prompt: a cache like `cache`, whose keys and values were read under cond.

    past [B, F, C, H, W]: the frames that the cache holds, `cache.frames`, in their order. They are read block by block
    (kv_cache.block_borders), each at its own place, clean or noised to config.context_noise as a rollout remembers
    them. Raises ValueError where past has another number of frames.
    """
    todo("let the generator remember the held frames once more, with the new prompt.")


class MeltingSink:
    """A KVCache for inference whose sink takes up what is evicted: use as KVCache(sink_frames, window_frames).

    next_frame, frames, layers, gap (0) and extend(layers, num_frames) are those of KVCache. When a frame is evicted,
    its keys and values are mixed into those of the sink frame number (frame % sink_frames), token by token: (1 - share)
    of the sink's and share of the frame's, whose keys are first turned to the sink frame's position; oldest first.
    """

    gap = 0

    def __init__(self, sink_frames, window_frames, share=0.1):
        todo("make a cache that forgets slowly.")
