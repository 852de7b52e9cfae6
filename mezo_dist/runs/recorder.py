"""The run recorder writes to disk while a run goes on: every step to the trajectory, snapshots, and the log of
events."""

from __future__ import annotations

import logging
from typing import final

from mezo_dist.errors import UserError
from mezo_dist.runs.build import Run
from mezo_dist.runs.replay import snapshot_facts
from mezo_dist.storage import snapshot_writer
from mezo_dist.storage.files import move_aside
from mezo_dist.storage.run_files import note
from mezo_dist.storage.run_folder import Claim
from mezo_dist.storage.trajectory import Mark, Step
from mezo_dist.storage.trajectory_writer import TrajectoryWriter

log = logging.getLogger(__name__)


@final
class RunRecorder:
    """All ranks have one; rank 0's writes the trajectory. `open` makes one.

    Args:
        run: the run that is recorded.
        claim: its folder.
        writer: writes the trajectory; None on other ranks than 0.
    """

    def __init__(self, run: Run, claim: Claim, writer: TrajectoryWriter | None) -> None:
        self._run, self._claim, self._writer = run, claim, writer
        self._marked = max(claim.log.marks, default=-1) if claim.log is not None else -1
        self._saved = -1

    @staticmethod
    def open(run: Run, claim: Claim) -> RunRecorder:
        """Begin the trajectory, or go on with the one that was claimed.

        Raises:
            UserError: it cannot be written.
        """
        if run.comm.rank != 0:
            return RunRecorder(run, claim, None)
        sync_s = run.config.output.sync_s
        if claim.log is not None:
            return RunRecorder(run, claim, TrajectoryWriter.go_on(claim.trajectory, claim.log, sync_s))
        if claim.snapshots.exists():
            move_aside(claim.snapshots)  # of a run whose trajectory is gone
        writer = TrajectoryWriter.begin(claim.trajectory, run.header(), sync_s)
        note(claim.folder, "started", 0, ranks=run.comm.world_size)
        return RunRecorder(run, claim, writer)

    @property
    def bytes(self) -> int:
        """Size of the trajectory; 0 on other ranks than 0."""
        return self._writer.size if self._writer is not None else 0

    def append(self, step: Step) -> None:
        """Log a step; it is on disk when this returns. Raises as `TrajectoryWriter.append` does."""
        if self._writer is not None:
            self._writer.append(step)

    def mark(self, step: int) -> str:
        """Log the fingerprint of the weights, which are those after ``step`` steps, and return it. Collective.

        Raises:
            UserError: the ranks' weights are not the same.
        """
        fingerprint, anchor = self._run.engine.fingerprint(), self._run.engine.anchor_fingerprint()
        self._run.comm.agree({f"weights after step {step}": fingerprint, f"anchor after step {step}": anchor})
        if step > self._marked:
            self._marked = step
            if self._writer is not None:
                self._writer.append(Mark(step, fingerprint, anchor))
        return fingerprint

    def snapshot(self, step: int) -> bool:
        """Save the weights after ``step`` steps; returns whether they are saved. A failure is no reason to stop: the
        trajectory has all, and a run with gradients has older snapshots. Collective."""
        self.mark(step)
        run, claim = self._run, self._claim
        try:
            facts = snapshot_facts(run.header())
            keep = run.config.output.snapshots_kept
            snapshot_writer.save_snapshot(claim.snapshots, run.engine, step, run.comm, facts=facts, keep=keep)
        except UserError as error:
            self._note("snapshot failed", step, reason=str(error))
            safe = "as the trajectory still holds it" if run.gradients is None else "but cannot come back to here"
            log.warning("%s; the run goes on, %s", error, safe)
            return False
        self._saved = step
        return True

    def stopped(self, step: int) -> None:
        """Note that the run was asked to stop, and save the weights if the run keeps snapshots, or has them nowhere
        else. Collective."""
        self._note("stopped", step)
        if (self._run.config.output.snapshot_every or self._run.gradients is not None) and self._saved < step:
            self.snapshot(step)

    def close(self) -> None:
        """Close the trajectory."""
        if self._writer is not None:
            self._writer.close()

    def _note(self, event: str, step: int, **facts: str) -> None:
        if self._run.comm.rank == 0:
            note(self._claim.folder, event, step, **facts)
