"""Ends what a supervisor leaves behind when it is killed: all process groups it had started.

Run as a script by path: `python -I -S reaper.py GRACE_S`, with a pipe of the supervisor as its
standard input. Lines `+PGID` and `-PGID` tell what runs. The end of the input without `-` for each
means that the supervisor is gone: the groups get SIGTERM and, after the grace, SIGKILL. It covers
what the kernel's death signal does not: grandchildren, and children that ignore SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable


def remaining_groups(lines: Iterable[str]) -> set[int]:
    """The groups that were named with `+` and not with `-` after it.

    Only whole lines count: half a number would be somebody else's group.
    """
    groups: set[int] = set()
    for line in lines:
        sign, number = line[:1], line[1:-1]
        if not (line.endswith("\n") and number.isascii() and number.isdigit() and int(number) > 1):
            continue
        if sign == "+":
            groups.add(int(number))
        elif sign == "-":
            groups.discard(int(number))
    return groups


def signal_groups(groups: Iterable[int], number: int) -> set[int]:
    """Sends a signal to each group and returns those that still have a process."""
    alive = set()
    for group in groups:
        try:
            os.killpg(group, number)
            alive.add(group)
        except (ProcessLookupError, PermissionError):
            continue
    return alive


def end_groups(groups: set[int], grace_s: float) -> None:
    """SIGTERM, patience, SIGKILL."""
    deadline = time.monotonic() + grace_s
    groups = signal_groups(groups, signal.SIGTERM)
    while groups and time.monotonic() < deadline:
        time.sleep(0.05)
        groups = signal_groups(groups, 0)
    signal_groups(groups, signal.SIGKILL)


def main(arguments: list[str]) -> None:
    """Waits for the supervisor's end. Signals meant for the supervisor do not end it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_groups(remaining_groups(sys.stdin), float(arguments[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
