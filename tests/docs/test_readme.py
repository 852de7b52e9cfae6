"""Every command and every program in the README and the pages of docs/ really runs.

Commands run in the order of `PAGES`, in a folder of their own, on the real demo model but for sharded runs; `SMALL`
makes them quick. A command that is new must be entered in `HOW`, or the test fails.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from mezo_dist import cli
from mezo_dist.config import reader
from mezo_dist.testing import tiny_model, tiny_tokenizer, write_tiny_model
from tests import forked_ranks
from tests.forked import Program, output_of

ROOT = Path(__file__).parents[2]
PAGES = ("many-machines", "first-run", "model-and-data", "tasks", "algorithms", "nothing-is-lost", "library")
"""What makes a run comes before what looks at it; the other pages have nothing to run, which a test below says."""
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in PAGES)]
SMALL = [
    "--train.steps=3",
    "--train.batch_size=4",
    "--train.full_size=8",
    "--train.micro_batch=4",
    "--task.splits.train.size=16",
    "--task.splits.validation.size=8",
    "--task.splits.test.size=8",
]
SMALLER = ["--train.steps=1", "--output.test=false", "--output.export=false"]
SHARDED = [*SMALLER, "--model.name=tiny", '--model.trainable=["*norm*"]']
"""Every pass gathers the whole model: that of the demo would take 100 seconds of a core."""

RUN, SAME_WITHOUT_HUB, MAKE = "run", "check the settings", "see the Makefile's own test"
HOW = {
    "make quickstart": MAKE,
    "make test": MAKE,
    "mezo-dist train configs/quickstart.yaml --model.name=Qwen/Qwen3-0.6B '--model.trainable=[\"*norm*\"]' "
    "--output.dir=runs/qwen": SAME_WITHOUT_HUB,
    "mezo-dist init demo:tweets --model=demo:smollm2-135m --to=mine": RUN,
    "torchrun --standalone --nproc-per-node 2 -m mezo_dist train configs/quickstart.yaml": RUN,
    "mezo-dist plan llama-3-70b --hosts 2 --ranks-per-host 8 --memory 80GB --link 100gbit": RUN,
    # tests/simulation and tests/studies have more of these two
    "mezo-dist simulate llama-3-8b --hosts 1 10 100 1000 --ranks-per-host 8": "mezo-dist simulate llama-3-8b --weeks 1",
    "mezo-dist study examples/scaling_study/tiny.yaml": (
        f"mezo-dist study {ROOT}/examples/scaling_study/tiny.yaml --list"
    ),
    "torchrun --standalone --nproc-per-node 2 -m mezo_dist train configs/quickstart.yaml --layout.name=fsdp "
    "--output.dir=runs/sharded": RUN,
    "mezo-dist train --help train": RUN,
    "mezo-dist train configs/quickstart.yaml --dry-run": RUN,
    "source <(mezo-dist completion bash)": "mezo-dist completion bash",
    "mezo-dist evaluate runs/quickstart --split validation": RUN,
    "mezo-dist evaluate runs/quickstart --step 0": RUN,
    "mezo-dist export runs/quickstart my-model": RUN,
    "mezo-dist replay runs/quickstart": RUN,
    "mezo-dist report runs/quickstart": RUN,
    "mezo-dist report runs/quickstart runs/sharded --to compared.html": RUN,
    "mezo-dist train configs/quickstart.yaml --model.name=Qwen/Qwen3-0.6B '--monitor=[tensorboard, wandb]' "
    "--output.dir=runs/watched": SAME_WITHOUT_HUB,
    "tensorboard --logdir runs/quickstart": "tensorboard --inspect --logdir runs/quickstart",
    "mezo-dist train configs/quickstart.yaml --output.if_exists=resume": RUN,
}


def blocks(language: str, documents: Sequence[Path] = DOCUMENTS) -> list[str]:
    """Code of a language, each once."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in documents)
    return list(dict.fromkeys(re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)))


def commands() -> list[str]:
    return list(dict.fromkeys(line for block in blocks("sh") for line in block.splitlines() if line.strip()))


def call(arguments: list[str], folder: Path) -> str:
    """What a command prints, which must succeed; `mezo-dist` and ranks without the seconds that they take to start."""
    if arguments[0] == "mezo-dist":
        with Program(["-m", "mezo_dist", *arguments[1:]], folder, {**os.environ, "OMP_NUM_THREADS": "1"}) as program:
            status, output, errors = program.finish()
        assert status == 0, f"{shlex.join(arguments)}\n{output}\n{errors}"
        return output + errors
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with forked_ranks.environment() as env:
        env = {**env, "PATH": path}
        done = subprocess.run(arguments, cwd=folder, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_every_command_is_known_to_this_test() -> None:
    assert set(commands()) == set(HOW)


def test_other_pages_have_nothing_to_run() -> None:
    tested_elsewhere = {ROOT / "docs" / name for name in ("api.md", "migrating.md")}  # test_api, test_migrating
    others = set((ROOT / "docs").glob("*.md")) - set(DOCUMENTS) - tested_elsewhere
    assert others
    assert not [code for language in ("sh", "python", "yaml") for code in blocks(language, sorted(others))]


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """A dead link, a dead anchor or a page that the navigation forgets is an error."""
    site = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(site, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {f"{page}.html" for page in PAGES} <= {path.name for path in tmp_path.iterdir()}


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", DOCUMENTS[0].read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def test_the_settings_of_commands_that_need_a_hub_are_right() -> None:
    for command in commands():
        if HOW[command] == SAME_WITHOUT_HUB:
            _, _, path, *overrides = shlex.split(command)
            assert reader.load(ROOT / path, overrides).model.name in command


def test_make_targets_exist_and_start_what_the_readme_says() -> None:
    for command in commands():
        if HOW[command] == MAKE:
            assert "No rule" not in call([*shlex.split(command), "--dry-run"], ROOT)
    plan = call(["make", "quickstart", "--dry-run"], ROOT)
    first, second, report = (
        plan.index(part) for part in ("2 configs/quickstart.yaml", "2 configs/mezo-svrg.yaml", "report")
    )
    assert first < second < report
    assert " report " not in call(["make", "quickstart", "--dry-run", "ARGS=--output.dir=elsewhere"], ROOT)


@pytest.mark.assets
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_the_commands_run(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    write_tiny_model(tmp_path / "tiny", "llama-tied")
    for command in commands():
        how = HOW[command]
        if how in (SAME_WITHOUT_HUB, MAKE):
            continue
        arguments = shlex.split(command if how == RUN else how)
        more = SHARDED if "--layout.name=fsdp" in arguments else SMALLER if "--dry-run" in arguments else []
        output = call([*arguments, *(SMALL if "train" in arguments else []), *more], tmp_path)
        if "evaluate" in arguments:
            assert "accuracy" in output
    run = tmp_path / "runs" / "quickstart"
    results = json.loads((run / "results.json").read_text())
    assert results["steps"] == 3
    assert {"before", "after", "validation"} <= results.keys()
    assert (run / "config.yaml").read_text().startswith("# sha256")
    assert len((run / "trajectory.jsonl").read_text().splitlines()) == 1 + 3 + 1  # header, steps, fingerprint
    assert list((run / "tensorboard").iterdir())
    for folder in (run / "model", tmp_path / "my-model"):
        AutoModelForCausalLM.from_pretrained(folder)


PRINTED = [r"[0-9a-f]{16}\n", r"tensor\(\[ (0\.9|1\.0)\d+, -(1\.9|2\.0)\d+,  (2\.9|3\.0)\d+\]\) 1000\n"]


@pytest.mark.parametrize(("program", "printed"), list(zip(blocks("python"), PRINTED, strict=True)))
def test_the_programs_run(program: str, printed: str, tmp_path: Path) -> None:
    output = output_of(["-c", program], tmp_path, {**os.environ, "OMP_NUM_THREADS": "1"})
    assert re.fullmatch(printed, output)


def test_the_reward_yaml_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the function in its comment, and with a model, an algorithm and data, which it leaves to the reader."""
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in blocks("yaml") if "objective: reward" in block]
    (function,) = re.findall(r"# (def .*)", block)
    Path("rewards.py").write_text(function + "\n")
    config = yaml.safe_load(block)
    data = Path(config["task"]["data"])
    data.mkdir()
    for split in ("train", "validation", "test"):
        (data / f"{split}.jsonl").write_text('{"question": "the film"}\n' * 4)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tiny_model("llama").save_pretrained("model")
    tokenizer.save_pretrained("model")
    config["train"] |= {"steps": 1, "batch_size": 2}
    config |= {"model": {"name": "model"}, "algorithm": {"name": "mezo", "lr": 0.1}}
    config |= {"output": {"dir": "run", "export": False}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["train", "config.yaml"]) == 0
    assert json.loads(Path("run/results.json").read_text())["after"]["reward"] == 1.0
