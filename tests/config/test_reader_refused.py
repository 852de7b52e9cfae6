"""Configs that are refused, with messages that name setting, source and fix."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from mezo_dist.config.reader import load
from mezo_dist.errors import UserError
from tests.config.configs import CONFIG, TASK, Write, fault

# Unknown settings


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("seeed: 3", "run.yaml: unknown setting 'seeed'; did you mean 'seed'?"),
        ("trian: {steps: 3}", "run.yaml: unknown setting 'trian'; did you mean 'train'?"),
        ("batch_size: 3", "run.yaml: unknown setting 'batch_size'; did you mean 'train.batch_size'?"),
        ("output: {dirr: x}", "run.yaml: unknown setting 'output.dirr'; did you mean 'output.dir'?"),
        ("output: {seed: 1}", "run.yaml: unknown setting 'output.seed'; did you mean 'seed'?"),
        ("output: {xyz: 1}", "run.yaml: unknown setting 'output.xyz'; there are output.dir, output.if_exists, "),
        ("xyz: 1", "run.yaml: unknown setting 'xyz'; there are model, task, algorithm, "),
    ],
)
def test_unknown_settings_in_the_file(write_config: Write, more: str, expected: str) -> None:
    assert fault(write_config(CONFIG + more)).startswith(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--seeed=3", "command line: unknown setting 'seeed'; did you mean 'seed'?"),
        ("trian.steps=3", "command line: unknown setting 'trian.steps'; did you mean 'train.steps'?"),
        ("train.step=3", "command line: unknown setting 'train.step'; did you mean 'train.steps'?"),
        ("task.splits.train.sise=3", "command line: unknown setting 'task.splits.train.sise'; did you mean"),
        ("algorithm.schedule.knid=3", "command line: unknown setting 'algorithm.schedule.knid'; did you mean"),
        ("--config=x", "command line: unknown setting 'config'"),
        ("--print_config=x", "command line: unknown setting 'print_config'"),
        ("--task.labels.help=x", "command line: unknown setting 'task.labels.help'"),
        ("train={steps: 3}", "command line: train is a group of settings; give them one by one"),
        ("--seed", "command line: '--seed' is no setting with a value, as in --train.steps=10"),
        ("seed", "command line: 'seed' is no setting with a value, as in --train.steps=10"),
    ],
)
def test_unknown_settings_on_the_command_line(write_config: Write, override: str, expected: str) -> None:
    assert fault(write_config(), override).startswith(expected)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("prompt:", "promt:", "unknown setting 'task.promt'; did you mean 'task.prompt'?"),
        ("name:", "metrics: f1\nname:", "unknown setting 'task.metrics'; did you mean 'task.metric'?"),
        ("name:", "splits: {tset: {}}\nname:", "unknown setting 'task.splits.tset'; did you mean 'task.splits.test'?"),
        ("word: good", "wrod: good", "task.labels: must be a list of {value: text or a whole number, word: text}; "),
    ],
)
def test_unknown_settings_in_the_task_file(write_config: Write, old: str, new: str, expected: str) -> None:
    assert fault(write_config(task=TASK.replace(old, new, 1))).startswith(f"tasks/reviews.yaml: {expected}")


def test_a_setting_given_twice(write_config: Write) -> None:
    assert fault(write_config(CONFIG + "seed: 1\nseed: 2\n")) == (
        "config file run.yaml: 'seed' is set twice, in line 5 and in line 6"
    )
    assert "'word' is set twice" in fault(write_config(task=TASK.replace("word: bad", "word: bad, word: worse")))


# Values


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=many", "train.steps: must be a whole number, not many"),
        ("train.steps=1.5", "train.steps: must be a whole number, not 1.5"),
        ("train.steps=", "train.steps: must be a whole number, not "),
        ("train.steps=null", "train.steps: must be a whole number, not "),
        ("train.max_tokens=few", "train.max_tokens: must be a whole number or null, not few"),
        ("algorithm.lr=fast", "algorithm.lr: must be a number, not fast"),
        ("output.export=maybe", "output.export: must be true or false, not maybe"),
        ("model.head=tail", "model.head: must be label-words or classifier, not tail"),
        ("model.weights=float16", "model.weights: must be float32 or bfloat16, not float16"),
        ("task.plain=text", "task.plain: must be a list of text, not text"),
        ("task.labels=[{value: 0, word: no}, {value: 1, word: yes}]", "task.labels: must be a list of "),
        ("task.labels=[{value: 0}]", "task.labels: must be a list of {value: text or a whole number, word: text}; "),
    ],
)
def test_wrong_types(write_config: Write, override: str, expected: str) -> None:
    assert fault(write_config(), override).startswith(f"command line: {expected}")
    section, _, rest = override.partition(".")
    name, _, value = rest.partition("=")
    data = yaml.safe_load(CONFIG) | {"task": yaml.safe_load(TASK)}
    data["algorithm"]["lr"] = 5e-5
    data[section] = {**data.get(section, {}), name: yaml.safe_load(value)}
    assert fault(write_config(yaml.safe_dump(data))).startswith(f"run.yaml: {expected.rstrip()}")


def test_label_words_that_yaml_takes_for_booleans(write_config: Write) -> None:
    message = fault(write_config(task=TASK.replace("word: bad", "word: no")))
    assert "word is False (quote yes, no, on, off: YAML reads true, false)" in message


@pytest.mark.parametrize("value", ["3", "[a]", "", "text"])
def test_a_value_where_a_section_should_be(write_config: Write, value: str) -> None:
    message = fault(write_config(re.sub("train: .*", f"train: {value}", CONFIG)))
    assert message.startswith("run.yaml: train: must hold settings (steps, batch_size, ")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.steps=0"], "train.steps: must be at least 1"),
        (["train.batch_size=0"], "train.batch_size: must be at least 1"),
        (["train.micro_batch=-1"], "train.micro_batch: must be at least 1"),
        (["train.width=0"], "train.width: must be at least 1"),
        (["train.max_skipped=0"], "train.max_skipped: must be at least 1"),
        (["train.max_tokens=0"], "train.max_tokens: must be at least 1"),
        (["train.evaluate_every=-1"], "train.evaluate_every: must be at least 0"),
        (["train.full_size=3"], "train.full_size: 3 is less than train.batch_size 4"),
        (["direction_rank=0"], "rank: must be at least 1"),
        (["distributed.timeout_s=0"], "distributed.timeout_s: must lie between 0 and"),
        (["distributed.timeout_s=.nan"], "distributed.timeout_s: must lie between 0 and"),
        (["distributed.timeout_s=.inf"], "distributed.timeout_s: must lie between 0 and"),
        (["algorithm.lr=-1"], "algorithm.lr: must be above 0"),
        (["algorithm.lr=.nan"], "algorithm.lr: must be above 0"),
        (["algorithm.eps=.inf"], "algorithm.eps: must be above 0"),
        (["algorithm.schedule.final=2"], "algorithm.schedule: warmup_steps must be at least 0, and final must lie"),
        (["algorithm.annealing.divisor=0"], "algorithm.annealing: divisor and window must be at least 1"),
        (["algorithm.per_sample=true"], "algorithm.per_sample: a direction per sample needs law: lowrank"),
        (
            ["algorithm.per_sample=true", "law=lowrank", "train.calibrate=true"],
            "train.calibrate: needs directions that all samples of a batch share; set algorithm.per_sample to false",
        ),
        (["model.head=classifier"], "task.plain: missing; model.head: classifier needs a text without prompt"),
        (["model.head=classifier", "task.plain=['{{ text }}']", "model.kind=masked"], "model.kind: masked is for"),
        (["task.splits.test.size=0"], "task.splits: size must be at least 1 or null, not 0"),
        (["task.labels=[{value: 0, word: a}]"], "task.labels: a classification task needs at least two labels"),
        (["task.labels=[{value: 0, word: a}, {value: 1, word: a}]"], "task.labels: two labels have the same word"),
        (["task.labels=[{value: 0, word: a}, {value: '0', word: b}]"], "task.labels: two labels have the same value"),
        (["task.prompt={{ text }}"], "task.prompt: must contain {{ answer }}"),
        (["task.plain=[a, b, c]"], "task.plain: give one template, or two for a pair of texts"),
        (
            ["task.metric=f1", "task.labels=[{value: 0, word: a}, {value: 1, word: b}, {value: 2, word: c}]"],
            "task.metric: f1 is for two classes, this task has 3; use macro-f1",
        ),
    ],
)
def test_values_out_of_range_and_contradictions(write_config: Write, overrides: list[str], expected: str) -> None:
    message = fault(write_config(), *overrides)
    assert expected in message
    assert message.endswith("`mezo-dist train --help` lists every setting")


# Files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "config file run.yaml is empty; it must hold settings, as in configs/quickstart.yaml"),
        ("# nothing here\n", "config file run.yaml is empty"),
        ("just words", "config file run.yaml holds 'just words'; it must hold settings"),
        ("- a\n- b\n", "config file run.yaml holds ['a', 'b']; it must hold settings"),
        ("a: [b\nc: {", "config file run.yaml is not YAML: "),
        ("a:\n\tb: 1", "config file run.yaml is not YAML: "),
        ("a: \x07", "config file run.yaml is not YAML: "),
        (CONFIG.replace("{name: some/model}", "{}"), "run.yaml: missing settings: model.name"),
        (CONFIG.replace("task: tasks/reviews.yaml", ""), "run.yaml: missing settings: task.name, task.data, "),
        (CONFIG.replace("reviews", "nowhere"), "task file tasks/nowhere.yaml does not exist"),
    ],
)
def test_bad_files(write_config: Write, text: str, expected: str) -> None:
    assert fault(write_config(text)).startswith(expected)


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("", "task file tasks/reviews.yaml is empty"),
        ("a: [b\nc: {", "task file tasks/reviews.yaml is not YAML: "),
        ("name: reviews", "run.yaml: missing settings: task.data, task.prompt, task.labels"),
    ],
)
def test_bad_task_files(write_config: Write, task: str, expected: str) -> None:
    assert fault(write_config(task=task)).startswith(expected)


def test_a_missing_config_file_and_one_that_is_no_text(tmp_path: Path) -> None:
    assert fault(tmp_path / "run.yaml").startswith("config file run.yaml does not exist")
    assert fault(tmp_path / "a/run.yaml").startswith("config file run.yaml does not exist")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    assert fault(tmp_path / "binary").startswith("config file binary is not YAML: ")


def test_a_folder_for_a_config_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config file .* does not exist"):
        load(tmp_path)
