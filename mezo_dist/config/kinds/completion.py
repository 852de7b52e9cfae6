"""Settings of ``task.kind: completion``: instruction tuning and language modelling (torch-free).

prompt: "Question: {{ question }}\\nAnswer:"
completion: " {{ answer }}"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mezo_dist.algorithms.ranges import MANY, check_ranges
from mezo_dist.config.lines import check_lines
from mezo_dist.config.task import TaskSettings


@dataclass(frozen=True, kw_only=True)
class CompletionTask(TaskSettings):
    """A text that the model is to write: after a prompt, as the assistant of a conversation, or a whole document.

    The loss is the mean over all target tokens of a batch, so that long completions count more than short ones.
    """

    kind: Literal["completion"] = "completion"
    """Which answer is wanted: a text."""
    prompt: str = ""
    """jinja2 template over the fields of a sample: what the model is given. Empty: nothing, and the loss is that of the
    whole text (language modelling)."""
    completion: str = ""
    """jinja2 template: what it is to write next. A space between the two stands at its start."""
    chat: bool = False
    """The two templates are a turn of the user's and one of the assistant's, put into the tokenizer's chat template."""
    messages: str | None = None
    """Name of a field that holds a conversation, in place of the two templates: a list of ``{role, content}``. The
    tokenizer's chat template makes a text of it, and the loss is that of the assistant's turns."""
    window: int | None = None
    """With an empty prompt: cut documents into windows of so many tokens, one after another, each of which is a sample.
    Null: a document is a sample, shortened as ``truncate`` says."""
    end: bool = True
    """The model is to write its end-of-text token after the text. (In a conversation, the chat template says so.)"""
    metric: Literal["token-accuracy", "perplexity"] = "token-accuracy"
    """Main figure of merit; both are reported. ``token-accuracy``: share of target tokens that are the likeliest one
    there; ``perplexity``: e to the loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lines(self, "task.", "messages")
        check_ranges(self, "task.", window=(2, MANY))
        if bool(self.completion) == (self.messages is not None):
            raise ValueError("task.completion: give the template there, or task.messages; one of the two")
        if self.messages is not None and self.prompt:
            raise ValueError("task.prompt: the prompts of task.messages are in the conversation; leave it out")
        if self.chat and not self.prompt:
            raise ValueError("task.chat: needs task.prompt, the user's turn (in task.messages the turns are said)")
        if self.window is not None and (self.prompt or self.messages is not None):
            raise ValueError("task.window: cuts whole documents, which have no task.prompt and no task.messages")

    @property
    def templates(self) -> tuple[str, ...]:
        """See `TaskSettings`."""
        return (self.prompt, self.completion)

    @property
    def fields(self) -> tuple[str, ...]:
        """See `TaskSettings`."""
        return () if self.messages is None else (self.messages,)

    @property
    def rows_are_samples(self) -> bool:
        """See `TaskSettings`."""
        return self.window is None

    def check_objective(self) -> None:
        """See `TaskSettings`."""
        if self.metric == "perplexity":
            raise ValueError(
                "train.objective: metric needs one of which more is better, and perplexity is what the loss is made "
                "of; choose task.metric: token-accuracy"
            )
