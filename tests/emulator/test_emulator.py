"""The emulator itself: its instructions do what PTX says; it finds every planted fault, and nothing in right code."""

import numpy as np
import pytest
import torch
from emulation import (
    ARCHITECTURES,
    EMULATOR,
    compile_for_gpu,
    compile_program,
    needs_compiler,
    needs_nvcc,
    run,
)

THREADS = 64
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

FAULTS = {
    "reverse": "emulator: race: .* no barrier between",
    "rotate": "emulator: race: thread .* writes byte .*, which thread .* read with no barrier between",
    "scatter": "emulator: race: thread 40 writes byte 12 .*, which thread 3 wrote",
    "swap_in_warp": "emulator: race: ",
    "reverse_warps": "emulator: race: ",
    "past_static": "emulator: out of bounds: thread 63 writes 4 bytes at byte 256 of 256",
    "before_dynamic": "emulator: out of bounds: thread 0 reads 4 bytes at byte -4 of 256",
    "misaligned": "emulator: misaligned: thread 4 reads 8 bytes at byte 20",
    "past_global": "AddressSanitizer: heap-buffer-overflow",
    "copy_past_global": "AddressSanitizer: heap-buffer-overflow",
    "copy": "emulator: missing wait: thread 0 reads byte 0 ",
    "copy_at_the_end": "emulator: missing wait: thread 0 has ended with its copy of .*kernels.cu:",
    "copy_groups": "emulator: missing wait: thread 32 reads byte 128 ",
    "copy_for_others": "emulator: race: ",
    "early_exit": r"emulator: divergent barrier: thread 0 waits at .*kernels.cu:\d+, thread 32 has finished",
    "two_barriers": r"emulator: divergent barrier: thread 0 waits at .*kernels.cu:\d+, thread 5 waits at .*kernels.cu",
    "warp_sum": "emulator: diverged warp: thread 0 waits in a warp operation at .*kernels.cu",
}

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_program(tmp_path_factory.mktemp("emulator") / "kernels", EMULATOR / "kernels.cu")


def random_floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


EXPECTED = {
    "reverse": lambda x: x[::-1],
    "rotate": lambda x: 2 * np.roll(x, -1),
    "swap_in_warp": lambda x: x.reshape(-1, 2)[:, ::-1].ravel(),
    "reverse_warps": lambda x: x[::-1],
    "copy": lambda x: np.where(np.arange(THREADS) % 2, 0, x),
    "copy_for_others": lambda x: x.reshape(-1, 2)[:, ::-1].ravel(),
    "warp_sum": lambda x: x.reshape(-1, 32).sum(1).repeat(32),
}
"""What the kernels give that do not give their input."""


@pytest.mark.parametrize("kernel", FAULTS)
def test_right_code_passes(program, kernel):
    values = random_floats(THREADS)
    output = np.frombuffer(run(program, kernel, 0, given=values.tobytes()), np.float32)
    np.testing.assert_allclose(output, EXPECTED.get(kernel, lambda x: x)(values), rtol=1e-5)


@pytest.mark.parametrize(("kernel", "message"), FAULTS.items())
def test_a_planted_fault_is_found(program, kernel, message):
    with pytest.raises(RuntimeError, match=message) as error:
        run(program, kernel, 1, given=random_floats(THREADS).tobytes())
    assert "kernels.cu:" in str(error.value)


def test_a_block_finds_nothing_that_another_left_in_shared_memory(program):
    values = random_floats(2 * THREADS)
    assert run(program, "left_behind", 0, given=values.tobytes()) == values.tobytes()
    with pytest.raises(
        RuntimeError, match=r"emulator: uninitialised: thread 0 reads byte 0 .* its block has not written"
    ):
        run(program, "left_behind", 1, given=values.tobytes())


@pytest.mark.parametrize("dtype", DTYPES)
def test_mma_is_the_matrix_product(program, dtype):
    a, b = (torch.from_numpy(x).to(DTYPES[dtype]) for x in np.split(random_floats(24, 16), [16]))
    b = b.reshape(16, 8)
    given = b"".join(x.view(torch.int16).numpy().tobytes() for x in (a, b))
    output = np.frombuffer(run(program, f"product {dtype}", 0, given=given), np.float32).reshape(16, 8)
    np.testing.assert_allclose(output, 1 + (a.double() @ b.double()).numpy(), atol=1e-5)


def hard_to_round() -> torch.Tensor:
    """All scales of float16, its subnormals and ties, overflow, infinities and NaN."""
    values = random_floats(1000) * np.float32(2) ** np.random.default_rng(1).integers(-28, 18, 1000)
    ties = [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 2**-25, 3 * 2**-25, 2**-14 - 2**-26, 65519, 65520]
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3e38, 3.4e38, -65504, 2**-14, 2**-24, 1, -1, 1e-7, 65536]
    return torch.tensor([*values, *ties, *special], dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_pytorchs(program, dtype):
    values = hard_to_round()
    output = run(program, f"round {dtype}", 0, given=values.numpy().tobytes())
    got = torch.frombuffer(bytearray(output), dtype=DTYPES[dtype])
    assert torch.equal(got.nan_to_num(), values.to(DTYPES[dtype]).nan_to_num())
    assert torch.equal(got.isnan(), values.isnan()) and torch.equal(got.signbit()[:-15], values.signbit()[:-15])


@pytest.mark.parametrize("dtype", DTYPES)
def test_widening_is_pytorchs(program, dtype):
    bits = (
        torch.arange(-(2**15), 2**15, 64, dtype=torch.int32).to(torch.int16) + torch.arange(1024).to(torch.int16) % 64
    )
    output = run(program, f"widen {dtype}", 0, given=bits.numpy().tobytes())
    got, expected = torch.frombuffer(bytearray(output), dtype=torch.float32), bits.view(DTYPES[dtype]).float()
    assert torch.equal(got.isnan(), expected.isnan()) and expected.isnan().any()
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@needs_nvcc
def test_the_same_kernels_compile_for_the_gpu(tmp_path):
    report = compile_for_gpu(EMULATOR / "kernels.cu", tmp_path / "kernels.o")
    for architecture in ARCHITECTURES:
        assert f"for 'sm_{architecture}'" in report
