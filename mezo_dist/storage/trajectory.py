"""The trajectory: an append-only log from which a run can be rebuilt, one JSON line per step.

    {"format":"mezo_dist/trajectory/3","seed":0, ... ,"check":"9b1f0c3e"}             the header
    {"step":0,"loss":[{"mean":[0.69315,0.69402]}],"add":"1c90a2f4","check":"..."}       a step
    {"step":1,"loss":[{"each":["f:AACAPw...","f:..."]}],"add":"...","check":"..."}      a direction per sample
    {"step":1,"loss":[{"mean":[0.69],"norm":1.25}],...}                                 a first-order step
    {"step":2,"skipped":"a loss is not finite","check":"..."}
    {"step":3,"lr":[1e-06],"loss":[{"mean":[0.7,0.6]}],"add":"...","check":"..."}       a rate from a torch scheduler
    {"done":3,"weights":"0123456789abcdef","check":"..."}       fingerprint of the weights after three steps

The lines hold what was measured: the losses (and the norms of gradients, for first-order baselines, whose weights come
from snapshots alone: the header's ``weights`` says so). Everything else follows from them and can be computed again:
the directions from (run seed, step, index), and what was added to the weights from the losses, by the algorithm's
planner.
``add`` is a digest of what was added, so that an algorithm that computes anything else is noticed. (A log of seeds and
coefficients would take 45 bytes a term, and would repeat an anchor's terms in every step that builds on it.)

Values are exact: decimals keep every bit, and lists of more than `PLAIN` numbers are base64 of little-endian fp32
where that loses nothing (``f:``), else of fp64 (``d:``). ``check`` covers its line and the check of the step before,
so a step that was changed, lost, moved or taken from another run is noticed where it stands. (The first step follows
on the header's `Header.identity`, not on its text: so runs that differ in their folder alone have the same lines.)
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NoReturn

import numpy as np

from mezo_dist.algorithms.base import Losses
from mezo_dist.algorithms.operations import Operation, encode
from mezo_dist.config.schema import digest_of
from mezo_dist.errors import UserError
from mezo_dist.json_types import JsonObject
from mezo_dist.storage.files import open_in_place

FORMAT = "mezo_dist/trajectory/3"
FILE = "trajectory.jsonl"
PLAIN = 8
ONE = 1 << 32
"""Losses are sums of multiples of 1 / ONE (see `mezo_dist.distributed.communicator`)."""
_TAIL = re.compile(rb',"check":"([0-9a-f]{8})"}\n')
_TAIL_BYTES = len(',"check":"01234567"}\n')


@dataclass(frozen=True)
class Header:
    """What makes the steps reproducible."""

    config: JsonObject
    """The resolved config."""
    config_digest: str
    """SHA-256 of the part of it that changes results."""
    base_model: str
    """Name and revision of the model before step 0."""
    base_fingerprint: str
    """Fingerprint of its weights."""
    model_config: str
    """Digest of its config, of the buffers that it saves, and of code that came with it."""
    tokenizer: str
    """Digest of its tokenizer."""
    data: dict[str, str]
    """Split -> digest of its encoded samples."""
    law_version: str
    """Version of generator and law."""
    weights: str
    """dtype of the weights, and how updates are rounded to it."""
    seed: int
    """Run seed; the seed of stochastic rounding at a step is derived from it."""
    full_size: int
    """Samples of a full batch."""
    version: str
    """Version of mezo_dist that began the run."""
    num_train: int | None = None
    """Training samples; null if they are not known."""
    eps: float | None = None
    """For ``algorithm.eps: auto``, what was chosen when the run began; otherwise null."""

    @property
    def identity(self) -> str:
        """What all its lines are chained to: equal for runs that must have the same lines."""
        model = (self.base_fingerprint, self.model_config, self.tokenizer)
        facts = (self.config_digest, *model, self.law_version, self.data, *([self.eps] if self.eps else []))
        return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=4).hexdigest()


@dataclass(frozen=True)
class Step:
    """One step: its losses, enough to run the planner again."""

    step: int
    rounds: tuple[Losses, ...]
    update: str = ""
    """`digest` of what was done to the weights; empty if the step was skipped."""
    skipped: str = ""
    """Why the step was skipped; empty if it was not."""
    lr: tuple[float, ...] = ()
    """Learning rate of each group of weights, where a scheduler of another framework sets them; else empty, and they
    follow from the settings."""

    def to_json(self) -> JsonObject:
        """The line without its check."""
        if self.skipped:
            return {"step": self.step, "skipped": self.skipped}
        rates = {"lr": list(self.lr)} if self.lr else {}
        return {"step": self.step, **rates, "loss": [_losses_to_json(r) for r in self.rounds], "add": self.update}

    @staticmethod
    def from_json(line: JsonObject) -> Step:
        """Read `to_json` back. Raises KeyError, TypeError or ValueError on anything else."""
        number = line.pop("step")
        if type(number) is not int:
            raise ValueError(f"step {number!r} is no number")
        if "skipped" in line:
            return Step(number, (), skipped=str(line["skipped"]))
        rounds = tuple(_losses_from_json(item) for item in line["loss"])
        return Step(number, rounds, str(line["add"]), lr=_unpack(line.get("lr", [])))


@dataclass(frozen=True)
class Mark:
    """What the weights were after ``done`` steps."""

    done: int
    weights: str
    """Fingerprint of all weights, which does not depend on their layout."""
    anchor: str = ""
    """Fingerprint of the copy that the run keeps of them (`Engine.copy_anchor`); empty if it keeps none."""

    def to_json(self) -> JsonObject:
        """The line without its check."""
        return {name: value for name, value in vars(self).items() if value != ""}


@dataclass(frozen=True)
class Log:
    """A trajectory that was read."""

    header: Header
    check: str
    """What the next line is chained to."""
    size: int
    """Bytes up to the end of the last whole line."""
    torn: int
    """Bytes after it: of a line whose writing was interrupted."""
    steps: list[Step] = field(default_factory=list)
    marks: dict[int, Mark] = field(default_factory=dict)
    """Steps done -> what the weights were."""


def digest(operations: Sequence[Operation]) -> str:
    """8 hexadecimal digits over all that an update does to the weights."""
    return hashlib.blake2b(encode(operations), digest_size=4).hexdigest()


def to_line(content: JsonObject, previous: str) -> tuple[bytes, str]:
    """A line with its end, and its check. ``previous`` is the check of the step before, ``""`` for the header.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)[:-1].encode()
    check = _check(text, previous)
    return text + f',"check":"{check}"}}\n'.encode(), check


def read(path: Path) -> Log:
    """Read a trajectory file. A last line without its end (a crash while writing) is left out.

    Raises:
        UserError: the file is missing, is no trajectory, or is damaged; the message names line and offset.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: not a run folder, or a run that did not get to its first step")
    log = parse(read_bytes(path), path)
    if log is None:
        raise UserError(f"{path} is empty: the run did not get to its first step")
    return log


def read_bytes(path: Path) -> bytes:
    """What is in the file; its start is looked at before the rest is taken into memory. Raises as `read` does.

    A link is not followed. A hole in a sparse file, which may be larger than any memory, is not read.
    """
    try:
        with os.fdopen(open_in_place(path), "rb", buffering=0) as file:
            start = file.read(len(_START))
            _check_start(start, path)
            content = bytearray(start)
            while block := file.read(_BLOCK):
                if len(block) == _BLOCK and not block.strip(b"\0"):
                    raise UserError(
                        f"{path}: damaged: at byte {len(content)} a megabyte of zeros begins; cut the file there "
                        f"(truncate --size={len(content)}), if what stands before it is to be used"
                    )
                content += block
            return bytes(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def parse(data: bytes, path: Path, num_steps: int | None = None) -> Log | None:
    """The same from memory. None if not even the header is whole.

    Args:
        data: contents of the file.
        path: of the file, for messages.
        num_steps: read so many steps at most, as if the file ended with them (and what is known of the weights then).
    """
    _check_start(data[: len(_START)], path)
    header: Header | None = None
    steps: list[Step] = []
    marks: dict[int, Mark] = {}
    check, offset = "", 0
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            content, line_check = _content(line + b"\n", check)
            if "step" in content and len(steps) == num_steps:
                break
            if header is None:
                header = _header(content)
                check = header.identity
            elif "done" in content:  # no link of the chain: runs that save more often have the same steps
                marks[len(steps)] = _mark(content, len(steps))
            else:
                steps.append(_step(content, len(steps)))
                check = line_check
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise UserError(f"{path}, line {number} (offset {offset}): {_reason(error)}") from error
        offset += len(line) + 1
    return None if header is None else Log(header, check, offset, len(data) - offset, steps, marks)


_BLOCK = 1 << 20
_START = b'{"format":"mezo_dist/trajectory/'


def _check_start(start: bytes, path: Path) -> None:
    if not _START.startswith(start):
        raise UserError(f"{path}, line 1 (offset 0): not a trajectory")


def _reason(error: Exception) -> str:
    return f"damaged: {error} is missing" if isinstance(error, KeyError) else str(error)


def _check(text: bytes, previous: str) -> str:
    return hashlib.blake2b(text + previous.encode(), digest_size=4).hexdigest()


def _content(line: bytes, previous: str) -> tuple[JsonObject, str]:
    tail = _TAIL.fullmatch(line[-_TAIL_BYTES:])
    text = line[:-_TAIL_BYTES]
    if tail is None or _check(text, previous) != tail[1].decode():
        raise ValueError("damaged: the line does not fit its checksum, or does not follow the step before")
    content = json.loads(text + b"}", parse_constant=_refuse)
    if not isinstance(content, dict):
        raise ValueError("damaged: not a JSON object")
    return content, tail[1].decode()


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"damaged: {constant} is no JSON")


def _header(content: JsonObject) -> Header:
    version = content.pop("format")
    if version != FORMAT:
        raise ValueError(f"a trajectory of format {version!r}; this version of mezo_dist reads {FORMAT!r}")
    names = {item.name for item in fields(Header)}
    if content.keys() != names:
        raise ValueError(f"damaged header: {sorted(content.keys() ^ names)} are missing, or unknown")
    header = Header(**content)
    kinds = {"config": dict, "data": dict, "seed": int, "full_size": int, "num_train": int, "eps": float}
    for name, value in vars(header).items():
        if value is None and name in ("num_train", "eps"):
            continue
        if type(value) is not kinds.get(name, str):
            raise ValueError(f"damaged header: {name} is {value!r}")
    if digest_of(header.config) != header.config_digest:
        raise ValueError("the header's settings do not fit their digest (config_digest): they were edited")
    if not all(type(value) is str for value in header.data.values()):
        raise ValueError(f"damaged header: data is {header.data!r}")
    if (header.num_train or 1) < 1 or not 0 < (1.0 if header.eps is None else header.eps) < math.inf:
        raise ValueError(f"damaged header: num_train is {header.num_train}, eps {header.eps}")
    return header


def _step(content: JsonObject, expected: int) -> Step:
    step = Step.from_json(content)
    if step.step != expected:
        raise ValueError(f"step {step.step} where step {expected} was expected")
    return step


def _mark(content: JsonObject, done: int) -> Mark:
    if content["done"] != done:
        raise ValueError(f"a fingerprint after {content['done']!r} steps where there are {done}")
    return Mark(done, str(content["weights"]), str(content.get("anchor", "")))


def _losses_to_json(losses: Losses) -> JsonObject:
    """The means are left out where they follow from the losses of the samples (all of the same weight)."""
    each: JsonObject = {"each": [_pack(row) for row in losses.each]} if losses.each else {}
    mean: JsonObject = {} if _bits(_means(losses.each)) == _bits(losses.mean) else {"mean": _pack(losses.mean)}
    curvature = {} if losses.curvature is None else {"curvature": losses.curvature}
    norm = {} if losses.gradient_norm is None else {"norm": losses.gradient_norm}
    return mean | each | curvature | norm


def _losses_from_json(data: object) -> Losses:
    if not isinstance(data, dict):
        raise ValueError(f"damaged: a round must be an object, not {data!r}")
    each = tuple(_unpack(row) for row in data.get("each", ()))
    curvature = _unpack([data["curvature"]])[0] if "curvature" in data else None
    norm = _unpack([data["norm"]])[0] if "norm" in data else None
    return Losses(_unpack(data["mean"]) if "mean" in data else _means(each), each, curvature, norm)


def _means(each: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """As the communicator computes them: exact integers, one rounding. Empty where losses are too large for it."""
    if any(abs(loss) >= ONE for row in each for loss in row):
        return ()
    return tuple(sum(int(loss * ONE) for loss in row) / (len(row) * ONE) for row in each)


def _bits(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}d", *values)  # 0.0 == -0.0


def _pack(values: Sequence[float]) -> list[float] | str:
    wide = np.array(values, dtype="<f8")
    if not np.isfinite(wide).all():
        raise ValueError("a loss is not finite")
    if len(values) <= PLAIN:
        return list(values)
    with np.errstate(over="ignore"):
        narrow = wide.astype("<f4")
    code, data = ("f", narrow) if np.array_equal(narrow.astype("<f8"), wide) else ("d", wide)
    return f"{code}:{base64.b64encode(data.tobytes()).decode().rstrip('=')}"


def _unpack(packed: object) -> tuple[float, ...]:
    if isinstance(packed, list):
        values = [float(value) for value in packed if type(value) in (int, float)]
        if len(values) != len(packed):
            raise ValueError("damaged: losses that are no numbers")
        return tuple(values)
    code, _, text = str(packed).partition(":")
    data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    numbers = np.frombuffer(data, dtype={"f": "<f4", "d": "<f8"}[code]).astype(float)
    if not np.isfinite(numbers).all():
        raise ValueError("damaged: losses that are not finite")
    return tuple(numbers.tolist())
