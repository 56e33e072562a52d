"""`python -m commonweight` is the `commonweight` command."""

import sys
from typing import NoReturn

_INTERRUPTED = 130
"""As `commonweight.cli.main.INTERRUPTED`, which is not there yet while it is imported."""


def main() -> NoReturn:
    """Run the command line and end the process with its exit code, also if Ctrl-C comes while it is being imported."""
    try:
        from commonweight.cli.main import run

        code = run()
    except KeyboardInterrupt:
        code = _INTERRUPTED
    sys.exit(code)


if __name__ == "__main__":
    main()
