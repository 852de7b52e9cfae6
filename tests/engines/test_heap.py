"""What happens to freed memory: activations are used again without page faults; gathered weights go at once."""

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


HOLES = """
import torch
from mezo_dist.engines.heap import give_back_freed_memory
if {give_back}:
    give_back_freed_memory()
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
torch.zeros(7_000_000)  # 28 MB: from now on malloc takes blocks of this size for usual, and keeps them
before, kept = resident(), []
for _ in range(8):  # weights that come and go, and small things that stay
    weights = [torch.zeros(6_000_000) for _ in range(2)]
    kept += [weights.pop(), torch.zeros(1000)]
del kept[::2], weights
print(resident() - before)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has these settings")


@glibc
def test_page_faults_are_gone() -> None:
    faults = {}
    for keep in (False, True):
        done = subprocess.run([sys.executable, "-c", SCRIPT.format(keep=keep)], stdout=subprocess.PIPE, check=True)
        faults[keep] = [int(count) for count in done.stdout.split()]
    # Of several rounds, for malloc learns a little by itself, and some systems reclaim memory now and then.
    assert max(faults[False]) > 2_000, "malloc has become wiser: mezo_dist/engines/heap.py can go"
    assert min(faults[True]) * 2 < max(faults[False])


@glibc
def test_what_is_freed_goes_back() -> None:
    grown = {}
    for give_back in (False, True):
        command = [sys.executable, "-c", HOLES.format(give_back=give_back)]
        grown[give_back] = int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    assert grown[False] > 48e6, "malloc has become wiser: give_back_freed_memory can go"
    assert grown[True] < 10e6
