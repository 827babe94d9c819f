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
from typing import TypeAlias

import msgspec
import numpy as np
import torch
from torch import Tensor

from services.engine.core.batch import CapturedShape
from services.engine.core.kernels import AdapterParts, LowRankPart
from services.engine.core.parallel.step_input import StepHeader
from services.engine.core.settings import CoreSettings

_FRAME = struct.Struct("<IB")
_STEP, _MESSAGE = 0, 1
_BUFFER_BYTES = 1 << 16


class Setup(msgspec.Struct, tag=True):
    """The first that a rank is told. It answers with the bytes that its device has free."""

    settings: CoreSettings
    store_port: int


class Load(msgspec.Struct, tag=True):
    """Load these layers' weights, given by the first layer of each stage and their number."""

    bounds: list[int]


class Profile(msgspec.Struct, tag=True):
    """Begin to watch what memory the steps that follow take."""


class CountRows(msgspec.Struct, tag=True):
    """Answered with the rows of blocks, for all layers, for which there is room: beside what the
    steps took that were watched, if any were, and `graphs_bytes` for CUDA graphs. A KV cache that
    they were computed on is given up."""

    graphs_bytes: int


class Allocate(msgspec.Struct, tag=True):
    """Make the KV cache."""

    num_blocks: int


class Timing(msgspec.Struct, frozen=True):
    """How long the implementations of a product take; see `kernels.choice.Choice`."""

    op: str
    dtype: str
    outputs: int
    inputs: int
    bits: int
    rows: int
    seconds: dict[str, float]


class Tune(msgspec.Struct, tag=True):
    """Measure products; answered with the timings."""


class GoBy(msgspec.Struct, tag=True):
    """Choose implementations by these timings alone; not answered."""

    timings: list[Timing]


class BeginCapture(msgspec.Struct, tag=True):
    """Steps of these shapes may be captured from now on."""

    shapes: list[CapturedShape]


class Forget(msgspec.Struct, tag=True):
    """Forget the graphs of a shape, which not all ranks have; not answered."""

    shape: CapturedShape


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
    """The answer to what is answered, and to a step that was captured: with the bytes of all
    graphs."""

    value: int = 0
    timings: list[Timing] = []


class Beat(msgspec.Struct, tag=True):
    """Said now and then: the process runs."""


class Failed(msgspec.Struct, tag=True):
    """Something has failed: a step, after so many exchanges, or what was to be answered (0)."""

    problem: str
    step: int = 0
    num_exchanges: int = 0


AnsweredOrder: TypeAlias = Setup | Load | Profile | CountRows | Allocate | Tune | BeginCapture
Order: TypeAlias = AnsweredOrder | GoBy | Forget | CopyBlocks | SetAdapter
Report: TypeAlias = Hello | Done | Beat | Failed


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
