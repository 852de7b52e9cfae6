"""The arguments of an `Optimizer`, checked before anything is done with them."""

from __future__ import annotations

from collections.abc import Sized
from typing import final

import torch
from torch import nn

from mezo_dist.algorithms import ALGORITHMS, FirstOrder
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
        mend = "use torch.optim for a gradient; " if isinstance(algorithm, FirstOrder) else ""
        raise UserError(f"algorithm: {mend}give settings such as MeZO(lr=1e-6), not a {type(algorithm).__name__}")
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


def check_without_samples(algorithm: object) -> None:
    """Check settings of an algorithm for `mezo_dist.minimize`, whose functions have no samples and no gradients.

    Raises:
        UserError: they need one or the other.
    """
    if isinstance(algorithm, FirstOrder):
        raise UserError(
            f"algorithm: {algorithm.name} needs gradients, which a function does not give; choose MeZO(...)"
        )
    if getattr(algorithm, "per_sample", False):
        raise UserError("algorithm.per_sample: a function has no samples that could be told apart; leave it out")
    if getattr(algorithm, "lr", None) == "auto":
        raise UserError(
            "algorithm.lr: auto reads curvature off the losses of samples, and a function has none; give a number"
        )


@final
class KnownWeights:
    """What an `Optimizer` knows of a model's parameters since it was made; it would not notice another one."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known = _described(model)

    def check(self) -> None:
        """Raises UserError, which names the parameter, if the model's parameters are not those that were known."""
        now = _described(self._model)
        if now == self._known:
            return
        for name in self._known | now:
            before, after = self._known.get(name), now.get(name)
            if before == after:
                continue
            what = "was removed" if after is None else "was added" if before is None else _difference(before, after)
            raise UserError(
                f"model: {name} {what} after the Optimizer was made, which goes on with what it knew then; change the "
                "model first, and make a new Optimizer for it"
            )


_Described = tuple[int, bool, torch.dtype]


def _described(model: nn.Module) -> dict[str, _Described]:
    return {name: (id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()}


def _difference(before: _Described, after: _Described) -> str:
    if before[0] != after[0]:
        return "was replaced by another tensor"
    if before[1] != after[1]:
        return f"got requires_grad_({after[1]})"
    return f"became {str(after[2]).removeprefix('torch.')}"


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
