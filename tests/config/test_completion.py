"""Shell completion: bash itself completes by the script; zsh and fish do where they are installed."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from mezo_dist import cli
from mezo_dist.config.completion import SHELLS, _settings, script

CASES = {
    "mezo-dist ": "train",
    "mezo-dist tr": "train",
    "mezo-dist train config.yaml --la": "--layout.name=",
    "mezo-dist train config.yaml --law ": "rademacher",
    "mezo-dist train config.yaml --law=": "rademacher",
    "mezo-dist train config.yaml --law=g": "gaussian",
    "mezo-dist train config.yaml --law=gaussian --algorithm.momentum.": "--algorithm.momentum.decay=",
    "mezo-dist train config.yaml --algorithm.anchor_": "--algorithm.anchor_lr=",
    "mezo-dist train config.yaml --algorithm.name=mezo-svrg-": "mezo-svrg-released",
    "mezo-dist train config.yaml --task.temp": "--task.temperature=",
    "mezo-dist train config.yaml --task=sst2-": "sst2-masked",
    "mezo-dist train config.yaml --task=con": "config.yaml",
    "mezo-dist train con": "config.yaml",
    "mezo-dist train config.yaml --dry": "--dry-run",
    "mezo-dist tasks ": "show",
    "mezo-dist tasks show sst2 --ro": "--rows=",
    "mezo-dist tasks show sst2 --model con": "config.yaml",
    "mezo-dist evaluate runs --split v": "validation",
    "mezo-dist plan opt-125m --layout=f": "fsdp",
    "mezo-dist report con": "config.yaml",
    "mezo-dist completion ": "fish",
}


def written(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert cli.main(["completion", shell]) == 0
    path = folder / f"completion.{shell}"
    path.write_text(capsys.readouterr().out)
    (folder / "config.yaml").touch()
    return path


def bash_words(line: str) -> list[str]:
    """The words that bash makes of a line that is being completed: it cuts them at "=", too."""
    words = [part for word in line.split(" ") for part in re.split("(=)", word)]
    return [word for i, word in enumerate(words) if word or i == len(words) - 1]


def test_bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written("bash", tmp_path, capsys)
    program = [f"source {path}", "compopt() { :; }"]  # bash has it while it completes alone
    for line in CASES:
        words = bash_words(line)
        program += [f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}", "_mezo_dist",
                    'echo "${COMPREPLY[*]}"']  # fmt: skip
    done = subprocess.run(["bash", "-c", "\n".join(program)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    for (line, wanted), offered in zip(CASES.items(), done.stdout.splitlines(), strict=True):
        assert wanted in offered.split(), line
        start = re.split("[ =]", line)[-1]
        assert all(word.startswith(start) for word in offered.split()), line


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written("fish", tmp_path, capsys)
    for line, wanted in CASES.items():
        done = subprocess.run(
            ["fish", "--no-config", "-c", f"source {path}; complete -C {shlex.quote(line)}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        offered = [answer.partition("\t")[0].rpartition("=")[2] for answer in done.stdout.splitlines()]
        assert wanted.rstrip("=") in offered, line


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_reads_its_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["zsh", "-n", written("zsh", tmp_path, capsys)], check=True)


@pytest.mark.parametrize("shell", SHELLS)
def test_every_setting_is_there_with_what_it_may_be(shell: str) -> None:
    text = script(shell, cli._parser())  # type: ignore[arg-type]
    options = list(_settings())
    assert len(options) > 100
    for option in options:
        name = option.name.removeprefix("--") if shell == "fish" else option.name
        assert re.search(rf"[ ']{re.escape(name)}[ =']", text), name
    values = {option.name: option.values for option in options}
    assert values["--task.metric"][:2] == ("accuracy", "f1")
    assert "pearson" in values["--task.metric"]  # of another kind of task
    assert values["--train.calibrate"] == ("true", "false")
    assert "--origin.model" not in values
