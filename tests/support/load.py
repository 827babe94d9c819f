"""Clients that chat all the time, and what came of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self

import meshserve
from tests.support.waiting import wait_until


class Load:
    """Runs from `__enter__` to `__exit__`, a thread for each client. Nothing is tried again.

    Half of the requests may be answered by the cache.
    """

    def __init__(
        self, connect: Callable[[], meshserve.Client], *, clients: int = 4, max_tokens: int = 8
    ) -> None:
        self._connect = connect
        self._max_tokens = max_tokens
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._chat, args=(number,)) for number in range(clients)
        ]
        self.answered = 0
        self.failures: list[meshserve.MeshServeError] = []
        # Those of the failures before which there had been no text.
        self.refused: list[meshserve.MeshServeError] = []
        # Answers that ended as if they were whole and are not.
        self.truncated: list[str] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=90)
        assert not any(thread.is_alive() for thread in self._threads), "a stream hangs"

    def wait_for_more(self, answers: int | None = None, timeout_s: float = 60.0) -> None:
        """Returns after so many more answers, two for each client unless told otherwise."""
        goal = self.answered + (2 * len(self._threads) if answers is None else answers)
        wait_until(lambda: self.answered >= goal, f"more answers; {self.failures}", timeout_s)

    def _chat(self, number: int) -> None:
        turn = 0
        with self._connect() as client:
            while not self._stop.is_set():
                turn += 1
                has_begun = False
                try:
                    with client.stream_chat(
                        f"Count to {turn % 7 + 3}, client {number}.",
                        max_tokens=self._max_tokens,
                        temperature=0,
                        ignore_eos=True,
                        cache=bool(turn % 2),
                    ) as stream:
                        for _ in stream:
                            has_begun = True
                        answer = stream.collect()
                except meshserve.MeshServeError as error:
                    self.failures.append(error)
                    if not has_begun:
                        self.refused.append(error)
                    time.sleep(0.1)
                else:
                    self.answered += 1
                    if answer.usage.completion_tokens != self._max_tokens:
                        self.truncated.append(answer.text)
