"""Parts: tensors that one combination is added to together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


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
    starts: Tensor | None = None
    """For equally long pieces, one after another (rows): int64 [k], index of each one's first element; else None."""

    @property
    def num_rows(self) -> int:
        """Number of pieces."""
        return 1 if self.starts is None else len(self.starts)

    def with_outputs(self, places: Sequence[int]) -> Part:
        """The same with some of the outputs; a part without a list of outputs stays as it is."""
        return replace(self, outputs=tuple(self.outputs[v] for v in places))
