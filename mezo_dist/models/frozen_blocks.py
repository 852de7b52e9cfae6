"""Finding the frozen blocks of a model: the modules that `mezo_dist.models.frozen_cache` runs once per sample.

They are observed while the model runs on one micro-batch: the modules that are called before any trainable one, and the
tensors that they pass on to one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mezo_dist.engines.units import find_blocks

_Called = tuple[nn.Module, tuple[object, ...], object]
"""A module that was called, its arguments, and its output."""
Inputs = dict[str, Tensor]
"""``input_ids``, ``attention_mask`` (padding on the right) and maybe more, each [n, length]."""


@dataclass(frozen=True)
class BlockOutput:
    """A module whose output is remembered."""

    module: nn.Module
    nones: int = -1
    """-1: it gives a tensor; else a tuple of one and so many Nones."""

    @staticmethod
    def of(module: nn.Module, output: object, shape: torch.Size) -> BlockOutput | None:
        """None if the module gives something else than a vector per token, inputs being of ``shape`` [n, length].

        Args:
            module: the module.
            output: what it gave.
            shape: of the inputs, [n, length].
        """
        first, rest = (output[0], output[1:]) if isinstance(output, tuple) and output else (output, ())
        if not isinstance(first, Tensor) or first.shape[:2] != shape or any(item is not None for item in rest):
            return None
        return BlockOutput(module, len(rest) if isinstance(output, tuple) else -1)

    def given(self, tensor: Tensor) -> object:
        """The output that ``tensor`` was taken out of."""
        return tensor if self.nones < 0 else (tensor, *[None] * self.nones)


@dataclass(frozen=True)
class FrozenBlocks:
    """What need not be computed twice."""

    blocks: tuple[nn.Module, ...] = ()
    """In order; each block's output is the next one's first argument and goes nowhere else."""
    ends: tuple[BlockOutput, ...] = ()
    """The last block, and the frozen children that the block after it calls first."""


def find_frozen_blocks(model: nn.Module, probe: Inputs) -> tuple[FrozenBlocks, str]:
    """Leading modules before whose end nothing trainable is used: blocks that hand one tensor on to one another, and
    children of the block after them.

    Returns:
        The frozen blocks, and why there are not more of them, if that is not for their weights.
    """
    called = _frozen_calls(model, probe)
    blocks = set(find_blocks(model))
    leading: list[nn.Module] = []
    last: tuple[BlockOutput, ...] = ()
    handed: object = None
    reason = ""
    rest: Sequence[_Called] = ()
    for place, (block, args, output) in enumerate(called):
        if block not in blocks:
            continue
        if not leading and not (args and isinstance(args[0], Tensor) and args[0].is_floating_point()):
            continue  # embeddings count as a block in some models; they are cheap, and may be called as they are
        if block in leading or not isinstance(output, Tensor):
            reason = f"a {type(block).__name__} is called twice, or gives more than one tensor"
            break
        if leading and (not args or args[0] is not handed):
            reason = f"a {type(block).__name__} does not take what the one before it gives"
            break
        leading.append(block)
        last, handed, rest = (BlockOutput(block),), output, called[place + 1 :]
    if reason or not leading:
        return FrozenBlocks(tuple(leading), last), reason
    return FrozenBlocks(
        tuple(leading), (*last, *_leading_children(blocks - set(leading), rest, probe["input_ids"].shape))
    ), ""


def _frozen_calls(model: nn.Module, probe: Inputs) -> list[_Called]:
    """Module, arguments and output of all calls that end before anything trainable is used, in order."""
    called: list[_Called] = []
    trainable = {m for m in model.modules() if any(p is not None and p.requires_grad for p in m._parameters.values())}
    reached = False

    def enter(module: nn.Module, args: tuple[object, ...]) -> None:
        nonlocal reached
        reached = reached or module in trainable

    def leave(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        if not reached:
            called.append((module, args, output))

    hooks = [module.register_forward_pre_hook(enter) for module in model.modules()]
    hooks += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        model(**probe)
    finally:
        for hook in hooks:
            hook.remove()
    return called


def _leading_children(blocks: set[nn.Module], called: Sequence[_Called], shape: torch.Size) -> list[BlockOutput]:
    """Children of the block that was entered that gave one tensor each before anything trainable was used.

    Args:
        blocks: the blocks that are not frozen as a whole.
        called: calls after the last frozen block.
        shape: of the inputs, [n, length].
    """
    ends: list[BlockOutput] = []
    for block in blocks:
        children = set(block.children())
        for child, _, output in (call for call in called if call[0] in children):
            end = BlockOutput.of(child, output, shape)
            if end is None or any(end.module is other.module for other in ends):
                break
            ends.append(end)
    return ends
