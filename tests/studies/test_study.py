"""``mezo-dist study``: files, runs in turns, tables."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
from pathlib import Path

import pytest

from mezo_dist.cli import main
from mezo_dist.config import reader
from mezo_dist.errors import UserError
from mezo_dist.studies import launch, rank, results
from mezo_dist.studies.cases import Case, Study, read_study
from mezo_dist.studies.prepare import num_steps, prepare
from mezo_dist.studies.results import Measured
from tests import forked_ranks
from tests.forked import ROOT

FOLDER = ROOT / "examples" / "scaling_study"
SHIPPED = sorted(path.name for path in FOLDER.glob("*.yaml"))


def written(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def in_this_process(line: list[str], folder: Path, case: Case, timeout_s: int) -> None:
    assert rank.main(folder) == 0


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_studies(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of every case are those of a run, and the first case runs, on a model of no size."""
    study = read_study(FOLDER / name)
    assert len(study.cases) > 1
    assert study.x in results.COLUMNS
    for case in {dataclasses.replace(one, model="tiny.json", layers=None): one for one in study.cases}:
        config = reader.load(str(prepare(study, case, tmp_path / case.key)))
        assert (config.train.batch_size, config.layout.name) == (case.samples, case.layout)
    monkeypatch.setattr(launch, "_call", in_this_process)
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    study = dataclasses.replace(study, steps=2, warmup=0)
    measured = launch.run_case(study, dataclasses.replace(study.cases[0], model="tiny.json", layers=None), "torchrun")
    assert len(measured.seconds) == 2
    assert min(measured.seconds) > 0
    assert measured.peak_gib > 0


@pytest.mark.distributed
def test_a_study_is_run_gone_on_with_and_summed_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["study", str(FOLDER / "tiny.yaml"), f"--to={tmp_path}"]
    with forked_ranks.python() as python:
        monkeypatch.setenv("PYTHON_EXEC", python)
        assert main([*given, "--only=1"]) == 0
    (line,) = (json.loads(text) for text in (tmp_path / "results.jsonl").read_text().splitlines())
    assert line["case"]["ranks"] == 2
    assert line["scalar_bytes"] == 256
    (row,) = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    assert row["ranks"] == "2"
    assert row["efficiency"] == "", "one rank was not measured"
    assert (tmp_path / "results.png").stat().st_size > 1000
    assert main([*given, "--list"]) == 0
    states = [text.split()[1] for text in capsys.readouterr().out.splitlines()[-2:]]
    assert states == ["to", "done"]


def test_a_case_that_fails_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[int] = []

    def run_case(study: Study, case: Case, launcher: str) -> Measured:
        tried.append(case.ranks)
        if case.ranks == 2:
            raise launch.RunFailedError("out of luck")
        return Measured([1.0, 3.0], 1.5, 256.0, 0.0, "CPU")

    monkeypatch.setattr("mezo_dist.studies.command.run_case", run_case)
    path = written(tmp_path, "base: {batch: 8}\nmatrix: {ranks: [1, 2, 4]}\nrepeats: 2\n")
    given = ["study", str(path), f"--to={tmp_path / 'to'}"]
    assert main(given) == 2
    assert tried == [1, 2, 4, 1, 4], "in turns; what failed is not tried again at once"
    assert "ranks 2: out of luck" in capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / "to" / "results.csv").read_text().splitlines()))
    assert [row["runs"] for row in rows] == ["2", "2"]
    assert [row["efficiency"] for row in rows] == ["1.0", "0.25"]
    assert [float(rows[0][name]) for name in ("q1", "seconds per step", "q3")] == [1.0, 2.0, 3.0]
    tried.clear()
    assert main([*given, "--limit=1"]) == 2
    assert tried == [2]


def test_lines_that_are_torn_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    line = results.line_of(Case(), 0, Measured([1.0], 1.0, 0.0, 0.0, "CPU"))
    results.append(path, line)
    with path.open("a") as file:
        file.write('{"key"')
    assert [one["key"] for one in results.read_lines(path)] == [Case().key]
    path.write_text('{"key"\n' + json.dumps(line) + "\n")
    with pytest.raises(UserError, match="line 1 is damaged"):
        results.read_lines(path)


def test_cycles_are_whole() -> None:
    study = read_study(FOLDER / "tiny.yaml")
    assert num_steps(study, Case()) == (2, 4)
    odd = dataclasses.replace(study, warmup=1, steps=3)
    assert num_steps(odd, Case(algorithm="mezo-svrg")) == (2, 4)


def test_launchers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    study = read_study(FOLDER / "strong.yaml")
    lines = [launch.command_line(case, "torchrun", tmp_path) for case in study.cases]
    assert lines[1][2:6] == ["torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    assert "virtual_cluster" in lines[-1][1]
    assert lines[-1][2:9] == ["run", "--hosts", "2", "--rate", "1mbit", "--each", "--"]
    assert launch.command_line(study.cases[1], "srun", tmp_path)[:3] == ["srun", "--kill-on-bad-exit=1", "--nodes=1"]
    with pytest.raises(UserError, match="link"):
        launch.command_line(study.cases[-1], "srun", tmp_path)
    assert main(["study", str(FOLDER / "weak.yaml"), "--slurm"]) == 0
    script = capsys.readouterr().out
    assert "--array=0-29%1\n" in script
    assert "--ntasks-per-node=4\n" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("base: {rank: 1}", "'rank' is no setting"),
        ("base: {ranks: two}", "right type"),
        ("base: {ranks: 0}", "at least 1"),
        ("base: {model: opt-13}", "no named shape"),
        ("base: {layout: ddp}", "layout: one of"),
        ("base: {link: 1mbit}", "link: is between hosts"),
        ("base: {hosts: 2, link: fast}", "link: a whole number"),
        ("base: {replicate: 2}", "replicate"),
        ("base: {micro_batch: 9}", "micro_batch"),
        ("base: {full: 2}", "full"),
        ("base: {tokens: 2}", "tokens"),
        ("matrix: {ranks: 2}", "list of values"),
        ("cases: [1]", "settings by name"),
        ("repeats: 0", "repeats"),
        ("name: a/b", "name"),
        ("nonsense: 1", "'nonsense' is no setting"),
    ],
)
def test_errors_name_the_setting(text: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=word):
        read_study(written(tmp_path, text + "\n"))


def test_a_target_that_cannot_be_written_is_noticed_before_the_runs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        results.check_writable(tmp_path / "file" / "results.jsonl")
