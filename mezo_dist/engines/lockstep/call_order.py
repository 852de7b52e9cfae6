"""In which order passes call modules: what is made together is what was called together before."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import final

from torch import nn

from mezo_dist.engines.hooked import HookedModule
from mezo_dist.engines.units import Unit


@final
class CallOrder:
    """Learns which modules follow one another, from one run of passes for the next.

    Args:
        units: of the model.
    """

    def __init__(self, units: Iterable[Unit]) -> None:
        several = list(units)
        self._unit_of = {hooked.module: unit for unit in several for hooked in unit.hooked_modules}
        self._hooked = {hooked.module: hooked for unit in several for hooked in unit.hooked_modules}
        self._called: list[nn.Module] = []
        self._before: list[nn.Module] = []
        self._following: dict[nn.Module, list[HookedModule]] = {}

    def add(self, module: nn.Module) -> None:
        """A module is called."""
        self._called.append(module)

    def following(self, module: nn.Module) -> Sequence[HookedModule]:
        """What followed on the first call of ``module`` in the passes before, in its unit, until it was called
        again."""
        return self._following.get(module, ())

    def end(self) -> bool:
        """The passes are over. Returns whether they called other modules, or in another order, than those before."""
        called, self._called = self._called, []
        if not called or called == self._before:
            return False
        self._before = called
        self._following = self._followers(called)
        return True

    def _followers(self, order: Sequence[nn.Module]) -> dict[nn.Module, list[HookedModule]]:
        """See `following`. (Texts that are decoded call all modules once per token, so what is looked at must not grow
        with the square of the calls.)"""
        following: dict[nn.Module, list[HookedModule]] = {}
        for number, module in enumerate(order):
            if module not in following:
                rest: dict[nn.Module, None] = {}
                for other in itertools.islice(order, number + 1, None):
                    if other is module or self._unit_of[other] is not self._unit_of[module]:
                        break
                    rest[other] = None
                following[module] = [self._hooked[other] for other in rest]
        return following
