"""safetensors files by the slice: read any range of a tensor, write tensors one at a time.

The safetensors library reads through a memory map, whose pages count as this process's until the file is closed, and
writes from a dict that holds every tensor. Neither is affordable here: what is read goes straight from the file into
the tensor that wants it, and what is written is asked for one tensor after another. Measured on a tensor of 256 MiB
read in 32 slices (two CPU cores): this module takes 11 MiB more memory and 0.03 s, ``safe_open`` 272 MiB and 0.07 s,
``safe_open(backend="pread")`` 274 MiB and 6.8 s. The files are the library's own format
(https://huggingface.co/docs/safetensors): 8 bytes with the length of a JSON header, the header, the data.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mezo_dist.errors import UserError
from mezo_dist.json_types import JsonObject
from mezo_dist.storage.files import open_in_place, open_regular

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
CHUNK_BYTES = 1 << 22
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Place of its first byte in the file."""
    in_place: bool = False
    """The file lies in a folder of ours, where links are not followed."""

    @property
    def num_elements(self) -> int:
        """Number of elements of the whole tensor."""
        return math.prod(self.shape)

    def read(self, out: Tensor, offset: int = 0) -> None:
        """Fill ``out`` (contiguous, of any dtype and device) from element ``offset`` of the flattened tensor on.

        Besides ``out`` itself this takes 4 MiB: nothing at all if it has the file's dtype and lies in host memory.

        Raises:
            UserError: the file is shorter than its header says, or cannot be read.
            ValueError: the range is not inside the tensor.
        """
        flat = out.detach().view(-1)
        if offset < 0 or offset + flat.numel() > self.num_elements:
            raise ValueError(f"elements {offset} .. {offset + flat.numel()} of a tensor of {self.num_elements}")
        in_place = flat.dtype == self.dtype and flat.device.type == "cpu"
        step = CHUNK_BYTES // self.dtype.itemsize
        try:
            with _open(self.path, in_place=self.in_place) as file:
                file.seek(self.start + offset * self.dtype.itemsize)
                for piece in flat.split(step) if flat.numel() else ():
                    target = piece if in_place else torch.empty(len(piece), dtype=self.dtype)
                    _read_exactly(file, _bytes(target))
                    if not in_place:
                        piece.copy_(target)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error


def _open(path: Path, *, in_place: bool) -> io.FileIO:
    return io.FileIO(open_in_place(path)) if in_place else open_regular(path)


def read_header(path: Path, *, in_place: bool = False) -> dict[str, Entry]:
    """What tensors a safetensors file holds, in the order of their data. Reads the header alone.

    Args:
        path: of the file.
        in_place: a link is not followed, here and when tensors are read.

    Raises:
        UserError: it is missing, no safetensors file, or has a dtype that is not known here.
    """
    try:
        with _open(path, in_place=in_place) as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
                raise ValueError("no header of that length")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {name: _entry(path, item, 8 + length, size, in_place) for name, item in header.items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a safetensors file, or a damaged one ({error})") from error
    return dict(sorted(entries.items(), key=lambda pair: pair[1].start))


def equal(one: Entry, other: Entry) -> bool:
    """Whether two tensors have the same dtype, shape and bits, compared piece by piece."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    step = CHUNK_BYTES // one.dtype.itemsize
    for first in range(0, one.num_elements, step):
        pieces = [torch.empty(min(step, one.num_elements - first), dtype=one.dtype) for _ in range(2)]
        one.read(pieces[0], first)
        other.read(pieces[1], first)
        if _bytes(pieces[0]) != _bytes(pieces[1]):
            return False
    return True


def write(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write a safetensors file and wait until it is on disk; returns its SHA-256.

    Args:
        path: is overwritten.
        layout: dtype and shape of every tensor, by name, in the order of ``tensors``.
        tensors: may be made one after another; none is kept.
        metadata: texts for the header.

    Raises:
        OSError: the disk is full, or the like.
        ValueError: a tensor is not what ``layout`` says.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    stop = 0
    for name, (dtype, shape) in layout.items():
        start, stop = stop, stop + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            while len(data):  # a raw write may take only a part
                data = data[file.write(data) :]

        put(len(text).to_bytes(8, "little") + text)
        for (name, (dtype, shape)), tensor in zip(layout.items(), tensors, strict=True):
            if tensor.dtype != dtype or tensor.numel() != math.prod(shape):
                raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} instead of {dtype} {tuple(shape)}")
            flat = tensor.detach().reshape(-1)
            for first in range(0, flat.numel(), CHUNK_BYTES):
                put(_bytes(flat[first : first + CHUNK_BYTES].cpu().contiguous()))
        os.fsync(file.fileno())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file in a folder of ours, where links are not followed. Raises UserError if it cannot be read."""
    try:
        with _open(path, in_place=True) as file:
            digest, chunk = hashlib.sha256(), bytearray(CHUNK_BYTES)
            while count := file.readinto(chunk):
                digest.update(memoryview(chunk)[:count])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _entry(path: Path, item: JsonObject, data_start: int, file_size: int, in_place: bool) -> Entry:
    """An entry of the header, checked.

    Args:
        path: of the file.
        item: what the header says of the tensor.
        data_start: place of the first byte after the header.
        file_size: bytes of the file.
        in_place: see `Entry.in_place`.
    """
    if item["dtype"] not in DTYPES:
        raise ValueError(f"dtype {item['dtype']} is not supported")
    start, stop = (data_start + int(offset) for offset in item["data_offsets"])
    entry = Entry(path, DTYPES[item["dtype"]], tuple(map(int, item["shape"])), start, in_place)
    num_bytes = entry.num_elements * entry.dtype.itemsize
    if min((start - data_start, *entry.shape), default=0) < 0 or stop - start != num_bytes or stop > file_size:
        raise ValueError(f"data at {item['data_offsets']} do not fit the file or the shape {item['shape']}")
    return entry


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous 1-D tensor on the CPU."""
    return memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's hints do not say so


def _read_exactly(file: io.FileIO, target: memoryview) -> None:
    while len(target):
        count = file.readinto(target)
        if not count:
            raise UserError(f"{file.name}: shorter than its header says; the file is damaged")
        target = target[count:]
