"""The batch script that runs a study as an array of SLURM jobs, one for each run of a case."""

from __future__ import annotations

import shlex
from pathlib import Path

from mezo_dist.studies.cases import Study

SCRIPT = """\
#!/usr/bin/env bash
#SBATCH --job-name=mezo-study
#SBATCH --array=0-{last}%1
#SBATCH --nodes={hosts}
#SBATCH --ntasks-per-node={ranks}
#SBATCH --output=study-%A-%a.log
# {count} runs ({cases} cases, {repeats} times each, taking turns), one after another, each on as many of these nodes as
# it needs. Save this, add what your site wants (partition, GPUs, account), and submit it from a folder that all nodes
# see:
#
#   mezo-dist study {file} --slurm > study.sbatch && sbatch study.sbatch
#
# Started again, it leaves out what is done. Tables and plots: mezo-dist study {file} --to {to} --limit 0
set -euo pipefail
exec mezo-dist study {file} --to {to} --launcher srun --only "$SLURM_ARRAY_TASK_ID"
"""


def script(study: Study, file: Path, to: Path) -> str:
    """The script.

    Args:
        study: what is run.
        file: of the study.
        to: folder of the results.
    """
    return SCRIPT.format(
        last=len(study.cases) * study.repeats - 1,
        hosts=max(case.hosts for case in study.cases),
        ranks=max(case.ranks for case in study.cases),
        count=len(study.cases) * study.repeats,
        cases=len(study.cases),
        repeats=study.repeats,
        file=shlex.quote(str(file)),
        to=shlex.quote(str(to)),
    )
