"""What kinds of tasks share when they score a forward pass. Scores are computed in fp32, whatever the model's dtype."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezo_dist.directions import devices
from mezo_dist.engines.lockstep.head_slice import HeadSlice
from mezo_dist.tasks.batches import MicroBatch, padded
from mezo_dist.tasks.kind import Bench, Scores

log = logging.getLogger(__name__)


def cross_entropy(logits: Tensor, labels: Tensor) -> Scores:
    """Scores of one label per sample, given logits [n, classes] and labels int64 [n]."""
    logits, labels = logits.float(), labels.to(logits.device)
    loss = F.cross_entropy(logits, labels, reduction="none")
    return Scores(loss, torch.ones_like(labels), logits)


def on_device(model: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
    """The inputs of a micro-batch where the model is."""
    return dict(zip(batch.inputs, devices.upload([*batch.inputs.values()], device_of(model)), strict=True))


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device


def slice_head(model: nn.Module, rows: Tensor | None, logits: Callable[[bool], Tensor]) -> HeadSlice | None:
    """Let the output head compute what a task looks at, if that gives the same logits. Collective.

    Args:
        model: a language model.
        rows: the rows of the head that are needed; None: all.
        logits: those of a few samples, read at the task's positions, told whether the head is sliced.

    Returns:
        None if whole logits are needed: the head is of another class, or the model changes its logits after the head.
        The log says so.
    """
    get_head: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    if not isinstance(head, nn.Linear) or getattr(head.forward, "__func__", None) is not nn.Linear.forward:
        log.info("the output head is a %s: logits of the whole vocabulary are computed", type(head).__name__)
        return None
    with torch.no_grad():
        whole = logits(False)
        head_slice = HeadSlice(head, rows)
        if _agrees(whole, logits):
            return head_slice
        log.info("the model changes its logits after the head: those of the whole vocabulary are computed")
        head_slice.detach()
        return None


def _agrees(whole: Tensor, logits: Callable[[bool], Tensor]) -> bool:
    try:
        fast = logits(True)
    except (RuntimeError, IndexError) as error:
        log.debug("the sliced head failed: %s", error)
        return False
    return fast.shape == whole.shape and torch.allclose(fast.float(), whole.float(), rtol=1e-2, atol=1e-2)


def token_targets(rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Targets of `TokenScores`: the tokens that are to be predicted, each at the position before it.

    Args:
        rows: token ids of each row.
        places: of each row, the indices of its target tokens, above 0.

    Returns:
        ``position``, ``token`` and ``is_target``, int64 [rows, m], filled up with zeros.
    """
    return {
        "position": padded([[place - 1 for place in some] for some in places], 0),
        "token": padded([[ids[place] for place in some] for ids, some in zip(rows, places, strict=True)], 0),
        "is_target": padded([[1] * len(some) for some in places], 0),
    }


def target_texts(batch: Sequence[MicroBatch], tokenizer: Any) -> list[list[str]]:
    """The target tokens of every row of every sample, by slot, as texts."""
    texts: dict[int, list[str]] = {}
    for item in batch:
        rows = zip(item.row_slots, item.targets["token"], item.targets["is_target"], strict=True)
        for slot, tokens, is_target in rows:
            text = str(tokenizer.decode(tokens[is_target.bool()].tolist(), skip_special_tokens=True)).strip()
            texts.setdefault(slot, []).append(text)
    return [texts[slot] for slot in sorted(texts)]


@final
class TokenScores:
    """Log-probabilities of the target tokens of a micro-batch (see `token_targets`), by a causal language model."""

    def __init__(self, bench: Bench) -> None:
        self._run = bench.shorten(lambda batch: (batch.inputs, None))
        self.head_slice = slice_head(bench.model, None, lambda _: bench.once(self._logits))

    def __call__(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Run the model on one micro-batch.

        Returns:
            fp32 [rows, m], log-probabilities, zero where there is no target; and bool [rows, m], whether the target is
            the likeliest token.
        """
        logits = self._logits(model, batch).float()
        token, is_target = (batch.targets[name].to(logits.device) for name in ("token", "is_target"))
        chosen = logits.gather(-1, token.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
        right = (logits.argmax(-1) == token) & (is_target == 1)
        return torch.where(is_target == 1, chosen, 0.0), right

    def _logits(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """[rows, m, vocabulary]"""
        return self._run(model, on_device(model, batch), batch.targets["position"].to(device_of(model)))
