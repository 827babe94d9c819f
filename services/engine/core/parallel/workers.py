"""The other ranks, as rank 0 sees them: started, told what to compute, watched, and ended."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from services.engine.core.errors import FatalEngineError, StartupError
from services.engine.core.parallel.environment import Meeting
from services.engine.core.parallel.layout import Layout
from services.engine.core.parallel.ranks import abandon
from services.engine.core.parallel.wire import Beat, Connection, Done, Failed, Hello, Order, Report

logger = logging.getLogger(__name__)

WORKER_COMMAND: tuple[str, ...] = (sys.executable, "-m", "services.engine.core.parallel.worker")
# A rank says this often that its process runs, and is given up on when it has not for so long.
BEAT_S = 0.5
SILENCE_S = 8.0
# The same while models are loaded, which may keep the interpreter busy.
STARTING_SILENCE_S = 60.0
# How long after one rank has failed in a step the others may take to fail in it as well.
_ALIKE_S = 5.0
# How long a step loop may take to notice what it was told before the process ends without it.
_LAST_RESORT_S = 5.0
_LATE_S = 1.0
_HANDSHAKE_S = 10.0
_END_S = 2.0
_SIGNAL = signal.SIGUSR1


@dataclass(frozen=True, slots=True)
class Captured:
    """What ranks have made of capturing a step.

    Attributes:
        problem: why not all of them have captured it; "" where they have.
        num_bytes: that graphs hold on each of the others that have.
    """

    problem: str
    num_bytes: list[int]


class Workers:
    """All ranks but rank 0.

    The first fault that is not a sequence's own ends them all: from then on every call raises
    FatalEngineError, and so does whatever the main thread is at.
    """

    def __init__(self, layout: Layout) -> None:
        """Starts the ranks of this machine, and waits for nobody.

        Raises:
            StartupError: the environment contradicts the layout, or its port is taken.
        """
        self._layout = layout
        meeting = Meeting.of_leader(layout.num_ranks, secrets.token_hex(16))
        try:
            self._listener = socket.create_server(
                ("", meeting.port) if meeting.port else (meeting.address, 0)
            )
        except OSError as error:
            raise StartupError(f"rank 0 cannot listen at port {meeting.port}: {error}") from None
        port = self._listener.getsockname()[1]
        self.meeting = Meeting(meeting.address, port, meeting.local_ranks, meeting.token)
        self._others = range(1, layout.num_ranks)
        self._connections: dict[int, Connection] = {}
        self._heard_s: dict[int, float] = {}
        self._answers: dict[int, Done | Failed] = {}
        self._failed: dict[int, tuple[Failed, float]] = {}
        self._changed = threading.Condition()
        self._problem = ""
        self._closed = False
        self._is_serving = False
        self._is_told = False  # whether the main thread knows of the problem
        self._processes = {
            rank: subprocess.Popen(
                WORKER_COMMAND,
                stdin=subprocess.DEVNULL,
                env=os.environ | self.meeting.variables(rank),
            )
            for rank in range(1, self.meeting.local_ranks)
        }
        self._raise_in_main_thread()
        for run in (self._admit, self._watch):
            threading.Thread(target=run, name=run.__name__, daemon=True).start()

    def wait(self) -> None:
        """Wait until all ranks are there.

        Raises:
            StartupError: one of this machine has ended instead.
        """
        self._wait_for(lambda: len(self._connections) == len(self._others))

    def tell(self, order: Order) -> None:
        """Tell all ranks to do something.

        Raises:
            FatalEngineError: one is gone.
        """
        for connection in self._connections.values():
            self._send(connection.send, order)

    def answers(self) -> list[Done]:
        """What all ranks answer to the latest order, in their order.

        Raises:
            StartupError: one cannot do it.
        """
        self._wait_for(lambda: len(self._answers) == len(self._others))
        answers, self._answers = self._answers, {}
        for rank, answer in sorted(answers.items()):
            if isinstance(answer, Failed):
                raise StartupError(f"rank {rank}: {answer.problem}")
        return [answer for _, answer in sorted(answers.items()) if isinstance(answer, Done)]

    def tell_step(self, header: bytes) -> None:
        """Have all ranks compute a step.

        Raises:
            FatalEngineError: one is gone.
        """
        self._is_serving = True
        for connection in self._connections.values():
            self._send(connection.send_step, header)

    def _send(self, send: Callable[..., None], what: object) -> None:
        self.check()
        try:
            send(what)
        except OSError as error:
            self.check()
            raise self._fatal(f"a rank is gone: {error}") from error

    def check(self) -> None:
        """Raise FatalEngineError where ranks cannot go on."""
        if self._problem:
            raise self._fatal(self._problem)

    def judge(self, error: Exception, step: int, num_exchanges: int) -> None:
        """Take in that a step has failed on rank 0, after so many exchanges.

        Raises:
            FatalEngineError: it has not failed alike on all ranks, so that they cannot go on.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._problem or len(self._of_step(step)) == len(self._others), _ALIKE_S
            )
            reports = self._of_step(step)
            for report in reports:
                del self._failed[report]
        if self._problem:
            raise self._fatal(self._problem) from error
        if set(self._others) != set(reports) or any(
            report.num_exchanges != num_exchanges for report in reports.values()
        ):
            what = f"{type(error).__name__}: {error}"
            raise self._fatal(
                f"a step failed on rank 0, and not alike on others: {what}"
            ) from error

    def agree(self, step: int, error: Exception | None, num_exchanges: int) -> Captured:
        """Wait until all ranks are through with capturing a step, as rank 0 is: with an error, or
        without.

        Raises:
            FatalEngineError: a rank waits for one that has failed, or two that exchange have failed
                at different points.
        """

        def are_through() -> bool:
            return len(self._answers) + len(self._of_step(step)) == len(self._others)

        with self._changed:
            # While nobody has failed, one may take long: kernels are compiled.
            self._changed.wait_for(
                lambda: self._problem or are_through(), None if error is None else _ALIKE_S
            )
            failed, answers = self._of_step(step), self._answers
            if are_through():
                self._answers = {}
                for rank in failed:
                    del self._failed[rank]
        problems = {rank: f"rank {rank}: {each.problem}" for rank, each in failed.items()}
        points = {rank: each.num_exchanges for rank, each in failed.items()}
        if error is not None:
            problems[0], points[0] = f"rank 0: {type(error).__name__}: {error}", num_exchanges
        if self._problem:
            raise self._fatal(self._problem) from error
        stages = {(self._layout.place(rank).stage, point) for rank, point in points.items()}
        alike = len(stages) == len({stage for stage, _ in stages})
        if len(answers) + len(failed) < len(self._others) or not alike:
            told = "; ".join(each for _, each in sorted(problems.items()))
            raise self._fatal(f"ranks fail to capture a step together: {told}") from error
        return Captured(
            next((each for _, each in sorted(problems.items())), ""),
            [each.value for each in answers.values() if isinstance(each, Done)],
        )

    def _of_step(self, step: int) -> dict[int, Failed]:
        return {rank: each for rank, (each, _) in self._failed.items() if each.step == step}

    def close(self) -> None:
        """End all ranks. May be called twice."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
        if threading.current_thread() is threading.main_thread():
            signal.signal(_SIGNAL, signal.SIG_DFL)
        self._listener.close()
        for connection in self._connections.values():
            connection.close()
        deadline = time.monotonic() + _END_S
        for rank, process in self._processes.items():
            if rank not in self._connections:
                process.kill()  # it has nobody to tell it
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self._kill()

    def _kill(self) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()

    def _wait_for(self, is_there: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._problem or is_there())
        if self._problem:
            self._is_told = True
            raise StartupError(self._problem)

    def _fatal(self, problem: str) -> FatalEngineError:
        self._is_told = True
        return FatalEngineError(problem)

    def _raise_in_main_thread(self) -> None:
        """Have a problem end what the main thread is at, be it idle."""

        def tell(number: int, frame: FrameType | None) -> None:
            if not (self._closed or self._is_told):
                raise self._fatal(self._problem)

        if threading.current_thread() is threading.main_thread():
            signal.signal(_SIGNAL, tell)

    def _break(self, problem: str) -> None:
        """Give up: who waits for a rank is not to wait for ever."""
        with self._changed:
            if self._closed or self._problem:
                return
            self._problem = problem
            self._changed.notify_all()
        logger.error("the ranks of the model end: %s", problem)
        for process in self._processes.values():
            process.kill()
        for connection in self._connections.values():
            connection.close()
        abandon()
        signal.pthread_kill(threading.main_thread().ident or 0, _SIGNAL)
        time.sleep(_LAST_RESORT_S)
        if not (self._is_told or self._closed):
            logger.critical("the step loop does not end; the process does")
            time.sleep(BEAT_S)  # for the record to get out
            os._exit(1)

    def _admit(self) -> None:
        """Take in connections until all ranks are there."""
        while len(self._connections) < len(self._others):
            try:
                accepted, address = self._listener.accept()
            except OSError:
                return  # closed
            accepted.settimeout(_HANDSHAKE_S)
            connection = Connection(accepted)
            try:
                hello = connection.receive_report()
            except Exception as error:  # anything may come through a port
                logger.warning("%s is no rank of this model: %s", address[0], error)
                connection.close()
                continue
            if not self._is_awaited(hello):
                logger.warning("%s is no rank of this model", address[0])
                connection.close()
                continue
            accepted.settimeout(None)
            assert isinstance(hello, Hello)
            with self._changed:
                self._heard_s[hello.rank] = time.monotonic()
                self._connections[hello.rank] = connection
                self._changed.notify_all()
            name = f"rank {hello.rank}"
            threading.Thread(
                target=self._listen, args=(hello.rank, connection), name=name, daemon=True
            ).start()

    def _is_awaited(self, hello: Report) -> bool:
        return (
            isinstance(hello, Hello)
            and hello.token == self.meeting.token
            and hello.rank in self._others
            and hello.rank not in self._connections
        )

    def _listen(self, rank: int, connection: Connection) -> None:
        while True:
            try:
                report = connection.receive_report()
            except Exception as error:
                self._break(f"rank {rank} has ended: {error}")
                return
            self._take(rank, report)

    def _take(self, rank: int, report: Report) -> None:
        with self._changed:
            self._heard_s[rank] = time.monotonic()
            if isinstance(report, Failed) and report.step:
                self._failed[rank] = report, time.monotonic()
            elif isinstance(report, Done | Failed):
                self._answers[rank] = report
            if not isinstance(report, Beat):
                self._changed.notify_all()

    def _watch(self) -> None:
        """Look at what nobody tells."""
        last_s = time.monotonic()
        while not (self._closed or self._problem):
            time.sleep(BEAT_S)
            now_s = time.monotonic()
            if now_s - last_s > BEAT_S + _LATE_S:
                # This process was held up, and has heard nothing meanwhile.
                self._heard_s = dict.fromkeys(self._heard_s, now_s)
            last_s = now_s
            if problem := next(self._problems(now_s), None):
                self._break(problem)

    def _problems(self, now_s: float) -> Iterator[str]:
        for rank, process in self._processes.items():
            if rank not in self._connections and process.poll() is not None:
                yield f"rank {rank} has ended at its start, with exit code {process.returncode}"
        with self._changed:
            heard, failed = [*self._heard_s.items()], [*self._failed.items()]
        longest_s = SILENCE_S if self._is_serving else STARTING_SILENCE_S
        for rank, heard_s in heard:
            if now_s - heard_s > longest_s:
                yield f"rank {rank} has been silent for {now_s - heard_s:.0f} s"
        for rank, (report, failed_s) in failed:
            if now_s - failed_s > _ALIKE_S:
                yield f"rank {rank} failed in a step: {report.problem}"
