"""The doctor's verdicts; tests/cluster/test_doctor.py has it on several hosts."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from pathlib import Path
from unittest import mock

import pytest

from mezo_dist.distributed import doctor
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.distributed.doctor import Facts, Line, compare, examine, report, unreachable
from mezo_dist.errors import UserError
from mezo_dist.testing import spawn

FACTS = Facts(
    host="a",
    python="3.11.7",
    versions={"mezo_dist": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    code="c" * 64,
    files={"config.yaml": "f" * 64},
    interface="eth0",
    gpus=0,
)
OTHER = dataclasses.replace(FACTS, host="b")


def verdicts(*facts: Facts) -> dict[str, str]:
    """Check -> verdict, of those that are not ok."""
    return {line.check: line.verdict for line in compare(facts) if line.verdict != doctor.OK}


def test_equal_ranks_are_fine() -> None:
    assert verdicts(FACTS, OTHER) == {}
    assert verdicts(FACTS) == {}


@pytest.mark.parametrize(
    ("change", "check", "verdict"),
    [
        ({"python": "3.10.1"}, "python", doctor.WARNING),
        ({"versions": {**FACTS.versions, "torch": "2.12.0"}}, "torch", doctor.PROBLEM),
        ({"code": "d" * 64}, "code of mezo_dist", doctor.PROBLEM),
        ({"files": {"config.yaml": "e" * 64}}, "config.yaml", doctor.PROBLEM),
        ({"files": {"config.yaml": ""}}, "config.yaml", doctor.PROBLEM),
        ({"interface": "lo"}, "network card", doctor.PROBLEM),
    ],
)
def test_what_differs_is_found_and_where(change: dict[str, object], check: str, verdict: str) -> None:
    changed = dataclasses.replace(OTHER, **change)  # type: ignore[arg-type]
    assert verdicts(FACTS, OTHER, changed) == {check: verdict}
    (line,) = [line for line in compare([FACTS, OTHER, changed]) if line.check == check]
    assert "rank 2 (b)" in line.finding
    assert line.hint


def test_loopback_is_fine_on_one_host() -> None:
    assert verdicts(*[dataclasses.replace(FACTS, interface="lo")] * 2) == {}


def test_problems_are_an_error_that_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    report([Line("a", "fine"), Line("b", "hm", "warning", "do this")])
    assert capsys.readouterr().out.splitlines()[-1].strip() == "do this"
    with pytest.raises(UserError, match=r"1 problem\(s\): c"):
        report([Line("a", "fine"), Line("c", "broken", "PROBLEM")])


def test_who_listens_is_reached_and_who_does_not_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert unreachable("127.0.0.1", port, 1) is None
    why = unreachable("127.0.0.1", port, 0.1)
    assert why is not None
    assert "nobody listens" in why[0]


def test_an_environment_that_makes_no_sense_is_the_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (line,) = examine([], Path(), 1)
    assert line.verdict == doctor.PROBLEM
    assert "WORLD_SIZE" in line.hint


def on_a_rank(comm: Communicator, shared: str, private: str) -> tuple[list[Line], float, list[str]]:
    """The folder check on a shared folder and on one per rank, and the clock of a rank that is 90 s ahead."""
    facts = [FACTS, OTHER]
    lines = doctor._shared_folder(comm, Path(shared), facts)
    doctor.SEEN_WITHIN_S = 0.2
    with mock.patch.object(Path, "exists", return_value=False) if comm.rank else contextlib.nullcontext():
        lines += doctor._shared_folder(comm, Path(private), facts)
    ahead = doctor.offset_and_trip(comm, 1, lambda: time.time() + 90 * comm.rank)[0]
    return lines, ahead, [str(line) for line in doctor._links(comm, facts, lambda: time.time() + 90 * comm.rank)]


@pytest.mark.distributed
def test_folders_and_clocks(tmp_path: Path) -> None:
    lines, ahead, links = spawn(on_a_rank, 2, str(tmp_path), str(tmp_path))[0]
    assert [line.verdict for line in lines] == [doctor.OK, doctor.WARNING]
    assert "another folder on rank 1 (b)" in lines[1].finding
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    assert 80 < ahead < 100
    assert links[1].startswith("warning  clocks")
