"""Blocks of the KV cache that wait in the host's memory while their sequences are not running."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from services.engine.core.kernels.blocks import swap_blocks
from services.engine.core.kv_cache import KVCache, as_indices

# Rows begin where Triton knows that wide accesses are possible: at 16 words of eight bytes.
_ALIGNMENT = 128


class HostBlocks:
    """Copies of blocks, taken and brought back by tickets.

    What is copied is said on the host, and done on the device in the order in which it was said,
    beside the steps, on a stream of its own. A copy begins when all that the device has been told
    before is done; steps that come after it and write to the blocks that are saved, or read those
    that are restored, have to `join` first. On a CPU a copy is done when the call returns.

    Invariants: each row belongs to one ticket or is free.
    """

    def __init__(self, kv_cache: KVCache, capacity_bytes: int) -> None:
        """capacity_bytes: of the host's memory, which is taken at once, and pinned for a GPU.

        Raises MemoryError where there is not so much.
        """
        self._storage, self._scales = kv_cache.parts
        parts = [each for each in kv_cache.parts if each is not None]
        row_bytes = sum(each[:, :, 0].nbytes for each in parts)
        row_bytes = -(-row_bytes // _ALIGNMENT) * _ALIGNMENT
        self.num_blocks = capacity_bytes // row_bytes
        self.capacity_bytes = self.num_blocks * row_bytes
        pages = np.empty((self.num_blocks, row_bytes), np.uint8)
        self._host = torch.from_numpy(pages)
        self._stream: torch.cuda.Stream | None = None
        if self._storage.is_cuda:
            self._stream = torch.cuda.Stream(self._storage.device)  # type: ignore[no-untyped-call]
            _pin(self, self._host)
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._rows: dict[int, list[int]] = {}
        self._next_ticket = 0
        if self._stream is not None and self._free:
            # With the block that belongs to nobody: kernels are compiled now, and not while
            # sequences wait for them.
            for to_host in (True, False):
                self._swap([kv_cache.num_blocks], [0], to_host=to_host)

    @property
    def num_free_blocks(self) -> int:
        """How many more blocks can be saved."""
        return len(self._free)

    def save(self, blocks: Sequence[int]) -> int | None:
        """Copy blocks to the host; returns a ticket for them, or None where there is no room."""
        if len(blocks) > len(self._free):
            return None
        rows = [self._free.pop() for _ in blocks]
        self._swap(blocks, rows, to_host=True)
        ticket = self._next_ticket
        self._next_ticket += 1
        self._rows[ticket] = rows
        return ticket

    def restore(self, ticket: int, blocks: Sequence[int], *, first: int = 0) -> None:
        """Copy what was saved to as many blocks, in the order in which it was given then, without
        the blocks before `first`. The ticket stays good."""
        rows = self._rows[ticket][first:]
        assert len(blocks) == len(rows), f"{len(blocks)} blocks for {len(rows)} that were saved"
        self._swap(blocks, rows, to_host=False)

    def drop(self, ticket: int) -> None:
        """Forget what was saved. What has been told to be copied from there is copied still."""
        self._free += self._rows.pop(ticket)

    def join(self) -> None:
        """Have what the device is told from here on wait for the copies so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._storage.device).wait_stream(self._stream)

    def check_integrity(self) -> None:
        """Assert the invariants."""
        held = [row for rows in self._rows.values() for row in rows]
        assert sorted([*held, *self._free]) == list(range(self.num_blocks))

    def _swap(self, blocks: Sequence[int], rows: Sequence[int], *, to_host: bool) -> None:
        device = self._storage.device
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):  # None: as it is
            places, own = as_indices(list(zip(blocks, rows, strict=True)), device)
            swap_blocks(self._storage, self._scales, places, self._host, own, to_host=to_host)


def _pin(owner: object, memory: Tensor) -> None:
    """Let a GPU reach memory by itself, for as long as its owner lives.

    torch's own pinned memory comes in powers of two.
    """
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if memory.nbytes == 0:
        return
    code = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if code != 0:
        raise MemoryError(f"{memory.nbytes} bytes of the host cannot be pinned: CUDA error {code}")
    weakref.finalize(owner, runtime.cudaHostUnregister, memory.data_ptr())
