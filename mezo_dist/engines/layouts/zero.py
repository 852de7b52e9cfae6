"""Layout `zero`: weights are partitioned by DeepSpeed's ZeRO-3, and may live in host memory or on NVMe.

Forward passes use the part of DeepSpeed alone that owns parameters (`deepspeed.zero.Init`): there is no optimiser, and
none is faked. Its forward hooks would gather for every forward pass alone, so none are set; units are gathered
explicitly. A first-order baseline has DeepSpeed's engine around the model as well (`Zero.initialize`), whose hooks are
on only while it computes gradients.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.hooked import Weight, swap
from mezo_dist.engines.layouts.base import Shard, exchange_contents
from mezo_dist.engines.layouts.library_hooks import LibraryHooks
from mezo_dist.engines.layouts.zero_config import check_buffers, partition_config, training_config
from mezo_dist.engines.units import Unit, find_units
from mezo_dist.errors import UserError
from mezo_dist.json_types import JsonObject
from mezo_dist.patience import patience


@final
class Zero:
    """See `mezo_dist.engines.layouts.base.Layout`.

    Weights on the meta device get memory for their partitions alone, to be filled through `shards`.

    Args:
        model: is partitioned in place, over all ranks.
        comm: the ranks.
        config: a DeepSpeed config; see `read_config`.
        block_classes: see `find_units`.
        prefetch: as for `mezo_dist.engines.engine.Engine`.

    Raises:
        UserError: DeepSpeed is not installed, or cannot do what ``config`` asks for.
    """

    is_sharded = True
    gather_dtype = None

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        config: JsonObject,
        *,
        block_classes: Sequence[str] = (),
        prefetch: bool = False,
    ) -> None:
        self.units = find_units(model, block_classes)
        check_buffers(config, self.units, comm.world_size, prefetch=prefetch)
        self._comm = comm
        uses: dict[str, list[Weight]] = {name: [] for name, _ in model.named_parameters()}
        for weight in (weight for unit in self.units for hooked in unit.hooked_modules for weight in hooked.weights):
            uses[weight.name].append(weight)
        self._weights = {name: places[0] for name, places in uses.items()}
        self._handles: dict[Unit, Any] = {}
        self._model, self._config, self._prefetch = model, config, prefetch
        self._dtype = next(model.parameters()).dtype
        self._hooks = LibraryHooks()
        self._trainer: Any = None
        comm.ensure_group()
        self._device = _partition(uses, comm, partition_config(config, self._dtype))

    def describe(self, weight: Weight) -> tuple[torch.dtype, torch.device]:
        """See `Layout.describe`."""
        return weight.tensor.dtype, self._device

    def synchronize(self, what: str) -> None:
        """See `Layout.synchronize`."""
        self._comm.synchronize(what)

    def start(self, unit: Unit) -> None:
        """See `Layout.start`."""
        if parameters := _parameters(unit):
            with self._comm.guarded(f"gather of {unit.name}"):
                self._handles[unit] = parameters[0].all_gather_coalesced(parameters)

    def finish(self, unit: Unit) -> None:
        """See `Layout.finish`."""
        if unit in self._handles:
            with self._comm.guarded(f"gather of {unit.name}"):
                self._handles.pop(unit).wait()

    def release(self, unit: Unit) -> None:
        """See `Layout.release`."""
        if parameters := _parameters(unit):
            parameters[0].partition(parameters)

    def initialize(self, optimizer: torch.optim.Optimizer) -> Any:
        """Put DeepSpeed's engine around the model, once: it computes gradients within `back_propagating`, and steps.
        Collective.

        Args:
            optimizer: of the trainable weights.

        Returns:
            A ``deepspeed.DeepSpeedEngine``.

        Raises:
            UserError: DeepSpeed cannot train these weights.
        """
        import deepspeed

        if scalars := [name for name, weight in self._weights.items() if not weight.shape]:
            raise UserError(
                f"layout.name: DeepSpeed cannot train a model that has scalar weights ({scalars[0]}); use layout.name: "
                "fsdp"
            )
        size = sum(weight.shape.numel() for weight in self._weights.values() if weight.trainable)
        config = training_config(self._config, self._dtype, size, prefetch=self._prefetch)
        try:
            with (
                patience("DeepSpeed makes its engine"),
                self._comm.guarded("making DeepSpeed's engine"),
                self._hooks.taken_off(self._model.modules()),
            ):
                self._trainer = deepspeed.initialize(
                    model=self._model, optimizer=optimizer, config=config, dist_init_required=False
                )[0]
        except (AssertionError, ValueError) as error:
            raise UserError(
                f"layout.name: DeepSpeed cannot train this model ({error}); use layout.name: fsdp"
            ) from error
        return self._trainer

    @contextlib.contextmanager
    def back_propagating(self) -> Iterator[None]:
        """See `Layout.back_propagating`: within, DeepSpeed's hooks are on. Gradients are kept by its engine."""
        if self._trainer is None:
            raise RuntimeError("no engine of DeepSpeed's trains these weights")
        with self._hooks.put_back():
            yield
        self._trainer.optimizer.empty_partition_cache()  # what it has gathered; the engine's would collect garbage, too

    @torch.no_grad()
    def shards(self) -> Iterator[Shard]:
        """See `Layout.shards`: a piece of every flattened parameter. Those on NVMe are read, and written back."""
        for name, weight in self._weights.items():
            parameter: Any = weight.tensor
            if not _is_cut(parameter):
                yield Shard(name, weight.param_id, weight.shape, 0, parameter.detach(), self._comm.rank == 0)
                continue
            piece, total = parameter.ds_tensor, weight.shape.numel()
            offset = min(parameter.ds_zero_partition_rank * piece.ds_numel, total)
            is_away = piece.status.name == "NOT_AVAILABLE"  # on NVMe
            if is_away:
                parameter.nvme_swapper.swap_in([parameter], async_op=False)
            unpadded = piece.narrow(0, 0, min(piece.ds_numel, total - offset))
            try:
                yield Shard(name, weight.param_id, weight.shape, offset, unpadded, stays=not is_away)
            finally:
                if is_away:
                    parameter.nvme_swapper.swap_out_and_release([parameter])

    def exchange(self, others: dict[str, Tensor]) -> None:
        """See `Layout.exchange`."""
        exchange_contents(self.shards(), others)

    @torch.no_grad()
    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Layout.named_weights`."""
        for name, weight in self._weights.items():
            parameter: Any = weight.tensor
            if _is_cut(parameter):
                with self._comm.guarded(f"gather of {name}"):
                    parameter.all_gather()
            yield name, parameter.detach()
            if _is_cut(parameter):
                parameter.partition()

    def total(self, value: int) -> int:
        """See `Layout.total`."""
        return self._comm.total(value)


def _parameters(unit: Unit) -> list[Any]:
    unique = {id(weight.tensor): weight.tensor for hooked in unit.hooked_modules for weight in hooked.weights}
    return [parameter for parameter in unique.values() if _is_cut(parameter)]


def _is_cut(parameter: nn.Parameter) -> bool:
    """DeepSpeed owns it."""
    return hasattr(parameter, "ds_id")


def _partition(uses: Mapping[str, Sequence[Weight]], comm: Communicator, config: JsonObject) -> torch.device:
    """Cut every parameter into equal pieces, one for each rank.

    Args:
        uses: for every parameter, all places where it is used.
        comm: the ranks.
        config: DeepSpeed's.

    Returns:
        The device on which gathered weights are.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"layout.name: zero needs DeepSpeed: pip install 'mezo_dist[deepspeed]' ({error})") from error
    warnings.filterwarnings("ignore", r"`torch.distributed.*_tensor` is deprecated", FutureWarning)  # DeepSpeed's calls
    os.environ.setdefault("LOCAL_RANK", "0")
    # DeepSpeed would compile an all-reduce through shared memory for CPUs; unused here, and only right on one host.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        told = "DeepSpeed makes process groups, and the first time compiles its operators"
        with patience(told), comm.guarded("making process groups"):
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
            context = deepspeed.zero.Init(config_dict_or_path=config)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"layout.ds_config: DeepSpeed refuses it: {error}") from error
    for places in uses.values():  # one by one, so that no rank ever holds more than one that is only there to be cut
        parameter: Any = places[0].tensor
        if parameter.is_meta:
            empty = nn.Parameter(
                torch.empty_like(parameter, device=context.local_device), requires_grad=parameter.requires_grad
            )
            for place in places:
                swap((place,), [empty])
            parameter = empty
        if parameter.dim():  # ZeRO-3 takes no scalars: every rank keeps a copy
            parameter.data = parameter.data.to(context.local_device)
            # Not `_convert_to_zero_parameters`, which sends the whole model from rank 0 to all others.
            context._convert_to_deepspeed_param(parameter)
            parameter.partition()
    return torch.device(context.local_device)
