"""Jobs: what a step, a snapshot and a new start cost on so many hosts, for forward passes only and for AdamW.

Forward passes only: the costs of `mezo_dist.planning.choice.plan`; a start reads the base model, the newest snapshot if
there is one, and applies the logged steps since then: every rank generates all their directions for the weights that it
keeps, many steps in one pass over them (`mezo_dist.storage.replay`).

AdamW, as the literature has it (`mezo_dist.planning.first_order`), and in its favour where a choice is left: three
forward passes' worth of arithmetic for each micro-batch (four where activations are recomputed), the state read and
written once, traffic that hides behind the arithmetic completely and has no latency, checkpoints of weights and state
that all hosts share out. A start reads the newest one, and the steps since then are taken again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from mezo_dist.planning.choice import Plan, layout_name, plan
from mezo_dist.planning.first_order import FirstOrder, first_order
from mezo_dist.planning.machine import Machine
from mezo_dist.planning.setting import Setting
from mezo_dist.planning.shapes import ModelShape
from mezo_dist.planning.weights import resident_weights, shard_size
from mezo_dist.planning.work import flops_of_pass

TERMS_AT_ONCE = 4096
"""Directions that a replay adds in one pass over the weights (`mezo_dist.storage.replay`, which imports torch)."""


@dataclass(frozen=True)
class Costs:
    """On so many hosts, undisturbed; seconds and bytes."""

    computing: float
    """Of a step."""
    linking: float
    """Of a step: weights or gradients that cross links."""
    scalars: float
    """Of a step: its all-reduces."""
    hides_links: bool
    """What crosses links does so while ranks compute."""
    replay: float
    """For each step that is replayed."""
    base: float
    """Bytes of the base model that a host reads at a start."""
    saved: float
    """Bytes of a snapshot, over all hosts."""
    loaded: float
    """Bytes of a snapshot that a host reads at a start."""

    def step(self, slowness: float = 1.0, link_slowness: float = 1.0) -> float:
        """Seconds of a step.

        Args:
            slowness: of the slowest rank.
            link_slowness: of the slowest link.
        """
        computing, linking = self.computing * slowness, self.linking * link_slowness
        return (max(computing, linking) if self.hides_links else computing + linking) + self.scalars


@dataclass(frozen=True)
class Job:
    """Something that runs for long."""

    name: str
    samples: float
    """That a step sees, as a mean over a cycle of the algorithm."""
    repeats_steps: bool
    """A start goes back to the newest snapshot, and steps since then are lost (no trajectory)."""
    at: Callable[[int], Costs]
    """The costs on so many hosts."""
    divisor: int = 1
    """Hosts must be a multiple of this."""


def forward_job(shape: ModelShape, best: Plan) -> Job:
    """A run of mezo_dist.

    Args:
        shape: the model.
        best: of the run on all hosts.
    """
    setting, machine = best.setting, best.machine
    per_host = machine.ranks_per_host
    divisor = setting.replicate // math.gcd(setting.replicate, per_host) if setting.layout == "fsdp" else 1

    @cache
    def at(hosts: int) -> Costs:
        here = plan(shape, setting, replace(machine, hosts=hosts))
        ranks = here.machine.ranks
        whole = shape.size * setting.weight_bytes
        copies = any(step.round.copies_anchor for step in here.steps)
        trained = shape.num_trainable * setting.weight_bytes
        mine = min(whole, resident_weights(shape, setting, ranks) * per_host) or whole / hosts
        return Costs(
            computing=sum(_part(here, name) for name in ("passes", "calls", "directions")),
            linking=_part(here, "gathers"),
            scalars=_part(here, "scalars"),
            hides_links=False,
            replay=_replay(shape, here),
            base=mine,
            saved=whole + copies * trained,
            loaded=mine + copies * trained * mine / whole,
        )

    name = f"{layout_name(setting, machine.ranks)}, {setting.algorithm.name}"
    return Job(name, best.mean(lambda step: step.round.samples), False, at, divisor)


def _part(one: Plan, name: str) -> float:
    return one.mean(lambda step: step.duration.parts[name])


def _replay(shape: ModelShape, one: Plan) -> float:
    setting, machine = one.setting, one.machine
    kept = sum(min(w.size, shard_size(w, setting, machine.ranks)) for w in shape.weights if w.trainable)
    directions = one.mean(lambda step: step.round.update_directions)
    return kept * directions * (machine.generate + machine.write / TERMS_AT_ONCE)


def adamw_job(shape: ModelShape, setting: Setting, machine: Machine) -> Job | None:
    """AdamW on the same micro-batches; None if no way to cut it over the ranks fits.

    Args:
        shape: the model.
        setting: whose batches and dtype count.
        machine: all hosts.
    """
    way = adamw_way(shape, setting, machine)
    if way is None:
        return None
    state = 14 if setting.pass_bytes == 2 else 12
    """Bytes for each weight in a checkpoint: the weight and two moments, in 16 bits with a master copy."""

    @cache
    def at(hosts: int) -> Costs:
        here = replace(machine, hosts=hosts)
        traffic = next(o.traffic for o in first_order(shape, setting, here) if (o.name, o.stage) == way[:2])
        ranks = here.ranks
        whole = shape.size * state
        micro_batches = math.ceil(math.ceil(setting.batch_size / setting.micro_batch) / ranks)
        flops = (4 if way[2] else 3) * flops_of_pass(shape, setting) * micro_batches
        reading = 3 * micro_batches * shape.active_size * setting.pass_bytes / here.bandwidth
        updating = 2 * whole / (ranks if way[1] != "whole (DDP)" else 1) / here.bandwidth
        rate = min(here.link, here.host_link) if hosts > 1 else here.host_link
        share = whole / hosts if way[1].startswith("ZeRO") else whole
        return Costs(max(flops / here.flops, reading) + updating, traffic / rate if ranks > 1 else 0.0, 0.0, True, 0.0,
                     0.0, whole, share)  # fmt: skip

    return Job(f"AdamW, {way[1]}", setting.batch_size, True, at)


def adamw_way(shape: ModelShape, setting: Setting, machine: Machine) -> tuple[str, str, bool] | None:
    """Name, stage of ZeRO and whether activations are recomputed of AdamW on these ranks: of what fits, what is cut
    least."""
    fits: list[FirstOrder] = [o for o in first_order(shape, setting, machine) if o.name == "AdamW" and o.fits]
    return (fits[0].name, fits[0].stage, fits[0].recomputes) if fits else None
