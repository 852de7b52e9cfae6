"""Compiled code: kept between runs, whatever state the cache is in, and done without where numba is missing."""

from __future__ import annotations

import ctypes
import importlib
import logging
import sys
from pathlib import Path
from types import ModuleType

import numba
import pytest
import torch

import mezo_dist.directions.kernels
from mezo_dist.directions.add import add, advance, implementation
from mezo_dist.directions.bits import GAUSSIAN
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.kernels import numba_cache, reference


def test_without_numba_the_reference_does_it_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("cpu", "cpu_arguments", "cpu_kernel", "numba_cache", "threads"):
        monkeypatch.delitem(sys.modules, f"mezo_dist.directions.kernels.{name}", raising=False)
        monkeypatch.delattr(mezo_dist.directions.kernels, name, raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)  # `import numba` raises ImportError
    implementation.cache_clear()
    try:
        weight, advanced, step = torch.zeros(10), torch.zeros(10), Combination.single(1, 1.0)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                add(weight, [step], [weight], param_id=2, bits=GAUSSIAN)
            advance(advanced, [(step, None), (step, None)], param_id=2, bits=GAUSSIAN)
        assert implementation("cpu") is reference
    finally:
        implementation.cache_clear()
    assert [record.getMessage().count("pip install numba") for record in caplog.records] == [1]
    direction = GAUSSIAN.chunks(1, 2, 0, 1)[0, :10]
    assert torch.equal(weight, 2 * direction)
    assert torch.equal(advanced, 2 * direction)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    tmp_path.joinpath("doubling.py").write_text("def double(x):\n    x[0] *= 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "doubling", raising=False)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    return importlib.import_module("doubling")


def test_compiled_code_is_kept_and_damage_is_survived(
    source: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def doubled() -> float:
        x = ctypes.c_float(1)
        numba_cache.compiled(source.double, "void(CPointer(float32))", []).ctypes(ctypes.byref(x))
        return x.value

    assert doubled() == 2
    index, code = sorted((tmp_path / "cache").rglob("*.nb[ic]"), key=lambda path: path.suffix, reverse=True)
    written = code.stat().st_mtime_ns
    assert doubled() == 2
    assert code.stat().st_mtime_ns == written  # taken from the cache
    assert not caplog.records
    for path in (code, index):
        path.write_bytes(path.read_bytes()[:50])
        assert doubled() == 2
        assert "NUMBA_CACHE_DIR" in caplog.records[-1].getMessage()
    assert len(caplog.records) == 2


def test_without_a_writable_cache_it_still_compiles(
    source: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not hasattr(numba.config, "CACHE_LOCATOR_CLASSES"):
        pytest.skip(f"numba {numba.__version__} takes another folder instead, and cannot be kept from it")
    tmp_path.joinpath("file").touch()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "UserProvidedCacheLocator")
    x = ctypes.c_float(1)
    numba_cache.compiled(source.double, "void(CPointer(float32))", []).ctypes(ctypes.byref(x))
    assert x.value == 2
    assert "no locator" in caplog.text
