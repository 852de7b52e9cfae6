"""Bytes that a rank needs for a run of mezo_dist, part by part.

    total = weights + anchor + frozen cache + scratch + runtime
          + the most of: a block being computed, a block being gathered, the output head

Each part is a function below, with its formula. All of it is read off the code of `mezo_dist.engines`; a test holds the
sum against the allocations of real steps (`tests/planning/test_validation.py`).

Assumptions: weights are aligned; no module around the blocks owns weights; random tokens (texts have fewer different
ones, so that less of an embedding is made); everything that is freed can be used again, which allocators of sharded
runs come near to (`mezo_dist.engines.malloc`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mezo_dist.engines.waiting import numbers_held, tokens_that_fit
from mezo_dist.planning.activations import at_boundary, block_places
from mezo_dist.planning.machine import GIB, Machine
from mezo_dist.planning.rounds import BasePasses, Round, rounds_of
from mezo_dist.planning.setting import Setting
from mezo_dist.planning.shapes import ModelShape, ModuleShape, UnitShape, WeightShape

ALIGNMENT = 64
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
            scratch = scratch_bytes(shape, setting, base, width)
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


def resident_weights(shape: ModelShape, setting: Setting, ranks: int) -> int:
    """Weights that a rank keeps: all of them, or its shard of each. FSDP2 cuts the first dimension into equal numbers
    of rows, ZeRO-3 the flattened weight, both rounded up.

    Args:
        shape: the model.
        setting: how the run goes.
        ranks: all ranks.
    """
    return 0 if setting.offload else sum(shard_size(w, setting, ranks) for w in shape.weights) * setting.weight_bytes


def shard_size(weight: WeightShape, setting: Setting, ranks: int) -> int:
    """Elements of a weight that one rank keeps, padding included.

    Args:
        weight: the weight.
        setting: how the run goes.
        ranks: all ranks.
    """
    over = setting.shard_ranks(ranks)
    if setting.layout == "fsdp":
        return math.ceil(weight.shape[0] / over) * math.prod(weight.shape[1:])
    return math.ceil(weight.size / over) if setting.layout == "zero" else weight.size


def anchor_copy(shape: ModelShape, setting: Setting, ranks: int) -> int:
    """MeZO-SVRG's kept copy: this rank's shards of the trainable weights. On sharded layouts the largest shard is there
    once more while copy and weights change places.

    Args:
        shape: the model.
        setting: how the run goes.
        ranks: all ranks.
    """
    sizes = [_unpadded(weight, setting, ranks) for weight in shape.weights if weight.trainable]
    return sum(sizes) * setting.weight_bytes


def _unpadded(weight: WeightShape, setting: Setting, ranks: int) -> int:
    return min(weight.size, shard_size(weight, setting, ranks))


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


def scratch_bytes(shape: ModelShape, setting: Setting, base: BasePasses, width: int) -> int:
    """The buffer in which variants are made, as large as the module that needs most of it: its weights, once for every
    variant that has weights of its own. Of an embedding only the rows of the batch, of a head only those that are read.

    Args:
        shape: the model.
        setting: how the run goes.
        base: its variants.
        width: micro-batches in lock step.
    """
    copies = base.variants if setting.compute is not None else base.copies
    sizes = (_made(module, shape, setting, width) for unit in shape.units for module in unit.modules
             if setting.is_sharded or setting.compute or any(w.trainable for w in module.weights))  # fmt: skip
    return copies * max(sizes, default=0)


def _made(module: ModuleShape, shape: ModelShape, setting: Setting, width: int) -> int:
    """Bytes of one variant of a module."""
    itemsize = setting.pass_bytes if setting.compute else setting.gather_bytes
    rows = None
    if module.kind == "embedding":
        tokens = width * setting.micro_batch * setting.tokens
        rows = expected_rows(module.weights[0].shape[0], tokens)
    elif setting.reads == "labels" and module.weights[0].shape[0] == shape.vocabulary:
        rows = 2
    sizes = (w.size if rows is None else rows * math.prod(w.shape[1:]) for w in module.weights)
    return sum(math.ceil(size * itemsize / ALIGNMENT) * ALIGNMENT for size in sizes)


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
    own = 0 if any(unit.stays for unit in shape.units) else sizes[-1]
    yield (
        "the output head is computed",
        {"gathered": staying + own, "passes": at_head, "logits": logits_bytes(shape, setting), **inputs},
    )


def writing(
    shape: ModelShape, setting: Setting, base: BasePasses, width: int, machine: Machine, free: int
) -> tuple[str, dict[str, int]]:
    """The moment when texts have their full length: keys and values of all their tokens, in every layer. Under law
    lowrank, and from copies of the trainable weights (where these fit into half of the free memory), one pass after
    another writes; otherwise all variants write in lock step (`mezo_dist.engines.decoding`).

    Args:
        shape: the model.
        setting: how the run goes.
        base: its variants.
        width: micro-batches in lock step.
        machine: its ranks.
        free: bytes of a rank that are not in use when the run begins.
    """
    way = writing_way(shape, setting, machine.ranks, free)
    copy = copy_bytes(shape, setting, machine.ranks) if way == "copies" else 0
    passes = 1 if way != "lock step" and not setting.is_sharded else width * (1 if way == "copies" else base.variants)
    keys = 2 * shape.kv_heads * shape.head_dim * shape.layers * setting.pass_bytes
    sizes = [unit_bytes(unit, setting, machine.ranks) if setting.is_sharded else 0 for unit in shape.units]
    parts = {
        "kv cache": passes * setting.micro_batch * (setting.tokens + setting.targets) * keys,
        "copy": copy,
        "gathered": sum(s for s, u in zip(sizes, shape.units, strict=True) if u.stays) + 2 * max(sizes),
    }
    return f"texts are written ({way})", parts


def writing_way(shape: ModelShape, setting: Setting, ranks: int, free: int) -> str:
    """How variants write; see `mezo_dist.engines.decoding.choose_way`.

    Args:
        shape: the model.
        setting: how the run goes.
        ranks: all ranks.
        free: bytes of a rank that are not in use when the run begins.
    """
    if setting.law == "lowrank":
        return "activations"
    return "copies" if copy_bytes(shape, setting, ranks) <= free / 2 else "lock step"


def copy_bytes(shape: ModelShape, setting: Setting, ranks: int) -> int:
    """A copy of this rank's trainable weights; of all weights, where they are cast.

    Args:
        shape: the model.
        setting: how the run goes.
        ranks: all ranks.
    """
    if setting.compute is not None and not setting.is_sharded:
        return shape.size * setting.pass_bytes
    return anchor_copy(shape, setting, ranks)


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


def unit_bytes(unit: UnitShape, setting: Setting, ranks: int) -> int:
    """Bytes of a gathered unit, padding included: every weight once.

    Args:
        unit: the unit.
        setting: how the run goes.
        ranks: all ranks.
    """
    over = setting.shard_ranks(ranks)
    return sum(over * shard_size(weight, setting, ranks) for weight in unit.weights) * setting.gather_bytes
