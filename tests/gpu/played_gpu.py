"""A GPU that is not there, played on the CPU: it knows shapes, counts what would be launched, and refuses to be waited
for.

Tensors on it are torch's fake tensors on device ``cuda:0``. Everything that runs on tensors in host memory runs for
real. A copy from ordinary host memory to the device, a number read off the device, and any operation whose shape
depends on values there are what makes a host wait in the middle of a step: they raise `Waited`. Copies from pinned
memory, reads of a whole tensor and launches are counted.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mezo_dist.directions import devices
from mezo_dist.directions.kernels import gpu

CUDA = torch.device("cuda:0")
LAUNCHES_NOTHING = {"empty", "empty_strided", "empty_like", "detach", "alias", "new_empty", "new_empty_strided",
                    "lift_fresh", "_reshape_alias", "set_", "resize_", "_unsafe_view", "unfold"}  # fmt: skip


class Waited(AssertionError):
    """The host would wait for the device here."""


@dataclass
class Counts:
    """What was asked of the device."""

    uploads: int = 0
    """Copies from pinned memory."""
    reads: int = 0
    """Tensors that were copied to the host, which waits for them."""
    launches: Counter[str] = field(default_factory=Counter)
    """Kernels, by operation; those of Triton by name."""


class PlayedGpu(TorchDispatchMode):
    """See above."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.counts = Counts()

    def tensor(self, like: Tensor) -> Tensor:
        """A tensor on the device, of the shape of another one."""
        with self.fake:
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=CUDA)

    def move(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        """Let the weights and buffers of a model live on the device, the weights in some dtype."""
        moved: dict[int, Tensor] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in moved:
                        tensor = self.tensor(parameter.data.to(dtype))
                        moved[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
                    module._parameters[name] = moved[id(parameter)]  # type: ignore[assignment]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = moved.setdefault(id(buffer), self.tensor(buffer))

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks for the device of a tensor
            return func(*args, **kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        is_there = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        target = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        name = func._schema.name.removeprefix("aten::")
        if name == "copy_" and isinstance(args[0], FakeTensor) != isinstance(args[1], FakeTensor):
            target = args[0].device
        elif not is_there and (target is None or target.type == "cpu"):
            return func(*args, **kwargs)
        if target is not None and target.type == "cpu":
            return self._read(func, args, kwargs)
        if (not is_there and any(isinstance(leaf, Tensor) for leaf in leaves)) or name == "copy_":
            self._check_upload(name, args, kwargs)
        elif not func.is_view and name not in LAUNCHES_NOTHING:
            self.counts.launches[name] += 1
        try:
            with self.fake:
                return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise Waited(f"{name} reads values off the device in the middle of a step") from error

    def _check_upload(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        source = args[1] if name == "copy_" else args[0]
        if isinstance(source, FakeTensor):
            self.counts.launches[name] += 1
            return
        if not source.numel():
            return
        is_asynchronous = kwargs.get("non_blocking", False) or (name == "copy_" and args[2:3] == (True,))
        if not is_asynchronous or not getattr(source, "is_in_pinned_memory", False):
            raise Waited(f"{name} copies {tuple(source.shape)} to the device, not from pinned memory")
        self.counts.uploads += 1

    def _read(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        self.counts.reads += 1
        with self.fake:
            shape = func(*args, **kwargs)
        return torch.zeros(shape.shape, dtype=shape.dtype)


@contextlib.contextmanager
def played_gpu(monkeypatch: pytest.MonkeyPatch, answer: Callable[[Tensor], Tensor]) -> Iterator[PlayedGpu]:
    """Within, there is a GPU.

    Args:
        monkeypatch: undoes it all.
        answer: what is read off the device by `devices.read`, in place of the zeros that such a tensor has here.
    """
    _guard_like_that_of_meta_tensors(monkeypatch)
    there = PlayedGpu()
    read, data_ptr = devices.read, Tensor.data_ptr

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
        assert all(size < 2**31 for size in grid)
        there.counts.launches[f"triton {kernel.__name__}"] += 1

    def pinned(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        copy.is_in_pinned_memory = True  # type: ignore[attr-defined]
        return copy

    def memory(tensor: Tensor) -> int:
        return 64 * tensor.untyped_storage()._cdata if isinstance(tensor, FakeTensor) else data_ptr(tensor)

    def address(tensor: Tensor) -> int:
        return memory(tensor) + (
            int(tensor.storage_offset()) * tensor.itemsize if isinstance(tensor, FakeTensor) else 0
        )

    def answered(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [answer(tensor) for tensor in read(tensors)]

    monkeypatch.setattr(gpu, "launch", launch)
    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(devices, "stream_of", lambda _: 0)
    monkeypatch.setattr(devices, "address", address)
    monkeypatch.setattr(devices, "memory", memory)
    monkeypatch.setattr(devices, "read", answered)
    for cached in (gpu._half_table, gpu._table, gpu._seeds, gpu._terms):
        cached.cache_clear()
    gpu._workspaces.clear()
    torch._C._set_only_lift_cpu_tensors(
        True
    )  # torch.tensor(..., device=...) makes its tensor on the host, and copies it
    try:
        yield there
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        for cached in (gpu._half_table, gpu._table, gpu._seeds, gpu._terms):
            cached.cache_clear()
        gpu._workspaces.clear()


def _guard_like_that_of_meta_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch without CUDA has nothing that makes a GPU the current one, and some operations on fake tensors ask for it.
    Give it what it has for meta tensors, which does nothing."""
    if torch.version.cuda is not None:
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14
    guards[cuda] = guards[meta]
