"""Train a stage of the course: `python train.py stage=teacher`, `stage=init`, or the default, `stage=self_forcing`.

    teacher        bidirectional flow matching on data
    init           the teacher made block-causal: teacher or diffusion forcing on data
    self_forcing   Algorithm 1 on the student's own rollouts, with the teacher and an online critic

One step is one generator update with its critic updates. The loop is a Python generator: it trains, and whoever
iterates it logs, draws and saves. Every random draw is a function of (seed, step, sample), so a run that was killed
and resumed ends with the very weights of one that was not. Options are those of the dataclasses; see
configs/train.yaml.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import EMA, Weights, fill, load_checkpoint, load_weights, locate, save_checkpoint
from dynamic_video_sf import causal_forcing_loss, consistency_loss, flow_matching_loss, ode_regression_loss
from flow_match import FlowMatchScheduler
from generate import SamplingConfig, sample
from kv_cache import block_sizes
from randomness import generator, generators, rand, randn
from run_folder import (
    Evaluations,
    Interrupt,
    can_resume,
    holds,
    is_current,
    keep_freed_memory,
    machine,
    open_log,
    prepare_folder,
    wandb_log,
)
from settings import TrainingConfig, function, load_config, make, make_step
from visualization import film_strip

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
    algorithm: Callable | None = None
    evaluations: Evaluations | None = None
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


def build(cfg, resuming: bool = False) -> Run:
    """A run at step 0 out of the composed config; when resuming, what it trains needs no weights to start from."""
    config: TrainingConfig = make(cfg.training)
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    start = None if resuming or not config.pretrained_checkpoint else load_weights(locate(config.pretrained_checkpoint))
    networks = {"generator": network(cfg.generator, cfg, start, device)}
    teacher, critic, algorithm = scores(cfg, config, device)
    if critic:
        networks["critic"] = critic
    if config.compile:  # not what rolls out: it would be compiled anew for every length of its cache
        whole_clip = [teacher, networks["critic"]] if algorithm else [networks["generator"]]
        for layer in (layer for model in whole_clip for layer in getattr(model, "blocks", ())):
            layer.compile(dynamic=False)
    optimizers = {"generator": make_optimizers(networks["generator"], config.optimizer, config.lr, config)}
    if "critic" in networks:
        optimizers["critic"] = make_optimizers(networks["critic"], config.critic_optimizer, config.critic_lr, config)
    run = Run(
        config,
        OmegaConf.to_container(cfg, resolve=True),
        make(cfg.scheduler),
        make(cfg.data),
        make(cfg.encoder),
        networks,
        optimizers,
        EMA(networks["generator"], config.ema_decay, config.ema_start_step),
        teacher,
        algorithm,
        Evaluations([*networks.values(), *([teacher] if teacher else [])]),
        device=device,
    )
    check_shapes(run)
    return run


def scores(cfg, config: TrainingConfig, device) -> tuple[nn.Module | None, nn.Module | None, Callable | None]:
    """The frozen teacher, the critic and the step of the algorithm, as far as the stage has them."""
    kind = {"self_forcing": "teacher", "init": "init"}.get(config.stage)
    if not kind or (kind == "init" and config.init != "consistency"):
        return None, None, None
    if not (config.pretrained_checkpoint and config.teacher_checkpoint):
        raise ValueError(f"stage={config.stage} needs training.pretrained_checkpoint and training.teacher_checkpoint.")
    weights = load_weights(locate(config.teacher_checkpoint))
    check_teacher(weights, kind)
    teacher = network(cfg.real_score, cfg, weights, device).requires_grad_(False)
    if kind == "init":
        return teacher, None, None
    critic = network(cfg.fake_score, cfg, weights, device)
    if "critic" in cfg.objective:
        critic = function(cfg.objective.critic)(critic).to(device)
    return teacher if "teacher" in cfg.objective.needs else None, critic, make_step(cfg.objective)


def check_teacher(weights: Weights, kind: str) -> None:
    """A score sees whole clips, a consistency teacher blocks: the other's weights have the same shapes and would teach
    nonsense. Raises ValueError."""
    stage = weights.config.get("training", {}).get("stage", kind)
    if stage != kind:
        raise ValueError(
            f"{weights.path} was made by stage={stage}; training.teacher_checkpoint needs one of stage={kind}."
        )


def check_shapes(run: Run) -> None:
    """Data, model and blocks must fit together: say so now, not at the first sample. Raises ValueError."""
    split = run.record["world"]["split"]
    if split != "train":
        raise ValueError(f"world.split must be train, got {split}: the other digits are kept for measuring.")
    batch = run.data.batch([0])
    _, num_frames, channels, *_ = batch["video"].shape
    model = run.networks["generator"].config
    text_dim = run.encoder(batch["prompts"])["prompt_embeds"].shape[-1]
    if text_dim != model.text_dim:
        raise ValueError(f"Prompts are encoded with {text_dim} numbers per word: set model.text_dim to {text_dim}.")
    if channels != model.out_dim or (model.model_type == "t2v" and channels != model.in_dim):
        raise ValueError(f"Videos have {channels} channels: set model.in_dim and model.out_dim to {channels}.")
    if run.algorithm and "data" in run.record["objective"]["needs"] and num_frames < run.config.max_num_frames:
        raise ValueError(
            f"This objective starts from data of {num_frames} frames: set training.max_num_frames to no more."
        )
    if run.config.stage != "teacher":
        block_sizes(num_frames, run.config.num_frames_per_block)
    if run.config.stage == "init" and run.config.short_clip_steps:
        block_sizes(min(num_frames, run.config.short_clip_frames), run.config.num_frames_per_block)


def pick_device(name: str) -> torch.device:
    found = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    if name == "auto":
        name = "cuda" if "cuda" in found else "cpu"
    if name.split(":")[0] not in found:
        raise ValueError(f"training.device={name} is not to be had on this machine; use {' or '.join(found)}.")
    return torch.device(name)


def network(builder, cfg, weights: Weights | None, device) -> nn.Module:
    model = make(builder)
    if cfg.attention:
        model.attention = function(cfg.attention)
    if weights:
        fill(model, weights.state_dict, weights.path)
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
    options = {"parametrisation": run.config.parametrisation, "rng": rng, "observe": observe}
    yield "generator", flow_matching_loss(model, run.scheduler, video, cond, **options)


def init_losses(run: Run, samples: Sequence[int], rng, observe) -> Iterator[tuple[str, Tensor]]:
    model, config = run.networks["generator"], run.config
    given = {"config": config.rollout, "rng": rng}
    if config.init == "ode_pairs":
        batch = run.data.batch(samples)
        cond, states = to(run.encoder(batch["prompts"]), run.device), batch["trajectory"].to(run.device)
        times = [*run.scheduler.denoising_times(batch["steps"]), 0.0]
        forced = batch["causal"]
        loss = ode_regression_loss(model, run.scheduler, states, times, cond, teacher_forcing=forced, **given)
    elif config.init == "consistency":
        video, cond = clips(run, samples, rng)
        uncond = to(run.encoder.null(len(samples)), run.device)
        guided = {"uncond": uncond, "guidance_scale": config.guidance_scale}
        loss = consistency_loss(model, model, run.teacher, run.scheduler, video, cond, **guided, **given)
    else:
        video, cond = clips(run, samples, rng)
        forced = config.init == "teacher_forcing"
        given |= {"teacher_forcing": forced, "parametrisation": config.parametrisation}
        loss = causal_forcing_loss(model, run.scheduler, video, cond, **given)
    yield "generator", loss


def self_forcing_losses(run: Run, samples: Sequence[int], rng, observe) -> Iterator[tuple[str, Tensor]]:
    config = run.config.self_forcing
    batch = run.data.batch(samples)
    cond, uncond = to(run.encoder(batch["prompts"]), run.device), to(run.encoder.null(len(samples)), run.device)
    shape = (len(samples), config.max_num_frames, *batch["video"].shape[2:])
    yield from run.algorithm(
        run.networks["generator"],
        run.teacher,
        run.networks["critic"],
        run.scheduler,
        randn(shape, rng, device=run.device),
        cond,
        uncond,
        config,
        data=batch["video"].to(run.device),
        rng=rng,
        shared_rng=generator(run.config.seed, run.step, "shared"),
        observe=lambda name, **values: observe(name=name, **values),
    )


LOSSES = {"teacher": teacher_losses, "init": init_losses, "self_forcing": self_forcing_losses}


def clips(run: Run, samples: Sequence[int], rng) -> tuple[Tensor, dict[str, Tensor]]:
    """Data and prompts, some of them dropped; at the beginning, and in a share of the steps after, short clips.

    Short clips teach looks cheaply, and only they made the teacher tell the prompted direction from its opposite: a
    long clip gives it away.
    """
    batch = run.data.batch(samples)
    video = batch["video"]
    share = rand((1,), generator(run.config.seed, run.step, "clip length")).item()
    if run.step < run.config.short_clip_steps or share < run.config.short_clip_share:
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
        run.evaluations.take()
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
        yield {"step": run.step, "seconds": run.seconds, "evaluations": run.evaluations.take(), **report.means()}


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
    kind = run.config.autocast
    if kind == "auto":
        kind = "bf16" if computes_in_bf16(run.device) else None
    return torch.autocast(run.device.type, torch.bfloat16) if kind else nullcontext()


@lru_cache
def computes_in_bf16(device: torch.device) -> bool:
    """Whether bf16 is native: a CPU that emulates it is slower than in fp32 (docs/trials.md)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def to(cond: dict[str, Tensor], device) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in cond.items()}


class Report:
    """Means of what one step's losses say about themselves; flow errors also per quarter of the noise range."""

    def __init__(self):
        self.values = defaultdict(list)

    def add(self, name: str, value: float) -> None:
        self.values[name].append(value)

    def observe(self, t: Tensor | None = None, name="generator", error: Tensor | None = None, **values: Tensor) -> None:
        for key, value in values.items():
            self.add(key, value.mean().item())
        if error is not None:
            level = t.float().reshape(len(error), -1).mean(1)
            for each, at in zip(error.tolist(), level.tolist(), strict=True):
                self.add(f"{name}_flow_error_t{min(int(at * 4), 3) / 4:.2f}", each)

    def means(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in sorted(self.values.items())}


# ------------------------------------------------------------------------------------------- around the loop


def fit(cfg) -> Path:
    """Train one stage to its end and return checkpoint_final.pt; resumes an unfinished run of the same config."""
    keep_freed_memory()
    record = OmegaConf.to_yaml(cfg, resolve=True)
    run = build(cfg, resuming=can_resume(cfg.training, record))
    folder = prepare_folder(run.config, record)
    last, final = folder / "checkpoint_last.pt", folder / "checkpoint_final.pt"
    if last.exists():
        run.load_state_dict(load_checkpoint(last))
        print(f"Resuming {folder} at step {run.step}.")
    stop = Interrupt()
    with open_log(folder / "metrics.csv", run.step) as log, wandb_log(cfg, folder) as wandb, stop:
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


def preview(run: Run, folder: Path) -> dict[str, float]:
    """A strip of eight fixed prompts from fixed noise, drawn to samples/; its ink and its speed."""
    weights = run.ema.state_dict()
    model = run.networks["generator"]
    trained = {name: p.detach().clone() for name, p in model.state_dict().items()}
    if weights:
        model.load_state_dict(weights, strict=False)
    batch = run.data.batch(range(8))
    sampling = SamplingConfig.of(asdict(run.config), batch["video"].shape[1])
    with autocast(run), torch.compiler.set_stance("force_eager"):
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


# ------------------------------------------------------------------------------------------------- command line


# Where a stage starts when stages run in a row: at the latest weights of itself, if it is listed twice, or of another.
SOURCES = {
    "teacher": {"pretrained_checkpoint": ("teacher",)},
    "init": {"pretrained_checkpoint": ("init", "teacher")},
    "self_forcing": {"pretrained_checkpoint": ("self_forcing", "init"), "teacher_checkpoint": ("teacher",)},
}


STAGE_OF = {"objective": "self_forcing", "init": "init"}  # whose config groups these are


def group_of(override: str) -> str:
    """`objective` of "objective=sf_sid" and of "objective.loss=..."."""
    return override.partition("=")[0].partition(".")[0]


def main(overrides: Sequence[str]) -> Path:
    """Compose, check and run: one stage, or the stages that an experiment lists, each from the one before."""
    cfg = load_config(overrides)
    if not cfg.stages:
        stage = cfg.training.stage
        if foreign := next((group for group in map(group_of, overrides) if STAGE_OF.get(group, stage) != stage), None):
            raise ValueError(f"{foreign}= says how stage={STAGE_OF[foreign]} learns; stage={stage} has none.")
        return fit(cfg)
    if any(override.startswith("stage=") for override in overrides):
        raise ValueError("This experiment lists its stages: leave out stage=, finished ones are not run again.")
    made: dict[str, Path] = {}
    for name, settings in cfg.stages.items():
        own = [override for override in overrides if STAGE_OF.get(group_of(override), stage_of(name)) == stage_of(name)]
        one = load_config([f"stage={stage_of(name)}", *settings, *own])
        one.stages, one.training.output_dir = None, f"{cfg.training.output_dir}/{name}"
        stage = one.training.stage
        for option, sources in SOURCES[stage].items():
            if latest := next((made[source] for source in sources if source in made), None):
                one.training[option] = str(latest)
        made[stage] = fit_once(one)
    return made[stage]


def stage_of(name: str) -> str:
    """`teacher` of "teacher", "teacher_2", ...: a stage may be listed several times, each going on from the last."""
    return name.rstrip("0123456789").rstrip("_")


def fit_once(cfg) -> Path:
    """A stage of an experiment: finished ones are not run again."""
    final = Path(cfg.training.output_dir) / "checkpoint_final.pt"
    if holds(final.parent, OmegaConf.to_yaml(cfg, resolve=True)) and is_current(final, cfg.training):
        print(f"{final} is there already.")
        return final
    return fit(cfg)


class SimplifiedTrainer:
    """Training under the name of older documents: SimplifiedTrainer("training.num_steps=10").train()."""

    def __init__(self, *overrides: str):
        self.overrides = overrides

    def train(self) -> Path:
        return main(self.overrides)


if __name__ == "__main__":
    if {"-h", "--help"} & {*sys.argv}:
        sys.exit(print(__doc__))
    try:
        main(sys.argv[1:])
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"train.py: {error}")
