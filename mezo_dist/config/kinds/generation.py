"""Settings of ``task.kind: generation``: texts that the model writes by itself, and what they are worth (torch-free).

prompt: "Question: {{ question }}\\nAnswer:"
completion: " {{ answers[0] }}"
references: answers
stop: ["\\n"]
max_new_tokens: 16
metric: f1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mezo_dist.algorithms.ranges import check_ranges
from mezo_dist.config.lines import check_lines
from mezo_dist.config.task import TaskSettings

GenerationMetric = Literal["exact-match", "f1", "rouge-l", "bleu", "reward"]


@dataclass(frozen=True, kw_only=True)
class GenerationTask(TaskSettings):
    """A text that the model writes after a prompt, token by token.

    Trained on the loss of the completions (``train.objective: loss``), on the metric of what it writes (``metric``), or
    on what a program thinks of that (``reward``).
    """

    kind: Literal["generation"] = "generation"
    """Which answer is wanted: a text that the model writes."""
    prompt: str
    """jinja2 template over the fields of a sample: what the model is given."""
    chat: bool = False
    """The prompt is the user's turn of a conversation, put into the tokenizer's chat template."""
    completion: str = ""
    """jinja2 template: the text that ``train.objective: loss`` trains on. A space between the two stands at its
    start."""
    end: str = ""
    """What the model learns to write after a completion, such as ``"\\n"``, which then belongs into ``stop``, too.
    Empty: its end-of-text token."""
    references: str | None = None
    """Name of the field that holds the right texts: one, or a list of which any will do. Null: the completion."""
    stop: tuple[str, ...] = ()
    """Texts that end what the model writes, and are not part of it. The end-of-text token always does."""
    max_new_tokens: int = 64
    """Tokens that the model writes, at most. The prompt is shortened (``truncate``) so that they fit."""
    temperature: float = 0.0
    """0: the likeliest token is taken, always; penalties, beams and the like in the model's generation_config.json do
    not count. Otherwise tokens are drawn from the softmax of logits / temperature; which ones is a function of
    ``seed``, step and sample, the same for all variants of a step."""
    top_k: int = 0
    """Draw from the likeliest tokens, so many. 0: from all."""
    metric: GenerationMetric = "exact-match"
    """Main figure of merit. ``exact-match`` and ``f1`` (of words) are SQuAD's, the best over the references, and so is
    ``rouge-l``; ``bleu`` is that of all texts together; ``reward`` is what ``train.objective: reward`` gives."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lines(self, "task.", "references")
        check_ranges(self, "task.", max_new_tokens=(1, 100_000), temperature=(0, 1000), top_k=(0, 10**7))
        if not self.prompt:
            raise ValueError("task.prompt: is empty; the model needs something to go on")
        if "" in self.stop:
            raise ValueError("task.stop: an empty text ends everything; leave it out")
        if self.end and not any(stop in self.end for stop in self.stop):
            raise ValueError(f"task.end: {self.end!r} does not end what the model writes; put it into task.stop")
        if self.top_k and not self.temperature:
            raise ValueError("task.top_k: nothing is drawn at task.temperature 0; set a temperature, or leave it out")
        if not self.completion and self.references is None and self.metric != "reward":
            raise ValueError(
                f"task.metric: {self.metric} compares with right texts: give task.references or task.completion, or "
                "choose task.metric: reward"
            )

    @property
    def templates(self) -> tuple[str, ...]:
        """See `TaskSettings`."""
        return (self.prompt, self.completion)

    @property
    def fields(self) -> tuple[str, ...]:
        """See `TaskSettings`."""
        return () if self.references is None else (self.references,)

    @property
    def metric_is_mean(self) -> bool:
        """See `TaskSettings`."""
        return self.metric != "bleu"

    def check_objective(self) -> None:
        """See `TaskSettings`."""
        if self.metric == "reward":
            raise ValueError("train.objective: metric cannot be task.metric: reward; set train.objective: reward")
