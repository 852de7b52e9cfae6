"""The size of a run's perturbation: checked at start-up against the rounding of the forward pass, or chosen so."""

from __future__ import annotations

import logging

from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines import survival
from mezo_dist.engines.survival import LADDER, Survival
from mezo_dist.runs.model import LoadedModel, dtype_of

log = logging.getLogger(__name__)


def perturbation_size(loaded: LoadedModel, comm: Communicator) -> float | None:
    """For ``algorithm.eps: auto`` the eps to use; otherwise None, and a warning if the given one is lost. Collective.

    Where ``eps_schedule`` makes eps smaller, the smallest one of the run has to survive.

    Raises:
        UserError: no eps survives.
    """
    settings = loaded.config.algorithm
    schedule = getattr(settings, "eps_schedule", None)
    factor = schedule.smallest() if schedule else 1.0
    if settings.eps == "auto":
        chosen = survival.choose(_measured(loaded, comm, LADDER, factor), LADDER)
        log.info("algorithm.eps: auto: %g, at which the perturbations of all trainable weights survive", chosen)
        return chosen
    sizes = (settings.eps, *(size for size in LADDER if size > settings.eps))
    survivals = _measured(loaded, comm, sizes, factor)
    if comm.rank == 0 and (lost := survival.lost_weights(survivals, 0)):
        enough = survival.smallest_sound(survivals, sizes)
        log.warning(
            "algorithm.eps: %g is lost in rounding on %s; %s",
            settings.eps,
            lost,
            "compute in float32 (model.compute, model.weights), or freeze them"
            if enough is None
            else f"{enough:g} would do, as algorithm.eps: auto finds out",
        )
    return None


def _measured(
    loaded: LoadedModel, comm: Communicator, sizes: tuple[float, ...], factor: float
) -> dict[str, list[Survival]]:
    config, engine = loaded.config, loaded.engine
    trainable = {name for name, parameter in loaded.pretrained.model.named_parameters() if parameter.requires_grad}
    compute = config.model.compute
    gather = (config.layout.gather or compute) if config.layout.name == "fsdp" else None
    sums = comm.collect(
        lambda: survival.measure(
            (shard for shard in engine.shards() if shard.name in trainable),
            engine.law,
            [factor * size for size in sizes],
            compute_dtype=dtype_of(compute) if compute else None,
            gather_dtype=dtype_of(gather) if gather else None,
            one_sided=getattr(config.algorithm, "one_sided", False),
            seed=config.seed,
        )
    )
    return survival.combined(sums if engine.layout.is_sharded else sums[:1])  # or every rank says the same of the whole
