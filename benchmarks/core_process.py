"""The engine core alone, in a process of its own that is asked for one run at a time."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from typing import Any

from services.engine.core import startup
from services.engine.core.messages import Sampling, SequenceRequest, Stopping
from services.engine.core.settings import CoreSettings
from services.engine.core_process import CORE_ENVIRONMENT


class CoreProcess:
    """Runs while the `with` block does; between runs it waits without using a processor."""

    def __init__(self, settings: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, settings), daemon=True)
        self.description = ""

    def __enter__(self) -> CoreProcess:
        # The engine starts its core in this environment; alone it must not fare worse.
        before = dict(os.environ)
        os.environ.update(CORE_ENVIRONMENT)
        self._process.start()
        os.environ.clear()
        os.environ.update(before)
        self.description = self._connection.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.send(None)
        self._process.join(timeout=10)

    def run(self, prompts: list[list[int]], output_tokens: int) -> float:
        """Seconds from the arrival of all prompts to the last token of the last of them."""
        self._connection.send((prompts, output_tokens))
        duration_s: float = self._connection.recv()
        return duration_s


def _serve(connection: Connection, settings: dict[str, Any]) -> None:
    engine, facts = startup.build_engine(CoreSettings(**settings))
    connection.send(f"{facts.dtype} on {facts.device}")
    while (job := connection.recv()) is not None:
        prompts, output_tokens = job
        started = time.perf_counter()
        engine.add(
            [
                SequenceRequest(
                    sequence_id=index,
                    prompt_token_ids=prompt,
                    sampling=Sampling(temperature=0),
                    stopping=Stopping(max_tokens=output_tokens, ignore_eos=True),
                )
                for index, prompt in enumerate(prompts)
            ]
        )
        produced = 0
        while engine.has_work:
            produced += sum(len(delta.token_ids) for delta in engine.step().deltas)
        if produced != len(prompts) * output_tokens:
            raise RuntimeError(f"{produced} tokens came out")
        connection.send(time.perf_counter() - started)
