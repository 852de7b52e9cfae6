"""Linear layers whose variants exist in registers alone, in place of scratch (the setting ``layout.linear``).

The product of a layer's input with a variant of its weight makes that variant itself, tile by tile
(`mezo_dist.directions.registers`). Variants that do not move the weight, all other modules, and linear layers that the
kernel does not know go the usual way; the log says once for each reason which.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from mezo_dist.directions import registers
from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.law import Law
from mezo_dist.directions.parts import Part
from mezo_dist.engines.hooked import HookedModule, Weight
from mezo_dist.engines.layouts.base import Layout
from mezo_dist.engines.lockstep.fanout import Served, on_tensors
from mezo_dist.engines.lockstep.forwards import Forward
from mezo_dist.engines.lockstep.head_slice import head_rows
from mezo_dist.engines.lockstep.passes import Call
from mezo_dist.errors import UserError

log = logging.getLogger(__name__)
ServeWeights = Callable[[HookedModule, Sequence[Call], Forward], Served]


@final
class InRegisters:
    """Serves linear layers without scratch.

    Args:
        law: what the directions are.
        compute_dtype: dtype of the variants; the weights' own if None.
        layout: where the weights live.

    Raises:
        UserError: no layer can be computed so with this law or layout, or on this device.
    """

    def __init__(self, law: Law, compute_dtype: torch.dtype | None, layout: Layout) -> None:
        device = layout.describe(layout.units[0].hooked_modules[0].weights[0])[1]
        why = (
            "needs whole weights, and this layout shards them" if layout.is_sharded else registers.why_not(law, device)
        )
        if why:
            raise UserError(f"layout.linear: registers {why}; set it to materialised")
        self._law = law
        self._compute_dtype = compute_dtype
        self._said: set[str] = set()

    def serve(
        self,
        hooked: HookedModule,
        calls: Sequence[Call],
        real: Forward,
        shifts: Sequence[Combination],
        serve_weights: ServeWeights,
    ) -> Served:
        """What a module computes for the calls that wait for it.

        Args:
            hooked: the module.
            calls: its waiting calls.
            real: its own forward.
            shifts: of each variant.
            serve_weights: the usual way, for some of the calls.
        """
        matrix = next((w for w in hooked.weights if w.attribute == "weight" and w.trainable), None)
        if matrix is None:
            return serve_weights(hooked, calls, real)
        moved = [call for call in calls if self._takes(hooked, matrix, call, real, shifts[call.caller.variant])]
        if not moved:
            return serve_weights(hooked, calls, real)
        outputs = dict(zip(moved, self._outputs(hooked, matrix, moved, shifts), strict=True))
        rest = [call for call in calls if call not in outputs]
        served = serve_weights(hooked, rest, real) if rest else Served({})
        others = served.forward or functools.partial(on_tensors, hooked, real)

        def forward(call: Call, tensors: list[Tensor]) -> object:
            return outputs.pop(call) if call in outputs else others(call, tensors)

        return Served({call.caller.variant: [] for call in moved} | served.tensors, forward)

    def _takes(self, hooked: HookedModule, matrix: Weight, call: Call, real: Forward, shift: Combination) -> bool:
        """Whether a call is computed in registers. Where its variant moves the weight, and it is not, the log says why.

        Args:
            hooked: the module.
            matrix: its weight.
            call: the call.
            real: the module's own forward.
            shift: of the call's variant.
        """
        if not shift:
            return False
        why = _why_not(hooked, matrix.tensor, call, real, self._compute_dtype or matrix.tensor.dtype)
        if not why and len(shift) > registers.MOST_TERMS:
            why = f"a variant of more than {registers.MOST_TERMS} directions"
        if why and why not in self._said:
            self._said.add(why)
            log.info(
                "layout.linear: variants of %s (and perhaps of other weights) are materialised: %s", matrix.name, why
            )
        return not why

    def _outputs(
        self, hooked: HookedModule, matrix: Weight, moved: Sequence[Call], shifts: Sequence[Combination]
    ) -> list[Tensor]:
        """What the layer gives for each call.

        Args:
            hooked: the layer.
            matrix: its weight.
            moved: the calls.
            shifts: of each variant.
        """
        inputs = [call.args[0].detach() for call in moved]
        bias = next((w for w in hooked.weights if w.attribute == "bias"), None)
        biases = None
        if bias is not None:
            wanted = dict.fromkeys(shifts[call.caller.variant] if bias.trainable else ZERO for call in moved)
            # In one tensor, so that they lie as far from one another in every step: tables of addresses are remembered.
            rows = torch.empty(len(wanted), *bias.shape, dtype=inputs[0].dtype, device=inputs[0].device)
            made = dict(zip(wanted, rows, strict=True))
            part = Part(bias.tensor.detach(), tuple(made.values()), bias.param_id, bias.shape)
            self._law.add_parts([part], list(made))
            biases = [made[shifts[call.caller.variant] if bias.trainable else ZERO] for call in moved]
        return registers.linear(
            self._law,
            matrix.tensor.detach(),
            [shifts[call.caller.variant] for call in moved],
            inputs,
            biases,
            param_id=matrix.param_id,
        )


def _why_not(hooked: HookedModule, weight: Tensor, call: Call, real: Forward, dtype: torch.dtype) -> str:
    """Why a call cannot be computed in registers, whatever its variant; "" if it can.

    Args:
        hooked: the module.
        weight: its weight.
        call: the call.
        real: the module's own forward.
        dtype: of the variants.
    """
    if hooked.kind is not nn.Linear:
        return "not a linear layer"
    if head_rows(hooked.module) is not None:
        return "of an output head only some rows are computed"
    if getattr(real, "__func__", None) is not nn.Linear.forward:
        return "a linear layer whose forward is another one"
    if weight.dtype not in registers.DTYPES or dtype not in registers.DTYPES or not weight.is_contiguous():
        return "a weight that is not contiguous fp32, bf16 or fp16"
    if torch.is_autocast_enabled(weight.device.type):
        return "autocast chooses another dtype"
    x = call.args[0] if len(call.args) == 1 and not call.kwargs else None
    if not isinstance(x, Tensor) or (x.dtype, x.device, *x.shape[-1:]) != (dtype, weight.device, weight.shape[1]):
        return "an input that is not one tensor of the dtype of the passes"
    return ""
