"""A program in a terminal of its own, and what it shows there."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence

_HOME = "\x1b[H"
_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """`python -m meshserve ARGUMENTS` in a pseudo-terminal. Ends with the `with` block."""

    def __init__(self, arguments: Sequence[str], columns: int, rows: int, **environ: str) -> None:
        self._controller, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        plain = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "meshserve", *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env={**plain, "TERM": "xterm-256color", "LANG": "C.UTF-8", **environ},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(terminal)
        self.output = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._controller)

    def press(self, keys: str) -> None:
        os.write(self._controller, keys.encode())

    @property
    def screen(self) -> list[str]:
        """The lines of the last picture that is complete, without colours."""
        pictures = self.output.split(_HOME)
        last = pictures[-2] if len(pictures) > 1 else ""
        return _SEQUENCE.sub("", last).replace("\r", "").split("\n")

    @property
    def pictures(self) -> list[list[str]]:
        """The lines of each picture so far."""
        return [
            _SEQUENCE.sub("", each).replace("\r", "").split("\n")
            for each in self.output.split(_HOME)
        ]

    def wait_for(self, text: str, within_s: float = 15.0) -> None:
        """Reads until a picture that begins from now on has the text."""
        begun = len(self.output)
        self._read(lambda: text in _SEQUENCE.sub("", self.output[begun:]), within_s, text)

    def wait_for_end(self, within_s: float = 15.0) -> int:
        """Reads to the end; the exit code."""
        self._read(lambda: self.process.poll() is not None, within_s, "the end")
        return self.process.wait()

    def _read(self, is_done: object, within_s: float, what: str) -> None:
        assert callable(is_done)
        deadline = time.monotonic() + within_s
        while not is_done():
            assert time.monotonic() < deadline, f"no {what} in:\n" + "\n".join(self.screen)
            if select.select([self._controller], [], [], 0.05)[0]:
                try:
                    data = os.read(self._controller, 65_536)
                except OSError:  # the program has ended
                    data = b""
                self.output += data.decode("utf-8", "replace")
