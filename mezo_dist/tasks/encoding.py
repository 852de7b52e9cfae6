"""Rows become samples, many at a time: their texts go through the tokenizer together.

To tokenise a text by itself takes several times as long as one among many, for transformers' Python code around each
call and because only many texts are shared out over the threads of a fast tokenizer. So what makes a sample of a row
runs as a coroutine, as forward passes do: where it needs tokens it waits, until all others wait, too, and then one call
tokenises what all of them ask for. The code of a kind of task knows nothing of that: it asks for tokens, and has them.
"""

from __future__ import annotations

import itertools
import logging
import reprlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, final

from greenlet import getcurrent, greenlet

from mezo_dist.errors import UserError
from mezo_dist.tasks.encoding_pool import num_processes, shared_out
from mezo_dist.tasks.fields import Row

log = logging.getLogger(__name__)
SILENT_S = 5.0
"""Encoding that takes longer than that says how far it is."""
AT_ONCE = 128
"""Rows whose texts are tokenised together, at most."""
MOST_CHARACTERS = 2_000_000
"""Characters in one call of the tokenizer, which takes a hundred times as many bytes of memory meanwhile."""

T = TypeVar("T")
B = TypeVar("B")
Texts = tuple[str, ...]
"""A text or a pair."""
Tokenise = Callable[[Sequence[Texts]], list[Any]]
"""What a tokenizer makes of each of several texts, or of several pairs; texts of a call are all of one sort."""


@dataclass(slots=True)
class _Question:
    """Texts that a row waits for."""

    tokenise: Tokenise
    texts: Sequence[Texts]

    def goes_with(self, other: _Question) -> bool:
        """One call can answer both."""
        return self.tokenise == other.tokenise and len(self.texts[0]) == len(other.texts[0])


class _Worker(greenlet):
    """Makes samples of one row after another."""

    has_asked = False
    """For tokens, since it began with its row."""


def ask(tokenise: Tokenise, texts: Sequence[Texts]) -> list[Any]:
    """``tokenise(texts)``, within `encode_rows` together with what other rows ask for.

    Args:
        tokenise: a method, whose result for a text does not depend on the others.
        texts: all of them single texts, or all of them pairs.
    """
    worker = getcurrent()
    if not isinstance(worker, _Worker) or worker.parent is None:
        return tokenise(texts)
    worker.has_asked = True
    answer: list[Any] = worker.parent.switch(_Question(tokenise, texts))
    return answer


def is_among_rows() -> bool:
    """A row of many is being encoded, whose questions are answered with those of others."""
    return isinstance(getcurrent(), _Worker)


@dataclass(frozen=True)
class _Block(Generic[B]):
    """What became of some rows."""

    rows: range
    content: B
    """What was made of their samples, up to the refusal."""
    num_samples: int
    refusal: UserError | None
    """Of the last row."""


@final
@dataclass(frozen=True, eq=False)
class EncodedRows(Generic[T]):
    """The samples of a split, which are made when they are asked for, in the order of its rows."""

    rows: Sequence[Row]
    split: str
    """Its name."""
    encode: Callable[[Row], Sequence[T]]
    """Makes the samples of a row."""
    finish: Callable[[int], None] = lambda _: None
    """Is told the number of samples at the end; may refuse it (UserError)."""

    def __iter__(self) -> Iterator[T]:
        """One by one. The log says how far it is.

        Raises:
            UserError: ``encode`` refuses a row; the message says which, the first if there are several.
        """
        for samples in self.blocks(list):
            yield from samples

    def blocks(self, make: Callable[[Sequence[T]], B]) -> Iterator[B]:
        """``make`` of the samples of a few rows at a time, called where these are encoded. Otherwise like `__iter__`.

        Args:
            make: what it returns can be pickled.
        """
        num_rows, num_samples, began_s = len(self.rows), 0, time.monotonic()
        said_s = began_s

        def encode_some(numbers: range) -> Iterator[_Block[B]]:
            return self._blocks(numbers, make)

        processes = num_processes(num_rows)
        some = encode_some(range(num_rows)) if processes == 1 else shared_out(num_rows, encode_some, processes)
        for block in some:
            yield block.content
            if block.refusal is not None:
                raise block.refusal
            num_samples += block.num_samples
            if time.monotonic() - said_s > SILENT_S:
                said_s = time.monotonic()
                log.info(_progress(self.split, block.rows.stop, num_rows, said_s - began_s))
        self.finish(num_samples)

    def _blocks(self, numbers: range, make: Callable[[Sequence[T]], B]) -> Iterator[_Block[B]]:
        """See `blocks`; of some rows, in this process."""
        results = _encoded(self.rows, numbers, self.split, self.encode)
        for start in range(numbers.start, numbers.stop, AT_ONCE):
            rows = range(start, min(start + AT_ONCE, numbers.stop))
            samples: list[T] = []
            refusal = None
            for result in itertools.islice(results, len(rows)):
                if isinstance(result, UserError):
                    refusal = result
                    break
                samples += result
            yield _Block(rows, make(samples), len(samples), refusal)
            if refusal is not None:
                return


def _progress(split: str, done: int, num_rows: int, seconds: float) -> str:
    """How far it is.

    Args:
        split: its name.
        done: rows that are encoded.
        num_rows: of the split.
        seconds: that it took so far.
    """
    rate = done / max(seconds, 1e-9)
    left = f", about {(num_rows - done) / rate:.0f} s to go" if done < num_rows else ""
    return f"encoding the {split} split: {done:,} of {num_rows:,} rows, {rate:,.0f} a second{left}"


def encode_rows(rows: Sequence[Row], split: str, encode: Callable[[Row], T]) -> EncodedRows[T]:
    """``encode`` of every row.

    Args:
        rows: of one split.
        split: its name.
        encode: makes a sample of a row; may refuse it (UserError).
    """
    return EncodedRows(rows, split, lambda row: (encode(row),))


def _encoded(rows: Sequence[Row], numbers: range, split: str, encode: Callable[[Row], T]) -> Iterator[T | UserError]:
    """``encode`` of some rows in their order, or why it refuses one.

    Args:
        rows: of the split.
        numbers: of the rows to encode.
        split: its name.
        encode: makes a sample of a row.
    """
    results: dict[int, T | UserError] = {}
    left = iter(numbers)

    def work() -> None:
        worker = getcurrent()
        assert isinstance(worker, _Worker)
        for number in left:
            worker.has_asked = False
            try:
                results[number] = encode(rows[number])
            except UserError as error:
                results[number] = UserError(f"{split} sample {number}, {reprlib.repr(dict(rows[number]))}: {error}")
            if len(results) >= AT_ONCE and not worker.has_asked and worker.parent is not None:
                worker.parent.switch(None)

    number = numbers.start
    for _ in _rounds([_Worker(work) for _ in range(min(AT_ONCE, len(numbers)))]):
        while number in results:
            yield results.pop(number)
            number += 1


def _rounds(workers: Sequence[_Worker]) -> Iterator[None]:
    """Run the workers to their end; comes back whenever a row may be done.

    A worker waits with a question, or has done as many rows without any as are done at once, and may go on.
    """
    ready: deque[tuple[_Worker, list[Any] | None]] = deque((worker, None) for worker in workers)
    waiting: list[tuple[_Worker, _Question]] = []
    while ready or waiting:
        if not ready:
            ready.extend(_answered(waiting))
        worker, answer = ready.popleft()
        worker.parent = getcurrent()  # whoever asks for the next sample
        question = worker.switch(*() if answer is None else (answer,))
        if isinstance(question, _Question):
            waiting.append((worker, question))
        elif not worker.dead:
            ready.append((worker, None))
            if waiting:  # maybe with an earlier row: else those without questions would run ahead of it to the last one
                ready.extendleft(reversed(_answered(waiting)))
        yield


def _answered(waiting: list[tuple[_Worker, _Question]]) -> list[tuple[_Worker, list[Any]]]:
    """Takes those off ``waiting`` whose questions go into one call with the first, and answers them."""
    first, room = waiting[0][1], MOST_CHARACTERS
    chosen: list[tuple[_Worker, _Question]] = []
    left: list[tuple[_Worker, _Question]] = []
    for worker, question in waiting:
        if room > 0 and question.goes_with(first):
            chosen.append((worker, question))
            room -= sum([len(text) for texts in question.texts for text in texts])
        else:
            left.append((worker, question))
    waiting[:] = left
    answers = iter(first.tokenise([texts for _, question in chosen for texts in question.texts]))
    return [(worker, [next(answers) for _ in question.texts]) for worker, question in chosen]
