"""All ranks of a machine that is not rank 0's: `python -m services.engine.core.parallel.machine`.

The environment says which machine this is and where rank 0 listens: GROUP_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR and MASTER_PORT, or what a Kubernetes LeaderWorkerSet sets.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType

from services.engine.core.errors import StartupError
from services.engine.core.parallel.environment import Meeting, ranks_of_machine

_WORKER_COMMAND = (sys.executable, "-m", "services.engine.core.parallel.worker")
_RESTART_DELAY_S = 1.0


class Machine:
    """Keeps the ranks of this machine running until it is asked to end; then they end when rank 0
    does."""

    def __init__(self, meeting: Meeting, ranks: range) -> None:
        self._meeting = meeting
        self._ending = threading.Event()
        self._processes = {rank: self._start(rank) for rank in ranks}

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(_WORKER_COMMAND, env=os.environ | self._meeting.variables(rank))

    def end(self, number: int, frame: FrameType | None) -> None:
        """Ask the ranks to end with rank 0."""
        self._ending.set()
        for process in self._processes.values():
            self._ask(process)

    def _ask(self, process: subprocess.Popen[bytes]) -> None:
        # Not by Popen, which would take from `run` who has just ended.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)

    def run(self) -> None:
        """Return once all ranks have ended."""
        while self._processes:
            pid, _ = os.wait()
            rank = next(rank for rank, each in self._processes.items() if each.pid == pid)
            del self._processes[rank]
            if not self._ending.is_set():
                # One that was killed, or could not go on: the next engine needs it as well.
                time.sleep(_RESTART_DELAY_S)
            if not self._ending.is_set():
                self._processes[rank] = self._start(rank)
                if self._ending.is_set():  # since it was last looked at
                    self._ask(self._processes[rank])


def main() -> int:
    """The entry point."""
    try:
        meeting = Meeting.of_worker()
        machine = Machine(meeting, ranks_of_machine(meeting))
    except StartupError as error:
        print(error, file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, machine.end)
    signal.signal(signal.SIGINT, machine.end)
    machine.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
