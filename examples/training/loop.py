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
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import BatchSampler

from training import checkpoint, data
from training.files import CsvLog, claim
from training.learner import Learner, build_model
from training.processes import Processes
from training.randomness import seed_of
from training.recipe import initialise

FAILED, REFUSED, STOPPED = 1, 2, 128
"""Exit codes: stopped by bad data, a loss that is no number or a full disk; refused before the start; saved after a
signal, whose number is added."""

COLUMNS = (*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))

MAY_CHANGE = {
    *("data", "output", "resume", "workers", "save_every", "log_every", "device", "kernels"),
    *("compile", "checkpoint_activations", "fsdp", "accumulate"),
}
"""Options that a resumed run may be given anew: they change no more than rounding and which branches are dropped."""


class Trainer:
    """A run, from its first step or from where its checkpoint stands. Whatever can be refused is refused here.

    Raises:
        OSError, ValueError: data, a checkpoint or an option does not fit.
    """

    def __init__(self, options: Namespace, world: Processes) -> None:
        self.options, self.world = options, world
        self.exit_code, self.signal = 0, 0
        self.bar = Progress(*COLUMNS, disable=not world.is_first)
        self.output, self.last = Path(options.output), Path(options.output, "last.pt")
        if self.last.exists() and not options.resume:
            raise ValueError(f"--output: {self.output} holds a run already; accepted: --resume, or another folder")
        training, validation = data.open_data(options.data)
        self.order = data.TrainingOrder(len(training), options.batch_size, options.seed, world.rank, world.size)
        self.per_epoch = self.order.steps_per_epoch
        self.total = options.epochs * self.per_epoch
        self.classes = list(training.classes)
        self.sizes = {"images": len(training), "classes": len(self.classes), "steps_per_epoch": self.per_epoch}

        model = build_model(options, len(self.classes))
        state = checkpoint.read(self.last, self._identity(), self.classes) if self.last.exists() else None
        if state is None and options.init:
            self._say(f"{options.init}: {initialise(model, options.init, options.head_scale)}")
        self.step = self.saved = state["step"] if state else 0
        self.best = -1.0
        if self.world.highest(self.step) != self.step:
            raise ValueError(f"--output: other processes see another {self.last}; accepted: a folder that all share")
        self.learner = Learner(model, options, world, round(options.warmup * self.per_epoch), self.total)
        if state is not None:
            self._take_up(state)
        self._open_logs()
        self._open_loaders(training, validation)

    def _identity(self) -> dict[str, Any]:
        """The options that make this run what it is, and the sizes of its data."""
        return self.sizes | {name: value for name, value in vars(self.options).items() if name not in MAY_CHANGE}

    def _take_up(self, state: dict[str, Any]) -> None:
        self.learner.load(state)
        best = self.output / "best.pt"
        if best.exists():
            self.best = checkpoint.read_checkpoint(best)["accuracy"]
        self._say(f"resuming {self.last} after step {self.step} of {self.total}")

    def _open_logs(self) -> None:
        if self.world.is_first:
            self.output.mkdir(parents=True, exist_ok=True)
            self.lock = claim(self.output)
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
        self.mixing = data.Mixing(options.mixup, options.cutmix, len(self.classes))
        images = data.TrainingImages(training, augmentation, resolutions, options.seed)
        self.training = data.Batches(images, self.order.steps(self.step, self.total), options.workers, world.device)
        central = data.central(resolutions[-1], options.crop)
        images = data.ValidationImages(validation, central, world.rank, world.size)
        evaluated = BatchSampler(range(len(images)), -(-options.batch_size // (world.size * options.accumulate)), False)
        self.validation = data.Batches(images, evaluated, options.workers, world.device)

    def run(self) -> int:
        """Trains to the end, or to the first reason to stop; returns the exit code."""
        previous = {number: signal.signal(number, self._note_signal) for number in data.STOPPING}
        with self.bar:
            self.task = self.bar.add_task("steps", total=self.total, completed=self.step, figures="")
            try:
                self._epochs()
            finally:
                for number, handler in previous.items():
                    signal.signal(number, handler)
        if self.exit_code > STOPPED:
            name = signal.Signals(self.exit_code - STOPPED).name
            self._say(f"stopped by {name} after step {self.step}; --resume --output {self.output} goes on from there")
        return self.exit_code

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

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
        if self.exit_code and self.step > self.saved:
            self._save()

    def _batches(self, batches: data.Batches) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches, until one of the processes has a reason to stop: `exit_code`."""
        for batch in batches:
            unreadable = isinstance(batch, data.Unreadable)
            if unreadable:
                print(f"train.py: {batch.message}", file=sys.stderr)
            reason = STOPPED + self.signal if self.signal else FAILED if unreadable else 0
            self.exit_code = self.world.highest(reason)
            if self.exit_code:
                return
            yield batch

    def _train(self, images: Tensor, labels: Tensor) -> int:
        """One step; returns the number of images."""
        options, learner = self.options, self.learner
        torch.manual_seed(seed_of(options.seed, self.step, self.world.rank, 0))
        lr = learner.scheduler.get_last_lr()[-1]
        self.loss, self.norm = learner.step(*self.mixing(images, labels))
        self.step += 1
        if self.step % options.log_every == 0 or self.step % self.per_epoch == 0:
            self._log(lr)
        self.bar.update(self.task, completed=self.step)
        return len(images)

    def _figures(self) -> tuple[float, float]:
        """Loss and norm of the gradients of the step before, of all processes; waits for the GPU.

        Raises:
            FloatingPointError: one of them is no number, and it is not that the scaler skipped the step.
        """
        loss = float(self.world.sum(self.loss.double())) / self.world.size
        norm = float(self.norm.full_tensor() if isinstance(self.norm, DTensor) else self.norm)
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.learner.scaler.is_enabled()):
            raise FloatingPointError(
                f"the loss is {loss}, the norm of its gradients {norm} at step {self.step}; "
                f"{self.last} is as it was last saved"
            )
        return loss, norm

    def _log(self, lr: float) -> None:
        loss, norm = self._figures()
        epoch = (self.step - 1) // self.per_epoch
        self.steps_log.add(step=self.step, epoch=epoch, lr=lr, loss=loss, gradient_norm=norm)
        self.bar.update(self.task, figures=f"loss {loss:.3f}, lr {lr:.1e}")

    def _save(self) -> None:
        self._figures()  # weights that are no numbers must not replace those before
        place = {"step": self.step, "options": self._identity(), "class_names": self.classes}
        state = self.learner.state() | place
        if self.world.is_first:
            checkpoint.write(self.last, state)
        self.saved = self.step

    def _evaluate(self, speed: float) -> None:
        """Figures of the model and of its moving average after an epoch; the better of all is kept in best.pt."""
        learner = self.learner
        figures = learner.evaluate(self._batches(self.validation))
        if self.exit_code:
            return
        for prefix, model in learner.evaluated.items():
            accuracy = figures[f"{prefix}accuracy"]
            if accuracy > self.best:
                self.best = accuracy
                weights = {"model": checkpoint.weights_of(model), "accuracy": accuracy, "step": self.step}
                if self.world.is_first:
                    checkpoint.write(self.output / "best.pt", weights)
        epoch = self.step // self.per_epoch
        self.epochs_log.add(step=self.step, epoch=epoch - 1, **figures, images_per_second=round(speed, 1))
        average = f", {figures['ema_accuracy']:.2%} of the average" if learner.ema is not None else ""
        pace = "" if math.isnan(speed) else f"; {speed:.0f} images/s"
        self._say(
            f"epoch {epoch} of {self.options.epochs}: validation loss {figures['loss']:.4f}, "
            f"accuracy {figures['accuracy']:.2%}{average}{pace}"
        )

    def _say(self, message: str) -> None:
        if self.world.is_first:
            self.bar.console.print(message, highlight=False, soft_wrap=True)
