"""Layouts for loops of your own: where the weights of a model live."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from mezo_dist.distributed.communicator import Communicator
from mezo_dist.distributed.join import join
from mezo_dist.engines.layouts.base import Layout
from mezo_dist.engines.layouts.replicated import Replicated
from mezo_dist.errors import UserError


def shard(
    model: nn.Module,
    layout: Literal["replicated", "fsdp", "zero"] = "fsdp",
    *,
    comm: Communicator | None = None,
    replicate: int = 1,
    blocks: Sequence[str] = (),
    gather_dtype: torch.dtype | None = None,
    offload: bool = False,
    ds_config: str | None = None,
) -> Layout:
    """Cut the weights of a model over the processes, in place, for `mezo_dist.Optimizer`. Collective.

    Weights are gathered one block at a time while the optimizer evaluates, and freed again; updates go to the shards.
    Trajectories and fp32 weights have the same bits on every layout.

    Args:
        model: loaded on every rank; its parameters become shards (FSDP2's or ZeRO-3's).
        layout: ``fsdp`` shards by torch's FSDP2, ``zero`` by DeepSpeed's ZeRO-3; ``replicated`` leaves a copy in every
            process.
        comm: the processes; those of the launcher if None (see `mezo_dist.join`).
        replicate: for ``fsdp``: copies of the weights, each sharded over (number of processes / ``replicate``).
        blocks: names of the classes whose weights are gathered together; by default the model's own
            ``_no_split_modules``, or its longest list of equal modules.
        gather_dtype: for ``fsdp``: dtype in which weights are gathered; their own if None.
        offload: for ``fsdp``: keep shards in host memory.
        ds_config: for ``zero``: path of a DeepSpeed config (JSON); its section ``zero_optimization`` counts.

    Returns:
        The layout, to be given to ``Optimizer(model, ..., layout=layout)``.

    Raises:
        UserError: ``replicate`` does not divide the number of processes, DeepSpeed is missing, or an option belongs to
            another layout.

    >>> model = torch.nn.Linear(2, 1)
    >>> shard(model, "replicated").is_sharded
    False
    """
    _check_options(layout, replicate=replicate, gather_dtype=gather_dtype, offload=offload, ds_config=ds_config)
    if layout == "replicated":
        return Replicated(model)
    comm = comm or join()
    if layout == "fsdp":
        from mezo_dist.engines.layouts.fsdp import Fsdp

        options = {"replicate": replicate, "gather_dtype": gather_dtype, "offload": offload}
        return Fsdp(model, comm, block_classes=blocks, **options)  # type: ignore[arg-type]
    from mezo_dist.engines.layouts.zero import Zero
    from mezo_dist.engines.layouts.zero_config import read_config

    dtype = next(model.parameters()).dtype
    return Zero(model, comm, read_config(ds_config, str(dtype).removeprefix("torch.")), block_classes=blocks)


def _check_options(layout: str, **options: object) -> None:
    owners = {"replicate": "fsdp", "gather_dtype": "fsdp", "offload": "fsdp", "ds_config": "zero"}
    if layout not in ("replicated", "fsdp", "zero"):
        raise UserError(f"layout: {layout!r} is not one of replicated, fsdp, zero")
    for name, owner in owners.items():
        if layout != owner and options[name] not in (None, False, 1):
            raise UserError(f"{name}: is an option of layout {owner!r}, not of {layout!r}")
