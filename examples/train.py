"""Trains or fine-tunes a ConvNeXt on this package's kernels, or on plain PyTorch to compare: one process or many.

    python examples/train.py                                              scikit-learn's digits, on anything
    torchrun --nproc-per-node 8 examples/train.py --data FOLDER           the paper's recipe on eight GPUs
    python examples/train.py --data FOLDER --init convnext_base.pth --drop-path 0.8 --layer-decay 0.7     fine-tuning

FOLDER holds train/CLASS/IMAGE and val/CLASS/IMAGE. The defaults below are the paper's; the digits have their own.
examples/README.md says what is written where, and how a run is resumed. Exit codes: 0 done, 1 stopped by bad data, a
loss that is no number or a full disk, 2 refused before the start, 130 and 143 saved after SIGINT and SIGTERM.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from training.data import PART
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


def resolution(text: str) -> tuple[int, int]:
    """ "192@10" -> (10, 192): 192 pixels from epoch 10 on; "160" -> (0, 160)."""
    pixels, _, epoch = text.partition("@")
    return int(epoch or 0), int(pixels)


def number(kind: type, interval: str) -> Callable[[str], float]:
    """A type of options: the numbers of a kind in an interval such as "(0, 1]"."""
    low, high = map(float, interval[1:-1].split(","))

    def parse_number(text: str) -> float:
        value = kind(text)
        is_above = value > low or (value == low and interval[0] == "[")
        is_below = value < high or (value == high and interval[-1] == "]")
        if not (is_above and is_below):
            raise argparse.ArgumentTypeError(f"got {text}; accepted: {kind.__name__} in {interval}")
        return value

    parse_number.__name__ = kind.__name__  # argparse says it of a text that is no number
    return parse_number


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    def add(name: str, default: object, help: str, within: str = "", **options: object) -> None:
        if not options.keys() & {"action", "choices"}:
            kind = options.setdefault("type", type(default))
            options.setdefault("metavar", METAVARS.get(kind))
            options |= {"type": number(kind, within)} if within else {}
        shown = "" if default in (None, "") or isinstance(default, bool | list) else " (%(default)s)"
        parser.add_argument(name, default=default, help=help + shown, **options)

    add("--data", "digits", '"digits" or a folder')
    add("--output", "", "folder of checkpoints and logs, of no other run (runs/DATA-TIME)")
    add("--resume", False, "go on with the run in --output, if there is one", action="store_true")
    add("--kernels", "on", "this package's operators, or plain PyTorch", choices=("on", "off"))
    add("--device", "auto", "where to compute", choices=("auto", "cpu", "cuda"))
    add("--seed", 0, "of weights, order and augmentation", "[0, 4294967295]")
    add("--workers", 8, f"readers for each process; each has up to {4 * PART} images in /dev/shm", "[0, inf)")
    add("--log-every", 50, "steps between rows of steps.csv", "[1, inf)")
    add("--save-every", 0, "steps between checkpoints, beside those after epochs; 0: none", "[0, inf)")

    add("--model", "convnext_tiny", "architecture", choices=list_models(), metavar="NAME")
    add("--depths", None, "blocks per stage, in place of the model's", type=int, nargs="+", metavar="N")
    add("--dims", None, "channels per stage, in place of the model's", type=int, nargs="+", metavar="N")
    add(
        "--layer-scale",
        None,
        "first value of the layer scale, in place of the model's; 0: none",
        "[0, inf)",
        type=float,
    )
    add("--init", "", "weights to start from; a classifier of other classes is replaced")
    add("--head-scale", 1.0, "of the first weights of a replaced classifier", "(0, inf)")
    add("--freeze", 0, "stages that keep their weights, from the first on", "[0, inf)")

    add("--epochs", 300, "passes over the images", "[1, inf)")
    add("--warmup", 20.0, "epochs of rising learning rate; no more than --epochs unless given", "[0, inf)")
    add("--batch-size", 4096, "images per step, of all processes together", "[1, inf)")
    add("--accumulate", 1, "parts that each process cuts its batch into, for memory", "[1, inf)")
    add("--lr", 4e-3, "highest learning rate", "(0, inf)")
    add("--min-lr", 1e-6, "last learning rate", "[0, inf)")
    add("--layer-decay", 1.0, "of the learning rate, from a layer to the one before", "(0, 1]")
    add("--weight-decay", 0.05, "of AdamW", "[0, inf)")
    add("--betas", [0.9, 0.999], "of AdamW (0.9 0.999)", "[0, 1)", type=float, nargs=2)
    add("--clip", 0.0, "highest norm of the gradients; 0: any", "[0, inf)")
    add("--drop-path", 0.1, "stochastic depth of the last block", "[0, 1)")
    add("--ema", 0.9999, "decay of the weights' moving average; 0: none", "[0, 1)")
    add("--smoothing", 0.1, "of the labels", "[0, 1]")

    add("--resolution", [(0, 224)], "pixels, from an epoch on (224)", type=resolution, nargs="+", metavar="R[@EPOCH]")
    add("--crop", 0.875, "part of the shorter side that is evaluated; 1: the whole image, made square", "(0, 1]")
    add("--crop-scale", [0.08, 1.0], "parts of the area to crop in training (0.08 1)", "(0, 1]", type=float, nargs=2)
    add("--flip", 0.5, "probability of a mirrored image", "[0, 1]")
    add("--rand-augment", 9, "magnitude of 10; 0: off", "[0, 10]")
    add("--random-erasing", 0.25, "probability", "[0, 1]")
    add("--mixup", 0.8, "alpha; 0: off", "[0, inf)")
    add("--cutmix", 1.0, "alpha; 0: off", "[0, inf)")

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
    epochs = parser.parse_known_args(arguments)[0].epochs
    parser.set_defaults(warmup=min(parser.get_default("warmup"), epochs))
    options = parser.parse_args(arguments)
    if options.resume and not options.output:
        parser.error("--resume: got no --output; accepted: with the folder of the run")
    if not options.output:
        options.output = f"runs/{options.data.strip('/').rpartition('/')[2]}-{time.strftime('%Y%m%d-%H%M%S')}"
    if options.warmup > options.epochs:
        parser.error(f"--warmup: got {options.warmup:g}; accepted: at most {options.epochs}, the epochs")
    if options.min_lr > options.lr:
        parser.error(f"--min-lr: got {options.min_lr:g}; accepted: at most {options.lr:g}, the learning rate")
    if options.crop_scale != sorted(options.crop_scale):
        parser.error(f"--crop-scale: got {options.crop_scale}; accepted: the smaller one first")
    if (first := min(options.resolution)[0]) != 0:
        parser.error(f"--resolution: got epoch {first} as the first; accepted: R, or R@0 among others")
    if options.compile and options.compile not in (backends := torch.compiler.list_backends(exclude_tags=())):
        parser.error(f"--compile: got {options.compile}; accepted: {', '.join(backends)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    code, expected = REFUSED, (OSError, ValueError)
    try:
        trainer = Trainer(options, join(options.device))
        code, expected = FAILED, (OSError, FloatingPointError)
        return trainer.run()
    except Exception as error:
        # Workers end with the frames that read from them; for one that is left at its exit Python waits for ever.
        traceback.clear_frames(error.__traceback__)
        if not isinstance(error, expected):
            raise
        print(f"train.py: {error}", file=sys.stderr)
        return code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
