"""The options of a row, and which of them is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mezo_dist.config.kinds.choice import ChoiceTask
from mezo_dist.config.values import names_of
from mezo_dist.errors import UserError
from mezo_dist.tasks.continuation import all_continued, before_answer
from mezo_dist.tasks.fields import Row, listed, lookup, shown
from mezo_dist.tasks.text import TextEncoder, render_row


@dataclass(frozen=True)
class Sample:
    """One encoded sample."""

    options: tuple[tuple[int, ...], ...]
    """Token ids of the prompt with each option."""
    starts: tuple[int, ...]
    """Index of the first token of each option."""
    sizes: tuple[int, ...]
    """Bytes of each option's text."""
    label: int
    """The option whose loss counts."""
    right: tuple[int, ...]
    """The options that are right, the label among them."""

    @property
    def num_tokens(self) -> int:
        """Length of the longest sequence."""
        return max(map(len, self.options))

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """See `mezo_dist.tasks.batches.Sample`."""
        return self.options


@dataclass(frozen=True)
class EncodedOptions:
    """A prompt with each of several options."""

    options: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def __len__(self) -> int:
        return max(map(len, self.options))


def options_of(task: ChoiceTask, row: Row) -> list[str]:
    """The options of a row, as texts.

    Raises:
        UserError: the field that should hold them is not a list of at least two texts.
    """
    if task.options_field is None:
        return [render_row(option, row) for option in task.options]
    values = _list_in(row, task.options_field, "task.options_field")
    return [render_row(task.option, row, option=option) if task.option else str(option) for option in values]


def right_options(task: ChoiceTask, row: Row, options: Sequence[str]) -> tuple[int, ...]:
    """Which options are right: the row's label is the number of one, its text, the value that stands for it, or a list
    of these, of which some may name no option.

    Args:
        task: the settings.
        row: by field.
        options: texts.

    Raises:
        UserError: it is none of them.
    """
    value = lookup(row, task.label, "task.label")
    if task.labels_field is not None:
        known = [names_of(name) for name in _list_in(row, task.labels_field, "task.labels_field")]
    elif task.labels:
        known = [names_of(name) for name in task.labels]
    else:
        known = [(str(number), text) for number, text in enumerate(options)]
    wanted = value if isinstance(value, list) else [value]
    named = [_named(one, known[: len(options)]) for one in wanted]
    right = list(dict.fromkeys(place for places in named for place in places))
    # In a list, texts may be there twice; what is the number of one option and the text of another is still in doubt.
    in_doubt = any(len({options[place] for place in places}) > 1 for places in named)
    if not right or in_doubt or (len(right) > 1 and not isinstance(value, list)):
        reason = "stands for several of them" if right else "names none of them"
        raise UserError(
            f"task.label: the label is {shown(wanted)[1:-1]}, which {reason}: {listed(names[0] for names in known)} "
            f"(options {listed(options)}); set task.labels, or leave such rows out with task.where"
        )
    return tuple(right)


def _named(value: object, known: Sequence[Sequence[str]]) -> list[int]:
    """Places of the options that a label names: those with one of its names among theirs."""
    names = names_of(value)
    return [place for place, others in enumerate(known) if any(name in others for name in names)]


def encode_options(texts: TextEncoder, prompt: str, options: Sequence[str], row: Row) -> EncodedOptions:
    """The tokens of a prompt with each option. An option's tokens are those after what it shares with the prompt.

    Args:
        texts: the tokenizer.
        prompt: template.
        options: texts.
        row: by field.

    Raises:
        UserError: an option has no tokens, or nothing stands before it.
    """
    before = before_answer(prompt, row)
    encoded = all_continued(texts, before, options)
    for option, sequence in zip(options, encoded, strict=True):
        if not sequence.start:
            raise UserError("task.prompt: no token stands before {{ answer }}, so that nothing predicts the options")
        if sequence.start == len(sequence):
            raise UserError(f"task.options: the option {option!r:.100} has no tokens after this prompt")
    sizes = tuple(len(option.encode()) for option in options)
    return EncodedOptions(tuple(e.ids for e in encoded), tuple(e.start for e in encoded), sizes)


def _list_in(row: Row, name: str, setting: str) -> list[object]:
    values = lookup(row, name, setting)
    if not isinstance(values, list) or len(values) < 2 or any(isinstance(v, dict | list) or v is None for v in values):
        raise UserError(f"{setting}: the field {name!r} must be a list of at least two texts, not {values!r:.100}")
    return values
