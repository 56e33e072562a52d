"""Founds a run again and again and has itself killed at another place each time; `test_founding.py` runs it.

    python kill_founding.py FOLDER    prints one JSON object a line: where it was killed, and what came of it

Each founding is a forked child that sends itself SIGKILL right before its n-th change of the file system (Python's
audit events). Then another child founds the run once more, in the same place.
"""

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from commonweight.digits import write_digits
from coordinator.directory import RunDirectory
from coordinator.founding import found
from coordinator.settings import Settings

RANDOM_PLACES = 6
CHANGES = frozenset({"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.chmod", "shutil.rmtree"})


def in_child(work: Callable[[], None]) -> int:
    """Do the work in a forked child; return its exit code, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path) -> None:
    """Count the places, then be killed at every rename and at some other places."""
    settings = Settings()
    shards, heldout = write_digits(folder / "data", shards=2)

    def founding(place: Path) -> None:
        found(
            RunDirectory(place / "run"),
            settings,
            shards=shards,
            heldout=heldout,
            root_key_out=place / "root.pem",
            seed=bytes(32),
            now_ms=1_800_000_000_000,
        )

    def watched(place: Path, stop_at: int) -> None:
        seen = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            if event in CHANGES and str(place) in str(arguments):
                if seen == stop_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if stop_at < 0:
                    with (folder / "events").open("a", encoding="utf-8") as file:
                        file.write(event + "\n")
                seen += 1

        place.mkdir()
        sys.addaudithook(hook)
        founding(place)

    assert in_child(lambda: watched(folder / "whole", -1)) == 0
    events = (folder / "events").read_text(encoding="utf-8").split()
    renames = [i for i, event in enumerate(events) if event == "os.rename"]
    others = random.Random(1).sample([i for i in range(len(events)) if i not in renames], RANDOM_PLACES)
    others = sorted({*others, len(events) - 1})
    for stop_at in sorted(renames + others):
        place = folder / f"killed-{stop_at}"
        killed = in_child(lambda: watched(place, stop_at))  # noqa: B023 - runs before the next turn
        whole = RunDirectory(place / "run").holds_run
        again = 0 if whole else in_child(lambda: founding(place))  # noqa: B023
        answer = {"place": str(place), "event": events[stop_at], "killed": killed, "whole": whole, "again": again}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
