"""Layout `fsdp`: weights are sharded by torch's FSDP2, along their first dimension.

FSDP2 gathers a module when its forward begins and frees it when that ends. Here many forward passes share one gather,
so units are gathered and freed by its explicit `unshard` and `reshard`, and its own forward hooks are taken off (there
is no public way to have none).
"""

from __future__ import annotations

import collections
import contextlib
import graphlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.hooked import Weight
from mezo_dist.engines.layouts.base import Shard, exchange_contents
from mezo_dist.engines.layouts.library_hooks import LibraryHooks
from mezo_dist.engines.units import Unit, find_units
from mezo_dist.errors import UserError


@final
class Fsdp:
    """See `mezo_dist.engines.layouts.base.Layout`.

    The ranks form a mesh ``replicate`` x ``shard``: every group of ``world_size / replicate`` ranks holds one copy of
    the weights, sharded. Weights on the meta device get memory for their shards alone, to be filled through `shards`.

    Args:
        model: is sharded in place; its weights are registered as DTensors from now on.
        comm: the ranks.
        replicate: copies of the weights.
        block_classes: see `find_units`.
        gather_dtype: floating-point weights are cast to it before they are gathered; as they are if None.
        offload: shards live in host memory and are copied to the device to be gathered.

    Raises:
        UserError: ``replicate`` does not divide the number of ranks.
    """

    is_sharded = True

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        *,
        replicate: int = 1,
        block_classes: Sequence[str] = (),
        gather_dtype: torch.dtype | None = None,
        offload: bool = False,
    ) -> None:
        if comm.world_size % replicate:
            raise UserError(f"layout.replicate: {replicate} copies cannot be made on {comm.world_size} process(es)")
        comm.ensure_group()
        self.units = find_units(model, block_classes)
        self.gather_dtype = gather_dtype
        self._comm = comm
        self._model = model
        self._weights = _by_name(model, self.units)
        self._copied = _not_shardable(self._weights, self.units)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        mesh, self._group, self._copy = _make_mesh(comm, replicate, device)
        self._place = self._group.rank()
        self._handles: dict[Unit, Any] = {}
        pinned = offload and device == "cuda"
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=gather_dtype, cast_forward_inputs=False),
            "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy(),
            "ignored_params": {weight.tensor for weight in self._weights.values() if weight.name in self._copied},
        }
        self._options = options
        self._hooks = LibraryHooks()
        for unit in _inside_out(self.units):
            with self._hooks.taken_off(unit.modules):
                fully_shard(list(unit.modules), **options)
        home = torch.device("cpu" if offload else device)
        if any(p.is_meta for p in model.parameters()):
            model._apply(lambda t: torch.empty_like(t, device=home) if t.is_meta else t)

    def describe(self, weight: Weight) -> tuple[torch.dtype, torch.device]:
        """See `Layout.describe`."""
        dtype = weight.tensor.dtype
        is_cast = self.gather_dtype is not None and dtype.is_floating_point and weight.name not in self._copied
        return self.gather_dtype if is_cast and self.gather_dtype else dtype, self._device

    def synchronize(self, what: str) -> None:
        """See `Layout.synchronize`."""
        self._comm.synchronize(what, self._copy)

    def start(self, unit: Unit) -> None:
        """See `Layout.start`."""
        with self._comm.guarded(f"gather of {unit.name}"):
            self._handles[unit] = _fsdp(unit).unshard(async_op=True)

    def finish(self, unit: Unit) -> None:
        """See `Layout.finish`."""
        with self._comm.guarded(f"gather of {unit.name}"):
            self._handles.pop(unit).wait()

    def release(self, unit: Unit) -> None:
        """See `Layout.release`."""
        _fsdp(unit).reshard()

    @contextlib.contextmanager
    def back_propagating(self) -> Iterator[None]:
        """See `Layout.back_propagating`: FSDP2 as usual, with its own hooks, and a root around all units."""
        if not isinstance(self._model, FSDPModule):
            with self._hooks.taken_off([self._model]):
                fully_shard(self._model, **self._options)
        with self._hooks.put_back():
            yield

    @torch.no_grad()
    def shards(self) -> Iterator[Shard]:
        """See `Layout.shards`: some rows of every parameter, in the dtype they are kept in."""
        ranks = self._group.size()
        for name, weight in self._weights.items():
            tensor: Tensor = weight.tensor.detach()
            offset, is_first = 0, self._comm.rank < ranks  # the first copy is that of the first ranks
            if isinstance(tensor, DTensor):
                rows = min(self._place * math.ceil(weight.shape[0] / ranks), weight.shape[0])
                tensor, offset = tensor.to_local(), rows * math.prod(weight.shape[1:])
            else:
                is_first = self._comm.rank == 0
            yield Shard(name, weight.param_id, weight.shape, offset, tensor, is_first)

    def exchange(self, others: dict[str, Tensor]) -> None:
        """See `Layout.exchange`."""
        exchange_contents(self.shards(), others)

    @torch.no_grad()
    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Layout.named_weights`."""
        for name, weight in self._weights.items():
            tensor = weight.tensor.detach()
            if isinstance(tensor, DTensor):
                with self._comm.guarded(f"gather of {name}"):
                    tensor = tensor.full_tensor()
            yield name, tensor

    def total(self, value: int) -> int:
        """See `Layout.total`."""
        return self._comm.total(value)


def _make_mesh(
    comm: Communicator, replicate: int, device: str
) -> tuple[DeviceMesh, dist.ProcessGroup, dist.ProcessGroup | None]:
    """The mesh of the ranks, the group that shares a copy of the weights, and such a group for tensors on the CPU.

    A mesh that makes its groups itself gives them torch's time-outs, not the run's.

    Args:
        comm: the ranks.
        replicate: copies of the weights.
        device: "cpu" or "cuda".

    Returns:
        The last is None where that group is all ranks: the communicator has one.
    """
    if replicate == 1:
        mesh = init_device_mesh(device, (comm.world_size,), mesh_dim_names=("shard",))  # the group of all ranks
        return mesh, mesh.get_group(), None
    ranks = torch.arange(comm.world_size).view(replicate, -1)
    across, within = comm.group_of(ranks.T.tolist()), comm.group_of(ranks.tolist())
    mesh = DeviceMesh.from_group([across, within], device, mesh=ranks, mesh_dim_names=("replicate", "shard"))
    return mesh, within, comm.group_of(ranks.tolist(), "gloo")


def _fsdp(unit: Unit) -> FSDPModule:
    """FSDP2 knows a unit by the first of its modules."""
    module = unit.modules[0]
    assert isinstance(module, FSDPModule)
    return module


def _inside_out(units: Sequence[Unit]) -> list[Unit]:
    """FSDP2 gives a weight to the module that is sharded first. So a unit comes before all those that have a module
    around one of its modules; tied weights can lie in several depths."""
    unit_of = {module: unit for unit in units for module in unit.modules}
    inner = {
        unit: [unit_of[m] for module in unit.modules for m in module.modules() if unit_of.get(m, unit) is not unit]
        for unit in units
    }
    try:
        return list(graphlib.TopologicalSorter(inner).static_order())
    except graphlib.CycleError as error:
        names = ", ".join(unit.name for unit in error.args[1])
        raise UserError(
            f"layout.name: fsdp cannot shard modules that lie inside one another and share weights ({names}); "
            "use layout.name: zero"
        ) from error


def _not_shardable(weights: Mapping[str, Weight], units: Sequence[Unit]) -> set[str]:
    """Names of the weights of which every rank keeps a copy.

    FSDP2 takes no scalars, and a unit's weights must have one dtype. Where a model keeps a few in another one (fp32
    biases of a router in a bf16 model), those are copied.
    """
    copied = {name for name, weight in weights.items() if not weight.shape}
    for unit in units:
        sizes: collections.Counter[torch.dtype] = collections.Counter()
        names = [w.name for hooked in unit.hooked_modules for w in hooked.weights if w.name not in copied]
        for name in dict.fromkeys(names):
            sizes[weights[name].tensor.dtype] += weights[name].shape.numel()
        if len(sizes) > 1:
            (main, _), *_ = sizes.most_common()
            copied |= {name for name in names if weights[name].tensor.dtype != main}
    return copied


def _by_name(model: nn.Module, units: Sequence[Unit]) -> dict[str, Weight]:
    """One `Weight` of every parameter, in the model's order."""
    weights = {
        weight.name: weight for unit in units for hooked in unit.hooked_modules for weight in reversed(hooked.weights)
    }
    return {name: weights[name] for name, _ in model.named_parameters()}
