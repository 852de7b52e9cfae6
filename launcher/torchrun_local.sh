#!/usr/bin/env bash
# Start a training job as N processes on this machine:
#
#   launcher/torchrun_local.sh N CONFIG [OVERRIDE...]
#   launcher/torchrun_local.sh 2 configs/quickstart.yaml --seed 1
#
# The processes share the cores; set OMP_NUM_THREADS, the threads of one process, to choose otherwise.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 N CONFIG [OVERRIDE...]" >&2
    exit 2
fi
num_processes=$1
shift

num_cores=$(getconf _NPROCESSORS_ONLN)
num_threads=$((num_cores > num_processes ? num_cores / num_processes : 1))

set -x # show what runs
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$num_threads}
# --standalone finds a free port, so that two jobs can run side by side. After --, options are ours: torchrun would take
# --monitor for the beginning of its own --monitor-interval.
exec torchrun --standalone --nproc-per-node "$num_processes" -m -- mezo_dist train "$@"
