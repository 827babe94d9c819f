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
from typing import Any, Protocol, TypeAlias

from services.engine.core.errors import AdmissionError, StartupError
from services.engine.core.gpu import gpu_use
from services.engine.core.heap import trim_heap
from services.engine.core.mailbox import ConnectionClosedError, Mailbox
from services.engine.core.messages import (
    Abort,
    AdapterChanged,
    Add,
    Command,
    Delta,
    Drain,
    Encode,
    Ended,
    Event,
    Fatal,
    Load,
    LoadAdapter,
    LoadChanged,
    Log,
    ModelFacts,
    Ping,
    Pong,
    Ready,
    Refused,
    Start,
    UnloadAdapter,
)
from services.engine.core.settings import CoreSettings
from services.runtime.modelfiles import ModelFileError

logger = logging.getLogger(__name__)


class Core(Protocol):
    """What computes: an engine of sequences, or of an encoder's batches.

    Single-threaded: no call may overlap another.
    """

    @property
    def due_in_s(self) -> float | None:
        """When `step` should be called next; None: there is nothing to compute."""

    def add(self, requests: list[Any], /) -> None:
        """Take in what was asked for, all of it or none; raises AdmissionError."""

    def abort(self, sequence_ids: list[int], /) -> list[Delta]:
        """End sequences; returns what there is to say of them."""

    def drain(self) -> None:
        """Refuse new sequences from here on."""

    def change_adapter(self, command: LoadAdapter | UnloadAdapter, /) -> None:
        """Begin to load or unload an adapter."""

    def adapter_changes(self) -> list[AdapterChanged]:
        """What has come of that since the last call."""

    def step(self) -> Event:
        """Compute what is due."""

    def load(self) -> Load:
        """How busy it is now."""

    def check_integrity(self) -> None:
        """Check its state; raises IntegrityError."""


EngineBuilder: TypeAlias = Callable[[CoreSettings], tuple[Core, ModelFacts]]

# A core is idle once nothing has come for this long.
_UPKEEP_AFTER_S = 0.2
_MOST_STEPS_UNCOLLECTED = 10_000
# A step that returns while the mailbox runs is not kept waiting for the interpreter much longer.
_SWITCH_INTERVAL_S = 0.0005
# How long the step loop has to notice that its front is gone before the process ends without it.
_ORPHAN_GRACE_S = 5.0


def serve(mailbox: Mailbox, build_engine: EngineBuilder) -> int:
    """Run a core until its front goes away (0) or it cannot go on (1). Returns the exit code."""
    try:
        start = _receive_start(mailbox)
        try:
            engine, facts = build_engine(start.settings)
        except (StartupError, ModelFileError) as error:
            # The user's to mend, and written for the user: no traceback.
            mailbox.post(Fatal(str(error), starting=True))
            return 1
        except Exception as error:
            logger.exception("the core cannot start")
            mailbox.post(Fatal(f"{type(error).__name__}: {error}", starting=True))
            return 1
        # What loading left behind lives as long as the process: keep the collector away from it,
        # and from the steps altogether (see _Upkeep).
        _give_back_memory()
        gc.freeze()
        gc.disable()
        mailbox.post(Ready(facts))
        mailbox.hold_s = start.settings.event_hold_ms / 1000
        return _serve_commands(mailbox, engine, facts.device)
    except ConnectionClosedError:
        return 0


def _receive_start(mailbox: Mailbox) -> Start:
    commands = mailbox.take(wait_s=None)
    if len(commands) != 1 or not isinstance(commands[0], Start):
        raise ConnectionClosedError("the front did not begin with Start")
    return commands[0]


def _serve_commands(mailbox: Mailbox, engine: Core, device: str) -> int:
    try:
        upkeep = _Upkeep(engine)
        while True:
            due_in_s = engine.due_in_s
            commands = mailbox.take(wait_s=upkeep.due_in_s if due_in_s is None else due_in_s)
            if not commands and due_in_s is None:
                upkeep.do()
            changed = False
            for command in commands:
                changed |= _handle(command, mailbox, engine, device)
            for change in engine.adapter_changes():
                mailbox.post(change)
            if engine.due_in_s == 0:
                # The mailbox sends this while the next step runs.
                mailbox.post(engine.step())
                upkeep.after_step()
            elif changed:
                mailbox.post(LoadChanged(engine.load()))
    except ConnectionClosedError:
        raise
    except Exception as error:
        logger.exception("the core gives up")
        mailbox.post(Fatal(f"{type(error).__name__}: {error}"))
        return 1


class _Upkeep:
    """What is done once after each busy time, when nobody waits for it: the core checks itself,
    clears away garbage that only the collector finds (everything else is freed as it is dropped),
    and gives memory that the busy time needed back to the machine.
    """

    def __init__(self, engine: Core) -> None:
        self._engine = engine
        self._steps = 0  # since the last upkeep

    @property
    def due_in_s(self) -> float | None:
        """How long the core must have been idle; None: there is nothing to do."""
        return _UPKEEP_AFTER_S if self._steps else None

    def after_step(self) -> None:
        """Count a step. A core that is never idle has its garbage cleared now and then."""
        self._steps += 1
        if self._steps % _MOST_STEPS_UNCOLLECTED == 0:
            gc.collect()

    def do(self) -> None:
        """Check and clear.

        Raises:
            IntegrityError: the core's state is broken.
        """
        self._engine.check_integrity()
        _give_back_memory()
        self._steps = 0


def _give_back_memory() -> None:
    """Clear garbage away, and leave to the system what the heap does not need."""
    gc.collect()
    trim_heap()


def _handle(command: Command, mailbox: Mailbox, engine: Core, device: str) -> bool:
    """Carry out one command; returns whether the load changed."""
    if isinstance(command, Add | Encode):
        try:
            engine.add(command.sequences)
        except AdmissionError as error:
            ids = [request.sequence_id for request in command.sequences]
            mailbox.post(Refused(ids, type(error).__name__, str(error)))
            return False
        return True
    if isinstance(command, Abort):
        deltas = engine.abort(command.sequence_ids)
        if deltas:
            mailbox.post(Ended(deltas, engine.load()))
        return False
    if isinstance(command, LoadAdapter | UnloadAdapter):
        engine.change_adapter(command)
        return False
    if isinstance(command, Drain):
        engine.drain()
        return True
    if isinstance(command, Ping):
        mailbox.post(Pong(command.number, engine.load(), gpu_use(device)))
    return False


class _LogForwarder(logging.Handler):
    """Sends log records to the front, so that the service's logs have one form."""

    def __init__(self, mailbox: Mailbox) -> None:
        super().__init__()
        self._mailbox = mailbox

    def emit(self, record: logging.LogRecord) -> None:
        try:
            progress = getattr(record, "progress", None)
            self._mailbox.post(Log(record.levelno, record.name, self.format(record), progress))
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
    mailbox = Mailbox(raw)
    logging.basicConfig(level=logging.INFO, handlers=[_LogForwarder(mailbox)], format="%(message)s")
    logging.captureWarnings(capture=True)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    threading.Thread(target=_end_with_front, args=(raw,), daemon=True).start()
    try:
        return serve(mailbox, build_engine)
    finally:
        mailbox.close()


def main() -> int:
    """The entry point: `python -m services.engine.core.process FILE_DESCRIPTOR`."""
    from services.engine.core.startup import build_engine

    return run(int(sys.argv[1]), build_engine)


if __name__ == "__main__":
    sys.exit(main())
