"""Forward passes as coroutines (`greenlet`): what a pass is, and what it waits for."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from typing import Any

import greenlet
from torch import Tensor, nn

from mezo_dist.directions.combination import Combination
from mezo_dist.engines.hooked import HookedModule, Weight, swap
from mezo_dist.engines.lockstep.reads import resolved


@dataclass(frozen=True)
class ForwardPass:
    """One forward pass: ``run`` calls the model; ``variant`` is the number of the weights that it runs on."""

    variant: int
    run: Callable[[], object]
    sample_shifts: tuple[Combination, ...] = ()
    """With a direction per sample: what to add to the variant for each sample of this pass."""


@dataclass(eq=False)  # frozen ones take three times as long to make
class Call:
    """A pass waits for a hooked module's forward to be computed on its variant."""

    caller: Coroutine
    hooked: HookedModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: Context | None = None
    """The context variables of the pass: where the forward runs outside of it, it runs with these."""


@dataclass(frozen=True, eq=False)
class Read:
    """A pass waits for its variant of one weight, which its code uses without calling the module."""

    caller: Coroutine
    hooked: HookedModule
    weight: Weight


@dataclass(frozen=True, eq=False)
class Agree:
    """A pass waits for all others, on all ranks, to say whether they go on."""

    caller: Coroutine
    goes_on: bool


@dataclass(frozen=True)
class Raised:
    """An outcome that is to be raised inside the pass, where its traceback belongs."""

    error: Exception


class Coroutine(greenlet.greenlet):
    """A running pass, with the hooked modules whose forward it is inside of (only those that span blocks stay open)."""

    def __init__(self, index: int, forward_pass: ForwardPass) -> None:
        super().__init__(self._run_model)
        self._run = forward_pass.run
        self.index = index
        self.variant = forward_pass.variant
        self.sample_shifts = forward_pass.sample_shifts
        self.open: list[Open] = []
        self.has_read = False
        """A weight was read, so that handles may be among the pass's values (see `WeightHandle`)."""

    def _run_model(self) -> object:
        result = self._run()
        return resolved(result) if self.has_read else result

    def wait(self, request: Call | Read | Agree) -> Any:
        """Let the others run until ``request`` is served. Only the pass itself may call this."""
        outcome = self.parent.switch(request)
        if isinstance(outcome, Raised):
            raise outcome.error  # here, because thrown from outside it would lose its traceback
        return outcome


def is_inside() -> bool:
    """Whether the caller is part of a forward pass."""
    return isinstance(greenlet.getcurrent(), Coroutine)


class Open:
    """A hooked module that spans blocks, with the weights that its modules use while one pass is inside of it and
    running."""

    def __init__(self, hooked: HookedModule, tensors: list[Tensor]) -> None:
        self.hooked = hooked
        self._tensors = tensors
        self._before: list[nn.Parameter] = []

    def enter(self) -> None:
        """The pass goes on."""
        self._before = swap(self.hooked.weights, self._tensors)

    def leave(self) -> None:
        """The pass waits, or leaves the module."""
        swap(self.hooked.weights, self._before)


def any_goes_on(goes_on: bool) -> bool:
    """Whether any forward pass that runs in lock step with this one still has something to do, on any rank.

    For forwards that call the model until they have enough, token by token. Where weights are sharded, all must call it
    equally often, or ranks gather different things. So a pass that is done asks here, and goes on with the others.

    Args:
        goes_on: whether this pass has something to do.
    """
    caller = greenlet.getcurrent()
    return bool(caller.wait(Agree(caller, goes_on))) if isinstance(caller, Coroutine) else goes_on
