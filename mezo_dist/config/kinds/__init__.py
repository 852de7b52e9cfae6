"""The settings of each kind of task (torch-free): what a task file may hold, by its ``kind``.

`mezo_dist.tasks.kinds` has the implementations under the same names.
"""

from __future__ import annotations

from mezo_dist.config.kinds.choice import ChoiceTask
from mezo_dist.config.kinds.classification import ClassificationTask
from mezo_dist.config.kinds.completion import CompletionTask
from mezo_dist.config.kinds.generation import GenerationTask
from mezo_dist.config.kinds.regression import RegressionTask

Task = ClassificationTask | RegressionTask | ChoiceTask | CompletionTask | GenerationTask
"""The settings of a task, of whatever kind."""
KINDS: dict[str, type[Task]] = {
    "classification": ClassificationTask,
    "regression": RegressionTask,
    "choice": ChoiceTask,
    "completion": CompletionTask,
    "generation": GenerationTask,
}
DEFAULT_KIND = "classification"
"""The kind of a task file that names none."""
