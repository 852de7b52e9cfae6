"""`mezo-dist doctor`: finds out why a job does not start, if it is started the same way as the job.

Every rank looks at itself and at the way to rank 0; once all have met, rank 0 compares what they found and prints one
line per check, with a verdict. Before they have met, each rank that is stuck prints its own lines.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

import mezo_dist
from mezo_dist.distributed import environment
from mezo_dist.distributed.communicator import Communicator, fingerprint
from mezo_dist.distributed.connect import connect
from mezo_dist.errors import LostRankError, UserError

Verdict = Literal["ok", "warning", "PROBLEM"]
OK: Verdict = "ok"
WARNING: Verdict = "warning"
PROBLEM: Verdict = "PROBLEM"
SKEW_S = 1.0  # clocks further apart than this are worth a warning
SEEN_WITHIN_S = 5.0
"""Network file systems show a new file to other hosts after some seconds."""
MEGABYTE = 2**20


@dataclass(frozen=True)
class Line:
    """One line of the report."""

    check: str
    finding: str
    verdict: Verdict = OK
    hint: str = ""
    """What to do about it."""

    def __str__(self) -> str:
        hint = f"\n{'':28}{self.hint}" if self.hint else ""
        return f"{self.verdict:8} {self.check:18} {self.finding}{hint}"


@dataclass(frozen=True)
class Facts:
    """What a rank knows about itself."""

    host: str
    python: str
    versions: dict[str, str]
    code: str
    """SHA-256 of the sources of mezo_dist."""
    files: dict[str, str]
    """SHA-256 of the files to compare; empty where one cannot be read."""
    interface: str
    """The network card that gloo uses; empty: its own choice."""
    gpus: int


def examine(files: Sequence[Path], folder: Path, timeout_s: float) -> list[Line]:
    """All checks, in the order in which things can go wrong; an empty list on ranks other than 0 that get to the end.

    Args:
        files: to be the same on all ranks (a config, the data).
        folder: to be seen by all ranks (where the run folder will be).
        timeout_s: seconds to wait for ranks that do not answer.
    """
    try:
        me = environment.discover(os.environ)
    except UserError as error:
        return [Line("launcher", "environment not understood", PROBLEM, str(error))]
    lines = [_launcher(me)]
    reached = _way_to_rank_0(me, timeout_s) if me.world_size > 1 and me.address else []
    try:
        comm = connect(timeout_s)
    except (UserError, LostRankError) as error:
        reached = [line for line in reached if line.verdict == PROBLEM] or [Line("all ranks", str(error), PROBLEM)]
        return lines + reached
    try:
        facts = [Facts(**json.loads(text)) for text in comm.gather_texts(json.dumps(asdict(_facts(files))))]
        lines += [*reached, *compare(facts), *_shared_folder(comm, folder, facts)]
        if comm.world_size > 1:
            lines += [*_speed(comm), *_links(comm, facts, time.time)]
    finally:
        comm.close()
    return lines if comm.rank == 0 else []


def _facts(files: Sequence[Path]) -> Facts:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return Facts(
        socket.gethostname(),
        platform.python_version(),
        {"mezo_dist": mezo_dist.__version__, **versions},
        code=environment.code_digest(),
        files={str(path): _digest(path) for path in files},
        interface=os.environ.get("GLOO_SOCKET_IFNAME", ""),
        gpus=torch.cuda.device_count(),
    )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if os.access(path, os.R_OK) and path.is_file() else ""


def _launcher(me: environment.ClusterEnvironment) -> Line:
    if me.world_size == 1:
        started = f"{me.launcher}, " if me.launcher else "none: "
        return Line("launcher", f"{started}one process; start me the way the job is started to see all ranks")
    where = f", rendezvous at {me.address}:{me.port}" if me.address else ", rendezvous through MPI"
    return Line("launcher", f"{me.launcher}: {me.world_size} ranks{where}", WARNING if me.hint else OK, me.hint[2:])


def _way_to_rank_0(me: environment.ClusterEnvironment, timeout_s: float) -> list[Line]:
    """Whether rank 0 can be reached from here. On rank 0 itself only the name is looked at."""
    try:
        address = str(socket.getaddrinfo(me.address, me.port, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        hint = "set MASTER_ADDR to a name or an address that all hosts know"
        return [Line("name of rank 0", f"{me.address} is not known on {socket.gethostname()} ({error})", PROBLEM, hint)]
    lines = [Line("name of rank 0", f"{me.address} is {address}")]
    if not me.on_one_host and address != me.address and environment.names_this_machine(address):
        hint = "on other hosts it must have another address; set MASTER_ADDR to that one if they do not reach it"
        lines = [Line("name of rank 0", f"{me.address} is {address}, the loopback, here", WARNING, hint)]
    if me.rank and (why := unreachable(address, me.port, timeout_s)):
        card = environment.interface_towards(me.address) or "no network card"
        where = f"rank {me.rank} on {socket.gethostname()} (through {card})"
        lines.append(Line("way to rank 0", f"{where} does not reach {me.address}:{me.port}: {why[0]}", PROBLEM, why[1]))
    return lines


def unreachable(address: str, port: int, timeout_s: float) -> tuple[str, str] | None:
    """Why nothing can be connected to at ``address``, and what to do; None if it can, within ``timeout_s``.

    Args:
        address: host name or address.
        port: TCP port.
        timeout_s: seconds to try.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            left = max(0.1, deadline - time.monotonic())
            socket.create_connection((address, port), timeout=left).close()
            return None
        except ConnectionRefusedError:
            why = "the host answers, but nobody listens", "is rank 0 running, and is MASTER_PORT the same everywhere?"
        except OSError as error:
            why = f"no answer ({error})", "a firewall, a cut link, or an address of another network; see MASTER_ADDR"
        if time.monotonic() >= deadline:
            return why
        time.sleep(0.2)


def compare(facts: Sequence[Facts]) -> list[Line]:
    """Lines on what must be the same on all ranks, and on what they run on."""
    hosts = sorted({fact.host for fact in facts})
    lines = [Line("ranks", f"{len(facts)} on {len(hosts)} host(s): {', '.join(hosts)}")]
    hint = "install the same version everywhere"
    lines.append(_same("python", [fact.python for fact in facts], facts, WARNING, hint, facts[0].python))
    for name, version in facts[0].versions.items():
        lines.append(_same(name, [fact.versions[name] for fact in facts], facts, PROBLEM, hint, version))
    hint = "all ranks must run the same checkout; reinstall, or use a shared folder"
    lines.append(_same("code of mezo_dist", [fact.code for fact in facts], facts, PROBLEM, hint, facts[0].code[:12]))
    for path in facts[0].files:
        values = [fact.files[path] for fact in facts]
        line = _same(path, values, facts, PROBLEM, "copy it, or use a shared folder", values[0][:12])
        lines.append(line if all(values) else _unreadable(path, values, facts))
    gpus = ", NCCL for weights" if any(fact.gpus for fact in facts) else "; no GPU"
    lines.append(Line("backend", f"gloo for scalars{gpus}"))
    loopback = [_who(number, facts) for number, fact in enumerate(facts) if fact.interface == "lo"]
    cards = ", ".join(sorted({fact.interface or "gloo's own choice" for fact in facts}))
    if loopback and len(hosts) > 1:
        hint = "name rank 0 (MASTER_ADDR) by an address that others use, or set GLOO_SOCKET_IFNAME"
        return [*lines, Line("network card", f"loopback on {', '.join(loopback)}", PROBLEM, hint)]
    return [*lines, Line("network card", cards if len(facts) > 1 else "not needed")]


def _same(
    check: str,
    values: Sequence[str],
    facts: Sequence[Facts],
    verdict: Verdict,
    hint: str,
    shown: str,
) -> Line:
    """A line on a fact that must be the same on all ranks.

    Args:
        check: name of the line.
        values: the fact on every rank.
        facts: what else the ranks know.
        verdict: of the line, if ranks differ.
        hint: what to do then.
        shown: rank 0's value, as it is shown.
    """
    others = [f"{value[:12]} on {_who(rank, facts)}" for rank, value in enumerate(values) if value != values[0]]
    if not others:
        return Line(check, f"{shown}, the same on all" if len(values) > 1 else shown)
    return Line(check, f"{shown} on {_who(0, facts)}, but {', '.join(others)}", verdict, hint)


def _unreadable(path: str, values: Sequence[str], facts: Sequence[Facts]) -> Line:
    """The line on a file that some ranks cannot read.

    Args:
        path: of the file.
        values: its digest on every rank; empty where it cannot be read.
        facts: what else the ranks know.
    """
    where = ", ".join(_who(number, facts) for number, value in enumerate(values) if not value)
    return Line(path, f"cannot be read on {where}", PROBLEM, "copy it, or use a shared folder")


def _who(rank: int, facts: Sequence[Facts]) -> str:
    return f"rank {rank} ({facts[rank].host})"


def _shared_folder(comm: Communicator, folder: Path, facts: Sequence[Facts]) -> list[Line]:
    """Whether a file that rank 0 writes is seen by all.

    Args:
        comm: the ranks.
        folder: the folder.
        facts: what the ranks know of themselves.
    """
    mark = Path(comm.broadcast_text(str(folder / f".mezo-dist-doctor-{uuid.uuid4().hex}")))
    problem = ""
    if comm.rank == 0:
        try:
            mark.touch()
        except OSError as error:
            problem = f"{folder} cannot be written to by {_who(0, facts)} ({error.strerror})"
    if problem := comm.broadcast_text(problem):
        return [Line("shared folder", problem, PROBLEM, "name another one: --folder")]
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = [_who(number, facts) for number, text in enumerate(comm.gather_texts(str(seen))) if text != "True"]
    if comm.rank == 0:
        mark.unlink()
    if not blind:
        return [Line("shared folder", f"{mark.parent} is seen by all")]
    hint = "the run is in rank 0's alone: there it can be resumed, but snapshots need an output.dir that all see"
    return [Line("shared folder", f"{mark.parent} is another folder on {', '.join(blind)}", WARNING, hint)]


def _speed(comm: Communicator) -> list[Line]:
    """Latency of the all-reduce of a step, and the bandwidth of larger ones, between all ranks."""
    times = []
    for number in range(21):
        began = time.perf_counter()
        comm.round(torch.zeros(0, dtype=torch.int64), fingerprint("doctor", number))
        times.append(time.perf_counter() - began)
    latency = statistics.median(times[1:])
    size, elapsed = 2**12, 0.0
    while elapsed < 0.2 and size < 64 * MEGABYTE:  # seconds; a slow link is not asked for more than it needs to be
        size *= 2
        began = time.perf_counter()
        with comm.guarded("all-reduce"):
            dist.all_reduce(torch.zeros(size, dtype=torch.uint8))
            slowest = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)  # so that all stop at the same size
        elapsed = float(slowest)
    rate = 2 * (comm.world_size - 1) / comm.world_size * size / elapsed  # a ring sends everything nearly twice
    return [
        Line("scalar all-reduce", f"{latency * 1e3:.2f} ms between all ranks: what a step waits at least"),
        Line("bandwidth", f"{rate * 8 / 1e6:.1f} Mbit/s per rank in an all-reduce of {size / MEGABYTE:.3g} MiB"),
    ]


def _links(comm: Communicator, facts: Sequence[Facts], clock: Callable[[], float]) -> list[Line]:
    """Round trips between rank 0 and each other rank: the slowest link, and how far their clocks are apart.

    Args:
        comm: the ranks.
        facts: what the ranks know of themselves.
        clock: this rank's, in seconds.
    """
    links = {rank: offset_and_trip(comm, rank, clock) for rank in range(1, comm.world_size)}
    slow = max(links, key=lambda rank: links[rank][1])
    skewed = max(links, key=lambda rank: abs(links[rank][0]))
    offset, trip = links[skewed]
    lines = [Line("slowest link", f"{links[slow][1] * 1e3:.2f} ms there and back, to {_who(slow, facts)}")]
    apart = f"{offset:+.3f} s on {_who(skewed, facts)}, known to {trip / 2:.3f} s"
    if abs(offset) <= SKEW_S + trip:
        return [*lines, Line("clocks", f"at most {apart}")]
    hint = "training does not mind, but logs and certificates do; run an NTP client"
    return [*lines, Line("clocks", apart, WARNING, hint)]


def offset_and_trip(comm: Communicator, rank: int, clock: Callable[[], float]) -> tuple[float, float]:
    """How many seconds ``rank``'s clock is ahead of rank 0's, and the shortest round trip; zeros on other ranks.

    All ranks call it; rank 0 and ``rank`` exchange five pairs of messages. The error is at most half of the round trip.

    Args:
        comm: the ranks.
        rank: the other end.
        clock: this rank's, in seconds.
    """
    best = (0.0, float("inf"))
    word = torch.zeros(1, dtype=torch.float64)
    with comm.guarded(f"messages to rank {rank}"):
        for _ in range(5):
            if comm.rank == 0:
                sent = clock()
                dist.send(word, rank)
                dist.recv(word, rank)
                received = clock()
                best = min(best, (float(word) - (sent + received) / 2, received - sent), key=lambda pair: pair[1])
            elif comm.rank == rank:
                dist.recv(word, 0)
                word[0] = clock()
                dist.send(word, 0)
    return best if comm.rank == 0 else (0.0, 0.0)


def report(lines: Sequence[Line]) -> None:
    """Print the lines.

    Raises:
        UserError: there are problems among them.
    """
    for line in lines:
        print(line, flush=True)
    if problems := [line.check for line in lines if line.verdict == PROBLEM]:
        raise UserError(f"doctor found {len(problems)} problem(s): {', '.join(problems)}")
