"""What is put into an accelerated block and only its host's forward would obey."""

import copy
import warnings
from types import MethodType

import pytest
import torch
from small import BLOCK, BLOCKS, TOLERANCE, assert_ours, build, build_pair, difference, gradients, images, operators
from torch import nn
from torch.nn.utils import parametrizations, prune

from convnext_kernels import accelerate
from convnext_kernels.accelerate import blocks


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

    def forward(self, input):
        return 2 * self.inner(input)


CHANGES = (
    ("hook", lambda block: block.norm.register_forward_hook(lambda m, a, out: 2 * out), "hooks sit on its `norm`"),
    (
        "container",
        lambda block: block.mlp.register_forward_pre_hook(lambda m, a: (2 * a[0],)),
        "hooks sit on its `mlp`",
    ),
    (
        "linear",
        lambda block: setattr(block.mlp, "fc1", Doubled(block.mlp.fc1)),
        "`mlp.fc1` is a Doubled and was a Conv2d",
    ),
    ("none", lambda block: setattr(block, "norm", nn.Identity()), "`norm` is a Identity"),
    ("norm", lambda block: parametrizations.weight_norm(block.mlp.fc2), "`mlp.fc2` is a ParametrizedConv2d"),
    ("prune", lambda block: prune.l1_unstructured(block.mlp.fc1, "weight", 0.5), "hooks sit on its `mlp.fc1`"),
    (
        "forward",
        lambda block: setattr(block.norm, "forward", torch.sin),
        "the forward of its `norm` has been replaced",
    ),
    (
        "method",
        lambda block: setattr(block.mlp.act, "forward", MethodType(nn.ReLU.forward, nn.ReLU())),
        "the forward of its `mlp.act` has been replaced",
    ),
    (
        "another's",
        lambda block: setattr(block.norm, "forward", type(block.norm)(24).forward),
        "the forward of its `norm` has been replaced",
    ),
    ("dropout", lambda block: setattr(block.mlp, "drop1", nn.Sequential()), "`mlp.drop1` is a Sequential"),
)


@pytest.mark.parametrize(("change", "reason"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_the_hosts_forward_runs_with_a_warning(pair, change, reason):
    blocks._warn_host_forward.cache_clear()
    host, ours = pair
    for model in pair:
        change(model.stages[2].blocks[0])
    expected = host(images())
    assert difference(expected, build()(images())) > 1e-3 or "drop1" in reason or "fc2" in reason
    with pytest.warns(UserWarning, match="an accelerated ConvNeXtBlock runs its host's forward: .*" + reason):
        assert difference(ours(images()), expected) <= TOLERANCE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert operators(ours, images())[BLOCK] == len(BLOCKS) - 1


def test_the_forward_of_its_own_class_changes_nothing(pair):
    """`kernelize` sets it on modules that it knows by name and has no layer for."""
    for act in (pair[1].get_submodule(name).mlp.act for name in BLOCKS):
        act.forward = MethodType(type(act).forward, act)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert operators(pair[1], images())[BLOCK] == len(BLOCKS)


def test_ours_comes_back_when_the_hook_goes(pair):
    handle = pair[1].stages[2].blocks[0].norm.register_forward_hook(lambda module, args, output: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert operators(pair[1], images())[BLOCK] == len(BLOCKS) - 1
    handle.remove()
    assert_ours(pair[1])


def test_hooks_on_the_block_itself_are_no_obstacle(pair):
    seen = []
    pair[1].stages[2].blocks[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert_ours(pair[1])
    assert seen == [(2, 24, 2, 2)]


def test_quantisation_of_other_layers(pair):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(
            pair[1], {"head.fc": torch.ao.quantization.default_dynamic_qconfig}
        )
    assert not isinstance(quantised.head.fc, nn.Linear)
    assert_ours(quantised)


@pytest.mark.filterwarnings("ignore:.*quantization:DeprecationWarning")
def test_quantised_layers_are_told_from_those_they_were():
    blocks._warn_host_forward.cache_clear()
    ours = build_pair(conv_mlp=False)[1]
    quantised = torch.ao.quantization.quantize_dynamic(ours, {nn.Linear})
    apart = r"is a torch\.ao\.nn\.quantized\..*\.Linear and was a torch\.nn\.modules\..*\.Linear"
    with pytest.warns(UserWarning, match=apart):
        quantised(images())


ATTRIBUTES = (
    ("stages.2.blocks.0", "conv_dw", "stride", (2, 2)),
    ("stages.3.blocks.0", "conv_dw", "padding", (4, 4)),
    ("stages.2.blocks.0", "conv_dw", "padding_mode", "replicate"),
    ("stages.1.blocks.0", "conv_dw", "dilation", (1, 2)),
    ("stages.2.blocks.0", "mlp.act", "approximate", "tanh"),
    ("stages.2.blocks.0", "mlp.drop1", "p", 0.5),
)


@pytest.mark.parametrize(("block", "path", "name", "value"), ATTRIBUTES, ids=[a[2] for a in ATTRIBUTES])
def test_attributes_that_only_the_hosts_forward_reads(block, path, name, value):
    blocks._warn_host_forward.cache_clear()
    host = build(act_layer=nn.GELU)
    host.get_submodule("stages.1.blocks.0").conv_dw.padding = "same"
    ours = copy.deepcopy(host)
    assert not accelerate(ours).skipped
    before = gradients(host.train(), images())["output"]
    for model in (host, ours):
        setattr(model.get_submodule(f"{block}.{path}"), name, value)
    expected = gradients(host, images())["output"]
    assert difference(expected, before) > 1e-5
    with pytest.warns(UserWarning, match=rf"the {name} of its `{path}` is .* and was .*"):
        assert difference(gradients(ours.train(), images())["output"], expected) <= TOLERANCE


@pytest.mark.filterwarnings("error")
def test_the_hosts_forward_compiles(pair):
    """Into one graph; and ours, when the hook is gone."""
    host, ours = pair
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    handles = [model.stages[2].blocks[0].norm.register_forward_hook(lambda m, a, out: 2 * out) for model in pair]
    assert difference(host(images()), build()(images())) > 1e-3
    assert difference(compiled(images()), host(images())) <= TOLERANCE
    for handle in handles:
        handle.remove()
    assert difference(compiled(images()), host(images())) <= TOLERANCE
