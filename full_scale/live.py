"""Wan's models as live.Live wants them: what demo.py does when it is given a --model_path."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from dynamic_video_sf import Guided
from full_scale.generate import (
    FPS,
    SAMPLING_OPTIONS,
    Models,
    Sampling,
    choose_sampling,
    parse_arguments,
    pick_models,
)
from full_scale.memory import VisitingStream
from full_scale.pixels import STRIDE, check_size
from full_scale.text import clean
from live import LiveModel, bounded

NOT_LIVE = (  # options of full_scale.generate that say what to show, or where to write it
    "prompts", "data_path", "extended_prompt_path", "i2v", "image", "video", "num_samples", "seed", "output_folder",
    "save_with_index", "format", "batch_size",
)  # fmt: skip
EXAMPLES = (
    "a cat walks on the grass, realistic style",
    "a sailing boat on a calm sea at sunset, wide shot",
    "a red panda eats bamboo in the snow, close-up",
)


def load_live(arguments: Sequence[str]) -> LiveModel:
    """A model by the options of `python -m full_scale.generate`, loaded whole.

    Raises ValueError for options that mean nothing here, for image-to-video models, and for what does not fit together.
    """
    args, plain = parse_arguments(arguments), parse_arguments([])
    useless = [name for name in NOT_LIVE if getattr(args, name) != getattr(plain, name)]
    if useless:
        raise ValueError(
            f"--{useless[0]} means nothing here: prompts and seeds are typed on the page, nothing is saved."
        )
    models = pick_models(args)
    options = {name: getattr(args, name) for name in SAMPLING_OPTIONS}
    sampling = choose_sampling(models, args.num_output_frames, **options)
    return live_wan(models, sampling, num_frames=args.num_output_frames, height=args.height, width=args.width)


def live_wan(models: Models, sampling: Sampling, *, num_frames=21, height=480, width=832) -> LiveModel:
    """A text-to-video model of Wan's size. num_frames: of a whole clip, and how many are seen where there is no window.

    A block of 3 latent frames is 12 pictures. Raises ValueError for image-to-video models and sizes that do not fit.
    """
    check_size(height, width, models.sizes.patch_size)
    if models.sizes.model_type == "i2v":
        raise ValueError("An image-to-video model sees the image of a whole clip: use python -m full_scale.generate.")
    models.decoder  # noqa: B018  (small; if it cannot be loaded, nobody should wait for the transformer)
    uncond = read_prompt(models, None) if sampling.guidance_scale != 1 else {}
    transformer = models.transformer
    return LiveModel(
        generator=Guided(transformer, uncond, sampling.guidance_scale) if uncond else transformer,
        scheduler=sampling.scheduler,
        rollout=bounded(sampling.rollout, num_frames),
        frame_shape=(models.sizes.out_dim, height // STRIDE, width // STRIDE),
        check=checked,
        read=lambda prompt: read_prompt(models, prompt),
        decoder=lambda: VisitingStream(models.decoder, models.device, models.home),
        sampler=sampling.sampler,
        device=models.device,
        whole_clip=sampling.rollout.frames_per_block == num_frames,
        pictures_per_frame=4,
        fps=FPS,
        most_frames=max(num_frames, sampling.rollout.sink_frames, sampling.rollout.window_frames or 0),
        grammar="what is to be seen, in English or Chinese; long and exact prompts work best",
        examples=EXAMPLES,
    )


def read_prompt(models: Models, prompt: str | None) -> Mapping[str, Tensor]:
    """Its cond, or that of no prompt. With low_memory the text encoder goes when it has read, and is loaded again for
    the next prompt that is new."""
    cond = models.text.null(1) if prompt is None else models.text([prompt])
    if models.low_memory:
        models.text.free()
    return cond


def checked(prompt: str) -> str:
    """The prompt as the text encoder reads it. Raises ValueError for an empty one."""
    if not clean(prompt):
        raise ValueError("The prompt is empty: write what is to be seen.")
    return clean(prompt)
