"""A step reaches every rank as it was made."""

from __future__ import annotations

import socket
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.engine.core.batch import CapturedShape, ForwardBatch
from services.engine.core.kernels import DeviceLengths, LowRankPart
from services.engine.core.parallel.step_input import StepHeader, StepMemory, pack, unpack
from services.engine.core.parallel.wire import (
    Beat,
    Connection,
    CopyBlocks,
    adapter_from_wire,
    adapter_to_wire,
)


@st.composite
def batches(draw: st.DrawFn) -> ForwardBatch:
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    groups = draw(st.integers(1, 3))
    total, width, rows = sum(counts), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    leading = () if groups == 1 else (groups,)

    def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(0, 1 << 30, shape, dtype=dtype)

    contexts = tuple(count + draw(st.integers(0, 9)) for count in counts)
    lengths = None
    if draw(st.booleans()):
        lengths = DeviceLengths(
            integers(len(counts) + 1, dtype=torch.int32), integers(len(counts), dtype=torch.int32)
        )
    adapters = draw(st.none() | st.just(tuple(range(-1, len(counts) - 1))))
    return ForwardBatch(
        integers(total),
        integers(total),
        integers(*leading, total),
        integers(*leading, len(counts), width, dtype=torch.int32),
        tuple(counts),
        contexts,
        integers(rows),
        lengths,
        are_bounds=lengths is not None,
        adapters=adapters,
        token_adapters=integers(total, dtype=torch.int32) if draw(st.booleans()) else None,
    )


def assert_same(ours: object, theirs: object) -> None:
    if isinstance(theirs, Tensor):
        assert isinstance(ours, Tensor)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, DeviceLengths):
        assert isinstance(ours, DeviceLengths)
        assert_same(ours.query_starts, theirs.query_starts)
        assert_same(ours.contexts, theirs.contexts)
    else:
        assert ours == theirs


@settings(max_examples=80)
@given(batch=batches())
def test_a_batch_is_the_same_on_the_other_side(batch: ForwardBatch) -> None:
    header = StepHeader.of(7, batch)
    arrived = StepHeader.from_bytes(header.to_bytes())
    assert arrived == header
    packed = pack(batch)
    assert len(packed) == arrived.num_packed
    found = unpack(arrived, packed)
    for name in ForwardBatch.__dataclass_fields__:
        assert_same(getattr(found, name), getattr(batch, name))


def captured(num_tokens: int, width: int, shape: CapturedShape) -> ForwardBatch:
    """A step of a captured shape, of one sequence that uses so many blocks."""
    each = torch.arange(num_tokens) + 1
    ends = torch.arange(num_tokens + 1, dtype=torch.int32)
    return ForwardBatch(
        each,
        2 * each,
        3 * each,
        torch.randint(1, 99, (num_tokens, 8), dtype=torch.int32),
        (1,) * num_tokens,
        (128,) * num_tokens,
        each - 1,
        DeviceLengths(ends, ends[1:]),
        are_bounds=shape.max_query_length is not None,
        num_table_columns=width,
        captured=shape,
    )


def test_captured_steps_of_a_shape_arrive_at_the_same_places() -> None:
    shapes = [CapturedShape(4, 1), CapturedShape(6, None), CapturedShape(2, 1)]
    memory = StepMemory(
        shapes, max_running_sequences=8, max_blocks=8, num_groups=1, device=torch.device("cpu")
    )
    for number, shape in enumerate(shapes):
        places = []
        for width in (1, 3, 8):
            batch = captured(shape.num_tokens, width, shape)
            header = StepHeader.of(1, batch, captured=number)
            payload = header.to_bytes()
            assert len(payload) < 8 * 20  # bounds are told once
            header = StepHeader.from_bytes(payload)
            place = memory.packed(header)
            place.copy_(pack(batch))
            arrived = memory.batch(header, place)
            assert arrived.captured == shape
            for name in ("token_ids", "positions", "slots", "logits_rows", "lengths"):
                assert_same(getattr(arrived, name), getattr(batch, name))
            assert torch.equal(arrived.block_tables[:, :width], batch.block_tables[:, :width])
            if arrived.are_bounds:
                assert arrived.block_tables.shape == batch.block_tables.shape
            assert arrived.lengths is not None
            read = [arrived.token_ids, arrived.positions, arrived.slots]
            if arrived.are_bounds:
                read += [arrived.block_tables, arrived.logits_rows]
                read += [arrived.lengths.query_starts, arrived.lengths.contexts]
            places.append(
                tuple(each.data_ptr() - memory.packed(header).data_ptr() for each in read)
            )
            assert all(each.data_ptr() % 16 == 0 for each in read)
        assert len(set(places)) == 1


def test_an_adapter_is_the_same_on_the_other_side() -> None:
    parts = {
        "layers.0.attention.qkv": (
            LowRankPart(torch.randn(3, 5), torch.randn(4, 3), 0),
            LowRankPart(torch.randn(2, 5), torch.randn(6, 2), 4),
        ),
        "layers.1.feed_forward.down": (LowRankPart(torch.randn(1, 7), torch.randn(2, 1), 0),),
    }
    found = adapter_from_wire(adapter_to_wire(parts))
    assert found.keys() == parts.keys()
    for path, own in parts.items():
        for ours, theirs in zip(found[path], own, strict=True):
            assert ours.first == theirs.first
            assert torch.equal(ours.down, theirs.down)
            assert torch.equal(ours.up, theirs.up)


def pair() -> tuple[Connection, Connection]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    return Connection(ours), Connection(theirs)


def test_orders_and_steps_arrive_in_order() -> None:
    leader, follower = pair()
    header = StepHeader(1, 2, 1, (1, 4), False, False, False, 3, True, (2,), (2,), None)
    for _ in range(3):
        leader.send(CopyBlocks([(1, 2)]))
        leader.send_step(header.to_bytes())
    for _ in range(3):
        assert follower.receive_order() == CopyBlocks([(1, 2)])
        assert follower.receive_order() == header


def test_who_waits_is_told_that_the_other_end_is_gone() -> None:
    leader, follower = pair()
    follower.send(Beat())
    assert leader.receive_report() == Beat()
    threading.Timer(0.05, follower.close).start()
    with pytest.raises(ConnectionError):
        leader.receive_report()
