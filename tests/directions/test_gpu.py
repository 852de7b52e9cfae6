"""The Triton kernel: its bits against the reference, and the code that it compiles to.

Without a GPU the kernel runs in Triton's interpreter; where there is one, the same cases run on it too. Triton decides
at import whether to compile or to interpret, so the cases run in a process of their own: this file as a script.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mezo_dist
from mezo_dist.directions import add
from mezo_dist.directions.bits import FACTOR_U, FACTOR_V, GAUSSIAN, RADEMACHER, BitLayout
from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.kernels import reference

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux", allow_module_level=True)

FP32, BF16, FP16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARAM_ID = 0xF1234567
FAR = 2**42 + 77  # its gaussian blocks have numbers above 2**32
SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 6e-8, 2.0**-24, 65519.9, 65520.0, 3.4e38, -3.4e38, float("inf"), -float("inf")]
TIES = [1 + 2.0**-8, -1 - 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11]  # to bf16, to fp16
NANS = [0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF]  # bits that look like something else once they are rounded


@dataclass(frozen=True)
class Case:
    weight: torch.dtype = FP32
    outputs: tuple[torch.dtype, ...] = (FP32,)
    bits: BitLayout = GAUSSIAN
    offsets: tuple[int, ...] = (5,)
    length: int = 1500
    terms: int = 2
    rounding_seed: int | None = None
    special: bool = False  # weights include zeros of both signs, subnormals, infinities, NaN
    in_place: bool = False


def _cases() -> Iterator[tuple[str, Case]]:
    for bits in (GAUSSIAN, RADEMACHER, FACTOR_U, FACTOR_V):
        for dtype in DTYPES:
            yield f"{bits.name}-{dtype}", Case(dtype, (dtype,), bits, in_place=dtype != FP32)
    for bits in (GAUSSIAN, RADEMACHER):
        of_law = Case(bits=bits)
        yield f"{bits.name}-mixed-outputs", replace(of_law, weight=BF16, outputs=DTYPES, terms=5)
        yield f"{bits.name}-eight-outputs", replace(of_law, weight=FP16, outputs=(FP32,) * 8, terms=4, length=300)
        yield f"{bits.name}-no-terms", replace(of_law, outputs=DTYPES, terms=0, special=True)
        yield f"{bits.name}-one-element", replace(of_law, offsets=(1023,), length=1, terms=1)
        yield f"{bits.name}-whole-chunks", replace(of_law, offsets=(0,), length=4096, terms=1, in_place=True)
        yield f"{bits.name}-long-piece", replace(of_law, offsets=(FAR,), length=5000, terms=1)
        yield f"{bits.name}-many-rows", replace(of_law, offsets=(0, 9 * 96, FAR, 2**45 - 50, 96), length=96)
        yield f"{bits.name}-special", replace(of_law, outputs=DTYPES, special=True)
        for dtype, seed in ((BF16, 7), (FP32, 2**63 + 12345)):
            stochastic = replace(of_law, weight=dtype, outputs=(BF16, BF16), rounding_seed=seed, special=True)
            yield f"{bits.name}-stochastic-{dtype}", stochastic


CASES = dict(_cases())


def combinations(case: Case) -> list[Combination]:
    """Combinations of different seeds for every output, some above 2**63; every seed is missing in a third of them.

    With special weights the first output has no terms: what others add must not make a 0.0 of its -0.0.
    """
    seeds = [(2**63 if k % 2 else 0) + 1000003 * k + 1 for k in range(case.terms)]
    several = [
        Combination.of((seed, 0.3 * (k + 1) - 0.7 * v) for k, seed in enumerate(seeds) if (k + v) % 3 != 1 or k == v)
        for v in range(len(case.outputs))
    ]
    return [ZERO, *several[1:]] if case.special else several


def weights(case: Case) -> Tensor:
    w = torch.randn(len(case.offsets), case.length, generator=torch.Generator().manual_seed(1))
    if case.special:
        values = torch.cat([torch.tensor(SPECIAL + TIES), torch.tensor(NANS, dtype=torch.int32).view(FP32)])
        w[0, : 40 * len(values)] = values.repeat(40)
        w[0, 1000:1300] *= 2.0 ** torch.arange(-160, 140).clamp(-148, 127).float()  # every exponent
    return w.to(case.weight)


def run_case(case: Case, device: str) -> str:
    """What is wrong with the kernel's outputs; "" if nothing."""
    from mezo_dist.directions.kernels import gpu

    w = weights(case)
    kernels = [torch.full_like(w, 9.0, dtype=dtype, device=device) for dtype in case.outputs]
    expected = [torch.full_like(w, 9.0, dtype=dtype) for dtype in case.outputs]
    common: dict[str, Any] = {"param_id": PARAM_ID, "offsets": case.offsets, "bits": case.bits}
    reference.add(w, combinations(case), expected, **common, rounding_seed=case.rounding_seed)
    source = w.to(device)
    if case.in_place:
        kernels[0] = source
    gpu.add(source, combinations(case), kernels, **common, rounding_seed=case.rounding_seed)
    if not case.in_place and not same_bits(source.cpu(), w):
        return "the weight changed"
    wrong = [v for v, (a, b) in enumerate(zip(kernels, expected, strict=True)) if not same_bits(a.cpu(), b)]
    return f"outputs {wrong} differ" if wrong else ""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal but for the bits of NaNs, which are the processor's business."""
    integer = torch.int32 if a.dtype == FP32 else torch.int16
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a.view(integer)[~nan], b.view(integer)[~nan])


@pytest.fixture(scope="module", params=["interpreter", *(["cuda"] if torch.cuda.is_available() else [])])
def results(request: pytest.FixtureRequest) -> dict[str, str]:
    """By case: what is wrong."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"  # the tensors are small
    environment["PYTHONPATH"] = str(Path(mezo_dist.__file__).parents[1])
    if request.param == "interpreter":
        environment["TRITON_INTERPRET"] = "1"
    device = "cpu" if request.param == "interpreter" else "cuda"
    child = subprocess.run([sys.executable, __file__, device], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.parametrize("name", CASES)
def test_same_bits_as_the_reference(results: dict[str, str], name: str) -> None:
    assert results[name] == ""


class Hopper:
    """As much of a driver as Triton needs to compile for an H100 on a machine without any GPU."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class Compiler:
    """Stands in for `gpu._kernel`: compiles what it is launched with, and does not launch it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self.compiled = self.kernel.warmup(*arguments, grid=grid, **options)

        return launch


COMPILED = {
    "gaussian": Case(length=5000),
    "gaussian-mixed-outputs": Case(BF16, (FP32, BF16, FP16)),
    "rademacher": Case(FP16, (FP16, FP32), RADEMACHER, length=5000),
    "rademacher-stochastic": Case(BF16, (BF16,), RADEMACHER, rounding_seed=3),
}


@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED)
def test_machine_code(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Code for the H100: no fused multiply-add, nothing flushed to zero, every weight read once, lanes in a row."""
    import triton

    from mezo_dist.directions.kernels import gpu

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    compiler = Compiler(gpu._kernel)
    monkeypatch.setattr(gpu, "_kernel", compiler)
    w = weights(case)
    outputs = [torch.empty_like(w, dtype=dtype) for dtype in case.outputs]
    common: dict[str, Any] = {"param_id": PARAM_ID, "offsets": case.offsets, "bits": case.bits}
    gpu.add(w, combinations(case), outputs, **common, rounding_seed=case.rounding_seed)

    ptx, layouts, binary = (compiler.compiled.asm[kind] for kind in ("ptx", "ttgir", "cubin"))
    assert "add.rn.f32" in ptx
    assert case.bits is RADEMACHER or "mul.rn.f32" in ptx  # c * -1 may become -c
    assert not re.search(r"\b(fma|mad)[.\w]*f(16|32|64)|\.ftz|add\.f32|mul\.f32", ptx)
    assert binary  # ptxas took it

    lanes_in_a_row = re.findall(r"(#\w+) = #ttg.blocked<\{sizePerThread = \[1\], threadsPerWarp = \[32\]", layouts)
    stores = re.findall(r"tt\.store .*, (#\w+)>", layouts)
    loads = re.findall(r"tt\.load .*cacheModifier = cg.*, (#\w+)>", layouts)
    assert len(loads) == 1
    assert len(stores) == len(outputs)
    assert {*stores, *loads} == {*lanes_in_a_row}


def test_is_the_implementation_for_cuda() -> None:
    from mezo_dist.directions.kernels import gpu

    assert add.implementation("cuda") is gpu


def test_refuses_an_unknown_law() -> None:
    from mezo_dist.directions.kernels import gpu

    bits = replace(GAUSSIAN, name="uniform", values=lambda words: words.float())
    with pytest.raises(ValueError, match="'uniform'"):
        gpu.add(torch.ones(1, 4), [ZERO], [torch.ones(1, 4)], param_id=1, offsets=(0,), bits=bits, rounding_seed=None)


if __name__ == "__main__":
    print(json.dumps({name: run_case(case, sys.argv[1]) for name, case in CASES.items()}))
