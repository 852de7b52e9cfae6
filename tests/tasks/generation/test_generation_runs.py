"""Tasks that write texts, trained on losses, metrics and rewards: the same bits on every layout and number of ranks."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mezo_dist import cli
from mezo_dist.algorithms.base import Variant
from mezo_dist.config import reader
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import UserError
from mezo_dist.runs import api, training
from mezo_dist.tasks.generation.kind import Generation
from mezo_dist.testing import spawn, write_tiny_data, write_tiny_model
from tests.one_thread import one_thread  # noqa: F401
from tests.parts import Parts, run_parts

REWARD = """
def count_film(row, text):
    if "warm" in row["text"]:
        raise ValueError("no idea")
    return text.split().count("film") - 0.01 * len(text)
"""
TASK = {
    "kind": "generation",
    "name": "tiny",
    "splits": {name: {"source": "train", "size": 8} for name in ("train", "validation", "test")},
    "prompt": "{{ text }} . It was",
    "completion": " {{ 'great' if label else 'terrible' }}",
    "max_new_tokens": 5,
    "metric": "f1",
}
CASES: dict[str, list[str]] = {
    "loss": ["algorithm.lr=0.1"],
    "metric": ["train.objective=metric", "algorithm.lr=1", "algorithm.eps=0.5"],
    "drawn": ["train.objective=reward", "algorithm.eps=0.5", "task.temperature=2", "task.top_k=20"],
    "reward": ["train.objective=reward", "task.metric=reward", "algorithm.lr=0.1", "algorithm.eps=0.5"],
    "reward, low-rank": ["train.objective=reward", "algorithm.eps=0.5", "law=lowrank", "algorithm.lr=0.1"],
    "each sample": ["train.objective=reward", "law=lowrank", "algorithm.per_sample=true", "algorithm.eps=0.5"],
    "mixture": ["train.objective=reward", "reward.weights.metric=1", "reward.weights.loss=0.1", "algorithm.eps=0.5"],
}
WORLDS = [("replicated", 2), ("fsdp", 2), ("zero", 2)]


def write_config(root: Path) -> Path:
    (root / "rewards.py").write_text(REWARD)
    data = {
        "model": {"name": str(write_tiny_model(root / "model", "llama"))},
        "task": {**TASK, "data": str(write_tiny_data(root / "data.jsonl", 24))},
        "algorithm": {"name": "mezo", "lr": 0.01},
        "train": {"steps": 3, "batch_size": 4, "micro_batch": 2},
        "output": {"export": False},
    }
    # Ends that the tokenizer does not know, and settings of generate that are not ours.
    odd_settings = {
        "eos_token_id": [3, *range(4, 14)],
        "repetition_penalty": 1.5,
        "num_beams": 2,
        "suppress_tokens": [30],
    }
    (root / "model" / "generation_config.json").write_text(json.dumps(odd_settings))
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def options(root: Path, name: str, folder: Path) -> list[str]:
    more = [f"reward.function={root / 'rewards.py'}:count_film"] if "objective=reward" in " ".join(CASES[name]) else []
    return [*CASES[name], *more, f"output.dir={folder}"]


def train(comm: Communicator, root: Path, name: str, layout: str) -> int:
    """A run; how often this rank compared the texts of a split with references."""
    folder = root / f"{name} under {layout} on {comm.world_size}"
    settings = [*options(root, name, folder), f"layout.name={layout}"]
    calls, summarise = [0], Generation.summarise

    def counted(kind: Generation, *arguments: Any) -> Any:
        calls[0] += 1
        return summarise(kind, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generation, "summarise", counted)
        training.train(reader.load(root / "config.yaml", settings), comm, quiet=True)
    return calls[0]


def everything(comm: Communicator, root: Path) -> Parts:
    return run_parts(
        {
            f"{name} under {layout}": functools.partial(train, comm, root, name, layout)
            for layout, _ in WORLDS
            for name in CASES
        }
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    write_config(folder)
    for name in CASES:
        train(Communicator(), folder, name, "replicated")
    return folder


@pytest.fixture(scope="module")
def worlds(root: Path) -> list[Parts]:
    return spawn(everything, 2, root, timeout_s=280)


def trained(root: Path, name: str, layout: str = "replicated", world: int = 1) -> tuple[list[Any], dict[str, Any]]:
    folder = root / f"{name} under {layout} on {world}"
    lines = [json.loads(line) for line in (folder / "trajectory.jsonl").read_text().splitlines()[1:]]
    steps = [{key: value for key, value in line.items() if key != "check"} for line in lines]
    return steps, json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_a_run_learns_from_what_it_writes(root: Path, name: str) -> None:
    steps, results = trained(root, name)
    assert len([step for step in steps if "step" in step]) == 3
    metrics = {"exact-match", "f1", "rouge-l", "bleu", "loss"}
    rewarded = "reward" in name or name in ("each sample", "mixture", "drawn")
    for when in ("before", "after", "validation"):
        assert set(results[when]) - {"reward"} == metrics
        assert ("reward" in results[when]) is rewarded
    if rewarded:
        assert results["after"]["reward"] == -results["after"]["loss"]
    assert results["before"] != results["after"] or name == "metric"  # an exact word is rare by chance


def test_losses_are_those_of_the_texts(root: Path) -> None:
    """The validation figures are those of texts that the exported weights write by themselves."""
    run = api.load_run(root / "reward under replicated on 1")
    payload = run.evaluator._payload([Variant()], run.split("validation"), ("test",), lambda _: None)[0]
    texts = run.kind.texts(payload)  # type: ignore[attr-defined]
    rows = [json.loads(sample.row) for sample in run.splits["validation"]]  # type: ignore[attr-defined]
    rewards = [text.split().count("film") - 0.01 * len(text)
               for row, text in zip(rows, texts, strict=True) if "warm" not in row["text"]]  # fmt: skip
    assert 0 < len(rewards) < len(rows)  # those that have none do not count
    _, results = trained(root, "reward")
    assert results["validation"]["reward"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-6)
    assert len(set(texts)) > 1


@pytest.mark.parametrize("name", ["mixture", "reward", "drawn"])
def test_figures_are_those_that_evaluate_finds(root: Path, name: str) -> None:
    figures = api.evaluate(root / f"{name} under replicated on 1", "validation")
    _, results = trained(root, name)
    for metric in ("exact-match", "f1", "rouge-l", "bleu"):
        assert figures[metric] == results["validation"][metric]


def test_what_a_foreign_run_names_is_not_run(root: Path) -> None:
    folder = root / "reward under replicated on 1"
    (root / "rewards.py").rename(root / "gone.py")
    try:
        assert "f1" in api.evaluate(folder)
    finally:
        (root / "gone.py").rename(root / "rewards.py")


def test_evaluate_says_that_it_asks_nobody_for_rewards_unless_told_to(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = root / "reward under replicated on 1"
    evaluate = ["evaluate", str(folder), "--split", "validation"]
    assert cli.main(evaluate) == 0
    said = capsys.readouterr().out
    assert "reward " not in said.splitlines()[0]
    assert "This run optimises a reward, which is not shown here: the loss is that of the texts in" in said
    assert cli.main([*evaluate, "--rewards"]) == 0
    said = capsys.readouterr().out
    _, results = trained(root, "reward")
    assert f"reward {results['validation']['reward']:.4f}" in said
    assert "not shown" not in said
    assert cli.main(["evaluate", str(root / "loss under replicated on 1"), "--rewards"]) == 2
    assert "error: --rewards: this run was not trained on rewards" in capsys.readouterr().err


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("layout", "world"), WORLDS)
def test_a_run_is_the_same_on_every_layout(root: Path, worlds: list[Parts], layout: str, world: int, name: str) -> None:
    for rank in worlds:
        rank[f"{name} under {layout}"]
    assert _without_time(trained(root, name, layout, world)) == _without_time(trained(root, name))


@pytest.mark.distributed
def test_texts_are_compared_by_one_rank(worlds: list[Parts]) -> None:
    """It takes minutes where there are thousands: all others would do the same."""
    assert [rank["loss under replicated"] for rank in worlds] == [3, 0]


def _without_time(run: tuple[list[Any], dict[str, Any]]) -> tuple[list[Any], dict[str, Any]]:
    steps, results = run
    return steps, {key: value for key, value in results.items() if key != "training_s"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.objective=reward"], r"train\.objective: reward needs reward\.function"),
        (["reward.function=a.py:b"], r"reward\.function: counts only with train\.objective: reward"),
        (["task.metric=reward"], r"task\.metric: reward needs train\.objective: reward"),
        (["task.metric=reward", "train.objective=metric"], r"set train\.objective: reward"),
        (["task.completion="], r"task\.metric: f1 compares with right texts"),
        (["task.completion=", "task.references=text"], r"task\.completion: missing"),
        (["task.top_k=3"], r"task\.top_k: nothing is drawn"),
        (["task.stop=['']"], r"task\.stop: an empty text"),
        (["task.max_new_tokens=0"], r"task\.max_new_tokens"),
        (["task.prompt="], r"task\.prompt: is empty"),
        (["task.metric=bleu", "train.objective=reward", "reward.function=a.py:b", "reward.weights.metric=1"],
         r"reward\.weights\.metric: needs a task\.metric of single texts"),
        (["task.chat=true"], r"task\.chat: the tokenizer has no chat template"),
        (["task.references=nothing"], r"task\.references"),
        (["task.max_new_tokens=62"], r"tokens even without the text"),
        (["train.objective=reward", "reward.function=/no/file.py:name"], r"reward\.function: there is no file"),
    ],
)  # fmt: skip
def test_bad_settings(root: Path, tmp_path: Path, settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        training.train(
            reader.load(root / "config.yaml", [*settings, f"output.dir={tmp_path / 'run'}"]), Communicator(), quiet=True
        )


def test_a_masked_model_cannot_write(root: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "bert", "bert")
    config = reader.load(root / "config.yaml", [f"model.name={tmp_path / 'bert'}", f"output.dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=r"task\.kind: generation needs a causal language model"):
        training.train(config, Communicator(), quiet=True)
