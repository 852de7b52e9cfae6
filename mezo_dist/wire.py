"""What crosses between ranks: one all-reduce of a small integer vector per round, and nothing else.

Losses travel as fixed-point 64-bit integers, so their sum is exact and does not depend on who added what first. Every
round also carries a fingerprint of what the rank believes it is evaluating; a rank that fell out of step is named
instead of corrupting the run.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from mezo_dist.errors import UserError

FRACTION_BITS = 32
ONE = 1 << FRACTION_BITS
MAX_SUM = 1 << 62
PAYLOAD_WORDS = 32
"""The first so many words of a round (256 bytes) travel alone, and a shorter round is padded to them: so ranks in
different rounds still meet and can be told, where collectives of different lengths would kill the processes."""


class OutOfStepError(RuntimeError):
    """Ranks disagree about the round they are in; going on would corrupt the weights."""


class LostRankError(UserError):
    """Another rank stopped, or did not answer in time. What is wrong is in that rank's own message."""


def to_fixed(losses: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 or fp64 losses [n] as int64 [n] multiples of 2**-32, and a bool [n] that is False where that failed.

    It fails where the loss is not finite or so large that it has diverged (2**30 or more); the value is 0 there.
    """
    wide = losses.detach().to("cpu", torch.float64)
    sound = torch.isfinite(wide) & (wide.abs() < 2.0**30)
    return torch.where(sound, wide * ONE, 0.0).round().to(torch.int64), sound


def mean(total: int, weight: int) -> float:
    """The mean loss from a fixed-point sum and a sum of weights: exact integers, one rounding."""
    return total / (weight * ONE)


def fingerprint(*what: Any) -> int:
    """A 62-bit hash of JSON-serialisable values."""
    text = json.dumps(what, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 2


@final
class Wire:
    """The processes of a run and the collectives between them. Use `connect` to make one.

    Attributes:
        rank, world_size: as the launcher gave them; 0 and 1 without a launcher.
        payload_bytes: bytes that this rank has put into collectives so far.
        rounds: number of `round` calls so far.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size
        self.payload_bytes = 0
        self.rounds = 0

    def round(self, values: Tensor, mark: int) -> Tensor:
        """Sum ``values`` (int64, any shape, the same on all ranks) over the ranks.

        One collective; two if there are more values than fit into `PAYLOAD_WORDS`.

        Args:
            values: exact contributions of this rank; the sum must fit into 62 bits.
            mark: `fingerprint` of the step, the variants and the batch.

        Raises:
            OutOfStepError: a rank came with another ``mark``; the message names it.
            LostRankError: a rank is gone. So do all other methods that talk.
        """
        words = torch.zeros(max(PAYLOAD_WORDS, values.numel() + 1), dtype=torch.int64)
        words[0] = mark // self.world_size  # the sum of equal marks stays below 2**62
        words[1 : values.numel() + 1] = values.reshape(-1)
        own = int(words[0])
        self._all_reduce(words[:PAYLOAD_WORDS])
        self.rounds += 1
        if int(words[0]) != own * self.world_size:
            self._name_outlier(own)
        if len(words) > PAYLOAD_WORDS:
            self._all_reduce(words[PAYLOAD_WORDS:])
        return words[1 : values.numel() + 1].view(values.shape)

    def agree(self, facts: Mapping[str, str]) -> None:
        """Check once, at the start, that all ranks run the same code, settings and data.

        Raises:
            UserError: a fact differs between ranks; the message names the fact and the ranks.
        """
        if self.world_size == 1:
            return
        marks = self._gather(torch.tensor([fingerprint(facts[name]) for name in sorted(facts)]))
        for column, name in enumerate(sorted(facts)):
            values = [int(row[column]) for row in marks]
            if len(set(values)) > 1:
                others = [rank for rank, value in enumerate(values) if value != values[0]]
                raise UserError(f"{name} of rank(s) {others} differs from rank 0's; all ranks must run the same")

    def broadcast_text(self, text: str) -> str:
        """Rank 0's ``text`` on every rank."""
        if self.world_size == 1:
            return text
        data = list(text.encode())
        size = torch.tensor([len(data)])
        with self._all_present():
            dist.broadcast(size, 0)
            payload = torch.tensor(data if self.rank == 0 else [0] * int(size), dtype=torch.uint8)
            dist.broadcast(payload, 0)
        self.payload_bytes += 8 + len(payload)
        return bytes(payload.tolist()).decode()

    def barrier(self) -> None:
        """Wait for all ranks. Raises OutOfStepError if one of them is not at a barrier."""
        self.round(torch.zeros(0, dtype=torch.int64), fingerprint("barrier"))

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _all_reduce(self, words: Tensor) -> None:
        if self.world_size > 1:
            with self._all_present():
                dist.all_reduce(words)
            self.payload_bytes += words.numel() * words.element_size()

    def _gather(self, words: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(words) for _ in range(self.world_size)]
        with self._all_present():
            dist.all_gather(gathered, words)
        self.payload_bytes += words.numel() * words.element_size()
        return gathered

    @contextlib.contextmanager
    def _all_present(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # how torch tells of a closed connection and of a time-out
            raise LostRankError(
                "another rank stopped, or did not answer within distributed.timeout_s (seen on rank "
                f"{self.rank}, round {self.rounds}); its own message says why"
            ) from error

    def _name_outlier(self, own: int) -> None:
        """All ranks see the wrong sum, so all come here: one more collective tells who it was."""
        marks = [int(row[0]) for row in self._gather(torch.tensor([own]))]
        common = max(marks, key=marks.count)  # rank 0's, if there is no majority
        wrong = [rank for rank, mark in enumerate(marks) if mark != common]
        raise OutOfStepError(
            f"rank(s) {wrong} evaluate another round than the other ranks (seen on rank {self.rank}, round "
            f"{self.rounds}): step, seeds or settings differ. Nothing was updated; restart the run."
        )


def connect(timeout_s: float, init_method: str | None = None) -> Wire:
    """Join the process group that the launcher describes in the environment (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    Without those variables, or with a world of one, no process group is made. Scalars always travel through gloo
    on the CPU; NCCL is set up beside it where there are GPUs, for the engines that gather weights.

    Args:
        timeout_s: seconds after which a collective gives up on a rank that does not answer.
        init_method: where ranks meet, if not at MASTER_ADDR:MASTER_PORT (``file:///...`` in tests).

    Raises:
        UserError: the environment describes a rank only in part, or the other ranks do not answer in time.
    """
    needed = ("RANK", "WORLD_SIZE") if init_method else ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ.get(name) for name in needed}
    if given["WORLD_SIZE"] in (None, "1") and given["RANK"] in (None, "0"):
        return Wire()
    missing = [name for name, value in given.items() if not value]
    if missing:
        raise UserError(f"environment: {', '.join(missing)} not set, but {_present(given)}; start ranks with torchrun")
    try:
        rank, world_size = int(given["RANK"] or 0), int(given["WORLD_SIZE"] or 1)
    except ValueError as error:
        raise UserError(f"environment: RANK and WORLD_SIZE must be numbers, but {_present(given)}") from error
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        dist.init_process_group(backend, init_method, rank=rank, world_size=world_size, timeout=timeout)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {rank} of {world_size} could not join the others ({_present(given)}) within "
            f"distributed.timeout_s = {timeout_s:g} s: {error}"
        ) from error
    return Wire(rank, world_size)


def _present(given: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name}={value}" for name, value in given.items() if value)
