"""A run at Weights & Biases, or its files for `wandb sync` (``monitor: [wandb]``).

Where to, as whom and whether at once is said by wandb's own variables: ``WANDB_PROJECT``, ``WANDB_ENTITY``,
``WANDB_API_KEY``, ``WANDB_MODE=offline``, ...
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import final

import wandb

from mezo_dist.json_types import JsonObject
from mezo_dist.monitoring.service_ids import keep_id, known_id

log = logging.getLogger(__name__)
PROJECT = "mezo_dist"
"""Unless ``WANDB_PROJECT`` says otherwise."""
WAITS_S = {"init_timeout": 60.0, "login_timeout": 30, "finish_timeout": 60.0}
"""Settings of wandb: seconds after which it gives up. Without them, it waits for ever for a key or a network."""


@final
class WandbRun:
    """A `CurveWriter` (see `mezo_dist.monitoring.curve_writers`).

    Args:
        folder: of the run; wandb's files are in ``wandb/`` in it.
        first_step: steps done before; the curves go on with the run that has the folder's id. None: the run begins
            anew.
    """

    def __init__(self, folder: Path, first_step: int | None) -> None:
        known = known_id(folder, "wandb") if first_step is not None else None
        run_id = known or secrets.token_hex(8)
        keep_id(folder, "wandb", run_id)
        waits = {name: value for name, value in WAITS_S.items() if name in wandb.Settings.model_fields}
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", folder.resolve().name),
            id=run_id,
            resume="allow",
            dir=str(folder),
            settings=wandb.Settings(console="off", silent=True, **waits),
        )
        if self._run.url:
            log.info("wandb: %s", self._run.url)
        else:
            log.info("wandb: `wandb sync %s` sends the curves there", Path(self._run.dir).parent)

    def settings(self, settings: JsonObject) -> None:
        """See `CurveWriter`."""
        self._run.config.update(settings, allow_val_change=True)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `CurveWriter`. wandb leaves out steps before the last one that it has, which are done again alike."""
        self._run.log(dict(scalars), step=step)

    def close(self, *, finished: bool) -> None:
        """See `CurveWriter`."""
        self._run.finish(exit_code=0 if finished else 1)
