"""``metrics.jsonl``, and what else gets the same scalars: TensorBoard, wandb, MLflow, a table (``monitor``).

The run does not depend on these files: anything in their place that a resumed run cannot append to is moved aside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, final

from mezo_dist.json_types import JsonObject
from mezo_dist.monitoring.curve_writers import CurveWriter, open_writer
from mezo_dist.storage.files import open_log


def train_loss_tag(*, calibrated: bool) -> str:
    """The tag of a step's loss.

    The calibrated loss of a minibatch has a tag that says so: it is biased low, as the offsets of the classes are
    fitted to that minibatch, and must not be compared with a validation loss.
    """
    return "loss/train_calibrated_biased_low" if calibrated else "loss/train"


def figure(value: float, digits: int = 4) -> str:
    """A loss, a metric or a reward for people, with so many digits.

    >>> figure(0.40512), figure(0.40512, 3), figure(2.5e-06), figure(0), figure(12345678)
    ('0.4051', '0.405', '2.5e-06', '0.0000', '1.235e+07')
    """
    is_in_reach = value == 0 or 10 ** (1 - digits) <= abs(value) < 1e6
    return f"{value:.{digits}f}" if is_in_reach else f"{value:.{digits}g}"


@final
class Curves:
    """The curves of one run. `open` makes one.

    Args:
        jsonl: metrics.jsonl, opened to append to.
        writers: what else gets the scalars.
    """

    def __init__(self, jsonl: TextIO, writers: Sequence[CurveWriter]) -> None:
        self._jsonl = jsonl
        self._writers = writers

    @staticmethod
    @contextmanager
    def open(folder: Path, first_step: int | None, monitors: Sequence[str]) -> Iterator[Curves]:
        """Context manager around the files of a run; leaving it closes them.

        Args:
            folder: the run folder; made if it is missing.
            first_step: steps done before, after which the files go on; None: they start anew.
            monitors: what else gets the scalars, as `RunConfig.monitor` names it. One that fails is left out with a
                warning.

        Raises:
            OSError: the folder cannot be written to.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with open_log(folder / "metrics.jsonl", anew=first_step is None) as jsonl:
            writers = [open_writer(name, folder, first_step) for name in dict.fromkeys(monitors)]
            finished = False
            try:
                yield Curves(jsonl, writers)
                finished = True
            finally:
                for writer in writers:
                    writer.close(finished=finished)

    def settings(self, settings: JsonObject) -> None:
        """Show the resolved config where there is a place for it."""
        for writer in self._writers:
            writer.settings(settings)

    def write(self, step: int, scalars: Mapping[str, float], **facts: float | str) -> None:
        """Write one line, which the operating system has when this returns; monitors follow within seconds.

        Args:
            step: steps done.
            scalars: tag -> value. One that is not finite becomes null in the line, as JSON has no NaN.
            facts: stand in the line beside the scalars, and nowhere else.

        Raises:
            OSError: the line could not be written.
        """
        finite = {tag: value if math.isfinite(value) else None for tag, value in scalars.items()}
        self._jsonl.write(json.dumps({"step": step, **facts, "scalars": finite}, allow_nan=False) + "\n")
        self._jsonl.flush()
        for writer in self._writers:
            writer.write(step, scalars)
