"""Files from anywhere: whatever is in them, they are read or refused with a message, at once and in little memory."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import pickle
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mezo_dist import cli
from mezo_dist.config import reader
from mezo_dist.config.schema import RunConfig
from mezo_dist.distributed.communicator import Communicator
from mezo_dist.errors import UserError
from mezo_dist.runs import training
from mezo_dist.storage import trajectory
from mezo_dist.tasks.rows import load_rows
from mezo_dist.tasks.templates import render
from mezo_dist.testing import write_tiny_config


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config that works, and a run of it."""
    root = tmp_path_factory.mktemp("fuzz")
    training.train(reader.load(write_tiny_config(root, steps=2)), Communicator())
    return root


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """No more address space than now and 1 GiB: what wants more fails with MemoryError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def read_config(path: Path) -> RunConfig | str:
    with little_memory():
        try:
            return reader.load(path)
        except UserError as error:
            return str(error)


# Without the phase that explains failures: it traces every line executed, which makes reading a config minutes long.
quick = settings(
    deadline=None,
    max_examples=120,
    phases=set(Phase) - {Phase.explain},
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
YAML = ["&a ", "*a", "!!python/name:os.system ", "{", "[", ": ", "- ", "\n", "null", "1e999", "\0", "<<: "]


@quick
@given(st.data())
def test_whatever_is_done_to_a_config(tiny: Path, data: st.DataObject) -> None:
    text = (tiny / "config.yaml").read_text()
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        stop = data.draw(st.integers(start, min(len(text), start + 60)))
        text = text[:start] + data.draw(st.sampled_from(YAML) | st.text(max_size=12)) + text[stop:]
    path = tiny / "changed.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    assert isinstance(read_config(path), (RunConfig, str))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6), v, max_size=3))


@settings(quick, max_examples=30)
@given(st.data())
def test_any_value_for_any_setting(tiny: Path, data: st.DataObject) -> None:
    config = yaml.safe_load((tiny / "config.yaml").read_text())
    full = reader.load(tiny / "config.yaml").to_dict()
    section = data.draw(st.sampled_from(sorted(full)))
    inside = sorted(full[section]) if isinstance(full[section], dict) else []
    value: Any = data.draw(values)
    into: bool = data.draw(st.booleans())
    if inside and into:
        config.setdefault(section, {})[data.draw(st.sampled_from(inside))] = value
    else:
        config[section] = value
    path = tiny / "changed.yaml"
    path.write_text(yaml.safe_dump(config))
    outcome = read_config(path)
    if isinstance(outcome, RunConfig):
        assert reader.from_dict(json.loads(json.dumps(outcome.to_dict())), "again") == outcome


BOMBS = {
    "laughs": "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(40)),
    "itself": "seed: &a [*a]\n",
    "lists": "seed: " + "[" * 5000 + "]" * 5000,
    "objects": "seed: " + "{a: " * 3000,
    "a long number": "seed: " + "9" * 5000,
    "a key of nothing": " ?",
    "python": "seed: !!python/object/apply:os.system ['true']\n",
    "large": "# " + "x" * 2_000_000,
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.timeout(20)
def test_bombs_in_a_config(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.yaml").write_text(BOMBS[name])
    message = read_config(tmp_path / "config.yaml")
    assert isinstance(message, str)
    assert message.startswith("config file ")


@settings(quick, max_examples=25)
@given(st.data())
def test_whatever_is_done_to_the_data(tiny: Path, data: st.DataObject) -> None:
    config = reader.load(tiny / "config.yaml")
    content = bytearray((tiny / "data.jsonl").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        content[start : start + data.draw(st.integers(0, 30))] = data.draw(st.binary(max_size=8))
    (tiny / "changed.jsonl").write_bytes(content)
    task = dataclasses.replace(config.task, data=str(tiny / "changed.jsonl"))
    with contextlib.suppress(UserError):
        assert len(load_rows(task).train) == len(load_rows(config.task).train)


FIELDS = {"text": "a dull film"}
TEMPLATES = {
    "a long text": "{{ 'a' * 10**12 }}",
    "a wide text": "{{ '%999999999d' % 1 }}",
    "a wider text": "{{ text | center(10**10) }}",
    "format": "{{ '{:>9999999999}'.format(text) }}",
    "doubling": "{% set x = text ~ text %}" + "{% set x = x ~ x %}" * 60 + "{{ x }}",
    "loops": "{% for a in text %}" * 12 + "x" + "{% endfor %}" * 12,
    "macros": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "replacing": "{{ text" + "| replace('', 'xxxxxxxx')" * 30 + "}}",
    "powers": "{{ 9 ** 9 ** 9 ** 9 }}",
    "files": "{% include '/etc/passwd' %}",
    "classes": "{{ text.__class__.__mro__ }}",
    "calls": "{{ text.ljust(10 ** 10) }}",
    "chance": "{{ [1, 2, 3] | random }}",
    "digits": "{{ 1.0 | round(1000000000, 'ceil') }}",
    "digits of a field": "{{ text | length | round(-10 ** 9) }}",
    "digits of digits": "{{ 1 | round(text | length | float) }}",
    "a short cut": "{{ text | truncate(1) }}",
    "no number": "{{ 'inf' | float | int }}",
    "depth": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.timeout(20)
def test_templates_that_do_more_than_fill_in_fields(name: str) -> None:
    with little_memory(), pytest.raises(UserError, match=r"^task template"):
        render(TEMPLATES[name], FIELDS, FIELDS)


@quick
@given(
    st.lists(
        st.sampled_from(["{{", "}}", "{%", "%}", "text", " if ", "endif", "|", "upper", "'", "(", ".", "[0]", "a"])
    )
)
def test_any_template(parts: list[str]) -> None:
    with contextlib.suppress(UserError):
        assert isinstance(render(" ".join(parts), FIELDS, FIELDS), str)


# What a run folder from somebody else must not do


def test_no_code_comes_with_a_run_folder(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file in it replaced by a pickle that would show itself: no command reads one."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read")

    run = Path(shutil.copytree(tiny / "run", tmp_path / "run"))
    for path in run.rglob("*"):
        if path.is_file() and path.name != "trajectory.jsonl":
            path.write_bytes(pickle.dumps({"weights": 1}))
    importlib.import_module("mezo_dist.directions.kernels.cpu")  # numba keeps compiled kernels as pickles, in its cache
    with monkeypatch.context() as patch:
        for name in ("load", "loads", "Unpickler"):
            patch.setattr(pickle, name, refuse)
        assert cli.main(["evaluate", str(run)]) == 0
        assert cli.main(["replay", str(run), "--export", str(tmp_path / "model")]) == 0
    shutil.copy(run / "events.jsonl", run / "trajectory.jsonl")
    assert cli.main(["evaluate", str(run)]) == 2
    assert "not a trajectory" in capsys.readouterr().err


def test_code_of_a_model_is_not_run_because_a_run_folder_says_so(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--output.dir={tmp_path / 'run'}", "--output.test=false", "--output.export=false"]
    assert cli.main(["train", str(tiny / "config.yaml"), *options, "--model.trust_remote_code=true"]) == 0
    for command in (["evaluate"], ["export"], ["replay"]):
        arguments = [*command, str(tmp_path / "run"), *([str(tmp_path / "model")] if command == ["export"] else [])]
        assert cli.main(arguments) == 2
        assert "A run folder from somebody else must not start that unasked" in capsys.readouterr().err
    assert cli.main(["replay", str(tmp_path / "run"), "--trust-remote-code"]) == 0


def test_nobody_listens_in_a_job_of_one_process(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("a socket was opened to listen on")

    monkeypatch.setattr(socket.socket, "listen", refuse)
    before = listening()
    training.train(reader.load(tiny / "config.yaml", [f"output.dir={tmp_path}"]), Communicator())
    assert listening() <= before


def listening() -> set[str]:
    """Sockets of this process that listen (state 0A), also those of native code."""
    inodes = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                inodes.add(f"socket:[{fields[9]}]")
    sockets = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(str(link.readlink()))
    return inodes & sockets


def forged(tiny: Path, to: Path, change: Any) -> Path:
    """A run folder whose trajectory was changed by ``change(lines)``, with digest and checks right again."""
    lines = [json.loads(line) for line in (tiny / "run" / "trajectory.jsonl").read_bytes().splitlines()]
    change(lines)
    config = reader.from_dict(lines[0]["config"], "header")
    lines[0] |= {"config_digest": config.digest()}
    content, check = b"", ""
    for number, line in enumerate(lines):
        line.pop("check")
        text, new = trajectory.to_line(line, check)
        content += text
        if number == 0:
            new = trajectory.Header(**{k: v for k, v in line.items() if k != "format"}).identity
        check = check if "done" in line else new
    to.mkdir()
    (to / "trajectory.jsonl").write_bytes(content)
    return to


def set_losses(*losses: Any) -> Any:
    def change(lines: list[Any]) -> None:
        lines[1]["loss"] = list(losses)

    return change


def set_samples(lines: list[Any]) -> None:
    lines[0]["config"] |= {"law": "lowrank", "algorithm": lines[0]["config"]["algorithm"] | {"per_sample": True}}
    lines[0]["full_size"] = 10**9


FORGED = {
    "no round": (set_losses(), "step 0 has losses that no step of this run can have"),
    "no losses": (set_losses({"mean": []}), "step 0 has losses that no step of this run can have"),
    "too few": (set_losses({"mean": [0.5]}), "step 0 has losses that no step of this run can have"),
    "too many": (set_losses({"mean": [0.5] * 8}), "step 0 has losses that no step of this run can have"),
    "huge": (set_losses({"mean": [1e308, -1e308]}), "step 0 has losses that no step of this run can have"),
    "others": (set_losses({"mean": [0.5, 0.75]}), "step 0 is not what this version of the algorithm makes"),
    "samples": (set_samples, "a step would have 1000000000 of them"),
}


@pytest.mark.parametrize("what", FORGED)
@pytest.mark.timeout(300)
def test_forged_trajectories_with_right_checksums(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    change, expected = FORGED[what]
    run = forged(tiny, tmp_path / "run", change)
    with little_memory():
        assert cli.main(["replay", str(run)]) == 2
    assert expected in capsys.readouterr().err


def test_an_unchanged_one_can_be_written_again(tiny: Path, tmp_path: Path) -> None:
    """So it is not the forging that is refused."""
    run = forged(tiny, tmp_path / "run", lambda lines: None)
    assert (run / "trajectory.jsonl").read_bytes() == (tiny / "run" / "trajectory.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["fifo.jsonl", "zero.jsonl", "fifo", "/dev/zero"])
@pytest.mark.timeout(20)
def test_data_that_never_ends(tiny: Path, tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fifo.jsonl")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    task = dataclasses.replace(reader.load(tiny / "config.yaml").task, data=str(tmp_path / name))
    with pytest.raises(UserError, match=r"task\.data: .*(is not a regular file|is no file ending in)"):
        load_rows(task)
    task = dataclasses.replace(task, data=str(tmp_path))
    with pytest.raises(UserError, match=r"fifo\.jsonl is not a regular file"):
        load_rows(task)
