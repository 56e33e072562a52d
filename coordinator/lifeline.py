"""What every process of the coordinator does first: end with its supervisor, and take as many sockets as it may.

The supervisor holds the writing end of a pipe; a child reads the other end and exits when it closes. This works after
SIGKILL too, when nobody is left to say goodbye, and keeps a second coordinator from meeting the first one's children.
"""

import os
import resource
import threading


def exit_with_parent(descriptor: int) -> None:
    """Exit this process at once when the pipe at `descriptor` closes."""

    def wait() -> None:
        while os.read(descriptor, 1):
            continue
        os._exit(3)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def raise_file_limit() -> None:
    """Let this process open as many files and sockets as the system allows it; the usual soft limit is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
