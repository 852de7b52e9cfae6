"""What a model answers: a handful of validation samples before and after training, and which classes it takes for which
(``answers.json`` in the run folder, for `mezo-dist report`)."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mezo_dist.directions.seeds import derive_seed
from mezo_dist.json_types import Json, JsonObject
from mezo_dist.objectives.calibration import Calibration
from mezo_dist.runs.build import Run
from mezo_dist.storage.files import read_in_place, replace_file
from mezo_dist.storage.run_files import ANSWERS
from mezo_dist.tasks.batches import MicroBatch
from mezo_dist.tasks.kind import Answer

log = logging.getLogger(__name__)
SPLIT = "validation"
LONGEST = 2000
"""Characters of a prompt or an answer that are kept."""
MOST_BYTES = 1 << 22
MOST_CLASSES = 50
"""Classes of which a table can be looked at."""


def ask(run: Run, calibration: Calibration | None) -> list[Answer]:
    """The answers of the current weights to the first ``output.answers`` validation samples. Collective.

    Args:
        run: data, model and engine.
        calibration: offsets that predictions take, if losses are calibrated.

    Returns:
        An answer for each sample; empty on other ranks than 0.
    """
    batch = _batch(run)
    answers: list[Answer] = []

    def listen(_: float, payload: Tensor, batch: Sequence[MicroBatch]) -> Mapping[str, float]:
        if run.comm.rank == 0:
            answers.extend(run.kind.answers(payload, batch))
        return {}

    # Without a joint loss: nobody is asked what a few more texts are worth.
    evaluator = dataclasses.replace(run.evaluator, joint=None)
    evaluator.score(batch, listen, lambda _: None, calibration.adjusted if calibration else None)
    return answers


def samples_before(run: Run, answers: Sequence[Answer]) -> JsonObject:
    """What answers.json holds before training: prompts, right answers, and those of the base model."""
    prompts = _prompts(run, _batch(run))
    asked: list[Json] = [
        {"prompt": _short(prompt), "right": _short(answer.right), "before": _short(answer.said)}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return {"split": SPLIT, "asked": asked}


def samples_after(run: Run, folder: Path, answers: Sequence[Answer]) -> JsonObject:
    """The same with the answers of the trained model; those before are taken from the folder, if they are there."""
    content = samples_before(run, answers)
    known = _before_in(folder)
    for item in content["asked"]:
        item["after"] = item.pop("before")
        before = known.get((item["prompt"], item["right"]))
        if before is not None:
            item["before"] = before
    return content


def confusion(run: Run, split: str, answers: Sequence[Answer]) -> JsonObject | None:
    """How often samples of each class were taken for each class; None if the task has no classes, or too many to look
    at.

    Args:
        run: data and model.
        split: that the answers are about.
        answers: to all of its samples.
    """
    words = run.config.task.words
    if not 0 < len(words) <= MOST_CLASSES or any(answer.classes is None for answer in answers):
        return None
    pairs = Counter(answer.classes for answer in answers)
    counts = [[pairs[right, said] for said in range(len(words))] for right in range(len(words))]
    return {"split": split, "classes": [_short(word) for word in words], "counts": counts}


def write_answers(folder: Path, **parts: JsonObject | None) -> None:
    """Write answers.json, which nothing depends on: a failure is a warning."""
    content = {name: part for name, part in parts.items() if part is not None}
    try:
        replace_file(folder / ANSWERS, json.dumps(content, indent=1).encode(errors="replace"))
    except OSError as error:
        log.warning("%s cannot be written (%s)", folder / ANSWERS, error.strerror)


def _before_in(folder: Path) -> dict[tuple[str, str], str]:
    """(prompt, right answer) -> what was said before training, as answers.json has it."""
    try:
        asked = json.loads(read_in_place(folder / ANSWERS, MOST_BYTES))["samples"]["asked"]
        return {(str(item["prompt"]), str(item["right"])): str(item["before"]) for item in asked}
    except FileNotFoundError:  # nothing was evaluated before training
        return {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        log.warning("%s: the answers before training cannot be read (%s)", folder / ANSWERS, type(error).__name__)
        return {}


def _batch(run: Run) -> list[MicroBatch]:
    samples = run.splits[SPLIT][: run.config.output.answers]
    return run.cut(samples, derive_seed(run.config.seed, "drawn", SPLIT))


def _prompts(run: Run, batch: Sequence[MicroBatch]) -> list[str]:
    """The text of every sample, by slot, up to what is to be predicted."""
    texts = {}
    for item in batch:
        first_rows = _first_rows(item)
        for slot, row in zip(item.slots, first_rows, strict=True):
            ids = item.inputs["input_ids"][row][item.inputs["attention_mask"][row].bool()]
            if "is_target" in item.targets and bool(item.targets["is_target"][row, 0]):
                ids = ids[: int(item.targets["position"][row, 0]) + 1]
            texts[slot] = str(run.pretrained.tokenizer.decode(ids.tolist()))
    return [texts[slot] for slot in sorted(texts)]


def _first_rows(item: MicroBatch) -> list[int]:
    """The first of each sample's rows."""
    rows, first = [], 0
    for count in item.rows_per_sample or [1] * len(item.slots):
        rows.append(first)
        first += count
    return rows


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
