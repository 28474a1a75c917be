"""What the hosts' own test suites ask of a ConvNeXt, asked of an accelerated one, beside the one that is not."""

import copy
from typing import Any

import pytest
import timm
import torch
from hosts import CLASSES, DEPTHS, DIMS, DROP_PATH, HOSTS, SIZES, timm_maps
from support import random_like, randomise, relative_error
from timm.layers import set_scriptable
from timm.models._features_fx import create_feature_extractor as timm_extractor
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from convnext_kernels import accelerate

TOLERANCE = 1e-5
each_timm = pytest.mark.parametrize(
    "name", ["convnext_atto_ols", "convnext_tiny_hnf", "convnextv2_atto", "edgenext_xx_small"]
)
each_transformers = pytest.mark.parametrize(
    "name", ["transformers", "transformers V2", "transformers DINOv3", "transformers backbone"]
)


def pair(model: nn.Module) -> tuple[Any, Any]:
    """An accelerated copy of a model, its parameters drawn, and the model."""
    randomise(model)
    ours = copy.deepcopy(model)
    assert accelerate(ours).converted
    return ours, model


def timm_pair(name: str, **options: Any) -> tuple[Any, Any]:
    depths = (2, 2, 2, 2) if name.startswith("edgenext") else DEPTHS
    sizes = SIZES | {"depths": depths}
    return pair(timm.create_model(name, drop_path_rate=DROP_PATH, **sizes | options).eval())


def images(batch: int = 2, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(3))


def assert_same(ours: Any, theirs: Any) -> None:
    """Both are tensors, or trees of as many, of the same shapes and values."""
    got, expected = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (ours, theirs))
    assert len(got) == len(expected) > 0
    for output, truth in zip(got, expected, strict=True):
        assert output.shape == truth.shape and relative_error(output, truth) < TOLERANCE


def gradients(model: nn.Module, input: Tensor) -> list[Tensor]:
    """Of every parameter, in a step with stochastic depth."""
    torch.manual_seed(5)
    output = model.train()(input)
    output = output if isinstance(output, Tensor) else output.logits
    output.backward(random_like(output))
    assert all(parameter.grad is not None for parameter in model.parameters())
    return [parameter.grad for parameter in model.parameters()]


@each_timm
class TestTimm:
    def test_features_head_and_a_new_classifier(self, name):
        models = timm_pair(name)
        for change in ((), (0,), (0, ""), (CLASSES + 2, "max")):
            outputs = []
            for model in models:
                torch.manual_seed(0)
                if change:
                    model.reset_classifier(*change)
                features = model.forward_features(images())
                outputs.append((features, model.forward_head(features, pre_logits=True), model(images())))
            assert_same(*outputs)

    def test_features_only(self, name):
        ours, theirs = timm_pair(name, features_only=True, out_indices=(1, 3))
        assert ours.feature_info.channels() == [DIMS[1], DIMS[3]]
        assert_same(ours(images()), theirs(images()))

    def test_intermediates_are_the_features(self, name):
        ours, theirs = timm_pair(name)
        assert_same(timm_maps(ours, images()), timm_maps(theirs, images()))
        features, maps = ours.forward_intermediates(images(), indices=(0, 2))
        assert len(maps) == 2 and features.equal(ours.forward_features(images()))
        kept = ours.prune_intermediate_layers((0, 1))
        assert kept == [0, 1] and len(ours.stages) == 2 and ours(images()).dim() == 4

    @pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
    def test_backward(self, name, checkpointing):
        models = timm_pair(name)
        for model in models:
            model.set_grad_checkpointing(checkpointing)
        assert_same(*(gradients(model, images(4)) for model in models))

    def test_fx(self, name):
        ours, theirs = timm_pair(name)
        layers = {"stages.1": "first", "stages.3": "last"}
        extracted = timm_extractor(ours, layers)(images())
        assert_same(extracted, timm_extractor(theirs, layers)(images()))

    @pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
    def test_torchscript(self, name):
        ours, theirs = timm_pair(name)
        traced = torch.jit.trace(ours, images())
        assert_same(traced(images(3, 96)), theirs(images(3, 96)))
        with set_scriptable(True):
            ours, theirs = timm_pair(name)
        features = timm_extractor(ours, {"stages.3": "last"})
        assert_same(torch.jit.script(features)(images()), timm_extractor(theirs, {"stages.3": "last"})(images()))
        with pytest.warns(UserWarning, match=r"torch\.jit\.script cannot read .* it compiles the host's"):
            assert_same(torch.jit.script(ours)(images()), theirs(images()))


class TestTorchvision:
    @pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained")
    def test_feature_extraction(self):
        ours, theirs = pair(HOSTS["torchvision"].make().eval())
        assert get_graph_node_names(theirs)[1][-1] in get_graph_node_names(ours)[1]
        nodes = {"features.1": "c2", "features.3": "c3", "features.7": "c5", "avgpool": "pooled"}
        outputs = create_feature_extractor(ours, nodes)(images())
        assert list(outputs) == list(nodes.values())
        assert_same(outputs, create_feature_extractor(theirs, nodes)(images()))

    @pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
    def test_torchscript(self):
        ours, theirs = pair(HOSTS["torchvision"].make().eval())
        assert_same(torch.jit.trace(ours, images())(images(3, 96)), theirs(images(3, 96)))
        with pytest.warns(UserWarning, match=r"torch\.jit\.script cannot read .* it compiles the host's"):
            assert_same(torch.jit.script(ours)(images()), theirs(images()))

    def test_backward(self):
        assert_same(*(gradients(model, images(4)) for model in pair(HOSTS["torchvision"].make())))

    def test_fx_and_the_gradient_of_images(self):
        ours, theirs = pair(HOSTS["torchvision"].make().eval())
        results = []
        for model in (torch.fx.symbolic_trace(ours), theirs):
            input = images().requires_grad_()
            output = model(input)
            results.append((output, *torch.autograd.grad(output.square().sum(), input)))
        assert_same(*results)


@each_transformers
class TestTransformers:
    def test_outputs_as_a_tuple_and_hidden_states(self, name):
        ours, theirs = pair(HOSTS[name].make().eval())
        for options in ({}, {"return_dict": False}, {"output_hidden_states": True}):
            got, expected = ours(images(), **options), theirs(images(), **options)
            assert type(got) is type(expected)
            assert_same(got, expected)
        assert len(ours(images(), output_hidden_states=True).hidden_states) == len(DEPTHS) + 1

    def test_hidden_states_keep_their_gradients(self, name):
        ours, theirs = pair(HOSTS[name].make())
        gradients = []
        for model in (ours, theirs):
            torch.manual_seed(5)
            output = model(images(4).requires_grad_(), output_hidden_states=True)
            for states in output.hidden_states:
                states.retain_grad()
            (output.feature_maps[-1] if name.endswith("backbone") else output[0]).square().sum().backward()
            gradients.append([states.grad for states in output.hidden_states])
        assert_same(*gradients)

    @pytest.mark.parametrize("before", [False, True], ids=["after loading", "before saving"])
    def test_saved_and_loaded(self, name, before, tmp_path):
        ours, theirs = pair(HOSTS[name].make().eval())
        (ours if before else theirs).save_pretrained(tmp_path)
        loaded = type(theirs).from_pretrained(tmp_path)
        assert type(loaded) is type(theirs) and loaded.state_dict().keys() == ours.state_dict().keys()
        assert_same(loaded(images()), theirs(images()))
        assert accelerate(loaded).converted
        assert_same(loaded(images()), theirs(images()))


def test_classifier_of_transformers_learns_from_labels():
    labels = torch.tensor([1, 3, 0, 2])
    gradients = []
    for model in pair(HOSTS["transformers V2"].make()):
        torch.manual_seed(5)
        model(images(4), labels=labels).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert_same(*gradients)
