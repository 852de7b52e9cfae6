"""What crosses between ranks: one all-reduce of a small integer vector per round.

Losses travel as fixed-point 64-bit integers, so their sum is exact and does not depend on who added what first. Every
round also carries a fingerprint of what the rank believes it is evaluating; a rank that fell out of step is named
instead of corrupting the run. Sharded layouts gather weights besides, through FSDP2 or DeepSpeed; they do so inside
`Communicator.guarded`, so that a lost rank is the same error wherever it is noticed.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mezo_dist.distributed.watchdog import Watchdog
from mezo_dist.errors import LostRankError, UserError
from mezo_dist.json_types import JsonObject

PAYLOAD_WORDS = 32
"""The first words of a round (256 bytes) travel in a collective of their own, and a shorter round is padded to as many.
Ranks that are in different rounds then still issue equal collectives, and the error can name them; collectives of
different lengths would kill the processes."""


ValueT = TypeVar("ValueT")


class OutOfStepError(RuntimeError):
    """Ranks disagree about the round they are in; going on would corrupt the weights."""


def fingerprint(*what: object) -> int:
    """A 62-bit hash of JSON-serialisable values."""
    text = json.dumps(what, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 2


@final
class Communicator:
    """The processes of a run and the collectives between them. Use `connect` to make one.

    Args:
        rank: number of this process.
        world_size: number of processes.
        watchdog: says which ranks keep the others waiting; None: nobody watches.
        ranks_here: ranks on this host; 0 if the launcher does not say.
        group: process group with a backend for tensors on the CPU; the default one if None.
        timeout_s: seconds after which a collective of some of the ranks (`group_of`) gives up; torch's own number if
            None. The group of all ranks has been given its own before.

    Attributes:
        rank, world_size: as the launcher gave them; 0 and 1 without a launcher.
        ranks_here: ranks on this host; all, if the launcher does not say.
        payload_bytes: bytes that this rank has put into collectives so far.
        rounds: number of `round` calls so far.
        place: where the run is ("step 17"), for messages; set it as the run goes on.
        wants_stop: set it (a signal handler may) to make all ranks stop.
        stopping: a rank wanted to stop in some round so far; all ranks see this in the same round.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        watchdog: Watchdog | None = None,
        ranks_here: int = 0,
        group: dist.ProcessGroup | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.ranks_here = ranks_here or world_size
        self.payload_bytes = 0
        self.rounds = 0
        self.place = "start"
        self.wants_stop = False
        self.stopping = False
        self._watchdog = watchdog or Watchdog.off()
        self._where: dict[str, Any] = {} if group is None else {"group": group}
        self._timeout = None if timeout_s is None else datetime.timedelta(seconds=timeout_s)

    def round(self, values: Tensor, mark: int) -> Tensor:
        """Sum ``values`` (int64, any shape, the same on all ranks) over the ranks.

        One collective; two if there are more values than fit into `PAYLOAD_WORDS`.

        Args:
            values: exact contributions of this rank; the sum must fit into 62 bits.
            mark: `fingerprint` of the step, the variants and the batch.

        Raises:
            OutOfStepError: a rank came with another ``mark``; the message names it.
            LostRankError: a rank is gone; all other collectives raise it, too.
        """
        words = torch.zeros(max(PAYLOAD_WORDS, values.numel() + 2), dtype=torch.int64)
        words[0] = mark // self.world_size  # the sum of equal marks stays below 2**62
        words[1] = self.wants_stop
        words[2 : values.numel() + 2] = values.reshape(-1)
        part = int(words[0])
        self._all_reduce(words[:PAYLOAD_WORDS])
        self.rounds += 1
        if int(words[0]) != part * self.world_size:
            self._name_outlier(part)
        if len(words) > PAYLOAD_WORDS:
            self._all_reduce(words[PAYLOAD_WORDS:])
        self.stopping = self.stopping or bool(words[1])
        return words[2 : values.numel() + 2].view(values.shape)

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

    def total(self, value: int) -> int:
        """Sum of ``value`` over all ranks, modulo 2**64."""
        words = torch.tensor([value % 2**64], dtype=torch.uint64).view(torch.int64)  # whose sums wrap
        self._all_reduce(words)
        return int(words) % 2**64

    def synchronize(self, what: str, group: dist.ProcessGroup | None = None) -> None:
        """Wait for ranks to come here for the same reason.

        Args:
            what: the reason.
            group: the ranks, with a backend for tensors on the CPU (see `group_of`); all if None. What is found among
                some of the ranks is not known to the others: nobody stops there (`wants_stop`).

        Raises:
            OutOfStepError: one of them has another reason.
            LostRankError: see `round`.
        """
        if group is None:
            self.round(torch.zeros(0, dtype=torch.int64), fingerprint(what))
            return
        words = torch.zeros(PAYLOAD_WORDS, dtype=torch.int64)
        words[0] = part = fingerprint(what) // group.size()
        self._all_reduce(words, {"group": group})
        self.rounds += 1
        if int(words[0]) != part * group.size():
            self._name_outlier(part, {"group": group}, dist.get_process_group_ranks(group))

    def group_of(self, parts: Sequence[Sequence[int]], backend: str | None = None) -> dist.ProcessGroup:
        """Make a process group of each part of the ranks. Collective.

        Args:
            parts: numbers of ranks; every rank is in one of them.
            backend: of the groups; that of the group of all if None.

        Returns:
            The group of the part that this rank is in.
        """
        mine: list[dist.ProcessGroup] = []
        with self.guarded("making process groups"):
            for part in parts:
                group = dist.new_group([*part], timeout=self._timeout, backend=backend)
                if self.rank in part:
                    mine.append(group)
        (group,) = mine
        return group

    def sum_floats(self, value: float, mark: int) -> float:
        """Sum of every rank's ``value``, added in the order of ranks: the same bits on all of them.

        Args:
            value: this rank's.
            mark: see `round`.
        """
        bits = torch.zeros(self.world_size, dtype=torch.int64)
        bits[self.rank] = torch.tensor(value, dtype=torch.float64).view(torch.int64)
        return sum(self.round(bits, mark).view(torch.float64).tolist())

    def sum_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over the ranks in place: the same bits on all of them, but not on another number of them."""
        if self.world_size == 1:
            return
        with self.guarded("sum of gradients"):
            for handle in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                handle.wait()
        self.payload_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def broadcast_text(self, text: str) -> str:
        """Rank 0's ``text`` on every rank."""
        return self.broadcast_bytes(text.encode()).decode()

    def broadcast_bytes(self, data: bytes) -> bytes:
        """Rank 0's ``data`` on every rank."""
        if self.world_size == 1:
            return data
        size = torch.tensor([len(data)])
        with self.guarded():
            dist.broadcast(size, 0, **self._where)
            payload = torch.empty(int(size), dtype=torch.uint8)
            if self.rank == 0:
                payload.numpy()[:] = np.frombuffer(data, dtype=np.uint8)
            dist.broadcast(payload, 0, **self._where)
        self.payload_bytes += 8 + len(payload)
        return payload.numpy().tobytes()

    def collect(self, work: Callable[[], ValueT]) -> list[ValueT]:
        """What ``work()`` returned on every rank (JSON types), by rank, on every rank. All ranks must call it.

        Raises:
            UserError: on all ranks alike, if ``work`` raised OSError or UserError on some: so nobody waits for them.
        """
        try:
            mine: JsonObject = {"value": work()}
        except (OSError, UserError) as error:
            mine = {"error": str(error)}
        answers = [json.loads(text) for text in self.gather_texts(json.dumps(mine))]
        if errors := [(rank, answer["error"]) for rank, answer in enumerate(answers) if "error" in answer]:
            at = f"rank(s) {[rank for rank, _ in errors]}: " if self.world_size > 1 else ""
            raise UserError(f"{at}{errors[0][1]}")
        return [answer["value"] for answer in answers]

    def gather_texts(self, text: str) -> list[str]:
        """Every rank's ``text``, by rank, on every rank."""
        if self.world_size == 1:
            return [text]
        data = text.encode()
        sizes = [int(size) for size in self._gather(torch.tensor([len(data)]))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        texts = self._gather(padded)
        return [bytes(words[:size].tolist()).decode() for words, size in zip(texts, sizes, strict=True)]

    def barrier(self) -> None:
        """Wait for all ranks. Raises OutOfStepError if one of them is not at a barrier."""
        self.synchronize("barrier")

    def ensure_group(self) -> None:
        """Make a process group even of one rank: sharded layouts cannot do without."""
        if self.world_size == 1 and not dist.is_initialized():
            dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1)

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextlib.contextmanager
    def guarded(self, what: str = "") -> Iterator[None]:
        """Around a collective, or around waiting for one: whoever issues it, a rank that is gone is named.

        A rank that waits in it for longer than ``distributed.patience_s`` says for whom. Nothing that takes long by
        itself belongs inside. In a world of one it does nothing.

        Args:
            what: the collective, for messages ("gather of model.layers.0"); empty for a round.

        Raises:
            LostRankError: the connection to a rank was closed, or it did not answer in time.
        """
        if self.world_size == 1:
            yield
            return
        with self.explained(what), self._watchdog.waiting(f"{self.place}, {what}" if what else self.place):
            yield

    @contextlib.contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Around work that issues collectives of its own (a backward pass): as `guarded`, but nobody is said to wait.

        Args:
            what: see `guarded`.

        Raises:
            LostRankError: see `guarded`.
        """
        place = f"{self.place}, {what}" if what else self.place
        try:
            yield
        except RuntimeError as error:
            if not _tells_of_a_lost_rank(error):
                raise
            late = self._watchdog.late() if "imed out" in str(error) else []
            raise LostRankError(
                f"{place}: {_in_words(late or self._watchdog.lost())} stopped, or did not answer within "
                f"distributed.timeout_s (seen on rank {self.rank}, round {self.rounds}); the message of that rank, if "
                "there is one, says why"
            ) from error

    def _all_reduce(self, words: Tensor, where: Mapping[str, Any] | None = None) -> None:
        if self.world_size > 1:
            with self.guarded():
                dist.all_reduce(words, **(self._where if where is None else where))
            self.payload_bytes += words.numel() * words.element_size()

    def _gather(
        self, words: Tensor, where: Mapping[str, Any] | None = None, num_ranks: int | None = None
    ) -> list[Tensor]:
        gathered = [torch.empty_like(words) for _ in range(num_ranks or self.world_size)]
        with self.guarded():
            dist.all_gather(gathered, words, **(self._where if where is None else where))
        self.payload_bytes += words.numel() * words.element_size()
        return gathered

    def _name_outlier(
        self, part: int, where: Mapping[str, Any] | None = None, ranks: Sequence[int] | None = None
    ) -> None:
        """All ranks see the wrong sum, so all come here: one more collective tells who it was.

        Args:
            part: what this rank put in.
            where: the group, as collectives want it; that of all ranks if None.
            ranks: those of the group, in its order.
        """
        ranks = range(self.world_size) if ranks is None else ranks
        marks = [int(row[0]) for row in self._gather(torch.tensor([part]), where, len(ranks))]
        common = max(marks, key=marks.count)  # the first rank's, if there is no majority
        wrong = [rank for rank, mark in zip(ranks, marks, strict=True) if mark != common]
        raise OutOfStepError(
            f"rank(s) {wrong} evaluate another round than the other ranks (seen on rank {self.rank}, round "
            f"{self.rounds}, {self.place}): step, seeds or settings differ. Nothing was updated; restart the run."
        )


def _tells_of_a_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because of another rank. gloo and NCCL, which have no class of errors of their own,
    name themselves in the text; what else can fail in a gather (memory, a fault of ours) does not."""
    return isinstance(error, dist.DistError) or any(name in str(error) for name in ("gloo", "Gloo", "NCCL"))


def _in_words(lost: list[int]) -> str:
    if not lost:
        return "another rank"
    return f"rank(s) {lost}" if len(lost) == 1 else f"one or more of rank(s) {lost}"


def backend() -> str:
    """Backends of process groups: gloo for scalars, and NCCL beside it for weights where there are GPUs."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
