"""Sharded weights, model by model: the same bits as whole weights, and every weight gathered once for all passes.

Starting a process takes longer than what is asked of it here, so every world is started once, does everything, and the
tests look at what it found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from mezo_dist.algorithms.base import Variant
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator, OutOfStepError
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.layouts.base import Layout
from mezo_dist.engines.layouts.fsdp import Fsdp
from mezo_dist.engines.layouts.zero import Zero
from mezo_dist.engines.units import find_units
from mezo_dist.errors import UserError
from mezo_dist.testing import spawn, tiny_model
from tests.engines.models import KINDS, TOYS, VARIANTS, Broken, explode, make
from tests.parts import Parts, run_parts

pytestmark = pytest.mark.distributed

NAMES = (*KINDS, "classifier", *(toy.__name__ for toy in TOYS))
UPDATE = Combination.of([(1, 0.1), (2, -0.2)])
WORLD = 3
ITEMS_OF = (3, 1, 0)
"""Micro-batches of every rank: one of them has none."""
LAYOUTS: dict[str, Callable[[nn.Module, Communicator], Layout | None]] = {
    "replicated": lambda model, comm: None,
    "fsdp": Fsdp,
    "zero": lambda model, comm: Zero(model, comm, {}),
}
# A pass gathers every unit once; these own weights that are used again and again, here or there.
AGAIN = {"Blocks": 3}


@dataclass(frozen=True)
class Passed:
    """What one rank found on one model."""

    results: list[list[Any]]
    """The results for its micro-batches."""
    fingerprints: tuple[str, str, str]
    """Before, after evaluating, after an update."""
    gathers: int
    gathered_bytes: int
    whole_bytes: int
    """Size of all weights."""
    never_used: list[str]


# What every rank does (this part runs in processes of its own)


def pass_all(comm: Communicator, layout: str, law: str) -> dict[str, Passed]:
    torch.set_num_threads(1)
    return {name: pass_one(comm, layout, law, name) for name in NAMES}


def pass_one(comm: Communicator, layout: str, law: str, name: str) -> Passed:
    """A rank has the first few of three micro-batches, two of which go through the model together."""
    model, items, forward = make(name)
    model.get_parameter(next(iter(dict(model.named_parameters())))).requires_grad_(False)  # some weights are frozen
    engine = Engine(model, Law(law), LAYOUTS[layout](model, comm), width=2, prefetch=layout == "fsdp")
    before = engine.fingerprint()
    results = engine.evaluate(VARIANTS, items[: ITEMS_OF[comm.rank]], forward, most=3, filler=items[0])
    after = engine.fingerprint()
    gathers, num_bytes = engine.gathers, engine.gathered_bytes
    engine.add(UPDATE, rounding_seed=0)
    size = sum(4 * shard.shape.numel() for shard in engine.shards())
    ends = (before, after, engine.fingerprint())
    return Passed([[r.numpy() for r in row] for row in results], ends, gathers, num_bytes, size, engine.never_used())


def everything(comm: Communicator) -> Parts:
    parts: dict[str, Callable[[], Any]] = {
        f"{layout} {law}": functools.partial(pass_all, comm, layout, law) for layout, law in SHARDED
    }
    for name, make_layout in list(LAYOUTS.items())[1:]:
        parts[f"{name} faults"] = functools.partial(faults, comm, make_layout)
        parts[f"{name} filled"] = functools.partial(fill_meta, comm, make_layout)
    parts["offload"] = lambda: offload(comm)
    parts["bf16"] = lambda: {name: bf16(comm, make_layout) for name, make_layout in LAYOUTS.items()}
    parts["gather in bf16"] = lambda: gather_in_bf16(comm)
    parts["does not divide"] = lambda: message_of(lambda: Fsdp(tiny_model("opt"), comm, replicate=2))
    return run_parts(parts)


SHARDED = [("fsdp", "gaussian"), ("zero", "gaussian"), ("fsdp", "lowrank")]


def message_of(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except (UserError, OutOfStepError, Broken) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def faults(comm: Communicator, make_layout: Callable[..., Any]) -> dict[str, str]:
    """Passes that fail, or differ between ranks; after each the engine works as before."""
    model, items, forward = make("llama")
    engine = Engine(model, Law("gaussian"), make_layout(model, comm))
    is_last = comm.rank == comm.world_size - 1

    def works() -> str:
        (results,) = engine.evaluate(VARIANTS, items[:1], forward)
        return "" if all(r.isfinite().all() for r in results) else "broken"

    blocks = model.get_submodule("model.layers")
    model.get_submodule("model").layers = blocks[:1] if is_last else blocks  # type: ignore[index]
    messages = {"path": message_of(lambda: engine.evaluate(VARIANTS, items[:1], forward))}
    model.get_submodule("model").layers = blocks
    messages["after path"] = works()

    def more_groups() -> None:
        engine.evaluate(VARIANTS, items[: 1 + is_last], forward)
        if not is_last:
            comm.barrier()

    engine.width = 1
    messages["groups"] = message_of(more_groups)
    engine.width = None
    messages["after groups"] = works()
    handle = model.get_submodule("model.layers.1.mlp.up_proj").register_forward_pre_hook(explode)
    messages["error"] = message_of(lambda: engine.evaluate(VARIANTS, items, forward))
    handle.remove()
    messages["after error"] = works()
    return messages


def fill_meta(comm: Communicator, make_layout: Callable[..., Any]) -> list[str]:
    """A model without data gets memory for its shards alone, and is filled through them."""
    source = tiny_model("llama-tied")
    with torch.device("meta"):
        model = type(source)(source.config).eval()
    for name, buffer in source.named_buffers():
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = buffer
    engine = Engine(model, Law("gaussian"), make_layout(model, comm))
    for shard in engine.shards():
        whole = source.get_parameter(shard.name).data.view(-1)
        shard.tensor.view(-1).copy_(whole[shard.offset : shard.offset + shard.tensor.numel()])
    same = [torch.equal(tensor, source.get_parameter(name)) for name, tensor in engine.named_weights()]
    return [engine.fingerprint(), str(all(same) and len(same) == len(list(source.parameters())))]


def offload(comm: Communicator) -> tuple[str, str, bool]:
    model, items, forward = make("opt")
    engine = Engine(model, Law("gaussian"), Fsdp(model, comm, offload=True))
    (results,) = engine.evaluate(VARIANTS, items[:1], forward)
    on_cpu = all(shard.tensor.device.type == "cpu" for shard in engine.shards())
    before = engine.fingerprint()
    engine.add(UPDATE, rounding_seed=0)
    return before, engine.fingerprint(), on_cpu and all(r.isfinite().all() for r in results)


def bf16(comm: Communicator, make_layout: Callable[..., Any]) -> tuple[str, list[list[float]]]:
    """bf16 weights, rounded stochastically."""
    model, items, forward = make("llama")
    model.bfloat16()
    engine = Engine(model, Law("gaussian"), make_layout(model, comm), stochastic_rounding=True)
    engine.add(Combination.single(3, 1e-5), rounding_seed=77)
    results = engine.evaluate(VARIANTS, items[:1], forward)
    return engine.fingerprint(), [[r.float().sum().item() for r in row] for row in results]


def gather_in_bf16(comm: Communicator) -> tuple[Any, Any, int, int]:
    """fp32 shards, gathered in bf16: half the bytes."""
    by_dtype = []
    for gather in (torch.float32, torch.bfloat16):
        model, items, forward = make("llama")
        layout = Fsdp(model, comm, gather_dtype=gather)
        engine = Engine(model, Law("gaussian"), layout, compute_dtype=torch.bfloat16)
        (results,) = engine.evaluate(VARIANTS, items[:1], forward)
        by_dtype.append(([r.float().numpy() for r in results], engine.gathered_bytes))
        assert all(shard.tensor.dtype == torch.float32 for shard in engine.shards())
    return by_dtype[0][0], by_dtype[1][0], by_dtype[0][1], by_dtype[1][1]


# What is made of it


@pytest.fixture(scope="module")
def whole() -> dict[str, dict[str, Passed]]:
    return {law: pass_all(Communicator(), "replicated", law) for law in ("gaussian", "lowrank")}


@pytest.fixture(scope="module")
def sharded() -> list[Parts]:
    return spawn(everything, WORLD, timeout_s=280)


every_layout = pytest.mark.parametrize("layout", ["fsdp", "zero"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("layout", "law"), SHARDED)
def test_sharded_weights_give_the_bits_of_whole_ones(
    whole: dict[str, dict[str, Passed]], sharded: list[Parts], layout: str, law: str, name: str
) -> None:
    alone = whole[law][name]
    for rank, reported in enumerate(sharded):
        passed: Passed = reported[f"{layout} {law}"][name]
        assert passed.fingerprints == alone.fingerprints
        assert passed.never_used == alone.never_used == []
        assert len(passed.results) == ITEMS_OF[rank]
        for row, expected in zip(passed.results, alone.results, strict=False):
            assert all((one == other).all() for one, other in zip(row, expected, strict=True))
    assert alone.fingerprints[0] == alone.fingerprints[1] != alone.fingerprints[2]


@pytest.mark.parametrize("name", NAMES)
@every_layout
def test_a_pass_gathers_every_weight_once(sharded: list[Parts], layout: str, name: str) -> None:
    """For all variants and both micro-batches together. Padding makes it a little more on tiny weights."""
    units = len(find_units(make(name)[0])) + AGAIN.get(name, 0)
    for reported in sharded:
        passed: Passed = reported[f"{layout} gaussian"][name]
        assert passed.gathers <= 2 * units  # two groups: of two micro-batches and of one
        if name not in AGAIN:
            assert passed.gathered_bytes / 2 <= passed.whole_bytes * (1.5 if name in ("mixtral", *TOY_NAMES) else 1.1)


TOY_NAMES = [toy.__name__ for toy in TOYS]


@every_layout
def test_ranks_that_take_different_ways_are_told(sharded: list[Parts], layout: str) -> None:
    for reported in sharded:
        faults: dict[str, str] = reported[f"{layout} faults"]
        for what in ("path", "groups"):
            assert f"OutOfStepError: rank(s) [{WORLD - 1}]" in faults[what]
            assert faults[f"after {what}"] == ""


@every_layout
def test_an_error_in_a_pass_leaves_the_engine_whole(sharded: list[Parts], layout: str) -> None:
    for reported in sharded:
        assert reported[f"{layout} faults"]["error"].startswith("Broken")
        assert reported[f"{layout} faults"]["after error"] == ""


@every_layout
def test_models_without_data_are_filled_by_shards(sharded: list[Parts], layout: str) -> None:
    wanted = Engine(tiny_model("llama-tied"), Law("gaussian")).fingerprint()
    for reported in sharded:
        assert reported[f"{layout} filled"] == [wanted, "True"]


def test_shards_in_host_memory(whole: dict[str, dict[str, Passed]], sharded: list[Parts]) -> None:
    model, _, _ = make("opt")
    engine = Engine(model, Law("gaussian"))
    before = engine.fingerprint()
    engine.add(UPDATE, rounding_seed=0)
    for reported in sharded:
        assert reported["offload"] == (before, engine.fingerprint(), True)


def test_bf16_shards_are_rounded_as_whole_weights(sharded: list[Parts]) -> None:
    for reported in sharded:
        assert reported["bf16"]["fsdp"] == reported["bf16"]["zero"] == reported["bf16"]["replicated"]


def test_fp32_shards_gathered_in_bf16(sharded: list[Parts]) -> None:
    """Half the bytes. Weights are rounded once more, before the perturbation, by up to half a unit in the last place
    (2**-9 of their size): the logits of a model of two blocks move by a few such units."""
    for reported in sharded:
        exact, close, full_bytes, half_bytes = reported["gather in bf16"]
        assert half_bytes * 2 == full_bytes
        for variant, one, other in zip(VARIANTS, exact, close, strict=True):
            assert abs(one - other).max() <= 8 * 2**-9 * abs(one).max()
            assert (one == other).all() == (not variant.shift)


def test_copies_that_cannot_be_made(sharded: list[Parts]) -> None:
    for reported in sharded:
        assert reported["does not divide"] == "UserError: layout.replicate: 2 copies cannot be made on 3 process(es)"


# Units


class Stack(nn.Module):
    """Two lists; the model says nothing about blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.few = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.many = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(4))


def test_blocks_are_the_members_of_the_largest_list() -> None:
    names = [unit.name for unit in find_units(Stack())]
    assert names == ["few.0", "few.1", "many.0.0", "many.1.0", "many.2.0", "many.3.0"]
    assert [len(unit.hooked_modules) for unit in find_units(Stack())] == [1, 1, 2, 2, 2, 2]


def test_blocks_can_be_named() -> None:
    units = find_units(Stack(), ["ModuleList"])
    assert [len(unit.hooked_modules) for unit in units] == [2, 8]
    with pytest.raises(UserError, match=r"layout.blocks: no module of the model is a Decoder or Encoder"):
        find_units(Stack(), ["Decoder", "Encoder"])


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_belongs_to_one_unit(name: str) -> None:
    model, _, _ = make(name)
    units = find_units(model)
    owners = [{weight.name for hooked in unit.hooked_modules for weight in hooked.weights} for unit in units]
    assert sum(map(len, owners)) == len(set().union(*owners)) == len(dict(model.named_parameters()))
    assert [unit.hooked_modules[0].order for unit in units] == sorted(unit.hooked_modules[0].order for unit in units)


def test_tied_weights_are_one_unit() -> None:
    units = find_units(tiny_model("llama-tied"))
    assert [len(unit.modules) for unit in units] == [2, 1, 1, 1]
    assert [unit.stays for unit in units] == [True, False, False, False]


def test_variants_need_no_shift() -> None:
    """One process may have a sharded layout too."""
    comm = Communicator()
    model, items, forward = make("llama")
    plain = Engine(make("llama")[0], Law("gaussian")).evaluate([Variant()], items[:1], forward)[0][0]
    engine = Engine(model, Law("gaussian"), Fsdp(model, comm))
    assert torch.equal(engine.evaluate([Variant()], items[:1], forward)[0][0], plain)
    comm.close()
