"""Freed activations are used again without page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from mezo_dist.engines.heap import keep_freed_memory
if {keep}:
    keep_freed_memory()
def work():
    kept = [torch.zeros(6_000_000) for _ in range(4)]  # 24 MB each, as a fan-out holds them
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
work()
print(*(faults() for _ in range(5)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has these settings")
def test_page_faults_are_gone() -> None:
    faults = {}
    for keep in (False, True):
        done = subprocess.run([sys.executable, "-c", SCRIPT.format(keep=keep)], stdout=subprocess.PIPE, check=True)
        faults[keep] = [int(count) for count in done.stdout.split()]
    # Of several rounds, for malloc learns a little by itself, and some systems reclaim memory now and then.
    assert max(faults[False]) > 2_000, "malloc has become wiser: mezo_dist/engines/heap.py can go"
    assert min(faults[True]) * 2 < max(faults[False])
