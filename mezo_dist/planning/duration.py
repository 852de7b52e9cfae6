"""Seconds of a step, part by part.

    step = passes + calls + directions + gathers + scalars

* passes: operations over the rate of matrix products, but no less than reading the weights once for every pass takes;
* calls: a constant for each call of a module by a pass (switching passes, Python, launches); on a GPU, which works
  meanwhile, what that is longer than passes and directions;
* directions: elements made and written, at the rates of the fused kernel;
* gathers: bytes over the slower of the links that they cross, framing over the link between hosts, and a latency for
  each hop and collective; with ``layout.prefetch`` what is longer than passes and directions;
* scalars: 2 (n - 1) hops of a ring for each all-reduce (`mezo_dist.planning.allreduce`), of the losses among all n
  ranks, and before each gather among those that share a copy of the weights; their bytes and framing over the link.

Assumptions: nothing else uses the machine; ranks do not wait for one another; data are ready. Ranks that share a
processor are not slower for it than the rates say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mezo_dist.planning.allreduce import hops
from mezo_dist.planning.machine import Machine
from mezo_dist.planning.rounds import Round
from mezo_dist.planning.setting import Setting
from mezo_dist.planning.shapes import ModelShape
from mezo_dist.planning.traffic import Traffic
from mezo_dist.planning.work import Work


@dataclass(frozen=True)
class Duration:
    """Seconds of one step."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts.values())


def duration_of(
    shape: ModelShape, setting: Setting, machine: Machine, step: Round, work: Work, traffic: Traffic
) -> Duration:
    """How long one step takes.

    Args:
        shape: the model.
        setting: how the run goes.
        machine: what it runs on.
        step: its round.
        work: its arithmetic.
        traffic: its bytes.
    """
    reading = step.passes * setting.calls * shape.active_size * setting.pass_bytes / machine.bandwidth
    passes = max(work.flops / machine.flops, reading)
    directions = work.generated * machine.generate + work.written * machine.write
    calls = work.calls * machine.call
    if machine.gpu:
        calls = max(0.0, calls - passes - directions)
    computing = {"passes": passes, "calls": calls, "directions": directions}
    gathers = _gather_seconds(setting, machine, traffic)
    if setting.prefetch:
        gathers = max(0.0, gathers - sum(computing.values()))
    return Duration({**computing, "gathers": gathers, "scalars": _scalar_seconds(setting, machine, traffic)})


def _gather_seconds(setting: Setting, machine: Machine, traffic: Traffic) -> float:
    over = setting.shard_ranks(machine.ranks)
    if over == 1:
        return 0.0
    crossing = traffic.gathered * (over - 1) / over
    spans_hosts = over > machine.ranks_per_host
    rate = min(machine.link, machine.host_link) if spans_hosts else machine.host_link
    framed = traffic.framed_gathers / machine.link
    return crossing / rate + framed + traffic.gathers * (over - 1) * machine.latency


def _scalar_seconds(setting: Setting, machine: Machine, traffic: Traffic) -> float:
    """Losses are added up among all ranks; which unit is gathered is agreed on among those that share a copy."""
    if machine.ranks == 1:
        return 0.0
    over = setting.shard_ranks(machine.ranks)
    hosts_of_copy = math.ceil(over / machine.ranks_per_host)
    messages = (
        (traffic.reduces, traffic.scalars - traffic.agreed, machine.hosts, machine.ranks_per_host),
        (traffic.gathers, traffic.agreed, hosts_of_copy, min(over, machine.ranks_per_host)),
    )
    seconds = traffic.framed_scalars / machine.link
    for number, size, hosts, ranks_per_host in messages:
        if hosts * ranks_per_host > 1:
            slowest = machine.link if hosts > 1 else machine.host_link
            seconds += number * hops(machine.reduce, hosts, ranks_per_host) * machine.latency + 2 * size / slowest
    return seconds
