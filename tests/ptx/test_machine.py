"""The machine itself: its instructions do what PTX says, and it finds every planted fault and none in right code."""

from textwrap import dedent

import numpy as np
import pytest
import torch
from ptx.machine import launch
from ptx.memory import Fault
from ptx.program import kernels
from ptx.values import narrow, round_to_tf32

THREADS = 64


def run(body, *tensors, threads=THREADS, shared=1024, blocks=1):
    """Runs a kernel whose %rd0, %rd1 ... hold the tensors' addresses and %r0 is the thread's number."""
    parameters = ",\n".join(f".param .u64 .ptr .global .align 1 kernel_param_{i}" for i in range(len(tensors)))
    loads = "\n".join(f"ld.param.b64 %rd{i}, [kernel_param_{i}];" for i in range(len(tensors)))
    registers = ".reg .pred %p<9>;\n.reg .b16 %rs<9>;\n.reg .b32 %r<99>;\n.reg .b64 %rd<99>;"
    start = f"{loads}\nmov.u32 %r0, %tid.x;"
    ptx = f".visible .entry kernel(\n{parameters}\n)\n.reqntid {threads}\n{{\n{registers}\n{start}\n{body}\nret;\n}}\n"
    launch(*kernels(ptx), (blocks, 1, 1), shared, tensors)


def of_threads(function, dtype=torch.int32):
    return torch.tensor([function(thread) for thread in range(THREADS)], dtype=dtype)


LOAD = "mad.wide.u32 %rd9, %r0, 4, %rd0; ld.global.b32 { %r1 }, [ %rd9 + 0 ];"
STORE = "mad.wide.u32 %rd8, %r0, 4, %rd1; st.global.b32 [ %rd8 + 0 ], { %r2 };"


def computed(instructions, values, dtype=torch.int32):
    """What the instructions make of each thread's %r1 in %r2."""
    values, result = torch.tensor(values).view(-1), torch.full((THREADS,), -1, dtype=dtype)
    given = torch.zeros(THREADS, dtype=values.dtype)
    given[: len(values)] = values
    run(f"{LOAD}\n{instructions}\n{STORE}", given, result)
    return result[: len(values)].tolist()


@pytest.mark.parametrize(
    ("instructions", "values", "expected"),
    [
        ("add.s32 %r2, %r1, -3;", [1, -(2**31)], [-2, 2**31 - 3]),
        ("div.s32 %r2, %r1, 4;", [7, -7, -8], [1, -1, -2]),
        ("rem.s32 %r2, %r1, 4;", [7, -7, -8], [3, -3, 0]),
        ("shr.s32 %r2, %r1, 40;", [-5, 5], [-1, 0]),
        ("shr.u32 %r2, %r1, 28;", [-1, 5], [15, 0]),
        ("shl.b32 %r2, %r1, 33;", [-1], [0]),
        ("bfe.u32 %r2, %r1, 4, 3;", [0b1011_0000, 0xF0], [0b011, 0b111]),
        ("bfe.s32 %r2, %r1, 4, 1;", [16, 32], [-1, 0]),
        ("prmt.b32 %r2, %r1, 0x44332211, 0x5140U;", [0x0D0C0B0A], [0x220B110A]),
        ("prmt.b32 %r2, %r1, 0, 0xAU;", [0x00800000], [0xFF]),
        ("bfi.b32 %r2, %r1, -1, 4, 8;", [0x3FF, 0xA5], [-1, 0xFFFFFA5F - 2**32]),
        ("mul.hi.s32 %r2, %r1, 1431655766;", [9, -9], [3, -4]),
        (
            "cvt.s64.s32 %rd2, %r1; cvt.u64.u32 %rd3, %rd2; shr.u64 %rd3, %rd3, 4; cvt.u32.u64 %r2, %rd3;",
            [-1],
            [2**28 - 1],
        ),
        ("not.b32 %r2, %r1;", [0, -1], [-1, 0]),
        ("max.s32 %r2, %r1, 3;", [-1, 5], [3, 5]),
        ("setp.lt.u32 %p1, %r1, 3; selp.b32 %r2, 10, 20, %p1;", [-1, 2], [20, 10]),
        ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r2, {%rs2, %rs1};", [0x00010002], [0x00020001]),
        ("cvt.s64.s32 %rd2, %r1; shr.u64 %rd2, %rd2, 32; cvt.u32.u64 %r2, %rd2;", [-1, 1], [-1, 0]),
        ("mul.wide.s32 %rd2, %r1, %r1; shr.s64 %rd2, %rd2, 32; cvt.u32.u64 %r2, %rd2;", [-(2**20)], [256]),
        ("mov.b32 %r2, 7; setp.eq.s32 %p1, %r1, 0; @!%p1 add.s32 %r2, %r1, %r2;", [0, 1], [7, 8]),
    ],
)
def test_integers(instructions, values, expected):
    assert computed(instructions, np.array(values, np.int64).astype(np.int32)) == expected


@pytest.mark.parametrize(
    ("instructions", "values", "expected"),
    [
        ("fma.rn.f32 %r2, %r1, %r1, 0fBF800000;", [1 + 2**-12], [2**-11 + 2**-24]),
        ("max.NaN.f32 %r2, %r1, 0f00000000;", [np.nan, -1], [np.nan, 0]),
        ("max.f32 %r2, %r1, 0f00000000;", [np.nan, 2], [0, 2]),
        ("ex2.approx.ftz.f32 %r2, %r1;", [3, -np.inf], [8, 0]),
        ("setp.ne.f32 %p1, %r1, %r1; selp.f32 %r2, 0f3F800000, 0f00000000, %p1;", [np.nan, 2], [0, 0]),
        ("setp.neu.f32 %p1, %r1, %r1; selp.f32 %r2, 0f3F800000, 0f00000000, %p1;", [np.nan, 2], [1, 0]),
        ("cvt.rn.bf16x2.f32 %r3, 0f40000000, %r1; shr.u32 %r2, %r3, 16; shl.b32 %r2, %r2, 16;", [1], [2]),
        ("cvt.rn.bf16.f32 %rs1, %r1; cvt.f32.bf16 %r2, %rs1;", [1 + 2**-8, 1 + 3 * 2**-8], [1, 1 + 2**-6]),
        ("cvt.rn.f16.f32 %rs1, %r1; cvt.f32.f16 %r2, %rs1;", [65520, 1 + 2**-11], [np.inf, 1]),
        ("cvt.rna.tf32.f32 %r2, %r1;", [1 + 2**-11, 1 + 2**-12], [1 + 2**-10, 1]),
        ("cvt.rn.f32.s32 %r2, 3;", [0], [3]),
    ],
)
def test_floats(instructions, values, expected):
    np.testing.assert_array_equal(computed(instructions, np.array(values, np.float32), torch.float32), expected)


def test_packed_numbers():
    instructions = "neg.bf16x2 %r3, %r1; setp.ge.bf16x2 %p1|%p2, %r3, %r1; selp.b32 %r4, 1, 0, %p1;"
    instructions += "selp.b32 %r5, 2, 0, %p2; or.b32 %r2, %r4, %r5;"
    pairs = torch.tensor([[1.0, -1.0], [-2.0, 3.0], [-1.0, -1.0]]).bfloat16().view(torch.int32)
    assert computed(instructions, pairs.numpy()) == [2, 1, 3]


def test_rounding_is_pytorchs():
    values = torch.randn(4096) * 2.0 ** torch.randint(-140, 127, (4096,))
    assert np.array_equal(narrow(values.numpy(), "bf16"), values.bfloat16().view(torch.int16).numpy().view(np.uint16))
    rounded = torch.from_numpy(round_to_tf32(values.numpy()))
    assert ((rounded - values).abs() <= values.abs() * 2.0**-11 + 2.0**-137).all()


def test_threads_that_branch_apart_meet_again():
    """Odd threads go round a loop as often as their number says, and all of them meet at a barrier."""
    body = """
    mov.b32 %r2, 0;
    mov.b32 %r3, %r0;
    and.b32 %r4, %r0, 1;
    setp.eq.s32 %p1, %r4, 0;
    @%p1 bra $L_meet;
    $L_loop:
    add.s32 %r2, %r2, 2;
    add.s32 %r3, %r3, -1;
    setp.gt.s32 %p2, %r3, 0;
    @%p2 bra $L_loop;
    $L_meet:
    bar.sync 0;
    mad.wide.u32 %rd8, %r0, 4, %rd0;
    st.global.b32 [ %rd8 + 0 ], { %r2 };
    """
    result = torch.full((THREADS,), -1, dtype=torch.int32)
    run(body, result)
    assert torch.equal(result, of_threads(lambda thread: 2 * thread if thread % 2 else 0))


def test_shuffles_and_sums_of_a_warp():
    values, result = of_threads(lambda thread: thread), torch.empty(THREADS, dtype=torch.int32)
    run(f"{LOAD} shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1; {STORE}", values, result)
    assert torch.equal(result, of_threads(lambda thread: thread ^ 5))
    run(f"{LOAD} shfl.sync.idx.b32 %r2, %r1, 3, 31, -1; {STORE}", values, result)
    assert torch.equal(result, of_threads(lambda thread: thread // 32 * 32 + 3))
    run(f"{LOAD} mov.b32 %r7, 6175; shfl.sync.bfly.b32 %r2|%p1, %r1, 12, %r7, -1; {STORE}", values, result)
    assert torch.equal(result, of_threads(lambda thread: thread ^ 12 if thread & 8 else thread))
    run(f"{LOAD} redux.sync.add.s32 %r2, %r1, -1; {STORE}", values, result)
    assert torch.equal(result, of_threads(lambda thread: sum(range(thread // 32 * 32, thread // 32 * 32 + 32))))


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_mma_is_the_matrix_product(kind):
    """Fragments by PTX's pictures: lane = 4 g + q has rows g and g + 8 and pairs of columns from 2 q on."""
    bits, inner = (32, 8) if kind == "tf32" else (16, 16)
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}[kind]
    a, b = torch.randn(16, inner).to(dtype), torch.randn(inner, 8).to(dtype)
    if kind == "tf32":
        a, b = (torch.from_numpy(round_to_tf32(x.numpy())) for x in (a, b))
    per = 32 // bits
    g, q = np.arange(32) // 4, np.arange(32) % 4
    fragments_a = [a[g + 8 * (i % 2), per * q + e + 4 * per * (i // 2)] for i in range(4) for e in range(per)]
    fragments_b = [b[per * q + e + 4 * per * i, g] for i in range(2) for e in range(per)]
    given = torch.stack(fragments_a + fragments_b, -1).contiguous().view(torch.int32)
    result = torch.empty(32, 4)
    loads = "".join(f"ld.global.b32 {{ %r{i + 10} }}, [ %rd9 + {4 * i} ];" for i in range(6))
    shape = f"m16n8k{inner}.row.col.f32.{kind}.{kind}.f32"
    body = f"""
    mad.wide.u32 %rd9, %r0, 24, %rd0;
    mad.wide.u32 %rd8, %r0, 16, %rd1;
    mov.b32 %r20, 0f3F800000;
    {loads}
    mma.sync.aligned.{shape}
        {{%r1, %r2, %r3, %r4}}, {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%r20, %r20, %r20, %r20}};
    st.global.v4.b32 [ %rd8 + 0 ], {{ %r1, %r2, %r3, %r4 }};
    """
    run(body, given, result, threads=32)
    expected = 1 + a.double() @ b.double()
    for i in range(4):
        np.testing.assert_allclose(result[:, i], expected[g + 8 * (i // 2), 2 * q + i % 2], atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_of_shared_memory(transposed):
    """stmatrix puts a fragment down whose rows ldmatrix, or plain loads, pick up."""
    matrix = torch.arange(64, dtype=torch.int16).view(8, 8)
    given = matrix.t().contiguous() if transposed else matrix
    result, plain = torch.empty(32, dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    trans = ".trans" if transposed else ""
    body = f"""
    {LOAD}
    and.b32 %r3, %r0, 7;
    shl.b32 %r3, %r3, 4;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r3+128], {{%r1}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r2}}, [%r3+128];
    {STORE}
    shl.b32 %r4, %r0, 2;
    ld.shared.b32 %r2, [%r4+128];
    mad.wide.u32 %rd8, %r0, 4, %rd2;
    st.global.b32 [ %rd8 + 0 ], {{ %r2 }};
    """
    run(body, given.view(torch.int32).flatten().contiguous(), result, plain, threads=32)
    assert torch.equal(result.view(torch.int16).view(8, 8), matrix)
    assert torch.equal(plain.view(torch.int16).view(8, 8), given)


def test_a_barrier_that_tells_of_any_thread_of_a_block():
    body = f"{LOAD} setp.eq.s32 %p1, %r1, 192; bar.red.or.pred %p2, 0, %p1; selp.b32 %r2, 1, 0, %p2; {STORE}"
    values, result = torch.arange(0, 6 * THREADS, 3, dtype=torch.int32), torch.empty(2 * THREADS, dtype=torch.int32)
    in_grid = "mov.u32 %r6, %ctaid.x; mad.lo.s32 %r0, %r6, 64, %r0;"
    run(f"{in_grid} {body}", values, result, blocks=2)
    assert torch.equal(result, torch.arange(2 * THREADS, dtype=torch.int32) // THREADS)


def test_copies_that_a_predicate_turns_off():
    values, result = of_threads(lambda thread: 3 * thread), torch.empty(THREADS, dtype=torch.int32)
    copy = COPY.replace("0x4;", "4, off;")
    assembly = f"// begin inline asm\n{{\n.reg .pred off;\nsetp.gt.s32 off, %r0, 2;\n{copy}\n}}\n// end inline asm\n"
    run(f"{LOAD}\n{assembly} cp.async.wait_all; ld.shared.b32 %r2, [%r3]; {STORE}", values, result)
    assert torch.equal(result, of_threads(lambda thread: 3 * thread if thread < 3 else 0))


def test_parameters_and_shared_memory_by_name():
    """As nvcc writes them: structs, sizes, and memory without a size behind the rest."""
    (program,) = kernels(
        dedent("""
    .extern .shared .align 16 .b8 dynamic[];
    .entry kernel(
        .param .u32 kernel_param_0,
        .param .align 8 .b8 kernel_param_1[24]
    )
    .maxntid 64, 1, 1
    .minnctapersm 2
    {
        .reg .b32 %r<9>;
        .shared .align 4 .b8 first[20];
        .shared .align 8 .b8 second[8];
        ret;
    }
    """)
    )
    assert program.parameters.places == {"kernel_param_0": 0, "kernel_param_1": 8} and program.parameters.bytes == 32
    assert program.shared.places == {"first": 0, "second": 24} and program.shared.bytes == 32
    assert program.threads == 64 and [step.name for step in program.instructions] == ["ret"]


PUT = "shl.b32 %r3, %r0, 2; st.shared.b32 [%r3], %r1;"
OTHERS = "xor.b32 %r4, %r3, 128; ld.shared.b32 %r2, [%r4];"
"""What the other warp has put down."""
COPY = "shl.b32 %r3, %r0, 2; cp.async.ca.shared.global [ %r3 + 0 ], [ %rd9 + 0 ], 0x4;"

RIGHT = {
    "exchange": f"{PUT} bar.sync 0; {OTHERS}",
    "exchange twice": f"{PUT} bar.sync 0; {OTHERS} bar.sync 0; st.shared.b32 [%r3], %r2; bar.sync 0; {OTHERS}",
    "copy": f"{COPY} cp.async.commit_group; cp.async.wait_group 0; bar.sync 0; {OTHERS}",
    "second copy": f"{COPY} cp.async.commit_group; {COPY.replace('%r3 + 0', '%r3 + 256')} cp.async.commit_group;"
    f" cp.async.wait_group 1; bar.sync 0; {OTHERS} cp.async.wait_group 0;",
}
FAULTS = {
    "no barrier": (f"{PUT} {OTHERS}", "race: reads what another warp wrote"),
    "written too early": (
        f"{PUT} bar.sync 0; {OTHERS} st.shared.b32 [%r3], %r2;",
        "race: writes what another warp read",
    ),
    "copied too early": (f"{PUT} bar.sync 0; {OTHERS} {COPY}", "race: writes what another warp read"),
    "same place": ("mov.b32 %r2, %r1; mov.b32 %r3, 0; st.shared.b32 [%r3], %r0;", "race: two warps write different"),
    "same element": (
        "mov.b32 %r2, %r1; st.global.b32 [ %rd1 + 0 ], { %r0 };",
        "race: threads write different values to",
    ),
    "no wait": (f"{COPY} cp.async.commit_group; bar.sync 0; {OTHERS}", "missing wait: reads what a copy"),
    "wait for the other": (
        f"{COPY} cp.async.commit_group; cp.async.wait_group 1; bar.sync 0; {OTHERS}",
        "missing wait: reads what a copy",
    ),
    "copy at the end": (f"{COPY} cp.async.commit_group; mov.b32 %r2, %r1;", "missing wait: a block has ended with"),
    "write below a copy": (f"{COPY} {PUT} mov.b32 %r2, %r1;", "missing wait: writes what a copy"),
    "never written": (f"{PUT} bar.sync 0; ld.shared.b32 %r2, [%r3+512];", "uninitialised"),
    "past shared memory": (f"{PUT} bar.sync 0; ld.shared.b32 %r2, [%r3+1000];", "out of bounds: byte 1252 of 1024"),
    "misaligned": ("add.s32 %r3, %r0, 2; st.shared.b32 [%r3], %r1; mov.b32 %r2, %r1;", "misaligned: 4 bytes of shared"),
    "past a tensor": ("ld.global.b32 { %r2 }, [ %rd9 + 4 ];", "out of bounds: byte 256 of 256 of a tensor"),
    "before all tensors": (
        "mov.b64 %rd7, 16; ld.global.b32 { %r2 }, [ %rd7 + 0 ];",
        "out of bounds: global memory before",
    ),
    "misaligned copy": (
        f"{COPY.replace('0x4', '0x10')} mov.b32 %r2, %r1;",
        "misaligned",
    ),
    "some at a barrier": (
        "mov.b32 %r2, %r1; setp.lt.s32 %p1, %r0, 3; @%p1 bra $L_end; bar.sync 0; $L_end:\n",
        "divergent barrier",
    ),
    "some in a shuffle": (
        "mov.b32 %r2, 0; setp.lt.s32 %p1, %r0, 3; @%p1 shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;",
        "diverged warp",
    ),
    "unknown": ("frobnicate.b32 %r2, %r1;", "frobnicate"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_code_passes(name):
    values, result = of_threads(lambda thread: 3 * thread), torch.empty(THREADS, dtype=torch.int32)
    run(f"{LOAD} {RIGHT[name]} {STORE}", values, result)
    twice = name == "exchange twice"
    assert torch.equal(result, of_threads(lambda thread: 3 * (thread if twice else thread ^ 32)))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name):
    body, message = FAULTS[name]
    values, result = of_threads(lambda thread: 3 * thread), torch.empty(THREADS, dtype=torch.int32)
    with pytest.raises((Fault, NotImplementedError), match=message):
        run(f"{LOAD} {body} {STORE}", values, result)


def test_copies_of_no_bytes_are_zeros_and_read_nothing():
    values, result = of_threads(lambda thread: 3 * thread), torch.empty(THREADS, dtype=torch.int32)
    body = f"""
    {LOAD}
    setp.lt.s32 %p1, %r0, 3;
    selp.b32 %r5, 4, 0, %p1;
    selp.b64 %rd9, %rd9, 0, %p1;
    {COPY.replace("0x4;", "0x4, %r5;")}
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.b32 %r2, [%r3];
    {STORE}
    """
    run(body, values, result)
    assert torch.equal(result, of_threads(lambda thread: 3 * thread if thread < 3 else 0))


GROUPS = 128
PRODUCT = """
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r10,%r11,%r12,%r13}, %rd10, %rd11, 0, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
"""
WAIT = "wgmma.wait_group.sync.aligned 0;"
FENCE = "fence.proxy.async.shared::cta; bar.sync 0;"


def multiply(after_writing, after_multiplying):
    """A 64 x 16 times the transpose of B 8 x 16, both in rows of 32 bytes that the hardware swizzles."""
    a, b = torch.randn(64, 16).half(), torch.randn(8, 16).half()
    rows = torch.cat([a, b])
    row = torch.arange(len(rows))
    swapped = rows.view(-1, 2, 8)[row[:, None], torch.arange(2) ^ (row[:, None] // 4 % 2)]
    swizzle, stride = 3 << 62, 256 // 16 << 32
    descriptors = [swizzle | stride, swizzle | stride | 2048 // 16]
    given, result = swapped.contiguous().view(torch.int32).flatten(), torch.empty(GROUPS, 4)
    body = f"""
    mad.wide.u32 %rd9, %r0, 16, %rd0;
    shl.b32 %r3, %r0, 4;
    ld.global.v4.b32 {{ %r4, %r5, %r6, %r7 }}, [ %rd9 + 0 ];
    st.shared.v4.b32 [%r3], {{ %r4, %r5, %r6, %r7 }};
    setp.lt.s32 %p1, %r0, 16;
    @%p1 ld.global.v4.b32 {{ %r4, %r5, %r6, %r7 }}, [ %rd9 + 2048 ];
    @%p1 st.shared.v4.b32 [%r3+2048], {{ %r4, %r5, %r6, %r7 }};
    mov.b64 %rd10, {descriptors[0]};
    mov.b64 %rd11, {descriptors[1]};
    {after_writing}
    {PRODUCT}
    {after_multiplying}
    mad.wide.u32 %rd8, %r0, 16, %rd1;
    st.global.v4.b32 [ %rd8 + 0 ], {{ %r10, %r11, %r12, %r13 }};
    """
    run(body, given, result, threads=GROUPS, shared=4096)
    lane, warp = np.arange(GROUPS) % 32, np.arange(GROUPS) // 32
    expected = a.double() @ b.double().t()
    for i in range(4):
        row, column = 16 * warp + lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2
        np.testing.assert_allclose(result[:, i], expected[row, column], atol=1e-4)


def test_wgmma_is_the_matrix_product():
    multiply(FENCE, WAIT)


@pytest.mark.parametrize(
    ("after_writing", "after_multiplying", "message"),
    [
        ("fence.proxy.async.shared::cta;", WAIT, "race: reads what another warp wrote"),
        ("bar.sync 0;", WAIT, "missing fence"),
        (FENCE, f"st.shared.b32 [%r3], %r4; {WAIT}", "missing wait: writes what a product"),
        (
            FENCE,
            f"cp.async.ca.shared.global [ %r3 + 0 ], [ %rd9 + 0 ], 0x4; {WAIT}",
            "missing wait: writes what a prod",
        ),
    ],
)
def test_a_product_whose_operands_are_not_ready_or_do_not_stay(after_writing, after_multiplying, message):
    with pytest.raises(Fault, match=message):
        multiply(after_writing, after_multiplying)


def test_what_a_product_has_read_may_be_written():
    multiply(FENCE, f"{WAIT} bar.sync 0; st.shared.b32 [%r3], %r4;")
