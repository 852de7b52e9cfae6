"""Weights that a model reads without calling the module that owns them: ``F.conv1d(x, self.conv.weight)``.

While passes run, the parameters of every hooked module are kept in a dict that knows who reads them. The module's own
served forward gets the tensors that were put there for it. Other code of a pass gets a `WeightHandle`, which says what
shape, dtype and device the pass's weight has, and becomes that weight as soon as something is computed with it. So
code that only asks for ``weight.dtype`` costs nothing, and is told the dtype of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mezo_dist.engines.hooked import HookedModule, Weight

NestT = TypeVar("NestT")
Resolve = Callable[[], Tensor]
"""The weight that a handle stands for, as the pass sees it that is running."""
Reader = Callable[[HookedModule, Weight], "Tensor | None"]
"""What code gets that reads a weight of a hooked module; None: what is there."""

_PROPERTIES = "dtype device shape ndim layout requires_grad is_cuda is_cpu is_meta is_sparse is_quantized itemsize"
_METHODS = "size dim numel nelement ndimension element_size is_floating_point is_complex __len__"
_NO_HANDLES = frozenset({Tensor, nn.Parameter, type(None), bool, int, float, str, torch.dtype, torch.device})
"""Types of values that are no handles, and have none inside."""
_DESCRIBING = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES.split()),
    *(getattr(Tensor, name) for name in _METHODS.split()),
    *(getattr(torch, name) for name in ("is_floating_point", "is_complex", "numel")),
}
"""Functions of a tensor that need none of its elements."""


@final
class WeightHandle(Tensor):
    """A weight that is made when it is used; see above."""

    _is_param = True  # isinstance(handle, nn.Parameter)
    _name: str
    _resolve: Resolve
    _value: Tensor | None

    @staticmethod
    def make(weight: Weight, dtype: torch.dtype, device: torch.device, resolve: Resolve) -> WeightHandle:
        """A handle of a weight that has not been made yet.

        Args:
            weight: the weight.
            dtype: of the tensor to come.
            device: of the tensor to come.
            resolve: makes it.
        """
        handle: WeightHandle = Tensor._make_wrapper_subclass(
            WeightHandle, weight.shape, dtype=dtype, device=device, requires_grad=weight.trainable
        )
        handle._name, handle._resolve, handle._value = weight.name, resolve, None
        return handle

    def value(self) -> Tensor:
        """The weight itself. It lives as long as the handle."""
        if self._value is None:
            self._value = self._resolve()
        return self._value

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if func in _DESCRIBING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], WeightHandle) and _writes(name):
            raise NotImplementedError(f"the model's forward pass writes to its weight {args[0]._name} ({name})")
        return func(*resolved(args), **resolved(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: object, types: object, args: object = (), kwargs: object = None
    ) -> NoReturn:
        names = [leaf._name for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, WeightHandle)]
        raise NotImplementedError(f"the model hands {', '.join(names)} to compiled code ({func}) inside a forward pass")


def _writes(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"


def resolved(values: NestT) -> NestT:
    """``values`` (any nest of containers) with weights in place of handles."""
    nest: Any = values
    leaves = nest.values() if type(nest) is dict else nest if type(nest) is tuple else (nest,)
    if _NO_HANDLES.issuperset(map(type, leaves)):  # the arguments of most modules; a nest takes 50 us
        return values
    plain: NestT = pytree.tree_map_only(WeightHandle, WeightHandle.value, values)
    return plain


@final
class InterceptedParameters(dict[str, "nn.Parameter | None"]):
    """The ``_parameters`` of a module while passes run. A pass that puts another weight there is refused, for others
    would compute with it, too (``torch.func.functional_call`` does so); the engine itself writes by `swap`.

    Args:
        owner: the module.
        hooked: the hooked module that its weights belong to.
        read: None for code that is to get what is in the dict; else the handle that it gets.
    """

    def __init__(self, owner: nn.Module, hooked: HookedModule, read: Reader) -> None:
        super().__init__()
        self._owner = owner
        self._hooked = hooked
        self._weights = {weight.attribute: weight for weight in hooked.weights if weight.owner is owner}
        self._read = read

    def put_in(self) -> dict[str, nn.Parameter | None]:
        """Take the place of the owner's dict. Returns what `take_out` needs."""
        attributes = self._owner.__dict__
        before: dict[str, nn.Parameter | None] = attributes["_parameters"]
        dict.update(self, before)
        attributes["_parameters"] = self
        return before

    def take_out(self, before: dict[str, nn.Parameter | None]) -> None:
        """Undo `put_in`. What was put into the module since (sharded layouts do) stays there."""
        dict.update(before, self)
        self._owner.__dict__["_parameters"] = before
        self.clear()

    def __getitem__(self, name: str) -> Any:
        weight = self._weights.get(name)
        handle = None if weight is None else self._read(self._hooked, weight)
        return super().__getitem__(name) if handle is None else handle

    def __setitem__(self, name: str, value: nn.Parameter | None) -> None:
        self._refuse(name)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self._refuse(name)
        super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:
        """See dict."""
        self._refuse(name)
        return super().pop(name, *default)

    def _refuse(self, name: str) -> None:
        weight = self._weights.get(name)
        if weight is not None and self._read(self._hooked, weight) is not None:
            raise NotImplementedError(
                f"the model's forward pass replaces its weight {weight.name} (by functional_call, or an assignment)"
            )

    def get(self, name: str, default: Any = None) -> Any:
        """See dict."""
        try:
            return self[name]
        except KeyError:
            return default

    def items(self) -> Any:
        """See dict; this is what ``module.parameters()`` reads."""
        return {name: self[name] for name in self}.items()

    def values(self) -> Any:
        """See dict."""
        return {name: self[name] for name in self}.values()


def interceptors(hooked: HookedModule, read: Reader) -> list[InterceptedParameters]:
    """What intercepts reads of the parameters of all modules whose weights ``hooked`` has.

    Args:
        hooked: the hooked module.
        read: see `InterceptedParameters`.
    """
    owners = dict.fromkeys(weight.owner for weight in hooked.weights)
    return [InterceptedParameters(owner, hooked, read) for owner in owners]
