"""What happens to freed memory: activations are used again without page faults; gathered weights go at once."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, torch
from mezo_dist.engines.malloc import tune_malloc
if {keep}:
    tune_malloc(is_sharded=False)
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
from mezo_dist.engines.malloc import tune_malloc
if {give_back}:
    tune_malloc(is_sharded=True)
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
SETTINGS = ("THP_MEM_ALLOC_ENABLE", "MALLOC_", "GLIBC_TUNABLES")
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has these settings")


def run(script: str) -> list[int]:
    """The numbers that it prints, in a process without the settings of malloc that this one has."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, env=env, check=True)
    return [int(word) for word in done.stdout.split()]


@glibc
def test_page_faults_are_gone() -> None:
    faults = {}
    for keep in (False, True):
        faults[keep] = run(SCRIPT.format(keep=keep))
    # Several rounds are measured, for malloc learns a little by itself, and some systems reclaim memory now and then.
    assert max(faults[False]) > 2_000, "malloc has become wiser: mezo_dist/engines/malloc.py can go"
    assert min(faults[True]) * 2 < max(faults[False])


@glibc
def test_what_is_freed_goes_back() -> None:
    grown = {}
    for give_back in (False, True):
        (grown[give_back],) = run(HOLES.format(give_back=give_back))
    assert grown[True] < 10e6
    if grown[False] <= 10e6:  # 24 to 384 MB seen with glibc 2.36 on Linux; none on a sandboxed machine with a GPU
        pytest.skip("on this machine freed memory goes back in any case, or nothing tells that it does not")


PAGES = """
import sys
from pathlib import Path
if {command_line}:
    from mezo_dist import cli
    cli.main(["report", "/none"])
import torch
weights = torch.ones(16_000_000)
with open("/proc/self/smaps_rollup") as file:
    print(next(line.split()[1] for line in file if line.startswith("AnonHugePages")))
"""
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not ENABLED.exists() or "[madvise]" not in ENABLED.read_text(), reason="large pages are not for those who ask"
)
def test_weights_are_on_large_pages() -> None:
    kilobytes = {}
    for command_line in (False, True):
        (kilobytes[command_line],) = run(PAGES.format(command_line=command_line))
    assert kilobytes[False] + 10_000 < kilobytes[True]  # of 64,000; a system short of large pages gives fewer
