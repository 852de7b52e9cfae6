"""Templates of prompts: jinja2, cut down to what fills fields into a text.

A task file may come from anybody. So a template can do nothing but print fields, choose between texts and apply the
filters below: no loops, macros, assignments, slices or calls. What it prints is no longer than the template and its
fields make it, and it always ends. Besides jinja2's filters there are those that the papers' prompts need:
`upper_first` and `lower_first` (the first letter), `drop_last` (the last character, or the last few) and `strip_end`
(white space at the end, or an end that is given, as in ``question | strip_end('?')``).
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.filters import do_round
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mezo_dist.errors import UserError
from mezo_dist.tasks.fields import Row, field_names, listed

FILTERS = (
    "abs capitalize default first int float last length lower replace round string striptags title trim truncate upper"
).split()
MOST_DIGITS = 30
"""After (or, if negative, before) the point, that `round` may be asked for: jinja2 computes that power of ten."""
NODES = (
    nodes.Template,
    nodes.Output,
    nodes.TemplateData,
    nodes.If,
    nodes.CondExpr,
    nodes.Name,
    nodes.Const,
    nodes.Getattr,
    nodes.Getitem,
    nodes.Filter,
    nodes.Keyword,
    nodes.Test,
    nodes.Compare,
    nodes.Operand,
    nodes.And,
    nodes.Or,
    nodes.Not,
    nodes.Concat,
    nodes.Add,
    nodes.Sub,
    nodes.Div,
    nodes.FloorDiv,
    nodes.Neg,
    nodes.Pos,
)
"""Elements that a template may consist of."""
TEMPLATE_NAMES = ("self", "super", "loop", "caller", "varargs", "kwargs")
"""Names that may mean something else to jinja2 than a field."""
ROW = "row"
"""The name of the whole row in templates, unless a field is called so."""
LONGEST = 1_000_000
"""Characters that one `replace` may add."""
LONGEST_TEMPLATE, MOST_ELEMENTS = 50_000, 2_000
"""Characters and elements of a template: its compiler takes time that grows with their square."""


def render(template: str, row: Row, values: Mapping[str, object]) -> str:
    """``template`` with fields and values filled in, without space around it.

    Args:
        template: in jinja2, see above.
        row: its fields by name, and itself as ``row``.
        values: further ones by name, which hide fields.

    Raises:
        UserError: the template is wrong, not allowed, or does not fit the values.
    """
    try:
        filled = _joined(template, row, values)
        if filled is None:
            filled = _compiled(template).render({ROW: row, **row, **values})
        return filled.strip()
    except RecursionError as error:
        raise UserError("task template: it is nested too deeply") from error
    except Exception as error:  # a filter may raise whatever it likes, and the template is the user's
        reason = str(error) or type(error).__name__
        raise UserError(
            f"task template {reprlib.repr(template)}: {reason[:300]} (the fields are {listed(field_names(row))})"
        ) from error


def names_in(template: str) -> set[str]:
    """Names of the fields that a template reads, those inside other fields as in ``passage.text``.

    A template that is wrong has none; it is refused when a text is rendered.
    """
    try:
        pending: list[nodes.Node] = [_environment.parse(template[:LONGEST_TEMPLATE])]
    except (jinja2.TemplateSyntaxError, RecursionError):
        return set()
    names = set()
    while pending:
        node = pending.pop()
        path = _path(node)
        if path:
            names.add(".".join(path[1:] if path[0] == ROW and len(path) > 1 else path))
        else:
            pending.extend(node.iter_child_nodes())
    return names


def _path(node: nodes.Node) -> list[str]:
    """``passage.text`` in its parts; empty for what is no name of a field."""
    if isinstance(node, nodes.Name):
        return [node.name]
    if isinstance(node, nodes.Getattr):
        inside, last = _path(node.node), node.attr
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
        inside, last = _path(node.node), node.arg.value
    else:
        return []
    return [*inside, last] if inside else []


def _not_null(value: object) -> object:
    if value is None:
        raise jinja2.UndefinedError("a field that it prints is null")  # else the prompt would say None
    return value


def _replace(text: object, old: object, new: object) -> str:
    """The filter ``replace``, with a bound on the length of its result.

    Args:
        text: where to replace.
        old: what is replaced.
        new: what stands in its place.
    """
    text, old, new = str(text), str(old), str(new)
    if text.count(old) * len(new) > LONGEST:
        raise SecurityError("replace makes the text too long")
    return text.replace(old, new)


def _round(value: Any, precision: object = 0, method: str = "common") -> Any:
    """The filter ``round``, with a bound on its digits.

    Args:
        value: a number.
        precision: digits after the point.
        method: see jinja2.
    """
    if type(precision) is not int or abs(precision) > MOST_DIGITS:
        raise SecurityError(f"round takes a whole number of digits up to {MOST_DIGITS}, not {precision!r}")
    return do_round(value, precision, method)  # type: ignore[arg-type]  # it checks the method itself


def _upper_first(text: Any) -> str:
    return str(text)[:1].upper() + str(text)[1:]


def _lower_first(text: Any) -> str:
    return str(text)[:1].lower() + str(text)[1:]


def _drop_last(text: Any, count: Any = 1) -> str:
    if type(count) is not int or count < 0:
        raise SecurityError(f"drop_last takes a number of characters, not {count!r}")
    return str(text)[: max(0, len(str(text)) - count)]


def _strip_end(text: Any, end: Any = None) -> str:
    return str(text).rstrip() if end is None else str(text).removesuffix(str(end))


def _refusing_null(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, which would make a text such as "none" of null."""
    place = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def checked(*values: Any, **options: Any) -> Any:
        _not_null(values[place])
        return function(*values, **options)

    return checked


class _Environment(ImmutableSandboxedEnvironment):
    """A dot is for fields inside fields: no method of a text, or of a mapping, is ever meant."""

    def getitem(self, obj: Any, argument: Any) -> Any:
        try:
            return obj[argument]
        except (TypeError, LookupError):
            return self.undefined(obj=obj, name=argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self.getitem(obj, attribute)


def _make_environment() -> _Environment:
    environment = _Environment(undefined=jinja2.StrictUndefined, autoescape=False, finalize=_not_null)
    environment.globals.clear()
    filters = {name: environment.filters[name] for name in FILTERS} | {
        "replace": _replace,
        "round": _round,
        "upper_first": _upper_first,
        "lower_first": _lower_first,
        "drop_last": _drop_last,
        "strip_end": _strip_end,
    }
    default = filters.pop("default")  # the one that is for nulls, too
    environment.filters = {name: _refusing_null(function) for name, function in filters.items()} | {"default": default}
    return environment


_environment = _make_environment()


def _joined(template: str, row: Row, values: Mapping[str, object]) -> str | None:
    """What jinja2 makes of a template that only prints texts; None where it has to be asked.

    Such templates are the usual ones, and jinja2 takes five times as long.

    Args:
        template: see `render`.
        row: see `render`.
        values: see `render`.
    """
    pieces = []
    for piece, is_name in _pieces(template):
        if is_name:
            value = values[piece] if piece in values else row.get(piece)
            if type(value) is not str:  # it may have a text of its own, or none
                return None
            pieces.append(value)
        else:
            pieces.append(piece)
    return "".join(pieces) if pieces else None


@functools.lru_cache
def _pieces(template: str) -> tuple[tuple[str, bool], ...]:
    """The texts and names (True) that a template prints one after another; empty if it does anything else."""
    _compiled(template)  # it is allowed
    pieces: list[tuple[str, bool]] = []
    for node in _environment.parse(template).body:
        for part in node.nodes if isinstance(node, nodes.Output) else [node]:
            if isinstance(part, nodes.TemplateData):
                pieces.append((part.data, False))
            elif isinstance(part, nodes.Name) and part.name not in TEMPLATE_NAMES:
                pieces.append((part.name, True))
            else:
                return ()
    return tuple(pieces)


@functools.lru_cache
def _compiled(template: str) -> jinja2.Template:
    if len(template) > LONGEST_TEMPLATE:
        raise SecurityError(f"it is longer than {LONGEST_TEMPLATE} characters")
    pending: list[nodes.Node] = [_environment.parse(template)]
    num_elements = 0
    while pending:
        node = pending.pop()
        num_elements += 1
        if num_elements > MOST_ELEMENTS:
            raise SecurityError(f"it has more than {MOST_ELEMENTS} elements")
        if not isinstance(node, NODES):
            raise SecurityError(f"{type(node).__name__.lower()} is not for templates, which only fill in fields")
        pending.extend(node.iter_child_nodes())
    return _environment.from_string(template)
