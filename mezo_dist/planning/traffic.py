"""Bytes that cross between ranks in a step: the scalars of a round, gathered weights, and the framing of both.

Assumptions: collectives go round a ring, so that of what they bring to a rank the part (n - 1) / n has crossed a link
(Thakur et al. 2005); ranks of a host are neighbours, so that one rank's stream crosses each link between hosts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mezo_dist.planning.framing import framing_of, messages_of_gather, messages_of_reduce
from mezo_dist.planning.machine import Machine
from mezo_dist.planning.rounds import Round
from mezo_dist.planning.setting import Setting
from mezo_dist.planning.shapes import ModelShape
from mezo_dist.planning.weights import unit_bytes

WORD = 8
ROUND_WORDS = 32
"""Words of the shortest round (`mezo_dist.distributed.communicator.PAYLOAD_WORDS`, which imports torch)."""


@dataclass(frozen=True)
class Traffic:
    """Of one step and one rank."""

    gathers: int
    """Collectives that gather weights."""
    gathered: int
    """Bytes that they bring to the rank, its own share among them (`gathers/bytes_per_step` in a run's log)."""
    scalars: int
    """Bytes that the rank puts into all-reduces: losses or what they are computed of, and before each gather which
    unit it is for."""
    reduces: int
    """Number of all-reduces among all ranks, which carry losses."""
    agreed: int
    """Bytes among ``scalars`` that say which unit is gathered; one all-reduce for each gather, among the ranks that
    share a copy of the weights."""
    between_hosts: int
    """Bytes that cross the link of a host, in each direction: the contents of messages."""
    framed_gathers: int
    """Bytes that cross it beside the contents of gathers (`mezo_dist.planning.framing`): of gloo's, on CPUs. Of NCCL's
    they are not counted."""
    framed_scalars: int
    """The same of all-reduces, which are gloo's everywhere."""
    within_host: int
    """Bytes that a rank gets from a neighbour on its host."""


def traffic_of(shape: ModelShape, setting: Setting, machine: Machine, step: Round, width: int) -> Traffic:
    """What crosses in one step.

    A step gathers every unit once for each base of its variants (a kept anchor is one), and once more for each further
    group of micro-batches, if they do not all go through the model together. Texts gather
    everything for every token.

    Args:
        shape: the model.
        setting: how the run goes.
        machine: its hosts and ranks.
        step: the round.
        width: micro-batches in lock step.
    """
    ranks, over = machine.ranks, setting.shard_ranks(machine.ranks)
    groups = math.ceil(step.micro_batches / width)
    turns = groups * len(step.bases) * setting.calls if setting.is_sharded else 0
    gathered = turns * sum(unit_bytes(unit, setting, ranks) for unit in shape.units)
    gathers = turns * len(shape.units)
    messages = [max(ROUND_WORDS, words) for words in step.messages]
    losses, agreed = (WORD * sum(messages), WORD * gathers * ROUND_WORDS) if ranks > 1 else (0, 0)
    reduces = sum(1 + (words > ROUND_WORDS) for words in messages) if ranks > 1 else 0
    reduced = 2 * losses * (ranks - 1) // ranks
    crossing = (gathered + 2 * agreed) * (over - 1) // over
    spans_hosts = over > machine.ranks_per_host
    sizes = [WORD * part for words in messages for part in (ROUND_WORDS, words - ROUND_WORDS)]
    framed_scalars = sum(_framed_reduce(size, ranks) for size in sizes) if machine.hosts > 1 else 0
    framed_scalars += gathers * _framed_reduce(WORD * ROUND_WORDS, over) if spans_hosts else 0
    by_gloo = spans_hosts and not machine.gpu
    return Traffic(
        gathers,
        gathered,
        losses + agreed,
        reduces,
        agreed,
        between_hosts=(crossing if spans_hosts else 0) + (reduced if machine.hosts > 1 else 0),
        framed_gathers=turns * sum(_framed_gather(unit_bytes(u, setting, ranks), over) for u in shape.units) * by_gloo,
        framed_scalars=framed_scalars,
        within_host=(crossing + reduced) if machine.ranks_per_host > 1 else 0,
    )


def _framed_gather(size: int, over: int) -> int:
    """Framing of a unit of ``size`` bytes that is gathered among ``over`` ranks."""
    return framing_of(messages_of_gather(over), size * (over - 1) / over, over)


def _framed_reduce(size: int, ranks: int) -> int:
    """Framing of an all-reduce of ``size`` bytes among ``ranks`` ranks."""
    return framing_of(messages_of_reduce(size, ranks), 2 * size * (ranks - 1) / ranks, ranks)
