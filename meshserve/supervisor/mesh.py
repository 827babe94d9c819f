"""The life of `meshserve up`: start everything, greet, serve until told to stop or until a process
is dead for good, stop everything."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from meshserve.async_client import AsyncClient
from meshserve.errors import AuthenticationError, MeshServeError
from meshserve.supervisor.display import Display
from meshserve.supervisor.greeting import (
    FOR_TEXT,
    FOR_VECTORS,
    Greeting,
    embed_greeting,
    generates,
    stream_greeting,
)
from meshserve.supervisor.groups import REAPER_GRACE_S
from meshserve.supervisor.keyboard import key_presses
from meshserve.supervisor.logview import LogFollower, format_line, format_lines
from meshserve.supervisor.restarts import RestartLimits
from meshserve.supervisor.spec import ProcessSpec, ProcessStatus
from meshserve.supervisor.statedir import RunningMesh, StateDir, StateError, trim_log
from meshserve.supervisor.supervisor import Failure, MeshFailedError, Supervisor
from meshserve.transport import API_KEY_VARIABLE, TLS

EXIT_OK = 0
EXIT_FAILED = 1
LOG_POLL_S = 0.2
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What `meshserve up` was asked for."""

    show_logs: bool = False
    show_traces: bool = False
    greet: bool = True
    started_s: float | None = None
    """Monotonic time from which the time to ready is counted. Default: the start of the run."""
    limits: RestartLimits | None = None
    reaper_grace_s: float = REAPER_GRACE_S


class Mesh:
    """One run of the mesh. The state directory must be held by this process."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        mesh: RunningMesh,
        state: StateDir,
        console: Console,
        options: UpOptions,
        gateway_tls: TLS | bool = False,
    ) -> None:
        self._mesh = mesh
        self._state = state
        self._console = console
        self._options = options
        self._gateway_tls = gateway_tls
        self._supervisor = Supervisor(
            specs,
            state.log_dir,
            on_change=self._changed,
            limits=options.limits,
            reaper_grace_s=options.reaper_grace_s,
        )
        addresses = {spec.name: spec.addresses[0].address for spec in specs if spec.addresses}
        self._display = Display(console, self._supervisor.statuses, addresses)
        self._how_to_ask = FOR_TEXT
        self._followers: dict[str, LogFollower] = {}
        self._stop_requested = asyncio.Event()
        self._signals = 0

    async def run(self) -> int:
        """Returns the exit code once everything has ended."""
        started = self._options.started_s or time.monotonic()
        self._state.write(self._mesh)
        if self._options.show_logs:
            self._toggle_logs()
        with self._handled_signals(), key_presses(self._key_pressed):
            async with self._log_printing():
                self._display.show()
                code = EXIT_FAILED
                try:
                    if await self._start(started):
                        code = await self._serve()
                    elif self._stop_requested.is_set():
                        code = EXIT_OK
                finally:
                    self._display.footer = "stopping; Ctrl-C again kills"
                    self._display.show()
                    await self._supervisor.stop()
                    self._display.hide(leave=code != EXIT_OK)
        return code

    async def _start(self, started: float) -> bool:
        """Whether the mesh is ready; False after a failure, which is shown, or a stop."""
        self._display.footer = "starting; Ctrl-C stops"
        starting = asyncio.create_task(self._supervisor.start())
        stopping = asyncio.create_task(self._stop_requested.wait())
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return False
            await starting
        except MeshFailedError as error:
            self._show_failure(error.failure)
            return False
        finally:
            for task in (starting, stopping):
                task.cancel()
            await asyncio.gather(starting, stopping, return_exceptions=True)
        ready_s = time.monotonic() - started
        self._display.hide(leave=True)
        self._console.print(f"\n[green]The mesh is ready[/] after {ready_s:.1f} s.")
        if self._options.greet:
            await self._greet(started)
        self._mesh = dataclasses.replace(self._mesh, ready=True)
        try:
            self._state.write(self._mesh)
        except StateError as error:  # others cannot see that it is ready; it serves all the same
            self._console.print(Text(str(error), style="yellow"))
        self._show_how_to_talk()
        return True

    async def _serve(self) -> int:
        self._display.footer = "Ctrl-C stops, l shows or hides the logs"
        self._display.show()
        failing = asyncio.create_task(self._supervisor.wait_for_failure())
        stopping = asyncio.create_task(self._stop_requested.wait())
        try:
            await asyncio.wait({failing, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if failing.done():
                self._show_failure(failing.result())
                return EXIT_FAILED
            return EXIT_OK
        finally:
            for task in (failing, stopping):
                task.cancel()

    async def _greet(self, started: float) -> None:
        """One answer through the whole mesh. A failure is shown; the mesh goes on."""
        tls = self._gateway_tls
        async with AsyncClient(self._mesh.gateway.target, tls=tls) as client:
            greeting = asyncio.create_task(self._first_answer(client))
            stopping = asyncio.create_task(self._stop_requested.wait())
            try:
                ready_at = time.monotonic()
                await asyncio.wait({greeting, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if not greeting.done():
                    return
                result = await greeting
                if result is None:
                    return
            except AuthenticationError:
                self._console.print(
                    f"[yellow]No greeting:[/] the gateway asks for an API key; "
                    f"set {API_KEY_VARIABLE} to one."
                )
                return
            except MeshServeError as error:
                self._console.print("[red]The first answer failed:[/] ", end="")
                self._console.print(error.message, markup=False, highlight=False)
                return
            finally:
                greeting.cancel()
                stopping.cancel()
                await asyncio.gather(greeting, stopping, return_exceptions=True)
        since_start_s = ready_at - started + result.first_token_s
        self._console.print(
            f"[dim]{result.completion_tokens} tokens, first token {result.first_token_s:.2f} s "
            f"after the request and {since_start_s:.1f} s after the start, "
            f"{result.tokens_per_s:.1f} tokens/s[/]",
            highlight=False,
            soft_wrap=True,
        )

    async def _first_answer(self, client: AsyncClient) -> Greeting | None:
        models = await client.models()
        if generates(models):
            return await stream_greeting(client, self._console)
        if any("embed" in model.capabilities for model in models):
            self._how_to_ask = FOR_VECTORS
            await embed_greeting(client, self._console)
        return None

    def _show_how_to_talk(self) -> None:
        target, traces_url = self._mesh.gateway.target, self._mesh.traces_url
        console_url = self._mesh.console_url
        plaintext = "" if self._mesh.gateway.ca_file else "-plaintext "
        tls = ", tls=True" if self._mesh.gateway.ca_file else ""
        service, how = "meshserve.v1.InferenceService", self._how_to_ask
        lines = [
            "",
            f"The gateway listens on {target}. Talk to it:",
            f'  meshserve {how.command} "{how.text}"',
            f"  grpcurl {plaintext}-d '{how.document}' {target} {service}/{how.method}",
            "  python -c 'import meshserve; "
            f'print(meshserve.Client("{target}"{tls}).{how.command}("Hello"))\'',
            *([f"Or open the console: {console_url}"] if console_url else []),
            *([f"Traces are shown at {traces_url}"] if traces_url else []),
            f"Logs are in {self._state.log_dir}. Stop with Ctrl-C or `meshserve down`.",
            "",
        ]
        for line in lines:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _show_failure(self, failure: Failure) -> None:
        self._display.hide()
        self._console.print(
            Text(f"\n{failure.name} {failure.message}.", style="bold red"), soft_wrap=True
        )
        if failure.log_tail:
            self._console.print(Text(f"The last lines of {failure.log_path}:", style="dim"))
            for line in format_lines(failure.name, failure.log_tail):
                self._console.print(line, highlight=False, soft_wrap=True)
        else:
            self._console.print(Text(f"It logged nothing to {failure.log_path}.", style="dim"))
        self._console.print(
            "Mend what the log says and run `meshserve up` again.", markup=False, highlight=False
        )

    @contextlib.contextmanager
    def _handled_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in STOP_SIGNALS:
                loop.remove_signal_handler(number)

    def _signalled(self) -> None:
        """The first signal stops in good order, the second kills."""
        self._signals += 1
        self._stop_requested.set()
        if self._signals > 1:
            self._supervisor.kill()

    def _key_pressed(self, key: str) -> None:
        if key in ("l", "L"):
            self._toggle_logs()

    def _toggle_logs(self) -> None:
        if self._followers:
            self._followers = {}
            return
        self._followers = {
            spec.name: LogFollower(self._supervisor.log_path(spec.name))
            for spec in self._supervisor.specs
        }

    @contextlib.asynccontextmanager
    async def _log_printing(self) -> AsyncIterator[None]:
        printing = asyncio.create_task(self._print_logs())
        try:
            yield
        finally:
            printing.cancel()
            await asyncio.gather(printing, return_exceptions=True)
            self._print_new_lines()

    async def _print_logs(self) -> None:
        while True:
            self._print_new_lines()
            for spec in self._supervisor.specs:
                trim_log(self._supervisor.log_path(spec.name))
            await asyncio.sleep(LOG_POLL_S)

    def _print_new_lines(self) -> None:
        for name, follower in self._followers.items():
            self._display.print_all(format_line(name, line) for line in follower.new_lines())

    def _changed(self, status: ProcessStatus) -> None:
        try:
            self._display.changed(status)
        except OSError:  # the terminal is gone; the mesh is not
            self._console.quiet = True
