"""Operands that are overwritten while a product reads them are found in what Triton and its assembler wrote."""

import pytest

pytest.importorskip("triton")
from benchmarks.hazards import early_writes, short_rings
from benchmarks.machine_code import parse_instructions

LOOP = """
    %a_1 = ttg.local_alloc : () -> !ttg.memdesc<{buffers}x128x32xf32, #shared, #smem, mutable>
    %b_2 = ttg.local_alloc : () -> !ttg.memdesc<3x32x128xf32, #shared, #smem, mutable>
    %sum:4 = scf.for %k = %start to %end step %c32 iter_args(%acc = %zero) -> (tensor<128x128xf32, #mma>) : i32 {{
      %a_3 = ttg.memdesc_index %a_1[%read] : !ttg.memdesc<{buffers}x128x32xf32> -> !ttg.memdesc<128x32xf32>
      %b_4 = ttg.memdesc_index %b_2[%read] : !ttg.memdesc<3x32x128xf32> -> !ttg.memdesc<32x128xf32>
      %c = ttng.warp_group_dot %a_3, %b_4, %acc {{inputPrecision = 0 : i32, isAsync = true}} : tensor<128x128xf32>
      %d:3 = ttng.warp_group_dot_wait %c, %a_3, %b_4 {{pendings = {pending} : i32}} : tensor<128x128xf32, #mma>
      %a_5 = ttg.memdesc_index %a_1[%write] : !ttg.memdesc<{buffers}x128x32xf32> -> !ttg.memdesc<128x32xf32>
      %e = ttg.async_copy_global_to_local %f, %a_5 mask %m other %o : tensor<128x32x!tt.ptr<f32>> -> <128x32xf32>
      %b_6 = ttg.memdesc_index %b_2[%write] : !ttg.memdesc<3x32x128xf32> -> !ttg.memdesc<32x128xf32>
      %g = ttg.async_copy_global_to_local %h, %b_6 mask %m other %o : tensor<32x128x!tt.ptr<f32>> -> <32x128xf32>
      scf.yield %d#0 : tensor<128x128xf32, #mma>
    }}
"""


@pytest.mark.parametrize(("buffers", "pending", "short"), [(2, 1, 1), (3, 1, 0), (2, 0, 0)])
def test_a_buffer_that_is_copied_to_too_early(buffers, pending, short):
    """One too few is enough where each product is waited for at once."""
    assert short_rings(LOOP.format(buffers=buffers, pending=pending)) == short


OPERANDS = {"registers": "R24, R152, gdesc[UR4], R24, gsb0", "shared memory": "R24, gdesc[UR4], R24, gsb0"}


@pytest.mark.parametrize(
    ("operands", "pending", "load", "early"),
    [
        ("registers", 1, "LDS.128 R152, [R3]", 1),
        ("registers", 1, "LDS R155, [R3]", 1),
        ("registers", 1, "IMAD.WIDE R154, R3, R4, R5", 1),
        ("registers", 1, "LDS R156, [R3]", 0),
        ("registers", 1, "STS [R3], R152", 0),
        ("registers", 1, "ISETP.GE.AND P0, PT, R152, R3, PT", 0),
        ("registers", 0, "LDS.128 R152, [R3]", 0),
        ("shared memory", 1, "LDS.128 R152, [R3]", 0),
    ],
)
def test_a_register_that_is_written_too_early(operands, pending, load, early):
    """By the next step of the loop, as a wait for all but one leaves the step's own product under way."""
    lines = [load, f"HGMMA.64x128x16.F32.BF16 {OPERANDS[operands]}", f"WARPGROUP.DEPBAR.LE gsb0, 0x{pending}"]
    lines += ["@P1 BRA 0x10", "LDS.128 R152, [R3]", "EXIT"]
    sass = "".join(
        f"        /*{16 * place:04x}*/   {line} ;  /* 0x0 */\n" for place, line in enumerate(["NOP", *lines])
    )
    assert early_writes(parse_instructions(sass)) == early
