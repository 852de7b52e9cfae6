"""Hooked modules: the places in a model where weights are used, found without knowing the model's class.

A hooked module is a module together with the weights that are materialised when its forward runs: usually one linear,
norm or embedding module. Variants are materialised one hooked module at a time, just before they are used. So the
scratch is as small as the largest hooked module, and still in the cache when the matrix product reads it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mezo_dist.directions.seeds import param_ids
from mezo_dist.errors import UserError

OPAQUE = (nn.TransformerEncoderLayer,)
"""Modules that own no weights but may compute with those of inner modules without calling them (torch's fast path)."""


@dataclass(frozen=True, eq=False)
class Weight:
    """One parameter as one module uses it. Tied weights have one `name` and several `Weight` objects."""

    owner: nn.Module
    attribute: str
    name: str
    """Canonical: the first name under which ``model.named_parameters()`` yields the tensor."""
    param_id: int
    shape: torch.Size
    """Shape of the full parameter."""
    trainable: bool

    @property
    def tensor(self) -> nn.Parameter:
        """The tensor that the module uses at the moment. It is looked up every time, for layouts put shards and
        gathered weights there in turn (and a reference kept here would keep the memory of the whole model)."""
        # A plain dict's lookup, also while passes run and reads are intercepted (`mezo_dist.engines.lockstep.reads`).
        tensor = dict.__getitem__(self.owner._parameters, self.attribute)
        assert tensor is not None
        return tensor


@dataclass(frozen=True, eq=False)
class HookedModule:
    """A module and the weights that its forward pass uses."""

    name: str
    module: nn.Module
    kind: type[nn.Module]
    """The module's own class: FSDP2 puts modules into classes of its own later."""
    weights: tuple[Weight, ...]
    order: int
    """Place in the model's order of modules."""
    spans_blocks: bool
    """The module owns weights and also contains blocks that are hooked modules of their own."""

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Of the weights."""
        return frozenset(weight.name for weight in self.weights)

    @functools.cached_property
    def attributes(self) -> tuple[str, ...]:
        """Under which the owners of the weights have them."""
        return tuple(weight.attribute for weight in self.weights)

    @functools.cached_property
    def owner(self) -> nn.Module | None:
        """The module that owns all of the weights, if it is one."""
        owners = {weight.owner for weight in self.weights}
        return owners.pop() if len(owners) == 1 else None


def find_hooked_modules(
    model: nn.Module, *, include_frozen: bool, whole: Collection[nn.Module] = ()
) -> list[HookedModule]:
    """All hooked modules of ``model``, in its order of modules.

    A module that owns weights is a hooked module. If modules inside it own weights too, the whole subtree is one hooked
    module, because its code may use the inner weights directly (``nn.MultiheadAttention`` does). In two cases the inner
    modules are hooked modules themselves, and the outer one has only the weights that it owns: the subtree holds a list
    of blocks, or the outer weights are all tied to inner ones (BERT's head and the bias of the linear layer in it).

    Args:
        model: any module, not wrapped yet.
        include_frozen: also modules without trainable weights (needed when all weights are cast for the forward).
        whole: modules that are hooked modules with all weights inside of them, whatever these are (compiled blocks).
    """
    scripted = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        raise UserError(
            f"model.name: {scripted[0] or 'the model'} is TorchScript, whose use of weights cannot be followed; leave "
            "torch.jit.script out"
        )
    weights = _weights_by_module(model)
    hooked_modules: list[HookedModule] = []

    def visit(module: nn.Module, path: str) -> None:
        direct = weights.get(module, ())
        inner = [w for m in module.modules() if m is not module for w in weights.get(m, ())]
        spans = (
            module not in whole
            and bool(direct and inner)
            and (
                any(isinstance(m, nn.ModuleList) for m in module.modules())
                or {w.name for w in direct} <= {w.name for w in inner}
            )
        )
        is_hooked = bool(direct) or isinstance(module, OPAQUE) or module in whole
        if is_hooked:
            used = direct if spans else (*direct, *inner)
            if include_frozen or any(w.trainable for w in used):
                hooked_modules.append(HookedModule(path, module, type(module), used, len(hooked_modules), spans))
        if spans or not is_hooked:
            for child_name, child in module.named_children():
                visit(child, f"{path}.{child_name}" if path else child_name)

    visit(model, "")
    seen: set[int] = set()  # a module object that is reachable by two paths is one hooked module
    return [hooked for hooked in hooked_modules if id(hooked.module) not in seen and not seen.add(id(hooked.module))]  # type: ignore[func-returns-value]


def _weights_by_module(model: nn.Module) -> dict[nn.Module, tuple[Weight, ...]]:
    name_of = {id(tensor): name for name, tensor in model.named_parameters()}
    ids = param_ids(name_of.values())
    return {
        module: tuple(
            Weight(module, attribute, name_of[id(p)], ids[name_of[id(p)]], p.shape, p.requires_grad)
            for attribute, p in direct
        )
        for module in model.modules()
        if (direct := [(a, p) for a, p in module._parameters.items() if p is not None])
    }


def as_parameter(weight: Weight, tensor: Tensor) -> nn.Parameter:
    """``tensor`` as its module expects it. (Some kernels are chosen by requires_grad, so that stays as it was.)"""
    if type(tensor) is nn.Parameter or isinstance(tensor, nn.Parameter):  # what `isinstance` asks takes longer
        return tensor
    return nn.Parameter(tensor, requires_grad=weight.trainable)


def swap(weights: tuple[Weight, ...], tensors: Sequence[Tensor]) -> list[nn.Parameter]:
    """Make the modules use ``tensors`` in place of their weights (no copy, nothing is written). Returns these."""
    before = [weight.tensor for weight in weights]
    for weight, tensor in zip(weights, tensors, strict=True):
        # passes may not write there, see `reads`
        dict.__setitem__(weight.owner._parameters, weight.attribute, as_parameter(weight, tensor))
    return before


@contextlib.contextmanager
def swapped(weights: tuple[Weight, ...], tensors: Sequence[Tensor]) -> Iterator[None]:
    """`swap` within a ``with`` block."""
    before = swap(weights, tensors)
    try:
        yield
    finally:
        swap(weights, before)
