"""Judging the texts of a batch: by all parts of a reward, several texts at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, final

from mezo_dist.config.reward import RewardConfig
from mezo_dist.config.schema import RunConfig
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import UserError
from mezo_dist.objectives.rewards.http import Service
from mezo_dist.objectives.rewards.process import Program
from mezo_dist.objectives.rewards.refused import NoReward, TooSlow

log = logging.getLogger(__name__)
Row = Mapping[str, Any]
Ask = Callable[[Row, str], float]
"""Raises NoReward if there is no number for this text."""
MOST_SLOW = 3
"""Texts of a batch without an answer in time, after which the rest of the batch is not asked for: the other ranks
wait."""
MOST_MESSAGES = 5
"""Reasons for missing rewards that one batch brings into the log."""


@final
class Judge:
    """The function, program and service of a reward, as far as they are set; a context manager that ends them.

    Args:
        config: the settings.

    Raises:
        UserError: the function or the program does not exist, or cannot be loaded.

    Attributes:
        programs: the processes that were started.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._weights, self._slow = config.weights, 0
        self.programs: list[Program] = []
        self._pool = ThreadPoolExecutor(config.workers, thread_name_prefix="mezo_dist-reward")
        try:
            self._idle: list[dict[str, Ask]] = [self._asks(config) for _ in range(config.workers)]
        except UserError:
            self._end()
            raise

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for program in self.programs:
            program.end()

    def rewards(self, rows: Sequence[Row], texts: Sequence[str]) -> list[float | None]:
        """The weighted sum of the parts for each text; None where a part had no number.

        Args:
            rows: what each text is about.
            texts: what the model wrote.
        """
        self._slow = 0
        outcomes = list(self._pool.map(self._one, rows, texts))
        reasons = [outcome for outcome in outcomes if isinstance(outcome, NoReward)]
        for reason in reasons[:MOST_MESSAGES]:
            log.warning("%s", reason)
        if reasons:
            log.warning(
                "%d of %d texts have no reward: these samples do not count in this step", len(reasons), len(texts)
            )
        return [None if isinstance(outcome, NoReward) else outcome for outcome in outcomes]

    def _one(self, row: Row, text: str) -> float | NoReward:
        if self._slow >= MOST_SLOW:
            return NoReward(f"{self._slow} texts of this batch had no answer in time: the rest was not asked for")
        asks = self._idle.pop()  # as many as there are threads
        try:
            return sum(getattr(self._weights, name) * ask(row, text) for name, ask in asks.items())
        except NoReward as reason:
            self._slow += isinstance(reason, TooSlow)
            return reason
        finally:
            self._idle.append(asks)

    def _asks(self, config: RewardConfig) -> dict[str, Ask]:
        """One of everything that is set."""
        asks: dict[str, Ask] = {}
        if "function" in config.sources:
            assert config.function is not None
            path, _, name = config.function.rpartition(":")
            if not Path(path).is_file():
                raise UserError(f"reward.function: there is no file {path} (relative paths start at {Path.cwd()})")
            self.programs.append(Program("reward.function", (path, name), config.timeout_s, says_ready=True))
            asks["function"] = self.programs[-1].ask
        if "command" in config.sources:
            self.programs.append(Program("reward.command", config.command, config.timeout_s))
            asks["command"] = self.programs[-1].ask
        if "http" in config.sources:
            asks["http"] = Service(config).ask
        return asks


@contextmanager
def judging(config: RunConfig, comm: Communicator) -> Iterator[Judge | None]:
    """The judge of a run that trains on rewards, while it runs; None of another. Rank 0's alone is asked.

    Args:
        config: the run's.
        comm: the ranks.

    Raises:
        UserError: on all ranks: what is to judge texts cannot be started.
    """
    if config.train.objective != "reward":
        yield None
        return
    nobody = replace(config.reward, function=None, command=(), http=None, http_token=None, http_proxy=False)
    settings = config.reward if comm.rank == 0 else nobody
    with ExitStack() as stack:
        judges: list[Judge] = []
        comm.collect(lambda: judges.append(stack.enter_context(Judge(settings))))
        yield judges[0]
