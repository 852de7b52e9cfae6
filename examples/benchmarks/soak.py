"""Hours of a training job in minutes: hundreds of steps, ranks killed at random moments, restarts on other world sizes.

    python examples/benchmarks/soak.py --kills 40 --json soak.json

Every run that gets to its end must have the bits of the undisturbed one. A last, long run is watched from outside: its
memory and its open files must not grow. The model is tiny, so what is tried is everything but the arithmetic. Ends with
the findings as JSON, and with status 1 if something was not as it must be.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mezo_dist.testing import write_tiny_config
from tests.faults.jobs import Job, kill_at_random, start, steps_of

STEPS, LONG_STEPS, SNAPSHOT_EVERY = 300, 1500, 25
LONGEST_S = 4.0
"""Within which a rank is killed: about as long as a run takes."""
GRACE_S = 5.0
"""Within which the other ranks must have noticed, or are killed as well, as launchers do."""
WARM_UP = 0.3
"""Part of the long run after which memory and open files must stay as they are."""


def main(given: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--long-steps", type=int, default=LONG_STEPS, help="of the run whose memory is watched")
    parser.add_argument("--json", type=Path, help="file for the findings")
    options = parser.parse_args(given)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mezo-soak-") as folder:
        found = soak(Path(folder), options.kills, options.steps, random.Random(options.seed))
        found |= watch_long_run(Path(folder), options.long_steps)
    found |= {"seed": options.seed, "seconds": round(time.monotonic() - began, 1)}
    text = json.dumps(found)
    if options.json is not None:
        options.json.write_text(text + "\n")
    print(text)
    flat = found["rss_growth_MiB"] < 8 and found["fd_growth"] <= 0
    return 0 if found["bit_equal"] and found["kills"] >= options.kills and flat else 1


def soak(root: Path, kills: int, steps: int, draw: random.Random) -> dict[str, Any]:
    """Kill and restart jobs until there were so many kills; compare every run that got to its end."""
    config = write_tiny_config(root, "llama-tied", "mezo-svrg", steps=steps)
    reference = finish(root, config, root / "undisturbed")
    count, runs, equal, events = 0, 0, True, Counter[str]()
    folder = root / "run-0"
    while count < kills or runs == 0:
        with start(root, draw.choice([1, 2, 3]), arguments(config, folder)) as job:
            struck = count < kills and kill_at_random(job, draw, LONGEST_S)
            codes = job.wait(grace_s=GRACE_S)
        count += struck
        if set(codes) == {0}:
            equal = equal and outcome(folder) == reference
            events.update(json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines())
            runs, folder = runs + 1, root / f"run-{runs + 1}"
        elif not struck:
            raise RuntimeError(f"a job failed by itself:\n{job.output()}")
        done = len(steps_of(folder)) if (folder / "trajectory.jsonl").exists() else 0
        print(f"kill {count}/{kills}, run {runs}, step {done}/{steps}, ranks ended with {codes}", file=sys.stderr)
    return {"kills": count, "runs": runs, "steps": steps, "restarts": events["resumed"], "bit_equal": equal}


def arguments(config: Path, folder: Path, *more: str) -> list[str]:
    options = ["--output.if_exists=resume", "--output.test=false", "--output.export=false"]
    snapshots = f"--output.snapshot_every={SNAPSHOT_EVERY}"
    return ["train", str(config), f"--output.dir={folder}", snapshots, *options, *more]


def finish(root: Path, config: Path, folder: Path) -> tuple[list[bytes], str]:
    """An undisturbed run on one process."""
    with start(root, 1, arguments(config, folder)) as job:
        if job.wait() != [0]:
            raise RuntimeError(job.output())
    return outcome(folder)


def outcome(folder: Path) -> tuple[list[bytes], str]:
    """All steps, and the fingerprint of the weights."""
    return steps_of(folder), json.loads((folder / "results.json").read_text())["weights"]


def watch_long_run(root: Path, steps: int) -> dict[str, Any]:
    """Memory and open files of two ranks over a long run: the largest growth after the warm-up."""
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
    files = [max(later[rank][1] for later in warm) - warm[0][rank][1] for rank in range(2)]
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
    found = []
    for process in job.processes:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        except OSError:
            continue
        lines = [line for line in status.splitlines() if line.startswith("VmRSS")]
        found += [(int(lines[0].split()[1]) / 1024, files)] if lines else []
    return found


if __name__ == "__main__":
    sys.exit(main())
