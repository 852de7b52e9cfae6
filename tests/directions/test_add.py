"""The compiled `add` of the CPU has the bits of the reference: any dtype, bits, place, number of outputs and
threads."""

from __future__ import annotations

import os
import random
import signal
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mezo_dist.directions.add import add, advance
from mezo_dist.directions.bits import FACTOR_V, GAUSSIAN, RADEMACHER, BitLayout
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.kernels import cpu, reference

FP32, BF16, FP16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAWS = (GAUSSIAN, RADEMACHER, FACTOR_V)
SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 65504.0, 65519.0, 65520.0, 3.39e38, 6e-8, 2e-8, 1e-40]


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bit_patterns(tensor: Tensor) -> Tensor:
    """The bits of a tensor, all NaNs alike: which NaN a cast gives differs between processors, in torch too."""
    same = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
    return same.view(torch.int32 if tensor.dtype == FP32 else torch.int16)


def weights(count: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Random numbers of many sizes, and the special ones that this dtype can hold."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator) * scale
    values[::7] *= 2.0 ** torch.randint(-140, 120, (len(values[::7]),), generator=generator)
    special = torch.tensor(SPECIAL)[: count // 2]
    values[: len(special)] = special
    return values.to(dtype)


def combinations(count: int, seed: int, most_terms: int = 4, scale: float = 1.0) -> list[Combination]:
    """Some seeds are shared, some are not, some sums are empty."""
    rng = random.Random(seed)
    pool = [rng.getrandbits(64) for _ in range(5)] + [0, 2**64 - 1]
    terms = [rng.sample(pool, min(rng.randint(0, most_terms), len(pool))) for _ in range(count)]
    return [Combination.of((s, rng.uniform(-1, 1) * scale) for s in some) for some in terms]


def both(
    weight: Tensor,
    sums: Sequence[Combination],
    dtypes: Sequence[torch.dtype],
    *,
    bits: BitLayout = GAUSSIAN,
    offsets: Sequence[int] = (0,),
    rounding_seed: int | None = None,
    in_place: int | None = None,
) -> list[Tensor]:
    """Outputs of `cpu`, after a check that they equal the reference's bit by bit and that nothing else changed."""
    results = []
    for function in (reference.add, cpu.add):
        source = weight.clone().view(len(offsets), -1)
        outputs = [torch.full_like(source, 7.0, dtype=dtype) for dtype in dtypes]
        if in_place is not None:
            outputs[in_place] = source
        function(source, sums, outputs, param_id=99, bits=bits, offsets=offsets, rounding_seed=rounding_seed)
        results.append([*outputs, source])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(bit_patterns(got), bit_patterns(expected), rtol=0, atol=0)
    if in_place is None:
        assert torch.equal(bit_patterns(results[1][-1].flatten()), bit_patterns(weight))
    return [output.flatten() for output in results[1][:-1]]


@pytest.mark.parametrize("bits", LAWS, ids=lambda bits: bits.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out", DTYPES, ids=str)
def test_kernel_equals_reference(bits: BitLayout, dtype: torch.dtype, out: torch.dtype) -> None:
    places = ((0, 1), (1023, 2), (5, 4000), (2**35 - 700, 1500))
    for (offset, length), rounding_seed in product(places, (None, 17) if out == BF16 else (None,)):
        both(
            weights(length, dtype, seed=length),
            combinations(2, seed=offset + length),
            [out, out],
            bits=bits,
            offsets=[offset],
            rounding_seed=rounding_seed,
            in_place=1 if out == dtype else None,
        )


@settings(deadline=None, max_examples=80)
@given(
    bits=st.sampled_from(LAWS),
    dtype=st.sampled_from(DTYPES),
    outputs=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=8),
    offsets=st.lists(st.sampled_from([0, 1, 1023, 1024, 2**35 - 5]) | st.integers(0, 2**36), min_size=1, max_size=6),
    length=st.sampled_from([1, 2, 576, 1023, 1024, 1025]) | st.integers(1, 3000),
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([1.0, 1e-3, 1e-7, 1e4, 1e30, 1e-40]),
    rounding_seed=st.none() | st.integers(0, 2**64 - 1),
)
def test_kernel_equals_reference_on_anything(
    bits: BitLayout,
    dtype: torch.dtype,
    outputs: list[torch.dtype],
    offsets: list[int],
    length: int,
    seed: int,
    scale: float,
    rounding_seed: int | None,
) -> None:
    dtypes = outputs if rounding_seed is None else [BF16] * len(outputs)
    both(
        weights(len(offsets) * length, dtype, seed=seed),
        combinations(len(dtypes), seed, scale=scale),
        dtypes,
        bits=bits,
        offsets=offsets,
        rounding_seed=rounding_seed,
        in_place=dtypes.index(dtype) if seed % 2 and dtype in dtypes else None,
    )


def test_many_terms_and_many_short_rows() -> None:
    rng = random.Random(0)
    long_sum = Combination.of((rng.getrandbits(64), rng.uniform(-1, 1)) for _ in range(300))
    both(weights(1500, BF16), [long_sum, long_sum + Combination.single(5, 1e-3)], [FP32, BF16], offsets=[77])
    rows = [rng.randrange(50_000) * 576 for _ in range(500)]
    both(weights(500 * 576, FP32), combinations(2, seed=4, most_terms=1), [FP32, FP32], offsets=rows)


@pytest.mark.parametrize("bits", LAWS, ids=lambda bits: bits.name)
def test_any_piece_equals_that_piece_of_the_whole(bits: BitLayout) -> None:
    weight, (step,) = weights(5000, FP32), combinations(1, seed=3)
    (whole,) = both(weight, [step], [FP32], bits=bits, offsets=[100])
    for first, length in ((0, 1), (1, 1023), (924, 1024), (923, 2049), (4999, 1), (17, 4900)):
        (piece,) = both(weight[first : first + length], [step], [FP32], bits=bits, offsets=[100 + first])
        assert torch.equal(bit_patterns(piece), bit_patterns(whole[first : first + length]))
    starts = [0, 1000, 3, 4000]
    (rows,) = both(
        torch.cat([weight[s : s + 1000] for s in starts]), [step], [FP32], bits=bits, offsets=[100 + s for s in starts]
    )
    assert torch.equal(bit_patterns(rows), bit_patterns(torch.cat([whole[s : s + 1000] for s in starts])))


@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize("bits", [GAUSSIAN, RADEMACHER], ids=lambda bits: bits.name)
def test_number_of_threads_changes_no_bit(bits: BitLayout) -> None:
    count = 1024 * cpu.CHUNKS_PER_THREAD * 5 + 333  # enough for five threads
    weight, sums = weights(count, BF16), combinations(2, seed=8)
    patterns = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        outputs = [torch.empty(count), torch.empty(count, dtype=BF16)]
        add(weight, sums, outputs, param_id=1, bits=bits, offsets=[1000])
        patterns.append([bit_patterns(output) for output in outputs])
    for other in patterns[1:]:
        assert all(torch.equal(a, b) for a, b in zip(patterns[0], other, strict=True))


@pytest.mark.usefixtures("torch_threads")
def test_python_threads_and_forked_processes_may_add_at_once() -> None:
    torch.set_num_threads(2)
    weight, step = torch.zeros(1024 * cpu.CHUNKS_PER_THREAD * 3), Combination.single(4, 1.0)

    def result(_: int = 0) -> bytes:
        output = torch.empty_like(weight)
        add(weight, [step], [output], param_id=1, bits=RADEMACHER)
        return bytes(output.numpy())

    expected = result()
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(result, range(12))) == {expected}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: threads and fork; that is the point here
        child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that waits for its parent's threads waits for ever
        os._exit(0 if result() == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


# Many updates in one pass


@pytest.mark.parametrize("bits", [GAUSSIAN, RADEMACHER], ids=["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(("offset", "length"), [(0, 1), (0, 5000), (1000, 30), (1020, 4099)])
def test_many_updates_in_one_pass_have_the_same_bits(
    bits: BitLayout, dtype: torch.dtype, stochastic: bool, offset: int, length: int
) -> None:
    """In every step the sum is rounded to the weight's dtype, so adding it all up in fp32 would be wrong."""
    if stochastic and dtype is not torch.bfloat16:
        pytest.skip("only bf16 is rounded stochastically")
    weight = torch.randn(length, generator=torch.Generator().manual_seed(0)).to(dtype)
    updates = [
        (Combination.of((seed * 11 + k, 1e-2 * (k + 1)) for k in range(seed % 4)), 70 + seed if stochastic else None)
        for seed in range(9)
    ]
    at_once, stepped, exact = weight.clone(), weight.clone(), weight.clone()
    advance(at_once, updates, param_id=5, bits=bits, offset=offset)
    for combination, seed in updates:
        add(stepped, [combination], [stepped], param_id=5, bits=bits, offsets=[offset], rounding_seed=seed)
        reference.add(
            exact.view(1, -1), [combination], [exact.view(1, -1)], param_id=5, bits=bits, offsets=[offset],
            rounding_seed=seed,
        )  # fmt: skip
    assert torch.equal(at_once, stepped)
    assert torch.equal(at_once, exact)
    assert not torch.equal(at_once, weight)
