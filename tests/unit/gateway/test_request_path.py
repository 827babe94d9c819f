"""What the stages make of what the engine says: text, ends, counts, whatever happens on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest

from meshserve.v1 import gateway_pb2, types_pb2
from services.gateway.events import ChoiceEnd
from services.safety.completion_session import CompletionSession
from tests.fakes.scripted_mesh import (
    EngineRequest,
    EngineResponse,
    ScriptedMesh,
    chunk,
    complete,
    encode,
    generation,
    says,
    token_bytes,
)
from tests.support.errors import Failure, failure_of
from tests.support.waiting import until

CARD = "4111 1111 1111 1111"
STOP, LENGTH = types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH
FILTERED = types_pb2.FINISH_REASON_CONTENT_FILTER


async def failure(call: Any) -> Failure:
    with pytest.raises(grpc.RpcError) as error:
        await call
    return failure_of(error.value)


def text_of(messages: list[gateway_pb2.StreamGenerateResponse], index: int = 0) -> str:
    return "".join(
        delta.text for message in messages for delta in message.chunk.deltas if delta.index == index
    )


def bundles(text: str, size: int) -> list[str]:
    """The tokens of a text, `size` in a message."""
    tokens = [token_bytes(token_id).decode() for token_id in encode(text)]
    return ["".join(tokens[i : i + size]) for i in range(0, len(tokens), size)]


# --- how many tokens may follow


async def test_a_request_that_sets_no_limit_gets_what_the_context_leaves(
    mesh: ScriptedMesh,
) -> None:
    await mesh.generate("hello")
    await mesh.generate("hello", max_tokens=7)
    unlimited, limited = mesh.engine.requests
    assert unlimited.stopping.max_tokens == 4096 - len(encode("hello"))
    assert limited.stopping.max_tokens == 7


async def test_the_operator_may_cap_requests_that_set_no_limit(tmp_path: Path) -> None:
    async with ScriptedMesh(tmp_path, gateway={"default_max_tokens": 50}) as mesh:
        await mesh.generate("hello")
        await mesh.generate("hello", max_tokens=60)
    assert [request.stopping.max_tokens for request in mesh.engine.requests] == [50, 60]


# --- redaction and tokenization


async def test_what_was_redacted_never_reaches_the_engine(mesh: ScriptedMesh) -> None:
    answer = await mesh.generate(f"Pay with {CARD} now")
    (request,) = mesh.engine.requests
    assert request.prompt.ids == encode("Pay with [redacted] now")
    assert answer.usage.prompt_tokens == len(request.prompt.ids)
    assert answer.prompt_safety.action == types_pb2.SAFETY_ACTION_REDACT


async def test_a_redaction_that_comes_after_tokenization_outdates_it(mesh: ScriptedMesh) -> None:
    """And one that comes before it does not make it run twice in vain."""
    mesh.tokenizer.may_encode.clear()
    call = asyncio.create_task(mesh.generate(CARD))
    await until(lambda: mesh.tokenizer.encoded == [CARD])
    await asyncio.sleep(0.1)
    mesh.tokenizer.may_encode.set()
    await call
    assert mesh.tokenizer.encoded == [CARD, "[redacted]"]
    mesh.tokenizer.encoded.clear()
    await mesh.generate("harmless")
    assert mesh.tokenizer.encoded == ["harmless"]


@pytest.mark.parametrize("place", ["content", "tool", "tool schema", "arguments", "reasoning"])
async def test_every_text_of_a_conversation_is_redacted(mesh: ScriptedMesh, place: str) -> None:
    user = types_pb2.ChatMessage(role=types_pb2.ROLE_USER, content="hi")
    request = gateway_pb2.ChatRequest(conversation=types_pb2.Conversation(messages=[user]))
    conversation = request.conversation
    if place == "content":
        conversation.messages[0].content = CARD
    elif place == "tool":
        conversation.tools.add(name="pay", description=f"with {CARD}")
    elif place == "tool schema":
        conversation.tools.add(name="pay").parameters.update({"default": CARD, "type": "string"})
    elif place == "arguments":
        conversation.messages.add(role=types_pb2.ROLE_ASSISTANT).tool_calls.add(
            name="pay", arguments_json=f'{{"card": "{CARD}"}}'
        )
    else:
        conversation.messages.add(role=types_pb2.ROLE_ASSISTANT, reasoning_content=CARD)
    answer = await mesh.stub.Chat(request, timeout=10)
    assert answer.prompt_safety.action == types_pb2.SAFETY_ACTION_REDACT
    assert CARD not in mesh.tokenizer.encoded[-1]


async def test_a_blocked_prompt_reaches_no_engine(mesh: ScriptedMesh) -> None:
    refused = await failure(mesh.generate("please stop here at once"))
    assert refused.reason == "PROMPT_BLOCKED"
    assert "stop here" not in refused.message
    assert not mesh.engine.requests


# --- stop strings


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize("stop", ["STOP", "two STO", "o ST", "S"])
async def test_stop_strings_are_found_however_tokens_are_bundled(
    mesh: ScriptedMesh, stop: str, size: int
) -> None:
    """Inside one token, over many, and with the same count whatever came in one message."""
    said = "one two STOP three END"
    mesh.engine.script = says(*bundles(said, size))
    answer = await mesh.generate(stop_strings=[stop, "never"])
    choice = answer.choices[0]
    assert choice.text == said[: said.index(stop)]
    assert (choice.finish_reason, choice.matched_stop.text) == (STOP, stop)
    end = said.index(stop) + len(stop)
    counted, position = 0, 0
    while position < end:
        position += len(token_bytes(encode(said)[counted]))
        counted += 1
    assert answer.usage.completion_tokens == counted


async def test_stop_strings_do_not_end_a_completion_before_min_tokens(mesh: ScriptedMesh) -> None:
    mesh.engine.script = says("oneENDoneENDone")
    answer = await mesh.generate(stop_strings=["END"], min_tokens=3, max_tokens=10)
    assert answer.choices[0].text == "oneENDone"
    assert answer.usage.completion_tokens == 4
    kept = await mesh.generate(
        stop_strings=["END"], min_tokens=3, max_tokens=10, include_stop_in_text=True
    )
    assert kept.choices[0].text == "oneENDoneEND"


async def test_an_engine_that_nobody_listens_to_any_more_is_left_at_once(
    mesh: ScriptedMesh,
) -> None:
    """By a stop string that only the text shows, in both choices."""

    async def endless(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        yield chunk((0, encode("one two EN")), (1, encode("tw")))
        yield chunk((0, encode("D")), (1, encode("oE")))
        yield chunk((1, encode("ND")))
        while True:
            await asyncio.sleep(0.01)
            yield chunk((0, encode("more")), (1, encode("more")))

    mesh.engine.script = endless
    answer = await mesh.generate(stop_strings=["END"], n=2)
    assert [choice.text for choice in answer.choices] == ["one two ", "two"]
    await until(lambda: mesh.engine.left == 1)


# --- counting and details


@pytest.mark.parametrize("size", [1, 3, 50])
async def test_usage_is_independent_of_bundles(mesh: ScriptedMesh, size: int) -> None:
    said = "one two three — ünïcode END"
    parts = [encode(said)[i : i + size] for i in range(0, len(encode(said)), size)]

    async def script(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        for part in parts:
            yield chunk((0, part), logprobs=True)
        yield complete()

    mesh.engine.script = script
    messages = await mesh.stream(token_ids=True, logprobs=0)
    deltas = [delta for message in messages for delta in message.chunk.deltas]
    end = messages[-1].complete
    assert text_of(messages) == said
    assert [token for delta in deltas for token in delta.token_ids] == encode(said)
    positions = [each for delta in deltas for each in delta.logprobs.positions]
    assert [each.chosen.token_id for each in positions] == encode(said)
    assert end.usage.completion_tokens == len(encode(said))
    assert messages[0].started.prompt_tokens == end.usage.prompt_tokens == len(encode("hello"))


async def test_logprobs_come_without_token_ids_too(mesh: ScriptedMesh) -> None:
    said = "ö—ü"
    mesh.engine.script = says(said)
    whole = await mesh.generate(logprobs=0)
    assert len(whole.choices[0].logprobs.positions) == len(encode(said))

    async def byte_by_byte(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        for token_id in encode(said):
            yield chunk((0, [token_id]), logprobs=True)
        yield complete()

    mesh.engine.script = byte_by_byte
    split = await mesh.generate(logprobs=0)
    assert split.choices[0].logprobs == whole.choices[0].logprobs
    assert not split.choices[0].token_ids


async def test_the_prompt_is_repeated_before_the_completion(mesh: ScriptedMesh) -> None:
    answer = await mesh.generate(f"Say {CARD}:", echo=True, n=2)
    assert {choice.text for choice in answer.choices} == {"Say [redacted]:onetwo"}
    messages = await mesh.stream("Say:", echo=True)
    assert messages[0].HasField("started")
    assert text_of(messages) == "Say:onetwo"
    assert answer.usage.completion_tokens == 4


# --- completions that are redacted or blocked


async def test_a_completion_is_redacted_and_its_tokens_are_not_told(mesh: ScriptedMesh) -> None:
    mesh.engine.script = says("Card: ", "4111 1111", " 1111 1111", " is it.", "one")
    messages = await mesh.stream(token_ids=True)
    deltas = [delta for message in messages for delta in message.chunk.deltas]
    assert text_of(messages) == "Card: [redacted] is it.one"
    told = [token for delta in deltas for token in delta.token_ids]
    assert told == encode("Card: ")[: len(told)]
    assert messages[-1].complete.safety.action == types_pb2.SAFETY_ACTION_REDACT
    assert messages[-1].complete.finish_reason == LENGTH


async def test_a_blocked_completion_ends_before_what_is_blocked(mesh: ScriptedMesh) -> None:
    async def endless(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        for text in ("one ", "two. ", "stop", " here", " and"):
            yield chunk((0, encode(text)))
        while True:
            await asyncio.sleep(0.01)
            yield chunk((0, encode("more")))

    mesh.engine.script = endless
    messages = await mesh.stream(token_ids=True)
    assert "stop" not in text_of(messages)
    assert text_of(messages).startswith("one")
    assert messages[-1].complete.finish_reason == FILTERED
    assert messages[-1].complete.safety.action == types_pb2.SAFETY_ACTION_BLOCK
    await until(lambda: mesh.engine.left == 1)


async def test_a_blocked_choice_leaves_the_others(mesh: ScriptedMesh) -> None:
    has_ended = asyncio.Event()
    has_ended.set()

    async def script(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        yield chunk((0, encode("one ")), (1, encode("stop ")))
        yield chunk((0, encode("two ")), (1, encode("here. ")))
        await has_ended.wait()
        yield chunk((0, encode("three")), (1, encode("secret")))
        yield complete(1)
        yield complete(0)

    mesh.engine.script = script
    answer = await mesh.generate(n=2)
    fine, blocked = answer.choices
    assert (fine.text, fine.finish_reason) == ("one two three", LENGTH)
    assert blocked.finish_reason == FILTERED
    assert "stop" not in blocked.text
    assert "secret" not in blocked.text
    # What the engine says of it once it has ended is not counted.
    has_ended.clear()
    request = gateway_pb2.StreamGenerateRequest(request=generation(n=2))
    ends = []
    async for message in mesh.stub.StreamGenerate(request, timeout=20):
        if message.HasField("complete"):
            ends.append(message.complete)
            has_ended.set()
    assert [end.index for end in ends] == [1, 0]
    texts = ("one ", "two ", "three", "stop ", "here. ")
    counted = sum(len(encode(text)) for text in texts)
    assert sum(end.usage.completion_tokens for end in ends) == counted


@pytest.mark.parametrize("lost", ["safety", "tokenizer"])
async def test_a_lost_replica_changes_nothing_in_the_answer(
    mesh: ScriptedMesh, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed between the halves of redactions, of a character and of a stop string."""
    first_byte, second_byte = encode("ö")
    # What the engine says, and the end of what has been checked when the replica is lost.
    parts = [
        (encode("ö badger 4111 1111"), "badger 4111 1111"),
        (encode(" 1111 1111 ö, then 4111 1111"), "then 4111 1111"),
        ([*encode(" 1111 1111. badger "), first_byte], ". badger "),
        ([second_byte, *encode("E")], "ö"),
        (encode("ND more"), None),
    ]
    checked: list[str] = []
    feed = CompletionSession.feed

    def watched(session: CompletionSession, message: Any) -> Any:
        checked.append(message.text)
        return feed(session, message)

    monkeypatch.setattr(CompletionSession, "feed", watched)
    losses = 0

    async def script(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        nonlocal losses
        for token_ids, tail in parts:
            yield chunk((0, token_ids))
            if tail is not None:
                await until(lambda: "".join(checked).endswith(tail))  # noqa: B023
                await asyncio.sleep(0.05)
                await mesh.kill(lost)
                await mesh.start(lost)
                losses += 1
        yield complete()

    mesh.engine.script = script
    messages = await mesh.stream(stop_strings=["END"], include_stop_in_text=True)
    assert losses == 4
    assert text_of(messages) == "ö [redacted] [redacted] ö, then [redacted]. [redacted] öEND"
    end = messages[-1].complete
    assert end.finish_reason == STOP
    assert len(end.safety.findings) == 4


@pytest.mark.parametrize("ending", ["a stop string", "a block"])
async def test_the_engine_is_left_before_a_slow_reader_has_read_the_end(
    mesh: ScriptedMesh, ending: str
) -> None:
    async def endless(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        while True:
            yield chunk((0, encode("oneEN" if ending == "a stop string" else "one stop ")))
            yield chunk((0, encode("Dmore" if ending == "a stop string" else "here. More")))
            await asyncio.sleep(0.01)

    mesh.engine.script = endless
    inference = mesh.gateway._inference
    request = generation(stop_strings=["END"])
    with inference.request(request, "text_completion", (), streaming=True) as call:
        async with aclosing(inference.events(call)) as events:
            async for event in events:
                if isinstance(event, ChoiceEnd):
                    await until(lambda: mesh.engine.left == 1)


# --- names, room, refusals


async def test_an_id_in_flight_is_refused_and_free_again_after(mesh: ScriptedMesh) -> None:
    release = asyncio.Event()

    async def waits(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        await release.wait()
        yield chunk((0, encode("one")))
        yield complete()

    mesh.engine.script = waits
    first = asyncio.create_task(mesh.generate(request_id="mine"))
    await until(lambda: mesh.engine.active == 1)
    refused = await failure(mesh.generate(request_id="mine"))
    assert (refused.code, refused.reason) == (
        grpc.StatusCode.ALREADY_EXISTS,
        "REQUEST_ID_IN_USE",
    )
    release.set()
    assert (await first).request_id == "mine"
    assert (await mesh.generate(request_id="mine")).request_id == "mine"


async def test_cancelled_requests_give_everything_back(mesh: ScriptedMesh) -> None:
    async def silent(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        yield chunk((0, encode("one")))
        await asyncio.Event().wait()

    mesh.engine.script = silent
    calls = [
        mesh.stub.StreamGenerate(gateway_pb2.StreamGenerateRequest(request=generation(n=2)))
        for _ in range(10)
    ]
    for call in calls:
        await call.read()
        call.cancel()
    await until(lambda: mesh.engine.left == 10)
    await until(lambda: mesh.count("meshserve_gateway_active_requests") == 0)
    name = "meshserve_gateway_requests_total"
    labels = {"model": "scripted", "tenant": "anonymous", "reason": "CANCELLED"}
    await until(lambda: mesh.count(name, **labels) == 10)


async def test_a_request_refused_by_the_front_door_is_counted_too(mesh: ScriptedMesh) -> None:
    user = types_pb2.ChatMessage(role=types_pb2.ROLE_USER, content="hi")
    request = gateway_pb2.ChatRequest(
        conversation=types_pb2.Conversation(messages=[user]),
        tool_choice=gateway_pb2.TOOL_CHOICE_REQUIRED,
    )
    refused = await failure(mesh.stub.Chat(request, timeout=5))
    assert refused.reason == "CAPABILITY_MISSING"
    assert refused.metadata["request_id"]
    request.tool_choice = 77  # type: ignore[assignment]
    assert (await failure(mesh.stub.Chat(request, timeout=5))).fields == ("tool_choice",)
    for reason in ("CAPABILITY_MISSING", "INVALID_FIELD"):
        labels = {"model": "unknown", "tenant": "anonymous", "reason": reason}
        assert mesh.count("meshserve_gateway_requests_total", **labels) == 1


async def test_an_engine_that_ends_too_soon_is_no_finished_answer(mesh: ScriptedMesh) -> None:
    async def truncated(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        yield chunk((0, encode("one")))

    mesh.engine.script = truncated
    refused = await failure(mesh.generate())
    assert (refused.code, refused.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")


async def test_a_prompt_that_no_engine_has_read_costs_nothing(mesh: ScriptedMesh) -> None:
    await mesh.kill("engine")
    assert (await failure(mesh.generate())).reason == "SERVICE_UNAVAILABLE"
    labels = {"model": "scripted", "tenant": "anonymous"}
    assert mesh.count("meshserve_gateway_prompt_tokens_total", **labels) == 0


async def test_no_more_requests_than_allowed_are_in_flight(tmp_path: Path) -> None:
    async with ScriptedMesh(tmp_path, gateway={"max_active_requests": 2}) as mesh:
        release = asyncio.Event()

        async def waits(request: EngineRequest) -> AsyncIterator[EngineResponse]:
            await release.wait()
            yield chunk((0, encode("one")))
            yield complete()

        mesh.engine.script = waits
        running = [asyncio.create_task(mesh.generate()) for _ in range(2)]
        await until(lambda: mesh.engine.active == 2)
        refused = await failure(mesh.generate())
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.reason == "QUEUE_FULL"
        assert refused.retry_after_s == 1.0
        release.set()
        await asyncio.gather(*running)
        await mesh.generate()


@pytest.mark.parametrize("policy", ["allow", "refuse"])
async def test_a_filter_that_is_away(tmp_path: Path, policy: str) -> None:
    async with ScriptedMesh(tmp_path, safety={"when_unavailable": policy}) as mesh:
        await mesh.kill("safety")
        if policy == "refuse":
            refused = await failure(mesh.generate())
            assert refused.reason == "SERVICE_UNAVAILABLE"
            assert refused.metadata["service"] == "safety"
            assert not mesh.engine.requests
            return
        async with asyncio.timeout(4):
            answer = await mesh.generate()
        assert answer.choices[0].text == "onetwo"
        assert mesh.count("meshserve_gateway_unchecked_requests_total", model="scripted") == 1


async def test_a_filter_that_goes_away_in_the_middle_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.sessions.REOPEN_FOR_S", 0.3)
    async with ScriptedMesh(tmp_path, safety={"when_unavailable": "allow"}) as mesh:

        async def script(request: EngineRequest) -> AsyncIterator[EngineResponse]:
            yield chunk((0, encode("one 4111 ")))
            await asyncio.sleep(0.1)
            await mesh.kill("safety")
            for _ in range(50):
                yield chunk((0, encode("two")))
                await asyncio.sleep(0)
            yield complete()

        mesh.engine.script = script
        async with asyncio.timeout(8):
            messages = await mesh.stream()
        assert text_of(messages) == "one 4111 " + "two" * 50
        assert mesh.count("meshserve_gateway_unchecked_requests_total", model="scripted") == 1


# --- the interval of streams


async def test_text_is_sent_when_its_time_has_come_and_not_with_what_follows(
    mesh: ScriptedMesh,
) -> None:
    got_all = asyncio.Event()

    async def script(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        for text in ("one ", "two ", "three "):
            yield chunk((0, encode(text)))
            await asyncio.sleep(0.01)
        await got_all.wait()
        yield complete()

    mesh.engine.script = script
    request = gateway_pb2.StreamGenerateRequest(request=generation())
    request.stream_options.min_interval_ms = 200
    texts: list[str] = []
    async for message in mesh.stub.StreamGenerate(request, timeout=10):
        texts += [delta.text for delta in message.chunk.deltas]
        if "".join(texts).rstrip() == "one two three":
            got_all.set()
    assert len(texts) == 2


async def test_an_interval_beyond_the_limit_is_refused_by_its_own_name(mesh: ScriptedMesh) -> None:
    request = gateway_pb2.StreamGenerateRequest(request=generation())
    request.stream_options.min_interval_ms = 60_000
    with pytest.raises(grpc.RpcError) as error:
        await mesh.stub.StreamGenerate(request, timeout=5).read()
    assert failure_of(error.value).fields == ("stream_options.min_interval_ms",)
