"""A real SLURM on a virtual cluster: munged and slurmd on every host, slurmctld on the first."""

from __future__ import annotations

import time

from .hosts import TOOLS, Cluster, ClusterError

SLURM_TOOLS = {**TOOLS, "munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "srun": "slurm-wlm"}
"""What `missing` should look for."""
START_S = 30
"""Seconds that the nodes have to report for work."""
CONFIG = """
ClusterName=virtual
SlurmctldHost={first}
SlurmUser=root
AuthType=auth/munge
# Hosts share the machine's control groups.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/spool
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmctldLogFile=/run/slurm/slurmctld.log
SlurmdLogFile=/run/slurm/slurmd.log
# A host that lost its power is noticed within this, and its job goes back into the queue.
SlurmdTimeout=10
KillWait=2
ReturnToService=2
# All hosts are one machine: each may use two cores, whatever the machine has.
SlurmdParameters=config_overrides
NodeName={hosts} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def start_slurm(cluster: Cluster) -> None:
    """Start SLURM's daemons and wait until every host takes jobs. They end with the cluster.

    Raises:
        ClusterError: a daemon does not start, or a host did not report within `START_S`.
    """
    config = CONFIG.format(first=cluster.hosts[0], hosts=",".join(cluster.hosts))
    for host in cluster.hosts:
        inside = f"""
        mkdir -p /run/munge /run/slurm/state /run/slurm/spool
        # Any secret will do that all hosts know: the ssh key is one.
        (umask 077; cp /run/cluster/key /run/munge/key)
        munged --key-file=/run/munge/key --pid-file=/run/munge/pid --log-file=/run/munge/log --seed-file=/run/munge/seed
        mount -t tmpfs tmpfs /etc/slurm
        # Named, slurmd does not look for control groups; with the plugins chosen above nothing uses them.
        echo CgroupPlugin=cgroup/v1 > /etc/slurm/cgroup.conf
        cat > /etc/slurm/slurm.conf <<'END'\n{config}\nEND
        if [ $(hostname) = {cluster.hosts[0]} ]; then slurmctld; fi
        slurmd
        """
        cluster.run(host, ["sh", "-ec", inside], timeout_s=START_S)
    deadline = time.monotonic() + START_S
    while (states := _states(cluster)) != ["idle"] * len(cluster.hosts):
        if time.monotonic() > deadline:
            log = cluster.run(cluster.hosts[0], ["tail", "-n", "20", "/run/slurm/slurmctld.log"])
            raise ClusterError(f"SLURM: hosts are {states} after {START_S} s, not all idle\n{log}")
        time.sleep(0.1)


def _states(cluster: Cluster) -> list[str]:
    return cluster.run(cluster.hosts[0], ["sinfo", "--noheader", "--Node", "--format=%T"]).split()
