"""csrc/depthwise_conv/forward.cu: the float64 convolution in the emulator, and no spills when compiled for a GPU."""

import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from emulation import (
    ARCHITECTURES,
    EMULATOR,
    SOURCES,
    compile_for_gpu,
    compile_program,
    needs_compiler,
    needs_nvcc,
    run,
)
from torch import Tensor

KERNEL = SOURCES / "depthwise_conv" / "forward.cu"
TYPES = [torch.float32, torch.float16, torch.bfloat16]
"""In the order of ElementType."""

SUCCESS, INVALID_VALUE, NOT_SUPPORTED = 0, 1, 801

THREADS = 256
REGISTERS, SHARED_BYTES = 64 * 1024, 164 * 1024
"""Of a multiprocessor, sm_80's shared memory being the smaller."""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("depthwise_conv_forward")
    return compile_program(folder / "program", EMULATOR / "depthwise_conv_forward.cpp", KERNEL)


@dataclass(frozen=True)
class Call:
    """A call of the launcher; padding is what lies between the pixels, rows and images, in elements."""

    batch: int = 1
    height: int = 5
    width: int = 3
    channels: int = 8
    kernel_size: int = 7
    dtype: torch.dtype = torch.float16
    parameters: torch.dtype | None = None
    bias: bool = True
    input_padding: tuple[int, int, int] = (0, 0, 0)
    output_padding: tuple[int, int, int] = (0, 0, 0)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.height, self.width, self.channels

    def strides(self, padding: tuple[int, int, int]) -> tuple[int, int, int]:
        """Of image, row and pixel."""
        pixel = self.channels + padding[0]
        row = self.width * pixel + padding[1]
        return self.height * row + padding[2], row, pixel

    def view(self, memory: Tensor, padding: tuple[int, int, int]) -> Tensor:
        return memory.as_strided(self.shape, (*self.strides(padding), 1))

    def memory(self, padding: tuple[int, int, int]) -> Tensor:
        """From the first element of an image batch to its last, all NaN."""
        strides = (*self.strides(padding), 1)
        extent = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, strides, strict=True))
        return torch.full((extent if self.batch else 0,), torch.nan, dtype=self.dtype)

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """The input's memory, with NaN between the pixels, weight and bias."""
        generator = torch.Generator().manual_seed(0)
        memory, parameters = self.memory(self.input_padding), self.parameters or self.dtype
        if self.batch:
            self.view(memory, self.input_padding).copy_(torch.randn(self.shape, generator=generator))
        weight = torch.randn(self.channels, self.kernel_size, self.kernel_size, generator=generator) / self.kernel_size
        bias = torch.randn(self.channels, generator=generator)
        return memory, weight.to(parameters), bias.to(parameters)

    def run(self, program: Path, memory: Tensor, weight: Tensor, bias: Tensor) -> tuple[int, Tensor]:
        """The error code and the output's memory."""
        strides = [*self.strides(self.input_padding), *self.strides(self.output_padding)]
        types = [TYPES.index(tensor.dtype) for tensor in (memory, weight)]
        tensors = [memory, weight, bias] if self.bias else [memory, weight]
        given = b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)
        written = run(program, *strides, *types, *self.shape, self.kernel_size, int(self.bias), given=given)
        output = torch.frombuffer(bytearray(written), dtype=torch.uint8)[4:].clone().view(self.dtype)
        return struct.unpack_from("i", written)[0], output

    def convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The definition, in the arguments' precision."""
        filter = weight.unsqueeze(1)
        output = torch.nn.functional.conv2d(
            input.permute(0, 3, 1, 2), filter, bias, padding=self.kernel_size // 2, groups=self.channels
        )
        return output.permute(0, 2, 3, 1)


def assert_right(call: Call, program: Path) -> None:
    """Rounded once, after a sum in float; and nothing written between the outputs."""
    memory, weight, bias = call.draw()
    status, output_memory = call.run(program, memory, weight, bias)
    assert status == SUCCESS
    output = call.view(output_memory, call.output_padding).double()
    input, weight, bias = call.view(memory, call.input_padding).double(), weight.to(call.dtype).double(), bias.double()
    exact = call.convolve(input, weight, bias if call.bias else None)
    magnitude = call.convolve(input.abs(), weight.abs(), bias.abs() if call.bias else None)
    rounding = torch.finfo(call.dtype).eps / 2 * exact.abs() + torch.finfo(call.dtype).smallest_normal
    summing = call.kernel_size**2 * 2.0**-24 * magnitude
    assert not output.isnan().any()
    assert ((output - exact).abs() <= rounding + 2 * summing).all()
    written = torch.zeros(output_memory.shape, dtype=torch.bool)
    call.view(written, call.output_padding).fill_(True)
    assert output_memory[~written].isnan().all()


CALLS = {
    "1x1": Call(height=1, width=1),
    "2x2": Call(height=2, width=2, channels=24),
    "5x3, 96 channels": Call(channels=96),
    "25x41, 40 channels": Call(height=25, width=41, channels=40),
    "two strips": Call(height=3, width=70),
    "two blocks of rows": Call(height=67, width=2),
    "7x7, 11 images": Call(batch=11, height=7, width=7, channels=24),
    "14x14, 5 images": Call(batch=5, height=14, width=14),
    "20 wide, 3 images": Call(batch=3, height=4, width=20),
    "2 channels": Call(channels=2),
    "one row": Call(height=1, width=9),
    "one column": Call(height=9, width=1),
    "3x3": Call(batch=2, height=9, width=10, channels=24, kernel_size=3),
    "5x5": Call(batch=2, height=9, width=10, channels=24, kernel_size=5),
    "no bias": Call(bias=False),
    "float32 parameters": Call(channels=24, parameters=torch.float32),
    "strides": Call(batch=3, input_padding=(2, 6, 10), output_padding=(4, 8, 2)),
}


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_is_the_convolution(program, name, dtype):
    assert_right(replace(CALLS[name], dtype=dtype), program)


@needs_compiler
def test_an_empty_batch_is_done(program):
    call = Call(batch=0)
    status, output = call.run(program, *call.draw())
    assert status == SUCCESS and output.numel() == 0


@needs_compiler
@pytest.mark.parametrize(
    ("call", "status"),
    [
        (Call(channels=5), NOT_SUPPORTED),
        (Call(kernel_size=9), NOT_SUPPORTED),
        (Call(dtype=torch.float32), NOT_SUPPORTED),
        (Call(dtype=torch.float16, parameters=torch.bfloat16), NOT_SUPPORTED),
        (Call(input_padding=(1, 0, 0)), NOT_SUPPORTED),
        (Call(output_padding=(0, 1, 0)), NOT_SUPPORTED),
        (Call(height=0), INVALID_VALUE),
        (Call(width=0), INVALID_VALUE),
    ],
)
def test_what_it_does_not_do_is_an_error_and_writes_nothing(program, call, status):
    memory = torch.full((4096,), torch.nan, dtype=call.dtype)
    drawn = [torch.ones(call.channels * call.kernel_size**2), torch.ones(call.channels)]
    got, output = call.run(program, memory, *(tensor.to(call.parameters or call.dtype) for tensor in drawn))
    assert got == status
    assert output.isnan().all()


@needs_compiler
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_reaches_its_window_and_stays_near(program, value):
    call = Call(height=20, width=40)
    memory, weight, bias = call.draw()
    call.view(memory, call.input_padding)[0, 10, 20, 3] = value
    _, output_memory = call.run(program, memory, weight, bias)
    spoilt = ~call.view(output_memory, call.output_padding)[0].isfinite()
    assert spoilt[7:14, 17:24, 3].all()
    spoilt[6:15, 8:32, 3] = False
    assert not spoilt.any()


@needs_nvcc
def test_on_the_gpu_two_blocks_fit_and_nothing_spills(tmp_path):
    report = compile_for_gpu(KERNEL, tmp_path / "forward.o")
    for architecture in ARCHITECTURES:
        pattern = (
            rf"entry function '(\w+)' for 'sm_{architecture}'\n(?:.*\n)+?.*Used (\d+) registers.* (\d+) bytes smem"
        )
        kernels = re.findall(pattern, report)
        assert len({name for name, *_ in kernels}) == 6
        assert max(int(registers) for _, registers, _ in kernels) * THREADS * 2 <= REGISTERS
        assert max(int(shared_bytes) for *_, shared_bytes in kernels) * 2 <= SHARED_BYTES
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == 6 * len(ARCHITECTURES)
    assert set(spills) == {("0", "0", "0")}
