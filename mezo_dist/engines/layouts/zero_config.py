"""DeepSpeed configs: what of a user's counts, and what DeepSpeed is given, for its partitions and for its engine."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from mezo_dist.engines.units import Unit
from mezo_dist.errors import UserError
from mezo_dist.json_types import JsonObject

log = logging.getLogger(__name__)
MIN_NVME_BYTES = 1 << 20
"""Smaller pieces stay in host memory."""
PREFETCHED = 50_000_000
"""Elements that DeepSpeed's engine gathers ahead, with ``layout.prefetch``: its own default."""
REDUCED_AT_ONCE = 50_000_000
"""Elements of gradients that it sums at once, at most; its own default would take 2 GB."""
HONOURED = ("stage", "offload_param")
"""Keys of ``zero_optimization`` that matter where there are no gradients."""
HONOURED_WITH_GRADIENTS = (
    *HONOURED,
    "offload_optimizer",
    "overlap_comm",
    "contiguous_gradients",
    "reduce_bucket_size",
    "sub_group_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)
"""Those that matter where DeepSpeed's engine trains."""
SECTIONS = ("zero_optimization", "bf16", "bfloat16", "fp16", "aio")
"""Sections that matter."""
REFUSED = {
    "zero_hpz_partition_size": "secondary partitions are copies that would miss the updates",
    "zero_quantized_weights": "weights would be gathered rounded to 8 bits, so that perturbations vanish",
    "zero_quantized_nontrainable_weights": "frozen weights would be rounded to 8 bits",
    "mics_shard_size": "use layout.name: fsdp with layout.replicate for several copies of the weights",
}
OWNED_BY_RUN = {
    "optimizer": "algorithm.name says which",
    "scheduler": "algorithm.lr and algorithm.schedule are the rate",
    "gradient_clipping": "algorithm.clip is the limit",
}
"""Sections that would decide about steps, which settings of the run do."""


def read_config(path: str | None, weights: str, *, gradients: bool = False) -> JsonObject:
    """The user's DeepSpeed config, checked against the run's settings; a plain ZeRO-3 config if ``path`` is None.

    Args:
        path: a JSON file.
        weights: ``model.weights``, the dtype in which weights are kept.
        gradients: DeepSpeed's engine trains.

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
    if gradients:
        _check_gradients(config, zero)
    honoured = HONOURED_WITH_GRADIENTS if gradients else HONOURED
    without_effect = [key for key in config if key not in SECTIONS]
    without_effect += [f"zero_optimization.{key}" for key in zero if key not in (*honoured, *REFUSED)]
    if without_effect:
        where = "here, where settings of the run decide" if gradients else "in a run without gradients"
        log.warning("layout.ds_config: no effect %s: %s", where, ", ".join(without_effect))
    return config


def _check_gradients(config: JsonObject, zero: JsonObject) -> None:
    """Check what DeepSpeed's engine is not to do, or not in its way.

    Args:
        config: a DeepSpeed config.
        zero: its section ``zero_optimization``.

    Raises:
        UserError: it asks for that; the message says what to set in its place.
    """
    for section, owner in OWNED_BY_RUN.items():
        if config.get(section) not in (None, "auto", 0, {}):
            raise UserError(f"layout.ds_config: leave {section} out: {owner}")
    for key in ("offload_param", "offload_optimizer"):
        offload = zero.get(key)
        if isinstance(offload, dict) and offload.get("device") == "nvme":
            raise UserError(
                f"layout.ds_config: zero_optimization.{key}.device: nvme is for runs without gradients, whose "
                "snapshots need no state of an optimiser; set it to cpu"
            )
    if zero.get("zero_quantized_gradients"):
        raise UserError(
            "layout.ds_config: zero_optimization.zero_quantized_gradients cannot be used: gradients would be rounded "
            "to 8 bits"
        )


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


def partition_config(config: JsonObject, dtype: torch.dtype) -> JsonObject:
    """``config`` with what DeepSpeed insists on, for `deepspeed.zero.Init`.

    Args:
        config: see `read_config`.
        dtype: of the weights.
    """
    complete = copy.deepcopy(dict(config))
    for key in (*OWNED_BY_RUN, "train_batch_size", "gradient_accumulation_steps"):
        complete.pop(key, None)
    complete["train_micro_batch_size_per_gpu"] = 1
    zero = complete.setdefault("zero_optimization", {})
    zero["stage"] = 3
    zero["memory_efficient_linear"] = False  # it would replace torch.nn.functional.linear in the whole process
    if dtype != torch.float32:
        complete["bf16" if dtype == torch.bfloat16 else "fp16"] = {"enabled": True}
    return complete


def training_config(config: JsonObject, dtype: torch.dtype, num_trainable: int, *, prefetch: bool) -> JsonObject:
    """What `deepspeed.initialize` is given: of ``config`` what is honoured, and nothing that would decide about steps.

    Args:
        config: see `read_config`.
        dtype: of the weights.
        num_trainable: elements of all trainable weights.
        prefetch: gather a module while the one before it computes.
    """
    theirs = config.get("zero_optimization", {})
    zero = {key: theirs[key] for key in HONOURED_WITH_GRADIENTS if theirs.get(key, "auto") != "auto"}
    if isinstance(zero.get("offload_optimizer"), dict):
        zero["offload_optimizer"] = {
            k: v for k, v in zero["offload_optimizer"].items() if k in ("device", "pin_memory")
        }
    zero.setdefault("reduce_bucket_size", max(1, min(num_trainable, REDUCED_AT_ONCE)))
    zero |= {
        "stage": 3,
        "memory_efficient_linear": False,
        "stage3_prefetch_bucket_size": PREFETCHED if prefetch else 0,
        "stage3_param_persistence_threshold": 0,  # between passes all weights lie in partitions, where the engine looks
        "enable_sanity_checks": True,  # gradients of different weights are never added up
    }
    return {
        "train_micro_batch_size_per_gpu": 1,  # it knows no sizes of batches: losses are sums, divided later
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's SGD; it is tested here
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # its own default is 1
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "log_level": "warning",
        **({} if dtype == torch.float32 else {"bf16": {"enabled": True}}),
    }
