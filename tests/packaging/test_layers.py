"""Imports go one way (DESIGN, section 6), and what must be light or free of torch stays so."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "mezo_dist"

# What each module of mezo_dist may import of the others. From the bottom to the top: an entry names only
# entries above it, so there are no cycles. A new module needs a line: the moment to think where it belongs.
LAYERS = {
    "errors": "",
    "readout": "",
    "calibration": "",
    "directions": "errors",
    "algorithms": "errors directions",
    "minimize": "errors directions algorithms",
    "watch": "",
    "ranks": "errors",
    "meeting": "ranks",
    "wire": "errors watch ranks meeting",
    "doctor": "errors watch ranks wire",
    "engines": "errors readout directions algorithms wire",
    "prefix_finder": "engines",
    "prefix": "readout prefix_finder",
    # beside the engines
    "files": "",
    "trajectory": "errors directions algorithms",
    "journal": "errors files trajectory",
    "tensorfile": "errors",
    "checkpoint": "errors engines files wire tensorfile",
    "checkpoint_reader": "errors engines tensorfile",
    "random_weights": "directions checkpoint_reader",
    "demo_assets": "errors",
    "assets": "errors demo_assets",
    "tasks": "errors directions assets",
    "data": "errors directions tasks",
    "objectives": "errors readout prefix tasks data",
    "config": "errors algorithms tasks",
    "config_reader": "errors algorithms config",
    "folder": "errors files wire trajectory config",
    "adapters": "errors directions checkpoint_reader tasks config",
    "export": "errors calibration engines wire tensorfile adapters",
    "models": "errors directions checkpoint_reader adapters random_weights assets tasks config",
    "curves": "files",
    "monitor": "errors curves",
    "testing": "errors wire",
    # what brings them together
    "shares": "algorithms data",
    "evaluation": "errors calibration algorithms engines wire tasks data objectives shares",
    "runs": "errors calibration directions algorithms engines wire trajectory checkpoint_reader prefix tasks "
    "data objectives shares config models evaluation",
    "summary": "trajectory runs",
    "replay": "errors directions algorithms wire trajectory checkpoint config config_reader folder runs",
    "keeper": "errors trajectory journal checkpoint folder runs replay",
    "training": "errors calibration directions algorithms wire trajectory export config folder monitor runs summary "
    "replay keeper",
    "report": "errors files trajectory folder",
    "cli": "errors calibration engines ranks wire doctor export config_reader monitor runs replay training report",
    "__main__": "cli",
}

NO_TORCH = ["mezo_dist", "mezo_dist.config_reader", "mezo_dist.algorithms", "mezo_dist.directions.combination"]


def modules() -> set[str]:
    found = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    return found - {"__init__"}


def sources(module: str) -> list[Path]:
    return (
        [PACKAGE / f"{module}.py"] if (PACKAGE / f"{module}.py").exists() else sorted((PACKAGE / module).rglob("*.py"))
    )


def imported(path: Path) -> Iterator[str]:
    """What a file imports, also inside functions and for type checking; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; the layers are read off absolute ones"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_table_is_complete() -> None:
    assert set(LAYERS) == modules()


def test_the_table_goes_one_way() -> None:
    below: set[str] = set()
    for module, allowed in LAYERS.items():
        assert below.issuperset(allowed.split()), f"{module} imports a module that stands after it"
        below.add(module)


@pytest.mark.parametrize("module", LAYERS)
def test_imports_go_one_way(module: str) -> None:
    allowed = {module, *LAYERS[module].split()}
    for path in sources(module):
        parts = [name.split(".") for name in imported(path) if name.split(".")[0] == "mezo_dist"]
        others = {part[1] for part in parts if len(part) > 1} & modules()
        assert others <= allowed, f"{path.name} imports {sorted(others - allowed)}, which {module} may not"


def test_the_package_itself_imports_nothing() -> None:
    assert list(imported(PACKAGE / "__init__.py")) == []


@pytest.mark.parametrize("module", NO_TORCH)
def test_free_of_torch(module: str) -> None:
    """In a fresh interpreter, so that imports of imports count."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False).returncode == 0
