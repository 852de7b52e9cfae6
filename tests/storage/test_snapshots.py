"""Snapshots: written by any number of ranks with any cuts, read by any other; complete or not there at all."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import Tensor

from mezo_dist.directions.law import Law
from mezo_dist.directions.seeds import param_id
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.engines.engine import Engine
from mezo_dist.engines.layouts.base import Shard
from mezo_dist.errors import UserError
from mezo_dist.storage import safetensors_io, snapshot_writer, snapshots
from mezo_dist.testing import spawn, tiny_model


class Cut:
    """Only what checkpoints need of an engine: every parameter cut at any element into ``num_shards`` pieces."""

    optimizer = None

    def __init__(self, place: int, num_shards: int, dtype: torch.dtype = torch.float32) -> None:
        self.whole = {name: p.detach().to(dtype) for name, p in tiny_model("llama-tied").named_parameters()}
        self.bounds: dict[str, tuple[int, int]] = {}
        for name, tensor in self.whole.items():
            step = tensor.numel() // num_shards + 3  # unequal pieces; the last rank owns nothing of small weights
            self.bounds[name] = (min(place * step, tensor.numel()), min((place + 1) * step, tensor.numel()))
        self.local = {name: self.whole[name].view(-1)[slice(*self.bounds[name])].clone() for name in self.whole}

    def shards(self) -> Iterator[Shard]:
        """Each is valid only until the next is asked for."""
        for name, tensor in self.whole.items():
            lent = self.local[name].clone()
            yield Shard(name, param_id(name), tensor.shape, self.bounds[name][0], lent)
            self.local[name].copy_(lent)
            lent.fill_(torch.nan)

    def anchor_shards(self) -> Iterator[Shard]:
        """No copy was kept."""
        return iter(())

    def optimizer_shards(self) -> Iterator[Shard]:
        """No optimiser is attached."""
        return iter(())

    def is_right(self) -> bool:
        return all(
            torch.equal(self.local[name], w.view(-1)[slice(*self.bounds[name])]) for name, w in self.whole.items()
        )


def fresh(engine: Any) -> Any:
    """The same engine with other weights."""
    for shard in engine.shards():
        shard.tensor.fill_(7)
    return engine


def as_engine(cut: Cut) -> Engine:
    return cast(Engine, cut)


def save(comm: Communicator, folder: Path, num_shards: int) -> str:
    """Ranks with the same place are replicas of each other."""
    engine = as_engine(Cut(comm.rank % num_shards, num_shards))
    return snapshot_writer.save_snapshot(folder, engine, 5, comm, facts={"of": "rank", "rank": comm.rank}).name


def load(comm: Communicator, snapshot: Path, num_shards: int) -> bool:
    engine = Cut(comm.rank % num_shards, num_shards)
    snapshots.load_snapshot(snapshot, as_engine(fresh(engine)), comm)
    return engine.is_right()


def fail(comm: Communicator, folder: Path) -> list[str]:
    """The last rank cannot write; then one file is damaged, which only one rank checks."""
    full_disk = mock.Mock(side_effect=OSError(28, "No space left on device"))
    messages = []
    with mock.patch.object(safetensors_io, "write", full_disk) if comm.rank == 1 else contextlib.nullcontext():
        try:
            save(comm, folder, 2)
        except UserError as error:
            messages.append(str(error))
    try:
        load(comm, folder.with_name("damaged") / "step-00000005", 2)
    except UserError as error:
        messages.append(str(error))
    return messages


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Snapshots of the same weights by several worlds."""
    root = tmp_path_factory.mktemp("snapshots")
    folders = {"1": root / "one" / save(Communicator(), root / "one", 1)}
    for name, world, num_shards in (("3 shards", 3, 3), ("2 replicas", 2, 1), ("2 x 2", 4, 2)):
        folder = root / name
        assert set(spawn(save, world, folder, num_shards)) == {"step-00000005"}
        folders[name] = folder / "step-00000005"
    return folders


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["1", "3 shards", "2 replicas", "2 x 2"])
def test_any_cuts_load_into_one_process(saved: dict[str, Path], name: str) -> None:
    engine = fresh(Engine(tiny_model("llama-tied"), Law("gaussian")))
    snapshot = snapshots.load_snapshot(saved[name], engine, Communicator())
    assert (snapshot.step, snapshot.facts) == (5, {"of": "rank", "rank": 0})
    reference = dict(tiny_model("llama-tied").named_parameters())
    assert all(torch.equal(tensor, reference[weight]) for weight, tensor in engine.named_weights())
    for place in range(3):
        assert load(Communicator(), saved[name], 1)
        cut = Cut(place, 3)
        snapshots.load_snapshot(saved[name], as_engine(fresh(cut)), Communicator())
        assert cut.is_right()


@pytest.mark.distributed
def test_another_world_loads(saved: dict[str, Path]) -> None:
    assert spawn(load, 2, saved["3 shards"], 2) == [True, True]


@pytest.mark.distributed
def test_every_element_is_written_once_and_replicas_share_the_work(saved: dict[str, Path]) -> None:
    whole = sum(tensor.nbytes for tensor in Cut(0, 1).whole.values())
    for snapshot in saved.values():
        sizes = [
            sum(entry.num_elements * 4 for entry in safetensors_io.read_header(path).values())
            for path in snapshot.glob("*.safetensors")
        ]
        assert sum(sizes) == whole
    assert len(list(saved["2 x 2"].glob("*.safetensors"))) == 4
    halves = [path.stat().st_size for path in saved["2 replicas"].glob("*.safetensors")]
    assert max(halves) < 0.75 * whole


@pytest.mark.distributed
def test_what_fails_on_one_rank_is_told_on_all(saved: dict[str, Path], tmp_path: Path) -> None:
    damaged = shutil.copytree(saved["3 shards"], tmp_path / "damaged" / "step-00000005")
    flip(sorted(damaged.glob("*.safetensors"))[1])
    folder = tmp_path / "snapshots"
    for messages in spawn(fail, 2, folder):
        assert "could not be written: rank(s) [1]: [Errno 28] No space left" in messages[0]
        assert "rank-00001.safetensors: damaged (its SHA-256" in messages[1]
    assert list(folder.iterdir()) == []


def flip(path: Path) -> None:
    """The last byte becomes another."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def snapshot_of(tmp_path: Path, step: int = 1, **options: Any) -> Path:
    return snapshot_writer.save_snapshot(tmp_path, as_engine(Cut(0, 1)), step, Communicator(), **options)


def test_old_ones_go_when_the_new_one_is_there(tmp_path: Path) -> None:
    assert snapshots.snapshots(tmp_path / "none") == []
    for step in (1, 2, 30, 4):
        snapshot_of(tmp_path, step, keep=3)
    assert [path.name for path in snapshots.snapshots(tmp_path)] == [f"step-{n:08d}" for n in (2, 4, 30)]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in snapshots.snapshots(tmp_path)}


def test_a_crash_before_the_end_leaves_the_old_ones_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = snapshot_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            snapshot_of(tmp_path, 2)
    assert snapshots.snapshots(tmp_path) == [first]
    assert [first, snapshot_of(tmp_path, 2)] == snapshots.snapshots(tmp_path)


def test_a_step_may_be_saved_again(tmp_path: Path) -> None:
    snapshot_of(tmp_path, facts={"n": 1})
    assert snapshots.read_snapshot(snapshot_of(tmp_path, facts={"n": 2})).facts == {"n": 2}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format": "x"}, "format 'x' is not mezo_dist/snapshot/1"),
        (
            {"weights": {"a": {"dtype": "F32", "shape": [4], "pieces": []}}},
            "a: its pieces do not make the whole weight",
        ),
        ({"weights": {"a": {"dtype": "F32", "shape": [4], "pieces": [["x", 0, 4]]}}}, "do not fit together"),
        ({"files": {"../x": ""}}, "a file name with a folder in it"),
        ({"step": None}, "damaged, or of another version"),
    ],
)
def test_a_damaged_index(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    snapshot = snapshot_of(tmp_path)
    index = snapshot / snapshots.INDEX
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))
    with pytest.raises(UserError, match=expected):
        snapshots.read_snapshot(snapshot)


def test_a_damaged_snapshot_touches_no_weight(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path)
    flip(next(snapshot.glob("*.safetensors")))
    engine = fresh(Cut(0, 1))
    with pytest.raises(UserError, match="damaged"):
        snapshots.load_snapshot(snapshot, as_engine(engine), Communicator())
    assert all(bool((tensor == 7).all()) for tensor in engine.local.values())


@pytest.mark.parametrize("what", ["file", "folder", "index"])
def test_links_are_not_followed(tmp_path: Path, what: str) -> None:
    snapshot = snapshot_of(tmp_path)
    link = {"file": next(snapshot.glob("*.safetensors")), "folder": snapshot, "index": snapshot / snapshots.INDEX}[what]
    link.rename(tmp_path / "elsewhere")
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"symbolic link|a link or a file, not a folder"):
        snapshots.load_snapshot(snapshot, as_engine(fresh(Cut(0, 1))), Communicator())
    assert snapshots.snapshots(snapshot.parent) == ([] if what == "folder" else [snapshot])


def test_a_folder_that_is_no_snapshot(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a complete snapshot"):
        snapshots.load_snapshot(tmp_path, as_engine(Cut(0, 1)), Communicator())


def test_a_snapshot_of_another_model_or_dtype(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path)
    with pytest.raises(UserError, match=r"of another model: .* is only in one of the two"):
        snapshots.load_snapshot(snapshot, Engine(tiny_model("opt"), Law("gaussian")), Communicator())
    with pytest.raises(UserError, match=r"is torch.float32 \(.*\) there, but torch.bfloat16"):
        snapshots.load_snapshot(snapshot, as_engine(Cut(0, 1, torch.bfloat16)), Communicator())


def test_exact_bits(tmp_path: Path) -> None:
    """Not a number and minus zero included."""
    engine = Cut(0, 1)
    name = next(iter(engine.local))
    bits: Tensor = engine.local[name].view(torch.int32)
    bits[:3] = torch.tensor([0x7FC00001, -0x80000000, 0x00000001])
    before = bits.clone()
    snapshot = snapshot_writer.save_snapshot(tmp_path, as_engine(engine), 1, Communicator())
    snapshots.load_snapshot(snapshot, as_engine(fresh(engine)), Communicator())
    assert torch.equal(bits, before)
