"""Config files and command-line overrides: what is read, and the resolved config."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mezo_dist.algorithms import ALGORITHMS
from mezo_dist.algorithms.mezo import MeZO
from mezo_dist.algorithms.svrg import MeZOSVRG
from mezo_dist.config.kinds.classification import ClassificationTask, Label
from mezo_dist.config.reader import from_dict, from_settings, load
from mezo_dist.config.task import Split
from mezo_dist.errors import UserError
from tests.config.configs import CONFIG, TASK, Write, fault


def test_a_good_config_with_a_task_file_relative_to_it(write_config: Write) -> None:
    config = load(write_config())
    assert (config.model.name, config.task.name, config.train.steps) == ("some/model", "reviews", 20)
    assert isinstance(config.task, ClassificationTask)
    assert config.task.labels == (Label(0, "bad"), Label(1, "good"))
    assert config.train.micro_batch == 8  # not given: the default


@pytest.mark.parametrize("overrides", [["--train.steps=7"], ["train.steps=7"], ["--train.steps", "7"]])
def test_forms_of_an_override(write_config: Write, overrides: list[str]) -> None:
    config = load(write_config(), overrides)
    assert config.train == dataclasses.replace(load(write_config()).train, steps=7)


def test_the_last_of_several_overrides_counts(write_config: Write) -> None:
    assert load(write_config(), ["seed=1", "--seed=2", "--output.dir", "a=b"]).seed == 2
    assert load(write_config(), ["--output.dir", "a=b"]).output.dir == "a=b"


@pytest.mark.parametrize("number", ["5e-5", "5.0e-5", "0.00005", ".5e-4", "5E-5"])
def test_numbers_in_scientific_notation(write_config: Write, number: str) -> None:
    assert load(write_config(CONFIG.replace("5e-5", number))).algorithm.lr == 5e-5
    assert load(write_config(CONFIG.replace("5e-5", "1")), [f"algorithm.lr={number}"]).algorithm.lr == 5e-5


def test_a_rate_may_be_auto_in_a_file_and_on_the_command_line(write_config: Write) -> None:
    in_file = load(write_config(CONFIG.replace("5e-5", "auto, eta: 0.2")))
    assert (in_file.algorithm.lr, in_file.algorithm.eta) == ("auto", 0.2)  # type: ignore[union-attr]
    assert load(write_config(), ["algorithm.lr=auto", "algorithm.eta=0.2"]).digest() == in_file.digest()
    assert "algorithm.eta: is a setting of algorithm.lr: auto" in fault(write_config(), "algorithm.eta=0.2")


def test_a_config_that_gives_no_rate_means_auto(write_config: Write) -> None:
    path = write_config(CONFIG.replace(", lr: 5e-5", ""))
    assert load(path).algorithm == MeZO(lr="auto")
    assert load(path).digest() == load(path, ["algorithm.lr=auto"]).digest()
    assert load(path, ["--algorithm=mezo"]).algorithm.lr == "auto"
    assert from_settings(["model.name=m", f"task={path.parent}/tasks/reviews.yaml"]).algorithm.lr == "auto"
    assert MeZO().lr == 1e-6, "code knows nothing of its losses"


def test_two_rates_are_auto_together_or_not_at_all(write_config: Write) -> None:
    neither = write_config(CONFIG.replace("name: mezo, lr: 5e-5", "name: mezo-svrg"))
    rates: dict[tuple[str, ...], tuple[Any, Any]] = {
        (): ("auto", "auto"),
        ("algorithm.lr=0.1",): (0.1, 0.1),
        ("algorithm.anchor_lr=1e-1",): (0.1, 0.1),
        ("algorithm.lr=auto",): ("auto", "auto"),
        ("algorithm.anchor_lr=auto", "algorithm.lr=auto"): ("auto", "auto"),
        ("algorithm.anchor_lr=0.2", "algorithm.lr=0.1"): (0.1, 0.2),
    }
    for options, (lr, anchor_lr) in rates.items():
        assert load(neither, options).algorithm == MeZOSVRG(lr=lr, anchor_lr=anchor_lr)
    assert "; give numbers (a config that gives none means auto)" in fault(neither, "algorithm.weight_decay=0.1")
    message = "or write lr: auto and anchor_lr: auto"
    assert message in fault(neither, "algorithm.lr=0.1", "algorithm.eta=0.1")
    one = write_config(CONFIG.replace("name: mezo, lr: 5e-5", "name: mezo-svrg, anchor_lr: 0.1"))
    assert load(one).algorithm == MeZOSVRG(lr=0.1, anchor_lr=0.1)
    assert load(one, ["algorithm.anchor_lr=auto"]).algorithm == MeZOSVRG(lr="auto", anchor_lr="auto")
    assert "algorithm.lr: auto, but algorithm.anchor_lr is 0.1; write both as auto" in fault(one, "algorithm.lr=auto")


def test_where_auto_does_not_do_a_rate_must_be_given(write_config: Write) -> None:
    path = write_config(CONFIG.replace(", lr: 5e-5", ""))
    for option, reason in {
        "algorithm.scaling=sign": "does not go together with algorithm.scaling",
        "algorithm.weight_decay=0.1": "does not go together with algorithm.weight_decay",
    }.items():
        message = fault(path, option)
        assert f"algorithm.lr: auto {reason}" in message
        assert "; give a number (a config that gives none means auto)" in message
        assert load(path, [option, "algorithm.lr=0.01"]).algorithm.lr == 0.01


def test_text_that_looks_like_something_else_stays_text(write_config: Write) -> None:
    assert load(write_config(), ["--model.revision=12"]).model.revision == "12"
    assert load(write_config(CONFIG.replace("some/model", '"007"'))).model.name == "007"
    task = load(write_config(task=TASK.replace("0, word: bad", '"00", word: "no"'))).task
    assert isinstance(task, ClassificationTask)
    assert task.labels[0] == Label("00", "no")
    assert load(write_config(), ["--model.revision=null"]).model.revision is None
    assert load(write_config(), ["--model.name=null"]).model.name == "null"


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "2024-01-01", "1:30", "1_000", "0x10", "=", "<<"])
def test_words_that_yaml_1_1_takes_for_something_else_are_text(write_config: Write, word: str) -> None:
    assert load(write_config(task=TASK.replace("word: bad", f"word: {word}"))).task.words == [word, "good"]


def test_a_number_may_stand_for_another_kind_of_number_only_where_nothing_is_lost(write_config: Write) -> None:
    config = load(write_config(CONFIG.replace("5e-5", "1")))
    assert type(config.algorithm.lr) is float
    assert fault(write_config(), "train.steps=10.0").startswith("command line: train.steps: must be a whole number")
    assert fault(write_config(), "algorithm.lr='1'").startswith("command line: algorithm.lr: must be a number")
    assert fault(write_config(), "train.steps=true").startswith("command line: train.steps: must be a whole number")


@given(st.floats(min_value=5e-324, allow_infinity=False), st.integers(-(2**63) + 1, 2**63 - 1))
def test_numbers_keep_every_bit(lr: float, seed: int) -> None:
    data = {"model": {"name": "m"}, "task": yaml.safe_load(TASK), "algorithm": {"name": "mezo", "lr": lr}, "seed": seed}
    config = from_dict(data, "here")
    assert (config.algorithm.lr, config.seed) == (lr, seed)


def test_a_section_given_in_part_keeps_the_defaults_that_it_has_there(write_config: Write) -> None:
    """The plateau rule is off in mezo by default, and the validation split has a source of its own."""
    config = load(write_config(), ["algorithm.annealing.threshold=2", "task.splits.validation.size=5"])
    assert isinstance(config.algorithm, MeZO)
    assert config.algorithm.annealing.divisor == 1
    assert config.task.splits.validation == Split("validation", 5)


def test_an_override_may_name_another_task_file_relative_to_the_current_folder(
    write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/other.yaml").write_text(TASK.replace("reviews", "other"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = write_config(task=TASK + "subset: only-in-the-first\n")
    config = load(path, ["task=other.yaml", "task.label=stars"])
    assert isinstance(config.task, ClassificationTask)
    assert (config.task.name, config.task.subset, config.task.label) == ("other", None, "stars")


def test_an_override_may_fill_in_what_the_file_lacks(write_config: Write) -> None:
    assert load(
        write_config(CONFIG.replace("some/model", "x").replace("model: {name: x}", "")), ["model.name=y"]
    ).model.name


# The algorithm's settings depend on its name


def test_the_name_picks_the_settings(write_config: Write) -> None:
    assert load(write_config(CONFIG.replace("mezo,", "mezo-svrg, q: 5,"))).algorithm == MeZOSVRG(lr=5e-5, q=5)
    assert "algorithm.q is a setting of mezo-svrg and mezo-svrg-released, not of mezo" in fault(
        write_config(CONFIG.replace("mezo,", "mezo, q: 5,"))
    )


def test_an_override_of_the_name_keeps_settings_that_both_have(write_config: Write) -> None:
    config = load(write_config(), ["algorithm.name=mezo-svrg", "algorithm.q=3"])
    assert config.algorithm == MeZOSVRG(lr=5e-5, q=3)


def test_an_override_of_the_name_to_one_that_does_not_fit_the_file(write_config: Write) -> None:
    path = write_config(CONFIG.replace("mezo,", "mezo-svrg, anchor_lr: 1e-3,"))
    expected = "run.yaml: algorithm.anchor_lr is a setting of mezo-svrg and mezo-svrg-released, not of mezo"
    message = fault(path, "--algorithm.name=mezo")
    assert message.startswith(expected)
    assert "--algorithm='{name: mezo, lr: ...}' takes the place of the whole section" in message


def test_another_algorithm_takes_the_place_of_the_whole_section(write_config: Write) -> None:
    path = write_config(CONFIG.replace("mezo,", "mezo-svrg, anchor_lr: 1e-3,"))
    assert load(path, ["--algorithm={name: mezo, lr: 0.25}"]).algorithm == MeZO(lr=0.25)
    assert load(path, ["--algorithm", "mezo", "--algorithm.lr=0.5"]).algorithm == MeZO(lr=0.5)
    expected = "command line: algorithm.q is a setting of mezo-svrg and mezo-svrg-released, not of mezo"
    assert fault(path, "--algorithm={name: mezo, lr: 1, q: 2}").startswith(expected)
    assert fault(path, "--algorithm=[1]").startswith("command line: algorithm.name: [1] does not exist")


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("algorithm: {lr: 1}", "run.yaml: algorithm.name: missing; choose one of adamw, mezo, mezo-svrg"),
        ("", "run.yaml: algorithm.name: missing; choose one of adamw, mezo, mezo-svrg"),
        ("algorithm: {name: mezzo}", "run.yaml: algorithm.name: 'mezzo' does not exist; choose one of adamw, mezo,"),
        ("algorithm: {name: [mezo]}", "run.yaml: algorithm.name: ['mezo'] does not exist"),
        ("algorithm: mezo", "run.yaml: algorithm: must hold settings (name, lr, eta,"),
    ],
)
def test_no_such_algorithm(write_config: Write, section: str, expected: str) -> None:
    assert fault(write_config(CONFIG.replace("algorithm: {name: mezo, lr: 5e-5}", section))).startswith(expected)


# The resolved config


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_resolved_config_reads_back_equal(write_config: Write, algorithm: str) -> None:
    overrides = ["train.full_size=8", "train.max_tokens=9", "model.compute=bfloat16", "algorithm.annealing.window=4"]
    labels = "task.labels=[{value: '01', word: 'yes'}, {value: 1, word: '2'}]"
    config = load(write_config(), [f"algorithm.name={algorithm}", *overrides, labels, "seed=5"])
    again = load(write_config(yaml.safe_dump(config.to_dict(), sort_keys=False)))
    assert again == config
    assert again.digest() == config.digest()
    assert from_dict(config.to_dict(), "test") == config
    assert not [name for name, value in leaves(config.to_dict()) if isinstance(value, tuple)]


def leaves(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_the_digest_ignores_where_results_go_and_nothing_else(write_config: Write) -> None:
    path = write_config()
    config = load(path)
    same = load(path, ["output.dir=x", "output.export=false", "output.if_exists=new", "distributed.timeout_s=5"])
    assert same.digest() == config.digest()
    for change in (
        "seed=1",
        "train.steps=21",
        "task.splits.seed=1",
        "algorithm.lr=6e-5",
        "model.name=other",
        "direction_rank=2",
    ):
        assert load(path, [change]).digest() != config.digest(), change


def test_a_resolved_config_of_another_version_is_refused(write_config: Write) -> None:
    data = load(write_config()).to_dict()
    data["train"]["of_the_future"] = 1
    with pytest.raises(UserError, match=r"runs/run: unknown setting .train\.of_the_future."):
        from_dict(data, "runs/run")
