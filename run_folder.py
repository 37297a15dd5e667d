"""What surrounds a training loop: its folder, its log, its interruption, and where it was made."""

import csv
import ctypes
import os
import platform
import shutil
import signal
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from yaml import YAMLError

from checkpoint import atomic, locate
from precision import computes_in_bf16
from tiny_causal_wan import PatchEmbedding

COLUMNS = [
    *("step", "seconds", "evaluations", "generator_loss", "generator_grad_norm", "critic_loss", "critic_grad_norm"),
    *("score_distance", "normaliser", "real_logit", "fake_logit", "sample_ink", "sample_speed"),
    *(f"{name}_flow_error_t{level}" for name in ("generator", "critic") for level in ("0.00", "0.25", "0.50", "0.75")),
]


def prepare_folder(training, config: str) -> Path:
    """The run's folder, holding its config (as YAML); what is there but cannot be resumed is moved aside."""
    folder = Path(training.output_dir)
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ValueError(
            f"training.output_dir must be a folder of its own, such as logs/training; got {str(folder)!r}."
        )
    if reason := cannot_resume(folder, training, config):
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        shutil.move(folder, aside)
        print(f"{folder} held {reason}: moved to {aside}.")
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(".*.tmp"):  # writes that a kill cut short
        unfinished.unlink()
    with atomic(folder / "config.yaml") as temporary:
        temporary.write_text(config)
    return folder


def cannot_resume(folder: Path, training, config: str) -> str:
    """What the folder holds, in words, if it is not a run that this one can go on from; else nothing."""
    last = find(folder, "checkpoint_last")
    if not folder.exists() or not any(folder.iterdir()):
        return ""
    if not holds(folder, config):
        return "a run with other settings" if (folder / "config.yaml").exists() else "other files"
    if find(folder, "checkpoint_final"):
        return "a finished run"
    return "a run from older weights" if last and not is_current(last, training) else ""


def can_resume(training, config: str) -> bool:
    """Whether the folder holds a checkpoint of this very run to go on from."""
    folder = Path(training.output_dir)
    return bool(find(folder, "checkpoint_last")) and not cannot_resume(folder, training, config)


def find(folder: Path, name: str) -> Path | None:
    """The checkpoint of that name, one process's file or the folder of many; none if there is none."""
    return next((path for path in (folder / f"{name}.pt", folder / name) if path.exists()), None)


def holds(folder: Path, config: str) -> bool:
    """Whether the run in the folder is one of this config (as YAML), in whatever order either names its settings."""
    written = folder / "config.yaml"
    try:
        return written.exists() and OmegaConf.load(written) == OmegaConf.create(config)
    except (YAMLError, OSError, ValueError):  # damaged, or somebody else's
        return False


def is_current(checkpoint: Path, training) -> bool:
    """Whether a checkpoint exists and is newer than the weights that its run started from."""
    sources = [locate(path) for path in (training.pretrained_checkpoint, training.teacher_checkpoint) if path]
    return checkpoint.exists() and all(x.stat().st_mtime <= checkpoint.stat().st_mtime for x in sources if x.exists())


class Evaluations:
    """Counts what networks compute, in frames: 1 for each frame of a forward call, 2 more if it is differentiated.

    A call of teacher forcing has its frames twice, clean and noisy.
    """

    def __init__(self, models):
        self.frames = 0
        for model in models:
            for module in model.modules():
                if isinstance(module, PatchEmbedding):  # runs once in every call, and is never compiled
                    module.register_forward_hook(self._count)

    def _count(self, module, inputs, tokens) -> None:
        frames = inputs[0].shape[0] * inputs[0].shape[1]
        self.frames += frames
        if tokens.requires_grad:
            tokens.register_hook(lambda gradient: self._add(2 * frames))

    def _add(self, frames: int) -> None:
        self.frames += frames

    def take(self) -> int:
        """What was counted since the last time."""
        frames, self.frames = self.frames, 0
        return frames


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


@contextmanager
def open_logs(cfg, folder: Path, step: int):
    """A function that logs a row to metrics.csv and, if asked for, to wandb."""
    with open_log(folder / "metrics.csv", step) as rows, wandb_log(cfg, folder) as wandb:

        def log(values) -> None:
            rows.writerow(values)
            wandb(values)

        yield log


class Interrupt:
    """Ctrl-C or SIGTERM asks for a stop after the step at hand, when everything is consistent; twice stops at once.

    The same signal again within REPEAT seconds is the same request: a cluster signals all processes of a job, and
    torchrun, which is one of them, hands on to its workers what they have already got.
    """

    REPEAT = 5.0

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number, frame):
        if not self.asked:
            self.asked, self.first, self.time = True, number, time.monotonic()
            # print may not be interrupted by itself
            os.write(2, b"\nStopping after this step; once more, some seconds later, stops at once.\n")
        elif number != self.first or time.monotonic() - self.time > self.REPEAT:
            raise KeyboardInterrupt

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextmanager
def wandb_log(cfg, folder: Path):
    """A function that logs a row to wandb, or does nothing: wandb is off unless asked for."""
    modes = ("disabled", "offline", "online")
    if cfg.wandb.mode not in modes:
        raise ValueError(f"wandb.mode must be one of {', '.join(modes)}; got {cfg.wandb.mode!r}.")
    if cfg.wandb.mode == "disabled":
        yield lambda values: None
        return
    try:
        import wandb
    except ImportError as error:
        raise ValueError("wandb is not installed: pip install wandb, or leave wandb.mode=disabled.") from error
    record = OmegaConf.to_container(cfg, resolve=True)
    with wandb.init(project=cfg.wandb.project, mode=cfg.wandb.mode, dir=str(folder), config=record) as run:
        yield lambda values: run.log(values, step=values["step"])


def keep_freed_memory() -> None:
    """Ask glibc to keep what is freed: the large tensors of the next step then cost no page faults.

    They are a quarter of a teacher-forcing step on two cores and 5 to 10 % of the others. Elsewhere nothing happens.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 2**31 - 1)


def processor() -> str:
    """The processor's name where Linux tells it, else its kind."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What a logged result says of where it was made."""
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "computes_in_bf16": computes_in_bf16(torch.device("cpu")),
        "denormals": "zero",  # see precision.py
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
