import copy

import pytest
import timm
import torch
from support import randomise, relative_error
from torch import nn

from convnext_kernels import ConvNeXt, accelerate, fold_, graphed, graphs


def make_model(**options):
    model = ConvNeXt((1, 1), (8, 16), **{"num_classes": 5, "layer_scale_init_value": 1.0, **options})
    randomise(model)
    return model.eval()


def make_accelerated():
    model = timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 8, 8), num_classes=5)
    randomise(model)
    accelerate(model.eval())
    return model


def images(batch=2, size=32, device="cpu", seed=0):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.fixture
def emulated(monkeypatch):
    """In place of a CUDA graph, what it does: it runs on the same input again and fills the same outputs."""

    def record(model, input):
        with torch.no_grad():
            outputs = model(input)

        def replay():
            with torch.no_grad():
                for output, new in zip(as_list(outputs), as_list(model(input)), strict=True):
                    output.copy_(new)

        return replay, outputs

    monkeypatch.setattr(graphs, "_record", record)
    return graphs.Graphed


def as_list(outputs):
    return outputs if isinstance(outputs, list) else [outputs]


@pytest.mark.parametrize(
    ("model", "example", "error", "match"),
    [
        (len, images(), TypeError, "model: got builtin_function_or_method; accepted: a torch.nn.Module"),
        (nn.Identity().eval(), [images()], TypeError, "example: got list; accepted: a torch.Tensor"),
        (nn.Sequential(nn.Identity()), images(), ValueError, "model: `model` is in training mode"),
        (nn.Identity().eval(), images(), ValueError, "example: got a tensor on cpu; accepted: one on a CUDA device"),
    ],
)
def test_arguments_that_do_not_fit(model, example, error, match):
    with pytest.raises(error, match=match):
        graphed(model, example)


def test_a_model_on_another_device_than_the_example():
    """Before CUDA is touched."""

    class Elsewhere(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda:0")

    with pytest.raises(ValueError, match=r"model: `weight` is on cpu; accepted: the example's cuda:0"):
        graphed(nn.Linear(2, 2).eval(), torch.zeros(1, 2).as_subclass(Elsewhere))


@pytest.mark.parametrize(
    ("input", "match"),
    [
        (images(1), r"got shape \[1, 3, 32, 32\], torch.float32, cpu; accepted by this graph: shape \[2, 3, 32, 32\]"),
        (images(size=64), r"got shape \[2, 3, 64, 64\]"),
        (images().half(), "torch.float16, cpu; accepted"),
        (images(device="meta"), "torch.float32, meta; accepted"),
        ([images()], "got list"),
        (images().requires_grad_(), "requires a gradient"),
    ],
    ids=["batch", "size", "dtype", "device", "type", "gradient"],
)
def test_inputs_that_do_not_fit(emulated, input, match):
    run = emulated(make_model(), images())
    with pytest.raises(ValueError, match=match):
        run(input)


def test_an_input_whose_gradient_is_not_asked_for(emulated):
    model = make_model()
    run = emulated(model, images())
    with torch.no_grad():
        assert torch.equal(run(images(seed=1).requires_grad_()), model(images(seed=1)))


def test_a_model_back_in_training_mode(emulated):
    model = make_model()
    run = emulated(model, images())
    model.train()
    with pytest.raises(ValueError, match="model: `model` is in training mode"):
        run(images())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda model: setattr(model.head, "bias", nn.Parameter(torch.zeros(5))), "bias"),
        (lambda model: model.double(), "weight"),
        (lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True), "weight"),
        (fold_, "gamma"),
    ],
    ids=["replaced", "converted", "assigned", "folded"],
)
def test_parameters_that_the_graph_no_longer_reads(emulated, change, name):
    model = make_model()
    run = emulated(model, images())
    change(model)
    with pytest.raises(RuntimeError, match=f"`{name}` was removed, replaced or moved since.*calling graphed again"):
        run(images())


def check_calls(run, model, device, tolerance):
    """New inputs, other layouts, and weights changed in place; outputs outlive the next call."""
    first, second = images(device=device), images(device=device, seed=1)
    with torch.no_grad():
        expected = [*as_list(model(first)), *as_list(model(second))]
    outputs = [*as_list(run(first)), *as_list(run(second.to(memory_format=torch.channels_last)))]
    for ours, theirs in zip(outputs, expected, strict=True):
        assert ours.dtype == theirs.dtype and relative_error(ours, theirs) <= tolerance
        assert not ours.requires_grad
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
        changed = as_list(model(first))
    assert relative_error(changed[0], expected[0]) > 1e-2
    for ours, theirs in zip(as_list(run(first)), changed, strict=True):
        assert relative_error(ours, theirs) <= tolerance


MODELS = {
    "ours": make_model,
    "maps": lambda: make_model(out_indices=(0, 1)),
    "folded": lambda: folded(make_model()),
    "accelerated": make_accelerated,
}


def folded(model):
    fold_(model)
    return model


@pytest.mark.parametrize("model", MODELS)
def test_calls_in_place_of_the_model(emulated, model):
    model = MODELS[model]()
    check_calls(emulated(model, images(seed=2)), model, "cpu", 0)


def test_the_example_is_left_alone(emulated):
    example = images()
    run = emulated(make_model(), example)
    run(images(seed=1))
    assert torch.equal(example, images())


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_calls_in_place_of_the_model_on_a_gpu(model):
    model = MODELS[model]().cuda()
    check_calls(graphed(model, images(device="cuda", seed=2)), model, "cuda", 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_calls_under_autocast_on_a_gpu(model):
    model = MODELS[model]().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        model(images(device="cuda"))  # its weights are in autocast's cache
        run = graphed(model, images(device="cuda", seed=2))
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        check_calls(run, model, "cuda", 2 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.gpu
def test_calls_on_another_stream_on_a_gpu():
    model = make_model().cuda()
    run, input = graphed(model, images(device="cuda")), images(device="cuda", seed=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        assert relative_error(run(input), model(input)) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("input", [images(1), images(size=64), images().half()], ids=["batch", "size", "dtype"])
def test_inputs_that_do_not_fit_on_a_gpu(input):
    run = graphed(make_model().cuda(), images(device="cuda"))
    with pytest.raises(ValueError, match="accepted by this graph"):
        run(input.cuda())
