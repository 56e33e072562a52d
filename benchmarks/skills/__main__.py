"""A text-to-image run that fits two cores for an hour, and what it has learnt: colour, count, position and spelling.

    python -m benchmarks.skills [--quick]                   train, score every snapshot, write results and the sheet
    python -m benchmarks.skills pictures FOLDER --count N   write training pictures and captions for a run of one's own

Training can be broken off and taken up again; `--chunks` makes it longer or shorter, as long as its rate has not begun
to fall. Needs the `demo` extra, for its fonts.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.report import RESULTS
from benchmarks.skills.bench import FULL, QUICK, measure
from benchmarks.skills.pictures import write_folder
from benchmarks.skills.training import CHUNK_STEPS


def main() -> int:
    """Do as asked; the exit status says whether the targets were met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, a few steps, few pictures; write nothing")
    parser.add_argument("--chunks", type=int, default=FULL.steps // CHUNK_STEPS, help="of 512 samples each")
    commands = parser.add_subparsers(dest="command")
    pictures = commands.add_parser("pictures", help="write pictures and captions for `commonweight data prepare`")
    pictures.add_argument("folder", type=Path)
    pictures.add_argument("--count", type=int, default=20_000)
    pictures.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.command == "pictures":
        write_folder(arguments.folder, arguments.seed, arguments.count)
        return 0
    torch.set_num_threads(1)  # the two threads of training are its own
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            return 0 if measure(QUICK, Path(folder), quick=True) else 1
    return (
        0
        if measure(replace(FULL, steps=arguments.chunks * CHUNK_STEPS), RESULTS / "cells" / "skills", quick=False)
        else 1
    )


if __name__ == "__main__":
    sys.exit(main())
