"""Models of other libraries compute with our operators what they computed without, and go back to it."""

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import pytest
import torch
from hosts import HOSTS, OTHERS, Host
from support import random_like, randomise
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from convnext_kernels.accelerate import accelerate, restore
from convnext_kernels.accelerate.blocks import drop_rate
from convnext_kernels.parity import FACTOR, errors

TOLERANCE = 1e-5
UNIT = torch.finfo(torch.bfloat16).eps / 2
SEED = 5

each_host = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)


def step(host: Host, model: nn.Module, autocast: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All that a training step computes: the outputs and the gradients of the images and of every parameter."""
    images = host.images().bfloat16().to(dtype).requires_grad_()
    torch.manual_seed(SEED)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = host.outputs(model, images)
    leaves = {"images": images, **dict(model.named_parameters())}
    grad_outputs = [random_like(output, seed) for seed, output in enumerate(outputs.values())]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), grad_outputs, allow_unused=True)
    found = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return {name: output.detach() for name, output in outputs.items()} | found


def drop_paths(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if drop_rate(module)}


@contextmanager
def recorded_drops(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Which samples each stochastic depth of a host keeps, call by call."""
    kept: dict[str, list[Tensor]] = defaultdict(list)

    def hook_of(name: str) -> Any:
        return lambda module, inputs, output: kept[name].append(output.detach().flatten(1).any(1))

    hooks = [module.register_forward_hook(hook_of(name)) for name, module in drop_paths(model).items()]
    yield kept
    for hook in hooks:
        hook.remove()


@contextmanager
def replayed_drops(model: nn.Module, kept: dict[str, list[Tensor]]) -> Iterator[None]:
    """Stochastic depth that keeps those samples."""

    def forward_of(calls: Iterator[Tensor], keep: float) -> Any:
        return lambda input: input * next(calls).double().div(keep).view(-1, *[1] * (input.dim() - 1))

    for name, module in drop_paths(model).items():
        module.forward = forward_of(cycle(kept[name]), 1 - drop_rate(module))
    yield


def assert_same_step(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    differences = {name: errors(ours[name], theirs[name].double())[0] for name in theirs}
    assert max(differences.values()) < TOLERANCE, {n: d for n, d in differences.items() if not d < TOLERANCE}


def attributes_of(model: nn.Module) -> dict[str, tuple[type, set[str]]]:
    return {name: (type(module), set(vars(module))) for name, module in model.named_modules()}


@each_host
def test_a_training_step_is_the_hosts(host):
    theirs = host.make()
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    expected = step(host, theirs)
    assert_same_step(step(host, ours), expected)
    with torch.no_grad():
        kept = host.outputs(theirs.eval(), host.images())
    assert host.drops == any(errors(expected[name], value.double())[0] > 0.1 for name, value in kept.items())


@each_host
def test_autocast_is_as_exact_as_the_hosts(host):
    theirs = host.make()
    ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    accelerate(ours)
    with recorded_drops(theirs) as kept:
        their_step = step(host, theirs, autocast=True)
    our_step = step(host, ours, autocast=True)
    with replayed_drops(exact, kept):
        truth = step(host, exact, dtype=torch.float64)
    assert our_step.keys() == their_step.keys() == truth.keys()
    our_errors, their_errors = (
        torch.tensor([errors(found[name], value)[0] for name, value in truth.items()])
        for found in (our_step, their_step)
    )
    typical = their_errors.square().mean().sqrt()
    assert our_errors.square().mean().sqrt() <= FACTOR * typical + UNIT
    worse = our_errors > 2 * their_errors.clamp_min(typical) + UNIT  # single ones are a matter of luck
    assert not worse.any(), [(name, our_errors[i], their_errors[i]) for i, name in enumerate(truth) if worse[i]]


def test_a_long_stage_with_float32_residuals_is_as_exact_as_the_hosts():
    """Sums that are rounded to 16 bits one after the other are ten times as far off."""
    theirs = nn.Sequential(*[ConvNeXtBlock(32) for _ in range(27)])
    randomise(theirs)
    for block in theirs:
        block.gamma.data *= 0.1
    images = torch.randn(2, 32, 6, 6, generator=torch.Generator().manual_seed(1)).bfloat16()

    def results(model, dtype=torch.float32):
        input = images.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            output = model(input)
        assert output.dtype == dtype
        return output.detach(), *torch.autograd.grad(output, input, random_like(output))

    truth = results(copy.deepcopy(theirs).double(), torch.float64)
    found = {"theirs": results(theirs)}
    for float32_residual in (False, True):
        ours = copy.deepcopy(theirs)
        assert len(accelerate(ours, float32_residual=float32_residual).converted) == len(ours)
        found[float32_residual] = results(ours)
    for value, host, rounded, kept in zip(truth, found["theirs"], found[False], found[True], strict=True):
        assert errors(kept, value)[0] <= FACTOR * errors(host, value)[0]
        assert errors(rounded, value)[0] > 3 * errors(kept, value)[0]


@each_host
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_results_lie_in_memory_as_the_hosts(host, autocast):
    theirs = host.make()
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        images = host.images().to(memory_format=memory_format)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got, expected = host.outputs(ours, images), host.outputs(theirs, images)
        for name, output in expected.items():
            assert got[name].shape == output.shape
            assert got[name].dtype in (output.dtype, torch.float32)  # on a GPU autocast's norms return float32
            if not (host.follows and output.is_contiguous()):
                assert got[name].is_contiguous() == output.is_contiguous(), name


@pytest.mark.parametrize("name", ["timm tiny", "timm V2 atto", "torchvision", "transformers", "transformers V2"])
def test_drop_path_is_drawn_on_the_dtype_of_the_hosts_branch(name, monkeypatch):
    """The random numbers of a seed may depend on it; on a CPU they hardly do, and no mask would show it."""
    host = HOSTS[name]
    theirs = host.make()
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    drawn: list[Any] = []
    for kind in {type(module) for module in drop_paths(theirs).values()}:

        def forward(self: nn.Module, input: Tensor, original: Any = kind.forward) -> Tensor:
            drawn.extend([(input.dtype, len(input), input.dim())] * bool(drop_rate(self)))
            return original(self, input)

        monkeypatch.setattr(kind, "forward", forward)
    for model in (theirs, ours):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            host.outputs(model, host.images())
    half = len(drawn) // 2
    assert half == len(drop_paths(theirs)) > 0 and drawn[:half] == drawn[half:]


@each_host
def test_all_that_can_be_is_converted_and_restored(host):
    model = host.make().eval()
    before = host.outputs(model, host.images())
    state, attributes = model.state_dict(), attributes_of(model)
    tensors = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    report = accelerate(model)
    assert Counter(report.hosts.values()) == host.converted
    assert Counter(report.skipped.values()) == host.skipped
    assert attributes_of(model) != attributes
    assert isinstance(model.get_submodule(report.converted[0]), attributes[report.converted[0]][0])
    assert list(model.state_dict()) == list(state)
    assert {id(tensor) for tensor in (*model.parameters(), *model.buffers())} == tensors
    assert any(not output.equal(before[name]) for name, output in host.outputs(model, host.images()).items())
    assert restore(model) == tuple(name for name, _ in model.named_modules() if name in report.converted)
    assert attributes_of(model) == attributes
    after = host.outputs(model, host.images())
    assert after.keys() == before.keys() and all(output.equal(before[name]) for name, output in after.items())


@pytest.mark.parametrize("host", OTHERS.values(), ids=OTHERS)
def test_other_blocks_are_left_alone_and_the_reason_is_said(host):
    model = host.make().eval()
    attributes = attributes_of(model)
    with pytest.warns(UserWarning, match="changed nothing"):
        report = accelerate(model)
    assert not report.converted and Counter(report.skipped.values()) == host.skipped
    assert attributes_of(model) == attributes
    assert all(reason in str(report) for reason in host.skipped)
