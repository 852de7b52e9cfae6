"""The public face: every name is there, documented, and its examples run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mezo_dist

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
make_api = importlib.import_module("make_api")
sys.path.remove(str(ROOT / "docs"))
WITH_EXAMPLES = ["Combination", "Optimizer", "join", "minimize", "replay", "shard", "train"]


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import mezo_dist; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert {name for name in done.stdout.split() if name.startswith(("mezo_dist", "torch", "numpy"))} == {"mezo_dist"}


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'mezo_dist' has no attribute 'Optimiser'"):
        mezo_dist.Optimiser  # noqa: B018


@pytest.mark.parametrize("name", mezo_dist.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    value = getattr(mezo_dist, name)
    assert name in dir(mezo_dist)
    text = inspect.getdoc(value)
    assert text, f"{name} has no docstring"
    if inspect.isfunction(value) and inspect.signature(value).parameters:
        assert "Args:" in text
        assert "Raises:" in text


def test_the_page_of_public_names_is_what_the_docstrings_say() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == make_api.document(), "run `python docs/make_api.py`"
    assert sorted(name for names in make_api.GROUPS.values() for name in names) == sorted(mezo_dist.__all__)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "DS_ACCELERATOR", "cpu"
    )  # otherwise DeepSpeed, which transformers imports, prints that it guesses
    value: Any = getattr(mezo_dist, name)
    tests = [t for t in doctest.DocTestFinder(recurse=False).find(value, name) if t.examples]
    assert tests, f"{name} has no example"
    for test in tests:
        assert doctest.DocTestRunner(verbose=False).run(test).failed == 0


def test_the_tour_names_every_module() -> None:
    tour = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## A tour")[2].partition("\n## ")[0]
    modules = {path for path in (ROOT / "mezo_dist").rglob("*.py") if path.name != "__init__.py"}
    missing = sorted(
        str(path.relative_to(ROOT)) for path in modules if not re.search(rf"`([\w/]+/)?{path.name}`", tour)
    )
    assert not missing, f"name them in CONTRIBUTING.md's tour: {missing}"
    named = set(re.findall(r"`(?:[\w/]+/)?(\w+\.py)`", tour))
    assert named <= {path.name for path in modules} | {"__main__.py"}, "the tour names a module that is not there"


def test_the_readme_names_every_folder() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The tree")[2]
    folders = {
        path.parent.relative_to(ROOT / "mezo_dist").parts[0] for path in (ROOT / "mezo_dist").glob("*/__init__.py")
    }
    assert all(re.search(rf"^  {folder}/ ", tree, re.MULTILINE) for folder in folders)
