"""The public operators, gathered."""

import inspect

import pytest
import torch

import convnext_kernels
from convnext_kernels import functional, parity
from convnext_kernels.functional import OPERATORS, explain


def test_every_operator_is_public_under_its_name():
    for name, function in OPERATORS.items():
        assert getattr(convnext_kernels.functional, name) is function and function.__name__ == name
    assert set(functional.__all__) == {"OPERATORS", "explain", *OPERATORS}
    assert set(parity.OPERATORS) == set(parity.DEFINITIONS) == set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_signature_is_the_definition_s_and_a_backend(name):
    ours = inspect.signature(OPERATORS[name]).parameters
    theirs = inspect.signature(parity.DEFINITIONS[name]).parameters
    assert list(ours) == [*theirs, "backend"]
    assert [p.kind for p in ours.values()][:-1] == [p.kind for p in theirs.values()]
    assert ours["backend"].default is None and ours["backend"].kind is inspect.Parameter.KEYWORD_ONLY
    for option in ("eps", "dilation", "grn_eps", "activation"):
        assert option not in ours or ours[option].default == theirs[option].default


@pytest.mark.parametrize("name", OPERATORS)
def test_docstring_names_every_argument(name):
    text = OPERATORS[name].__doc__
    assert all(parameter in text for parameter in inspect.signature(OPERATORS[name]).parameters)
    assert all(f"{section}:" in text for section in ("Args", "Returns", "Raises", "Source"))


@pytest.mark.parametrize("operator", ["layer_norm", OPERATORS["layer_norm"]], ids=["name", "function"])
def test_explain_takes_a_name_or_a_function(operator):
    assert explain(operator, torch.randn(2, 3, 4)).operator == "layer_norm"


@pytest.mark.parametrize(
    "operator", ["softmax", torch.nn.functional.layer_norm, None], ids=["unknown", "torch's", "none"]
)
def test_explain_refuses_what_is_no_operator(operator):
    with pytest.raises(ValueError, match=r"^operator: got .*; accepted: convnext_block, .*patch_linear$"):
        explain(operator, torch.randn(2, 3, 4))


def test_explain_raises_what_the_call_would():
    with pytest.raises(ValueError, match=r"^weight: got shape"):
        explain("layer_norm", torch.randn(2, 3, 4), torch.ones(5))
    assert functional.layer_norm(torch.randn(2, 3, 4)).shape == (2, 3, 4)


def test_the_default_compiler_gives_the_same_values():
    """One operator through Inductor, forward and backward, between operators that it fuses itself."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    image, weight = torch.randn(2, 6, 5, 4, generator=generator), torch.randn(6, generator=generator)

    def run(function):
        leaves = [tensor.clone().requires_grad_() for tensor in (image, weight)]
        output = function(*leaves)
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    def call(image, weight):
        return functional.layer_norm(image * 2, weight + 1).relu()

    for got, expected in zip(run(torch.compile(call, fullgraph=True)), run(call), strict=True):
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
