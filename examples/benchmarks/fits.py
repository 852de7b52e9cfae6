"""What fits into the memory of MeZO-SVRG on all weights, by size of model and length of texts?

    python examples/benchmarks/fits.py [--model smollm2-135m smollm2-360m] [--tokens 128 512] [--out FILE] [--plan]

The same question as that of `equal_memory.py`, for more than one model and one length, and without learning.

1. Measured. Everybody needs least with one text at a time, so batches are one news article, cut to ``--tokens``. The
   limit is the peak memory of a cycle of MeZO-SVRG (q = 2) on all weights. Against it: the choice that needs least of
   those that train all weights by gradients (SGD with checkpointing; equal_memory.py has others); AdamW on the last k
   blocks, k doubling until it does not fit; and AdamW on LoRA matrices, with checkpointing. Every choice takes 2 steps
   in a process of its own with one thread. Nothing is remembered of frozen blocks, which would take memory and save
   time. smollm2-360m is that model's shape with random weights, for its own cannot be had offline: memory does not
   depend on them.
2. Planned, for sizes that do not fit here: what `mezo-dist plan` knows of bf16 weights with an fp32 master copy of what
   gradients train, micro-batches of one text everywhere, activations recomputed. "LoRA from" is the shortest text (a
   power of two) from which on even LoRA needs more than MeZO-SVRG.

Cases are not run again if they stand in ``--out``. `--plan` shows the second part alone.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import harness
from equal_choices import LIMIT, ROOT, Choice, Contest, choices
from equal_memory import Cases

from mezo_dist.algorithms.svrg import MeZOSVRG
from mezo_dist.assets.registry import resolve_model
from mezo_dist.planning.first_order import first_order
from mezo_dist.planning.lookup import find_shape
from mezo_dist.planning.machine import GIB, Machine
from mezo_dist.planning.memory import memory_of
from mezo_dist.planning.setting import Setting

FAST = {"model": ["tiny"], "tokens": [16]}
STEPS = 2
BASE = "demo:smollm2-135m"
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"num_hidden_layers": 2},
    "smollm2-135m": {"num_hidden_layers": 30},
    "smollm2-360m": {
        "num_hidden_layers": 32,
        "hidden_size": 960,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "intermediate_size": 2560,
    },
}
LEAST_OF_ALL = "SGD, all weights, checkpointing, batch 1"
LORA = "AdamW, LoRA, checkpointing"
PLANNED = ("opt-1.3b", "opt-13b", "opt-66b", "llama-3-8b", "llama-3-70b")
LENGTHS = (512, 2048, 8192)
LONGEST = 2**20
Row = dict[str, object]


def source(model: str) -> str:
    """``model.name`` of a size; a random one's config and tokenizer are written down first."""
    if model == "smollm2-135m":
        return BASE
    folder = Path(tempfile.gettempdir()) / f"mezo_dist-shape-{model}"
    folder.mkdir(exist_ok=True)
    base = resolve_model(BASE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder / name)
    config = json.loads((base / "config.json").read_text()) | SIZES[model]
    (folder / "config.json").write_text(json.dumps(config))
    return f"random:{folder}"


def settings_of(choice: Choice, model: str, tokens: int) -> list[str]:
    """All settings of a case."""
    common = ["train.batch_size=1", "train.micro_batch=1"]
    if model != "tiny":
        common += [f"model.name={source(model)}", f"task={ROOT / 'configs/tasks/bbc-news.yaml'}"]
        common += [f"task.splits.{split}.size=4" for split in ("train", "validation", "test")]
        common += [f"train.max_tokens={tokens}", "train.frozen_cache_gib=0"]
    own = choice.settings(choice.rate, STEPS, seed=0)
    merged = dict(item.split("=", 1) for item in (*common, *own)) | {"train.full_size": "1"}
    if "mezo-svrg" not in merged["algorithm.name"]:
        del merged["train.full_size"]
    return [f"{name}={value}" for name, value in merged.items()]


def measured(cases: Cases, model: str, tokens: int) -> Row:
    """The peak memory of every choice, GiB; those of ``last`` in the order of k, up to the first that does not fit."""
    every = choices(Contest(num_blocks=SIZES[model]["num_hidden_layers"]))
    row: Row = {"model": model, "tokens": tokens}

    def peak(choice: Choice) -> float | None:
        figures = cases.run(settings_of(choice, model, tokens), is_scored=False)
        value = None if figures is None else round(figures["peak_gib"], 3)
        print(f"{model}, {tokens} tokens, {choice.label}: {'failed' if value is None else f'{value} GiB'}", flush=True)
        return value

    by_label = {choice.label: choice for choice in every}
    limit = peak(by_label[LIMIT])
    row |= {LIMIT: limit, LEAST_OF_ALL: peak(by_label[LEAST_OF_ALL]), LORA: peak(by_label[LORA])}
    last: dict[str, float | None] = {}
    for choice in every:
        if choice.family == "last blocks" and all(p is not None and p <= (limit or 0) for p in last.values()):
            last[choice.label] = peak(choice)
    return {**row, "last": last}


def planned(name: str, tokens: int) -> Row:
    """GiB by the cost model: MeZO-SVRG with the anchor replayed and stored, and what gradients need at least."""
    shape, machine = find_shape(name, []), Machine(memory=2**60)
    totals = []
    for anchor in ("replay", "stored"):
        algorithm = MeZOSVRG(anchor=anchor)  # type: ignore[arg-type]
        setting = Setting(algorithm=algorithm, batch_size=16, micro_batch=1, width=1, tokens=tokens)
        totals.append(memory_of(shape, setting, machine).total / GIB)
    others = first_order(shape, setting, Machine(memory=1))  # so little that activations are recomputed
    least = {option.name: option.memory / GIB for option in others}
    return {"model": name, "tokens": tokens, "replayed": totals[0], "stored": totals[1], **least}


def lora_from(name: str) -> int | None:
    """The shortest text from which on LoRA needs more than MeZO-SVRG with replayed anchors; None: none up to
    `LONGEST`."""
    tokens = 128
    while tokens <= LONGEST:
        row = planned(name, tokens)
        if row["LoRA"] > row["replayed"]:  # type: ignore[operator]
            return tokens
        tokens *= 2
    return None


def plan_table(names: Sequence[str]) -> tuple[list[Row], str]:
    """The second part, as rows and in Markdown."""
    rows, columns = [], ("replayed", "stored", "SGD", "AdamW", "LoRA")
    lines = [
        "| model | tokens | MeZO-SVRG, anchor replayed | stored | SGD | AdamW | LoRA | LoRA from |",
        "|---" * 8 + "|",
    ]
    for name in names:
        beyond = lora_from(name)
        for tokens in LENGTHS:
            row = planned(name, tokens)
            rows.append(row | {"lora_from": beyond})
            figures = " | ".join(f"{row[column]:.1f}" for column in columns)
            lines.append(f"| {name} | {tokens} | {figures} | {beyond or '-'} |")
    return rows, "\n".join(lines)


def measured_table(rows: Sequence[Row]) -> str:
    """The first part in Markdown; what fits is in bold."""
    lines = [f"| model | tokens | {LIMIT} | {LEAST_OF_ALL} | {LORA} | AdamW, last blocks |", "|---" * 6 + "|"]
    for row in rows:
        limit = row[LIMIT]

        def cell(value: object, limit: object = limit) -> str:
            if not isinstance(value, float) or not isinstance(limit, float):
                return "failed"
            return f"**{value:.3f}**" if value <= limit else f"{value:.3f}"

        last = row["last"]
        assert isinstance(last, dict)
        blocks = ", ".join(f"{label.split()[2]}: {cell(value)}" for label, value in last.items())
        figures = [f"{row['tokens']}", *(cell(row[label]) for label in (LIMIT, LEAST_OF_ALL, LORA)), blocks]
        lines.append(f"| {row['model']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, plan, print both tables and, with --json, one last line for machines."""
    parser = harness.parser(__doc__)
    parser.add_argument("--model", nargs="+", choices=SIZES, default=["smollm2-135m", "smollm2-360m"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--out", type=Path, help="cases, a line each; what is there is not run again")
    parser.add_argument("--plan", action="store_true", help="measure nothing")
    arguments = harness.parse(parser, FAST)
    facts = harness.begin()
    cells = [] if arguments.plan else [(model, tokens) for model in arguments.model for tokens in arguments.tokens]
    cases = Cases(arguments.out, tiny="llama-tied" if arguments.model == ["tiny"] else None)
    rows = [measured(cases, model, tokens) for model, tokens in cells]
    planned_rows, text = plan_table(PLANNED[:1] if arguments.fast else PLANNED)
    print("\n" + (measured_table(rows) + "\n\n" if rows else "") + text, flush=True)
    harness.end(arguments, facts, {"measured": rows, "planned": planned_rows})


if __name__ == "__main__":
    main()
