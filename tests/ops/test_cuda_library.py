"""What the compiled library's launchers do that no operator asks of them yet, and what they refuse."""

import sys
import threading
import time

import pytest
import torch
from support import DTYPES, INTERPRETED, relative_error
from torch import Tensor

from convnext_kernels.backends import machine_reasons
from convnext_kernels.functional import layer_norm
from convnext_kernels.ops.common.cuda_launch import (
    address,
    element_type,
    image_strides,
    launch,
    library,
    partial_sums,
)

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SHAPE = (5, 6, 9, 10)
"""Images [N, H, W, C]."""

REASONS = machine_reasons("cuda", DEVICE, torch.float32, by_name=True)
pytestmark = pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS))

PADDINGS = {
    "dense": (0, 0, 0, 0),
    "even": (0, 2, 6, 10),
    "odd": (0, 1, 0, 0),
    "misaligned": (1, 0, 0, 0),
}
"""Elements before the first pixel, and between pixels, rows and images."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padded(values: Tensor, dtype: torch.dtype, padding: str) -> tuple[Tensor, Tensor]:
    """Images of these values, and the memory that they lie in, NaN elsewhere."""
    batch, height, width, channels = values.shape
    first, pixel, row, image = PADDINGS[padding]
    pixel += channels
    row += width * pixel
    image += height * row
    memory = torch.full((first + batch * image,), torch.nan, dtype=dtype, device=DEVICE)
    images = memory.as_strided(values.shape, (image, row, pixel, 1), first)
    return images.copy_(values), memory


def written(images: Tensor, memory: Tensor) -> Tensor:
    """Which elements of the memory are the images'."""
    mask = torch.zeros_like(memory, dtype=torch.bool)
    mask.as_strided(images.shape, images.stride(), images.storage_offset()).fill_(True)
    return mask


def vector(values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return values.to(dtype).to(DEVICE)


def dropped(images: Tensor) -> tuple[Tensor, Tensor]:
    """Drop path factors, and the images with NaN in those whose factor is 0."""
    factor = vector(torch.tensor([0.0, 1.25, 0.0, 0.0, 1.25]))
    images[factor == 0] = torch.nan
    return factor, images


def convolve(input: Tensor, weight: Tensor, output: Tensor, **changes) -> None:
    """Launches the convolution, of no bias and no residual."""
    arguments = {
        "input": address(input),
        "weight": address(weight),
        "bias": 0,
        "residual": 0,
        "drop_path_factor": 0,
        "output": address(output),
        "input_strides": image_strides(input),
        "output_strides": image_strides(output),
        "type": element_type(input.dtype),
        "parameter_type": element_type(weight.dtype),
        "shape": input.shape,
        "kernel_size": weight.shape[-1],
        "flip_filter": False,
    }
    launch("depthwise_conv_forward", DEVICE, **{**arguments, **changes})


def convolution(input: Tensor, weight: Tensor) -> Tensor:
    """Of [N, H, W, C] with [C, K, K], in float64."""
    images, size = input.double().permute(0, 3, 1, 2), weight.shape[-1]
    output = torch.nn.functional.conv2d(images, weight.double()[:, None], padding=size // 2, groups=images.shape[1])
    return output.permute(0, 2, 3, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", PADDINGS)
def test_memory_between_pixels_is_neither_read_nor_written(dtype, padding):
    input, _ = padded(random(*SHAPE), dtype, padding)
    output, memory = padded(torch.full(SHAPE, torch.nan), dtype, padding)
    residual, _ = padded(random(*SHAPE, seed=1), dtype, padding)
    weight = vector(random(SHAPE[-1], 7, 7, seed=2) / 7, dtype)
    convolve(input, weight, output, residual=address(residual))
    expected = convolution(input, weight) + residual.double()
    assert relative_error(output, expected) < 2 * torch.finfo(dtype).eps
    assert memory[~written(output, memory)].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [9, 10])
def test_dropped_images_have_their_residual_alone(dtype, channels):
    shape = (*SHAPE[:3], channels)
    factor, input = dropped(padded(random(*shape), dtype, "dense")[0])
    residual, output = vector(random(*shape, seed=1), dtype), torch.full_like(input, torch.nan)
    weight = vector(random(channels, 7, 7, seed=2) / 7, dtype)
    convolve(input, weight, output, residual=address(residual), drop_path_factor=address(factor), flip_filter=True)
    kept = factor != 0
    assert torch.equal(output[~kept], residual[~kept])
    expected = convolution(input[kept], weight.flip(1, 2)) + residual[kept].double()
    assert relative_error(output[kept], expected) < 2 * torch.finfo(dtype).eps
    convolve(input, weight, output, drop_path_factor=address(factor))
    assert not output[~kept].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_reaches_its_window_and_nothing_else(dtype, value):
    input = vector(random(2, 20, 40, 4), dtype)
    input[1, 10, 20, 3] = value
    output = torch.zeros_like(input)
    convolve(input, vector(random(4, 7, 7, seed=1), dtype), output)
    spoilt = ~output.isfinite()
    assert spoilt[1, 7:14, 17:24, 3].all() and spoilt.sum() == 49


def filter_gradient(grad: Tensor, input: Tensor, size: int, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of filter and bias."""
    call = {"type": element_type(input.dtype), "shape": input.shape, "kernel_size": size}
    channels = input.shape[-1]
    shape = (library().filter_gradient_splits(**call), channels * (size * size + 1))
    partials = torch.full(shape, torch.nan, device=DEVICE)
    strides = {"grad_output_strides": image_strides(grad), "input_strides": image_strides(input)}
    launch(
        "depthwise_conv_filter_gradient",
        DEVICE,
        grad_output=address(grad),
        input=address(input),
        drop_path_factor=address(factor),
        partials=address(partials),
        **strides,
        **call,
    )
    sums = partial_sums(partials)
    return sums[:-channels].view(channels, size, size), sums[-channels:]


def expected_filter_gradient(grad: Tensor, input: Tensor, size: int) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(input.shape[-1], size, size, dtype=torch.float64, device=DEVICE, requires_grad=True)
    (expected,) = torch.autograd.grad(convolution(input, weight), weight, grad.double())
    return expected, grad.double().sum((0, 1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", PADDINGS)
def test_filter_gradient_reads_nothing_between_pixels(dtype, padding):
    (input, _), (grad, _) = (padded(random(*SHAPE, seed=seed), dtype, padding) for seed in (0, 1))
    for got, expected in zip(filter_gradient(grad, input, 5), expected_filter_gradient(grad, input, 5), strict=True):
        assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_filter_gradient_of_dropped_images_is_zero(dtype):
    (factor, input), (_, grad) = (dropped(vector(random(*SHAPE, seed=seed), dtype)) for seed in (0, 1))
    got, kept = filter_gradient(grad, input, 7, factor), factor != 0
    for result, expected in zip(got, expected_filter_gradient(grad[kept], input[kept], 7), strict=True):
        assert relative_error(result, expected) < 1e-5
    assert not any(result.any() for result in filter_gradient(grad, input, 7, torch.zeros_like(factor)))


def one_pass(input: Tensor, size: int) -> dict:
    """What the choice of a path looks at."""
    return {
        "input": address(input),
        "input_strides": image_strides(input),
        "type": element_type(input.dtype),
        "shape": input.shape,
        "kernel_size": size,
    }


def convolve_and_normalise(input: Tensor, weight: Tensor, norm: Tensor | None, factor: Tensor | None) -> list[Tensor]:
    """Output, convolution, mean and rstd."""
    pixels = input.shape[:3].numel()
    results = [torch.full_like(input, torch.nan) for _ in range(2)]
    results += [torch.full((pixels,), torch.nan, device=DEVICE) for _ in range(2)]
    launch(
        "depthwise_conv_layer_norm_forward",
        DEVICE,
        weight=address(weight),
        bias=0,
        norm_weight=address(norm),
        norm_bias=address(norm),
        drop_path_factor=address(factor),
        **dict(zip(("output", "convolved", "mean", "rstd"), map(address, results), strict=True)),
        parameter_type=element_type(weight.dtype),
        norm_parameter_type=element_type(torch.float32),
        eps=1e-6,
        **one_pass(input, weight.shape[-1]),
    )
    return results


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dropped_images_are_zero_in_one_pass(dtype):
    factor, input = dropped(vector(random(5, 6, 20, 10), dtype))
    weight, norm = vector(random(10, 7, 7, seed=1) / 7, dtype), vector(random(10, seed=2))
    kept = factor != 0
    results = [result.view(len(input), -1) for result in convolve_and_normalise(input, weight, norm, factor)]
    alone = convolve_and_normalise(input[kept], weight, norm, None)
    for result, expected in zip(results, alone, strict=True):
        assert torch.equal(result[kept].flatten(), expected.flatten()) and not result[~kept].any()


@pytest.mark.parametrize(
    ("shape", "dtype", "size", "fits"),
    [
        ((2, 56, 56, 96), torch.float16, 7, True),
        ((2, 5, 17, 128), torch.bfloat16, 3, True),
        ((2, 14, 14, 96), torch.float16, 7, False),
        ((2, 56, 56, 96), torch.float32, 7, False),
        ((2, 56, 56, 97), torch.float16, 7, False),
        ((2, 7, 7, 4096), torch.float16, 7, False),
    ],
)
def test_one_pass_where_whole_pixels_fit(shape, dtype, size, fits):
    assert library().in_one_pass(**one_pass(torch.empty(shape, dtype=dtype, device=DEVICE), size)) == fits


def normalise_backward(grad: Tensor, input: Tensor, weight: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of the input [N, T, C] and, one after the other, of weight and bias."""
    batch, tokens_per_image, channels = input.shape
    mean = input.double().mean(-1).float()
    rstd = (input.double().var(-1, correction=0) + 1e-6).rsqrt().float()
    call = {"type": element_type(input.dtype), "tokens": batch * tokens_per_image, "channels": channels}
    partials = torch.full((library().layer_norm_backward_splits(**call), 2 * channels), torch.nan, device=DEVICE)
    grad_input = torch.full_like(input, torch.nan)
    launch(
        "layer_norm_backward",
        DEVICE,
        grad_output=address(grad),
        input=address(input),
        weight=address(weight),
        mean=address(mean),
        rstd=address(rstd),
        drop_path_factor=address(factor),
        grad_input=address(grad_input),
        partials=address(partials),
        parameter_type=element_type(weight.dtype),
        tokens_per_image=tokens_per_image,
        **call,
    )
    return grad_input, partial_sums(partials)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [5, 96])
def test_norm_gradients_of_dropped_images_are_zero(dtype, channels):
    (factor, input), (_, grad) = (dropped(vector(random(5, 7, channels, seed=seed), dtype)) for seed in (0, 1))
    weight, kept = vector(1 + 0.1 * random(channels, seed=2)), factor != 0
    results = normalise_backward(grad, input, weight, factor)
    alone = normalise_backward(grad[kept], input[kept], weight, None)
    assert torch.equal(results[0][kept], alone[0]) and not results[0][~kept].any()
    assert relative_error(results[1], alone[1]) < 1e-5
    leaf = input[kept].double().requires_grad_()
    output = torch.nn.functional.layer_norm(leaf, (channels,), weight.double(), eps=1e-6)
    (expected,) = torch.autograd.grad(output, leaf, grad[kept].double())
    assert relative_error(alone[0], expected) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [40, 96])
def test_norm_of_misaligned_tokens(dtype, channels):
    """Contiguous, but one element away from where vectors of elements lie."""
    shape = (1, 3, 1, channels)
    input, grad = (padded(random(*shape, seed=seed), dtype, "misaligned")[0].squeeze(2) for seed in (0, 1))
    weight, bias = (padded(random(1, 1, 1, channels, seed=seed), dtype, "misaligned")[0].flatten() for seed in (2, 3))
    assert input.is_contiguous() and input.data_ptr() % 16 == weight.data_ptr() % 16 == dtype.itemsize
    results = []
    for function in (torch.Tensor.detach, torch.Tensor.clone):
        leaves = [function(tensor).detach().requires_grad_() for tensor in (input, weight, bias)]
        output = layer_norm(*leaves, backend="cuda")
        results.append([output, *torch.autograd.grad(output, leaves, function(grad))])
    for misaligned, aligned in zip(*results, strict=True):
        assert relative_error(misaligned, aligned) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("count", [0, 1, 7, 300])
@pytest.mark.parametrize("elements", [1, 1000])
def test_partial_sums(count, elements):
    partials = vector(random(count, elements)).contiguous()
    sums = partial_sums(partials)
    assert torch.equal(sums, partial_sums(partials))
    assert (sums.double() - partials.double().sum(0)).abs().max() < 1e-6 * max(count, 1)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU a launch ends before another thread has begun")
def test_other_threads_run_during_a_launch():
    """A launch waits where a stream's queue is full, which another thread may have to empty."""
    partials, times = vector(random(300, 300)), []
    thread = threading.Thread(target=lambda: (time.sleep(0.01), times.append(time.perf_counter())))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # Python itself lets nobody else run
    try:
        thread.start()
        begin = time.perf_counter()
        partial_sums(partials)  # a quarter of a second
        end = time.perf_counter()
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert times[0] < (begin + end) / 2


REFUSED = {
    "kernel size": ({"kernel_size": 9}, "cudaErrorNotSupported"),
    "parameters": ({"type": torch.float16, "parameter_type": torch.bfloat16}, "cudaErrorNotSupported"),
    "height": ({"shape": (1, 0, 3, 8)}, "cudaErrorInvalidValue"),
    "width": ({"shape": (1, 5, 0, 8)}, "cudaErrorInvalidValue"),
    "channels": ({"shape": (1, 5, 3, 0)}, "cudaErrorInvalidValue"),
    "batch": ({"shape": (-1, 5, 3, 8)}, "cudaErrorInvalidValue"),
}


@pytest.mark.parametrize("changes", REFUSED)
def test_what_is_refused_is_an_error_and_writes_nothing(changes):
    arguments, error = REFUSED[changes]
    arguments = {n: element_type(v) if isinstance(v, torch.dtype) else v for n, v in arguments.items()}
    input, weight = vector(random(1, 5, 3, 8)), vector(random(8, 7, 7))
    output = torch.full_like(input, torch.nan)
    with pytest.raises(RuntimeError, match=f"^{error}: "):
        convolve(input, weight, output, **arguments)
    assert output.isnan().all()


def test_one_pass_refuses_what_does_not_fit():
    with pytest.raises(RuntimeError, match=r"^cudaErrorNotSupported: "):
        convolve_and_normalise(vector(random(1, 5, 3, 8)), vector(random(8, 7, 7)), None, None)
