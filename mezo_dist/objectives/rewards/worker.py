"""``python -m mezo_dist.objectives.rewards.worker PARENT path.py name``: runs a reward function, a line at a time.

(``PARENT -- COMMAND ...`` runs a program instead.) Both end with the process PARENT, which asks them.

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

from mezo_dist.child_process import die_with

READY = "ready"
"""What the worker says, in place of an answer, once the function is loaded."""


def main(path: str, name: str) -> None:
    """Answer until standard input ends."""
    process = os.getpid()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # print() must not get in between
    try:
        function = _load(Path(path), name)
    except BaseException as error:  # noqa: BLE001 (the user's code)
        answers.write(json.dumps({"error": f"cannot be loaded: {type(error).__name__}: {error}"}) + "\n")
        return
    answers.write(json.dumps(READY) + "\n")
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer: object = function(question["row"], question["text"])
            if hasattr(answer, "item"):  # a number of numpy or torch
                answer = answer.item()
            text = json.dumps(answer if isinstance(answer, (bool, int, float)) else {"error": _wrong(answer)})
        except Exception as error:  # noqa: BLE001
            text = json.dumps({"error": f"{type(error).__name__}: {error}"})
        if os.getpid() != process:  # the function forked: the child's answer is not ours
            os._exit(0)
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
    die_with(int(sys.argv[1]))
    if sys.argv[2] == "--":
        os.execvp(sys.argv[3], sys.argv[3:])
    main(sys.argv[2], sys.argv[3])
