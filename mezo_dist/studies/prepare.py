"""The folder of one run of a case: shape, tokenizer, data and config."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from mezo_dist.config import yaml_file
from mezo_dist.studies.cases import Case, Study, model_config
from mezo_dist.testing import BAD, GOOD, WORDS, tiny_tokenizer

PROMPT_WORDS = 3
"""Tokens of the prompt beside the text."""
LEFT_OVER = 8
"""Samples of the other splits."""


def cycle_of(case: Case) -> int:
    """Steps of a cycle of the algorithm."""
    from mezo_dist.algorithms.svrg import MeZOSVRG

    return MeZOSVRG().q if case.algorithm == "mezo-svrg" else 1


def num_steps(study: Study, case: Case) -> tuple[int, int]:
    """Steps before the measured ones, and measured ones: whole cycles both."""
    cycle = cycle_of(case)
    return tuple(-(-number // cycle) * cycle for number in (study.warmup, study.steps))  # type: ignore[return-value]


def prepare(study: Study, case: Case, folder: Path) -> Path:
    """Write what a run needs into ``folder``; the config file.

    Args:
        study: of the case.
        case: what is run.
        folder: where to; made if need be.
    """
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(model_config(case, study.folder)))
    tiny_tokenizer().save_pretrained(model)
    _write_data(folder / "data.jsonl", case)
    path = folder / "config.yaml"
    path.write_text(yaml_file.dump(_config(study, case, folder)))
    return path


def _write_data(path: Path, case: Case) -> None:
    """Random sentences that all have as many tokens."""
    draw = random.Random(0)
    rows = []
    for number in range(max(case.samples, case.full_samples) + 2 * LEFT_OVER):
        words = [*draw.choices(WORDS[:20], k=case.tokens - PROMPT_WORDS - 1), draw.choice(GOOD if number % 2 else BAD)]
        rows.append(json.dumps({"text": " ".join(words), "label": number % 2}) + "\n")
    path.write_text("".join(rows))


def _config(study: Study, case: Case, folder: Path) -> dict[str, Any]:
    algorithm: dict[str, Any] = {"name": case.algorithm}
    if case.algorithm.startswith("mezo"):
        algorithm |= {"directions": case.directions, "lr": 1e-6}  # a rate that is found needs losses of single samples
    sizes = {"train": max(case.samples, case.full_samples), "validation": LEFT_OVER, "test": LEFT_OVER}
    layout: dict[str, Any] = {"name": case.layout}
    if case.layout == "fsdp":
        layout["replicate"] = case.replicate
    return {
        "model": {"name": f"random:{folder / 'model'}", "kind": "causal", "weights": case.dtype},
        "task": {
            "name": "study",
            "data": str(folder / "data.jsonl"),
            "splits": {name: {"source": "train", "size": size} for name, size in sizes.items()},
            "prompt": "{{ text }} . It was {{ answer }}",
            "labels": [{"value": 0, "word": "terrible"}, {"value": 1, "word": "great"}],
        },
        "algorithm": algorithm,
        "layout": layout,
        "train": {
            "steps": sum(num_steps(study, case)),
            "batch_size": case.samples,
            "full_size": case.full_samples,
            "micro_batch": case.micro_batch,
            "width": case.width,
            "max_tokens": case.tokens,
        },
        "output": {"dir": str(folder / "run"), "if_exists": "replace", "export": False, "test": False, "sync_s": None},
    }
