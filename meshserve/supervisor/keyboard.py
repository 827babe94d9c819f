"""Single key presses from the terminal, while the mesh serves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def key_presses(on_key: Callable[[str], None]) -> Iterator[None]:
    """Calls `on_key` with each key pressed; without a terminal, or in the background, never.

    The terminal goes on turning Ctrl-C into a signal, and is put back as it was.
    """
    if not _owns_terminal():
        yield
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    loop = asyncio.get_running_loop()
    # A job that is put into the background must serve on, not be stopped for touching the terminal.
    ignored = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTTIN, signal.SIGTTOU)
    }

    def read() -> None:
        try:
            pressed = os.read(descriptor, 64).decode("utf-8", "replace")
        except OSError:
            pressed = ""
        if not pressed:
            loop.remove_reader(descriptor)
        for key in pressed:
            on_key(key)

    tty.setcbreak(descriptor)
    loop.add_reader(descriptor, read)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
        for number, handler in ignored.items():
            signal.signal(number, handler)


def _owns_terminal() -> bool:
    """Whether standard input is a terminal with this process in its foreground."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False
