#!/usr/bin/env bash
# The Debian packages that the virtual cluster and its tests need, and nothing else of mezo_dist does:
#
#   launcher/system_packages.sh            name those that are missing here
#   launcher/system_packages.sh install    install them, if this is root on a system with apt; else name them
set -euo pipefail

packages=(
    iproute2 util-linux           # the virtual cluster: ip, tc; unshare, nsenter
    openssh-client openssh-server # how DeepSpeed and mpirun reach the hosts
    pdsh                          # DeepSpeed's way of running something on many hosts
    openmpi-bin mpich             # two kinds of mpirun
    slurm-wlm munge               # slurmctld, slurmd, srun, sbatch
)

missing=()
for package in "${packages[@]}"; do
    dpkg-query --show --showformat '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [[ ${#missing[@]} -eq 0 ]]; then
    exit 0
fi
echo "system packages that the tests on the virtual cluster need: ${missing[*]}"
if [[ ${1:-} == install && $(id -u) -eq 0 ]] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -qq --yes --no-install-recommends "${missing[@]}" >/dev/null
    # Their services are for real hosts; nothing here needs them.
    for service in slurmctld slurmd munge ssh; do service "$service" stop >/dev/null 2>&1 || true; done
fi
