"""docs/migrating.md: what scripts become really runs, and at most three lines of each are new."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import DataCollatorForSeq2Seq

from mezo_dist import MeZO, MeZOTrainer, cli
from mezo_dist.config import reader
from mezo_dist.storage import trajectory
from mezo_dist.testing import tiny_model, tiny_tokenizer, write_tiny_model
from tests.forked import ROOT
from tests.trainer.trainers import DATA

PAGE = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # on machines without a GPU
@pytest.mark.parametrize("number", range(3))
def test_the_scripts_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = blocks("diff")[number].splitlines()
    assert sum(line.startswith("+") for line in lines) == 3
    script = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    assert "mezo_dist" in script
    write_tiny_model(tmp_path / "facebook" / "opt-125m", "opt")
    monkeypatch.chdir(tmp_path)
    rows = [{name: values.tolist() for name, values in row.items()} for row in DATA]
    tokenizer = tiny_tokenizer()
    names: dict[str, Any] = {"model": tiny_model("opt"), "data": rows, "held_out": rows, "tokenizer": tokenizer}
    names["collator"] = DataCollatorForSeq2Seq(tokenizer)
    script = script.replace("max_steps=20000", "max_steps=2").replace(", learning_rate=1e-5", ", max_steps=2")
    exec(script, names)
    assert isinstance(names["trainer"], MeZOTrainer)
    (written,) = tmp_path.rglob("checkpoint-2/trajectory.jsonl")
    assert len(trajectory.read(written).steps) == 2


def test_the_config_is_one(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    (tmp_path / "run.yaml").write_text(text)
    config = reader.load(tmp_path / "run.yaml", [])
    assert isinstance(config.algorithm, MeZO)
    assert (config.algorithm.lr, config.algorithm.eps, config.train.steps) == (1e-7, 1e-3, 20000)


def test_settings_of_the_table_are_there() -> None:
    table = next(part for part in PAGE.split("\n\n") if part.startswith("| run.py"))
    named = re.findall(r"`([a-z]+(?:\.[a-z_]+)+)", table.replace("device_map='auto'", ""))
    assert {"algorithm.eps", "model.peft.method", "task.splits.train.size", "layout.name"} <= set(named)
    helped = " ".join(help_of_train().split())
    for name in named:
        assert f"--{name} " in helped, name


def help_of_train() -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main(["train", "--help"])
    return out.getvalue()
