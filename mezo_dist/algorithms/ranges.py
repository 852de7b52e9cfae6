"""Ranges of settings: what lies outside is refused by name, before any memory is asked for (torch-free)."""

from __future__ import annotations

MANY = 10**9
"""More steps, samples or tokens than any run has: a larger number is a slip, or meant to exhaust the memory."""


def check_ranges(section: object, prefix: str = "", **ranges: tuple[float, float]) -> None:
    """Check settings against their ranges. None, which says that a setting is off, is let pass.

    Args:
        section: the dataclass that holds the settings.
        prefix: what stands before their names in a config, such as ``train.``; empty for a section that stands in
            several places, of which the reader of configs knows the right one.
        ranges: setting -> smallest and largest value.

    Raises:
        ValueError: a value lies outside, or is not a number; the message names the setting.
    """
    for name, (least, most) in ranges.items():
        value = getattr(section, name)
        if value is None or least <= value <= most:
            continue
        limit = f"most {most:,}" if value > most else f"least {least:,}"
        raise ValueError(f"{prefix}{name}: must be at {limit}, not {value}")
