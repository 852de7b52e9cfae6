"""Plans of all ways to run a model on some machines, the one to recommend, and the largest thing that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mezo_dist.errors import UserError
from mezo_dist.planning.duration import Duration, duration_of
from mezo_dist.planning.families import shape_of_config
from mezo_dist.planning.machine import GIB, Machine
from mezo_dist.planning.memory import Memory, memory_of, width_of
from mezo_dist.planning.named import NAMED
from mezo_dist.planning.rounds import Round, rounds_of
from mezo_dist.planning.setting import LayoutName, Setting
from mezo_dist.planning.shapes import ModelShape
from mezo_dist.planning.traffic import Traffic, traffic_of
from mezo_dist.planning.weights import resident_weights
from mezo_dist.planning.work import Work, work_of
from mezo_dist.planning.writing import writing_way

CLOSE = 1.02
"""Ratio of times that are taken to be equal: then the simpler layout is recommended."""
SIMPLEST: tuple[LayoutName, ...] = ("replicated", "fsdp", "zero")
MOST_SAMPLES = 2**16


@dataclass(frozen=True)
class StepPlan:
    """What one kind of step costs."""

    round: Round
    width: int
    traffic: Traffic
    work: Work
    duration: Duration


@dataclass(frozen=True)
class Plan:
    """One way to run."""

    setting: Setting
    machine: Machine
    memory: Memory
    steps: tuple[StepPlan, ...]
    """Of one cycle of the algorithm."""

    @property
    def fits(self) -> bool:
        """The memory of a rank is enough."""
        return self.memory.total <= self.machine.memory

    @property
    def seconds(self) -> float:
        """Of a step, over a cycle."""
        return self.mean(lambda step: step.duration.total)

    def mean(self, figure: Callable[[StepPlan], float]) -> float:
        """A figure of a step, over a cycle."""
        count = sum(step.round.steps for step in self.steps)
        return sum(figure(step) * step.round.steps for step in self.steps) / count

    @property
    def name(self) -> str:
        """Layout and algorithm, for people."""
        return f"{layout_name(self.setting, self.machine.ranks)}, {self.algorithm}"

    @property
    def algorithm(self) -> str:
        """The algorithm, and where its anchor comes from."""
        setting, anchor = self.setting, ""
        if setting.algorithm.name == "mezo-svrg":
            anchor = ", anchor stored" if any(step.round.copies_anchor for step in self.steps) else ", anchor replayed"
        return setting.algorithm.name + anchor


def layout_name(setting: Setting, ranks: int) -> str:
    """``fsdp 2 x 8``: two copies, each cut over eight ranks."""
    if setting.layout == "fsdp":
        return f"fsdp {setting.replicate} x {setting.shard_ranks(ranks)}"
    return setting.layout


def plan(shape: ModelShape, setting: Setting, machine: Machine) -> Plan:
    """What a run costs.

    Args:
        shape: the model.
        setting: how it runs.
        machine: what it runs on.
    """
    memory = memory_of(shape, setting, machine)
    free = machine.memory - machine.runtime - resident_weights(shape, setting, machine.ranks)
    free -= memory.parts["anchor"] + memory.parts["frozen cache"]
    steps = []
    for step in rounds_of(setting, machine.ranks):
        width = width_of(shape, setting, step, free)
        traffic = traffic_of(shape, setting, machine, step, width)
        in_lock_step = writing_way(shape, setting, machine.ranks, free) == "lock step"
        work = work_of(shape, setting, machine.ranks, step, width, in_lock_step=in_lock_step)
        steps.append(StepPlan(step, width, traffic, work, duration_of(shape, setting, machine, step, work, traffic)))
    return Plan(setting, machine, memory, tuple(steps))


def layouts(setting: Setting, ranks: int, names: Sequence[LayoutName] = SIMPLEST) -> list[Setting]:
    """``setting`` on every layout: whole, FSDP2 with any number of copies, ZeRO-3.

    Args:
        setting: how the run goes.
        ranks: all ranks; with one, nothing can be cut.
        names: of the layouts to consider.
    """
    plain = replace(setting, layout="replicated", replicate=1, gather=None, prefetch=False, offload=False)
    options = [plain] if "replicated" in names else []
    if ranks > 1 and "fsdp" in names:
        copies = [n for n in range(1, ranks) if ranks % n == 0]
        options += [replace(setting, layout="fsdp", replicate=n) for n in copies]
    if ranks > 1 and "zero" in names:
        options.append(replace(setting, layout="zero", replicate=1, gather=None, offload=False))
    if not options:
        raise UserError(
            "--layout: with one rank there is nothing to cut the weights over; give more ranks or replicated"
        )
    return options


def by_algorithm(plans: Sequence[Plan]) -> list[list[Plan]]:
    """The plans of each algorithm: their steps do different things, so that only layouts compete."""
    kinds: list[list[Plan]] = []
    for one in plans:
        same = next((some for some in kinds if some[0].setting.algorithm == one.setting.algorithm), None)
        if same is None:
            kinds.append([one])
        else:
            same.append(one)
    return kinds


def recommended(plans: Sequence[Plan]) -> Plan | None:
    """The fastest plan that fits; of those that are as fast, the simplest layout, and of these the one with the least
    memory. None if none fits. ``plans`` are those of one algorithm."""
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return None
    fastest = min(plan.seconds for plan in fitting)
    close = [plan for plan in fitting if plan.seconds <= CLOSE * fastest]
    return min(close, key=lambda plan: (SIMPLEST.index(plan.setting.layout), plan.memory.total))


def reason(plans: Sequence[Plan]) -> str:
    """Why `recommended` recommends what it does, or what would help if nothing fits."""
    best = recommended(plans)
    if best is None:
        least = min(plans, key=lambda plan: plan.memory.total)
        part, size = max(least.memory.parts.items(), key=lambda item: item[1])
        return (
            f"nothing fits: the least is {least.memory.total / GIB:.1f} GiB per rank ({least.name}), of which "
            f"{size / GIB:.1f} are {part}, and a rank has {least.machine.memory / GIB:.1f}. {_HELP[part]}"
        )
    others = [other for other in plans if other.setting.layout == "replicated"]
    spare = (best.machine.memory - best.memory.total) / GIB
    if best.setting.layout == "replicated":
        return f"whole weights fit, with {spare:.1f} GiB to spare, and then nothing is gathered"
    gathers = best.mean(lambda step: step.duration.parts["gathers"]) / best.seconds
    whole = min((p.memory.total for p in others), default=0) / GIB
    why = f"whole weights need {whole:.1f} GiB per rank; " if whole else ""
    return (
        f"{why}of what fits this is the fastest: {gathers:.0%} of a step are gathers, and {spare:.1f} GiB are to spare"
    )


_HELP = {
    "weights": "More ranks to cut them over make it less; so does --dtype bfloat16, if it is not set yet.",
    "anchor": "--anchor replay keeps no copy; more ranks make it less.",
    "frozen cache": "train.frozen_cache_gib limits it.",
    "scratch": "Fewer directions, or law lowrank with per-sample directions, make it less.",
    "gathered": "It does not shrink with more ranks: a unit must be whole.",
    "passes": "A smaller --micro-batch, shorter --tokens, or --width 1 make it less.",
    "logits": "A smaller --micro-batch makes it less.",
    "inputs": "A smaller --micro-batch makes it less.",
    "runtime": "A rank needs more memory than that.",
    "copy": "law lowrank writes texts without a copy of the weights.",
    "kv cache": "A smaller --micro-batch, or fewer --new-tokens, make it less.",
    "factors": "Smaller batches make it less.",
}


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to ``limit`` that fits, if all smaller ones do; 0 if 1 does not."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def find(what: str, shape: ModelShape | None, settings: Sequence[Setting], machine: Machine) -> tuple[str, Plan | None]:
    """The largest model (of `NAMED`), micro-batch or context that fits on some layout, and its plan.

    Args:
        what: ``model``, ``micro-batch`` or ``context``.
        shape: the model; None to find one.
        settings: ways to run it.
        machine: what it runs on.
    """
    if what == "model":
        shapes = [s for name, config in NAMED.items() if (s := shape_of_config(config, name))]
        for candidate in sorted(shapes, key=lambda s: -s.size):
            best = recommended([plan(candidate, setting, machine) for setting in settings])
            if best is not None:
                return candidate.name, best
        return "", None
    assert shape is not None
    limit = MOST_SAMPLES if what == "micro-batch" else shape.window

    def changed(setting: Setting, n: int) -> Setting:
        if what == "context":
            return replace(setting, tokens=n, targets=min(setting.targets, n), width=1)
        size = max(setting.batch_size, n * machine.ranks)
        return replace(setting, micro_batch=n, width=1, batch_size=size, full_size=max(setting.full_size, size))

    def fitting(n: int) -> bool:
        return any(memory_of(shape, changed(s, n), machine).total <= machine.memory for s in settings)

    size = largest(fitting, limit)
    if not size:
        return "", None
    return str(size), recommended([plan(shape, changed(setting, size), machine) for setting in settings])
