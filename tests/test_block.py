import copy
import io
import pickle
import warnings

import pytest
import timm
import torch
from support import OperatorCalls, randomise, relative_error
from torch import nn
from torch.nn.utils import parametrizations, prune

from convnext_kernels import block as block_module
from convnext_kernels import use_backend
from convnext_kernels.block import ConvNeXtBlock
from convnext_kernels.reference import ReferenceBlock

OPTIONS = {
    "v1": {},
    "v2": {"use_grn": True, "layer_scale_init_value": None},
    "grn_and_scale": {"use_grn": True},
    "no_scale": {"layer_scale_init_value": 0.0},
    "dilated": {"dilation": 2},
    "5x5": {"kernel_size": 5},
    "tanh": {"activation": "gelu_tanh"},
    "no_conv_bias": {"conv_bias": False},
    "narrow_and_eps": {"mlp_ratio": 1.5, "eps": 1e-2},
}


def make_pair(dim=24, dtype=torch.float32, **options):
    reference = ReferenceBlock(dim, **options).to(dtype)
    randomise(reference)
    block = ConvNeXtBlock(dim, **options).to(dtype)
    block.load_state_dict(reference.state_dict())
    return block, reference


def run(block, input, grad_output):
    """Output and gradients of the input and of every parameter."""
    input = input.clone().requires_grad_()
    output = block(input)
    output.backward(grad_output.to(output.dtype))
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in block.named_parameters()}
    return {"output": output, "gradient of input": input.grad} | gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_output_and_gradients_are_those_of_the_reference(options, dtype, tolerance):
    block, reference = make_pair(dtype=dtype, **options)
    input, grad_output = torch.randn(2, 2, 24, 7, 5, dtype=dtype)
    ours, theirs = run(block, input, grad_output), run(reference, input, grad_output)
    errors = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_is_as_exact_as_pytorch(version, dtype):
    block, reference = make_pair(dim=40, dtype=dtype, **OPTIONS[version])
    exact = copy.deepcopy(reference).double()
    input, grad_output = torch.randn(2, 2, 40, 9, 6).to(dtype)
    ours, theirs = run(block, input, grad_output), run(reference, input, grad_output)
    truth = run(exact, input.double(), grad_output.double())
    unit = torch.finfo(dtype).eps
    for name, value in truth.items():
        assert ours[name].dtype == dtype
        assert relative_error(ours[name], value) <= 1.5 * relative_error(theirs[name], value) + unit, name


def test_memory_formats_give_the_same_channels_last_result():
    block, _ = make_pair()
    input = torch.randn(2, 24, 7, 5)
    outputs = [
        block(input),
        block(input.contiguous(memory_format=torch.channels_last)),
        block(torch.cat((input, input), dim=1)[:, :24]),
        block(input.transpose(2, 3).contiguous().transpose(2, 3)),
    ]
    for output in outputs:
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(output, outputs[0]) < 1e-6


@pytest.mark.parametrize("shape", [(1, 24, 1, 1), (3, 24, 2, 2), (1, 24, 5, 3), (1, 24, 25, 41)])
def test_odd_maps(shape):
    block, reference = make_pair()
    input = torch.randn(shape)
    assert relative_error(block(input), reference(input)) < 1e-5


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_stochastic_depth_draws_the_reference_masks(version):
    block, reference = make_pair(drop_path=0.5, **OPTIONS[version])
    input, grad_output = torch.randn(2, 12, 24, 4, 4)
    results = []
    for module in (block, reference):
        torch.manual_seed(5)
        results.append(run(module, input, grad_output))
    ours, theirs = results
    dropped = (theirs["output"] == input).flatten(1).all(1)
    assert 0 < dropped.sum() < 12
    assert ours["output"][dropped].equal(input[dropped])
    assert max(relative_error(ours[name], theirs[name]) for name in theirs) < 1e-5


def test_stochastic_depth_rests_in_evaluation():
    block, reference = make_pair(drop_path=0.9)
    input = torch.randn(8, 24, 4, 4)
    assert relative_error(block.eval()(input), reference.eval()(input)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_gives_16_bit_and_float32_gradients(dtype):
    block, reference = make_pair(drop_path=0.5)
    input = torch.randn(4, 24, 6, 6)
    exact = copy.deepcopy(reference).double()
    results = {}
    for name, module in {"ours": block, "theirs": reference}.items():
        torch.manual_seed(2)
        with torch.autocast("cpu", dtype=dtype):
            results[name] = module(input)
    torch.manual_seed(2)
    truth = exact(input.double())
    assert results["ours"].dtype == dtype
    limit = 1.5 * relative_error(results["theirs"], truth) + torch.finfo(dtype).eps
    assert relative_error(results["ours"], truth) <= limit
    results["ours"].float().sum().backward()
    assert {parameter.grad.dtype for parameter in block.parameters()} == {torch.float32}


def test_frozen_parameters_get_no_gradient_and_the_others_do():
    block, reference = make_pair()
    input = torch.randn(2, 24, 4, 4)
    for module in (block, reference):
        module.requires_grad_(False)
        module.pwconv2.weight.requires_grad_()
        module(input).square().sum().backward()
    assert [name for name, parameter in block.named_parameters() if parameter.grad is not None] == ["pwconv2.weight"]
    assert relative_error(block.pwconv2.weight.grad, reference.pwconv2.weight.grad) < 1e-5


def test_parameters_are_read_at_call_time():
    block, reference = make_pair(use_grn=True)
    input = torch.randn(2, 24, 4, 4)
    block(input)
    for module in (block, reference):
        randomise(module, seed=1)
        module.gamma = torch.nn.Parameter(torch.linspace(0.5, 1.5, 24))
    assert relative_error(block(input), reference(input)) < 1e-5


def operators(block, input):
    """How many operators of the package a call runs; no warning is given."""
    with warnings.catch_warnings(), OperatorCalls() as operators:
        warnings.simplefilter("error")
        block(input)
    return len(operators.calls)


def test_parametrised_parameters_are_computed_with():
    pair = make_pair()
    for module in pair:
        parametrizations.weight_norm(module.dwconv)
        parametrizations.weight_norm(module.pwconv1)
        with torch.no_grad():
            module.pwconv1.parametrizations.weight.original0.mul_(2)
    input, grad_output = torch.randn(2, 2, 24, 5, 5)
    ours, theirs = (run(module, input, grad_output) for module in pair)
    assert max(relative_error(ours[name], theirs[name]) for name in theirs) < 1e-5
    assert operators(pair[0], input) == 1


class LowRank(nn.Module):
    """A linear layer beside another, as LoRA has it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.beside = base, copy.deepcopy(base)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, input):
        return self.base(input) + self.beside(input)


class Doubled(nn.Linear):
    def forward(self, input):
        return super().forward(input + input)


def make_doubled(linear):
    linear.__class__ = Doubled


def script(block):
    block.pwconv1 = torch.jit.script(nn.Sequential(block.pwconv1, nn.GELU()))


CHANGES = {
    "another": (lambda block: setattr(block, "pwconv1", LowRank(block.pwconv1)), "its `pwconv1` is a LowRank and was"),
    "subclass": (lambda block: make_doubled(block.pwconv2), "its `pwconv2` is a Doubled and was a Linear"),
    "scripted": (script, "its `pwconv1` is a RecursiveScriptModule and was a Linear"),
    "forward": (lambda block: setattr(block.norm, "forward", torch.sin), "the forward of its `norm` has been replaced"),
    "hook": (lambda block: block.grn.register_forward_hook(lambda m, a, out: 2 * out), "hooks sit on its `grn`"),
    "padding": (
        lambda block: setattr(block.dwconv, "padding_mode", "reflect"),
        "the padding_mode of its `dwconv` is 'reflect' and was 'zeros'",
    ),
    "prune": (lambda block: prune.l1_unstructured(block.dwconv, "weight", 0.5), "hooks sit on its `dwconv`"),
}
"""What is put into a block and only the published forward obeys."""


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES)
def test_the_published_forward_obeys_changes_with_one_warning(change, reason):
    block_module._warn_published_forward.cache_clear()
    pair = make_pair(use_grn=True)
    input, grad_output = torch.randn(2, 2, 24, 5, 5)
    unchanged = pair[0](input)
    for module in pair:
        change(module)
    with pytest.warns(UserWarning, match=f"a ConvNeXtBlock runs the published forward, in plain PyTorch: {reason}"):
        ours = run(pair[0], input, grad_output)
    theirs = run(pair[1], input, grad_output)
    assert relative_error(unchanged, theirs["output"]) > 1e-2
    assert max(relative_error(ours[name], value) for name, value in theirs.items() if value is not None) < 1e-5
    assert ours["output"].is_contiguous(memory_format=torch.channels_last)
    assert operators(pair[0], input) == 0


@pytest.mark.filterwarnings("ignore:a ConvNeXtBlock runs the published forward")
def test_pruned_weights_are_made_anew_at_every_step():
    block, _ = make_pair()
    prune.l1_unstructured(block.pwconv1, "weight", 0.5)
    optimizer = torch.optim.SGD(block.parameters(), 1e-2)
    for _ in range(2):
        block(torch.randn(2, 24, 5, 5)).square().mean().backward()
        optimizer.step()


def test_hooks_on_the_block_itself_and_those_taken_away_are_no_obstacle():
    block, _ = make_pair()
    block.register_forward_hook(lambda module, args, output: 2 * output)
    block.norm.register_forward_hook(lambda module, args, output: 2 * output).remove()
    assert operators(block, torch.randn(2, 24, 5, 5)) == 1


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_empty_batch_gives_an_empty_result_and_zero_gradients(version):
    block, _ = make_pair(drop_path=0.5, **OPTIONS[version])
    input = torch.empty(0, 24, 4, 4)
    results = run(block, input, input)
    assert results["output"].shape == results["gradient of input"].shape == (0, 24, 4, 4)
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape
        assert (parameter.grad == 0).all(), name


def test_nan_spreads_over_its_own_image_only():
    block, _ = make_pair()
    input = torch.randn(2, 24, 16, 16)
    input[0, 3, 8, 8] = float("nan")
    output = block(input)
    assert output[0, :, 5:12, 5:12].isnan().all()
    assert not output[0, :, :5].isnan().any()
    assert not output[1].isnan().any()


def test_copies_and_pickles_compute_the_same():
    block, _ = make_pair(use_grn=True)
    input = torch.randn(2, 24, 4, 4)
    expected = block(input)
    saved = io.BytesIO()
    torch.save(block.state_dict(), saved)
    saved.seek(0)
    loaded = ConvNeXtBlock(24, use_grn=True)
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), loaded):
        assert other(input).equal(expected)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"dim": 0}, "dim"),
        ({"kernel_size": 4}, "kernel_size"),
        ({"kernel_size": -3}, "kernel_size"),
        ({"dilation": 0}, "dilation"),
        ({"mlp_ratio": 0}, "mlp_ratio"),
        ({"drop_path": -0.1}, "drop_path"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"drop_path": float("nan")}, "drop_path"),
        ({"eps": 0}, "eps"),
        ({"activation": "relu"}, "activation"),
        ({"backend": "opencl"}, "backend"),
    ],
)
def test_bad_arguments_are_named(options, name):
    with pytest.raises(ValueError, match=rf"^{name}: got .*; accepted: "):
        ConvNeXtBlock(**({"dim": 8} | options))


@pytest.mark.parametrize(
    ("input", "error", "words"),
    [
        (torch.randn(1, 23, 4, 4), ValueError, "23 channels"),
        (torch.randn(24, 4, 4), ValueError, "input: got 3 dimensions"),
        (torch.ones(1, 24, 4, 4, dtype=torch.int64), TypeError, "input: got dtype torch.int64"),
        (torch.randn(1, 24, 4, 4, dtype=torch.float64), TypeError, "got dtype torch.float32"),
        (torch.randn(1, 24, 0, 4), ValueError, "input: got shape"),
    ],
    ids=["channels", "rank", "integers", "mixed", "no_rows"],
)
def test_bad_inputs_are_named(input, error, words):
    with pytest.raises(error, match=words):
        ConvNeXtBlock(24)(input)


def test_backend_of_the_block_and_of_the_context():
    input = torch.randn(1, 8, 4, 4)
    with pytest.raises(RuntimeError, match="cuda"):
        ConvNeXtBlock(8, backend="cuda")(input)
    with use_backend("cuda"):
        ConvNeXtBlock(8, backend="reference")(input)
        with pytest.raises(RuntimeError, match="cuda"):
            ConvNeXtBlock(8)(input)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_compiled_block_gives_the_same_values_and_gradients(version):
    torch.compiler.reset()
    block, _ = make_pair(**OPTIONS[version])
    input, grad_output = torch.randn(2, 2, 24, 7, 5)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    expected = run(block, input, grad_output)
    block.zero_grad()
    results = run(compiled, input, grad_output)
    assert max(relative_error(a, b) for a, b in zip(results.values(), expected.values(), strict=True)) < 1e-6


@pytest.mark.parametrize(
    "change",
    [lambda linear: parametrizations.weight_norm(linear), lambda linear: prune.l1_unstructured(linear, "weight", 0.5)],
    ids=["parametrised", "pruned"],
)
def test_a_changed_block_compiles_to_one_graph(change):
    torch.compiler.reset()
    pair = make_pair()
    for module in pair:
        change(module.pwconv1)
    input = torch.randn(2, 24, 7, 5)
    compiled = torch.compile(pair[0], fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(input), pair[1](input)) < 1e-5


def test_block_is_one_operator():
    block, _ = make_pair()
    program = torch.export.export(block, (torch.randn(2, 24, 7, 5),))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    operators = [name.split(".")[1] for name in called if name.startswith("convnext_kernels.")]
    assert operators == ["convnext_block"]
    assert not [name for name in called if "conv" in name and not name.startswith("convnext_kernels.")]


def saved_bytes(block, input):
    """Of all that autograd keeps for backward, but for the input and the parameters; each memory counted once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (input, *block.parameters())}
    saved = {}

    def note(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in known:
            saved[memory.data_ptr()] = memory.nbytes()
        held.append(tensor)  # no address is used twice
        return tensor

    held = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        block(input)
    return sum(saved.values())


@pytest.mark.parametrize(("recompute", "most"), [(False, 0.46), (True, 0.13)])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_what_is_saved_is_a_fraction_of_what_timm_saves(version, recompute, most):
    grn = version == "v2"
    ours = ConvNeXtBlock(96, recompute_hidden=recompute, use_grn=grn, layer_scale_init_value=None if grn else 1.0)
    theirs = timm.models.convnext.ConvNeXtBlock(96, use_grn=grn, ls_init_value=None if grn else 1.0)
    input = torch.randn(2, 96, 24, 24, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    assert saved_bytes(ours, input.requires_grad_()) <= most * saved_bytes(theirs, input)
