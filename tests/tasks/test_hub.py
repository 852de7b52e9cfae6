"""Data sets that the hub does not give: the message says what to do."""

from __future__ import annotations

import errno
from typing import Any

import datasets
import pytest

from mezo_dist.errors import UserError
from mezo_dist.tasks.hub import read_hub


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            RuntimeError("Dataset scripts are no longer supported, but found x.py"),
            "try task.revision: refs/convert/parquet",
        ),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub. Visit ..."),
            "Accept its terms on https://huggingface.co/datasets/a/b, then log in with `hf auth login` or set",
        ),
        (
            ConnectionError("Couldn't reach 'a/b' on the Hub (LocalEntryNotFoundError)"),
            "run `python -c \"import datasets; datasets.load_dataset('a/b').save_to_disk('FOLDER')\"`",
        ),
        (ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"), "Without the network: where there"),
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['x']"),
            "Set task.subset to",
        ),
        (ValueError("BuilderConfig 'y' not found. Available: ['x']"), "Set task.subset to one of them"),
        (OSError(errno.ENOLCK, "No locks available"), "set HF_HOME to a folder that has, such as on a local disk"),
        (NotImplementedError("FileSystem does not appear to support flock"), "set HF_HOME to a folder that has"),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"),
            "doesn't exist on the Hub",
        ),
    ],
)
def test_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str) -> None:
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        read_hub("a/b", None, None)
    message = str(caught.value)
    assert message.startswith(
        f"task.data: 'a/b' is no local file, no demo data set, and the hub did not give it: {error}"
    )
    assert expected in message


def test_subset_and_revision_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*names: Any, **options: Any) -> Any:
        asked.append((names, options))
        return {"train": datasets.Dataset.from_list([{"text": "x"}])}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tables = read_hub("a/b", "sub", "main")
    assert tables["train"].take([0]) == [{"text": "x"}]
    assert asked == [(("a/b", "sub"), {"revision": "main"})]


def test_the_command_that_fetches_it_elsewhere_names_subset_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'a/b' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"load_dataset\('a/b', 'copa', revision='refs/x'\)\.save_to_disk\('FOLDER'\)"):
        read_hub("a/b", "copa", "refs/x")
