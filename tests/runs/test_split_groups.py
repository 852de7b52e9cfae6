"""Micro-batches of whole splits, made one by one: those that `cut` makes; what is in several counts for the last."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mezo_dist.config import reader
from mezo_dist.models.frozen_groups import Group
from mezo_dist.runs.split_groups import SplitGroups
from mezo_dist.storage.sample_file import block_of, read_samples, write_samples
from mezo_dist.tasks.batches import MicroBatch, cut
from mezo_dist.tasks.classification.kind import Classification
from mezo_dist.tasks.classification.prompts import Sample
from mezo_dist.tasks.kind import TaskKind, TextModel
from mezo_dist.tasks.kinds import kind_of
from mezo_dist.testing import tiny_tokenizer
from tests.tasks import kind_configs
from tests.tasks.encoders import encoder
from tests.tasks.kind_configs import write_kind_config

SIZE, PAD = 4, 0


def made_by(kind: TaskKind) -> Callable[[Sequence[Any]], Group]:
    def make(samples: Sequence[Any]) -> Group:
        return kind.collate(samples, tuple(range(len(samples))), PAD).inputs, None

    return make


def sequences(batch: dict[str, torch.Tensor]) -> list[bytes]:
    """The tokens of each row, without padding."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    return [row[:length].numpy().tobytes() for row, length in zip(batch["input_ids"], lengths, strict=True)]


def kinds(folder: Path) -> dict[str, tuple[TaskKind, list[Any]]]:
    """Kinds of tasks whose samples have a row, or several, with samples of which some are there twice."""
    rows, model = kind_configs.rows(23), TextModel(tiny_tokenizer(), "causal", 64, None)
    rows += rows[3:9]
    some = {}
    for name in ("choice", "completion"):
        task = reader.load(write_kind_config(folder / name, name)).task
        kind = kind_of(task, model, rows[0])
        some[name] = kind, list(kind.encode(rows, "train"))
    classes = encoder()
    some["classification"] = Classification(classes.task, classes), list(classes.encode(rows, "train"))
    return some


def test_groups_are_those_of_whole_splits(tmp_path: Path) -> None:
    for name, (kind, samples) in kinds(tmp_path).items():
        splits = [samples[:13], samples[13:], samples[5:8]]
        write_samples(tmp_path / "x.samples", [block_of(splits[1])], "key", lambda: None)
        in_file = read_samples(tmp_path / "x.samples", "key", kind.sample)
        assert in_file is not None
        groups = SplitGroups([splits[0], in_file, splits[2]], SIZE, made_by(kind))
        every: list[MicroBatch] = [item for split in splits for item in cut(split, SIZE, PAD, kind.collate)]
        wanted = {tokens: number for number, item in enumerate(every) for tokens in sequences(item.inputs)}
        for number, item in enumerate(every):
            inputs, _ = groups.group(number)
            assert all(torch.equal(inputs[key], tensor) for key, tensor in item.inputs.items()), (name, number)
        assert {tokens: groups.numbers(tokens)[0] for tokens in wanted} == wanted, name
        assert any(len(groups.numbers(tokens)) > 1 for tokens in wanted)
        assert groups.numbers(b"") == []


def test_nothing_is_read_but_what_is_asked_for(tmp_path: Path) -> None:
    draw = random.Random(0)
    samples = [Sample(tuple(draw.choices(range(50), k=draw.randint(3, 9))), 0, 2) for _ in range(500)]
    write_samples(tmp_path / "x.samples", [block_of(samples)], "key", lambda: None)
    seen = []

    def read(*values: Any) -> Sample:
        seen.append(values)
        return Sample(*values)

    file = read_samples(tmp_path / "x.samples", "key", read)
    assert file is not None
    classes = encoder()
    groups = SplitGroups([file], SIZE, made_by(Classification(classes.task, classes)))
    assert groups.numbers(torch.tensor(samples[7].ids).numpy().tobytes())
    assert not seen
    groups.group(3)
    assert len(seen) == SIZE
