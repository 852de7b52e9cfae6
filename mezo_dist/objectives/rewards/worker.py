"""``python -m mezo_dist.objectives.rewards.worker path.py name``: runs a user's reward function, a line at a time.

Reads ``{"row": {...}, "text": "..."}`` from standard input, and writes a number, or ``{"error": "..."}``, for each.
What the function prints goes to standard error.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def main(path: str, name: str) -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # print() must not get in between
    try:
        function = _load(Path(path), name)
    except BaseException as error:  # noqa: BLE001 (the user's code; every question gets the reason)
        reason = f"cannot be loaded: {type(error).__name__}: {error}"
        for _ in sys.stdin:
            answers.write(json.dumps({"error": reason}) + "\n")
        return
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer: object = function(question["row"], question["text"])
            if hasattr(answer, "item"):  # a number of numpy or torch
                answer = answer.item()
            text = json.dumps(answer if isinstance(answer, (bool, int, float)) else {"error": _wrong(answer)})
        except Exception as error:  # noqa: BLE001
            text = json.dumps({"error": f"{type(error).__name__}: {error}"})
        answers.write(text + "\n")


def _wrong(answer: object) -> str:
    return f"it returned {str(answer)[:80]!r}, which is not a number"


def _load(path: Path, name: str) -> Callable[[Mapping[str, Any], str], object]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # as if it had been started from there
    spec.loader.exec_module(module)
    function = getattr(module, name)
    if not callable(function):
        raise TypeError(f"{name} is not a function")
    return function


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
