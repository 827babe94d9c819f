"""What rank 0 and the others say to each other beside what devices exchange.

One TCP connection joins rank 0 with each rank: it says what to compute, it tells of faults, and it
closes when either of them ends. A frame is the length of its payload, a kind, and the payload. A
step's is an array of integers; all others are structs.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from itertools import pairwise
from typing import TypeAlias

import msgspec
import numpy as np
import torch
from torch import Tensor

from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels import AdapterParts, DeviceLengths, LowRankPart
from services.engine.core.settings import CoreSettings

_FRAME = struct.Struct("<IB")
_STEP, _MESSAGE = 0, 1
_NUM_FIXED = 9  # integers of a step's header that every header has
_BUFFER_BYTES = 1 << 16


class Setup(msgspec.Struct, tag=True):
    """The first that a rank is told. It answers with the bytes that its device has free."""

    settings: CoreSettings
    store_port: int


class Load(msgspec.Struct, tag=True):
    """Load these layers' weights, given by the first layer of each stage and their number. Answered
    with the rows of blocks for which there is room."""

    bounds: list[int]


class Allocate(msgspec.Struct, tag=True):
    """Make the KV cache."""

    num_blocks: int


class CopyBlocks(msgspec.Struct, tag=True):
    """Copy blocks of the KV cache; not answered."""

    pairs: list[tuple[int, int]]


class AdapterMatrix(msgspec.Struct):
    """A part of an adapter, its matrices as float32."""

    path: str
    first: int
    rank: int
    down: bytes
    up: bytes


class SetAdapter(msgspec.Struct, tag=True):
    """Keep an adapter under a number; None: forget it. Not answered."""

    slot: int
    parts: list[AdapterMatrix] | None


class Hello(msgspec.Struct, tag=True):
    """The first that a rank says. token: that of the engine that it belongs to."""

    rank: int
    token: str


class Done(msgspec.Struct, tag=True):
    """The answer to what is answered."""

    value: int = 0


class Beat(msgspec.Struct, tag=True):
    """Said now and then: the process runs."""


class Failed(msgspec.Struct, tag=True):
    """Something has failed: a step, after so many exchanges, or what was to be answered (0)."""

    problem: str
    step: int = 0
    num_exchanges: int = 0


Order: TypeAlias = Setup | Load | Allocate | CopyBlocks | SetAdapter
Report: TypeAlias = Hello | Done | Beat | Failed


class StepHeader(msgspec.Struct, frozen=True, array_like=True):
    """What is known on the host of a step: all but the integers that are on the device."""

    number: int
    num_tokens: int
    num_rows: int
    table_shape: tuple[int, ...]
    has_lengths: bool
    has_token_adapters: bool
    are_bounds: bool
    query_lengths: tuple[int, ...]
    context_lengths: tuple[int, ...]
    adapters: tuple[int, ...] | None

    @classmethod
    def of(cls, number: int, batch: ForwardBatch) -> StepHeader:
        """That of a batch."""
        return cls(
            number,
            len(batch.token_ids),
            len(batch.logits_rows),
            tuple(batch.block_tables.shape),
            batch.lengths is not None,
            batch.token_adapters is not None,
            batch.are_bounds,
            batch.query_lengths,
            batch.context_lengths,
            batch.adapters,
        )

    @property
    def num_packed(self) -> int:
        """How many integers `pack` makes of the batch."""
        groups = self.table_shape[0] if len(self.table_shape) > 2 else 1
        lengths = 2 * len(self.query_lengths) + 1 if self.has_lengths else 0
        tables = int(np.prod(self.table_shape))
        per_token = 2 + groups + self.has_token_adapters
        return per_token * self.num_tokens + self.num_rows + tables + lengths

    def to_bytes(self) -> bytes:
        """As integers, in a fixed order: lengths of what has one first."""
        fixed = (
            self.number,
            self.num_tokens,
            self.num_rows,
            len(self.query_lengths),
            len(self.table_shape),
            self.has_lengths,
            self.has_token_adapters,
            self.are_bounds,
            self.adapters is not None,
        )
        values = (*fixed, *self.table_shape, *self.query_lengths, *self.context_lengths)
        return np.array((*values, *(self.adapters or ())), np.int64).tobytes()

    @classmethod
    def from_bytes(cls, payload: bytes) -> StepHeader:
        """What `to_bytes` made."""
        values = np.frombuffer(payload, np.int64).tolist()
        number, num_tokens, num_rows, count, dims, *flags = values[:_NUM_FIXED]
        has_lengths, has_token_adapters, are_bounds, adapted = map(bool, flags)
        ends = np.cumsum([_NUM_FIXED, dims, count, count, count * adapted]).tolist()
        shape, queries, contexts, adapters = (
            tuple(values[start:end]) for start, end in pairwise(ends)
        )
        return cls(
            number,
            num_tokens,
            num_rows,
            shape,
            has_lengths,
            has_token_adapters,
            are_bounds,
            queries,
            contexts,
            adapters if adapted else None,
        )


def pack(batch: ForwardBatch) -> Tensor:
    """All integers of a batch that are on the device, in one tensor, [StepHeader.num_packed]
    int64."""
    parts = [batch.token_ids, batch.positions, batch.slots, batch.logits_rows, batch.block_tables]
    if batch.lengths is not None:
        parts += [batch.lengths.query_starts, batch.lengths.contexts]
    if batch.token_adapters is not None:
        parts.append(batch.token_adapters)
    return torch.cat([part.reshape(-1).long() for part in parts])


def unpack(header: StepHeader, packed: Tensor) -> ForwardBatch:
    """The batch that was packed."""
    several = len(header.table_shape) > 2
    slots = (header.table_shape[0], header.num_tokens) if several else (header.num_tokens,)
    sequences = len(header.query_lengths)
    shapes = [(header.num_tokens,)] * 2 + [slots, (header.num_rows,), header.table_shape]
    if header.has_lengths:
        shapes += [(sequences + 1,), (sequences,)]
    if header.has_token_adapters:
        shapes.append((header.num_tokens,))
    cuts = torch.split(packed, [int(np.prod(shape)) for shape in shapes])
    token_ids, positions, slots_there, rows, tables, *further = (
        cut.view(shape) for cut, shape in zip(cuts, shapes, strict=True)
    )
    return ForwardBatch(
        token_ids=token_ids,
        positions=positions,
        slots=slots_there,
        block_tables=tables.int(),
        query_lengths=header.query_lengths,
        context_lengths=header.context_lengths,
        logits_rows=rows,
        lengths=DeviceLengths(further[0].int(), further[1].int()) if header.has_lengths else None,
        are_bounds=header.are_bounds,
        adapters=header.adapters,
        token_adapters=further[-1].int() if header.has_token_adapters else None,
    )


def adapter_to_wire(parts: AdapterParts) -> list[AdapterMatrix]:
    """An adapter as it is sent."""
    return [
        AdapterMatrix(path, part.first, len(part.down), _to_bytes(part.down), _to_bytes(part.up))
        for path, own in parts.items()
        for part in own
    ]


def adapter_from_wire(matrices: list[AdapterMatrix]) -> AdapterParts:
    """The adapter that was sent."""
    parts: dict[str, tuple[LowRankPart, ...]] = {}
    for each in matrices:
        down = _from_bytes(each.down).view(each.rank, -1)
        up = _from_bytes(each.up).view(-1, each.rank)
        parts[each.path] = (*parts.get(each.path, ()), LowRankPart(down, up, each.first))
    return parts


def _to_bytes(values: Tensor) -> bytes:
    return values.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()


def _from_bytes(values: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(values, np.float32).copy())


class Connection:
    """One end. Any thread may send; one thread receives.

    Raises ConnectionError where the other end is gone.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._incoming = connection.makefile("rb", _BUFFER_BYTES)
        self._sending = threading.Lock()
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: Order | Report) -> None:
        """Send anything but a step."""
        self._send(_MESSAGE, self._encoder.encode(message))

    def send_step(self, header: bytes) -> None:
        """Send a step's header, as bytes."""
        self._send(_STEP, header)

    def receive_order(self) -> Order | StepHeader:
        """The next that rank 0 says."""
        kind, payload = self._receive()
        if kind == _STEP:
            return StepHeader.from_bytes(payload)
        order: Order = _ORDERS.decode(payload)
        return order

    def receive_report(self) -> Report:
        """The next that a rank says."""
        _, payload = self._receive()
        report: Report = _REPORTS.decode(payload)
        return report

    def close(self) -> None:
        """End it; who receives at either end is told."""
        with contextlib.suppress(OSError):  # the other end was first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _send(self, kind: int, payload: bytes) -> None:
        with self._sending:
            self._socket.sendall(_FRAME.pack(len(payload), kind) + payload)

    def _receive(self) -> tuple[int, bytes]:
        length, kind = _FRAME.unpack(self._read(_FRAME.size))
        return kind, self._read(length)

    def _read(self, size: int) -> bytes:
        read: bytes = self._incoming.read(size)
        if len(read) < size:
            raise ConnectionError("the other end is gone")
        return read


_ORDERS = msgspec.msgpack.Decoder(Order)
_REPORTS = msgspec.msgpack.Decoder(Report)
