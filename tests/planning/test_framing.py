"""Framing against what a network card counted, and what the plan makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mezo_dist.planning.choice import plan
from mezo_dist.planning.duration import duration_of
from mezo_dist.planning.families import shape_of_config
from mezo_dist.planning.framing import framing_of, messages_of_gather, messages_of_reduce
from mezo_dist.planning.machine import Machine
from mezo_dist.planning.named import NAMED
from mezo_dist.planning.rounds import rounds_of
from mezo_dist.planning.setting import Setting
from mezo_dist.planning.traffic import Traffic, traffic_of
from mezo_dist.planning.work import work_of
from mezo_dist.simulation.jobs import forward_job

COUNTED = {
    ("reduce", 256): {2: (4, 1718), 4: (12, 5114), 8: (28, 11504)},
    ("reduce", 1024): {2: (4, 2562), 4: (12, 6276), 8: (28, 12876)},
    ("gather", 256): {2: (2, 1042), 4: (6, 3153), 8: (14, 7362)},
    ("gather", 1000): {2: (2, 1800), 4: (6, 5395), 8: (14, 12606)},
    ("gather", 8000): {2: (2, 9256), 4: (6, 27358)},
}
"""By collective and bytes of a rank, and by hosts: frames with contents, and bytes that the card of a virtual host
sent (one rank on each, gloo of torch 2.13, 2026-11-26). Those of 8,000 bytes were counted at 1 Mbit/s: a faster
virtual link leaves the cutting into packets to the card, which does not count the headers."""


@pytest.mark.parametrize(("kind", "size"), COUNTED)
def test_bytes_are_those_that_a_card_counts(kind: str, size: int) -> None:
    for ranks, (frames, counted) in COUNTED[kind, size].items():
        messages = messages_of_gather(ranks) if kind == "gather" else messages_of_reduce(size, ranks)
        contents = (size if kind == "gather" else 2 * size / ranks) * (ranks - 1)
        assert messages == frames
        assert contents + framing_of(messages, contents, ranks) == pytest.approx(counted, rel=0.08), ranks


def test_few_words_go_round_many_ranks_in_few_messages() -> None:
    """A part is a word at least: with 32 words and 100 ranks most parts are empty, and are not sent."""
    assert messages_of_reduce(256, 100) == 2 * 32 * 99 / 100
    assert messages_of_reduce(256, 1) == messages_of_reduce(0, 8) == 0
    assert messages_of_reduce(2**25, 4) == 2 * 32 * 3 / 4, "parts of a MiB"


def traffic(setting: Setting, machine: Machine) -> Traffic:
    shape = shape_of_config(NAMED["opt-125m"], "opt-125m")
    assert shape is not None
    return traffic_of(shape, setting, machine, rounds_of(setting, machine.ranks)[0], 1)


def test_framing_stands_apart_from_contents() -> None:
    sharded, whole = Setting(layout="fsdp"), Setting()
    slow = Machine(hosts=2, gpu=False)
    both = traffic(sharded, slow)
    assert both.between_hosts == both.gathered // 2 + 2 * both.scalars // 2
    assert 0.05 * both.gathered / 2 < both.framed_gathers < 0.08 * both.gathered / 2, "headers of full packets"
    assert both.framed_scalars == (both.gathers + 1) * traffic(whole, slow).framed_scalars > 0


def test_framing_is_that_of_gloo_between_hosts() -> None:
    sharded = Setting(layout="fsdp")
    nccl, inside = traffic(sharded, Machine(hosts=2)), traffic(sharded, Machine(ranks_per_host=2, gpu=False))
    assert (nccl.framed_gathers, nccl.framed_scalars > 0) == (0, True)
    assert (inside.framed_gathers, inside.framed_scalars) == (0, 0)
    copies = traffic(Setting(layout="fsdp", replicate=2), Machine(2, 2, gpu=False))
    assert (copies.framed_gathers, copies.framed_scalars > 0) == (0, True), "a copy on each host"


def test_a_slow_link_takes_its_time_for_framing() -> None:
    shape, setting = shape_of_config(NAMED["opt-125m"], "opt-125m"), Setting(layout="fsdp")
    assert shape is not None
    machine = Machine(hosts=2, gpu=False, link=125_000)
    (step,) = rounds_of(setting, 2)
    framed, work = traffic(setting, machine), work_of(shape, setting, 2, step, 1)
    plain = replace(framed, framed_gathers=0, framed_scalars=0)
    slower, faster = (duration_of(shape, setting, machine, step, work, some).parts for some in (framed, plain))
    assert slower["gathers"] - faster["gathers"] == pytest.approx(framed.framed_gathers / 125_000)
    assert slower["scalars"] - faster["scalars"] == pytest.approx(framed.framed_scalars / 125_000)


def test_a_simulated_job_takes_that_time_too() -> None:
    shape, setting = shape_of_config(NAMED["opt-125m"], "opt-125m"), Setting(layout="fsdp")
    assert shape is not None
    machine = Machine(hosts=4, gpu=False, link=125_000)
    costs = forward_job(shape, plan(shape, setting, machine)).at(2)
    crossing = traffic(setting, replace(machine, hosts=2))
    assert costs.linking == pytest.approx((crossing.gathered / 2 + crossing.framed_gathers) / 125_000, rel=1e-3)
    assert costs.scalars > crossing.framed_scalars / 125_000
