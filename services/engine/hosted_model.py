"""One of the models that an engine hosts: whether it is in memory, and how it gets there and out.

A model that is in memory has a core process of its own: one that dies, hangs or runs out of memory
takes no other model with it, and one that ends gives back all that it had.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import enum
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import psutil

from services.engine.core.messages import ModelFacts
from services.engine.core.settings import CoreSettings
from services.engine.core_client import CoreClient, CoreStartError
from services.engine.refusals import (
    draining_error,
    loading_error,
    not_loaded_error,
    unavailable_error,
)
from services.engine.request_stream import CoreUnavailableError
from services.runtime.errors import Reason, ServiceError
from services.runtime.server import StartupError

log = logging.getLogger(__name__)

T = TypeVar("T")

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class State(enum.Enum):
    """Where a model is; what requests for it find in each state is said in the contract, for which
    one that wakes is still asleep."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    SLEEPING = "sleeping"
    WAKING = "waking"
    DRAINING = "draining"
    FAILED = "failed"


class HostedModel:
    """A model of an engine.

    Its changes happen one after another, and go on when those who asked for them go away: a model
    that several requests wait for is loaded once, and for all that are left.

    Attributes:
        name: as in the settings.
        aliases: other names of it.
        client: its core. It outlives the core's processes, and remembers what is to be in the next.
        state: where it is. READY says nothing of how its core does; `check_ready` does.
        problem: why it is FAILED; else empty.
        way_out: what to do about that.
        is_draining: whether it takes nothing new, for good.
    """

    def __init__(
        self,
        name: str,
        client: CoreClient,
        make_settings: Callable[[], CoreSettings] | None = None,
        *,
        aliases: tuple[str, ...] = (),
        state: State = State.UNLOADED,
        sleep_after_s: float | None = None,
        on_loaded: Callable[[float], object] | None = None,
    ) -> None:
        """`make_settings` says what to load when it is loaded, or raises StartupError; by default
        the client's own settings. The client has been started where `state` is READY. After
        `sleep_after_s` without a request it falls asleep. `on_loaded` is told how many seconds a
        load took."""
        self.name = name
        self.aliases = aliases
        self.client = client
        self.state = state
        self.problem = ""
        self.way_out = ""
        self._make_settings = make_settings
        self._sleep_after_s = sleep_after_s
        self._changing = asyncio.Lock()
        self._loading: asyncio.Task[None] | None = None
        self._is_unwanted = False  # while it is being loaded
        self._num_waiting = 0  # requests, for it to be ready
        self._changes: set[asyncio.Task[Any]] = set()
        self._nap: asyncio.TimerHandle | None = None
        self.is_draining = False
        self._on_loaded = on_loaded

    @property
    def is_asleep(self) -> bool:
        """Whether a request wakes it, and waits; see `wake`."""
        return self.state is State.SLEEPING or self.state is State.WAKING

    @property
    def is_being_loaded(self) -> bool:
        """Whether its core is on its way."""
        return self.state is State.LOADING or self.state is State.WAKING

    @property
    def is_idle(self) -> bool:
        """Whether no request is in flight, nor waits."""
        return not self._num_waiting and not self.client.in_flight

    @property
    def num_requests(self) -> int:
        """Requests in flight, those that wait for it to be ready among them."""
        return self._num_waiting + len(self.client.in_flight)

    @property
    def memory_bytes(self) -> int:
        """What it takes now: what is resident of its process, and on a GPU weights and cache."""
        pid, facts = self.client.core_pid, self.client.facts
        if pid is None:
            return 0
        try:
            held = int(psutil.Process(pid).memory_info().rss)
        except psutil.Error:  # it has ended since
            return 0
        if facts is None or facts.device == "cpu" or self.is_being_loaded:
            return held
        dense = facts.num_parameters * _DTYPE_BYTES.get(facts.dtype, 2)
        weights = facts.memory.get("weights", dense)
        return held + weights + facts.kv_cache_memory_bytes

    def facts(self) -> ModelFacts:
        """What it is, also while it sleeps.

        Raises:
            ServiceError: it is neither in memory nor asleep, or has never been in memory.
        """
        if self.state is State.LOADING:
            raise loading_error(self.name)
        if self.state in (State.UNLOADED, State.FAILED) or self.client.facts is None:
            raise not_loaded_error(self.name, self.state.value)
        return self.client.facts

    def check_ready(self) -> None:
        """Raises ServiceError unless it can take a request now."""
        if self.is_draining or self.state is State.DRAINING:
            raise draining_error()
        if self.state is State.LOADING:
            raise loading_error(self.name)
        if self.state is not State.READY:
            raise not_loaded_error(self.name, self.state.value)
        try:
            self.client.check_health()
        except CoreUnavailableError as error:
            raise unavailable_error(str(error)) from None

    async def wake(self) -> None:
        """Brings it back, if it is asleep.

        Raises:
            ServiceError: it could not be loaded, or was unloaded meanwhile.
        """
        while self.is_asleep:
            self._num_waiting += 1
            try:
                await self.load()
            finally:
                self._num_waiting -= 1

    async def load(self) -> None:
        """Brings it into memory, unless it is there.

        Raises:
            ServiceError: it could not be loaded, or was unloaded meanwhile.
        """
        if self._loading is None or self._loading.done():
            self._loading = self._begin(self._load())
        await asyncio.shield(self._loading)

    async def unload(self, timeout_s: float) -> int:
        """Takes it out of memory once what is in flight has ended, or was aborted after
        `timeout_s`; where it is being loaded, at once. Returns how many requests were aborted."""
        return await asyncio.shield(self._begin(self._unload(timeout_s)))

    async def sleep(self) -> int:
        """Takes it out of memory until it is asked for again. Returns how many bytes it had.

        Raises:
            ServiceError: it is busy, or not in memory.
        """
        return await asyncio.shield(self._begin(self._sleep()))

    async def drain(self, timeout_s: float) -> None:
        """Takes nothing new, for good, and waits until what is in flight has ended; it is aborted
        after `timeout_s`. What waits for the model to be loaded fails at once."""
        self.is_draining = True
        if self.is_being_loaded:
            await self.client.close()
        await self.client.drain(timeout_s)

    async def close(self) -> None:
        """Ends its core, and all changes under way; there are none afterwards."""
        self.is_draining = True
        self._set(State.UNLOADED)
        await self.client.close()
        await asyncio.gather(*self._changes, return_exceptions=True)

    def _begin(self, change: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        # In a context of its own: what it starts belongs to no request's trace.
        task = asyncio.create_task(change, context=contextvars.Context())
        self._changes.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()  # those who waited may be gone

    async def _load(self) -> None:
        async with self._changing:
            if self.is_draining:
                raise draining_error()
            if self.state is State.READY:
                return
            self._is_unwanted = False
            self._set(State.WAKING if self.state is State.SLEEPING else State.LOADING)
            started_s = time.monotonic()
            try:
                if self._make_settings is not None:
                    self.client.settings = self._make_settings()
                await self.client.start()
            except (CoreStartError, StartupError) as error:
                if not (self._is_unwanted or self.is_draining):
                    self._fail(error)
                    raise not_loaded_error(self.name, self.state.value) from None
            if self._is_unwanted or self.is_draining:
                await self.client.close()
                self._set(State.UNLOADED)
                if self.is_draining:
                    raise draining_error()
                raise not_loaded_error(self.name, self.state.value)
            self._set(State.READY)
            if self._on_loaded is not None:
                self._on_loaded(time.monotonic() - started_s)

    def _fail(self, error: CoreStartError | StartupError) -> None:
        if isinstance(error, StartupError):
            problem, self.way_out = error.message, error.hint
        else:
            problem = f"the engine core cannot start: {error}"
            self.way_out = "check models and engine in the settings, and the log above"
        log.error("the model %s cannot be loaded: %s", self.name, problem)
        self._set(State.FAILED, problem)

    async def _unload(self, timeout_s: float) -> int:
        if self.is_being_loaded:
            self._is_unwanted = True
            await self.client.close()
        async with self._changing:
            aborted = 0
            if self.state is State.READY:
                self._set(State.DRAINING)
                requests = self.client.in_flight
                await self.client.drain(timeout_s)
                aborted = sum(request.was_aborted for request in requests)
            await self.client.close()
            self._set(State.UNLOADED)
            return aborted

    async def _sleep(self) -> int:
        async with self._changing:
            if self.state is State.SLEEPING:
                return 0
            if self.state is not State.READY:
                raise not_loaded_error(self.name, self.state.value)
            if not self.is_idle:
                raise ServiceError(
                    Reason.MODEL_BUSY,
                    f"the model {self.name!r} works on {self.num_requests} requests",
                    metadata={"model": self.name},
                )
            freed_bytes = self.memory_bytes
            # What comes from here on waits for the lock, to wake it.
            self._set(State.SLEEPING)
            await self.client.close()
            return freed_bytes

    def _set(self, state: State, problem: str = "") -> None:
        if state is not self.state:
            log.info("the model %s is %s", self.name, state.value)
        self.state, self.problem = state, problem
        self._watch_idleness()

    def _watch_idleness(self) -> None:
        """Looks again when it has been idle for long enough, if nothing comes until then."""
        if self._nap is not None:
            self._nap.cancel()
            self._nap = None
        if self._sleep_after_s is None or self.state is not State.READY:
            return
        loop = asyncio.get_running_loop()
        due_s = self.client.idle_since_s + self._sleep_after_s
        if not self.is_idle:
            due_s = loop.time() + self._sleep_after_s
        if due_s <= loop.time():
            self._begin(self._fall_asleep())
        else:
            self._nap = loop.call_at(due_s, self._watch_idleness)

    async def _fall_asleep(self) -> None:
        with contextlib.suppress(ServiceError):
            freed_bytes = await self._sleep()
            log.info("the model %s gave %.0f MiB back", self.name, freed_bytes / 2**20)
        self._watch_idleness()
