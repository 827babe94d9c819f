"""The front's view of its core: requests in, deltas out, whichever process runs the core now."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Sequence

import msgspec

from services.engine.adapters import CoreAdapters
from services.engine.core.messages import (
    Abort,
    AdapterChanged,
    Add,
    Command,
    Delta,
    Drain,
    Encode,
    Encoded,
    EncodeRequest,
    Ended,
    Event,
    Fatal,
    GpuUse,
    Load,
    LoadChanged,
    Log,
    ModelFacts,
    Ping,
    Pong,
    Ready,
    Refused,
    SequenceRequest,
    Step,
)
from services.engine.core.settings import CoreSettings
from services.engine.core_process import CORE_COMMAND, CoreProcess
from services.engine.pacing import Pacer
from services.engine.pending_answers import PendingAnswers
from services.engine.request_stream import (
    CoreLostError,
    CoreUnavailableError,
    RefusedError,
    RequestStream,
)
from services.engine.starvation import ProcessorWait
from services.engine.watchdog import Watchdog

log = logging.getLogger(__name__)

FIRST_RESTART_DELAY_S = 0.2
LONGEST_RESTART_DELAY_S = 10.0
# How long the core has to say that aborted sequences have ended.
ABORT_GRACE_S = 2.0
# A core that dies without a word before it was ever ready may have been killed by mistake.
FIRST_START_ATTEMPTS = 3
# A core that has lived this long crashed for a new reason: back-off starts over.
STABLE_AFTER_S = 60.0


class CoreStartError(Exception):
    """The core cannot start as it is configured; the text is its own reason."""


class CoreClient:
    """Keeps one core running and hands its deltas to the requests they belong to.

    When the core dies, or is silent for longer than `restart_stalled_after_s`, the requests in
    flight fail with CoreLostError and a new core is started, after a back-off that doubles each
    time. One silent for longer than `stall_timeout_s` is given no more requests; see `watchdog`.
    `longest_interval_s` bounds the interval at which running streams are told of their tokens.

    Attributes:
        settings: what the next core is told; needed before `start`.
        facts: what a core said of its model last; stays when the core has ended.
        adapters: what the core has, and is given to load.
        idle_since_s: when the last request ended, or a core became ready, by the loop's clock.
    """

    def __init__(
        self,
        settings: CoreSettings | None,
        *,
        stall_timeout_s: float = 3.0,
        restart_stalled_after_s: float = 10.0,
        longest_interval_s: float = 0.0,
        command: Sequence[str] = CORE_COMMAND,
        on_step: Callable[[Step | Encoded], None] | None = None,
        on_restart: Callable[[], None] | None = None,
    ) -> None:
        self.load = Load()
        self.gpu_use: GpuUse | None = None
        self.facts: ModelFacts | None = None
        self.settings = settings
        self.adapters = CoreAdapters(self._send)
        self.idle_since_s = 0.0
        self._watchdog = Watchdog(stall_timeout_s, restart_stalled_after_s)
        self._command = command
        self._pacer = Pacer(longest_interval_s)
        self._on_step = on_step
        self._on_restart = on_restart
        self._core: CoreProcess | None = None
        self._ready = False
        self._loading = ""  # how far it is with that
        self.draining = False
        self._first_start: asyncio.Future[ModelFacts] | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._sequence_ids = itertools.count()
        self._streams: dict[int, RequestStream] = {}
        self._pending: dict[int, PendingAnswers] = {}
        self._nothing_live = asyncio.Event()
        self._nothing_live.set()

    @property
    def core_pid(self) -> int | None:
        """The process id of the core, if one runs."""
        return self._core.pid if self._core is not None else None

    async def start(self) -> ModelFacts:
        """Start the core and wait until it has loaded its model. Precondition: there is none.

        Raises:
            CoreStartError: it cannot, and would not on a second attempt; or `close` was called.
        """
        self.draining = False
        self._first_start = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise())
        return await asyncio.shield(self._first_start)

    async def close(self) -> None:
        """End the core. Requests in flight fail with CoreLostError. It may be started again."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self._first_start is not None and not self._first_start.done():
            self._first_start.set_exception(CoreStartError("it was ended before it was ready"))
            self._first_start.exception()  # nobody may be left to be told

    @property
    def is_ready(self) -> bool:
        """Whether a core has loaded its model."""
        return self._ready

    @property
    def in_flight(self) -> list[RequestStream | PendingAnswers]:
        """The requests that have not ended."""
        return [*set(self._streams.values()), *set(self._pending.values())]

    def check_health(self) -> None:
        """Raise CoreUnavailableError unless the core takes requests and its step loop turns."""
        if self.draining:
            raise CoreUnavailableError("the engine drains")
        self._running_core()

    def _running_core(self) -> CoreProcess:
        if not self._ready or self._core is None:
            raise CoreUnavailableError(f"the engine core is starting{self._loading}")
        if self._watchdog.is_stalled:
            silent_s = self._watchdog.silent_s
            raise CoreUnavailableError(f"the engine core has been silent for {silent_s:.0f} s")
        return self._core

    def _send(self, command: Command) -> None:
        self._running_core().send(command)

    def next_sequence_id(self) -> int:
        """A sequence id that was never used before in this process."""
        return next(self._sequence_ids)

    def submit(self, requests: list[SequenceRequest]) -> RequestStream:
        """Send the sequences of one request to the core; they are admitted all or none.

        Raises:
            CoreUnavailableError: there is no core that could take them now.
        """
        core = self._running_core()
        stream = RequestStream(
            [request.sequence_id for request in requests], self._forget, self._pacer
        )
        for request in requests:
            self._streams[request.sequence_id] = stream
        self._nothing_live.clear()
        core.send(Add(requests))
        return stream

    def encode(self, requests: list[EncodeRequest]) -> PendingAnswers:
        """Send the sequences of one request to an encoder's core; they are admitted all or none.

        Raises:
            CoreUnavailableError: there is no core that could take them now.
        """
        core = self._running_core()
        pending = PendingAnswers([request.sequence_id for request in requests], self._forget)
        self._pending |= {request.sequence_id: pending for request in requests}
        self._nothing_live.clear()
        core.send(Encode(requests))
        return pending

    def abort(self, stream: RequestStream) -> None:
        """Have the core end a request; its reader sees its sequences finish as aborted."""
        self._abort(stream.live_sequence_ids)

    def withdraw(self, stream: RequestStream, choices: Sequence[int]) -> bool:
        """Have the core end some choices of a request, while the others go on.

        Returns whether there was any to end.
        """
        sequence_ids = stream.withdraw(choices)
        self._abort(sequence_ids)
        return bool(sequence_ids)

    def _abort(self, sequence_ids: list[int]) -> None:
        if self._core is not None and sequence_ids:
            self._core.send(Abort(sequence_ids))

    async def drain(self, timeout_s: float) -> int:
        """Take nothing new and wait until all requests have ended, at most `timeout_s`.

        Returns how many sequences were still live then; they are aborted.
        """
        self.draining = True
        if self._core is not None and self._ready:
            self._core.send(Drain())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._nothing_live.wait()
        leftover = list(self._streams)
        given_up = set(self._pending.values())
        unanswered = len(self._pending)
        for pending in given_up:
            pending.abort()
        if leftover and self._core is not None:
            self._core.send(Abort(leftover))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ABORT_GRACE_S):
                    await self._nothing_live.wait()
        return len(leftover) + unanswered

    def _forget(self, sequence_ids: list[int], *, abort: bool) -> None:
        """Called by a stream whose sequences have ended, or whose reader has gone away."""
        for sequence_id in sequence_ids:
            if self._streams.pop(sequence_id, None) is None:
                self._pending.pop(sequence_id, None)
        if abort and self._core is not None:
            self._core.send(Abort(sequence_ids))
        if not (self._streams or self._pending):
            self._nothing_live.set()
            self.idle_since_s = asyncio.get_running_loop().time()

    async def _supervise(self) -> None:
        delay_s = FIRST_RESTART_DELAY_S
        loop = asyncio.get_running_loop()
        for attempt in itertools.count(1):
            started_s = loop.time()
            reason, hopeless = await self._run_one_core()
            never_ready = self._first_start is not None and not self._first_start.done()
            if never_ready and (hopeless or attempt == FIRST_START_ATTEMPTS):
                assert self._first_start is not None
                self._first_start.set_exception(CoreStartError(reason))
                return
            if loop.time() - started_s > STABLE_AFTER_S:
                delay_s = FIRST_RESTART_DELAY_S
            log.error("the engine core ended: %s; restarting in %.1f s", reason, delay_s)
            if self._on_restart is not None:
                self._on_restart()
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, LONGEST_RESTART_DELAY_S)

    async def _run_one_core(self) -> tuple[str, bool]:
        """Spawn a core and serve it until it ends.

        Returns why it ended, and whether the same settings would end every other core alike.
        """
        reason, hopeless = "", False
        try:
            core = await CoreProcess.spawn(self._next_settings(), self._command)
        except OSError as error:
            return f"its process cannot be started: {error}", False
        self._core = core
        self._loading = ""
        heartbeat = asyncio.create_task(self._heartbeat(core))
        try:
            async for event in core.events():
                self._watchdog.heard()
                if isinstance(event, Fatal):
                    reason, hopeless = event.reason, event.starting
                else:
                    self._take(event)
        finally:
            heartbeat.cancel()
            self._ready = False
            self._core = None
            self.load = Load()
            self.gpu_use = None
            self._fail_all()
            exit_code = await core.close()
        if not reason:
            reason = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
        return reason, hopeless

    def _next_settings(self) -> CoreSettings:
        """What the next core is told.

        One that takes the place of another on a GPU takes no more memory than that had: models
        that were loaded since have theirs, or come back themselves.
        """
        assert self.settings is not None
        settings = self.adapters.for_next_core(self.settings)
        replaces = self._first_start is not None and self._first_start.done()
        if not replaces or self.facts is None or not self.facts.device.startswith("cuda"):
            return settings
        return msgspec.structs.replace(
            settings,
            waiting_models=0,
            waiting_caches=0,
            waiting_weights_bytes=0,
            waiting_cache_bytes=0,
            kv_cache_limit_bytes=self.facts.kv_cache_memory_bytes,
        )

    async def _heartbeat(self, core: CoreProcess) -> None:
        watchdog, wait = self._watchdog, ProcessorWait(core.pid)
        for number in itertools.count():
            await asyncio.sleep(watchdog.tick_interval_s)
            if not self._ready:
                continue
            watchdog.tick(asyncio.get_running_loop().time(), wait.seconds())
            core.send(Ping(number))
            if watchdog.is_hopeless:
                log.error(
                    "the engine core has been silent for %.0f s; killing it", watchdog.silent_s
                )
                core.kill()
                return

    def _take(self, event: Event) -> None:
        match event:
            case Step():
                self.load = event.load
                self._pacer.set_running(event.load.running_sequences)
                self._deliver(event.deltas)
                if self._on_step is not None:
                    self._on_step(event)
            case Encoded():
                self.load = event.load
                for answer in event.answers:
                    pending = self._pending.get(answer.sequence_id)
                    if pending is not None:
                        pending.accrue(answer, event.ended_ns)
                if self._on_step is not None:
                    self._on_step(event)
            case Ended():
                self.load = event.load
                self._deliver(event.deltas)
            case Pong():
                self.load = event.load
                self.gpu_use = event.gpu_use
            case LoadChanged():
                self.load = event.load
            case Refused():
                error = RefusedError(event.error_kind, event.error)
                first_id = event.sequence_ids[0]
                refused = self._streams.get(first_id) or self._pending.get(first_id)
                if refused is not None:
                    refused.fail(error)
            case Log():
                logging.getLogger(event.logger).log(event.level, "%s", event.message)
                if event.progress is not None:
                    self._loading = f": {event.progress:.0%} of its weights are read"
            case AdapterChanged():
                self.adapters.take(event)
            case Ready():
                self._take_ready(event.facts)

    def _take_ready(self, facts: ModelFacts) -> None:
        self.facts = facts
        assert self.settings is not None
        self.adapters.take_ready(self.settings, facts)
        self._watchdog.begin(facts, self._most_batch_tokens(facts))
        self._ready = True
        self.idle_since_s = asyncio.get_running_loop().time()
        if self.draining and self._core is not None:
            self._core.send(Drain())
        if self._first_start is not None and not self._first_start.done():
            self._first_start.set_result(facts)

    def _most_batch_tokens(self, facts: ModelFacts) -> int:
        assert self.settings is not None
        if facts.tasks:
            return max(self.settings.batcher.max_tokens, facts.max_context_tokens)
        return self.settings.max_batch_tokens

    def _deliver(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            stream = self._streams.get(delta.sequence_id)
            if stream is not None:
                stream.accrue(delta)

    def _fail_all(self) -> None:
        error = CoreLostError("the engine core ended while it worked on the request")
        for stream in set(self._streams.values()):
            stream.fail(error)
        for pending in set(self._pending.values()):
            pending.fail(error)
            pending.close()
        self.adapters.fail_all(error)
