"""Many sessions on one stream, the server's side: in order, and each fails alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.rpc import code_pb2
from hypothesis import given
from hypothesis import strategies as st

from meshserve.v1 import tokenizer_pb2
from services.runtime.errors import Reason, ServiceError, from_session_status
from tests.fakes.decoding import CRASH, POISON, SILENCE, EchoHost, text_of

Message = list[tokenizer_pb2.DecodeInput]


def say(
    session_id: int,
    *token_ids: int,
    opens: bool = False,
    finish: bool = False,
    cancel: bool = False,
    model: str = "",
) -> tokenizer_pb2.DecodeInput:
    message = tokenizer_pb2.DecodeInput(
        session_id=session_id, token_ids=token_ids, finish=finish, cancel=cancel
    )
    if opens:
        message.open.model = model
    return message


async def requests_of(*messages: Message) -> AsyncIterator[Any]:
    for inputs in messages:
        yield tokenizer_pb2.StreamDecodeRequest(inputs=inputs)


async def answers(host: EchoHost, *messages: Message) -> list[list[tokenizer_pb2.DecodeOutput]]:
    return [list(outputs) async for outputs in host.host().serve(requests_of(*messages))]


def brief(outputs: list[tokenizer_pb2.DecodeOutput]) -> list[tuple[int, str]]:
    """(session, text or reason) of each output."""
    return [
        (
            output.session_id,
            from_session_status(output.error, peer="tokenizer").reason.value
            if output.HasField("error")
            else output.text,
        )
        for output in outputs
    ]


async def test_a_message_is_answered_by_one_message_in_the_order_of_its_inputs() -> None:
    first, second = await answers(
        EchoHost(),
        [say(3, 1, opens=True), say(1, 2, opens=True), say(2, 3, opens=True)],
        [say(2, 4), say(3, 5, finish=True)],
    )
    assert brief(first) == [(3, "<1>"), (1, "<2>"), (2, "<3>")]
    assert brief(second) == [(2, "<4>"), (3, "<5>")]
    assert [output.finished for output in second] == [False, True]


async def test_a_message_that_asks_for_nothing_is_not_answered() -> None:
    host = EchoHost()
    assert await answers(host, [say(1, opens=True)], [say(1, SILENCE)], []) == []
    assert len(host.opened) == 1


@pytest.mark.parametrize(("token", "reason"), [(POISON, "INVALID_FIELD"), (CRASH, "INTERNAL")])
async def test_a_session_that_fails_ends_alone(
    token: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    host = EchoHost()
    with caplog.at_level(logging.CRITICAL):
        _, second, third = await answers(
            host,
            [say(1, 1, opens=True), say(2, 1, opens=True)],
            [say(1, token), say(2, 2)],
            [say(1, 3), say(2, 3)],
        )
    assert brief(second) == [(1, reason), (2, "<2>")]
    assert second[0].finished
    assert "defect" not in second[0].error.message
    assert brief(third) == [(1, "INVALID_FIELD"), (2, "<3>")]
    (error,) = host.opened[0].closed
    assert error is not None
    assert error.reason.value == reason


async def test_a_session_that_cannot_be_opened_fails_alone() -> None:
    (outputs,) = await answers(
        EchoHost(), [say(1, 1, opens=True, model="absent"), say(2, 2, opens=True)]
    )
    assert brief(outputs) == [(1, "MODEL_NOT_FOUND"), (2, "<2>")]
    assert outputs[0].error.code == code_pb2.NOT_FOUND


async def test_an_input_of_no_session_is_told_so() -> None:
    (outputs,) = await answers(EchoHost(), [say(9, 1)])
    assert brief(outputs) == [(9, "INVALID_FIELD")]
    assert "session 9 is not open" in outputs[0].error.message


async def test_a_session_opened_twice_ends_since_its_answers_could_not_be_told_apart() -> None:
    host = EchoHost()
    _, second = await answers(host, [say(1, 1, opens=True)], [say(1, 2, opens=True)])
    assert brief(second) == [(1, "INVALID_FIELD")]
    assert len(host.opened) == 1
    assert len(host.opened[0].closed) == 1


async def test_a_cancelled_session_is_closed_and_not_answered() -> None:
    host = EchoHost()
    messages = await answers(
        host,
        [say(1, 1, opens=True), say(2, 1, opens=True)],
        [say(1, cancel=True), say(7, cancel=True)],
        [say(2, 2)],
    )
    assert [brief(outputs) for outputs in messages] == [[(1, "<1>"), (2, "<1>")], [(2, "<2>")]]
    (error,) = host.opened[0].closed
    assert error is not None
    assert error.reason is Reason.CANCELLED


async def test_the_end_of_the_stream_closes_what_is_open() -> None:
    host = EchoHost()
    await answers(host, [say(1, 1, opens=True), say(2, 1, opens=True, finish=True)])
    (open_one,), (finished,) = (session.closed for session in host.opened)
    assert open_one is not None
    assert open_one.reason is Reason.CANCELLED
    assert finished is None


async def test_leaving_the_stream_closes_what_is_open() -> None:
    host = EchoHost()

    async def endless() -> AsyncIterator[Any]:
        yield tokenizer_pb2.StreamDecodeRequest(inputs=[say(1, 1, opens=True)])
        await asyncio.Event().wait()

    outputs = host.host().serve(endless())
    await anext(outputs)
    await outputs.aclose()  # type: ignore[attr-defined]
    assert host.open_sessions == 0


async def test_a_session_whose_close_fails_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    host = EchoHost()

    def fail(self: Any, error: ServiceError | None) -> None:
        self.closed.append(error)
        raise RuntimeError("a defect in close")

    monkeypatch.setattr("tests.fakes.decoding.EchoSession.close", fail)
    messages = await answers(
        host,
        [say(1, 1, opens=True), say(2, 1, opens=True), say(3, 1, opens=True)],
        [say(1, 2, finish=True), say(2, POISON), say(3, 2)],
    )
    assert brief(messages[1]) == [(1, "<2>"), (2, "INVALID_FIELD"), (3, "<2>")]
    assert host.open_sessions == 0


async def test_a_stream_holds_so_many_sessions_and_no_more() -> None:
    host = EchoHost(max_sessions=2)
    first, second = await answers(
        host,
        [say(n, n, opens=True) for n in (1, 2, 3)],
        [say(1, 4, finish=True), say(4, 5, opens=True)],
    )
    assert brief(first) == [(1, "<1>"), (2, "<2>"), (3, "QUEUE_FULL")]
    assert brief(second) == [(1, "<4>"), (4, "<5>")]


async def test_a_draining_stream_opens_nothing_and_ends_with_its_last_session() -> None:
    host = EchoHost()
    sent: asyncio.Queue[Message] = asyncio.Queue()

    async def requests() -> AsyncIterator[Any]:
        while True:
            yield tokenizer_pb2.StreamDecodeRequest(inputs=await sent.get())

    outputs = host.host().serve(requests())
    sent.put_nowait([say(1, 1, opens=True)])
    assert brief(list(await anext(outputs))) == [(1, "<1>")]
    host.draining.set()
    sent.put_nowait([say(1, 2), say(2, 1, opens=True)])
    assert brief(list(await anext(outputs))) == [(1, "<2>"), (2, "DRAINING")]
    sent.put_nowait([say(1, 3, finish=True)])
    assert brief(list(await anext(outputs))) == [(1, "<3>")]
    async with asyncio.timeout(1):
        assert await anext(outputs, None) is None


async def test_a_draining_stream_without_sessions_ends_at_once() -> None:
    host = EchoHost()

    async def silent() -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield

    reading = asyncio.create_task(anext(host.host().serve(silent()), None))
    await asyncio.sleep(0.01)
    host.draining.set()
    async with asyncio.timeout(1):
        assert await reading is None


async def test_a_caller_that_does_not_read_its_answers_is_not_read_from() -> None:
    host = EchoHost()
    read = 0

    async def requests() -> AsyncIterator[Any]:
        nonlocal read
        for index in range(10_000):
            read += 1
            yield tokenizer_pb2.StreamDecodeRequest(inputs=[say(1, 1, opens=index == 0)])

    outputs = host.host().serve(requests())
    await anext(outputs)
    await asyncio.sleep(0.01)
    assert read < 200
    await outputs.aclose()  # type: ignore[attr-defined]


async def test_bytes_that_are_no_message_end_the_stream_with_their_error() -> None:
    async def malformed() -> AsyncIterator[Any]:
        yield tokenizer_pb2.StreamDecodeRequest(inputs=[say(1, 1, opens=True)])
        raise ServiceError(Reason.MALFORMED_MESSAGE, "not a message")

    host = EchoHost()
    outputs = host.host().serve(malformed())
    assert brief(list(await anext(outputs))) == [(1, "<1>")]
    with pytest.raises(ServiceError, match="not a message"):
        await anext(outputs)
    assert host.open_sessions == 0


inputs = st.builds(
    say,
    st.integers(1, 4),
    st.sampled_from([1, 2, POISON, CRASH, SILENCE]),
    opens=st.booleans(),
    finish=st.booleans(),
    cancel=st.sampled_from([False, False, False, True]),
)


def expected(messages: list[Message]) -> list[list[tuple[int, str]]]:
    """What a plain reading of the contract answers."""
    is_open: set[int] = set()
    answered = []
    for message in messages:
        outputs: list[tuple[int, str]] = []
        for given_ in message:
            session_id, (token,) = given_.session_id, given_.token_ids
            was_open, opens = session_id in is_open, given_.HasField("open")
            if given_.cancel:
                is_open.discard(session_id)
            elif was_open == opens or token == POISON:
                outputs.append((session_id, "INVALID_FIELD"))
                is_open.discard(session_id)
            elif token == CRASH:
                outputs.append((session_id, "INTERNAL"))
                is_open.discard(session_id)
            else:
                is_open.add(session_id)
                if token != SILENCE:
                    outputs.append((session_id, text_of([token])))
                    if given_.finish:
                        is_open.discard(session_id)
        if outputs:
            answered.append(outputs)
    return answered


@given(st.lists(st.lists(inputs, max_size=4), max_size=12))
def test_any_conversation_is_answered_as_the_contract_says(messages: list[Message]) -> None:
    logging.disable(logging.CRITICAL)
    try:
        host = EchoHost()
        outputs = asyncio.run(answers(host, *messages))
    finally:
        logging.disable(logging.NOTSET)
    assert [brief(message) for message in outputs] == expected(messages)
    assert all(len(session.closed) == 1 for session in host.opened)
