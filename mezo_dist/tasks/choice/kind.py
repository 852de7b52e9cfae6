"""`Choice`: a `mezo_dist.tasks.kind.TaskKind`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezo_dist.config.kinds.choice import ChoiceTask
from mezo_dist.tasks.batches import MicroBatch, by_slot, facts_by_slot, model_inputs
from mezo_dist.tasks.choice.options import EncodedOptions, Sample, encode_options, options_of, right_options
from mezo_dist.tasks.continuation import check_causal
from mezo_dist.tasks.encoding import EncodedRows, encode_rows
from mezo_dist.tasks.fields import Row
from mezo_dist.tasks.kind import Answer, Bench, Forward, Scores, TextModel, text_encoder
from mezo_dist.tasks.scoring import TokenScores, target_texts, token_targets
from mezo_dist.tasks.text import TextEncoder

Measure = Callable[[Tensor, Tensor], Mapping[str, float]]
"""Figures, by name, of predicted and right options (int64 [n] each)."""


@final
@dataclass(frozen=True)
class Choice:
    """One of several texts that could continue a prompt. Payload: the scores of the options, and zeros after them."""

    texts: TextEncoder
    prompt: str
    """Template."""
    options_of: Callable[[Row], list[str]]
    """The options of a row, in the order of the columns of the payload."""
    right_options: Callable[[Row, list[str]], tuple[int, ...]]
    """Which of them are right."""
    measure: Measure
    normalise: Literal["mean", "sum", "bytes"] = "mean"
    loss: Literal["choice", "lm"] = "choice"
    sample: ClassVar[type[Sample]] = Sample
    payload_is_smooth: ClassVar[bool] = True

    @staticmethod
    def of(task: ChoiceTask, model: TextModel, _: Row) -> Choice:
        """See `mezo_dist.tasks.kinds`.

        Raises:
            UserError: the model is not a causal one.
        """
        check_causal(model, task.kind)

        def options(row: Row) -> list[str]:
            return options_of(task, row)

        def right(row: Row, options: list[str]) -> tuple[int, ...]:
            return right_options(task, row, options)

        return Choice(text_encoder(task, model), task.prompt, options, right, accuracy, task.normalise, task.loss)

    def encode(self, rows: Sequence[Row], split: str) -> EncodedRows[Sample]:
        """See `TaskKind`."""
        return encode_rows(rows, split, self._sample)

    def collate(self, samples: Sequence[Sample], slots: tuple[int, ...], pad_id: int) -> MicroBatch:
        """See `TaskKind`. Every option is a row."""
        rows = [ids for sample in samples for ids in sample.options]
        starts = [start for sample in samples for start in sample.starts]
        counts = [len(sample.options) for sample in samples]
        columns = max(counts)
        units = [self._units(sample) + [1] * (columns - len(sample.options)) for sample in samples]
        targets = {
            "label": torch.tensor([sample.label for sample in samples]),
            "num_options": torch.tensor(counts),
            "units": torch.tensor(units),
            "num_tokens": torch.tensor([len(s.options[s.label]) - s.starts[s.label] for s in samples]),
            **token_targets(rows, [range(start, len(ids)) for ids, start in zip(rows, starts, strict=True)]),
        }
        right = tuple(sample.right for sample in samples)
        return MicroBatch(slots, model_inputs(rows, pad_id), targets, columns, tuple(counts), facts=right)

    def forward(self, bench: Bench) -> Forward:
        """See `TaskKind`."""
        token_scores = TokenScores(bench)

        def score(model: nn.Module, batch: MicroBatch) -> Scores:
            chosen, _ = token_scores(model, batch)
            return self._scores(chosen.sum(dim=1), batch)

        return score

    def writer(self, bench: Bench) -> None:
        """See `TaskKind`."""

    def class_tokens(self, row: Row) -> list[int]:
        """See `TaskKind`."""
        return []

    def summarise(self, loss: float, payload: Tensor, batch: Sequence[MicroBatch]) -> Mapping[str, float]:
        """See `TaskKind`."""
        best = _best(payload, by_slot(batch, "num_options"))
        return self.measure(best, _wanted(best, batch))

    def merits(self, payload: Tensor, batch: Sequence[MicroBatch]) -> Tensor:
        """See `TaskKind`."""
        best = _best(payload, by_slot(batch, "num_options"))
        return (best == _wanted(best, batch)).double()

    def answers(self, payload: Tensor, batch: Sequence[MicroBatch]) -> list[Answer]:
        """See `TaskKind`."""
        best = _best(payload, by_slot(batch, "num_options"))
        pairs = zip(_wanted(best, batch).tolist(), best.tolist(), strict=True)
        options = target_texts(batch, self.texts.tokenizer)
        return [
            Answer(options[slot][right], options[slot][said], (right, said)) for slot, (right, said) in enumerate(pairs)
        ]

    def _sample(self, row: Row) -> Sample:
        right = self.right_options(row, self.options_of(row))
        encoded, _ = self.texts.fit(row, self._encoded)
        return Sample(encoded.options, encoded.starts, encoded.sizes, right[0], right)

    def _encoded(self, row: Row) -> EncodedOptions:
        return encode_options(self.texts, self.prompt, self.options_of(row), row)

    def _units(self, sample: Sample) -> list[int]:
        """What the log-probability of each option is divided by."""
        if self.normalise == "bytes":
            return list(sample.sizes)
        if self.normalise == "sum":
            return [1] * len(sample.options)
        return [len(ids) - start for ids, start in zip(sample.options, sample.starts, strict=True)]

    def _scores(self, log_probability: Tensor, batch: MicroBatch) -> Scores:
        """Scores of the options, whose log-probabilities are fp32 [rows]."""
        device = log_probability.device
        names = ("label", "num_options", "units", "num_tokens")
        label, num_options, units, num_tokens = (batch.targets[name].to(device) for name in names)
        is_option = torch.arange(batch.columns, device=device) < num_options.unsqueeze(1)
        sums = torch.zeros(is_option.shape, device=device).masked_scatter(is_option, log_probability)
        payload = sums / units
        if self.loss == "lm":
            return Scores(-sums.gather(1, label.unsqueeze(1)).squeeze(1), num_tokens, payload)
        loss = F.cross_entropy(payload.masked_fill(~is_option, -torch.inf), label, reduction="none")
        return Scores(loss, torch.ones_like(label), payload)


def accuracy(prediction: Tensor, label: Tensor) -> Mapping[str, float]:
    """The share of right predictions."""
    return {"accuracy": float((prediction == label).double().mean())}


def _best(payload: Tensor, num_options: Tensor) -> Tensor:
    """int64 [n]: the option with the best score."""
    is_option = torch.arange(payload.shape[1]) < num_options.unsqueeze(1)
    return payload.masked_fill(~is_option, -torch.inf).argmax(dim=-1)


def _wanted(best: Tensor, batch: Sequence[MicroBatch]) -> Tensor:
    """int64 [n]: the right option; of several, the predicted one, if it is among them.

    Args:
        best: int64 [n], the predicted options.
        batch: the micro-batches.
    """
    pairs = zip(best.tolist(), facts_by_slot(batch), strict=True)
    return torch.tensor([option if option in right else right[0] for option, right in pairs])
