"""`add` and `advance` in plain torch: the definition that every fast path must equal bit for bit.

``out = cast(w + sum_k c_k z_k)``: in fp32, terms in the combination's order, multiply then add, each rounded, one
cast at the end. Memory: a few hundred KiB of scratch however large the parameter is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mezo_dist.directions import philox
from mezo_dist.directions.bits import CHUNK, BitLayout, halves
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.parts import Part

CHUNKS_AT_ONCE = 64
ROUNDING_BLOCKS_PER_CHUNK = 128


def add(
    weight: Tensor,
    combinations: Sequence[Combination],
    outputs: Sequence[Tensor],
    *,
    param_id: int,
    offsets: Sequence[int],
    bits: BitLayout,
    rounding_seed: int | None,
) -> None:
    """See `mezo_dist.directions.add.add`."""
    weight, *outputs = (tensor.detach().view(len(offsets), -1) for tensor in (weight, *outputs))
    length = weight.shape[1]
    for row, offset in enumerate(offsets):
        start = offset
        while start < offset + length:
            first_chunk = start // CHUNK
            stop = min(offset + length, (first_chunk + CHUNKS_AT_ONCE) * CHUNK)
            piece = slice(start - offset, stop - offset)
            in_chunks = slice(start - first_chunk * CHUNK, stop - first_chunk * CHUNK)
            num_chunks = -(-stop // CHUNK) - first_chunk
            source = weight[row, piece].to(torch.float32, copy=True)
            for combination, output in zip(combinations, outputs, strict=True):
                total = source.clone()
                for seed, coefficient in combination.terms:
                    z = bits.chunks(seed, param_id, first_chunk, num_chunks).flatten()[in_chunks]
                    total += coefficient * z.to(total.device)
                if rounding_seed is not None:
                    noise = _rounding_bits(rounding_seed, param_id, first_chunk, num_chunks)[in_chunks]
                    total = round_stochastically(total, noise.to(total.device))
                output[row, piece] = total.to(output.dtype)
            start = stop


def advance(
    weight: Tensor,
    updates: Sequence[tuple[Combination, int | None]],
    *,
    param_id: int,
    bits: BitLayout,
    offset: int,
) -> None:
    """See `mezo_dist.directions.add.advance`."""
    for combination, seed in updates:
        add(weight, [combination], [weight], param_id=param_id, offsets=[offset], bits=bits, rounding_seed=seed)


def add_lowrank(
    part: Part,
    combinations: Sequence[Combination],
    factors: dict[int, tuple[Tensor, Tensor]],
    rounding_seed: int | None,
) -> None:
    """`add` of low-rank directions, as GPUs compute it: ``z = sum_r u_r v_r``, r in order, each operation rounded.

    (On the CPU `mezo_dist.directions.lowrank` uses matrix products: the same directions, other last bits.)

    Args:
        part: a matrix, a shard or some of its rows.
        combinations: one per output.
        factors: of each seed, U [rows, rank] and V [columns, rank] of the whole matrix, fp32, on the part's device.
        rounding_seed: for bf16 outputs that are to be rounded stochastically.
    """
    columns = part.columns
    elements = torch.arange(part.weight.numel() // part.num_pieces)
    starts = torch.tensor([part.offset]) if part.rows is None else part.rows.cpu() * columns
    elements = (starts.unsqueeze(1) + elements).flatten()
    rows, places = (elements // columns).to(part.weight.device), (elements % columns).to(part.weight.device)
    source = part.weight.detach().reshape(-1).to(torch.float32, copy=True)
    for combination, output in zip(combinations, part.outputs, strict=True):
        total = source.clone()
        for seed, coefficient in combination.terms:
            u, v = factors[seed]
            z = u[rows, 0] * v[places, 0]
            for r in range(1, u.shape[1]):
                z = z + u[rows, r] * v[places, r]
            total += coefficient * z
        if rounding_seed is not None:
            first = int(elements.min()) // CHUNK
            noise = _rounding_bits(rounding_seed, part.param_id, first, int(elements.max()) // CHUNK + 1 - first)
            total = round_stochastically(total, noise[elements - first * CHUNK].to(total.device))
        output.view(-1).copy_(total.to(output.dtype))


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
    """A linear layer on variants of its weight: each is made by `add`, products are added up in fp32 with the bias, and
    rounded once. `fused_linear.linear` has the same weights bit for bit, and sums in another order.

    Args:
        weight: fp32, bf16 or fp16 [output features, input features]: a whole parameter, or rows of it.
        combinations: of each variant.
        inputs: for each variant [n, input features], of the dtype that weights are cast to.
        biases: for each variant [output features], of the inputs' dtype; None: no bias.
        param_id: see `mezo_dist.directions.seeds.param_id`.
        bits: bit layout of the directions.
        offset: index of the weight's first element in the flattened parameter.

    Returns:
        For each variant [n, output features], of the inputs' dtype.
    """
    outputs = []
    for v, (combination, x) in enumerate(zip(combinations, inputs, strict=True)):
        moved = torch.empty_like(weight, dtype=x.dtype)
        add(weight, [combination], [moved], param_id=param_id, offsets=[offset], bits=bits, rounding_seed=None)
        y = x.float() @ moved.float().T
        outputs.append((y if biases is None else y + biases[v].float()).to(x.dtype))
    return outputs


def _rounding_bits(seed: int, param_id: int, first_chunk: int, num_chunks: int) -> Tensor:
    """16 random bits per element from stream 1, in the ``gaussian`` bit layout: int64 [num_chunks * 1024].

    Args:
        seed: that of the rounding.
        param_id: see `seeds.param_id`.
        first_chunk: number of the first chunk in the full parameter.
        num_chunks: number of chunks of 1024 elements.
    """
    per = ROUNDING_BLOCKS_PER_CHUNK
    words = philox.direction_words(seed, param_id, philox.STREAM_ROUNDING, first_chunk * per, num_chunks * per)
    return halves(words).flatten()


def round_stochastically(value: Tensor, bits: Tensor) -> Tensor:
    """fp32 values rounded to bf16's grid, up with a probability equal to the discarded fraction.

    Args:
        value: fp32 [n].
        bits: int64 [n], uniform in 0..65535. They are added to the 16 bits that bf16 lacks, and those are cut off:
            exact for every finite value, whatever its exponent. Values that are not finite pass unchanged.

    Returns:
        fp32 [n], exactly representable in bf16.
    """
    raw = value.view(torch.int32).to(torch.int64) & philox.MASK32
    rounded = ((raw + bits) & 0xFFFF0000).to(torch.int64)
    rounded = torch.where(rounded >= 2**31, rounded - 2**32, rounded).to(torch.int32).view(torch.float32)
    return torch.where(torch.isfinite(value), rounded, value)
