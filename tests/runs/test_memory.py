"""Memory that is full ends a run with the settings to lower."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mezo_dist.config import reader
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.errors import UserError
from mezo_dist.runs import training
from mezo_dist.testing import write_tiny_config

ERRORS = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
    "machine": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
}


@pytest.mark.parametrize("where", ERRORS)
def test_full_memory_names_what_to_lower(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise ERRORS[where]

    monkeypatch.setattr(Engine, "evaluate_groups", full)
    path = write_tiny_config(tmp_path, "llama", "mezo")
    config = reader.load(path, ["algorithm.directions=3", "train.width=4", "output.test=false"])
    message = (
        rf"{where}.* is full: .*train.width \(now 4\).*train.micro_batch \(now 4\)"
        r".*algorithm.directions \(now 3\).*model.compute: bfloat16.*layout.name: fsdp"
    )
    with pytest.raises(UserError, match=message):
        training.train(config, Communicator(), quiet=True)


def test_other_errors_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("sizes do not match")

    monkeypatch.setattr(training, "build_run", fail)
    config = reader.load(write_tiny_config(tmp_path, "llama", "mezo"))
    with pytest.raises(RuntimeError, match="sizes do not match"):
        training.train(config, Communicator(), quiet=True)
