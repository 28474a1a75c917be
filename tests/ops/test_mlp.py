"""The pointwise MLP."""

from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from contract import Contract
from support import (
    INTERPRETED,
    arguments_of,
    assert_accurate,
    assert_far_images_are_right,
    assert_parity,
    assert_same,
    device_of,
    evaluate,
    random_like,
    relative_error,
    with_dtype,
    without_gradients,
)

from convnext_kernels.functional import mlp
from convnext_kernels.ops.mlp.configs import fused_config
from convnext_kernels.parity import DEFINITIONS, Case, poisoned_memory

HIDDEN = 11
BIASES = ("bias1", "bias2")
BLOCK = (*BIASES, "layer_scale", "drop_path_factor", "residual")
SIXTEEN_BITS = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)
"""Triton's interpreter multiplies bfloat16 as integers."""


class TestMLP(Contract):
    operator = "mlp"

    @staticmethod
    def examples(batch, channels, height, width):
        image, tokens = (batch, channels, height, width), (batch, height * width, channels)
        matrices = {"weight1": (HIDDEN, channels), "weight2": (channels, HIDDEN)}
        biases = {"bias1": (HIDDEN,), "bias2": (channels,)}
        scales = {"layer_scale": (channels,), "drop_path_factor": (batch,)}
        grn = {"grn_weight": (HIDDEN,), "grn_bias": (HIDDEN,)}
        v1 = {"input": image, **matrices, **biases, **scales, "residual": image}
        return [
            Case("mlp", "all", {**v1, **grn}, {"grn_eps": 1e-5}),
            Case("mlp", "V1", v1),
            Case("mlp", "V1, recomputed", v1, {"recompute_hidden": True}),
            Case("mlp", "V2 tokens", {"input": tokens, **matrices, **biases, **grn, "residual": tokens}),
            Case(
                "mlp",
                "tanh",
                {"input": image, **matrices, "bias1": (HIDDEN,), "layer_scale": (channels,)},
                {"bias2": None, "activation": "gelu_tanh"},
            ),
            Case("mlp", "tokens", {"input": tokens, **matrices}, {"bias1": None, "bias2": None}),
        ]

    @pytest.mark.parametrize("grn", [False, True])
    def test_recomputing_changes_no_bit(self, backend, grn):
        arguments = arguments_of(self.full(), device=device_of(backend))
        if not grn:
            arguments |= {"grn_weight": None, "grn_bias": None}
        recomputed = evaluate(self.on(backend, recompute_hidden=True), arguments)
        assert_same(recomputed, evaluate(self.on(backend), arguments))

    @pytest.mark.parametrize("images", [*SIXTEEN_BITS, torch.float32])
    @pytest.mark.parametrize("dropping", [False, True])
    def test_tiles_with_parts_of_two_images_that_grn_scales(self, dropping, images):
        """Of 143 tokens each, the last with the batch's end in it; every third is dropped."""
        case = self.full(batch=5, height=13, width=11)
        if not dropping:
            case = Case("mlp", case.name, {n: s for n, s in case.shapes.items() if n != "drop_path_factor"})
        assert_parity(case, images, device_of("triton"), "triton")

    @pytest.mark.parametrize(("tokens", "passes"), [(127, 1), (128, 0)])
    def test_grn_of_large_images_is_no_pass_of_its_own(self, tokens, passes, monkeypatch):
        arguments = without_gradients(arguments_of(self.full(height=1, width=tokens), device=device_of("triton")))
        expected = mlp(**arguments, backend="reference")
        kernel = import_module("convnext_kernels.ops.response_norm.triton_kernel")
        apply = Mock(side_effect=kernel._apply)
        monkeypatch.setattr(kernel, "_apply", apply)
        assert relative_error(mlp(**arguments, backend="triton"), expected) < 1e-6 and apply.call_count == passes

    def test_large_images_of_an_empty_batch(self):
        arguments = arguments_of(self.full(batch=0, height=13, width=11), device=device_of("triton"))
        results = evaluate(self.on("triton"), arguments)
        assert results["output"].shape == (0, *arguments["input"].shape[1:]) and not results["grad weight2"].any()

    def test_nan_stays_in_its_large_image(self):
        arguments = without_gradients(arguments_of(self.full(height=13, width=11), device=device_of("triton")))
        output = mlp(**arguments, backend="triton")
        arguments["input"][0, 0, 12, 10] = torch.nan
        got = mlp(**arguments, backend="triton")
        assert torch.equal(got[1:], output[1:]) and got[0].isnan().any()

    def test_images_of_more_tokens_than_a_split_of_grn(self):
        assert_parity(self.full(height=17, width=16), torch.float32, device_of("triton"), "triton")

    @pytest.mark.parametrize("recompute", [False, True])
    @pytest.mark.parametrize("grn", [False, True])
    @pytest.mark.parametrize(("batch", "size"), [(3, 16), (40, 2)])
    def test_what_triton_drops_may_hold_anything(self, batch, size, grn, recompute):
        """In tiles of its own and in those it shares with kept images."""
        case, device = self.full(batch=batch, height=size, width=size), device_of("triton")
        arguments = arguments_of(case, device=device) | ({} if grn else {"grn_weight": None, "grn_bias": None})
        dropped = torch.arange(batch, device=device) % 3 == 0
        arguments["drop_path_factor"] = 1 + 0.25 * torch.rand(batch, device=device)
        arguments["drop_path_factor"][dropped] = 0
        expected = evaluate(self.on("triton"), arguments)
        changed = {"input": arguments["input"].detach().clone(), "grad": random_like(expected["output"])}
        for tensor in changed.values():
            tensor[dropped] = torch.inf
            tensor[dropped, ::2] = torch.nan
        arguments["input"] = changed["input"].requires_grad_()
        with poisoned_memory():
            got = evaluate(self.on("triton", recompute_hidden=recompute), arguments, changed["grad"])
        assert torch.equal(got["grad residual"].isfinite().flatten(1).all(1), ~dropped)
        got["grad residual"] = expected["grad residual"]
        assert_same(got, expected)

    @pytest.mark.skipif(not INTERPRETED, reason="counts the products of Triton's interpreter")
    @pytest.mark.parametrize("recompute", [False, True])
    @pytest.mark.parametrize("grn", [False, True])
    def test_half_the_images_are_half_the_products(self, grn, recompute, monkeypatch):
        """Every second image is dropped, so that no tile holds dropped ones alone."""
        arguments = arguments_of(self.full(batch=96, height=2, width=2), device=device_of("triton"))
        arguments |= {} if grn else {"grn_weight": None, "grn_bias": None}
        interpreter, counts = import_module("triton.runtime.interpreter").InterpreterBuilder, []
        for factor in (torch.ones(96), torch.arange(96.0) % 2):
            products = Mock(side_effect=interpreter.create_dot)
            with monkeypatch.context() as context:
                context.setattr(interpreter, "create_dot", lambda *args, run=products: run(*args))
                evaluate(self.on("triton", recompute_hidden=recompute), {**arguments, "drop_path_factor": factor})
            counts.append(products.call_count)
        assert counts[0] == 2 * counts[1] > 0

    def test_what_triton_drops_is_not_multiplied_by_zero(self):
        arguments = without_gradients(arguments_of(self.full(), device=device_of("triton")))
        arguments["bias2"] = torch.full_like(arguments["bias2"], torch.nan)
        kept, output = arguments["drop_path_factor"] != 0, mlp(**arguments, backend="triton")
        assert torch.equal(output[~kept], arguments["residual"][~kept]) and output[kept].isnan().all()

    @pytest.mark.parametrize("given", ["grn_weight", "grn_bias"])
    def test_half_a_response_norm(self, given):
        other = {"grn_weight": "grn_bias", "grn_bias": "grn_weight"}[given]
        message = "grn_weight, grn_bias: got one of the two; accepted: both or neither"
        self.assert_refused(lambda _: {other: None}, ValueError, message)

    @pytest.mark.parametrize("eps", [0.0, -1.0])
    def test_bad_eps(self, eps):
        message = f"grn_eps: got {eps}; accepted: a number greater than 0"
        self.assert_refused(lambda _: {"grn_eps": eps}, ValueError, message)

    def test_unknown_activation(self):
        message = "activation: got 'relu'; accepted: 'gelu', 'gelu_tanh'"
        self.assert_refused(lambda _: {"activation": "relu"}, ValueError, message)

    @pytest.mark.parametrize(
        ("change", "exception", "got"),
        [
            (
                lambda r: r[:, :4],
                ValueError,
                r"shape \[3, 4, 4, 6\] on cpu; accepted: the input's \[3, 5, 4, 6\] on cpu",
            ),
            (lambda r: r[:1], ValueError, r"shape \[1, 5, 4, 6\] on cpu"),
            (lambda r: r.to("meta"), ValueError, r"shape \[3, 5, 4, 6\] on meta"),
            (torch.Tensor.half, TypeError, r"dtype torch.float16; accepted: the input's torch.float32"),
            (torch.Tensor.tolist, TypeError, r"list; accepted: a torch.Tensor"),
        ],
    )
    def test_bad_residual(self, change, exception, got):
        self.assert_refused(lambda a: {"residual": change(a["residual"])}, exception, f"residual: got {got}")

    @pytest.mark.parametrize("name", ["weight1", "weight2"])
    def test_weights_that_do_not_fit(self, name):
        self.assert_refused(lambda a: {name: a[name].t()}, ValueError, r"\w+\d: got shape .*; accepted: \[\d+.*\]")

    @pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
    def test_a_dropped_image_is_its_residual(self, backend, activation):
        """The factor 0 multiplies: output and gradients are those of a branch that is not there."""
        arguments = arguments_of(self.full(), device=device_of(backend)) | {"activation": activation}
        arguments["drop_path_factor"] = torch.tensor([0.0, 1.25, 0.0], device=arguments["input"].device)
        results = evaluate(self.on(backend), arguments)
        dropped = [0, 2]
        assert torch.equal(results["output"][dropped], arguments["residual"][dropped])
        assert not results["grad input"][dropped].any()
        kept = {
            n: v[1:2].detach() if n in ("input", "residual", "drop_path_factor") else v for n, v in arguments.items()
        }
        assert relative_error(results["output"][1:2], mlp(**kept, backend=backend)) < 1e-6

    @pytest.mark.parametrize("images", [*SIXTEEN_BITS, torch.float32])
    @pytest.mark.parametrize("grn", [False, True])
    def test_triton_keeps_the_bits_of_factors_in_sums_over_tokens(self, grn, images):
        """Of 16-bit gradients too: 1 / 0.9 in bfloat16 would make all of bias2's gradient wrong by 0.2%."""
        arguments, grad, factor = self._with_factors(images, grn, device_of("triton"))
        expected = (grad.double() * factor.double()[:, None, None, None]).sum((0, 2, 3))
        got = evaluate(self.on("triton"), arguments, grad)["grad bias2"]
        assert relative_error(got, expected) < 2**-15

    @pytest.mark.parametrize("images", SIXTEEN_BITS)
    def test_an_infinite_gradient_has_an_infinite_sum(self, images):
        arguments, grad, factor = self._with_factors(images, False, device_of("triton"))
        for image in range(len(factor)):
            grad[image, image, 0, 0] = torch.inf
        got = evaluate(self.on("triton"), arguments, grad)["grad bias2"]
        infinite = torch.arange(len(got), device=got.device) < len(factor)
        assert (got[infinite] == torch.inf).all() and got[~infinite].isfinite().all()

    def _with_factors(self, dtype, grn, device):
        """Images with parameters in float32; of what 16 bits do not hold of the factors, some is below, some above."""
        arguments = arguments_of(self.full(batch=4), device=device) | {"layer_scale": None}
        if not grn:
            arguments |= {"grn_weight": None, "grn_bias": None}
        factor = torch.tensor([1 / 0.9, 1 / 0.8, 1 / 0.75, 1.0], device=device)
        for name in ("input", "residual"):
            arguments[name] = arguments[name].detach().to(dtype).requires_grad_()
        arguments["drop_path_factor"] = factor
        return arguments, random_like(arguments["input"]).detach(), factor

    def test_without_a_residual_a_dropped_image_is_zero(self, backend):
        arguments = arguments_of(self.full(), device=device_of(backend)) | {"residual": None}
        arguments["drop_path_factor"] = torch.zeros_like(arguments["drop_path_factor"])
        assert not any(result.any() for result in evaluate(self.on(backend), arguments).values())

    @pytest.mark.parametrize("magnitude", [1e-6, 1e-2])
    @pytest.mark.parametrize("parameters", [torch.float16, torch.float32])
    def test_gradients_of_float16_at_a_small_layer_scale(self, backend, example, parameters, magnitude):
        """At the 1e-6 that layer scale starts from it times a weight is less than float16's smallest number."""
        case = self.resized(example, batch=4, channels=24, height=9, width=9)
        arguments = arguments_of(case, torch.float16, parameters=parameters, device=device_of(backend))
        near_one = self.full(batch=4, channels=24, height=9, width=9).draw(torch.float32, "cpu", seed=1)["layer_scale"]
        scale = (magnitude * near_one).half().to(arguments["input"].device, parameters)
        arguments["layer_scale"] = scale.requires_grad_()
        grad = 1000 * random_like(arguments["input"])
        ours = evaluate(self.on(backend), arguments, grad)
        exact = evaluate(self.definition, with_dtype(arguments, torch.float64), grad.double())
        theirs = evaluate(self.definition, with_dtype(arguments, torch.float16), grad)
        assert_accurate(ours, theirs, exact, torch.float16)

    @pytest.mark.parametrize("scale", [[0.0] * 5, [0.0, 1e-6, 0, 0, 0], [torch.inf, 1, 1, 1, 1], [torch.nan] * 5])
    def test_float16_at_layer_scales_of_no_size(self, backend, scale):
        """What a factor cannot be taken from: 0 gives gradients of 0, inf and NaN reach theirs."""
        arguments = arguments_of(self.full(), torch.float16, device=device_of(backend))
        arguments["layer_scale"] = torch.tensor(scale, device=arguments["input"].device).half().requires_grad_()
        ours = evaluate(self.on(backend), arguments)
        theirs = evaluate(self.definition, with_dtype(arguments, torch.float64))
        for name in ("grad weight1", "grad bias1"):
            assert torch.equal(ours[name].isfinite().all(), theirs[name].isfinite().all())
            assert ours[name].any() == theirs[name].half().any()

    @pytest.mark.gpu
    @pytest.mark.parametrize("recompute", [False, True])
    def test_offsets_past_32_bits(self, kernels, recompute):
        _, function = self.gpu_call(kernels)
        call = partial(function, bias1=None, bias2=None, recompute_hidden=recompute)
        assert_far_images_are_right(call, (2048, 64), {"weight1": (64, 64), "weight2": (64, 64)}, tensors=14)


@pytest.mark.parametrize(
    ("wanting", "products", "over_tokens"),
    [
        ("input weight1 weight2", 2, 2),
        ("input", 2, 0),
        ("weight1", 1, 1),
        ("bias1", 1, 1),
        ("weight2", 1, 1),
        ("layer_scale", 1, 1),
    ],
)
def test_backward_multiplies_only_for_what_asks(monkeypatch, wanting, products, over_tokens):
    """Beside dp's product, which all need: du's for the input, and dW's."""
    case = next(case for case in TestMLP.examples(2, 5, 3, 2) if case.name == "V1")
    arguments = without_gradients(arguments_of(case, device=device_of("triton")))
    leaves = [arguments[name].requires_grad_() for name in wanting.split()]
    output, kernel = mlp(**arguments, backend="triton"), import_module("convnext_kernels.ops.mlp.triton_kernel")
    count = {name: Mock(wraps=getattr(kernel, name)) for name in ("matmul", "long_matmul")}
    for name, mock in count.items():
        monkeypatch.setattr(kernel, name, mock)
    torch.autograd.grad(output, leaves, random_like(output))
    assert [mock.call_count for mock in count.values()] == [products, over_tokens]


ONE_KERNEL = {
    "48 channels": (48, 72, (2, 48, 9, 8), BLOCK, {}),
    "64 channels": (64, 50, (3, 64, 2, 3), BLOCK, {}),
    "96 channels, tokens": (96, 384, (2, 67, 96), (*BIASES, "drop_path_factor"), {}),
    "128 channels, tanh": (128, 128, (1, 128, 5, 5), (*BIASES, "residual"), {"activation": "gelu_tanh"}),
    "192 channels": (192, 160, (2, 192, 3, 3), (), {"bias1": None, "bias2": None}),
}
"""Channels, hidden channels, shape of the input, vectors and options: tiles and steps that are not full."""


def one_kernel_arguments(name: str, dtype: torch.dtype = torch.float16, **changes: Any) -> dict[str, Any]:
    width, hidden, shape, vectors, options = ONE_KERNEL[name]
    lengths = {"bias1": (hidden,), "drop_path_factor": shape[:1], "residual": shape}
    shapes = {"input": shape, "weight1": (hidden, width), "weight2": (width, hidden)}
    case = Case("mlp", name, {**shapes, **{v: lengths.get(v, (width,)) for v in vectors}}, options)
    return {**without_gradients(arguments_of(case, dtype, device=device_of("triton"))), **changes}


@pytest.fixture
def launches(monkeypatch):
    """Of the forward that is one kernel."""
    device_of("triton")
    kernel = import_module("convnext_kernels.ops.mlp.triton_kernel")
    mock = Mock(wraps=kernel.launch)
    monkeypatch.setattr(kernel, "launch", mock)
    yield mock
    assert all(call.args[0] is kernel.fused_kernel for call in mock.call_args_list)


class TestOneKernel:
    """Forward where nothing is saved and channels are few."""

    @pytest.mark.parametrize("name", ONE_KERNEL)
    @pytest.mark.parametrize("dtype", SIXTEEN_BITS)
    def test_accuracy(self, name, dtype, launches):
        arguments = one_kernel_arguments(name, dtype)
        definition = DEFINITIONS["mlp"]
        with poisoned_memory():
            ours = mlp(**arguments, backend="triton")
        exact = definition(**with_dtype(arguments, torch.float64))
        theirs = definition(**with_dtype(arguments, dtype))
        assert launches.call_count == 1
        assert_accurate({"output": ours}, {"output": theirs}, {"output": exact}, dtype)

    @pytest.mark.parametrize(
        ("changes", "count"),
        [
            ({}, 1),
            ({"backend": "reference"}, 0),
            ({"grn_weight": (50,), "grn_bias": (50,)}, 0),
            ({"input": (0, 64, 2, 3), "residual": (0, 64, 2, 3), "drop_path_factor": (0,)}, 0),
        ],
        ids=["plain", "reference", "GRN", "empty batch"],
    )
    def test_where_it_is_taken(self, changes, count, launches):
        arguments = one_kernel_arguments("64 channels", backend="triton")
        new = arguments["input"].new_zeros
        arguments |= {name: new(value) if isinstance(value, tuple) else value for name, value in changes.items()}
        assert mlp(**arguments).shape == arguments["input"].shape
        assert launches.call_count == count

    @pytest.mark.parametrize(("recompute", "count"), [(True, 1), (False, 0)])
    def test_training_takes_it_where_nothing_is_saved(self, recompute, count, launches):
        arguments = one_kernel_arguments("64 channels", recompute_hidden=recompute, backend="triton")
        arguments["weight1"].requires_grad_()
        evaluate(mlp, arguments)
        assert launches.call_count == count

    def test_nan_stays_in_its_token(self, launches):
        arguments = one_kernel_arguments("48 channels")
        expected = mlp(**arguments, backend="triton")
        arguments["input"][0, 5, 8, 7] = torch.nan
        output = mlp(**arguments, backend="triton")
        assert launches.call_count == 2 and output[0, :, 8, 7].isnan().all()
        output[0, :, 8, 7] = expected[0, :, 8, 7]
        assert torch.equal(output, expected)

    def test_dropped_images(self, launches):
        """In tiles of their own, whatever they hold, and in those they share with others."""
        arguments = one_kernel_arguments("48 channels", layer_scale=None)
        for name in ("input", "residual"):
            arguments[name] = arguments[name][:, :, :8].repeat(2, 1, 2, 1)
        factor = torch.tensor([1.25, 0, 0, 1.25], device=arguments["input"].device)
        expected = mlp(**arguments | {"drop_path_factor": 1.25 * torch.ones_like(factor)}, backend="triton")
        arguments["input"][1:3] = torch.nan
        output = mlp(**arguments | {"drop_path_factor": factor}, backend="triton")
        assert torch.equal(output[1:3], arguments["residual"][1:3])
        assert torch.equal(output[::3], expected[::3])
        shared = one_kernel_arguments("64 channels")
        assert torch.equal(mlp(**shared, backend="triton")[1], shared["residual"][1])
        shared["residual"] = None
        assert not mlp(**shared, backend="triton")[1].any() and launches.call_count == 4

    def test_two_runs_and_transposed_weights_give_the_same_bits(self, launches):
        arguments = one_kernel_arguments("48 channels")
        expected = mlp(**arguments, backend="triton")
        assert torch.equal(mlp(**arguments, backend="triton"), expected)
        arguments |= {name: arguments[name].t().contiguous().t() for name in ("weight1", "weight2")}
        assert torch.equal(mlp(**arguments, backend="triton"), expected) and launches.call_count == 3


EPS = 1e-5


def normalizing_arguments(name: str, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    """Of `forward_normalizing`: an input that is not normalized, and with biases also the norm's affine."""
    arguments = {"layer_scale": None, "drop_path_factor": None, "residual": None, "activation": "gelu"}
    arguments |= one_kernel_arguments(name, dtype)
    input, affine = (
        arguments.pop("input"),
        torch.randn(2, ONE_KERNEL[name][0], generator=torch.Generator().manual_seed(3)),
    )
    weight, bias = (1 + 0.2 * affine).to(dtype).to(input.device) if arguments["bias1"] is not None else (None, None)
    return {"convolved": 3 * input + 5, "norm_weight": weight, "norm_bias": bias, "eps": EPS, **arguments}


def normalizing_definition(convolved, norm_weight, norm_bias, eps, **arguments) -> dict[str, torch.Tensor]:
    rows = convolved.permute(0, 2, 3, 1) if convolved.dim() == 4 else convolved
    normalized, affine = (
        F.layer_norm(rows, rows.shape[-1:], weight, bias, eps).view_as(rows)
        for weight, bias in ((None, None), (norm_weight, norm_bias))
    )
    rstd = (rows.var(-1, correction=0) + eps).rsqrt().flatten()
    if convolved.dim() == 4:
        normalized, affine = normalized.permute(0, 3, 1, 2), affine.permute(0, 3, 1, 2)
    output, factor = DEFINITIONS["mlp"](affine, **arguments), arguments["drop_path_factor"]
    if factor is not None:  # of dropped images x^ is 0
        normalized = torch.where(factor.view(-1, *[1] * (normalized.dim() - 1)) == 0, 0, normalized)
    return {"output": output, "normalized": normalized, "rstd": rstd}


def normalizing(save: bool = True, **arguments: Any) -> dict[str, torch.Tensor]:
    kernel = import_module("convnext_kernels.ops.mlp.triton_kernel")
    results = kernel.forward_normalizing(**arguments, save=save)
    return dict(zip(("output", "normalized", "rstd"), results, strict=True))


class TestOneKernelThatNormalizes:
    """`forward_normalizing`, which the whole block is made of."""

    @pytest.mark.parametrize("name", ONE_KERNEL)
    @pytest.mark.parametrize("dtype", SIXTEEN_BITS)
    def test_accuracy(self, name, dtype, launches):
        arguments = normalizing_arguments(name, dtype)
        with poisoned_memory():
            ours = normalizing(**arguments)
        exact = normalizing_definition(**with_dtype(arguments, torch.float64))
        theirs = normalizing_definition(**with_dtype(arguments, dtype))
        rstd, exact_rstd = ours.pop("rstd"), exact.pop("rstd")
        assert launches.call_count == 1 and rstd.dtype == torch.float32
        kept = exact["normalized"].movedim(1 if exact["normalized"].dim() == 4 else -1, -1).flatten(0, -2).any(1)
        assert relative_error(rstd[kept], exact_rstd[kept]) < 1e-6 and rstd.isfinite().all()
        assert theirs.pop("rstd").shape == rstd.shape
        assert ours["normalized"].stride() == ours["output"].stride() == arguments["convolved"].stride()
        assert_accurate(ours, theirs, exact, dtype)

    def test_far_from_zero(self, launches):
        """The variance comes from differences: as the mean of squares less a square it would be lost."""
        arguments = normalizing_arguments("48 channels")
        arguments |= {"convolved": arguments["convolved"] / 16 + 1000, "drop_path_factor": None}
        exact = normalizing_definition(**with_dtype(arguments, torch.float64))
        assert relative_error(normalizing(**arguments)["rstd"], exact["rstd"]) < 1e-6

    def test_nothing_is_saved_unasked(self, launches):
        arguments = normalizing_arguments("96 channels, tokens")
        saved, results = normalizing(**arguments), normalizing(False, **arguments)
        assert torch.equal(results["output"], saved["output"]) and launches.call_count == 2
        assert results["normalized"].numel() == results["rstd"].numel() == 0

    def test_nan_stays_in_its_token(self, launches):
        arguments = normalizing_arguments("48 channels")
        expected = normalizing(**arguments)
        arguments["convolved"][0, 5, 8, 7] = torch.nan
        results = normalizing(**arguments)
        for name in ("output", "normalized"):
            assert results[name][0, :, 8, 7].isnan().all()
            results[name][0, :, 8, 7] = expected[name][0, :, 8, 7]
        assert results["rstd"][71].isnan()
        results["rstd"][71] = expected["rstd"][71]
        assert_same(results, expected)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_dropped_images_may_hold_anything(self, value, launches):
        arguments = normalizing_arguments("64 channels")
        expected = normalizing(**arguments)
        arguments["convolved"][arguments["drop_path_factor"] == 0] = value
        assert not arguments["convolved"].isfinite().all()
        assert_same(normalizing(**arguments), expected)

    def test_where_it_cannot_run(self, launches):
        arguments = normalizing_arguments("48 channels")
        kernel = import_module("convnext_kernels.ops.mlp.triton_kernel")
        assert kernel.takes_one_kernel(arguments["convolved"], None)
        assert not kernel.takes_one_kernel(arguments["convolved"], arguments["bias1"])
        arguments["convolved"] = arguments["convolved"].float()
        assert not kernel.takes_one_kernel(arguments["convolved"], None)
        with pytest.raises(ValueError, match=r"input: got 48 channels of torch.float32; accepted: what"):
            normalizing(**arguments)


@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 100, 110, 120])
def test_where_one_kernel_is_compiled_for(architecture):
    widths = [channels for channels in range(8, 400, 8) if fused_config(channels, architecture) is not None]
    few = [32, 48, 64, 80, 96, 128, 144, 160]
    assert widths == {9: [*few, 192], 10: [*few, 192], 11: []}.get(architecture // 10, few)
    for config in (fused_config(channels, architecture) for channels in widths):
        assert config.high in (0, 16, 32, 64) and config.low + config.high in widths
