"""Algorithms are planners: small, pure, torch-free. `ALGORITHMS` is the closed list that a config can name.

To add one: a config dataclass, a state dataclass and a planner (see `mezo.py`), and a line in `ALGORITHMS` and in
`Settings`; the contract tests and the command line pick it up from there.
"""

from __future__ import annotations

from mezo_dist.algorithms.base import Algorithm, Problem
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner
from mezo_dist.algorithms.svrg import MeZOSVRG, SVRGPlanner
from mezo_dist.algorithms.svrg_released import MeZOSVRGReleased, SVRGReleasedPlanner

Settings = MeZO | MeZOSVRG | MeZOSVRGReleased
"""Settings of any algorithm; their ``name`` says of which."""
ALGORITHMS: dict[str, tuple[type, type]] = {
    "mezo": (MeZO, MeZOPlanner),
    "mezo-svrg": (MeZOSVRG, SVRGPlanner),
    "mezo-svrg-released": (MeZOSVRGReleased, SVRGReleasedPlanner),
}
"""Name -> (settings, planner)."""


def build(name: str, settings: Settings, problem: Problem) -> Algorithm[object]:
    """The planner ``name`` with its ``settings``, an instance of the config class in `ALGORITHMS`.

    What its state is depends on ``name``: only the planner itself looks into it.

    Args:
        name: a name in `ALGORITHMS`.
        settings: an instance of the config class that stands there.
        problem: what the algorithm may know about the run.
    """
    planner: Algorithm[object] = ALGORITHMS[name][1](settings, problem)
    return planner
