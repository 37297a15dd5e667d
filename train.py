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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import EMA, Weights, fill, load_weights, locate
from dynamic_video_sf import causal_forcing_loss, consistency_loss, flow_matching_loss, ode_regression_loss
from flow_match import FlowMatchScheduler
from generate import SamplingConfig, sample_blocks, sample_keys
from kv_cache import block_sizes
from precision import autocast, bf16_products
from processes import OneProcess
from randomness import generator, generators, rand, randn
from run_folder import (
    Evaluations,
    Interrupt,
    can_resume,
    find,
    holds,
    is_current,
    keep_freed_memory,
    machine,
    open_logs,
    prepare_folder,
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
    processes: Any = field(default_factory=lambda: OneProcess("cpu"))
    codec: Any = None
    step: int = 0
    seconds: float = 0.0

    @property
    def device(self) -> torch.device:
        return self.processes.device

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
    processes = make(cfg.processes)
    start = None if resuming else weights_for(cfg.generator, config.pretrained_checkpoint)
    networks = {"generator": place(network(cfg.generator, cfg, start), processes)}
    codec = make(cfg.codec) if cfg.codec else None
    teacher, critic, algorithm = scores(cfg, config, processes, codec)
    if critic:
        networks["critic"] = critic
    if config.compile:  # not what rolls out: it would be compiled anew for every length of its cache
        whole_clip = [teacher, networks["critic"]] if algorithm else [networks["generator"]]
        for layer in (layer for model in whole_clip for layer in getattr(model, "blocks", ())):
            layer.compile(dynamic=False)
    optimizers = {"generator": make_optimizers(networks["generator"], config.optimizer, config.lr, config)}
    if "critic" in networks:
        optimizers["critic"] = make_optimizers(networks["critic"], config.critic_optimizer, config.critic_lr, config)
    encoder = make(cfg.encoder)
    if getattr(encoder, "sharded", False):
        encoder.place = partial(processes.place, trained=False)
    record = OmegaConf.to_container(cfg, resolve=True)
    if "path" in cfg.generator:  # it knows its own sizes
        record["model"] = asdict(networks["generator"].config)
    run = Run(
        config,
        record,
        make(cfg.scheduler),
        make(cfg.data),
        encoder,
        networks,
        optimizers,
        EMA(networks["generator"], config.ema_decay, config.ema_start_step),
        teacher,
        algorithm,
        Evaluations([*networks.values(), *([teacher] if teacher else [])]),
        processes,
        codec,
    )
    check_shapes(run)
    return run


def scores(cfg, config: TrainingConfig, processes, codec) -> tuple[nn.Module | None, nn.Module | None, Callable | None]:
    """The frozen teacher, the critic and the step of the algorithm, as far as the stage has them."""
    kind = {"self_forcing": "teacher", "init": "init"}.get(config.stage)
    if not kind or (kind == "init" and config.init != "consistency"):
        return None, None, None
    if not (config.pretrained_checkpoint and config.teacher_checkpoint):
        raise ValueError(f"stage={config.stage} needs training.pretrained_checkpoint and training.teacher_checkpoint.")
    weights = weights_for(cfg.real_score, config.teacher_checkpoint)
    if weights:
        check_teacher(weights, kind)
    teacher = None
    if kind == "init" or "teacher" in cfg.objective.needs:
        teacher = network(cfg.real_score, cfg, weights).requires_grad_(False)
        teacher = place(teacher, processes, trained=False)
    if kind == "init":
        return teacher, None, None
    critic = network(cfg.fake_score, cfg, weights)
    if "critic" in cfg.objective:
        critic = function(cfg.objective.critic)(critic)
    return teacher, place(critic, processes), make_step(cfg.objective, codec)


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
    channels, *_ = run.data.frame_shape
    num_frames = clip_frames(run, batch)
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


def weights_for(builder, path: str | None) -> Weights | None:
    """What a network that is built from its sizes starts from; a builder with a `path` brings its weights itself."""
    return load_weights(locate(path)) if path and "path" not in builder else None


def clip_frames(run: Run, batch) -> int:
    """How long the data's clips are; without clips, the shortest rollout."""
    return batch["video"].shape[1] if "video" in batch else run.config.min_num_frames


def network(builder, cfg, weights: Weights | None) -> nn.Module:
    model = make(builder)
    if cfg.attention:
        model.attention = function(cfg.attention)
    if weights:
        fill(model, weights.state_dict, weights.path)
    return model


def place(model: nn.Module, processes, trained: bool = True) -> nn.Module:
    """The network where it computes, alone or shared out among processes."""
    model = processes.place(model, trained=trained)
    if trained and any(p.dtype != torch.float32 for p in model.parameters()):
        raise ValueError(
            "Master weights must be float32: small updates vanish in half precision. Use training.autocast."
        )
    return model


def make_optimizers(model: nn.Module, kind: str, lr: float, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """AdamW or, for the matrices inside the layers, Muon with AdamW for the rest; each remembers its base lr."""
    named = list(model.named_parameters())
    muon = [(name, p) for name, p in named if kind == "muon" and p.ndim == 2 and "blocks." in name]
    rest = [one for one in named if one[0] not in dict(muon)]
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
    cond, uncond = (conditions(run, batch, x) for x in (run.encoder(batch["prompts"]), run.encoder.null(len(samples))))
    shape = (len(samples), config.max_num_frames, *run.data.frame_shape)
    data = batch["video"].to(run.device) if "video" in batch else None
    yield from run.algorithm(
        run.networks["generator"],
        run.teacher,
        run.networks["critic"],
        run.scheduler,
        randn(shape, rng, device=run.device),
        cond,
        uncond,
        config,
        data=data,
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
    return video.to(run.device), conditions(run, batch, run.encoder(prompts))


def conditions(run: Run, batch, prompt: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model looks into: the encoded prompts and what the data have besides, such as a given image."""
    return to({**prompt, **batch.get("cond", {})}, run.device)


def training_loop(run: Run) -> Iterator[dict[str, float]]:
    """Train to the last step, yielding what each one reports; `run.step` is already counted up."""
    config = run.config
    micro = config.micro_batch_size or max(1, config.batch_size // run.processes.count)
    while run.step < config.last_step:
        start, report = time.perf_counter(), Report()
        run.evaluations.take()
        first = run.step * config.batch_size
        parts = [range(begin, begin + micro) for begin in range(first, first + config.batch_size, micro)]
        streams = []
        for samples in run.processes.share(parts):
            rng = generators(config.seed, run.step, "train", samples=samples)
            streams.append(LOSSES[config.stage](run, samples, rng, report.observe))
        for name in config.updates:
            update(run, name, streams, report)
        run.step += 1
        run.ema.update(run.step)
        run.seconds += time.perf_counter() - start
        reports, evaluations = zip(*run.processes.gather((report.values, run.evaluations.take())), strict=True)
        yield {"step": run.step, "seconds": run.seconds, "evaluations": sum(evaluations), **means(reports)}


def update(run: Run, name: str, streams: list[Iterator[tuple[str, Tensor]]], report: "Report") -> None:
    """One optimizer step of one network: the next loss of every micro batch, averaged."""
    model, optimizers = run.networks[name], run.optimizers[name]
    model.zero_grad(set_to_none=True)  # also what a generator loss may have left in the critic
    for stream in streams:
        with autocast(run.config.autocast, run.device):
            loss_of, loss = next(stream)
        assert loss_of == name
        (loss / len(streams)).backward()
        report.add(f"{name}_loss", loss.item())
    norm = run.processes.clip_gradients(model, run.config.max_grad_norm)
    if not norm.isfinite():
        raise FloatingPointError(
            f"The gradient of the {name} is not finite at step {run.step}; lower its learning rate."
        )
    report.add(f"{name}_grad_norm", norm.item())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_scale(run.step, run.config)
        with bf16_products(run.device):
            optimizer.step()


def lr_scale(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, constant, linear decay to (almost) zero."""
    rise = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay_steps = config.decay_fraction * config.num_steps
    return rise * (min(1.0, (config.num_steps - step) / decay_steps) if decay_steps else 1.0)


def to(cond: dict[str, Tensor], device) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in cond.items()}


class Report:
    """What one step's losses say about themselves; flow errors per quarter of the noise range."""

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


def means(reports: Sequence[dict[str, list[float]]]) -> dict[str, float]:
    """Mean over everything that all processes report under a name."""
    together = defaultdict(list)
    for name, values in (item for report in reports for item in report.items()):
        together[name] += values
    return {name: sum(values) / len(values) for name, values in sorted(together.items())}


# ------------------------------------------------------------------------------------------- around the loop


def fit(cfg) -> Path:
    """Train one stage to its end and return checkpoint_final.pt; resumes an unfinished run of the same config."""
    keep_freed_memory()
    record = OmegaConf.to_yaml(cfg, resolve=True)
    run = build(cfg, resuming=can_resume(cfg.training, record))
    processes, folder = run.processes, Path(run.config.output_dir)
    if processes.is_first:
        prepare_folder(run.config, record)
    processes.gather(None)  # the others wait until the folder is there
    last, final = (processes.path(folder, name) for name in ("checkpoint_last", "checkpoint_final"))
    if last.exists():
        run.load_state_dict(processes.load(last, run.state_dict()))
        if processes.is_first:
            print(f"Resuming {folder} at step {run.step}.")
    stop = Interrupt()
    shown = {"total": run.config.last_step, "desc": run.config.stage, "unit": "step", "disable": not processes.is_first}
    with open_logs(cfg, folder, run.step) if processes.is_first else nullcontext(dict) as log, stop:
        bar = tqdm(training_loop(run), initial=run.step, **shown)
        for values in bar:
            if run.step % run.config.sample_every == 0 or run.step == run.config.last_step:
                values |= preview(run, folder)
            log(values)
            bar.set_postfix({k: f"{v:.3g}" for k, v in values.items() if k.endswith("_loss")})
            stopping = any(processes.gather(stop.asked))
            if run.step % run.config.checkpoint_every == 0 or stopping:
                processes.save(last, run.state_dict())
            if stopping:
                processes.finish()
                sys.exit(f"Stopped at step {run.step}; the same command goes on from there.")
    processes.save(final, run.state_dict())
    processes.finish()
    processes.remove(last)
    if processes.is_first:
        print(f"{final}: {run.step} steps in {run.seconds:.0f} s")
    return final


def preview(run: Run, folder: Path) -> dict[str, float]:
    """A strip of eight fixed prompts from fixed noise, drawn to samples/; its ink and its speed."""
    weights = run.ema.state_dict()
    model = run.networks["generator"]
    trained = {name: p.detach().clone() for name, p in model.state_dict().items()}
    if weights:
        model.load_state_dict(weights, strict=False)
    batch = run.data.batch(range(run.config.num_previews))
    num_frames, prompts = clip_frames(run, batch), batch["prompts"]
    cond, uncond = (conditions(run, batch, x) for x in (run.encoder(prompts), run.encoder.null(len(prompts))))
    sampling, shape = SamplingConfig.of(asdict(run.config), num_frames), (num_frames, *run.data.frame_shape)
    keys = sample_keys(prompts, run.config.seed)
    with autocast(run.config.autocast, run.device), torch.compiler.set_stance("force_eager"):
        blocks = list(sample_blocks(model, run.scheduler, cond, uncond, sampling, shape, keys))
    video = torch.cat([block.float().cpu() for block in blocks], dim=1)
    model.load_state_dict(trained)
    if run.codec:
        video = run.codec.decode(video.to(run.device)).cpu()
    if run.processes.is_first:
        strip = folder / "samples" / f"step_{run.step:06d}.png"
        film_strip(video, strip, every=1 + video.shape[1] // 24, labels=prompts)
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
    final = find(Path(cfg.training.output_dir), "checkpoint_final")
    if final and holds(final.parent, OmegaConf.to_yaml(cfg, resolve=True)) and is_current(final, cfg.training):
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
