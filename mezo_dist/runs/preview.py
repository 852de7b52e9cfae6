"""What a task looks like to a model: rendered samples, what is cut off, label tokens, and the untrained prior."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from mezo_dist.algorithms.base import Variant
from mezo_dist.models.window import NO_LIMIT
from mezo_dist.runs.build import Run, text_model_of
from mezo_dist.tasks.batches import MicroBatch, Sample
from mezo_dist.tasks.kinds import kind_of
from mezo_dist.tasks.rows import load_rows

MOST_PROBED = 64
"""Training samples that the untrained model is asked about, at most."""


def preview(run: Run, num_samples: int) -> list[str]:
    """Lines about a task and a model.

    Args:
        run: built, untrained.
        num_samples: training samples to show.
    """
    tokenizer, task = run.pretrained.tokenizer, run.config.task
    lines = [f"{task.name} ({task.kind}): " + ", ".join(f"{len(s)} {name}" for name, s in run.splits.items()), ""]
    for number, item in enumerate(_one_by_one(run, num_samples)):
        for row, mask in zip(item.inputs["input_ids"], item.inputs["attention_mask"], strict=True):
            ids = row[mask.bool()].tolist()
            lines += [f"train sample {number}, {len(ids)} tokens:", *_quoted(tokenizer.decode(ids))]
        lines += [f"    {name} {value.tolist()}" for name, value in item.targets.items()]
    lines += ["", _lengths(run)]
    if run.class_tokens:
        words = zip(task.words, run.class_tokens, tokenizer.convert_ids_to_tokens(run.class_tokens), strict=True)
        lines.append("label tokens: " + ", ".join(f"{word!r} is {token} {piece!r}" for word, token, piece in words))
    if task.words:
        lines.append(_prior(run))
    return lines


def _one_by_one(run: Run, num_samples: int) -> Iterator[MicroBatch]:
    pad_id = run.pretrained.pad_id
    return (run.kind.collate([sample], (0,), pad_id) for sample in run.splits["train"][:num_samples])


def _quoted(text: str) -> list[str]:
    return [f"    | {line}" for line in text.split("\n")]


def _lengths(run: Run) -> str:
    """How many of the training samples were cut, and where."""
    model = text_model_of(run.config, run.pretrained)
    rows = load_rows(run.config.task).train
    unlimited = kind_of(run.config.task, dataclasses.replace(model, max_tokens=NO_LIMIT), rows[0])
    wanted: Sequence[Sample] = unlimited.encode(rows, "train")
    lengths = sorted(sample.num_tokens for sample in wanted)
    too_long = sum(length > model.max_tokens for length in lengths)
    return (
        f"tokens of the training samples: median {lengths[len(lengths) // 2]}, most {lengths[-1]}; the model takes "
        f"{model.max_tokens}, so {too_long} of {len(lengths)} are shortened"
    )


def _prior(run: Run) -> str:
    """What the untrained model says about classes in general."""
    batch = run.cut(run.splits["train"][:MOST_PROBED])
    payload = run.evaluator.compute([Variant()], batch, lambda p: torch.softmax(p[0].double(), -1).mean(0),
                                    (len(run.config.task.words),), ("preview",))  # fmt: skip
    if payload is None:
        return "prior of the untrained model: its logits are not finite"
    pairs = zip(run.config.task.words, payload.tolist(), strict=True)
    shares = ", ".join(f"{word} {share:.3f}" for word, share in pairs)
    num_samples = min(MOST_PROBED, len(run.splits["train"]))
    return f"prior of the untrained model, mean over {num_samples} samples: {shares}"
