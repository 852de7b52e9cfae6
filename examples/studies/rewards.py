"""Rewards that have no gradient: how far do forward passes get against REINFORCE, at equal numbers of written texts?

    python examples/studies/rewards.py [--tasks keywords topics] [--only LABEL ...] [--report]

Two tasks on SmolLM2-135M-Instruct and headlines.

* `keywords`: two words of the headline with a comma between, and no more (`examples/rewards.py:two_keywords` says what
  share of that a text is), in four tokens. Many answers are right, so there is nothing to imitate. 192 headlines to
  learn from, 64 to choose rates, 128 to test; 640 texts a run.
* `topics`: the section that a headline is of, in one token. The reward is accuracy itself: 1 for the right word, 0 for
  anything else. Here labels exist, and supervised tuning sees as many labelled headlines as the others write texts.
  320, 96 and 320 headlines; 1,536 texts a run.

Contenders, each on the two norms of configs/reward.yaml (1,152 weights) and on these with the MLP of the last block
(2.7 million), all with the schedule of that config and 32 texts a step:

* MeZO with a direction per sample, normalised: the likeliest texts of 16 headlines, under both signs of a direction;
  and the same with ``lr: auto``, plain, for which no rate is chosen.
* REINFORCE (`reinforce.py`): 4 texts drawn for each of 8 headlines, the mean reward of the other three as baseline,
  back-propagation, Adam.
* supervised: the package's AdamW on 32 labelled headlines.

Each has three rates, tried from seed 3 and scored on validation; if the best one lies at an edge, the grid grows there
by one, once. The best rate runs from seeds 0, 1 and 2, and these are scored on test. A score is the mean reward of the
likeliest texts. No trained weight comes before the last attention, so keys and values of prompts are computed once (for
all contenders; not counted as time).

For memory they are computed every time. It is the largest resident memory of two steps (Linux: VmHWM, reset when the
model is loaded), in a process of its own for each contender, for REINFORCE on all weights, and for writing alone.

Writes one line per finished run to rewards.jsonl, headed by a line about machine and versions. What is there is not run
again, so the same command goes on where it was stopped; `--report` prints tables of what is there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from curve_contenders import rounded
from learning_curves import Record, Results, provenance
from reinforce import Known
from reward_runs import CONTENDERS, MEASURED, SEEDS, TASKS, TUNING_SEED, Bench, Contender, learn, opened, steps_of

from mezo_dist.engines.malloc import ask_for_huge_pages, tune_malloc


class Study:
    """All runs of a task.

    Args:
        task: its name.
        results: the file.
        bench: with the weights of the contenders that are asked for; None: only what is there counts.
    """

    def __init__(self, task: str, results: Results, bench: Bench | None = None) -> None:
        self.task, self._results, self._bench = task, results, bench
        self.contenders, self.measured = (
            [c for c in some if TASKS[task].has_labels or c.method != "supervised"] for some in (CONTENDERS, MEASURED)
        )

    def before(self) -> Record | None:
        """The model before training."""
        label = f"{self.task}, before"
        if (done := self._results.find(label, 0.0, 0)) is None and (bench := self._bench) is not None:
            bench.reset()
            scores = {split: bench.score(split) for split in ("validation", "test")}
            self._add(done := {"kind": "run", "label": label, "lr": 0.0, "seed": 0, "scores": scores})
        return done

    def run(self, contender: Contender, lr: float, seed: int) -> Record | None:
        """One run, from the file if it is there; None if it is not and there is no bench."""
        label = f"{self.task}, {contender.label}"
        if (done := self._results.find(label, lr, seed)) is None and (bench := self._bench) is not None:
            done = {"kind": "run", "label": label, "lr": lr, "seed": seed, **learn(bench, contender, lr, seed)}
            self._add(done)
        return done

    def best_rate(self, contender: Contender) -> float | None:
        """The rate that validation likes best; None if none was tried."""
        rates, scores = [rounded(lr * TASKS[self.task].faster) for lr in contender.rates], {}
        if rates == [0.0]:  # nothing is chosen
            return 0.0
        ratio = rates[1] / rates[0]
        for _ in range(2):
            runs = {lr: self.run(contender, lr, TUNING_SEED) for lr in rates}
            scores |= {lr: run["scores"]["validation"] for lr, run in runs.items() if run is not None}
            if not scores:
                return None
            best = max(scores, key=lambda lr: scores[lr])
            if min(scores) < best < max(scores):
                break
            rates = [rounded(best / ratio if best == min(scores) else best * ratio)]
        return best

    def memory(self, contender: Contender) -> Record | None:
        """Peak memory, if it was measured."""
        return self._results.find(f"{self.task}, memory, {contender.label}", 0.0, 0)

    def measure(self, contender: Contender) -> None:
        """Measure it, if need be."""
        if self.memory(contender) is None:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                figures = pool.submit(peak_of, self.task, contender).result()
            label = f"{self.task}, memory, {contender.label}"
            self._add({"kind": "run", "label": label, "lr": 0.0, "seed": 0, **figures})

    def _add(self, record: Record) -> None:
        self._results.add(record)
        print({name: value for name, value in record.items() if name != "kind"}, flush=True)


def peak_of(task: str, contender: Contender) -> Record:
    """Memory of a contender, to be called in a process of its own: GiB of the weights and at the peak of two steps."""
    torch.set_num_threads(1)
    ask_for_huge_pages()
    tune_malloc(is_sharded=False)
    with opened(task, contender.place, None) as bench:
        weights = sum(p.nbytes for p in bench.run.pretrained.model.parameters())
        lr = contender.rates[0] if contender.rates else 0.0
        bench.start.clear()  # no run begins again here
        Path("/proc/self/clear_refs").write_text("5")
        if contender.method == "writing":
            bench.scorer.score(bench.run.batch("minibatch", 0), lambda *_: {}, lambda _: None)
        else:
            steps = steps_of(bench, contender, lr, TUNING_SEED)
            next(steps)
            next(steps)
        lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return {"peak_gib": round(peak / 2**20, 3), "weights_gib": round(weights / 2**30, 3)}


def table(study: Study) -> str:
    """What came of a task, in Markdown; scores in %."""
    head = ["contender", "rate", "validation: a quarter", "all", "test", "texts", "tokens", "CPU s", "peak GiB"]
    lines = [f"### {study.task}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    if (before := study.before()) is not None:
        scores = before["scores"]
        lines.append(f"| before | | | {100 * scores['validation']:.1f} | {100 * scores['test']:.1f} | | | | |")
    for contender in study.contenders:
        lr = study.best_rate(contender)
        runs = [run for seed in SEEDS if lr is not None and (run := study.run(contender, lr, seed)) is not None]
        if not runs:
            continue
        columns = [
            _mean([run["scores"][split] for run in runs]) for split in ("validation, a quarter", "validation", "test")
        ]
        work = [f"{statistics.mean(run[name] for run in runs):,.0f}" for name in ("texts", "tokens", "cpu_s")]
        memory = study.memory(contender)
        peak = "" if memory is None else f"{memory['peak_gib']:.2f}"
        lines.append(f"| {' | '.join([contender.label, f'{lr:g}' if lr else 'auto', *columns, *work, peak])} |")
    memory = {c.label: m["peak_gib"] for c in study.measured if c not in CONTENDERS and (m := study.memory(c))}
    lines += ["", *(f"Peak of {label}: {peak:.2f} GiB" for label, peak in memory.items())]
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def work(task: str, results: Results, only: list[str]) -> None:
    """All runs of a task that are not there yet.

    Args:
        task: its name.
        results: the file.
        only: labels of contenders; all if empty.
    """
    known: Known = {}
    chosen = [c for c in Study(task, results).contenders if not only or c.label in only]
    for place in dict.fromkeys(c.place for c in chosen):
        with opened(task, place, known) as bench:
            for name in bench.run.splits:
                bench.prompts.remember(bench.run.split(name))
            study = Study(task, results, bench)
            study.before()
            for contender in (c for c in chosen if c.place == place):
                lr = study.best_rate(contender)
                for seed in SEEDS:
                    study.run(contender, lr, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["keywords", "topics"])
    parser.add_argument("--parts", nargs="+", choices=("runs", "memory"), default=["runs", "memory"])
    parser.add_argument("--only", nargs="+", choices=[c.label for c in MEASURED], default=[], help="contenders")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="sum up what is there and run nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    about = provenance(f"a process with {options.threads} thread(s)", f"{TUNING_SEED} to choose rates, then {SEEDS}")
    results = Results(options.out / "rewards.jsonl", {**about, "scores": "mean reward of the likeliest texts"})
    for task in options.tasks if not options.report else ():
        if "runs" in options.parts:
            work(task, results, options.only)
        if "memory" in options.parts:
            study = Study(task, results)
            for contender in study.measured:
                if not options.only or contender.label in options.only:
                    study.measure(contender)
    print("\n\n".join(table(Study(task, results)) for task in options.tasks))


if __name__ == "__main__":
    main()
