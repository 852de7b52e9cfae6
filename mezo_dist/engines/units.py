"""Units: the parts of a model whose weights are gathered together.

Every transformer block is a unit, and so is every remaining module that owns weights. Modules that share a tied weight
(an embedding and the output head) are one unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from mezo_dist.engines.hooked import HookedModule, find_hooked_modules
from mezo_dist.errors import UserError


@dataclass(frozen=True, eq=False)
class Unit:
    """Modules whose weights are gathered together."""

    name: str
    modules: tuple[nn.Module, ...]
    """The modules that an engine gathers together: a block, a module, or several that share weights; none lies inside
    another."""
    hooked_modules: tuple[HookedModule, ...]
    """Where its weights are used."""
    stays: bool
    """Used at several ends of the model (tied weights): once gathered it stays whole until the pass ends."""


def find_units(model: nn.Module, block_classes: Sequence[str] = (), *, whole_blocks: bool = False) -> list[Unit]:
    """All units of ``model``, in its order of modules. Every parameter belongs to exactly one.

    Args:
        model: any module, not sharded yet.
        block_classes: names of the classes of its blocks. If there are none, the model's own ``_no_split_modules``
            names them; failing that, they are the members of the largest ``nn.ModuleList`` of modules of one class.
        whole_blocks: a block is one hooked module, with all of its weights.

    Raises:
        UserError: no module is of one of ``block_classes``.
    """
    blocks = find_blocks(model, block_classes)
    block_of = {inner: block for block in blocks for inner in block.modules()}
    groups: dict[nn.Module, list[HookedModule]] = {}
    for hooked in find_hooked_modules(model, include_frozen=True, whole=set(blocks) if whole_blocks else ()):
        groups.setdefault(block_of.get(hooked.module, hooked.module), []).append(hooked)
    return [_unit(modules, [s for m in modules for s in groups[m]]) for modules in _join_tied(groups)]


def _unit(modules: Sequence[nn.Module], hooked_modules: Sequence[HookedModule]) -> Unit:
    ordered = tuple(sorted(hooked_modules, key=lambda hooked: hooked.order))
    inside = {inner for module in modules for inner in module.modules() if inner is not module}
    roots = tuple(module for module in modules if module not in inside)
    return Unit(ordered[0].name, roots, ordered, stays=len(modules) > 1)


def _join_tied(groups: dict[nn.Module, list[HookedModule]]) -> list[list[nn.Module]]:
    """The keys of ``groups``, those together whose hooked modules share a weight."""
    joined: list[tuple[list[nn.Module], set[str]]] = []
    for module, hooked_modules in groups.items():
        modules, names = [module], {weight.name for hooked in hooked_modules for weight in hooked.weights}
        for other in [group for group in joined if group[1] & names]:
            joined.remove(other)
            modules, names = other[0] + modules, other[1] | names
        joined.append((modules, names))
    return sorted((modules for modules, _ in joined), key=lambda modules: min(groups[m][0].order for m in modules))


def find_blocks(model: nn.Module, classes: Iterable[str] = ()) -> list[nn.Module]:
    """The blocks of ``model``, by the rule of `find_units`; of blocks inside others only the outermost."""
    blocks = _of_class(model, set(classes))
    if classes and not blocks:
        raise UserError(f"layout.blocks: no module of the model is a {' or '.join(classes)}; see print(model)")
    blocks = blocks or _of_class(model, set(getattr(model, "_no_split_modules", None) or ()))
    if not blocks:
        lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(b) for b in m}) == 1]
        blocks = max(lists, key=_num_weights, default=[])
    inside = {inner for block in blocks for inner in block.modules() if inner is not block}
    return [block for block in blocks if block not in inside]


def _of_class(model: nn.Module, classes: set[str]) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ in classes]


def _num_weights(blocks: list[nn.Module]) -> int:
    return sum(p.numel() for block in blocks for p in block.parameters())
