"""The measure of parity itself: an error that is planted is found."""

import dataclasses

import pytest
import torch

from convnext_kernels import parity
from convnext_kernels.functional import OPERATORS

FILTER = parity.Case("depthwise_conv2d", "7x7", {"input": (2, 16, 9, 7), "weight": (16, 1, 7, 7), "bias": (16,)})
MLP = parity.Case(
    "mlp",
    "V1",
    {
        "input": (2, 8, 5, 3),
        "weight1": (32, 8),
        "bias1": (32,),
        "weight2": (8, 32),
        "bias2": (8,),
        "layer_scale": (8,),
        "drop_path_factor": (2,),
        "residual": (2, 8, 5, 3),
    },
)
DTYPES = list(parity.DTYPES.values())


def failures(monkeypatch, case, function, dtype=torch.float32):
    """Names of the tensors that fail when a function stands in for the operator."""
    monkeypatch.setitem(parity.FUNCTIONS, case.operator, lambda backend, **arguments: function(**arguments))
    return {c.tensor for c in parity.compare(case, dtype, "cpu", "reference") if not c.passed}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [FILTER, MLP], ids=lambda case: case.operator)
def test_the_operators_pass(case, dtype):
    comparisons = parity.compare(case, dtype, "cpu", "reference")
    differentiable = [name for name in case.shapes if name != "drop_path_factor"]
    assert [c.tensor for c in comparisons] == ["output", *(f"grad {name}" for name in differentiable)]
    assert all(c.passed for c in comparisons)
    assert {(c.operator, c.case, c.backend) for c in comparisons} == {(case.operator, case.name, "reference")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channel", [0, 15])
def test_a_wrong_tap_of_one_channel_fails(monkeypatch, dtype, channel):
    operator = OPERATORS["depthwise_conv2d"]

    def planted(input, weight, bias):
        scale = torch.ones_like(weight)
        scale[channel, 0, 0, 6] = 0
        return operator(input, weight * scale, bias)

    assert failures(monkeypatch, FILTER, planted, dtype) == {"output", "grad input", "grad weight"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [(0, 0, 0, 0), (1, 15, 8, 6), (1, 7, 0, 6)])
def test_a_wrong_element_fails(monkeypatch, dtype, index):
    operator = OPERATORS["depthwise_conv2d"]

    def planted(**arguments):
        output = operator(**arguments)
        error = torch.zeros_like(output)
        error[index] = 0.1
        return output + error

    assert failures(monkeypatch, FILTER, planted, dtype) == {"output"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_element_never_written_fails(monkeypatch, dtype):
    operator = OPERATORS["depthwise_conv2d"]

    def planted(**arguments):
        output = operator(**arguments)
        unwritten = torch.empty_like(output)
        written = torch.ones_like(output, dtype=torch.bool)
        written[-1, -1, -1, -1] = False
        return torch.where(written, output, unwritten)

    assert "output" in failures(monkeypatch, FILTER, planted, dtype)


@pytest.mark.parametrize(
    ("absent", "fails"),
    [
        ({"layer_scale": 1.0}, {"output", "grad input", "grad weight2", "grad bias2", "grad layer_scale"}),
        ({"bias2": 0.0}, {"output", "grad bias2", "grad layer_scale"}),
        ({"bias1": 0.0}, {"output", "grad bias1", "grad input"}),
        ({"residual": 0.0}, {"output", "grad residual"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_term_left_out_fails(monkeypatch, absent, fails):
    ((name, neutral),) = absent.items()
    operator = OPERATORS["mlp"]

    def planted(**arguments):
        return operator(**{**arguments, name: arguments[name] * 0 + neutral})

    assert fails <= failures(monkeypatch, MLP, planted)


def test_dropping_another_image_fails(monkeypatch):
    operator = OPERATORS["mlp"]

    def planted(drop_path_factor, **arguments):
        return operator(**arguments, drop_path_factor=drop_path_factor.flip(0))

    assert "output" in failures(monkeypatch, MLP, planted)


@pytest.mark.parametrize(
    ("limits", "times", "fails"),
    [
        (0, 0, False),
        (1.5, 1, False),  # once by little: luck
        (1.5, parity.DRAWS, True),
        (20, 1, True),
        (float("nan"), 1, True),
    ],
)
def test_what_is_over_the_limit_is_drawn_again(monkeypatch, limits, times, fails):
    """An error of so many limits in the first draws."""
    (output, *_) = parity.compare(FILTER, torch.float32, "cpu", "reference")
    operator, drawn = OPERATORS["depthwise_conv2d"], []

    def planted(input, weight, bias):
        drawn.append(input.detach())
        right = operator(input, weight, bias)
        return right * (1 + limits * output.limit) if len(drawn) <= times else right

    assert ("output" in failures(monkeypatch, FILTER, planted)) == fails
    assert len(drawn) == (parity.DRAWS if times else 1) and len({float(input.sum()) for input in drawn}) == len(drawn)


def test_the_measure_decides_that_is_nearer_its_limit():
    """The smaller error here, whose limit PyTorch makes smaller still."""
    norm, maximum = (3e-7, 1e-7), (4e-7, 1e-6)
    judged = parity._judge(FILTER, torch.float32, "reference", "output", [norm, maximum])
    assert (judged.error, judged.torch_error) == norm and not judged.passed


@pytest.mark.parametrize("layout", parity.LAYOUTS)
def test_inputs_and_gradients_lie_in_the_layout_of_the_case(monkeypatch, layout):
    operator, strides = OPERATORS["mlp"], {}

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.clone()

        @staticmethod
        def backward(ctx, gradient):
            strides["gradient"] = gradient.stride()
            return gradient

    def noting(**arguments):
        strides.update({name: arguments[name].stride() for name in ("input", "residual")})
        return Noting.apply(operator(**arguments))

    assert failures(monkeypatch, dataclasses.replace(MLP, layout=layout), noting) == set()
    expected = parity.LAYOUTS[layout](torch.empty(MLP.shapes["input"])).stride()
    assert strides == dict.fromkeys(("input", "residual", "gradient"), expected)


def test_a_gradient_of_another_sign_fails(monkeypatch):
    class Negated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.view_as(tensor)

        @staticmethod
        def backward(ctx, gradient):
            return -gradient

    operator = OPERATORS["depthwise_conv2d"]

    def planted(input, weight, bias):
        return operator(input, weight, Negated.apply(bias))

    assert failures(monkeypatch, FILTER, planted) == {"grad bias"}


def test_nan_never_passes_and_the_limit_is_inclusive():
    (comparison, *_) = parity.compare(FILTER, torch.float32, "cpu", "reference")
    assert not dataclasses.replace(comparison, error=float("nan")).passed
    assert dataclasses.replace(comparison, error=comparison.limit).passed
    assert not dataclasses.replace(comparison, error=comparison.limit * 1.001).passed
    assert not dataclasses.replace(comparison, limit=float("nan")).passed


@pytest.mark.parametrize("operator", parity.OPERATORS)
def test_scales_are_drawn_near_one(operator):
    for case in parity.cases(operator, small=True):
        tensors = case.draw(torch.float64, "cpu", seed=0)
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == dict(case.shapes)
        for name, tensor in tensors.items():
            if name in ("layer_scale", "norm_weight", "grn_weight") or (name == "weight" and tensor.dim() == 1):
                assert tensor.min() > 0.3 and tensor.max() < 1.7
            elif name != "drop_path_factor":
                assert tensor.abs().min() < 1 and tensor.std() > 0.02, name


@pytest.mark.parametrize("operator", parity.OPERATORS)
def test_cases_have_names_of_their_own_and_the_small_are_among_all(operator):
    small, every = parity.cases(operator, True), parity.cases(operator, False)
    assert len({case.name for case in every}) == len(every) > len(small)
    assert all(case in every for case in small)
    assert {case.operator for case in every} == {operator}


def test_cases_of_no_operator():
    with pytest.raises(ValueError, match=r"^operator: got 'softmax'; accepted: convnext_block"):
        parity.cases("softmax", True)


def test_layouts_are_what_they_say():
    image = torch.randn(2, 3, 4, 5)
    laid = {name: layout(image) for name, layout in parity.LAYOUTS.items()}
    assert laid["channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert laid["contiguous"].is_contiguous()
    for name in ("permuted", "sliced", "expanded"):
        assert not laid[name].is_contiguous() and not laid[name].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(laid[name], image) for name in laid if name != "expanded")
    assert 0 in laid["expanded"].stride()


def test_what_cannot_run_is_told():
    case = parity.cases("layer_norm", True)[0]
    assert parity.unsupported(case, torch.float32, "cpu", "reference") == []
    assert parity.unsupported(case, torch.float64, "cpu", "triton")


@pytest.mark.parametrize(("setting", "tf32"), [("highest", False), ("high", True)])
def test_pytorchs_convolutions_are_as_precise_as_its_products(monkeypatch, setting, tf32):
    """Its own error, which is the measure of ours, would be that of TF32 beside kernels that compute in float32."""
    seen, definition = [], parity.DEFINITIONS["depthwise_conv2d"]

    def noting(**arguments):
        seen.append((arguments["input"].dtype, torch.backends.cudnn.allow_tf32))
        return definition(**arguments)

    monkeypatch.setitem(parity.DEFINITIONS, "depthwise_conv2d", noting)
    torch.set_float32_matmul_precision(setting)
    try:
        parity.compare(FILTER, torch.float32, "cpu", "reference")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (torch.float32, tf32) in seen and torch.backends.cudnn.allow_tf32


def test_memory_is_poisoned_only_within_the_context():
    before = torch.are_deterministic_algorithms_enabled()
    with parity.poisoned_memory():
        assert torch.empty(1000).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before
