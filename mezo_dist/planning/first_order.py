"""What back-propagation would need on the same machines: SGD, AdamW and LoRA, whole and cut (ZeRO, FSDP).

Bytes per weight in 16 bits with an fp32 master copy (Rajbhandari et al. 2020, arXiv 1910.02054): 2 for the weight, 2
for its gradient, and 12 for AdamW's state (master copy and two moments), 4 for SGD's (master copy). In fp32: 4, 4, and
8 or 0. ZeRO stage 1 cuts the state over the ranks, stage 2 the gradients too, stage 3 (FSDP) the weights too. LoRA
trains matrices of rank 16 on the attention's projections, with AdamW's state for those alone.

Activations: 34 bytes per feature of the residual stream, token and layer in 16 bits (Korthikanti et al. 2022, arXiv
2205.05198, without the scores of attention, which fused kernels do not keep); with recomputation the input of each
layer, and one layer's activations. Traffic per step: 2 (n - 1) / n gradients for an all-reduce, and 3 (n - 1) / n
weights for stage 3 (arXiv 1910.02054, section 7). SGD and AdamW train the weights that the run trains; activations are
counted as if all layers did. These are estimates from the literature, not validated here.
"""

from __future__ import annotations

from dataclasses import dataclass

from mezo_dist.planning.machine import Machine
from mezo_dist.planning.setting import Setting
from mezo_dist.planning.shapes import ModelShape

LORA_RANK = 16
KORTHIKANTI = 17
"""Numbers per feature of the residual stream, token and layer, for a feed-forward part four times as wide."""


@dataclass(frozen=True)
class FirstOrder:
    """One way of training with gradients."""

    name: str
    stage: str
    """How it is cut over the ranks."""
    memory: int
    """Bytes of a rank, with whichever is smaller of all activations and recomputed ones that fits."""
    recomputes: bool
    """Activations are recomputed."""
    traffic: int
    """Bytes that a rank gets in a step."""
    fits: bool


def first_order(shape: ModelShape, setting: Setting, machine: Machine) -> list[FirstOrder]:
    """SGD, AdamW and LoRA with everything whole in each rank, and with ZeRO stages 1 to 3, on the same micro-batches.

    Args:
        shape: the model.
        setting: whose micro-batches and dtype count.
        machine: the ranks.
    """
    stages = ["whole"] if machine.ranks == 1 else ["whole (DDP)", "ZeRO-1", "ZeRO-2", "ZeRO-3 / FSDP"]
    options = []
    for name in ("SGD", "AdamW", "LoRA"):
        for stage in stages:
            kept = _state_bytes(shape, setting, machine.ranks, name, stages.index(stage)) + machine.runtime
            whole, recomputed = (kept + _activations(shape, setting, recomputes=r) for r in (False, True))
            recomputes = whole > machine.memory
            memory = recomputed if recomputes else whole
            traffic = _traffic(shape, setting, machine.ranks, name, stages.index(stage))
            options.append(FirstOrder(name, stage, memory, recomputes, traffic, memory <= machine.memory))
    return options


def lora_size(shape: ModelShape) -> int:
    """Weights of LoRA's matrices on the four projections of every attention."""
    inner = shape.heads * shape.head_dim
    pairs = 2 * (shape.hidden + inner) + 2 * (shape.hidden + shape.kv_heads * shape.head_dim)
    return LORA_RANK * pairs * shape.layers


def _state_bytes(shape: ModelShape, setting: Setting, ranks: int, name: str, stage: int) -> int:
    """Weights, gradients, and the state of the optimiser on one rank.

    Args:
        shape: the model.
        setting: whose dtype counts.
        ranks: all ranks.
        name: of the optimiser.
        stage: of ZeRO.
    """
    itemsize = setting.pass_bytes
    trained = lora_size(shape) if name == "LoRA" else shape.num_trainable
    state = {"SGD": 0, "AdamW": 8, "LoRA": 8}[name] + (4 if itemsize == 2 else 0)
    weights = shape.size * itemsize + (trained * itemsize if name == "LoRA" else 0)
    largest = max(sum(w.size for w in unit.weights) for unit in shape.units) * itemsize
    parts = (weights, trained * itemsize, trained * state)
    cut = [part / ranks if stage >= needed else part for part, needed in zip(parts, (3, 2, 1), strict=True)]
    return round(sum(cut) + (2 * largest if stage == 3 else 0))


def _activations(shape: ModelShape, setting: Setting, *, recomputes: bool) -> int:
    """Bytes of activations that the backward pass of one micro-batch needs, its logits among them."""
    tokens = setting.micro_batch * setting.tokens
    inner = shape.inner * shape.active_experts
    numbers = (KORTHIKANTI - 8) * shape.hidden + 2 * inner  # the feed-forward part keeps its input and output twice
    layer = tokens * numbers * setting.pass_bytes
    boundary = tokens * shape.hidden * setting.pass_bytes
    logits = 2 * setting.micro_batch * setting.targets * shape.vocabulary * 4 if setting.reads != "labels" else 0
    return (shape.layers * boundary + layer if recomputes else shape.layers * layer) + logits


def _traffic(shape: ModelShape, setting: Setting, ranks: int, name: str, stage: int) -> int:
    """Bytes that a rank gets in one step: reduced gradients, and from stage 3 on weights, twice, as well.

    Args:
        shape: the model.
        setting: whose dtype counts.
        ranks: all ranks.
        name: of the optimiser.
        stage: of ZeRO.
    """
    trained = lora_size(shape) if name == "LoRA" else shape.num_trainable
    gathers = 2 * shape.size if stage == 3 else 0
    reduced = (1 if stage == 3 else 2) * trained
    return (gathers + reduced) * setting.pass_bytes * (ranks - 1) // ranks
