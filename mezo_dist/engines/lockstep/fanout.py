"""Fan-out: many forward passes of one model in lock step, each on weights of its own.

Every forward pass is a coroutine (`greenlet`) that runs the ordinary model code until that calls a hooked module, and
waits there. When all have arrived, the hooked module is served once: its variants are made together, from one read of
the weights and one generation of each direction, and the hooked module's real forward runs for each coroutine on its
own arguments with its own variant swapped in. Then all go on. Knows nothing about the model's class or about batch
dimensions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mezo_dist.directions.combination import Combination
from mezo_dist.engines.hooked import HookedModule, swap, swapped


@dataclass(frozen=True)
class ForwardPass:
    """One forward pass: ``run`` calls the model; ``variant`` is the number of the weights that it runs on."""

    variant: int
    run: Callable[[], Any]
    sample_shifts: tuple[Combination, ...] = ()
    """With a direction per sample: what to add to the variant for each sample of this pass."""


@dataclass(frozen=True, eq=False)
class Call:
    """A pass's call of a hooked module, waiting to be served."""

    caller: _Coroutine
    hooked: HookedModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: Context
    """Context variables of the pass (see `mezo_dist.engines.lockstep.head_slice`): its forward runs outside the pass,
    but with these."""


@dataclass(frozen=True)
class _Raised:
    error: Exception


class _Coroutine(greenlet.greenlet):
    """A running pass, with the hooked modules whose forward it is inside of (only those that span blocks stay open)."""

    def __init__(self, index: int, forward_pass: ForwardPass) -> None:
        super().__init__(forward_pass.run)
        self.index = index
        self.variant = forward_pass.variant
        self.sample_shifts = forward_pass.sample_shifts
        self.open: list[_Open] = []


class _Open:
    """A hooked module that spans blocks, with the weights that its modules use while one pass is inside of it and
    running."""

    def __init__(self, hooked: HookedModule, tensors: list[Tensor]) -> None:
        self._hooked = hooked
        self._tensors = tensors
        self._before: list[nn.Parameter] = []

    def enter(self) -> None:
        self._before = swap(self._hooked.weights, self._tensors)

    def leave(self) -> None:
        swap(self._hooked.weights, self._before)


@dataclass(frozen=True)
class Served:
    """The weights of one hooked module for all variants among its calls.

    ``tensors[variant]`` has one tensor per ``hooked.weights``. Those of a hooked module that spans blocks must stay
    valid while its forward runs; those of other hooked modules until the next hooked module is served. ``forward``, if
    given, replaces the hooked module's real forward (a lookup in a few rows in place of the whole table): it takes the
    call and its tensors."""

    tensors: dict[int, list[Tensor]]
    forward: Callable[[Call, list[Tensor]], Any] | None = None


Materialise = Callable[[HookedModule, Sequence[Call], Callable[..., Any]], Served]
"""(hooked, its waiting calls, its real forward) -> the weights to run it on."""


class FanOut:
    """Runs passes on one model. Hooks into the hooked modules' ``forward`` while `run` is active, and only then."""

    def __init__(self, hooked_modules: Sequence[HookedModule], materialise: Materialise) -> None:
        self._hooked_modules = hooked_modules
        self._materialise = materialise
        self.modules_served: set[str] = set()
        """Names of the hooked modules that some caller has called so far."""

    def run(self, passes: Sequence[ForwardPass]) -> list[Any]:
        """Results of ``passes``, in order.

        An exception inside a pass surfaces here with its own traceback; the model is usable afterwards.

        Raises:
            NotImplementedError: the model switches autocast around its layers.
        """
        forwards = {hooked: _install(hooked) for hooked in self._hooked_modules}
        try:
            return self._run(passes, forwards)
        finally:
            for hooked, forward in forwards.items():
                _uninstall(hooked, forward)

    def _run(self, passes: Sequence[ForwardPass], forwards: dict[HookedModule, Callable[..., Any]]) -> list[Any]:
        results: list[Any] = [None] * len(passes)
        waiting: dict[HookedModule, list[Call]] = {}
        coroutines = [_Coroutine(index, caller) for index, caller in enumerate(passes)]
        autocast = _autocast()

        def resume(caller: _Coroutine, outcome: Any = None, *, first: bool = False) -> None:
            for opened in caller.open:
                opened.enter()
            try:
                call = caller.switch() if first else caller.switch(outcome)
            finally:
                for opened in reversed(caller.open):
                    opened.leave()
            if _autocast() != autocast:  # it belongs to the thread, so the next pass would run in it
                raise NotImplementedError("the model switches autocast around its layers; set model.compute instead")
            if caller.dead:
                results[caller.index] = call
            else:
                waiting.setdefault(call.hooked, []).append(call)

        try:
            for caller in coroutines:
                resume(caller, first=True)
            while waiting:
                # The earliest hooked module first, so that passes that lag behind (other experts, other branches) catch
                # up.
                hooked = min(waiting, key=lambda s: s.order)
                # Who came last goes first: what it has just computed is in the cache still.
                for call, outcome in self._serve(hooked, waiting.pop(hooked)[::-1], forwards[hooked]):
                    resume(call.caller, outcome)
        finally:
            for caller in coroutines:
                if caller and not caller.dead:
                    caller.throw(greenlet.GreenletExit())
        return results

    def _serve(
        self, hooked: HookedModule, calls: Sequence[Call], real: Callable[..., Any]
    ) -> Iterator[tuple[Call, Any]]:
        """Each call with its outcome, which is computed when it is asked for: its pass can go on while it is hot."""
        self.modules_served.add(hooked.name)
        served = self._materialise(hooked, calls, real)
        for call in calls:
            tensors = served.tensors[call.caller.variant]
            if hooked.spans_blocks:  # its forward will call other hooked modules, so it must run inside the coroutine
                yield call, tensors
                continue
            try:
                forward = served.forward or functools.partial(on_tensors, hooked, real)
                outcome = _unshared(call.context.run(forward, call, tensors), tensors)
            except Exception as error:  # noqa: BLE001 (raised again inside the pass, where its traceback belongs)
                outcome = _Raised(error)
            yield call, outcome


def _autocast() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


def on_tensors(hooked: HookedModule, real: Callable[..., Any], call: Call, tensors: list[Tensor]) -> Any:
    """The hooked module's real forward with ``tensors`` in place of its weights."""
    with swapped(hooked.weights, tensors):
        return real(*call.args, **call.kwargs)


def _install(hooked: HookedModule) -> Callable[..., Any]:
    """Make calls of the hooked module's forward from inside a pass wait for the hub. Returns the real forward."""
    real = hooked.module.forward

    def waiting_forward(*args: Any, **kwargs: Any) -> Any:
        caller = greenlet.getcurrent()
        if not isinstance(caller, _Coroutine):
            return real(*args, **kwargs)
        outcome = caller.parent.switch(Call(caller, hooked, args, kwargs, copy_context()))
        if isinstance(outcome, _Raised):
            raise outcome.error  # here, because thrown from outside it would lose its traceback
        if not hooked.spans_blocks:
            return outcome
        opened = _Open(hooked, outcome)
        caller.open.append(opened)
        opened.enter()
        try:
            return real(*args, **kwargs)
        finally:
            caller.open.pop().leave()

    hooked.module.forward = waiting_forward
    return real


def _uninstall(hooked: HookedModule, real: Callable[..., Any]) -> None:
    if (
        getattr(real, "__self__", None) is hooked.module
        and getattr(real, "__func__", None) is type(hooked.module).forward
    ):
        del hooked.module.forward  # it was the class's own method
    else:
        hooked.module.forward = real


def _unshared(output: Any, scratch: list[Tensor]) -> Any:
    """``output``, with whatever in it is a view of the scratch copied, for the next hooked module overwrites that."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in scratch}

    def own(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor

    return own(output) if isinstance(output, Tensor) else pytree.tree_map_only(Tensor, own, output)
