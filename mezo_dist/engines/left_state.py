"""What a forward pass leaves behind on a model's modules: recurrent states, caches, lengths."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.utils import _pytree as pytree


@contextlib.contextmanager
def states_left(model: nn.Module) -> Iterator[set[str]]:
    """Within, the set is empty; afterwards it has ``module.attribute`` of all that was assigned to a module, and of
    every tensor on it (a buffer, or in a list, tuple or dict) that is new or was written to.

    Assignments count even where the value stays the same: passes in lock step would read one another's.
    """
    left: set[str] = set()
    before = {key: (tensor, _version(tensor)) for key, tensor in _tensors(model)}
    names = {module: name for name, module in model.named_modules()}
    assign = nn.Module.__setattr__

    def record(module: nn.Module, attribute: str, value: Tensor | nn.Module) -> None:
        if module in names and attribute != "forward":  # the engine's doing
            left.add(_joined(names[module], attribute))
        assign(module, attribute, value)

    nn.Module.__setattr__ = record  # type: ignore[method-assign, assignment]
    try:
        yield left
    finally:
        nn.Module.__setattr__ = assign  # type: ignore[method-assign]
    for key, tensor in _tensors(model):
        known, version = before.get(key, (None, 0))
        if known is not tensor or version != _version(tensor):
            left.add(_joined(*key[:2]))


def _joined(module: str, attribute: str) -> str:
    return f"{module}.{attribute}" if module else attribute


def _tensors(model: nn.Module) -> Iterator[tuple[tuple[str, str, int], Tensor]]:
    for name, module in model.named_modules():
        for attribute, value in _attributes(module):
            if isinstance(value, (Tensor, list, tuple, dict)):
                leaves = (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
                yield from (((name, attribute, place), leaf) for place, leaf in enumerate(leaves))


def _attributes(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Buffers, and what hangs on the module itself; not its weights, modules and hooks."""
    yield from module._buffers.items()
    yield from ((name, value) for name, value in vars(module).items() if name not in _INNER)


_INNER = frozenset(vars(nn.Module()))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
