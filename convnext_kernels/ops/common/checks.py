"""Checks of arguments, made before any kernel runs. Each error names the argument, what was got, what is accepted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Found once: torch.compile of PyTorch 2.8 cannot trace the question.
AUTOCAST_DEVICES = tuple(device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device))


def check_tensor(name: str, value: object) -> None:
    """Checks that an argument is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}; accepted: a torch.Tensor")


def check_input(input: Tensor, ranks: tuple[int, ...], name: str = "input") -> None:
    """Checks that a tensor is one of activations: floating point, of an accepted rank, with nothing empty but N."""
    check_tensor(name, input)
    if input.dtype not in DTYPES:
        raise TypeError(f"{name}: got dtype {input.dtype}; accepted: float16, bfloat16, float32, float64")
    if input.dim() not in ranks:
        shapes = {4: "[N, C, H, W]", 3: "[N, L, C]"}
        accepted = " or ".join(shapes[rank] for rank in ranks)
        raise ValueError(f"{name}: got {input.dim()} dimensions {list(input.shape)}; accepted: {accepted}")
    if 0 in input.shape[1:]:
        raise ValueError(f"{name}: got shape {list(input.shape)}; accepted: only the batch may be empty")


def check_parameter(name: str, parameter: Tensor | None, shape: tuple[int, ...], input: Tensor) -> None:
    """Checks a parameter's shape, device and dtype (float32 or the input's) against the input; None passes."""
    if parameter is None:
        return
    check_tensor(name, parameter)
    if parameter.shape != shape:
        raise ValueError(f"{name}: got shape {list(parameter.shape)}; accepted: {list(shape)}")
    if parameter.dtype != input.dtype and (parameter.dtype != torch.float32 or input.dtype == torch.float64):
        accepted = [input.dtype] if input.dtype == torch.float64 else [input.dtype, torch.float32]
        names = " or ".join(map(str, dict.fromkeys(accepted)))
        raise TypeError(f"{name}: got dtype {parameter.dtype}; accepted: {names} with an input of {input.dtype}")
    if parameter.device != input.device:
        raise ValueError(f"{name}: got device {parameter.device}; accepted: the input's {input.device}")


def check_positive(name: str, value: float) -> None:
    """Checks that a number is greater than zero."""
    if not value > 0:
        raise ValueError(f"{name}: got {value}; accepted: a number greater than 0")


def check_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    """Checks that a value is one of a few names."""
    if value not in accepted:
        raise ValueError(f"{name}: got {value!r}; accepted: {', '.join(map(repr, accepted))}")


def check_eval_mode(model: nn.Module) -> None:
    """ValueError with the name of the first module in training mode."""
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(f"model: `{name or 'model'}` is in training mode; accepted: a model after model.eval()")


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives to these activations; None where it is off."""
    device = input.device.type
    if device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def autocast(input: Tensor) -> Tensor:
    """Casts activations to autocast's dtype where it is on: 16-bit in and out, float32 inside the kernels."""
    dtype = autocast_dtype(input)
    return input if dtype is None else input.to(dtype)
