"""A run at an MLflow server, or in its local store (``monitor: [mlflow]``).

Where to and as whom is said by MLflow's own variables: ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``, ...
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import final

from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from mezo_dist.json_types import Json, JsonObject
from mezo_dist.monitoring.service_ids import keep_id, known_id

EXPERIMENT = "mezo_dist"
"""Unless ``MLFLOW_EXPERIMENT_NAME`` says otherwise."""
LONGEST_PARAM = 500
"""Characters of a setting that every MLflow takes."""
MOST_PARAMS = 100
"""Settings that one request takes."""


@final
class MlflowRun:
    """A `CurveWriter` (see `mezo_dist.monitoring.curve_writers`).

    Args:
        folder: of the run.
        first_step: steps done before; the curves go on with the run that has the folder's id. None: the run begins
            anew.
    """

    def __init__(self, folder: Path, first_step: int | None) -> None:
        self._client = MlflowClient()
        self._last: dict[str, int] = {}  # tag -> the last step that a run that goes on has there
        known = known_id(folder, "mlflow") if first_step is not None else None
        if known is not None and self._goes_on(known):
            self._id, self._is_new = known, False
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = self._client.get_experiment_by_name(name)
        place = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._id = self._client.create_run(place, run_name=folder.resolve().name).info.run_id
        self._is_new = True
        keep_id(folder, "mlflow", self._id)

    def settings(self, settings: JsonObject) -> None:
        """See `CurveWriter`. MLflow's parameters cannot change: those of a run that goes on are what they were."""
        params = [Param(name, str(value)[:LONGEST_PARAM]) for name, value in _flat(settings, "")] * self._is_new
        for first in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._id, params=params[first : first + MOST_PARAMS])

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `CurveWriter`. Steps that are taken again are alike, and are not sent twice: MLflow would keep both."""
        now_ms = int(time.time() * 1000)
        new = [Metric(tag, value, now_ms, step) for tag, value in scalars.items() if step > self._last_known(tag)]
        if new:
            self._client.log_batch(self._id, new)

    def close(self, *, finished: bool) -> None:
        """See `CurveWriter`."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")

    def _last_known(self, tag: str) -> int:
        if self._is_new:
            return -1
        if tag not in self._last:
            history = self._client.get_metric_history(self._id, tag)
            self._last[tag] = max((point.step for point in history), default=-1)
        return self._last[tag]

    def _goes_on(self, run_id: str) -> bool:
        """The server has that run, which runs again."""
        try:
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # of another server
                return False
            raise
        return True


def _flat(settings: JsonObject, prefix: str) -> Iterator[tuple[str, Json]]:
    """Dotted name and value of every setting."""
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
