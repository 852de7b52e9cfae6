"""The rewards of a batch of written texts, as losses."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from mezo_dist.config.schema import RunConfig
from mezo_dist.objectives.rewards.judge import Judge
from mezo_dist.tasks.batches import MicroBatch, facts_by_slot
from mezo_dist.tasks.generation.kind import Generation
from mezo_dist.tasks.kind import TaskKind


def minus_rewards(
    config: RunConfig, kind: TaskKind, judge: Judge, payload: Tensor, batch: Sequence[MicroBatch]
) -> Tensor:
    """Minus the reward of every text.

    A sample that has no reward under one variant has none under any, so that variants are compared on the same samples.

    Args:
        config: the settings.
        kind: of the task, which writes texts.
        judge: what judges them.
        payload: fp32 [variants, n, columns] by slot: tokens, and the sample's loss, if that is part of the reward.
        batch: the micro-batches.

    Returns:
        fp64 [variants, n]; NaN for samples that have none.
    """
    assert isinstance(kind, Generation)
    weights, columns = config.reward.weights, config.task.max_new_tokens  # type: ignore[union-attr]
    rows = [json.loads(row) for _, row in facts_by_slot(batch)]
    texts = [text for rows_of_variant in payload for text in kind.texts(rows_of_variant[:, :columns])]
    judged = judge.rewards(rows * len(payload), texts)
    missing = torch.tensor([reward is None for reward in judged]).view(len(payload), -1)
    rewards = torch.tensor([reward or 0.0 for reward in judged], dtype=torch.float64).view(len(payload), -1)
    if weights.metric:
        merits = [kind.merits(rows_of_variant[:, :columns], batch) for rows_of_variant in payload]
        rewards += weights.metric * torch.stack(merits)
    if weights.loss:
        rewards -= weights.loss * payload[..., columns].double()
    return -rewards.masked_fill(missing.any(dim=0), torch.nan)
