"""The package installs, as a wheel and from a checkout, and the set-up around it keeps its promises."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from torch.distributed.run import parse_args

ROOT = Path(__file__).resolve().parents[2]
GENERATED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
# A caller's PYTHONPATH would hide a broken install; make's own variables would reach the make started here.
ENV = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "MAKEFLAGS", "MAKELEVEL"}}


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] = ENV) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def output(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] = ENV) -> str:
    """What a command prints; the test fails if the command does."""
    done = run(*command, cwd=cwd, env=env)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: building leaves files behind, and takes up old ones."""

    def ignore(folder: str, names: list[str]) -> set[str]:
        outputs = {"runs"} if Path(folder) == ROOT else set()  # mezo_dist/runs is a package
        return GENERATED(folder, names) | outputs

    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("tree") / "mezo_dist", ignore=ignore))


@pytest.fixture(scope="session")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    output(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        folder,
        tree,
    )
    (path,) = folder.glob("mezo_dist-*.whl")
    return path


@dataclass(frozen=True)
class Installed:
    bin: Path
    """The scripts of the environment."""
    home: Path
    """Where `mezo_dist` must be imported from."""


@pytest.fixture(scope="session", params=["wheel", "editable"])
def installed(
    request: pytest.FixtureRequest, tree: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Installed:
    """A fresh environment with only mezo_dist in it; a .pth file lends it the dependencies of this one."""
    prefix = tmp_path_factory.mktemp(request.param)
    venv.create(prefix, symlinks=True)
    python = prefix / "bin" / "python"
    site = Path(output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    what = [wheel] if request.param == "wheel" else ["--editable", tree]
    # --ignore-installed: never touch the mezo_dist of the lending environment.
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed"]
    output(sys.executable, "-m", "pip", "--python", python, "install", *options, *what)
    return Installed(python.parent, site if request.param == "wheel" else tree)


def test_both_commands_answer_from_any_folder(installed: Installed, tmp_path: Path) -> None:
    script = output(installed.bin / "mezo-dist", "--help", cwd=tmp_path)
    module = output(installed.bin / "python", "-m", "mezo_dist", "--help", cwd=tmp_path)
    assert "train" in script
    assert script == module


def test_installed_files_are_the_ones_used(installed: Installed, tmp_path: Path) -> None:
    code = "import mezo_dist, mezo_dist.launcher; print(mezo_dist.__file__, *mezo_dist.launcher.__path__)"
    package, launcher = output(installed.bin / "python", "-c", code, cwd=tmp_path).split()
    assert Path(package).is_relative_to(installed.home)
    assert Path(launcher).is_relative_to(installed.home)
    assert os.access(Path(launcher) / "torchrun_local.sh", os.X_OK)


def test_wheel_holds_every_file_of_the_package(wheel: Path, tree: Path) -> None:
    paths = [path for path in (tree / "mezo_dist").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    files = {path.relative_to(tree).as_posix() for path in paths}  # an editable install leaves bytecode there
    launcher = {path.name for path in (tree / "launcher").iterdir() if path.is_file()}
    files |= {f"mezo_dist/launcher/{name}" for name in launcher}
    files |= {f"mezo_dist/{path.relative_to(tree).as_posix()}" for path in (tree / "configs").rglob("*.yaml")}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.startswith("mezo_dist/")} == files
    # Nothing else becomes importable: a top-level `launcher` or `tests` could hide somebody else's.
    assert {name.split("/")[0] for name in names} == {"mezo_dist", f"{wheel.name.split('-py3')[0]}.dist-info"}


def requirements(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    return [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]


def pins(file: str = "constraints.txt") -> dict[str, Requirement]:
    lines = (ROOT / file).read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in parsed}


def version(pin: Requirement) -> str:
    (spec,) = pin.specifier
    assert spec.operator == "==", pin
    return spec.version


def test_every_dependency_that_make_installs_is_pinned_within_its_bounds(wheel: Path) -> None:
    pinned = pins()
    for requirement in requirements(wheel):
        if requirement.name == "mezo_dist":
            continue
        assert canonicalize_name(requirement.name) in pinned, f"{requirement} has no line in constraints.txt"
        assert requirement.specifier.contains(version(pinned[canonicalize_name(requirement.name)])), requirement


def test_the_oldest_set_is_the_lower_bounds(wheel: Path) -> None:
    """Of what everybody needs, and of the extras that the oldest set is tested with."""
    pinned = pins("constraints-oldest.txt")
    extras = ("", "trainer", "peft", "gpu")
    wanted = [
        one
        for one in requirements(wheel)
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras)
    ]
    assert {canonicalize_name(requirement.name) for requirement in wanted} == pinned.keys()
    for requirement in wanted:
        (lowest,) = (Version(spec.version) for spec in requirement.specifier if spec.operator == ">=")
        assert Version(version(pinned[canonicalize_name(requirement.name)])) == lowest, requirement


def test_builds_of_torch_for_a_device_are_left_alone(wheel: Path, tmp_path: Path) -> None:
    """`pip install mezo_dist-*.whl` beside a torch that is new enough, whatever it was built for, wants no other."""
    (torch,) = (requirement for requirement in requirements(wheel) if requirement.name == "torch")
    for there in ("2.11.0+cu130", "2.11.0+cpu", "2.12.1+rocm7.0", "2.13.0+cpu", "2.14.1", "2.15.0+cu132"):
        assert torch.specifier.contains(there), there
    report = tmp_path / "report.json"
    options = ["--dry-run", "--no-index", "--quiet", "--report", str(report)]
    output(sys.executable, "-m", "pip", "install", *options, f"mezo_dist @ {wheel.as_uri()}")
    names = {one["metadata"]["name"] for one in json.loads(report.read_text())["install"]}
    assert names == {"mezo_dist"}, "pip would install something beside what is there"


def test_what_is_released_is_right(tree: Path, wheel: Path, tmp_path: Path) -> None:
    """The sdist makes the same wheel as the tree, and twine finds nothing to complain of."""
    output(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, tree)
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == [wheel.name, f"{wheel.name.split('-py3')[0]}.tar.gz"]
    with zipfile.ZipFile(paths[0]) as built, zipfile.ZipFile(wheel) as direct:
        contents = [{name: archive.read(name) for name in archive.namelist()} for archive in (built, direct)]
    assert contents[0] == contents[1]
    assert "PASSED" in output(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *paths)


def test_pins_that_need_a_newer_python_say_so() -> None:
    for name, pin in pins().items():
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if distribution.version.split("+")[0] == version(pin):
            about = distribution.metadata
            needs = SpecifierSet(about["Requires-Python"] if "Requires-Python" in about else "")  # noqa: SIM401
            marker = None if needs.contains("3.10.13") else 'python_version >= "3.11"'
            assert marker == (pin.marker and str(pin.marker)), f"{pin}: the package needs Python {needs}"


def test_help_imports_nothing_heavy() -> None:
    code = """
import runpy, sys
sys.argv = ["mezo-dist", "--help"]
try:
    runpy.run_module("mezo_dist", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
print("LOADED", *sys.modules)
"""
    loaded = output(sys.executable, "-c", code).split("LOADED")[1].split()
    assert "mezo_dist.cli" in loaded
    heavy = {"torch", "transformers", "datasets", "numba", "tensorboard", "torchmetrics", "pandas", "scipy"}
    assert heavy.isdisjoint(loaded), heavy.intersection(loaded)


@pytest.mark.parametrize(
    "command", ["ruff check --output-format concise", "ruff format --check --output-format concise", "mypy"]
)
def test_lint(command: str) -> None:
    output(sys.executable, "-m", *command.split())


def test_an_old_python_is_refused_in_words(tree: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")  # what the version check of the Makefile exits with
    old.chmod(0o755)
    done = run("make", "test", f"PYTHON={old}", cwd=tree)
    assert done.returncode != 0
    assert "needs Python 3.10 or newer" in done.stdout
    assert not (tree / ".venv").exists()


def test_make_help_names_the_two_commands() -> None:
    text = output("make", "help")
    assert "make quickstart " in text
    assert "make test " in text


def test_local_launcher_starts_torchrun_with_a_share_of_the_cores(tmp_path: Path) -> None:
    torchrun = tmp_path / "torchrun"
    torchrun.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS"\nprintf "%s\\n" "$@"\n')
    torchrun.chmod(0o755)
    script = ROOT / "launcher" / "torchrun_local.sh"
    env = ENV | {"PATH": f"{tmp_path}:{ENV['PATH']}", "OMP_NUM_THREADS": ""}
    command = [
        "--standalone",
        "--nproc-per-node",
        "100000",
        "-m",
        "--",
        "mezo_dist",
        "train",
        "my config.yaml",
        "--monitor=[csv]",
    ]
    assert output(script, "100000", "my config.yaml", "--monitor=[csv]", env=env).splitlines() == ["1", *command]
    assert parse_args(command).training_script_args == command[-3:]  # not torchrun's --monitor-interval
    assert output(script, "1", "c.yaml", env=env).splitlines()[0] == str(os.cpu_count())
    assert output(script, "1", "c.yaml", env=env | {"OMP_NUM_THREADS": "7"}).splitlines()[0] == "7"
    assert run(script, "c.yaml").returncode == 2
