#!/usr/bin/env bash
# Start a training job on several machines with DeepSpeed's launcher, from one of them, over ssh:
#
#   launcher/deepspeed.sh [OPTION OF deepspeed...] -- CONFIG [OVERRIDE...]
#   launcher/deepspeed.sh --hostfile hostfile --exclude host3 -- configs/quickstart.yaml
#
# A hostfile has a line `host1 slots=1` for each machine, slots being the processes there. Environment variables that all
# machines need go into a file .deepspeed_env, in this folder or at home, as lines NAME=VALUE.
set -euo pipefail

options=()
while [[ $# -gt 0 && $1 != -- ]]; do
    options+=("$1")
    shift
done
if [[ $# -lt 2 ]]; then
    echo "usage: $0 [OPTION OF deepspeed...] -- CONFIG [OVERRIDE...]" >&2
    exit 2
fi
shift

# So that ssh, and with it the job, ends within half a minute when a machine is gone.
export PDSH_SSH_ARGS_APPEND=${PDSH_SSH_ARGS_APPEND:--o ServerAliveInterval=10 -o ServerAliveCountMax=3}
set -x # show what runs
exec deepspeed "${options[@]}" --module mezo_dist train "$@" --output.if_exists=resume
