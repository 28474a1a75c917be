import copy
import pickle

import pytest
import timm
import torch
import torchvision
import transformers
from support import assert_same, randomise, relative_error
from torch import nn

from convnext_kernels import ConvNeXt, ConvNeXtBlock, accelerate, fold_, restore
from convnext_kernels.parity import errors

OPTIONS = {
    "v1": {},
    "v2": {"use_grn": True, "layer_scale_init_value": None},
    "grn and scale, 5x5, dilated, tanh": {"use_grn": True, "kernel_size": 5, "dilation": 2, "activation": "gelu_tanh"},
}
FOLDED = ("norm.weight", "norm.bias", "gamma")


def make_block(dtype=torch.float32, **options):
    block = ConvNeXtBlock(16, **options)
    randomise(block)
    return block.to(dtype).eval()


def in_float64(module, input):
    with torch.no_grad():
        return copy.deepcopy(module).double()(input.double())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_folded_block_computes_the_same(options):
    block, input = make_block(torch.float64, **options), torch.randn(2, 16, 9, 7, dtype=torch.float64)
    expected, names = block(input), set(block.state_dict())
    report = fold_(block)
    assert relative_error(block(input), expected) < 1e-13
    assert names - set(block.state_dict()) == names & set(FOLDED)
    assert report.before[""] == 0 and 0 < report.after[""] < 1e-13


def test_weights_are_those_of_the_formula():
    block = make_block()
    was = {name: value.double() for name, value in copy.deepcopy(block).state_dict().items()}
    parameters = dict(block.named_parameters())
    fold_(block)
    expected = {
        "pwconv1.weight": was["pwconv1.weight"] @ was["norm.weight"].diag(),
        "pwconv1.bias": was["pwconv1.bias"] + was["pwconv1.weight"] @ was["norm.bias"],
        "pwconv2.weight": was["gamma"].diag() @ was["pwconv2.weight"],
        "pwconv2.bias": was["gamma"] * was["pwconv2.bias"],
        "dwconv.weight": was["dwconv.weight"],
        "dwconv.bias": was["dwconv.bias"],
    }
    for name, value in expected.items():  # rounded once, in the same parameters
        torch.testing.assert_close(block.state_dict()[name], value.float(), rtol=1.2e-7, atol=1e-9)
        assert dict(block.named_parameters())[name] is parameters[name]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_report_tells_the_error_of_the_branch(dtype):
    model = nn.Sequential(make_block(dtype), make_block(dtype, use_grn=True)).eval()
    report = fold_(model)
    unit = torch.finfo(dtype).eps
    for name in ("0", "1"):
        assert unit / 20 < report.before[name] < 2 * unit and unit / 20 < report.after[name] < 2 * unit
    worst = max(report.after, key=report.after.get)
    assert report.worst == worst
    assert str(report).startswith("2 blocks folded") and f"worst: {worst}: {report.before[worst]:.1e}" in str(report)


def test_the_report_shows_a_layer_scale_that_float16_cannot_hold():
    block = make_block(torch.float16)
    with torch.no_grad():
        block.gamma.fill_(1e-6)
    report = fold_(block)
    assert report.before[""] < 2 * torch.finfo(torch.float16).eps and report.after[""] > 0.01


def test_errors_are_measured_against_the_block_as_it_was():
    block, input = make_block(torch.bfloat16), torch.randn(2, 16, 14, 14, generator=torch.Generator().manual_seed(0))
    truth = in_float64(block, input.bfloat16()) - input.bfloat16()
    report = fold_(block)
    folded = in_float64(block, input.bfloat16()) - input.bfloat16()
    rounding_of_weights = ((folded - truth).norm() / truth.norm()).item()
    assert rounding_of_weights < report.after[""] < 3 * rounding_of_weights


def test_a_model_of_ours_computes_the_same():
    model = ConvNeXt((1, 1), (8, 16), num_classes=5, layer_scale_init_value=1.0)
    randomise(model)
    images, plain = torch.randn(2, 3, 32, 32), copy.deepcopy(model.eval())
    report = fold_(model)
    assert list(report.after) == ["stages.0.0", "stages.1.0"] and max(report.after.values()) < 1e-6
    exact, unit = in_float64(plain, images), torch.finfo(torch.float32).eps
    for ours, theirs in zip(errors(model(images), exact), errors(plain(images), exact), strict=True):
        assert ours <= 1.5 * theirs + unit
    with torch.no_grad():
        torch._dynamo.reset()
        assert relative_error(torch.compile(model, fullgraph=True, backend="aot_eager")(images), model(images)) < 1e-6
        assert relative_error(torch.export.export(model, (images,)).module()(images), model(images)) < 1e-6


def timm_model(**options):
    options = {"depths": (1, 1, 1, 1), "dims": (8, 16, 8, 8), "num_classes": 5, "ls_init_value": 1.0, **options}
    return timm.models.ConvNeXt(**options)


def torchvision_model():
    from torchvision.models.convnext import CNBlockConfig

    setting = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
    return torchvision.models.ConvNeXt(setting, layer_scale=1.0, num_classes=5)


def transformers_model():
    config = transformers.ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=5)
    return transformers.ConvNextV2ForImageClassification(config)


HOSTS = {
    "timm": timm_model,
    "timm 1x1": lambda: timm_model(conv_mlp=True, use_grn=True),
    "torchvision": torchvision_model,
    "transformers": transformers_model,
}


def accelerated(model):
    randomise(model)
    accelerate(model.eval())
    return model


def logits(model, images):
    output = model(images)
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("host", HOSTS)
def test_an_accelerated_model_computes_the_same(host):
    model, images = accelerated(HOSTS[host]()), torch.randn(2, 3, 32, 32)
    expected = logits(model, images)
    report = fold_(model)
    assert report.after and max(report.after.values()) < 1e-6
    assert relative_error(logits(model, images), expected) < 1e-5
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in copies:
        assert torch.equal(logits(other, images), logits(model, images))
        with pytest.raises(RuntimeError, match="has been folded by fold_"):
            restore(other)


def test_a_folded_block_is_not_restored_and_nothing_else_is():
    model = accelerated(timm_model())
    fold_(model)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match=r"restore: `stages\.0\.blocks\.0` has been folded"):
        restore(model)
    assert [type(module) for module in model.modules()] == classes


def test_a_folded_block_does_not_run_its_host_s_forward():
    model = accelerated(timm_model())
    fold_(model)
    model.stages[0].blocks[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"a folded ConvNeXtBlock cannot run its host's forward.*hooks sit on"):
        model(torch.randn(1, 3, 32, 32))


def test_folding_again_changes_nothing():
    block = make_block()
    fold_(block)
    state = copy.deepcopy(block.state_dict())
    report = fold_(block)
    assert report.after == {} and report.worst is None and str(report).startswith("0 blocks folded")
    assert_same(block.state_dict(), state)


def test_checkpoints_do_not_load_past_folding():
    plain = make_block()
    folded = copy.deepcopy(plain)
    fold_(folded)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*gamma.*norm\.weight"):
        folded.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*gamma.*norm\.weight"):
        plain.load_state_dict(folded.state_dict())


def refused(model, match):
    """Nothing is changed."""
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        fold_(model)
    assert_same(model.state_dict(), state)


def test_training_mode_is_refused_by_the_module_s_name():
    model = nn.Sequential(make_block(), make_block()).eval()
    model[1].norm.train()
    refused(model, r"model: `1\.norm` is in training mode; accepted")
    refused(make_block().train(), "model: `model` is in training mode")


def test_a_model_without_blocks_is_refused():
    refused(nn.Linear(2, 2).eval(), "no ConvNeXtBlock and no accelerated block")
    refused(timm_model().eval(), "no ConvNeXtBlock and no accelerated block")


@pytest.mark.parametrize(
    "share",
    [
        lambda model: setattr(model[1], "norm", model[0].norm),
        lambda model: setattr(model[1], "gamma", model[0].gamma),
        lambda model: setattr(model[2], "weight", model[0].pwconv2.bias),
    ],
    ids=["a module", "a parameter of blocks", "a parameter outside"],
)
def test_shared_parameters_are_refused(share):
    model = nn.Sequential(make_block(), make_block(), nn.LayerNorm(16)).eval()
    share(model)
    refused(model, r"nothing was folded\. `0`: its `[\w.]+` is shared with another module")


def test_a_repeated_block_is_folded_once():
    block, input = make_block(torch.float64), torch.randn(1, 16, 5, 5, dtype=torch.float64)
    model = nn.Sequential(block, block).eval()
    expected = model(input)
    assert len(fold_(model).after) == 1
    assert relative_error(model(input), expected) < 1e-13


def test_a_missing_bias():
    block = make_block()
    block.pwconv1.bias = None
    refused(block, "its `pwconv1` has no bias that could take that of its norm up")
    block.pwconv2.bias = None
    torch.nn.init.zeros_(block.norm.bias)
    input = torch.randn(1, 16, 5, 5)
    expected = block(input)
    fold_(block)
    assert relative_error(block(input), expected) < 1e-6
    assert block.pwconv1.bias is None and block.pwconv2.bias is None


def test_what_is_no_plain_parameter_is_refused():
    model = nn.Sequential(make_block(), make_block()).eval()
    nn.utils.parametrizations.weight_norm(model[1].pwconv1)
    model.eval()
    refused(model, r"`1`: its `pwconv1\.weight` is a Tensor; accepted: floating-point parameters")


def test_a_block_with_hooks_is_refused():
    model = accelerated(timm_model())
    model.stages[1].blocks[0].mlp.register_forward_hook(lambda *_: None)
    refused(model, r"`stages\.1\.blocks\.0`: hooks sit on its `mlp`")
    block = make_block().eval()
    block.pwconv2.register_forward_hook(lambda *_: None)
    refused(block, "`: hooks sit on its `pwconv2`")


@pytest.mark.filterwarnings("ignore:a ConvNeXtBlock runs the published forward")
def test_a_folded_block_with_hooks_runs_the_published_forward():
    block, input, seen = make_block(torch.float64).eval(), torch.randn(1, 16, 5, 5, dtype=torch.float64), []
    expected = block(input)
    fold_(block)
    block.pwconv2.register_forward_hook(lambda *_: seen.append(1))
    assert relative_error(block(input), expected) < 1e-13
    assert seen
