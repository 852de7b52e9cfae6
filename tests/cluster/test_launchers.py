"""Every launcher starts the same job on several hosts, with the same result as one process, and stands what happens.

A host that is killed takes its cable with it: the others get no word of it, as with a power cut.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.hosts import HOSTFILE, Cluster, ClusterError, cluster
from launcher.slurm import SLURM_TOOLS, start_slurm

from .conftest import PATIENCE_S, STEPS, Workplace, command, commands, need

pytestmark = pytest.mark.distributed

EARLY = 5
STUDIES = Path(__file__).resolve().parents[2] / "examples" / "scaling_study"
LOST = "stopped, or did not answer"
SOON = "--distributed.timeout_s=8"
"""Notice a dead host within seconds."""
RENDEZVOUS = {"PET_RDZV_CONF": "last_call_timeout=2,keep_alive_interval=1"}
"""torchrun waits 30 s for hosts that may come; here none does."""


def into(run: str) -> str:
    return f"--output.dir={run}"


def test_torchrun_goes_on_without_a_host_that_was_killed(workplace: Workplace, three_hosts: Cluster) -> None:
    line = [*command("launcher/torchrun.sh 2:3"), SOON, into("elastic")]
    started = [workplace.start(three_hosts, host, line, **RENDEZVOUS) for host in three_hosts.hosts]
    workplace.wait_for_step("elastic", EARLY, *started)
    three_hosts.kill("host3")
    assert len(workplace.steps("elastic")) < STEPS, "killed too late to prove anything"
    outcomes = [one.finish() for one in started[:2]]
    assert [status for status, _ in outcomes] == [0, 0], outcomes
    output = outcomes[0][1] + outcomes[1][1]
    assert re.search(rf"3 process\(es\).*{LOST}.*2 process\(es\)", output, re.DOTALL), output
    assert workplace.same_as_alone("elastic")


def test_torchrun_survives_a_link_that_is_cut_for_10_s(workplace: Workplace, two_hosts: Cluster) -> None:
    line = [*command("launcher/torchrun.sh 2 "), into("cut")]
    started = [workplace.start(two_hosts, host, line) for host in two_hosts.hosts]
    workplace.wait_for_step("cut", EARLY, *started)
    two_hosts.cut("host2")
    time.sleep(1)  # what was under way arrives, or does not
    stopped_at = len(workplace.steps("cut"))
    time.sleep(9)
    assert len(workplace.steps("cut")) == stopped_at < STEPS, "the link was not cut"
    two_hosts.mend("host2")
    outcomes = [one.finish() for one in started]
    assert [status for status, _ in outcomes] == [0, 0], outcomes
    assert LOST not in outcomes[0][1], "it was to survive, not to start again"
    assert workplace.same_as_alone("cut")


def test_deepspeed_over_ssh_ends_clearly_and_resumes_without_the_host(
    workplace: Workplace, three_hosts: Cluster
) -> None:
    need({"pdsh": "pdsh"})
    shutil.copy(f"/proc/{three_hosts.pid('host1')}/root{HOSTFILE}", workplace.folder / "hostfile")
    # DeepSpeed passes little of the environment on; ranks with two threads each would fight for two cores.
    (workplace.folder / ".deepspeed_env").write_text("HF_HUB_OFFLINE=1\nOMP_NUM_THREADS=1\n")
    quick = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=1 -o ServerAliveCountMax=3"}
    line = [*command("launcher/deepspeed.sh --hostfile hostfile -- "), SOON, into("deepspeed")]
    started = workplace.start(three_hosts, "host1", line, **quick)
    workplace.wait_for_step("deepspeed", EARLY, started)
    three_hosts.kill("host3")
    status, output = started.finish()
    assert status != 0
    assert LOST in output
    assert "export HF_HUB_OFFLINE=1;" in output, "from .deepspeed_env"
    assert "3 process(es)" in output
    assert len(workplace.steps("deepspeed")) < STEPS
    line = [*command("launcher/deepspeed.sh --hostfile hostfile --exclude host3"), SOON, into("deepspeed")]
    assert "2 process(es)" in workplace.call(three_hosts, "host1", line)
    assert workplace.same_as_alone("deepspeed")


@pytest.mark.parametrize("layout", ["replicated", "zero"])
def test_deepspeed_without_ssh(workplace: Workplace, two_hosts: Cluster, layout: str) -> None:
    shutil.copy(f"/proc/{two_hosts.pid('host1')}/root{HOSTFILE}", workplace.folder / "hostfile")
    started = []
    for number, host in enumerate(two_hosts.hosts):
        line = command(f"launcher/deepspeed.sh --hostfile hostfile --no_ssh --node_rank {number}")
        started.append(workplace.start(two_hosts, host, [*line, f"--layout.name={layout}", into(layout)]))
    outcomes = [one.finish() for one in started]
    assert [status for status, _ in outcomes] == [0, 0], outcomes
    assert f"layout      {layout}, 2 process(es)" in outcomes[0][1]
    assert workplace.same_as_alone(layout)


def test_mpirun_over_ssh_ends_clearly_and_resumes_on_what_is_left(workplace: Workplace, two_hosts: Cluster) -> None:
    need({"mpirun": "openmpi-bin"})
    pytest.importorskip("mpi4py")
    shutil.copy(f"/proc/{two_hosts.pid('host1')}/root{HOSTFILE}", workplace.folder / "hostfile")
    quick = {f"OMPI_MCA_oob_tcp_keepalive_{what}": "1" for what in ("time", "intvl", "probes")}
    started = workplace.start(two_hosts, "host1", [*command("launcher/mpirun.sh --hostfile"), into("mpirun")], **quick)
    workplace.wait_for_step("mpirun", EARLY, started)
    two_hosts.kill("host2")
    status, output = started.finish()
    assert status != 0
    assert "lost communication with a remote daemon" in output
    assert "2 process(es)" in output
    assert len(workplace.steps("mpirun")) < STEPS
    line = [*command("launcher/mpirun.sh --host host1:2"), into("mpirun")]
    assert "2 process(es)" in workplace.call(two_hosts, "host1", line)
    assert workplace.same_as_alone("mpirun")


def test_mpich_that_is_told_where_to_meet(workplace: Workplace, two_hosts: Cluster) -> None:
    need({"mpiexec.hydra": "mpich"})
    line = [*command("MPIRUN=mpiexec.hydra"), into("mpich")]
    assert "2 process(es)" in workplace.call(two_hosts, "host1", ["env", *line])
    assert workplace.same_as_alone("mpich")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    """Three nodes, the first of which is the controller, too."""
    need(SLURM_TOOLS)
    with cluster(3) as hosts:
        start_slurm(hosts)
        yield hosts


def job(workplace: Workplace, hosts: Cluster, line: list[str]) -> str:
    """Submit a job; its number."""
    (number,) = re.findall(r"Submitted batch job (\d+)", workplace.call(hosts, "host1", line))
    return str(number)


def wait_for_state(workplace: Workplace, hosts: Cluster, number: str, wanted: str) -> None:
    """Until all parts of a SLURM job are in a state."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        shown = hosts.run("host1", ["scontrol", "show", "job", number])
        states = set(re.findall(r"JobState=(\w+)", shown))
        if states == {wanted}:
            return
        logs = "".join(path.read_text() for path in workplace.folder.glob("slurm-*.log"))
        assert not states & {"FAILED", "CANCELLED", "TIMEOUT"}, f"{shown}\n{logs}"
        assert time.monotonic() < deadline, f"{shown}\n{logs}"
        for part in shown.split("\n\n"):
            if "Reason=BeginTime" in part:  # SLURM holds back what returned to the queue for two minutes
                with contextlib.suppress(ClusterError):  # it has just started
                    hosts.run("host1", ["scontrol", "update", part.split()[0], "StartTime=now"])
        time.sleep(0.2)


def nodes(hosts: Cluster, number: str) -> list[str]:
    """The hosts of a SLURM job."""
    listed = re.search(r"\bNodeList=(\S+)", hosts.run("host1", ["scontrol", "show", "job", number]))
    assert listed is not None
    return hosts.run("host1", ["scontrol", "show", "hostnames", listed[1]]).split()


def test_slurm_starts_a_job_per_seed_and_takes_it_up_again_after_a_warning(
    workplace: Workplace, slurm: Cluster
) -> None:
    number = job(workplace, slurm, command("sbatch --nodes=1 --array=0-1"))
    runs = [f"runs/{number}-seed{seed}" for seed in (0, 1)]
    workplace.wait_for_step(runs[0], EARLY)
    slurm.run("host1", ["scancel", "--signal=USR1", "--batch", f"{number}_0"])  # what comes before the time limit
    assert len(workplace.steps(runs[0])) < STEPS
    wait_for_state(workplace, slurm, number, "COMPLETED")
    logs = [path.read_text() for path in workplace.folder.glob("slurm-*.log")]
    assert any("back into the queue (time is nearly up)" in log for log in logs), logs
    assert workplace.same_as_alone(runs[0]), "the seed of the config is 0, too"
    assert len(workplace.steps(runs[1])) == STEPS
    assert workplace.weights(runs[1]) != workplace.weights(runs[0])


def test_slurm_runs_a_study_as_an_array(workplace: Workplace, slurm: Cluster) -> None:
    shutil.copy(STUDIES / "tiny.json", workplace.folder)
    (workplace.folder / "study.yaml").write_text(
        "name: array\nbase: {model: tiny.json, batch: 8, micro_batch: 4, tokens: 16}\nmatrix: {hosts: [1, 2]}\n"
        "repeats: 1\nsteps: 2\nwarmup: 1\n"
    )
    script = workplace.call(slurm, "host1", ["mezo-dist", "study", "study.yaml", "--slurm"])
    (workplace.folder / "study.sbatch").write_text(script)
    number = job(workplace, slurm, ["sbatch", "study.sbatch"])
    wait_for_state(workplace, slurm, number, "COMPLETED")
    results = workplace.folder / "results" / "array"
    lines = [json.loads(line) for line in (results / "results.jsonl").read_text().splitlines()]
    assert sorted(line["case"]["hosts"] for line in lines) == [1, 2], lines
    assert "| 2 |" in (results / "results.md").read_text()


def test_slurm_takes_a_job_to_another_node_when_one_fails(workplace: Workplace, slurm: Cluster) -> None:
    line = [*command("sbatch launcher/slurm.sbatch"), SOON, into("slurm")]
    number = job(workplace, slurm, line)
    workplace.wait_for_step("slurm", EARLY)
    lost = nodes(slurm, number)[-1]
    slurm.kill(lost)
    assert len(workplace.steps("slurm")) < STEPS
    wait_for_state(workplace, slurm, number, "COMPLETED")
    assert lost not in nodes(slurm, number)
    assert workplace.same_as_alone("slurm")


def test_every_command_of_the_readme_is_run_here() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    starts = re.findall(r'command\(\s*f?"([^"{]+)', tests)
    for line in commands():
        assert any(line.startswith(start) for start in starts), f"no test runs {line}"
