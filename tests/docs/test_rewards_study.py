"""The study of rewards (examples/studies/rewards.py) compares what it says that it compares."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.docs.test_examples import main_of
from tests.forked import ROOT
from tests.one_thread import one_thread  # noqa: F401


@pytest.fixture
def studies(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "studies"))
    return importlib.import_module


@pytest.mark.parametrize("k", [2, 3])
def test_the_estimate_of_reinforce_is_unbiased(studies: Any, k: int) -> None:
    """Over all k-tuples of the words that one-word texts can have, for two prompts."""
    rewards = torch.tensor([[1.0, 0.2, -0.5], [0.0, 2.0, 0.3]], dtype=torch.float64)
    logits = torch.tensor([[0.3, -1.0, 0.8], [0.1, 0.4, -0.7]], dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad((logits.softmax(-1) * rewards).sum(-1).mean(), logits)
    estimate, variance = torch.zeros_like(exact), torch.zeros(())
    rows = torch.arange(2)
    for words in itertools.product(itertools.product(range(3), repeat=k), repeat=2):
        index = torch.tensor(words).T  # [k, prompts]
        log_p = logits.log_softmax(-1)[rows, index]
        (gradient,) = torch.autograd.grad(studies("reinforce").surrogate(log_p, rewards[rows, index]), logits)
        probability = log_p.detach().sum().exp()
        estimate -= probability * gradient
        variance = variance + probability * (gradient + exact).pow(2).sum()
    torch.testing.assert_close(estimate, exact)
    assert variance > 0.01, "single estimates do differ from it"


def test_drawn_texts_have_the_probabilities_that_the_model_gives_them(studies: Any) -> None:
    with studies("reward_runs").opened("tiny", "all weights", None) as bench:
        run, reinforce = bench.run, studies("reinforce")
        (item,) = run.cut(run.splits["train"][:3])
        ends = reinforce.Ends(4, frozenset({20, 21, 22, 23, 24, 25, 26}), lambda tokens: tokens[-1] in (30, 31, 32))
        model = run.pretrained.model
        texts, log_p = reinforce.draw(model, item, bench.prompts, 4, ends, torch.Generator().manual_seed(0))
        assert len(set(map(tuple, texts))) > 4
        assert {len(text) for text in texts} >= {0, 4}, "some end early, some are full"
        gradients = torch.autograd.grad(log_p.sum(), list(model.parameters()))
        wanted = torch.zeros(len(texts))
        keys = [key for key in reinforce._keys(item) for _ in range(4)]
        assert len(set(map(len, keys))) > 1, "there is padding"
        ended: list[int] = []
        for i, (key, text) in enumerate(zip(keys, texts, strict=True)):
            scores = model(torch.tensor([[*key, *text]])).logits[0, len(key) - 1 :].detach().log_softmax(-1)
            wanted[i] = sum(float(scores[place, token]) for place, token in enumerate(text))
            if len(text) < 4 and not (text and text[-1] in (30, 31, 32)):
                # Which of the ends it was is not told: the probability must be that of one.
                rest = [float(scores[len(text), token]) for token in ends.tokens]
                wanted[i] += min(rest, key=lambda value: abs(float(log_p.detach()[i] - wanted[i]) - value))
                ended.append(i)
        assert ended
        torch.testing.assert_close(log_p.detach(), wanted, atol=1e-4, rtol=0)
        assert all(gradient.abs().sum() > 0 for gradient in gradients), "through the prompts, too"


def test_remembered_prompts_change_nothing(studies: Any) -> None:
    runs = studies("reward_runs")
    with runs.opened("tiny", "two norms", {}) as bench, torch.no_grad():
        run = bench.run
        for _, p in runs.trainable(run):
            p += 0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        product = run.kind.writer(type("Bench", (), {"model": run.pretrained.model}))
        for item in run.split("train"):
            texts = [write(run.pretrained.model, item).payload for write in (bench.scorer.writer.forward, product)]
            assert torch.equal(*texts)
        logits = []
        tables: list[dict[tuple[int, ...], torch.Tensor] | None] = [{}, None]
        for known in tables:
            prompts = studies("reinforce").Prompts(run.pretrained.model, known)
            drawn = studies("reinforce").draw(
                run.pretrained.model, item, prompts, 2, studies("reinforce").Ends.of(run), torch.Generator()
            )
            logits.append(drawn[1])
        torch.testing.assert_close(*logits)


def test_rewards(
    tmp_path: Path, studies: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(studies("rewards"), "SEEDS", (0,))
    contenders = [c for c in studies("reward_runs").CONTENDERS if c.place == "two norms"]
    command = ["--tasks", "tiny", "--parts", "runs", "--out", str(tmp_path), "--only", *(c.label for c in contenders)]
    main_of("rewards", monkeypatch, *command)
    path = tmp_path / "rewards.jsonl"
    about, before, *runs = map(json.loads, path.read_text().splitlines())
    assert {"command", "commit", "machine", "date", "versions", "seeds"} <= about.keys()
    for contender in contenders:
        here = [run for run in runs if run["label"] == f"tiny, {contender.label}"]
        tried = {run["lr"]: run["scores"]["validation"] for run in here if run["seed"] == 3}
        final = [run for run in here if run["seed"] != 3]
        assert {run["seed"] for run in final} == {0}
        if contender.rates == (0.0,):  # lr: auto
            assert not tried, "nothing is chosen"
            assert final[0]["lr"] == 0.0
            assert final[0]["scores"]["validation"] > before["scores"]["validation"], "it learns"
            continue
        assert tried[final[0]["lr"]] == max(tried.values()), "validation chooses the rate"
        assert all("test" not in run["scores"] for run in here if run["seed"] == 3), "no test data"
        assert {run["texts"] for run in here} == {0 if contender.method == "supervised" else 4 * 32}
        assert max(tried.values()) > before["scores"]["validation"], "it learns"
    table = capsys.readouterr().out.split("### tiny")[1]
    assert "| MeZO, two norms |" in table
    before_again = path.read_bytes()
    main_of("rewards", monkeypatch, *command, "--report")
    assert capsys.readouterr().out.split("### tiny")[1] == table
    assert path.read_bytes() == before_again


def test_memory_of_a_contender(studies: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    study = studies("rewards")
    monkeypatch.setattr(study, "tune_malloc", lambda **_: None)  # not for this process
    monkeypatch.setattr(study, "ask_for_huge_pages", lambda: None)
    figures = study.peak_of("tiny", study.MEASURED[-1])
    assert figures["peak_gib"] > figures["weights_gib"]


def test_two_keywords() -> None:
    spec = importlib.util.spec_from_file_location("example_rewards", ROOT / "examples" / "rewards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    row = {"headline": "Ad sales 'boost' Time Warner profit"}
    worth = {
        "boost, profit": 1.0,
        "Sales, Time": 1.0,
        "sales, growth": 1 / 2,
        "sales, sales": 1 / 2,
        "sales": 1 / 2,
        "sales, Time, profit": 2 / 3,
        "sales, profit,": 1 / 2,
        "sales,profit": 0.0,
        "Time Warner, profit": 1 / 2,
        "money, growth": 0.0,
        "": 0.0,
    }
    assert {text: module.two_keywords(row, text) for text in worth} == worth
