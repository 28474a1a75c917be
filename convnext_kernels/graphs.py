"""CUDA graphs of whole models: at batch 1 the launches, not the kernels, take the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from convnext_kernels.ops.common.checks import check_eval_mode

WARM_UP_CALLS = 3
"""Calls before the capture: they compile kernels, choose algorithms and get workspaces, which a capture may not."""


class Graphed:
    """What `graphed` returns; see there."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self._model = model
        self._addresses = _addresses(model)
        self._input = example.detach().clone()
        self._replay, self._output = _record(model, self._input)

    def __call__(self, input: Tensor) -> Any:
        self._check(input)
        self._input.copy_(input)
        self._replay()
        return tree_map_only(Tensor, torch.clone, self._output)

    def _check(self, input: Tensor) -> None:
        accepted = _signature(self._input)
        if not isinstance(input, Tensor) or _signature(input) != accepted:
            got = _signature(input) if isinstance(input, Tensor) else type(input).__name__
            raise ValueError(f"input: got {got}; accepted by this graph: {accepted}")
        if torch.is_grad_enabled() and input.requires_grad:
            raise ValueError("input: requires a gradient; accepted: inference, a graph has no backward")
        if self._model.training:
            check_eval_mode(self._model)
        for owner, name, address in self._addresses:
            tensor = owner.get(name)
            if tensor is None or tensor.data_ptr() != address:
                raise RuntimeError(
                    f"a parameter or buffer `{name}` was removed, replaced or moved since the graph was captured;"
                    " accepted: changes in place, or a new graph by calling graphed again"
                )


def graphed(model: nn.Module, example: Tensor) -> Callable[[Tensor], Any]:
    """Captures a model's forward for one shape of input in a CUDA graph, for inference.

    The function that is returned copies its input into the graph's, replays, and clones the outputs, so that they
    outlive the next call. Parameters and buffers are read at every replay: changes in place are seen, others are an
    error. Autocast holds as it was when the graph was captured, with weights cast anew at every replay. Random numbers,
    data-dependent branches and hooks are as they were at the capture. One call at a time: the graph has one input.

    `torch.cuda.make_graphed_callables` would not do: outside of `torch.no_grad` it captures a backward too, it refuses
    autocast's cache, spreads a batch of one over the whole input without a word, and overwrites its own outputs.

    Args:
        model: any module of one tensor in eval mode, ours, accelerated, folded or another's, on the example's device.
        example: an input on a CUDA device; its shape, dtype and memory format are those of the graph, its values are
            of no matter.

    Returns:
        A function from an input of the example's shape, dtype and device to what the model returns; it records no
        gradients.

    Raises:
        TypeError: `model` is no module, `example` no tensor.
        ValueError: a module is in training mode; the example or a parameter is not on the CUDA device. Of a call: the
            input has another shape, dtype or device, or requires a gradient, or the model is in training mode since.
        RuntimeError: of a call: a parameter or buffer has been removed (as by `fold_`), replaced or moved since.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; accepted: a torch.nn.Module")
    if not isinstance(example, Tensor):
        raise TypeError(f"example: got {type(example).__name__}; accepted: a torch.Tensor")
    check_eval_mode(model)
    if not example.is_cuda:
        raise ValueError(f"example: got a tensor on {example.device}; accepted: one on a CUDA device")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != example.device:
            raise ValueError(f"model: `{name}` is on {tensor.device}; accepted: the example's {example.device}")
    return Graphed(model, example)


def _signature(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)}, {tensor.dtype}, {tensor.device}"


def _addresses(model: nn.Module) -> list[tuple[dict[str, Any], str, int]]:
    """Of every parameter and buffer: the dictionary that it lies in, its name there and where its memory is."""
    owners = (owner for module in model.modules() for owner in (module._parameters, module._buffers))
    return [(o, name, tensor.data_ptr()) for o in owners for name, tensor in o.items() if tensor is not None]


def _record(model: nn.Module, input: Tensor) -> tuple[Callable[[], None], Any]:
    """Captures the model's forward on that input; what replays it, and the outputs that it then fills."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(input.device)
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    # without its cache: weights cast before would be those of the capture for ever, in memory that others get
    autocast = torch.autocast("cuda", dtype, enabled, cache_enabled=False)
    with torch.cuda.device(input.device), torch.no_grad(), autocast:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                model(input)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            output = model(input)
    return graph.replay, output
