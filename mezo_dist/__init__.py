"""mezo_dist: distributed zeroth-order fine-tuning of language models, with forward passes only.

Importing the package imports nothing else, so that `mezo-dist --help` answers at once; the names below are loaded when
they are first used (PEP 562). `docs/api.md` lists them all.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_MODULES = {
    "algorithms.mezo": ("MeZO",),
    "algorithms.momentum": ("Momentum",),
    "algorithms.schedules": ("Annealing", "Schedule"),
    "algorithms.svrg": ("MeZOSVRG",),
    "algorithms.svrg_released": ("MeZOSVRGReleased",),
    "directions.combination": ("Combination",),
    "directions.law": ("Law",),
    "distributed.communicator": ("Communicator", "OutOfStepError"),
    "distributed.join": ("join",),
    "errors": ("LostRankError", "Stopped", "UserError"),
    "optim.log": ("replay",),
    "optim.minimize": ("Draw", "Minimum", "minimize"),
    "optim.optimizer": ("Optimizer",),
    "optim.sharding": ("shard",),
    "runs.api": ("evaluate", "export", "load_run", "train"),
    "trainer.trainer": ("MeZOTrainer",),
}
"""Module -> the public names in it."""
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = [
    "Annealing",
    "Combination",
    "Communicator",
    "Draw",
    "Law",
    "LostRankError",
    "MeZO",
    "MeZOSVRG",
    "MeZOSVRGReleased",
    "MeZOTrainer",
    "Minimum",
    "Momentum",
    "Optimizer",
    "OutOfStepError",
    "Schedule",
    "Stopped",
    "UserError",
    "evaluate",
    "export",
    "join",
    "load_run",
    "minimize",
    "replay",
    "shard",
    "train",
]

if TYPE_CHECKING:  # for editors and type checkers, which do not follow `__getattr__`
    from mezo_dist.algorithms.mezo import MeZO
    from mezo_dist.algorithms.momentum import Momentum
    from mezo_dist.algorithms.schedules import Annealing, Schedule
    from mezo_dist.algorithms.svrg import MeZOSVRG
    from mezo_dist.algorithms.svrg_released import MeZOSVRGReleased
    from mezo_dist.directions.combination import Combination
    from mezo_dist.directions.law import Law
    from mezo_dist.distributed.communicator import Communicator, OutOfStepError
    from mezo_dist.distributed.join import join
    from mezo_dist.errors import LostRankError, Stopped, UserError
    from mezo_dist.optim.log import replay
    from mezo_dist.optim.minimize import Draw, Minimum, minimize
    from mezo_dist.optim.optimizer import Optimizer
    from mezo_dist.optim.sharding import shard
    from mezo_dist.runs.api import evaluate, export, load_run, train
    from mezo_dist.trainer.trainer import MeZOTrainer


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mezo_dist' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mezo_dist.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
