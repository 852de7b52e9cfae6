"""Layout `zero`: weights are partitioned by DeepSpeed's ZeRO-3, and may live in host memory or on NVMe.

Only the part of DeepSpeed that owns parameters is used (`deepspeed.zero.Init`): there is no optimiser, and none is
faked. Its forward hooks would gather for every forward pass alone, so none are set; units are gathered explicitly.
This is the only file that imports DeepSpeed.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.hooked import Weight, swap
from mezo_dist.engines.layouts.base import Shard, exchange_contents
from mezo_dist.engines.units import Unit, find_units
from mezo_dist.errors import UserError
from mezo_dist.json_types import JsonObject
from mezo_dist.patience import patience

log = logging.getLogger(__name__)
MIN_NVME_BYTES = 1 << 20
"""Smaller pieces stay in host memory."""
HONOURED = ("stage", "offload_param")
"""Keys of ``zero_optimization`` that matter here."""
REFUSED = {
    "zero_hpz_partition_size": "secondary partitions are copies that would miss the updates",
    "zero_quantized_weights": "weights would be gathered rounded to 8 bits, so that perturbations vanish",
    "zero_quantized_nontrainable_weights": "frozen weights would be rounded to 8 bits",
    "mics_shard_size": "use layout.name: fsdp with layout.replicate for several copies of the weights",
}


def read_config(path: str | None, weights: str) -> JsonObject:
    """The user's DeepSpeed config, checked against the run's settings; a plain ZeRO-3 config if ``path`` is None.

    Args:
        path: a JSON file.
        weights: ``model.weights``, the dtype in which weights are kept.

    Raises:
        UserError: not a JSON object, or it contradicts the run or asks for what cannot hold here.
    """
    if path is None:
        return {}
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"layout.ds_config: {path} is no readable JSON file ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        raise UserError(f"layout.ds_config: {path} must hold a DeepSpeed config, a JSON object")
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 3) != 3:
        raise UserError(f"layout.ds_config: zero_optimization.stage is {zero['stage']}; layout.name: zero is stage 3")
    for key, reason in REFUSED.items():
        value = zero.get(key)
        if value is True or value not in (None, False, 1, -1):  # 1 and -1: DeepSpeed's own defaults
            raise UserError(f"layout.ds_config: zero_optimization.{key} cannot be used: {reason}")
    for section, dtype in (("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp16", "float16")):
        if _is_on(config, section) and weights != dtype:
            raise UserError(f"layout.ds_config: {section} is on, but model.weights is {weights}; make them agree")
    without_effect = [key for key in config if key not in ("zero_optimization", "bf16", "bfloat16", "fp16", "aio")]
    without_effect += [f"zero_optimization.{key}" for key in zero if key not in (*HONOURED, *REFUSED)]
    if without_effect:
        log.warning("layout.ds_config: no effect in a run without gradients: %s", ", ".join(without_effect))
    return config


def check_buffers(config: JsonObject, units: Sequence[Unit], ranks: int, *, prefetch: bool) -> None:
    """Check that what is read from NVMe at once fits into DeepSpeed's buffers, which would fail in a later gather.

    Args:
        config: a DeepSpeed config.
        units: of the model, before its weights are cut.
        ranks: over which they will be cut.
        prefetch: a unit is gathered while the one before it is in use.

    Raises:
        UserError: a rank's piece of a weight is larger than a buffer, or there are fewer buffers than pieces.
    """
    offload = config.get("zero_optimization", {}).get("offload_param")
    if not isinstance(offload, dict) or offload.get("device") != "nvme":
        return
    size, count = offload.get("buffer_size", 100_000_000), offload.get("buffer_count", 5)  # DeepSpeed's defaults
    if not isinstance(size, (int, float)) or not isinstance(count, int):
        return  # DeepSpeed refuses that
    aio = config.get("aio", {})
    smallest = max(MIN_NVME_BYTES, aio.get("block_size", 0) if isinstance(aio, dict) else 0)
    counts = [0]
    for unit in units:
        weights = {w.name: w.tensor for hooked in unit.hooked_modules for w in hooked.weights}
        pieces = {name: -(-tensor.numel() // ranks) for name, tensor in weights.items()}
        away = [name for name, piece in pieces.items() if piece * weights[name].element_size() >= smallest]
        for name in away:
            if pieces[name] > size:
                raise UserError(
                    f"layout.ds_config: zero_optimization.offload_param.buffer_size is {size:,} elements, but the "
                    f"piece of {name} that a rank reads from NVMe has {pieces[name]:,}: set it to at least that many"
                )
        counts.append(len(away))
    most = max(map(sum, itertools.pairwise(counts)) if prefetch else counts, default=0)
    if most > count:
        raise UserError(
            f"layout.ds_config: zero_optimization.offload_param.buffer_count is {count}, but {most} weights are read "
            "from NVMe at once: set it to at least that many"
            + (", or layout.prefetch to false" if prefetch and max(counts) <= count else "")
        )


def _is_on(config: JsonObject, section: str) -> bool:
    value = config.get(section, {})
    return isinstance(value, dict) and value.get("enabled") is True


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
        comm.ensure_group()
        self._device = _partition(uses, comm, _complete(config, next(model.parameters()).dtype))

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

    def back_propagating(self) -> AbstractContextManager[None]:
        """See `Layout.back_propagating`."""
        raise UserError("layout.name: zero has no gradients; use layout.name: fsdp")

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


def _complete(config: JsonObject, dtype: torch.dtype) -> JsonObject:
    """``config`` with what DeepSpeed insists on."""
    complete = copy.deepcopy(dict(config))
    for key in ("optimizer", "scheduler", "train_batch_size", "gradient_accumulation_steps"):
        complete.pop(key, None)
    complete["train_micro_batch_size_per_gpu"] = 1
    zero = complete.setdefault("zero_optimization", {})
    zero["stage"] = 3
    zero["memory_efficient_linear"] = False  # it would replace torch.nn.functional.linear in the whole process
    if dtype != torch.float32:
        complete["bf16" if dtype == torch.bfloat16 else "fp16"] = {"enabled": True}
    return complete


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
