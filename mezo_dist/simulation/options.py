"""The options of ``mezo-dist simulate``. Nothing is imported here but argparse, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse

from mezo_dist.planning.options import add_question

EPILOG = """\
MODEL: as for `mezo-dist plan`, and so are the options of machines and of the run, but that --batch (or --directions) is
that of each rank: see --grow. AdamW with checkpoints, under the same failures, stands beside. Numbers that are nobody's
measurement are assumptions: `--assume NAME=VALUE` changes them, mezo_dist/simulation/assumptions.py explains them, and
the table of sensitivities says which carry the result.
"""


def add_simulate(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.usage = "mezo-dist simulate [--help] [OPTION ...] MODEL|CONFIG"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    machine = add_question(parser)
    machine.add_argument("--hosts", type=int, nargs="+", default=[1, 10, 100, 1000], metavar="N",
                         help="numbers of hosts; 1 10 100 1000 by default")  # fmt: skip
    machine.add_argument("--spares", type=int, metavar="N", default=0, help="hosts that stand by; none by default")
    machine.add_argument("--reduce", choices=["ring", "tree", "hierarchical"], default="ring",
                         help="way of the scalars; ring, which is what runs do, by default")  # fmt: skip
    job = parser.add_argument_group("the job")
    job.add_argument("--time", metavar="TIME", default="7d", help="that is simulated; 7d by default")
    job.add_argument("--grow", choices=["batch", "directions", "none"], default="batch",
                     help="what each further rank adds to a step; batch by default")  # fmt: skip
    job.add_argument("--launcher", choices=["torchrun", "slurm"], default="torchrun",
                     help="goes on with the hosts that are left (the default), or waits in the queue")  # fmt: skip
    job.add_argument("--snapshots", default="auto", metavar="STEPS",
                     help="steps between snapshots, none, or auto: as often as is best")  # fmt: skip
    job.add_argument("--stragglers", metavar="RUN", help="run folder whose steps say how times spread")
    job.add_argument("--assume", nargs="+", default=[], metavar="NAME=VALUE", help="as in mtbf=90d silent=0.5 read=5GB")
    answer = parser.add_argument_group("the answer")
    answer.add_argument("--every-layout", action="store_true", help="the best of each layout, not of all")
    answer.add_argument("--weeks", type=int, metavar="N", default=4, help="how often it is drawn; 4 times by default")
    answer.add_argument("--seed", type=int, metavar="N", default=0, help="of what is drawn")
    answer.add_argument("--plot", metavar="FILE", help="draw it into a .png, .svg or .pdf")
    answer.add_argument("--json", action="store_true", help="one JSON object in place of tables")
