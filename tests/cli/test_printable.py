"""What comes from a file reaches the terminal without its control characters."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mezo_dist import cli, commands
from mezo_dist.errors import Stopped, UserError, printable
from mezo_dist.testing import write_tiny_config

NAME = "a\x1b[2J\x1b]0;title\x07\x9b31m\r\nmezo-dist: all is well"
SEEN = r"a\x1b[2J\x1b]0;title\x07\x9b31m\r\nmezo-dist: all is well"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ü, 日本, \N{GRINNING FACE}, \\x1b", "plain, ü, 日本, \N{GRINNING FACE}, \\x1b"),
        (NAME, SEEN),
        ("\x00\x7f\x85\u2028\u202e\ud800", r"\x00\x7f\x85\u2028\u202e\ud800"),
        ("", ""),
    ],
)
def test_what_is_not_visible_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()


def test_some_characters_can_be_kept() -> None:
    assert printable("a\tb\nc\x1b", keep="\n") == "a\\tb\nc\\x1b"


@pytest.mark.parametrize(("error", "status"), [(UserError(f"task.name: {NAME}"), 2), (Stopped(NAME, 75), 75)])
def test_errors_of_the_command_line(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(commands, "report", fail)
    assert cli.main(["report", "run"]) == status
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("mezo-dist: ")
    assert first.endswith(r"a\x1b[2J\x1b]0;title\x07\x9b31m\r")
    assert second == "  mezo-dist: all is well"  # indented: it cannot pass for a message of its own


def test_a_model_with_a_hostile_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """From the start of a run to its replay and its report."""
    path = write_tiny_config(tmp_path / "run")
    config = yaml.safe_load(path.read_text())
    model = Path(config["model"]["name"])
    config["model"]["name"] = str(model.rename(model.with_name(NAME)))
    path.write_text(yaml.safe_dump(config))
    run = config["output"]["dir"]
    for command in (["train", str(path), "--train.steps=1"], ["replay", run], ["report", run]):
        assert cli.main(command) == 0
        output = "".join(capfd.readouterr())
        assert not [c for c in output if not c.isprintable() and c not in "\n\r"]  # progress bars of transformers
        assert "\nmezo-dist: all is well" not in output
        assert SEEN in output or command[0] == "report"
    assert SEEN in (Path(run) / "report.html").read_text()


def test_a_stop_is_nobodys_fault() -> None:
    """It is raised wherever SIGTERM comes, such as in a library that explains whatever exceptions it gets."""
    assert not issubclass(Stopped, Exception)
