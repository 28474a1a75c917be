"""Global response normalisation."""

import pytest
import torch
from contract import Contract
from support import arguments_of, device_of, evaluate

from convnext_kernels.parity import Case


class TestGlobalResponseNorm(Contract):
    operator = "global_response_norm"
    special_values = (torch.nan,)  # an infinite norm leaves the other channels finite

    @staticmethod
    def examples(batch, channels, height, width):
        affine = {"weight": (channels,), "bias": (channels,)}
        return [
            Case("global_response_norm", "images", {"input": (batch, channels, height, width), **affine}),
            Case("global_response_norm", "tokens", {"input": (batch, height * width, channels), **affine}),
        ]

    @pytest.mark.parametrize("eps", [0.0, -1.0])
    def test_bad_eps(self, eps):
        self.assert_refused(lambda _: {"eps": eps}, ValueError, f"eps: got {eps}; accepted: a number greater than 0")

    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_both_parameters_are_needed(self, name):
        self.assert_refused(lambda _: {name: None}, TypeError, f"{name}: got NoneType; accepted: a torch.Tensor")

    def test_squares_that_float16_cannot_hold(self, backend):
        arguments = arguments_of(self.full(), torch.float16, device=device_of(backend))
        arguments["input"] = (arguments["input"].detach() * 1000).requires_grad_()
        assert all(result.isfinite().all() for result in evaluate(self.on(backend), arguments).values())

    def test_a_channel_of_zeros_has_finite_gradients(self, backend):
        arguments = arguments_of(self.full(), device=device_of(backend))
        zeroed = arguments["input"].detach().clone()
        zeroed[:, 2] = 0
        results = evaluate(self.on(backend), {**arguments, "input": zeroed.requires_grad_()})
        assert all(result.isfinite().all() for result in results.values())
