"""Plans as people read them (tables), and as programs do (JSON)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from mezo_dist.errors import needs, printable
from mezo_dist.json_types import JsonObject
from mezo_dist.planning.choice import Plan, StepPlan, by_algorithm, layout_name, reason, recommended
from mezo_dist.planning.first_order import FirstOrder
from mezo_dist.planning.machine import GIB, Machine
from mezo_dist.planning.shapes import ModelShape

with needs("rich", "rich, which draws the tables"):
    from rich import box
    from rich.console import Console
    from rich.table import Table

WIDTH = 118
MIN_WIDTH = 60
"""Of a table, whose title would break in pieces above few columns."""
NONE = "-"


@dataclass(frozen=True)
class Answer:
    """Both forms of one answer."""

    data: JsonObject
    head: list[str]
    tables: list[Table] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)


def text(answer: Answer) -> str:
    """The answer as text, in lines of at most `WIDTH` characters."""
    console = Console(file=io.StringIO(), width=WIDTH, force_terminal=False)
    for line in answer.head:
        console.print(printable(line), highlight=False, markup=False)
    for table in answer.tables:
        console.print()
        console.print(table)
    if answer.tail:
        console.print()
    for line in answer.tail:
        console.print(printable(line), highlight=False, markup=False)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def answer(shape: ModelShape, plans: Sequence[Plan], others: Sequence[FirstOrder], notes: Sequence[str]) -> Answer:
    """All plans, the recommended one in detail, and what back-propagation would need.

    Args:
        shape: the model.
        plans: one for each way to run it.
        others: first-order training on the same machines.
        notes: what people must know.
    """
    kinds, machine = by_algorithm(plans), plans[0].machine
    chosen = [(recommended(some), reason(some), some[0].setting.algorithm.name) for some in kinds]
    data: JsonObject = {
        "model": _model(shape),
        "machine": _machine(machine),
        "plans": [_plan(p) for p in plans],
        "recommended": {
            kind: best and {"name": best.name, "layout": layout_name(best.setting, machine.ranks)}
            for best, _, kind in chosen
        },
        "reasons": {kind: why for _, why, kind in chosen},
        "first_order": [vars(option) for option in others],
        "notes": list(notes),
    }
    tail = []
    for best, why, kind in chosen:
        tail.append(f"{best.name}: {why}." if best else f"{kind}: {why}")
        tail += [] if best is None else _details(best)
    tail += [f"Note: {note}." for note in notes]
    tables = [_table(some, best) for some, (best, _, _) in zip(kinds, chosen, strict=True)]
    return Answer(data, _head(shape, plans[0]), [*tables, _first_order_table(others)], tail)


def answer_to_find(what: str, size: str, best: Plan | None, notes: Sequence[str]) -> Answer:
    """The answer to ``--find``.

    Args:
        what: ``model``, ``micro-batch`` or ``context``.
        size: the largest; empty if there is none.
        best: its plan.
        notes: what people must know.
    """
    data: JsonObject = {"find": what, "largest": size or None, "plan": best and _plan(best), "notes": list(notes)}
    if best is None:
        return Answer(data, [f"No {what} fits."])
    samples, tokens = best.setting.micro_batch, best.setting.tokens
    words = {
        "model": f"The largest model that ships and fits: {size}",
        "micro-batch": f"The largest micro-batch that fits: {size} samples of {tokens} tokens",
        "context": f"The longest samples that fit: {size} tokens, {samples} in each pass",
    }
    return Answer(data, [f"{words[what]} ({best.name}).", *_details(best), *(f"Note: {note}." for note in notes)])


def of_rates(data: JsonObject) -> str:
    """What a calibration measured."""
    rates, flops = data["rates"], data["flops"]
    lines = [f"{data['host']}, {data['device']}, {data['threads']} thread(s), {data['date']}, load {data['load']:.1f}"]
    lines += [f"  matrix products, {dtype}: {value / 1e9:,.1f} GFLOPS" for dtype, value in flops.items()]
    lines += [
        f"  memory: {rates['bandwidth'] / 1e9:,.1f} GB/s",
        f"  directions: {rates['generate'] * 1e9:.2f} ns an element to generate one, and "
        f"{rates['write'] * 1e9:.2f} to write a variant",
        f"  a module of a pass: {rates['call'] * 1e6:.0f} us beside its arithmetic",
        f"  between processes of this host (gloo): {rates['latency'] * 1e6:.0f} us a hop, "
        f"{rates['host_link'] / 1e9:,.2f} GB/s",
    ]
    return "\n".join(lines)


def _head(shape: ModelShape, some: Plan) -> list[str]:
    setting, machine = some.setting, some.machine
    active = "" if shape.is_dense_everywhere else f", {_billions(shape.active_size)} multiplied with each token"
    trained = "" if shape.num_trainable == shape.size else f", {_billions(shape.num_trainable)} trained"
    hosts = f"{machine.hosts} host(s) x {machine.ranks_per_host} rank(s) of {machine.memory / 1e9:.1f} GB"
    link = f", {machine.link * 8 / 1e9:g} Gbit/s between hosts" if machine.hosts > 1 else ""
    reads = {"labels": "read at label words", "tokens": f"{setting.targets} target tokens each",
             "texts": f"{setting.targets} tokens written for each"}[setting.reads]  # fmt: skip
    return [
        f"{shape.name}: {_billions(shape.size)} weights{active}{trained}; {setting.weights}"
        f"{f', passes in {setting.compute}' if setting.compute else ''}",
        f"{hosts}{link}; rates {machine.origin}",
        f"batches of {setting.batch_size} x {setting.tokens} tokens (full batches of {setting.full_size}) in "
        f"micro-batches of {setting.micro_batch}, {reads}",
    ]


def _table(plans: Sequence[Plan], best: Plan | None) -> Table:
    """The layouts of one algorithm."""
    table = _plain_table(f"{plans[0].algorithm}: GiB per rank; of a step, as a mean over a cycle")
    table.add_column("", no_wrap=True)
    table.add_column("layout", no_wrap=True)
    names = ("GiB", "weights", "gathered", "scratch", "passes", "other", "bytes gathered", "between hosts", "seconds",
             "samples/s")  # fmt: skip
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for one in plans:
        parts = one.memory.parts
        named = ("weights", "gathered", "scratch", "passes")
        other = sum(size for name, size in parts.items() if name not in named)
        gathered, crossing = one.mean(lambda s: s.traffic.gathered), one.mean(lambda s: s.traffic.between_hosts)
        table.add_row(
            ">" if one is best else " " if one.fits else "x",
            layout_name(one.setting, one.machine.ranks),
            f"{one.memory.total / GIB:,.1f}",
            *(f"{parts.get(name, 0) / GIB:,.1f}" for name in named),
            f"{other / GIB:,.1f}",
            _bytes(gathered),
            _bytes(crossing),
            _figure(one.seconds),
            _figure(one.mean(lambda s: s.round.samples) / one.seconds),
        )
    table.caption = "> recommended   x does not fit"
    return table


def _plain_table(title: str) -> Table:
    return Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
                 title_style="bold", padding=(0, 1, 0, 0), min_width=MIN_WIDTH)  # fmt: skip


def _first_order_table(others: Sequence[FirstOrder]) -> Table:
    table = _plain_table("back-propagation on the same machines: GiB per rank, bytes per step (from the literature)")
    stages = list(dict.fromkeys(option.stage for option in others))
    table.add_column("")
    for stage in stages:
        table.add_column(stage, justify="right")
    for name in dict.fromkeys(option.name for option in others):
        cells = [option for option in others if option.name == name]
        table.add_row(name, *(_cell(option) for option in cells))
    table.caption = "x does not fit   r recomputes activations"
    return table


def _cell(option: FirstOrder) -> str:
    marks = "" if option.fits and not option.recomputes else " r" if option.fits else " x"
    return f"{option.memory / GIB:,.1f}{marks}, {_bytes(option.traffic)}"


def _details(best: Plan) -> list[str]:
    memory = "  ".join(f"{name} {size / GIB:.2f}" for name, size in best.memory.parts.items() if size > 0.005 * GIB)
    lines = [f"  memory of a rank, {best.memory.total / GIB:.2f} GiB when {best.memory.when}: {memory}"]
    for what in dict.fromkeys(step.round.what for step in best.steps):
        lines.append(_step_line(what, [step for step in best.steps if step.round.what == what][-1]))
    return lines


def _step_line(what: str, step: StepPlan) -> str:
    parts = "  ".join(f"{name} {_figure(s)}" for name, s in step.duration.parts.items() if s > 0)
    framing = step.traffic.framed_gathers + step.traffic.framed_scalars
    framed = f", {framing:,} of framing beside {step.traffic.between_hosts:,} between hosts" if framing else ""
    return (
        f"  {what}, {_figure(step.duration.total)} s: {parts}; {step.round.passes} passes, {step.width} "
        f"micro-batch(es) in lock step, {step.work.flops / 1e12:,.2f} TFLOP, {step.traffic.scalars:,} bytes of "
        f"scalars{framed}"
    )


def _model(shape: ModelShape) -> JsonObject:
    names = ("name", "size", "active_size", "num_trainable", "layers", "hidden", "heads", "kv_heads", "experts",
             "active_experts", "vocabulary", "window")  # fmt: skip
    return {name: getattr(shape, name) for name in names}


def _machine(machine: Machine) -> JsonObject:
    return dict(vars(machine))


def _plan(one: Plan) -> JsonObject:
    setting = one.setting
    return {
        "name": one.name,
        "layout": layout_name(setting, one.machine.ranks),
        "algorithm": setting.algorithm.name,
        "fits": one.fits,
        "memory": {"total": one.memory.total, "when": one.memory.when, "parts": dict(one.memory.parts)},
        "seconds_per_step": one.seconds,
        "samples_per_second": one.mean(lambda s: s.round.samples) / one.seconds,
        "steps": [_step(step) for step in one.steps],
    }


def _step(step: StepPlan) -> JsonObject:
    return {
        "what": step.round.what,
        "times": step.round.steps,
        "passes": step.round.passes,
        "width": step.width,
        "flops": step.work.flops,
        "seconds": step.duration.total,
        "parts": dict(step.duration.parts),
        "traffic": dict(vars(step.traffic)),
    }


def _billions(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"


def _bytes(number: float) -> str:
    if number <= 0:
        return NONE
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"


def _figure(number: float) -> str:
    """Three digits."""
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.3g}" if number >= 1e-3 else f"{number:.1e}"
