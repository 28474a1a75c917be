"""What every operator must keep, written once: a test class for each names its examples and inherits these tests."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from ptx import running
from support import (
    ACTIVATIONS,
    BACKENDS,
    DTYPES,
    INTERPRETED,
    INTERPRETED_DTYPES,
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


def name_of(value: Any) -> str:
    """Of a case its own, of a tuple those of its parts, of others as they are written."""
    return "-".join(map(name_of, value)) if isinstance(value, tuple) else getattr(value, "name", str(value))


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
    sizes: ClassVar[dict[str, int]] = {"batch": 3, "channels": 5, "height": 4, "width": 6}
    """Of the examples."""
    more_cases: ClassVar[tuple[parity.Case, ...]] = ()
    """What the CUDA kernels are checked on besides `parity.cases`; on a GPU all kernels."""
    more_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16)
    """Of those cases: the 16-bit types share their code."""
    sixteen_bit: ClassVar[torch.dtype] = torch.bfloat16
    """Of what CUDA kernels must keep besides accuracy."""
    cheap_float16: ClassVar[tuple[str, ...] | None] = None
    """The cases that Triton's interpreter runs in float16; None for all."""
    special_values: ClassVar[tuple[float, ...]] = (torch.nan, torch.inf)
    spreading: ClassVar[tuple[str, ...]] = ()
    """Results that may be NaN elsewhere in a channel that holds one: in PyTorch's own kernels and on tensor cores."""

    folds: ClassVar[bool] = False
    """Whether a call that saves for backward folds weights, and so rounds its output differently."""

    @staticmethod
    def examples(batch: int, channels: int, height: int, width: int) -> list[parity.Case]:
        """Small calls: the first with all optional arguments, the last with none."""
        raise NotImplementedError

    def example_cases(self, **sizes: int) -> list[parity.Case]:
        """The examples at sizes of which some may be given."""
        return self.examples(**{**self.sizes, **sizes})

    @property
    def function(self) -> Callable[..., Tensor]:
        return OPERATORS[self.operator]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        examples, on_a_gpu = self.example_cases(), metafunc.definition.get_closest_marker("gpu")
        takes = partial(self.takes, case=examples[0])
        # Called for the tests that want them: asking the kernels about every call takes seconds.
        values: dict[str, Callable[[], Iterable[Any]]] = {
            "example": lambda: examples,
            "small_case": lambda: parity.cases(self.operator, small=True),
            "kernel_call": self.small_calls,
            # Strides are the same matter whatever other arguments are given.
            "laid_out": lambda: [
                *product((examples[0], examples[-1]), parity.LAYOUTS),
                *((example, "channels_last") for example in examples[1:-1]),
            ],
            "any_call": lambda: self.parity_calls(small=False),
            "parameter": lambda: [name for name in examples[0].shapes if name not in ACTIVATIONS],
            "value": lambda: self.special_values,
            "layout": lambda: parity.LAYOUTS,
            "backend": lambda: [*filter(takes, BACKENDS)],
            "kernels": lambda: ("triton", "cuda") if on_a_gpu else [*filter(takes, BACKENDS[1:])],
            "dtype": lambda: DTYPES,
        }
        joint = [name for name in ("backend", "example", "dtype") if name in metafunc.fixturenames]
        if {"backend", "example"} <= set(joint):
            # Without a dtype of its own a test is for one dtype.
            calls = [call[: len(joint)] for call in self.calls() if "dtype" in joint or call[2] == torch.float32]
            metafunc.parametrize(joint, calls, ids=name_of)
            values = {name: value for name, value in values.items() if name not in joint}
        for name in [name for name in metafunc.fixturenames if name in values]:
            metafunc.parametrize(name, values[name](), ids=name_of)

    def takes(self, backend: str, case: parity.Case, dtype: torch.dtype = torch.float32) -> bool:
        """Whether a backend runs a case; the reference and Triton at least in the examples."""
        return backend != "cuda" or not parity.unsupported(case, dtype, "cpu" if INTERPRETED else "cuda", backend)

    def calls(self) -> list[tuple[str, parity.Case, torch.dtype]]:
        """Backends, examples and dtypes of what kernels must keep besides accuracy."""
        examples = self.example_cases()
        return [
            *(("reference", example, torch.float32) for example in examples),
            # The interpreter is slow: with all optional arguments and with none has to do.
            *(("triton", example, torch.float32) for example in (examples[0], examples[-1])),
            # CUDA kernels have code of their own for 16-bit types.
            *(
                ("cuda", example, dtype)
                for dtype in (torch.float32, self.sixteen_bit)
                for example in examples
                if "cuda" in BACKENDS and self.takes("cuda", example, dtype)
            ),
        ]

    def parity_calls(self, small: bool) -> list[tuple[parity.Case, torch.dtype]]:
        """Cases and dtypes of what kernels are held to."""
        every = [(case, dtype) for dtype in DTYPES for case in parity.cases(self.operator, small)]
        return every + [(case, dtype) for dtype in self.more_dtypes for case in self.more_cases]

    def small_calls(self) -> list[tuple[str, parity.Case, torch.dtype]]:
        """Those of interpreter and emulator, both slow."""
        triton = [
            ("triton", case, dtype)
            for dtype in INTERPRETED_DTYPES
            for case in parity.cases(self.operator, small=True)
            if dtype == torch.float32 or case.name in (self.cheap_float16 or [case.name]) or running.chosen()
        ]
        cuda = self.parity_calls(small=True) if "cuda" in BACKENDS else []
        return [*triton, *(("cuda", *call) for call in cuda if self.takes("cuda", *call))]

    def full(self, **sizes: int) -> parity.Case:
        """The example with all optional arguments."""
        return self.example_cases(**sizes)[0]

    def resized(self, example: parity.Case, **sizes: int) -> parity.Case:
        """An example at other sizes."""
        return next(case for case in self.example_cases(**sizes) if case.name == example.name)

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

    def test_kernel_parity(self, kernel_call):
        backend, case, dtype = kernel_call
        assert_parity(case, dtype, device_of(backend), backend)

    @pytest.mark.gpu
    def test_gpu_parity(self, any_call, kernels):
        reasons = parity.unsupported(*any_call, "cuda", kernels)
        if reasons:
            pytest.skip("; ".join(reasons))
        assert_parity(*any_call, "cuda", kernels)

    def test_float32_parameters_of_16_bit_activations(self, example, backend):
        device = device_of(backend)
        dtype = torch.float16 if backend == "triton" else self.sixteen_bit
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

    def test_layouts_give_the_same_bits_in_channels_last_memory(self, example, layout, backend, dtype):
        given = arguments_of(example, dtype, layout=layout, device=device_of(backend))
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

    def test_parameters_of_any_strides(self, example, backend, dtype):
        dense = arguments_of(example, dtype, device=device_of(backend))
        given = {
            name: strided(value.detach()).requires_grad_(value.requires_grad)
            if isinstance(value, Tensor) and name not in ACTIVATIONS
            else value
            for name, value in dense.items()
        }
        got, expected = evaluate(self.on(backend), given), evaluate(self.on(backend), dense)
        assert max(relative_error(got[name], value) for name, value in expected.items()) < 1e-6

    # Special values

    def test_empty_batch(self, example, backend, dtype):
        arguments = arguments_of(self.resized(example, batch=0), dtype, device=device_of(backend))
        results, full = evaluate(self.on(backend), arguments), self.definition(**arguments_of(example))
        assert results["output"].shape == (0, *full.shape[1:])
        for name, leaf in leaves_of(arguments).items():
            assert torch.equal(results[f"grad {name}"], torch.zeros_like(leaf)), name

    @pytest.mark.parametrize("place", ["input", "grad_output"])
    def test_nan_and_inf_reach_what_depends_on_them_and_nothing_else(self, example, backend, dtype, place, value):
        arguments = without_gradients(arguments_of(example, dtype, device=device_of(backend)))
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

        ours = results(self.on(backend), value, dtype)
        before, after = (results(self.definition, change, torch.float64) for change in (1.0, -2.0))
        for name, result in ours.items():
            touched, depends = ~result.isfinite(), (before[name] - after[name]).abs() > 1e-9
            if name in self.spreading and (backend == "reference" or dtype != torch.float32):
                channels = depends.flatten(1).any(1).view(-1, *[1] * (depends.dim() - 1))
                assert not (touched & ~channels).any(), name
                touched = touched & depends
            assert torch.equal(touched, depends), name

    # Autograd

    def test_two_runs_give_the_same_bits(self, example, backend, dtype):
        arguments = arguments_of(example, dtype, device=device_of(backend))
        assert_same(*(evaluate(self.on(backend), arguments) for _ in range(2)))

    def test_frozen_arguments_change_no_other_gradient(self, backend):
        arguments = arguments_of(self.full(), device=device_of(backend))
        expected, names = evaluate(self.on(backend), arguments), tuple(leaves_of(arguments))
        only_one = [tuple(other for other in names if other != name) for name in names]
        for frozen in [*only_one, names[::2], names[1::2], names]:
            got = evaluate(self.on(backend), without_gradients(arguments, frozen))
            wanted = {n: value for n, value in expected.items() if n.removeprefix("grad ") not in frozen}
            if self.folds and frozen == names:
                assert relative_error(got.pop("output"), wanted.pop("output")) < 1e-6
            assert_same(got, wanted)

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

    def test_opcheck_layouts(self, laid_out):
        self.opcheck(arguments_of(laid_out[0], layout=laid_out[1]), "reference")

    @pytest.mark.parametrize("sizes", [{"batch": 0}, {"height": 1, "width": 1}, {"channels": 1}, {"batch": 1}], ids=str)
    def test_opcheck_sizes(self, sizes):
        self.opcheck(arguments_of(self.full(**sizes), layout="contiguous"), "reference")

    def test_opcheck_kernels(self, kernels):
        case = [case for case in self.example_cases() if self.takes(kernels, case)][-1]
        self.opcheck(arguments_of(case, device=device_of(kernels)), kernels)

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
        channels = self.sizes["channels"]
        wide = arguments_of(self.full(channels=channels + 1))["input"]
        message = rf"\w+: got shape \[.*{channels}.*\]; accepted: .*\b{channels + 1}\b"
        self.assert_refused(lambda _: {"input": wide}, ValueError, message)

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
    def test_side_stream(self, kernels):
        arguments, function = self.gpu_call(kernels)
        expected, grad = evaluate(function, arguments), self.gradient(arguments)
        late, stream = self.blank(arguments), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            late["input"].detach().copy_(arguments["input"])
            results = evaluate(function, late, grad)
        stream.synchronize()
        assert_same(results, expected)

    @pytest.mark.gpu
    def test_second_device(self, kernels):
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two CUDA devices")
        arguments, function = self.gpu_call(kernels)
        moved = {
            name: value.detach().to("cuda:1").requires_grad_(value.requires_grad)
            if isinstance(value, Tensor)
            else value
            for name, value in arguments.items()
        }
        results, expected = evaluate(function, moved), evaluate(function, arguments)
        assert {result.device for result in results.values()} == {torch.device("cuda:1")}
        assert_same({name: result.to("cuda:0") for name, result in results.items()}, expected)

    @pytest.mark.gpu
    def test_cuda_graph(self, kernels):
        """Forward and backward in one graph."""
        arguments, function = self.gpu_call(kernels)
        expected, grad = evaluate(function, arguments), self.gradient(arguments)
        static, graph = self.blank(arguments), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = evaluate(function, static, grad)
        static["input"].detach().copy_(arguments["input"])
        graph.replay()
        torch.cuda.synchronize()
        assert_same(results, expected)

    def gpu_call(self, kernels):
        """The example on the GPU, and the operator on a backend; skips the test if that cannot run."""
        case = self.full(channels=8)
        reasons = parity.unsupported(case, torch.float16, "cuda", kernels)
        if reasons:
            pytest.skip("; ".join(reasons))
        return arguments_of(case, torch.float16, device="cuda"), self.on(kernels)

    def gradient(self, arguments):
        """The gradient of the output that `evaluate` draws."""
        with torch.no_grad():
            return random_like(self.function(**arguments))

    def blank(self, arguments):
        """The arguments with an input of zeros."""
        return {**arguments, "input": torch.zeros_like(arguments["input"]).requires_grad_()}
