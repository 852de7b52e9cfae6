"""Statistics of the laws: moments, distribution, independence. All seeds are fixed, so nothing here flickers.

Thresholds are what a right generator passes for all but about one seed in a million: 5 standard deviations of one
statistic, and for the greatest of m statistics the normal quantile that leaves 1e-6 / m on either side.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor

from mezo_dist.directions.bits import GAUSSIAN, RADEMACHER, BitLayout, gaussian_table
from mezo_dist.directions.philox import KEY_INCREMENTS, MASK32, MULTIPLIERS, ROUNDS, direction_words
from mezo_dist.directions.seeds import derive_seed

LAWS = [GAUSSIAN, RADEMACHER]
CHUNKS = 4096


@functools.cache
def sample(bits: BitLayout) -> Tensor:
    """One direction, fp32 [4096, 1024]: 4 million values."""
    return bits.chunks(derive_seed(0, "statistics"), 77, first_chunk=0, num_chunks=CHUNKS)


def support(bits: BitLayout) -> Tensor:
    """The equally likely values of a bits, fp64."""
    return torch.tensor(gaussian_table() if bits is GAUSSIAN else [-1.0, 1.0], dtype=torch.float64)


def check_uncorrelated(rows: Tensor) -> None:
    """Every pair of rows [k, n] (of mean 0, n values each) is as uncorrelated as independent rows are.

    For independent rows a pair's sqrt(n) * r is near N(0, 1). Over the m pairs the r are uncorrelated among themselves
    and so, once all rows have one length, are their squares: the sums have deviations sqrt(m) and sqrt(2 m).
    """
    k, n = rows.shape
    unit = rows / rows.norm(dim=1, keepdim=True)
    first, second = torch.triu_indices(k, k, offset=1)
    scores = (unit @ unit.T)[first, second].double() * math.sqrt(n)
    m = len(scores)
    assert scores.abs().max() < NormalDist().inv_cdf(1 - 1e-6 / m)
    assert abs(scores.square().sum() - m) < 5 * math.sqrt(2 * m)
    assert abs(scores.sum()) < 5 * math.sqrt(m)


# --- one element --------------------------------------------------------------------------------------------------


def test_table_has_the_moments_of_the_normal_distribution() -> None:
    z = support(GAUSSIAN)
    assert z.mean().item() == pytest.approx(0, abs=1e-12)
    assert z.pow(3).mean().item() == pytest.approx(0, abs=1e-12)  # symmetric, but threads sum in different orders
    assert z.square().mean().item() == pytest.approx(1, abs=1e-7)  # values are rounded to fp32
    # The fourth moment lacks what the normal distribution has beyond the table's end: E[z^4; |z| > end] = 0.0065.
    normal, end = NormalDist(), z.max().item()
    beyond = 2 * ((end**3 + 3 * end) * normal.pdf(end) + 3 * normal.cdf(-end))
    assert abs(z.pow(4).mean() - 3) < beyond < 0.01


@pytest.mark.parametrize("bits", LAWS, ids=lambda bits: bits.name)
@pytest.mark.parametrize("power", [1, 2, 3, 4])
def test_moments(bits: BitLayout, power: int) -> None:
    values, expected = sample(bits).double().pow(power), support(bits).pow(power)
    deviation = expected.std(correction=0) / math.sqrt(values.numel())
    assert abs(values.mean() - expected.mean()) <= 5 * deviation + 1e-15


def test_gaussian_values_follow_the_table() -> None:
    """Kolmogorov-Smirnov and chi-square of the 65536 equally likely values."""
    n = sample(GAUSSIAN).numel()
    table = torch.from_numpy(gaussian_table().copy())
    places = torch.searchsorted(table, sample(GAUSSIAN).flatten())
    assert torch.equal(table[places], sample(GAUSSIAN).flatten())
    counts = torch.bincount(places, minlength=65536).double()
    # Dvoretzky-Kiefer-Wolfowitz: P(D > x) <= 2 exp(-2 n x^2), for any distribution; here it is to be 1e-6
    distance = (counts.cumsum(0) / n - torch.arange(1, 65537, dtype=torch.float64) / 65536).abs().max()
    assert distance < math.sqrt(math.log(2 / 1e-6) / (2 * n))
    # mean 65535, deviation sqrt(2 * 65535): 64 expected in each cell are enough for that. Too even is wrong, too.
    chi_square = ((counts - n / 65536).square() / (n / 65536)).sum()
    assert abs(chi_square - 65535) < 5 * math.sqrt(2 * 65535)


def test_rademacher_bits_follow_no_pattern() -> None:
    """Chi-square of the 65536 patterns of 16 neighbouring signs."""
    bits = (sample(RADEMACHER).flatten().numpy() > 0).astype(np.uint8)
    patterns = np.packbits(bits, bitorder="little").view("<u2")
    expected = len(patterns) / 65536  # 4
    counts = np.bincount(patterns, minlength=65536)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # A count's fourth moment adds 1 / expected to the variance 2 of a cell's term.
    assert abs(chi_square - 65535) < 5 * math.sqrt((2 + 1 / expected) * 65535)


# --- independence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", LAWS, ids=lambda bits: bits.name)
def test_elements_of_a_chunk_are_uncorrelated(bits: BitLayout) -> None:
    """All 523,776 pairs of places in a chunk, so every way in which elements share a block, a word or a half."""
    check_uncorrelated(sample(bits).T.contiguous())


@pytest.mark.parametrize("bits", LAWS, ids=lambda bits: bits.name)
@pytest.mark.parametrize("lag", [1, 2, 128, 1023, 1024, 1025, 8192, 131072])
def test_elements_a_lag_apart_are_uncorrelated(bits: BitLayout, lag: int) -> None:
    values = sample(bits).flatten()
    products = (values[lag:] * values[:-lag]).double()
    assert abs(products.sum()) < 5 * math.sqrt(len(products))


def test_sizes_of_gaussian_elements_are_uncorrelated() -> None:
    """Squares, brought to mean 0: independent is more than uncorrelated."""
    check_uncorrelated((sample(GAUSSIAN).square() - 1).T.contiguous())


@pytest.mark.parametrize("bits", LAWS, ids=lambda bits: bits.name)
def test_directions_are_uncorrelated(bits: BitLayout) -> None:
    """Across seeds, parameters and streams: neighbours, numbers one bit apart, derived seeds; 46,056 pairs."""
    seed, parameter = 0x0123456789ABCDEF, 0x89ABCDEF
    names = {(derive_seed(0, "step", i), parameter, 0) for i in range(100)}
    names |= {(i, parameter, 0) for i in range(50)}
    names |= {(seed, i, 0) for i in range(50)}
    names |= {(seed ^ (1 << bit), parameter, 0) for bit in range(64)}
    names |= {(seed, parameter ^ (1 << bit), 0) for bit in range(32)}
    names |= {(seed, parameter, stream) for stream in range(4)} | {(parameter, seed & MASK32, 0)}
    names |= {(0, 0, stream) for stream in range(1, 4)}
    rows = [replace(bits, stream=stream).chunks(s, p, 0, 8).flatten() for s, p, stream in sorted(names)]
    assert len(rows) == 304
    check_uncorrelated(torch.stack(rows))


# --- no block twice -----------------------------------------------------------------------------------------------


def test_no_block_repeats_within_a_direction() -> None:
    """By construction: a block's words can be turned back into its parameter, stream and number, so no two are equal.

    Blocks are taken from all over the 2**36 elements that the largest tables have (a 7B model has 2**33 in all).
    """
    seed, parameter, stream = 0xFEDCBA9876543210, 0xDEADBEEF, 1
    for first in (0, 2**20 - 2, 2**30 - 2, 2**32 - 2, 2**33 - 4):
        words = direction_words(seed, parameter, stream, first, 4)
        for j in range(4):
            low, high, *rest = counter_of(words[:, j].tolist(), seed)
            assert low + (high << 32) == first + j
            assert rest == [parameter, stream]


def counter_of(words: list[int], seed: int) -> list[int]:
    """Philox backwards: its multipliers are odd, so each has an inverse modulo 2**32."""
    keys = [[(word + r * step) & MASK32 for word, step in zip((seed & MASK32, seed >> 32), KEY_INCREMENTS, strict=True)]
            for r in range(ROUNDS)]  # fmt: skip
    for k0, k1 in reversed(keys):
        c0 = words[3] * pow(MULTIPLIERS[0], -1, 2**32) & MASK32
        c2 = words[1] * pow(MULTIPLIERS[1], -1, 2**32) & MASK32
        c1 = words[0] ^ (MULTIPLIERS[1] * c2 >> 32) ^ k0
        c3 = words[2] ^ (MULTIPLIERS[0] * c0 >> 32) ^ k1
        words = [c0, c1, c2, c3]
    return words


# --- the checks themselves ----------------------------------------------------------------------------------------


def test_the_correlation_check_sees_one_bad_pair_and_a_small_common_part() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 4096, generator=generator)
    check_uncorrelated(rows)
    bad_pair = rows.clone()
    bad_pair[7] = 0.8 * rows[7] + 0.6 * rows[200]
    common = (rows + 0.1 * torch.randn(4096, generator=generator)) / math.sqrt(1.01)
    for wrong in (bad_pair, common):
        with pytest.raises(AssertionError):
            check_uncorrelated(wrong)
