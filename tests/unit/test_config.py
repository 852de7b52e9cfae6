"""Config files and command-line overrides: strict, with messages that name setting, source and fix."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mezo_dist import cli
from mezo_dist.algorithms import ALGORITHMS
from mezo_dist.algorithms.svrg import SvrgConfig
from mezo_dist.config import RunConfig
from mezo_dist.config_reader import from_dict, help_text, load
from mezo_dist.errors import UserError
from mezo_dist.tasks.task import Label

TASK = """\
name: reviews
data: reviews.jsonl
prompt: "{{ text }} It was {{ answer }}"
labels: [{value: 0, word: bad}, {value: 1, word: good}]
"""
CONFIG = """\
model: {name: some/model}
task: tasks/reviews.yaml
algorithm: {name: mezo, lr: 5e-5}
train: {steps: 20, batch_size: 4}
"""
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a config, by default a good one, and its task file; returns the config's path."""

    def write(text: str = CONFIG, task: str = TASK) -> Path:
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks/reviews.yaml").write_text(task)
        (tmp_path / "run.yaml").write_text(text)
        return tmp_path / "run.yaml"

    return write


def fault(path: Path, *overrides: str) -> str:
    """The message that `load` fails with, less the name of the folder."""
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "")


# What is read


def test_a_good_config_with_a_task_file_relative_to_it(write: Write) -> None:
    config = load(write())
    assert (config.model.name, config.task.name, config.train.steps) == ("some/model", "reviews", 20)
    assert config.task.labels == (Label(0, "bad"), Label(1, "good"))
    assert config.train.micro_batch == 8  # not given: the default


@pytest.mark.parametrize("overrides", [["--train.steps=7"], ["train.steps=7"], ["--train.steps", "7"]])
def test_forms_of_an_override(write: Write, overrides: list[str]) -> None:
    config = load(write(), overrides)
    assert config.train == dataclasses.replace(load(write()).train, steps=7)


def test_the_last_of_several_overrides_counts(write: Write) -> None:
    assert load(write(), ["seed=1", "--seed=2", "--output.dir", "a=b"]).seed == 2
    assert load(write(), ["--output.dir", "a=b"]).output.dir == "a=b"


@pytest.mark.parametrize("number", ["5e-5", "5.0e-5", "0.00005", ".5e-4", "5E-5"])
def test_numbers_in_scientific_notation(write: Write, number: str) -> None:
    assert load(write(CONFIG.replace("5e-5", number))).algorithm.lr == 5e-5
    assert load(write(CONFIG.replace("5e-5", "1")), [f"algorithm.lr={number}"]).algorithm.lr == 5e-5


def test_text_that_looks_like_something_else_stays_text(write: Write) -> None:
    assert load(write(), ["--model.revision=12"]).model.revision == "12"
    assert load(write(CONFIG.replace("some/model", '"007"'))).model.name == "007"
    assert load(write(task=TASK.replace("0, word: bad", '"00", word: "no"'))).task.labels[0] == Label("00", "no")


def test_an_override_may_name_another_task_file_relative_to_the_current_folder(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/other.yaml").write_text(TASK.replace("reviews", "other"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = write(task=TASK + "subset: only-in-the-first\n")
    config = load(path, ["task=other.yaml", "task.label=stars"])
    assert (config.task.name, config.task.subset, config.task.label) == ("other", None, "stars")


def test_an_override_may_fill_in_what_the_file_lacks(write: Write) -> None:
    assert load(write(CONFIG.replace("some/model", "x").replace("model: {name: x}", "")), ["model.name=y"]).model.name


# The algorithm's settings depend on its name


def test_the_name_picks_the_settings(write: Write) -> None:
    assert load(write(CONFIG.replace("mezo,", "mezo-svrg, q: 5,"))).algorithm.q == 5
    assert "algorithm.q is a setting of mezo-svrg, not of mezo" in fault(write(CONFIG.replace("mezo,", "mezo, q: 5,")))


def test_an_override_of_the_name_keeps_settings_that_both_have(write: Write) -> None:
    config = load(write(), ["algorithm.name=mezo-svrg", "algorithm.q=3"])
    assert config.algorithm == SvrgConfig(lr=5e-5, q=3)


def test_an_override_of_the_name_to_one_that_does_not_fit_the_file(write: Write) -> None:
    path = write(CONFIG.replace("mezo,", "mezo-svrg, anchor_lr: 1e-3,"))
    expected = "run.yaml: algorithm.anchor_lr is a setting of mezo-svrg, not of mezo; leave it out"
    assert fault(path, "--algorithm.name=mezo").startswith(expected)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("algorithm: {lr: 1}", "run.yaml: algorithm.name: missing; choose one of mezo, mezo-svrg"),
        ("", "run.yaml: algorithm.name: missing; choose one of mezo, mezo-svrg"),
        ("algorithm: {name: mezzo}", "run.yaml: algorithm.name: 'mezzo' does not exist; choose one of mezo, mezo-svrg"),
        ("algorithm: {name: [mezo]}", "run.yaml: algorithm.name: ['mezo'] does not exist"),
        ("algorithm: mezo", "run.yaml: algorithm: must hold settings (name, lr, eps,"),
    ],
)
def test_no_such_algorithm(write: Write, section: str, expected: str) -> None:
    assert fault(write(CONFIG.replace("algorithm: {name: mezo, lr: 5e-5}", section))).startswith(expected)


# What is refused: unknown settings


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
def test_unknown_settings_in_the_file(write: Write, more: str, expected: str) -> None:
    assert fault(write(CONFIG + more)).startswith(expected)


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
def test_unknown_settings_on_the_command_line(write: Write, override: str, expected: str) -> None:
    assert fault(write(), override).startswith(expected)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("prompt:", "promt:", "unknown setting 'task.promt'; did you mean 'task.prompt'?"),
        ("name:", "metrics: f1\nname:", "unknown setting 'task.metrics'; did you mean 'task.metric'?"),
        ("name:", "splits: {tset: {}}\nname:", "unknown setting 'task.splits.tset'; did you mean 'task.splits.test'?"),
        ("word: good", "wrod: good", "task.labels: must be a list of {value: text or a whole number, word: text}; "),
    ],
)
def test_unknown_settings_in_the_task_file(write: Write, old: str, new: str, expected: str) -> None:
    assert fault(write(task=TASK.replace(old, new, 1))).startswith(f"tasks/reviews.yaml: {expected}")


def test_a_setting_given_twice(write: Write) -> None:
    assert fault(write(CONFIG + "seed: 1\nseed: 2\n")) == (
        "config file run.yaml: 'seed' is set twice, in line 5 and in line 6"
    )
    assert "'word' is set twice" in fault(write(task=TASK.replace("word: bad", "word: bad, word: worse")))


# What is refused: values


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
def test_wrong_types(write: Write, override: str, expected: str) -> None:
    assert fault(write(), override).startswith(f"command line: {expected}")
    section, _, rest = override.partition(".")
    name, _, value = rest.partition("=")
    data = yaml.safe_load(CONFIG) | {"task": yaml.safe_load(TASK)}
    data["algorithm"]["lr"] = 5e-5
    data[section] = {**data.get(section, {}), name: yaml.safe_load(value)}
    assert fault(write(yaml.safe_dump(data))).startswith(f"run.yaml: {expected.rstrip()}")


def test_label_words_that_yaml_takes_for_booleans(write: Write) -> None:
    message = fault(write(task=TASK.replace("word: bad", "word: no")))
    assert "word is False (quote yes, no, on, off: YAML reads true, false)" in message


@pytest.mark.parametrize("value", ["3", "[a]", "", "text"])
def test_a_value_where_a_section_should_be(write: Write, value: str) -> None:
    message = fault(write(re.sub("train: .*", f"train: {value}", CONFIG)))
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
        (["rank=0"], "rank: must be at least 1"),
        (["distributed.timeout_s=0"], "distributed.timeout_s: must lie between 0 and"),
        (["distributed.timeout_s=.nan"], "distributed.timeout_s: must lie between 0 and"),
        (["distributed.timeout_s=.inf"], "distributed.timeout_s: must lie between 0 and"),
        (["algorithm.lr=-1"], "algorithm.lr: must be above 0"),
        (["algorithm.lr=.nan"], "algorithm.lr: must be above 0"),
        (["algorithm.eps=.inf"], "algorithm.eps: must be above 0"),
        (["algorithm.schedule.final=2"], "algorithm.schedule: warmup_steps must be at least 0, and final must lie"),
        (["algorithm.annealing.divisor=0"], "algorithm.annealing: divisor and window must be at least 1"),
        (["algorithm.per_sample=true"], "algorithm.per_sample: a direction per sample needs law: lowrank"),
        (["algorithm.directions=2", "law=lowrank", "algorithm.per_sample=true"], "algorithm.directions: must be 1"),
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
def test_values_out_of_range_and_contradictions(write: Write, overrides: list[str], expected: str) -> None:
    message = fault(write(), *overrides)
    assert expected in message
    assert message.endswith("`mezo-dist train --help` lists every setting")


# What is refused: files


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
def test_bad_files(write: Write, text: str, expected: str) -> None:
    assert fault(write(text)).startswith(expected)


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("", "task file tasks/reviews.yaml is empty"),
        ("a: [b\nc: {", "task file tasks/reviews.yaml is not YAML: "),
        ("name: reviews", "run.yaml: missing settings: task.data, task.prompt, task.labels"),
    ],
)
def test_bad_task_files(write: Write, task: str, expected: str) -> None:
    assert fault(write(task=task)).startswith(expected)


def test_a_missing_config_file_and_one_that_is_no_text(tmp_path: Path) -> None:
    assert fault(tmp_path / "run.yaml").startswith("config file run.yaml does not exist")
    assert fault(tmp_path / "a/run.yaml").startswith("config file run.yaml does not exist")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    assert fault(tmp_path / "binary").startswith("config file binary is not YAML: ")


def test_a_folder_for_a_config_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config file .* does not exist"):
        load(tmp_path)


# The resolved config


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_resolved_config_reads_back_equal(write: Write, algorithm: str) -> None:
    overrides = ["train.full_size=8", "train.max_tokens=9", "model.compute=bfloat16", "algorithm.schedule.kind=cosine"]
    labels = "task.labels=[{value: '01', word: 'yes'}, {value: 1, word: '2'}]"
    config = load(write(), [f"algorithm.name={algorithm}", *overrides, labels, "seed=5"])
    again = load(write(yaml.safe_dump(config.to_dict(), sort_keys=False)))
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


def test_the_digest_ignores_where_results_go_and_nothing_else(write: Write) -> None:
    path = write()
    config = load(path)
    same = load(path, ["output.dir=x", "output.export=false", "output.if_exists=new", "distributed.timeout_s=5"])
    assert same.digest() == config.digest()
    for change in ("seed=1", "train.steps=21", "task.splits.seed=1", "algorithm.lr=6e-5", "model.name=other", "rank=2"):
        assert load(path, [change]).digest() != config.digest(), change


def test_a_resolved_config_of_another_version_is_refused(write: Write) -> None:
    data = load(write()).to_dict()
    data["train"]["of_the_future"] = 1
    with pytest.raises(UserError, match=r"runs/run: unknown setting .train\.of_the_future."):
        from_dict(data, "runs/run")


# Help


def settings(section: Any, algorithm: str, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every setting that is not a section: its dotted name, its class and its field name."""
    for name, kind in typing.get_type_hints(section).items():
        kind = ALGORITHMS[algorithm][0] if kind is Any else kind
        if dataclasses.is_dataclass(kind):
            yield from settings(kind, algorithm, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", section, name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_help_explains_every_setting(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # one line per setting
    text = help_text(algorithm)
    explained = dict(re.findall(r"^  --([\w.]+).*?(?:\n {20,}| {2,})(\S.*)$", text, re.MULTILINE))
    names = [name for name, _, _ in settings(RunConfig, algorithm)]
    assert set(explained) == {*names, "task"}
    for name in names:
        words = explained[name].partition(" (type: ")[0].partition(" (required")[0]
        assert len(words.split()) >= 2, f"--{name} is not explained: {explained[name]!r}"


def test_help_explains_the_parts_of_a_label() -> None:
    for field in dataclasses.fields(Label):
        assert f"{field.name}: " in re.search(r"--task\.labels[^\0]*?--task", help_text())[0]  # type: ignore[index]


def test_help_is_free_of_markup_and_of_what_cannot_be_used() -> None:
    text = help_text()
    assert "``" not in text
    assert "--config" not in text
    assert "Path to a configuration file" not in text


# The command line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "mezo-dist: error: name a config file first, as in `mezo-dist train "),
        (["--seed", "1"], "mezo-dist: error: name a config file first"),
        (["nowhere.yaml"], "mezo-dist: error: config file nowhere.yaml does not exist"),
        (["CONFIG", "--train.step=1"], "mezo-dist: error: command line: unknown setting 'train.step'; did you mean "),
        (["CONFIG", "--seed", "x"], "mezo-dist: error: command line: seed: must be a whole number, not x"),
        (["--help", "algorithm.name=x"], "mezo-dist: error: command line: algorithm.name: 'x' does not exist"),
    ],
)
def test_the_command_line_shows_one_message_and_no_traceback(
    write: Write, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    status = cli.main(["train", *(str(write()) if item == "CONFIG" else item for item in arguments)])
    output = capsys.readouterr()
    assert status == 2
    assert output.out == ""
    assert output.err.startswith(expected)
    assert "Traceback" not in output.err
    assert output.err.count("error:") == 1


def test_the_rank_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert cli.main(["train", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err.startswith("mezo-dist (rank 3): error: config file nowhere.yaml")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["some.yaml", "--help"]])
def test_help_of_train(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(["train", *arguments]) == 0
    assert "--algorithm.anchor_lr" in capsys.readouterr().out


def test_help_of_train_for_an_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help", "--algorithm.name=mezo"]) == 0
    output = capsys.readouterr().out
    assert "--algorithm.directions" in output
    assert "--algorithm.anchor_lr" not in output


@pytest.mark.parametrize("arguments", [["--help"], [], ["evaluate"], ["evaluate", "x", "--foo"], ["frobnicate"]])
def test_other_commands_are_ordinary_argparse(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == (0 if "--help" in arguments else 2)
    assert "usage: mezo-dist" in "".join(capsys.readouterr())


def test_reading_a_config_needs_no_heavy_library() -> None:
    code = (
        "import sys; from mezo_dist.config_reader import load, help_text; help_text();"
        "load('configs/quickstart.yaml', ['seed=3']);"
        "sys.exit(' '.join({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)) or 0)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
