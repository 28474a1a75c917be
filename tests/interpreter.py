"""Triton's interpreter without the work that it does for nothing, over half of its time."""

from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def quicken() -> None:
    """To be called before any kernel runs, in a process that compiles none."""
    if find_spec("triton") is None:
        return
    interpreter = import_module("triton.runtime.interpreter")
    patch_language = interpreter._patch_lang

    @cache
    def patch_language_once(function: Any) -> Any:
        """Triton does it for every call of a function inside a kernel, and undoes it after a kernel."""
        scope = patch_language(function)
        getattr(scope, "_changes", []).clear()  # so that nothing is undone
        return scope

    interpreter._patch_lang = patch_language_once
    # Each sum of integers is taken in 64 bits too, for an assertion that is made only where kernels are debugged.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
