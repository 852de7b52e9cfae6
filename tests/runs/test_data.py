"""Large data are encoded once per host and once for all runs; whatever lies in the cache, the samples are the same."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

from mezo_dist.config import reader
from mezo_dist.config.schema import RunConfig
from mezo_dist.distributed import in_turn
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import UserError
from mezo_dist.models.load import Pretrained, load_model
from mezo_dist.runs import data as data_module
from mezo_dist.runs.build import text_model_of
from mezo_dist.runs.data import Encoded, encode_data, open_data
from mezo_dist.storage.sample_file import SampleFile
from mezo_dist.tasks import encoding
from mezo_dist.tasks.batches import Sample
from mezo_dist.tasks.kinds import kind_of
from mezo_dist.tasks.rows import Rows, load_rows
from mezo_dist.testing import write_tiny_config

SPLITS = ("train", "validation", "test")


class World:
    """A tiny task, its model, and a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = reader.load(write_tiny_config(folder / "run"))
        self.task: Any = self.config.task
        self.data = folder / "run" / "data.jsonl"
        self.cache = folder / "cache" / "samples"
        self.pretrained = load_model(self.config.located().model, num_labels=2, seed=0)

    def encode(
        self, comm: Communicator | None = None, config: RunConfig | None = None, pretrained: Pretrained | None = None
    ) -> dict[str, Encoded]:
        comm, config, pretrained = comm or Communicator(), config or self.config, pretrained or self.pretrained
        rows = open_data(config.located().task, comm)
        model = text_model_of(config, pretrained)
        return encode_data(rows, kind_of(config.task, model, rows.first_row), pretrained, model, comm)

    def files(self) -> list[Path]:
        return sorted(self.cache.iterdir()) if self.cache.exists() else []


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def world(tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("MEZO_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(data_module.LIMIT, raising=False)
    monkeypatch.setattr(data_module, "LEAST_ROWS", 10)
    tiny.cache = tmp_path / "cache" / "samples"
    return tiny


def refuse(*_: object) -> Any:
    raise AssertionError("nobody should have to")


def in_memory(
    world: World, monkeypatch: pytest.MonkeyPatch, config: RunConfig | None = None
) -> dict[str, list[Sample]]:
    with monkeypatch.context() as patch:
        patch.setenv(data_module.LIMIT, "0")
        encoded = world.encode(config=config)
    assert all(isinstance(some.samples, list) for some in encoded.values())
    return {name: list(some.samples) for name, some in encoded.items()}


def test_a_second_run_reads_neither_rows_nor_texts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = gc.get_freeze_count()  # Python 3.12 starts with some
    first = world.encode()
    monkeypatch.setattr(data_module, "load_rows", refuse)
    monkeypatch.setattr(encoding, "_rounds", refuse)
    second = world.encode()
    expected = in_memory_of(first)
    assert in_memory_of(second) == expected
    assert all(isinstance(some.samples, SampleFile) for some in (*first.values(), *second.values()))
    assert [first[name].digest for name in SPLITS] == [second[name].digest for name in SPLITS]
    assert gc.get_freeze_count() == frozen


def in_memory_of(encoded: dict[str, Encoded]) -> dict[str, list[Sample]]:
    return {name: list(some.samples) for name, some in encoded.items()}


def test_samples_and_digests_are_those_in_memory(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = in_memory(world, monkeypatch)
    assert not world.files()
    encoded = world.encode()
    assert in_memory_of(encoded) == expected
    assert len(world.files()) == 4  # a file per split, and one about the rows


def test_small_data_touch_no_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "LEAST_ROWS", 2_000)
    assert isinstance(world.encode()["train"].samples, list)
    assert not world.files()


@pytest.mark.parametrize(
    "change",
    ["prompt", "truncate_side", "labels", "seed", "size", "max_tokens", "row", "tokenizer", "code", "chat template"],
)
def test_whatever_samples_depend_on_makes_others(change: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.encode()
    before = {path.name for path in world.files() if path.suffix == ".samples"}
    task, train, pretrained = world.task, world.config.train, world.pretrained
    content = world.data.read_text()
    if change == "prompt":
        task = dataclasses.replace(task, prompt="{{ text }} . This was {{ answer }}")
    elif change == "truncate_side":
        task = dataclasses.replace(task, truncate_side="left")
    elif change == "labels":
        task = dataclasses.replace(task, labels=tuple(reversed(task.labels)))
    elif change in ("seed", "size"):
        splits = task.splits
        new = {"seed": 5} if change == "seed" else {"test": dataclasses.replace(splits.test, size=10)}
        task = dataclasses.replace(task, splits=dataclasses.replace(splits, **new))
    elif change == "max_tokens":
        train = dataclasses.replace(train, max_tokens=20)
    elif change == "row":
        world.data.write_text(content.replace("and", "the", 1))
    elif change == "tokenizer":
        pretrained = dataclasses.replace(pretrained, tokenizer_digest="another")
    elif change == "code":
        monkeypatch.setattr(data_module, "code_digest", lambda: "another")
    else:
        monkeypatch.setattr(pretrained.tokenizer, "chat_template", "{{ messages }}")
    config = dataclasses.replace(world.config, task=task, train=train)
    try:
        encoded = world.encode(config=config, pretrained=pretrained)
        assert before.isdisjoint(path.name for path in world.files() if path.name not in before)
        assert len([path for path in world.files() if path.suffix == ".samples"]) == 6
        assert in_memory_of(encoded) == in_memory(world, monkeypatch, config)
    finally:
        world.data.write_text(content)


def test_where_the_data_are_does_not_matter(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world.encode()
    (tmp_path / "copy.jsonl").write_bytes(world.data.read_bytes())
    monkeypatch.setattr(data_module, "load_rows", refuse)
    task = dataclasses.replace(world.task, data=str(tmp_path / "copy.jsonl"))
    world.encode(config=dataclasses.replace(world.config, task=task))


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "folder"])
@pytest.mark.parametrize("what", [".samples", ".json"])
def test_damaged_files_are_made_anew(
    damage: str, what: str, world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = in_memory_of(world.encode())
    for path in world.files():
        if path.suffix == what:
            content = path.read_bytes()
            path.unlink()
            if damage == "folder":
                path.mkdir()
            else:
                changed = content.replace(b"1", b"2", 1)
                path.write_bytes({"cut": content[:-9], "changed": changed, "empty": b""}[damage])
    assert in_memory_of(world.encode()) == expected
    assert "again" in caplog.text or damage == "folder"
    if damage != "folder":
        monkeypatch.setattr(encoding, "_rounds", refuse)
        assert in_memory_of(world.encode()) == expected


def test_what_was_said_of_rows_is_said_again(world: World, caplog: pytest.LogCaptureFixture) -> None:
    content = world.data.read_text()
    rows = [json.loads(line) for line in content.splitlines()]
    world.data.write_text("".join(json.dumps({**row, "note": None}) + "\n" for row in rows))
    task = dataclasses.replace(world.task, prompt="{{ note | default('', true) }}{{ text }} It was {{ answer }}")
    config = dataclasses.replace(world.config, task=task)
    try:
        for _ in range(2):
            caplog.clear()
            world.encode(config=config)
            assert caplog.text.count("fields that are null, of the 30 rows of the train split: note in 30") == 1
    finally:
        world.data.write_text(content)


def test_a_wrong_row_is_named_and_nothing_is_kept(world: World) -> None:
    one, other = world.task.labels
    task = dataclasses.replace(world.task, labels=(one, dataclasses.replace(other, value="no such class")))
    with pytest.raises(UserError, match=r"^train sample \d+, .*add it, or leave such rows out"):
        world.encode(config=dataclasses.replace(world.config, task=task))
    assert [path.suffix for path in world.files()] == [".json"]


def test_a_folder_that_cannot_be_written_is_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.cache.parent.parent.mkdir(exist_ok=True)
    world.cache.parent.write_text("a file where a folder should be")
    encoded = world.encode()
    assert isinstance(encoded["train"].samples, list)
    assert "set MEZO_DIST_CACHE to another folder" in caplog.text


@pytest.mark.parametrize("value", ["-1", "much", "nan", "inf"])
def test_a_wrong_limit_is_refused(value: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data_module.LIMIT, value)
    with pytest.raises(UserError, match="MEZO_DIST_SAMPLES_GIB"):
        world.encode()


# Several ranks


class Ranks:
    """The ranks of a world as threads, with the collectives of a `Communicator` that are needed here."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.texts = [""] * size

    def run(self, work: Callable[[Communicator], Any]) -> list[Any]:
        def on(rank: int) -> Any:
            try:
                return work(cast(Communicator, _Rank(self, rank)))
            except UserError as error:
                return str(error)

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(on, range(self.size)))


class _Rank:
    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank, self.world_size = ranks, rank, ranks.size

    def gather_texts(self, text: str) -> list[str]:
        self.ranks.texts[self.rank] = text
        self.ranks.barrier.wait()
        texts = list(self.ranks.texts)
        self.ranks.barrier.wait()
        return texts

    collect = Communicator.collect


def test_one_rank_of_a_host_encodes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = in_memory(world, monkeypatch)
    loads: list[str] = []

    def counted(*given: Any) -> Rows:
        loads.append("rows")
        return load_rows(*given)

    monkeypatch.setattr(data_module, "load_rows", counted)
    results = Ranks(3).run(lambda comm: world.encode(comm))
    assert [in_memory_of(result) for result in results] == [expected] * 3
    assert all(isinstance(result["train"].samples, SampleFile) for result in results)
    assert loads == ["rows"]


def test_each_host_encodes_its_own(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = iter("aabb")
    monkeypatch.setattr(socket, "gethostname", lambda: next(hosts))
    turns = Ranks(4).run(lambda comm: in_turn.turn_on_host(comm, world.cache))
    assert sorted(turns) == [0, 0, 1, 1]


def test_a_rank_that_cannot_read_does_not_hang_the_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, *_: Any) -> Any:
        raise OSError("no such disk")

    monkeypatch.setattr(data_module, "write_samples", broken)  # then every rank has to encode by itself
    results = Ranks(2).run(lambda comm: world.encode(comm))
    assert in_memory_of(results[0]) == in_memory_of(results[1])
    monkeypatch.setattr(data_module, "read_samples", broken)
    assert Ranks(2).run(lambda comm: world.encode(comm)) == ["rank(s) [0]: no such disk"] * 2


def test_ranks_whose_data_differ_in_size_do_not_hang(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one encodes in memory what the other keeps in files: that data differ is said later."""
    sizes = dataclasses.replace(world.task.splits, test=dataclasses.replace(world.task.splits.test, size=5))
    other = dataclasses.replace(world.config, task=dataclasses.replace(world.task, splits=sizes))
    monkeypatch.setattr(data_module, "LEAST_ROWS", 60)
    first, second = Ranks(2).run(lambda comm: world.encode(comm, other if comm.rank else None))
    assert (len(first["test"].samples), len(second["test"].samples)) == (20, 5)
    assert os.listdir(world.cache)
