"""The linear layer that perturbs in registers: its weights bit for bit, its sums, and the code that it compiles to.

As in `test_gpu`, the cases run in a process of their own, in Triton's interpreter, and on a GPU where there is one.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mezo_dist.directions.bits import FACTOR_U, GAUSSIAN, RADEMACHER, BitLayout
from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.kernels import reference
from tests.directions.test_gpu import BF16, FAR, FP16, FP32, FUSED, PARAM_ID, compiled, every, interpreted, resources

__all__ = ["compiled"]
MOST_HOTS = 48
"""Rows of an input that pick one column of the weight."""


@dataclass(frozen=True)
class Case:
    bits: BitLayout = RADEMACHER
    weight: torch.dtype = BF16
    inputs: torch.dtype = BF16
    shape: tuple[int, int] = (33, 128)
    offset: int = 0
    variants: int = 2
    terms: int = 1
    has_bias: bool = False
    sizes: tuple[int, ...] = (5,)
    """Rows of inputs, by turns."""


CASES = {
    "rademacher-whole-spans": Case(has_bias=True),
    "rademacher-other-dtype": Case(weight=FP32, shape=(20, 256), terms=2),
    "rademacher-any-place": Case(weight=FP16, inputs=FP16, shape=(3, 72), offset=777),
    "rademacher-eight": Case(weight=FP32, inputs=FP32, shape=(2, 32), variants=8, has_bias=True, sizes=(3, 3, 3, 1)),
    "rademacher-odd": Case(shape=(2, 33), offset=FAR, variants=1),
    "rademacher-many-tiles": Case(shape=(70, 64), sizes=(135,)),
    "gaussian-whole-spans": Case(GAUSSIAN, shape=(3, 1024), has_bias=True),
    "gaussian-period-8": Case(GAUSSIAN, FP32, FP32, shape=(9, 128), offset=FAR - 77, variants=1, terms=3),
    "gaussian-any-place": Case(GAUSSIAN, FP16, FP16, shape=(2, 136), offset=1023, variants=4),
    "other-stream": Case(FACTOR_U, shape=(2, 128)),
}


def combinations(case: Case) -> list[Combination]:
    """Both signs of one direction or several after another; one variant more if the number is odd."""
    several = []
    for v in range(case.variants):
        seeds = [2**63 * (k % 2) + 1000003 * k + v // 2 + 1 for k in range(case.terms)]
        several.append(Combination.of((seed, (-1) ** v * 0.3 * (k + 1)) for k, seed in enumerate(seeds)))
    return several


def arguments(case: Case) -> tuple[Tensor, list[Tensor], list[Tensor] | None]:
    """Weight, inputs and biases. The first rows of inputs pick columns."""
    draw = torch.Generator().manual_seed(3)
    num_rows, num_columns = case.shape
    weight = torch.randn(case.shape, generator=draw)
    weight.view(-1)[:4] = torch.tensor([1 + 2.0**-8, -1 - 3 * 2.0**-8, 1 + 2.0**-11, -0.0])  # ties, and a zero
    picked = torch.linspace(0, num_columns - 1, min(num_columns, MOST_HOTS)).round().long()
    inputs = [
        torch.cat(
            [torch.eye(num_columns)[picked], torch.randn(case.sizes[v % len(case.sizes)], num_columns, generator=draw)]
        )
        for v in range(case.variants)
    ]
    biases = [torch.randn(num_rows, generator=draw).to(case.inputs) for _ in inputs] if case.has_bias else None
    return weight.to(case.weight), [x.to(case.inputs) for x in inputs], biases


def run_case(case: Case, device: str) -> str:
    """What is wrong with the kernel's outputs; "" if nothing."""
    from mezo_dist.directions.kernels import fused_linear

    weight, inputs, biases = arguments(case)
    common: dict[str, Any] = {"param_id": PARAM_ID, "bits": case.bits, "offset": case.offset}

    outputs = fused_linear.linear(
        weight.to(device),
        combinations(case),
        [x.to(device) for x in inputs],
        None if biases is None else [bias.to(device) for bias in biases],
        **common,
    )
    wanted = reference.linear(weight, combinations(case), inputs, biases, **common)
    num_picked = min(case.shape[1], MOST_HOTS)
    wrong = []
    for v, (output, expected) in enumerate(zip(outputs, wanted, strict=True)):
        y, x, moved = output.cpu(), inputs[v], torch.empty_like(weight, dtype=case.inputs)
        reference.add(weight, [combinations(case)[v]], [moved], param_id=PARAM_ID, offsets=[case.offset],
                      bits=case.bits, rounding_seed=None)  # fmt: skip
        # One product and zeros are added up exactly; then the bias, and one rounding, are the same as the reference's.
        if not torch.equal(y[:num_picked], expected[:num_picked]):
            wrong.append(f"weights of variant {v} differ")
        size = x.abs().double() @ moved.abs().double().T + (0 if biases is None else biases[v].abs().double())
        bound = 2 * (case.shape[1] + 2) * 2.0**-24 * size + torch.finfo(case.inputs).eps * expected.abs().double()
        if ((y.double() - expected.double()).abs() > bound).any():
            wrong.append(f"sums of variant {v} are off")
    return "; ".join(wrong)


def run_company(device: str) -> str:
    """An output has the same bits in every call, and whatever variants are computed beside it."""
    from mezo_dist.directions.kernels import fused_linear

    case = Case(shape=(5, 128), variants=2)
    weight, inputs, _ = arguments(case)
    both = combinations(case)
    common: dict[str, Any] = {"param_id": PARAM_ID, "bits": case.bits}
    there, inputs = weight.to(device), [x.to(device) for x in inputs]
    together = fused_linear.linear(there, both, inputs, **common)
    again = fused_linear.linear(there, both, inputs, **common)
    alone = [fused_linear.linear(there, [both[v]], [inputs[v]], **common)[0] for v in range(2)]
    same = all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(together, again, alone, strict=True))
    return "" if same else "differs"


@pytest.fixture(scope="module", params=["interpreter", *(["cuda"] if torch.cuda.is_available() else [])])
def results(request: pytest.FixtureRequest) -> dict[str, str]:
    """By case: what is wrong."""
    return interpreted(__file__, request.param)


@pytest.mark.parametrize("name", [*CASES, "company"])
def test_weights_bit_for_bit_and_sums(results: dict[str, str], name: str) -> None:
    assert results[name] == ""


def test_the_reference_is_materialised_variants_times_inputs() -> None:
    weight, inputs, biases = arguments(replace(CASES["rademacher-whole-spans"], weight=FP32, inputs=FP32))
    assert biases is not None
    shift = Combination.single(3, 0.5)
    moved = torch.empty_like(weight)
    reference.add(weight, [shift], [moved], param_id=1, offsets=[7], bits=GAUSSIAN, rounding_seed=None)
    (y,) = reference.linear(weight, [shift], inputs[:1], biases[:1], param_id=1, bits=GAUSSIAN, offset=7)
    torch.testing.assert_close(y, torch.nn.functional.linear(inputs[0], moved, biases[0]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"inputs": [torch.zeros(3, 5)]}, "inputs must be"),
        ({"inputs": [torch.zeros(8, 3).T]}, "inputs must be"),
        ({"weight": torch.zeros(2, 8, dtype=torch.float64)}, "not torch.float64"),
        ({"biases": [torch.zeros(3)]}, "biases must be"),
        ({"combinations": [Combination.of((seed, 1.0) for seed in range(5))]}, "more than 4"),
        ({"bits": replace(GAUSSIAN, name="uniform", values=lambda words: words.float())}, "'uniform'"),
    ],
)
def test_refusals(changed: dict[str, Any], message: str) -> None:
    from mezo_dist.directions.kernels import fused_linear

    usual = {"weight": torch.zeros(2, 8), "combinations": [ZERO], "inputs": [torch.zeros(3, 8)], "bits": GAUSSIAN}
    with pytest.raises(ValueError, match=message):
        fused_linear.linear(**{**usual, **changed}, param_id=1)


COMPILED = [(80, RADEMACHER), (90, RADEMACHER), (100, RADEMACHER), (90, GAUSSIAN)]


@pytest.mark.parametrize(("capability", "bits"), COMPILED, ids=lambda value: str(getattr(value, "name", value)))
def test_machine_code(
    capability: int,
    bits: BitLayout,
    compiled: Callable[[int], list[tuple[str, Any]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both signs of a layer of OPT-13B in bf16: tensor cores, no fused multiply-add, nothing in local memory."""
    from mezo_dist.directions.kernels import fused_linear

    kernels = compiled(capability)
    both = [Combination.single(7, 1e-3), Combination.single(7, -1e-3)]
    inputs = [torch.empty(640, 5120, dtype=BF16)] * 2
    weight, bias = torch.empty(5120, 5120, dtype=BF16), torch.empty(5120, dtype=BF16)
    fused_linear.linear(weight, both, inputs, [bias, bias], param_id=PARAM_ID, bits=bits)

    ((_, kernel),) = kernels
    ptx, text = kernel.asm["ptx"], resources(kernel.asm["cubin"])
    registers, stack, static = (int(re.findall(rf"{what}:(\d+)", text)[0]) for what in ("REG", "STACK", "SHARED"))
    shared = max(static, kernel.metadata.shared)
    with capsys.disabled():
        print(f"\nsm_{capability}, {bits.name}: {registers} registers, stack {stack}, {shared} bytes of shared memory")
    assert f".target sm_{capability}" in ptx
    assert {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability] in ptx
    assert "cvt.rn.bf16" in ptx  # to nearest even
    assert "mul.rn.f32" in ptx
    assert "add.rn.f32" in ptx
    assert not re.search(FUSED, ptx)
    assert registers <= 200
    assert stack == 0
    assert shared <= 163 * 1024  # what a program can have on an A100


def run(name: str, device: str) -> str:
    """What is wrong in the case with this name."""
    return run_case(CASES[name], device) if name in CASES else run_company(device)


if __name__ == "__main__":
    from mezo_dist.directions.kernels import fused_linear

    if sys.argv[1] == "cpu":  # larger steps, for an operation costs the interpreter as much on any number of elements
        fused_linear.TILES["gaussian"] = replace(fused_linear.TILES["gaussian"], blocks=64)
        fused_linear.FP32_TILE = replace(fused_linear.FP32_TILE, inputs=64, blocks=64)
    print(json.dumps(every(run, [*CASES, "company"], sys.argv[1])))
