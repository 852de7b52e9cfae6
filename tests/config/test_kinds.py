"""Settings that depend on the kind of task, and what contradicts one another in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mezo_dist.config.kinds import KINDS
from mezo_dist.config.kinds.choice import ChoiceTask
from mezo_dist.config.kinds.completion import CompletionTask
from mezo_dist.config.reader import from_dict, load
from tests.config.configs import TASK, Write, fault

COMMON = "name: t\ndata: nowhere\n"
CHOICE = COMMON + 'kind: choice\nprompt: "{{ text }} {{ answer }}"\n'
COMPLETION = COMMON + "kind: completion\n"
GENERATION = COMMON + "kind: generation\nprompt: p\ncompletion: c\n"
REGRESSION = COMMON + "kind: regression\n"
HEAD = "model.head=classifier"


def test_a_task_file_without_a_kind_is_a_classification(write_config: Write) -> None:
    config = load(write_config())
    assert config.task.kind == "classification"
    assert config == load(write_config(task=f"kind: classification\n{TASK}"))


@pytest.mark.parametrize(
    "task",
    [
        CHOICE + "options: [a, b]\nlabels: [A, 2]\nnormalise: bytes\nloss: lm\n",
        COMPLETION + "completion: '{{ text }}'\nwindow: 9\nmetric: perplexity\n",
        COMPLETION + "messages: turns\nend: false\n",
    ],
)
def test_the_resolved_config_reads_back_equal(write_config: Write, tmp_path: Path, task: str) -> None:
    config = load(write_config(task=task))
    assert isinstance(config.task, ChoiceTask | CompletionTask)
    assert from_dict(config.to_dict(), "test") == config
    assert load(write_config(yaml.safe_dump(config.to_dict()))).digest() == config.digest()


REFUSED = [
    ("kind: chioce\n" + TASK, [], "task.kind: 'chioce' does not exist; choose one of choice, classification, "),
    ("kind: [choice]\n" + TASK, [], "task.kind: ['choice'] does not exist; choose one of choice, classification, "),
    (TASK + "normalise: sum\n", [], "task.normalise is a setting of choice, not of classification; leave it out"),
    (TASK + "window: 8\n", [], "task.window is a setting of completion, not of classification; leave it out"),
    (CHOICE + "metric: f1\noptions: [a, b]\n", [], "task.metric: must be accuracy, not f1"),
    (CHOICE, [], "task.options: give the options there, or task.options_field; one of the two"),
    (CHOICE + "options: [a, b]\noptions_field: o\n", [], "task.options: give the options there, or task.options_field"),
    (CHOICE + "options: [a]\n", [], "task.options: a choice needs at least two options"),
    (CHOICE + "options: [a, a]\n", [], "task.options: two of them are the same: ['a', 'a']"),
    (CHOICE + "options: [a, b]\nlabels: [A]\n", [], "task.labels: 1 values for 2 options"),
    (CHOICE + "options: [a, b]\nlabels: [1, '1']\n", [], "task.labels: two of them are the same: ['1', '1']"),
    (CHOICE + "options: [a, b]\nlabels: [1, 2]\nlabels_field: l\n", [], "task.labels: give the values there, or "),
    (CHOICE + "options: [a, b]\noption: '{{ option }}'\n", [], "task.option: is for the options of task.options_field"),
    (CHOICE + "options_field: ''\n", [], "task.options_field: must not be empty"),
    (CHOICE.replace("{{ answer }}", "") + "options: [a, b]\n", [], "task.prompt: must contain {{ answer }}"),
    (CHOICE + "options: [a, b]\n", [HEAD], "model.head: classifier is not for task.kind: choice; leave it out"),
    (CHOICE + "options: [a, b]\nloss: lm\n", ["train.calibrate=true"], "train.calibrate: changes the scores of all "),
    (CHOICE + "options_field: o\n", ["train.calibrate=true"], "train.calibrate: needs classes that all samples share"),
    (COMPLETION, [], "task.completion: give the template there, or task.messages; one of the two"),
    (COMPLETION + "completion: a\nmessages: m\n", [], "task.completion: give the template there, or task.messages"),
    (COMPLETION + "prompt: a\nmessages: m\n", [], "task.prompt: the prompts of task.messages are in the conversation"),
    (COMPLETION + "prompt: a\ncompletion: b\nwindow: 9\n", [], "task.window: cuts whole documents"),
    (COMPLETION + "completion: b\nwindow: 1\n", [], "task.window: must be at least 2"),
    (COMPLETION + "completion: b\nchat: true\n", [], "task.chat: needs task.prompt, the user's turn"),
    (COMPLETION + "messages: ''\n", [], "task.messages: must not be empty"),
    (COMPLETION + "completion: b\n", [HEAD], "model.head: classifier is not for task.kind: completion; leave it out"),
    (
        COMPLETION + "completion: b\nmetric: perplexity\n",
        ["train.objective=metric"],
        "train.objective: metric needs one of which more is better",
    ),
    (
        COMPLETION + "completion: b\n",
        ["train.objective=metric", "law=lowrank", "algorithm.per_sample=true"],
        "train.objective: metric gives one number per batch where task.metric is token-accuracy",
    ),
    (GENERATION + 'end: "\\n"\n', [], "task.end: '\\n' does not end what the model writes; put it into task.stop"),
    (REGRESSION, [HEAD], "task.plain: missing; it must be a list of text"),
    (REGRESSION + "plain: []\n", [HEAD], "task.plain: give one template, or two for a pair of texts"),
    (REGRESSION + "plain: [a]\n", [], "model.head: task.kind: regression needs a fresh head: model.head: classifier"),
    (
        TASK,
        ["train.objective=metric", "train.calibrate=true"],
        "train.calibrate: changes the loss, which train.",
    ),
    (
        TASK,
        ["train.objective=metric", "algorithm.eps=auto"],
        "algorithm.eps: auto finds where a loss is straight, and train.objective: metric takes few values, which a "
        "larger size changes more often; give a number, such as 0.02",
    ),
    (TASK, ["train.objective=margin"], "train.objective: must be loss or metric"),
]


@pytest.mark.parametrize(("task", "options", "expected"), REFUSED)
def test_what_is_refused(write_config: Write, task: str, options: list[str], expected: str) -> None:
    assert expected in fault(write_config(task=task), *options)


def test_every_kind_says_what_it_is() -> None:
    for kind, settings in KINDS.items():
        assert settings.__dataclass_fields__["kind"].default == kind
