"""Jobs of a second, started on virtual hosts by real launchers.

The command lines are those of launcher/README.md: they run in a folder where ``launcher`` is the real one and
``configs/quickstart.yaml`` is a tiny job. Settings that a test needs beyond them are appended.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from launcher.hosts import TOOLS, Cluster, cluster, missing
from mezo_dist.storage import trajectory
from mezo_dist.storage.trajectory import Step
from mezo_dist.testing import write_tiny_config
from tests import gpus
from tests.forked import output_of

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "launcher" / "README.md"
STEPS = 100
PATIENCE_S = 120
"""Far more than anything here takes."""


def commands() -> list[str]:
    """All command lines of launcher/README.md."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def command(start: str) -> list[str]:
    """The one command line that starts so, as arguments."""
    (command_line,) = [line for line in commands() if line.startswith(start)]
    return shlex.split(command_line)


@dataclass(frozen=True)
class Started:
    """A command that runs."""

    process: subprocess.Popen[str]
    log: Path

    def finish(self) -> tuple[int, str]:
        """Exit status and output; fails if it does not end."""
        try:
            return self.process.wait(PATIENCE_S), self.log.read_text()
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {PATIENCE_S} s:\n{self.log.read_text()}", pytrace=False)


@dataclass(frozen=True)
class Workplace:
    """A folder, shared by all hosts, in which the README's command lines mean a tiny job."""

    folder: Path

    def start(self, hosts: Cluster, host: str, line: list[str], **more: str) -> Started:
        """Start a command on a host, in this folder; ``more`` are environment variables."""
        log = self.folder / f"log-{len(list(self.folder.glob('log-*')))}"
        environment = {**os.environ, **more, "OMP_NUM_THREADS": "1"}
        with log.open("w") as file:
            process = hosts.popen(
                host,
                line,
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        return Started(process, log)

    def call(self, hosts: Cluster, host: str, line: list[str], **more: str) -> str:
        """The output of a command that must succeed."""
        status, output = self.start(hosts, host, line, **more).finish()
        assert status == 0, f"{shlex.join(line)}\n{output}"
        return output

    def wait_for_step(self, run: str, number: int, *started: Started) -> None:
        """Until the trajectory has so many steps; fails if a command ended before."""
        path = self.folder / run / "trajectory.jsonl"
        deadline = time.monotonic() + PATIENCE_S
        while not path.exists() or path.read_text().count("\n") <= number:
            ended = [one.log.read_text() for one in started if one.process.poll() is not None]
            assert not ended, f"ended before step {number}:\n{ended[0]}"
            assert time.monotonic() < deadline, f"no step {number}:\n{started[0].log.read_text()}"
            time.sleep(0.02)

    def steps(self, run: str) -> list[Step]:
        """The steps in a run's trajectory."""
        return trajectory.read(self.folder / run / "trajectory.jsonl").steps

    def weights(self, run: str) -> str:
        """Fingerprint of a run's final weights."""
        fingerprint: str = json.loads((self.folder / run / "results.json").read_text())["weights"]
        return fingerprint

    def same_as_alone(self, run: str) -> bool:
        """Whether a run is done and has taken the same steps to the same weights as one process."""
        return (self.steps(run), self.weights(run)) == (self.steps("alone"), self.weights("alone"))


def need(tools: dict[str, str]) -> None:
    """Skip if a virtual cluster with these tools cannot be had here."""
    if gpus.kept:
        pytest.skip("virtual hosts share the GPU of this machine, which launchers show to each of them")
    if reason := missing({**TOOLS, **tools}):
        pytest.skip(reason)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """With a run of one process in it, called ``alone``."""
    need({})
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "launcher").symlink_to(ROOT / "launcher")
    path = write_tiny_config(folder / "configs", steps=STEPS)
    data = yaml.safe_load(path.read_text())
    data["output"] = {"dir": "alone", "export": False, "test": False}
    (folder / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(data))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output_of(["-m", "mezo_dist", "train", "configs/quickstart.yaml"], folder, environment)
    return Workplace(folder)


@pytest.fixture
def two_hosts() -> Iterator[Cluster]:
    need({})
    with cluster(2) as hosts:
        yield hosts


@pytest.fixture
def three_hosts() -> Iterator[Cluster]:
    need({})
    with cluster(3) as hosts:
        yield hosts
