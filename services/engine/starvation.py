"""How long a process was kept from the processors that it wanted."""

from __future__ import annotations

from pathlib import Path


class ProcessorWait:
    """Reads how long the threads of a process were ready to run and did not.

    Linux counts it for each thread (Documentation/scheduler/sched-stats.rst), also while a control
    group has used up its share. Where it is not counted, nobody has waited.
    """

    def __init__(self, pid: int) -> None:
        self._threads = Path(f"/proc/{pid}/task")
        self._waited_ns: dict[str, int] = {}
        self.seconds()

    def seconds(self) -> float:
        """How long the thread that waited longest has done so since the last call."""
        before, self._waited_ns = self._waited_ns, self._read()
        return (
            max(
                (each - before.get(thread, each) for thread, each in self._waited_ns.items()),
                default=0,
            )
            / 1e9
        )

    def _read(self) -> dict[str, int]:
        waited_ns = {}
        try:
            for thread in self._threads.iterdir():
                _, waited, _ = (thread / "schedstat").read_text().split()
                waited_ns[thread.name] = int(waited)
        except OSError:  # a thread, or all of them, ended meanwhile
            pass
        return waited_ns
