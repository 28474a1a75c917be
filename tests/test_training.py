"""Training beside the reference: loss curves, loss scaling, checkpointing, and what autograd promises its users."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import (
    INTERPRETED,
    LiveMemory,
    OperatorCalls,
    assert_accurate,
    assert_same,
    device_of,
    random_like,
    randomise,
    relative_error,
)
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from convnext_kernels.block import ConvNeXtBlock
from convnext_kernels.model import ConvNeXt
from convnext_kernels.parity import FACTOR
from convnext_kernels.reference import ReferenceBlock, ReferenceConvNeXt

VERSIONS: dict[str, dict[str, Any]] = {
    "v1": {"layer_scale_init_value": 1.0},
    "v2": {"use_grn": True, "layer_scale_init_value": None},
}
OPTIMIZERS = {"sgd": partial(torch.optim.SGD, lr=0.02, momentum=0.9), "adamw": partial(torch.optim.AdamW, lr=2e-3)}
SEEDS = range(3)
STEPS = 50

each_version = pytest.mark.parametrize("version", VERSIONS)
each_recompute = pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
each_precision = pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
each_kind_of_call = pytest.mark.parametrize(
    ("backend", "version", "recompute"),
    [*product(["reference"], VERSIONS, [False, True]), ("triton", "v1", False), ("triton", "v2", True)],
)


def make_network(kind: type[ReferenceConvNeXt], version: str, seed: int, **options: Any) -> ReferenceConvNeXt:
    """Two blocks, of which the second may drop its branch, with all around them that makes them a classifier."""
    network = kind((1, 1), (16, 24), num_classes=5, **VERSIONS[version], **options)
    randomise(network, seed)
    return network


def make_block(kind: type[ReferenceBlock], version: str = "v1", **options: Any) -> ReferenceBlock:
    block = kind(8, **VERSIONS[version], **options)
    randomise(block)
    return block


def make_input(batch: int = 3, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    images = random_like(torch.empty(batch, 8, 5, 4), seed=7).to(device, dtype)
    return images.contiguous(memory_format=torch.channels_last).requires_grad_()


def batches(seed: int, steps: int, size: int = 16, batch: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of each step: four batches over and over."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, batch, 3, size, size, generator=generator)
    labels = torch.randint(5, (4, batch), generator=generator)
    for step in range(steps):
        yield images[step % 4].clone(), labels[step % 4]


class Trainer:
    """Takes steps of training in the network's own dtype, or under autocast and with a scaled loss."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: str = "sgd",
        autocast: torch.dtype | None = None,
        **scaling: Any,
    ) -> None:
        self.network, self.autocast = network.train(), autocast
        self.optimizer = OPTIMIZERS[optimizer](network.parameters())
        self.scaler = torch.amp.GradScaler("cpu", enabled=bool(scaling), **scaling)
        torch.manual_seed(0)

    def step(self, images: Tensor, labels: Tensor) -> float:
        like = next(self.network.parameters())
        self.optimizer.zero_grad()
        with torch.autocast(like.device.type, self.autocast, enabled=self.autocast is not None):
            logits = self.network(images.to(like))
        loss = F.cross_entropy(logits.to(like.dtype), labels.to(like.device))
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()


def loss_curve(network: nn.Module, seed: int, optimizer: str, autocast: torch.dtype | None, **data: int) -> Tensor:
    trainer = Trainer(network, optimizer, autocast)
    return torch.tensor([trainer.step(*batch) for batch in batches(seed, **data)], dtype=torch.float64)


@cache
def reference_curves(
    version: str, drop_path: float, optimizer: str, dtype: torch.dtype, autocast: torch.dtype | None
) -> Tensor:
    """The reference's losses [seeds, steps]."""
    networks = [make_network(ReferenceConvNeXt, version, seed, drop_path_rate=drop_path).to(dtype) for seed in SEEDS]
    curves = [loss_curve(network, seed, optimizer, autocast, steps=STEPS) for seed, network in enumerate(networks)]
    return torch.stack(curves)


def assert_same_curve(ours: Tensor, theirs: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """On average over the steps our losses are as near to those of a run in float64 as the reference's own.

    Rounding grows along a run, in each by chance; so the mean distance is compared, with a unit in the loss to spare.
    """
    our_error, their_error = ((losses - exact).abs().mean() for losses in (ours, theirs))
    assert our_error <= FACTOR * their_error + torch.finfo(dtype).eps / 2 * exact.mean(), f"{our_error} {their_error}"


class TestLossCurves:
    @each_version
    @pytest.mark.parametrize(
        ("optimizer", "autocast", "recompute", "drop_path"),
        [
            ("sgd", None, False, 0.5),
            ("adamw", None, True, 0.0),
            ("adamw", torch.bfloat16, False, 0.0),
            ("adamw", torch.bfloat16, True, 0.5),
        ],
        ids=["sgd-dropped", "adamw-recomputed", "adamw-bfloat16", "adamw-bfloat16-recomputed-dropped"],
    )
    def test_of_50_steps(self, version, optimizer, autocast, recompute, drop_path):
        exact = reference_curves(version, drop_path, optimizer, torch.float64, None)
        theirs = reference_curves(version, drop_path, optimizer, torch.float32, autocast)
        options = {"drop_path_rate": drop_path, "recompute_hidden": recompute}
        networks = [make_network(ConvNeXt, version, seed, **options) for seed in SEEDS]
        ours = [loss_curve(network, seed, optimizer, autocast, steps=STEPS) for seed, network in enumerate(networks)]
        assert exact[:, -4:].mean() < 0.3 * exact[:, :4].mean()
        assert_same_curve(torch.stack(ours), theirs, exact, autocast or torch.float32)

    @pytest.mark.parametrize(
        ("version", "autocast", "recompute"),
        [("v1", None, True), ("v2", torch.float16, False)],
        ids=["v1-float32-recomputed", "v2-float16-saved"],
    )
    def test_of_kernels(self, version, autocast, recompute):
        device = device_of("triton")
        # On a GPU a seed draws other masks in float64.
        drop_path = 0.5 if INTERPRETED else 0.0
        curves = {}
        for name, kind, dtype in (
            ("ours", ConvNeXt, torch.float32),
            ("theirs", ReferenceConvNeXt, torch.float32),
            ("exact", ReferenceConvNeXt, torch.float64),
        ):
            network = make_network(kind, version, seed=1, drop_path_rate=drop_path).to(device, dtype)
            for block in network.modules():
                if isinstance(block, ConvNeXtBlock):
                    block.backend, block.recompute_hidden = "triton", recompute
            lower = None if name == "exact" else autocast
            curves[name] = loss_curve(network, 1, "sgd", lower, steps=3, size=8, batch=2)
        assert_same_curve(**curves, dtype=autocast or torch.float32)


def put_nan_into_the_input(network: nn.Module, images: Tensor) -> None:
    images[0, 1, 2, 3] = torch.nan


def put_infinity_into_a_gradient(network: nn.Module, images: Tensor) -> None:
    def spoil(block: nn.Module, grad_output: tuple[Tensor]) -> tuple[Tensor]:
        hook.remove()
        spoiled = grad_output[0].clone()
        spoiled[0, 1, 0, 1] = torch.inf
        return (spoiled,)

    hook = network.stages[1][0].register_full_backward_pre_hook(spoil)


class TestLossScaling:
    def run(
        self,
        kind: type[ReferenceConvNeXt],
        version: str,
        spoil: Callable[[nn.Module, Tensor], None] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, list[float], set[str]]:
        """Losses and scales of a run, and which parameters' gradients are not finite in the step that `spoil` spoils.

        That step must leave the parameters as they are.
        """
        network = make_network(kind, version, seed=2, drop_path_rate=0.5).to(dtype)
        scaling = {"init_scale": 2.0**10, "growth_interval": 5}
        trainer = Trainer(network, "adamw", torch.float16 if dtype == torch.float32 else None, **scaling)
        losses, scales, spoiled = [], [], set()
        for index, (images, labels) in enumerate(batches(2, STEPS)):
            before = {name: parameter.clone() for name, parameter in network.named_parameters()}
            if spoil is not None and index == 13:
                spoil(network, images)
            losses.append(trainer.step(images, labels))
            scales.append(trainer.scaler.get_scale())
            if spoil is not None and index == 13:
                assert_same(dict(network.named_parameters()), before)
                gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
                spoiled = {name for name, gradient in gradients.items() if not gradient.isfinite().all()}
        return torch.tensor(losses, dtype=torch.float64), scales, spoiled

    @each_version
    @pytest.mark.parametrize("spoil", [None, put_nan_into_the_input, put_infinity_into_a_gradient])
    def test_curve_and_scales(self, version, spoil):
        ours, scales, spoiled = self.run(ConvNeXt, version, spoil)
        theirs, their_scales, their_spoiled = self.run(ReferenceConvNeXt, version, spoil)
        exact, _, _ = self.run(ReferenceConvNeXt, version, spoil, torch.float64)
        assert scales == their_scales
        assert spoiled == their_spoiled
        if spoil is not None:
            assert scales[13] == scales[12] / 2
            assert {
                f"stages.0.0.{name}" for name, _ in make_block(ConvNeXtBlock, version).named_parameters()
            } <= spoiled
        assert torch.equal(ours.isnan(), exact.isnan())
        assert ours.isnan().sum() == (spoil is put_nan_into_the_input)
        finite = ~exact.isnan()
        assert_same_curve(ours[finite], theirs[finite], exact[finite], torch.float16)

    @each_version
    def test_a_scale_that_overflows_is_halved_at_every_step(self, version):
        network = make_network(ConvNeXt, version, seed=2)
        trainer = Trainer(network, "adamw", torch.float16, init_scale=2.0**32)
        before = {name: parameter.clone() for name, parameter in network.named_parameters()}
        for step, batch in enumerate(batches(2, 8)):
            trainer.step(*batch)
            assert trainer.scaler.get_scale() == 2.0 ** (31 - step)
        assert_same(dict(network.named_parameters()), before)


def results(module: nn.Module, input: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """The module's output, or that of a call in its place, and the gradients of the input and of every parameter."""
    leaves = {"input": input, **dict(module.named_parameters())}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    output = (call or module)(input)
    gradients = torch.autograd.grad(output, list(leaves.values()), random_like(output))
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def save_operators(save: bool) -> Callable[..., CheckpointPolicy]:
    """A policy of selective checkpointing for this package's operators; all others run again."""

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        ours = getattr(operator, "namespace", None) == "convnext_kernels"
        return CheckpointPolicy.MUST_SAVE if ours and save else CheckpointPolicy.MUST_RECOMPUTE

    return policy


CHECKPOINTS: dict[str, Callable[..., Tensor]] = {
    "non-reentrant": partial(checkpoint, use_reentrant=False),
    "operators recomputed": partial(
        checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, save_operators(False))
    ),
    "operators saved": partial(
        checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, save_operators(True))
    ),
}


class TestCheckpointing:
    @staticmethod
    def measured(
        checkpointed: Callable[..., Tensor] | None, version: str, recompute: bool, autocast: bool = True
    ) -> tuple[dict[str, Tensor], int, int]:
        """Results of two calls in a row, bytes alive between forward and backward, number of forward operators."""
        dtype = torch.float32 if autocast else torch.float64
        block = make_block(ConvNeXtBlock, version, drop_path=0.5, recompute_hidden=recompute).to(dtype)
        input = make_input(dtype=dtype)
        call = block if checkpointed is None else partial(checkpointed, block)
        torch.manual_seed(3)
        with OperatorCalls() as operators, LiveMemory() as memory:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = call(call(input))
            alive = memory.bytes()
            output.backward(random_like(output))
        gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
        forward = [operator for operator, _ in operators.calls if not operator._opname.endswith("backward")]
        return {"output": output.detach(), "input": input.grad, **gradients}, alive, len(forward)

    @each_version
    @each_recompute
    @pytest.mark.parametrize("kind", CHECKPOINTS)
    def test_same_bits_and_less_memory(self, version, recompute, kind):
        expected, all_alive, all_calls = self.measured(None, version, recompute)
        results, alive, calls = self.measured(CHECKPOINTS[kind], version, recompute)
        assert_same(results, expected)
        if kind == "operators saved":
            assert calls == all_calls and alive <= all_alive
        else:
            assert calls == 2 * all_calls and alive < all_alive

    @each_version
    @each_recompute
    def test_reentrant(self, version, recompute):
        """Forward runs without gradients first, where a block may round otherwise."""
        expected, all_alive, all_calls = self.measured(None, version, recompute, autocast=False)
        reentrant = partial(checkpoint, use_reentrant=True)
        results, alive, calls = self.measured(reentrant, version, recompute, autocast=False)
        assert max(relative_error(results[name], value) for name, value in expected.items()) < 1e-13
        assert calls == 2 * all_calls and alive < all_alive


class TestAutograd:
    @each_kind_of_call
    def test_a_block_used_twice(self, backend, version, recompute):
        device, dtype = device_of(backend), torch.float64 if backend == "reference" else torch.float32
        block = make_block(ConvNeXtBlock, version, recompute_hidden=recompute, backend=backend).to(device, dtype)
        reference = make_block(ReferenceBlock, version).to(device, dtype)
        input = make_input(2, dtype, device)
        ours, theirs = (results(module, input, nn.Sequential(module, module)) for module in (block, reference))
        assert max(relative_error(ours[name], theirs[name]) for name in theirs) < 100 * torch.finfo(dtype).eps

    @each_kind_of_call
    def test_backward_twice_doubles_every_gradient(self, backend, version, recompute):
        device = device_of(backend)
        block = make_block(ConvNeXtBlock, version, recompute_hidden=recompute, backend=backend).to(device)
        input = make_input(2, device=device)
        output = block(input)
        gradient = random_like(output)
        output.backward(gradient, retain_graph=True)
        leaves = {"input": input, **dict(block.named_parameters())}
        once = {name: leaf.grad.clone() for name, leaf in leaves.items()}
        output.backward(gradient)
        assert_same({name: leaf.grad for name, leaf in leaves.items()}, {n: 2 * g for n, g in once.items()})
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            output.backward(gradient)

    @each_version
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_gradients_of_micro_batches_accumulate_in_float32(self, version, dtype):
        images, runs = make_input(6).detach(), {}
        for name, kind, precision in (
            ("ours", ConvNeXtBlock, torch.float32),
            ("theirs", ReferenceBlock, torch.float32),
            ("exact", ReferenceBlock, torch.float64),
        ):
            block, parts = make_block(kind, version).to(precision), []
            for micro_batch in images.to(precision).split(2):
                with torch.autocast("cpu", dtype, enabled=name != "exact"):
                    output = block(micro_batch)
                grad_output = random_like(micro_batch).to(output.dtype)
                parts.append(torch.autograd.grad(output, list(block.parameters()), grad_output, retain_graph=True))
                output.backward(grad_output)
            runs[name] = {name: parameter.grad for name, parameter in block.named_parameters()}
            sums = [first + second + third for first, second, third in zip(*parts, strict=True)]
            assert_same(runs[name], dict(zip(runs[name], sums, strict=True)))
            assert {gradient.dtype for gradient in runs[name].values()} == {precision}
        assert_accurate(**runs, dtype=dtype)

    @each_version
    def test_functional_call(self, version):
        block, other = make_block(ConvNeXtBlock, version), make_block(ConvNeXtBlock, version)
        randomise(other, seed=1)
        input = make_input()
        own, parameters = block(input), dict(other.named_parameters())
        called = results(other, input, lambda input: torch.func.functional_call(block, parameters, (input,)))
        assert_same(called, results(other, input))
        assert torch.equal(own, block(input)) and relative_error(called["output"], own) > 1e-2

    @pytest.mark.filterwarnings("ignore:.*batching rule")
    def test_vmap_is_a_loop_over_samples(self):
        block, images = make_block(ConvNeXtBlock), make_input()
        expected = results(block, images)
        mapped = results(block, images, torch.func.vmap(lambda image: block(image[None])[0]))
        assert max(relative_error(mapped[name], value) for name, value in expected.items()) < 1e-5

    @pytest.mark.parametrize(
        "derivative",
        [
            lambda block, input: torch.func.grad(lambda images: block(images).sum())(input),
            lambda block, input: torch.func.jvp(block, (input,), (input,)),
            lambda block, input: torch.func.jvp(block.requires_grad_(False), (input,), (input,)),
        ],
        ids=["grad", "jvp", "jvp, frozen"],
    )
    def test_derivatives_of_torch_func_are_an_error(self, derivative):
        with pytest.raises(RuntimeError, match="functorch transforms"):
            derivative(make_block(ConvNeXtBlock), make_input().detach())

    @pytest.mark.parametrize("trained", [False, True])
    def test_forward_mode_is_an_error(self, trained):
        block, input = make_block(ConvNeXtBlock).requires_grad_(trained), make_input().detach()
        with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
            block(torch.autograd.forward_ad.make_dual(input, input))

    @each_version
    @each_recompute
    def test_a_second_derivative_is_an_error(self, version, recompute):
        block, input = make_block(ConvNeXtBlock, version, recompute_hidden=recompute), make_input()
        (gradient,) = torch.autograd.grad(block(input).square().sum(), input, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()

    @each_version
    @each_recompute
    @each_precision
    def test_a_tensor_changed_before_backward_is_an_error_or_of_no_effect(self, version, recompute, autocast):
        options = {"recompute_hidden": recompute}
        names = ["input", *dict(make_block(ConvNeXtBlock, version).named_parameters())]
        raised = set()
        for changed in (None, *names):
            block, leaf = make_block(ConvNeXtBlock, version, **options), make_input()
            input = leaf * 1
            leaves = {"input": leaf, **dict(block.named_parameters())}
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = block(input)
            with torch.no_grad():
                if changed is not None:
                    {**leaves, "input": input}[changed].add_(1)
            try:
                output.backward(random_like(output))
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
                raised.add(changed)
                continue
            gradients = {name: leaf.grad for name, leaf in leaves.items()}
            if changed is None:
                expected = gradients
            assert_same(gradients, expected)
        assert {"dwconv.weight", "pwconv1.weight", "pwconv2.weight"} <= raised
        assert autocast or "input" in raised

    @each_version
    @each_precision
    def test_the_output_may_be_changed_in_place(self, version, autocast):
        block, input = make_block(ConvNeXtBlock, version), make_input()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert_same(
                results(block, input, lambda x: block(x).mul_(2)), results(block, input, lambda x: 2 * block(x))
            )

    @each_version
    @each_precision
    def test_weights_are_read_anew_after_a_step(self, version, autocast):
        block, input = make_block(ConvNeXtBlock, version), make_input()
        optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            before = block(input)
            before.sum().backward()
            optimizer.step()
            after = results(block, input)
            fresh = make_block(ConvNeXtBlock, version)
            fresh.load_state_dict(block.state_dict())
            assert_same(after, results(fresh, input))
        assert relative_error(before, after["output"]) > 1e-2


TRAINED: dict[str, Callable[[str], bool]] = {
    "all but the norm": lambda name: not name.startswith("norm"),
    "the convolution": lambda name: name.startswith("dwconv"),
    "the MLP": lambda name: name.startswith("pwconv"),
    "the biases": lambda name: name.endswith("bias"),
    "all but the input": lambda name: name != "input",
}
ALONE = [
    (version, name)
    for version, options in VERSIONS.items()
    for name in ("input", *dict(ReferenceBlock(1, **options).named_parameters()))
]


@each_recompute
@pytest.mark.parametrize(("version", "trained"), [*product(VERSIONS, TRAINED), *ALONE])
def test_frozen_tensors_change_no_gradient_and_get_none(version, recompute, trained):
    block, input = make_block(ConvNeXtBlock, version, recompute_hidden=recompute), make_input()
    expected = results(block, input)
    leaves = {"input": input, **dict(block.named_parameters())}
    names = {name for name in leaves if TRAINED.get(trained, trained.__eq__)(name)}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in names)
    output = block(input)
    output.backward(random_like(output))
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert gradients.keys() == names
    assert_same({"output": output.detach(), **gradients}, {n: expected[n] for n in ("output", *names)})
