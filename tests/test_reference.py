import math

import pytest
import torch
from support import randomise, relative_error
from torch import Tensor, nn

from convnext_kernels.reference import ReferenceBlock, ReferenceConvNeXt, create_reference_model, drop_path_factor
from convnext_kernels.variants import VARIANTS

PUBLISHED_MILLIONS = {
    "convnext_atto": 3.70,
    "convnext_femto": 5.22,
    "convnext_pico": 9.05,
    "convnext_nano": 15.59,
    "convnext_tiny": 28.59,
    "convnext_small": 50.22,
    "convnext_base": 88.59,
    "convnext_large": 197.77,
    "convnext_xlarge": 350.2,
    "convnext_xxlarge": 846.5,
    "convnextv2_atto": 3.71,
    "convnextv2_femto": 5.23,
    "convnextv2_pico": 9.07,
    "convnextv2_nano": 15.62,
    "convnextv2_tiny": 28.64,
    "convnextv2_base": 88.72,
    "convnextv2_large": 197.96,
    "convnextv2_huge": 660.3,
    "convnext_isotropic_small": 22,
    "convnext_isotropic_base": 87,
    "convnext_isotropic_large": 306,
}


def direct_block(block: ReferenceBlock, input: Tensor) -> Tensor:
    """The paper's formula, term by term: a sum of shifted images, moments, erf, products of indices."""
    size, dilation = block.dwconv.kernel_size[0], block.dwconv.dilation[0]
    reach = dilation * (size // 2)
    height, width = input.shape[2:]
    padded = nn.functional.pad(input, (reach, reach, reach, reach))
    u = torch.zeros_like(input)
    for i in range(size):
        for j in range(size):
            rows = slice(i * dilation, i * dilation + height)
            columns = slice(j * dilation, j * dilation + width)
            u += block.dwconv.weight[:, 0, i, j].view(-1, 1, 1) * padded[:, :, rows, columns]
    u = u + block.dwconv.bias.view(-1, 1, 1)
    mean = u.mean(1, keepdim=True)
    variance = ((u - mean) ** 2).mean(1, keepdim=True)
    u = (u - mean) / (variance + block.norm.eps).sqrt()
    u = u * block.norm.weight.view(-1, 1, 1) + block.norm.bias.view(-1, 1, 1)
    h = torch.einsum("nchw,dc->ndhw", u, block.pwconv1.weight) + block.pwconv1.bias.view(-1, 1, 1)
    h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    if block.grn is not None:
        norms = (h**2).sum((2, 3), keepdim=True).sqrt()
        relative = norms / (norms.mean(1, keepdim=True) + 1e-6)
        h = block.grn.gamma.view(-1, 1, 1) * h * relative + block.grn.beta.view(-1, 1, 1) + h
    out = torch.einsum("nchw,dc->ndhw", h, block.pwconv2.weight) + block.pwconv2.bias.view(-1, 1, 1)
    return input + (out if block.gamma is None else block.gamma.view(-1, 1, 1) * out)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        model = create_reference_model(name)
    published = PUBLISHED_MILLIONS[name]
    digits = len(str(published).partition(".")[2])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, digits) == published


def test_every_variant_has_a_published_count():
    assert set(PUBLISHED_MILLIONS) == set(VARIANTS)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_grn": True, "layer_scale_init_value": None}, {"kernel_size": 3, "dilation": 2}],
    ids=["v1", "v2", "dilated"],
)
def test_block_is_the_formula_of_the_paper(options):
    block = ReferenceBlock(10, **options).double()
    randomise(block)
    input = torch.randn(2, 10, 6, 9, dtype=torch.float64)
    assert relative_error(block(input), direct_block(block, input)) < 1e-13


def test_official_names_and_shapes_of_v1():
    model = ReferenceConvNeXt((1, 1, 1, 1), (8, 16, 24, 32), num_classes=5)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes["downsample_layers.0.0.weight"] == (8, 3, 4, 4)
    assert shapes["downsample_layers.0.1.weight"] == (8,)
    assert shapes["downsample_layers.2.0.bias"] == (16,)
    assert shapes["downsample_layers.2.1.weight"] == (24, 16, 2, 2)
    block = {key.removeprefix("stages.3.0."): shape for key, shape in shapes.items() if key.startswith("stages.3.0.")}
    assert block == {
        "gamma": (32,),
        "dwconv.weight": (32, 1, 7, 7),
        "dwconv.bias": (32,),
        "norm.weight": (32,),
        "norm.bias": (32,),
        "pwconv1.weight": (128, 32),
        "pwconv1.bias": (128,),
        "pwconv2.weight": (32, 128),
        "pwconv2.bias": (32,),
    }
    assert (shapes["norm.weight"], shapes["head.weight"], shapes["head.bias"]) == ((32,), (5, 32), (5,))
    assert len(shapes) == 4 + 3 * 4 + 4 * 9 + 4


def test_official_names_and_shapes_of_v2_and_isotropic():
    v2 = ReferenceBlock(8, use_grn=True, layer_scale_init_value=None).state_dict()
    assert v2["grn.gamma"].shape == v2["grn.beta"].shape == (1, 1, 1, 32)
    assert "gamma" not in v2
    isotropic = create_reference_model("convnext_isotropic_small", depths=(2,), dims=(8,)).state_dict()
    assert isotropic["stem.weight"].shape == (8, 3, 16, 16)
    assert {key.split(".")[0] for key in isotropic} == {"stem", "blocks", "norm", "head"}
    assert "blocks.1.pwconv2.bias" in isotropic
    assert "blocks.0.gamma" not in isotropic


def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    model = ReferenceConvNeXt((1, 1, 1, 1), (8, 16, 24, 64))
    weight = model.stages[3][0].pwconv1.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.stages[3][0].pwconv1.bias.abs().max() == 0
    assert (model.stages[0][0].gamma == 1e-6).all()
    assert ReferenceBlock(8, use_grn=True).grn.gamma.abs().max() == 0


def test_stochastic_depth_rises_linearly_from_zero():
    model = ReferenceConvNeXt((1, 2, 1, 1), (8, 8, 8, 8), drop_path_rate=0.4)
    rates = [block.drop_path for stage in model.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_drop_path_factor_is_zero_or_the_inverse_keep_probability():
    torch.manual_seed(0)
    factor = drop_path_factor(torch.empty(20000, 1, 1, 1), 0.25)
    assert factor.shape == (20000,)
    assert set(factor.tolist()) == {0.0, torch.tensor(1.0).div(0.75).item()}
    assert (factor == 0).double().mean().item() == pytest.approx(0.25, abs=0.015)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_drop_path_factor_is_the_same_in_every_dtype(dtype):
    factors = []
    for input in (torch.empty(64, 1, 1, 1), torch.empty(64, 1, 1, 1, dtype=dtype)):
        torch.manual_seed(3)
        factors.append(drop_path_factor(input, 0.5))
    assert factors[0].equal(factors[1])


def test_dropped_samples_pass_unchanged_and_kept_ones_are_scaled():
    block = ReferenceBlock(8, drop_path=0.5).double()
    randomise(block)
    input = torch.randn(16, 8, 5, 5, dtype=torch.float64)
    torch.manual_seed(1)
    factor = drop_path_factor(input, 0.5)
    torch.manual_seed(1)
    output = block(input)
    branch = block.eval()(input) - input
    assert 0 < (factor == 0).sum() < 16
    assert relative_error(output, input + factor.view(-1, 1, 1, 1) * branch) < 1e-14


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"depths": (1, 0, 1, 1)}, "depths"),
        ({"depths": ()}, "depths"),
        ({"depths": (1, 1), "dims": (8, 8), "isotropic": True}, "depths"),
        ({"dims": (8, 8)}, "dims"),
        ({"dims": (8, 8, 8, 0)}, "dim"),
        ({"in_chans": 0}, "in_chans"),
        ({"num_classes": -1}, "num_classes"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"drop_path_rate": -0.1}, "drop_path_rate"),
        ({"eps": 0.0}, "eps"),
        ({"out_indices": ()}, "out_indices"),
        ({"out_indices": 3}, "out_indices"),
        ({"out_indices": (0, 4)}, "out_indices"),
        ({"out_indices": (-1,)}, "out_indices"),
        ({"out_indices": (2, 1)}, "out_indices"),
        ({"out_indices": (1, 1)}, "out_indices"),
    ],
)
def test_bad_arguments_of_the_network_are_named(options, name):
    arguments = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)} | options
    with pytest.raises(ValueError, match=rf"^{name}: got .*; accepted: "):
        ReferenceConvNeXt(**arguments)
