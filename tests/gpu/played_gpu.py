"""A GPU that is not there, played on the CPU: it computes, counts what would be launched, and refuses to be waited for.

Tensors on it say that they are on device ``cuda:0`` and keep their elements in host memory, where every operation on
them is computed; the fused kernels are counted, and what they would give is computed by those of the CPU. So a whole
run has the values that it has on the CPU. A copy from ordinary host memory to the device, a number read off the device,
and any operation whose shape depends on values there are what makes a host wait in the middle of a step: they raise
`Waited`, except where waiting is allowed (`PlayedGpu.waiting`). Copies from pinned memory, reads of a whole tensor and
launches are counted. A tensor in host memory beside one on the device is refused, as torch refuses it.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - imports ask for GPUs, and remember the answer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from mezo_dist.directions import devices, lowrank
from mezo_dist.directions.bits import RADEMACHER, BitLayout
from mezo_dist.directions.kernels import gpu, gpu_inputs
from mezo_dist.directions.law import Law
from mezo_dist.directions.parts import Part

CUDA = torch.device("cuda:0")
LAUNCHES_NOTHING = {"empty", "empty_strided", "empty_like", "detach", "alias", "new_empty", "new_empty_strided",
                    "lift_fresh", "_reshape_alias", "set_", "resize_", "_unsafe_view", "unfold"}  # fmt: skip
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}


class Waited(AssertionError):
    """The host would wait for the device here."""


@dataclass
class Counts:
    """What was asked of the device."""

    uploads: int = 0
    """Copies from pinned memory."""
    reads: int = 0
    """Tensors that were copied to the host, which waits for them."""
    waits: int = 0
    """Other waits, where they are allowed."""
    mask_looks: int = 0
    """transformers asks whether a mask has no padding, once per forward pass: a wait that is not ours."""
    buffers: int = 0
    """Buffers that code of mezo_dist allocated there, by `torch.empty` and its like."""
    launches: Counter[str] = field(default_factory=Counter)
    """Kernels, by operation; those of Triton by name."""


class DeviceTensor(Tensor):
    """A tensor on the device that is not there."""

    there: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(there: Tensor) -> DeviceTensor:
        """A tensor on the device with the elements of one in host memory."""
        there = there.detach()
        tensor: DeviceTensor = Tensor._make_wrapper_subclass(
            DeviceTensor,
            there.shape,
            strides=there.stride(),
            storage_offset=there.storage_offset(),
            dtype=there.dtype,
            device=CUDA,
        )
        tensor.there = there
        return tensor

    @property
    def data(self) -> Tensor:
        """Assigning to it is no operation that could be seen otherwise."""
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        assert isinstance(other, DeviceTensor)
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.there = other.there

    def tolist(self) -> Any:
        """torch does not send this through dispatch."""
        assert PlayedGpu.current is not None
        PlayedGpu.current.wait("tolist reads values off the device in the middle of a step")
        return self.there.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert PlayedGpu.current is not None
        return PlayedGpu.current.run(func, args, kwargs or {})


class PlayedGpu(TorchDispatchMode):
    """See above."""

    current: ClassVar[PlayedGpu | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.may_wait = False

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, waits are counted, and are no error."""
        before, self.may_wait = self.may_wait, True
        try:
            with self:
                yield
        finally:
            self.may_wait = before

    def move(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Let the weights and buffers of a model live on the device, the weights in some dtype."""
        moved: dict[int, Tensor] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and not isinstance(parameter.data, DeviceTensor):
                    if id(parameter) not in moved:
                        tensor = DeviceTensor.of(parameter.data.to(dtype or parameter.dtype))
                        moved[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
                    module._parameters[name] = moved[id(parameter)]  # type: ignore[assignment]
            for name, buffer in module._buffers.items():
                if buffer is not None and not isinstance(buffer, DeviceTensor):
                    module._buffers[name] = moved.setdefault(id(buffer), DeviceTensor.of(buffer))
        return model

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Any operation of torch."""
        leaves = _leaves(args, kwargs)
        on_device = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
        device = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        if func.namespace == "prim" or (not on_device and (device is None or device.type != "cuda")):
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        self.counts.buffers += "empty" in name and _is_ours(sys._getframe())
        if name == "_fused_sdp_choice":
            return SDPBackend.MATH.value  # as below, where torch has no CUDA to choose for
        if (device is not None and device.type == "cpu") or (name == "copy_" and not isinstance(args[0], DeviceTensor)):
            self.counts.reads += 1
        else:
            self._check(func, name, args, kwargs)
        return self._compute(func, args, kwargs, to_host=device is not None and device.type == "cpu")

    def _check(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count what an operation launches, or raise `Waited` if the host would wait for it."""
        if _by_mask(name, args) if name in INDEXING else WAITING.intersection(func.tags):
            self.wait(f"{name} reads values off the device in the middle of a step")
            return
        tensors = [leaf for leaf in _leaves(args, kwargs) if isinstance(leaf, Tensor)]
        away = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor) and tensor.numel()]
        if name in ("copy_", "_to_copy", "lift_fresh") and not any(isinstance(t, DeviceTensor) for t in tensors[-1:]):
            if not away:
                return
            is_asynchronous = kwargs.get("non_blocking", False) or (name == "copy_" and args[2:3] == (True,))
            if not is_asynchronous or not getattr(away[0], "is_in_pinned_memory", False):
                self.wait(f"{name} copies {tuple(away[0].shape)} to the device, not from pinned memory")
            else:
                self.counts.uploads += 1
            return
        if name in INDEXING and away:
            self.wait(f"{name} takes indices {tuple(away[-1].shape)} from the host")
        elif any(tensor.dim() for tensor in away):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        if not func.is_view and name not in LAUNCHES_NOTHING:
            self.counts.launches[name] += 1

    def wait(self, what: str) -> None:
        """The host waits for the device.

        Raises:
            Waited: it must not.
        """
        frame: Any = sys._getframe()
        while frame is not None:
            if frame.f_code.co_filename.endswith("transformers/masking_utils.py"):
                self.counts.mask_looks += 1
                return
            frame = frame.f_back
        if not self.may_wait:
            raise Waited(what)
        self.counts.waits += 1

    @staticmethod
    def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, to_host: bool) -> Any:
        """The operation on the elements. What it writes to in place is what it gives."""
        known: dict[int, Tensor] = {}

        def there(leaf: Any) -> Any:
            if isinstance(leaf, DeviceTensor):
                known[id(leaf.there)] = leaf
                return leaf.there
            if isinstance(leaf, torch.device):
                return torch.device("cpu")
            if isinstance(leaf, Tensor):
                known[id(leaf)] = leaf
            return leaf

        result = func(*(_map(there, arg) for arg in args), **{key: _map(there, arg) for key, arg in kwargs.items()})
        if to_host:  # a copy, as from another memory
            return result.clone()

        def here(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) in known and func._schema.is_mutable:
                assert leaf.shape == known[id(leaf)].shape
                return known[id(leaf)]
            return DeviceTensor.of(leaf.clone() if id(leaf) in known else leaf)

        return _map(here, result)


def _is_ours(frame: Any) -> bool:
    """Whether the code that calls torch here is mezo_dist's."""
    while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return "/mezo_dist/" in frame.f_code.co_filename


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments of an operation, those in lists one by one."""
    several = [arg if isinstance(arg, list | tuple) else [arg] for arg in (*args, *kwargs.values())]
    return [leaf for some in several for leaf in some]


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """A function of a value, or of each in a list."""
    return type(value)(map(function, value)) if isinstance(value, list | tuple) else function(value)


def _by_mask(name: str, args: tuple[Any, ...]) -> bool:
    """Boolean indices: how many elements there are depends on values."""
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])


@contextlib.contextmanager
def played_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedGpu]:
    """Within, there is a GPU, for code that runs in ``with gpu``.

    Args:
        monkeypatch: undoes it all.
    """
    there = PlayedGpu()
    data_ptr = Tensor.data_ptr

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
        assert all(size < 2**31 for size in grid)
        there.counts.launches[f"triton {kernel.__name__}"] += 1

    def pinned(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        copy.is_in_pinned_memory = True  # type: ignore[attr-defined]
        return copy

    monkeypatch.setattr(gpu, "launch", launch)
    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    monkeypatch.setattr(devices, "stream_of", lambda _: 0)
    monkeypatch.setattr(devices, "address", lambda tensor: data_ptr(_on_host(tensor)))
    monkeypatch.setattr(devices, "memory", lambda tensor: _on_host(tensor).untyped_storage().data_ptr())
    for name, value in _runtime().items():
        monkeypatch.setattr(torch.cuda, name, value)
    real_to = nn.Module.to

    def to(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return there.move(model) if args[:1] == (CUDA,) else real_to(model, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", to)
    _let_kernels_compute(monkeypatch)
    _forget()
    # torch.tensor(..., device=...) makes its tensor on the host, and copies it
    torch._C._set_only_lift_cpu_tensors(True)
    monkeypatch.setattr(PlayedGpu, "current", there)
    try:
        # attention by its definition: torch with CUDA otherwise chooses kernels that the CPU does not have
        with _guard_like_that_of_meta_tensors(), sdpa_kernel(SDPBackend.MATH):
            yield there
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        _forget()


def _runtime() -> dict[str, Any]:
    """What is asked of torch.cuda."""
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device_of": lambda _: contextlib.nullcontext(),
        "mem_get_info": lambda: (2**36, 2**36),
        "get_device_properties": lambda device: SimpleNamespace(uuid="played", major=9, minor=0),
        "get_device_capability": lambda *_: (9, 0),
        "max_memory_allocated": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "synchronize": lambda *_: None,
        "_lazy_init": lambda: None,
    }


def _forget() -> None:
    for cached in (gpu_inputs.half_table, gpu_inputs.table_of, gpu_inputs.seeds_table, gpu_inputs.terms_table):
        cached.cache_clear()
    gpu_inputs.workspaces.clear()


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.there if isinstance(tensor, DeviceTensor) else tensor


def _part_on_host(part: Part) -> Part:
    rows = None if part.rows is None else _on_host(part.rows)
    return replace(part, weight=_on_host(part.weight), outputs=tuple(map(_on_host, part.outputs)), rows=rows)


def _let_kernels_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """After what kernels launch was counted, the CPU's compute what these would give. (Products of thin factors have
    other last bits on a real GPU.)"""

    def law_of(bits: BitLayout) -> Law:
        return Law("rademacher" if bits is RADEMACHER else "gaussian")

    def advance_lowrank(parts: Sequence[Part], updates: Sequence[Any], *, rank: int) -> None:
        for part in parts:
            for combination, seed in updates:
                lowrank.add_lowrank(part, [combination], rank, seed)

    def add_lowrank(parts: Sequence[Part], sums: Sequence[Any], *, rank: int, rounding_seed: int | None) -> None:
        for part in parts:
            lowrank.add_lowrank(part, sums, rank, rounding_seed)

    computed: dict[str, Callable[..., Any]] = {
        "add_parts": lambda parts, sums, bits, **options: law_of(bits).add_parts(parts, sums, **options),
        "advance_parts": lambda parts, updates, bits: law_of(bits).advance_parts(parts, updates),
        "scale_parts": lambda parts, factor, **options: Law("gaussian").scale_parts(parts, factor, **options),
        "add_lowrank": add_lowrank,
        "advance_lowrank": advance_lowrank,
    }

    def with_values(launching: Callable[..., Any], compute: Callable[..., Any]) -> Callable[..., None]:
        def both(parts: Sequence[Part], *args: Any, **options: Any) -> None:
            launching(parts, *args, **options)
            compute([_part_on_host(part) for part in parts], *args, **options)

        return both

    for name, compute in computed.items():
        monkeypatch.setattr(gpu, name, with_values(getattr(gpu, name), compute))

    fill, factors, directions = gpu.fill, gpu.factors, gpu.directions

    def fill_too(bits: BitLayout, seeds: Sequence[int], param_id: int, size: int, device: torch.device) -> Tensor:
        values = fill(bits, seeds, param_id, size, device)
        _on_host(values).copy_(lowrank.fill(bits, seeds, param_id, 0, size))
        return values

    def factors_too(rank: int, seeds: Sequence[int], param_id: int, shape: torch.Size, device: torch.device) -> Any:
        pair = factors(rank, seeds, param_id, shape, device)
        for factor, values in zip(pair, lowrank.factors(rank, seeds, param_id, shape), strict=True):
            _on_host(factor).copy_(values)
        return pair

    def directions_too(rank: int, seeds: Sequence[int], weights: Sequence[Any], device: torch.device) -> Any:
        together = directions(rank, seeds, weights, device)
        of_cpu = Law("lowrank", rank).directions(seeds, weights)
        for some, values in zip(together, of_cpu, strict=True):
            for tensor, value in zip(some, values, strict=True):
                _on_host(tensor).copy_(value)
        return together

    monkeypatch.setattr(gpu, "directions", directions_too)
    monkeypatch.setattr(gpu, "fill", fill_too)
    monkeypatch.setattr(gpu, "factors", factors_too)


@contextlib.contextmanager
def _guard_like_that_of_meta_tensors() -> Iterator[None]:
    """Some operations make a GPU the current one. torch without CUDA has nothing to do that with, and torch with CUDA
    asks for a driver: give it what it has for meta tensors, which does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14
    before, guards[cuda] = guards[cuda], guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before
