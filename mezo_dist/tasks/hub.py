"""Data sets of the Hugging Face hub, and those saved by ``datasets``: what to do where one does not load."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

from mezo_dist.errors import UserError, needs
from mezo_dist.tasks.files import Arrow, Table

SAVED = ("dataset_dict.json", "state.json")
"""Files by which a folder written by ``save_to_disk`` is known."""


def read_saved(folder: Path) -> Mapping[str, Table]:
    """Split -> rows, from a folder written by ``save_to_disk`` of ``datasets``.

    Raises:
        UserError: it cannot be read.
    """
    with needs("datasets", f"task.data: datasets, which reads {folder}"):
        import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (ValueError, OSError) as error:
        raise UserError(f"task.data: cannot read the data set saved in {folder}: {error}") from error
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    return {split: Arrow(str(folder), data) for split, data in splits.items()}


def read_hub(name: str, subset: str | None, revision: str | None) -> Mapping[str, Table]:
    """Split -> rows, from the hub or the cache of it.

    Args:
        name: of the data set.
        subset: its configuration, if it has several.
        revision: branch, tag or commit.

    Raises:
        UserError: it does not load; the message says what to do.
    """
    with needs("datasets", f"task.data: datasets, which fetches {name!r}"):
        import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, subset, revision=revision)
    except (datasets.exceptions.DatasetsError, ValueError, OSError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"task.data: {name!r} is no local file, no demo data set, and the hub did not give it: {error}"
            f"{_remedy(error, name, subset, revision)}"
        ) from error
    return {split: Arrow(name, data) for split, data in loaded.items()}


def _remedy(error: Exception, name: str, subset: str | None, revision: str | None) -> str:
    """What to do about it, as far as the library's words tell.

    Args:
        error: of the library.
        name: see `read_hub`.
        subset: see `read_hub`.
        revision: see `read_hub`.
    """
    text = str(error)
    if "scripts are no longer supported" in text:
        return (
            "\n`datasets` no longer runs the script that this data set is. The hub may have converted it: try "
            "task.revision: refs/convert/parquet; or look for a copy in Parquet, or load it with datasets < 4 "
            "elsewhere, save_to_disk(FOLDER), and set task.data to that folder"
        )
    if "gated" in text or "401" in text or "403" in text:
        return (
            f"\nAccept its terms on https://huggingface.co/datasets/{name}, then log in with `hf auth login` or set "
            "the environment variable HF_TOKEN"
        )
    if "Config name is missing" in text or "BuilderConfig" in text:
        return "\nSet task.subset to one of them"
    if isinstance(error, NotImplementedError) or getattr(error, "errno", None) in (errno.ENOLCK, errno.ENOSYS):
        return "\nThe file system of its cache has no locks: set HF_HOME to a folder that has, such as on a local disk"
    if isinstance(error, ConnectionError) or "Couldn't reach" in text or "offline" in text.lower():
        given = [repr(name), *([repr(subset)] if subset else []), *([f"revision={revision!r}"] if revision else [])]
        load = f"import datasets; datasets.load_dataset({', '.join(given)}).save_to_disk('FOLDER')"
        return (
            f'\nWithout the network: where there is one, run `python -c "{load}"`, copy the folder and set task.data '
            "to it"
        )
    return ""
