"""Every architecture of the zoo on every layout, and there and back through an export.

Variants against really changed weights are in test_reads.py and test_probe.py. The nine families of
`mezo_dist.testing` are in test_layouts_models.py and tests/runs/test_export.py.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.layouts.base import Layout
from mezo_dist.engines.layouts.fsdp import Fsdp
from mezo_dist.engines.layouts.zero import Zero
from mezo_dist.runs.export import export_model
from mezo_dist.testing import spawn, tiny_tokenizer
from tests.engines import zoo
from tests.engines.models import VARIANTS, assert_same
from tests.parts import Parts, run_parts

ALL = (*zoo.NAMES, *zoo.HYBRIDS)
REFUSED = ("rwkv", "recurrent-gemma", "funnel")  # shown in test_probe.py: writes to its weights; keep state
NAMES = [name for name in ALL if name not in REFUSED]
LAYOUTS = ("fsdp", "zero")
UPDATE = Combination.of([(1, 0.1), (2, -0.2)])


def sharded(model: nn.Module, layout: str, comm: Communicator) -> Layout:
    return Fsdp(model, comm) if layout == "fsdp" else Zero(model, comm, {})


def as_whole(comm: Communicator, layout: str, name: str) -> str:
    """Losses and weights as those of whole weights, before and after an update; the fingerprint at the end."""
    model = zoo.build(name)
    cut, whole = Engine(model, Law("gaussian"), sharded(model, layout, comm)), Engine(zoo.build(name), Law("gaussian"))
    for _ in range(2):
        assert_same(*(engine.evaluate(VARIANTS, [zoo.ids()], zoo.forward) for engine in (cut, whole)))
        assert cut.fingerprint() == whole.fingerprint()
        for engine in (cut, whole):
            engine.add(UPDATE, rounding_seed=0)
    return cut.fingerprint()


def everything(comm: Communicator) -> Parts:
    torch.set_num_threads(1)
    return run_parts(
        {f"{layout} {name}": functools.partial(as_whole, comm, layout, name) for layout in LAYOUTS for name in NAMES}
    )


@pytest.fixture(scope="module")
def reports() -> list[Parts]:
    return spawn(everything, 2, timeout_s=280)


def test_there_are_enough() -> None:
    assert len(NAMES) >= 20


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_sharded_weights_give_the_bits_of_whole_ones(reports: list[Parts], layout: str, name: str) -> None:
    first, second = (report[f"{layout} {name}"] for report in reports)
    assert first == second


@pytest.mark.parametrize("name", ALL)
def test_an_export_loads(name: str, tmp_path: Path) -> None:
    model = zoo.build(name)
    engine = Engine(model, Law("gaussian"))
    engine.add(UPDATE, rounding_seed=0)
    export_model(engine, tiny_tokenizer(), tmp_path / "out", Communicator())
    again = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / "out").eval()
    weights = dict(model.named_parameters())
    assert weights.keys() == dict(again.named_parameters()).keys()
    assert all(torch.equal(weight, weights[key]) for key, weight in again.named_parameters())
