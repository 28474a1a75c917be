"""The command `convnext-kernels`: what can run here, whether it is right, and how fast it is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from convnext_kernels.cli import bench, info, tune, verify
from convnext_kernels.cli.errors import CommandError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="convnext-kernels", description="Fast ConvNeXt blocks for PyTorch.")
    commands = parser.add_subparsers(
        title="commands", required=True, metavar="{info,verify,bench,tune}", dest="command"
    )
    for name, module in (("info", info), ("verify", verify), ("bench", bench), ("tune", tune)):
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 1 where a check failed; 2 where the arguments or the machine do not allow what was asked.
    """
    try:
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)
    except CommandError as error:
        print(f"convnext-kernels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
