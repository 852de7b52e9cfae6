"""Settings of ``task.kind: regression``: a number, such as how alike two sentences are (torch-free).

plain: ["{{ sentence1 }}", "{{ sentence2 }}"]
label: score
metric: pearson
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mezo_dist.config.lines import check_lines
from mezo_dist.config.task import TEMPLATE_PARTS, TaskSettings


@dataclass(frozen=True, kw_only=True)
class RegressionTask(TaskSettings):
    """A number, by a fresh head of one output (``model.head: classifier``). The loss is the squared error."""

    kind: Literal["regression"] = "regression"
    """Which answer is wanted: a number."""
    plain: tuple[str, ...]
    """One or two jinja2 templates, for a text or a pair of texts."""
    label: str = "label"
    """Name of the data's field that holds the number."""
    metric: Literal["pearson", "spearman"] = "pearson"
    """Figure of merit: correlation of predictions and numbers, from -1 to 1. Both are reported."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lines(self, "task.", "label")
        if not 1 <= len(self.plain) <= TEMPLATE_PARTS:
            raise ValueError("task.plain: give one template, or two for a pair of texts")

    @property
    def templates(self) -> tuple[str, ...]:
        """See `TaskSettings`."""
        return self.plain

    @property
    def fields(self) -> tuple[str, ...]:
        """See `TaskSettings`."""
        return (self.label,)

    def check_head(self, head: str) -> None:
        """See `TaskSettings`."""
        if head != "classifier":
            raise ValueError("model.head: task.kind: regression needs a fresh head: model.head: classifier")
