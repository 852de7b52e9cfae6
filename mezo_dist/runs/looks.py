"""How often a run looks at its validation split along the way (``output.looks``, ``train.evaluate_every``)."""

from __future__ import annotations

from mezo_dist.objectives.calibration import MOST_SAMPLES
from mezo_dist.runs.build import Run
from mezo_dist.tasks.generation.kind import Generation

SHARE = 0.1
"""Of the forward passes of a run that ``output.looks`` may take, all together."""


def evaluation_interval(run: Run) -> int:
    """Steps between evaluations on the validation split, before the first step and then after every so many; 0: there
    is none but the one at the end. The same on all ranks and after every restart."""
    train = run.config.train
    if train.evaluate_every:
        return train.evaluate_every
    looks = min(run.config.output.looks, int(SHARE * train.steps * _passes_of_step(run) / _passes_of_look(run)))
    return -(-train.steps // looks) if looks else 0


def _passes_of_step(run: Run) -> int:
    """Forward passes of one sample that a usual step takes, at least."""
    request = run.algorithm.plan(run.algorithm.init(), 0)
    variants = len(request.variants) if request.batch == "minibatch" else 2
    return run.config.train.batch_size * (run.gradients.cost if run.gradients is not None else variants)


def _passes_of_look(run: Run) -> int:
    samples = len(run.splits["validation"])
    if isinstance(run.kind, Generation):
        return samples * (1 + run.kind.task.max_new_tokens)
    offsets = min(MOST_SAMPLES, len(run.splits["train"])) if run.config.train.calibrate else 0
    return samples + offsets
