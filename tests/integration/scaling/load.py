"""Clients that ask all the time, and what came of it."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import Counter
from typing import Self

import meshserve

CLIENTS = 12
MAX_TOKENS = 24


class Load:
    """Runs in a thread of its own from `__enter__` to `__exit__`."""

    def __init__(self, target: str, clients: int = CLIENTS, max_tokens: int = MAX_TOKENS) -> None:
        self._target = target
        self._clients = clients
        self._max_tokens = max_tokens
        self._name = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.answered = 0
        # By what went wrong, and whether the answer had begun.
        self.failures: Counter[tuple[str, bool]] = Counter()
        self.wrong: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        self.go_on(self._clients)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=60)
        assert not self._thread.is_alive(), "a stream hangs"

    def go_on(self, answers: int, timeout_s: float = 60.0) -> None:
        """Returns after so many more answers."""
        goal, give_up_at = self.answered + answers, time.monotonic() + timeout_s
        while self.answered < goal:
            assert time.monotonic() < give_up_at, f"{self.answered} answers, {self.failures}"
            time.sleep(0.02)

    async def _run(self) -> None:
        async with meshserve.AsyncClient(self._target, timeout=60) as client:
            await asyncio.gather(*(self._ask(client, number) for number in range(self._clients)))

    async def _ask(self, client: meshserve.AsyncClient, number: int) -> None:
        turn = 0
        while not self._stop.is_set():
            turn += 1
            has_begun = False
            try:
                # Half of the clients ask everything twice, and are answered by the cache then.
                topic = turn // 2 if number % 2 else turn
                async with client.stream_chat(
                    f"{self._name}: tell client {number} about {topic}.",
                    max_tokens=self._max_tokens,
                    temperature=0,
                    ignore_eos=True,
                    cache=bool(number % 2),
                ) as stream:
                    async for _ in stream:
                        has_begun = True
                    answer = await stream.collect()
            except meshserve.MeshServeError as error:
                self.failures[f"{type(error).__name__} {error.reason}: {error}", has_begun] += 1
            else:
                self.answered += 1
                if answer.usage.completion_tokens != self._max_tokens:
                    self.wrong.append(f"{answer.usage.completion_tokens} tokens")
