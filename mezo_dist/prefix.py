"""The frozen prefix: leading blocks that nothing trainable comes before, run once per sample and remembered.

With only the last blocks trainable, most of a forward pass computes what it computed before: hidden states that depend
on the sample and on nothing that is ever changed. They are kept, and the blocks before them skipped. They come from
forward passes of fixed groups of samples, so they have the same bits on any number of ranks, whoever needs them first.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, final

import torch
from torch import Tensor, nn

from mezo_dist.engines.units import find_blocks

log = logging.getLogger(__name__)
Inputs = dict[str, Tensor]
"""``input_ids``, ``attention_mask`` (padding on the right) and maybe more, each [n, length]."""
RunModel = Callable[[nn.Module, Inputs], Any]
"""Calls a model on inputs."""

_entering: ContextVar[Tensor | None] = ContextVar("frozen_prefix", default=None)
"""What the last block of the prefix gives, for the forward pass of this context; None: compute it, and stop there."""


class _Reached(Exception):
    """Ends a forward pass at the end of the prefix."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def run_whole(model: nn.Module, inputs: Inputs) -> Any:
    """``model(**inputs)``; see `RunModel`."""
    return model(**inputs)


@final
class FrozenPrefix:
    """Runs a model from the end of its frozen prefix on.

    Hooks into the prefix's blocks until `detach`; the model is to be called through this object only (a `RunModel`).

    Args:
        blocks: the prefix, in order; each block's output is the next one's first argument and goes nowhere else.
        limit: bytes of hidden states to remember; the samples that were not needed for longest are forgotten first.
        groups: inputs of samples that go through the prefix together; any other sample goes alone.
    """

    def __init__(self, blocks: Sequence[nn.Module], limit: int, groups: Iterable[Inputs] = ()) -> None:
        self._group_of = {key: group for group in groups for key, _ in _samples(group)}
        self._limit = limit
        self._used = 0
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()
        self.blocks = tuple(blocks)
        self._forwards = [block.forward for block in blocks]
        for block, forward in zip(blocks, self._forwards, strict=True):
            replacement = _last(forward) if block is blocks[-1] else _skipped(forward)
            block.forward = replacement

    def __call__(self, model: nn.Module, inputs: Inputs) -> Any:
        """``model(**inputs)``, hidden states of padding excepted (zeros where the prefix ends)."""
        hidden = [self._of(model, key, sample) for key, sample in _samples(inputs)]
        token = _entering.set(nn.utils.rnn.pad_sequence(hidden, batch_first=True))
        try:
            return model(**inputs)
        finally:
            _entering.reset(token)

    def detach(self) -> None:
        """Give the blocks their own forwards back."""
        for block, forward in zip(self.blocks, self._forwards, strict=True):
            block.forward = forward

    def _of(self, model: nn.Module, key: bytes, sample: Inputs) -> Tensor:
        """[length, features] of one sample, from memory if it is there."""
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        group = self._group_of.get(key, sample)
        try:
            model(**{name: tensor.to(sample[name].device) for name, tensor in group.items()})
        except _Reached as reached:
            found = {
                other: hidden[: single["input_ids"].shape[1]].clone()
                for (other, single), hidden in zip(_samples(group), reached.hidden, strict=True)
            }
            self._remember(found)
            return found[key]
        raise RuntimeError("a forward pass did not reach the end of the frozen prefix")

    def _remember(self, found: dict[bytes, Tensor]) -> None:
        for key, hidden in found.items():
            if key not in self._known:
                self._known[key] = hidden
                self._used += hidden.nbytes
        while self._used > self._limit:
            _, forgotten = self._known.popitem(last=False)
            self._used -= forgotten.nbytes


def _samples(inputs: Inputs) -> Iterator[tuple[bytes, Inputs]]:
    """Each sample of a micro-batch by itself, without padding, and a key that tells it from all others."""
    for i, length in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
        sample = {name: tensor[i : i + 1, :length] for name, tensor in inputs.items()}
        yield b"|".join(sample[name].cpu().numpy().tobytes() for name in sorted(sample)), sample


def _skipped(real: Callable[..., Any]) -> Callable[..., Any]:
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return real(hidden, *args, **kwargs) if _entering.get() is None else hidden

    return forward


def _last(real: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        known = _entering.get()
        if known is None:
            raise _Reached(real(*args, **kwargs))
        return known

    return forward


def attach_prefix(model: nn.Module, groups: Sequence[Inputs], limit: int) -> RunModel:
    """How to run ``model`` on inputs: from the end of its frozen prefix on where it has one, else as it is.

    The log says what is done, and why a prefix that is there cannot be used.

    Args:
        model: weights that must not change have ``requires_grad`` off.
        groups: inputs of all micro-batches of the data, each of which goes through the prefix at once; on the first one
            the shortcut is compared with the whole way.
        limit: bytes of hidden states to remember per process.
    """
    probe = groups[0]
    with torch.no_grad():
        blocks, reason = find_prefix(model, probe)
        if blocks:
            prefix = FrozenPrefix(blocks, limit)
            short = prefix(model, probe).logits
            prefix.detach()
            if _agree(short, run_whole(model, probe).logits, probe["attention_mask"]):
                log.info("the first %d blocks are frozen: each sample goes through them once", len(blocks))
                return FrozenPrefix(blocks, limit, groups)
            reason = "skipping them changes the logits"
    if reason:
        log.info("the first blocks are frozen, but every forward pass computes them: %s", reason)
    return run_whole


def _agree(short: Tensor, whole: Tensor, mask: Tensor) -> bool:
    if short.dim() == 3 and short.shape[1] == mask.shape[1]:  # logits of padding are nobody's business
        short, whole = short[mask.bool()], whole[mask.bool()]
    return torch.allclose(short.float(), whole.float(), rtol=1e-2, atol=1e-2)


def find_prefix(model: nn.Module, probe: Inputs) -> tuple[list[nn.Module], str]:
    """Leading blocks before whose end nothing trainable is used, as far as they hand one tensor on to one another.

    Returns:
        The blocks in the order of their calls, and why there are not more of them, if that is not for their weights.
    """
    called: list[tuple[nn.Module, Any, Any]] = []
    trainable = {m for m in model.modules() if any(p is not None and p.requires_grad for p in m._parameters.values())}
    reached = False

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal reached
        reached = reached or module in trainable

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if not reached:
            called.append((module, args, output))

    blocks = set(find_blocks(model))
    hooks = [module.register_forward_pre_hook(enter) for module in model.modules()]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    try:
        model(**probe)
    finally:
        for hook in hooks:
            hook.remove()
    prefix: list[nn.Module] = []
    handed: Any = None
    for block, args, output in called:
        if not prefix and not (args and isinstance(args[0], Tensor) and args[0].is_floating_point()):
            continue  # embeddings count as a block in some models; they are cheap, and may be called as they are
        if block in prefix or not isinstance(output, Tensor):
            return prefix, f"a {type(block).__name__} is called twice, or gives more than one tensor"
        if prefix and (not args or args[0] is not handed):
            return prefix, f"a {type(block).__name__} does not take what the one before it gives"
        prefix.append(block)
        handed = output
    return prefix, ""
