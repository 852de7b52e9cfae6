"""The command line: its help, its messages and what it does not import."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mezo_dist import __main__, cli, commands
from mezo_dist.algorithms import ALGORITHMS
from mezo_dist.config.help import help_text
from mezo_dist.config.kinds import KINDS
from mezo_dist.config.kinds.classification import Label
from mezo_dist.config.schema import RunConfig
from mezo_dist.planning import command
from mezo_dist.runs import starter
from tests.config.configs import Write

# Help


def settings(section: Any, algorithm: str, task: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every setting that is not a section: its dotted name, its class and its field name."""
    for name, kind in typing.get_type_hints(section).items():
        kind = {"algorithm": ALGORITHMS[algorithm][0], "task": task}.get(f"{prefix}{name}", kind)
        if dataclasses.is_dataclass(kind):
            yield from settings(kind, algorithm, task, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", section, name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_help_explains_every_setting(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # one line per setting
    text = help_text(algorithm)
    explained = dict(re.findall(r"^  --([\w.]+).*?(?:\n {20,}| {2,})(\S.*)$", text, re.MULTILINE))
    names = [name for task in KINDS.values() for name, _, _ in settings(RunConfig, algorithm, task)]
    assert set(explained) == {*names, "task"}
    for kind in KINDS:
        assert f"task, kind: {kind}:" in text
    for name in names:
        words = explained[name].rpartition(" (")[0]
        assert len(words.split()) >= 2, f"--{name} is not explained: {explained[name]!r}"


def test_help_explains_the_parts_of_a_label() -> None:
    for field in dataclasses.fields(Label):
        assert f"{field.name}: " in re.search(r"--task\.labels[^\0]*?--task", help_text())[0]  # type: ignore[index]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_help_has_words_for_types(algorithm: str) -> None:
    assert not re.search(
        r"Literal|Union|Optional|NoneType|typing|<class|\btuple\b|\bint\b|\bbool\b", help_text(algorithm)
    )


@pytest.mark.parametrize(
    ("section", "shown", "hidden"),
    [
        ("layout", "--layout.offload", "--train.steps"),
        ("algorithm.momentum", "--algorithm.momentum.decay", "--algorithm.lr"),
        ("task", "task, kind: generation:", "--seed"),
        ("task.temperature", "--task.temperature", "--task.top_k"),
        ("train.steps", "--train.steps", "--train.batch_size"),
        ("general", "--seed", "--layout.name"),
    ],
)
def test_help_of_a_section(section: str, shown: str, hidden: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help", section]) == 0
    text = capsys.readouterr().out
    assert shown in text
    assert hidden not in text
    assert text.count("Where the weights live") == (section == "layout")


def test_help_of_a_section_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help", "layuot"]) == 2
    error = capsys.readouterr().err
    assert "there is no section or setting 'layuot'; did you mean 'layout'; sections are general, model, " in error
    assert cli.main(["train", "--help=adamw"]) == 2
    assert "give --algorithm.name=adamw --help algorithm" in capsys.readouterr().err


def test_help_is_about_the_algorithm_of_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("algorithm: {name: adamw}")
    assert cli.main(["train", str(tmp_path / "mine.yaml"), "--help", "algorithm"]) == 0
    assert "--algorithm.beta2" in capsys.readouterr().out


def test_help_is_free_of_markup_and_of_what_cannot_be_used() -> None:
    text = help_text()
    assert "``" not in text
    assert "--config" not in text
    assert "Path to a configuration file" not in text


# The command line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "mezo-dist: error: name a config file first, as in `mezo-dist train "),
        (["--seed", "1"], "mezo-dist: error: name a config file first"),
        (["nowhere.yaml"], "mezo-dist: error: config file nowhere.yaml does not exist"),
        (["CONFIG", "--train.step=1"], "mezo-dist: error: command line: unknown setting 'train.step'; did you mean "),
        (["CONFIG", "--seed", "x"], "mezo-dist: error: command line: seed: must be a whole number, not x"),
        (["--help", "algorithm.name=x"], "mezo-dist: error: command line: algorithm.name: 'x' does not exist"),
    ],
)
def test_the_command_line_shows_one_message_and_no_traceback(
    write_config: Write, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    status = cli.main(["train", *(str(write_config()) if item == "CONFIG" else item for item in arguments)])
    output = capsys.readouterr()
    assert status == 2
    assert output.out == ""
    assert output.err.startswith(expected)
    assert "Traceback" not in output.err
    assert output.err.count("error:") == 1


def test_settings_behind_another_command_are_refused_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, has_hint in ((["plan", "run.yaml", "--algorithm.name=mezo-svrg"], True), (["plan", "--foo"], False)):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        message = capsys.readouterr().err
        assert f"unknown arguments: {arguments[-1]}" in message
        assert ("settings go with train, or into the config" in message) is has_hint


def test_the_rank_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert cli.main(["train", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err.startswith("mezo-dist (rank 3): error: config file nowhere.yaml")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["some.yaml", "--help"]])
def test_help_of_train(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(["train", *arguments]) == 0
    assert "--algorithm.anchor_lr" in capsys.readouterr().out


def test_help_of_train_for_an_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help", "--algorithm.name=mezo"]) == 0
    output = capsys.readouterr().out
    assert "--algorithm.directions" in output
    assert "--algorithm.anchor_lr" not in output


@pytest.mark.parametrize("arguments", [["--help"], [], ["evaluate"], ["evaluate", "x", "--foo"], ["frobnicate"]])
def test_other_commands_are_ordinary_argparse(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == (0 if "--help" in arguments else 2)
    assert "usage: mezo-dist" in "".join(capsys.readouterr())


def test_reading_a_config_needs_no_heavy_library() -> None:
    code = (
        "import sys; from mezo_dist.config.help import help_text; from mezo_dist.config.reader import load;"
        "help_text();"
        "load('configs/quickstart.yaml', ['seed=3']);"
        "sys.exit(' '.join({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)) or 0)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["train", "--help"], ["plan", "--help"], ["tasks"], ["--help"]])
def test_output_that_nobody_reads_is_no_error(arguments: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mezo_dist", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()  # before a line is written, as `head -0` would
    _, errors = process.communicate(timeout=60)
    assert errors == ""
    assert process.returncode in (0, 141)  # argparse ignores that nobody reads its help


def test_another_pipe_that_breaks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise BrokenPipeError

    monkeypatch.setattr(__main__, "main", broken)
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
    with pytest.raises(BrokenPipeError):
        __main__.run()


@pytest.mark.parametrize(
    ("arguments", "hints"), [(["init", "data", "--model=m"], False), (["plan", "opt-125m"], False), (["train"], True)]
)
def test_ctrl_c(
    arguments: list[str],
    hints: bool,
    write_config: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for module, name in ((starter, "write_starter"), (command, "run"), (commands, "_with_communicator")):
        monkeypatch.setattr(module, name, interrupted)
    assert cli.main(arguments if arguments != ["train"] else ["train", str(write_config())]) == 130
    assert ("if_exists=resume" in capsys.readouterr().err) == hints


def test_a_connected_rank_that_fails_ends_at_once(tmp_path: Path) -> None:
    """Taking down the threads of its connections would abort it now and then, and its status would be lost."""
    program = (
        "import atexit, sys\n"
        "import torch.distributed as dist\n"
        "from mezo_dist import __main__\n"
        "atexit.register(print, 'taken down')\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        f"sys.argv = ['mezo-dist', 'report', {str(tmp_path / 'nowhere')!r}]\n"
        "__main__.run()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "taken down" not in done.stdout


@pytest.mark.parametrize(
    ("rank", "is_loaded", "is_said"), [("0", False, True), ("1", False, False), ("0", True, False), ("x", False, False)]
)
def test_the_seconds_of_imports_are_announced(
    rank: str, is_loaded: bool, is_said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "host1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    if is_loaded:
        for name in ("torch", "transformers"):
            monkeypatch.setitem(sys.modules, name, sys)
    else:
        monkeypatch.delitem(sys.modules, "transformers", raising=False)
    commands.announce_imports()
    assert ("importing torch and transformers" in capsys.readouterr().err) == is_said
