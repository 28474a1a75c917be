"""Lays out the package as a repository that Hugging Face's `kernels` loads:

    python -m tools.kernel_repository DIR

DIR/build.toml and DIR/torch-ext/ are what kernel-builder builds from, DIR/build/torch-BACKEND/ what `kernels` loads.

`kernels` imports a repository under a name of its own, so that several versions can lie beside each other and beside an
installed package. The package's imports of itself, which are absolute, are therefore made relative; its operators
register under the name that it is imported by. Only what the layers need is taken: it needs PyTorch and Triton.
"""

import argparse
import json
import re
import secrets
import shutil
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with `kernels`

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "convnext_kernels"
PARTS = (
    "accelerate",
    "ops",
    "tables",
    "backends.py",
    "build.py",
    "functional.py",
    "layers.py",
    "parameters.py",
    "reference.py",
    "variants.py",
)
INIT = '''"""ConvNeXt on fused kernels."""

from . import functional, layers

__all__ = ["functional", "layers"]
'''
OWN_IMPORT = re.compile(rf"^( *)from {PACKAGE}(?:\.([\w.]+))? import\b", re.MULTILINE)


def with_relative_imports(source: str, depth: int) -> str:
    """The source of a module that lies `depth` folders below the package."""
    return OWN_IMPORT.sub(lambda found: f"{found[1]}from {'.' * (depth + 1)}{found[2] or ''} import", source)


def sources() -> dict[str, str]:
    """The kernel's files by their paths."""
    package = ROOT / PACKAGE
    names = (path.relative_to(package) for path in sorted(package.rglob("*")))
    taken = [name for name in names if name.parts[0] in PARTS and name.suffix in (".py", ".json")]
    files = {str(name): with_relative_imports((package / name).read_text(), len(name.parts) - 1) for name in taken}
    return {"__init__.py": INIT, **files}


def lay_out(directory: Path) -> None:
    """Writes the repository into a new directory; each has a name of its own in a process that loads several."""
    general = tomllib.loads((ROOT / "build.toml").read_text())["general"]
    files = sources()
    directory.mkdir(parents=True)
    shutil.copy(ROOT / "build.toml", directory)
    write(files, directory / "torch-ext" / PACKAGE)
    for backend in general["backends"]:
        metadata = {
            "name": general["name"],
            "id": f"_{PACKAGE}_{backend}_{secrets.token_hex(4)}",
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        write({**files, "metadata.json": json.dumps(metadata)}, directory / "build" / f"torch-{backend}")


def write(files: dict[str, str], folder: Path) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a new directory")
    lay_out(parser.parse_args().directory)
