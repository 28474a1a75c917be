"""Every CUDA kernel compiles without spills, and what the report says of it: for GPUs that need not be there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support import refusal

pytest.importorskip("triton")
from benchmarks import static_report
from benchmarks.kernel_work import SHAPES, WORK, Loop, Work
from benchmarks.machine_code import Instruction, MachineCode, compile_source, count_in_loops, find_nvcc, main_loop
from benchmarks.static_report import (
    DEVICES,
    Kernel,
    Prediction,
    blocks_per_multiprocessor,
    compile_all,
    describe,
    failures,
    main,
    needless_reasons,
    pipe_clocks,
    report,
    sources,
    work_of,
)

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")

PLANTED = r"""
namespace convnext_kernels {
namespace {

template <typename Element, int rows>
__global__ void __launch_bounds__(128) sums(Element const* input, Element* output, int count) {
  __shared__ Element staged[128];
  Element sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += 128) {
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      sum += input[row * 1000 + i];
    }
  }
  staged[threadIdx.x] = sum;
  __syncthreads();
  output[threadIdx.x] = staged[127 - threadIdx.x];
}

// 128 values, each of which depends on all others, do not fit into 32 registers.
__global__ void __launch_bounds__(1024, 2) spilling(float const* input, float* output) {
  float values[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) values[i] = input[i * 1024 + threadIdx.x];
#pragma unroll
  for (int round = 0; round < 3; ++round) {
#pragma unroll
    for (int i = 0; i < 128; ++i) values[i] += values[(i * 37 + 11) % 128] * values[(i + 64) % 128];
  }
#pragma unroll
  for (int i = 0; i < 128; ++i) output[i * 1024 + threadIdx.x] = values[i];
}

__global__ void straight(float4 const* input, float4* output) {
  float4 value = input[threadIdx.x];
  value.x = value.x * value.y + value.z;
  output[threadIdx.x] = value;
}

template __global__ void sums<float, 4>(float const*, float*, int);

}  // namespace
}  // namespace convnext_kernels
"""


@needs_nvcc
def test_the_kernels_keep_their_promises():
    """No spills, tensor cores where they are promised, two blocks and no slow pipe, or else a reason."""
    kernels = compile_all(sources(), tuple(DEVICES), processes=2)
    for architecture in DEVICES:
        compiled = {kernel.source for kernel in kernels if kernel.architecture == architecture}
        assert compiled == set(sources())
    assert {f"{kernel.where}: {failure}" for kernel in kernels for failure in failures(kernel)} == set()
    assert needless_reasons(kernels) == []
    unused = [
        pattern for pattern, work in WORK.items() if not any(work_of(kernel.kernel) is work for kernel in kernels)
    ]
    assert unused == []


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> dict[tuple[str, str], MachineCode]:
    """Kernels whose machine code is known, by name and architecture."""
    source = tmp_path_factory.mktemp("planted") / "planted.cu"
    source.write_text(PLANTED)
    return {(code.kernel, code.architecture): code for code in compile_source(source, tuple(DEVICES))}


@needs_nvcc
@pytest.mark.parametrize("architecture", DEVICES)
class TestPlantedKernels:
    def test_a_loop_is_found(self, planted, architecture):
        code = planted["sums<float, 4>", architecture]
        assert (code.type, code.threads, code.shared) == ("float32", 128, 512)
        assert (code.stack, code.spill_stores, code.spill_loads) == (0, 0, 0)
        kernel = describe("planted.cu", code)
        assert kernel.loop and kernel.predicted == []
        assert kernel.instructions["global memory"] == kernel.instructions["fp32"] == 4
        (opcode,) = kernel.memory_instructions
        assert opcode.startswith("LDG.E")
        assert kernel.instructions["shared memory"] == 0 < kernel.instructions["all"] < len(code.instructions)

    def test_spills_are_found(self, planted, architecture):
        code = planted["spilling", architecture]
        assert code.registers <= 32 and code.spill_stores > 0 < code.spill_loads
        spilled, accesses = failures(describe("planted.cu", code))
        assert spilled == f"{code.spill_stores + code.spill_loads} bytes of spills"
        assert "accesses to local memory" in accesses

    def test_without_a_loop_the_whole_kernel_counts(self, planted, architecture):
        kernel = describe("planted.cu", planted["straight", architecture])
        assert not kernel.loop and kernel.threads is None and kernel.type is None
        assert kernel.instructions["fp32"] == 1
        assert all("128" in opcode for opcode in kernel.memory_instructions)
        assert sum(kernel.memory_instructions.values()) == kernel.instructions["global memory"] == 2


def code_of(*lines: str) -> MachineCode:
    """A kernel of instructions, 16 bytes each: "@P0 BRA 0x20"."""
    instructions = []
    for i, line in enumerate(lines):
        words = line.split()
        condition = words.pop(0)[1:] if words[0].startswith("@") else None
        instructions.append(Instruction(16 * i, condition, words[0], " ".join(words[1:])))
    return MachineCode("f<float>", "80", 32, 0, 0, 0, 0, 256, tuple(instructions))


def opcodes(instructions: list[Instruction]) -> list[str]:
    return [instruction.opcode for instruction in instructions]


def test_the_marked_loop_is_the_main_loop():
    code = code_of(
        *("MOV", "FADD", "FMUL", "LDS", "@P0 BRA 0x10"),  # a longer loop before it
        *("HMMA.16816.F32", "@P1 EXIT", "BRA 0x50"),
    )
    assert opcodes(main_loop(code, "HMMA").instructions) == ["HMMA.16816.F32", "EXIT", "BRA"]
    assert opcodes(main_loop(code, "STG").instructions) == ["FADD", "FMUL", "LDS", "BRA"]


def test_inner_loops_are_kept_apart():
    code = code_of("MUFU.RSQ", "SHFL.BFLY", "@P0 BRA 0x10", "STG.E", "@!P1 BRA 0x0", "EXIT")
    loop = main_loop(code, "MUFU")
    assert opcodes(loop.instructions) == ["MUFU.RSQ", "STG.E", "BRA"]
    assert opcodes(loop.inner) == ["SHFL.BFLY", "BRA"]


def test_variants_of_a_loop_are_known_by_their_size():
    code = code_of("SHFL.BFLY", "FADD", "@P0 BRA 0x0", "SHFL.BFLY", "@P0 BRA 0x30", "EXIT")
    assert opcodes(main_loop(code, "SHFL").instructions) == ["SHFL.BFLY", "BRA"]
    assert opcodes(main_loop(code, "SHFL", variant=1).instructions) == ["SHFL.BFLY", "FADD", "BRA"]


def test_code_out_of_line_belongs_to_the_loop_it_comes_back_to():
    code = code_of(
        *("MOV", "FADD", "@P0 BRA 0x60", "FMUL", "@P1 BRA 0x10", "EXIT"),
        *("LDS", "BRA 0x30"),  # goes back into the loop: no loop of its own
        *("STS", "BRA 0x10"),  # nothing comes here
    )
    loop = main_loop(code, "HMMA")
    assert opcodes(loop.instructions) == ["FADD", "BRA", "FMUL", "BRA", "LDS", "BRA"] and loop.found


def test_a_pass_leaves_out_what_need_not_run():
    code = code_of(
        *("MOV", "@P0 BRA 0x40", "IADD3", "LEA", "LDS"),  # two instructions that no work is in
        *("@P1 BRA 0x80", "FFMA", "BRA 0x90", "STS", "@P2 BRA 0x0", "EXIT"),  # either a product or a store
    )
    opcodes_of_pass = opcodes(main_loop(code).instructions)
    assert opcodes_of_pass == ["MOV", "BRA", "LDS", "BRA", "STS", "BRA"]  # the shorter of both ways
    products = opcodes(main_loop(code, working=["FFMA"]).instructions)
    assert products == ["MOV", "BRA", "LDS", "BRA", "FFMA", "BRA", "BRA"]


def test_spills_are_counted_in_loops_alone():
    code = code_of(
        "STL [R1], R2", "LDL R2, [R1]", "HMMA", "LDL.64 R4, [R1+0x8]", "@P0 BRA 0x10", "LDL R6, [R1]", "EXIT"
    )
    assert count_in_loops(code.instructions, ("LDL", "STL")) == 2


def test_code_for_divergent_warps_is_not_followed():
    code = code_of("FADD", "BRA.DIV ~URZ, 0x40", "@P0 BRA 0x0", "EXIT", "SHFL.BFLY", "BRA 0x20")
    assert opcodes(main_loop(code, "HMMA").instructions) == ["FADD", "BRA.DIV", "BRA"]


def test_an_indirect_branch_is_an_error():
    with pytest.raises(RuntimeError, match="indirect branch at 0x10"):
        main_loop(code_of("MOV", "BRX R2", "EXIT"), "HMMA")


def test_clocks_of_the_pipes():
    lines = (
        ["HMMA.16816.F32.BF16"] * 2 + ["LDS"] * 3 + ["LDS.128", "LDSM.16.M88.4", "LDGSTS.E", "STG.E.64", "SHFL.BFLY"]
    )
    lines += ["FFMA"] * 4 + ["IMAD.MOV.U32", "PRMT", "MUFU.EX2", "EXIT"]
    instructions = code_of(*lines).instructions
    a100 = pipe_clocks(instructions, DEVICES["80"], conflicts=2, copies=0.5)
    assert a100["issue"] == len(lines) / 4
    assert a100["tensor"] == 2 * 2048 / 1024
    assert a100["shared"] == 2 * 3 + 2 * 4 + 4 + 0.5 + 2 + 1
    assert (a100["fma"], a100["integer"], a100["special"]) == (5 / 2, 1 / 2, 2)
    h200 = pipe_clocks(instructions, DEVICES["90a"], conflicts=2, copies=0.5)
    assert h200["fma"] == 5 / 4 and h200["tensor"] == pytest.approx(4 / 2 / 0.62)


def test_what_never_runs_takes_its_turn_and_nothing_else():
    """Before copies to shared memory the assembler puts loads whose predicate is false."""
    loop = ["LDS", "HMMA.16816.F32.BF16", "LDGSTS.E", "@P0 BRA 0x0", "EXIT"]
    bare, filled = (code_of(*before, *loop) for before in ([], ["@!PT LDS"] * 3))
    clocks, more = (pipe_clocks(code.instructions, DEVICES["90a"]) for code in (bare, filled))
    assert more == {**clocks, "issue": clocks["issue"] + 3 / 4}
    assert describe("a.cu", filled).memory_instructions == {"LDS": 1, "LDGSTS.E": 1}


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "architecture", "blocks"),
    [
        (128, 46080, 256, "80", 2),
        (129, 0, 256, "80", 1),  # 136 registers: three warps of each scheduler, twelve of eight
        (64, 0, 256, "80", 4),
        (32, 0, 64, "80", 32),
        (32, 0, 1024, "80", 2),
        (32, 81 << 10, 256, "80", 2),  # and 1 KiB of the driver's
        (32, 82 << 10, 256, "80", 1),
        (32, 100 << 10, 256, "90a", 2),
    ],
)
def test_blocks_per_multiprocessor(registers, shared, threads, architecture, blocks):
    assert blocks_per_multiprocessor(registers, shared, threads, DEVICES[architecture]) == blocks


NAME = "convolution<__half, 7>"
GOOD = Kernel(
    source="folder/name.cu",
    kernel=NAME,
    type="float16",
    architecture="80",
    registers=128,
    stack=0,
    spills=0,
    shared=1024,
    threads=256,
    loop=True,
    local_memory=0,
    instructions={"all": 100, "matrix": 8},
    memory_instructions={"LDS": 4},
    predicted=[Prediction(96, 56, 0, 2, {"issue": 0.2, "tensor": 0.1}, 0.3)],
)
SLOW = replace(GOOD, predicted=[Prediction(96, 56, 0, 1, {"issue": 0.6, "tensor": 0.1}, 0.3)])


@pytest.fixture
def table(monkeypatch):
    """Puts one entry for GOOD into the table."""

    def put(**options):
        monkeypatch.setattr(static_report, "WORK", {"convolution<*, 7>": Work((Loop(lambda shape: 1),), 4, **options)})

    put(matrix=True)
    return put


@pytest.mark.usefixtures("table")
def test_a_good_kernel_passes():
    assert failures(GOOD) == [] and report([], every=False) == 1


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (replace(GOOD, spills=16), ["16 bytes of spills"]),
        (replace(GOOD, kernel="unknown", local_memory=2), ["2 accesses to local memory in the main loop"]),
        (replace(GOOD, instructions={"all": 9, "matrix": 0}), ["no matrix instruction in the main loop"]),
        (
            SLOW,
            [
                "1 blocks per multiprocessor at 96 channels, 56x56",
                "issue predicted at 2.00 times memory at 96 channels, 56x56",
            ],
        ),
    ],
)
def test_a_bad_kernel_fails(bad, expected):
    assert failures(bad) == expected


def test_a_reason_excuses_and_is_needed(table):
    table(matrix=True, few_blocks="tiles are large", slow="many moves")
    assert failures(SLOW) == [] and needless_reasons([SLOW]) == []
    assert len(needless_reasons([GOOD])) == 2 and needless_reasons([]) == []
    table(matrix=True, slow="many moves")
    assert failures(SLOW) == ["1 blocks per multiprocessor at 96 channels, 56x56"]


@needs_nvcc
def test_the_report_is_a_table_and_json(tmp_path, monkeypatch, capsys):
    source = tmp_path / "planted.cu"
    source.write_text(PLANTED)
    work = Work((Loop(lambda shape: 1 / (128 * shape.channels), marker="FADD"),), 8, slow="few bytes")
    monkeypatch.setattr(static_report, "WORK", {"sums<float, *>": work})
    monkeypatch.setattr(static_report, "sources", lambda: {"tests/planted.cu": source})
    path = tmp_path / "report.json"
    assert main(["--architectures", "80", "--json", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "FAILED spilling for sm_80: " in printed and "few bytes" in printed
    assert "3 kernels compiled, 2 failures" in printed
    content = json.loads(path.read_text())
    assert {"nvcc", "versions", "commit", "date", "assumed", "reasons", "kernels"} <= content.keys()
    kernels = {kernel["kernel"]: kernel for kernel in content["kernels"]}
    assert kernels["straight"]["predicted"] == []
    predicted = kernels["sums<float, 4>"]["predicted"]
    assert [(p["channels"], p["size"]) for p in predicted] == [(shape.channels, shape.size) for shape in SHAPES]
    assert predicted[0]["memory"] == pytest.approx(8 * 108 * 1.41e9 / 2.0e12)
    assert predicted[0]["clocks"]["issue"] == pytest.approx(
        kernels["sums<float, 4>"]["instructions"]["all"] / 4 / 128 / 96
    )


def test_the_stored_report_is_of_these_kernels():
    stored = json.loads((Path(static_report.__file__).parent / "results" / "static_report.json").read_text())
    assert {kernel["source"] for kernel in stored["kernels"]} == set(sources())
    assert {kernel["architecture"] for kernel in stored["kernels"]} == set(DEVICES)
    assert all(kernel["spills"] == kernel["local_memory"] == 0 for kernel in stored["kernels"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--architectures", "70"], "--architectures: got '70'; accepted: 80, 90a"),
        (["--source", "conv.cu"], "--source: got 'conv.cu'; accepted: common/"),
        (["--json", "/no/such/folder/file"], "--json: cannot write"),
    ],
)
def test_a_bad_argument_is_named(arguments, text, monkeypatch, capsys):
    monkeypatch.setattr(static_report, "find_nvcc", lambda: "nvcc")
    assert text in refusal(main, arguments, capsys)


def test_without_nvcc_it_is_said(monkeypatch, capsys):
    monkeypatch.setattr(static_report, "find_nvcc", lambda: None)
    assert refusal(main, [], capsys).startswith("static_report: needs nvcc")
