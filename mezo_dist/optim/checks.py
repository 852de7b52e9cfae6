"""The arguments of an `Optimizer`, checked before anything is done with them."""

from __future__ import annotations

from collections.abc import Sized

from torch import nn

from mezo_dist.algorithms import ALGORITHMS
from mezo_dist.directions.add import DTYPES
from mezo_dist.errors import UserError


def check_arguments(
    model: nn.Module, algorithm: object, law: str, batch_size: int | None, num_steps: int | None, full_batch: object
) -> None:
    """Check the arguments of `mezo_dist.Optimizer` that have these names.

    Args:
        model: has a trainable weight of a dtype that can be trained.
        algorithm: settings of an algorithm.
        law: name of a law.
        batch_size: set for a direction per sample.
        num_steps: set where a schedule needs it.
        full_batch: None, or something with a length.

    Raises:
        UserError: one of them cannot be used, or needs another one; the message names it.
    """
    if not isinstance(algorithm, tuple(settings for settings, _ in ALGORITHMS.values())):
        raise UserError(f"algorithm: give settings such as MeZO(lr=1e-6), not a {type(algorithm).__name__}")
    if law not in ("gaussian", "rademacher", "lowrank"):
        raise UserError(f"law: {law!r} is not one of gaussian, rademacher, lowrank")
    if getattr(algorithm, "per_sample", False) and (law != "lowrank" or batch_size is None):
        raise UserError("per_sample: a direction per sample needs law='lowrank' and batch_size=...")
    for name in ("schedule", "eps_schedule"):
        if num_steps is None and getattr(getattr(algorithm, name, None), "kind", "constant") != "constant":
            raise UserError(f"num_steps: {name} falls to the end of training; say how many steps that has")
    if full_batch is not None and not isinstance(full_batch, Sized):
        raise UserError("full_batch: every anchor step goes through it: give a list of micro-batches, or a DataLoader")
    _check_weights(model)


def _check_weights(model: nn.Module) -> None:
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise UserError("model: no parameter has requires_grad, so there is nothing to train")
    for name, parameter in trainable:
        if parameter.dtype not in DTYPES:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UserError(
                f"model: {name} is {dtype}; trained weights are float32, bfloat16 or float16 (model.float())"
            )
        if not parameter.is_contiguous():
            raise UserError(
                f"model: {name} is not contiguous (channels_last, or a transposed view); make it so before: "
                "parameter.data = parameter.data.contiguous()"
            )
