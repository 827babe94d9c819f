"""Has a process of its own find out whether a rule is harmless. See `checker`."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

import msgspec

from services.engine.core.constraints.checker import Opening, Verdict
from services.engine.core.constraints.vocabulary import Vocabulary
from services.engine.core.errors import ConstraintsUnavailableError, InvalidConstraintError
from services.engine.core.framing import LENGTH
from services.engine.core.messages import Constraint

MAX_CPU_S = 2
MAX_MEMORY_BYTES = 1 << 30
# By the clock, on a machine that has other things to do.
_START_TIMEOUT_S = 60.0
_CHECK_TIMEOUT_S = 20.0
_COMMAND = (sys.executable, "-m", "services.engine.core.constraints.checker")


class CheckProcess:
    """Starts a checker when one is needed, and another one when that is lost. For one thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._opening = Opening(vocabulary, MAX_CPU_S, MAX_MEMORY_BYTES)
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, constraint: Constraint) -> str:
        """The grammar, in the library's notation, that a completion under `constraint` follows.

        Raises:
            InvalidConstraintError: it is not valid, not supported or too costly.
            ConstraintsUnavailableError: no checker can be started.
        """
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = self._start()
        verdict = self._ask(process, msgspec.msgpack.encode(constraint), _CHECK_TIMEOUT_S)
        if verdict is None:
            raise InvalidConstraintError(self._lose(process))
        if verdict.problem:
            raise InvalidConstraintError(verdict.problem)
        return verdict.lark

    def close(self) -> None:
        """End the checker."""
        if self._process is not None:
            self._lose(self._process)

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        opening = msgspec.msgpack.encode(self._opening)
        if self._ask(process, opening, _START_TIMEOUT_S) is None:
            raise ConstraintsUnavailableError(f"the checker does not start: {self._lose(process)}")
        return process

    def _ask(
        self, process: subprocess.Popen[bytes], payload: bytes, timeout_s: float
    ) -> Verdict | None:
        """The answer; None if there is none in time, or ever."""
        assert process.stdin is not None
        assert process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        try:
            process.stdin.write(LENGTH.pack(len(payload)) + payload)
            process.stdin.flush()
            head = _read(process.stdout.fileno(), LENGTH.size, deadline_s)
            answer = _read(process.stdout.fileno(), LENGTH.unpack(head)[0], deadline_s)
        except (BrokenPipeError, EOFError, TimeoutError):
            return None
        return msgspec.msgpack.decode(answer, type=Verdict)

    def _lose(self, process: subprocess.Popen[bytes]) -> str:
        """End a checker; returns what its end says of the rule it was at."""
        self._process = None
        try:
            code = process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            code = -signal.SIGXCPU
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue
        if code == -signal.SIGXCPU:
            return f"it takes more than {MAX_CPU_S} s to compile"
        return "it needs too much memory, or nesting, to compile"


def _read(descriptor: int, count: int, deadline_s: float) -> bytes:
    """Read so many bytes. Raises EOFError or TimeoutError."""
    parts: list[bytes] = []
    while count:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not select.select([descriptor], [], [], left_s)[0]:
            raise TimeoutError
        part = os.read(descriptor, count)
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
