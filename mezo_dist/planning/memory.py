"""Bytes that a rank needs for a run of mezo_dist, part by part.

    total = weights + anchor + frozen cache + scratch + runtime
          + the most of: a block being computed, a block being gathered, the output head

Each part is a function below, with its formula. All of it is read off the code of `mezo_dist.engines`; a test holds the
sum against the allocations of real steps (`tests/planning/test_validation.py`), to 5 %. Not among its cases: texts that
are written (`mezo_dist.planning.writing`), the frozen cache, offloaded shards, and ``layout.prefetch``.

Assumptions: weights are aligned; no module around the blocks owns weights; random tokens (texts have fewer different
ones, so that less of an embedding is made); everything that is freed can be used again, which allocators of sharded
runs come near to (`mezo_dist.engines.malloc`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mezo_dist.engines.scratch import leading, padded
from mezo_dist.engines.waiting import numbers_held, tokens_that_fit
from mezo_dist.planning.activations import at_boundary, block_places
from mezo_dist.planning.machine import GIB, Machine
from mezo_dist.planning.rounds import BasePasses, Round, rounds_of
from mezo_dist.planning.setting import Setting
from mezo_dist.planning.shapes import ModelShape, ModuleShape
from mezo_dist.planning.weights import anchor_copy, resident_weights, unit_bytes
from mezo_dist.planning.writing import writing

FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    parts: dict[str, int]
    """What is there when the most is there, by name."""
    when: str
    """What happens then."""
    width: int
    """Micro-batches in lock step."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())

    @property
    def tensors(self) -> int:
        """All that torch allocates: without Python and the libraries."""
        return self.total - self.parts["runtime"]


def memory_of(shape: ModelShape, setting: Setting, machine: Machine) -> Memory:
    """The largest memory of a rank over all steps.

    Args:
        shape: the model.
        setting: how the run goes.
        machine: whose ranks it has.
    """
    ranks = machine.ranks
    rounds = rounds_of(setting, ranks)
    kept = {
        "weights": resident_weights(shape, setting, ranks),
        "anchor": anchor_copy(shape, setting, ranks) if any(r.copies_anchor for r in rounds) else 0,
        "frozen cache": frozen_cache(shape, setting),
    }
    free = machine.memory - machine.runtime - sum(kept.values())
    options = []
    for step in rounds:
        width = width_of(shape, setting, step, free)
        for base in step.bases:
            scratch = scratch_bytes(shape, setting, base, width, gpu=machine.gpu)
            moments = [*_moments(shape, setting, base, width, ranks)]
            if setting.reads == "texts":
                moments += [writing(shape, setting, base, width, machine, free)]
            for when, parts in moments:
                options.append(Memory({**kept, "scratch": scratch, **parts, "runtime": machine.runtime}, when, width))
    return max(options, key=lambda memory: memory.total)


def width_of(shape: ModelShape, setting: Setting, step: Round, free: int) -> int:
    """Micro-batches that go through the model in lock step: ``train.width``, or the engine's own rule (a quarter of the
    free memory), but no more than a rank has.

    Args:
        shape: the model.
        setting: how the run goes.
        step: the round.
        free: bytes of a rank that are not in use when the run begins.
    """
    if setting.width is not None:
        return min(setting.width, step.micro_batches)
    if shape.block_kind == "plain":
        widest = shape.inner
    else:
        widest = max(shape.inner * (2 if shape.experts > 1 else 1), shape.heads * shape.head_dim)
    capacity = tokens_that_fit(max(1, free), 1, numbers_held(shape.hidden, widest), setting.pass_bytes)
    variants = sum(base.variants for base in step.bases)
    return min(step.micro_batches, max(1, capacity // (variants * setting.micro_batch * setting.tokens)))


def frozen_cache(shape: ModelShape, setting: Setting) -> int:
    """Outputs of the frozen blocks, one vector per token of every training sample, up to the limit
    (``train.frozen_cache_gib``); nothing on sharded layouts, or where the first block is trained.

    Args:
        shape: the model.
        setting: how the run goes.
    """
    if setting.is_sharded or frozen_layers(shape) == 0:
        return 0
    samples = setting.num_train or setting.full_size
    return min(setting.frozen_cache, samples * setting.tokens * shape.hidden * setting.pass_bytes)


def frozen_layers(shape: ModelShape) -> int:
    """Blocks before which, and in which, nothing is trained. A trainable embedding (of tokens or positions) comes
    before all of them."""
    blocks = [unit for unit in shape.units if unit.is_block]
    ends = [unit for unit in shape.units if not unit.is_block]
    if any(w.trainable for unit in ends for m in unit.modules if m.kind in ("embedding", "other") for w in m.weights):
        return 0
    return next((i for i, unit in enumerate(blocks) if any(w.trainable for w in unit.weights)), len(blocks))


def scratch_bytes(shape: ModelShape, setting: Setting, base: BasePasses, width: int, *, gpu: bool = False) -> int:
    """The buffer in which variants are made, as large as the module that needs most of it: its weights, once for every
    variant that has weights of its own. Of an embedding only the rows of the batch, of a head only those that are read.
    On a GPU modules of a unit are made together, as far as `mezo_dist.engines.scratch` says, and an embedding has a
    row for every token, not for every different one.

    The engine's other buffers there are a few kilobytes: thin factors of the directions that are being added, and
    tables of addresses. Activations are the model's own, and PyTorch's allocator gives their memory out again.

    Args:
        shape: the model.
        setting: how the run goes.
        base: its variants.
        width: micro-batches in lock step.
        gpu: the engine's weights are on a GPU.
    """
    copies = base.variants if setting.compute is not None else base.copies
    largest = 0
    for unit in shape.units:
        modules = [module for module in unit.modules
                   if setting.is_sharded or setting.compute or any(w.trainable for w in module.weights)]  # fmt: skip
        sizes = [copies * _variant_bytes(module, shape, setting, width, gpu=gpu) for module in modules]
        while sizes:
            number = leading(sizes) if gpu and unit.is_block else 1
            number = len(sizes) if setting.compiled and unit.is_block else number
            largest, sizes = max(largest, sum(sizes[:number])), sizes[number:]
    return largest


def _variant_bytes(module: ModuleShape, shape: ModelShape, setting: Setting, width: int, *, gpu: bool) -> int:
    """Bytes of one variant of a module; arguments as those of `scratch_bytes`."""
    itemsize = setting.pass_bytes if setting.compute else setting.gather_bytes
    rows = None
    if module.kind == "embedding":
        tokens = width * setting.micro_batch * setting.tokens
        rows = tokens if gpu else expected_rows(module.weights[0].shape[0], tokens)
    elif setting.reads == "labels" and module.weights[0].shape[:1] == (shape.vocabulary,):
        rows = 2
    sizes = (w.size if rows is None else rows * math.prod(w.shape[1:]) for w in module.weights)
    return sum(padded(size * itemsize) for size in sizes)


def expected_rows(vocabulary: int, tokens: int) -> int:
    """Different tokens among random ones: V (1 - (1 - 1/V)^n).

    Args:
        vocabulary: V.
        tokens: n.
    """
    return math.ceil(-vocabulary * math.expm1(tokens * math.log1p(-1 / vocabulary))) if vocabulary > 1 else 1


def _moments(
    shape: ModelShape, setting: Setting, base: BasePasses, width: int, ranks: int
) -> Iterator[tuple[str, dict[str, int]]]:
    """What may be the moment of the most memory, with the parts that are there then beside those that always are.

    A unit is received in one buffer and copied out of it, so that it is there twice at that time; while one is in use,
    the next one may be on its way (``layout.prefetch``). Tied ends stay once they are there.

    Args:
        shape: the model.
        setting: how the run goes.
        base: its variants.
        width: micro-batches in lock step.
        ranks: all ranks.
    """
    passes, tokens = width * base.variants, setting.micro_batch * setting.tokens
    place = max(block_places(shape, setting), key=lambda p: p.bytes_of(passes))
    hidden = round(passes * tokens * at_boundary(shape, setting))
    at_head = round(passes * setting.micro_batch * (setting.tokens + setting.targets) * shape.hidden)
    at_head *= setting.pass_bytes
    inputs = {"inputs": 2 * width * tokens * 8}  # token ids and masks
    sizes = [unit_bytes(unit, setting, ranks) if setting.is_sharded else 0 for unit in shape.units]
    staying = 0
    for i, unit in enumerate(shape.units):
        size, is_head = sizes[i], i == len(shape.units) - 1 and not unit.is_block
        coming = sizes[i + 1] if setting.prefetch and i + 1 < len(sizes) else 0
        before = hidden if unit.is_block else at_head if is_head else 0
        if size:
            yield (
                f"a unit of {size / GIB:.2f} GiB is gathered",
                {
                    "gathered": staying + 2 * size,
                    "passes": before,
                    **inputs,
                },
            )
        if unit.is_block and size == max(s for s, u in zip(sizes, shape.units, strict=True) if u.is_block):
            held = round(tokens * place.bytes_of(passes))
            yield (
                f"a block is computed ({place.name})",
                {"gathered": staying + size + coming, "passes": held, **inputs},
            )
        if coming:
            yield "the next unit arrives", {"gathered": staying + size + 2 * coming, "passes": hidden, **inputs}
        staying += size if unit.stays else 0
    head = 0 if any(unit.stays for unit in shape.units) else sizes[-1]
    yield (
        "the output head is computed",
        {"gathered": staying + head, "passes": at_head, "logits": logits_bytes(shape, setting), **inputs},
    )


def logits_bytes(shape: ModelShape, setting: Setting) -> int:
    """Logits of one pass (they are made, scored and freed pass after pass): in the dtype of the passes, in fp32 where
    that is another one, and once more inside of logsumexp.

    Args:
        shape: the model.
        setting: how the run goes.
    """
    columns = 2 if setting.reads == "labels" else shape.vocabulary
    copies = setting.pass_bytes + FP32 + (FP32 if setting.pass_bytes < FP32 else 0)
    places = 1 if setting.reads == "texts" else setting.targets  # texts: those of the next token
    return setting.micro_batch * places * columns * copies
