"""What `test_processes.py` runs under torchrun: gradients and steps on a batch, by the learner of examples/train.py."""

import sys
from pathlib import Path
from typing import Any

import torch
import train
from torch.distributed.tensor import DTensor
from training.learner import Learner, build_model
from training.processes import Processes, join

IMAGES = 6

IEEE = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(IMAGES, 3, 32, 32, generator=generator), torch.arange(IMAGES) % 10


def part(world: Processes) -> list[torch.Tensor]:
    """Every other image for each of two processes."""
    return [tensor[world.rank :: world.size].to(world.device) for tensor in batch()]


def learner(world: Processes, *arguments: str) -> Learner:
    options = train.parse(["--drop-path", "0", "--ema", "0.5", *arguments])
    return Learner(build_model(options, classes=10), options, world, warmup=1, total=4)


@IEEE
def gradients_of(learner: Learner, world: Processes) -> dict[str, torch.Tensor]:
    """Of the mean loss over the whole batch."""
    learner.backward(*part(world))
    gradients = {name: parameter.grad for name, parameter in learner.model.named_parameters()}
    return {name: (g.full_tensor() if isinstance(g, DTensor) else g).cpu() for name, g in gradients.items()}


@IEEE
def state_of(world: Processes, folder: Path, *arguments: str) -> dict[str, Any]:
    """After two steps, of which the second is one of a new learner that took up the first's state and evaluated it.

    With so large an epsilon Adam's steps are about the gradients; with the usual one, their signs. The scale is one
    that half a batch does not overflow.
    """
    first, second = (learner(world, "--lr", "1", *arguments) for _ in range(2))
    for group in first.optimizer.param_groups:
        group["eps"] = 1.0
    if first.scaler.is_enabled():
        first.scaler.load_state_dict(first.scaler.state_dict() | {"scale": 1024.0})
    first.step(*part(world))
    state = first.state()
    if world.is_first:
        torch.save(state, folder / "state.pt")
    if world.size > 1:
        torch.distributed.barrier()
    second.load(torch.load(folder / "state.pt"))
    second.evaluate([part(world)])
    second.step(*part(world))
    return second.state()


GRADIENTS = {
    "ddp": (),
    "ddp, accumulated": ("--accumulate", "2"),
    "fsdp": ("--fsdp",),
    "fsdp, accumulated": ("--fsdp", "--accumulate", "2"),
    "fsdp, bf16": ("--fsdp", "--amp", "bf16"),
    "fsdp, bf16, plain": ("--fsdp", "--amp", "bf16", "--kernels", "off"),
}

STATES = {
    "ddp": ("--compile", "aot_eager"),
    "fsdp": ("--fsdp", "--checkpoint-activations"),
    "fsdp, compiled": ("--fsdp", "--compile", "aot_eager"),
    "fsdp, fp16": ("--fsdp", "--amp", "fp16"),
}


def main(folder: Path, device: str) -> None:
    world = join(device)
    gradients = {case: gradients_of(learner(world, *arguments), world) for case, arguments in GRADIENTS.items()}
    states = {case: state_of(world, folder, *arguments) for case, arguments in STATES.items()}
    highest = world.highest(5 + world.rank)
    if world.is_first:
        torch.save({"gradients": gradients, "states": states, "highest": highest}, folder / "found.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
