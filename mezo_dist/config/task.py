"""What the task files of all kinds share (torch-free). `mezo_dist.config.kinds` has the settings of each kind.

name: movie-sentences
kind: classification                # the default; it says which settings stand below the common ones
data: demo:movie-sentences          # a demo data set, a hub name, or a local file
splits:
  train: {source: all, size: 512}
  validation: {source: all, size: 256}
  test: {source: all, size: 1000}
truncate: [text]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mezo_dist.algorithms.ranges import MANY, check_ranges
from mezo_dist.config.lines import check_lines
from mezo_dist.config.values import Where

TruncateSide = Literal["right", "left"]
ANSWER = "answer"
"""The name that a template gives to the place of the answer."""
TEMPLATE_PARTS = 2
"""Texts that a model takes at once, for a pair of sentences."""


@dataclass(frozen=True)
class Split:
    """Where the samples of a split come from."""

    source: str = "train"
    """Split of the data set that the samples come from. Splits with the same source are cut from one seeded
    permutation and never overlap."""
    size: int | None = None
    """Number of samples. Null: all that remain in the source."""

    def __post_init__(self) -> None:
        check_ranges(self, size=(1, MANY))


@dataclass(frozen=True)
class Splits:
    """The three splits of a task; settings are chosen on validation, test is looked at once."""

    train: Split = field(default_factory=Split)
    """Samples to fine-tune on (the paper: 512)."""
    validation: Split = field(default_factory=lambda: Split("validation"))
    """Samples to choose settings on (the paper: 256)."""
    test: Split = field(default_factory=lambda: Split("test"))
    """Samples for the final figure."""
    seed: int = 0
    """Seed of the permutation that the splits are cut from."""

    def __post_init__(self) -> None:
        check_ranges(self, "task.splits.", seed=(-(2**63), 2**63))


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """A task: data, and what is asked about them. What else there is depends on its kind."""

    kind: str
    """The kind of task."""
    metric: str
    """The main figure of merit."""
    name: str
    """Short name of the task, for logs."""
    data: str
    """The data set: ``demo:NAME``, a hub name, a local .jsonl, .json, .csv, .tsv, .parquet or .arrow file (whose rows
    are the split ``train``), a folder of such files named after their splits, or a folder written by ``save_to_disk``
    of ``datasets``. Relative paths start at the folder of the task file. Cells of CSV and TSV stay the text that they
    are."""
    subset: str | None = None
    """Configuration of a hub data set, by its name."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    where: Where = field(default_factory=Where)
    """Which rows count at all."""
    splits: Splits = field(default_factory=Splits)
    """Which samples are used for what."""
    truncate: tuple[str, ...] | None = None
    """Fields that are shortened, the longest first, when a text exceeds the model's window; ``passage.text`` is a
    field inside another. Nothing else is shortened. Null: ``text``, where there is a field of that name."""
    truncate_side: TruncateSide = "right"
    """The end of such a field that is cut off: ``right``, its last tokens, or ``left``, its first ones. With a
    classification head it is the end of the text, or of the longer one of a pair."""

    def __post_init__(self) -> None:
        check_lines(self, "task.", "name", "data", "subset", "revision")

    # What the rest of the package asks of a kind's settings; a kind says otherwise where otherwise is true.

    @property
    def words(self) -> list[str]:
        """The classes that all samples share, in the order of the columns of a payload; empty if there are none."""
        return []

    @property
    def templates(self) -> tuple[str, ...]:
        """Its jinja2 templates over the fields of a row."""
        return ()

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of fields that are read besides those in its templates."""
        return ()

    @property
    def num_outputs(self) -> int:
        """Outputs of a fresh classification head."""
        return max(1, len(self.words))

    @property
    def metric_is_mean(self) -> bool:
        """The metric of a batch is the mean of one number per sample."""
        return False

    @property
    def rows_are_samples(self) -> bool:
        """Every row of the data is one sample."""
        return True

    def check_calibration(self) -> None:
        """Raises ValueError if ``train.calibrate`` makes no sense."""
        if not self.words:
            raise ValueError(
                f"train.calibrate: needs classes that all samples share, which this task.kind: {self.kind} lacks"
            )

    def check_objective(self) -> None:
        """Raises ValueError if ``train.objective: metric`` makes no sense: greater figures must be better ones."""

    def check_head(self, head: str) -> None:
        """Raises ValueError if the kind of task, or this task, cannot be answered by ``model.head``."""
        if head == "classifier":
            raise ValueError(f"model.head: classifier is not for task.kind: {self.kind}; leave it out")
