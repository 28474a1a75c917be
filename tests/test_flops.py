"""FLOPs of our operators: those that PyTorch counts for the same computation in its own."""

import copy
import inspect
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from convnext_kernels import accelerate, create_model, functional, parity, register_flop_formulas
from convnext_kernels.flops import FORMULAS
from convnext_kernels.reference import create_reference_model

BLOCK = torch.ops.convnext_kernels.convnext_block
SIZES = {"depths": (1, 2, 1, 1), "dims": (8, 12, 16, 20)}
NORMS = ("layer_norm", "global_response_norm")
V2 = {"use_grn": True, "ls_init_value": None}
HOSTS = {
    "V1": {},
    "V2": V2,
    "1x1 convolutions": {"conv_mlp": True},
    "3x3 filters": {"kernel_sizes": 3},
    "dilation": {"output_stride": 8},
    "no biases": {"conv_bias": False},
    "stochastic depth": {"drop_path_rate": 0.9},
}
FROZEN = {
    "all but the head": lambda name: not name.startswith("head"),
    "two stages": lambda name: name.startswith(("stem", "stages.0", "stages.1")),
    "weights": lambda name: name.endswith("weight"),
    "layer 1": lambda name: "fc1" in name,
    "layer 2": lambda name: "fc2" in name,
    "all but norms and scales": lambda name: "norm" not in name and "gamma" not in name,
    "all but response norms": lambda name: "grn" not in name,
    "convolutions": lambda name: "conv" in name or "downsample" in name or "stem" in name,
}
CASES = [case for name in parity.OPERATORS for case in parity.cases(name, small=True)]


@pytest.fixture(autouse=True, scope="module")
def registered():
    register_flop_formulas()


def counted(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> dict[Any, int]:
    """FLOPs by operator, of the call and of backward where anything requires a gradient."""
    with FlopCounterMode(display=False) as counter:
        output = function(*args, **kwargs)
        if output.requires_grad:
            output.sum().backward()
    return counter.get_flop_counts().get("Global", {})


def total(*args: Any, **kwargs: Any) -> int:
    return sum(counted(*args, **kwargs).values())


def images(size: int = 33, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size)


def assert_counts_as_host(host: nn.Module, input: Tensor) -> None:
    """An accelerated copy does; its blocks are our operator."""
    ours = copy.deepcopy(host)
    accelerate(ours)
    got, expected = counted(ours, input), counted(host, input)
    assert got[BLOCK] > 0 and sum(got.values()) == sum(expected.values())


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("options", HOSTS.values(), ids=HOSTS)
def test_an_accelerated_model_counts_as_its_host(options, grad):
    with torch.set_grad_enabled(grad):
        assert_counts_as_host(timm.create_model("convnext_atto", **SIZES, **options).train(), images(64))


@pytest.mark.parametrize("options", [{}, V2], ids=["V1", "V2"])
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_an_accelerated_model_with_frozen_parameters_counts_as_its_host(frozen, options):
    host = timm.create_model("convnext_atto", **SIZES, **options)
    for name, parameter in host.named_parameters():
        parameter.requires_grad_(not frozen(name))
    assert_counts_as_host(host, images())
    assert_counts_as_host(host, images().requires_grad_())


def test_the_groups_of_a_convolution_are_heeded_where_pytorch_heeds_them(monkeypatch):
    """2.14 does not in backward. Here its formula does something with them."""
    backward = torch.ops.aten.convolution_backward
    formula, groups = flop_registry[backward], 9

    def heeding(*arguments: Any, **named: Any) -> int:
        return arguments[groups] * formula(*arguments, **named)

    monkeypatch.setitem(flop_registry, backward, heeding)
    assert_counts_as_host(timm.create_model("convnext_atto", **SIZES), images())


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto", "convnext_isotropic_small"])
def test_our_model_counts_as_the_published_one(name, grad):
    sizes = {"depths": (2,), "dims": (12,)} if "iso" in name else SIZES
    with torch.set_grad_enabled(grad):
        got, expected = (total(create(name, **sizes), images()) for create in (create_model, create_reference_model))
    assert got == expected > 0


def test_the_paper_s_model_is_counted_without_computing_it():
    """arXiv 2201.03545, table 1: 4.5 G multiplications and additions."""
    with torch.device("meta"), torch.no_grad():
        assert total(create_model("convnext_tiny"), images(224, 1)) == pytest.approx(2 * 4.5e9, rel=0.02)


def arguments_of(case: parity.Case, wanted: set[str]) -> dict[str, Any]:
    """A case's arguments, of which those wanted require a gradient; None for what it leaves out."""
    parameters = inspect.signature(functional.OPERATORS[case.operator]).parameters.values()
    absent = {parameter.name: None for parameter in parameters if parameter.default is parameter.empty}
    tensors = case.draw(torch.float32, "cpu", seed=0)
    return {**absent, **{name: t.requires_grad_(name in wanted) for name, t in tensors.items()}, **case.options}


def differentiable(case: parity.Case) -> set[str]:
    return set(case.shapes) - {"drop_path_factor"}


def wanted_sets(case: parity.Case) -> list[set[str]]:
    """All gradients, none, each alone, all but each, and some at random."""
    names, generator = differentiable(case), random.Random(0)
    some = [{name for name in sorted(names) if generator.random() < 0.5} for _ in range(8)]
    return [names, set(), *({name} for name in names), *(names - {name} for name in names), *some]


def assert_counts_as_definition(case: parity.Case, wanted: set[str]) -> int:
    """The total; where backward computes the pre-activation again, it is a product of tokens and weight more."""
    ours, definition = functional.OPERATORS[case.operator], parity.DEFINITIONS[case.operator]
    got, expected = (total(function, **arguments_of(case, wanted)) for function in (ours, definition))
    if wanted and case.options.get("recompute_hidden"):
        expected += 2 * prod(case.shapes["input"]) * case.shapes["weight1"][0]
    assert got == expected, wanted
    return got


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operator}, {case.name}")
def test_an_operator_counts_as_its_definition(case):
    for wanted in wanted_sets(case):
        assert (assert_counts_as_definition(case, wanted) == 0) == (case.operator in NORMS)


@pytest.mark.parametrize("operator", parity.OPERATORS)
def test_no_images_are_no_flops(operator):
    case = parity.cases(operator, small=True)[0]
    of_batch = {"input", "residual", "drop_path_factor"} & case.shapes.keys()
    empty = {name: (0, *case.shapes[name][1:]) for name in of_batch}
    assert assert_counts_as_definition(replace(case, shapes={**case.shapes, **empty}), differentiable(case)) == 0


def test_registering_again_changes_nothing(monkeypatch):
    before = dict(flop_registry)
    register_flop_formulas()
    assert flop_registry == before and len({operator.overloadpacket for operator in FORMULAS} & before.keys()) == 10
    monkeypatch.setitem(flop_registry, BLOCK, others := print)
    register_flop_formulas()
    assert flop_registry[BLOCK] is others


def test_nothing_is_counted_or_imported_before():
    """PyTorch's counter imports Triton, which reads TRITON_INTERPRET once."""
    script = """
import sys
import convnext_kernels
assert not {"torch.utils.flop_counter", "triton"} & sys.modules.keys()
import torch
from torch.utils.flop_counter import FlopCounterMode
def total():
    with FlopCounterMode(display=False) as counter:
        convnext_kernels.functional.depthwise_conv2d(torch.ones(1, 2, 5, 5), torch.ones(2, 1, 3, 3))
    return counter.get_total_flops()
assert total() == 0
convnext_kernels.register_flop_formulas()
assert total() == 2 * 9 * 2 * 25
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
