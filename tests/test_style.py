"""The house rules that a machine can check: format, lint, types, size of a file, and who may import whom."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "convnext_kernels"
SOURCES = [path for path in (ROOT / PACKAGE).rglob("*.py") if path != ROOT / PACKAGE / "__init__.py"]
MAXIMUM_LINES = 500

LAYERS = [{"build", "backends"}, {"ops"}, {"functional"}, {"block", "model"}, {"cli"}]
"""Lower to upper modules of the package; those not named lie beside block and model."""

OPERATOR_LAYERS = [{"configs"}, {"reference", "triton_kernel", "cuda_kernel"}, {"operator"}, {"__init__"}]
"""Lower to upper files of an operator; those not named lie beside its kernels."""


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_tool_has_nothing_to_say(command):
    result = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"


def test_tests_are_collected_by_the_command_pytest():
    """Which does not look for modules where it was started, unlike `python -m pytest`; isolated, Python neither."""
    command = [sys.executable, "-I", "-m", "pytest", "--collect-only", "-q", "-n0"]
    files = ["tests/test_compare.py", "tests/test_layers.py"]  # they import benchmarks and tools
    result = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_file_is_too_long():
    folders = [ROOT / name for name in (PACKAGE, "csrc", "tests", "benchmarks", "examples")]
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*"))]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in files
        if path.suffix in {".py", ".cu", ".cuh", ".cpp", ".h"}
    }
    assert "setup.py" in lengths and f"{PACKAGE}/build.py" in lengths
    assert {name: length for name, length in lengths.items() if length > MAXIMUM_LINES} == {}


def module_name(path: Path) -> str:
    """convnext_kernels/ops/mlp/operator.py -> convnext_kernels.ops.mlp.operator"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(path: Path) -> Iterator[str]:
    """Full names of the package's own modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = module_name(path).split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, node.module] if node.module else parents)
            names = [name if is_module(name := f"{base}.{alias.name}") else base for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == PACKAGE)


def layer(name: str, layers: list[set[str]], default: int) -> int:
    return next((level for level, names in enumerate(layers) if name in names), default)


def package_layer(module: str) -> int:
    """Level of a module in LAYERS; the package itself, which gathers all, lies beside cli."""
    return layer([*module.split("."), "cli"][1], LAYERS, LAYERS.index({"block", "model"}))


def operator_of(module: str) -> tuple[str | None, str]:
    """convnext_kernels.ops.mlp.operator -> ("mlp", "operator"); (None, "") outside the operators and in ops.common."""
    parts = module.removesuffix(".__init__").split(".")
    if parts[1:2] != ["ops"] or len(parts) < 3 or parts[2] == "common":
        return None, ""
    return parts[2], parts[3] if len(parts) > 3 else "__init__"


def breaks_the_rule(importer: str, imported: str) -> bool:
    """Whether an import goes upward, or enters another operator past its public function.

    A fused operator may be composed of what it fuses, like with like: its reference of their references, its kernels of
    their kernels, and its CUDA kernels of Triton's where there are no others.
    """
    if package_layer(imported) > package_layer(importer):
        return True
    operator, file = operator_of(importer)
    other, other_file = operator_of(imported)
    if other is None or (operator is None and package_layer(importer) > LAYERS.index({"functional"})):
        return False
    if operator != other:
        stand_in = "triton_kernel" if file == "cuda_kernel" else file
        return other_file not in ("__init__", file, stand_in)
    beside_kernels = 1
    return layer(other_file, OPERATOR_LAYERS, beside_kernels) > layer(file, OPERATOR_LAYERS, beside_kernels)


def test_nothing_imports_upward():
    broken = [
        f"{path.relative_to(ROOT)} imports {imported}"
        for path in SOURCES
        for imported in imports(path)
        if breaks_the_rule(module_name(path), imported)
    ]
    assert SOURCES
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("importer", "imported", "broken"),
    [
        ("model", "functional", False),
        ("functional", "model", True),
        ("functional", "ops.mlp", False),
        ("functional", "ops.mlp.operator", True),
        ("ops.mlp.operator", "backends", False),
        ("backends", "ops.mlp", True),
        ("ops.mlp.triton_kernel", "ops.common.checks", False),
        ("ops.common.checks", "functional", True),
        ("ops.mlp.operator", "ops.mlp.reference", False),
        ("ops.mlp.reference", "ops.mlp.operator", True),
        ("ops.mlp.__init__", "ops.mlp.operator", False),
        ("ops.mlp.operator", "ops.mlp", True),
        ("ops.convnext_block.operator", "ops.mlp", False),
        ("ops.convnext_block.operator", "ops.mlp.operator", False),
        ("ops.convnext_block.reference", "ops.mlp.reference", False),
        ("ops.convnext_block.triton_kernel", "ops.mlp.triton_kernel", False),
        ("ops.convnext_block.cuda_kernel", "ops.mlp.triton_kernel", False),
        ("ops.convnext_block.triton_kernel", "ops.mlp.cuda_kernel", True),
        ("ops.convnext_block.triton_kernel", "ops.mlp.reference", True),
        ("ops.convnext_block.operator", "ops.mlp.reference", True),
        ("cli.verify", "ops.mlp.reference", False),
        ("cli.verify", "", False),
        ("model", "", True),
        ("model", "cli.verify", True),
    ],
)
def test_the_rule_itself(importer, imported, broken):
    assert breaks_the_rule(f"{PACKAGE}.{importer}", f"{PACKAGE}.{imported}".rstrip(".")) == broken
