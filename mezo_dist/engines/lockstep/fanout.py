"""Fan-out: many forward passes of one model in lock step, each on weights of its own.

Every forward pass is a coroutine (`greenlet`) that runs the ordinary model code until that calls a site, and waits
there. When all have arrived, the site is served once: its variants are made together, from one read of the weights
and one generation of each direction, and the site's real forward runs for each coroutine on its own arguments with
its own variant swapped in. Then all go on. Knows nothing about the model's class or about batch dimensions.
"""

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
from mezo_dist.engines.hooked import Site, swap, swapped


@dataclass(frozen=True)
class Job:
    """One forward pass: ``run`` calls the model; ``variant`` is the number of the weights that it runs on."""

    variant: int
    run: Callable[[], Any]
    sample_shifts: tuple[Combination, ...] = ()
    """With a direction per sample: what to add to the variant for each sample of this pass."""


@dataclass(frozen=True, eq=False)
class Call:
    """A job's call of a site, waiting to be served."""

    job: _Coroutine
    site: Site
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: Context
    """Context variables of the job (see `mezo_dist.engines.lockstep.head_slice`): its forward runs outside the job, but
    with these."""


@dataclass(frozen=True)
class _Raised:
    error: Exception


class _Coroutine(greenlet.greenlet):
    """A running job, with the sites whose forward it is inside of (only those that span blocks stay open)."""

    def __init__(self, index: int, job: Job) -> None:
        super().__init__(job.run)
        self.index = index
        self.variant = job.variant
        self.sample_shifts = job.sample_shifts
        self.open: list[_Open] = []


class _Open:
    """A site that spans blocks, with the weights that its modules use while one job is inside of it and running."""

    def __init__(self, site: Site, tensors: list[Tensor]) -> None:
        self._site = site
        self._tensors = tensors
        self._before: list[nn.Parameter] = []

    def enter(self) -> None:
        self._before = swap(self._site.weights, self._tensors)

    def leave(self) -> None:
        swap(self._site.weights, self._before)


@dataclass(frozen=True)
class Served:
    """The weights of one site for all variants among its calls.

    ``tensors[variant]`` has one tensor per ``site.weights``. Those of a site that spans blocks must stay valid while
    its forward runs; those of other sites until the next site is served. ``forward``, if given, replaces the site's
    real forward (a lookup in a few rows in place of the whole table): it takes the call and its tensors.
    """

    tensors: dict[int, list[Tensor]]
    forward: Callable[[Call, list[Tensor]], Any] | None = None


Materialise = Callable[[Site, Sequence[Call], Callable[..., Any]], Served]
"""(site, its waiting calls, its real forward) -> the weights to run it on."""


class FanOut:
    """Runs jobs on one model. Hooks into the sites' ``forward`` while `run` is active, and only then."""

    def __init__(self, sites: Sequence[Site], materialise: Materialise) -> None:
        self._sites = sites
        self._materialise = materialise
        self.sites_served: set[str] = set()
        """Names of the sites that some job has called so far."""

    def run(self, jobs: Sequence[Job]) -> list[Any]:
        """Results of ``jobs``, in order.

        An exception inside a job surfaces here with its own traceback; the model is usable afterwards.

        Raises:
            NotImplementedError: the model switches autocast around its layers.
        """
        forwards = {site: _install(site) for site in self._sites}
        try:
            return self._run(jobs, forwards)
        finally:
            for site, forward in forwards.items():
                _uninstall(site, forward)

    def _run(self, jobs: Sequence[Job], forwards: dict[Site, Callable[..., Any]]) -> list[Any]:
        results: list[Any] = [None] * len(jobs)
        waiting: dict[Site, list[Call]] = {}
        coroutines = [_Coroutine(index, job) for index, job in enumerate(jobs)]
        autocast = _autocast()

        def resume(job: _Coroutine, outcome: Any = None, *, first: bool = False) -> None:
            for opened in job.open:
                opened.enter()
            try:
                call = job.switch() if first else job.switch(outcome)
            finally:
                for opened in reversed(job.open):
                    opened.leave()
            if _autocast() != autocast:  # it belongs to the thread, so the next pass would run in it
                raise NotImplementedError("the model switches autocast around its layers; set model.compute instead")
            if job.dead:
                results[job.index] = call
            else:
                waiting.setdefault(call.site, []).append(call)

        try:
            for job in coroutines:
                resume(job, first=True)
            while waiting:
                # The earliest site first, so that jobs that lag behind (other experts, other branches) catch up.
                site = min(waiting, key=lambda s: s.order)
                # Who came last goes first: what it has just computed is in the cache still.
                for call, outcome in self._serve(site, waiting.pop(site)[::-1], forwards[site]):
                    resume(call.job, outcome)
        finally:
            for job in coroutines:
                if job and not job.dead:
                    job.throw(greenlet.GreenletExit())
        return results

    def _serve(self, site: Site, calls: Sequence[Call], real: Callable[..., Any]) -> Iterator[tuple[Call, Any]]:
        """Each call with its outcome, which is computed when it is asked for: its job can go on while it is hot."""
        self.sites_served.add(site.name)
        served = self._materialise(site, calls, real)
        for call in calls:
            tensors = served.tensors[call.job.variant]
            if site.spans_blocks:  # its forward will call other sites, so it must run inside the coroutine
                yield call, tensors
                continue
            try:
                forward = served.forward or functools.partial(on_tensors, site, real)
                outcome = _unshared(call.context.run(forward, call, tensors), tensors)
            except Exception as error:  # noqa: BLE001 (raised again inside the job, where its traceback belongs)
                outcome = _Raised(error)
            yield call, outcome


def _autocast() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


def on_tensors(site: Site, real: Callable[..., Any], call: Call, tensors: list[Tensor]) -> Any:
    """The site's real forward with ``tensors`` in place of its weights."""
    with swapped(site.weights, tensors):
        return real(*call.args, **call.kwargs)


def _install(site: Site) -> Callable[..., Any]:
    """Make calls of the site's forward from inside a job wait for the hub. Returns the real forward."""
    real = site.module.forward

    def waiting_forward(*args: Any, **kwargs: Any) -> Any:
        job = greenlet.getcurrent()
        if not isinstance(job, _Coroutine):
            return real(*args, **kwargs)
        outcome = job.parent.switch(Call(job, site, args, kwargs, copy_context()))
        if isinstance(outcome, _Raised):
            raise outcome.error  # here, because thrown from outside it would lose its traceback
        if not site.spans_blocks:
            return outcome
        opened = _Open(site, outcome)
        job.open.append(opened)
        opened.enter()
        try:
            return real(*args, **kwargs)
        finally:
            job.open.pop().leave()

    site.module.forward = waiting_forward
    return real


def _uninstall(site: Site, real: Callable[..., Any]) -> None:
    if getattr(real, "__self__", None) is site.module and getattr(real, "__func__", None) is type(site.module).forward:
        del site.module.forward  # it was the class's own method
    else:
        site.module.forward = real


def _unshared(output: Any, scratch: list[Tensor]) -> Any:
    """``output``, with whatever in it is a view of the scratch copied, for the next site overwrites that."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in scratch}

    def own(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor

    return own(output) if isinstance(output, Tensor) else pytree.tree_map_only(Tensor, own, output)
