"""What a task looks like to a model: samples, what is cut off, label tokens, and what the untrained model says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mezo_dist.models.window import NO_LIMIT
from mezo_dist.monitoring.scalars import figure
from mezo_dist.runs.build import Run, text_model_of
from mezo_dist.tasks.batches import MicroBatch, Sample
from mezo_dist.tasks.generation.kind import Generation
from mezo_dist.tasks.kinds import kind_of
from mezo_dist.tasks.rows import load_rows

MOST_PROBED, MOST_PROBED_TOKENS, MOST_WRITTEN = 64, 8_192, 4
"""Training samples that the untrained model is asked about, at most, and their tokens; and texts that it writes."""


def preview(run: Run, num_samples: int) -> list[str]:
    """Lines about a task and a model. Collective.

    Args:
        run: built, untrained.
        num_samples: training samples to show.
    """
    tokenizer, task = run.pretrained.tokenizer, run.config.task
    lines = [f"{task.name} ({task.kind}): " + ", ".join(f"{len(s)} {name}" for name, s in run.splits.items()), ""]
    whole = _whole_lengths(run)
    for number, sample in enumerate(run.splits["train"][:num_samples]):
        lines += _shown(run, number, sample, whole[number])
    lines += ["", _lengths(run, whole)]
    if run.class_tokens:
        words = zip(task.words, run.class_tokens, tokenizer.convert_ids_to_tokens(run.class_tokens), strict=True)
        lines.append("label tokens: " + ", ".join(f"{word!r} is {token} {piece!r}" for word, token, piece in words))
    return lines + _untrained(run)


def _shown(run: Run, number: int, sample: Sample, whole: int) -> list[str]:
    """One training sample: its text, what of it is to be predicted, and what is right.

    Args:
        run: the run.
        number: of the sample.
        sample: itself.
        whole: tokens that it has when nothing is cut off.
    """
    item = run.kind.collate([sample], (0,), run.pretrained.pad_id)
    cut = f", shortened from {whole}" if whole > sample.num_tokens else ""
    rows = [row[mask.bool()] for row, mask in zip(item.inputs["input_ids"], item.inputs["attention_mask"], strict=True)]
    lines = [f"train sample {number}, {sample.num_tokens} tokens{cut}:", *_quoted(_text(run, rows[0]))]
    if "is_target" in item.targets:
        learnt = [t[on.bool()] for t, on in zip(item.targets["token"], item.targets["is_target"], strict=True)]
        for place, tokens in enumerate(learnt):
            name = f"option {place}" if len(rows) > 1 else "to be predicted"
            lines.append(f"    {name}, {len(tokens)} tokens: {_text(run, tokens)!r}")
    if "value" in item.targets:
        lines.append(f"    right: {float(item.targets['value']):g}")
    elif isinstance(run.kind, Generation):
        lines += [f"    right: {text!r}" for text in item.facts[0][0]]
    elif "label" in item.targets:
        words, label = run.config.task.words, int(item.targets["label"])
        lines.append(f"    right: {words[label] if words else ', '.join(f'option {n}' for n in item.facts[0])}")
    return lines


def _text(run: Run, ids: Tensor) -> str:
    return str(run.pretrained.tokenizer.decode(ids.tolist()))


def _quoted(text: str) -> list[str]:
    return [f"    | {line}" for line in text.split("\n")]


def _whole_lengths(run: Run) -> list[int]:
    """Tokens that each training sample had if the model took texts of any length."""
    unlimited = dataclasses.replace(text_model_of(run.config, run.pretrained), max_tokens=NO_LIMIT)
    rows = load_rows(run.config.task).train
    samples = kind_of(run.config.task, unlimited, rows[0]).encode(rows, "train")
    return [sample.num_tokens for sample in samples]


def _lengths(run: Run, whole: Sequence[int]) -> str:
    """How many of the training samples were cut, and where.

    Args:
        run: the run.
        whole: see `_whole_lengths`.
    """
    lengths = sorted(whole)
    cut = sum(a.num_tokens < b for a, b in zip(run.splits["train"], whole, strict=True))
    return (
        f"tokens of the training samples: median {lengths[len(lengths) // 2]}, most {lengths[-1]}; the model takes "
        f"{text_model_of(run.config, run.pretrained).max_tokens}, so {cut} of {len(lengths)} are shortened"
    )


def _untrained(run: Run) -> list[str]:
    """What the untrained model says about training samples: figures, its prior for classes, and texts; on rank 0."""
    batch = run.cut(_some(run, MOST_WRITTEN if isinstance(run.kind, Generation) else MOST_PROBED))
    payloads: list[Tensor] = []

    def summarise(loss: float, payload: Tensor, batch: Sequence[MicroBatch]) -> Mapping[str, float]:
        payloads.append(payload)
        return run.kind.summarise(loss, payload, batch)

    figures = run.evaluator.score(batch, summarise, lambda _: None)
    size = sum(len(item.slots) for item in batch)
    shown = ", ".join(f"{name} {figure(value, 3)}" for name, value in figures.items())
    lines = [f"the untrained model on {size} training samples: {shown}"]
    names = _classes(run, batch)
    for payload in payloads:
        if isinstance(run.kind, Generation):
            lines += [f"    it writes for sample {n}: {text!r}" for n, text in enumerate(run.kind.texts(payload))]
        elif names:
            shares = torch.softmax(payload.double(), -1).mean(0).tolist()
            shown = ", ".join(f"{name} {share:.3f}" for name, share in zip(names, shares, strict=True))
            lines.append(f"prior of the untrained model, mean over {size} samples: {shown}")
    return lines


def _some(run: Run, most: int) -> Sequence[Sample]:
    """The first training samples, as many as take no more than `MOST_PROBED_TOKENS` tokens, but one at least.

    Args:
        run: the run.
        most: no more than so many.
    """
    samples, num_tokens = run.splits["train"][:most], 0
    for number, sample in enumerate(samples):
        num_tokens += run.kind.collate([sample], (0,), run.pretrained.pad_id).cost
        if num_tokens > MOST_PROBED_TOKENS:
            return samples[: max(1, number)]
    return samples


def _classes(run: Run, batch: Sequence[MicroBatch]) -> list[str]:
    """What the columns of the payload stand for, if they are classes, or options of which all samples have as many."""
    if run.config.task.words:
        return run.config.task.words
    counts = {int(count) for item in batch for count in item.targets.get("num_options", ())}
    return [f"option {place}" for place in range(counts.pop())] if len(counts) == 1 else []
