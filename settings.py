"""The settings of a training run: their defaults, and one clear sentence for each way to get them wrong.

A run is configs/train.yaml composed by Hydra with a stage, an experiment and the command line. Its leaves are the
frozen dataclasses of the code that they configure, with their defaults. TrainingConfig speaks for a run: where it has
a field of SelfForcingConfig or RolloutConfig, whose defaults are the paper's, its own are those of the small world.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException, MissingConfigException, OverrideParseException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dynamic_video_sf import RolloutConfig, SelfForcingConfig
from moving_mnist import WorldConfig
from parametrisation import KINDS
from tiny_causal_wan import WanConfig

STAGES = ("teacher", "init", "self_forcing")
CHOICES = {
    "stage": STAGES,
    "autocast": ("auto", None, "bf16"),
    "optimizer": ("adamw", "muon"),
    "critic_optimizer": ("adamw", "muon"),
    "parametrisation": KINDS,
    "init": ("teacher_forcing", "diffusion_forcing", "ode_pairs", "consistency"),
}
COUNTS = ("num_steps", "max_steps", "batch_size", "micro_batch_size", "checkpoint_every", "sample_every")
COUNTS += ("num_previews", "short_clip_frames", "gradient_frames", "min_num_frames")
AT_LEAST_ZERO = ("seed", "warmup_steps", "short_clip_steps", "ema_start_step", "lr", "critic_lr", "weight_decay")
LEAST = dict.fromkeys(COUNTS, 1) | dict.fromkeys(AT_LEAST_ZERO, 0)
FRACTIONS = ("decay_fraction", "ema_decay", "prompt_dropout", "min_score_time", "short_clip_share", "shortest_share")


@dataclass(frozen=True)
class TrainingConfig:
    """Everything about training that is not the model, the world or the schedule. Steps, frames and samples are counts.

    A run ends after num_steps, or already after max_steps of them: a smoke test of the very same steps. batch_size is
    global; micro_batch_size (None: all at once) is what is held in memory, gradients accumulate. lr is that of Muon's
    matrices, other parameters get a tenth of it; with AdamW it is everybody's. The lr rises over warmup_steps
    and falls to zero over the last decay_fraction of the run. The first short_clip_steps steps, and short_clip_share
    of those after them, see only the first short_clip_frames of each clip. parametrisation says in
    what the error on data is measured. The rollout settings are those of SelfForcingConfig and RolloutConfig
    (denoising_steps in 0..1000), with defaults for the small world: every block takes all its steps and keeps the
    gradient of the last, and three critic updates share the rollout of the generator. autocast "auto" is bf16 where
    the device computes in it, null elsewhere. compile has torch.compile work on the networks that see whole clips,
    which pays in runs of many minutes; it needs a C++ compiler.
    """

    stage: str = "self_forcing"
    output_dir: str = "logs/training"
    seed: int = 0
    device: str = "auto"
    autocast: str | None = "auto"
    compile: bool = False

    num_steps: int = 300
    max_steps: int | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    optimizer: str = "adamw"
    critic_optimizer: str = "muon"
    lr: float = 2e-4
    critic_lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    decay_fraction: float = 0.0
    ema_decay: float = 0.98
    ema_start_step: int = 0

    pretrained_checkpoint: str | None = None
    teacher_checkpoint: str | None = None
    parametrisation: str = "flow"
    prompt_dropout: float = 0.1
    short_clip_steps: int = 0
    short_clip_frames: int = 3
    short_clip_share: float = 0.0
    init: str = "teacher_forcing"

    denoising_steps: tuple[float, ...] = (1000, 750, 500, 250)
    num_frames_per_block: int | tuple[int, ...] = 3
    context_noise: float = 0
    sink_frames: int = 0
    window_frames: int | None = 6
    sink_follows: bool = False
    cache_gradient: bool = False
    guidance_scale: float = 2.0
    fake_guidance_scale: float | None = None
    critic_steps: int = 3
    fresh_rollouts: bool = False
    exit_rule: str = "last"
    gradient_frames: int = 12
    min_num_frames: int = 12
    max_num_frames: int = 12
    shortest_share: float = 0.0
    min_score_time: float = 0.0
    ts_schedule: bool = False
    ts_schedule_max: bool = False

    checkpoint_every: int = 50
    sample_every: int = 50
    num_previews: int = 8

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, list):  # YAML has no tuples
                object.__setattr__(self, name, tuple(value))
            if name in CHOICES and value not in CHOICES[name]:
                allowed = ", ".join("null" if choice is None else choice for choice in CHOICES[name])
                raise ValueError(f"training.{name} must be one of {allowed}; got {value!r}.")
            if name in LEAST and value is not None and not value >= LEAST[name]:  # nor NaN
                raise ValueError(f"training.{name} must be at least {LEAST[name]}, got {value}.")
            if name in FRACTIONS and not 0 <= value <= 1:
                raise ValueError(f"training.{name} must lie between 0 and 1, got {value}.")
        if not self.max_grad_norm > 0:
            raise ValueError(f"training.max_grad_norm must be above 0, got {self.max_grad_norm}.")
        micro = self.micro_batch_size or self.batch_size
        if self.batch_size % micro:
            raise ValueError(
                f"training.batch_size={self.batch_size} is not a whole number of micro batches of {micro}; "
                "choose a micro_batch_size that divides it."
            )
        self.self_forcing  # noqa: B018  (says what is wrong with the rollout settings)

    @property
    def rollout(self) -> RolloutConfig:
        own = {f.name: getattr(self, f.name) for f in fields(RolloutConfig) if f.name != "frames_per_block"}
        return RolloutConfig(frames_per_block=self.num_frames_per_block, **own)

    @property
    def self_forcing(self) -> SelfForcingConfig:
        own = {f.name for f in fields(self)}
        shared = {f.name: getattr(self, f.name) for f in fields(SelfForcingConfig) if f.name in own}
        return SelfForcingConfig(rollout=self.rollout, **shared)

    @property
    def last_step(self) -> int:
        return min(self.num_steps, self.max_steps or self.num_steps)

    @property
    def updates(self) -> tuple[str, ...]:
        """The networks that a step updates, in order."""
        return ("generator",) + ("critic",) * (self.critic_steps if self.stage == "self_forcing" else 0)


GROUPS = {"training": TrainingConfig, "model": WanConfig, "world": WorldConfig}


def register_defaults() -> None:
    """Make every dataclass a config group entry: its defaults are written once, next to the code."""
    for name, kind in GROUPS.items():
        ConfigStore.instance().store(group="defaults", name=name, node={"_target_": target(kind), **asdict(kind())})


def target(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def load_config(overrides: Sequence[str]):
    """Compose configs/train.yaml with command-line overrides. Raises ValueError with one sentence."""
    register_defaults()
    with initialize_config_dir(str(Path(__file__).parent.resolve() / "configs"), version_base="1.3"):
        try:
            cfg = compose("train", overrides=list(overrides))
        except Exception as error:  # Hydra and OmegaConf raise many kinds; a user needs one sentence
            raise ValueError(explain(error, compose("train"))) from error
    for group, kind in GROUPS.items():
        if OmegaConf.select(cfg, f"{group}._target_") == target(kind):
            check_options(group, kind, OmegaConf.to_container(cfg[group], resolve=True))
    return cfg


def explain(error: Exception, cfg) -> str:
    """One sentence that names the fix."""
    message = str(error).split("\n")[0]
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override!r} cannot be read; options are written group.name=value, such as training.num_steps=50."
        )
    if isinstance(error, MissingConfigException) and error.options:
        return f"There is no {error.missing_cfg_file}; known are {', '.join(error.options)}."
    key = re.search(r"override '([^']+)'", message)
    if not key:
        return message
    group = key[1].rpartition(".")[0]
    return no_option(key[1], list(OmegaConf.select(cfg, group) or []) if group else list(cfg))


def no_option(option: str, known: Sequence[str]) -> str:
    group, dot, name = option.rpartition(".")
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {group}{dot}{near[0]}?" if near else f"known are {', '.join(known)}."
    return f"There is no option {option}; {hint}"


def check_options(group: str, kind: type, values: dict[str, Any]) -> None:
    """Refuse options that a dataclass does not have, and values that its annotations do not allow."""
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name == "_target_":
            continue
        if name not in hints:
            raise ValueError(no_option(f"{group}.{name}", list(hints)))
        if not allows(hints[name], value):
            spelled = hints[name].__name__ if type(hints[name]) is type else str(hints[name])
            for python, yaml in {"tuple": "list", "None": "null", " | ": " or "}.items():
                spelled = spelled.replace(python, yaml)
            raise ValueError(f"{group}.{name} must be {spelled}, got {value!r}.")


def allows(hint, value) -> bool:
    """Whether a value of a YAML file fits an annotation: a list is a tuple there, and an int will do for a float."""
    if isinstance(hint, UnionType):
        return any(allows(kind, value) for kind in hint.__args__)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            return False
        kinds = get_args(hint)
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return len(kinds) == len(value) and all(map(allows, kinds, value))
    return type(value) in ((int, float) if hint is float else (hint,))


def make_step(objective, codec=None) -> Callable:
    """The step of Algorithm 1 that an objective names, with the functions and numbers that it names beside it. A codec
    re-encodes where a clip is cut out of a longer rollout of the student's own."""
    options = {name: function(value) for name, value in objective.items() if name not in ("step", "needs", "critic")}
    step = function(objective.step)
    makes_videos = options.get("student_video")
    if codec and makes_videos and "reencode" in inspect.signature(makes_videos).parameters:
        options["student_video"] = partial(makes_videos, reencode=codec.reencode_last_frame)
    try:
        inspect.signature(step).bind_partial(**options)
    except TypeError as error:
        raise ValueError(f"{objective.step} does not go with these options of objective: {error}.") from error
    return partial(step, **options)


def function(value):
    """What a dotted path or a `_target_` names; numbers and switches are themselves."""
    if isinstance(value, str):
        return make({"_target_": "hydra.utils.get_method", "path": value})
    return make(value) if OmegaConf.is_config(value) else value


def make(node):
    """Build what a `_target_` names. Raises ValueError in one sentence if it refuses its options."""
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error
        while isinstance(cause, InstantiationException) and cause.__cause__:
            cause = cause.__cause__
        raise ValueError(str(cause) if isinstance(cause, ValueError) else " ".join(str(error).split())) from error
