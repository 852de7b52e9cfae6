"""What a slow link costs: step time on links of 1 Gbit/s to 1 Mbit/s against loopback, forward passes only and DDP.

    python examples/benchmarks/network.py [--shape opt-125m] [--rounds 5] [--steps 3] [--plot comm.png]

Two ranks, one thread each, train the same model with random weights: on one virtual host over loopback, and on two
virtual hosts whose links tc limits (needs root; see launcher/README.md). A step of mezo_dist is a MeZO step on
the replicated engine with the comm of a real run; a step of DDP is forward, backward and SGD.

Conditions take turns, a few steps each, so that a busy machine slows all of them alike; a ratio is the median of the
ratios within a round. Bytes are read from the network card of host1, headers included; TCP payload is what is left
without Ethernet, IP and TCP headers. A token bucket lets a step's few packets through at once, where a real line needs
time to put them out; that time, all bytes of a step at the line's rate, is added to the measured one.

A DDP step that takes longer than --patience seconds is not waited for: its time is the bytes of a step, as counted at
1 Gbit/s, over the bytes per second that the card is seen to send. Such figures are marked with a ~.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import harness
import torch
from step_cost import SHAPES, make_batch, make_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launcher.hosts import Cluster, Counters, cluster
from mezo_dist.algorithms.base import Evaluation, Losses, Problem
from mezo_dist.algorithms.mezo import MeZO, MeZOPlanner
from mezo_dist.algorithms.step import Progress, take_step
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.distributed.connect import connect
from mezo_dist.engines.engine import Engine
from mezo_dist.planning.framing import SEGMENT_HEADERS
from mezo_dist.runs.evaluation import Evaluator
from mezo_dist.tasks.classification.label_words import LabelWords

RATES = {"1gbit": 1e9, "100mbit": 1e8, "10mbit": 1e7, "1mbit": 1e6}
"""Bits per second."""
SAMPLES, TOKENS, LR = 8, 32, 1e-6
"""Samples and tokens of a rank's micro-batch, and the learning rate."""
FLOW = 50_000
"""Bytes that only gradients come to, not the messages before them."""
LOOPBACK = "loopback"
FAST = {"shape": "tiny", "rounds": 1, "steps": 20, "patience": 2.0}


def mezo_step(shape: str, comm: Communicator) -> Callable[[], None]:
    """A training step as `mezo_dist.runs.training` takes it: plan, evaluate with one all-reduce, update, apply."""
    model = make_model(shape)
    first = make_batch(SAMPLES, TOKENS)
    batch = [first, dataclasses.replace(first, slots=tuple(range(SAMPLES, 2 * SAMPLES)))]
    evaluator = Evaluator(Engine(model, Law("gaussian")), LabelWords(model, [100, 200], first), comm)
    planner = MeZOPlanner(MeZO(lr=LR), Problem(seed=0, num_steps=10**6, batch_size=2 * SAMPLES, full_size=2 * SAMPLES))
    progress = Progress(planner.init())

    def evaluate(request: Evaluation, round_number: int) -> Losses | None:
        return evaluator.losses(request, batch, ("benchmark", progress.step))

    def take() -> None:
        assert take_step(planner, progress, evaluate, evaluator.engine, 0).update is not None

    return take


def ddp_step(shape: str, comm: Communicator) -> Callable[[], None]:
    """Forward, backward with gradients averaged over the ranks, SGD; as many tokens as a rank of `mezo_step` has."""
    model = torch.nn.parallel.DistributedDataParallel(make_model(shape))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    ids = make_batch(SAMPLES, TOKENS).inputs["input_ids"]

    def take() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return take


STEPS = {"mezo": mezo_step, "ddp": ddp_step}


def work(shape: str) -> None:
    """A rank: obey the lines of standard input.

    ``make KIND`` makes what takes steps, in place of what was there, and takes a first one; the answer is READY. A
    number has it take so many steps; the answer is STEP, seconds and payload bytes per step.
    """
    torch.set_num_threads(1)
    comm = connect(timeout_s=3600)
    take: Callable[[], None] = comm.barrier
    for line in sys.stdin:
        if line.startswith("make "):
            take = comm.barrier  # the model of the kind before is freed
            take = STEPS[line.split()[1]](shape, comm)
            take()
            print("READY", flush=True)
            continue
        comm.barrier()
        began, sent = time.perf_counter(), comm.payload_bytes
        for _ in range(int(line)):
            take()
        seconds = (time.perf_counter() - began) / int(line)
        print("STEP", seconds, (comm.payload_bytes - sent) / int(line), flush=True)


class Pair:
    """Two ranks, on two hosts or, if these are the same, over loopback."""

    def __init__(self, machines: Cluster, hosts: tuple[str, str], shape: str, port: int) -> None:
        address = "127.0.0.1" if hosts[0] == hosts[1] else hosts[0]
        command = [sys.executable, __file__, "--worker", "--shape", shape]
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        self.ranks = [
            machines.popen(
                host,
                ["env", *(f"{name}={value}" for name, value in {**shared, "RANK": str(rank)}.items()), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank, host in enumerate(hosts)
        ]

    def make(self, kind: str) -> None:
        """From now on both ranks take steps of a kind."""
        self._tell(f"make {kind}")
        for rank in self.ranks:
            _answer(rank, "READY")

    def ask(self, num_steps: int) -> None:
        """Have both ranks take steps."""
        self._tell(str(num_steps))

    def answer(self) -> tuple[float, float]:
        """Wait for them; seconds per step of the slower rank, payload bytes per step."""
        answers = [_answer(rank, "STEP") for rank in self.ranks]
        return max(seconds for seconds, _ in answers), answers[0][1]

    def _tell(self, line: str) -> None:
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write(f"{line}\n")
            rank.stdin.flush()

    def wait_for_traffic(self, machines: Cluster, before: Counters) -> None:
        """Until gradients have begun to flow out of host1, which counted ``before``: the passes are done."""
        while (machines.counters("host1") - before).sent_bytes < FLOW:
            if any(rank.poll() is not None for rank in self.ranks):
                raise RuntimeError("a rank ended")
            time.sleep(0.05)

    def close(self) -> None:
        """End both ranks."""
        for rank in self.ranks:
            rank.kill()


def _answer(rank: subprocess.Popen[str], word: str) -> list[float]:
    assert rank.stdout is not None
    for line in rank.stdout:
        if line.startswith(word):
            return [float(part) for part in line.split()[1:]]
    raise RuntimeError(f"a rank ended with status {rank.wait()}")


def measure_mezo(
    machines: Cluster, local: Pair, apart: Pair, rounds: int, num_steps: int
) -> dict[str, dict[str, float]]:
    """Condition -> figures of a step of mezo_dist."""
    machines.rate(None)
    for pair in (local, apart):
        pair.make("mezo")
    times: dict[str, list[float]] = {name: [] for name in (LOOPBACK, *RATES)}
    sent: dict[str, list[Counters]] = {name: [] for name in RATES}
    payload = 0.0
    for round_number in range(rounds + 1):  # the first warms up and does not count
        for name, values in times.items():
            machines.rate(None if name == LOOPBACK else name)
            pair, before = (local if name == LOOPBACK else apart), machines.counters("host1")
            pair.ask(num_steps)
            seconds, payload = pair.answer()
            if round_number:
                values.append(seconds)
                if name != LOOPBACK:
                    sent[name].append(machines.counters("host1") - before)
    figures = {LOOPBACK: {"seconds": statistics.median(times[LOOPBACK]), "over_loopback": 1.0}}
    for name, rate in RATES.items():
        # The barrier before the steps is a round like theirs.
        of_a_step = rounds * (num_steps + 1)
        num_bytes = sum(counters.sent_bytes for counters in sent[name]) / of_a_step
        packets = sum(counters.sent_packets for counters in sent[name]) / of_a_step
        line_s = num_bytes * 8 / rate
        ratios = [(there + line_s) / here for there, here in zip(times[name], times[LOOPBACK], strict=True)]
        figures[name] = {
            "seconds": statistics.median(times[name]) + line_s,
            "over_loopback": statistics.median(ratios),
            "bytes": num_bytes,
            "tcp_payload": num_bytes - packets * SEGMENT_HEADERS,
            "payload": payload,
        }
    return figures


def measure_ddp(machines: Cluster, local: Pair, apart: Pair, patience_s: float) -> dict[str, dict[str, float]]:
    """Condition -> figures of a step of DDP."""
    machines.rate(None)
    for pair in (local, apart):
        pair.make("ddp")
    local.ask(1)
    figures = {LOOPBACK: {"seconds": local.answer()[0]}}
    num_bytes = 0.0
    for name in RATES:
        machines.rate(name)
        began, before = time.monotonic(), machines.counters("host1")
        apart.ask(1)
        if num_bytes * 8 / RATES[name] < patience_s:
            figures[name] = {"seconds": apart.answer()[0], "projected": 0.0}
            num_bytes = num_bytes or (machines.counters("host1") - before).sent_bytes
        else:
            apart.wait_for_traffic(machines, before)
            began, before = time.monotonic(), machines.counters("host1")
            time.sleep(patience_s / 2)
            rate = (machines.counters("host1") - before).sent_bytes / (time.monotonic() - began)
            figures[name] = {"seconds": figures[LOOPBACK]["seconds"] + num_bytes / rate, "projected": 1.0}
            machines.rate(None)
            apart.answer()
        figures[name] |= {"over_loopback": figures[name]["seconds"] / figures[LOOPBACK]["seconds"], "bytes": num_bytes}
    return figures


def show(kind: str, figures: dict[str, dict[str, float]]) -> None:
    """A table."""
    print(f"\n{kind:12} {'s per step':>12} {'/ loopback':>12} {'bytes sent':>14} {'TCP payload':>12} {'payload':>9}")
    for name, row in figures.items():
        mark = "~" if row.get("projected") else ""
        numbers = [f"{row[key]:.0f}" if key in row else "" for key in ("bytes", "tcp_payload", "payload")]
        ratio = f"{mark}{row.get('over_loopback', 1.0):.3f}"
        print(f"{name:12} {mark + format(row['seconds'], '.3f'):>12} {ratio:>12}", end="")
        print(f" {numbers[0]:>14} {numbers[1]:>12} {numbers[2]:>9}")


def plot(path: str, results: dict[str, dict[str, dict[str, float]]]) -> None:
    """Step time over the rate of the link."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for kind, figures in results.items():
        (line,) = axes.plot(RATES.values(), [figures[name]["seconds"] for name in RATES], "o-", label=kind)
        axes.axhline(figures[LOOPBACK]["seconds"], linestyle=":", color=line.get_color())
    axes.set(xscale="log", yscale="log", xlabel="link, bit/s", ylabel="seconds per step (dotted: loopback)")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    """Measure, print a table, plot and, with --json, print one last line for machines."""
    parser = harness.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="opt-125m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of mezo_dist in each condition of a round")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds that a DDP step may take")
    parser.add_argument("--plot", metavar="FILE.png")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = harness.parse(parser, FAST)
    if given.worker:
        work(given.shape)
        return
    facts = harness.begin()
    with cluster(2) as machines:
        local = Pair(machines, ("host1", "host1"), given.shape, 29501)
        apart = Pair(machines, ("host1", "host2"), given.shape, 29502)
        mezo = measure_mezo(machines, local, apart, given.rounds, given.steps)
        show("mezo_dist", mezo)
        ddp = measure_ddp(machines, local, apart, given.patience)
        show("DDP", ddp)
        for pair in (local, apart):
            pair.close()
    if given.plot:
        plot(given.plot, {"mezo_dist": mezo, "DDP": ddp})
    slow = mezo["1mbit"]
    figures = {
        "payload_bytes_per_step": round(slow["payload"]),
        "tcp_payload_bytes_per_step": round(slow["tcp_payload"]),
        "bytes_per_step": round(slow["bytes"]),
        "time_1mbit_over_loopback": round(slow["over_loopback"], 3),
        "ddp_bytes_per_step": round(ddp["1mbit"]["bytes"]),
        "ddp_time_1mbit_over_loopback": round(ddp["1mbit"]["over_loopback"]),
    }
    harness.end(given, facts, figures)


if __name__ == "__main__":
    main()
