"""What stands in for a device that captures: what it would replay is computed anew, from the memory
that was captured and from nothing else."""

from __future__ import annotations

import threading
from functools import partial

import torch
from torch import Tensor

from services.engine.core.graph_pieces import ComputePieces, Replay
from services.engine.core.graphs import Compute


class Replaying:
    """Computes anew what it was given, into the memory of the first time."""

    def __init__(self) -> None:
        self.replays = 0
        self.pieces = 0

    def record(self, compute: Compute) -> Compute:
        output = compute()

        def replay() -> Tensor:
            self.replays += 1
            again = compute()
            return again if again.data_ptr() == output.data_ptr() else output.copy_(again)

        return replay

    def record_pieces(self, compute: ComputePieces) -> tuple[list[Replay], Tensor]:
        """Each time that the first piece is replayed a thread computes anew, and waits at each cut
        until the next piece is."""
        cuts = []
        output = compute(lambda: cuts.append(None))
        course: list[InTurns] = []

        def replay(index: int) -> None:
            self.pieces += 1
            if index == 0:
                course[:] = [InTurns(compute)]
            again = course[0].go_on()
            if index == len(cuts):
                assert again is not None
                output.copy_(again)

        return [partial(replay, index) for index in range(len(cuts) + 1)], output

    def num_bytes(self) -> int:
        return 0


class Refusing(Replaying):
    """Captures so many steps, and fails with the next."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._left = most

    def record(self, compute: Compute) -> Compute:
        recorded = super().record(compute)
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("operation not permitted when stream is capturing")
        return recorded


class InTurns:
    """A computation on a thread of its own, a piece at a time."""

    def __init__(self, compute: ComputePieces) -> None:
        self._turn, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._result: Tensor | None = None

        def run() -> None:
            self._turn.acquire()
            with torch.inference_mode():
                self._result = compute(self._cut)
            self._done.release()

        threading.Thread(target=run, daemon=True).start()

    def go_on(self) -> Tensor | None:
        """Compute the next piece; returns the result with the last."""
        self._turn.release()
        assert self._done.acquire(timeout=30)
        return self._result

    def _cut(self) -> None:
        self._done.release()
        self._turn.acquire()
