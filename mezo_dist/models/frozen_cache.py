"""The frozen blocks: the leading modules that nothing trainable comes before, run once per sample and remembered.

With only the last weights trainable, most of a forward pass computes what it computed before: hidden states that depend
on the sample and on nothing that is ever changed. They are kept, and the modules before them skipped: leading blocks,
and the leading children (attention, say) of the block after them. If all that is left works position by position, only
the hidden state where the answer is read is kept, and the rest of the model runs on one token per sample. A classifier
is not told where to read; where it reads the first token alone (BERT's family), the same is done with that one.

Hidden states come from forward passes of fixed groups of samples, so they have the same bits on any number of ranks,
whoever needs them first.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from mezo_dist.directions import devices
from mezo_dist.engines.lockstep.forwards import Forward, Layer, add_layer, remove_layer
from mezo_dist.engines.lockstep.head_slice import HeadSlice, hidden_at
from mezo_dist.models.frozen_blocks import FrozenBlocks, Inputs, find_frozen_blocks
from mezo_dist.models.frozen_groups import Group, Groups, OneGroup

log = logging.getLogger(__name__)
RunModel = Callable[[nn.Module, Inputs, Tensor | None], Tensor]
"""Calls a model on inputs; its logits. Given positions (int64 [n]): [n, rows], sample i's at positions[i]; given some
for each sample (int64 [n, m]): [n, m, rows]."""
TOLERANCE = {4: 1e-4, 2: 2e-2}
"""Largest error of logits by rounding, as a part of the largest logit, by the bytes of a number. (A fp32 model whose
last block attended to one token in place of all was off by 4e-3.)"""

_known: ContextVar[Sequence[object] | None] = ContextVar("frozen_known", default=None)
"""The remembered outputs of the modules at the end of the frozen blocks, for the forward pass of this context."""
_recorded: ContextVar[list[object] | None] = ContextVar("frozen_recorded", default=None)
"""The list to which these modules append their outputs; the pass stops after the last of them."""


class _Reached(Exception):
    """Ends a forward pass at the end of the frozen blocks."""


def run_whole(model: nn.Module, inputs: Inputs, positions: Tensor | None = None) -> Tensor:
    """Every module computes; see `RunModel`.

    Args:
        model: the model.
        inputs: its inputs.
        positions: int64 [n]: where logits are read; None: everywhere.
    """
    token = HeadSlice.at(positions)
    try:
        logits: Tensor = model(**inputs).logits
        is_sliced = HeadSlice.was_used()
    finally:
        HeadSlice.reset(token)
    if positions is None:
        return logits
    logits = logits if is_sliced else hidden_at(logits, positions)
    return logits[:, 0] if positions.dim() == 1 else logits


@final
class FrozenCache:
    """Runs a model from the end of its frozen blocks on: a `RunModel`.

    Hooks into the frozen modules until `detach`; the model is to be called through this object only.

    Args:
        frozen: from `find_frozen_blocks`.
        limit: bytes of hidden states to remember; the samples that were not needed for longest are forgotten first.
        groups: samples that go through the frozen blocks together; any other sample goes alone, and one that is in
            several groups goes with the first that they name.
        narrow: keep the hidden state at the sample's position only; without positions, that of its first token.
    """

    def __init__(self, frozen: FrozenBlocks, limit: int, groups: Groups, *, narrow: bool = False) -> None:
        self.frozen, self.narrow = frozen, narrow
        self._limit, self._used = limit, 0
        self._groups = groups
        self._latest: tuple[Tensor | None, list[object]] = None, []
        self._known: OrderedDict[bytes, list[Tensor]] = OrderedDict()
        for block in frozen.blocks[:-1]:
            add_layer(block, Layer.FROZEN_CACHE, _skip)
        for index, end in enumerate(frozen.ends):
            add_layer(end.module, Layer.FROZEN_CACHE, _Keep(index, is_last=end is frozen.ends[-1]))

    def __call__(self, model: nn.Module, inputs: Inputs, positions: Tensor | None = None) -> Tensor:
        """See `RunModel`. Hidden states of padding are zeros where the frozen blocks end."""
        ids, known = self._latest
        if inputs["input_ids"] is not ids:  # all variants of a micro-batch come one after another
            known_at = positions if self.narrow else None  # else states of all positions are known
            device = inputs["input_ids"].device
            hidden = [self._of(model, key, sample, device) for key, sample in self._samples((inputs, known_at))]
            ends = zip(self.frozen.ends, zip(*hidden, strict=True), strict=True)
            known = [end.given(nn.utils.rnn.pad_sequence(list(states), batch_first=True)) for end, states in ends]
            self._latest = inputs["input_ids"], known
        token = _known.set(known)
        try:
            if self.narrow and positions is None:  # embeddings of the other tokens need not be made, either
                inputs = {name: tensor[:, :1] for name, tensor in inputs.items()}
            at = torch.zeros_like(positions) if self.narrow and positions is not None else positions
            return run_whole(model, inputs, at)
        finally:
            _known.reset(token)

    def detach(self) -> None:
        """Take the layers off the modules again."""
        for module in (*self.frozen.blocks[:-1], *(end.module for end in self.frozen.ends)):
            remove_layer(module, Layer.FROZEN_CACHE)

    def _of(self, model: nn.Module, key: bytes, sample: Group, device: torch.device) -> list[Tensor]:
        """The output of each end for one sample: [length, features], or [1, features] if narrow.

        Args:
            model: the model.
            key: tells the sample from all others.
            sample: the sample by itself.
            device: where the model is.
        """
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        number = self._group_of(key, sample)
        group = sample if number is None else self._group(number)
        computed = dict(self._compute(model, group, device))
        for other, one in self._samples(group):
            if other != key and self._group_of(other, one, number) != number:
                computed.pop(other, None)  # else it would depend on whose turn it was which group counts for a sample
        self._remember(computed)
        return computed[key]

    def _group(self, number: int) -> Group:
        inputs, positions = self._groups.group(number)
        return inputs, positions if self.narrow else None

    def _group_of(self, key: bytes, sample: Group, is_in: int | None = None) -> int | None:
        """The number of the group that counts for a sample; None if it is in none.

        Args:
            key: tells the sample from all others.
            sample: the sample by itself.
            is_in: the number of a group that the sample is in.
        """
        for number in self._groups.numbers(sample[0]["input_ids"].numpy().tobytes()):
            if number == is_in or any(key == other for other, _ in self._samples(self._group(number))):
                return number
        return None

    def _compute(self, model: nn.Module, group: Group, device: torch.device) -> Iterator[tuple[bytes, list[Tensor]]]:
        """Run a group through the frozen blocks. Yields the key of each sample, and the output of each end for it.

        Args:
            model: the model.
            group: samples that go through together.
            device: where the model is.
        """
        outputs: list[Any] = []
        token = _recorded.set(outputs)
        try:
            model(**dict(zip(group[0], devices.upload([*group[0].values()], device), strict=True)))
            raise RuntimeError("a forward pass did not reach the end of the frozen blocks")
        except _Reached:
            pass
        finally:
            _recorded.reset(token)
        tensors = [output if isinstance(output, Tensor) else output[0] for output in outputs]
        for row, (key, (single, position)) in enumerate(self._samples(group)):
            length = single["input_ids"].shape[1]
            first = 0 if position is None else int(position)
            wanted = slice(first, first + 1) if self.narrow else slice(length)
            yield key, [tensor[row, wanted].clone() for tensor in tensors]

    def _remember(self, computed: dict[bytes, list[Tensor]]) -> None:
        for key, states in computed.items():
            if key not in self._known:
                self._known[key] = states
                self._used += sum(state.nbytes for state in states)
        while self._used > self._limit:
            _, forgotten = self._known.popitem(last=False)
            self._used -= sum(state.nbytes for state in forgotten)

    def _samples(self, group: Group) -> Iterator[tuple[bytes, Group]]:
        """Each sample of a micro-batch by itself in host memory, without padding, and a key that tells it from all
        others. The host knows what it brought to a device, and need not wait for it."""
        *tensors, positions = devices.known([*group[0].values(), torch.empty(0) if group[1] is None else group[1]])
        inputs = dict(zip(group[0], tensors, strict=True))
        for i, length in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
            sample = {name: tensor[i : i + 1, :length] for name, tensor in inputs.items()}
            key = b"|".join(sample[name].numpy().tobytes() for name in sorted(sample))
            position = None if group[1] is None else positions[i : i + 1]
            yield key + (b"" if position is None else b"@%d" % int(position)), (sample, position)


def _skip(block: nn.Module, inner: Forward, hidden: Tensor, *args: object, **kwargs: object) -> object:
    """The layer around a block before the last frozen one: where outputs are remembered, it passes its input on
    unchanged.

    Args:
        block: the block.
        inner: the forward inside of this layer.
        hidden: [n, length, features].
    """
    return inner(hidden, *args, **kwargs) if _known.get() is None else hidden


@dataclass(frozen=True)
class _Keep:
    """The layer around a module whose output is remembered."""

    index: int
    """Its place among these modules."""
    is_last: bool

    def __call__(self, module: nn.Module, inner: Forward, *args: object, **kwargs: object) -> object:
        known, recorded = _known.get(), _recorded.get()
        if known is not None:
            return known[self.index]
        output = inner(*args, **kwargs)
        if recorded is not None:
            recorded.append(output)
            if self.is_last:
                raise _Reached
        return output


def attach_frozen_cache(model: nn.Module, groups: Groups, limit: int) -> RunModel:
    """How to run ``model`` on inputs: from the end of its frozen blocks on where it has one, else as it is.

    The log says what is done, and why frozen blocks that are there cannot be skipped.

    Args:
        model: weights that must not change have ``requires_grad`` off.
        groups: all micro-batches of the data; the shortcut is compared with the whole way on the first one.
        limit: bytes of hidden states to remember per process.
    """
    device = next(model.parameters()).device
    first, at = groups.group(0)
    names, tensors = [*first], [*first.values(), *([] if at is None else [at])]
    there = devices.upload(tensors, device)
    devices.remember(there, tensors)
    inputs = dict(zip(names, there, strict=False))
    positions = None if at is None else there[-1]
    probe = (inputs, positions)
    with torch.no_grad():
        frozen, reason = find_frozen_blocks(model, inputs)
        if frozen.blocks:
            whole = run_whole(model, inputs, positions)
            one, is_narrow = OneGroup(probe), positions is not None
            is_narrow = is_narrow or _reads_first_token(model, FrozenCache(frozen, limit, one), inputs)
            for narrow in [True, False] if is_narrow else [False]:
                if _agrees(model, FrozenCache(frozen, limit, one, narrow=narrow), probe, whole):
                    inner = len(frozen.ends) - 1
                    log.info(
                        "the first %d blocks%s are frozen: each sample goes through them once; from there on, %s",
                        len(frozen.blocks),
                        f" and {inner} modules of the next one" * bool(inner),
                        "only the token at its answer" if narrow else "all its tokens",
                    )
                    return FrozenCache(frozen, limit, groups, narrow=narrow)
            reason = "skipping them changes the logits"
    if reason:
        log.info("the first blocks are frozen, but every forward pass computes them: %s", reason)
    return run_whole


def _reads_first_token(model: nn.Module, cache: FrozenCache, inputs: Inputs) -> bool:
    """Whether, from the end of the frozen blocks on, the logits of every sample are a function of its first token: they
    have the same bits whatever is said of the others, and not if something else is said of the first.

    Args:
        model: the model.
        cache: the cache, attached, not narrow; it is detached here.
        inputs: of a micro-batch.
    """
    try:
        logits = [cache(model, inputs)]
        for tokens in (slice(1, None), slice(1)):
            for output in cache._latest[1]:
                (output if isinstance(output, Tensor) else output[0])[:, tokens].mul_(-3).add_(5)  # type: ignore[index]
            logits.append(cache(model, inputs))
    except Exception as error:  # noqa: BLE001 (as in `_agrees`)
        log.debug("the frozen blocks failed: %s", error)
        return False
    finally:
        cache.detach()
    plain, others, first = devices.read(logits)
    return plain.dim() == 2 and torch.equal(plain, others) and bool((others != first).any(-1).all())


def _agrees(model: nn.Module, cache: FrozenCache, probe: Group, whole: Tensor) -> bool:
    """Whether the logits of the frozen cache are those of the whole way, but for rounding. What rounding makes of
    logits goes with their size: those of a fresh or tiny head are small all over.

    Args:
        model: the model.
        cache: the cache, attached; it is detached here.
        probe: a micro-batch.
        whole: its logits, computed the whole way.
    """
    inputs, positions = probe
    try:
        short = cache(model, inputs, positions)
    except Exception as error:  # noqa: BLE001 (model code meets one token per sample where it wants all of them)
        log.debug("the frozen blocks failed: %s", error)
        return False
    finally:
        cache.detach()
    if positions is None and whole.dim() == 3 and short.shape == whole.shape:  # logits of padding do not count
        mask = inputs["attention_mask"].bool()
        short, whole = short[mask], whole[mask]
    if short.shape != whole.shape:
        return False
    largest = [tensor.abs().max() for tensor in (short.float() - whole.float(), whole.float())]
    off, size = devices.read(largest)
    return bool(off <= TOLERANCE[4 if whole.dtype.itemsize >= 4 else 2] * size)
