"""A linear layer on variants of its weight that exist in registers alone (Triton).

`mezo_dist.directions.kernels.gpu` writes variants of a weight to memory, from where a matrix product reads them. Here
the product makes them itself: a program (`fused_linear_kernel`) reads a tile of the weight once for both signs of a
direction, makes the direction's bits, rounds the weight of each variant as `add` would, bit for bit, and multiplies
each variant's input by it. No variant is ever written to memory.

Products are added up in fp32, then comes the bias, then one rounding: an output differs from that of another matrix
product on the same weights by the order of the sum. It has the same bits in every call, and whatever other variants
are computed beside it.

Its weights and sums are checked on an H200 and in Triton's interpreter, its code as compiled for sm_80, sm_90 and
sm_100. Every tile of inputs makes the bits anew. For rademacher directions that is a few instructions per weight, for
gaussian ones ten and a look-up in a table. So on the H200 it was faster than materialised variants only for rademacher
directions and inputs of 16 rows, and slower by far with 640 (``examples/gpu/README.md``). Two variants go into one
launch, for the sums of more do not stay in registers; each pair of signs reads the weight once. Where the number of
input features is no multiple of 128, tiles are not filled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from mezo_dist.directions.bits import CHUNK, RADEMACHER, BitLayout
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.kernels import fused_linear_kernel, gpu, gpu_inputs
from mezo_dist.directions.registers import MOST_TERMS

MOST_OUTPUTS = 2
"""Variants of one launch."""
IS_INTERPRETED = not isinstance(fused_linear_kernel.linear_kernel, triton.JITFunction)
"""Triton decides at import whether it compiles or interprets."""


@dataclass(frozen=True)
class Tile:
    """How much one program computes, and with what."""

    inputs: int
    """Rows of each input."""
    rows: int
    """Rows of the weight: output features."""
    blocks: int = 16
    """Generator blocks of a gaussian chunk at a time."""
    warps: int = 8
    stages: int = 2
    """Tiles of the inputs and the weight that are on their way at a time."""


TILES = {"rademacher": Tile(128, 64), "gaussian": Tile(64, 32)}
FEW = 32
"""Rows of an input that are few: texts being written have one each, and most of the work is reading weights."""
FP32_TILE = Tile(32, 32, stages=1)
"""Where variants are fp32: their products are no work for tensor cores, which would round them to 11 bits."""


def linear(
    weight: Tensor,
    combinations: Sequence[Combination],
    inputs: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    param_id: int,
    bits: BitLayout,
    offset: int = 0,
) -> list[Tensor]:
    """``inputs[v] cast(weight + combinations[v])^T + biases[v]`` for every v; see `reference.linear`, the definition.

    Args:
        weight: fp32, bf16 or fp16 [output features, input features], contiguous: a whole parameter, or rows of it.
        combinations: of each variant, with at most `registers.MOST_TERMS` terms.
        inputs: for each variant [n, input features], contiguous, of the dtype that weights are cast to.
        biases: for each variant [output features], contiguous, of the inputs' dtype; None: no bias.
        param_id: see `seeds.param_id`.
        bits: bit layout of the directions.
        offset: index of the weight's first element in the flattened parameter.

    Returns:
        For each variant [n, output features], of the inputs' dtype.

    Raises:
        ValueError: tensors or combinations that are not as described, or a bit layout that is not known.
    """
    gpu.law_of(bits)  # which refuses what is not known
    _check(weight, combinations, inputs, biases)
    outputs = [x.new_empty(x.shape[0], weight.shape[0]) for x in inputs]
    for places in _launches(combinations, inputs):
        if outputs[places[0]].numel():
            _launch(
                weight,
                [combinations[v] for v in places],
                tuple(inputs[v] for v in places),
                tuple(outputs[v] for v in places),
                None if biases is None else tuple(biases[v] for v in places),
                param_id,
                bits,
                offset,
            )
    return outputs


def _check(
    weight: Tensor, combinations: Sequence[Combination], inputs: Sequence[Tensor], biases: Sequence[Tensor] | None
) -> None:
    """Raises ValueError for what `linear` does not take; its arguments."""
    dtype = inputs[0].dtype
    if weight.dtype not in gpu_inputs.CODES or dtype not in gpu_inputs.CODES or not weight.is_contiguous():
        raise ValueError(f"weights and inputs must be contiguous fp32, bf16 or fp16, not {weight.dtype} and {dtype}")
    for x in inputs:
        if x.dtype != dtype or x.dim() != 2 or x.shape[1] != weight.shape[1] or not x.is_contiguous():
            raise ValueError(f"inputs must be contiguous [n, {weight.shape[1]}] of {dtype}, not {tuple(x.shape)}")
    for bias in biases or ():
        if bias.dtype != dtype or bias.shape != weight.shape[:1] or not bias.is_contiguous():
            raise ValueError(f"biases must be contiguous [{weight.shape[0]}] of {dtype}, not {tuple(bias.shape)}")
    if any(len(combination) > MOST_TERMS for combination in combinations):
        raise ValueError(f"a variant has more than {MOST_TERMS} directions")


def _launches(combinations: Sequence[Combination], inputs: Sequence[Tensor]) -> Iterator[list[int]]:
    """Places of variants that are computed together: those of the same directions and of inputs of one size, in order.

    Args:
        combinations: of each variant.
        inputs: of each variant.
    """
    alike: dict[object, list[int]] = {}
    for v, (combination, x) in enumerate(zip(combinations, inputs, strict=True)):
        alike.setdefault((tuple(seed for seed, _ in combination.terms), x.shape[0]), []).append(v)
    for places in alike.values():
        yield from (places[start : start + MOST_OUTPUTS] for start in range(0, len(places), MOST_OUTPUTS))


def _launch(
    weight: Tensor,
    combinations: Sequence[Combination],
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    biases: tuple[Tensor, ...] | None,
    param_id: int,
    bits: BitLayout,
    offset: int,
) -> None:
    """Launch `fused_linear_kernel.linear_kernel`.

    Args:
        weight: see `linear`.
        combinations: of each variant, of the same directions.
        inputs: of each variant, of one size.
        outputs: where results go.
        biases: of each variant, or None.
        param_id: see `linear`.
        bits: see `linear`.
        offset: see `linear`.
    """
    (num_rows, num_columns), num_inputs = weight.shape, inputs[0].shape[0]
    tile = _tile(_name(bits), inputs[0].dtype, num_inputs)
    # fp32 weights on their way beside 16-bit inputs would take more shared memory than smaller GPUs have.
    stages = 1 if weight.dtype == torch.float32 else tile.stages
    span = 128 if _name(bits) == "rademacher" else CHUNK
    period = span // math.gcd(span, num_columns)
    rows_alike = triton.cdiv(num_rows, period)  # rows that begin at the same place of a span
    tiles = triton.cdiv(num_inputs, tile.inputs) * triton.cdiv(rows_alike, tile.rows) * min(period, num_rows)
    with torch.cuda.device_of(weight):  # Triton launches on the current device; this does nothing to CPU tensors
        where = gpu_inputs.place(weight)
        seeds, coefficients, _ = gpu_inputs.terms_table(gpu_inputs.key([(combinations, None)]), *where)
        gpu.launch(
            fused_linear_kernel.linear_kernel,
            (tiles,),
            weight,
            inputs,
            outputs,
            biases or inputs,
            gpu_inputs.half_table(*where),
            seeds,
            coefficients,
            num_inputs,
            num_rows,
            num_columns,
            offset,
            param_id,
            bits.stream,
            SOURCE=gpu_inputs.CODES[weight.dtype],
            TARGET=gpu_inputs.CODES[inputs[0].dtype],
            GAUSSIAN=span == CHUNK,
            NUM_TERMS=len(seeds),
            NUM_OUTPUTS=len(outputs),
            HAS_BIAS=biases is not None,
            PERIOD=period,
            WHOLE=period == 1 and offset % span == 0,
            INTERPRETED=IS_INTERPRETED,
            TILE_INPUTS=tile.inputs,
            TILE_ROWS=tile.rows,
            TILE_BLOCKS=tile.blocks,
            num_warps=tile.warps,
            num_stages=stages,
        )


def _tile(name: str, dtype: torch.dtype, num_inputs: int) -> Tile:
    """What one program computes.

    Args:
        name: of the bit layout.
        dtype: of the inputs.
        num_inputs: rows of each input.
    """
    if dtype == torch.float32:
        return FP32_TILE
    if num_inputs <= FEW:  # small tiles, for there must be enough of them to occupy a GPU
        return replace(TILES[name], inputs=16 if num_inputs <= 16 else FEW, rows=32, warps=4, stages=3)
    return TILES[name]


def _name(bits: BitLayout) -> str:
    return "rademacher" if bits.values is RADEMACHER.values else "gaussian"
