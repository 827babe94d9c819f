"""Sums over the cards of one machine in CUDA C++, of short messages (src/all_reduce.cu).

The memory in which ranks leave each other what they have is CUDA's own (cudaMalloc), opened in
other processes by its handles (CUDA IPC). PyTorch has a way to such memory as well,
torch.distributed._symmetric_memory; it is in alpha state, wants memory that NVLink or a driver
maps in its own way, and refuses several ranks on one card, by which the kernels can be tried where
there is but one. What is needed here are four calls, which have been the same for many years.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from services.engine.core.kernels.cuda.library import active, call

MOST_RANKS = 8
# Of each of the two slots of an inbox: what eight ranks have of 256 KiB, or twice 1 MiB.
SLOT_BYTES = 2 * 2**20
# `enum class Summand` of src/all_reduce.h.
_FORMATS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_VECTOR_BYTES = 16
# As many keep a link busy (NCCL takes about as many channels), and leave the other multiprocessors
# to kernels behind. A multiprocessor writes some 64 bytes a cycle, and those of one token eight
# times over, so that short messages are spread over as many of them as long ones.
_BLOCKS = 32
_WARP, _MOST_THREADS = 32, 256
_ABANDONED = 1


class AllReduceArgs(ctypes.Structure):
    """`struct AllReduceArgs` of src/all_reduce.h, field by field."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("inboxes", ctypes.c_void_p * MOST_RANKS),
        ("calls", ctypes.c_void_p),
        ("status", ctypes.c_void_p),
        ("patience_ns", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("vectors", "slot_vectors", "ranks", "rank")),
        *((name, ctypes.c_int32) for name in ("blocks", "threads", "two_shot", "traps", "format")),
    )


class InboxArgs(ctypes.Structure):
    """`struct InboxArgs` of src/all_reduce.h, field by field."""

    _fields_ = (
        ("device", ctypes.c_int32),
        ("bytes", ctypes.c_int32),
        ("handle", ctypes.c_ubyte * 64),
        ("address", ctypes.c_void_p),
    )


class Inbox:
    """Memory of this rank's card, for other ranks to write.

    Attributes:
        handle: by which another process opens it.
    """

    def __init__(self, device: torch.device) -> None:
        """Raises CudaError where there is no room, or no way to share it."""
        self._args = InboxArgs(_index(device), 2 * SLOT_BYTES)
        _call("inbox_allocate", self._args)
        self.address = int(self._args.address)
        self.handle = bytes(self._args.handle)

    def free(self) -> None:
        """Give it back. No other process may have it open any more."""
        _call("inbox_free", self._args)


class OpenInbox:
    """The memory of another rank, as this process sees it."""

    def __init__(self, device: torch.device, handle: bytes) -> None:
        """device: of this rank. Raises CudaError where it cannot reach that memory."""
        self._args = InboxArgs(_index(device))
        ctypes.memmove(self._args.handle, handle, len(handle))
        _call("inbox_open", self._args)
        self.address = int(self._args.address)

    def close(self) -> None:
        """See no more of it."""
        _call("inbox_close", self._args)


def _index(device: torch.device) -> int:
    return device.index or 0


def _call(name: str, arguments: InboxArgs) -> None:
    library = active()
    assert library is not None
    library.call(name, arguments, 0)


def holds(num_bytes: int, ranks: int, *, two_shot: bool) -> bool:
    """Whether a slot has room for a message."""
    if not two_shot:
        return ranks * num_bytes <= SLOT_BYTES
    part = -(-num_bytes // (_VECTOR_BYTES * ranks)) * _VECTOR_BYTES
    return 2 * ranks * part <= SLOT_BYTES


def is_summable(values: Tensor) -> bool:
    """Whether the kernels read such a tensor. Of equal shapes that is alike on all ranks."""
    num_bytes = values.nbytes
    return (
        values.dtype in _FORMATS
        and num_bytes > 0
        and num_bytes % _VECTOR_BYTES == 0
        and values.is_contiguous()
        and values.data_ptr() % _VECTOR_BYTES == 0
    )


class PeerSums:
    """Sums of what ranks have, which all call alike, on one stream each.

    Ranks are waited for in the kernel. What does not come for `patience_s` ends this process's use
    of the card (`traps`: no result of it can be read any more), or else leaves `has_timed_out`.
    """

    def __init__(
        self,
        rank: int,
        inboxes: Sequence[int],
        device: torch.device,
        *,
        slot_bytes: int = SLOT_BYTES,
        patience_s: float,
        traps: bool,
    ) -> None:
        """inboxes: their addresses as this process has them, in the order of ranks."""
        ranks = len(inboxes)
        self.num_ranks = ranks
        self._calls = torch.zeros(1, dtype=torch.int32, device=device)
        # The card reads it where it is, and no kernel has to end for the host to write it.
        self._pinned = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._status = ctypes.c_int32.from_address(self._pinned.data_ptr())
        self._args = AllReduceArgs(
            calls=self._calls.data_ptr(),
            status=self._pinned.data_ptr(),
            slot_vectors=slot_bytes // _VECTOR_BYTES,
            ranks=ranks,
            rank=rank,
        )
        # Each begins with its own, so that not all write to the same card first.
        for place in range(ranks):
            self._args.inboxes[place] = inboxes[(rank + place) % ranks]
        self.wait(patience_s, traps=traps)

    def wait(self, patience_s: float, *, traps: bool) -> None:
        """Wait for others as long as that from now on."""
        self._args.patience_ns = int(patience_s * 1e9)
        self._args.traps = traps

    def sum(self, values: Tensor, *, two_shot: bool) -> None:
        """Make `values` the sum over all ranks, in place; `is_summable` and `holds` are true.

        The sum is that of float32 in the order of ranks, rounded once: the same bits everywhere.
        """
        args = self._args
        args.values = values.data_ptr()
        args.vectors = vectors = values.nbytes // _VECTOR_BYTES
        warps = -(-vectors // (_BLOCKS * _WARP))
        args.threads = threads = min(_MOST_THREADS, warps * _WARP)
        args.blocks = min(_BLOCKS, -(-vectors // threads))
        args.two_shot = two_shot
        args.format = _FORMATS[values.dtype]
        call("all_reduce", args, values)

    @property
    def has_timed_out(self) -> bool:
        """Whether another rank was waited for too long."""
        return self._status.value not in (0, _ABANDONED)

    def abandon(self) -> None:
        """Have kernels wait for nobody any more, from any thread: sums are of no use then."""
        self._status.value = _ABANDONED
