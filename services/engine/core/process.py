"""The engine core as a process of its own: commands in, events out, over one socket."""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

from services.engine.core.engine import EngineCore
from services.engine.core.errors import AdmissionError, StartupError
from services.engine.core.framing import ConnectionClosedError, CoreConnection
from services.engine.core.messages import (
    Abort,
    Add,
    Command,
    Drain,
    Ended,
    Fatal,
    LoadChanged,
    Log,
    ModelFacts,
    Ping,
    Pong,
    Ready,
    Refused,
    Start,
)
from services.engine.core.settings import CoreSettings
from services.runtime.modelfiles import ModelFileError

logger = logging.getLogger(__name__)

EngineBuilder: TypeAlias = Callable[[CoreSettings], tuple[EngineCore, ModelFacts]]

# An idle core checks its own integrity once nothing has come for this long.
_IDLE_CHECK_AFTER_S = 0.2
# How long the step loop has to notice that its front is gone before the process ends without it.
_ORPHAN_GRACE_S = 5.0


def serve(connection: CoreConnection, build_engine: EngineBuilder) -> int:
    """Run a core until its front goes away (0) or it cannot go on (1). Returns the exit code."""
    try:
        start = _receive_start(connection)
        try:
            engine, facts = build_engine(start.settings)
        except (StartupError, ModelFileError) as error:
            # The user's to mend, and written for the user: no traceback.
            connection.send(Fatal(str(error), starting=True))
            return 1
        except Exception as error:
            logger.exception("the core cannot start")
            connection.send(Fatal(f"{type(error).__name__}: {error}", starting=True))
            return 1
        # What loading left behind lives as long as the process: keep the collector away from it.
        gc.collect()
        gc.freeze()
        connection.send(Ready(facts))
        return _serve_commands(connection, engine)
    except ConnectionClosedError:
        return 0


def _receive_start(connection: CoreConnection) -> Start:
    commands = connection.receive(wait_s=None)
    if len(commands) != 1 or not isinstance(commands[0], Start):
        raise ConnectionClosedError("the front did not begin with Start")
    return commands[0]


def _serve_commands(connection: CoreConnection, engine: EngineCore) -> int:
    try:
        checked = True
        while True:
            commands = connection.receive(wait_s=_patience_s(engine, checked=checked))
            if not commands and not engine.has_work and not checked:
                engine.check_integrity()
                checked = True
            changed = False
            for command in commands:
                changed |= _handle(command, connection, engine)
            if engine.has_work:
                connection.send(engine.step())
                checked = False
            elif changed:
                connection.send(LoadChanged(engine.load()))
                checked = False
    except ConnectionClosedError:
        raise
    except Exception as error:
        logger.exception("the core gives up")
        connection.send(Fatal(f"{type(error).__name__}: {error}"))
        return 1


def _patience_s(engine: EngineCore, *, checked: bool) -> float | None:
    if engine.has_work:
        return 0.0
    return None if checked else _IDLE_CHECK_AFTER_S


def _handle(command: Command, connection: CoreConnection, engine: EngineCore) -> bool:
    """Carry out one command; returns whether the load changed."""
    if isinstance(command, Add):
        try:
            engine.add(command.sequences)
        except AdmissionError as error:
            ids = [request.sequence_id for request in command.sequences]
            connection.send(Refused(ids, type(error).__name__, str(error)))
            return False
        return True
    if isinstance(command, Abort):
        deltas = engine.abort(command.sequence_ids)
        if deltas:
            connection.send(Ended(deltas, engine.load()))
        return False
    if isinstance(command, Drain):
        engine.drain()
        return True
    if isinstance(command, Ping):
        connection.send(Pong(command.number, engine.load()))
    return False


class _LogForwarder(logging.Handler):
    """Sends log records to the front, so that the service's logs have one form."""

    def __init__(self, connection: CoreConnection) -> None:
        super().__init__()
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._connection.send(Log(record.levelno, record.name, self.format(record)))
        except ConnectionClosedError:
            # Nobody is left to tell; the step loop notices by itself.
            print(self.format(record), file=sys.stderr)


def _end_with_front(connection: socket.socket) -> None:
    """Wait until the front is gone, then give the step loop a moment to end by itself.

    The step loop sees a closed connection at its next step; this is for one that hangs in a step
    or a load and would otherwise keep the device for ever.
    """
    poll = select.poll()
    poll.register(connection, 0)  # a hang-up is reported unasked
    poll.poll()
    time.sleep(_ORPHAN_GRACE_S)
    os._exit(1)


def run(file_descriptor: int, build_engine: EngineBuilder) -> int:
    """Serve the front at the other end of an inherited socket. Returns the exit code."""
    # A terminal's Ctrl-C and a supervisor's SIGTERM reach the whole process group, but it is the
    # front that decides when the core ends: after it has drained.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raw = socket.socket(fileno=file_descriptor)
    connection = CoreConnection(raw)
    logging.basicConfig(
        level=logging.INFO, handlers=[_LogForwarder(connection)], format="%(message)s"
    )
    logging.captureWarnings(capture=True)
    threading.Thread(target=_end_with_front, args=(raw,), daemon=True).start()
    return serve(connection, build_engine)


def main() -> int:
    """The entry point: `python -m services.engine.core.process FILE_DESCRIPTOR`."""
    from services.engine.core.startup import build_engine

    return run(int(sys.argv[1]), build_engine)


if __name__ == "__main__":
    sys.exit(main())
