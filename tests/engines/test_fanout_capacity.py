"""How many micro-batches go through the model together when nobody says: what memory holds, the same on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mezo_dist.algorithms.base import Evaluation, Variant
from mezo_dist.directions.combination import Combination
from mezo_dist.directions.law import Law
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines import capacity
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.units import find_units
from mezo_dist.runs.evaluation import Evaluator
from mezo_dist.tasks.batches import cut
from mezo_dist.tasks.classification.kind import collate
from mezo_dist.tasks.classification.label_words import LabelWords
from mezo_dist.tasks.classification.prompts import Sample
from mezo_dist.testing import tiny_model


def test_tokens_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    units = find_units(tiny_model("opt"))  # its residual stream has 32 features, its widest layer 48
    monkeypatch.setattr(capacity, "free_bytes", lambda: 100_000)
    assert capacity.tokens_at_once(units, torch.float32, 1) == int(25_000 / ((5 * 32 + 48) * 4))
    assert capacity.tokens_at_once(units, torch.bfloat16, 2) == int(12_500 / ((5 * 32 + 48) * 2))
    experts = find_units(tiny_model("mixtral"))  # 32 features, and 2 x 48 of gate and up in one matrix
    assert capacity.tokens_at_once(experts, torch.float32, 1) == int(25_000 / ((5 * 32 + 96) * 4))
    monkeypatch.setattr(capacity, "free_bytes", lambda: 0)
    assert capacity.tokens_at_once(units, torch.float32, 1) == 1
    monkeypatch.undo()
    assert 10**3 < capacity.tokens_at_once(units, torch.float32, 1) < 10**12


@pytest.mark.parametrize(("width", "tokens", "groups"), [(2, 1, [2, 2, 1]), (None, 1, [1] * 5), (None, 80, [3, 2])])
def test_groups_do_not_change_losses(width: int | None, tokens: int, groups: list[int]) -> None:
    """Ten samples of 6 tokens in micro-batches of two: with both signs 24 tokens each."""
    batch = cut([Sample((5, 6, 7, 8, 9, 4 + i), i % 2, 5) for i in range(10)], 2, 0, collate)
    model = tiny_model("llama")
    engine = Engine(model, Law("gaussian"))
    evaluator = Evaluator(engine, LabelWords(model, [40, 7], batch[0]), Communicator(), width, tokens)
    z = Combination.single(3, 1e-2)
    request = Evaluation((Variant(z), Variant(-z)))
    wanted = Evaluator(engine, evaluator.forward, Communicator()).losses(request, batch, ("step",))
    run, sizes = engine._fanout.run, []

    def counted(passes: Any) -> Any:
        sizes.append(len(passes) // 2)
        return run(passes)

    engine._fanout.run = counted  # type: ignore[method-assign]
    assert evaluator.losses(request, batch, ("step",)) == wanted
    assert sizes == groups
