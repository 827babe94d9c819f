"""Starts processes in order, keeps them alive, and stops them in reverse order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshserve.supervisor.groups import REAPER_GRACE_S, GroupReaper
from meshserve.supervisor.process import ChildProcess, describe_exit, last_lines
from meshserve.supervisor.restarts import RestartLimits, RestartPolicy
from meshserve.supervisor.spec import ProbeError, ProcessSpec, ProcessState, ProcessStatus

START_PROBE_INTERVAL_S = 0.1
PROBE_INTERVAL_S = 1.0
FAILURE_LOG_LINES = 15

OnChange = Callable[[ProcessStatus], None]


@dataclass(frozen=True, slots=True)
class Failure:
    """A process that is dead for good."""

    name: str
    message: str
    exit_code: int | None
    log_path: Path
    log_tail: tuple[str, ...]


class MeshFailedError(Exception):
    """A process died for good, so the mesh cannot go on."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.name} {failure.message}")
        self.failure = failure


class Supervisor:
    """Runs `specs` in order of their stages.

    `on_change` is called in the event loop whenever a status changes. Use: `start`, then
    `wait_for_failure` for as long as the mesh serves, then `stop`, whatever happened before.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        log_dir: Path,
        *,
        on_change: OnChange = lambda status: None,
        limits: RestartLimits | None = None,
        reaper_grace_s: float = REAPER_GRACE_S,
    ) -> None:
        self.specs = tuple(specs)
        self.statuses = {spec.name: ProcessStatus(spec.name) for spec in specs}
        self._log_dir = log_dir
        self._on_change = on_change
        self._limits = limits or RestartLimits()
        self._children: dict[str, ChildProcess] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._ready = {spec.name: asyncio.Event() for spec in specs}
        self._failed: asyncio.Future[Failure] | None = None
        self._kill_now = asyncio.Event()
        self._groups = GroupReaper(reaper_grace_s)

    def log_path(self, name: str) -> Path:
        """Where the output of a process goes."""
        return self._log_dir / f"{name}.log"

    async def start(self) -> None:
        """Starts everything and returns once all that is essential is healthy.

        Raises MeshFailedError when a process dies for good or is not healthy in time.
        """
        self._failed = asyncio.get_running_loop().create_future()
        for stage in sorted({spec.stage for spec in self.specs}):
            members = [spec for spec in self.specs if spec.stage == stage]
            for spec in members:
                keeper = asyncio.create_task(self._watch(spec), name=f"watch {spec.name}")
                self._keepers[spec.name] = keeper
            ready = asyncio.create_task(self._all_ready(members))
            awaited: set[asyncio.Future[Any]] = {ready, self._failed}
            try:
                await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            finally:
                ready.cancel()
            if self._failed.done():
                raise MeshFailedError(self._failed.result())

    async def wait_for_failure(self) -> Failure:
        """Returns when an essential process is dead for good."""
        assert self._failed is not None, "start comes first"
        return await asyncio.shield(self._failed)

    async def stop(self) -> None:
        """Ends all processes, the last started first, each within its `stop_timeout_s`.

        `kill` from elsewhere cuts this short.
        """
        for keeper in self._keepers.values():
            keeper.cancel()
        await asyncio.gather(*self._keepers.values(), return_exceptions=True)
        for spec in reversed(self.specs):
            child = self._children.get(spec.name)
            if child is None:
                if self.statuses[spec.name].state is not ProcessState.FAILED:
                    self._change(spec.name, ProcessState.STOPPED)
                continue
            self._change(spec.name, ProcessState.STOPPING)
            code = await self._stop_child(child, spec.stop_timeout_s)
            self._forget(spec.name)
            self._change(spec.name, ProcessState.STOPPED, "" if code == 0 else describe_exit(code))
        self._groups.close()

    def kill(self) -> None:
        """Kills everything at once; `stop` then has nothing to wait for."""
        self._kill_now.set()
        for child in self._children.values():
            child.kill()

    async def _stop_child(self, child: ChildProcess, timeout_s: float) -> int:
        if self._kill_now.is_set():
            child.kill()
        return await child.stop(timeout_s)

    async def _all_ready(self, specs: Sequence[ProcessSpec]) -> None:
        for spec in specs:
            if spec.essential:
                await self._ready[spec.name].wait()

    async def _watch(self, spec: ProcessSpec) -> None:
        """Keeps one process; a defect in that must not leave it unwatched in silence."""
        try:
            await self._keep(spec)
        except Exception as error:
            self._give_up(spec, f"can no longer be watched: {error!r}", None)

    async def _keep(self, spec: ProcessSpec) -> None:
        """Runs one process, again and again, until it is given up."""
        policy = RestartPolicy(self._limits)
        status = self.statuses[spec.name]
        while True:
            try:
                healthy_for_s, code, reason = await self._run_once(spec)
            except OSError as error:
                self._give_up(spec, f"cannot be started: {error}", None)
                return
            first_start = not self._ready[spec.name].is_set()
            if code in spec.fatal_exit_codes:
                self._give_up(spec, f"cannot run as it is configured ({reason})", code)
                return
            if first_start and code is None:
                self._give_up(spec, reason, code)
                return
            delay_s = policy.record_crash(time.monotonic(), healthy_for_s)
            if delay_s is None:
                self._give_up(spec, f"{reason}, crash {policy.crashes} in a short time", code)
                return
            status.restarts += 1
            self._change(spec.name, ProcessState.RESTARTING, f"{reason}; again in {delay_s:g} s")
            await asyncio.sleep(delay_s)

    async def _run_once(self, spec: ProcessSpec) -> tuple[float, int | None, str]:
        """One life of a process: how long it was healthy in seconds, its exit code or None when
        it had to be killed, and why it ended."""
        started = time.monotonic()
        self._change(spec.name, ProcessState.STARTING)
        child = await ChildProcess.start(spec.command, spec.environment, self.log_path(spec.name))
        self._children[spec.name] = child
        self._groups.add(child.pid)
        self.statuses[spec.name].pid = child.pid
        ended = asyncio.create_task(child.wait())
        healthy_since: float | None = None
        try:
            while not ended.done():
                problem = await self._probe(spec, ended)
                now = time.monotonic()
                if ended.done():
                    break
                if problem is None:
                    if healthy_since is None:
                        healthy_since = now
                        self.statuses[spec.name].start_took_s = now - started
                    last_answer = now
                    self._change(spec.name, ProcessState.HEALTHY)
                    self._ready[spec.name].set()
                elif healthy_since is None:
                    if now - started > spec.start_timeout_s:
                        reason = f"was not healthy within {spec.start_timeout_s:g} s ({problem})"
                        return await self._kill_child(spec, child, ended, 0.0, reason)
                else:
                    self._change(spec.name, ProcessState.UNHEALTHY, str(problem))
                    if problem.answered:
                        last_answer = now
                    elif now - last_answer > spec.unresponsive_timeout_s:
                        reason = f"did not answer for {spec.unresponsive_timeout_s:g} s"
                        uptime_s = last_answer - healthy_since
                        return await self._kill_child(spec, child, ended, uptime_s, reason)
                interval_s = START_PROBE_INTERVAL_S if healthy_since is None else PROBE_INTERVAL_S
                await asyncio.wait({ended}, timeout=interval_s)
            code = await ended
        finally:
            ended.cancel()
        self._forget(spec.name)
        uptime_s = 0.0 if healthy_since is None else time.monotonic() - healthy_since
        return uptime_s, code, describe_exit(code)

    async def _probe(self, spec: ProcessSpec, ended: asyncio.Task[int]) -> ProbeError | None:
        probing = asyncio.ensure_future(spec.probe())
        try:
            await asyncio.wait({probing, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not probing.done():
                return None
            probing.result()
        except ProbeError as error:
            return error
        finally:
            probing.cancel()
        return None

    async def _kill_child(
        self,
        spec: ProcessSpec,
        child: ChildProcess,
        ended: asyncio.Task[int],
        uptime_s: float,
        reason: str,
    ) -> tuple[float, int | None, str]:
        child.kill()
        await ended
        self._forget(spec.name)
        return uptime_s, None, reason

    def _forget(self, name: str) -> None:
        child = self._children.pop(name, None)
        self.statuses[name].pid = None
        if child is not None:
            self._groups.remove(child.pid)

    def _give_up(self, spec: ProcessSpec, message: str, code: int | None) -> None:
        self._change(spec.name, ProcessState.FAILED, message)
        if not spec.essential:
            return
        path = self.log_path(spec.name)
        tail = tuple(last_lines(path, FAILURE_LOG_LINES))
        assert self._failed is not None
        if not self._failed.done():
            self._failed.set_result(Failure(spec.name, message, code, path, tail))

    def _change(self, name: str, state: ProcessState, detail: str = "") -> None:
        status = self.statuses[name]
        if (status.state, status.detail) == (state, detail):
            return
        if status.state is not state:
            status.since_s = time.monotonic()
        status.state, status.detail = state, detail
        self._on_change(status)
