"""A matrix product in Triton with the operands and epilogues that ConvNeXt needs, and its launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from convnext_kernels.ops.common.launch import architecture, launch, product_precision, round_up
from convnext_kernels.ops.common.matmul_configs import (
    LONG_MATMUL,
    MATMUL,
    Kind,
    MatmulConfig,
    aligned,
    few_programs,
    operand_bits,
    split_count,
)
from convnext_kernels.ops.common.triton_drop_path import DropPath
from convnext_kernels.ops.common.triton_images import ImageScale, images_of_tile, scale_images
from convnext_kernels.ops.common.triton_math import dot, gelu, gelu_derivative, gelu_form, in_parts, load_part


class Matrix(NamedTuple):
    """A matrix in memory: its tensor and strides, or with `patch` = P the patches of contiguous images [N, H, W, C].

    Patches are rows [N (H // P) (W // P), P P C], read and written in place.
    """

    tensor: Tensor
    row_stride: int
    column_stride: int
    patch: int = 0

    @property
    def transposed(self) -> Matrix:
        """The same memory with rows and columns exchanged."""
        return Matrix(self.tensor, self.column_stride, self.row_stride, self.patch)


def matrix(tensor: Tensor) -> Matrix:
    """A 2-D tensor as an operand."""
    return Matrix(tensor, *tensor.stride())


def patches(images: Tensor, size: int) -> Matrix:
    """The patches of contiguous images [N, H, W, C] as an operand."""
    return Matrix(images, 0, 0, size)


class Epilogue(NamedTuple):
    """What is done to a product before it is stored, in this order; None leaves a step out.

    bias [columns] is added; scale [1] in float32 multiplies; `pre_activation` receives that, before `activation`;
    or, with `derivative`, the product is multiplied by the activation's derivative at `pre_activation`, whose
    activation, times the factor of `drop_path`, goes to `hidden`. There the pre-activation may also be `recomputed`: a
    second product of the same shape, whose first operand has the first one's strides, plus the bias. Then column_scale
    [columns] and the factor multiply, and `residual` is added, where no pre-activation is read.

    With a drop_path rows are taken in its order: those of dropped images come last, are neither read nor multiplied,
    and 0 but for the residual. With `scale_tokens` false its factor does not multiply; with `write_dropped` false those
    rows are not written either, but for the pre-activation, which a caller may keep.
    """

    bias: Tensor | None = None
    scale: Tensor | None = None
    activation: str | None = None
    pre_activation: Tensor | None = None
    derivative: bool = False
    hidden: Tensor | None = None
    recomputed: tuple[Matrix, Matrix] | None = None
    column_scale: Tensor | None = None
    drop_path: DropPath | None = None
    scale_tokens: bool = True
    write_dropped: bool = True
    residual: Tensor | None = None


@triton.jit
def _row_offsets(rows, stride, PATCH: tl.constexpr, patch_rows, patch_columns, height, width, channels):
    if PATCH == 0:
        return rows.to(tl.int64) * stride
    line, column = rows // patch_columns, rows % patch_columns
    image, row = line // patch_rows, line % patch_rows
    return ((image.to(tl.int64) * height + row * PATCH) * width + column * PATCH) * channels


@triton.jit
def _column_offsets(columns, stride, PATCH: tl.constexpr, width, channels):
    if PATCH == 0:
        return columns.to(tl.int64) * stride
    run = PATCH * channels
    return (columns // run).to(tl.int64) * width * channels + columns % run


@triton.jit
def _add_bias(accumulator, second, bias_ptr, n, n_mask, DERIVATIVE: tl.constexpr):
    """To the product, or to the pre-activation that is recomputed for a derivative."""
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        if DERIVATIVE:
            second += bias
        else:
            accumulator += bias
    return accumulator, second


@triton.jit
def _differentiate(sums, pre_activation, hidden_ptr, row_factor, offsets, mask, ACTIVATION: tl.constexpr):
    """Sums times the activation's derivative; the activation itself, times rows' factor, is stored."""
    # One that was recomputed is rounded as it would have been saved.
    pre_activation = pre_activation.to(hidden_ptr.dtype.element_ty).to(tl.float32)
    sums *= gelu_derivative(pre_activation, ACTIVATION)
    hidden = gelu(pre_activation, ACTIVATION)
    if row_factor is not None:
        hidden *= row_factor[:, None]
    tl.store(hidden_ptr + offsets, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)
    return sums


@triton.jit
def _two_parts(factor, dtype: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns whose sum is the factor to 2^-17: in the first what 16 bits hold of it, in the others the rest."""
    high = factor.to(dtype)
    rest = (factor - high.to(tl.float32)).to(dtype)
    return tl.where(tl.arange(0, COLUMNS)[None, :] == 0, high[:, None], rest[:, None])


@triton.jit
def _add_two_parts(products, COLUMNS: tl.constexpr):
    """Sums of products with `_two_parts`; of an infinity the rest may be NaN or its opposite."""
    column = tl.arange(0, COLUMNS)[None, :]
    high = tl.sum(tl.where(column == 0, products, 0.0), axis=1)
    rest = tl.sum(tl.where(column == 1, products, 0.0), axis=1)
    return tl.where(tl.abs(rest) < float("inf"), high + rest, high)


@triton.jit(do_not_specialize=["rows", "patch_rows", "patch_columns", "height", "width", "image_tokens"])
def matmul_kernel(
    a_ptr,
    b_ptr,
    second_a_ptr,
    second_b_ptr,
    out_ptr,
    scale_ptr,
    bias_ptr,
    pre_activation_ptr,
    hidden_ptr,
    column_scale_ptr,
    order_ptr,
    factor_ptr,
    kept_ptr,
    residual_ptr,
    row_sums_ptr,
    image_scale_ptr,
    image_bias_ptr,
    rows,
    columns,
    inner,
    inner_per_split,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_second_bk,
    stride_second_bn,
    patch_rows,
    patch_columns,
    height,
    width,
    channels,
    image_tokens,
    A_PATCH: tl.constexpr,
    B_PATCH: tl.constexpr,
    OUT_PATCH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    ROWS_ALIGNED: tl.constexpr,
    ORDERED: tl.constexpr,
    WRITE_DROPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PART_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """See `Epilogue`. ORDERED: which dimension is tokens in the order of stochastic depth, "rows", "inner" or None.

    The epilogue takes PART_N columns at a time: what it reads and results of all of them would take more registers than
    there are beside the sums, or than two programs have.
    """
    # Programs that share tiles of a and b run together, so that they find them in L2.
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    program, split = tl.program_id(0), tl.program_id(1)
    group = program // (GROUP_M * tiles_n)
    group_size = min(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + (program % (GROUP_M * tiles_n)) % group_size
    tile_n = (program % (GROUP_M * tiles_n)) // group_size

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if ROWS_ALIGNED:  # what the compiler cannot know; without it a is loaded element by element
        rows = rows // 16 * 16
    m_mask, n_mask = m < rows, n < columns
    start = split * inner_per_split
    end = min(start + inner_per_split, inner)
    a_mask, row_factor = m_mask, None
    if ORDERED is not None:
        kept = tl.load(kept_ptr)
    if ORDERED == "rows":
        a_mask = m < kept
        end = tl.where(tile_m * BLOCK_M < kept, end, start)
        if factor_ptr is not None:
            row_factor = tl.load(factor_ptr + m, mask=m_mask, other=0.0)
        m = tl.load(order_ptr + m, mask=m_mask, other=0)
    elif ORDERED == "inner":
        inner_per_split = tl.cdiv(tl.cdiv(kept, tl.num_programs(1)), BLOCK_K) * BLOCK_K
        start = split * inner_per_split
        end = min(start + inner_per_split, kept)
    if image_scale_ptr is not None:
        image1, image2, in_image1 = images_of_tile(tile_m * BLOCK_M, rows, order_ptr, image_tokens, BLOCK_M)
    a_rows = _row_offsets(m, stride_am, A_PATCH, patch_rows, patch_columns, height, width, channels)
    b_columns = _column_offsets(n, stride_bn, B_PATCH, width, channels)

    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # 16-bit products start from their bias, which takes up to 32 registers beside the sums behind the loop. In float32
    # each step would round at its size.
    FLOAT32: tl.constexpr = a_ptr.dtype.element_ty == tl.float32
    if not FLOAT32:
        accumulator, second = _add_bias(accumulator, second, bias_ptr, n, n_mask, DERIVATIVE)
    # Sums of 16-bit rows are a product too: added up by shuffles they take more instructions than all the rest.
    SUMS: tl.constexpr = 1 if FLOAT32 else 16
    WEIGHTED: tl.constexpr = ORDERED == "inner" and factor_ptr is not None
    row_sums = tl.zeros((BLOCK_M, SUMS), dtype=tl.float32)
    ones = tl.full((BLOCK_K, SUMS), 1.0, dtype=a_ptr.dtype.element_ty)
    stop = end
    if ORDERED == "inner" or image_scale_ptr is not None:
        # One step at least, if an empty one, and the compiler knows: after a loop that may be skipped the sums come in
        # two ways, and on sm_90 products that weigh or scale an operand then wait for one another in it.
        stop = max(end, start + 1)
        tl.assume(start < stop)
    for offset in range(start, stop, BLOCK_K):
        k = offset + tl.arange(0, BLOCK_K)
        k_mask = k < end
        if ORDERED == "inner":
            if WEIGHTED:
                factor = tl.load(factor_ptr + k, mask=k_mask, other=0.0)
            k = tl.load(order_ptr + k, mask=k_mask, other=0)
        a_offsets = a_rows[:, None] + _column_offsets(k, stride_ak, A_PATCH, width, channels)[None, :]
        b_rows = _row_offsets(k, stride_bk, B_PATCH, patch_rows, patch_columns, height, width, channels)
        a = tl.load(a_ptr + a_offsets, mask=a_mask[:, None] & k_mask[None, :], other=0.0)
        b = tl.load(b_ptr + b_rows[:, None] + b_columns[None, :], mask=k_mask[:, None] & n_mask[None, :], other=0.0)
        if image_scale_ptr is not None:
            a = scale_images(a, image_scale_ptr, image_bias_ptr, image1, image2, in_image1, k, k_mask, inner)
        if row_sums_ptr is not None:
            if FLOAT32:
                row_sums += tl.sum(a * factor[None, :] if WEIGHTED else a, axis=1)[:, None]
            else:
                row_sums = tl.dot(a, _two_parts(factor, ones.dtype, SUMS) if WEIGHTED else ones, row_sums)
        accumulator = dot(a, b, accumulator, PRECISION)
        if second_a_ptr is not None:
            b_offsets = k.to(tl.int64)[:, None] * stride_second_bk + n.to(tl.int64)[None, :] * stride_second_bn
            a = tl.load(second_a_ptr + a_offsets, mask=a_mask[:, None] & k_mask[None, :], other=0.0)
            b = tl.load(second_b_ptr + b_offsets, mask=k_mask[:, None] & n_mask[None, :], other=0.0)
            second = dot(a, b, second, PRECISION)

    # Offsets of 32 bits from the tile's own, unless its rows are anywhere: a register less for each row of a thread.
    # With TF32 they spill 8 bytes on sm_80.
    if ORDERED == "rows" or FLOAT32:
        tile, row_offsets = 0, m.to(tl.int64) * columns
    else:
        tile, row_offsets = tile_m.to(tl.int64) * BLOCK_M * columns, tl.arange(0, BLOCK_M) * columns
    out_ptr += split.to(tl.int64) * rows * columns
    if OUT_PATCH > 0:
        out_rows = _row_offsets(m, 0, OUT_PATCH, patch_rows, patch_columns, height, width, channels)
    else:
        out_ptr += tile
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    if hidden_ptr is not None:
        hidden_ptr += tile
    if pre_activation_ptr is not None:
        pre_activation_ptr += tile
    if residual_ptr is not None:
        residual_ptr += tile
    # What a part reads is loaded before the last one is stored, and under way meanwhile.
    READS: tl.constexpr = residual_ptr is not None or (DERIVATIVE and second_a_ptr is None)
    if READS:
        read_ptr, read_mask = (pre_activation_ptr, a_mask) if DERIVATIVE else (residual_ptr, m_mask)
        following = load_part(read_ptr, row_offsets, read_mask, tile_n * BLOCK_N, columns, PART_N)
    PARTS: tl.constexpr = BLOCK_N // PART_N
    accumulators, seconds = in_parts(accumulator, PARTS), in_parts(second, PARTS)
    for part in tl.static_range(PARTS):
        sums, pre_activation, first = accumulators[part], seconds[part], tile_n * BLOCK_N + part * PART_N
        if READS:
            read = following
            if part + 1 < PARTS:
                following = load_part(read_ptr, row_offsets, read_mask, first + PART_N, columns, PART_N)
        n = first + tl.arange(0, PART_N)
        n_mask, offsets = n < columns, row_offsets[:, None] + n[None, :]
        mask = m_mask[:, None] & n_mask[None, :]
        out_mask = mask if WRITE_DROPPED else a_mask[:, None] & n_mask[None, :]
        if FLOAT32:
            sums, pre_activation = _add_bias(sums, pre_activation, bias_ptr, n, n_mask, DERIVATIVE)
        if scale_ptr is not None:
            sums *= scale
        if DERIVATIVE:
            if second_a_ptr is None:
                pre_activation = read
            sums = _differentiate(sums, pre_activation, hidden_ptr, row_factor, offsets, out_mask, ACTIVATION)
        elif ACTIVATION is not None:
            if pre_activation_ptr is not None:
                tl.store(pre_activation_ptr + offsets, sums.to(pre_activation_ptr.dtype.element_ty), mask=mask)
            sums = gelu(sums, ACTIVATION)
        if column_scale_ptr is not None:
            sums *= tl.load(column_scale_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        if row_factor is not None:
            sums *= row_factor[:, None]
        if ORDERED == "rows":
            sums = tl.where(a_mask[:, None], sums, 0.0)
        if residual_ptr is not None:
            sums += read.to(tl.float32)
        if OUT_PATCH > 0:
            offsets = out_rows[:, None] + _column_offsets(n, 0, OUT_PATCH, width, channels)[None, :]
        tl.store(out_ptr + offsets, sums.to(out_ptr.dtype.element_ty), mask=out_mask)
    if row_sums_ptr is not None:  # noqa: SIM102 - this test is the compiler's, the next one the GPU's
        if tile_n == 0:
            # Without weights all columns are the same.
            total = _add_two_parts(row_sums, SUMS) if WEIGHTED and not FLOAT32 else tl.max(row_sums, axis=1)
            tl.store(row_sums_ptr + split.to(tl.int64) * rows + m, total, mask=m_mask)


GROUP_M = 8


def _launch(
    a: Matrix,
    b: Matrix,
    out: Matrix,
    shape: tuple[int, int, int],
    config: MatmulConfig,
    epilogue: Epilogue,
    splits: int = 1,
    row_sums: Tensor | None = None,
    image_scale: ImageScale | None = None,
) -> None:
    rows, columns, inner = shape
    patch = a.patch or b.patch or out.patch
    second_a, second_b = epilogue.recomputed or (None, None)
    patched = next((operand.tensor for operand in (a, b, out) if operand.patch), None)
    _, height, width, channels = (1, 1, 1, 1) if patched is None else patched.shape
    drop_path, ordered = epilogue.drop_path, None
    if drop_path is not None:
        ordered = "rows" if row_sums is None else "inner"
    per_split = round_up(-(-inner // splits), config.block_k)
    tiles = -(-rows // config.block_m) * -(-columns // config.block_n)
    # Partial sums have no epilogue.
    part = config.block_n if row_sums is not None else min(config.block_n, config.part_bytes // out.tensor.itemsize)
    launch(
        matmul_kernel,
        (tiles, splits),
        a.tensor,
        b.tensor,
        second_a and second_a.tensor,
        second_b and second_b.tensor,
        out.tensor,
        epilogue.scale,
        epilogue.bias,
        epilogue.pre_activation,
        epilogue.hidden,
        epilogue.column_scale,
        drop_path and drop_path.order,
        drop_path.factor if drop_path and epilogue.scale_tokens else None,
        drop_path and drop_path.kept,
        epilogue.residual,
        row_sums,
        image_scale and image_scale.scale,
        image_scale and image_scale.bias,
        rows,
        columns,
        inner,
        per_split,
        *a[1:3],
        *b[1:3],
        *(second_b[1:3] if second_b else (0, 0)),
        height // patch if patch else 1,
        width // patch if patch else 1,
        height,
        width,
        channels,
        rows // image_scale.scale.shape[0] if image_scale else 1,
        A_PATCH=a.patch,
        B_PATCH=b.patch,
        OUT_PATCH=out.patch,
        ACTIVATION=epilogue.activation and gelu_form(epilogue.activation, a.tensor.dtype),
        DERIVATIVE=epilogue.derivative,
        ROWS_ALIGNED=a.row_stride == 1 and rows % 16 == 0,
        ORDERED=ordered,
        WRITE_DROPPED=epilogue.write_dropped,
        PRECISION=product_precision(),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PART_N=part,
        GROUP_M=GROUP_M,
        warps=config.warps,
        registers=config.registers,
        # Where the order is loaded in the loop, what it leads to is loaded half the stages later.
        num_stages=2 * config.stages - 1 if ordered == "inner" else config.stages,
    )


PLAIN = Epilogue()


def _kind(a: Matrix, out: Matrix, epilogue: Epilogue, image_scale: ImageScale | None) -> Kind:
    if out.patch:
        return Kind.ELEMENTS
    if epilogue.derivative:
        return Kind.DERIVATIVE if epilogue.recomputed is None else Kind.RECOMPUTED
    if image_scale is not None:
        return Kind.SCALED
    return Kind.PATCHES if a.patch else Kind.PLAIN


def matmul(
    a: Matrix,
    b: Matrix,
    out: Matrix,
    shape: tuple[int, int, int],
    epilogue: Epilogue = PLAIN,
    image_scale: ImageScale | None = None,
) -> None:
    """out = epilogue(a b) for shape = (rows, columns, inner); every element of out is written.

    With an image_scale a is scaled by it as it is read; images have `MINIMUM_TOKENS` or more.
    """
    rows, columns, inner = shape
    bits, few, device = operand_bits(a.tensor.dtype), few_programs(rows, columns), a.tensor.device
    kind = aligned(_kind(a, out, epilogue, image_scale), columns, inner)
    config = MATMUL(a.tensor, columns, inner, bits, kind, int(few), architecture(device))
    _launch(a, b, out, shape, config, epilogue, image_scale=image_scale)


def long_matmul(
    a: Matrix, b: Matrix, shape: tuple[int, int, int], drop_path: DropPath | None = None, weigh_sums: bool = False
) -> tuple[Tensor, Tensor]:
    """a b and the sums of a's rows in float32, for an inner dimension of tokens.

    The sum is split among programs and the parts added in a fixed order: two runs give the same bits.

    Args:
        shape: (rows, columns, inner).
        drop_path: its kept images alone are summed over.
        weigh_sums: its factor multiplies a in the sums, not in the product.
    """
    rows, columns, inner = shape
    bits, device = operand_bits(a.tensor.dtype), a.tensor.device
    kind = aligned(Kind.PATCHES if b.patch else Kind.PLAIN, rows, columns)
    config = LONG_MATMUL(a.tensor, rows, columns, bits, kind, architecture(device))
    splits = split_count(rows, columns, inner, config)
    product = torch.empty((splits, rows, columns), dtype=torch.float32, device=a.tensor.device)
    row_sums = torch.empty((splits, rows), dtype=torch.float32, device=a.tensor.device)
    out = Matrix(product, columns, 1)
    epilogue = Epilogue(drop_path=drop_path, scale_tokens=weigh_sums)
    _launch(a, b, out, shape, config, epilogue, splits, row_sums)
    return product.sum(0), row_sums.sum(0)
