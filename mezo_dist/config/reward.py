"""Settings of rewards: what judges the texts that a model writes (torch-free)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from mezo_dist.algorithms.ranges import check_ranges
from mezo_dist.config.kinds import Task
from mezo_dist.config.kinds.generation import GenerationTask
from mezo_dist.config.lines import check_lines

MAX_TIMEOUT_S = 86_400.0


@dataclass(frozen=True)
class RewardWeights:
    """Factors of the parts of a reward, which are added up."""

    function: float = 1.0
    """Of what ``reward.function`` gives."""
    command: float = 1.0
    """Of what ``reward.command`` answers."""
    http: float = 1.0
    """Of what ``reward.http`` answers."""
    metric: float = 0.0
    """Of the task's metric of the text (0 or 1 for an exact match)."""
    loss: float = 0.0
    """Of minus the loss of the reference, a mean over its tokens. It takes a forward pass more."""

    def __post_init__(self) -> None:
        names = ("function", "command", "http", "metric", "loss")
        check_ranges(self, "reward.weights.", **dict.fromkeys(names, (-1e6, 1e6)))


@dataclass(frozen=True)
class RewardConfig:
    """What judges a text, for ``train.objective: reward``. It need not be differentiable, nor fast. Several parts are
    added up, with the factors in ``weights``.

    Only rank 0 asks; all ranks get its numbers. A text that gets no number, because what judges it fails, hangs or
    dies, costs that sample of the step and a line in the log, not the run.
    """

    function: str | None = None
    """``path.py:name`` of a Python function (row, text) -> number. It runs in processes of its own, and is never run
    by anything but training with a config of yours. The path starts at the current folder."""
    command: tuple[str, ...] = ()
    """A program and its arguments. It gets one line of JSON for each text on its standard input, ``{"row": {...},
    "text": "..."}``, and answers each with a line that holds a number. It is started again if it dies."""
    http: str | None = None
    """An address that texts are posted to, as JSON of the same form; the answer is a number, or an object with a
    ``reward``."""
    http_token: str | None = None
    """Name of the environment variable that holds the token for ``Authorization: Bearer``; never the token itself."""
    http_proxy: bool = False
    """Ask through the proxy that the environment names (``http_proxy``, ``https_proxy``, ``no_proxy``). Otherwise the
    address is asked directly, whatever these say: a proxy sees rows, texts and, over ``http://``, the token."""
    retries: int = 2
    """Times that an address is asked again after no answer, or one of status 429 or 5xx."""
    timeout_s: float = 10.0
    """Seconds for one text. Then what judges it is ended (and started again for the next)."""
    workers: int = 1
    """Processes, or connections, that judge texts at the same time."""
    weights: RewardWeights = field(default_factory=RewardWeights)
    """Factors of the parts."""

    def __post_init__(self) -> None:
        check_lines(self, "reward.", "function", "http", "http_token")
        check_ranges(self, "reward.", retries=(0, 100), timeout_s=(1e-3, MAX_TIMEOUT_S), workers=(1, 256))
        if self.function is not None and not re.fullmatch(r".+\.py:[A-Za-z_]\w*", self.function):
            raise ValueError(f"reward.function: {self.function!r} is not of the form path.py:name")
        if self.http is not None:
            _check_address(self.http)
        if self.http_token is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.http_token):
            raise ValueError("reward.http_token: names an environment variable; it does not hold the token")
        if self.http is None and (self.http_proxy or self.http_token is not None):
            name = "http_proxy" if self.http_proxy else "http_token"
            raise ValueError(f"reward.{name}: is for an address (reward.http); leave it out")

    @property
    def sources(self) -> list[str]:
        """Names of the parts that count."""
        given = {"function": self.function, "command": self.command, "http": self.http, "metric": True, "loss": True}
        return [name for name, there in given.items() if there and getattr(self.weights, name)]


def _check_address(address: str) -> None:
    try:
        parts = urlsplit(address)
        port, host = parts.port, (parts.hostname or "").encode("idna")  # both raise ValueError for what is none
        sound = parts.scheme in ("http", "https") and host and port != 0 and re.fullmatch(r"[!-~]+", address)
    except ValueError:
        sound = None
    if not sound:
        raise ValueError(f"reward.http: {address[:200]!r} is not an http:// or https:// address")
    if parts.username is not None or parts.password is not None:
        raise ValueError("reward.http: holds a password; put it into an environment variable (reward.http_token)")


def check_reward(task: Task, objective: str, reward: RewardConfig) -> None:
    """Check what an objective needs of a task that writes texts.

    Args:
        task: the task.
        objective: ``train.objective``.
        reward: the section ``reward``.

    Raises:
        ValueError: something is missing, or does not go together; the message names it.
    """
    if objective != "reward":
        judges = [name for name in ("function", "command", "http") if getattr(reward, name)]
        if judges:
            raise ValueError(f"reward.{judges[0]}: counts only with train.objective: reward, not {objective}")
        if isinstance(task, GenerationTask) and objective == "loss" and not task.completion:
            raise ValueError("task.completion: missing; train.objective: loss needs texts to learn")
        if isinstance(task, GenerationTask) and task.metric == "reward":
            raise ValueError(f"task.metric: reward needs train.objective: reward, not {objective}")
        return
    if not isinstance(task, GenerationTask):
        raise ValueError(f"train.objective: reward judges texts, which task.kind: {task.kind} does not write")
    if not reward.sources:
        raise ValueError("train.objective: reward needs reward.function, reward.command, reward.http or a weight")
    if reward.weights.loss and not task.completion:
        raise ValueError("reward.weights.loss: needs task.completion, the text whose loss it is")
    if reward.weights.metric and (task.metric == "reward" or not task.metric_is_mean):
        raise ValueError(f"reward.weights.metric: needs a task.metric of single texts, not {task.metric}")
