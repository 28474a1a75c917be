"""The layers, as `kernels` loads them from a repository that was laid out for it."""

import copy
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import transformers
from support import OperatorCalls, randomise, relative_error
from torch import nn
from transformers.activations import GELUActivation

from tools import kernel_repository

kernels = pytest.importorskip("kernels")
Mode = kernels.Mode
BLOCK = {"convnext": "ConvNextLayer", "convnextv2": "ConvNextV2Layer", "dinov3_convnext": "DINOv3ConvNextLayer"}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hub") / "convnext-kernels"
    kernel_repository.lay_out(directory)
    return directory


@pytest.fixture(scope="module")
def layers(repository):
    return kernels.get_local_kernel(repository).layers


@pytest.fixture
def kernelized(repository, monkeypatch):
    """Makes classes known to `kernels` by their layer's name and kernelizes a model; undone after the test.

    transformers' GELU is known too, for which there is no layer: transformers sees to that where it takes the installed
    version of `kernels`.
    """

    def run(model, classes, mode=Mode.INFERENCE, condition=None):
        known = [(cls, layer, condition) for cls, layer in classes.items()]
        for cls, layer, needed in [*known, (GELUActivation, "GeLU", None)]:
            monkeypatch.setattr(cls, "kernel_layer_name", None, raising=False)
            monkeypatch.setattr(cls, "kernel_condition", None, raising=False)
            kernels.replace_kernel_forward_from_hub(cls, layer, needed)
        local = {layer: kernels.LocalLayerRepository(repository, layer_name=layer) for layer in classes.values()}
        mapping = {layer: {"cpu": found} for layer, found in local.items()}
        with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
            return kernels.kernelize(model, mode=mode, use_fallback=kernels.KernelizeFallback.NO_LAYER)

    return run


def transformers_model(kind="convnext"):
    """A model of two stages, and its classes by the layers for them."""
    prefix = "DINOv3ConvNext" if kind.startswith("dino") else BLOCK[kind].removesuffix("Layer")
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 2], "drop_path_rate": 0.3}
    if kind == "dinov3_convnext":
        sizes = {"hidden_sizes": [8, 16, 8, 8], "depths": [1, 2, 1, 1], "drop_path_rate": 0.3}
    else:
        sizes["num_stages"] = 2
    model = getattr(transformers, f"{prefix}Model")(getattr(transformers, f"{prefix}Config")(**sizes))
    modeling = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    return model, {
        getattr(modeling, f"{prefix}Layer"): BLOCK[kind],
        getattr(modeling, f"{prefix}LayerNorm"): "ConvNextLayerNorm",
    }


def outputs_and_gradients(model, compiled=None):
    torch.manual_seed(1)  # of drop path
    images = torch.randn(3, 3, 32, 32, requires_grad=True)
    output = (model if compiled is None else compiled)(images)
    output = output if isinstance(output, torch.Tensor) else output.last_hidden_state
    gradients = torch.autograd.grad(output.square().mean(), [images, *model.parameters()], allow_unused=True)
    names = ["input", *dict(model.named_parameters())]
    return {"output": output, **{n: g for n, g in zip(names, gradients, strict=True) if g is not None}}


def assert_the_same(model, plain, compiled=None):
    ours, theirs = outputs_and_gradients(model, compiled), outputs_and_gradients(plain)
    errors = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    assert max(errors.values()) < 1e-5, errors


def calls_of(model, images):
    with OperatorCalls() as record, torch.no_grad():
        model(images)
    return [function for function, _ in record.calls]


@pytest.mark.parametrize("kind", BLOCK)
@pytest.mark.parametrize("mode", [Mode.INFERENCE, Mode.TRAINING], ids=["inference", "training"])
def test_transformers_models_compute_the_same(kind, mode, kernelized, layers):
    plain, classes = transformers_model(kind)
    randomise(plain)
    plain.train(Mode.TRAINING in mode)
    model = kernelized(copy.deepcopy(plain), classes, mode, layers.fits)
    replaced = [module for module in model.modules() if "forward" in vars(module)]
    assert {type(module) for module in replaced} == {*classes, GELUActivation}
    assert_the_same(model, plain)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_compiled_models_compute_the_same_from_their_first_call(kernelized, layers):
    """Here with a kernelized norm inside a kernelized block."""
    plain, classes = timm_model(conv_mlp=True)
    randomise(plain)
    model = kernelized(copy.deepcopy(plain), classes, Mode.TRAINING | Mode.TORCH_COMPILE, layers.fits)
    torch._dynamo.reset()
    assert_the_same(model, plain, torch.compile(model, fullgraph=True, backend="aot_eager"))


def test_compiled_models_that_were_not_examined_before(kernelized):
    plain, classes = transformers_model()
    randomise(plain)
    block = {cls: layer for cls, layer in classes.items() if layer == "ConvNextLayer"}
    model = kernelized(copy.deepcopy(plain), block, Mode.INFERENCE | Mode.TORCH_COMPILE)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="by `condition=fits` or by one call"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(torch.randn(1, 3, 32, 32))
    torch._dynamo.reset()
    assert_the_same(model, plain, torch.compile(model, backend="aot_eager"))
    assert_the_same(model, plain, torch.compile(model, fullgraph=True, backend="aot_eager"))


def timm_model(**options):
    from timm.layers import LayerNorm2d
    from timm.models.convnext import ConvNeXtBlock

    model = timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 8, 8), num_classes=4, **options)
    return model, {ConvNeXtBlock: "ConvNeXtBlock", LayerNorm2d: "LayerNorm2d"}


def torchvision_model():
    from torchvision.models.convnext import CNBlock, CNBlockConfig, ConvNeXt, LayerNorm2d

    model = ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)], stochastic_depth_prob=0.3, num_classes=4)
    return model, {CNBlock: "CNBlock", LayerNorm2d: "LayerNorm2d"}


HOSTS = {
    "timm": timm_model,
    "timm 1x1": lambda: timm_model(conv_mlp=True, use_grn=True, ls_init_value=None),
    "torchvision": torchvision_model,
}


@pytest.mark.parametrize("host", HOSTS)
def test_other_hosts_compute_the_same(host, kernelized, layers):
    plain, classes = HOSTS[host]()
    randomise(plain)
    model = kernelized(copy.deepcopy(plain), classes, Mode.TRAINING, layers.fits)
    assert {type(module) for module in model.modules() if "forward" in vars(module)} == set(classes)
    assert_the_same(model, plain)


def test_operators_are_those_of_the_repository(kernelized, layers):
    plain, classes = timm_model()
    images = torch.randn(1, 3, 32, 32)
    assert calls_of(plain, images) == []
    calls = calls_of(kernelized(plain, classes, condition=layers.fits), images)
    assert [call.name().split("::")[1] for call in calls] == ["layer_norm", "convnext_block"] * 4 + ["layer_norm"]
    assert {call.namespace for call in calls} == {layers.__name__.removesuffix(".layers")}


def test_a_block_that_computes_something_else_is_refused_with_the_reason(kernelized, layers):
    plain, classes = timm_model(act_layer="relu")
    images = torch.randn(1, 3, 32, 32)
    block = {next(iter(classes)): "ConvNeXtBlock"}
    left_alone = kernelized(copy.deepcopy(plain), block, condition=layers.fits)
    assert torch.equal(left_alone(images), plain(images))
    model = kernelized(plain, block)
    with pytest.raises(RuntimeError, match=r"this ConvNeXtBlock: its `mlp.act` is a ReLU; accepted.*fits"):
        model(images)


def test_a_norm_over_something_else_is_refused_with_the_reason(kernelized):
    _, classes = transformers_model()
    norm = next(cls for cls, layer in classes.items() if layer == "ConvNextLayerNorm")
    last = norm(8, eps=1e-6)
    kernelized(last, {norm: "ConvNextLayerNorm"})
    with pytest.raises(RuntimeError, match="over the channels of images"):
        last(torch.randn(2, 4, 4, 8))
    kernelized(plain := nn.LayerNorm(8), {nn.LayerNorm: "ConvNextLayerNorm"})
    with pytest.raises(RuntimeError, match="neither ConvNeXt's block nor a layer norm"):
        plain(torch.randn(2, 8))


def test_a_block_that_changed_since_is_refused_with_the_reason(kernelized, layers):
    model, classes = timm_model()
    kernelized(model, classes, condition=layers.fits)
    model.stages[1].blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"hooks sit on its `mlp\.fc1`"):
        model(torch.randn(1, 3, 32, 32))


def test_a_hidden_change_of_the_block_s_arithmetic_is_seen(kernelized, layers):
    """Blocks are tried, not only looked at."""
    model, classes = timm_model()
    block = next(iter(classes))
    other = type("Other", (block,), {"forward": lambda self, x: block.forward(self, x) + 1})
    model.stages[0].blocks[0].__class__ = other
    assert layers.fits(model.stages[1].blocks[0]) and not layers.fits(model.stages[0].blocks[0])


def test_a_wrapper_is_no_block_though_it_has_its_attributes(layers):
    block = timm_model()[0].stages[0].blocks[0]
    compiled = torch.compile(block)
    assert [layers.fits(module) for module in (compiled, block, compiled)] == [False, True, False]


def test_every_module_of_the_repository_imports_alone(repository):
    """Without the package it was made from, and with nothing but PyTorch and Triton."""
    forbidden = ("convnext_kernels", "safetensors", "rich", "timm", "torchvision", "transformers")
    program = f"""
import importlib, pkgutil, sys
from pathlib import Path
sys.modules.update(dict.fromkeys({forbidden!r}))
import kernels
kernel = kernels.get_local_kernel(Path({str(repository)!r}))
kernel.__path__ = [str(Path(kernel.__file__).parent)]
names = [module.name for module in pkgutil.walk_packages(kernel.__path__, kernel.__name__ + ".")]
for name in names:
    importlib.import_module(name)
print(len(names), kernel.__all__)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    count, exported = result.stdout.split(maxsplit=1)
    assert int(count) > 40 and exported.strip() == "['functional', 'layers']"


def test_repository_is_one_that_kernel_builder_reads(repository):
    build = importlib.import_module("kernels._rust").Build.open(repository)
    assert [str(backend) for backend in build.general.backends] == ["cpu", "cuda"]
    source = repository / "torch-ext" / "convnext_kernels"
    for backend in ("cpu", "cuda"):
        built = repository / "build" / f"torch-{backend}"
        files = {str(path.relative_to(built)) for path in built.rglob("*") if path.suffix != ".pyc" and path.is_file()}
        assert files == {str(path.relative_to(source)) for path in source.rglob("*.py")} | {"metadata.json"}


def test_no_source_names_the_package_but_in_words(repository):
    """Such as for import_module or torch.ops: there may be another package of that name, or none."""
    sources = {path: path.read_text() for path in (repository / "torch-ext").rglob("*.py")}
    assert sources
    assert [path for path, source in sources.items() if re.search(r"""["']convnext_kernels[.:]""", source)] == []


def test_command_lays_a_repository_out_and_never_over_another(tmp_path):
    root = Path(kernel_repository.__file__).parents[1]
    command = [sys.executable, "-m", "tools.kernel_repository", str(tmp_path / "new")]
    assert subprocess.run(command, cwd=root).returncode == 0
    assert (tmp_path / "new/build/torch-cuda/metadata.json").is_file()
    again = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert again.returncode != 0 and "FileExistsError" in again.stderr


@pytest.mark.parametrize(
    ("source", "depth", "expected"),
    [
        ("from convnext_kernels import build", 0, "from . import build"),
        ("from convnext_kernels.ops.mlp import (\n    mlp,\n)", 0, "from .ops.mlp import (\n    mlp,\n)"),
        ("    from convnext_kernels.backends import choose", 2, "    from ...backends import choose"),
        ("from convnext_kernels_else import x", 0, "from convnext_kernels_else import x"),
    ],
)
def test_imports_become_relative(source, depth, expected):
    assert kernel_repository.with_relative_imports(source, depth) == expected
