"""Settings that are names or paths: one line of text (torch-free)."""

from __future__ import annotations

import unicodedata


def check_lines(section: object, prefix: str, *names: str) -> None:
    """Raises ValueError naming the first setting whose text is empty or cannot stand on a line. None is let pass.

    Such text is a name or a path: it is printed, logged and handed to the operating system, and control characters in
    it could do something to a terminal.

    Args:
        section: the dataclass that holds the settings.
        prefix: what stands before their names in a config, such as ``output.``.
        names: of the settings.
    """
    for name in names:
        text = getattr(section, name)
        if text is None:
            continue
        if not text.strip():
            raise ValueError(f"{prefix}{name}: must not be empty")
        bad = [character for character in text if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")]
        if bad:
            raise ValueError(f"{prefix}{name}: must be one line of text without control characters, not {text!r}")
