"""The filters of templates, and what a template sees of a row."""

from __future__ import annotations

from typing import Any

import pytest
from markupsafe import Markup

from mezo_dist.errors import UserError
from mezo_dist.tasks import templates
from mezo_dist.tasks.text import render_row


@pytest.mark.parametrize(
    ("template", "value", "expected"),
    [
        ("{{ x | upper_first }}", "is it McDonald", "Is it McDonald"),
        ("{{ x | lower_first }}", "The USA", "the USA"),
        ("{{ x | upper_first }}|", "", "|"),
        ("{{ x | drop_last }}?", "It rains.", "It rains?"),
        ("{{ x | drop_last(3) }}", "It rains...", "It rains"),
        ("{{ x | drop_last(0) }}", "It", "It"),
        ("{{ x | drop_last(9) }}|", "It", "|"),
        ("{{ x | drop_last }}|", "", "|"),
        ("{{ x | strip_end('?') }}?", "is it", "is it?"),
        ("{{ x | strip_end('?') }}?", "is it?", "is it?"),
        ("{{ x | strip_end }}?", "is it \n", "is it?"),
        ("{{ x | strip_end('.') }}", "no...", "no.."),
        ("{{ x | lower_first | drop_last }}", "Two.", "two"),
        ("{{ x | default('no text', true) }}", None, "no text"),
        ("{{ x.y.z }}", {"y": {"z": "deep"}}, "deep"),
        ("{{ x.items }}", {"items": "an item"}, "an item"),
        ("{{ row.x }}", "by row", "by row"),
        ("{{ row['x'] }}", "by name", "by name"),
    ],
)
def test_filters_and_fields(template: str, value: Any, expected: str) -> None:
    assert render_row(template, {"x": value}) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ x[1:] }}", "slice is not for templates"),
        ("{{ x | drop_last(-1) }}", "drop_last takes a number of characters, not -1"),
        ("{{ x | drop_last('1') }}", "drop_last takes a number of characters, not '1'"),
        ("{{ none_here | lower }}", "a field that it prints is null"),
        ("{{ none_here | upper_first }}", "a field that it prints is null"),
        ("{{ none_here | first }}", "a field that it prints is null"),
        ("{{ x.upper }}", "has no attribute 'upper'"),
        ("{{ nested.items }}", "has no attribute 'items' (the fields are ['nested.y', 'none_here', 'x'])"),
    ],
)
def test_what_is_refused(template: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        render_row(template, {"x": "a text", "none_here": None, "nested": {"y": "z"}})
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ x }} It was {{ answer }}",
        "  {{ y }}\n{{ x }}\n",
        "{# nothing #}{{ x }}",
        "a\n  {{- x -}}  b",
        "{{ 'x' }}{{ x }}",
        "{{ x }}{% if y %}!{% endif %}",
        "{{ row }}",
        "{{ row.x }}",
        "{{ self }}",
        "{{ loop }}",
        "{{ missing }}",
        "no field",
        "",
    ],
)
def test_texts_are_put_together_as_jinja2_does(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [
        {"x": "a text", "y": " "},
        {"x": "{{ y }}", "y": "\n"},
        {"x": None, "y": "y"},
        {"x": 3, "y": 0.5},
        {"x": ["a"], "y": True, "self": "itself", "loop": "l"},
        {"x": Markup("<b>"), "y": "&", "row": "a field"},
    ]
    said: list[list[str]] = []
    for _ in range(2):
        said.append([])
        for row in rows:
            try:
                said[-1].append(render_row(template, row, answer="good"))
            except UserError as error:
                said[-1].append(str(error))
        monkeypatch.setattr(templates, "_joined", lambda *_: None)
    assert said[0] == said[1]


def test_usual_templates_need_no_jinja2(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ x }}. It was {{ answer }}"
    render_row(template, {"x": "a text"}, answer="good")
    monkeypatch.setattr(templates._compiled(template), "render", None)
    assert render_row(template, {"x": "other"}, answer="bad") == "other. It was bad"


def test_a_field_that_the_answer_hides_and_one_called_row() -> None:
    assert render_row("{{ answer }}, {{ row.answer }}", {"answer": "yes"}, answer="SLOT") == "SLOT, yes"
    assert render_row("{{ row }}", {"row": "a field"}) == "a field"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ " + "~".join(["x"] * 3000) + " }}", "it has more than 2000 elements"),
        ("y" * 60_000, "it is longer than 50000 characters"),
    ],
)
def test_templates_that_would_take_minutes_to_compile(template: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        render_row(template, {"x": "a text"})
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 500
