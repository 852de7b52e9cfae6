"""What pages of reports share: the template that they extend, and values as short texts."""

from __future__ import annotations

from importlib import resources

import jinja2

from mezo_dist.monitoring.plots import shortened

LONGEST_VALUE = 200


def fill(template: str, **values: object) -> str:
    """A page from a template in this folder: one file, which loads nothing from elsewhere.

    Every text is escaped but the plots (``safe`` in the templates): matplotlib writes those, and escapes names in them.
    """
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(
            lambda name: resources.files("mezo_dist.monitoring").joinpath(name).read_text(encoding="utf-8")
        ),
    )
    return environment.get_template(template).render(**values)


def in_short(value: object) -> str:
    """A JSON value in a few words, however deep, long or large it is."""
    if isinstance(value, str):
        return shortened(value, LONGEST_VALUE)
    if isinstance(value, (list, dict)):
        return f"{len(value):,} {'values' if isinstance(value, list) else 'settings'}"
    if type(value) is int and abs(value) >= 10**18:
        return "a number of more than 18 digits"
    return "?" if value is None else str(value)
