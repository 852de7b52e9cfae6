"""Parts: tensors that one combination is added to together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, final

import torch
from torch import Tensor

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, eq=False)
class Part:
    """A parameter, a shard of it or some of its rows, and where sums of it and combinations go."""

    weight: Tensor
    """fp32, bf16 or fp16, contiguous."""
    outputs: tuple[Tensor, ...]
    """One per combination, with as many elements each; or the weight itself, where it is changed in place."""
    param_id: int
    """See `mezo_dist.directions.seeds.param_id`."""
    shape: torch.Size
    """The whole parameter's."""
    offset: int = 0
    """Index of a shard's first element in the flattened parameter."""
    rows: Tensor | None = None
    """int64 [k]: the rows of the parameter that ``weight`` holds, one after another; None: a shard, or all."""

    @property
    def columns(self) -> int:
        """Elements of a row of the parameter: all dimensions after the first."""
        return math.prod(self.shape[1:])

    @property
    def num_pieces(self) -> int:
        """Pieces of the flattened parameter that ``weight`` consists of, all as long: a shard, or rows."""
        return 1 if self.rows is None else len(self.rows)

    def with_outputs(self, places: Sequence[int]) -> Part:
        """The same with some of the outputs; a part without a list of outputs stays as it is."""
        return replace(self, outputs=tuple(self.outputs[v] for v in places))


@final
class KeptParts(tuple[Part, ...]):
    """Parts that are worked on again and again, while all of their tensors stay where they are: what is found out about
    them is remembered with them (`remembered`)."""

    _known: dict[object, Any]

    def __new__(cls, parts: Iterable[Part]) -> KeptParts:
        kept = super().__new__(cls, parts)
        kept._known = {}
        return kept


def remembered(parts: Sequence[Part], key: object, find_out: Callable[[], ResultT]) -> ResultT:
    """What ``find_out`` gives; of parts that are kept, what it gave when it was called first.

    Args:
        parts: what it is about.
        key: what it is, of all that is remembered of ``parts``.
        find_out: finds it out.
    """
    if not isinstance(parts, KeptParts):
        return find_out()
    if key not in parts._known:
        parts._known[key] = find_out()
    result: ResultT = parts._known[key]
    return result


def kept_as(parts: Sequence[Part], some: Sequence[Part]) -> Sequence[Part]:
    """``some`` of ``parts``, kept if these are."""
    return KeptParts(some) if isinstance(parts, KeptParts) else some
