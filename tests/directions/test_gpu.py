"""The Triton kernel: its bits against the reference, and the code that it compiles to.

Without a GPU the kernel runs in Triton's interpreter; where there is one, the same cases run on it too. Triton decides
at import whether to compile or to interpret, so the cases run in a process of their own: this file as a script.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mezo_dist
from mezo_dist.directions import add, lowrank
from mezo_dist.directions.bits import FACTOR_U, FACTOR_V, GAUSSIAN, RADEMACHER, BitLayout
from mezo_dist.directions.combination import ZERO, Combination
from mezo_dist.directions.kernels import reference
from mezo_dist.directions.law import Law
from mezo_dist.directions.parts import Part
from tests import gpus

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


@dataclass(frozen=True)
class Group:
    """Many tensors at once, in place or not, low-rank or not."""

    dtype: torch.dtype = FP32
    law: Law = Law("gaussian")
    sizes: tuple[int, ...] = (700, 3, 1024)
    columns: int = 20  # so that shards and rows start anywhere
    offset: int = 0
    rows: tuple[int, ...] = ()
    outputs: tuple[torch.dtype, ...] = ()  # none: in place
    updates: int = 1
    is_stochastic: bool = False
    factor: float | None = None
    most_terms: int = 64


def _groups() -> Iterator[tuple[str, Group]]:
    for law in (Law("gaussian"), Law("rademacher"), Law("lowrank", 1), Law("lowrank", 3)):
        name = f"{law.name}-{law.rank}"
        yield f"{name}-parts", Group(law=law, outputs=(FP32, BF16, FP16), offset=33)
        yield f"{name}-rows", Group(BF16, law, (100,), rows=(7, 249, 8, 7, 2000), outputs=(FP32, BF16))
        yield f"{name}-ten-outputs", Group(BF16, law, (100, 777), outputs=(BF16,) * 10)
        sizes = (310, 3) if law.is_lowrank else (700, 3, 1024)
        for dtype in DTYPES[: law.rank]:
            yield f"{name}-advance-{dtype}", Group(dtype, law, sizes, offset=33, updates=2)
        yield f"{name}-advance-stochastic", Group(BF16, law, sizes, offset=33, updates=2, is_stochastic=True)
        yield f"{name}-add-stochastic", Group(FP32, law, (900, 3), outputs=(BF16,), offset=33, is_stochastic=True)
    for columns in (1100, 4000):  # chunks that lie in one row, and such that go across its end
        wide = Group(BF16, Law("lowrank", 2), (9000, 3), columns, 777 * columns // 2)
        yield f"lowrank-{columns}-parts", replace(wide, outputs=(FP32, BF16))
        yield f"lowrank-{columns}-advance", replace(wide, updates=2, is_stochastic=True)
        yield f"lowrank-{columns}-rows", replace(wide, sizes=(3 * columns,), offset=0, rows=(7, 8, 1), outputs=(BF16,))
    yield "scale", Group(offset=33, factor=0.97)
    yield "scale-stochastic", Group(BF16, offset=33, factor=0.97, is_stochastic=True)
    yield "advance-many-terms", Group(FP16, Law("lowrank", 2), (60,), updates=4, most_terms=5)


GROUPS = dict(_groups())


def run_group(group: Group, device: str) -> str:
    """What is wrong with what the kernels do to many tensors; "" if nothing."""
    from mezo_dist.directions.kernels import gpu

    law, shape = group.law, torch.Size((3000, group.columns))
    draw = torch.Generator().manual_seed(2)
    updates = [
        (
            Combination.of([(2**63 * (k % 2) + 17 * k, 0.3 - k), (5, 0.01 * (k + 1))]),
            77 + k if group.is_stochastic else None,
        )
        for k in range(group.updates)
    ]
    sums = [updates[0][0] * (v % 3 + 1) for v in range(len(group.outputs))]
    rows = torch.tensor(group.rows) if group.rows else None
    rows_there = None if rows is None else rows.to(device)
    expected, parts = [], []
    for number, size in enumerate(group.sizes):
        w = torch.randn(size, generator=draw).to(group.dtype)
        if group.rows:
            w = w.view(len(group.rows), -1)
        outputs = tuple(torch.full_like(w, 9.0, dtype=dtype) for dtype in group.outputs)
        copies = tuple(output.to(device, copy=True) for output in outputs)
        there = w.to(device, copy=True)
        expected.append(Part(w, outputs or (w,), 4 + number, shape, group.offset, rows))
        parts.append(Part(there, copies or (there,), 4 + number, shape, group.offset, rows_there))
    rounding_seed = 77 if group.is_stochastic else None
    if group.factor is not None:
        gpu.scale_parts(parts, group.factor, rounding_seed=rounding_seed)
        for part in expected:
            scaled = part.weight.float() * group.factor
            plain_add(Law("gaussian"), replace(part, weight=scaled), [ZERO], rounding_seed)
    elif group.outputs:
        if law.is_lowrank:
            gpu.add_lowrank(parts, sums, rank=law.rank, rounding_seed=rounding_seed)
        else:
            gpu.add_parts(parts, sums, bits=law._bits, rounding_seed=rounding_seed)
        for part in expected:
            plain_add(law, part, sums, rounding_seed)
    else:
        if law.is_lowrank:
            gpu.MOST_TERMS = group.most_terms
            gpu.advance_lowrank(parts, updates, rank=law.rank)
        else:
            gpu.advance_parts(parts, updates, bits=law._bits)
        for part in expected:
            for combination, seed in updates:
                plain_add(law, part, [combination], seed)
    pairs = [
        (a, b)
        for part, other in zip(parts, expected, strict=True)
        for a, b in zip(part.outputs, other.outputs, strict=True)
    ]
    wrong = [v for v, (a, b) in enumerate(pairs) if not same_bits(a.cpu(), b)]
    return f"outputs {wrong} differ" if wrong else ""


def plain_add(law: Law, part: Part, sums: list[Combination], seed: int | None) -> None:
    """By the reference."""
    if law.is_lowrank:
        seeds = sorted({seed for c in sums for seed, _ in c.terms})
        u, v = lowrank.factors(law.rank, seeds, part.param_id, part.shape)
        reference.add_lowrank(part, sums, {seed: (u[k], v[k]) for k, seed in enumerate(seeds)}, seed)
        return
    offsets = [part.offset] if part.rows is None else (part.rows * part.columns).tolist()
    reference.add(part.weight, sums, part.outputs, param_id=part.param_id, offsets=offsets, bits=law._bits,
                  rounding_seed=seed)  # fmt: skip


def run_factors(law: Law, device: str) -> str:
    """What is wrong with directions that a GPU makes: factors, and values of vectors."""
    from mezo_dist.directions.kernels import gpu

    seeds, where = [3, 2**63 + 5, 9], torch.device(device)
    if not law.is_lowrank:
        got = [gpu.fill(law._bits, seeds, PARAM_ID, 2500, where)]
        expected = [lowrank.fill(law._bits, seeds, PARAM_ID, 0, 2500)]
    else:
        got = [*gpu.factors(law.rank, seeds, PARAM_ID, torch.Size((700, 30, 3)), where)]
        expected = [*lowrank.factors(law.rank, seeds, PARAM_ID, torch.Size((700, 30, 3)))]
        weights = [(PARAM_ID, torch.Size((70, 3))), (5, torch.Size((250,)))]
        got += [tensor for some in gpu.directions(law.rank, seeds, weights, where) for tensor in some]
        expected += [tensor for some in law.directions(seeds, weights) for tensor in some]
    right = all(same_bits(a.cpu(), b) for a, b in zip(got, expected, strict=True))
    return "" if right else "differ"


FACTORS = {
    f"{law.name}-{law.rank}-values": law
    for law in (Law("gaussian"), Law("rademacher"), Law("lowrank", 1), Law("lowrank", 3))
}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal but for the bits of NaNs, which are the processor's business."""
    integer = torch.int32 if a.dtype == FP32 else torch.int16
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a.view(integer)[~nan], b.view(integer)[~nan])


def interpreted(script: str, way: str) -> dict[str, str]:
    """What a test file prints when it runs as a script, in the interpreter or on a GPU: by case, what is wrong."""
    environment = {name: value for name, value in gpus.environment().items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"  # the tensors are small
    paths = [str(Path(mezo_dist.__file__).parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    if way == "interpreter":
        environment["TRITON_INTERPRET"] = "1"
    device = "cpu" if way == "interpreter" else "cuda"
    child = subprocess.run([sys.executable, script, device], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    result: dict[str, str] = json.loads(child.stdout.splitlines()[-1])  # libraries talk before
    return result


@pytest.fixture(scope="module", params=["interpreter", *(["cuda"] if torch.cuda.is_available() else [])])
def results(request: pytest.FixtureRequest) -> dict[str, str]:
    """By case: what is wrong."""
    return interpreted(__file__, request.param)


@pytest.mark.parametrize("name", [*CASES, *GROUPS, *FACTORS])
def test_same_bits_as_the_reference(results: dict[str, str], name: str) -> None:
    assert results[name] == ""


@dataclass(frozen=True)
class Driver:
    """As much of a driver as Triton needs to compile for a GPU on a machine without any."""

    capability: int

    def get_current_device(self) -> int:
        """Triton remembers by device what it compiled, so each capability is another one."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], list[tuple[str, Any]]]:
    """Compile what is launched from now on for a GPU of some capability, in place of launching it."""
    import triton

    from mezo_dist.directions.kernels import gpu

    def start(capability: int) -> list[tuple[str, Any]]:
        kernels: list[tuple[str, Any]] = []

        def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
            kernels.append((kernel.__name__, kernel.warmup(*arguments, grid=grid, **{**gpu.OPTIONS, **constants})))

        monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
        monkeypatch.setattr(triton.runtime.driver, "_active", Driver(capability))
        monkeypatch.setattr(gpu, "launch", launch)
        return kernels

    return start


COMPILED = {
    "gaussian": Case(length=5000),
    "gaussian-mixed-outputs": Case(BF16, (FP32, BF16, FP16)),
    "rademacher": Case(FP16, (FP16, FP32), RADEMACHER, length=5000),
    "rademacher-stochastic": Case(BF16, (BF16,), RADEMACHER, rounding_seed=3),
}
FUSED = r"\b(fma|mad)[.\w]*f(16|32|64)|\.ftz|add\.f32|mul\.f32|div\.(full|approx)"


@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED)
def test_machine_code(case: Case, compiled: Callable[[int], list[tuple[str, Any]]]) -> None:
    """Code for the H100: no fused multiply-add, nothing flushed to zero, every weight read once, lanes in a row."""
    from mezo_dist.directions.kernels import gpu

    kernels = compiled(90)
    w = weights(case)
    outputs = [torch.empty_like(w, dtype=dtype) for dtype in case.outputs]
    common: dict[str, Any] = {"param_id": PARAM_ID, "offsets": case.offsets, "bits": case.bits}
    gpu.add(w, combinations(case), outputs, **common, rounding_seed=case.rounding_seed)

    ((_, kernel),) = kernels
    ptx, layouts, binary = (kernel.asm[kind] for kind in ("ptx", "ttgir", "cubin"))
    assert "add.rn.f32" in ptx
    assert case.bits is RADEMACHER or "mul.rn.f32" in ptx  # c * -1 may become -c
    assert not re.search(FUSED, ptx)
    assert binary  # ptxas took it

    lanes_in_a_row = re.findall(r"(#\w+) = #ttg.blocked<\{sizePerThread = \[1\], threadsPerWarp = \[32\]", layouts)
    stores = re.findall(r"tt\.store .*, (#\w+)>", layouts)
    loads = re.findall(r"tt\.load .*cacheModifier = cg.*, (#\w+)>", layouts)
    assert len(loads) == 2  # of chunks that are whole, and of others
    assert len(stores) == 2 * len(outputs)
    assert {*stores, *loads} == {*lanes_in_a_row}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_registers_and_shared_memory(
    capability: int, compiled: Callable[[int], list[tuple[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every kernel, for every generation of GPUs: no fused multiply-add, nothing in local memory, few registers."""
    from mezo_dist.directions.kernels import gpu

    kernels = compiled(capability)
    weight = torch.zeros(4096, dtype=BF16)
    two = [Combination.single(1, 1e-3), Combination.single(1, -1e-3)]
    parts = [Part(weight, (torch.empty_like(weight), torch.empty_like(weight)), 1, torch.Size((64, 64)))] * 2
    itself = [Part(weight, (weight,), 1, torch.Size((64, 64)))] * 2
    updates = [(two[0], 3), (two[1], 4)]
    for bits in (GAUSSIAN, RADEMACHER):
        gpu.add_parts(parts, two, bits=bits, rounding_seed=None)
        gpu.advance_parts(itself, updates, bits=bits)
    gpu.add_lowrank(parts, two, rank=2, rounding_seed=None)
    gpu.advance_lowrank(itself, updates, rank=2)
    usage = []
    for name, kernel in kernels:
        text = resources(kernel.asm["cubin"])
        registers, stack, shared = (int(re.findall(rf"{what}:(\d+)", text)[0]) for what in ("REG", "STACK", "SHARED"))
        usage.append((name, registers, stack, max(shared, kernel.metadata.shared)))
        assert not re.search(FUSED, kernel.asm["ptx"]), name
    with capsys.disabled():
        print(f"\nsm_{capability}: kernel, registers, stack, shared memory:", *usage, sep="\n  ")
    assert len(usage) == 8  # two of them fill factors
    spilled = 8  # bytes, of the low-rank kernel on sm_100 by Triton 3.6 (3.7: none)
    assert all(registers <= 128 and stack <= spilled and shared <= 20_000 for _, registers, stack, shared in usage)


def resources(binary: bytes) -> str:
    """What cuobjdump, which comes with Triton, says of a kernel."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary)
        return subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout


def test_is_the_implementation_for_cuda() -> None:
    from mezo_dist.directions.kernels import gpu

    assert add.implementation("cuda") is gpu


def test_refuses_an_unknown_law() -> None:
    from mezo_dist.directions.kernels import gpu

    bits = replace(GAUSSIAN, name="uniform", values=lambda words: words.float())
    with pytest.raises(ValueError, match="'uniform'"):
        gpu.add(torch.ones(1, 4), [ZERO], [torch.ones(1, 4)], param_id=1, offsets=(0,), bits=bits, rounding_seed=None)


def run(name: str, device: str) -> str:
    """What is wrong in the case with this name."""
    if name in CASES:
        return run_case(CASES[name], device)
    return run_group(GROUPS[name], device) if name in GROUPS else run_factors(FACTORS[name], device)


def read_numbers_of_arrays() -> None:
    """Let Triton 3.6's interpreter know where a loop ends: numpy 2.5 makes no number of an array of one element."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: type, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: scalar.handle.data.item())

    interpreter._patch_lang_tensor = patch


def every(run: Callable[[str, str], str], names: Iterable[str], device: str) -> dict[str, str]:
    """By case: what is wrong. On a GPU in several processes, for most of the time goes into compiling."""
    names = list(names)
    if device == "cpu":
        read_numbers_of_arrays()
        return {name: run(name, device) for name in names}
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        return dict(zip(names, pool.map(run, names, itertools.repeat(device)), strict=True))


if __name__ == "__main__":
    print(json.dumps(every(run, [*CASES, *GROUPS, *FACTORS], sys.argv[1])))
