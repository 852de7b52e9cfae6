"""The kept copy of the weights: evaluated, it is what a really kept copy would give, and nothing is touched."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from mezo_dist.algorithms.base import Variant
from mezo_dist.config import reader
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.runs import training
from mezo_dist.storage import trajectory
from mezo_dist.tasks.classification.label_words import LabelWords
from mezo_dist.testing import tiny_model, write_tiny_config
from tests.engines.models import AROUND, Broken, assert_same, assert_untouched, attributes, explode, make, state
from tests.engines.test_persample import PER_SAMPLE, losses, micro_batches

UPDATE = Combination.of([(1, 0.1), (2, -0.2)])
VARIANTS = [Variant(AROUND), Variant(AROUND, base="anchor"), Variant(), Variant(base="anchor"), Variant(-AROUND)]


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral", "Blocks", "Recurrent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_a_copy_of_the_model_gives(name: str, dtype: torch.dtype) -> None:
    model, items, forward = make(name)
    model, items = model.to(dtype), [item.to(dtype) if item.is_floating_point() else item for item in items]
    engine = Engine(model, Law("gaussian"), width=2, stochastic_rounding=dtype == torch.bfloat16)
    old = Engine(copy.deepcopy(model), Law("gaussian"))
    engine.copy_anchor()
    engine.add(UPDATE, rounding_seed=0)
    before, modules = state(model), attributes(model)
    results = engine.evaluate(VARIANTS, items, forward)
    assert_same([row[1:4:2] for row in results], old.evaluate([Variant(AROUND), Variant()], items, forward))
    assert_same([row[0::2] for row in results], engine.evaluate([VARIANTS[v] for v in (0, 2, 4)], items, forward))
    assert_same(results, engine.evaluate(VARIANTS, items, forward))
    assert_untouched(model, before, modules)
    assert all(not torch.equal(row[2], row[3]) for row in results)


def test_in_16_bits_the_way_back_along_the_displacement_ends_beside_it() -> None:
    model, items, forward = make("llama")
    engine = Engine(model.bfloat16(), Law("gaussian"), stochastic_rounding=True)
    before = engine.evaluate([Variant()], items, forward)
    engine.copy_anchor()
    engine.add(Combination.single(5, 1e-2), rounding_seed=3)
    stored, replayed = (
        engine.evaluate([variant], items, forward)
        for variant in (Variant(base="anchor"), Variant(Combination.single(5, -1e-2)))
    )
    assert_same(stored, before)
    assert not torch.equal(replayed[0][0], before[0][0])


def test_a_direction_per_sample_at_the_anchor() -> None:
    model = tiny_model("opt")
    objective = LabelWords(model, [40, 7, 22], micro_batches()[0])
    engine, variant = Engine(model, Law("lowrank")), Variant(AROUND, PER_SAMPLE)
    wanted = losses(model, Law("lowrank"), [variant], objective)
    engine.copy_anchor()
    engine.add(UPDATE, rounding_seed=0)
    results = engine.evaluate([variant, Variant(AROUND, PER_SAMPLE, "anchor")], micro_batches(), objective)
    for item, row in zip(micro_batches(), results, strict=True):
        assert torch.equal(row[1].loss, wanted[0, list(item.slots)])
        assert not torch.equal(row[0].loss, row[1].loss)


def test_the_newest_copy_counts_and_an_error_leaves_all_in_place() -> None:
    model, items, forward = make("llama")
    engine = Engine(model, Law("gaussian"))
    engine.copy_anchor()
    engine.add(UPDATE, rounding_seed=0)
    engine.copy_anchor()
    wanted = engine.evaluate([Variant()], items, forward)
    engine.add(UPDATE, rounding_seed=0)
    before, modules = state(model), attributes(model)
    handle = model.get_submodule("model.layers.1.mlp.up_proj").register_forward_pre_hook(explode)
    with pytest.raises(Broken):
        engine.evaluate([Variant(base="anchor")], items, forward)
    handle.remove()
    assert_untouched(model, before, modules)
    assert_same(engine.evaluate([Variant(base="anchor")], items, forward), wanted)


def test_nothing_was_kept() -> None:
    model, items, forward = make("llama")
    with pytest.raises(RuntimeError, match="based on the anchor, but none was kept"):
        Engine(model, Law("gaussian")).evaluate([Variant(base="anchor")], items, forward)


def test_in_32_bits_a_run_is_that_of_a_replayed_anchor_up_to_rounding(tmp_path: Path) -> None:
    config = write_tiny_config(tmp_path, "opt", steps=7, batch_size=5, micro_batch=3)
    all_losses = []
    for anchor in ("replay", "stored"):
        options = ["algorithm.lr=1e-3", "algorithm.anchor_lr=1e-2", "algorithm.q=4", "output.export=false"]
        options += [f"algorithm.anchor={anchor}", f"output.dir={tmp_path / anchor}", "output.test=false"]
        training.train(reader.load(config, options), Communicator())
        steps = trajectory.read(tmp_path / anchor / "trajectory.jsonl").steps
        all_losses.append([loss for step in steps for loss in step.rounds[0].mean])
    assert len(all_losses[0]) == 2 * 2 + 5 * 4
    assert all_losses[0] == pytest.approx(all_losses[1], rel=1e-4)
    assert all_losses[0] != all_losses[1]
