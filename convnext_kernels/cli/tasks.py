"""What `bench` times: whole models and single blocks, in inference and training, and whether ours are right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnext_kernels.cli.measure import Work
from convnext_kernels.model import create_model
from convnext_kernels.ops.common.launch import float32_precision
from convnext_kernels.reference import ReferenceConvNeXt, create_reference_model

OURS, EAGER, COMPILED = "convnext-kernels", "PyTorch eager", "torch.compile"

MODES = ("inference", "training", "block")

FLOAT32_LIMIT = 1e-4
"""Relative difference from eager in float32: sums in another order, through up to 36 blocks."""

TF32_EPS = 2.0**-10
"""TF32 keeps ten bits behind the first."""

FLOAT16_LOSS_SCALE = 4096.0
"""Gradients of a mean over a batch underflow in float16; AdamW's step does not depend on a constant factor."""

LEARNING_RATE = 1e-5

Objective = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""From an output to the tensor that `backward` starts at and the gradient it starts with."""


@dataclass(frozen=True)
class Task:
    """One thing to time: the same weights in PyTorch's form and ours, a batch, and what is done with it.

    Attributes:
        model: the model's name.
        name: the mode, for blocks with the stage.
        reference, ours: in float32, of the same weights.
        inputs: the batch as the contenders take it.
        dtype: of the arithmetic: parameters are cast to it for inference, autocast uses it for training.
        objective: None in inference.
        optimizer: whether a training step ends with AdamW.
    """

    model: str
    name: str
    reference: nn.Module
    ours: nn.Module
    inputs: Tensor
    dtype: torch.dtype
    objective: Objective | None = None
    optimizer: bool = False

    def contender(self, module: nn.Module) -> nn.Module:
        """A copy of a module as it is timed."""
        module = copy.deepcopy(module)
        return module.eval().to(self.dtype) if self.objective is None else module.train()

    def backward(self, module: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Forward and backward of one batch; returns the output and the batch, with its gradient if it has one."""
        if self.objective is None:
            raise ValueError(f"{self.name} has no backward")
        batch = batch.detach().requires_grad_(not self.optimizer)  # photographs need no gradient, a block's input does
        with torch.autocast(batch.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = module(batch)
            start, gradient = self.objective(output)
        start.backward(gradient)
        return output.detach(), batch

    def work(self, module: nn.Module) -> tuple[Work, torch.optim.Optimizer | None]:
        """What is timed, and the optimizer that it uses."""
        if self.objective is None:
            return torch.inference_mode()(module.__call__), None
        if not self.optimizer:
            return partial(self._forward_and_backward, module), None
        optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, fused=self.inputs.is_cuda)
        return partial(self._training_step, module, optimizer), optimizer

    def _forward_and_backward(self, module: nn.Module, batch: Tensor) -> None:
        self.backward(module, batch)
        module.zero_grad()

    def _training_step(self, module: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
        self.backward(module, batch)
        optimizer.step()
        optimizer.zero_grad()

    def results(self, module: nn.Module, batch: Tensor) -> dict[str, list[Tensor]]:
        """What must agree between contenders: the output and, in training, every gradient."""
        if self.objective is None:
            with torch.inference_mode():
                return {"output": [module(batch)]}
        output, batch = self.backward(module, batch)
        tensors = [batch, *module.parameters()]
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        module.zero_grad()
        return {"output": [output], "gradients": gradients}


@dataclass(frozen=True)
class Parity:
    """The relative difference of ours and, in 16 bits, of eager from the float32 reference."""

    tensors: str
    error: float
    eager_error: float | None
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


@contextmanager
def full_float32() -> Iterator[None]:
    """Within the context float32 is float32; by default PyTorch rounds to TF32 in convolutions, not in products."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def relative_difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Root mean square, over the tensors, of ||actual - expected|| / ||expected||."""
    squares = [
        ((a.double() - e.double()).norm() / e.double().norm()).square() for a, e in zip(actual, expected, strict=True)
    ]
    return torch.stack(squares).mean().sqrt().item()


def check_parity(task: Task, modules: Mapping[str, nn.Module]) -> list[Parity]:
    """Compares ours with eager in float32; in TF32 and 16 bits both with the float32 reference.

    Ours may be off by 1e-4 in float32, in the others by 1.5 times what eager is off plus one unit in the last place.
    """
    ours, eager = (task.results(modules[name], task.inputs) for name in (OURS, EAGER))
    tf32 = task.dtype == torch.float32 and float32_precision() == "tf32"
    if task.dtype == torch.float32 and not tf32:
        return [
            Parity(tensors, relative_difference(ours[tensors], eager[tensors]), None, FLOAT32_LIMIT) for tensors in ours
        ]
    exact_task = replace(task, dtype=torch.float32)
    with full_float32():
        exact = exact_task.results(exact_task.contender(task.reference), task.inputs.float())
    checks = []
    for tensors, expected in exact.items():
        eager_error = relative_difference(eager[tensors], expected)
        limit = 1.5 * eager_error + (TF32_EPS if tf32 else torch.finfo(task.dtype).eps)
        checks.append(Parity(tensors, relative_difference(ours[tensors], expected), eager_error, limit))
    return checks


def parity_failure(checks: Sequence[Parity]) -> str | None:
    """What the checks that failed say, None where all passed."""
    failed = [f"{c.tensors} off by {c.error:.1e}, limit {c.limit:.1e}" for c in checks if not c.passed]
    return f"parity failed: {'; '.join(failed)}" if failed else None


def randomise(model: nn.Module) -> None:
    """Draws scales near 1, biases that are not 0 and matrices that keep the variance.

    At the values that training starts from, a layer scale of 1e-6 and small matrices, the residual hides every error.
    """
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", ".beta")):
            nn.init.normal_(parameter, std=0.1)
        elif parameter.squeeze().dim() == 1:
            nn.init.uniform_(parameter, 0.8, 1.2)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def build_models(name: str, device: torch.device, seed: int = 0) -> tuple[ReferenceConvNeXt, ReferenceConvNeXt]:
    """The plain PyTorch model and ours with the same random weights."""
    torch.manual_seed(seed)
    reference = create_reference_model(name)
    randomise(reference)
    ours = create_model(name)
    ours.load_state_dict(reference.state_dict())
    return reference.to(device), ours.to(device)


def tasks(model: str, modes: list[str], images: Tensor, dtype: torch.dtype) -> Iterator[Task]:
    """Every task of one model, built one after the other."""
    reference, ours = build_models(model, images.device)
    if "inference" in modes:
        yield Task(model, "inference", reference, ours, images.to(dtype), dtype)
    if "training" in modes:
        yield Task(model, "training", reference, ours, images, dtype, classification(images, dtype), optimizer=True)
    if "block" in modes:
        yield from _block_tasks(model, reference, ours, images, dtype)


def classification(images: Tensor, dtype: torch.dtype) -> Objective:
    """Cross-entropy with a class for each image."""
    targets = torch.arange(len(images), device=images.device) * 37 % 1000
    scale = FLOAT16_LOSS_SCALE if dtype == torch.float16 else 1.0
    return lambda logits: (F.cross_entropy(logits, targets) * scale, None)


def _first_blocks(model: ReferenceConvNeXt) -> list[nn.Module]:
    """The first block of each stage."""
    stages = [model.get_submodule("blocks")] if model.isotropic else model.get_submodule("stages").children()
    return [next(stage.children()) for stage in stages]


def _block_tasks(
    model: str, reference: ReferenceConvNeXt, ours: ReferenceConvNeXt, images: Tensor, dtype: torch.dtype
) -> Iterator[Task]:
    """The first block of each stage, on the activations that reach it."""
    blocks = list(zip(_first_blocks(reference), _first_blocks(ours), strict=True))
    activations: dict[nn.Module, Tensor] = {}
    hooks = [
        block.register_forward_pre_hook(lambda module, arguments: activations.update({module: arguments[0]}))
        for block, _ in blocks
    ]
    with torch.no_grad():
        reference.eval()(images)
    for hook in hooks:
        hook.remove()
    for stage, (theirs, mine) in enumerate(blocks, start=1):
        inputs = activations[theirs].to(dtype)
        cotangent = torch.randn_like(inputs)
        yield Task(model, f"block {stage}, forward", theirs, mine, inputs, dtype)
        yield Task(model, f"block {stage}, forward + backward", theirs, mine, inputs, dtype, _with_gradient(cotangent))


def _with_gradient(cotangent: Tensor) -> Objective:
    return lambda output: (output, cotangent.to(output.dtype))
