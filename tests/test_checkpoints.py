import argparse
import copy
import warnings

import pytest
import torch
from safetensors.torch import save_file
from support import assert_same, randomise, relative_error
from torch import nn
from torch.optim.swa_utils import AveragedModel

from convnext_kernels.checkpoints import load_checkpoint
from convnext_kernels.model import ConvNeXt, create_model
from convnext_kernels.reference import ReferenceConvNeXt

DEPTHS, DIMS, CLASSES = (1, 2, 1, 1), (16, 24, 32, 40), 7
SIZES = {"depths": DEPTHS, "dims": DIMS, "num_classes": CLASSES}
V2 = {"use_grn": True, "layer_scale_init_value": None}
ISOTROPIC = {"depths": (2,), "dims": (24,), "isotropic": True}


def official(**options):
    model = ReferenceConvNeXt(**(SIZES | options))
    randomise(model, seed=1)
    return model.eval()


def timm_model(**options):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    sizes = {"depths": DEPTHS, "dims": DIMS, "num_classes": CLASSES}
    model = timm.models.convnext.ConvNeXt(**(sizes | options))
    randomise(model, seed=1)
    return model.eval()


def torchvision_model():
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    convnext = torchvision.models.convnext
    outputs = [*DIMS[1:], None]
    settings = [convnext.CNBlockConfig(*sizes) for sizes in zip(DIMS, outputs, DEPTHS, strict=True)]
    model = convnext.ConvNeXt(settings, num_classes=CLASSES)
    randomise(model, seed=1)
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):
            parameter.data.copy_(1 + 0.2 * torch.randn(parameter.shape))
    return model.eval()


def transformers_model(version):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"depths": list(DEPTHS), "hidden_sizes": list(DIMS), "num_labels": CLASSES, "layer_norm_eps": 1e-6}
    if version == "v1":
        model = transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**sizes))
    else:
        model = transformers.ConvNextV2ForImageClassification(transformers.ConvNextV2Config(**sizes))
    randomise(model, seed=1)
    return model.eval()


HOSTS = {
    "official": (official, {}),
    "official_v2": (lambda: official(**V2), V2),
    "official_isotropic": (lambda: official(**ISOTROPIC, layer_scale_init_value=None), ISOTROPIC | {"scale": None}),
    "official_isotropic_with_scale": (lambda: official(**ISOTROPIC), ISOTROPIC),
    "timm": (timm_model, {}),
    "timm_1x1_convolutions": (lambda: timm_model(conv_mlp=True), {}),
    "timm_v2": (lambda: timm_model(use_grn=True, ls_init_value=None), V2),
    "timm_v2_1x1_convolutions": (lambda: timm_model(use_grn=True, ls_init_value=None, conv_mlp=True), V2),
    "timm_eps": (lambda: timm_model(norm_eps=1e-2), {"eps": 1e-2}),
    "torchvision": (torchvision_model, {}),
    "transformers": (lambda: transformers_model("v1"), {}),
    "transformers_v2": (lambda: transformers_model("v2"), V2),
}


@pytest.mark.parametrize("host", HOSTS)
def test_logits_are_those_of_the_host_library(host):
    build, options = HOSTS[host]
    theirs = build()
    options = dict(options)
    if "scale" in options:
        options["layer_scale_init_value"] = options.pop("scale")
    ours = ConvNeXt(**(SIZES | options)).eval()
    report = load_checkpoint(ours, theirs.state_dict())
    assert report.format == host.split("_")[0]
    assert report.loaded == len(ours.state_dict()) == len(theirs.state_dict())
    assert (report.ignored, report.missing, report.unexpected) == ((), (), ())
    input = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = theirs(input)
        logits = ours(input)
    assert relative_error(logits, getattr(expected, "logits", expected)) < 1e-5


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_femto"])
def test_published_variant_of_timm(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    theirs = timm.create_model(name).eval()
    randomise(theirs)
    ours = create_model(name, checkpoint=theirs.state_dict()).eval()
    input = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(ours(input), theirs(input)) < 1e-5


def test_backbone_of_transformers_brings_its_norms():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ConvNextConfig(
        depths=list(DEPTHS), hidden_sizes=list(DIMS), out_features=["stage2", "stage4"]
    )
    theirs = transformers.ConvNextBackbone(config).eval()
    randomise(theirs)
    ours = ConvNeXt(DEPTHS, DIMS, out_indices=(1, 3)).eval()
    report = load_checkpoint(ours, theirs.state_dict())
    assert report.missing == ()
    input = torch.randn(1, 3, 75, 101)
    with torch.no_grad():
        maps = zip(ours(input), theirs(input).feature_maps, strict=True)
        assert all(relative_error(a, b) < 1e-5 for a, b in maps)


def arrange_file(kind, path, weights):
    if kind == "safetensors":
        save_file(weights, path)
    elif kind == "data_parallel":
        torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, path)
    elif kind == "training":
        torch.save({"model": weights, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}, path)
    else:
        torch.save({"model": weights} if kind == "model" else weights, path)
    return path


@pytest.mark.parametrize("kind", ["bare", "model", "training", "data_parallel", "safetensors"])
def test_files(kind, tmp_path):
    theirs = official()
    suffix = "safetensors" if kind == "safetensors" else "pth"
    path = arrange_file(kind, tmp_path / f"weights.{suffix}", theirs.state_dict())
    for place in (path, str(path)):
        ours = ConvNeXt(**SIZES)
        assert load_checkpoint(ours, place).format == "official"
        assert all(value.equal(theirs.state_dict()[key]) for key, value in ours.state_dict().items())


def test_create_model_reads_a_checkpoint(tmp_path):
    theirs = official()
    path = arrange_file("model", tmp_path / "weights.pth", theirs.state_dict())
    ours = create_model("convnext_tiny", checkpoint=path, **SIZES)
    input = torch.randn(1, 3, 64, 64)
    assert relative_error(ours(input), theirs(input)) < 1e-5


def with_compiled_stages(model):
    for index, stage in enumerate(model.stages):
        model.stages[index] = torch.compile(stage)
    return model


AS_SAVED = {
    "compiled": lambda model: torch.compile(model).state_dict(),
    "compiled_stages": lambda model: with_compiled_stages(copy.deepcopy(model)).state_dict(),
    "averaged": lambda model: AveragedModel(torch.compile(model)).state_dict(),
    "data_parallel": lambda model: nn.DataParallel(torch.compile(model)).state_dict(),
}


@pytest.mark.parametrize("kind", AS_SAVED)
def test_names_of_wrapped_models(kind):
    theirs = official()
    ours = ConvNeXt(**SIZES)
    assert load_checkpoint(ours, AS_SAVED[kind](theirs)).unexpected == ()
    assert_same(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("wrapper", ["model_ema", "state_dict_ema"])
def test_averages_are_taken_where_there_is_nothing_else(wrapper):
    theirs, average = official(), official()
    randomise(average, seed=2)
    ours = ConvNeXt(**SIZES)
    load_checkpoint(ours, {wrapper: average.state_dict(), "epoch": 3})
    assert_same(ours.state_dict(), average.state_dict())
    load_checkpoint(ours, {wrapper: average.state_dict(), "state_dict": theirs.state_dict()})
    assert_same(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_broken_file_is_named(suffix, damage, tmp_path):
    path = tmp_path / f"broken.{suffix}"
    arrange_file("safetensors" if suffix == "safetensors" else "bare", path, official().state_dict())
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"not a checkpoint"}[damage])
    with pytest.raises(ValueError, match=r"checkpoint: .*broken\..* is truncated, corrupt"):
        load_checkpoint(ConvNeXt(**SIZES), path)


def test_code_in_a_file_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    path = tmp_path / "payload.pth"
    torch.save({"model": Payload()}, path)
    with pytest.raises(ValueError, match=r"payload\.pth"):
        load_checkpoint(ConvNeXt(**SIZES), path)


def test_other_content_is_refused(tmp_path):
    path = tmp_path / "list.pth"
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds list; accepted: a dictionary"):
        load_checkpoint(ConvNeXt(**SIZES), path)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_checkpoint(ConvNeXt(**SIZES), tmp_path / "absent.pth")
    with pytest.raises(TypeError, match=r"checkpoint: got ConvNeXt; accepted: a path or a dictionary"):
        load_checkpoint(ConvNeXt(**SIZES), ConvNeXt(**SIZES))
    with pytest.raises(ValueError, match=r"conv1\.weight.*official, timm, torchvision, transformers"):
        load_checkpoint(ConvNeXt(**SIZES), {"conv1.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="no keys"):
        load_checkpoint(ConvNeXt(**SIZES), {})
    with pytest.raises(ValueError, match="got int under 'epoch'"):
        load_checkpoint(ConvNeXt(**SIZES), official().state_dict() | {"epoch": 3})


def assert_refused(model, weights, *words, **options):
    """The error names every word, and the model stays as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="checkpoint: its parameters") as caught:
        load_checkpoint(model, weights, **options)
    for word in words:
        assert word in str(caught.value)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_every_missing_unexpected_and_misshapen_key_is_named():
    weights = official().state_dict()
    del weights["stages.1.1.gamma"], weights["norm.bias"]
    weights["stages.0.0.dwconv.weight"] = torch.ones(16, 1, 5, 5)
    weights |= {"stages.1.2.gamma": torch.ones(24), "extra": torch.ones(1)}
    assert_refused(
        ConvNeXt(**SIZES),
        weights,
        "missing: stages.1.1.gamma, norm.bias",
        "unexpected: stages.1.2.gamma, extra",
        "misshapen: stages.0.0.dwconv.weight (got [16, 1, 5, 5], expected [16, 1, 7, 7])",
        "official",
    )


@pytest.mark.parametrize("layout", [(64, 16, 1), (16, 64, 1, 1), (64 * 16,)])
def test_only_dimensions_of_one_are_forgiven(layout):
    weights = official().state_dict()
    weights["stages.0.0.pwconv1.weight"] = weights["stages.0.0.pwconv1.weight"].reshape(layout)
    if layout == (64, 16, 1):
        load_checkpoint(ConvNeXt(**SIZES), weights)
    else:
        assert_refused(ConvNeXt(**SIZES), weights, f"(got {list(layout)}, expected [64, 16])")


def test_a_checkpoint_of_another_model_is_refused():
    assert_refused(ConvNeXt(**SIZES, **V2), official().state_dict(), "grn.gamma", "unexpected", "gamma")
    assert_refused(ConvNeXt(**SIZES), official(depths=(1, 2, 2, 1)).state_dict(), "stages.2.1.dwconv.weight")
    assert_refused(ConvNeXt(**SIZES), official(**ISOTROPIC).state_dict(), "unexpected: stem.weight")


def test_without_strict_keys_are_reported_and_shapes_still_checked():
    weights = official().state_dict()
    weights["extra"] = weights.pop("norm.bias")
    report = load_checkpoint(ConvNeXt(**SIZES), weights, strict=False)
    assert (report.missing, report.unexpected) == (("norm.bias",), ("extra",))
    assert "missing: norm.bias" in str(report)
    weights["norm.weight"] = torch.ones(3)
    assert_refused(ConvNeXt(**SIZES), weights, "norm.weight (got [3], expected [40])", strict=False)


def test_another_number_of_classes():
    theirs = official()
    ours = ConvNeXt(**(SIZES | {"num_classes": 5}))
    head = ours.head.weight.clone()
    assert_refused(ours, theirs.state_dict(), "head.weight (got [7, 40], expected [5, 40])", "ignore_head=True")
    report = load_checkpoint(ours, theirs.state_dict(), ignore_head=True)
    assert report.ignored == report.missing == ("head.weight", "head.bias")
    assert ours.head.weight.equal(head)
    input = torch.randn(1, 3, 64, 64)
    assert relative_error(ours.forward_features(input), theirs.forward_features(input)) < 1e-5


@pytest.mark.parametrize("classes", [CLASSES, 0], ids=["other classes", "no classifier"])
def test_create_model_ignores_the_classifier_where_told(classes):
    weights = official(num_classes=classes).state_dict()
    options = {"name": "convnext_tiny", "depths": DEPTHS, "dims": DIMS, "num_classes": 5, "checkpoint": weights}
    with pytest.raises(ValueError, match=r"head\.weight.*; ignore_head=True leaves the model's classifier"):
        create_model(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is missing that was not left out on request
        model = create_model(**options, ignore_head=True)
    assert model.head.weight.shape == (5, 40)
    assert model.norm.weight.equal(weights["norm.weight"])


def test_a_model_without_classes_ignores_the_classifier():
    ours = ConvNeXt(**(SIZES | {"num_classes": 0}))
    report = load_checkpoint(ours, official().state_dict())
    assert report.ignored == ("head.weight", "head.bias")
    assert report.missing == ()


def test_a_backbone_ignores_the_head_and_says_that_its_norms_are_missing():
    theirs = official()
    ours = ConvNeXt(DEPTHS, DIMS, out_indices=(0, 3))
    report = load_checkpoint(ours, theirs.state_dict())
    assert set(report.ignored) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert set(report.missing) == {"norm0.weight", "norm0.bias", "norm3.weight", "norm3.bias"}
    assert ours.stages[2][0].gamma.equal(theirs.stages[2][0].gamma)
    with pytest.warns(UserWarning, match=r"missing: norm0\.weight"):
        create_model("convnext_tiny", checkpoint=theirs.state_dict(), depths=DEPTHS, dims=DIMS, out_indices=(0, 3))


def test_a_backbone_keeps_the_norms_of_a_backbone():
    theirs = official(out_indices=(0, 1, 2, 3))
    for options in ({}, {"ignore_head": True}):
        ours = ConvNeXt(DEPTHS, DIMS, out_indices=(1, 2))
        report = load_checkpoint(ours, theirs.state_dict(), **options)
        assert ours.norm2.weight.equal(theirs.norm2.weight)
        assert set(report.ignored) == {"norm0.weight", "norm0.bias", "norm3.weight", "norm3.bias"}
        assert report.missing == ()


def test_a_classifier_does_not_take_a_backbone():
    weights = official(out_indices=(0, 3)).state_dict()
    assert_refused(ConvNeXt(**SIZES), weights, "missing: norm.weight, norm.bias, head.weight, head.bias")


def test_16_bit_weights_are_read_into_float32():
    theirs = official().half()
    ours = ConvNeXt(**SIZES)
    load_checkpoint(ours, theirs.state_dict())
    assert ours.head.weight.dtype == torch.float32
    assert ours.head.weight.equal(theirs.head.weight.float())
