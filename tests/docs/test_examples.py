"""The examples run, and do what they say."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path

import pytest

from mezo_dist.config import reader
from tests.forked import ROOT, output_of


def run(*arguments: str) -> str:
    return output_of(arguments, environment={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def test_estimator_quality(tmp_path: Path) -> None:
    labels = ["MeZO", "MeZO, 16 directions", "MeZO-SVRG, q = 2"]
    run("examples/studies/estimator_quality.py", "--estimates", "8", "--out", str(tmp_path), "--only", *labels)
    result = json.loads((tmp_path / "estimator_quality-small-1.25.json").read_text())
    rows = {row["label"]: row for row in result["rows"]}
    assert rows.keys() == set(labels)
    for row in rows.values():
        assert row["passes_per_step"] == 160
        assert 0.05 * result["weights"] < row["error"] < 20 * result["weights"], "about as many as there are weights"
    svrg = rows["MeZO-SVRG, q = 2"]
    assert 1.8 < svrg["run_error"] / svrg["best_error"] < 2.2, "both steps of a cycle err alike"
    assert (tmp_path / "estimator_quality-small-1.25.png").stat().st_size > 1000


def test_class_bias(tmp_path: Path) -> None:
    effort = ["--batches", "25", "--power-steps", "6"]
    run("examples/studies/class_bias.py", "--preset", "small", *effort, "--out", str(tmp_path))
    plain, calibrated = json.loads((tmp_path / "class_bias.json").read_text())["rows"]
    assert (plain["calibrated"], calibrated["calibrated"]) == (False, True)
    assert plain["spread"] / 16 * 0.5 < plain["batch"] < plain["spread"] / 16 * 1.5, "batches average it out"
    assert calibrated["batch"] < plain["batch"]
    assert calibrated["curvature"] < plain["curvature"]


def test_learning_curves(tmp_path: Path) -> None:
    labels = {"prompts": ["AdamW", "MeZO, batch 4, calibrated"], "head": ["AdamW", "MeZO-SVRG, per sample"]}
    command = ["examples/studies/learning_curves.py", "--preset", "smoke", "--out", str(tmp_path), "--settings"]
    for setting, some in labels.items():
        run(*command, setting, "--only", *some)
    files = {setting: tmp_path / f"learning_curves-smoke-{setting}-tiny.jsonl" for setting in labels}
    for setting, path in files.items():
        about, *runs = map(json.loads, path.read_text().splitlines())
        assert {"command", "commit", "machine", "date", "versions", "seeds"} <= about.keys()
        for label in labels[setting]:
            tried = {r["lr"]: r for r in runs if r["label"] == label and r["seed"] == 0}
            (final,) = (r for r in runs if r["label"] == label and r["seed"] == 1)
            accuracy = {lr: r["points"][-1][3] for lr, r in tried.items()}
            assert accuracy[final["lr"]] == max(accuracy.values()), "validation chooses the rate"
            assert abs(final["points"][-1][0] - 384) < 64, "all spend the same"
            assert final["points"][0][0] == 0
            assert final["points"][-1][2] != final["points"][0][2], "it moved"
        adamw = [r["points"] for r in runs if r["label"] == "AdamW"]
        assert min(points[-1][4] for points in adamw) < adamw[0][0][4], "it learns"
    before = {path: path.read_text() for path in files.values()}
    assert "| AdamW |" in run(*command, "head", "--only", *labels["head"])
    assert before == {path: path.read_text() for path in files.values()}, "nothing is run twice"
    assert (tmp_path / "learning_curves-smoke-head.png").stat().st_size > 1000

    run("examples/studies/offsets_at_prediction.py", "--preset", "smoke", "--out", str(tmp_path), "--only", "AdamW")
    _, again = map(json.loads, (tmp_path / "offsets_at_prediction.jsonl").read_text().splitlines())
    assert again["plain"][1] == again["stored"], "the run is the one that is stored"
    assert again["offsets"] != again["plain"]


def test_auto_rate(tmp_path: Path) -> None:
    command = ["examples/studies/auto_rate.py", "--tasks", "tiny", "--kinds", "norms", "--out", str(tmp_path)]
    table = run(*command)
    about, *runs = map(json.loads, (tmp_path / "auto_rate-look_back.jsonl").read_text().splitlines())
    assert {"command", "commit", "machine", "date", "versions", "seeds"} <= about.keys()
    auto = [row for row in runs if row["label"] == "norms, tiny, auto"]
    assert {row["seed"] for row in auto} == {1, 2, 3}, "nothing is chosen for it"
    assert all(len(row["rates"]) == 3 and min(row["rates"]) > 0 and row["steps"] == 4 for row in auto)
    tuned = [row for row in runs if row["label"] == "norms, tiny, tuned"]
    tried = {row["lr"]: (row["points"][-1][3], -row["points"][-1][2]) for row in tuned if row["seed"] == 0}
    best = max(tried, key=lambda lr: tried[lr])
    assert {row["lr"] for row in tuned if row["seed"]} == {best}, "validation chooses the rate"
    assert f"| norms, tiny | {best:g} |" in table
    assert table.endswith(run(*command, "--report")), "what is there is summed up"


def test_auto_eps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    main_of("auto_eps", monkeypatch, "--kinds", "tiny", "--batches", "2", "--out", str(tmp_path))
    about, *batches = map(json.loads, (tmp_path / "auto_eps.jsonl").read_text().splitlines())
    assert {"command", "commit", "machine", "date", "versions", "seeds"} <= about.keys()
    assert len(batches) == 2
    for batch in batches:
        errors = batch["two-sided"]["errors"]
        assert errors[0] < 0.02, "projected gradients are those of back-propagation"
        assert errors[0] < 0.1 * errors[-1]
        assert {batch["two-sided"]["eps"], batch["one-sided"]["eps"]} <= {1e-3, 2e-3}
        assert errors[0] < batch["one-sided"]["errors"][0]
    assert "| tiny, two-sided |" in capsys.readouterr().out


def test_untouched_samples_are_those_that_no_study_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "studies"))
    study = importlib.import_module("auto_rate")
    sizes = {"movie-sentences": 10041, "tweets": 3362, "bbc-news": 2127, "r8": 2189}
    sizes |= {"product-sentences": 2935, "editorial-sentences": 2751}
    assert study.UNTOUCHED.keys() == sizes.keys()
    for task, place in study.UNTOUCHED.items():
        start, stop, _ = place.indices(sizes[task])
        seen = 1000 if task == "r8" else 512 + 256 + 1000
        assert start >= seen, task
        assert stop <= sizes[task] - (1000 if task == "movie-sentences" else 0), task


def main_of(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """A study in this process, as imports take longer than all that it does."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "studies"))
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    study = importlib.import_module(name)
    for setting, value in {"BATCHES_TO_LOOK_AT": 40, "BATCHES": 8, "CURVATURES": 2, "STEPS": 8}.items():
        if hasattr(study, setting):
            monkeypatch.setattr(study, setting, value)
    study.main()


@pytest.mark.parametrize(("setting", "name"), [("prompts", "untouched-smoke"), ("head", "untouched-smoke-head")])
def test_untouched(
    setting: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    label = "MeZO, batch 4, calibrated"
    command = ["--preset", "smoke", "--out", str(tmp_path), "--only", label]
    main_of("learning_curves", monkeypatch, *command, "--settings", setting)
    path = tmp_path / f"learning_curves-smoke-{setting}-tiny.jsonl"
    (stored,) = (row for row in map(json.loads, path.read_text().splitlines()) if row.get("seed") == 1)
    command += ["--setting", setting]
    untouched = importlib.import_module("untouched")
    monkeypatch.setitem(untouched.UNTOUCHED, "tiny", slice(5, 12))
    main_of("untouched", monkeypatch, *command)
    about, *before, row = map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())
    assert {"command", "commit", "machine", "date", "versions", "seeds"} <= about.keys()
    assert [other["label"] for other in before] == ["before, tiny", "before, calibrated, tiny"]
    assert (row["lr"], row["same"], row["validation"]) == (stored["lr"], True, stored["points"][-1][2:4])
    assert row["untouched"][0] != stored["points"][-1][4], "other samples"
    assert abs(7 * row["untouched"][1] - round(7 * row["untouched"][1])) < 1e-3, "seven of them"
    assert row["passes"] == stored["points"][-1][0] + 48, "passes that fit offsets count"
    assert f"| {label} | {100 * row['untouched'][1]:.1f} |" in capsys.readouterr().out

    path.write_text(path.read_text().replace(str(row["validation"][0]), "0.1"))
    (tmp_path / f"{name}.jsonl").unlink()
    main_of("untouched", monkeypatch, *command)
    assert "0 of 1 runs" in capsys.readouterr().out, "a run that is another one is told"
    path.unlink()
    with pytest.raises(ValueError, match=r"no run of .* let learning_curves.py make it first"):
        main_of("untouched", monkeypatch, *command)


def test_where_svrg_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--tasks", "tiny", "--samples", "16", "--out", str(tmp_path)]
    main_of("where_svrg_pays", monkeypatch, *command)
    about, *runs = map(json.loads, (tmp_path / "where_svrg_pays.jsonl").read_text().splitlines())
    assert {"command", "commit", "machine", "date", "versions", "seeds"} <= about.keys()
    for name in ("MeZO", "MeZO-SVRG"):
        here = [row for row in runs if row["label"] == f"tiny, 16, {name}"]
        tried = {row["lr"]: row["points"][-1][2] for row in here if row["seed"] == 0}
        assert {row["lr"] for row in here if row["seed"]} == {min(tried, key=lambda lr: tried[lr])}, (
            "the best by losses"
        )
        assert all(abs(row["points"][-1][0] - 512) < 200 for row in here), "all spend the same"
    (watched,) = (row for row in runs if len(row["points"][0]) == 7)
    assert 4 < watched["points"][0][-1] < 4000, "single samples' gradients differ more than batches'"
    assert capsys.readouterr().out.splitlines()[-1].startswith("| tiny | 16 |")
    assert (tmp_path / "where_svrg_pays.png").stat().st_size > 1000


def test_paper_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["MeZO-SVRG, lr: auto", "SGD"]
    command = ["--preset", "tiny", "--out", str(tmp_path), "--only", *labels]
    main_of("paper_table", monkeypatch, *command)
    about, *runs = map(json.loads, (tmp_path / "paper_table-tiny-head-tiny.jsonl").read_text().splitlines())
    assert {"command", "commit", "machine", "date", "versions", "seeds"} <= about.keys()
    (final,) = (row for row in runs if row["seed"] and row["label"] == "SGD")
    tried = {row["lr"]: row["points"][-1] for row in runs if row["label"] == "SGD" and not row["seed"]}
    assert max(tried, key=lambda lr: (tried[lr][3], -tried[lr][2])) == final["lr"], "validation chooses the rate"
    assert final["points"][-1][4] < final["points"][0][4], "it learns"
    (auto,) = (row for row in runs if row["label"] == labels[0])
    assert auto["lr"] == 0
    assert min(auto["rates"]) > 0
    assert all(abs(row["points"][-1][0] - 768) < 100 for row in runs), "all spend the same"
    capsys.readouterr()
    main_of("paper_table", monkeypatch, *command, "--report")
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]] == [
        "| before",
        *(f"| {label}" for label in labels),
    ]
    assert (tmp_path / "paper_table-tiny.png").stat().st_size > 1000


def test_the_paper_table_has_settings_for_the_papers_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "studies"))
    paper_table = importlib.import_module("paper_table")
    gpu = paper_table.PRESETS["gpu"]
    for model in paper_table.PAPERS_MODELS:
        for task in gpu.tasks.values():
            config = reader.load(
                ROOT / "configs/quickstart.yaml", [f"task={ROOT / task}", *gpu.settings[model].overrides]
            )
            assert (config.model.name, config.model.trainable, config.train.max_tokens) == (model, ("*",), 128)
            config.task.check_head("classifier")
    mezo = paper_table.contenders(gpu, 512)[0]
    steps = {m: mezo.steps(gpu.budget * gpu.shares[m, "sst2"]) for m in paper_table.PAPERS_MODELS}
    assert steps == paper_table.PAPERS_MODELS


def test_what_a_pass_buys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--tasks", "tiny", "--kinds", "prompt: two norms", "--out", str(tmp_path)]
    main_of("what_a_pass_buys", monkeypatch, *command)
    _, row = map(json.loads, (tmp_path / "what_a_pass_buys.jsonl").read_text().splitlines())
    assert row["rate"] == pytest.approx(7 / row["curvature"] / (1 + row["noise"]), rel=0.06)
    assert row["predicted"] > 0
    assert len(row["falls"]) == 3
    main_of("what_a_pass_buys", monkeypatch, *command, "--report")
    assert capsys.readouterr().out.splitlines()[-1].startswith("| prompt: two norms | tiny |")


def test_passes_that_fit_offsets_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "studies"))
    curve_report = importlib.import_module("curve_report")

    def record(label: str, **more: int) -> str:
        points = [[done, 0.1 * done, 1.0, done / 1000, 1.0, done / 1000] for done in (0, 96, 192, 384)]
        return json.dumps({"kind": "run", "label": label, "lr": 0.1, "seed": 1, "points": points, **more})

    runs = [record("MeZO, batch 4"), record("new, calibrated", fitting=48), record("old, calibrated")]
    (tmp_path / "learning_curves-smoke-prompts-tiny.jsonl").write_text("\n".join(runs) + "\n")
    lines = curve_report.report(tmp_path, "smoke").splitlines()
    assert "| new, calibrated | 0.0 ± 0.0 | 38.4 ± 0.0 |" in lines, "96 and 48 passes are more than a quarter of 384"
    assert "| MeZO, batch 4 | 9.6 ± 0.0 | 38.4 ± 0.0 |" in lines
    needed = lines[lines.index("|  | tiny: 38.4 |") :]
    assert {"| MeZO, batch 4 | 384 |", "| new, calibrated | 432 |", "| old, calibrated | 896 |"} <= set(needed)


def test_quickstart_rate(tmp_path: Path) -> None:
    command = ["examples/studies/quickstart_rate.py", "train.steps=2", "--config", "tiny", "--held-out", "8"]
    output = run(*command, "--out", str(tmp_path), "--rates", "0.001", "0.01", "0.1")
    about, *rows = map(json.loads, (tmp_path / "quickstart_rate.jsonl").read_text().splitlines())
    assert {"command", "commit", "machine", "date", "versions", "seeds"} <= about.keys()
    choice = re.search(r"validation chose (\S+)", output)
    assert choice, output
    accuracies: dict[float, list[float]] = {}
    for row in rows:
        if row["label"] == "tiny, to choose":
            assert row["scores"].keys() == {"validation"}, "nothing else is looked at before the rate is chosen"
            accuracies.setdefault(row["lr"], []).append(row["scores"]["validation"][1])
    assert sum(accuracies[float(choice[1])]) == max(map(sum, accuracies.values()))
    chosen = {row["seed"] for row in rows if row["label"] == "tiny, chosen" and row["lr"] == float(choice[1])}
    assert chosen == {0, 1, 2}
    assert {row["seed"] for row in rows if row["label"] == "tiny, auto"} == {0, 1, 2}


def test_recipes(tmp_path: Path) -> None:
    command = ["examples/studies/recipes.py", "tiny", "--out", str(tmp_path), "--set", "train.steps=2"]
    output = run(*command)
    about, before, *rows = map(json.loads, (tmp_path / "recipes.jsonl").read_text().splitlines())
    assert {"command", "commit", "machine", "date", "versions", "seeds"} <= about.keys()
    assert (before["steps"], before["lr"]) == (0, 0.0)
    tried = {row["lr"]: row["scores"]["validation"] for row in rows if row["label"] == "tiny, to choose"}
    best = max(tried, key=lambda lr: (tried[lr]["accuracy"], -tried[lr]["loss"]))
    chosen = [row for row in rows if row["label"] == "tiny, chosen"]
    assert [(row["lr"], row["seed"]) for row in chosen] == [(best, seed) for seed in (0, 1, 2)]
    assert all(row["scores"].keys() == {"test"} for row in chosen)
    assert f"validation chose {best:g}" in output
    auto = [(row["lr"], row["seed"], row["steps"]) for row in rows if row["label"] == "tiny, auto"]
    assert auto == [(0.0, seed, 2) for seed in (0, 1, 2)]
    alone = run(*command[:-2], "--auto-alone", *command[-2:])
    assert "tiny, auto: test" in alone
    assert "validation chose" not in alone
    before_again = (tmp_path / "recipes.jsonl").read_bytes()
    run(*command)
    assert (tmp_path / "recipes.jsonl").read_bytes() == before_again, "nothing is run twice"


@pytest.mark.parametrize("options", [[], ["--processes", "2"]], ids=["in one process", "in two more"])
def test_minimize(options: list[str]) -> None:
    output = run("examples/minimize.py", "--steps", "12", *options)
    shares_down = re.search(r"down for ([\d.]+)% before, ([\d.]+)% after", output)
    assert shares_down, output
    assert float(shares_down[1]) > 90
    assert float(shares_down[2]) < 20
