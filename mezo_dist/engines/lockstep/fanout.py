"""Fan-out: many forward passes of one model in lock step, each on weights of its own.

Every forward pass is a coroutine that runs the ordinary model code until that calls a hooked module, and waits there.
When all passes have arrived, the hooked module is served once: its variants are made together, from one read of the
weights and one generation of each direction, and the hooked module's real forward runs for each pass on that pass's
arguments, with that pass's variant in place of the weights. Then all passes go on. A weight that model code reads
without calling its module is served in the same way, as soon as something is computed with it
(`mezo_dist.engines.lockstep.reads`). Nothing here depends on the model's class or on which dimension is the batch.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, Protocol, final

import greenlet
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mezo_dist.directions import devices
from mezo_dist.engines.hooked import HookedModule, Weight, swapped
from mezo_dist.engines.lockstep.forwards import Forward, Layer, add_layer, forward_below, remove_layer
from mezo_dist.engines.lockstep.passes import Agree, Call, Coroutine, ForwardPass, Open, Raised, Read, is_inside
from mezo_dist.engines.lockstep.reads import InterceptedParameters, WeightHandle, interceptors, resolved
from mezo_dist.errors import UserError


@dataclass(frozen=True)
class Served:
    """The weights of one hooked module for all variants among its calls.

    ``tensors[variant]`` has one tensor per ``hooked.weights``, or none where ``forward`` needs none. Those of a hooked
    module that spans blocks must stay valid while its forward runs; those of other hooked modules until the next hooked
    module is served. ``forward``, if given, replaces the hooked module's real forward (a lookup in a few rows in place
    of the whole table): it takes the call and its tensors."""

    tensors: dict[int, list[Tensor]]
    forward: Callable[[Call, list[Tensor]], object] | None = None

    @functools.cached_property
    def memory(self) -> frozenset[int]:
        """Where the storages of the tensors lie."""
        return frozenset(devices.memory(tensor) for some in self.tensors.values() for tensor in some)


class Server(Protocol):
    """Where a fan-out gets its weights from."""

    def serve(self, hooked: HookedModule, calls: Sequence[Call], real: Forward) -> Served:
        """The weights of a module for the calls that wait for it.

        Args:
            hooked: the module.
            calls: its waiting calls.
            real: its own forward.
        """

    def at_hand(self, hooked: HookedModule, caller: Coroutine) -> Served | None:
        """The weights of a module for a pass that comes to it, and for others, if they were made before it came, and
        its forward needs nothing else. They stay until the next module is served.

        Args:
            hooked: the module.
            caller: the pass.
        """

    def read(self, reads: Sequence[Read], *, nested: bool) -> dict[int, Tensor]:
        """One weight, by variant, for all who wait for it; valid as long as it is referenced.

        ``nested``: it is needed while another hooked module is being served, whose weights must stay valid.
        """

    def describe(self, weight: Weight) -> tuple[torch.dtype, torch.device]:
        """Dtype and device that `read` will give ``weight``."""

    def any_goes_on(self, answers: Sequence[bool]) -> bool:
        """Whether any of this rank's passes, or of those of the ranks that gather with it, goes on."""


@final
class FanOut:
    """Runs passes on one model. Hooks into the hooked modules while `run` is active, and only then.

    Attributes:
        weights_served: names of the weights that some pass has used so far.
        served_first: those that the passes of the first run used.
        served_last: those that the passes of the last run used.
    """

    def __init__(self, hooked_modules: Sequence[HookedModule], server: Server) -> None:
        self._hooks = [
            (hooked.module, functools.partial(self._call, hooked), interceptors(hooked, self._handle))
            for hooked in hooked_modules
        ]
        self._server = server
        self._serving: Call | None = None
        self.weights_served: set[str] = set()
        self.served_first: set[str] = set()
        self.served_last: set[str] = set()

    def run(self, passes: Sequence[ForwardPass]) -> list[object]:
        """Results of ``passes``, in order.

        An exception inside a pass surfaces here with its own traceback; the model is usable afterwards.

        Raises:
            UserError: called by a forward pass.
            NotImplementedError: the model switches autocast around its layers, writes to its weights, or hands weights
                that it reads to code that torch cannot see into.
        """
        if is_inside():
            raise UserError("a forward pass (a loss function) evaluates variants of weights itself, which it must not")
        with self._hooked():
            self.served_last = set()
            if not self.weights_served:
                self.served_first = self.served_last
            try:
                return self._run(passes)
            finally:
                self.weights_served |= self.served_last

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[None]:
        """Within, calls of the hooked modules and reads of their weights come to this fan-out."""
        layered: list[nn.Module] = []
        intercepted: list[tuple[InterceptedParameters, dict[str, nn.Parameter | None]]] = []
        try:
            for module, call, owners in self._hooks:
                add_layer(module, Layer.FAN_OUT, call)
                layered.append(module)
                for interceptor in owners:
                    intercepted.append((interceptor, interceptor.put_in()))
            yield
        finally:
            for interceptor, before in reversed(intercepted):
                interceptor.take_out(before)
            for module in reversed(layered):
                remove_layer(module, Layer.FAN_OUT)

    def _run(self, passes: Sequence[ForwardPass]) -> list[object]:
        results: list[object] = [None] * len(passes)
        waiting: dict[tuple[int, int], list[Any]] = {}
        coroutines = [Coroutine(index, forward_pass) for index, forward_pass in enumerate(passes)]
        autocast = _autocast()

        def resume(caller: Coroutine, *outcome: object) -> None:
            for opened in caller.open:
                opened.enter()
            try:
                request = caller.switch(*outcome)
            finally:
                for opened in reversed(caller.open):
                    opened.leave()
            if _autocast() != autocast:  # it belongs to the thread, so the next pass would run in it
                raise NotImplementedError("the model switches autocast around its layers; set model.compute instead")
            if caller.dead:
                results[caller.index] = request
            else:
                waiting.setdefault(_place(request), []).append(request)

        try:
            for caller in coroutines:
                resume(caller)
            while waiting:
                # Serve the earliest place first, so that passes that lag behind (other experts, other branches) catch
                # up. Resume the latest arrival first: its output is still in the cache.
                requests = waiting.pop(min(waiting))[::-1]
                for caller, outcome in self._serve(requests):
                    resume(caller, outcome)
        finally:
            for caller in coroutines:
                if caller and not caller.dead:
                    caller.throw(greenlet.GreenletExit())
        return results

    def _serve(self, requests: list[Any]) -> Iterator[tuple[Coroutine, object]]:
        """Each waiting pass with what it waits for, computed when it is asked for: the pass goes on while it is hot."""
        first = requests[0]  # what waits at one place is of one kind
        if isinstance(first, Call):
            yield from self._serve_calls(first.hooked, requests)
        elif isinstance(first, Read):
            self.served_last.add(first.weight.name)
            by_variant = self._server.read(requests, nested=False)
            yield from ((read.caller, by_variant[read.caller.variant]) for read in requests)
        else:  # all passes that have not ended wait here, for this place is served last
            goes_on = self._server.any_goes_on([request.goes_on for request in requests])
            yield from ((request.caller, goes_on) for request in requests)

    def _serve_calls(self, hooked: HookedModule, calls: Sequence[Call]) -> Iterator[tuple[Coroutine, object]]:
        """`_serve` for calls of one module."""
        self.served_last.update(hooked.names)
        real = forward_below(hooked.module, Layer.FAN_OUT)
        served = self._server.serve(hooked, calls, real)
        forward = served.forward or functools.partial(on_tensors, hooked, real)
        for call in calls:
            tensors = served.tensors[call.caller.variant]
            if hooked.spans_blocks:  # its forward will call other hooked modules, so it must run inside the coroutine
                yield call.caller, tensors
                continue
            self._serving = call
            try:
                assert call.context is not None
                outcome = _unshared(call.context.run(forward, call, tensors), served.memory)
            except Exception as error:  # noqa: BLE001 (raised again inside the pass, where its traceback belongs)
                outcome = Raised(error)
            finally:
                self._serving = None
            yield call.caller, outcome

    def _call(self, hooked: HookedModule, module: nn.Module, inner: Forward, *args: object, **kwargs: object) -> object:
        """The layer around a hooked module's forward: a call from inside a pass waits until it is served, unless its
        weights are at hand.

        Args:
            hooked: the module, with its weights.
            module: the module itself.
            inner: the forward inside of this layer.
        """
        caller = greenlet.getcurrent()
        if self._serving is not None or not isinstance(caller, Coroutine):
            return inner(*args, **kwargs)
        if caller.has_read:
            args, kwargs = resolved(args), resolved(kwargs) if kwargs else kwargs
        served = self._server.at_hand(hooked, caller)
        if served is not None:
            self.served_last.update(hooked.names)
            self._serving = call = Call(caller, hooked, args, kwargs)
            try:
                tensors, forward = served.tensors[caller.variant], served.forward
                output = forward(call, tensors) if forward else on_tensors(hooked, inner, call, tensors)
                return _unshared(output, served.memory)
            finally:
                self._serving = None
        outcome = caller.wait(Call(caller, hooked, args, kwargs, copy_context()))
        if not hooked.spans_blocks:
            return outcome
        opened = Open(hooked, outcome)
        caller.open.append(opened)
        opened.enter()
        try:
            return inner(*args, **kwargs)
        finally:
            opened.leave()
            caller.open.pop()

    def _handle(self, hooked: HookedModule, weight: Weight) -> WeightHandle | None:
        """See `InterceptedParameters`: the hub and the module's own forward see what is there, passes see handles."""
        caller = greenlet.getcurrent()
        if self._serving is not None:
            if self._serving.hooked is hooked:
                return None
            caller = self._serving.caller
        elif not isinstance(caller, Coroutine) or any(opened.hooked is hooked for opened in caller.open):
            return None
        caller.has_read = True
        dtype, device = self._server.describe(weight)
        return WeightHandle.make(weight, dtype, device, functools.partial(self._resolve, hooked, weight))

    def _resolve(self, hooked: HookedModule, weight: Weight) -> Tensor:
        caller, call = greenlet.getcurrent(), self._serving
        if call is None and isinstance(caller, Coroutine):
            tensor: Tensor = caller.wait(Read(caller, hooked, weight))
            return tensor
        self._serving = None
        if call is None:
            raise RuntimeError(f"a forward pass left the weight {weight.name} to code that runs after it")
        try:  # another module's forward reads it: no pass can wait here
            self.served_last.add(weight.name)
            return self._server.read([Read(call.caller, hooked, weight)], nested=True)[call.caller.variant]
        finally:
            self._serving = call


def _place(request: Call | Read | Agree) -> tuple[int, int]:
    """Where a pass waits; on all ranks the same, and in the order in which places are served."""
    if isinstance(request, Agree):
        return sys.maxsize, 0
    weights = request.hooked.weights
    return request.hooked.order, weights.index(request.weight) if isinstance(request, Read) else len(weights)


def _autocast() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


def on_tensors(hooked: HookedModule, real: Forward, call: Call, tensors: list[Tensor]) -> object:
    """The hooked module's real forward with ``tensors`` in place of its weights.

    Args:
        hooked: the module.
        real: its forward.
        call: the call with its arguments.
        tensors: one parameter per weight of the module.
    """
    if hooked.owner is None:
        with swapped(hooked.weights, tensors):
            return real(*call.args, **call.kwargs)
    attributes = hooked.owner.__dict__
    before = attributes["_parameters"]
    attributes["_parameters"] = parameters = dict.copy(before)  # a plain dict, whose look-ups are fast
    parameters.update(zip(hooked.attributes, tensors, strict=True))
    try:
        return real(*call.args, **call.kwargs)
    finally:
        attributes["_parameters"] = before


def _unshared(output: object, storages: frozenset[int]) -> object:
    """``output``, with whatever in it is a view of the scratch copied, for the next hooked module overwrites that."""

    def kept(tensor: Tensor) -> Tensor:
        return tensor.clone() if devices.memory(tensor) in storages else tensor

    return kept(output) if isinstance(output, Tensor) else pytree.tree_map_only(Tensor, kept, output)
