"""One child process: in a process group of its own, with its output in a log file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

GUARD = Path(__file__).with_name("guard.py")
TAIL_BYTES = 16 * 2**10


class ChildProcess:
    """A running child. Its process group is ended with it, so that nothing of it stays behind."""

    def __init__(self, process: asyncio.subprocess.Process, log_path: Path) -> None:
        self._process = process
        self.log_path = log_path

    @classmethod
    async def start(
        cls, command: Sequence[str], environment: Mapping[str, str], log_path: Path
    ) -> ChildProcess:
        """Starts a command that appends its output to `log_path`. Raises OSError.

        The output goes to the file and not through a pipe of ours: a supervisor that is suspended
        must not hold up the mesh.
        """
        with log_path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-S",
                str(GUARD),
                str(os.getpid()),
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(environment),
                start_new_session=True,
            )
        return cls(process, log_path)

    @property
    def pid(self) -> int:
        """Also the id of its process group."""
        return self._process.pid

    async def wait(self) -> int:
        """Waits for the end and returns the exit code, negative for a signal.

        What is left of the process group is killed.
        """
        code = await self._process.wait()
        self._signal_group(signal.SIGKILL)
        return code

    async def stop(self, timeout_s: float) -> int:
        """Asks the process to end, kills its group if it has not after `timeout_s`."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(timeout_s):
                return await self.wait()
        except TimeoutError:
            self.kill()
            return await self.wait()

    def kill(self) -> None:
        """Kills the whole process group at once."""
        self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log file; none where there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            start = max(0, file.tell() - TAIL_BYTES)
            file.seek(start)
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    return (lines[1:] if start else lines)[-count:]


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
