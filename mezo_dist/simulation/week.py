"""One job on hosts that fail, come back, and lose their links for a while: the events of some days (simpy).

The job starts, trains, and starts again for every host that is lost or comes back, as mezo_dist's launchers do it
(``torchrun``: on the hosts that there are; ``slurm``: from the queue, on as many hosts as it asked for). Between two
events nothing happens one by one: steps take the mean time of the slowest rank (`Stragglers`).
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Literal, final

from mezo_dist.simulation.assumptions import Assumptions
from mezo_dist.simulation.jobs import Costs, Job
from mezo_dist.simulation.stragglers import Stragglers

Events = Generator[Any, Any, None]
"""What a process of simpy waits for, one thing after the other."""
Launcher = Literal["torchrun", "slurm"]
RUNNING = ("start", "replay", "training", "stall")
"""Phases in which there are ranks that notice what happens to hosts."""
CAUSES = ("useful", "slow", "fewer", "saving", "notice", "wait", "start", "replay", "redone",
          "stall")  # fmt: skip
"""What the time goes into: steps that count, at the speed of all hosts undisturbed; what slow ranks and links, and
fewer hosts, make steps longer; snapshots; until all ranks have ended after a loss; launcher and rendezvous; reading
weights, imports, connections; replay; steps that are lost and taken again; links that are cut."""


@dataclass(frozen=True)
class Case:
    """What is simulated."""

    job: Job
    hosts: int
    ranks_per_host: int
    assumptions: Assumptions
    stragglers: Stragglers
    seconds: float = 7 * 86400.0
    launcher: Launcher = "torchrun"
    spares: int = 0
    """Hosts beyond those that the job uses, which take the place of lost ones."""
    snapshot_every: int | None = None
    """Steps between snapshots; None: as often as is best (`best_interval`); 0: none."""


@dataclass
class Outcome:
    """What became of it."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    """By cause; their sum is the simulated time."""
    steps: float = 0.0
    """That count at the end."""
    losses: int = 0
    """Hosts that were lost while the job wanted them."""
    starts: int = 0
    until_back: list[float] = field(default_factory=list)
    """Seconds from a loss until the steps that had been done were done again."""
    snapshot_every: int = 0

    @property
    def goodput(self) -> float:
        """Share of the time that useful steps would take, with all hosts and undisturbed."""
        return self.seconds["useful"] / sum(self.seconds.values())


def simulate(case: Case, seed: int) -> Outcome:
    """One run of events.

    Args:
        case: what is simulated.
        seed: of everything random; the same seed draws the same failures for other jobs and assumptions.
    """
    import simpy

    environment = simpy.Environment()
    cluster = _Cluster(case, seed)
    run = _Run(case, environment, cluster)
    cluster.listener = run.hear
    environment.process(cluster.failures(environment))
    environment.process(cluster.cuts(environment))
    environment.run(until=case.seconds)
    run.settle()
    return run.outcome


def best_interval(case: Case, costs: Costs) -> int:
    """Steps between snapshots that cost least (Young 1974): the time to save one, against half an interval that is
    taken again, or replayed, at every loss.

    Args:
        case: what is simulated.
        costs: on all hosts.
    """
    again = costs.step() if case.job.repeats_steps else costs.replay
    saving = save_seconds(case, costs, case.hosts)
    between = case.assumptions.mtbf / case.hosts
    most = case.seconds / costs.step()
    interval = math.sqrt(2 * saving * between / (again * costs.step())) if again else most
    return max(1, round(min(interval, most)))


def save_seconds(case: Case, costs: Costs, hosts: int) -> float:
    """Of one snapshot, which all hosts write together.

    Args:
        case: what is simulated.
        costs: on so many hosts.
        hosts: that there are.
    """
    a = case.assumptions
    return max(costs.saved / hosts / a.save, costs.saved / a.storage)


def start_seconds(case: Case, costs: Costs, hosts: int, *, has_snapshot: bool) -> float:
    """From the rendezvous to trained weights, but for the replay.

    Args:
        case: what is simulated.
        costs: on so many hosts.
        hosts: that there are.
        has_snapshot: there is one, which is read after the base model.
    """
    a = case.assumptions
    reading = costs.base / a.read
    if has_snapshot:
        reading += max(costs.loaded / a.read, hosts * costs.loaded / a.storage)
    return a.start + a.connect * hosts * case.ranks_per_host + reading


@final
class _Cluster:
    """The hosts. Which one fails when is drawn as if all were there, and what befalls a host that is not is nothing:
    so the draws are the same whatever becomes of the job."""

    def __init__(self, case: Case, seed: int) -> None:
        self._case, a = case, case.assumptions
        self.seed = seed
        self._total = case.hosts + case.spares
        self._draw = {name: random.Random(f"{seed}/{name}") for name in ("failures", "cuts", "slow")}
        self._down: set[int] = set()
        self._slow: set[int] = set()
        self._slow_links: set[int] = set()
        self.listener: Callable[[str, float], None] = lambda *_: None
        for host in range(self._total):
            self._renew(host, a)

    def _renew(self, host: int, a: Assumptions) -> None:
        for share, some in ((a.slow_hosts, self._slow), (a.slow_links, self._slow_links)):
            some.discard(host)
            if self._draw["slow"].random() < share:
                some.add(host)

    @property
    def alive(self) -> int:
        """Hosts that are there."""
        return self._total - len(self._down)

    @property
    def slowness(self) -> tuple[float, float]:
        """Factors of the slowest host and the slowest link that are there."""
        a = self._case.assumptions
        return (
            a.slow_factor if self._slow - self._down else 1.0,
            a.slow_link_factor if self._slow_links - self._down else 1.0,
        )

    def failures(self, environment: Any) -> Events:
        """The process of failures."""
        draw, a = self._draw["failures"], self._case.assumptions
        while True:
            yield environment.timeout(draw.expovariate(1.0) * a.mtbf / self._total)
            host, is_silent = draw.randrange(self._total), draw.random() < a.silent
            if host in self._down:
                continue
            self._down.add(host)
            noticing = a.notice + (a.timeout if is_silent else 0.0)
            self.listener("the first host is lost" if host == 0 else "a host is lost", noticing)
            environment.process(self._repair(environment, host))

    def _repair(self, environment: Any, host: int) -> Events:
        a = self._case.assumptions
        back = environment.now + a.repair
        if a.join_every:
            back = math.ceil(back / a.join_every) * a.join_every
        yield environment.timeout(back - environment.now)
        self._down.discard(host)
        self._renew(host, a)
        self.listener("a host is back", 0.0)

    def cuts(self, environment: Any) -> Events:
        """The process of links that are cut for a while."""
        draw, a = self._draw["cuts"], self._case.assumptions
        while True:
            yield environment.timeout(draw.expovariate(1.0) * a.cut_every / self._total)
            if draw.randrange(self._total) in self._down:
                continue
            if a.cut < a.timeout:
                self.listener("a link is cut", a.cut)
            else:
                self.listener("a host is lost", a.timeout + a.notice)


@final
class _Run:
    """The job: a process that goes from phase to phase, and is interrupted by what happens to hosts."""

    def __init__(self, case: Case, environment: Any, cluster: _Cluster) -> None:
        self._case, self._environment, self._cluster = case, environment, cluster
        self.outcome = Outcome()
        self._ideal = case.job.at(case.hosts).step()
        every = case.snapshot_every
        self.outcome.snapshot_every = best_interval(case, case.job.at(case.hosts)) if every is None else every
        self._phase, self._since = "wait", 0.0
        self._hosts = 0
        self._step_s = self._ideal
        self._saved = 0.0  # steps in the newest snapshot
        self._lost_at: float | None = None
        self._wanted = 0.0  # steps that had been done when a host was lost
        self._awaits_hosts = False
        self._undisturbed_s, self._snapshot_s = self._ideal, 0.0
        self._draw = random.Random(f"{cluster.seed}/spares")
        self._process = environment.process(self._life())

    def hear(self, what: str, seconds: float) -> None:
        """Something happened: the job's process is interrupted, if it has to do with it."""
        if what == "a host is back":
            is_news = self._usable() > self._hosts and (self._awaits_hosts or self._phase in RUNNING)
        elif self._hosts and self._draw.random() >= self._hosts / (self._cluster.alive + 1):
            is_news = False  # a spare one
        else:
            self.outcome.losses += what.endswith("lost")
            is_news = self._phase in RUNNING  # or else ranks are ending anyway, or not there yet
        if is_news:
            self._process.interrupt((what, seconds))

    def settle(self) -> None:
        """Book the time of the phase that goes on."""
        now = self._environment.now
        elapsed, self._since = now - self._since, now
        if self._phase == "training":
            self._book_training(elapsed)
        else:
            self.outcome.seconds[self._phase] += elapsed

    def _usable(self) -> int:
        case, alive = self._case, min(self._cluster.alive, self._case.hosts)
        if case.launcher == "slurm":
            return case.hosts if alive == case.hosts else 0
        return alive - alive % case.job.divisor

    def _life(self) -> Events:
        from simpy import Interrupt

        delay = 0.0  # of the launcher, before ranks meet
        while True:
            try:
                yield from self._start(delay)
                yield from self._train()
            except Interrupt as interrupt:
                what, seconds = interrupt.args[0]
                yield from self._end(what, seconds)
                a = self._case.assumptions
                anew = what == "the first host is lost" or self._case.launcher == "slurm"
                delay = a.requeue if anew and what != "a host is back" else 0.0

    def _start(self, delay: float) -> Events:
        case, a = self._case, self._case.assumptions
        self._enter("wait")
        self._hosts = 0
        yield self._environment.timeout(delay)
        while True:
            if case.launcher == "torchrun" and 0 < self._usable() < case.hosts:
                yield self._environment.timeout(a.last_call)
            if self._usable():
                break
            yield from self._wait_for_hosts()
        self._hosts = self._usable()
        costs = case.job.at(self._hosts)
        self.outcome.starts += 1
        self._enter("start")
        yield self._environment.timeout(start_seconds(case, costs, self._hosts, has_snapshot=self._saved > 0))
        self._enter("replay")
        yield self._environment.timeout((self.outcome.steps - self._saved) * costs.replay)

    def _wait_for_hosts(self) -> Events:
        from simpy import Interrupt

        self._awaits_hosts = True
        with contextlib.suppress(Interrupt):
            yield self._environment.timeout(math.inf)
        self._awaits_hosts = False

    def _train(self) -> Events:
        """Train until something happens; a cut link only stalls."""
        from simpy import Interrupt

        while True:
            self._begin_training()
            try:
                yield self._environment.timeout(self._until_back())
                self._note_back()
                yield self._environment.timeout(math.inf)
            except Interrupt as interrupt:
                what, seconds = interrupt.args[0]
                if what != "a link is cut":
                    raise
                self._enter("stall")
                yield self._environment.timeout(seconds)

    def _begin_training(self) -> None:
        self._enter("training")
        case, costs = self._case, self._case.job.at(self._hosts)
        slow, slow_link = self._cluster.slowness
        slow *= case.stragglers.slowest(self._hosts * case.ranks_per_host)
        self._undisturbed_s, self._step_s = costs.step(), costs.step(slow, slow_link)
        every = self.outcome.snapshot_every
        self._snapshot_s = save_seconds(case, costs, self._hosts) / every if every else 0.0

    def _until_back(self) -> float:
        """Seconds until the steps that were done before a loss are done again."""
        missing = max(0.0, self._wanted - self.outcome.steps)
        return missing * (self._step_s + self._snapshot_s) if self._lost_at is not None else math.inf

    def _note_back(self) -> None:
        assert self._lost_at is not None
        self.outcome.until_back.append(self._environment.now - self._lost_at)
        self._lost_at = None

    def _book_training(self, elapsed: float) -> None:
        steps = elapsed / (self._step_s + self._snapshot_s)
        booked = self.outcome.seconds
        booked["useful"] += steps * self._ideal
        booked["fewer"] += steps * (self._undisturbed_s - self._ideal)
        booked["slow"] += steps * (self._step_s - self._undisturbed_s)
        booked["saving"] += steps * self._snapshot_s
        before, every = self.outcome.steps, self.outcome.snapshot_every
        self.outcome.steps += steps
        if every and self.outcome.steps // every > before // every:
            self._saved = self.outcome.steps // every * every

    def _end(self, what: str, seconds: float) -> Events:
        """What follows an interruption until no rank is left."""
        was_training = self._phase in ("training", "stall")
        self.settle()
        if what == "a host is back":
            if was_training and (self.outcome.snapshot_every or self._case.job.repeats_steps):
                self._enter("saving")  # SIGTERM finishes the step, and saves
                yield self._environment.timeout(save_seconds(self._case, self._case.job.at(self._hosts), self._hosts))
                self._saved = math.floor(self.outcome.steps)
            return
        if self._lost_at is None:
            self._lost_at, self._wanted = self._environment.now, math.floor(self.outcome.steps)
        self._wanted = max(self._wanted, math.floor(self.outcome.steps))
        self._lose_steps()
        self._enter("notice")
        yield self._environment.timeout(seconds)

    def _lose_steps(self) -> None:
        """The step in flight is lost, or all since the newest snapshot."""
        kept = self._saved if self._case.job.repeats_steps else math.floor(self.outcome.steps)
        lost = self.outcome.steps - kept
        self.outcome.seconds["useful"] -= lost * self._ideal
        self.outcome.seconds["redone"] += lost * self._ideal
        self.outcome.steps = kept

    def _enter(self, phase: str) -> None:
        self.settle()
        self._phase = phase
