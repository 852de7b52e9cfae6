"""A checkpoint of several files on disk, 13.4 GB in bf16 for OPT-6.7B's shape, through a run on two processes.

    python examples/benchmarks/from_disk.py FOLDER [--shape opt-6.7b] [--layout fsdp] [--ranks 2]

Random weights are written into FOLDER as a checkpoint (an export of mezo_dist's), whose bytes are read once, plainly.
Then a run of MeZO is trained on a few movie sentences from that checkpoint; it is stopped, which saves a snapshot, and
resumed from there; at its end it exports its model. FOLDER must have room for three times the checkpoint. Reported for
every phase: seconds, and the peak of resident memory of each rank (Linux: VmHWM). `load` is the time that a rank takes
to build the model and read its share of the checkpoint, which was dropped from the system's cache before.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from shapes import SHAPES, without_data

from mezo_dist.assets import registry
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.distributed.connect import connect
from mezo_dist.engines.malloc import ask_for_huge_pages, tune_malloc
from mezo_dist.errors import Stopped
from mezo_dist.runs import model as model_module
from mezo_dist.runs import training
from mezo_dist.runs.export import export_model

STOP, MORE = 2, 2
"""Steps after which the run is stopped, and steps that are left to do then (more where they take no time)."""
FAST = {"shape": "tiny"}
BLOCK = 1 << 24
FILE_BYTES = 2 << 30
"""Of each file of the checkpoint, at most."""


def settings(folder: Path, shape: str, layout: str) -> dict[str, Any]:
    """The run's config."""
    steps = 60 if shape == "tiny" else STOP + MORE
    return {
        "model": {"name": str(folder / "checkpoint"), "weights": "bfloat16"},
        "task": {
            "name": "movie sentences",
            "data": "demo:movie-sentences",
            "splits": {name: {"source": "all", "size": 8} for name in ("train", "validation", "test")},
            "prompt": "{{ text }} It was {{ answer }}",
            "labels": [{"value": 0, "word": "terrible"}, {"value": 1, "word": "great"}],
        },
        "algorithm": {"name": "mezo", "lr": 1e-7},
        "layout": {"name": layout},
        "train": {"steps": steps, "batch_size": 4, "micro_batch": 2},
        "output": {
            "dir": str(folder / "run"),
            "if_exists": "resume",
            "snapshot_every": 1_000_000,
            "snapshots_kept": 1,
            "test": False,
            "looks": 0,
            "answers": 0,
        },
        "distributed": {"timeout_s": 3_600, "patience_s": 600},
    }


def write_checkpoint(shape: str, folder: Path, comm: Communicator) -> None:
    """Random weights as a checkpoint. Every rank holds its shards, and rank 0 writes."""
    from transformers import AutoTokenizer

    from mezo_dist.directions.law import Law
    from mezo_dist.engines.engine import Engine
    from mezo_dist.engines.layouts.fsdp import Fsdp
    from mezo_dist.models.sliced_checkpoint import fill

    model, source = without_data(shape, torch.bfloat16)
    engine = Engine(model, Law("gaussian"), Fsdp(model, comm), stochastic_rounding=True)
    fill(source, engine.shards())
    tokenizer = AutoTokenizer.from_pretrained(registry.resolve_model("demo:smollm2-135m"))
    export_model(engine, tokenizer, folder / "checkpoint", comm, file_bytes=FILE_BYTES)


def stop_after_steps(folder: Path) -> None:
    """End this process's run, as a batch system would, once its first steps are logged."""
    log = folder / "run" / "trajectory.jsonl"
    while not log.exists() or log.read_bytes().count(b'{"step":') < STOP:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


def run_rank(phase: str, shape: str, layout: str, folder: Path) -> None:
    """One rank of one phase; rank 0 prints what all of them found."""
    torch.set_num_threads(1)
    comm = connect(timeout_s=3_600.0)
    loads: list[float] = []
    load = model_module.load_base

    def load_timed(*given: Any) -> Any:
        began = time.perf_counter()
        loaded = load(*given)
        loads.append(time.perf_counter() - began)
        return loaded

    began = time.perf_counter()
    if phase == "write":
        write_checkpoint(shape, folder, comm)
    else:
        from mezo_dist.config import reader
        from mezo_dist.runs import build

        setattr(build, "load_base", load_timed)  # noqa: B010 (timed, and nothing else)
        if phase == "train" and comm.rank == 0:
            threading.Thread(target=stop_after_steps, args=(folder,), daemon=True).start()
        try:
            training.train(reader.from_dict(settings(folder, shape, layout), "the config"), comm, quiet=True)
        except Stopped:
            assert phase == "train"
    figures = {"seconds": time.perf_counter() - began, **({"load_s": loads[0]} if loads else {})}
    peaks = comm.collect(peak_gib)
    if comm.rank == 0:
        print(json.dumps({**figures, **{f"rank_{rank}_peak_gib": peak for rank, peak in enumerate(peaks)}}), flush=True)
    comm.close()


def peak_gib() -> float:
    """Largest resident memory of this process so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def read_plainly(folder: Path) -> float:
    """Bytes of the files in a folder, read one after another."""
    size = 0
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while block := file.read(BLOCK):
                size += len(block)
    return size


def forget(folder: Path) -> None:
    """Drop the files of a folder from the system's cache."""
    os.sync()
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def timed(work: Callable[[], float]) -> tuple[float, float]:
    """What ``work`` returned, and the seconds it took."""
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def main() -> None:
    """Run the phases one after another; with --json one last line for machines."""
    parser = harness.parser(__doc__)
    parser.add_argument("folder", type=Path, help="is made, and must not exist")
    parser.add_argument("--shape", choices=SHAPES, default="opt-6.7b")
    parser.add_argument("--layout", choices=["fsdp", "zero"], default="fsdp")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    arguments = harness.parse(parser, FAST)
    folder = arguments.folder.resolve()
    logging.getLogger("mezo_dist").setLevel(logging.WARNING)
    ask_for_huge_pages()  # as the command line does
    tune_malloc(is_sharded=True)
    if arguments.phase:
        run_rank(arguments.phase, arguments.shape, arguments.layout, folder)
        return
    folder.mkdir(parents=True)
    figures: dict[str, dict[str, float]] = {}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.ranks)]
    same = ["--shape", arguments.shape, "--layout", arguments.layout]
    facts = harness.begin()
    for phase in ("write", "read", "train", "resume"):
        if phase == "read":
            forget(folder / "checkpoint")
            size, seconds = timed(lambda: read_plainly(folder / "checkpoint"))
            figures[phase] = {"seconds": seconds, "gb": size / 1e9}
        else:
            forget(folder / "checkpoint") if phase != "write" else None
            command = [*torchrun, __file__, str(folder), "--phase", phase, *same]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            figures[phase] = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
        print(phase, "  ".join(f"{name} {value:.2f}" for name, value in figures[phase].items()), flush=True)
    exported = sum(path.stat().st_size for path in (folder / "run" / "model").iterdir())
    figures["export"] = {"gb": exported / 1e9, "files": len(list((folder / "run" / "model").glob("*.safetensors")))}
    print(f"exported {exported / 1e9:.2f} GB")
    harness.end(arguments, facts, figures)


if __name__ == "__main__":
    main()
