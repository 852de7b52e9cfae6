#!/usr/bin/env bash
# Start a training job with mpirun, from one of the machines, over ssh:
#
#   launcher/mpirun.sh [OPTION OF mpirun...] -- CONFIG [OVERRIDE...]
#   launcher/mpirun.sh --hostfile hostfile -- configs/quickstart.yaml
#
# Ranks agree on where they meet through mpi4py (pip install 'mezo_dist[mpi]'). Without it, or with another MPI than
# mpi4py finds, tell them: MASTER_ADDR=host1 MASTER_PORT=29500, passed on to all ranks (-x of Open MPI, -genv of MPICH).
# MPIRUN names another mpirun: mpiexec, mpiexec.hydra, srun --mpi=pmix.
set -euo pipefail

options=()
while [[ $# -gt 0 && $1 != -- ]]; do
    options+=("$1")
    shift
done
if [[ $# -lt 2 ]]; then
    echo "usage: $0 [OPTION OF mpirun...] -- CONFIG [OVERRIDE...]" >&2
    exit 2
fi
shift

# So that Open MPI ends the job half a minute after a machine is gone; it waits for hours otherwise.
export OMPI_MCA_oob_tcp_keepalive_time=${OMPI_MCA_oob_tcp_keepalive_time:-10}
export OMPI_MCA_oob_tcp_keepalive_intvl=${OMPI_MCA_oob_tcp_keepalive_intvl:-5}
export OMPI_MCA_oob_tcp_keepalive_probes=${OMPI_MCA_oob_tcp_keepalive_probes:-4}
set -x # show what runs
exec ${MPIRUN:-mpirun} "${options[@]}" python -m mezo_dist train "$@" --output.if_exists=resume
