"""What ``mezo-dist simulate`` says against what happens: virtual hosts, one of them killed, a link of 1 Mbit/s.

    python examples/scaling_study/simulate_check.py [--fast] [--hosts 2 4 8] [--repeats 3] [--parts link]

Needs root (`launcher/README.md`); eight hosts need 6 GiB of memory. Three parts, for each number of hosts, one rank
on each:

* all-reduce: seconds of a round of 256 bytes, and packets that host1 sends in it. A message that goes round a ring
  takes 2 (n - 1) hops; seconds and packets of a hop are taken from the smallest number of hosts, so that only the
  others test the formula. Packets do not depend on how busy the machine is: three times as many for four hosts as for
  two is a ring, twice as many would be a tree.
* slow link: a step of a tiny model, whole and sharded (fsdp), on links of 1 Mbit/s: the bytes that the network card
  of a host sends in it, contents and framing, which do not depend on how busy the machine is; and its seconds.
  Predicted is the step without the limit, measured in turns with it, plus the bytes of the plan over the rate of the
  link, less the few that the token bucket of a virtual link lets through at once.
* lost: a host is killed (cable first, so that nobody is told), or only its rank; seconds until the next step is in the
  trajectory. What a start takes (imports, data, model: the assumption ``start``) is taken from the start of another job
  on as many hosts as go on: virtual hosts share the cores of this machine, and the job before it has filled its caches
  of files. Time-out and last call are those of the job. What is tested is that a loss costs their sum.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from launcher.hosts import BURST, Cluster, cluster  # noqa: E402
from mezo_dist.planning.allreduce import hops  # noqa: E402
from mezo_dist.planning.choice import plan  # noqa: E402
from mezo_dist.planning.lookup import find_shape  # noqa: E402
from mezo_dist.planning.machine import Machine  # noqa: E402
from mezo_dist.planning.setting import Setting  # noqa: E402
from mezo_dist.simulation.assumptions import Assumptions  # noqa: E402
from mezo_dist.simulation.jobs import Costs, Job  # noqa: E402
from mezo_dist.simulation.stragglers import Stragglers  # noqa: E402
from mezo_dist.simulation.week import Case, simulate  # noqa: E402
from mezo_dist.testing import write_tiny_config  # noqa: E402

LIMIT = 0.2
"""Residuals beyond this are marked."""
RATE = "1mbit"
RATE_BYTES = 125_000
TIMEOUT_S, LAST_CALL_S = 20, 5
"""``distributed.timeout_s`` and torchrun's ``last_call_timeout`` of the jobs here."""
PATIENCE_S = 600
PARTS = ("reduce", "link", "host", "rank")
ROUNDS = 200
TURNS = 3
"""How often the limit of the links comes and goes."""
MANY = 10**6


def work(rounds: int) -> None:
    """A rank of the first part: some rounds, and how long one takes."""
    import torch

    from mezo_dist.distributed.connect import connect

    torch.set_num_threads(1)
    comm = connect(timeout_s=PATIENCE_S)
    for line in sys.stdin:
        if line.strip() != "go":
            break
        comm.barrier()
        began = time.perf_counter()
        for _ in range(rounds):
            comm.round(torch.zeros(8, dtype=torch.int64), 1)
        print((time.perf_counter() - began) / rounds, flush=True)


def all_reduce(hosts: Cluster, repeats: int) -> dict[str, float]:
    """Seconds and packets of a round: the fastest of some turns, as others use this machine, too."""
    shared = {"WORLD_SIZE": str(len(hosts.hosts)), "MASTER_ADDR": "host1", "MASTER_PORT": "29400"}
    ranks = []
    for rank, host in enumerate(hosts.hosts):
        given = [f"{name}={value}" for name, value in {**shared, "RANK": str(rank), "OMP_NUM_THREADS": "1"}.items()]
        line = ["env", *given, sys.executable, __file__, "--worker", str(ROUNDS)]
        ranks.append(hosts.popen(host, line, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    times, packets = [], 0.0
    for turn in range(repeats + 1):
        before = hosts.counters("host1")
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write("go\n")
            rank.stdin.flush()
        answers = [rank.stdout.readline() for rank in ranks if rank.stdout is not None]
        if turn:
            times.append(max(map(float, answers)))
            packets = (hosts.counters("host1") - before).sent_packets / (ROUNDS + 1)
    for rank in ranks:
        rank.communicate("end\n")
    return {"seconds": min(times), "packets": packets}


@contextlib.contextmanager
def job(
    hosts: Cluster, folder: Path, fewest: int, *settings: str, timeout_s: int = TIMEOUT_S
) -> Iterator[list[subprocess.Popen[str]]]:
    """A tiny run that does not end by itself, started by launcher/torchrun.sh on every host.

    Args:
        hosts: the virtual hosts.
        folder: of its config.
        fewest: hosts without which it does not start.
        settings: further ones, as the command line takes them.
        timeout_s: ``distributed.timeout_s``.
    """
    settings = (f"--distributed.timeout_s={timeout_s}", "--output.export=false", "--output.test=false", *settings)
    most = len(hosts.hosts)
    line = [str(ROOT / "launcher" / "torchrun.sh"), f"{fewest}:{most}", "host1", "config.yaml", *settings]
    more = {"PET_RDZV_CONF": f"last_call_timeout={LAST_CALL_S},keep_alive_interval=1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **more, "PYTHONPATH": str(ROOT)}
    with contextlib.ExitStack() as stack:
        started = []
        for host in hosts.hosts:
            log = stack.enter_context((folder / f"log-{host}").open("w"))
            started.append(hosts.popen(host, line, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                                       stderr=subprocess.STDOUT))  # fmt: skip
        try:
            yield started
        finally:
            for process in started:
                process.kill()


def wait_for_steps(folder: Path, number: int) -> float:
    """The time at which the trajectory had so many steps."""
    path, deadline = folder / "run" / "trajectory.jsonl", time.monotonic() + PATIENCE_S
    while _steps(path) < number:
        if time.monotonic() > deadline:
            logs = "\n".join(log.read_text()[-2000:] for log in folder.glob("log-*"))
            raise RuntimeError(f"no step {number} of {shlex.quote(str(path))}:\n{logs}")
        time.sleep(0.01)
    return time.monotonic()


def _steps(path: Path) -> int:
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


def wait_for_ranks(folder: Path) -> float:
    """The time at which rank 0 began to import."""
    while not _imports(folder):
        time.sleep(0.01)
    return time.monotonic()


def _imports(folder: Path) -> int:
    """How often rank 0 has begun to import."""
    return sum(log.read_text().count("importing") for log in folder.glob("log-*"))


def first_start(hosts: Cluster, folder: Path) -> float:
    """Seconds of a job from the moment that its ranks import to its first step."""
    write_tiny_config(folder, steps=MANY)
    with job(hosts, folder, len(hosts.hosts)):
        ranks_at = wait_for_ranks(folder)
        return wait_for_steps(folder, 1) - ranks_at


def lost(hosts: Cluster, folder: Path, *, silent: bool) -> dict[str, float]:
    """Seconds from a loss until ranks import again (what the assumption ``notice`` is, with the last call and, where
    nobody is told, the time-out), and until the next step."""
    write_tiny_config(folder, steps=MANY)
    victim = hosts.hosts[-1]
    with job(hosts, folder, len(hosts.hosts) - 1):
        wait_for_steps(folder, 20)
        before = _imports(folder)
        if silent:
            hosts.kill(victim)
        else:
            hosts.run(victim, ["sh", "-c", "kill -9 $(pgrep -f '[p]ython.* -m mezo_dist train' | tail -1)"])
        began = time.monotonic()
        time.sleep(1)  # what was under way arrives
        done = _steps(folder / "run" / "trajectory.jsonl")
        while _imports(folder) == before:
            time.sleep(0.01)
        noticed = time.monotonic() - began
        return {"noticed": noticed, "back": wait_for_steps(folder, done + 1) - began}


def simulated_loss(hosts: int, start: float, *, silent: bool) -> float:
    """Seconds until the work is back, as a week of `simulate` has them after a loss of a host that is not the first."""
    costs = Costs(0.02, 0.0, 0.0, False, 1e-6, 1.0, 1.0, 1.0)
    last_call = float(LAST_CALL_S if silent else 0)
    assumed = Assumptions(mtbf=86400.0 * hosts, silent=float(silent), timeout=float(TIMEOUT_S), start=start, connect=0,
                          last_call=last_call, cut_every=1e12, slow_hosts=0.0, sigma=0.0, repair=7200.0)  # fmt: skip
    case = Case(Job("tiny", 1, False, lambda _: costs), hosts, 1, assumed, Stragglers(0.0), snapshot_every=1000)
    return min(seconds for seed in range(4) for seconds in simulate(case, seed).until_back)


def slow_link(hosts: Cluster, folder: Path, layout: str, steps: int) -> dict[str, float]:
    """Seconds of a step at 1 Mbit/s and without a limit, bytes of a host's card in it, and what the plan says of both.
    The card is the last host's: the first one answers the launchers of all, too."""
    write_tiny_config(folder, algorithm="mezo", steps=MANY, batch_size=16)
    settings, card = (f"--layout.name={layout}", "--train.micro_batch=8"), hosts.hosts[-1]
    with job(hosts, folder, len(hosts.hosts), *settings, timeout_s=PATIENCE_S):
        wait_for_steps(folder, 10)
        times: dict[str, list[float]] = {"unlimited": [], RATE: []}
        sent: list[float] = []
        for _ in range(TURNS):
            for name, values in times.items():
                hosts.rate(None if name == "unlimited" else name)
                first = _steps(folder / "run" / "trajectory.jsonl") + 2
                began, before = wait_for_steps(folder, first), hosts.counters(card)
                values.append((wait_for_steps(folder, first + steps) - began) / steps)
                if name == RATE:
                    sent.append((hosts.counters(card) - before).sent_bytes / steps)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    setting = Setting(layout=layout, weights="float32", batch_size=16, micro_batch=8, tokens=16)  # type: ignore[arg-type]
    one = plan(find_shape(str(folder / "model"), []), setting, Machine(len(hosts.hosts), gpu=False))
    contents = one.mean(lambda step: step.traffic.between_hosts)
    framing = one.mean(lambda step: step.traffic.framed_gathers + step.traffic.framed_scalars)
    waiting = max(0.0, contents + framing - BURST) / RATE_BYTES
    return {"measured": seconds[RATE], "unlimited": seconds["unlimited"], "contents": contents, "framing": framing,
            "sent": statistics.median(sent), "predicted": seconds["unlimited"] + waiting}  # fmt: skip


def main() -> None:
    """Measure, compare, print a table, and write everything down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--fast", action="store_true", help="two hosts (and four for the all-reduce), each part once")
    parser.add_argument("--hosts", type=int, nargs="+", help="default: 2 and 4, for the slow link also 8")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--to", type=Path, help="a JSON file of all figures")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker)
        return
    counts, repeats, steps = ([2], 1, 5) if given.fast else (given.hosts or [2, 4], given.repeats, 10)
    table = Table(given.to)
    if "reduce" in given.parts:
        check_reduce(table, [2, 4] if given.fast else counts, repeats)
    if "link" in given.parts:
        for count in counts if given.fast or given.hosts else [2, 4, 8]:
            check_link(table, count, repeats, steps)
    for count in counts:
        for what in ("host", "rank"):
            if what in given.parts:
                check_lost(table, count, repeats, silent=what == "host")
    within = sum(abs(row["residual"]) <= LIMIT for row in table.rows)
    print(f"{within} of {len(table.rows)} within {LIMIT:.0%}; load {os.getloadavg()[0]:.1f}")


class Table:
    """Rows that are shown, and written down, as they come."""

    def __init__(self, path: Path | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._path = path
        print(f"{'':58} {'predicted':>10} {'measured':>10} {'residual':>8}")

    def show(self, what: str, predicted: float, measured: float, **more: Any) -> None:
        """Add a row."""
        residual = predicted / measured - 1
        load = os.getloadavg()[0]
        self.rows.append({"what": what, "predicted": predicted, "measured": measured, "residual": residual,
                          "load": load, **more})  # fmt: skip
        mark = "" if abs(residual) <= LIMIT else " !"
        print(f"{what:58} {predicted:10.4f} {measured:10.4f} {residual:+8.0%}{mark}", flush=True)
        if self._path:
            about = {"command": shlex.join(sys.argv), "date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(),
                     "machine": platform.processor() or platform.machine(),
                     "assumptions": dataclasses.asdict(Assumptions())}  # fmt: skip
            self._path.write_text(json.dumps({**about, "rows": self.rows}, indent=1) + "\n")


def check_reduce(table: Table, counts: list[int], repeats: int) -> None:
    """The first part."""
    a_hop: dict[str, float] = {}
    for count in counts:
        with cluster(count) as hosts:
            figures = all_reduce(hosts, 2 * repeats)
        passed = hops("ring", count, 1)
        for name, value in figures.items():
            fixes = " (fixes a hop)" if name not in a_hop else ""
            a_hop.setdefault(name, value / passed)
            table.show(f"{count} hosts, all-reduce, {name}{fixes}", passed * a_hop[name], value)


def check_link(table: Table, count: int, repeats: int, steps: int) -> None:
    """The second part."""
    for layout in ("replicated", "fsdp"):
        turns = []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder, cluster(count) as hosts:
                turns.append(slow_link(hosts, Path(folder), layout, steps))
        middle = sorted(turns, key=lambda turn: turn["measured"] / turn["predicted"])[len(turns) // 2]
        of_a_step = f"{count} hosts, {layout}, a step at {RATE}"
        sent = statistics.median(turn["sent"] for turn in turns)
        table.show(f"{of_a_step}, bytes", middle["contents"] + middle["framing"], sent)
        table.show(f"{of_a_step}, s", middle["predicted"], middle["measured"], turns=turns)


def check_lost(table: Table, count: int, repeats: int, *, silent: bool) -> None:
    """The third part: a whole host, of which nobody is told, or a rank alone."""
    starts, losses = [], []
    for turn in range(repeats + 1):  # the first start finds cold caches, and does not count
        with tempfile.TemporaryDirectory() as folder, cluster(count - 1 if silent else count) as hosts:
            starts.append(first_start(hosts, Path(folder)))
        if turn:
            with tempfile.TemporaryDirectory() as folder, cluster(count) as hosts:
                losses.append(lost(hosts, Path(folder), silent=silent))
    start = statistics.median(starts[1:])
    what = f"{count} hosts, a {'host' if silent else 'rank'} killed, until the next step, s"
    back = statistics.median(loss["back"] for loss in losses)
    table.show(what, simulated_loss(count, start, silent=silent), back, starts=starts, losses=losses)


if __name__ == "__main__":
    main()
