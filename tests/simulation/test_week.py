"""The simulated events, on jobs whose costs are round numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from mezo_dist.errors import UserError
from mezo_dist.planning.allreduce import hops
from mezo_dist.simulation.assumptions import Assumptions, assumed, parse_seconds, scaled
from mezo_dist.simulation.jobs import Costs, Job
from mezo_dist.simulation.stragglers import Stragglers, measured
from mezo_dist.simulation.week import Case, best_interval, simulate

pytest.importorskip("simpy")
DAY = 86400.0
COSTS = Costs(computing=1.0, linking=0.0, scalars=0.0, hides_links=False, replay=0.001, base=1e9, saved=1e9, loaded=1e9)
CALM = Assumptions(mtbf=1e12, cut_every=1e12, sigma=0.0, slow_hosts=0.0, connect=0.0, silent=0.0)


def case(*, repeats: bool = False, hosts: int = 10, **changes: Any) -> Case:
    costs = dataclasses.replace(COSTS, replay=0.0, base=0.0) if repeats else COSTS
    job = Job("job", 16, repeats, lambda _: costs)
    assumptions = dataclasses.replace(CALM, **changes.pop("assume", {}))
    return Case(job, hosts, 1, assumptions, Stragglers(assumptions.sigma), seconds=7 * DAY, **changes)


def test_without_disturbance_it_trains_after_one_start() -> None:
    outcome = simulate(case(snapshot_every=0), 0)
    start = CALM.start + COSTS.base / CALM.read
    assert outcome.steps == pytest.approx(7 * DAY - start)
    assert outcome.seconds["start"] == pytest.approx(start)
    assert outcome.goodput == pytest.approx(1 - start / (7 * DAY))


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_all_time_has_a_cause_and_draws_are_repeatable(repeats: bool, launcher: Any) -> None:
    rough = {"mtbf": 5 * DAY, "cut_every": 5 * DAY, "silent": 0.3, "slow_hosts": 0.1, "sigma": 0.1, "connect": 0.01}
    this = case(repeats=repeats, launcher=launcher, assume=rough, spares=1)
    outcome = simulate(this, 3)
    assert sum(outcome.seconds.values()) == pytest.approx(7 * DAY)
    assert all(seconds >= 0 for seconds in outcome.seconds.values()), outcome.seconds
    assert outcome == simulate(this, 3) != simulate(this, 4)
    assert 5 <= outcome.losses <= 25, "ten hosts, a week, a loss in five days each"
    assert outcome.starts > 5
    assert outcome.seconds["redone"] > 0
    assert (outcome.seconds["replay"] > 0) is not repeats


def test_a_lost_host_costs_what_is_assumed() -> None:
    one = case(assume={"mtbf": 20 * DAY}, snapshot_every=0)
    outcome = simulate(one, 2)
    assert outcome.until_back
    usual = CALM.notice + CALM.last_call + CALM.start + COSTS.base / CALM.read
    least = min(outcome.until_back)
    assert usual < least < usual + outcome.steps * COSTS.replay, "all of the trajectory is replayed"
    silent = simulate(case(assume={"mtbf": 20 * DAY, "silent": 1.0}, snapshot_every=0), 2)
    assert silent.until_back[0] == pytest.approx(outcome.until_back[0] + CALM.timeout, abs=1)


def test_a_job_with_checkpoints_takes_steps_again_and_one_with_a_trajectory_none() -> None:
    rough = {"mtbf": 5 * DAY}
    adamw = simulate(case(repeats=True, assume=rough, snapshot_every=3600), 1)
    mezo = simulate(case(assume=rough, snapshot_every=3600), 1)
    losses = adamw.losses
    assert losses == mezo.losses > 5
    assert mezo.seconds["redone"] <= losses, "the step in flight"
    assert 0.2 * 3600 < adamw.seconds["redone"] / losses < 0.8 * 3600, "half an interval"
    assert mezo.steps > adamw.steps


def test_snapshots_are_as_frequent_as_is_best() -> None:
    rough = {"mtbf": 2 * DAY}
    chosen = best_interval(case(repeats=True, assume=rough), dataclasses.replace(COSTS, replay=0.0))
    saving, between = 0.1, 2 * DAY / 10
    assert chosen == round(math.sqrt(2 * saving * between))
    steps = {every: simulate(case(repeats=True, assume=rough, snapshot_every=every), 0).steps
             for every in (chosen // 8, chosen, 8 * chosen)}  # fmt: skip
    assert steps[chosen] == max(steps.values()), steps


def test_slurm_waits_for_a_host_and_spares_help() -> None:
    rough = {"mtbf": 20 * DAY, "repair": 3600.0}
    waiting = simulate(case(launcher="slurm", assume=rough), 0)
    assert waiting.seconds["wait"] >= 3000 * waiting.losses
    spared = simulate(case(launcher="slurm", assume=rough, spares=3), 0)
    assert spared.seconds["wait"] <= CALM.requeue * spared.losses
    assert waiting.seconds["fewer"] == 0


def test_a_short_cut_stalls_and_a_long_one_loses_the_host() -> None:
    short = simulate(case(assume={"cut_every": 5 * DAY, "cut": 100.0}), 0)
    assert short.losses == 0
    assert short.starts == 1
    assert short.seconds["stall"] % 100 == pytest.approx(0, abs=1e-6)
    long = simulate(case(assume={"cut_every": 5 * DAY, "cut": 601.0}), 0)
    assert long.losses > 0
    assert long.starts > 1


def test_the_slowest_of_many() -> None:
    draw = random.Random(0)
    stragglers = Stragglers(0.2)
    drawn = [max(draw.lognormvariate(0, 0.2) for _ in range(50)) for _ in range(2000)]
    assert stragglers.slowest(50) == pytest.approx(statistics.fmean(drawn) / math.exp(0.02), rel=0.01)
    assert stragglers.slowest(1) == 1.0
    assert Stragglers(0.0).slowest(10**5) == 1.0
    times = (1.0,) * 9 + (3.0,)
    assert Stragglers(0.0, times).slowest(2) == pytest.approx((0.81 + 3 * 0.19) / 1.2, rel=1e-3)


def test_stragglers_of_a_log(tmp_path: Path) -> None:
    times = [9.0] * 10 + [1.0, 2.0, 3.0] * 30
    lines = [json.dumps({"step": n, "scalars": {"time/evaluate_s": time}}) for n, time in enumerate(times)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert sorted(set(measured(str(tmp_path)))) == [0.5, 1.0, 1.5], "without what warms up"
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:15]))
    with pytest.raises(UserError, match="14 steps"):
        measured(str(tmp_path))
    for content in ("{", "[1]", '{"scalars": 3}'):
        (tmp_path / "metrics.jsonl").write_text(content)
        with pytest.raises(UserError, match="--stragglers"):
            measured(str(tmp_path))


def test_assumptions() -> None:
    changed = assumed(["mtbf=90d", "read=5GB/s", "silent=0.5", "join_every=1h"])
    assert (changed.mtbf, changed.read, changed.silent, changed.join_every) == (90 * DAY, 5e9, 0.5, 3600)
    assert scaled(Assumptions(), "slow_factor", 2.0).slow_factor == pytest.approx(1.2)
    assert scaled(Assumptions(silent=0.8), "silent", 2.0).silent == 1.0
    assert parse_seconds("1.5h", "--time") == 5400
    wrong = {
        "mtbf": "mtbf",
        "no=1": "no assumption",
        "silent=2": "share",
        "slow_factor=0.5": "factor",
        "read=2": "read",
        "mtbf=0": "above 0",
        "mtbf=x": "duration",
        "mtbf=nan": "duration",
        "sigma=2": "at most 1",
    }
    for change, word in wrong.items():
        with pytest.raises(UserError, match=word):
            assumed([change])


def test_ways_of_the_scalars() -> None:
    assert hops("ring", 2, 1) == hops("tree", 2, 1) == hops("hierarchical", 2, 1) == 2
    assert hops("ring", 1000, 8) == 2 * 7999
    assert hops("tree", 1000, 8) == 2 * 13
    assert hops("hierarchical", 1000, 8) == 2 * (10 + 3)
