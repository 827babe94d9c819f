"""Single key presses from the terminal, while the mesh serves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def key_presses(on_key: Callable[[str], None]) -> Iterator[None]:
    """Calls `on_key` with each key pressed; where there is no terminal, never.

    The terminal goes on turning Ctrl-C into a signal, and is put back as it was.
    """
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    try:
        before = termios.tcgetattr(descriptor)
    except termios.error:
        yield
        return
    loop = asyncio.get_running_loop()

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
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
