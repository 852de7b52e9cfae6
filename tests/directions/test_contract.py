"""What `add` promises: rounding after every operation, special numbers, stochastic rounding, refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from mezo_dist.directions.add import add, advance
from mezo_dist.directions.bits import GAUSSIAN, BitLayout
from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.kernels import cpu, reference

FP32, BF16, FP16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Add = Callable[..., None]
PARAM = 99


@pytest.fixture(params=[reference.add, cpu.add], ids=["reference", "cpu"])
def function(request: pytest.FixtureRequest) -> Add:
    implementation: Add = request.param
    return implementation


def run(
    function: Add,
    weight: Tensor,
    sums: Sequence[Combination],
    dtypes: Sequence[torch.dtype],
    rounding_seed: int | None = None,
) -> list[Tensor]:
    outputs = [torch.empty(1, len(weight), dtype=dtype) for dtype in dtypes]
    function(weight.view(1, -1), sums, outputs, param_id=PARAM, bits=GAUSSIAN, offsets=[0], rounding_seed=rounding_seed)
    return [output[0] for output in outputs]


def direction(seed: int, count: int) -> Tensor:
    return GAUSSIAN.chunks(seed, PARAM, 0, -(-count // 1024)).flatten()[:count]


def random_weights(count: int) -> Tensor:
    """Numbers of all sizes that fp32 has."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, generator=generator) * 2.0 ** torch.randint(-140, 120, (count,), generator=generator)


def test_sum_is_rounded_after_every_product_and_every_addition(function: Add) -> None:
    """Terms in ascending order of seeds, no fused multiply-add: against fp64, rounded after each operation."""
    weight = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    step = Combination.of([(2**63, 0.3), (5, -0.7), (6, 1e-3)])
    total = weight.double()
    for seed, coefficient in step.terms:
        product = (coefficient * direction(seed, 3000).double()).float()  # exact in fp64 before it is rounded
        total = (total + product.double()).float().double()
    assert torch.equal(run(function, weight, [step], [FP32])[0], total.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_sum_copies_and_casts(function: Add, dtype: torch.dtype) -> None:
    weight = random_weights(2000).to(dtype)
    for out, got in zip(DTYPES, run(function, weight, [ZERO] * 3, DTYPES), strict=True):
        assert torch.equal(got, weight.float().to(out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_so(function: Add, dtype: torch.dtype) -> None:
    weight = torch.tensor([float("inf"), float("-inf"), float("nan")] * 500, dtype=dtype)
    for out, rounding_seed in ((FP32, None), (FP16, None), (BF16, None), (BF16, 3)):
        (got,) = run(function, weight, [Combination.single(1, 1e3)], [out], rounding_seed)
        torch.testing.assert_close(got, weight.to(out), rtol=0, atol=0, equal_nan=True)
    low_payload = torch.tensor([0x7F800001, -0x7FFFFF], dtype=torch.int32).view(FP32)  # cut off, they are infinities
    for cast in run(function, low_payload, [ZERO] * 2, [BF16, FP16]):
        assert cast.isnan().all()


def test_zeros_keep_their_sign_where_nothing_is_added(function: Add) -> None:
    kept, moved = run(function, torch.full((100,), -0.0), [ZERO, Combination.single(1, 1.0)], [FP32, FP32])
    assert kept.signbit().all()
    assert moved.all()


def test_plus_and_minus_are_mirror_images(function: Add) -> None:
    weight, step = torch.zeros(3000, dtype=BF16), Combination.single(3, 1e-3)
    plus, minus = run(function, weight, [step, -step], [FP32, FP32])
    assert torch.equal(plus, step.terms[0][1] * direction(3, 3000))
    assert torch.equal(minus, -plus)


def test_stochastic_rounding_gives_one_of_the_two_neighbours(function: Add) -> None:
    """Cutting off gives the neighbour nearer to zero; the next number of that sign is the other one (or infinity)."""
    weight = random_weights(20_000)
    weight[::50] = weight[::50].to(BF16).float()
    (got,) = run(function, weight, [ZERO], [BF16], rounding_seed=5)
    steps = got.view(torch.int16) - (weight.view(torch.int32) >> 16).to(torch.int16)
    exact = (weight.view(torch.int32) & 0xFFFF) == 0
    assert set(steps[~exact].tolist()) == {0, 1}
    assert set(steps[exact].tolist()) == {0}
    assert not torch.equal(got, run(function, weight, [ZERO], [BF16], rounding_seed=6)[0])


@pytest.mark.parametrize("value", [1.0 + 2.0**-10, -(1.0 + 3 * 2.0**-9), 1e-39, -3.3e38, 0.0123])
def test_stochastic_rounding_is_unbiased(function: Add, value: float) -> None:
    """P(away from zero) is the discarded fraction f. The count of n draws stays within 5 deviations sqrt(n f (1 - f)).

    The draws are fixed by the seed, so this cannot flicker; of all seeds, 6 in 10 million would fail.
    """
    count = 2**17
    weight = torch.full((count,), value)
    raw = int(weight[:1].view(torch.int32)) & 0xFFFFFFFF
    fraction = (raw & 0xFFFF) / 65536
    assert 0 < fraction < 1
    (got,) = run(function, weight, [ZERO], [BF16], rounding_seed=11)
    away = int((got.view(torch.int16).int() & 0xFFFF != raw >> 16).sum())
    assert abs(away - count * fraction) <= 5 * (count * fraction * (1 - fraction)) ** 0.5


W = torch.zeros(6)
BAD_ARGUMENTS: list[tuple[str, dict[str, object]]] = [
    ("combinations for", {"outputs": [W, W.clone()]}),
    ("equal pieces", {"offsets": [0, 1, 2, 3]}),
    ("equal pieces", {"offsets": []}),
    ("contiguous", {"weight": torch.zeros(6, 2)[:, 0]}),
    ("contiguous", {"weight": W.double()}),
    ("contiguous", {"outputs": [torch.zeros(6, dtype=torch.int32)]}),
    ("same number", {"outputs": [torch.zeros(7)]}),
    ("same device", {"outputs": [torch.zeros(6, device="meta")]}),
    ("stochastic", {"rounding_seed": 1}),
]


@pytest.mark.parametrize(("message", "change"), BAD_ARGUMENTS, ids=lambda x: x if isinstance(x, str) else "")
def test_arguments_that_do_not_fit_are_refused(message: str, change: dict[str, object]) -> None:
    arguments: dict[str, object] = {"weight": W, "combinations": [Combination.single(1, 1.0)], "outputs": [W]}
    with pytest.raises(ValueError, match=message):
        add(**{**arguments, "param_id": 1, "bits": GAUSSIAN, **change})  # type: ignore[arg-type]
    assert not W.any()


@pytest.mark.parametrize(
    ("message", "weight", "seeds"),
    [
        ("all updates are rounded", W.bfloat16(), [1, None]),
        ("stochastic", W, [1, 2]),
        ("contiguous", W.double(), [None, None]),
        ("contiguous", torch.zeros(6, 2)[:, 0], [None, None]),
    ],
)
def test_updates_that_do_not_fit_are_refused(message: str, weight: Tensor, seeds: list[int | None]) -> None:
    step = Combination.single(1, 1.0)
    with pytest.raises(ValueError, match=message):
        advance(weight, [(step, seed) for seed in seeds], param_id=1, bits=GAUSSIAN)
    assert not weight.any()


def test_no_updates_change_nothing() -> None:
    weight = torch.full((6,), -0.0)
    advance(weight, [], param_id=1, bits=GAUSSIAN)
    advance(weight, [(ZERO, None), (ZERO, None)], param_id=1, bits=GAUSSIAN)
    assert weight.signbit().all()


def test_an_empty_weight_is_left_alone() -> None:
    add(torch.zeros(0), [ZERO], [torch.zeros(0)], param_id=1, bits=GAUSSIAN)


def test_the_kernel_refuses_a_law_it_does_not_know() -> None:
    strange = BitLayout("strange", "strange/v0", 128, lambda words: words.float())
    with pytest.raises(ValueError, match="strange"):
        cpu.add(W.view(1, -1), [ZERO], [W.view(1, -1)], param_id=1, bits=strange, offsets=[0], rounding_seed=None)
