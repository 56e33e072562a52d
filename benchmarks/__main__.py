"""`python -m benchmarks [--quick]`: every benchmark in turn; the exit status says whether all targets hold."""

import subprocess
import sys

NAMES = (
    "train_step",
    "memory",
    "data",
    "merge",
    "upload",
    "verify",
    "attacks",
    "fleet",
    "codec",
    "convergence",
    "links",
    "skills",
)


def main() -> int:
    """Run them all, each in a process of its own."""
    missed = [
        name
        for name in NAMES
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]], check=False).returncode
    ]
    for name in missed:
        print(f"benchmarks.{name} missed a target or failed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
