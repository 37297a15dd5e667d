"""Train a stage of the course: `python train.py stage=teacher`, `stage=init`, or the default, `stage=self_forcing`.

    teacher        bidirectional flow matching on data
    init           the teacher made block-causal: teacher or diffusion forcing on data
    self_forcing   Algorithm 1 on the student's own rollouts, with the teacher and an online critic

One step is one generator update with its critic updates. The loop is a Python generator: it trains, and whoever
iterates it logs, draws and saves. Every random draw is a function of (seed, step, sample), so a run that was killed
and resumed ends with the very weights of one that was not. Options are those of the dataclasses; see
configs/train.yaml.
"""

import csv
import difflib
import os
import platform
import re
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_type_hints

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.utils import get_method, instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import EMA, atomic, fill, load_checkpoint, load_weights, locate, save_checkpoint
from dynamic_video_sf import (
    RolloutConfig,
    SelfForcingConfig,
    causal_forcing_loss,
    flow_matching_loss,
    self_forcing_step,
)
from flow_match import FlowMatchScheduler
from generate import SamplingConfig, sample
from moving_mnist import WorldConfig
from randomness import generator, generators, rand, randn
from tiny_causal_wan import WanConfig
from visualization import film_strip

STAGES = ("teacher", "init", "self_forcing")


@dataclass(frozen=True)
class TrainingConfig:
    """Everything about training that is not the model, the world or the schedule. Steps, frames and samples are counts.

    batch_size is global; micro_batch_size (None: all at once) is what is held in memory, gradients accumulate. lr is
    that of Muon's matrices, other parameters get a tenth of it; with AdamW it is everybody's. The lr rises over
    warmup_steps and falls to zero over the last decay_fraction of the run. The rollout settings are those of
    SelfForcingConfig and RolloutConfig (denoising_steps in 0..1000).
    """

    stage: str = "self_forcing"
    output_dir: str = "logs/training"
    seed: int = 0
    device: str = "auto"
    autocast: str | None = "bf16"

    num_steps: int = 300
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
    prompt_dropout: float = 0.1
    short_clip_steps: int = 0
    short_clip_frames: int = 3
    forcing: str = "teacher"

    denoising_steps: tuple[float, ...] = (1000, 750, 500, 250)
    num_frames_per_block: int | tuple[int, ...] = 3
    context_noise: float = 0
    sink_frames: int = 0
    window_frames: int | None = 6
    guidance_scale: float = 2.0
    fake_guidance_scale: float | None = None
    critic_steps: int = 3
    fresh_rollouts: bool = False
    exit_rule: str = "last"
    gradient_frames: int = 12
    min_num_frames: int = 12
    max_num_frames: int = 12
    min_score_time: float = 0.0
    ts_schedule: bool = False
    ts_schedule_max: bool = False

    checkpoint_every: int = 50
    sample_every: int = 50

    def __post_init__(self):
        check_types(self)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"training.{name} must be one of {', '.join(map(str, allowed))}; got {getattr(self, name)!r}."
                )
        micro = self.micro_batch_size or self.batch_size
        if self.batch_size < 1 or self.batch_size % micro:
            raise ValueError(
                f"training.batch_size={self.batch_size} is not a whole number of micro batches of {micro}; "
                "choose a micro_batch_size that divides it."
            )
        for name in ("num_steps", "checkpoint_every", "sample_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be at least 1.")
        self.self_forcing  # noqa: B018  (says what is wrong with the rollout settings)

    @property
    def rollout(self) -> RolloutConfig:
        return RolloutConfig(
            self.denoising_steps, self.num_frames_per_block, self.context_noise, self.sink_frames, self.window_frames
        )

    @property
    def self_forcing(self) -> SelfForcingConfig:
        own = {f.name for f in fields(self)}
        shared = {f.name: getattr(self, f.name) for f in fields(SelfForcingConfig) if f.name in own}
        return SelfForcingConfig(rollout=self.rollout, **shared)

    @property
    def updates(self) -> tuple[str, ...]:
        """The networks that a step updates, in order."""
        return ("generator",) + ("critic",) * (self.critic_steps if self.stage == "self_forcing" else 0)


CHOICES = {
    "stage": STAGES,
    "autocast": (None, "bf16"),
    "optimizer": ("adamw", "muon"),
    "critic_optimizer": ("adamw", "muon"),
    "forcing": ("teacher", "diffusion"),
}


def check_types(config) -> None:
    """Values from a command line may be of any type: refuse what a dataclass's annotation does not allow."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, list):
            object.__setattr__(config, name, value := tuple(value))
        kinds = hint.__args__ if isinstance(hint, UnionType) else (hint,)
        allowed = {getattr(kind, "__origin__", kind) for kind in kinds}  # tuple[int, ...] is a tuple
        allowed |= {int} if float in allowed else set()
        if not isinstance(value, tuple(allowed)) or (isinstance(value, bool) and bool not in allowed):
            names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in allowed)
            raise ValueError(f"training.{name} must be {names}, got {value!r}.")


# ------------------------------------------------------------------------------------------------------- one run


@dataclass
class Run:
    """What training changes (networks, optimizers, average, step) and what it reads."""

    config: TrainingConfig
    record: dict
    scheduler: FlowMatchScheduler
    data: Any
    encoder: Any
    networks: dict[str, nn.Module]
    optimizers: dict[str, list[torch.optim.Optimizer]]
    ema: EMA
    teacher: nn.Module | None = None
    step: int = 0
    seconds: float = 0.0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def state_dict(self) -> dict:
        """The checkpoint schema of checkpoint.py."""
        critic = self.networks.get("critic")
        return {
            "generator_state_dict": self.networks["generator"].state_dict(),
            "critic_state_dict": critic and critic.state_dict(),
            "ema_state_dict": self.ema.state_dict(),
            "optimizer_state_dict": [o.state_dict() for o in self.optimizers["generator"]],
            "critic_optimizer_state_dict": [o.state_dict() for o in self.optimizers.get("critic", [])],
            "rng_state": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
            "training_type": "dmd2" if self.config.stage == "self_forcing" else self.config.stage,
            "config": self.record,
            "command": "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "machine": machine(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.networks["generator"].load_state_dict(state["generator_state_dict"])
        self.ema.load_state_dict(state["ema_state_dict"])
        states = {"generator": state["optimizer_state_dict"], "critic": state["critic_optimizer_state_dict"]}
        if "critic" in self.networks:
            self.networks["critic"].load_state_dict(state["critic_state_dict"])
        for name, optimizers in self.optimizers.items():
            for optimizer, saved in zip(optimizers, states[name], strict=True):
                optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng_state"])
        self.step, self.seconds = state["step"], state["seconds"]


def build(cfg) -> Run:
    """A run at step 0 out of the composed config."""
    config: TrainingConfig = instantiate(cfg.training, _convert_="all")
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    networks = {"generator": network(cfg.generator, cfg, config.pretrained_checkpoint, device)}
    teacher = None
    if config.stage == "self_forcing":
        if not (config.pretrained_checkpoint and config.teacher_checkpoint):
            raise ValueError("stage=self_forcing needs training.pretrained_checkpoint and training.teacher_checkpoint.")
        teacher = network(cfg.real_score, cfg, config.teacher_checkpoint, device).requires_grad_(False)
        networks["critic"] = network(cfg.fake_score, cfg, config.teacher_checkpoint, device)
    optimizers = {"generator": make_optimizers(networks["generator"], config.optimizer, config.lr, config)}
    if "critic" in networks:
        optimizers["critic"] = make_optimizers(networks["critic"], config.critic_optimizer, config.critic_lr, config)
    return Run(
        config,
        OmegaConf.to_container(cfg, resolve=True),
        instantiate(cfg.scheduler, _convert_="all"),
        instantiate(cfg.data, _convert_="all"),
        instantiate(cfg.encoder, _convert_="all"),
        networks,
        optimizers,
        EMA(networks["generator"], config.ema_decay, config.ema_start_step),
        teacher,
        device=device,
    )


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def network(builder, cfg, checkpoint: str | None, device) -> nn.Module:
    model = instantiate(builder, _convert_="all")
    if cfg.attention:
        model.attention = get_method(cfg.attention)
    if checkpoint:
        fill(model, load_weights(locate(checkpoint)).state_dict, checkpoint)
    if any(p.dtype != torch.float32 for p in model.parameters()):
        raise ValueError(
            "Master weights must be float32: small updates vanish in half precision. Use training.autocast."
        )
    return model.to(device)


def make_optimizers(model: nn.Module, kind: str, lr: float, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """AdamW or, for the matrices inside the layers, Muon with AdamW for the rest; each remembers its base lr."""
    muon = [p for name, p in model.named_parameters() if kind == "muon" and p.ndim == 2 and "blocks." in name]
    chosen = {id(p) for p in muon}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    options = {"weight_decay": config.weight_decay}
    optimizers = [torch.optim.AdamW(rest, lr=lr / 10 if muon else lr, betas=tuple(config.betas), **options)]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=lr, **options))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


# ------------------------------------------------------------------------------------------------------ one step


def teacher_losses(run: Run, samples: Sequence[int], rng, observe) -> Iterator[tuple[str, Tensor]]:
    video, cond = clips(run, samples, rng)
    model = run.networks["generator"]
    yield "generator", flow_matching_loss(model, run.scheduler, video, cond, rng=rng, observe=observe)


def init_losses(run: Run, samples: Sequence[int], rng, observe) -> Iterator[tuple[str, Tensor]]:
    video, cond = clips(run, samples, rng)
    forced = run.config.forcing == "teacher"
    yield (
        "generator",
        causal_forcing_loss(
            run.networks["generator"], run.scheduler, video, cond, run.config.rollout, teacher_forcing=forced, rng=rng
        ),
    )


def self_forcing_losses(run: Run, samples: Sequence[int], rng, observe) -> Iterator[tuple[str, Tensor]]:
    config = run.config.self_forcing
    batch = run.data.batch(samples)
    cond, uncond = to(run.encoder(batch["prompts"]), run.device), to(run.encoder.null(len(samples)), run.device)
    shape = (len(samples), config.max_num_frames, *batch["video"].shape[2:])
    yield from self_forcing_step(
        run.networks["generator"],
        run.teacher,
        run.networks["critic"],
        run.scheduler,
        randn(shape, rng, device=run.device),
        cond,
        uncond,
        config,
        rng=rng,
        shared_rng=generator(run.config.seed, run.step, "shared"),
        observe=lambda name, **values: observe(name=name, **values),
    )


LOSSES = {"teacher": teacher_losses, "init": init_losses, "self_forcing": self_forcing_losses}


def clips(run: Run, samples: Sequence[int], rng) -> tuple[Tensor, dict[str, Tensor]]:
    """Data and prompts, some of them dropped; only short clips at the beginning, when looks are still being learned."""
    batch = run.data.batch(samples)
    video = batch["video"]
    if run.step < run.config.short_clip_steps:
        video = video[:, : run.config.short_clip_frames]
    dropped = rand((len(samples), 1), rng)[:, 0] < run.config.prompt_dropout
    prompts = ["" if drop else prompt for drop, prompt in zip(dropped, batch["prompts"], strict=True)]
    return video.to(run.device), to(run.encoder(prompts), run.device)


def training_loop(run: Run) -> Iterator[dict[str, float]]:
    """Train to `num_steps`, yielding what each step reports; `run.step` is already counted up."""
    config = run.config
    micro = config.micro_batch_size or config.batch_size
    while run.step < config.num_steps:
        start, report = time.perf_counter(), Report()
        first = run.step * config.batch_size
        streams = []
        for begin in range(first, first + config.batch_size, micro):
            samples = range(begin, begin + micro)
            rng = generators(config.seed, run.step, "train", samples=samples)
            streams.append(LOSSES[config.stage](run, samples, rng, report.observe))
        for name in config.updates:
            update(run, name, streams, report)
        run.step += 1
        run.ema.update(run.step)
        run.seconds += time.perf_counter() - start
        yield {"step": run.step, "seconds": run.seconds, **report.means()}


def update(run: Run, name: str, streams: list[Iterator[tuple[str, Tensor]]], report: "Report") -> None:
    """One optimizer step of one network: the next loss of every micro batch, averaged."""
    model, optimizers = run.networks[name], run.optimizers[name]
    model.zero_grad(set_to_none=True)  # also what a generator loss may have left in the critic
    for stream in streams:
        with autocast(run):
            loss_of, loss = next(stream)
        assert loss_of == name
        (loss / len(streams)).backward()
        report.add(f"{name}_loss", loss.item())
    norm = nn.utils.clip_grad_norm_(model.parameters(), run.config.max_grad_norm)
    if not norm.isfinite():
        raise FloatingPointError(
            f"The gradient of the {name} is not finite at step {run.step}; lower its learning rate."
        )
    report.add(f"{name}_grad_norm", norm.item())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_scale(run.step, run.config)
        optimizer.step()


def lr_scale(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, constant, linear decay to (almost) zero."""
    rise = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay_steps = config.decay_fraction * config.num_steps
    return rise * (min(1.0, (config.num_steps - step) / decay_steps) if decay_steps else 1.0)


def autocast(run: Run):
    if run.config.autocast is None:
        return nullcontext()
    return torch.autocast(run.device.type, torch.bfloat16)


def to(cond: dict[str, Tensor], device) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in cond.items()}


class Report:
    """Means of what one step's losses say about themselves; flow errors also per quarter of the noise range."""

    def __init__(self):
        self.values = defaultdict(list)

    def add(self, name: str, value: float) -> None:
        self.values[name].append(value)

    def observe(self, t: Tensor, name: str = "generator", error: Tensor | None = None, **values: Tensor) -> None:
        for key, value in values.items():
            self.add(key, value.mean().item())
        if error is not None:
            level = t.float().reshape(len(error), -1).mean(1)
            for each, at in zip(error.tolist(), level.tolist(), strict=True):
                self.add(f"{name}_flow_error_t{min(int(at * 4), 3) / 4:.2f}", each)

    def means(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in sorted(self.values.items())}


# ------------------------------------------------------------------------------------------- around the loop


COLUMNS = [
    *("step", "seconds", "generator_loss", "generator_grad_norm", "critic_loss", "critic_grad_norm"),
    *("score_distance", "normaliser", "sample_ink", "sample_speed"),
    *(f"{name}_flow_error_t{level}" for name in ("generator", "critic") for level in ("0.00", "0.25", "0.50", "0.75")),
]


def fit(cfg) -> Path:
    """Train one stage to its end and return checkpoint_final.pt; resumes an unfinished run of the same config."""
    run = build(cfg)
    folder = prepare_folder(run)
    last, final = folder / "checkpoint_last.pt", folder / "checkpoint_final.pt"
    if last.exists():
        run.load_state_dict(load_checkpoint(last))
        print(f"Resuming {folder} at step {run.step}.")
    stop = Interrupt()
    wandb = start_wandb(cfg, folder)
    with open_log(folder / "metrics.csv", run.step) as log, stop:
        loop = training_loop(run)
        bar = tqdm(loop, initial=run.step, total=run.config.num_steps, desc=run.config.stage, unit="step")
        for values in bar:
            if run.step % run.config.sample_every == 0 or run.step == run.config.num_steps:
                values |= preview(run, folder)
            log.writerow(values)
            wandb(values)
            bar.set_postfix({k: f"{v:.3g}" for k, v in values.items() if k.endswith("_loss")})
            if run.step % run.config.checkpoint_every == 0 or stop.asked:
                save_checkpoint(last, run.state_dict())
            if stop.asked:
                sys.exit(f"Stopped at step {run.step}; the same command goes on from there.")
    save_checkpoint(final, run.state_dict())
    last.unlink(missing_ok=True)
    print(f"{final}: {run.step} steps in {run.seconds:.0f} s")
    return final


def prepare_folder(run: Run) -> Path:
    """The run's folder, holding its config; what is there but cannot be resumed is moved aside."""
    folder = Path(run.config.output_dir)
    written = folder / "config.yaml"
    config = OmegaConf.to_yaml(OmegaConf.create(run.record))
    if folder.exists() and any(folder.iterdir()):
        same = written.exists() and written.read_text() == config
        if not same or (folder / "checkpoint_final.pt").exists():
            number = 1
            while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
                number += 1
            shutil.move(folder, aside)
            print(f"{folder} held another run: moved to {aside}.")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(written) as temporary:
        temporary.write_text(config)
    return folder


class open_log:
    """metrics.csv as a writer whose rows are on disk at once; rows past the resumed step are dropped."""

    def __init__(self, path: Path, step: int):
        rows = list(csv.DictReader(path.open())) if path.exists() else []
        with atomic(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(row for row in rows if row["step"].isdigit() and int(row["step"]) <= step)
        self.path = path

    def __enter__(self):
        self.file = self.path.open("a", newline="", buffering=1)
        return csv.DictWriter(self.file, COLUMNS)

    def __exit__(self, *error):
        self.file.close()


class Interrupt:
    """Ctrl-C or SIGTERM asks for a stop after the step at hand, when everything is consistent; twice stops at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def preview(run: Run, folder: Path) -> dict[str, float]:
    """A strip of eight fixed prompts from fixed noise, drawn to samples/; its ink and its speed."""
    weights = run.ema.state_dict()
    model = run.networks["generator"]
    trained = {name: p.detach().clone() for name, p in model.state_dict().items()}
    if weights:
        model.load_state_dict(weights, strict=False)
    batch = run.data.batch(range(8))
    sampling = SamplingConfig.of(asdict(run.config))
    with autocast(run):
        video = sample(
            model,
            run.scheduler,
            run.encoder,
            batch["prompts"],
            sampling,
            batch["video"].shape[1:],
            seed=run.config.seed,
        )
    model.load_state_dict(trained)
    film_strip(video, folder / "samples" / f"step_{run.step:06d}.png", labels=batch["prompts"])
    shown = (video + 1) / 2
    return {"sample_ink": shown.mean().item(), "sample_speed": shown.diff(dim=1).abs().mean().item()}


def start_wandb(cfg, folder: Path):
    """A function that logs a row to wandb, or does nothing: wandb is off unless asked for."""
    if cfg.wandb.mode == "disabled":
        return lambda values: None
    import wandb

    run = wandb.init(
        project=cfg.wandb.project,
        mode=cfg.wandb.mode,
        dir=str(folder),
        config=OmegaConf.to_container(cfg, resolve=True),
    )
    return lambda values: run.log(values, step=values["step"])


# ------------------------------------------------------------------------------------------------- command line


def register_defaults() -> None:
    """Make every dataclass a config group entry: its defaults are written once, next to the code."""
    for name, kind in {"training": TrainingConfig, "model": WanConfig, "world": WorldConfig}.items():
        node = {"_target_": f"{kind.__module__}.{kind.__qualname__}", **asdict(kind())}
        if kind is TrainingConfig:
            node["_target_"] = "train.TrainingConfig"
        ConfigStore.instance().store(group="defaults", name=name, node=node)


def load_config(overrides: Sequence[str]):
    """Compose configs/train.yaml with command-line overrides. Raises ValueError with one sentence."""
    register_defaults()
    with initialize_config_dir(str(Path(__file__).parent.resolve() / "configs"), version_base="1.3"):
        try:
            return compose("train", overrides=list(overrides))
        except Exception as error:  # Hydra and OmegaConf raise many kinds; a user needs one sentence
            raise ValueError(explain(error, compose("train"))) from error


def explain(error: Exception, cfg) -> str:
    message = str(error).split("\n")[0]
    key = re.search(r"override '([^']+)'", message)
    if not key:
        return message
    group, _, name = key[1].rpartition(".")
    known = list(OmegaConf.select(cfg, group) or []) if group else list(cfg)
    near = difflib.get_close_matches(name, known, n=1)
    place = f"{group}." if group else ""
    hint = f"did you mean {place}{near[0]}?" if near else f"known are {', '.join(map(str, known))}."
    return f"There is no option {key[1]}; {hint}"


def main(overrides: Sequence[str]) -> Path:
    """Compose, check and run: one stage, or the stages that an experiment lists, each from the one before."""
    cfg = load_config(overrides)
    if not cfg.stages:
        return fit(cfg)
    own = [o for o in overrides if not o.startswith(("experiment=", "stage="))]
    made: dict[str, Path] = {}
    for stage, settings in cfg.stages.items():
        wiring = [f"training.output_dir={cfg.training.output_dir}/{stage}"]
        if stage == "init":
            wiring += [f"training.pretrained_checkpoint={made['teacher']}"]
        if stage == "self_forcing":
            wiring += [
                f"training.pretrained_checkpoint={made['init']}",
                f"training.teacher_checkpoint={made['teacher']}",
            ]
        made[stage] = fit_once(load_config([f"stage={stage}", *settings, *own, *wiring]))
    return made[stage]


def fit_once(cfg) -> Path:
    """A stage of an experiment: finished ones are not run again."""
    folder = Path(cfg.training.output_dir)
    final, written = folder / "checkpoint_final.pt", folder / "config.yaml"
    resolved = OmegaConf.to_yaml(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)))
    if final.exists() and written.exists() and written.read_text() == resolved:
        print(f"{final} is there already.")
        return final
    return fit(cfg)


def machine() -> dict[str, Any]:
    """What a logged result says of where it was made."""
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


class SimplifiedTrainer:
    """Training under the name of older documents: SimplifiedTrainer("training.num_steps=10").train()."""

    def __init__(self, *overrides: str):
        self.overrides = overrides

    def train(self) -> Path:
        return main(self.overrides)


def root_cause(error: BaseException) -> BaseException:
    """Hydra wraps what a dataclass says; the sentence is in the innermost error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    except Exception as error:
        if not isinstance(root_cause(error), ValueError):
            raise
        sys.exit(f"train.py: {root_cause(error)}")
