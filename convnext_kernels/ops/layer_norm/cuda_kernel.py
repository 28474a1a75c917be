"""LayerNorm over channels in CUDA C++; see csrc/layer_norm."""

from __future__ import annotations

from torch import Tensor

from convnext_kernels.ops.common.cuda_launch import (
    address,
    as_float32,
    element_type,
    launch,
    library,
    parameter_type,
    partial_sums,
    same_dtype,
)
from convnext_kernels.ops.common.layouts import (
    empty_statistic,
    from_channels_last,
    nothing,
    to_channels_last,
    tokens_per_image,
)


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    save: bool,
    drop_path_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's `forward`."""
    rows, parameters = to_channels_last(input), same_dtype(weight, bias)
    factor = as_float32(drop_path_factor)
    channels = rows.shape[-1]
    tokens = rows.numel() // channels
    output = rows.new_empty(rows.shape)
    mean, rstd = (empty_statistic(rows) if save else None for _ in range(2))
    launch(
        "layer_norm_forward",
        rows.device,
        input=address(rows),
        weight=address(parameters[0]),
        bias=address(parameters[1]),
        drop_path_factor=address(factor),
        output=address(output),
        mean=address(mean),
        rstd=address(rstd),
        type=element_type(rows.dtype),
        parameter_type=parameter_type(rows.dtype, *parameters),
        tokens=tokens,
        tokens_per_image=tokens_per_image(rows),
        channels=channels,
        eps=eps,
    )
    if mean is None or rstd is None:
        return from_channels_last(output), nothing(rows), nothing(rows)
    return from_channels_last(output), mean, rstd


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    wanted: list[bool],
    drop_path_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's `backward`."""
    factor = as_float32(drop_path_factor)
    grads, rows, parameters = to_channels_last(grad_output), to_channels_last(input), same_dtype(weight)
    channels = rows.shape[-1]
    call = {"type": element_type(rows.dtype), "tokens": rows.numel() // channels, "channels": channels}
    grad_input = rows.new_empty(rows.shape) if wanted[0] else None
    partials = None
    if wanted[1] or wanted[2]:
        partials = rstd.new_empty((library().layer_norm_backward_splits(**call), 2 * channels))
    launch(
        "layer_norm_backward",
        rows.device,
        grad_output=address(grads),
        input=address(rows),
        weight=address(parameters[0]),
        mean=address(mean),
        rstd=address(rstd),
        drop_path_factor=address(factor),
        grad_input=address(grad_input),
        partials=address(partials),
        parameter_type=parameter_type(rows.dtype, *parameters),
        tokens_per_image=tokens_per_image(rows),
        **call,
    )
    sums = nothing(rstd) if partials is None else partial_sums(partials)
    return (
        nothing(input) if grad_input is None else from_channels_last(grad_input),
        sums[:channels] if wanted[1] else nothing(input),
        sums[channels:] if wanted[2] else nothing(input),
    )
