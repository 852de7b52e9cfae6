#!/usr/bin/env bash
# Start a training job on several machines with torchrun. Run the same line on each of them:
#
#   launcher/torchrun.sh HOSTS FIRST_HOST CONFIG [OVERRIDE...]
#   launcher/torchrun.sh 2 host1 configs/quickstart.yaml        waits until there are two
#   launcher/torchrun.sh 2:4 host1 configs/quickstart.yaml      elastic: two to four, and hosts may come and go
#
# FIRST_HOST is one of the machines; the others meet there, at port $PORT (29500). When a process or a host is lost, all
# ranks start again from the trajectory; only the loss of FIRST_HOST ends the job.
# PROCESSES (1) is the number of processes on each machine. RESTARTS (5) is how many losses the job survives: torchrun
# counts them on each machine, over the whole life of the job; hosts that join are not counted. It repeats bad input, too.
set -euo pipefail

if [[ $# -lt 3 || ! $1 =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]]; then
    echo "usage: $0 HOSTS FIRST_HOST CONFIG [OVERRIDE...]" >&2
    exit 2
fi
hosts=$1 first=$2
shift 2

set -x # show what runs
exec torchrun --nnodes "$hosts" --nproc-per-node "${PROCESSES:-1}" --max-restarts "${RESTARTS:-5}" \
    --rdzv-backend c10d --rdzv-endpoint "$first:${PORT:-29500}" \
    -m -- mezo_dist train "$@" --output.if_exists=resume
