"""A small timm model whose parameters matter, beside its accelerated copy."""

import copy

import timm
import torch
from support import OperatorCalls, randomise
from torch import Tensor, nn

from convnext_kernels import accelerate

BLOCKS = ["stages.0.blocks.0", "stages.1.blocks.0", "stages.1.blocks.1", "stages.2.blocks.0", "stages.3.blocks.0"]
NORMS = ["stem.1", "stages.1.downsample.0", "stages.2.downsample.0", "stages.3.downsample.0"]

TOLERANCE = 1e-5
BLOCK, NORM = "convnext_kernels.convnext_block", "convnext_kernels.layer_norm"


def build(**options) -> nn.Module:
    options = {"depths": (1, 2, 1, 1), "dims": (16, 16, 24, 24), "num_classes": 5, "drop_path_rate": 0.4, **options}
    model = timm.create_model("convnext_atto", **options).eval()
    randomise(model)
    return model


def build_pair(**options) -> tuple[nn.Module, nn.Module]:
    """The host's model, and a copy that is accelerated."""
    host = build(**options)
    ours = copy.deepcopy(host)
    accelerate(ours)
    return host, ours


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def gradients(model: nn.Module, input: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """The logits and every parameter's gradient of a training step."""
    torch.manual_seed(seed)
    model.zero_grad()
    output = model(input)
    output.square().sum().backward()
    return {"output": output.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def difference(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def operators(model: nn.Module, *args: Tensor) -> dict[str, int]:
    """How often our operators ran in a call of a model."""
    with OperatorCalls() as ran, torch.no_grad():
        model(*args)
    names = [function._schema.name.replace("::", ".") for function, _ in ran.calls]
    return {name: names.count(name) for name in set(names)}


def assert_ours(model: nn.Module, *args: Tensor) -> None:
    """All blocks and norms run our operators."""
    assert operators(model, *(args or (images(),))) == {BLOCK: len(BLOCKS), NORM: len(NORMS)}
