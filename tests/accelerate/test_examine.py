"""A block that computes anything else than ours is left as it was, and the report says why."""

import copy
import warnings

import pytest
import torch
from small import BLOCKS, NORMS, TOLERANCE, assert_ours, build, difference, images
from timm.layers import GELUTanh, RmsNorm
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, weight_norm
from transformers.activations import ACT2FN, ClippedGELUActivation, QuickGELUActivation

from convnext_kernels import accelerate, restore

CHANGED = "stages.2.blocks.0"


def conv(**options) -> nn.Conv2d:
    return nn.Conv2d(24, options.pop("out_channels", 24), **{"kernel_size": 7, "padding": 3, "groups": 24, **options})


def put(path: str, value):
    """A change of a block: an attribute of it, by its path."""

    def change(block: nn.Module) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            block = getattr(block, parent)
        setattr(block, name, value)

    return change


class Lora(nn.Linear):
    pass


class Subclass(Tensor):
    pass


def subclass_of_tensor(block):
    block.gamma = nn.Parameter(block.gamma.data.as_subclass(Subclass))


def drop_rate_alone(block):
    del block.drop_path
    block.drop_path = 0.1


REFUSED = {
    "stride": (put("conv_dw", conv(stride=2)), "its `conv_dw` has stride (2, 2)"),
    "groups": (put("conv_dw", conv(groups=12)), "its `conv_dw` is not depthwise: 24 to 24 channels in 12 groups"),
    "widening": (put("conv_dw", conv(out_channels=48)), "its `conv_dw` is not depthwise: 24 to 48"),
    "even": (put("conv_dw", conv(kernel_size=4, padding=2)), "its `conv_dw` has size (4, 4)"),
    "oblong": (put("conv_dw", conv(kernel_size=(7, 5), padding=(3, 2))), "its `conv_dw` has size (7, 5)"),
    "dilation": (put("conv_dw", conv(dilation=(1, 2), padding=(3, 6))), "dilation (1, 2)"),
    "valid": (put("conv_dw", conv(padding=0)), "its `conv_dw` pads (0, 0) with zeros; accepted: 3"),
    "reflect": (put("conv_dw", conv(padding_mode="reflect")), "its `conv_dw` pads (3, 3) with reflect"),
    "conv1d": (put("conv_dw", nn.Conv1d(24, 24, 7, padding=3, groups=24)), "its `conv_dw` is a Conv1d"),
    "conv3d": (put("conv_dw", nn.Conv3d(24, 24, 7, padding=3, groups=24)), "its `conv_dw` is a Conv3d"),
    "lora": (put("mlp.fc1", Lora(24, 96)), "its `mlp.fc1` is a Lora"),
    "3x3": (put("mlp.fc1", nn.Conv2d(24, 96, 3, padding=1)), "its `mlp.fc1` is a convolution (3, 3)"),
    "padded": (put("mlp.fc1", nn.Conv2d(24, 96, 1, padding=1)), "its `mlp.fc1` is a convolution (1, 1)"),
    "grouped": (put("mlp.fc2", nn.Conv2d(96, 24, 1, groups=2)), "its `mlp.fc2` is a convolution"),
    "rms": (put("norm", RmsNorm(24)), "its `norm` is a RmsNorm; accepted: a layer norm"),
    "batch norm": (put("norm", nn.BatchNorm2d(24)), "it has `norm.running_mean`, which ConvNeXt's block has not"),
    "group norm": (put("norm", nn.GroupNorm(4, 24)), "its branch differs from ours by"),
    "silu": (put("mlp.act", nn.SiLU()), "its `mlp.act` is a SiLU; accepted: GELU"),
    "relu": (put("mlp.act", nn.ReLU(inplace=True)), "its `mlp.act` is a ReLU; accepted: GELU"),
    "clipped": (put("mlp.act", ClippedGELUActivation(-10, 10)), "its `mlp.act` is a ClippedGELUActivation; accepted"),
    "quick": (put("mlp.act", QuickGELUActivation()), "its `mlp.act` is a QuickGELUActivation; accepted: GELU"),
    "prelu": (put("mlp.act", nn.PReLU(96)), "its `mlp.act` is a PReLU; accepted: GELU"),
    "dropout": (put("mlp.drop1", nn.Dropout(0.1)), "it has `mlp.drop1`, a Dropout, which"),
    "drop block": (put("drop_path", nn.Dropout2d(0.1)), "its `drop_path` is a Dropout2d; accepted: stochastic depth"),
    "drop rate": (drop_rate_alone, "its `drop_path` is a float; accepted: a module or none"),
    "shortcut": (put("shortcut", nn.AvgPool2d(1)), "it has `shortcut`, a AvgPool2d, which ConvNeXt's block has not"),
    "module": (lambda block: block.add_module("se", nn.Conv2d(24, 24, 1)), "it has `se`, a Conv2d, which"),
    "parameter": (put("alpha", nn.Parameter(torch.ones(1))), "it has `alpha`, which ConvNeXt's block has not"),
    "buffer": (lambda block: block.register_buffer("mask", torch.ones(1)), "it has `mask`, which"),
    "hook": (lambda block: block.norm.register_forward_hook(lambda *_: None), "hooks sit on its `norm`"),
    "backward hook": (lambda block: block.mlp.register_full_backward_hook(lambda *_: None), "hooks sit on its `mlp`"),
    "weight norm": (lambda block: weight_norm(block.mlp.fc1), "hooks sit on its `mlp.fc1`"),
    "parametrised": (lambda block: parametrizations.weight_norm(block.mlp.fc1), "its `mlp.fc1` is a Parametrized"),
    "inner forward": (
        lambda block: setattr(block.mlp, "forward", torch.sin),
        "the forward of its `mlp` has been replaced",
    ),
    "forward": (lambda block: setattr(block, "forward", torch.sin), "its forward has been replaced"),
    "tensor": (subclass_of_tensor, "its `gamma` is a Subclass; accelerate a model before"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_one_block_is_refused_the_others_not(change, reason):
    model = build()
    block = model.get_submodule(CHANGED)
    change(block)
    classes = {name: type(module) for name, module in block.named_modules()}
    report = accelerate(model)
    assert list(report.skipped) == [CHANGED]
    assert reason in report.skipped[CHANGED]
    assert {name: type(module) for name, module in block.named_modules()} == classes
    assert set(BLOCKS) - {CHANGED} <= set(report.converted)


HOST = type(build().stages[0].blocks[0])


class WithoutSkip(HOST):
    def forward(self, x):
        return super().forward(x) - x


class NormAfter(HOST):
    def forward(self, x):
        return x + self.norm(super().forward(x) - x)


class ScaledByFlag(HOST):
    gain = 1.0

    def forward(self, x):
        return x + self.gain * (super().forward(x) - x)


class AnotherEps(HOST):
    """Its norm's epsilon is not where it says."""

    def forward(self, x):
        eps, self.norm.eps = self.norm.eps, 1e-5
        try:
            return super().forward(x)
        finally:
            self.norm.eps = eps


class NeedsMore(HOST):
    def forward(self, x, mask):
        return super().forward(x) * mask


def test_a_block_that_takes_more_than_images():
    model = build()
    model.get_submodule(CHANGED).__class__ = NeedsMore
    reason = accelerate(model).skipped[CHANGED]
    assert reason.startswith("its host's forward failed on a copy with random parameters: TypeError: ")


@pytest.mark.parametrize("cls", [WithoutSkip, NormAfter, AnotherEps])
def test_a_block_built_alike_that_computes_something_else(cls):
    model = build()
    model.get_submodule(CHANGED).__class__ = cls
    for parameter in model.get_submodule(CHANGED).parameters():
        parameter.data.mul_(1e-6)  # as hidden as at initialisation
    report = accelerate(model)
    assert report.skipped[CHANGED].startswith("its branch differs from ours by")
    assert len(report.skipped) == 1


def test_blocks_of_one_class_that_differ_in_an_attribute_are_tried_each():
    model = build()
    for name in BLOCKS:
        model.get_submodule(name).__class__ = ScaledByFlag
        model.get_submodule(name).gain = 1.0
    model.get_submodule(CHANGED).gain = 2.0
    report = accelerate(model)
    assert list(report.skipped) == [CHANGED]
    assert report.skipped[CHANGED].startswith("its branch differs from ours by")


def test_another_block_of_the_family_is_named():
    class MedNeXtBlock(nn.Module):
        pass

    with pytest.warns(UserWarning, match="MedNeXt's block is three-dimensional"):
        report = accelerate(nn.Sequential(MedNeXtBlock()))
    assert list(report.skipped) == ["0"]


EXACT = (nn.GELU(), ACT2FN["gelu"], ACT2FN["gelu_python"])
BY_TANH = (nn.GELU("tanh"), GELUTanh(), *(ACT2FN[f"gelu_{kind}"] for kind in ("new", "fast", "pytorch_tanh")))


@pytest.mark.parametrize("activation", [*EXACT, *BY_TANH], ids=str)
def test_activations_are_known_by_their_values(activation):
    model = build()
    for name in BLOCKS:
        model.get_submodule(name).mlp.act = activation
    assert not accelerate(model).skipped
    expected = "gelu" if activation in EXACT else "gelu_tanh"
    assert {model.get_submodule(name).wiring.activation for name in BLOCKS} == {expected}


class Adapter(nn.Module):
    """Passes on what is asked of it to the module in it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return 2 * self.inner(x)


WRAPPERS = {
    "adapter": Adapter,
    "compiled": lambda block: torch.compile(block, backend="aot_eager"),
    "checkpointed": checkpoint_wrapper,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_block_in_a_wrapper_that_passes_on_its_attributes(wrap):
    host = build()
    stage = host.stages[2]
    stage.blocks = nn.Sequential(*map(wrap, stage.blocks))
    expected = host(images())
    report = accelerate(host)
    assert not report.skipped and len(report.converted) == len(BLOCKS) + len(NORMS)
    assert_ours(host)
    assert difference(host(images()), expected) <= TOLERANCE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert accelerate(host).converted == ()
    assert set(restore(host)) == set(report.converted)


def test_a_module_whose_properties_raise_is_passed_over():
    class NotBuilt(nn.Module):
        @property
        def conv_dw(self):
            raise RuntimeError("not built yet")

    assert set(BLOCKS) == {name[2:] for name in accelerate(nn.Sequential(build(), NotBuilt())).converted} - set(NORMS)


@pytest.mark.parametrize("compiler", [torch.jit.script, lambda model: torch.jit.trace(model, images())])
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated", "ignore:accelerate changed nothing")
def test_what_torchscript_compiled_is_left(compiler):
    reasons = accelerate(compiler(build())).skipped
    assert reasons == dict.fromkeys(BLOCKS, "TorchScript has compiled it; accelerate a model before")


def test_trying_leaves_no_trace():
    """No random numbers are drawn, no parameter, mode or gradient is touched."""
    model = build().train()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    accelerate(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "context",
    [
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=["inference", "no_grad", "device", "autocast"],
)
def test_within_contexts(context):
    model = build()
    with context(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(BLOCKS) <= set(accelerate(model).converted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_dtypes(dtype):
    assert set(BLOCKS) <= set(accelerate(build().to(dtype)).converted)


def test_model_without_memory():
    assert set(BLOCKS) <= set(accelerate(build().to("meta")).converted)


def test_a_norm_that_is_no_layer_norm_is_left():
    class LayerNorm2d(nn.GroupNorm):
        pass

    class LayerNorm(nn.LayerNorm):
        """Over the last dimension."""

    model = build()
    model.stem[1], model.stages[1].downsample[0] = LayerNorm2d(4, 16), LayerNorm(16)
    report = accelerate(model)
    assert set(report.converted) == {*BLOCKS, *NORMS} - {"stem.1", "stages.1.downsample.0"}


def test_norms_of_a_model_without_blocks_are_left():
    model = build().stem
    with pytest.warns(UserWarning, match="it has no ConvNeXt block"):
        assert accelerate(model).converted == ()
