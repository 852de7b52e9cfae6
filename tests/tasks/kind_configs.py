"""Configs of tiny runs of every kind of task, for the tests of mezo_dist/tasks/."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from mezo_dist.testing import WORDS, write_tiny_config

PROMPT = "{{ text }} . It was {{ answer }}"
TASKS: dict[str, dict[str, Any]] = {
    "choice": {"kind": "choice", "prompt": PROMPT, "options_field": "options"},
    "completion": {"kind": "completion", "prompt": "{{ text }} . It", "completion": " was {{ options[0] }}"},
    "generation": {
        "kind": "generation",
        "prompt": "{{ text }} . It",
        "completion": " was {{ options[0] }}",
        "max_new_tokens": 4,
        "metric": "f1",
    },
    "regression": {"kind": "regression", "plain": ["{{ text }}"], "label": "score"},
    "long words": {
        "prompt": PROMPT,
        "labels": [{"value": 0, "word": "terrible film"}, {"value": 1, "word": "great film"}],
        "metric": "f1",
    },
}
MODELS = {
    "choice": "llama-tied",
    "completion": "gpt2",
    "regression": "distilbert",
    "long words": "opt",
    "generation": "llama",
}


def rows(number: int = 60) -> list[dict[str, Any]]:
    """Made-up rows: a text, two or three options of which two share their first word, a label and a score."""
    draw = random.Random(0)
    made_up = []
    for n in range(number):
        first, *others = draw.sample(WORDS, 4)
        options = [f"{first} {others[0]}", f"{first} {others[1]} {others[2]}", others[2]][: 2 + n % 2]
        text = " ".join(draw.choices(WORDS, k=draw.randint(2, 9)))
        made_up.append({"text": text, "options": options, "label": n % 2, "score": n / 7})
    return made_up


def write_kind_config(folder: Path, name: str, **task: Any) -> Path:
    """A config with a task of the given name in `TASKS`, changed by ``task``, and its model and data beside it."""
    path = write_tiny_config(folder, MODELS[name], "mezo", steps=3, batch_size=5, micro_batch=3)
    config = yaml.safe_load(path.read_text())
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    splits = {split: {"source": "train", "size": 20} for split in ("train", "validation", "test")}
    config["task"] = {"name": name, "data": str(folder / "rows.jsonl"), "splits": splits, **TASKS[name], **task}
    if name == "regression":
        config["model"]["head"] = "classifier"
    path.write_text(yaml.safe_dump(config))
    return path
