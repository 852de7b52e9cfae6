"""What people do with the library, in a process where packages that it can do without are as if not installed.

`python -m tests.packaging.library FOLDER` prints what came of it, as JSON.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

NOT_NEEDED = (
    "datasets tensorboard torchmetrics rich numba llvmlite pandas pyarrow scipy sklearn matplotlib peft deepspeed "
    "mpi4py triton torchao bitsandbytes wandb mlflow"
).split()


class Absent:
    """A finder of modules that does not find some.

    Args:
        finder: finds the others.
        names: top-level modules that are not found; may change.
    """

    def __init__(self, finder: object, names: set[str]) -> None:
        self._finder, self._names = finder, names

    def find_spec(self, name: str, *args: object) -> object:
        if name.split(".")[0] in self._names:
            return None
        return self._finder.find_spec(name, *args)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        return getattr(self._finder, name)


def hide(names: Iterable[str]) -> set[str]:
    """From now on modules cannot be found, nor by `importlib.util.find_spec`; the set can be changed later."""
    hidden = set(names)
    sys.meta_path[:] = [Absent(finder, hidden) for finder in sys.meta_path]  # type: ignore[misc]
    return hidden


def message(action: Callable[[], object]) -> str:
    """What the UserError says that an action raises."""
    from mezo_dist.errors import UserError

    try:
        action()
    except UserError as error:
        return str(error)
    raise AssertionError("no UserError")


def results(folder: Path) -> dict[str, object]:
    """What `Optimizer`, `replay`, `minimize` and `MeZOTrainer` come to, with fingerprints of all bits of the weights.

    Args:
        folder: for their files.
    """
    import torch

    from mezo_dist import MeZO, Optimizer, minimize, replay
    from mezo_dist.testing import tiny_model
    from tests.trainer import trainers

    model, again = tiny_model("llama"), tiny_model("llama")
    ids = torch.arange(24).reshape(2, 12) + 4
    optimizer: Optimizer[torch.Tensor] = Optimizer(model, MeZO(lr=1e-3), trajectory=folder / "steps.jsonl")
    with optimizer:
        losses = [optimizer.step(lambda m, batch: m(input_ids=batch, labels=batch).loss, ids) for _ in range(2)]
        weights = optimizer.fingerprint()
    replay(again, folder / "steps.jsonl")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    smallest = minimize(lambda x, _: float((x["x"] ** 2).sum()), {"x": torch.ones(3)}, MeZO(lr=0.1), steps=5)
    trainer = trainers.trainer(folder / "trainer", max_steps=2)
    trainer.train()
    return {
        "losses": losses,
        "minimum": smallest.weights["x"].tolist(),
        "trained": trainers.fingerprint(trainer),
        "trainer losses": trainers.losses(trainer),
        "weights": weights,
    }


def without_accelerate() -> str:
    """What is said of a trainer; for a process of its own, as transformers looks for accelerate once."""
    import mezo_dist

    hide(["accelerate"])
    return message(lambda: mezo_dist.MeZOTrainer)


def main(folder: Path) -> None:
    """Print results and messages."""
    hidden = hide([*NOT_NEEDED, "greenlet"])
    import mezo_dist

    assert not {"torch", "transformers"} & sys.modules.keys()
    messages = {"greenlet": message(lambda: mezo_dist.Optimizer)}
    hidden.remove("greenlet")
    with multiprocessing.get_context("fork").Pool(1) as pool:  # after the seconds that torch takes
        messages["accelerate"] = pool.apply(without_accelerate)
    (folder / "rows.parquet").write_bytes(b"PAR1")
    done = results(folder)

    from mezo_dist.tasks import files, hub
    from mezo_dist.tasks.generation import figures

    messages["rich"] = message(lambda: mezo_dist.train)
    messages["rich tables"] = message(lambda: importlib.import_module("mezo_dist.planning.report"))
    messages["datasets"] = message(lambda: files.read_file(folder / "rows.parquet"))
    messages["datasets of the hub"] = message(lambda: hub.read_hub("some/data", None, None))
    messages["datasets saved"] = message(lambda: hub.read_saved(folder))
    messages["torchmetrics"] = message(lambda: figures.of_text("f1", "a", ["a"]))
    messages["torchmetrics of many"] = message(lambda: figures.bleu(["a"], [["a"]]))
    there = sorted({name.split(".")[0] for name in sys.modules} & set(NOT_NEEDED))
    print(json.dumps({"results": done, "messages": messages, "imported": there}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
