"""Configs that are refused, with messages that name setting, source and fix."""

from __future__ import annotations

import json
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
        (
            "word: good",
            "wrod: good",
            "task.labels: must be a list of {value: true or false or a whole number or text, word: text}; ",
        ),
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
        ("algorithm.lr=fast", "algorithm.lr: must be a number or auto, not fast"),
        ("algorithm.lr='\"0.1\"'", 'algorithm.lr: must be a number or auto, not "0.1"'),
        ("output.export=maybe", "output.export: must be true or false, not maybe"),
        ("model.head=tail", "model.head: must be label-words or classifier, not tail"),
        ("model.weights=float16", "model.weights: must be float32 or bfloat16, not float16"),
        ("task.plain=text", "task.plain: must be a list of text, not text"),
        ("task.labels=[{value: 0, word: true}, {value: 1, word: '1'}]", "task.labels: must be a list of "),
        (
            "task.labels=[{value: 0}]",
            "task.labels: must be a list of {value: true or false or a whole number or text, word: text}; ",
        ),
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


def test_the_place_inside_a_list_is_named(write_config: Write) -> None:
    kind = "task.labels: must be a list of {value: true or false or a whole number or text, word: text}"
    for old, new, expected in [
        ("word: good", "word: false", "[1].word is false"),
        ("value: 0", "value: 1.5", "[0].value is 1.5"),
        ("word: good", "wrod: good", "[1].wrod is unknown"),
        (", word: good", "", "[1].word is missing"),
        ("word: good", "word: good, weight: 3", "[1].weight is unknown"),
    ]:
        message = fault(write_config(task=TASK.replace(old, new)))
        assert f"tasks/reviews.yaml: {kind}; {expected}\n" in message
        assert message.count(expected) == 1


def test_all_faults_are_told_at_once(write_config: Write) -> None:
    path = write_config(CONFIG + "output: {dirr: x}\nlaw: uniform\n", TASK.replace("prompt:", "promt:"))
    assert fault(path, "train.steps=0", "algorithm.lr=fast").splitlines() == [
        "tasks/reviews.yaml: unknown setting 'task.promt'; did you mean 'task.prompt'?",
        "run.yaml: unknown setting 'output.dirr'; did you mean 'output.dir'?",
        "tasks/reviews.yaml: task.prompt: missing; it must be text",
        "command line: algorithm.lr: must be a number or auto, not fast",
        "run.yaml: law: must be gaussian or rademacher or lowrank, not uniform",
        "command line: train.steps: must be at least 1, not 0",
        "`mezo-dist train --help` lists every setting",
    ]
    many = "".join(f"unknown_{number}: 1\n" for number in range(30))
    assert "... and 20 more" in fault(write_config(CONFIG + many))


def test_a_setting_outside_its_section(write_config: Write) -> None:
    message = fault(write_config(CONFIG + "train.steps: 3\n"))
    assert message.startswith("run.yaml: train.steps must stand in its section train, as steps")


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
        (["distributed.timeout_s=0"], "distributed.timeout_s: must be at least"),
        (["distributed.timeout_s=.nan"], "distributed.timeout_s: must be at least"),
        (["distributed.timeout_s=.inf"], "distributed.timeout_s: must be at most"),
        (["algorithm.lr=-1"], "algorithm.lr: must be above 0"),
        (["algorithm.lr=.nan"], "algorithm.lr: must be above 0"),
        (["algorithm.eps=.inf"], "algorithm.eps: must be above 0"),
        (["algorithm.schedule.final=2"], "algorithm.schedule.final: must be at most 1, not 2"),
        (["algorithm.eps_schedule.warmup_steps=-1"], "algorithm.eps_schedule.warmup_steps: must be at least 0, not -1"),
        (["algorithm.annealing.divisor=0"], "algorithm.annealing.divisor: must be at least 1"),
        (["algorithm.momentum.decay=1"], "algorithm.momentum.decay: must be at least 0 and below 1, not 1"),
        (["algorithm.scaling=ranks"], "algorithm.directions: must be at least 2 for scaling: ranks"),
        (
            ["algorithm.scaling=normalised", "algorithm.per_sample=true", "law=lowrank", "train.batch_size=1"],
            "algorithm.directions: must be at least 2 for scaling: normalised",
        ),
        (["algorithm.per_sample=true"], "algorithm.per_sample: a direction per sample needs law: lowrank"),
        (
            ["algorithm.per_sample=true", "law=lowrank", "train.calibrate=true"],
            "train.calibrate: needs directions that all samples of a batch share; set algorithm.per_sample to false",
        ),
        (
            ["train.compile=units", "layout.name=fsdp"],
            "train.compile: blocks of layout.name: fsdp are gathered by hooks that cannot be compiled; set",
        ),
        (
            ["train.compile=graphs", "algorithm.per_sample=true", "law=lowrank"],
            "train.compile: directions per sample are applied inside of blocks; set train.compile to off",
        ),
        (
            ["train.compile=units", "model.quantise=int8", "model.peft.method=lora"],
            "train.compile: is not for quantised weights (model.quantise); set train.compile to off",
        ),
        (["model.head=classifier"], "task.plain: missing; model.head: classifier needs a text without prompt"),
        (["model.head=classifier", "task.plain=['{{ text }}']", "model.kind=masked"], "model.kind: masked is for"),
        (["task.splits.test.size=0"], "task.splits.test.size: must be at least 1, not 0"),
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
        (CONFIG.replace("{name: some/model}", "{}"), "run.yaml: model.name: missing; it must be text"),
        (
            CONFIG.replace("task: tasks/reviews.yaml", ""),
            "run.yaml: task.name: missing; it must be text\nrun.yaml: task.",
        ),
        (CONFIG + "---\n" + CONFIG, "config file run.yaml holds 2 YAML documents; it must hold one"),
        (CONFIG + "seed: !!int 3\n", "config file run.yaml, line 5: tags (tag:yaml.org,2002:int) are not taken"),
        (CONFIG + "seed: &a 3\noutput: {dir: *a}\n", "config file run.yaml, line 6: aliases (*a) are not taken"),
        (CONFIG + "? [a, b]\n: 3\n", "config file run.yaml, line 5: the name of a setting must be text"),
        (CONFIG.replace("tasks/reviews.yaml", "x" * 5000), "task file "),
        (CONFIG.replace("tasks/reviews.yaml", '"a\\0b"'), "task file "),
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
        ("name: reviews", "tasks/reviews.yaml: task.data: missing; it must be text"),
    ],
)
def test_bad_task_files(write_config: Write, task: str, expected: str) -> None:
    assert fault(write_config(task=task)).startswith(expected)


def test_a_missing_config_file_and_one_that_is_no_text(tmp_path: Path) -> None:
    assert fault(tmp_path / "run.yaml").startswith("config file run.yaml does not exist")
    assert fault(tmp_path / "a/run.yaml").startswith("config file run.yaml does not exist")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    assert fault(tmp_path / "binary").startswith("config file binary is not YAML: ")


ABSURD = {
    "direction_rank": 10**9,
    "seed": 2**63,
    "algorithm.directions": 10**9,
    "algorithm.anchor_directions": 10**9,
    "algorithm.pool": 10**9,
    "algorithm.momentum.window": 10**9,
    "algorithm.annealing.window": 10**12,
    "algorithm.annealing.threshold": ".inf",
    "algorithm.schedule.warmup_steps": 10**12,
    "algorithm.q": 10**12,
    "model.peft.r": 10**9,
    "model.peft.num_virtual_tokens": 10**9,
    "layout.replicate": 10**9,
    "task.splits.seed": 10**30,
    "task.splits.train.size": 10**12,
    "train.steps": 10**12,
    "train.batch_size": 10**12,
    "train.full_size": 10**12,
    "train.micro_batch": 10**9,
    "train.width": 10**9,
    "train.max_tokens": 10**12,
    "train.evaluate_every": 10**12,
    "train.max_skipped": 10**12,
    "train.frozen_cache_gib": ".inf",
    "output.sync_s": ".inf",
    "output.snapshot_every": 10**12,
    "output.snapshots_kept": 10**12,
    "distributed.patience_s": ".inf",
    "distributed.variant_groups": 10**9,
    "distributed.stop_exit_code": 256,
}
WHERE = {
    "algorithm.anchor_directions": ["algorithm.name=mezo-svrg"],
    "algorithm.q": ["algorithm.name=mezo-svrg"],
    "model.peft.r": ["model.peft.method=lora"],
    "model.peft.num_virtual_tokens": ["model.peft.method=prefix"],
    "layout.replicate": ["layout.name=fsdp"],
}


@pytest.mark.parametrize("name", ABSURD)
def test_numbers_that_no_run_reaches(write_config: Write, name: str) -> None:
    message = fault(write_config(), *WHERE.get(name, []), f"{name}={ABSURD[name]}")
    assert message.startswith(f"command line: {name}: must be at most ")


@pytest.mark.parametrize("name", ["output.dir", "task.data", "task.name", "task.label"])
@pytest.mark.parametrize("text", ["", " ", "a\nb", "a\x1b[2J", "a\x00", "a\u2028b", "a\udcff"])
def test_names_and_paths_that_are_no_line_of_text(write_config: Write, name: str, text: str) -> None:
    for message in (fault(write_config(), f"{name}={text}"), in_the_file(write_config, name, text)):
        assert re.search(rf"\w: {name}: must (not be empty|be one line of text|be text in UTF-8)", message)
        assert "`mezo-dist train --help`" in message


def in_the_file(write_config: Write, name: str, text: str) -> str:
    """The message about a text that stands in the config file, in the escapes of YAML."""
    data = yaml.safe_load(CONFIG) | {"task": yaml.safe_load(TASK)}
    data["algorithm"]["lr"] = 5e-5
    section, last = name.split(".")
    data.setdefault(section, {})[last] = text
    return fault(write_config(json.dumps(data)))  # JSON is YAML, too


def test_text_in_other_scripts(write_config: Write) -> None:
    assert load(write_config(), ["output.dir=läufe/実行\u3000一"]).output.dir == "läufe/実行\u3000一"


def test_a_folder_for_a_config_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config file .* is not a file"):
        load(tmp_path)
