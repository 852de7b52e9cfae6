"""The part `runs` of the first half hour: whole runs by the command line, and what holds of them away from the GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from mezo_dist.testing import write_tiny_config

CASES = {
    "gaussian": [],
    "rademacher, bf16, stochastic rounding": ["--law=rademacher", "--model.weights=bfloat16"],
    "MeZO-SVRG": ["--algorithm={name: mezo-svrg, lr: 1e-6, anchor_lr: 5e-5}"],
    "in registers": ["--law=rademacher", "--layout.linear=registers"],
    "units compiled": ["--train.compile=units"],
    "CUDA graphs": ["--train.compile=graphs"],
    "low-rank": ["--law=lowrank"],
    "adamw": ["--algorithm={name: adamw, lr: 0.001}"],
}
"""Settings of a run, by name."""
FOR_GPUS = ("in registers", "units compiled", "CUDA graphs")


class Machine(Protocol):
    """See `parts.Machine`."""

    out: Path
    rehearse: bool


def runs(machine: Machine, shapes: list[str]) -> Iterator[dict[str, Any]]:
    """Runs of a tiny model on the GPU: the last loss; whether the trajectory replays there, and on the CPU, to the same
    bits (`mezo-dist replay` compares fingerprints of weights); and the same run sharded by FSDP2 on NCCL."""
    names = [*CASES][:1] if machine.rehearse else [*CASES]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        yield from pool.map(lambda name: of_case(machine, name), names)


def of_case(machine: Machine, name: str) -> dict[str, Any]:
    """A row of `runs`.

    Args:
        machine: where.
        name: of the case.
    """
    settings, folder = CASES[name], machine.out / f"run-{name.replace(' ', '-').replace(',', '')}"
    config = write_tiny_config(folder, "opt", "mezo", batch_size=8)
    row = {"run": name, **said(folder, "train", str(config), *settings)}
    if name == "adamw":  # no trajectory to replay
        return row
    run = str(folder / "run")
    row["replay"] = said(folder, "replay", run)["ends"]
    row["replay on the CPU"] = said(folder, "replay", run, on_cpu=True)["ends"]
    if name not in FOR_GPUS:
        there = [f"--output.dir={folder / 'sharded'}", "--layout.name=fsdp"]
        row["sharded"] = said(folder, "train", str(config), *settings, *there, torchrun=True)["ends"]
        same = [loss(folder / at) for at in ("run", "sharded")]
        row["same losses when sharded"] = same[0] == same[1] is not None
    return row


def said(folder: Path, *arguments: str, on_cpu: bool = False, torchrun: bool = False) -> dict[str, Any]:
    """How `mezo-dist` ended: its last words if badly.

    Args:
        folder: where its output goes.
        arguments: of the command line.
        on_cpu: hide the GPUs.
        torchrun: start one process by torchrun.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"] if torchrun else []
    separator = ["--"] if torchrun else []
    command = [sys.executable, *launcher, "-m", *separator, "mezo_dist", *arguments]
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    with (folder / "log").open("a") as log:
        log.write(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}\n")
    if done.returncode == 0:
        return {"ends": "well"}
    return {"ends": " ".join([line for line in done.stderr.splitlines() if line.strip()][-3:])[:400]}


def loss(run: Path) -> object:
    """What was measured of the model at the end; None if it did not come to that."""
    results = run / "results.json"
    return json.loads(results.read_text())["after"] if results.exists() else None
