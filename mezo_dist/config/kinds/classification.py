"""Settings of ``task.kind: classification``: one of a few classes (torch-free).

prompt: "{{ text }} It was {{ answer }}"
plain: ["{{ text }}"]
label: label
labels: [{value: 0, word: terrible}, {value: 1, word: great}]
metric: accuracy
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mezo_dist.config.lines import check_lines
from mezo_dist.config.task import ANSWER, TEMPLATE_PARTS, TaskSettings
from mezo_dist.config.values import names_of

Metric = Literal["accuracy", "f1", "macro-f1", "matthews"]


@dataclass(frozen=True)
class Label:
    """One class."""

    value: bool | int | str
    """Value of the label field in the data: its text, number, ``true`` or ``false``, or the name of the class."""
    word: str
    """Word that stands for the class in the prompt and in reports."""


@dataclass(frozen=True, kw_only=True)
class ClassificationTask(TaskSettings):
    """One of a few classes, by a label word that completes a prompt, or by a fresh classification head."""

    kind: Literal["classification"] = "classification"
    """Which answer is wanted: one of a few classes."""
    prompt: str
    """jinja2 template over the fields of a sample, with ``{{ answer }}`` where the label word goes (at the very end
    for causal models, where the mask token goes for masked models). A field called ``answer`` is ``row.answer``."""
    labels: tuple[Label, ...]
    """The classes, as a list of ``{value: of the label field in the data, word: that stands for it in the prompt}``."""
    plain: tuple[str, ...] = ()
    """One or two jinja2 templates without prompt, for a fresh classification head."""
    label: str = "label"
    """Name of the data's field that holds the label."""
    metric: Metric = "accuracy"
    """Figure of merit, between 0 and 1 (matthews: -1 and 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lines(self, "task.", "label")
        if len(self.labels) < 2:
            raise ValueError("task.labels: a classification task needs at least two labels")
        values = [name for label in self.labels for name in names_of(label.value)]
        for what, names in (("value", values), ("word", [label.word for label in self.labels])):
            if len(set(names)) < len(names):
                raise ValueError(f"task.labels: two labels have the same {what}: {names}")
        if ANSWER not in self.prompt:
            raise ValueError("task.prompt: must contain {{ answer }} where the label word goes")
        if len(self.plain) > TEMPLATE_PARTS:
            raise ValueError("task.plain: give one template, or two for a pair of texts")
        if self.metric == "f1" and len(self.labels) != 2:
            raise ValueError(f"task.metric: f1 is for two classes, this task has {len(self.labels)}; use macro-f1")

    @property
    def templates(self) -> tuple[str, ...]:
        """See `TaskSettings`."""
        return (self.prompt, *self.plain)

    @property
    def fields(self) -> tuple[str, ...]:
        """See `TaskSettings`."""
        return (self.label,)

    @property
    def words(self) -> list[str]:
        """Label words, in class order."""
        return [label.word for label in self.labels]

    @property
    def metric_is_mean(self) -> bool:
        """See `TaskSettings`."""
        return self.metric == "accuracy"

    def check_head(self, head: str) -> None:
        """See `TaskSettings`."""
        if head == "classifier" and not self.plain:
            raise ValueError("task.plain: missing; model.head: classifier needs a text without prompt")
