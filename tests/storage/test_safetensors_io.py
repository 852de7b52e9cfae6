"""Our reading and writing of safetensors files agrees with the library's, at any slice, and refuses damaged files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mezo_dist.errors import UserError
from mezo_dist.storage import safetensors_io

TENSORS = {
    "matrix": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)),
    "half": torch.randn(9, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "mask": torch.tensor([True, False, True]),
}


def write(path: Path) -> str:
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()}
    return safetensors_io.write(path, layout, iter(TENSORS.values()), {"format": "pt"})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    write(path)
    return path


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    digest = write(path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest() == safetensors_io.sha256(path)
    read = safetensors.torch.load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    safetensors.torch.save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    entries = safetensors_io.read_header(tmp_path / "x.safetensors")
    assert entries.keys() == TENSORS.keys()
    for name, entry in entries.items():
        assert (entry.dtype, entry.shape) == (TENSORS[name].dtype, tuple(TENSORS[name].shape))
        out = torch.empty(entry.shape, dtype=entry.dtype)
        entry.read(out)
        assert torch.equal(out, TENSORS[name])


@settings(deadline=None)
@given(st.integers(0, 35), st.integers(0, 35), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 40))
def test_any_slice_in_any_dtype(path: Path, first: int, length: int, dtype: torch.dtype, chunk: int) -> None:
    entry = safetensors_io.read_header(path)["matrix"]
    out = torch.empty(length, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_io, "CHUNK_BYTES", chunk * 4)
        if first + length > 35:
            with pytest.raises(ValueError, match="of a tensor of 35"):
                entry.read(out, first)
        else:
            entry.read(out, first)
            assert torch.equal(out, TENSORS["matrix"].view(-1)[first : first + length].to(dtype))


def test_tensors_that_are_not_as_announced_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"instead of torch\.float32"):
        safetensors_io.write(tmp_path / "x", {"a": (torch.float32, [3])}, [torch.zeros(2)])


def header(**changes: object) -> bytes:
    item = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    text = json.dumps({"a": item}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (2**40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"nope",
        header(dtype="F5"),
        header(shape=[3]),
        header(shape=[-2]),
        header(data_offsets=[-8, 0]),
        header(data_offsets=[8, 16]),
        header(data_offsets=None),
    ],
)
def test_damaged_headers(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: not a safetensors file, or a damaged one"):
        safetensors_io.read_header(path)


def test_files_that_are_gone_or_shrink(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="cannot be read"):
        safetensors_io.read_header(path)
    path.write_bytes(header())
    entry = safetensors_io.read_header(path)["a"]
    path.write_bytes(header()[:-4])
    with pytest.raises(UserError, match="shorter than its header says"):
        entry.read(torch.empty(2))
