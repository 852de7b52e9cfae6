"""Imports of large packages, without searches for unused objects."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys

import pytest

from mezo_dist.imports import imports_at_once


@pytest.mark.parametrize("is_on", [True, False])
def test_the_search_is_off_within_and_as_before_after(is_on: bool) -> None:
    frozen = gc.get_freeze_count()
    try:
        (gc.enable if is_on else gc.disable)()
        with contextlib.suppress(ImportError), imports_at_once():
            with imports_at_once():
                pass
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() is is_on
        assert gc.get_freeze_count() == frozen
    finally:
        gc.enable()


def test_what_was_imported_for_good_is_not_looked_through_again() -> None:
    code = (
        "import gc; from mezo_dist.imports import imports_at_once\n"
        "with imports_at_once(for_good=True): import email.message\n"
        "assert gc.get_freeze_count() > 1_000 and len(gc.get_objects()) < 1_000"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
