"""The shape of a model: its weights, in the units in which sharded layouts gather them, and the sizes of its layers.

This is all that the cost model knows of a model. `mezo_dist.planning.families` makes shapes of a config.json by
formulas; `mezo_dist.planning.instantiated` asks transformers for any other model.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

ModuleKind = Literal["linear", "embedding", "vector", "experts", "other"]


@dataclass(frozen=True)
class WeightShape:
    """One parameter. Tied weights have one name, and stand in several modules."""

    name: str
    """Canonical, as the model's ``named_parameters()`` yields it."""
    shape: tuple[int, ...]
    trainable: bool = True

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModuleShape:
    """A hooked module: variants of its weights are made together."""

    kind: ModuleKind
    weights: tuple[WeightShape, ...]

    @property
    def size(self) -> int:
        """Elements of all its weights."""
        return sum(weight.size for weight in self.weights)


@dataclass(frozen=True)
class UnitShape:
    """Modules whose weights are gathered together."""

    modules: tuple[ModuleShape, ...]
    stays: bool = False
    """Used at several ends of the model (tied weights): once gathered it stays whole until the pass ends."""
    is_block: bool = False

    @cached_property
    def weights(self) -> tuple[WeightShape, ...]:
        """Each weight once."""
        return tuple({w.name: w for module in self.modules for w in module.weights}.values())


def widest_layer(units: Iterable[UnitShape], hidden: int) -> int:
    """The widest output of a layer inside a block, as which `ModelShape.inner` counts where no config says it;
    ``hidden`` if there is none.

    Args:
        units: of the model.
        hidden: features of the residual stream.
    """
    blocks = (unit for unit in units if len(unit.modules) > 1 and not unit.stays)
    matrices = (w for unit in blocks for module in unit.modules for w in module.weights if len(w.shape) >= 2)
    return max((w.shape[-2] for w in matrices), default=hidden)


@dataclass(frozen=True)
class ModelShape:
    """A decoder (or any other) model, as far as its costs go."""

    name: str
    units: tuple[UnitShape, ...]
    """In the order of the model's modules."""
    hidden: int
    """Features of the residual stream."""
    inner: int
    """Features inside the feed-forward part (of one expert, if there are several)."""
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    window: int
    """Longest sequence, in tokens."""
    experts: int = 1
    active_experts: int = 1
    """Experts that a token goes through."""
    shared_inner: int = 0
    """Features inside experts that every token goes through, beside those that are chosen."""
    block_kind: Literal["gated", "plain", "unknown"] = "unknown"
    """``gated``: gate and up projections with rotary positions (Llama); ``plain``: two layers and learned positions
    (OPT); ``unknown``: what a waiting pass holds is an upper estimate."""
    is_dense_everywhere: bool = True
    """No block has experts."""

    @cached_property
    def weights(self) -> tuple[WeightShape, ...]:
        """All weights, each once."""
        return tuple(weight for unit in self.units for weight in unit.weights)

    @property
    def size(self) -> int:
        """Number of weights: all experts, tied ones once."""
        return sum(weight.size for weight in self.weights)

    @property
    def num_trainable(self) -> int:
        """Number of trainable weights."""
        return sum(weight.size for weight in self.weights if weight.trainable)

    @property
    def active_size(self) -> int:
        """Weights that a token is multiplied with: of experts the active ones, of embeddings none but a tied or own
        output head."""
        return sum(size for size, _ in self.matrices())

    def matrices(self) -> Iterator[tuple[int, bool]]:
        """Active elements of every matrix that tokens are multiplied with, and whether it is the output head."""
        for unit in self.units:
            for module in unit.modules:
                for weight in module.weights:
                    is_matrix = len(weight.shape) >= 2 and module.kind in ("linear", "experts")
                    share = self.active_experts / self.experts if module.kind == "experts" else 1.0
                    if is_matrix:
                        yield round(weight.size * share), not unit.is_block and self.vocabulary in weight.shape

    def trained(self, trainable: tuple[str, ...], freeze: tuple[str, ...] = ()) -> ModelShape:
        """The same model, of which only the weights matching ``trainable`` and not ``freeze`` are trained
        (``model.trainable``, ``model.freeze``)."""

        def chosen(weight: WeightShape) -> WeightShape:
            is_chosen = any(fnmatch.fnmatchcase(weight.name, pattern) for pattern in trainable)
            is_frozen = any(fnmatch.fnmatchcase(weight.name, pattern) for pattern in freeze)
            return replace(weight, trainable=is_chosen and not is_frozen)

        units = tuple(
            replace(unit, modules=tuple(replace(m, weights=tuple(map(chosen, m.weights))) for m in unit.modules))
            for unit in self.units
        )
        return replace(self, units=units)
