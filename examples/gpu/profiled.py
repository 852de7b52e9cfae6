"""The part `profile` of the first half hour: where the time of a step goes, by kernel, and how long the GPU idles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

TOP = 7
"""Kernels that are named."""


class Machine(Protocol):
    """See `parts.Machine`."""

    only: str
    device: torch.device

    def seconds(self, run: Any) -> float:
        """Median time of a call."""

    def wait(self) -> None:
        """Until all is done."""

    def model(self, shape: str) -> nn.Module:
        """Random weights."""


Methods = Callable[[Any, nn.Module], Mapping[str, tuple[Callable[[], object], int]]]


def profiles(machine: Machine, shapes: list[str], methods: Methods) -> Iterator[dict[str, Any]]:
    """For each method of `parts.methods`: its time, that of its kernels in all, and the kernels that take most.

    Args:
        machine: where.
        shapes: of models.
        methods: see `parts.methods`.
    """
    for shape in shapes:
        model = machine.model(shape)
        for name, (run, calls) in methods(machine, model).items():
            if machine.only in name:
                seconds = machine.seconds(lambda run=run, calls=calls: [run() for _ in range(calls)])
                kernels = by_kernel(machine, run, calls)
                top = ", ".join(f"{kernel} {ms:.3g} ms" for kernel, ms in kernels.most_common(TOP))
                row = {"shape": shape, "method": name, "ms": 1000 * seconds, "kernels ms": sum(kernels.values())}
                yield row | {"by kernel": top}
        del model


def by_kernel(machine: Machine, run: Callable[[], object], calls: int) -> Counter[str]:
    """Milliseconds of each kernel (of each operation of the CPU where there is no GPU) in some calls.

    Args:
        machine: where.
        run: what is called.
        calls: how often.
    """
    on_gpu = machine.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(calls):
            run()
        machine.wait()
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        times[event.key.split("(")[0][:48]] += microseconds / 1000
    return times
