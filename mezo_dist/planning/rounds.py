"""The forward passes of a step: the algorithm's own planner says them, with made-up losses, and they are dealt to ranks
as a run deals them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from mezo_dist import algorithms
from mezo_dist.algorithms import Settings
from mezo_dist.algorithms.auto_rate import share
from mezo_dist.algorithms.base import Evaluation, Losses, Problem, Variant
from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.algorithms.operations import CopyAnchor
from mezo_dist.algorithms.svrg import MeZOSVRG
from mezo_dist.errors import UserError
from mezo_dist.planning.setting import Setting

MARKS = 2
"""Words of a message beside its contents: fingerprint, wish to stop."""
LOSS_MARKS = 2
"""Words beside losses: whether all are finite, whether a rank failed."""
MOST_STEPS = 12
"""Steps of a cycle that are planned one by one; those after are taken to be like the last one."""


@dataclass(frozen=True)
class BasePasses:
    """The variants of one base (`Variant.base`), which go through the model together."""

    variants: int
    """Those that one rank evaluates."""
    copies: int
    """Those among them with weights of their own; they are made in scratch."""
    directions: int
    """Directions that are generated for these, for every element of a weight."""


@dataclass(frozen=True)
class Round:
    """The forward passes of one step on one rank."""

    what: str
    """``step``, ``anchor step`` or ``inner step``."""
    bases: tuple[BasePasses, ...]
    samples: int
    """Of its batch, over all ranks."""
    micro_batches: int
    """That the busiest rank has."""
    update_directions: int
    """Directions that the update adds."""
    copies_anchor: bool
    """The anchor of this algorithm is a copy."""
    messages: tuple[int, ...]
    """Words (of 64 bits) of each message between the ranks, marks among them."""
    steps: int = 1
    """Steps of a cycle that are like this one."""

    @property
    def passes(self) -> int:
        """Forward passes of the busiest rank."""
        return self.micro_batches * sum(base.variants for base in self.bases)


def rounds_of(setting: Setting, ranks: int) -> list[Round]:
    """The rounds of one cycle of the algorithm: one for MeZO, an anchor step and inner steps for MeZO-SVRG.

    Args:
        setting: how the run goes.
        ranks: all ranks.
    """
    cycle = getattr(setting.algorithm, "q", 1)
    problem = Problem(0, 1000, setting.batch_size, setting.full_size, setting.weights != "float32", setting.num_train,
                      eps=1e-3)  # fmt: skip
    rounds = []
    for number, step in enumerate(_cycle(setting.algorithm, problem)):
        sets = step.by_base if setting.is_sharded else [step.request.variants]
        groups, micro_batches = _split(setting, ranks, [len(some) for some in sets], step.samples)
        rounds.append(
            Round(
                "step"
                if not hasattr(setting.algorithm, "q")
                else "anchor step"
                if step.request.batch == "full"
                else "inner step",
                tuple(_of_base(some) for some in _by_base(_busiest(sets, groups))),
                step.samples,
                micro_batches,
                step.update_directions,
                step.has_copy,
                _messages(setting, step.request, step.samples),
                1 + max(0, cycle - MOST_STEPS) * (number == MOST_STEPS - 1),
            )
        )
    return rounds


@dataclass(frozen=True)
class _Step:
    """What a planner asks for in one step."""

    request: Evaluation
    by_base: Sequence[Sequence[Variant]]
    samples: int
    update_directions: int
    has_copy: bool
    """There is a copy of the anchor by then."""


@lru_cache(maxsize=64)
def _cycle(settings: Settings, problem: Problem) -> list[_Step]:
    """The steps of a cycle of an algorithm. They do not depend on layout or ranks, of which simulations ask for very
    many.

    Args:
        settings: of the algorithm.
        problem: what the planner is told of the run.
    """
    if settings.eps == "auto":  # the passes that choose it are taken once
        settings = replace(settings, eps=problem.perturbation("auto"))
    # Nor is looking back planned, a few per cent of a run's passes.
    if isinstance(settings, MeZO | MeZOSVRG) and settings.lr == "auto":
        settings = replace(settings, eta=share(settings.eta, problem.num_steps))
    planner = algorithms.build(settings.name, settings, problem)
    state, steps, has_copy = planner.init(), list[_Step](), False
    for step in range(min(getattr(settings, "q", 1), MOST_STEPS)):
        request = planner.plan(state, step)
        samples = problem.full_size if request.batch == "full" else problem.batch_size
        fake = tuple(1.0 + 0.01 * i for i in range(len(request.variants)))
        each = tuple((value,) * samples for value in fake) if request.each_sample else ()
        curvature = 1.0 if request.pairs else None
        update = planner.update(state, step, [Losses(fake, each, curvature)])
        if isinstance(update, Evaluation):
            raise UserError(f"plan: {settings.name} asks for further rounds, which are not planned")
        has_copy = has_copy or any(isinstance(operation, CopyAnchor) for operation in update.operations)
        steps.append(_Step(request, _by_base(request.variants), samples, len(update.combination.terms), has_copy))
        state = update.state
    return steps


def _by_base(variants: Sequence[Variant]) -> list[list[Variant]]:
    bases = dict.fromkeys(variant.base for variant in variants)
    return [[variant for variant in variants if variant.base == base] for base in bases]


def _of_base(variants: Sequence[Variant]) -> BasePasses:
    seeds = {seed for variant in variants for seed, _ in variant.shift.terms}
    return BasePasses(len(variants), sum(bool(variant.shift) for variant in variants), len(seeds))


def _busiest(sets: Sequence[Sequence[Variant]], groups: int) -> list[Variant]:
    """The variants of the group of ranks that has most of them: the last one (`WorkSplit.of_rank`).

    Args:
        sets: that the groups share out, one after the other.
        groups: number of groups.
    """
    return [variant for some in sets for variant in some[(groups - 1) * len(some) // groups :]]


def _split(setting: Setting, ranks: int, sets: Sequence[int], samples: int) -> tuple[int, int]:
    """Groups of ranks that evaluate different variants, and micro-batches of the busiest rank: the rule of
    `mezo_dist.runs.work_split.WorkSplit` for micro-batches that cost the same.

    Args:
        setting: how the run goes.
        ranks: all ranks.
        sets: numbers of variants that groups share out: all of the round, or those of each base.
        samples: of its batch.
    """
    items = math.ceil(samples / setting.micro_batch)
    copies = setting.copies(ranks)
    allowed = [n for n in range(1, min(*sets, copies, copies) + 1) if copies % n == 0]

    def load(groups: int) -> int:
        return sum(math.ceil(n / groups) for n in sets) * math.ceil(items / (ranks // groups))

    groups = min(allowed, key=load)
    return groups, math.ceil(items / (ranks // groups))


def _messages(setting: Setting, request: Evaluation, samples: int) -> tuple[int, ...]:
    """Words of each message of a round: one with the losses and weights of every variant, or of every sample; where the
    loss is a function of the whole batch, one with what the model says of every sample, and one with rank 0's losses.

    Args:
        setting: how the run goes.
        request: what is evaluated.
        samples: of the batch.
    """
    variants = len(request.variants)
    if setting.joint is None:
        return (MARKS + LOSS_MARKS + 2 * variants * (samples if request.tells_samples_apart else 1),)
    results = (variants + 1) * samples if setting.joint == "samples" else variants + bool(request.pairs)
    return MARKS + variants * samples * setting.columns, MARKS + 1 + results
