"""Imports go one way (DESIGN, section 6), and what must be light or free of torch stays so."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "mezo_dist"

# What each folder of mezo_dist may import of the others. From the bottom to the top: an entry names only
# entries above it, so there are no cycles.
LAYERS = {
    "errors": "",
    "json_types": "",
    "patience": "",
    "child_process": "",
    "imports": "",
    "directions": "errors patience",
    "algorithms": "errors json_types directions",
    "config": "errors json_types algorithms",
    "distributed": "errors json_types",
    "engines": "errors patience json_types directions algorithms distributed",
    "assets": "errors json_types",
    # beside one another
    "storage": "errors json_types directions algorithms config distributed engines",
    "models": "errors imports json_types directions config distributed engines assets storage",
    "tasks": "errors child_process directions config engines assets models",
    "objectives": "errors child_process algorithms config distributed tasks",
    "monitoring": "errors patience json_types storage",
    "baselines": "errors algorithms distributed engines",
    "testing": "errors distributed",
    "planning": "errors json_types directions algorithms config engines assets storage",
    # what brings them together
    "optim": "errors json_types directions algorithms config distributed engines storage",
    "runs": "errors patience json_types directions algorithms config distributed engines assets storage tasks models "
    "objectives monitoring baselines planning",
    "trainer": "errors json_types directions algorithms config distributed engines storage tasks optim runs",
    "simulation": "errors json_types algorithms planning",
    "studies": "errors json_types algorithms config distributed engines storage testing runs planning",
    "commands": "errors imports config distributed engines models objectives monitoring runs planning simulation "
    "studies",
    "cli": "errors config engines planning simulation studies commands distributed",
    "__main__": "cli",
}

NO_TORCH = [
    "mezo_dist",
    "mezo_dist.config.help",
    "mezo_dist.config.reader",
    "mezo_dist.algorithms",
    "mezo_dist.directions.combination",
    "mezo_dist.engines.scratch",
    "mezo_dist.engines.waiting",
    "mezo_dist.planning.command",
    "mezo_dist.simulation.command",
]


def modules() -> set[str]:
    names = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    return names - {"__init__"}


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


@pytest.mark.parametrize("module", NO_TORCH)
def test_free_of_torch(module: str) -> None:
    """In a fresh interpreter, so that imports of imports count."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False).returncode == 0
