"""The whole ConvNeXt block as one operator."""

from unittest.mock import Mock

import pytest
import torch
from contract import Contract
from support import (
    DTYPES,
    INTERPRETED_DTYPES,
    OperatorCalls,
    arguments_of,
    assert_accurate,
    assert_far_images_are_right,
    assert_parity,
    assert_same,
    device_of,
    evaluate,
    leaves_of,
    relative_error,
    with_dtype,
    without_gradients,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from convnext_kernels.functional import depthwise_conv2d_layer_norm, explain, mlp
from convnext_kernels.ops.convnext_block import configs, reference
from convnext_kernels.ops.convnext_block.steps import fold, unfold
from convnext_kernels.parity import Case
from convnext_kernels.variants import VARIANTS

HIDDEN = 11
ABSENT = ("norm_weight", "norm_bias", "conv_bias", "bias1", "bias2")


class TestBlock(Contract):
    operator = "convnext_block"
    folds = True
    sixteen_bit = torch.float16  # which its products can be interpreted in
    spreading = ("grad conv_weight",)  # PyTorch and tensor cores multiply by the zeros around the image

    @staticmethod
    def examples(batch, channels, height, width):
        image = {"input": (batch, channels, height, width), "conv_weight": (channels, 1, 3, 3)}
        matrices = {"weight1": (HIDDEN, channels), "weight2": (channels, HIDDEN)}
        norm = {"norm_weight": (channels,), "norm_bias": (channels,)}
        biases = {"conv_bias": (channels,), "bias1": (HIDDEN,), "bias2": (channels,)}
        scales = {"layer_scale": (channels,), "drop_path_factor": (batch,)}
        grn = {"grn_weight": (HIDDEN,), "grn_bias": (HIDDEN,)}
        every = {**image, **matrices, **norm, **biases}
        return [
            Case("convnext_block", "all", {**every, **scales, **grn}, {"grn_eps": 1e-5}),
            Case("convnext_block", "V1", {**every, **scales}),
            Case("convnext_block", "V1, recomputed", {**every, **scales}, {"recompute_hidden": True}),
            Case("convnext_block", "V2", {**every, **grn}),
            Case("convnext_block", "weights alone", {**image, **matrices}, dict.fromkeys(ABSENT)),
        ]

    @pytest.mark.parametrize(("images", "channels"), [(torch.float32, 32), (torch.float16, 5)])
    def test_float32_residual(self, example, backend, images, channels):
        """Under autocast, to the accuracy of PyTorch where its sum is float32; 32 channels are one Triton kernel."""
        example = self.resized(example, channels=channels)
        arguments = arguments_of(example, images, parameters=torch.float32, device=device_of(backend))
        exact = evaluate(self.definition, with_dtype(arguments, torch.float64))
        halves = with_dtype(without_gradients(arguments), torch.float16)
        branch = self.definition(**halves).float() - halves["input"].float()
        with torch.autocast(arguments["input"].device.type, torch.float16):
            output = self.on(backend, float32_residual=True)(**{**arguments, "recompute_hidden": channels == 32})
        ours = evaluate(lambda **_: output, arguments)
        assert output.dtype == torch.float32 and output.is_contiguous(memory_format=torch.channels_last)
        assert ours["grad input"].dtype == images
        # The branch alone is rounded; what is added to it is not.
        rounding = torch.finfo(torch.float16).eps * branch.abs().max()
        assert (ours["output"].double() - exact["output"]).abs().max() <= 4 * rounding
        theirs = evaluate(self.definition, with_dtype(arguments, torch.float16))
        for results in (ours, theirs, exact):
            results.pop("output")
        assert_accurate(ours, theirs, exact, torch.float16)

    @torch.autocast("cpu", torch.bfloat16)
    def test_float32_residual_is_registered_and_compiles(self, example):
        arguments = {**arguments_of(example), "float32_residual": True}
        self.opcheck(arguments, "reference")
        torch._dynamo.reset()
        compiled = torch.compile(self.function, fullgraph=True, backend="aot_eager")
        assert_same(evaluate(compiled, arguments), evaluate(self.function, arguments))

    def test_float32_residual_rests_without_autocast(self, example):
        arguments = arguments_of(example, torch.bfloat16)
        with_it, without = (self.on("reference", float32_residual=keeps) for keeps in (True, False))
        assert_same(evaluate(with_it, arguments), evaluate(without, arguments))

    def test_is_its_two_halves(self, example):
        given = arguments_of(example, torch.float64)

        def halves(input, conv_weight, conv_bias, norm_weight, norm_bias, dilation=1, eps=1e-6, **others):
            others["recompute_hidden"] = bool(others.get("recompute_hidden"))
            norm = (norm_weight, norm_bias)
            u = depthwise_conv2d_layer_norm(input, conv_weight, conv_bias, *norm, dilation=dilation, eps=eps)
            return mlp(u, residual=input, **others)

        got, expected = evaluate(self.function, given), evaluate(halves, given)
        assert max(relative_error(got[name], value) for name, value in expected.items()) < 1e-12

    def test_recomputing_changes_no_bit(self, backend):
        arguments = arguments_of(self.full(), device=device_of(backend)) | {"grn_weight": None, "grn_bias": None}
        recomputed, saved = (evaluate(self.on(backend, recompute_hidden=r), arguments) for r in (True, False))
        assert_same(recomputed, saved)

    @pytest.mark.parametrize("recompute", [False, True])
    def test_opcheck_with_the_one_kernel_of_few_channels(self, recompute):
        arguments = arguments_of(self.full(channels=32), torch.float16, device=device_of("triton"))
        arguments |= {"grn_weight": None, "grn_bias": None, "recompute_hidden": recompute}
        self.opcheck(arguments, "triton")

    def test_what_is_dropped_may_hold_anything(self, kernels, value):
        """An image whose factor is 0 is copied, forward and backward, whatever its branch would be."""
        arguments = arguments_of(self.full(), device=device_of(kernels)) | {"grn_weight": None, "grn_bias": None}
        expected, dropped = evaluate(self.on(kernels), arguments), arguments["drop_path_factor"] == 0
        assert 0 < dropped.sum() < len(dropped)
        changed = arguments["input"].detach().clone()
        changed[dropped] = value
        got = evaluate(self.on(kernels), arguments | {"input": changed.requires_grad_()})
        torch.testing.assert_close(got["output"][dropped], changed[dropped].detach(), rtol=0, atol=0, equal_nan=True)
        got["output"][dropped] = expected["output"][dropped]
        assert_same(got, expected)

    @pytest.mark.parametrize("name", ["conv_weight", "weight1", "weight2"])
    def test_weights_that_do_not_fit(self, name):
        message = r"\w+\d?: got shape .*; accepted: \[\d+.*\]"
        self.assert_refused(lambda a: {name: a[name].transpose(0, 1)}, ValueError, message)

    @pytest.mark.parametrize("option", ["eps", "grn_eps"])
    def test_bad_eps(self, option):
        message = f"{option}: got -1.0; accepted: a number greater than 0"
        self.assert_refused(lambda _: {option: -1.0}, ValueError, message)

    @pytest.mark.gpu
    @pytest.mark.parametrize("recompute", [False, True])
    def test_offsets_past_32_bits(self, kernels, recompute):
        _, function = self.gpu_call(kernels)
        absent = dict.fromkeys(ABSENT)
        shapes = {"conv_weight": (64, 1, 7, 7), "weight1": (64, 64), "weight2": (64, 64)}
        assert_far_images_are_right(
            lambda **arguments: function(**arguments, **absent, recompute_hidden=recompute), (64, 32, 64), shapes, 16
        )


def test_folding_and_its_gradients():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, norm_weight, norm_bias, grad = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((6, 5), (7, 5), (7,), (5,), (5,), (6, 7))
    )
    leaves = [tensor.requires_grad_() for tensor in (norm_weight, norm_bias, weight)]
    expected = (x * norm_weight + norm_bias) @ weight.t() + bias
    folded_weight, folded_bias = fold(weight.detach(), bias, norm_weight.detach(), norm_bias.detach(), x)
    assert torch.allclose(x @ folded_weight.t() + folded_bias, expected, rtol=1e-13)
    gradients = unfold(grad.t() @ x, grad.sum(0), *(leaves[i].detach() for i in (2, 0, 1)))
    for got, wanted in zip(gradients, torch.autograd.grad(expected, leaves, grad), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-13)


@pytest.mark.parametrize("norm", [None, "given"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_folded_weight_is_dense_and_no_view_of_the_weight(norm, dtype):
    """What is saved must not change with the weights, nor be the same memory as an argument."""
    weight, bias = torch.randn(5, 7).t(), torch.randn(7)
    folded = fold(weight, bias, None if norm is None else torch.ones(5), None, torch.zeros(1, 5, 1, 1, dtype=dtype))
    assert folded[0].dtype == dtype and folded[1].dtype == torch.float32
    assert folded[0].is_contiguous() and torch.equal(folded[0], weight.to(dtype))
    assert {tensor.data_ptr() for tensor in folded}.isdisjoint({weight.data_ptr(), bias.data_ptr()})


@pytest.mark.parametrize(
    ("channels", "dtype", "grn", "on_gpu", "tf32", "expected"),
    [
        (96, torch.bfloat16, False, True, False, True),
        (256, torch.float16, False, True, False, True),
        (384, torch.bfloat16, False, True, False, False),
        (96, torch.bfloat16, True, True, False, False),
        (96, torch.bfloat16, False, False, False, False),
        (96, torch.float32, False, True, False, False),
        (96, torch.float32, False, True, True, True),
        (96, torch.float64, False, True, True, False),
    ],
)
def test_when_hidden_activations_are_recomputed_unasked(channels, dtype, grn, on_gpu, tf32, expected, monkeypatch):
    monkeypatch.setattr(configs, "float32_precision", lambda: "tf32" if tf32 else "ieee")
    input = Mock(dtype=dtype, is_cuda=on_gpu, shape=torch.Size([2, channels, 3, 3]))
    assert configs.recomputes_by_default(input, grn) is expected


class Rounded(TorchDispatchMode):
    """Notes the shape of every 16-bit tensor that is filled from a float32 one."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = args[0].dtype if args and isinstance(args[0], Tensor) and "empty" not in function.__name__ else None
        if given == torch.float32 and isinstance(result, Tensor) and result.dtype == torch.bfloat16:
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("recompute", [False, True])
def test_autocast_rounds_a_weight_once_a_step(recompute):
    """weight1 with the norm in it, for forward and backward; weight2 as it is, and with layer scale in backward."""
    arguments = arguments_of(TestBlock().full()) | {"recompute_hidden": recompute}
    with OperatorCalls() as step, torch.autocast("cpu", torch.bfloat16):
        evaluate(TestBlock().function, arguments)
    with Rounded() as rounded, torch.no_grad():
        for run, (_, call) in zip((reference.forward, reference.backward), step.calls, strict=True):
            run(*call[:-1])
    first, second = (tuple(arguments[name].shape) for name in ("weight1", "weight2"))
    assert [rounded.shapes.count(shape) for shape in (first, second)] == [1, 2]


def test_explain_says_why_products_cannot_run():
    """The CUDA kernels of a block are those of its convolution and norm; products are Triton's."""
    arguments = without_gradients(arguments_of(TestBlock().full()))
    reasons = explain("convnext_block", **with_dtype(arguments, torch.float64)).reasons["cuda"]
    assert "its products are Triton's: float64 has no Triton kernels" in reasons


def test_gradients_are_made_only_for_what_asks():
    """Leaves in a frozen block get theirs, and a block whose input needs none runs no convolution backward."""
    arguments = without_gradients(arguments_of(TestBlock().full()))
    arguments["layer_scale"].requires_grad_()
    convolution = Mock(side_effect=AssertionError("the convolution's backward ran"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("convnext_kernels.ops.depthwise_conv.reference.backward", convolution)
        patch.setattr("convnext_kernels.ops.layer_norm.reference.backward", convolution)
        results = evaluate(TestBlock().function, arguments)
    assert leaves_of(arguments).keys() == {"layer_scale"} and results["grad layer_scale"].any()


WIDTHS = sorted({width for variant in VARIANTS.values() for width in variant.dims})


def width_case(width: int, grn: bool, hidden: int, size: int) -> Case:
    """A block as a published variant has it, on maps of 2x2."""
    shapes = {"input": (2, width, 2, 2), "conv_weight": (width, 1, size, size), "conv_bias": (width,)}
    shapes |= {"norm_weight": (width,), "norm_bias": (width,), "weight1": (hidden, width), "bias1": (hidden,)}
    shapes |= {"weight2": (width, hidden), "bias2": (width,)}
    v1, v2 = {"layer_scale": (width,), "drop_path_factor": (2,)}, {"grn_weight": (hidden,), "grn_bias": (hidden,)}
    return Case("convnext_block", str(width), shapes | (v2 if grn else v1))


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
@pytest.mark.parametrize("grn", [False, True], ids=["V1", "V2"])
@pytest.mark.parametrize("width", WIDTHS)
def test_published_widths(width, grn, dtype):
    """The interpreter is slow: wide blocks have few hidden channels, and small filters where V1 has the same."""
    hidden, size = (4 * width, 7) if width <= 96 else (96, 1 if grn else 3)
    assert_parity(width_case(width, grn, hidden, size), dtype, device_of("triton"), "triton")


def test_more_hidden_channels_than_a_step_of_their_sums():
    assert_parity(width_case(20, False, 1040, 3), torch.float32, device_of("triton"), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grn", [False, True], ids=["V1", "V2"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_published_width_on_a_gpu(width, grn, dtype, backend):
    device_of(backend)
    assert_parity(width_case(width, grn, 4 * width, 7), dtype, "cuda", backend)
