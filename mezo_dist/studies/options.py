"""The options of ``mezo-dist study``. Nothing is imported here but argparse, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
FILE is YAML: `base` holds settings of all cases, `matrix` lists of values whose combinations are run, `cases` single
ones; mezo_dist/studies/cases.py lists the settings. examples/scaling_study has files for strong and weak scaling, model
size, and batch and context. A run that is in TO/results.jsonl is not done again.
"""


def add_study(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.usage = "mezo-dist study [--help] [OPTION ...] FILE"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("file", type=Path, metavar="FILE", help="the study")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="of the results; results/NAME by default")
    parser.add_argument("--limit", type=int, metavar="RUNS", help="stop after so many runs; 0: only tables and plots")
    parser.add_argument("--only", type=int, metavar="RUN", help="do this run alone, from 0 on")
    parser.add_argument("--launcher", choices=["torchrun", "srun"], default="torchrun",
                        help="torchrun here and on virtual hosts (the default), or srun inside a job")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the runs, and do none")
    parser.add_argument("--slurm", action="store_true", help="print a batch script for an array of SLURM jobs")
