"""`Regression`: a `mezo_dist.tasks.kind.TaskKind`."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from mezo_dist.config.kinds.regression import RegressionTask
from mezo_dist.errors import UserError
from mezo_dist.models.frozen_cache import RunModel
from mezo_dist.tasks.batches import MicroBatch, by_slot, model_inputs
from mezo_dist.tasks.encoding import EncodedRows, encode_rows
from mezo_dist.tasks.fields import Row, lookup
from mezo_dist.tasks.kind import Answer, Bench, Forward, Scores, TextModel, text_encoder
from mezo_dist.tasks.regression.metrics import pearson, spearman
from mezo_dist.tasks.scoring import on_device
from mezo_dist.tasks.text import TextEncoder


@dataclass(frozen=True)
class Sample:
    """One encoded sample."""

    ids: tuple[int, ...]
    """Token ids, special tokens included, no padding."""
    value: float
    """The number that is wanted."""
    types: tuple[int, ...] = ()
    """Token type ids, where the model has them."""

    @property
    def num_tokens(self) -> int:
        """Length of `ids`."""
        return len(self.ids)

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """See `mezo_dist.tasks.batches.Sample`."""
        return (self.ids,)


@final
@dataclass(frozen=True)
class Regression:
    """A number. Payload: the prediction."""

    task: RegressionTask
    text_model: TextModel
    sample: ClassVar[type[Sample]] = Sample
    payload_is_smooth: ClassVar[bool] = True

    @staticmethod
    def of(task: RegressionTask, model: TextModel, _: Row) -> Regression:
        """See `mezo_dist.tasks.kinds`."""
        return Regression(task, model)

    def encode(self, rows: Sequence[Row], split: str) -> EncodedRows[Sample]:
        """See `TaskKind`."""
        return encode_rows(rows, split, self._sample)

    def collate(self, samples: Sequence[Sample], slots: tuple[int, ...], pad_id: int) -> MicroBatch:
        """See `TaskKind`."""
        types = [sample.types for sample in samples] if samples[0].types else ()
        value = torch.tensor([sample.value for sample in samples])
        return MicroBatch(slots, model_inputs([sample.ids for sample in samples], pad_id, types), {"value": value})

    def forward(self, bench: Bench) -> Forward:
        """See `TaskKind`."""
        return functools.partial(squared_error, run=bench.shorten(lambda batch: (batch.inputs, None)))

    def writer(self, bench: Bench) -> None:
        """See `TaskKind`."""

    def class_tokens(self, row: Row) -> list[int]:
        """See `TaskKind`."""
        return []

    def summarise(self, loss: float, payload: Tensor, batch: Sequence[MicroBatch]) -> Mapping[str, float]:
        """See `TaskKind`."""
        prediction, value = payload[:, 0].double(), by_slot(batch, "value").double()
        return {"pearson": pearson(prediction, value), "spearman": spearman(prediction, value)}

    def merits(self, payload: Tensor, batch: Sequence[MicroBatch]) -> Tensor:
        """See `TaskKind`."""
        raise NotImplementedError("a correlation is no mean over samples")

    def answers(self, payload: Tensor, batch: Sequence[MicroBatch]) -> list[Answer]:
        """See `TaskKind`."""
        pairs = zip(by_slot(batch, "value").tolist(), payload[:, 0].tolist(), strict=True)
        return [Answer(f"{right:.4g}", f"{said:.4g}") for right, said in pairs]

    @functools.cached_property
    def _texts(self) -> TextEncoder:
        return text_encoder(self.task, self.text_model)

    def _sample(self, row: Row) -> Sample:
        ids, types = self._texts.plain(self.task.plain, row)
        return Sample(ids, self._value(row), types)

    def _value(self, row: Row) -> float:
        value = lookup(row, self.task.label, "task.label")
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or isinstance(value, bool):
            raise UserError(
                f"task.label: {value!r:.100} is no finite number; leave such rows out with task.where: "
                f"{{drop: {{{self.task.label}: [{'null' if value is None else value}]}}}}"
            )
        return number


def squared_error(model: nn.Module, batch: MicroBatch, run: RunModel) -> Scores:
    """Squared error of a head of one output, in fp32.

    Args:
        model: with a head of one output.
        batch: one micro-batch.
        run: calls the model.
    """
    prediction = run(model, on_device(model, batch), None).float()
    value = batch.targets["value"].to(prediction.device)
    weight = torch.ones(len(value), dtype=torch.int64, device=value.device)
    return Scores((prediction[:, 0] - value).square(), weight, prediction)
