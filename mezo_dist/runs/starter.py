"""The files that ``mezo-dist init`` writes: a task and a config for a model and a data set, with comments.

What can be found out is found out: fields, classes, splits, lengths in tokens. The rest has the values that the studies
recommend, and a comment that says what to look at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mezo_dist.config.schema import ModelConfig
from mezo_dist.config.task import ANSWER
from mezo_dist.errors import UserError
from mezo_dist.models.load import load_tokenizer, norms_and_window
from mezo_dist.tasks.fields import Row, keys_of, lookup
from mezo_dist.tasks.guess import Guess, guess
from mezo_dist.tasks.rows import load_tables
from mezo_dist.tasks.templates import ROW

LOOKED_AT = 2000
"""Training rows that are looked at, at most."""
MOST_TRAIN, MOST_VALIDATION, MOST_TEST = 10_000, 256, 1000
"""Samples of splits that have to be cut from one source, at most."""
WINDOW = 256
"""Tokens of a piece of a document, or as many as the model takes."""
ROUND_TO = 16
"""Lengths in tokens are rounded up to a multiple of this."""
JINJA_WORDS = ("and", "else", "false", "if", "in", "is", "none", "not", "or", "true", "False", "None", "True")
"""What is no field in a template."""
VALIDATION_NAMES = ("validation", "valid", "dev", "val")


def write_starter(
    data: str, model: str, folder: Path, *, name: str | None = None, subset: str | None = None
) -> list[Path]:
    """Write ``NAME-task.yaml`` and ``NAME.yaml``.

    Args:
        data: as ``task.data``; a relative path starts at the current folder.
        model: as ``model.name``.
        folder: where to write; it is made if need be.
        name: of the task; by default, that of the data.
        subset: as ``task.subset``.

    Returns:
        The two files, the config last.

    Raises:
        UserError: data or model cannot be read, no field holds texts, or a file is already there.
    """
    tables = load_tables(data, subset)
    name = name or Path(data.removeprefix("demo:").rstrip("/")).stem
    files = [folder / f"{name}-task.yaml", folder / f"{name}.yaml"]
    for file in files:
        if file.exists():
            raise UserError(f"{file} exists; choose another --name or --to")
    train = next((source for source in ("train", "all") if source in tables), next(iter(tables)))
    rows = tables[train].take(range(min(LOOKED_AT, len(tables[train]))))
    if not rows:
        raise UserError(f"{data}: its split {train!r} has no rows")
    looks_like = guess(rows)
    tokenizer = load_tokenizer(ModelConfig(model))

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    source = {"name": name, "data": _from(folder, data), **({"subset": subset} if subset else {})}
    texts = [_filled(looks_like, row) for row in rows]
    tokens = sorted(map(length, texts))
    split_lines = _splits({split: len(table) for split, table in tables.items()}, train)
    patterns, window = norms_and_window(ModelConfig(model), tokenizer)
    long_words = [word for word in _words(looks_like).values() if length(f" {word}") > 1]
    task = [f"# Written by mezo-dist init, from {len(rows)} rows of {data}. How the model gets them:",
            f"#   mezo-dist tasks show {files[0]} --model={model}",
            *(f"{key}: {_quoted(value)}" for key, value in source.items()),
            *split_lines, *_fields(looks_like, rows[0], long_words, min(WINDOW, window))]  # fmt: skip
    config = _config(name, _from(folder, model), patterns or ["*"], looks_like, files[1], tokens)
    folder.mkdir(parents=True, exist_ok=True)
    for file, lines in zip(files, (task, config), strict=True):
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def _from(folder: Path, name: str) -> str:
    """A path as a file in ``folder`` has to say it; a name that is no path as it is."""
    path = Path(name).expanduser()
    return name if path.is_absolute() or not path.exists() else os.path.relpath(path, folder)


def _quoted(value: object) -> str:
    """A value as YAML; JSON is YAML, too."""
    return json.dumps(value, ensure_ascii=False)


def _filled(looks_like: Guess, row: Row) -> str:
    """About the text that a sample will be."""
    names = [*looks_like.texts, looks_like.answer, looks_like.conversation]
    return "\n".join(str(lookup(row, name, "the data")) for name in names if name)


def _splits(sizes: Mapping[str, int], train: str) -> list[str]:
    """The section ``splits``: the data's own, or pieces of one.

    Args:
        sizes: rows of every split of the data.
        train: the one to train on.
    """
    validation = next((name for name in VALIDATION_NAMES if name in sizes), None)
    test = "test" if "test" in sizes else None
    cut = [None if validation else "validation", None if test else "test"]
    left, lines = sizes[train], []
    wanted = {"validation": min(MOST_VALIDATION, left // 5), "test": min(MOST_TEST, left // 5)}
    left -= sum(wanted[name] for name in cut if name)
    if min([left, *(wanted[name] for name in cut if name)]) < 1:
        raise UserError(f"{sizes[train]} rows are too few to cut train, validation and test from them")
    train_size = f", size: {min(MOST_TRAIN, left)}" if any(cut) or left > MOST_TRAIN else ""
    lines += ["splits:", f"  train: {{source: {_quoted(train)}{train_size}}}"]
    for name, there, most in (("validation", validation, MOST_VALIDATION), ("test", test, MOST_TEST)):
        size = wanted[name] if there is None else min(most, sizes[there])
        why = "  # settings are chosen on these" if name == "validation" else "  # looked at once, at the end"
        lines.append(f"  {name}: {{source: {_quoted(there or train)}, size: {size}}}{why}")
    return lines


def _words(looks_like: Guess) -> dict[bool | int | str, str]:
    """Class -> the word that stands for it."""
    plain = {True: "yes", False: "no"}
    return {
        value: looks_like.names.get(value) or (plain[value] if isinstance(value, bool) else str(value))
        for value in looks_like.classes
    }


def _slot(row: Row, name: str) -> str:
    """Where a template prints a field: ``{{ text }}``, or ``{{ row["Review Text"] }}`` where the name is no word.

    Args:
        row: of the data.
        name: of the field.
    """
    keys = keys_of(row, name, "the data")
    if keys[0] not in (ANSWER, ROW) and all(key.isidentifier() and key not in JINJA_WORDS for key in keys):
        return f"{{{{ {name} }}}}"
    return f"{{{{ {ROW}{''.join(f'[{_quoted(key)}]' for key in keys)} }}}}"


def _fields(looks_like: Guess, row: Row, long_words: Sequence[str], window: int) -> list[str]:
    """What the task file says of fields.

    Args:
        looks_like: kind and fields.
        row: of the data.
        long_words: label words that are several tokens.
        window: tokens of a piece of a document.
    """
    texts = "\n".join(_slot(row, name) for name in looks_like.texts)
    answer = _slot(row, looks_like.answer) if looks_like.answer else ""
    shortened = f"truncate: {_quoted(list(looks_like.texts))}  # fields that are shortened where a text is too long"
    if looks_like.kind == "classification":
        words = _words(looks_like)
        about = "# The words that the model is to answer with: best what a person would write there"
        if long_words:
            about += f"; {', '.join(map(_quoted, long_words[:5]))} are several tokens, single ones are faster"
        if all(word.lstrip("-").isdigit() for word in words.values()):
            about += "; numbers tell it little, write what they mean"
        gaps = [f"where: {{drop: {{{_quoted(looks_like.answer)}: [null]}}}}"] if looks_like.has_gaps else []
        question = keys_of(row, looks_like.answer or "", "the data")[-1]
        return ["kind: classification", f"prompt: {_quoted(f'{texts}{chr(10)}{question}: {{{{ answer }}}}')}",
                f"label: {_quoted(looks_like.answer)}", *gaps, about + ".", "labels:",
                *(f"  - {{value: {_quoted(value)}, word: {_quoted(word)}}}" for value, word in words.items()),
                shortened, "metric: accuracy"]  # fmt: skip
    if looks_like.conversation:
        return [
            "kind: completion",
            f"messages: {_quoted(looks_like.conversation)}  # the loss is that of the assistant's turns",
        ]
    if not looks_like.texts:
        return ["kind: completion", "# No prompt: the loss is that of the whole text.",
                f"completion: {_quoted(answer)}",
                f"window: {window}  # documents are cut into windows of so many tokens"]  # fmt: skip
    return ["kind: completion", f"prompt: {_quoted(f'{texts}{chr(10)}')}",
            f"completion: {_quoted(answer)}", shortened]  # fmt: skip


def _config(
    name: str, model: str, patterns: Sequence[str], looks_like: Guess, file: Path, tokens: Sequence[int]
) -> list[str]:
    """Lines of the config.

    Args:
        name: of the task.
        model: its name.
        patterns: of the weights that are trained.
        looks_like: kind and fields.
        file: where it will stand.
        tokens: lengths of texts, sorted.
    """
    most = -(-tokens[int(0.99 * (len(tokens) - 1))] // ROUND_TO) * ROUND_TO + ROUND_TO
    has_window = looks_like.kind == "completion" and not looks_like.texts and not looks_like.conversation
    steps = ["  # Losses without the model's preference for some classes: far less noise (docs/algorithms.md).",
             "  calibrate: true"] if looks_like.kind == "classification" else []  # fmt: skip
    length = (
        []
        if has_window
        else [f"  max_tokens: {most}  # 99 of 100 texts are shorter (median {tokens[len(tokens) // 2]})"]
    )
    return [f"# Written by mezo-dist init.  mezo-dist train {file}",
            "model:", f"  name: {_quoted(model)}",
            "  # Few weights learn fastest: the noise of a step grows with their number. All of them: leave this out;",
            "  # LoRA: model.peft.method.",
            f"  trainable: {_quoted(list(patterns))}",
            f"task: {_quoted(name + '-task.yaml')}",
            "algorithm: {name: mezo, directions: 7, one_sided: true, eps: 0.01, lr: auto}",
            "train:", *steps, "  steps: 1000", "  batch_size: 16", "  micro_batch: 8", *length,
            f"output: {{dir: {_quoted('runs/' + name)}}}"]  # fmt: skip
