"""Settings of ``task.kind: choice``: one of several texts that could continue a prompt (torch-free).

prompt: "{{ premise }} {{ 'because' if question == 'cause' else 'so' }} {{ answer }}"
options: ["{{ choice1 }}", "{{ choice2 }}"]
label: label
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mezo_dist.config.lines import check_lines
from mezo_dist.config.task import ANSWER, TaskSettings
from mezo_dist.config.values import names_of


@dataclass(frozen=True, kw_only=True)
class ChoiceTask(TaskSettings):
    """One of several options, which are texts of any length after a prompt: the likeliest one is chosen.

    A causal language model gives every option the log-probabilities of its tokens; an option's score is made of them
    as ``normalise`` says. Every option is a row of its own in a forward pass, so that a micro-batch of
    ``train.micro_batch`` samples has that many times the options in rows.
    """

    kind: Literal["choice"] = "choice"
    """Which answer is wanted: one of several texts."""
    prompt: str
    """jinja2 template over the fields of a sample, with ``{{ answer }}`` at its end, where the option goes."""
    options: tuple[str, ...] = ()
    """The options of every sample, as jinja2 templates over its fields, or as plain texts."""
    options_field: str | None = None
    """Name of a field that holds the options of a sample as a list, in place of ``options``. Samples may have
    different numbers of them."""
    option: str = ""
    """With ``options_field``: jinja2 template of one option, over the fields of the sample and ``{{ option }}``, what
    the list holds. Empty: that itself."""
    label: str = "label"
    """Name of the data's field that says which option is right: by its number (the first is 0), by its text, or by
    one of ``labels``. A list names several: the loss is that of the first, and a prediction may be any of them."""
    labels: tuple[bool | int | str, ...] = ()
    """Values of the label field that stand for the options, in their order, such as ``[A, B, C, D]``."""
    labels_field: str | None = None
    """Name of a field that holds such values as a list, in place of ``labels``. It may be ``options_field``: then an
    option goes by what the list holds, and not by its number."""
    normalise: Literal["mean", "sum", "bytes"] = "mean"
    """What an option's log-probabilities become: their ``mean`` over its tokens, their ``sum``, or that divided by the
    ``bytes`` of its text, which does not depend on the tokenizer."""
    loss: Literal["choice", "lm"] = "choice"
    """``choice``: cross-entropy of the right option among the scores of all; ``lm``: the language-model loss of the
    right option alone, averaged over tokens (as MeZO trains COPA)."""
    metric: Literal["accuracy"] = "accuracy"
    """Figure of merit, between 0 and 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lines(self, "task.", "label", "options_field", "labels_field")
        if ANSWER not in self.prompt:
            raise ValueError("task.prompt: must contain {{ answer }} where the option goes")
        if bool(self.options) == (self.options_field is not None):
            raise ValueError("task.options: give the options there, or task.options_field; one of the two")
        if self.option and self.options_field is None:
            raise ValueError("task.option: is for the options of task.options_field; leave it out")
        if self.options and len(self.options) < 2:
            raise ValueError("task.options: a choice needs at least two options")
        if self.labels and self.labels_field is not None:
            raise ValueError("task.labels: give the values there, or task.labels_field; one of the two")
        if self.options and self.labels and len(self.labels) != len(self.options):
            raise ValueError(f"task.labels: {len(self.labels)} values for {len(self.options)} options")
        for what, names in (
            ("options", list(self.options)),
            ("labels", [name for value in self.labels for name in names_of(value)]),
        ):
            if len(set(names)) < len(names):
                raise ValueError(f"task.{what}: two of them are the same: {names}")

    @property
    def templates(self) -> tuple[str, ...]:
        """See `TaskSettings`."""
        return (self.prompt, *self.options, self.option)

    @property
    def fields(self) -> tuple[str, ...]:
        """See `TaskSettings`."""
        return tuple(name for name in (self.label, self.options_field, self.labels_field) if name is not None)

    @property
    def words(self) -> list[str]:
        """The options, if all samples have the same ones."""
        return [] if any("{" in option for option in self.options) else list(self.options)

    @property
    def metric_is_mean(self) -> bool:
        """See `TaskSettings`."""
        return True

    def check_calibration(self) -> None:
        """See `TaskSettings`."""
        super().check_calibration()
        if self.loss == "lm":
            raise ValueError("train.calibrate: changes the scores of all options, and task.loss: lm looks at one")
