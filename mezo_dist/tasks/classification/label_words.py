"""What a forward pass says about the classes of a micro-batch's samples: by label words, or by a classification head.

Losses are computed in fp32 from the logits, whatever the model's dtype, one per sample.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mezo_dist.models.frozen_cache import RunModel, run_whole
from mezo_dist.tasks.batches import MicroBatch
from mezo_dist.tasks.kind import Scores
from mezo_dist.tasks.scoring import cross_entropy, device_of, on_device, slice_head


def classifier(model: nn.Module, batch: MicroBatch, run: RunModel = run_whole) -> Scores:
    """Cross-entropy of a classification head.

    Args:
        model: with a classification head.
        batch: one micro-batch.
        run: calls the model.
    """
    return cross_entropy(run(model, on_device(model, batch), None), batch.targets["label"])


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
        self._label_ids = torch.tensor(label_ids, device=device_of(model))
        on_probe = once or (lambda forward: forward(model, probe))
        self._head_slice = slice_head(
            model, self._label_ids, lambda is_sliced: on_probe(functools.partial(self._logits, is_sliced=is_sliced))
        )

    @property
    def label_ids(self) -> list[int]:
        """Token of each class."""
        return [int(token) for token in self._label_ids]

    def __call__(self, model: nn.Module, batch: MicroBatch) -> Scores:
        """See `mezo_dist.tasks.kind.Forward`."""
        return cross_entropy(self._logits(model, batch, is_sliced=self._head_slice is not None), batch.targets["label"])

    def _logits(self, model: nn.Module, batch: MicroBatch, *, is_sliced: bool) -> Tensor:
        """[n, classes]"""
        logits = self._run(model, on_device(model, batch), batch.targets["position"].to(self._label_ids.device))
        return logits if is_sliced else logits[:, self._label_ids]
