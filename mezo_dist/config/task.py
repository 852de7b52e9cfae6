"""`Task`: the contents of a task file (torch-free).

name: movie-sentences
data: demo:movie-sentences          # a demo data set, a hub name, or a local file
splits:
  train: {source: all, size: 512}
  validation: {source: all, size: 256}
  test: {source: all, size: 1000}
prompt: "{{ text }} It was {{ answer }}"
plain: ["{{ text }}"]
label: label
labels: [{value: 0, word: terrible}, {value: 1, word: great}]
truncate: [text]
metric: accuracy
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mezo_dist.algorithms.ranges import MANY, check_ranges
from mezo_dist.config.lines import check_lines
from mezo_dist.config.values import Where, names_of

Metric = Literal["accuracy", "f1", "macro-f1", "matthews"]
TruncateSide = Literal["right", "left"]
ANSWER = "answer"


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


@dataclass(frozen=True)
class Label:
    """One class."""

    value: bool | int | str
    """Value of the label field in the data: its text, number, ``true`` or ``false``, or the name of the class."""
    word: str
    """Word that stands for the class in the prompt and in reports."""


@dataclass(frozen=True)
class Task:
    """A classification task: data, prompt, label words, metric."""

    name: str
    """Short name of the task, for logs."""
    data: str
    """The data set: ``demo:NAME``, a hub name, a local .jsonl, .json, .csv, .tsv, .parquet or .arrow file (whose rows
    are the split ``train``), a folder of such files named after their splits, or a folder written by ``save_to_disk``
    of ``datasets``. Relative paths start at the folder of the task file. Cells of CSV and TSV stay the text that they
    are."""
    prompt: str
    """jinja2 template over the fields of a sample, with ``{{ answer }}`` where the label word goes (at the very end
    for causal models, where the mask token goes for masked models). A field called ``answer`` is ``row.answer``."""
    labels: tuple[Label, ...]
    """The classes, as a list of ``{value: of the label field in the data, word: that stands for it in the prompt}``."""
    plain: tuple[str, ...] = ()
    """One or two jinja2 templates without prompt, for a fresh classification head."""
    label: str = "label"
    """Name of the data's field that holds the label."""
    subset: str | None = None
    """Configuration of a hub data set, by its name."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    where: Where = field(default_factory=Where)
    """Which rows count at all."""
    splits: Splits = field(default_factory=Splits)
    """Which samples are used for what."""
    truncate: tuple[str, ...] | None = None
    """Fields that are shortened, the longest first, when a prompt exceeds the model's window; ``passage.text`` is a
    field inside another. Nothing else is shortened. Null: ``text``, where there is a field of that name."""
    truncate_side: TruncateSide = "right"
    """The end of such a field that is cut off: ``right``, its last tokens, or ``left``, its first ones. With a
    classification head it is the end of the text, or of the longer one of a pair."""
    metric: Metric = "accuracy"
    """Figure of merit, between 0 and 1 (matthews: -1 and 1)."""

    def __post_init__(self) -> None:
        check_lines(self, "task.", "name", "data", "label", "subset", "revision")
        if len(self.labels) < 2:
            raise ValueError("task.labels: a classification task needs at least two labels")
        values = [name for label in self.labels for name in names_of(label.value)]
        for what, names in (("value", values), ("word", [label.word for label in self.labels])):
            if len(set(names)) < len(names):
                raise ValueError(f"task.labels: two labels have the same {what}: {names}")
        if ANSWER not in self.prompt:
            raise ValueError("task.prompt: must contain {{ answer }} where the label word goes")
        if len(self.plain) > 2:
            raise ValueError("task.plain: give one template, or two for a pair of texts")
        if self.metric == "f1" and len(self.labels) != 2:
            raise ValueError(f"task.metric: f1 is for two classes, this task has {len(self.labels)}; use macro-f1")

    @property
    def words(self) -> list[str]:
        """Label words, in class order."""
        return [label.word for label in self.labels]
