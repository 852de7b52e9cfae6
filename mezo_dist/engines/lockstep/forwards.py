"""What may stand before a module's own forward, in one declared order.

Several parts of mezo_dist replace what a call of a module computes. Each is a layer around the module's forward, and
`Layer` says which layer is inside which, in whatever order they are added.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any, final

from torch import nn

Forward = Callable[..., Any]
Around = Callable[..., Any]
"""(module, inner forward, *args, **kwargs) -> output: computes a call, by way of the inner forward or not."""


class Layer(enum.IntEnum):
    """The layers, from the innermost to the outermost."""

    HEAD_ROWS = 1
    """An output head computes some of its rows (`mezo_dist.engines.lockstep.head_slice`). The fan-out must know, so
    that it materialises those rows alone, and so this layer is inside of it."""
    FAN_OUT = 2
    """The call waits for the other passes and is computed on its variant's weights
    (`mezo_dist.engines.lockstep.fanout`). Directions per sample are part of how it is computed."""
    HEAD_POSITIONS = 3
    """An output head gets hidden states of some positions. They are picked inside the pass, before it waits."""
    RECOMPUTED = 4
    """A block keeps its inputs alone for a backward pass (`mezo_dist.baselines.backward`)."""
    FROZEN_CACHE = 5
    """A frozen module gives what it gave before (`mezo_dist.models.frozen_cache`). A call that is answered from
    memory neither waits nor needs weights."""


@final
class _Stack:
    """Stands in for a module's ``forward``. Built of partials of the module, so that ``copy.deepcopy`` of a model
    gives a model whose layers refer to the copy."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.is_replaced = "forward" in vars(module)
        self.original: Forward = module.forward
        self.layers: dict[Layer, Around] = {}
        self.top: Forward = self.original

    def change(self, layer: Layer, around: Around | None) -> None:
        """Put a layer in, or (None) take it out."""
        if around is None:
            del self.layers[layer]
        else:
            self.layers[layer] = around
        self.top = self.below(None)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self.top(*args, **kwargs)

    def below(self, limit: Layer | None) -> Forward:
        """What the module computes without ``limit`` and the layers outside of it; None: with all of them."""
        forward = self.original
        for layer in sorted(self.layers) if len(self.layers) > 1 else self.layers:
            if limit is not None and layer >= limit:
                break
            forward = functools.partial(self.layers[layer], self.module, forward)
        return forward


def add_layer(module: nn.Module, layer: Layer, around: Around) -> None:
    """Put a layer around ``module``'s forward, at its place among those that are there.

    Args:
        module: the module.
        layer: its place; what was there before is replaced.
        around: what is called in place of the forward.
    """
    attributes = module.__dict__  # a Module's own way to set an attribute takes ten times as long
    stack = attributes.get("forward")
    if not isinstance(stack, _Stack):
        stack = attributes["forward"] = _Stack(module)
    stack.change(layer, around)


def remove_layer(module: nn.Module, layer: Layer) -> None:
    """Take a layer off; after the last one the module has the forward that it had before."""
    attributes = module.__dict__
    stack = attributes["forward"]
    stack.change(layer, None)
    if stack.layers:
        return
    if stack.is_replaced:
        attributes["forward"] = stack.original
    else:
        del attributes["forward"]  # it was the class's method


def layer_of(module: nn.Module, layer: Layer) -> Around | None:
    """What `add_layer` put there, if anything."""
    stack = module.__dict__.get("forward")
    return stack.layers.get(layer) if isinstance(stack, _Stack) else None


def forward_below(module: nn.Module, layer: Layer) -> Forward:
    """What ``module`` computes without ``layer`` and the layers outside of it."""
    stack = module.__dict__.get("forward")
    return stack.below(layer) if isinstance(stack, _Stack) else module.forward
