"""Every Triton kernel compiles for sm_80 and sm_90, spills nothing in loops, and multiplies by matrix instructions."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torch.torch_version import TorchVersion

pytest.importorskip("triton")
from benchmarks import ahead_of_time
from benchmarks.ahead_of_time import PRODUCT_KERNELS, Kernel, failures, main, report, serialized
from convnext_kernels.ops.common.tuning import tunables

ROOT = Path(__file__).resolve().parents[1]
OPS = ROOT / "convnext_kernels" / "ops"

KEEPS_THE_LIMITS = "3.8"
"""Triton, from this version on: registers were counted with 3.9. 3.4, 3.6 and 3.7 put up to 240 bytes aside."""

GOOD = Kernel(
    kernel=PRODUCT_KERNELS[0],
    operator="mlp",
    call="96 channels",
    dtype="float16",
    architecture=80,
    constants="BLOCK_M=128",
    warps=8,
    registers=185,
    stack=0,
    local=0,
    spills_in_loops=0,
    shared=65536,
    matrix_instructions=64,
    serialized=(),
    overwritten=0,
)


def package_kernels() -> set[str]:
    """folder.name of every kernel in the package: the functions under triton.jit whose names end in _kernel."""
    return {
        f"{path.parent.name}.{node.name}"
        for path in OPS.rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and node.name.endswith("_kernel")
        and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


def programs(kernel: Kernel) -> int:
    """How many fit on a multiprocessor of an A100: 64 K registers, given out eight to a thread, and 164 KB."""
    registers = -(-kernel.registers // 8) * 8 * 32 * kernel.warps
    return min((64 << 10) // registers, (164 << 10) // (kernel.shared + 1024))


def test_every_kernel_compiles_for_both_architectures(tmp_path):
    path = tmp_path / "kernels.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.ahead_of_time", "--quick", "--json", str(path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert path.exists(), result.stdout + result.stderr
    compiled = json.loads(path.read_text())
    kernels = [Kernel(**record) for record in compiled["kernels"]]
    may_spill = TorchVersion(compiled["triton"]) < KEEPS_THE_LIMITS
    assert may_spill or result.returncode == 0, result.stdout + result.stderr
    assert may_spill or not any(kernel.spills_in_loops or kernel.serialized for kernel in kernels)
    assert not any(failures(kernel, may_spill) for kernel in kernels)
    for architecture in (80, 90):
        launched = [kernel for kernel in kernels if kernel.architecture == architecture]
        assert {kernel.kernel for kernel in launched} == package_kernels()
        for dtype in ("float16", "bfloat16", "tf32"):
            products = [k for k in launched if k.operator == "mlp" and k.dtype == dtype and k.kernel in PRODUCT_KERNELS]
            # Two forward and four backward, not counting those with and without a saved pre-activation.
            assert sum(kernel.kernel == PRODUCT_KERNELS[0] for kernel in products) >= 6
            assert any(kernel.kernel == PRODUCT_KERNELS[1] for kernel in products) == (dtype != "tf32")
            assert all(kernel.matrix_instructions for kernel in products)
            if architecture == 80:  # where a program's warps wait for shared memory, another one multiplies
                assert min(map(programs, products)) > 1


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        ({"stack": 136}, "spills: 136 bytes of stack"),
        ({"local": 136}, "136 of local memory"),
        ({"stack": 8, "spills_in_loops": 2}, "2 instructions of loops"),
        ({"matrix_instructions": 0}, "no matrix instruction"),
        ({"matrix_instructions": 0, "dtype": "tf32"}, "no matrix instruction"),
        ({"matrix_instructions": 0, "kernel": "mlp.fused_kernel"}, "no matrix instruction"),
        ({"overwritten": 1}, "1 operands are overwritten while a product may still read them"),
        ({"shared": 200_000}, "200000 bytes of shared memory; a block has 166912"),
    ],
)
def test_a_bad_kernel_fails_the_report(change, failure, capsys):
    bad = replace(GOOD, **change)
    assert failure in failures(bad)[0]
    assert report([(GOOD, 1.0), (bad, 1.0)], every=False) == 1
    assert failure in capsys.readouterr().out


def test_good_kernels_pass_the_report(capsys):
    float32 = replace(GOOD, dtype="float32", matrix_instructions=0)
    convolution = replace(GOOD, kernel="depthwise_conv.convolution_kernel", matrix_instructions=0)
    wide = replace(GOOD, architecture=90, shared=200_000)
    behind_the_loop = replace(GOOD, stack=128, spills_in_loops=1)
    good = GOOD, float32, convolution, wide, behind_the_loop
    assert report([(kernel, 1.0) for kernel in good], every=True) == 0
    assert "float32 in full precision has no matrix instruction" in capsys.readouterr().out


def test_serialized_products_are_found_in_the_assemblers_log():
    kept = "ptxas info    : (C7517) wgmma.wait_group is injected in around line 97 by compiler in function 'f'\n"
    lost = "ptxas info    : (%s) Potential Performance Loss: wgmma.mma_async instructions are serialized due to %s\n"
    registers, accumulators = lost % ("C7515", "non wgmma instructions"), lost % ("C7511", "registers in line 2\n7")
    assert serialized(kept + registers + accumulators + registers) == ("C7511", "C7515")
    assert serialized(kept + "ptxas info    : Used 128 registers, used 1 barriers\n") == ()


def test_serialized_products_are_counted_and_no_failure(capsys):
    slow = replace(GOOD, architecture=90, serialized=("C7511", "C7515"))
    slower = replace(slow, kernel=PRODUCT_KERNELS[1], serialized=("C7515",))
    assert report([(kernel, 1.0) for kernel in (GOOD, slow, slower)], every=True) == 0
    assert "in: 1 C7511, 2 C7515" in capsys.readouterr().out
    assert report([(GOOD, 1.0)], every=True) == 0
    assert "C75" not in capsys.readouterr().out


def test_nothing_compiled_is_a_failure():
    assert report([], every=False) == 1


def test_the_interpreter_compiles_nothing(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main([]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_unknown_names_are_named(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert main(["--operator", "conv"]) == 2
    assert "--operator: got 'conv'; accepted: convnext_block, depthwise_conv2d" in capsys.readouterr().err


def test_candidates_are_compiled_in_place_of_the_operators(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    given = []
    monkeypatch.setattr(
        ahead_of_time, "compile_in_parallel", lambda jobs, processes: given.extend(jobs) or [(compiled, 1.0)]
    )
    compiled = replace(GOOD, local=200, spills_in_loops=8)  # what a spill costs is for tune to find
    assert main(["--candidates", "--dtype", "float16", "--architecture", "80", "90"]) == 0
    assert given == [(ahead_of_time.compile_candidates, architecture, "float16") for architecture in (80, 90)]
    compiled = replace(GOOD, shared=200_000)
    assert main(["--candidates", "--dtype", "float16"]) == 1


def test_every_tunable_kernel_is_among_the_candidates():
    workloads = list(ahead_of_time._candidate_workloads(90, "float16"))
    assert {workload.tunable.name for workload in workloads} == set(tunables())
    assert len({workload.name for workload in workloads}) == len(workloads)
