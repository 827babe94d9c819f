"""Shows the state of each process: a live table on a terminal, a line per change elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from meshserve.supervisor.spec import ProcessState, ProcessStatus

# The longest name of a service, so that lines of most meshes stand alike.
NAME_WIDTH = len("tokenizer")
_STYLES = {
    ProcessState.WAITING: ("·", "dim"),
    ProcessState.STARTING: ("…", "yellow"),
    ProcessState.HEALTHY: ("●", "green"),
    ProcessState.UNHEALTHY: ("●", "yellow"),
    ProcessState.RESTARTING: ("↻", "yellow"),
    ProcessState.FAILED: ("✗", "red"),
    ProcessState.STOPPING: ("…", "yellow"),
    ProcessState.STOPPED: ("○", "dim"),
}


class Display:
    """Prints what happens. `show` and `hide` bracket the times of the live table."""

    def __init__(
        self,
        console: Console,
        statuses: Mapping[str, ProcessStatus],
        addresses: Mapping[str, str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console
        self.footer = ""
        self._statuses = statuses
        self._addresses = addresses
        self._clock = clock
        self._live: Live | None = None

    def show(self) -> None:
        """Keeps the table at the bottom of the terminal from now on."""
        if self.console.is_terminal and self._live is None:
            self._live = Live(
                get_renderable=self._table_and_footer,
                console=self.console,
                refresh_per_second=4,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()

    def hide(self, *, leave: bool = False) -> None:
        """Takes the table away; with `leave`, its last state stays among the output."""
        live, self._live = self._live, None
        if live is None:
            return
        live.stop()
        if leave:
            self.console.print(self.table())

    def changed(self, status: ProcessStatus) -> None:
        """A status changed. On a terminal the table tells all but what must not scroll away."""
        lasting = status.state in (ProcessState.RESTARTING, ProcessState.FAILED)
        if self._live is None or lasting:
            self.console.print(self._line(status), highlight=False, soft_wrap=True)

    def print_all(self, lines: Iterable[Text]) -> None:
        """Prints lines above the table."""
        for line in lines:
            self.console.print(line, highlight=False, soft_wrap=True)

    def table(self) -> Table:
        """The state of every process now."""
        table = Table.grid(padding=(0, 2))
        for status in self._statuses.values():
            mark, style = _STYLES[status.state]
            table.add_row(
                Text(f"{mark} {status.name}", style=style),
                Text(str(status.state), style=style),
                Text(self._addresses.get(status.name, ""), style="dim"),
                Text(self._remark(status), style="dim", overflow="ellipsis", no_wrap=True),
            )
        return table

    def _table_and_footer(self) -> Group:
        return Group(self.table(), Text(self.footer, style="dim"))

    def _line(self, status: ProcessStatus) -> Text:
        mark, style = _STYLES[status.state]
        line = Text.assemble((time.strftime("%H:%M:%S "), "dim"))
        width = max(NAME_WIDTH, *map(len, self._statuses)) + 1
        line.append(f"{mark} {status.name:<{width}}", style=style)
        line.append(f"{status.state}", style=style)
        if status.state is ProcessState.HEALTHY and status.start_took_s is not None:
            line.append(f" after {status.start_took_s:.1f} s", style="dim")
        if status.detail:
            line.append(f": {status.detail}")
        return line

    def _remark(self, status: ProcessStatus) -> str:
        parts = []
        if status.state is ProcessState.STARTING:
            parts.append(f"{self._clock() - status.since_s:.0f} s")
        if status.state is ProcessState.HEALTHY and status.start_took_s is not None:
            parts.append(f"started in {status.start_took_s:.1f} s")
        if status.restarts:
            parts.append(f"restarts: {status.restarts}")
        if status.detail:
            parts.append(status.detail)
        return ", ".join(parts)
