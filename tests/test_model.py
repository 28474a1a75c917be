import copy
import pickle

import pytest
import torch
from support import randomise, relative_error

from convnext_kernels import use_backend
from convnext_kernels.model import ConvNeXt, create_model, list_models
from convnext_kernels.reference import create_reference_model
from convnext_kernels.variants import VARIANTS

SMALL = {
    "v1": ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (24, 32, 40, 48)}),
    "v2": ("convnextv2_atto", {"depths": (1, 1, 2, 1), "dims": (24, 32, 40, 48)}),
    "isotropic": ("convnext_isotropic_small", {"depths": (2,), "dims": (48,)}),
    "isotropic_with_scale": ("convnext_isotropic_large", {"depths": (2,), "dims": (48,)}),
    "eps_1e-5": ("convnext_xxlarge", {"depths": (1, 1, 2, 1), "dims": (24, 32, 40, 48)}),
}


def make_pair(kind="v1", dtype=torch.float32, **options):
    name, sizes = SMALL[kind]
    reference = create_reference_model(name, **(sizes | options)).to(dtype)
    randomise(reference)
    model = create_model(name, **(sizes | options)).to(dtype)
    model.load_state_dict(reference.state_dict())
    return model, reference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", SMALL)
def test_logits_and_gradients_are_those_of_the_reference(kind, dtype, tolerance):
    model, reference = make_pair(kind, dtype, num_classes=11)
    input = torch.randn(2, 3, 64, 96, dtype=dtype)
    outputs = {}
    for network in (model, reference):
        image = input.clone().requires_grad_()
        logits = network(image)
        logits.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        outputs[network] = {"logits": logits, "image": image.grad} | gradients
    assert outputs[model]["logits"].shape == (2, 11)
    errors = {name: relative_error(outputs[model][name], value) for name, value in outputs[reference].items()}
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("kind", ["v1", "v2", "isotropic"])
def test_bfloat16_is_as_exact_as_pytorch(kind):
    model, reference = make_pair(kind, torch.bfloat16)
    input = torch.randn(4, 3, 64, 64).bfloat16()
    exact = copy.deepcopy(reference).double()(input.double())
    limit = 1.5 * relative_error(reference(input), exact) + torch.finfo(torch.bfloat16).eps
    assert relative_error(model(input), exact) <= limit


def test_contiguous_and_channels_last_inputs_give_the_same():
    model, _ = make_pair()
    input = torch.randn(2, 3, 64, 64)
    assert relative_error(model(input.contiguous(memory_format=torch.channels_last)), model(input)) < 1e-6


def test_stochastic_depth_draws_the_reference_masks():
    model, reference = make_pair("v2", drop_path_rate=0.6)
    input = torch.randn(8, 3, 64, 64)
    logits = []
    for network in (model, reference):
        torch.manual_seed(4)
        logits.append(network(input))
    assert relative_error(*logits) < 1e-5
    assert relative_error(model.eval()(input), logits[1]) > 1e-2


def test_forward_features_are_pooled_and_normalised():
    model, reference = make_pair()
    input = torch.randn(2, 3, 64, 64)
    features = model.forward_features(input)
    assert features.shape == (2, 48)
    assert relative_error(model.head(features), reference(input)) < 1e-5


def test_no_classes_gives_features():
    model, reference = make_pair(num_classes=0)
    input = torch.randn(2, 3, 64, 64)
    assert not any(key.startswith("head") for key in model.state_dict())
    assert relative_error(model(input), reference.forward_features(input)) < 1e-5


@pytest.mark.parametrize("size", [(64, 64), (75, 101), (33, 63)])
@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_feature_maps_of_any_size(kind, size):
    model, reference = make_pair(kind, out_indices=(0, 1, 2, 3))
    input = torch.randn(1, 3, *size)
    maps, expected = model(input), reference(input)
    shapes = [
        (1, dim, size[0] // stride, size[1] // stride) for dim, stride in zip(model.dims, (4, 8, 16, 32), strict=True)
    ]
    assert [tuple(feature_map.shape) for feature_map in maps] == shapes
    for ours, theirs in zip(maps, expected, strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(ours, theirs) < 1e-5
    normalised = (maps[1] - model.norm1.bias.view(-1, 1, 1)) / model.norm1.weight.view(-1, 1, 1)
    assert normalised.mean(1).abs().max() < 1e-4


def test_some_feature_maps():
    model, reference = make_pair(out_indices=(1, 2))
    input = torch.randn(1, 3, 16, 40)
    assert [key for key in model.state_dict() if key.startswith(("norm", "head"))] == [
        "norm1.weight",
        "norm1.bias",
        "norm2.weight",
        "norm2.bias",
    ]
    maps = model(input)
    assert len(maps) == 2
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(maps, reference(input), strict=True))
    assert all(a.equal(b) for a, b in zip(maps, model.forward_features(input), strict=True))


def test_isotropic_feature_map():
    model, reference = make_pair("isotropic", out_indices=(0,))
    input = torch.randn(1, 3, 50, 35)
    (ours,), (theirs,) = model(input), reference(input)
    assert ours.shape == (1, 48, 3, 2)
    assert relative_error(ours, theirs) < 1e-5


def test_other_input_channels():
    model, reference = make_pair(in_chans=5)
    input = torch.randn(1, 5, 64, 64)
    assert relative_error(model(input), reference(input)) < 1e-5


@pytest.mark.parametrize("kind", ["v1", "v2", "isotropic"])
def test_empty_batch_gives_an_empty_result_and_zero_gradients(kind):
    model, _ = make_pair(kind, num_classes=11)
    logits = model(torch.empty(0, 3, 64, 64))
    assert logits.shape == (0, 11)
    logits.sum().backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["v1", "v2", "isotropic"])
def test_nan_stays_in_its_image(kind):
    model, _ = make_pair(kind)
    input = torch.randn(2, 3, 64, 64)
    input[1, 0, 5, 5] = float("nan")
    logits = model(input)
    assert logits[1].isnan().all()
    assert not logits[0].isnan().any()


def test_copies_and_pickles_compute_the_same():
    model, _ = make_pair("v2")
    input = torch.randn(1, 3, 64, 64)
    expected = model(input)
    fresh = create_model("convnextv2_atto", **SMALL["v2"][1])
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert other(input).equal(expected)


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_compiled_model_gives_the_same_values(kind):
    torch.compiler.reset()
    model, _ = make_pair(kind)
    input = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for network in (model, compiled):
        model.zero_grad()
        logits = network(input)
        logits.square().sum().backward()
        results.append([logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(*results, strict=True))


def test_exported_model_gives_the_same_values_for_any_batch_and_size():
    model, _ = make_pair()
    dynamic = {0: torch.export.Dim("batch", min=1), 2: torch.export.Dim("rows", min=64), 3: torch.export.Dim.AUTO}
    program = torch.export.export(model.eval(), (torch.randn(2, 3, 64, 96),), dynamic_shapes=(dynamic,))
    for shape in ((2, 3, 64, 96), (3, 3, 75, 101)):
        input = torch.randn(shape)
        assert relative_error(program.module()(input), model(input)) < 1e-6


def test_exported_backbone():
    model, _ = make_pair(out_indices=(0, 3))
    input = torch.randn(1, 3, 75, 101)
    maps = torch.export.export(model.eval(), (input,)).module()(input)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(maps, model(input), strict=True))


def test_context_chooses_the_backend_of_the_whole_model():
    model, _ = make_pair()
    with use_backend("cuda"), pytest.raises(RuntimeError, match=r"patch_linear.*'cuda' cannot run"):
        model(torch.randn(1, 3, 64, 64))


def test_names():
    assert list_models() == list(VARIANTS)
    assert {"convnext_tiny", "convnextv2_nano", "convnext_isotropic_small", "convnext_xxlarge"} < set(list_models())


def test_unknown_name_lists_the_close_ones():
    with pytest.raises(ValueError, match=r"^name: got 'convnext_tyny'; accepted: .*convnext_tiny"):
        create_model("convnext_tyny")
    with pytest.raises(ValueError, match="list_models"):
        create_model("vit")


def test_drop_path_rate_and_overrides_reach_the_blocks():
    model = create_model("convnext_atto", drop_path_rate=0.2, depths=(1, 1, 1, 1), layer_scale_init_value=1.0)
    assert model.stages[3][0].drop_path == pytest.approx(0.2)
    assert (model.stages[0][0].gamma == 1).all()
    assert model.stages[0][0].norm.eps == 1e-6
    with pytest.raises(TypeError, match="depth"):
        create_model("convnext_atto", depth=3)


@pytest.mark.parametrize(
    ("input", "error", "words"),
    [
        (torch.randn(1, 4, 64, 64), ValueError, "input: got 4 channels; accepted: in_chans = 3"),
        (torch.randn(1, 3, 31, 64), ValueError, "H and W of at least 32"),
        (torch.randn(3, 64, 64), ValueError, "input: got 3 dimensions"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "input: got dtype torch.uint8"),
        (torch.randn(1, 3, 64, 64, dtype=torch.float64), TypeError, "got dtype torch.float32"),
        ("image.jpg", TypeError, "input: got str"),
    ],
    ids=["channels", "size", "rank", "integers", "mixed", "text"],
)
def test_bad_inputs_are_named(input, error, words):
    model = ConvNeXt((1, 1, 1, 1), (8, 8, 8, 8))
    with pytest.raises(error, match=words):
        model(input)
