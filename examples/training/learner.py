"""A model and all that changes with it: a step of training, the evaluation, and the state to go on from."""

from __future__ import annotations

import copy
import math
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from convnext_kernels import create_model
from convnext_kernels.reference import ReferenceConvNeXt, create_reference_model
from training import checkpoint, processes, recipe
from training.data import PADDING

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(options: Namespace, classes: int) -> ReferenceConvNeXt:
    """The model that the options name, on the CPU, with the weights that the training starts from."""
    create = create_model if options.kernels == "on" else create_reference_model
    overrides = {"depths": options.depths, "dims": options.dims, "layer_scale_init_value": options.layer_scale}
    given = {name: value for name, value in overrides.items() if value is not None}
    torch.manual_seed(options.seed)
    model = create(options.model, num_classes=classes, drop_path_rate=options.drop_path, **given)
    stride = 16 if model.isotropic else 2 ** (len(model.depths) + 1)
    if too_small := [resolution for _, resolution in options.resolution if resolution < stride]:
        raise ValueError(f"--resolution: got {too_small[0]}; accepted: at least {stride}, the model's stride")
    recipe.freeze(model, options.freeze)
    return model


class Learner:
    """A model on its device, perhaps spread over processes, with its optimizer, schedule, scaler and moving average.

    model: whose parameters are trained; parallel: the same, called in training; ema: None or the moving average;
    evaluated: model and average by the prefix of their figures.
    """

    def __init__(
        self,
        model: ReferenceConvNeXt,
        options: Namespace,
        world: processes.Processes,
        warmup: int,
        total: int,
    ) -> None:
        self.world, self.clip, self.smoothing = world, options.clip or math.inf, options.smoothing
        self.accumulate, dtype = options.accumulate, AMP[options.amp]
        self.model = model.to(world.device)
        self.ema = copy.deepcopy(model).eval().requires_grad_(False) if options.ema else None
        self.decay = options.ema
        self.evaluated = {"": model} if self.ema is None else {"": model, "ema_": self.ema}
        if options.checkpoint_activations:
            recipe.recompute_blocks(model)
        if options.compile:
            model.compile(backend=options.compile)
        if options.fsdp:
            if not dist.is_initialized():
                raise ValueError("--fsdp: got a process that torchrun did not start; accepted: one that it did")
            for whole in self.evaluated.values():
                processes.shard(whole, recipe.blocks_of(whole), dtype, world)
        self.parallel: nn.Module = model if options.fsdp else processes.replicate(model, world)
        # Sharded models compute in their policy's dtype; autocast would only cast once more.
        self.autocast = torch.autocast(world.device.type, dtype, enabled=dtype is not None and not options.fsdp)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=options.amp == "fp16")
        groups = recipe.parameter_groups(model, options.lr, options.weight_decay, options.layer_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=tuple(options.betas), fused=world.device.type == "cuda")
        self.scheduler = recipe.schedule(self.optimizer, warmup, total, options.min_lr / options.lr)

    def backward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Puts the gradients of the mean loss over the batch, scaled for fp16, where the optimizer looks for them, and
        returns the loss; in `accumulate` parts, of which each but the last is of the same size."""
        size = -(-len(images) // self.accumulate)
        parts = list(zip(images.split(size), targets.split(size), strict=True))
        total = torch.zeros((), device=images.device)
        for number, (inputs, wanted) in enumerate(parts, 1):
            processes.exchange_gradients(self.parallel, number == len(parts))
            with self.autocast:
                logits = self.parallel(inputs)
            loss = F.cross_entropy(logits.float(), wanted, label_smoothing=self.smoothing)
            loss = loss * (len(inputs) / len(images))
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def step(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the optimizer on a batch [N, 3, H, W] with labels [N] or probabilities [N, classes].

        Returns the loss and the norm of the gradients before clipping, neither waited for.
        """
        loss = self.backward(images, targets)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()
        if self.ema is not None:
            recipe.follow(self.ema, self.model, self.decay)
        return loss, norm

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Mean cross-entropy "loss" and "accuracy" over all processes' images, of the average "ema_loss" and
        "ema_accuracy"; NaN if there were none."""
        sums = {prefix: torch.zeros(3, dtype=torch.float64, device=self.world.device) for prefix in self.evaluated}
        self.model.eval()
        for images, labels in batches:
            for prefix, model in self.evaluated.items():
                with self.autocast:
                    logits = model(images)
                loss = F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=PADDING)
                sums[prefix] += torch.stack([loss, (logits.argmax(1) == labels).sum(), (labels != PADDING).sum()])
        self.model.train()
        figures: dict[str, float] = {}
        for prefix, of_model in sums.items():
            loss, right, images = self.world.sum(of_model).tolist()
            figures[f"{prefix}loss"] = loss / images if images else math.nan
            figures[f"{prefix}accuracy"] = right / images if images else math.nan
        return figures

    def state(self) -> dict[str, Any]:
        """All of it, whole and on the CPU, for the first process only. Every process must call this."""
        state = checkpoint.capture(self.model, self.ema, self.optimizer)
        return state | {"scheduler": self.scheduler.state_dict(), "scaler": self.scaler.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`."""
        checkpoint.restore(state, self.model, self.ema, self.optimizer)
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
