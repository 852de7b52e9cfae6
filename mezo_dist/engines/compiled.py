"""Units compiled by torch.compile: fewer launches, fused pointwise kernels, and CUDA graphs where there is a GPU.

A block's forward is compiled as a whole, so that no pass waits inside of it: the block is one hooked module then, whose
variants are made together and live until the next one is served. What is compiled is a copy of the block without
weights, into which those of a variant are put for each call: the hooks of the engine are not in it.

A compiled block computes the same with other roundings. See ``train.compile`` for what that means for a run.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mezo_dist.engines.hooked import HookedModule, swapped
from mezo_dist.engines.lockstep.passes import Call
from mezo_dist.errors import UserError

Compile = Literal["off", "units", "graphs"]
"""``units``: compiled code; ``graphs``: replayed as CUDA graphs, too."""
BACKEND = "inductor"


@final
class CompiledUnit:
    """The forward of a block on the weights of a variant, compiled when it is called for the first time.

    Args:
        hooked: the block, with all weights inside of it.
        graphs: record CUDA graphs, and replay them.

    Raises:
        UserError: ``graphs`` without a GPU; torch cannot compile the block.
    """

    def __init__(self, hooked: HookedModule, *, graphs: bool) -> None:
        if graphs and not torch.cuda.is_available():
            raise UserError("train.compile: graphs needs a GPU, and this process sees none; set it to units or off")
        self._name, self._copies_outputs = type(hooked.module).__name__, graphs
        template = _without_weights(hooked.module)
        owners = dict(zip(hooked.module.modules(), template.modules(), strict=True))
        self._weights = tuple(dataclasses.replace(weight, owner=owners[weight.owner]) for weight in hooked.weights)
        # Shapes are symbols from the first call on: else what a sample's loss is rounded to would depend on the lengths
        # of the samples that came before.
        options: dict[str, Any] = {"mode": "reduce-overhead"} if graphs else {}
        self._forward: Callable[..., object] = torch.compile(template, backend=BACKEND, dynamic=True, **options)

    def __call__(self, call: Call, tensors: list[Tensor]) -> object:
        """See `mezo_dist.engines.lockstep.fanout.Served.forward`."""
        try:
            with swapped(self._weights, tensors):
                output = self._forward(*call.args, **call.kwargs)
        except _compiler_errors() as error:
            raise UserError(
                f"train.compile: torch cannot compile a {self._name} of this model here ({_first_line(error)}); set it "
                "to off"
            ) from error
        # A graph writes to the same memory at its next replay, which another pass may ask for at once.
        return pytree.tree_map_only(Tensor, torch.clone, output) if self._copies_outputs else output


def compiled_units(hooked_modules: Iterator[HookedModule], blocks: Sequence[nn.Module], how: Compile) -> Mapping[
    nn.Module, CompiledUnit
]:  # fmt: skip
    """The compiled forwards of those hooked modules that are blocks; empty if none are to be compiled.

    Args:
        hooked_modules: of the model.
        blocks: its blocks.
        how: see `Compile`.
    """
    if how == "off":
        return {}
    wanted = set(blocks)
    return {h.module: CompiledUnit(h, graphs=how == "graphs") for h in hooked_modules if h.module in wanted}


def _without_weights(module: nn.Module) -> nn.Module:
    """A copy whose parameters have shapes alone; buffers are shared."""
    memo: dict[int, object] = {id(buffer): buffer for buffer in module.buffers()}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    return copy.deepcopy(module, memo)


def _compiler_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
