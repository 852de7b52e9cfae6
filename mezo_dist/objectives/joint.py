"""Joint losses: the loss of a batch is a function of what the model says about all of its samples together.

Payloads of the whole batch cross between ranks, rank 0 computes the losses, and all ranks get the same numbers.
Additive losses, the default, are means over samples and need none of this (`mezo_dist.engines.loss_table`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mezo_dist.algorithms.base import Pair
from mezo_dist.config.schema import RunConfig
from mezo_dist.distributed.fixed_point import ONE, to_fixed
from mezo_dist.objectives.calibration import best_offsets, calibrated_loss, loss_at
from mezo_dist.objectives.curvature import gauss_newton
from mezo_dist.objectives.rewards.batch import minus_rewards
from mezo_dist.objectives.rewards.judge import Judge
from mezo_dist.tasks.batches import MicroBatch, by_slot
from mezo_dist.tasks.kind import TaskKind

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Joint:
    """A joint loss."""

    losses: Callable[[Tensor, Sequence[MicroBatch]], Tensor]
    """(payload fp32 [variants, n, columns] by slot, the micro-batches) -> fp64 [variants], or [variants, n] whose means
    count where each sample has a loss of its own: NaN if it has none."""
    each_sample: bool
    """It gives losses of samples."""
    is_discrete: bool
    """It takes few values, so that differences may be exactly zero."""
    is_reward: bool = False
    """It is minus a reward."""
    with_curvature: Callable[[Tensor, Sequence[MicroBatch], Sequence[Pair]], Tensor] | None = None
    """The losses and, after them, the mean curvature along the directions of these pairs of variants: fp64
    [variants + 1]. None: a loss that tells no curvature."""
    needs_loss: bool = False
    """The payload has one column more, the last one: the loss of each sample, a mean over its targets."""


def joint_objective(config: RunConfig, kind: TaskKind, judge: Judge | None = None) -> Joint | None:
    """The joint loss that a config asks for; None for an additive one.

    Args:
        config: the settings.
        kind: of the task.
        judge: what judges texts, on rank 0 of a run that trains. A run that is only evaluated has none, for the program
            that a foreign run folder names must not run: then there is no joint loss.
    """
    if config.train.objective == "reward":
        if judge is None:
            log.info("rewards are asked for by training alone: the loss here is that of the completions")
            return None
        losses = functools.partial(minus_rewards, config, kind, judge)
        return Joint(
            losses, each_sample=True, is_discrete=True, is_reward=True, needs_loss="loss" in config.reward.sources
        )
    if config.train.calibrate:
        return CALIBRATED
    if config.train.objective == "metric":
        if config.task.metric_is_mean:
            return Joint(functools.partial(_minus_merits, kind), each_sample=True, is_discrete=True)
        return Joint(functools.partial(_minus_metric, kind, config.task.metric), each_sample=False, is_discrete=True)
    return None


def exact_logits(payload: Tensor) -> Tensor:
    """fp32 logits as fp64 multiples of 2^-32, which is how calibrated losses are defined."""
    return to_fixed(payload)[0].double() / ONE


def calibrated(payload: Tensor, batch: Sequence[MicroBatch]) -> Tensor:
    """`calibrated_loss` of every variant: fp64 [variants]."""
    return calibrated_loss(exact_logits(payload), by_slot(batch, "label"))


def calibrated_with_curvature(payload: Tensor, batch: Sequence[MicroBatch], pairs: Sequence[Pair]) -> Tensor:
    """`calibrated`, and after it the mean Gauss-Newton curvature along ``pairs``: fp64 [variants + 1]."""
    logits, labels = exact_logits(payload), by_slot(batch, "label")
    offsets = best_offsets(logits, labels)
    return torch.cat([loss_at(logits, labels, offsets), gauss_newton(logits, pairs, offsets).view(1)])


CALIBRATED = Joint(calibrated, each_sample=False, is_discrete=False, with_curvature=calibrated_with_curvature)
"""Calibrated losses (``train.calibrate``)."""


def _minus_merits(kind: TaskKind, payload: Tensor, batch: Sequence[MicroBatch]) -> Tensor:
    return -torch.stack([kind.merits(rows, batch) for rows in payload])


def _minus_metric(kind: TaskKind, metric: str, payload: Tensor, batch: Sequence[MicroBatch]) -> Tensor:
    values = [kind.summarise(0.0, rows, batch)[metric] for rows in payload]
    return -torch.tensor(values, dtype=torch.float64)
