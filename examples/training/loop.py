"""Epochs: batches in, figures out, checkpoints in between, and an orderly end when the process is told to stop."""

from __future__ import annotations

import math
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training import checkpoint, data
from training.files import CsvLog
from training.learner import Learner, build_model
from training.processes import Processes
from training.randomness import seed_of
from training.recipe import initialise

FAILED, REFUSED, TERMINATED = 1, 2, 128 + signal.SIGTERM
"""Exit codes: stopped by bad data or a loss that is no number; refused before the start; saved after SIGTERM."""

COLUMNS = (*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))

MAY_CHANGE = {
    *("output", "resume", "workers", "save_every", "log_every", "device", "kernels"),
    *("compile", "checkpoint_activations", "fsdp", "accumulate"),
}
"""Options that a resumed run may be given anew: they change no more than rounding."""


class Trainer:
    """A run, from its first step or from where its checkpoint stands. Whatever can be refused is refused here.

    Raises:
        OSError, ValueError: data, a checkpoint or an option does not fit.
    """

    def __init__(self, options: Namespace, world: Processes) -> None:
        self.options, self.world = options, world
        self.exit_code, self.told_to_stop = 0, False
        self.bar = Progress(*COLUMNS, disable=not world.is_first)
        self.output, self.last = Path(options.output), Path(options.output, "last.pt")
        if self.last.exists() and not options.resume:
            raise ValueError(f"--output: {self.output} holds a run already; accepted: --resume, or another folder")
        training, validation = data.open_data(options.data)
        self.order = data.TrainingOrder(len(training), options.batch_size, options.seed, world.rank, world.size)
        self.per_epoch = self.order.steps_per_epoch
        self.total = options.epochs * self.per_epoch
        self.sizes = {"images": len(training), "classes": len(training.classes), "steps_per_epoch": self.per_epoch}

        model = build_model(options, len(training.classes))
        state = checkpoint.read(self.last, self._identity()) if self.last.exists() else None
        if state is None and options.init:
            self._say(f"{options.init}: {initialise(model, options.init)}")
        self.learner = Learner(model, options, world, round(options.warmup * self.per_epoch), self.total)
        self.step, self.best = 0, 0.0
        if state is not None:
            self._take_up(state)
        self._open_logs()
        self._open_loaders(training, validation)

    def _identity(self) -> dict[str, Any]:
        """The options that make this run what it is, and the sizes of its data."""
        return self.sizes | {name: value for name, value in vars(self.options).items() if name not in MAY_CHANGE}

    def _take_up(self, state: dict[str, Any]) -> None:
        self.learner.load(state)
        self.step = state["step"]
        best = self.output / "best.pt"
        if best.exists():
            self.best = checkpoint.read_checkpoint(best)["accuracy"]
        self._say(f"resuming {self.last} after step {self.step} of {self.total}")

    def _open_logs(self) -> None:
        if self.world.is_first:
            self.output.mkdir(parents=True, exist_ok=True)
        folder = self.output if self.world.is_first else None
        self.steps_log = CsvLog(
            folder and folder / "steps.csv", ("step", "epoch", "lr", "loss", "gradient_norm"), self.step + 1
        )
        # The epoch that a checkpoint ends is evaluated anew: the run may have died before that.
        self.epochs_log = CsvLog(
            folder and folder / "epochs.csv",
            ("step", "epoch", "loss", "accuracy", "ema_loss", "ema_accuracy", "images_per_second"),
            self.step,
        )

    def _open_loaders(self, training: Any, validation: Any) -> None:
        options, world = self.options, self.world
        resolutions = [max(at for at in options.resolution if at[0] <= epoch)[1] for epoch in range(options.epochs)]
        augmentation = data.Augmentation(
            tuple(options.crop_scale), options.flip, options.rand_augment, options.random_erasing
        )
        self.mixing = data.Mixing(options.mixup, options.cutmix, len(training.classes))
        shared = {"num_workers": options.workers, "pin_memory": world.device.type == "cuda"}
        self.training = data.loader(
            data.TrainingImages(training, augmentation, resolutions, options.seed),
            batch_sampler=self.order.steps(self.step, self.total),
            **shared,
        )
        self.validation = data.loader(
            data.ValidationImages(validation, data.central(resolutions[-1], options.crop), world.rank, world.size),
            batch_size=options.batch_size // world.size,
            **shared,
        )

    def run(self) -> int:
        """Trains to the end, or to the first reason to stop; returns the exit code."""
        previous = signal.signal(signal.SIGTERM, self._terminate)
        with self.bar:
            self.task = self.bar.add_task("steps", total=self.total, completed=self.step, figures="")
            try:
                self._epochs()
            finally:
                signal.signal(signal.SIGTERM, previous)
        if self.exit_code == TERMINATED:
            self._say(f"stopped by SIGTERM after step {self.step}; --resume --output {self.output} goes on from there")
        return self.exit_code

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self.told_to_stop = True

    def _epochs(self) -> None:
        if self.step and self.step % self.per_epoch == 0:
            self._evaluate(speed=math.nan)
        if self.exit_code:
            return
        images, since = 0, time.perf_counter()
        for batch in self._batches(self.training):
            images += self._train(*batch) * self.world.size
            ends_epoch = self.step % self.per_epoch == 0
            if ends_epoch or (self.options.save_every and self.step % self.options.save_every == 0):
                self._save()
            if ends_epoch:
                self._evaluate(images / (time.perf_counter() - since))
                images, since = 0, time.perf_counter()
            if self.exit_code:
                return
        if self.exit_code and self.step:
            self._save()

    def _batches(self, loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches on this process's device, until one of the processes has a reason to stop: `exit_code`."""
        for batch in loader:
            unreadable = isinstance(batch, data.Unreadable)
            if unreadable:
                print(f"train.py: {batch.message}", file=sys.stderr)
            reason = TERMINATED if self.told_to_stop else FAILED if unreadable else 0
            self.exit_code = self.world.highest(reason)
            if self.exit_code:
                return
            images, labels = batch
            images = images.to(self.world.device, memory_format=torch.channels_last, non_blocking=True)
            yield images, labels.to(self.world.device, non_blocking=True)

    def _train(self, images: Tensor, labels: Tensor) -> int:
        """One step; returns the number of images."""
        options, learner = self.options, self.learner
        torch.manual_seed(seed_of(options.seed, self.step, self.world.rank, 0))
        lr = learner.scheduler.get_last_lr()[-1]
        loss, norm = learner.step(*self.mixing(images, labels))
        self.step += 1
        if self.step % options.log_every == 0 or self.step % self.per_epoch == 0:
            self._log(lr, loss, norm)
        self.bar.update(self.task, completed=self.step)
        return len(images)

    def _log(self, lr: float, loss: Tensor, norm: Tensor) -> None:
        mean = float(self.world.sum(loss.double())) / self.world.size
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss is {mean} at step {self.step}; {self.last} is as it was last saved")
        epoch = (self.step - 1) // self.per_epoch
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.steps_log.add(step=self.step, epoch=epoch, lr=lr, loss=mean, gradient_norm=float(norm))
        self.bar.update(self.task, figures=f"loss {mean:.3f}, lr {lr:.1e}")

    def _save(self) -> None:
        state = self.learner.state() | {"step": self.step, "options": self._identity()}
        if self.world.is_first:
            checkpoint.write(self.last, state)

    def _evaluate(self, speed: float) -> None:
        """Figures of the model and of its moving average after an epoch; the better of all is kept in best.pt."""
        learner = self.learner
        models: dict[str, nn.Module] = {"": learner.model}
        if learner.ema is not None:
            models["ema_"] = learner.ema.module
        figures: dict[str, float] = {}
        for prefix, model in models.items():
            loss, accuracy = learner.evaluate(model, self._batches(self.validation))
            if self.exit_code:
                return
            figures |= {f"{prefix}loss": loss, f"{prefix}accuracy": accuracy}
            if accuracy > self.best:
                self.best = accuracy
                weights = {"model": checkpoint.weights_of(model), "accuracy": accuracy, "step": self.step}
                if self.world.is_first:
                    checkpoint.write(self.output / "best.pt", weights)
        epoch = self.step // self.per_epoch
        self.epochs_log.add(step=self.step, epoch=epoch - 1, **figures, images_per_second=round(speed, 1))
        average = f", {figures['ema_accuracy']:.2%} of the average" if learner.ema is not None else ""
        self._say(
            f"epoch {epoch} of {self.options.epochs}: validation loss {figures['loss']:.4f}, "
            f"accuracy {figures['accuracy']:.2%}{average}; {speed:.0f} images/s"
        )

    def _say(self, message: str) -> None:
        if self.world.is_first:
            self.bar.console.print(message, highlight=False, soft_wrap=True)
