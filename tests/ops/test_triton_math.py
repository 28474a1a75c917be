"""GELU on the device: its three forms and their derivatives over every 16-bit value and a dense sweep of float32."""

import math

import pytest
import torch
from support import INTERPRETED
from torch import Tensor

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from convnext_kernels.ops.common.triton_math import gelu, gelu_derivative, gelu_form  # noqa: E402

FORMS = ("erf", "fit", "tanh")


@triton.jit
def apply_kernel(x_ptr, out_ptr, count, FORM: tl.constexpr, DERIVATIVE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < count, other=0.0)
    result = gelu_derivative(x, FORM) if DERIVATIVE else gelu(x, FORM)
    tl.store(out_ptr + offsets, result, mask=offsets < count)


def on_device(x: Tensor, form: str, derivative: bool) -> Tensor:
    x = x.to("cpu" if INTERPRETED else "cuda")
    out = torch.full_like(x, torch.nan)
    apply_kernel[(triton.cdiv(x.numel(), 4096),)](
        x, out, x.numel(), FORM=form, DERIVATIVE=derivative, BLOCK=4096, num_warps=4
    )
    return out.cpu().double()


def exact(x: Tensor, form: str, derivative: bool) -> Tensor:
    """From the definitions, in float64; at the infinities the limits."""
    x = x.double().clamp(-1e9, 1e9)
    if form == "tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        gate = torch.sigmoid(2 * inner)
        slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
        return gate + x * gate * torch.sigmoid(-2 * inner) * slope if derivative else x * gate
    phi = 0.5 * torch.erfc(-x / math.sqrt(2))
    density = torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
    return phi + x * density if derivative else x * phi


def every_value(dtype: torch.dtype) -> Tensor:
    """All 65536 values of a 16-bit dtype, in float32."""
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).float()


def sweep() -> Tensor:
    """Every 1e-4 where GELU bends, and magnitudes from the subnormal to 1e9."""
    magnitudes = torch.logspace(-40, 9, 5000)
    return torch.cat([torch.linspace(-20, 20, 400001), magnitudes, -magnitudes])


VALUES = {
    "float16": lambda: every_value(torch.float16),
    "bfloat16": lambda: every_value(torch.bfloat16),
    "float32": sweep,
}

# Besides two units of rounding of the result. Those of "fit" are what its docstrings promise.
LIMITS = {"erf": 1e-7, "fit": 2.5e-7, "tanh": 1e-7}
DERIVATIVE_LIMITS = {"erf": 1e-7, "fit": 1.6e-6, "tanh": 2e-7}
# Above 0 the derivative by tanh takes 1 - gate. In units of 2^-24 the sum in gate's denominator costs one and a GPU's
# division two, times at most x slope = 34.07 at x = 4.96, beyond which the gate is 1. On these values it is 5.7e-6 with
# such a division emulated, and 1.2e-7 up to 0; as NumPy divides 1.7e-6 and 4.3e-8; PyTorch's own 8.0e-7 and 1.0e-6.
TANH_DERIVATIVE_ABOVE_0 = 3 * 2**-24 * 34.08


def limits(x: Tensor, form: str, derivative: bool) -> Tensor:
    limits = torch.full_like(x, (DERIVATIVE_LIMITS if derivative else LIMITS)[form])
    if form == "tanh" and derivative:
        limits[x > 0] = TANH_DERIVATIVE_ABOVE_0
    return limits


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("derivative", [False, True], ids=["gelu", "derivative"])
@pytest.mark.parametrize("form", FORMS)
def test_error(form, derivative, values):
    x = VALUES[values]()
    x = x[x.abs() <= 1e9]
    truth = exact(x, form, derivative)
    error = (on_device(x, form, derivative) - truth).abs() - 2 * torch.finfo(torch.float32).eps * truth.abs()
    assert x.numel() > 40000
    assert (error / limits(x, form, derivative)).max() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("derivative", [False, True], ids=["gelu", "derivative"])
@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_nan(form, derivative, dtype):
    x = every_value(dtype)
    x = x[x.isnan()]
    assert x.numel() > 100 and on_device(x, form, derivative).isnan().all()


@pytest.mark.parametrize("derivative", [False, True], ids=["gelu", "derivative"])
@pytest.mark.parametrize("form", FORMS)
def test_no_nan_where_pytorch_has_none(form, derivative):
    x = torch.tensor([-torch.inf, -3e38, -1e30, -1e20, 1e20, 1e30, 3e38, torch.inf], requires_grad=True)
    theirs = torch.nn.functional.gelu(x, approximate="tanh" if form == "tanh" else "none")
    if derivative:
        (theirs,) = torch.autograd.grad(theirs.sum(), x)
    ours = on_device(x.detach(), form, derivative)
    assert not (ours.isnan() & ~theirs.isnan()).any()
    if form == "fit":
        limits = (x > 0).double() if derivative else x.detach().double().clamp_min(0)
        assert torch.allclose(ours, limits, rtol=1e-6, atol=1e-6)


def test_form_by_activation_and_dtype():
    assert gelu_form("gelu", torch.float32) == "erf"
    assert gelu_form("gelu", torch.float16) == gelu_form("gelu", torch.bfloat16) == "fit"
    assert {gelu_form("gelu_tanh", dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)} == {"tanh"}
