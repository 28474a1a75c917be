"""Which tiles products are computed in: for how many programs, and what they give."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from support import assert_parity, device_of

from convnext_kernels import parity
from convnext_kernels.cli.workloads import multiplying
from convnext_kernels.ops.common import matmul_configs
from convnext_kernels.ops.common.matmul_configs import (
    MINIMUM_TOKENS,
    Kind,
    aligned,
    few_programs,
    long_matmul_config,
    matmul_config,
    scales_operands,
    split_count,
)
from convnext_kernels.variants import VARIANTS

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
BITS = (16, matmul_configs.TF32_BITS, 32)


@pytest.fixture
def on_gpu(monkeypatch):
    """Rules as they are where there is no interpreter, whatever this machine has."""
    monkeypatch.setattr(matmul_configs, "interpreting", lambda: False)


def programs(rows, columns, inner, architecture=90):
    config = matmul_config(columns, inner, 16, Kind.PLAIN, few_programs(rows, columns), architecture)
    return -(-rows // config.block_m) * -(-columns // config.block_n)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_image_is_spread_over_the_multiprocessors(on_gpu, architecture):
    """Of the 6 and 24 tiles of 128x128 that the third stage's products have, 24 and 96 programs are made."""
    assert programs(196, 384, 1536, architecture) == 24
    assert programs(196, 1536, 384, architecture) == 96


def test_large_batches_have_large_tiles(on_gpu):
    assert few_programs(196, 1536) and not few_programs(256 * 196, 1536)
    assert not few_programs(8 * 196, 1536), "of 64x64 there would be several on a multiprocessor"
    assert programs(256 * 196, 1536, 384) == 392 * 12
    assert programs(256 * 49, 768, 3072) == 49 * 6


def test_the_interpreter_has_no_multiprocessors_to_fill(monkeypatch):
    monkeypatch.setattr(matmul_configs, "interpreting", lambda: True)
    assert not few_programs(1, 16)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bits", BITS)
def test_every_product_of_every_model_has_a_tile_of_its_precision(architecture, bits):
    """A 16-bit tile does not fit a multiprocessor with operands of 32 bits, two of them with two products in one, and
    matrix instructions want 16 of each dimension."""
    widths = sorted({width for variant in VARIANTS.values() for width in variant.dims})
    for width in widths:
        for rows, columns in ((4 * width, width), (width, 4 * width)):
            for kind in Kind:
                tiles = [matmul_config(columns, rows, bits, kind, few, architecture) for few in (0, 1)]
                if kind in (Kind.PLAIN, Kind.PATCHES, Kind.ELEMENTS):
                    tiles.append(long_matmul_config(rows, columns, bits, kind, architecture))
                for tile in tiles:
                    assert min(tile.block_m, tile.block_n, tile.block_k) >= 16
                    operands = (tile.block_m + tile.block_n) * (2 if kind == Kind.RECOMPUTED else 1)
                    step = operands * tile.block_k * (2 if bits == 16 else 4)
                    assert step * (tile.stages - 1) <= 99 << 10


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", [Kind.SCALED, aligned(Kind.SCALED, 40)])
def test_where_images_are_scaled_a_tile_has_two_at_most(kind, bits, architecture):
    """Whatever a table says."""
    for columns, few in product((16, 40, 96, 384, 2816), (0, 1)):
        tiles = matmul_configs.MATMUL.candidates((columns, 4 * columns, bits, int(kind), few, architecture))
        assert len(tiles) > 3 and max(tile.block_m for tile in tiles) <= MINIMUM_TOKENS


def with_grn(channels):
    """Images of 143 tokens."""
    shapes = {"input": (3, channels, 13, 11), "weight1": (4 * channels, channels), "weight2": (channels, 4 * channels)}
    shapes |= {"bias1": (4 * channels,), "grn_weight": (4 * channels,), "grn_bias": (4 * channels,)}
    return parity.Case("mlp", "GRN", {**shapes, "drop_path_factor": (3,)})


@pytest.mark.parametrize(
    ("triton", "architecture", "scales"),
    [((3, 8), 90, False), ((3, 9), 90, True), ((3, 10), 90, True), ((3, 8), 80, True), ((3, 8), 100, True)],
)
def test_assemblers_that_reuse_registers_too_early_are_given_no_scaled_operand(
    on_gpu, monkeypatch, triton, architecture, scales
):
    monkeypatch.setattr(matmul_configs, "release", {"triton": triton}.get)
    assert scales_operands(MINIMUM_TOKENS, architecture) == scales
    assert not scales_operands(MINIMUM_TOKENS - 1, architecture)


@pytest.mark.parametrize("scales", [False, True])
def test_an_operand_that_is_not_scaled_as_it_is_read_is_scaled_before(monkeypatch, scales):
    kernel = pytest.importorskip("convnext_kernels.ops.mlp.triton_kernel")
    passes, forward = [], kernel.response_norm.forward
    monkeypatch.setattr(kernel, "scales_operands", lambda tokens, architecture: scales)
    monkeypatch.setattr(kernel.response_norm, "forward", lambda *tensors: passes.append(1) or forward(*tensors))
    assert_parity(with_grn(16), torch.float16, device_of("triton"), "triton")
    assert bool(passes) != scales


def test_partial_sums_do_not_grow_with_the_tile():
    """At most 512 results of 128x128 are added up for a weight, unless it has more tiles itself."""
    for rows, columns in ((3072, 768), (1536, 384), (768, 192), (384, 96)):
        for architecture in ARCHITECTURES:
            config = long_matmul_config(rows, columns, 16, Kind.PLAIN, architecture)
            splits = split_count(rows, columns, 256 * 56 * 56, config)
            tiles = -(-rows // config.block_m) * -(-columns // config.block_n)
            assert splits > 1 and splits * tiles * config.block_m * config.block_n <= 512 * 128 * 128
    assert split_count(3072, 768, 100, config) == 1


@pytest.fixture
def tiles(monkeypatch):
    """Products are launched as on a GPU of the given architecture, with few programs or many: every GPU can."""
    kernel = pytest.importorskip("convnext_kernels.ops.common.triton_matmul")

    def launched_as(architecture, few):
        monkeypatch.setattr(kernel, "few_programs", lambda rows, columns: few)
        monkeypatch.setattr(kernel, "architecture", lambda device: architecture)

    return launched_as


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("precision", ["float16", "tf32", "float32"])
def test_tiles_give_the_same(tiles, architecture, few, precision):
    """Of one image and of many, of GPUs that may not be here."""
    tiles(architecture, few)
    cases = [case for case in parity.cases("mlp", small=True) if case.name.startswith("2x96x5x3")]
    assert {case.options.get("recompute_hidden", False) for case in cases} == {False, True}
    for case in cases:
        with multiplying(precision) as dtype:
            assert_parity(case, dtype, device_of("triton"), "triton")


def test_the_largest_tiles_give_the_same(tiles):
    """Those of sm_90 where loops are long: of the second product and of gradients."""
    tiles(90, few=False)
    images, vectors = (
        dict.fromkeys(("input", "residual"), (2, 256, 5, 3)),
        dict.fromkeys(("bias2", "layer_scale"), (256,)),
    )
    layers = {"weight1": (1024, 256), "bias1": (1024,), "weight2": (256, 1024), "drop_path_factor": (2,)}
    case = parity.Case("mlp", "2x256x5x3", {**images, **layers, **vectors})
    assert matmul_config(256, 1024, 16, Kind.PLAIN, 0, 90) == matmul_configs.TALL
    assert_parity(case, torch.float16, device_of("triton"), "triton")


@pytest.mark.parametrize("part_bytes", [32, 256])
def test_an_epilogue_in_parts_gives_the_same(monkeypatch, part_bytes):
    """In one, and in eight of which the last two lie behind the 96 columns; pre-activations saved and recomputed."""
    kernel = pytest.importorskip("convnext_kernels.ops.common.triton_matmul")
    parts, launch = set(), kernel.launch

    def launching(function, grid, *arguments, **options):
        parts.add(options["BLOCK_N"] // options["PART_N"])
        launch(function, grid, *arguments, **options)

    monkeypatch.setattr(kernel, "launch", launching)
    monkeypatch.setattr(kernel, "MATMUL", lambda tensor, *key: replace(matmul_configs.WIDE, part_bytes=part_bytes))
    for case in parity.cases("mlp", small=True):
        if case.name.startswith("2x96x5x3"):
            assert_parity(case, torch.float16, device_of("triton"), "triton")
    assert max(parts) == (8 if part_bytes == 32 else 1)


@pytest.mark.parametrize(("channels", "tile"), [(96, "WIDE_SHALLOW"), (192, "BROAD_SHALLOW")])
def test_the_largest_tiles_that_scale_give_the_same(tiles, channels, tile):
    tiles(90, few=False)
    assert matmul_config(channels, 4 * channels, 16, Kind.SCALED, 0, 90) == getattr(matmul_configs, tile)
    assert_parity(with_grn(channels), torch.float16, device_of("triton"), "triton")
