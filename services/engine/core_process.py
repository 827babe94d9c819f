"""One life of the core process, seen from its front: spawned, spoken to, ended."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence

import msgspec

from services.engine.core.framing import LENGTH, frame
from services.engine.core.messages import Command, Event, Start
from services.engine.core.settings import CoreSettings

CORE_COMMAND: tuple[str, ...] = (sys.executable, "-m", "services.engine.core.process")
_EXIT_GRACE_S = 2.0
# Compute threads that wait for each other sleep instead of spinning: with other services on the
# same cores, spinning takes from them what the slowest thread is waiting for.
CORE_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
_RECEIVE_BUFFER_BYTES = 1 << 22


class CoreProcess:
    """A spawned core. Commands go out through `send`, events come in through `events`."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Event)

    @classmethod
    async def spawn(
        cls, settings: CoreSettings, command: Sequence[str] = CORE_COMMAND
    ) -> CoreProcess:
        """Start a core and tell it its settings; its first event is Ready or Fatal.

        Raises:
            OSError: the process cannot be started.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Larger than the core's default, so that a step's frame is one read.
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
            process = await asyncio.create_subprocess_exec(
                *command,
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                env=CORE_ENVIRONMENT | os.environ,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            # The core's end must be open in the core alone, or its death would go unnoticed.
            theirs.close()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        core = cls(process, reader, writer)
        core.send(Start(settings))
        return core

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def send(self, command: Command) -> None:
        """Send one command; to a core that is gone it goes nowhere."""
        if not self._writer.is_closing():
            self._writer.write(frame(command, self._encoder))

    async def events(self) -> AsyncIterator[Event]:
        """The core's events, until it closes its end, which it does only by ending."""
        while True:
            try:
                (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
                payload = await self._reader.readexactly(length)
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            yield self._decoder.decode(payload)

    def kill(self) -> None:
        """End the process at once (SIGKILL)."""
        if self._process.returncode is None:
            self._process.kill()

    async def close(self) -> int:
        """Close our end, wait for the process to end by itself, kill it if it does not.

        Returns the exit code, negative for a signal.
        """
        self._writer.close()
        try:
            async with asyncio.timeout(_EXIT_GRACE_S):
                return await self._process.wait()
        except TimeoutError:
            self.kill()
            return await self._process.wait()
