"""Trains or fine-tunes a ConvNeXt on this package's kernels, or on plain PyTorch to compare: one process or many.

    python examples/train.py                                              scikit-learn's digits, on anything
    torchrun --nproc-per-node 8 examples/train.py --data FOLDER           the paper's recipe on eight GPUs
    python examples/train.py --data FOLDER --init convnext_base.pth --drop-path 0.8 --layer-decay 0.7     fine-tuning

FOLDER holds train/CLASS/IMAGE and val/CLASS/IMAGE. The defaults below are the paper's; the digits have their own.
examples/README.md says what is written where, and how a run is resumed. Exit codes: 0 done, 1 stopped by bad data or a
loss that is no number, 2 refused before the start, 143 saved after SIGTERM.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch.distributed as dist
from training.learner import AMP
from training.loop import FAILED, REFUSED, Trainer
from training.processes import join

from convnext_kernels import list_models

DIGITS = {
    "model": "convnext_atto",
    "depths": [2, 2],
    "dims": [32, 64],
    "layer_scale": 1.0,
    "resolution": [(0, 32)],
    "epochs": 12,
    "warmup": 2.0,
    "batch_size": 64,
    "lr": 2e-3,
    "drop_path": 0.05,
    "ema": 0.98,
    "log_every": 1,
    "workers": 0,
    "crop": 1.0,
    "crop_scale": [0.7, 1.0],
    "flip": 0.0,
    "rand_augment": 0,
    "random_erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
}
"""What differs from the paper's recipe for images of 8x8 pixels and a minute of time."""


METAVARS = {int: "N", float: "X", str: "PATH"}


def pixels_at(text: str) -> tuple[int, int]:
    """ "192@10" -> (10, 192): 192 pixels from epoch 10 on; "160" -> (0, 160)."""
    pixels, _, epoch = text.partition("@")
    return int(epoch or 0), int(pixels)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    def add(name: str, default: object, help: str, **options: object) -> None:
        if not options.keys() & {"action", "choices"}:
            options.setdefault("type", type(default))
            options.setdefault("metavar", METAVARS.get(options["type"]))
        shown = "" if default in (None, "") or isinstance(default, bool | list) else " (%(default)s)"
        parser.add_argument(name, default=default, help=help + shown, **options)

    add("--data", "digits", '"digits" or a folder')
    add("--output", "", "folder of checkpoints and logs, of no other run (runs/DATA-TIME)")
    add("--resume", False, "go on with the run in --output, if there is one", action="store_true")
    add("--kernels", "on", "this package's operators, or plain PyTorch", choices=("on", "off"))
    add("--device", "auto", "where to compute", choices=("auto", "cpu", "cuda"))
    add("--seed", 0, "of weights, order and augmentation")
    add("--workers", 8, "processes that read images, for each process that trains")
    add("--log-every", 50, "steps between rows of steps.csv")
    add("--save-every", 0, "steps between checkpoints, beside those after epochs; 0: none")

    add("--model", "convnext_tiny", "architecture", choices=list_models(), metavar="NAME")
    add("--depths", None, "blocks per stage, in place of the model's", type=int, nargs="+", metavar="N")
    add("--dims", None, "channels per stage, in place of the model's", type=int, nargs="+", metavar="N")
    add("--layer-scale", None, "first value of the layer scale, in place of the model's", type=float)
    add("--init", "", "weights to start from; a classifier of other classes is replaced")
    add("--freeze", 0, "stages that keep their weights, from the first on")

    add("--epochs", 300, "passes over the images")
    add("--warmup", 20.0, "epochs of rising learning rate")
    add("--batch-size", 4096, "images per step, of all processes together")
    add("--accumulate", 1, "parts that each process cuts its batch into, for memory")
    add("--lr", 4e-3, "highest learning rate")
    add("--min-lr", 1e-6, "last learning rate")
    add("--layer-decay", 1.0, "of the learning rate, from a layer to the one before")
    add("--weight-decay", 0.05, "of AdamW")
    add("--betas", [0.9, 0.999], "of AdamW (0.9 0.999)", type=float, nargs=2)
    add("--clip", 0.0, "highest norm of the gradients; 0: any")
    add("--drop-path", 0.1, "stochastic depth of the last block")
    add("--ema", 0.9999, "decay of the weights' moving average; 0: none")
    add("--smoothing", 0.1, "of the labels")

    add("--resolution", [(0, 224)], "pixels, from an epoch on (224)", type=pixels_at, nargs="+", metavar="R[@EPOCH]")
    add("--crop", 0.875, "part of the shorter side that is evaluated")
    add("--crop-scale", [0.08, 1.0], "parts of the area to crop in training (0.08 1)", type=float, nargs=2)
    add("--flip", 0.5, "probability of a mirrored image")
    add("--rand-augment", 9, "magnitude; 0: off")
    add("--random-erasing", 0.25, "probability")
    add("--mixup", 0.8, "alpha; 0: off")
    add("--cutmix", 1.0, "alpha; 0: off")

    add("--amp", "off", "dtype of computation", choices=tuple(AMP))
    add("--fsdp", False, "shard parameters and optimizer over the processes of torchrun (FSDP2)", action="store_true")
    add(
        "--compile",
        None,
        "torch.compile, with a backend (inductor)",
        type=str,
        nargs="?",
        const="inductor",
        metavar="BACKEND",
    )
    add("--checkpoint-activations", False, "run each block's forward again in backward", action="store_true")
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked; those not given are the paper's, or for the digits theirs."""
    parser = build_parser()
    if parser.parse_known_args(arguments)[0].data == "digits":
        parser.set_defaults(**DIGITS)
    options = parser.parse_args(arguments)
    if options.resume and not options.output:
        parser.error("--resume: got no --output; accepted: with the folder of the run")
    if not options.output:
        options.output = f"runs/{options.data.strip('/').rpartition('/')[2]}-{time.strftime('%Y%m%d-%H%M%S')}"
    positive = ("epochs", "batch_size", "accumulate", "lr", "log_every")
    for name in positive:
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(options, name)}; accepted: above 0")
    if min(options.resolution)[0] > 0:
        parser.error("--resolution: got none for epoch 0; accepted: R, or R@0 among others")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        world = join(options.device)
        trainer = Trainer(options, world)
    except (OSError, ValueError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return REFUSED
    try:
        return trainer.run()
    except FloatingPointError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return FAILED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
