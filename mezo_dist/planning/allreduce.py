"""Seconds of the all-reduce of a round's scalars, by the way that they take between the ranks.

``ring`` is what runs do: gloo's all-reduce passes every part of a message once round all ranks to add it up, and once
more to tell everybody (2 (n - 1) messages one after another; ``examples/scaling_study/simulate_check.py`` counts them).
``tree`` and ``hierarchical`` are what it would cost otherwise: up and down a binary tree of all ranks; up and down a
tree in each host, and one between the hosts, whose messages alone cross links (Thakur et al. 2005, section 3).
"""

from __future__ import annotations

import math
from typing import Literal

Reduce = Literal["ring", "tree", "hierarchical"]


def hops(kind: Reduce, hosts: int, ranks_per_host: int) -> int:
    """Messages that follow one another in one all-reduce.

    Args:
        kind: the way.
        hosts: number of hosts.
        ranks_per_host: ranks of each.
    """
    ranks = hosts * ranks_per_host
    if kind == "ring":
        return 2 * (ranks - 1)
    if kind == "tree":
        return 2 * math.ceil(math.log2(ranks))
    return 2 * (math.ceil(math.log2(hosts)) + math.ceil(math.log2(ranks_per_host)))
