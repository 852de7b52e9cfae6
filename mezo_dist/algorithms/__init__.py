"""Algorithms are planners: small, pure, torch-free. `ALGORITHMS` is the closed list of those that need forward passes
only; a config can name one of them, or a baseline in `FIRST_ORDER`.

To add one: a config dataclass, a state dataclass and a planner (see `mezo.py`), and a line in `ALGORITHMS` and in
`Settings`; the contract tests and the command line pick it up from there.
"""

from __future__ import annotations

from mezo_dist.algorithms.base import Algorithm, Problem
from mezo_dist.algorithms.first_order import SGD, AdamW, FirstOrderPlanner
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner
from mezo_dist.algorithms.svrg import MeZOSVRG, SVRGPlanner
from mezo_dist.algorithms.svrg_released import MeZOSVRGReleased, SVRGReleasedPlanner

Settings = MeZO | MeZOSVRG | MeZOSVRGReleased
"""Settings of any algorithm that needs forward passes only; their ``name`` says of which."""
FirstOrder = SGD | AdamW
"""Settings of any first-order baseline."""
ALGORITHMS: dict[str, tuple[type, type]] = {
    "mezo": (MeZO, MeZOPlanner),
    "mezo-svrg": (MeZOSVRG, SVRGPlanner),
    "mezo-svrg-released": (MeZOSVRGReleased, SVRGReleasedPlanner),
}
"""Name -> (settings, planner)."""
FIRST_ORDER: dict[str, tuple[type, type]] = {
    "sgd": (SGD, FirstOrderPlanner),
    "adamw": (AdamW, FirstOrderPlanner),
}
"""The same of the baselines that back-propagate."""
EVERY = ALGORITHMS | FIRST_ORDER
"""All that a config can name."""


def build(name: str, settings: Settings | FirstOrder, problem: Problem) -> Algorithm[object]:
    """The planner ``name`` with its ``settings``, an instance of the config class in `EVERY`.

    What its state is depends on ``name``: only the planner itself looks into it.

    Args:
        name: a name in `EVERY`.
        settings: an instance of the config class that stands there.
        problem: what the algorithm may know about the run.
    """
    planner: Algorithm[object] = EVERY[name][1](settings, problem)
    return planner
