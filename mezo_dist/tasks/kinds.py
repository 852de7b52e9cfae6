"""The kinds of tasks that there are: settings -> implementation. A new kind is a line here, and a folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mezo_dist.config.kinds import Task
from mezo_dist.config.kinds.choice import ChoiceTask
from mezo_dist.config.kinds.classification import ClassificationTask
from mezo_dist.config.kinds.completion import CompletionTask
from mezo_dist.config.kinds.generation import GenerationTask
from mezo_dist.config.kinds.regression import RegressionTask
from mezo_dist.tasks.choice.kind import Choice
from mezo_dist.tasks.classification.kind import classification
from mezo_dist.tasks.completion.kind import Completion
from mezo_dist.tasks.fields import Row
from mezo_dist.tasks.generation.kind import Generation
from mezo_dist.tasks.kind import TaskKind, TextModel
from mezo_dist.tasks.regression.kind import Regression

KINDS: dict[type[Task], Callable[[Any, TextModel, Row], TaskKind]] = {
    ClassificationTask: classification,
    RegressionTask: Regression.of,
    ChoiceTask: Choice.of,
    CompletionTask: Completion.of,
    GenerationTask: Generation.of,
}


def kind_of(task: Task, model: TextModel, first_row: Row) -> TaskKind:
    """The kind of task that ``task`` has the settings of.

    Args:
        task: the settings.
        model: what reads the texts.
        first_row: of the training split.

    Raises:
        UserError: the model cannot do such tasks.
    """
    return KINDS[type(task)](task, model, first_row)
