"""The pointwise MLP."""

from functools import partial

import pytest
import torch
from contract import Contract
from support import arguments_of, assert_far_images_are_right, assert_same, device_of, evaluate, relative_error

from convnext_kernels.functional import mlp
from convnext_kernels.parity import Case

HIDDEN = 11


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

    def test_what_triton_drops_may_hold_anything(self, value):
        """Rows of dropped images alone are skipped, so these are more than a tile."""
        case = self.full(batch=2, height=16, width=16)
        arguments = arguments_of(case, device=device_of("triton")) | {"grn_weight": None, "grn_bias": None}
        arguments["drop_path_factor"] = torch.tensor([1.25, 0.0], device=arguments["input"].device)
        expected = evaluate(self.on("triton"), arguments)
        arguments["input"] = arguments["input"].detach().clone()
        arguments["input"][1] = value
        arguments["input"].requires_grad_()
        got = evaluate(self.on("triton", recompute_hidden=True), arguments)
        assert torch.equal(got["output"], expected["output"])

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

    def test_without_a_residual_a_dropped_image_is_zero(self, backend):
        arguments = arguments_of(self.full(), device=device_of(backend)) | {"residual": None}
        arguments["drop_path_factor"] = torch.zeros_like(arguments["drop_path_factor"])
        assert not any(result.any() for result in evaluate(self.on(backend), arguments).values())

    @pytest.mark.gpu
    def test_offsets_past_32_bits(self, kernels):
        _, function = self.gpu_call(kernels)
        call = partial(function, bias1=None, bias2=None)
        assert_far_images_are_right(call, (2048, 64), {"weight1": (64, 64), "weight2": (64, 64)}, tensors=14)
