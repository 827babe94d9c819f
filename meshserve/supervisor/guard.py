"""Execs a command so that it is told to end when its parent dies, however the parent dies.

Run as a script by path: `python -I -S guard.py PARENT_PID COMMAND...`. It imports next to nothing,
because it stands before every process of the mesh.
"""

from __future__ import annotations

import os
import signal
import sys

PR_SET_PDEATHSIG = 1
EXIT_CANNOT_EXECUTE = 126


def main(arguments: list[str]) -> None:
    """Replaces this process by the command; on Linux the kernel then watches the parent."""
    parent_pid, command = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the kernel was asked to watch it
        sys.exit(0)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        sys.exit(EXIT_CANNOT_EXECUTE)


if __name__ == "__main__":
    main(sys.argv[1:])
