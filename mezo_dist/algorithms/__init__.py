"""Algorithms are planners: small, pure, torch-free. `ALGORITHMS` is the closed list that a config can name.

To add one: a config dataclass, a state dataclass and a planner (see `mezo.py`), and a line in `ALGORITHMS`; the
contract tests and the command line pick it up from there.
"""

from __future__ import annotations

from typing import Any

from mezo_dist.algorithms.base import Algorithm, Problem
from mezo_dist.algorithms.mezo import Mezo, MezoConfig
from mezo_dist.algorithms.svrg import Svrg, SvrgConfig
from mezo_dist.algorithms.svrg_released import SvrgReleased, SvrgReleasedConfig

ALGORITHMS: dict[str, tuple[type, type]] = {
    "mezo": (MezoConfig, Mezo),
    "mezo-svrg": (SvrgConfig, Svrg),
    "mezo-svrg-released": (SvrgReleasedConfig, SvrgReleased),
}
"""Name -> (settings, planner)."""


def build(name: str, settings: Any, problem: Problem) -> Algorithm:
    """The planner ``name`` with its ``settings``, an instance of the config class in `ALGORITHMS`."""
    planner: Algorithm = ALGORITHMS[name][1](settings, problem)
    return planner
