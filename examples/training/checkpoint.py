"""The whole state of a training in one file, whichever way it is spread over processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from convnext_kernels.checkpoints import read_checkpoint
from training.files import replacing

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a file that `read` reads, and `load_checkpoint` too.

    Raises:
        OSError: the disk is full; the file is as it was before.
    """
    with replacing(path) as temporary:
        try:
            torch.save(dict(state), temporary)
        except RuntimeError as error:  # PyTorch's writer says nothing of disks
            raise OSError(f"{path} cannot be written, is the disk full? {error}") from error


def read(path: Path, options: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """Reads what `write` wrote, of a run with these options and classes; older files have no names of classes.

    Raises:
        OSError: there is no such file.
        ValueError: it is corrupt, no checkpoint of this trainer, or of a run with other options or classes; the message
            names them.
    """
    state = read_checkpoint(path)
    if not {"model", "optimizer", "step", "options"} <= state.keys():
        raise ValueError(f"--resume: {path} was not written by this script; --init starts from weights alone")
    differing = [
        f"{name} is {options.get(name)!r} here and {value!r} there"
        for name, value in state["options"].items()
        if options.get(name) != value
    ]
    if differing:
        raise ValueError(f"--resume: {path} is of another run: {', '.join(differing)}")
    for number, (got, accepted) in enumerate(zip(classes, state.get("class_names", classes), strict=True)):
        if got != accepted:
            raise ValueError(f"--data: got {got} as class {number}; accepted: {accepted}, as in {path}")
    return state


def weights_of(model: nn.Module) -> dict[str, Any]:
    """The model's weights under their official names, whole and on the CPU, for the first process alone.

    Every process must call it.
    """
    return get_model_state_dict(model, options=WHOLE)


def capture(model: nn.Module, ema: nn.Module | None, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights, their moving average and the optimizer's state, like `weights_of`."""
    state = {"model": weights_of(model), "optimizer": get_optimizer_state_dict(model, optimizer, options=WHOLE)}
    return state if ema is None else state | {"ema": weights_of(ema)}


def restore(
    state: Mapping[str, Any], model: nn.Module, ema: nn.Module | None, optimizer: torch.optim.Optimizer
) -> None:
    """Puts back what `capture` took, into models that may be spread over other processes."""
    set_model_state_dict(model, state["model"], options=WHOLE)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=WHOLE)
    if ema is not None:
        set_model_state_dict(ema, state["ema"], options=WHOLE)
