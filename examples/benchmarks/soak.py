"""Hours of a training job in minutes: hundreds of steps, ranks killed at random moments, restarts on other world sizes
and layouts.

    python examples/benchmarks/soak.py --kills 40 --json
    python examples/benchmarks/soak.py --fast

Ranks (1 to 3) hold their weights replicated, in FSDP2's or in ZeRO-3's shards, and go on from what another layout left:
snapshots and trajectory. A rank is killed after a random time or inside a gather of weights. Every run that gets to its
end must have the bits of the undisturbed one, and every rank that survives the loss of another must end with status 75,
which asks for a restart. A last, long run is watched from outside: its memory and its open files must not grow. The
model is tiny, so what is tried is everything but the arithmetic. Ends with status 1 if
something was not as it must be.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import harness

from mezo_dist.errors import LostRankError
from mezo_dist.testing import write_tiny_config
from tests.faults.jobs import Fault, Job, kill_at_random, start, steps_of

FAST = {"kills": 4, "steps": 40, "long_steps": 150}
"""About a minute on two idle cores."""
SNAPSHOT_EVERY = 25
LONGEST_S = 4.0
"""Within which a rank is killed: about as long as a run takes."""
TIMEOUT_S = 10.0
"""``distributed.timeout_s``: within it a rank that looks for a dead one at the start must have given up."""
GRACE_S = 60.0
"""Within which all survivors must have ended."""
GATHERS_PER_STEP = 5
WARM_UP = 0.3
"""Part of the long run after which memory and open files must stay as they are."""
LAYOUTS = {
    "replicated": "",
    "fsdp": "mezo_dist.engines.layouts.fsdp:Fsdp",
    "zero": "mezo_dist.engines.layouts.zero:Zero",
}
"""Layouts, and what gathers weights there."""


def main(given: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = harness.parser(__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--long-steps", type=int, default=1500, help="of the run whose memory is watched")
    options = harness.parse(parser, FAST, given)
    facts = harness.begin()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mezo-soak-") as folder:
        outcome = soak(Path(folder), options.kills, options.steps, random.Random(options.seed))
        findings = outcome.findings() | {"steps": options.steps}
        findings |= watch_long_run(Path(folder), options.long_steps)
    findings |= {"seed": options.seed, "seconds": round(time.monotonic() - began, 1)}
    print("  ".join(f"{name} {finding}" for name, finding in findings.items()))
    harness.end(options, facts, findings)
    flat = findings["rss_growth_MiB"] < 8 and findings["fd_growth"] <= 0
    return 0 if outcome.equal and not outcome.other_statuses and outcome.kills >= options.kills and flat else 1


@dataclass
class Soak:
    """What came of the kills so far."""

    kills: int = 0
    kills_in_gathers: int = 0
    runs: int = 0
    """Runs that got to their end."""
    equal: bool = True
    """All of these had the bits of the undisturbed run."""
    layouts: Counter[str] = field(default_factory=Counter)
    """Jobs by layout."""
    survivors: int = 0
    """Ranks that ended with status 75 because another one was lost."""
    other_statuses: list[int] = field(default_factory=list)
    """Statuses of survivors that ended otherwise."""
    events: Counter[str] = field(default_factory=Counter)

    def findings(self) -> dict[str, Any]:
        """For the line of JSON."""
        return {
            "kills": self.kills,
            "kills_in_gathers": self.kills_in_gathers,
            "runs": self.runs,
            "restarts": self.events["resumed"],
            "layouts": dict(self.layouts),
            "bit_equal": self.equal,
            "survivors_with_75": self.survivors,
            "survivors_with_other_status": self.other_statuses,
        }


def soak(root: Path, kills: int, steps: int, draw: random.Random) -> Soak:
    """Kill and restart jobs until there were so many kills; compare every run that got to its end."""
    config = write_tiny_config(root, "llama-tied", "mezo-svrg", steps=steps)
    reference = finish(root, config, root / "undisturbed")
    so_far, folder = Soak(), root / "run-0"
    while so_far.kills < kills or so_far.runs == 0:
        codes = disturbed_job(root, config, folder, so_far, draw, may_kill=so_far.kills < kills)
        done = len(steps_of(folder)) if (folder / "trajectory.jsonl").exists() else 0
        if set(codes) == {0}:
            so_far.equal = so_far.equal and outcome_of(folder) == reference
            so_far.events.update(json.loads(line)["event"] for line in (folder / "events.jsonl").open())
            so_far.runs, folder = so_far.runs + 1, root / f"run-{so_far.runs + 1}"
        print(f"kill {so_far.kills}/{kills}, run {so_far.runs}, step {done}/{steps}, {codes}", file=sys.stderr)
    return so_far


def disturbed_job(
    root: Path, config: Path, folder: Path, so_far: Soak, draw: random.Random, *, may_kill: bool
) -> list[int]:
    """Start the run, or go on with it, on a world and a layout that are drawn, and kill a rank if that is allowed.

    Returns:
        The exit status of every rank, minus the signal's number if one ended it.
    """
    world_size, layout = draw.choice([1, 2, 3]), draw.choice(list(LAYOUTS))
    so_far.layouts[layout] += 1
    fault = None
    if may_kill and LAYOUTS[layout] and draw.random() < 0.5:
        most = GATHERS_PER_STEP * len_of_rest(folder, config)
        moment = draw.choice([("start", "before"), ("start", "after"), ("finish", "before"), ("finish", "after")])
        function = f"{LAYOUTS[layout]}.{moment[0]}"
        fault = Fault(function, draw.randint(1, max(1, most)), draw.randrange(world_size), when=moment[1])
    with start(root, world_size, arguments(config, folder, f"--layout.name={layout}"), fault) as job:
        struck = may_kill and fault is None and kill_at_random(job, draw, LONGEST_S)
        codes = job.wait(grace_s=GRACE_S)
        in_gather = fault is not None and codes[fault.rank] == -signal.SIGKILL
        so_far.kills += struck or in_gather
        so_far.kills_in_gathers += in_gather
        if set(codes) != {0} and not (struck or in_gather):
            raise RuntimeError(f"a job failed by itself:\n{job.output()}")
        survivors = sorted(codes)[1:] if struck or in_gather else []  # the killed one has the only negative status
        so_far.survivors += survivors.count(LostRankError.exit_status)
        others = [code for code in survivors if code not in (0, LostRankError.exit_status)]
        so_far.other_statuses += others
        if others:
            print(job.output(), file=sys.stderr)
    return codes


def len_of_rest(folder: Path, config: Path) -> int:
    """Number of steps that a run still has to take."""
    steps = int(next(line.split()[1] for line in config.read_text().splitlines() if line.startswith("  steps:")))
    return steps - (len(steps_of(folder)) if (folder / "trajectory.jsonl").exists() else 0)


def arguments(config: Path, folder: Path, *more: str) -> list[str]:
    options = ["--output.if_exists=resume", "--output.test=false", "--output.export=false"]
    limits = [f"--output.snapshot_every={SNAPSHOT_EVERY}", f"--distributed.timeout_s={TIMEOUT_S}"]
    return ["train", str(config), f"--output.dir={folder}", *limits, *options, *more]


def finish(root: Path, config: Path, folder: Path) -> tuple[list[bytes], str]:
    """An undisturbed run on one process."""
    with start(root, 1, arguments(config, folder)) as job:
        if job.wait() != [0]:
            raise RuntimeError(job.output())
    return outcome_of(folder)


def outcome_of(folder: Path) -> tuple[list[bytes], str]:
    """All steps, and the fingerprint of the weights."""
    return steps_of(folder), json.loads((folder / "results.json").read_text())["weights"]


def watch_long_run(root: Path, steps: int) -> dict[str, Any]:
    """Memory and open files of two ranks over a long run: the largest growth after the warm-up.

    Some files are open for a moment only (a snapshot, a file of curves). So what counts is the smallest number of open
    files in the first and in the second half: a file that is left open is in all samples after that.
    """
    folder = root / "long"
    config = write_tiny_config(root / "of-long", "llama-tied", "mezo-svrg", steps=steps)
    seen: list[tuple[int, list[tuple[float, int]]]] = []
    with start(root, 2, arguments(config, folder)) as job:
        while any(process.is_alive() for process in job.processes):
            if (folder / "trajectory.jsonl").exists():
                seen.append((len(steps_of(folder)), usage(job)))
            time.sleep(0.1)
        if job.wait() != [0, 0]:
            raise RuntimeError(job.output())
    warm = [usages for done, usages in seen if steps * WARM_UP <= done < steps and len(usages) == 2]
    rss = [max(later[rank][0] for later in warm) - warm[0][rank][0] for rank in range(2)]
    half = len(warm) // 2
    files = [
        min(later[rank][1] for later in warm[half:]) - min(earlier[rank][1] for earlier in warm[:half])
        for rank in range(2)
    ]
    size = (folder / "trajectory.jsonl").stat().st_size
    return {
        "long_steps": steps,
        "samples": len(warm),
        "rss_growth_MiB": round(max(rss), 2),
        "fd_growth": max(files),
        "trajectory_bytes_per_step": round(size / steps, 1),
    }


def usage(job: Job) -> list[tuple[float, int]]:
    """Resident memory (MiB) and number of open files of every rank that is still there."""
    usages = []
    for process in job.processes:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        except OSError:
            continue
        lines = [line for line in status.splitlines() if line.startswith("VmRSS")]
        usages += [(int(lines[0].split()[1]) / 1024, files)] if lines else []
    return usages


if __name__ == "__main__":
    sys.exit(main())
