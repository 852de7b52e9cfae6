"""Directions: generator, layout of its bits, sums of directions, names. Against the design's text, not the code.

`literal_*` below are written from DESIGN 2.1 in plain integers, one element at a time. The golden values in
data/directions.json stop the laws from changing unnoticed: where one has to change, its version changes too.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezo_dist.directions import bits as bit_layouts
from mezo_dist.directions.bits import FACTOR_U, FACTOR_V, GAUSSIAN, RADEMACHER, BitLayout, gaussian_table
from mezo_dist.directions.combination import ZERO, Combination, to_fp32
from mezo_dist.directions.kernels import reference
from mezo_dist.directions.philox import MASK32, direction_words, philox4x32
from mezo_dist.directions.seeds import derive_seed, param_id, param_ids

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("data").joinpath("directions.json").read_text())
LAWS = {bits.name: bits for bits in (GAUSSIAN, RADEMACHER, FACTOR_U, FACTOR_V)}
STREAMS = {"gaussian": 0, "rademacher": 0, "lowrank-u": 2, "lowrank-v": 3}

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK32,) * 4, (MASK32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def literal_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


def literal_words(seed: int, parameter: int, stream: int, block: int) -> tuple[int, ...]:
    high, low = divmod(block, 2**32)
    return literal_philox((low, high, parameter, stream), (seed % 2**32, seed >> 32))


def literal_half(seed: int, parameter: int, stream: int, element: int) -> int:
    """16 bits per element: word e // 256, half (e // 128) % 2 (0 = low), block e % 128 of the chunk's 128."""
    chunk, e = divmod(element, 1024)
    word = literal_words(seed, parameter, stream, 128 * chunk + e % 128)[e // 256]
    return word >> 16 if (e // 128) % 2 else word & 0xFFFF


def literal_value(bits: str, seed: int, parameter: int, element: int) -> float:
    if bits != "rademacher":
        return float(gaussian_table()[literal_half(seed, parameter, STREAMS[bits], element)])
    chunk, e = divmod(element, 1024)
    word = literal_words(seed, parameter, 0, 8 * chunk + e // 128)[(e // 32) % 4]
    return 1.0 if (word >> e % 32) & 1 else -1.0


def values(bits: BitLayout, seed: int, parameter: int, start: int, stop: int) -> list[float]:
    first, last = start // 1024, (stop - 1) // 1024
    flat = bits.chunks(seed, parameter, first, last - first + 1).flatten()
    return flat[start - 1024 * first : stop - 1024 * first].tolist()


def sha256(tensor: torch.Tensor) -> str:
    array = tensor.numpy()
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()


# --- the generator -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    assert tuple(philox4x32((c0, c1, c2, c3), key)[:, 0].tolist()) == expected
    assert literal_philox(counter, key) == expected


@given(
    seed=st.integers(0, 2**64 - 1),
    parameter=st.integers(0, MASK32),
    stream=st.integers(0, 3),
    block=st.integers(0, 2**62),
)
def test_words_are_a_function_of_seed_parameter_stream_and_block(
    seed: int, parameter: int, stream: int, block: int
) -> None:
    words = direction_words(seed, parameter, stream, block, 2)
    for j in range(2):
        assert tuple(words[:, j].tolist()) == literal_words(seed, parameter, stream, block + j)


def test_block_numbers_carry_into_the_high_word_so_that_none_repeats() -> None:
    """The counter holds 64 bits of block number. Blocks either side of 2**32 differ in the high word, and only there.

    A parameter of a 7B model has under 2**33 elements, 2**30 gaussian blocks: even one of 2**35 elements stays below.
    """
    words = direction_words(5, 6, 0, 2**32 - 2, 4)
    expected = [
        literal_philox((low, high, 6, 0), (5, 0)) for low, high in [(2**32 - 2, 0), (2**32 - 1, 0), (0, 1), (1, 1)]
    ]
    assert [tuple(words[:, j].tolist()) for j in range(4)] == expected
    assert not torch.equal(words[:, 2:], direction_words(5, 6, 0, 0, 2))
    for bits, elements_per_block in ((GAUSSIAN, 8), (RADEMACHER, 128)):
        boundary = 2**32 * elements_per_block
        expected_values = [literal_value(bits.name, 5, 6, e) for e in range(boundary - 3, boundary + 3)]
        assert values(bits, 5, 6, boundary - 3, boundary + 3) == expected_values


# --- the laws ----------------------------------------------------------------------------------------------------


def test_gaussian_table_holds_the_scaled_quantiles() -> None:
    normal = NormalDist()
    quantiles = [normal.inv_cdf((u + 0.5) / 65536) for u in range(65536)]
    deviation = math.sqrt(math.fsum(q * q for q in quantiles) / 65536)
    table = gaussian_table()
    assert table.dtype == np.float32
    assert table.shape == (65536,)
    # half an ulp of fp32 is 6e-8; quantiles from the lower tail are good to 1e-13 or so
    np.testing.assert_allclose(table, np.array(quantiles) / deviation, rtol=6.1e-8, atol=0)
    np.testing.assert_array_equal(table, -table[::-1])
    assert (np.diff(table) > 0).all()
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 0


def test_gaussian_table_fingerprint_is_pinned_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(gaussian_table().astype("<f4").tobytes()).hexdigest()
    assert digest == GOLDEN["gaussian_table_sha256"] == bit_layouts.GAUSSIAN_TABLE_SHA256
    assert digest[:16] in GAUSSIAN.version
    monkeypatch.setattr(bit_layouts, "GAUSSIAN_TABLE_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match="SHA-256"):
        gaussian_table.__wrapped__()


@pytest.mark.parametrize("bits", LAWS.values(), ids=LAWS)
def test_layout_is_that_of_the_design(bits: BitLayout) -> None:
    seed, parameter = 0xFEDCBA9876543210, 0x89ABCDEF
    for start in (0, 1024 * 77):
        literal = [literal_value(bits.name, seed, parameter, e) for e in range(start, start + 1024)]
        assert values(bits, seed, parameter, start, start + 1024) == literal


@given(
    bits=st.sampled_from(sorted(LAWS)),
    seed=st.integers(0, 2**64 - 1),
    parameter=st.integers(0, MASK32),
    start=st.integers(0, 2**36),
    length=st.integers(1, 5),
)
def test_any_element_can_be_made_alone(bits: str, seed: int, parameter: int, start: int, length: int) -> None:
    literal = [literal_value(bits, seed, parameter, e) for e in range(start, start + length)]
    assert values(LAWS[bits], seed, parameter, start, start + length) == literal


@pytest.mark.parametrize("bits", LAWS.values(), ids=LAWS)
def test_many_chunks_at_once_are_those_made_one_by_one(bits: BitLayout) -> None:
    together = bits.chunks(3, 4, first_chunk=10, num_chunks=5)
    assert together.shape == (5, 1024)
    assert together.dtype == torch.float32
    assert torch.equal(together, torch.cat([bits.chunks(3, 4, first_chunk=10 + i, num_chunks=1) for i in range(5)]))


def test_rademacher_costs_one_bit_per_element() -> None:
    assert RADEMACHER.blocks_per_chunk * 128 == 1024  # a block has 128 bits
    assert GAUSSIAN.blocks_per_chunk * 128 == 1024 * 16
    assert set(RADEMACHER.chunks(1, 2, 0, 4).flatten().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("golden", GOLDEN["chunks"], ids=lambda g: f"{g['law']}-{g['seed']}-{g['first_chunk']}")
def test_golden_chunks(golden: dict[str, Any]) -> None:
    bits = LAWS[golden["law"]]
    values = bits.chunks(golden["seed"], golden["param_id"], golden["first_chunk"], golden["num_chunks"])
    assert sha256(values) == golden["sha256"], f"the bits {bits.name} changed: give it another version"


def test_golden_rounding_bits() -> None:
    golden = GOLDEN["rounding_bits"]
    rounding_bits = reference._rounding_bits(
        golden["seed"], golden["param_id"], golden["first_chunk"], golden["num_chunks"]
    )
    assert sha256(rounding_bits.to(torch.int32)) == golden["sha256"]
    start = 1024 * golden["first_chunk"]
    literal = [literal_half(golden["seed"], golden["param_id"], 1, e) for e in range(start, start + 1024)]
    assert rounding_bits[:1024].tolist() == literal


# --- seeds and parameter ids -------------------------------------------------------------------------------------


def test_golden_seeds_and_parameter_ids() -> None:
    for golden in GOLDEN["seeds"]:
        assert derive_seed(golden["run_seed"], *golden["purpose"]) == golden["seed"]
    assert param_ids(GOLDEN["param_ids"]) == GOLDEN["param_ids"]


def test_seeds_of_neighbouring_purposes_differ() -> None:
    seeds = {derive_seed(run, purpose, i) for run in range(20) for purpose in ("step", "round") for i in range(100)}
    assert len(seeds) == 20 * 2 * 100  # 64-bit hashes: a repeat would have a chance of 4e-13
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_seeds_of_purposes_with_slashes_in_them_differ() -> None:
    words = ["", *("".join(word) for n in (1, 2, 3) for word in itertools.product("a/\\", repeat=n))]
    purposes = [purpose for n in (1, 2) for purpose in itertools.product(words, repeat=n)]
    assert len({derive_seed(0, *purpose) for purpose in purposes}) == len(purposes)


def test_parameters_with_one_id_are_refused() -> None:
    first, second = "model.layers.4053.mlp.weight", "model.layers.75374.mlp.weight"  # found by search
    assert param_id(first) == param_id(second)
    with pytest.raises(RuntimeError, match=rf"(?s){first}.*{second}"):
        param_ids(["lm_head.weight", first, second])
    assert param_ids([first, first]) == {first: param_id(first)}


# --- combinations ------------------------------------------------------------------------------------------------

SEEDS = st.integers(0, 7) | st.integers(0, 2**64 - 1)  # the small ones meet each other
COEFFICIENTS = st.floats(-1e30, 1e30, allow_nan=False).map(to_fp32)
TERMS = st.lists(st.tuples(SEEDS, COEFFICIENTS), max_size=6)
COMBINATIONS = TERMS.map(Combination.of)


@given(TERMS)
def test_combination_is_canonical(terms: list[tuple[int, float]]) -> None:
    combination = Combination.of(terms)
    seeds = [seed for seed, _ in combination.terms]
    assert seeds == sorted(set(seeds))
    assert all(c != 0 and math.isfinite(c) and to_fp32(c) == c for _, c in combination.terms)
    expected = {seed: to_fp32(math.fsum(c for s, c in terms if s == seed)) for seed, _ in terms}
    for seed, c in expected.items():  # sums of at most six fp64 numbers, then one rounding to fp32
        size = sum(abs(c) for s, c in terms if s == seed)
        assert dict(combination.terms).get(seed, 0.0) == pytest.approx(c, rel=2.0**-23, abs=6 * 2.0**-52 * size + 1e-44)


@given(COMBINATIONS)
def test_combination_survives_json(combination: Combination) -> None:
    again = Combination.from_json(json.loads(json.dumps(combination.to_json())))
    assert again == combination
    assert hash(again) == hash(combination)


@given(COMBINATIONS, COMBINATIONS)
def test_combinations_form_a_group(a: Combination, b: Combination) -> None:
    assert a + b == b + a
    assert a + ZERO == a
    assert a - a == ZERO
    assert not (a + -a)
    assert a - b == a + -b
    assert a + a == 2 * a == a * 2
    assert len(a) == len(a.terms)
    assert bool(a) == bool(a.terms)


@given(COMBINATIONS, COMBINATIONS, COMBINATIONS)
def test_addition_is_associative_up_to_rounding(a: Combination, b: Combination, c: Combination) -> None:
    left, right = dict(((a + b) + c).terms), dict((a + (b + c)).terms)
    for seed in left.keys() | right.keys():
        size = sum(abs(dict(x.terms).get(seed, 0.0)) for x in (a, b, c))
        # two fp32 roundings on each side, each at most half an ulp (2**-24) of a partial sum, or of a subnormal
        assert abs(left.get(seed, 0.0) - right.get(seed, 0.0)) <= 4 * (2.0**-24 * size + 2.0**-150)


@pytest.mark.parametrize(
    "terms", [[(-1, 1.0)], [(2**64, 1.0)], [(1, math.inf)], [(1, math.nan)], [(1, 1e39)], [(1, 3e38), (1, 3e38)]]
)
def test_combination_refuses_what_fp32_or_64_bits_cannot_hold(terms: list[tuple[int, float]]) -> None:
    with pytest.raises(ValueError, match=r"fp32|64-bit"):
        Combination.of(terms)


@pytest.mark.parametrize("data", [[[1]], [[1, 2, 3]], [["1", 2.0]], [[1.0, 2.0]], [[True, 2.0]], [[1, "x"]]])
def test_combination_refuses_malformed_json(data: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        Combination.from_json(data)
