"""What runs took: a line of results.jsonl for each, and tables of medians and quartiles over all of them."""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mezo_dist
from mezo_dist.errors import UserError
from mezo_dist.json_types import JsonObject
from mezo_dist.studies.cases import Case, Study
from mezo_dist.studies.prepare import cycle_of, num_steps

COLUMNS = ("model", "dtype", "hosts", "ranks", "layout", "algorithm", "link", "batch", "micro_batch", "width", "tokens",
           "directions", "variants per step", "seconds per step", "q1", "q3", "runs", "efficiency", "peak GiB",
           "scalar bytes", "weight bytes", "commit", "versions", "machine", "date")  # fmt: skip
LEFT_OUT = ("commit", "versions", "machine", "date")
"""Columns of results.csv that results.md says once, below the table."""


@dataclass(frozen=True)
class Measured:
    """Of one run."""

    seconds: list[float]
    """Of a step, as a mean over each cycle of the algorithm."""
    peak_gib: float
    """Of the rank with most."""
    scalar_bytes: float
    """That a rank puts into all-reduces, per step."""
    weight_bytes: float
    """That are gathered to a rank, per step, its own share among them."""
    device: str


def read_run(study: Study, case: Case, folder: Path) -> Measured:
    """What a run has left in its folder.

    Args:
        study: of the case.
        case: what was run.
        folder: of the run.

    Raises:
        UserError: something is missing there.
    """
    warmup, steps = num_steps(study, case)
    try:
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(case.all_ranks)]
    except (OSError, ValueError) as error:
        raise UserError(f"{case.name}: the run left no figures ({error})") from error
    scalars = [line["scalars"] for line in lines if "time/evaluate_s" in line["scalars"]][warmup : warmup + steps]
    if len(scalars) < steps:
        raise UserError(f"{case.name}: the log has {len(scalars)} of {steps} measured steps")
    times = [one["time/evaluate_s"] + one["time/update_s"] for one in scalars]
    cycle = cycle_of(case)
    on_device = ranks[0]["peak_device_gib"] is not None
    return Measured(
        [statistics.fmean(times[first : first + cycle]) for first in range(0, steps, cycle)],
        max(rank["peak_device_gib" if on_device else "peak_rss_gib"] for rank in ranks),
        statistics.fmean(one["communicator/payload_bytes_per_step"] for one in scalars),
        statistics.fmean(one.get("gathers/bytes_per_step") or 0.0 for one in scalars),
        ranks[0]["device"],
    )


def line_of(case: Case, repeat: int, measured: Measured) -> JsonObject:
    """The line of results.jsonl of one run."""
    return {"key": case.key, "repeat": repeat, "case": dataclasses.asdict(case), **dataclasses.asdict(measured),
            **about(measured.device)}  # fmt: skip


def about(device: str) -> JsonObject:
    """Where and when figures come from: ``commit``, ``versions``, ``machine``, ``date``, and ``load`` of the machine.

    Args:
        device: what computed them.
    """
    root = Path(mezo_dist.__file__).resolve().parents[1]
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {
        "commit": commit or mezo_dist.__version__,
        "versions": "mezo_dist {}, {}".format(
            mezo_dist.__version__, ", ".join(f"{n} {v}" for n, v in versions.items())
        ),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device}",
        "date": time.strftime("%Y-%m-%d"),
        "load": round(os.getloadavg()[0], 2),
    }


def check_writable(path: Path) -> None:
    """Raise UserError if no line can be added to a file, before hours of runs are made for it."""
    _add(path, b"")


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line in one write, so that parts of an array of jobs may write to the same file."""
    _add(path, (json.dumps(line) + "\n").encode())


def _add(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, content)
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error})") from error


def read_lines(path: Path) -> list[JsonObject]:
    """All whole lines of results.jsonl; a torn last one (the machine stopped) is as if it was not there."""
    if not path.exists():
        return []
    lines = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    for number, content in enumerate(text.splitlines(), start=1):
        try:
            line = json.loads(content)
            lines.append({**line, "case": Case(**line["case"])})
        except (ValueError, TypeError, KeyError) as error:
            if number == text.count("\n") + 1:
                continue
            raise UserError(f"{path}: line {number} is damaged; remove it, and its run is done again") from error
    return lines


def rows_of(study: Study, lines: Sequence[JsonObject]) -> list[dict[str, Any]]:
    """A row for each case that was run, in the order of the study, by the names of `COLUMNS`; ``line`` holds what names
    its line in a plot in place of a column's value."""
    by_case = {case: [line for line in lines if line["case"] == case] for case in study.cases}
    speeds = {case: case.samples / statistics.median(_seconds(some)) for case, some in by_case.items() if some}
    return [_row(case, by_case[case], speeds) for case in study.cases if by_case[case]]


def _seconds(lines: Sequence[JsonObject]) -> list[float]:
    return [seconds for line in lines for seconds in line["seconds"]]


def _row(case: Case, lines: Sequence[JsonObject], speeds: Mapping[Case, float]) -> dict[str, Any]:
    seconds = _seconds(lines)
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    layout = f"fsdp {case.replicate} x {case.all_ranks // case.replicate}" if case.layout == "fsdp" else case.layout
    alone = next((speed for other, speed in speeds.items() if _is_one_rank_of(case, other)), None)
    newest = lines[-1]
    return {
        "model": case.model + ("" if case.layers is None else f"/{case.layers}"),
        "dtype": case.dtype,
        "hosts": case.hosts,
        "ranks": case.all_ranks,
        "layout": layout,
        "algorithm": case.algorithm,
        "link": case.link or "-",
        "batch": case.samples,
        "micro_batch": case.micro_batch,
        "width": case.width or "auto",
        "tokens": case.tokens,
        "directions": case.directions,
        "variants per step": _variants(case),
        "seconds per step": middle,
        "q1": low,
        "q3": high,
        "runs": len(lines),
        "efficiency": None if alone is None else speeds[case] / (alone * case.all_ranks),
        "peak GiB": max(line["peak_gib"] for line in lines),
        "scalar bytes": statistics.median(line["scalar_bytes"] for line in lines),
        "weight bytes": statistics.median(line["weight_bytes"] for line in lines),
        **{name: newest[name] for name in LEFT_OUT},
        "line": {"batch": f"{case.batch_per_rank} per rank"} if case.batch_per_rank else {},
    }


def _is_one_rank_of(case: Case, other: Case) -> bool:
    """``other`` is the same on one rank, with whole weights; of a batch that grows with the ranks the share of one."""
    alone = replace(case, hosts=1, ranks=1, link=None, layout="replicated", replicate=1, width=None)
    return replace(other, width=None) == alone


def _variants(case: Case) -> float:
    """Forward passes of each micro-batch in a step, as a mean over a cycle."""
    from mezo_dist.algorithms.mezo import MeZO
    from mezo_dist.algorithms.svrg import MeZOSVRG
    from mezo_dist.planning.rounds import rounds_of
    from mezo_dist.planning.setting import Setting

    if not case.algorithm.startswith("mezo"):
        return 1.0
    kind = MeZOSVRG if case.algorithm == "mezo-svrg" else MeZO
    setting = Setting(algorithm=kind(directions=case.directions), batch_size=case.samples, full_size=case.full_samples,
                      weights=case.dtype)  # type: ignore[arg-type]  # fmt: skip
    rounds = rounds_of(setting, 1)
    return sum(sum(b.variants for b in r.bases) * r.steps for r in rounds) / sum(r.steps for r in rounds)


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """results.csv."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def markdown(study: Study, rows: Sequence[Mapping[str, Any]], command: str) -> str:
    """results.md: the table, and what it was measured with."""
    names = [name for name in COLUMNS if name not in LEFT_OUT and _varies_or_counts(name, rows)]
    lines = [f"# {study.name}", "", f"    {command}", "", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(row[name]) for name in names) + " |" for row in rows]
    lines.append("")
    for name in LEFT_OUT:
        lines.append(f"* {name}: {'; '.join(sorted({str(row[name]) for row in rows}))}")
    cores = os.cpu_count() or 1
    if any(row["ranks"] > cores for row in rows):
        lines.append(
            f"* Some cases have more ranks than this machine has cores ({cores}): their seconds tell what ranks cost "
            "that share a core, and not how a run scales."
        )
    elif any(row["hosts"] > 1 for row in rows):
        lines.append("* Hosts are virtual: network namespaces of one machine, whose cores and memory they share.")
    return "\n".join(lines) + "\n"


def _varies_or_counts(name: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Settings that are the same everywhere and as ever are left out."""
    usual = {"link": "-", "directions": 1, "hosts": 1, "dtype": "float32", "width": "auto"}
    return name not in usual or any(row[name] != usual[name] for row in rows)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)
