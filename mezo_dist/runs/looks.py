"""Looks at the weights of a run as they are: on a split, before training, and along the way as often as
``output.looks`` and ``train.evaluate_every`` say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mezo_dist.monitoring.console import Monitor
from mezo_dist.objectives.calibration import MOST_SAMPLES, Calibration
from mezo_dist.runs.answers import ask, samples_before, write_answers
from mezo_dist.runs.build import Run
from mezo_dist.storage.run_files import save_config, write_results
from mezo_dist.tasks.batches import MicroBatch
from mezo_dist.tasks.generation.kind import Generation
from mezo_dist.tasks.kind import Answer

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


def look_before(run: Run, folder: Path, monitor: Monitor) -> dict[str, float]:
    """Evaluate the base model, and write down what it says. Collective.

    Args:
        run: data, model and planner.
        folder: the run folder.
        monitor: shows what happens.

    Returns:
        Its scores on the test split; empty without ``output.test``.
    """
    config, is_main = run.config, run.comm.rank == 0
    looks = evaluation_interval(run) > 0
    calibration = calibrate(run, monitor) if config.output.test or looks else None
    before = score(run, "test", monitor, 0, calibration) if config.output.test else {}
    if looks:
        score(run, "validation", monitor, 0, calibration)
    asks = config.output.answers and (config.output.test or looks)
    answers = ask(run, calibration) if asks else []
    if is_main:
        save_config(config, folder)
        write_results(folder, {"before": before})
        if asks:
            write_answers(folder, samples=samples_before(run, answers))
    return before


def calibrate(run: Run, monitor: Monitor) -> Calibration | None:
    """`Run.calibration` of the current weights, shown as it goes on."""
    if not run.config.train.calibrate:
        return None
    with monitor.evaluation("train", min(len(run.splits["train"]), MOST_SAMPLES), "fit offsets to") as advance:
        return run.calibration(advance)


def score(
    run: Run,
    split: str,
    monitor: Monitor,
    step: int,
    calibration: Calibration | None = None,
    answers: list[Answer] | None = None,
) -> dict[str, float]:
    """Loss and metric of the current weights on a split, shown and logged. Collective.

    Args:
        run: data, model and engine.
        split: ``train``, ``validation`` or ``test``.
        monitor: shows progress and result.
        step: steps that the weights have seen.
        calibration: offsets that predictions take, if losses are calibrated.
        answers: gets what is answered to each sample, on rank 0.
    """
    adjust = calibration.adjusted if calibration else None

    def summarise(loss: float, payload: Tensor, batch: Sequence[MicroBatch]) -> Mapping[str, float]:
        if answers is not None and run.comm.rank == 0:
            answers.extend(run.kind.answers(payload, batch))
        return run.kind.summarise(loss, payload, batch)

    with monitor.evaluation(split, len(run.splits[split])) as advance:
        result = run.evaluator.score(run.split(split), summarise, advance, adjust)
    monitor.result(split, step, result)
    return result
