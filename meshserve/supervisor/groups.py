"""The process groups of the mesh, told to a reaper that outlives us."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REAPER = Path(__file__).with_name("reaper.py")
REAPER_GRACE_S = 5.0


class GroupReaper:
    """The process that ends our process groups if we are killed; see reaper.py.

    It is started with the first group and started anew if it has been killed itself.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._groups: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None

    def add(self, group: int) -> None:
        """From now on the group is ended if this process dies."""
        self._groups.add(group)
        if self._process is None or not self._tell(f"+{group}\n"):
            self._start()

    def remove(self, group: int) -> None:
        """The group has ended."""
        self._groups.discard(group)
        if self._process is not None and not self._tell(f"-{group}\n"):
            self._start()

    def close(self) -> None:
        """Nothing is left to watch."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()

    def _start(self) -> None:
        if self._process is not None:
            self._process.wait()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(REAPER), str(self._grace_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )
        self._tell("".join(f"+{group}\n" for group in sorted(self._groups)))

    def _tell(self, text: str) -> bool:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(text.encode())
        except BrokenPipeError:
            return False
        return True
