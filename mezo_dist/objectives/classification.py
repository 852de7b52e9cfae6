"""Objectives: losses and predictions from a forward pass of one micro-batch.

Losses are computed in fp32 from the logits, whatever the model's dtype, one per sample.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezo_dist.engines.lockstep.head_slice import HeadSlice
from mezo_dist.models.frozen_cache import RunModel, run_whole
from mezo_dist.tasks.batches import MicroBatch

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Scores:
    """Losses and predictions of one forward pass, for each of its samples."""

    loss: Tensor
    """fp32 [n]: sum of losses over the things that ``weight`` counts."""
    weight: Tensor
    """int64 [n]: what the loss is averaged over, 1 per sample (or the number of target tokens)."""
    prediction: Tensor
    """int64 [n]: predicted class."""
    logits: Tensor
    """fp32 [n, classes], on the CPU: the logits that ``prediction`` was chosen from."""


Objective = Callable[[nn.Module, MicroBatch], Scores]
"""Runs the model on one micro-batch."""


def classifier(model: nn.Module, batch: MicroBatch, run: RunModel = run_whole) -> Scores:
    """Cross-entropy of a classification head.

    Args:
        model: with a classification head.
        batch: one micro-batch.
        run: calls the model.
    """
    return cross_entropy(run(model, _on_device(model, batch), None), batch.labels)


class LabelWords:
    """Cross-entropy over the label words' logits where the answer is read (as MeZO does for classification).

    Args:
        model: a causal or masked language model.
        label_ids: token of each class.
        probe: a micro-batch to check the sliced head on. If the model changes its logits after the head, so that single
            rows of the head do not give the same ones, whole logits are used, and the log says so.
        run: how to call the model.
        once: runs a forward pass of the probe; needed where weights are sharded and the model cannot just be called.
    """

    def __init__(
        self,
        model: nn.Module,
        label_ids: list[int],
        probe: MicroBatch,
        run: RunModel = run_whole,
        once: Callable[[Callable[[nn.Module, MicroBatch], Tensor]], Tensor] | None = None,
    ) -> None:
        self._run = run
        self._label_ids = torch.tensor(label_ids, device=_device(model))
        self._head_slice: HeadSlice | None = None
        get_head: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
        head = get_head()
        if not isinstance(head, nn.Linear) or getattr(head.forward, "__func__", None) is not nn.Linear.forward:
            log.info("the output head is a %s: logits of the whole vocabulary are computed", type(head).__name__)
            return
        with torch.no_grad():
            on_probe = once or (lambda forward: forward(model, probe))
            whole = on_probe(self._logits)
            self._head_slice = HeadSlice(head, self._label_ids)
            if not self._agrees(on_probe, whole):
                log.info("the model changes its logits after the head: those of the whole vocabulary are computed")
                self._head_slice.detach()
                self._head_slice = None

    @property
    def label_ids(self) -> list[int]:
        """Token of each class."""
        return [int(token) for token in self._label_ids]

    def __call__(self, model: nn.Module, batch: MicroBatch) -> Scores:
        """See `Objective`."""
        return cross_entropy(self._logits(model, batch), batch.labels)

    def _agrees(self, on_probe: Callable[[Callable[[nn.Module, MicroBatch], Tensor]], Tensor], whole: Tensor) -> bool:
        try:
            fast = on_probe(self._logits)
        except (RuntimeError, IndexError) as error:
            log.debug("the sliced head failed: %s", error)
            return False
        return fast.shape == whole.shape and torch.allclose(fast.float(), whole.float(), rtol=1e-2, atol=1e-2)

    def _logits(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """[n, classes]"""
        logits = self._run(model, _on_device(model, batch), batch.positions.to(self._label_ids.device))
        return logits[:, self._label_ids] if self._head_slice is None else logits


def cross_entropy(logits: Tensor, labels: Tensor) -> Scores:
    """Scores of one label per sample, given logits [n, classes] and labels int64 [n]."""
    logits = logits.float().cpu()
    loss = F.cross_entropy(logits, labels, reduction="none")
    return Scores(loss, torch.ones_like(labels), logits.argmax(dim=-1), logits)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _on_device(model: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
    device = _device(model)
    return {name: tensor.to(device) for name, tensor in batch.inputs.items()}
