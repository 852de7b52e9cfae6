"""The messages of the probe: the weights that cause a fault, and the settings that help, as the caller calls them."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mezo_dist.distributed.communicator import OutOfStepError
from mezo_dist.engines.engine import Engine
from mezo_dist.errors import LostRankError, UserError

MOST_NAMES = 3
"""Weights that a message names."""
_OF_DTYPES = re.compile("dtype|scalar type|BFloat16|Half")
"""What torch says where tensors of different dtypes meet."""


@dataclass(frozen=True)
class SettingNames:
    """What the caller of the probe calls its settings. The defaults are those of a config."""

    model: str = "model.name"
    """The model itself."""
    compute: str = "model.compute"
    """The dtype of the forward pass."""
    freeze: str = "leave them out: model.freeze: {}"
    """How to leave weights out; with their names, as JSON, in place of the braces."""
    weights: str = "set model.weights: {}"
    """How to choose the dtype of the weights; with its name in place of the braces."""
    hint: str = ""
    """A sentence at the end of every message."""

    def error(self, setting: str, text: str) -> UserError:
        """The error that names ``setting``."""
        return UserError(f"{setting}: {text}" + (f"\n({self.hint})" if self.hint else ""))

    def leave_out(self, names: Sequence[str]) -> str:
        """The advice to leave out the weights ``names``."""
        return self.freeze.format(json.dumps(list(names[:MOST_NAMES])))


CONFIG_NAMES = SettingNames()


def some_of(names: Sequence[str]) -> str:
    """The first of some names, and the number of the others."""
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).partition("\n")[0]


def narrowed(names: Sequence[str], is_wrong: Callable[[Sequence[str]], bool]) -> list[str]:
    """The smallest set of weights that is wrong, by halving."""
    while len(names) > 1:
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        wrong = next((half for half in halves if is_wrong(half)), None)
        if wrong is None:
            break
        names = wrong
    return list(names)


@contextlib.contextmanager
def failures_explained(engine: Engine, names: SettingNames = CONFIG_NAMES) -> Iterator[None]:
    """Within, what model code raises because of the engine, and not on ordinary weights, becomes a UserError."""
    try:
        yield
    except NotImplementedError as error:
        raise names.error(names.model, f"this model cannot be trained here: {first_line(error)}") from error
    except RuntimeError as error:
        if isinstance(error, (OutOfStepError, LostRankError, torch.OutOfMemoryError)):
            raise
        if engine.compute_dtype is None:
            dtypes = {str(p.dtype).removeprefix("torch.") for p in engine.model.parameters()} - {"float32"}
            if not dtypes or not _OF_DTYPES.search(str(error)):
                raise
            kinds = ", ".join(sorted(dtypes))
            raise names.error(
                "model.weights", f"the model's code fails on weights in {kinds} ({first_line(error)}); use float32"
            ) from error
        dtype = str(engine.compute_dtype).removeprefix("torch.")
        raise names.error(
            names.compute,
            f"the model's code fails on weights that are cast to {dtype} ({first_line(error)}); leave it out, or "
            f"{names.weights.format(dtype)}",
        ) from error
