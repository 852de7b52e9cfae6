"""A direction per sample at no extra forward pass: low-rank directions applied in activation space.

A low-rank direction z = U V^T of a weight matrix changes a linear layer's output by ``(x V) U^T``. So every sample of
a micro-batch can have a direction of its own, added to the output of one ordinary forward pass on weights that are
shared by all: no weights are materialised. Averaging the samples' own projected gradients along their own directions,
v = mean_i p_i z_i, has the variance of as many directions as there are samples (DESIGN 5.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.engines.hooked import HookedModule, Weight, swapped
from mezo_dist.engines.lockstep.factors import Factors
from mezo_dist.engines.lockstep.passes import Call, Coroutine
from mezo_dist.errors import UserError

Forward = Callable[[Call, list[Tensor]], Any]


def with_sample_directions(
    factors: Factors,
    hooked: HookedModule,
    seeds: tuple[int, ...],
    real: Callable[..., object],
    shared: Forward,
    rows: Tensor | None,
) -> Forward:
    """A forward of ``hooked`` that adds each sample's own direction to what ``shared`` computes.

    Linear layers, embeddings and heads under a `HeadSlice` are corrected in activation space. Modules whose weights are
    vectors (norms) run once, mapped over the samples' own weights. Any other module runs sample by sample, which is
    right for every module that works sample by sample.

    Args:
        factors: of the run's directions (low-rank).
        hooked: the module, with its weights.
        seeds: the directions of the calls, ascending (`seeds_of`), which are made once for all of them.
        real: the hooked module's own forward.
        shared: the forward on weights that all samples share: takes a call and its variant's tensors.
        rows: rows of the weights that ``shared`` works on, if not all.

    Raises:
        UserError: directions of trainable weights of ``hooked`` cannot be applied sample by sample; here, or when the
            forward is called.
    """
    if not any(weight.trainable for weight in hooked.weights):
        return shared
    if hooked.spans_blocks:
        return _spanning(hooked, shared)
    if rows is not None or hooked.kind in (nn.Linear, Conv1D):
        moved = _linear(factors, hooked, seeds, shared, rows)
    elif hooked.kind is nn.Embedding:
        moved = _embedding(factors, hooked, seeds, shared)
    elif all(len(weight.shape) == 1 for weight in hooked.weights):
        moved = _vectors(factors, hooked, seeds, real)
    else:
        moved = _one_by_one(factors.law, hooked, real)
    return lambda call, tensors: (moved if call.caller.sample_shifts else shared)(call, tensors)


def thin_weights(hooked: HookedModule) -> list[Weight]:
    """The weights of ``hooked`` whose factors or entries a forward of `with_sample_directions` computes with."""
    is_thin = hooked.kind in (nn.Linear, Conv1D) or all(len(weight.shape) == 1 for weight in hooked.weights)
    return [weight for weight in hooked.weights if weight.trainable] if is_thin else []


def seeds_of(calls: Iterable[Call]) -> tuple[int, ...]:
    """The directions of the samples of some calls, ascending."""
    return tuple(sorted({seed for call in calls for c in call.caller.sample_shifts for seed, _ in c.terms}))


def _spanning(hooked: HookedModule, shared: Forward) -> Forward:
    """Weights that are tied to those of inner hooked modules move there. Any others would not move at all, and would be
    updated by noise."""
    inner = {id(parameter) for child in hooked.module.children() for parameter in child.parameters()}
    alone = [weight.name for weight in hooked.weights if weight.trainable and id(weight.tensor) not in inner]
    if alone:
        raise UserError(
            f"algorithm.per_sample: {', '.join(alone)} belong to a module around the model's blocks, where a direction "
            "per sample cannot be applied; set it to false, or leave them out with model.freeze"
        )
    return shared


class _BySample:
    """U and V of one weight for all seeds of a serving, picked by sample.

    Args:
        factors: of the run's directions.
        weight: the weight, a matrix.
        seeds: the directions', ascending.
        swapped: whether the weight is [inputs, outputs].
        rows: the outputs that are computed; None: all.
    """

    def __init__(
        self, factors: Factors, weight: Weight, seeds: tuple[int, ...], *, swapped: bool, rows: Tensor | None
    ) -> None:
        self._factors, self._seeds = factors, seeds
        u, v = factors.matrix(weight, seeds, weight.tensor.device)
        self._into, self._out = (u, v) if swapped else (v, u)
        if rows is not None:
            self._out = self._out[:, rows]
        self._picked: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._of_pass: dict[tuple[object, ...], tuple[Tensor, Tensor, Tensor]] = {}

    def of(self, caller: Coroutine, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The factors of the terms of each sample of a pass side by side, and their coefficients, in ``like``'s dtype
        and device.

        Returns:
            [n, inputs, terms * rank], [n, terms * rank, outputs], [n, 1, terms * rank].
        """
        key = (caller.index, like.dtype, like.device)
        if key not in self._of_pass:
            self._of_pass[key] = self._pick(caller.sample_shifts, like)
        return self._of_pass[key]

    def _pick(self, shifts: tuple[Combination, ...], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `of`."""
        seeds = tuple(seed for shift in shifts for seed, _ in shift.terms)
        if seeds not in self._picked:  # both signs, and both ends of a step, share their directions
            index = self._factors.table(shifts, self._seeds, self._into.device).index
            into, out = (
                factor[index].transpose(1, 2).flatten(2).to(like.device, like.dtype)
                for factor in (self._into, self._out)
            )
            self._picked[seeds] = (into, out.transpose(1, 2))
        into, out = self._picked[seeds]
        return into, out, self._factors.coefficients(shifts, self._seeds, like, self._into.shape[-1])


def _linear(
    factors: Factors, hooked: HookedModule, seeds: tuple[int, ...], shared: Forward, rows: Tensor | None
) -> Forward:
    """A linear layer's forward, corrected in activation space.

    Args:
        factors: of the run's directions.
        hooked: the layer.
        seeds: the directions', ascending.
        shared: the forward on weights that all samples share.
        rows: the outputs that are computed; None: all.
    """
    weights = {w.attribute: w for w in hooked.weights if w.trainable}
    swapped = hooked.kind is Conv1D  # its weight is [inputs, outputs]
    thin = _BySample(factors, weights["weight"], seeds, swapped=swapped, rows=rows) if "weight" in weights else None
    bias = factors.vector(weights["bias"], seeds, weights["bias"].tensor.device) if "bias" in weights else None
    biases: dict[tuple[object, ...], Tensor] = {}

    def bias_of(caller: Coroutine, like: Tensor) -> Tensor:
        key = (caller.index, like.dtype, like.device)
        if key not in biases:
            assert bias is not None
            z = bias if rows is None else bias[:, rows]
            table = factors.table(caller.sample_shifts, seeds, z.device)
            moved = torch.zeros(len(caller.sample_shifts), z.shape[1], device=z.device)
            for index, c in zip(table.index.T, table.coefficients.T, strict=True):
                moved = moved + c.unsqueeze(1) * z[index]
            biases[key] = moved.unsqueeze(1).to(like.device, like.dtype)
        return biases[key]

    def forward(call: Call, tensors: list[Tensor]) -> Tensor:
        output: Tensor = shared(call, tensors)
        n = len(call.caller.sample_shifts)
        x, y = _by_sample(hooked, call.args[0], n), _by_sample(hooked, output, n)
        if thin is not None:
            into, out, coefficients = thin.of(call.caller, x)
            y = torch.baddbmm(y, torch.bmm(x, into) * coefficients, out)
        if bias is not None:
            y = y + bias_of(call.caller, y)
        return y.view(output.shape)

    return forward


def _embedding(factors: Factors, hooked: HookedModule, seeds: tuple[int, ...], shared: Forward) -> Forward:
    """An embedding's forward: rows of U are looked up like rows of the table.

    Args:
        factors: of the run's directions.
        hooked: the embedding.
        seeds: the directions', ascending.
        shared: the forward on weights that all samples share.
    """
    thin = _BySample(factors, hooked.weights[0], seeds, swapped=True, rows=None)

    def forward(call: Call, tensors: list[Tensor]) -> Tensor:
        output: Tensor = shared(call, tensors)
        n = len(call.caller.sample_shifts)
        ids = call.args[0].view(call.args[0].shape[0], -1)
        if ids.shape[0] == 1 and n > 1:  # the same positions for all samples: now each has its own vectors
            ids, output = ids.expand(n, -1), output.expand(n, *output.shape[1:])
        y = _by_sample(hooked, output, n)
        u, v, coefficients = thin.of(call.caller, y)
        looked_up = torch.gather(u, 1, ids.unsqueeze(-1).expand(-1, -1, u.shape[-1]))
        return torch.baddbmm(y, looked_up * coefficients, v).view(output.shape)

    return forward


def _vectors(factors: Factors, hooked: HookedModule, seeds: tuple[int, ...], real: Callable[..., object]) -> Forward:
    """The forward of a module whose weights are vectors, mapped over the samples' weights.

    Args:
        factors: of the run's directions.
        hooked: the module.
        seeds: the directions', ascending.
        real: its own forward.
    """
    moving = [w for w in hooked.weights if w.trainable]
    directions = {w.attribute: factors.vector(w, seeds, w.tensor.device) for w in moving}

    known: dict[int, list[Tensor]] = {}

    def weights_of(caller: Coroutine, tensors: list[Tensor]) -> list[Tensor]:
        """Of a pass, whose weights without directions per sample are ``tensors`` in all of its calls."""
        if caller.index not in known:
            mixing = factors.table(caller.sample_shifts, seeds, moving[0].tensor.device).mixing
            known[caller.index] = [
                tensor + (mixing @ directions[w.attribute]).to(tensor.device, tensor.dtype) if w.trainable else tensor
                for w, tensor in zip(hooked.weights, tensors, strict=True)
            ]
        return known[caller.index]

    def forward(call: Call, tensors: list[Tensor]) -> object:
        shifts = call.caller.sample_shifts
        moved = weights_of(call.caller, tensors)

        def on_sample(weights: list[Tensor], x: Tensor) -> object:
            for w, tensor in zip(hooked.weights, weights, strict=True):  # not `swap`: what vmap gives is no parameter
                w.owner._parameters[w.attribute] = tensor  # type: ignore[assignment]
            return real(x, *call.args[1:], **call.kwargs)

        x = call.args[0]
        if x.shape[0] % len(shifts) or x.shape[0] == 0:
            raise _not_by_sample(hooked, x, len(shifts))
        if _is_layer_norm(hooked, call, real, moved):
            return _layer_norm(hooked, moved, x, len(shifts))
        weight_axes = [0 if w.trainable else None for w in hooked.weights]
        with swapped(hooked.weights, tensors):  # puts back what `on_sample` leaves there
            mapped = torch.vmap(on_sample, in_dims=(weight_axes, 0))(moved, x.unflatten(0, (len(shifts), -1)))
        return pytree.tree_map(lambda y: y.flatten(0, 1), mapped)

    return forward


def _is_layer_norm(hooked: HookedModule, call: Call, real: Callable[..., object], moved: Sequence[Tensor]) -> bool:
    """Whether `_layer_norm` knows the module and the call. Arguments are those that `_vectors` has."""
    x = call.args[0]
    return (
        hooked.kind is nn.LayerNorm
        and getattr(real, "__func__", None) is nn.LayerNorm.forward
        and hooked.weights[0].attribute == "weight"
        and len(call.args) == 1
        and not call.kwargs
        and all(tensor.dtype == x.dtype and tensor.dim() <= 2 for tensor in moved)
        and not torch.is_autocast_enabled(x.device.type)
    )


def _layer_norm(hooked: HookedModule, moved: Sequence[Tensor], x: Tensor, num_samples: int) -> Tensor:
    """What ``torch.vmap`` computes of a layer norm, to the bit, which takes the host a tenth of the time.

    Args:
        hooked: the layer norm.
        moved: its weights, of each sample where they have a direction.
        x: its input.
        num_samples: number of samples.
    """
    assert isinstance(hooked.module, nn.LayerNorm)
    y = F.layer_norm(x, hooked.module.normalized_shape, None, None, hooked.module.eps).unflatten(0, (num_samples, -1))
    ones = [1] * (y.dim() - 2)
    weight, *bias = [tensor.view(num_samples, *ones, -1) if tensor.dim() == 2 else tensor for tensor in moved]
    y = y * weight
    return (y + bias[0] if bias else y).flatten(0, 1)


def _one_by_one(law: Law, hooked: HookedModule, real: Callable[..., object]) -> Forward:
    """The forward of any module, sample by sample.

    Args:
        law: the run's directions.
        hooked: the module.
        real: its own forward.
    """

    def forward(call: Call, tensors: list[Tensor]) -> object:
        n = len(call.caller.sample_shifts)
        outputs = []
        for i, shift in enumerate(call.caller.sample_shifts):
            moved = [torch.empty_like(t) if w.trainable else t for w, t in zip(hooked.weights, tensors, strict=True)]
            for w, t, target in zip(hooked.weights, tensors, moved, strict=True):
                if w.trainable:
                    law.add(t.contiguous(), [shift], [target], param_id=w.param_id, shape=w.shape)
            args = [_slice(hooked, argument, i, n) for argument in call.args]
            kwargs = {name: _slice(hooked, argument, i, n) for name, argument in call.kwargs.items()}
            with swapped(hooked.weights, moved):
                outputs.append(real(*args, **kwargs))
        return pytree.tree_map(_joined, *outputs)  # some modules give several tensors, or None among them

    return forward


def _joined(*parts: object) -> object:
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return torch.cat(tensors) if tensors else parts[0]


def _slice(hooked: HookedModule, argument: object, i: int, n: int) -> object:
    """Sample ``i``'s part of an argument; an argument that is no tensor, or has one row for all, stays as it is.

    Args:
        hooked: the module that is called.
        argument: what it is called with.
        i: number of the sample.
        n: number of samples.
    """
    if not isinstance(argument, Tensor) or argument.dim() == 0:
        return argument
    if argument.shape[0] == 1:
        return argument
    if argument.shape[0] % n:
        raise _not_by_sample(hooked, argument, n)
    per = argument.shape[0] // n
    return argument[i * per : (i + 1) * per]


def _by_sample(hooked: HookedModule, tensor: Tensor, num_samples: int) -> Tensor:
    """[n, tokens, features], from that or from [n * tokens, features] in sample order.

    Args:
        hooked: the module that is called.
        tensor: its input or output.
        num_samples: number of samples.
    """
    if tensor.shape[0] % num_samples or tensor.shape[0] == 0:
        raise _not_by_sample(hooked, tensor, num_samples)
    return tensor.reshape(num_samples, -1, tensor.shape[-1])


def _not_by_sample(hooked: HookedModule, tensor: Tensor, num_samples: int) -> UserError:
    """The error for a tensor whose rows are not the samples.

    Args:
        hooked: the module that is called.
        tensor: its input or output.
        num_samples: number of samples.
    """
    names = ", ".join(weight.name for weight in hooked.weights if weight.trainable)
    return UserError(
        f"algorithm.per_sample: module {hooked.name} gets a tensor {tuple(tensor.shape)} whose rows are not "
        f"{num_samples} samples, so a direction per sample cannot be applied to {names}; set it to false, or leave "
        "them out with model.freeze"
    )
