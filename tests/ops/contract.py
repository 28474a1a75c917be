"""What every operator must keep, written once: a test class for each names its examples and inherits these tests."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from support import (
    ACTIVATIONS,
    DTYPES,
    OperatorCalls,
    arguments_of,
    assert_accurate,
    assert_parity,
    assert_same,
    device_of,
    evaluate,
    leaves_of,
    random_like,
    relative_error,
    with_dtype,
    without_gradients,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from convnext_kernels import parity
from convnext_kernels.functional import OPERATORS

INTERPRETED_DTYPES = (torch.float32, torch.float16)
SIZES = {"batch": 3, "channels": 5, "height": 4, "width": 6}

BAD_INPUTS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "integers": (Tensor.int, TypeError, r"dtype torch.int32; accepted: float16, bfloat16, float32, float64"),
    "complex": (lambda t: t.to(torch.complex64), TypeError, r"dtype torch.complex64; accepted: float16, bfloat16"),
    "no tensor": (lambda t: t.tolist(), TypeError, r"list; accepted: a torch.Tensor"),
    "rank 2": (lambda t: t.flatten(1), ValueError, r"2 dimensions \[3, \d+\]; accepted: .*\[N, C, H, W\]"),
    "no pixels": (lambda t: t[..., :0], ValueError, r"shape \[.*0\]; accepted: only the batch may be empty"),
}
BAD_PARAMETERS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "shape": (lambda t: t.unsqueeze(0), ValueError, r"shape \[1, .*\]; accepted: .*\[.*\d.*\]"),
    "device": (lambda t: t.to("meta"), ValueError, r"device meta; accepted: the input's cpu"),
    "float16": (Tensor.half, TypeError, r"dtype torch.float16; accepted: torch.float32 with an input of torch.float32"),
    "float64": (
        Tensor.double,
        TypeError,
        r"dtype torch.float64; accepted: torch.float32 with an input of torch.float32",
    ),
    "integers": (Tensor.int, TypeError, r"dtype torch.int32; accepted: torch.float32 with an input of torch.float32"),
    "no tensor": (lambda t: t.tolist(), TypeError, r"list; accepted: a torch.Tensor"),
}


def strided(parameter: Tensor) -> Tensor:
    """The same values in every second element of a memory whose others are NaN, the last two axes exchanged."""
    swapped = parameter.transpose(0, -1)
    return torch.stack([swapped, torch.full_like(swapped, torch.nan)], -1)[..., 0].transpose(0, -1)


class ZerosMade(TorchDispatchMode):
    """Notes the shape of every tensor of zeros that PyTorch makes within the context."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "zero" in function.__name__:
            self.shapes.append(result.shape)
        return result


class Contract:
    """The tests of one operator, collected by inheriting from this class."""

    operator: ClassVar[str]
    cheap_float16: ClassVar[tuple[str, ...] | None] = None
    """The cases that Triton's interpreter runs in float16; None for all."""
    special_values: ClassVar[tuple[float, ...]] = (torch.nan, torch.inf)
    spreading: ClassVar[tuple[str, ...]] = ()
    """Results that are NaN in PyTorch's own kernels, and so in the reference, where they need not be."""

    @staticmethod
    def examples(batch: int, channels: int, height: int, width: int) -> list[parity.Case]:
        """Small calls: the first with all optional arguments, the last with none."""
        raise NotImplementedError

    @property
    def function(self) -> Callable[..., Tensor]:
        return OPERATORS[self.operator]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        examples, small = self.examples(**SIZES), parity.cases(self.operator, small=True)
        values: dict[str, list[Any]] = {
            "example": examples,
            "small_case": small,
            "any_case": parity.cases(self.operator, small=False),
            "interpreted": [
                pytest.param((case, dtype), id=f"{case.name}-{dtype}")
                for dtype in INTERPRETED_DTYPES
                for case in small
                if dtype == torch.float32 or self.cheap_float16 is None or case.name in self.cheap_float16
            ],
            "parameter": [name for name in examples[0].shapes if name not in ACTIVATIONS],
            "value": self.special_values,
            "layout": parity.LAYOUTS,
            "backend": ("reference", "triton"),
            "dtype": DTYPES,
        }
        if {"example", "backend"} <= set(metafunc.fixturenames):
            # The interpreter is slow: with all optional arguments and with none has to do.
            pairs = [*(("reference", e) for e in examples), ("triton", examples[0]), ("triton", examples[-1])]
            metafunc.parametrize(("backend", "example"), pairs, ids=lambda value: getattr(value, "name", value))
            del values["backend"], values["example"]
        for name in [name for name in metafunc.fixturenames if name in values]:
            metafunc.parametrize(name, values[name], ids=lambda value: getattr(value, "name", str(value)))

    def full(self, **sizes: int) -> parity.Case:
        """The example with all optional arguments."""
        return self.examples(**{**SIZES, **sizes})[0]

    def resized(self, example: parity.Case, **sizes: int) -> parity.Case:
        """An example at other sizes."""
        return next(case for case in self.examples(**{**SIZES, **sizes}) if case.name == example.name)

    def on(self, backend: str, **options: Any) -> Callable[..., Tensor]:
        return partial(self.function, backend=backend, **options)

    def definition(self, **arguments: Any) -> Tensor:
        return parity.DEFINITIONS[self.operator](**arguments)

    # Values

    def test_reference_is_the_definition(self, example, layout):
        arguments = arguments_of(example, torch.float64, layout=layout)
        ours, theirs = (evaluate(f, arguments) for f in (self.on("reference"), self.definition))
        assert max(relative_error(ours[name], theirs[name]) for name in theirs) < 1e-13

    def test_gradcheck(self, example):
        arguments = arguments_of(self.resized(example, batch=2, channels=4, height=3, width=2), torch.float64)
        leaves = leaves_of(arguments)

        def call(*tensors):
            return self.function(**{**arguments, **dict(zip(leaves, tensors, strict=True))})

        assert torch.autograd.gradcheck(call, tuple(leaves.values()))

    def test_reference_parity(self, small_case, dtype):
        assert_parity(small_case, dtype, "cpu", "reference")

    def test_triton_parity(self, interpreted):
        case, dtype = interpreted
        assert_parity(case, dtype, device_of("triton"), "triton")

    @pytest.mark.gpu
    @pytest.mark.parametrize("kernels", ["triton", "cuda"])
    def test_gpu_parity(self, any_case, dtype, kernels):
        reasons = parity.unsupported(any_case, dtype, "cuda", kernels)
        if reasons:
            pytest.skip("; ".join(reasons))
        assert_parity(any_case, dtype, "cuda", kernels)

    def test_float32_parameters_of_16_bit_activations(self, example, backend):
        device = device_of(backend)
        dtype = torch.float16 if backend == "triton" else torch.bfloat16
        arguments = arguments_of(example, dtype, parameters=torch.float32, device=device)
        exact = evaluate(self.definition, with_dtype(arguments, torch.float64))
        theirs = evaluate(self.definition, with_dtype(arguments, dtype))
        ours = evaluate(self.on(backend), arguments)
        assert_accurate(ours, theirs, exact, dtype)
        assert ours["output"].dtype == dtype
        for name, leaf in leaves_of(arguments).items():
            assert ours[f"grad {name}"].dtype == leaf.dtype, name

    def test_autocast(self, example):
        arguments = arguments_of(example)
        exact = evaluate(self.definition, with_dtype(arguments, torch.float64))
        theirs = evaluate(self.definition, with_dtype(arguments, torch.bfloat16))
        with torch.autocast("cpu", torch.bfloat16):
            output = self.function(**arguments)
        ours = evaluate(lambda **_: output, arguments)
        assert output.dtype == torch.bfloat16
        assert all(ours[f"grad {name}"].dtype == torch.float32 for name in leaves_of(arguments))
        assert_accurate(ours, theirs, exact, torch.bfloat16)

    # Layouts

    def test_layouts_give_the_same_bits_in_channels_last_memory(self, example, layout, backend):
        given = arguments_of(example, layout=layout, device=device_of(backend))
        dense = {
            name: value.detach().clone(memory_format=torch.contiguous_format).requires_grad_(value.requires_grad)
            if isinstance(value, Tensor)
            else value
            for name, value in given.items()
        }
        expected = evaluate(self.on(backend), dense)
        grad = parity.LAYOUTS[layout](random_like(expected["output"]))
        got = evaluate(self.on(backend), given, grad)
        assert_same(got, evaluate(self.on(backend), dense, grad.contiguous()))
        for name in ("output", "grad input"):
            memory = torch.channels_last if got[name].dim() == 4 else torch.contiguous_format
            assert got[name].is_contiguous(memory_format=memory), name

    def test_parameters_of_any_strides(self, example, backend):
        dense = arguments_of(example, device=device_of(backend))
        given = {
            name: strided(value.detach()).requires_grad_(value.requires_grad)
            if isinstance(value, Tensor) and name not in ACTIVATIONS
            else value
            for name, value in dense.items()
        }
        got, expected = evaluate(self.on(backend), given), evaluate(self.on(backend), dense)
        assert max(relative_error(got[name], value) for name, value in expected.items()) < 1e-6

    # Special values

    def test_empty_batch(self, example, backend):
        arguments = arguments_of(self.resized(example, batch=0), device=device_of(backend))
        results, full = evaluate(self.on(backend), arguments), self.definition(**arguments_of(example))
        assert results["output"].shape == (0, *full.shape[1:])
        for name, leaf in leaves_of(arguments).items():
            assert torch.equal(results[f"grad {name}"], torch.zeros_like(leaf)), name

    @pytest.mark.parametrize("place", ["input", "grad_output"])
    def test_nan_and_inf_reach_what_depends_on_them_and_nothing_else(self, example, backend, place, value):
        arguments = without_gradients(arguments_of(example, device=device_of(backend)))
        grad = random_like(self.definition(**arguments))

        def results(function, change, dtype):
            values = with_dtype(arguments, dtype)
            changed = {"input": values["input"].clone(), "grad_output": grad.to(dtype)}
            place_of = changed[place] = changed[place].clone()
            place_of[(0, *[size // 2 for size in place_of.shape[1:]])] = change
            for name, tensor in values.items():
                if isinstance(tensor, Tensor) and name != "drop_path_factor":
                    values[name] = (changed["input"] if name == "input" else tensor).requires_grad_()
            return evaluate(function, values, changed["grad_output"])

        ours = results(self.on(backend), value, torch.float32)
        before, after = (results(self.definition, change, torch.float64) for change in (1.0, -2.0))
        for name, result in ours.items():
            touched, depends = ~result.isfinite(), (before[name] - after[name]).abs() > 1e-9
            if backend == "reference" and name in self.spreading:
                touched = touched & depends
            assert torch.equal(touched, depends), name

    # Autograd

    def test_two_runs_give_the_same_bits(self, example, backend):
        arguments = arguments_of(example, device=device_of(backend))
        assert_same(*(evaluate(self.on(backend), arguments) for _ in range(2)))

    def test_frozen_arguments_change_no_other_gradient(self, backend):
        arguments = arguments_of(self.full(), device=device_of(backend))
        expected, names = evaluate(self.on(backend), arguments), tuple(leaves_of(arguments))
        only_one = [tuple(other for other in names if other != name) for name in names]
        for frozen in [*only_one, names[::2], names[1::2], names]:
            got = evaluate(self.on(backend), without_gradients(arguments, frozen))
            assert_same(got, {n: value for n, value in expected.items() if n.removeprefix("grad ") not in frozen})

    def test_backward_fills_no_zeros(self):
        """PyTorch would make a gradient of zeros for each tensor an operator saved, hidden activations included."""
        leaves = arguments_of(self.full())
        output = self.on("reference")(**leaves)
        with ZerosMade() as zeros:
            torch.autograd.grad(output, list(leaves_of(leaves).values()), random_like(output))
        assert zeros.shapes == []

    def test_a_second_derivative_is_an_error(self, backend):
        arguments = arguments_of(self.full(), device=device_of(backend))
        output, leaves = self.on(backend)(**arguments), list(leaves_of(arguments).values())
        grad = random_like(output).requires_grad_()
        gradients = torch.autograd.grad(output, leaves, grad, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            sum(g.square().sum() for g in gradients).backward()

    # Registration

    def opcheck(self, arguments, backend):
        """Checks the operators that a call runs: forward with and without what backward needs, and backward."""
        with OperatorCalls() as recorded:
            evaluate(self.on(backend), arguments)
            with torch.no_grad():
                self.on(backend)(**arguments)
        names = [function._schema.name.split("::")[1] for function, _ in recorded.calls]
        assert names == [self.operator, f"{self.operator}_backward", self.operator]
        for name, (function, args) in zip(names, recorded.calls, strict=True):
            if name != self.operator:
                args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
            torch.library.opcheck(function, args)

    def test_opcheck_layouts(self, example, layout):
        self.opcheck(arguments_of(example, layout=layout), "reference")

    @pytest.mark.parametrize("sizes", [{"batch": 0}, {"height": 1, "width": 1}, {"channels": 1}, {"batch": 1}], ids=str)
    def test_opcheck_sizes(self, sizes):
        self.opcheck(arguments_of(self.full(**sizes), layout="contiguous"), "reference")

    def test_opcheck_triton(self):
        self.opcheck(arguments_of(self.examples(**SIZES)[-1], device=device_of("triton")), "triton")

    def test_opcheck_16_bit(self):
        self.opcheck(arguments_of(self.full(), torch.bfloat16, parameters=torch.float32), "reference")

    def test_compiled(self, example, backend):
        torch._dynamo.reset()
        arguments, function = arguments_of(example, device=device_of(backend)), self.on(backend)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_same(evaluate(compiled, arguments), evaluate(function, arguments))
        with torch.no_grad():
            assert torch.equal(compiled(**arguments), function(**arguments))

    def test_compiled_once_for_all_sizes(self):
        torch._dynamo.reset()
        compiled = torch.compile(self.function, fullgraph=True, backend="aot_eager", dynamic=True)
        evaluate(compiled, arguments_of(self.full(batch=4, channels=5, height=6, width=7)))
        with torch._dynamo.config.patch(error_on_recompile=True):
            arguments = arguments_of(self.full(batch=8, channels=5, height=9, width=10))
            assert_same(evaluate(compiled, arguments), evaluate(self.function, arguments))

    def test_exported(self, example):
        arguments = without_gradients(arguments_of(example))

        class Call(torch.nn.Module):
            def forward(_, **tensors):
                return self.function(**tensors)

        exported = torch.export.export(Call(), (), arguments)
        names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
        assert f"convnext_kernels.{self.operator}.default" in names
        assert torch.equal(exported.module()(**arguments), self.function(**arguments))

    # Errors

    def assert_refused(self, changes, exception, message):
        """The call raises this exception, its message naming the argument from its start, and no operator has run."""
        arguments = without_gradients(arguments_of(self.full(), layout="contiguous"))
        with OperatorCalls() as recorded, pytest.raises(exception, match=f"^{message}") as raised:
            self.function(**{**arguments, **changes(arguments)})
        assert type(raised.value) is exception
        assert not recorded.calls

    @pytest.mark.parametrize("kind", BAD_INPUTS)
    def test_bad_input(self, kind):
        change, exception, message = BAD_INPUTS[kind]
        self.assert_refused(lambda a: {"input": change(a["input"])}, exception, f"input: got {message}")

    def test_channels_that_do_not_fit(self):
        wide = arguments_of(self.full(channels=6))["input"]
        self.assert_refused(lambda _: {"input": wide}, ValueError, r"\w+: got shape \[.*5.*\]; accepted: .*\b6\b")

    @pytest.mark.parametrize("kind", BAD_PARAMETERS)
    def test_bad_parameter(self, parameter, kind):
        change, exception, message = BAD_PARAMETERS[kind]
        self.assert_refused(lambda a: {parameter: change(a[parameter])}, exception, f"{parameter}: got {message}")

    def test_input_on_another_device(self):
        message = r"\w+: got device cpu; accepted: the input's meta"
        self.assert_refused(lambda a: {"input": a["input"].to("meta")}, ValueError, message)

    def test_meta_tensors_have_shape_and_strides(self, example):
        arguments = without_gradients(arguments_of(example))
        meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in arguments.items()}
        output, expected = self.function(**meta), self.function(**arguments)
        assert (output.shape, output.stride(), output.dtype) == (expected.shape, expected.stride(), expected.dtype)

    def test_unknown_backend(self):
        message = "backend: got 'fastest'; accepted: 'auto', 'cuda', 'triton', 'reference'"
        self.assert_refused(lambda _: {"backend": "fastest"}, ValueError, message)

    # What only a GPU has

    @pytest.mark.gpu
    @pytest.mark.parametrize("kernels", ["triton", "cuda"])
    def test_side_stream(self, kernels):
        arguments, function = self.gpu_call(kernels)
        expected = function(**arguments)
        late, stream = {**arguments, "input": torch.zeros_like(arguments["input"])}, torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            late["input"].copy_(arguments["input"])
            output = function(**late)
        stream.synchronize()
        assert torch.equal(output, expected)

    @pytest.mark.gpu
    @pytest.mark.parametrize("kernels", ["triton", "cuda"])
    def test_second_device(self, kernels):
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two CUDA devices")
        arguments, function = self.gpu_call(kernels)
        moved = {n: v.to("cuda:1") if isinstance(v, Tensor) else v for n, v in arguments.items()}
        moved = {n: v.requires_grad_(n != "drop_path_factor") if isinstance(v, Tensor) else v for n, v in moved.items()}
        results = evaluate(function, moved)
        assert {result.device for result in results.values()} == {torch.device("cuda:1")}
        assert torch.equal(results["output"].to("cuda:0"), function(**arguments))

    @pytest.mark.gpu
    @pytest.mark.parametrize("kernels", ["triton", "cuda"])
    def test_cuda_graph(self, kernels):
        arguments, function = self.gpu_call(kernels)
        expected = function(**arguments)
        static, graph = {**arguments, "input": torch.zeros_like(arguments["input"])}, torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = function(**static)
        static["input"].copy_(arguments["input"])
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, expected)

    def gpu_call(self, kernels):
        """The example on the GPU, and the operator on a backend; skips the test if that cannot run."""
        reasons = parity.unsupported(self.full(), torch.float16, "cuda", kernels)
        if reasons:
            pytest.skip("; ".join(reasons))
        return without_gradients(arguments_of(self.full(), torch.float16, device="cuda")), self.on(kernels)
