"""Carries messages between the step loop and its front, on threads of their own.

A step spends nearly all its time in code that holds no interpreter lock. What the step before it
brought is encoded and sent meanwhile, and what the front asks for is received and decoded, so that
none of it stands between two steps. A front that is slow to read holds nothing up either, until it
is far behind.
"""

from __future__ import annotations

import queue
import socket
import threading
import time

from services.engine.core.framing import CommandFrames, EventFrames
from services.engine.core.messages import Command, Event, Step

_RECEIVE_BYTES = 1 << 18
# Room for the events of many steps, so that a front that is briefly busy does not hold up the core.
_SEND_BUFFER_BYTES = 1 << 22
# Events that may wait to be sent, besides those in the socket's buffer, before a step waits too.
_MOST_UNSENT = 1024
_CLOSE_TIMEOUT_S = 2.0


class ConnectionClosedError(Exception):
    """The other end is gone."""


class Mailbox:
    """The core's end of the connection: commands are taken from it, events are posted to it.

    `take` is for one thread, the step loop's; `post` is for any. Events go out in the order in
    which they were posted. Once a thread of the mailbox has failed, `take` raises what it failed
    of; where the front is gone, `post` does so as well.

    `hold_s`: how long steps that brought nothing but further tokens may be held back, to be sent
    together: waking the front for each would cost more than some of the steps.
    """

    hold_s = 0.0

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setblocking(True)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._commands: queue.SimpleQueue[list[Command] | Exception] = queue.SimpleQueue()
        self._urgent = threading.Event()
        self._lost: ConnectionClosedError | None = None
        self._sender = threading.Thread(target=self._send_events, name="events", daemon=True)
        self._sender.start()
        threading.Thread(target=self._receive_commands, name="commands", daemon=True).start()

    def take(self, *, wait_s: float | None) -> list[Command]:
        """All commands that have arrived; waits up to `wait_s` (None: for ever) for the first.

        Raises:
            ConnectionClosedError: the front is gone.
        """
        commands: list[Command] = []
        if wait_s == 0 and self._commands.empty():
            return commands
        try:
            arrived = self._commands.get(timeout=wait_s)
            while True:
                if isinstance(arrived, Exception):
                    self._commands.put(arrived)  # for those who ask again
                    raise arrived
                commands += arrived
                arrived = self._commands.get_nowait()
        except queue.Empty:
            return commands

    def post(self, event: Event) -> None:
        """Send an event soon; waits only while the front is very far behind.

        Raises:
            ConnectionClosedError: the front is gone.
        """
        while self._lost is None and self._events.qsize() > _MOST_UNSENT:
            time.sleep(0.001)
        if self._lost is not None:
            raise self._lost
        self._events.put(event)
        if not (isinstance(event, Step) and event.brought_only_tokens):
            self._urgent.set()

    def close(self) -> None:
        """Send what has been posted. Afterwards nothing more is sent."""
        self._events.put(None)
        self._urgent.set()
        self._sender.join(_CLOSE_TIMEOUT_S)

    def _send_events(self) -> None:
        frames = EventFrames()
        while True:
            events = [self._events.get()]
            if self.hold_s:
                self._urgent.wait(self.hold_s)
            # Before the queue is emptied: what comes now is either taken or urgent again.
            self._urgent.clear()
            while not self._events.empty():
                events.append(self._events.get())
            posted = [event for event in events if event is not None]
            try:
                self._socket.sendall(frames.encode(posted))
            except OSError as error:
                self._lose(error)
                return
            except Exception as error:  # an event that cannot be encoded
                self._commands.put(error)
            if len(posted) < len(events):
                return

    def _receive_commands(self) -> None:
        frames = CommandFrames()
        try:
            while piece := self._socket.recv(_RECEIVE_BYTES):
                if commands := frames.decode(piece):
                    self._commands.put(commands)
            self._lose(ConnectionError("the other end closed the connection"))
        except OSError as error:
            self._lose(error)
        except Exception as error:  # a command that cannot be decoded
            self._commands.put(error)

    def _lose(self, error: OSError) -> None:
        self._lost = ConnectionClosedError(str(error))
        self._commands.put(self._lost)
