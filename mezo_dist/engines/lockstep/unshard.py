"""The unshard schedule: which units are whole at the moment (the current one, those that stay, perhaps the next one).

Ranks must gather the same units in the same order, or collectives of different sizes meet. So before each gather the
ranks compare which unit it is for. A rank whose forward passes take another path through the model is named on all
ranks; without that, it would make them hang or crash.
"""

from __future__ import annotations

from typing import final

from mezo_dist.engines.layouts.base import Layout
from mezo_dist.engines.meter import Meter
from mezo_dist.engines.units import Unit


@final
class UnshardSchedule:
    """Makes units whole as passes come to them, and releases them behind.

    Args:
        layout: where the weights live.
        prefetch: start to gather a unit while its predecessor computes (one unit more is whole at a time). The order
            is that of the passes before, which is the same on all ranks.
    """

    def __init__(self, layout: Layout, *, prefetch: bool) -> None:
        self.meter = Meter()
        self._layout = layout
        self._prefetch = prefetch
        self._next: dict[Unit, Unit] = {}
        self._current: Unit | None = None
        self._coming: Unit | None = None
        self._staying: list[Unit] = []

    def need(self, unit: Unit, *, keep_current: bool = False) -> None:
        """Make ``unit`` whole. What was whole before may be released, unless ``keep_current``."""
        if not self._layout.is_sharded or unit is self._current or unit in self._staying:
            return
        if self._current is not None:
            self._next[self._current] = unit
            self._release_current(keep=keep_current)
        if self._coming is not unit:
            self._drop_coming()
            self._start(unit)
        self._coming = None
        self._layout.finish(unit)
        self._current = unit
        following = self._next.get(unit)
        if self._prefetch and following is not None and following not in self._staying:
            self._start(following)
            self._coming = following

    def close(self) -> None:
        """Release everything: the end of a pass, or an error in it."""
        self._drop_coming()
        if self._current is not None:
            self._staying.append(self._current)
            self._current = None
        while self._staying:
            self._layout.release(self._staying.pop())

    def _release_current(self, *, keep: bool) -> None:
        assert self._current is not None
        if keep or self._current.stays:
            self._staying.append(self._current)
        else:
            self._layout.release(self._current)
        self._current = None

    def _drop_coming(self) -> None:
        if self._coming is not None:
            unit, self._coming = self._coming, None
            self._layout.finish(unit)
            self._layout.release(unit)

    def _start(self, unit: Unit) -> None:
        self._layout.synchronize(f"gather {unit.name}")
        with self.meter:
            self._layout.start(unit)
