"""The tokenizer's RPCs over a real gRPC connection: answers, and one clear error for bad input."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from meshserve.v1 import tokenizer_pb2 as pb
from meshserve.v1 import tokenizer_pb2_grpc, types_pb2
from services.runtime.errors import Reason, ServiceError, from_session_status
from services.runtime.server_calls import CallInterceptor
from services.runtime.settings import TokenizerSettings
from services.runtime.telemetry import Metrics
from services.tokenizer.model_tokenizer import ModelTokenizer
from services.tokenizer.models import ServedModels
from services.tokenizer.servicer import TokenizerServicer

USER, TOOL, ASSISTANT = types_pb2.ROLE_USER, types_pb2.ROLE_TOOL, types_pb2.ROLE_ASSISTANT


@dataclass
class Running:
    channel: grpc.aio.Channel
    stub: Any
    models: ServedModels
    metrics: Metrics
    draining: asyncio.Event


@pytest.fixture
async def running(
    byte_level: ModelTokenizer, sentencepiece: ModelTokenizer, request: pytest.FixtureRequest
) -> AsyncIterator[Running]:
    changes = getattr(request, "param", {})
    settings = TokenizerSettings(max_text_bytes=20_000_000, template_timeout_s=0.5).model_copy(
        update=changes
    )
    models = ServedModels()
    models.add("bytes", byte_level, ("alias",))
    models.add("pieces", sentencepiece)
    metrics = Metrics("tokenizer")
    draining = asyncio.Event()
    servicer = TokenizerServicer(settings, models, metrics, draining)
    limit = [("grpc.max_receive_message_length", 64 << 20)]
    server = grpc.aio.server(interceptors=[CallInterceptor(metrics)], options=limit)
    tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=limit) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        yield Running(channel, stub, models, metrics, draining)
    await server.stop(0)
    servicer.close()


def chat(*contents: str, **fields: Any) -> pb.ApplyChatTemplateRequest:
    messages = [types_pb2.ChatMessage(role=USER, content=content) for content in contents]
    conversation = types_pb2.Conversation(messages=messages, **fields)
    return pb.ApplyChatTemplateRequest(model="bytes", conversation=conversation, return_text=True)


async def failure(call: Any) -> ServiceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return ServiceError.from_rpc_error(caught.value, peer="tokenizer")


async def test_encode_and_decode_are_inverse(running: Running) -> None:
    texts = ["The quick brown fox", "", "Grüße 日本 <|im_start|>"]
    encoded = await running.stub.Encode(pb.EncodeRequest(model="alias", texts=texts))
    assert len(encoded.encoded) == 3
    decoded = await running.stub.Decode(
        pb.DecodeRequest(
            model="bytes",
            sequences=[types_pb2.TokenIds(ids=entry.token_ids) for entry in encoded.encoded],
        )
    )
    assert list(decoded.texts) == texts
    registry = running.metrics.registry
    count = registry.get_sample_value(
        "meshserve_tokenizer_encoded_tokens_total", {"model": "bytes"}
    )
    assert count == sum(len(entry.token_ids) for entry in encoded.encoded)


async def test_a_conversation_becomes_a_prompt(running: Running) -> None:
    prompt = await running.stub.ApplyChatTemplate(chat("Hi <|im_end|>"))
    assert prompt.text == "<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert [i for i in prompt.token_ids if i < 3] == [1, 2, 1]


async def test_tokenizers_describe_themselves(running: Running) -> None:
    info = await running.stub.GetTokenizerInfo(pb.GetTokenizerInfoRequest(model="alias"))
    assert (info.model, info.kind, info.bos_token_id) == ("bytes", "byte-level-bpe", 1)
    assert list(info.eos_token_ids) == [2]
    assert info.has_chat_template
    assert len(info.revision) == 32


def message(**fields: Any) -> pb.ApplyChatTemplateRequest:
    request = chat()
    request.conversation.messages.add(**fields)
    return request


def call(**fields: Any) -> pb.ApplyChatTemplateRequest:
    return message(role=ASSISTANT, tool_calls=[types_pb2.ToolCall(**fields)])


def with_arguments(name: str) -> pb.ApplyChatTemplateRequest:
    request = chat("x")
    request.conversation.template_arguments[name] = "y"
    return request


M0 = "conversation.messages[0]"


@pytest.mark.parametrize(
    ("method", "request_message", "reason", "field"),
    [
        ("Encode", pb.EncodeRequest(model="byte", texts=["x"]), Reason.MODEL_NOT_FOUND, "model"),
        ("Encode", pb.EncodeRequest(texts=["x"]), Reason.INVALID_FIELD, "model"),
        ("Encode", pb.EncodeRequest(model="bytes"), Reason.INVALID_FIELD, "texts"),
        (
            "Decode",
            pb.DecodeRequest(
                model="bytes", sequences=[types_pb2.TokenIds(), types_pb2.TokenIds(ids=[5, 99999])]
            ),
            Reason.INVALID_FIELD,
            "sequences[1].ids[1]",
        ),
        (
            "ApplyChatTemplate",
            pb.ApplyChatTemplateRequest(model="bytes"),
            Reason.INVALID_FIELD,
            "conversation",
        ),
        ("ApplyChatTemplate", chat(), Reason.INVALID_FIELD, "conversation.messages"),
        ("ApplyChatTemplate", message(content="x"), Reason.INVALID_FIELD, f"{M0}.role"),
        ("ApplyChatTemplate", message(role=77, content="x"), Reason.INVALID_FIELD, f"{M0}.role"),
        ("ApplyChatTemplate", message(role=USER), Reason.INVALID_FIELD, f"{M0}.content"),
        (
            "ApplyChatTemplate",
            message(role=USER, content="x", tool_call_id="1"),
            Reason.INVALID_FIELD,
            f"{M0}.tool_call_id",
        ),
        ("ApplyChatTemplate", call(), Reason.INVALID_FIELD, f"{M0}.tool_calls[0].name"),
        *(
            (
                "ApplyChatTemplate",
                call(name="f", arguments_json=arguments),
                Reason.INVALID_FIELD,
                f"{M0}.tool_calls[0].arguments_json",
            )
            for arguments in ("{", "[]", '{"a": NaN}', "[" * 100_000, "9" * 5000)
        ),
        (
            "ApplyChatTemplate",
            with_arguments("messages"),
            Reason.INVALID_FIELD,
            "conversation.template_arguments.messages",
        ),
        (
            "ApplyChatTemplate",
            with_arguments("bos_token"),
            Reason.INVALID_FIELD,
            "conversation.template_arguments.bos_token",
        ),
        (
            "ApplyChatTemplate",
            chat("x", tools=[types_pb2.Tool()]),
            Reason.INVALID_FIELD,
            "conversation.tools[0].name",
        ),
        (
            "ApplyChatTemplate",
            chat("x", chat_template="y"),
            Reason.INVALID_FIELD,
            "conversation.chat_template",
        ),
        (
            "ApplyChatTemplate",
            chat("x", add_generation_prompt=True, continue_final_message=True),
            Reason.INVALID_FIELD,
            "conversation.continue_final_message",
        ),
    ],
)
async def test_bad_input_is_named_by_its_path(
    running: Running, method: str, request_message: Any, reason: Reason, field: str
) -> None:
    error = await failure(getattr(running.stub, method)(request_message))
    assert error.reason is reason
    assert [path for path, _ in error.field_violations] == [field]
    # And the service goes on.
    assert await running.stub.Encode(pb.EncodeRequest(model="bytes", texts=["x"]))


async def test_a_near_name_is_suggested(running: Running) -> None:
    error = await failure(running.stub.Encode(pb.EncodeRequest(model="byte", texts=["x"])))
    assert error.metadata["nearest"] == "bytes"


async def test_a_model_without_a_template_cannot_chat(running: Running) -> None:
    request = chat("x")
    request.model = "pieces"
    error = await failure(running.stub.ApplyChatTemplate(request))
    assert error.reason is Reason.CAPABILITY_MISSING


@pytest.mark.parametrize("running", [{"max_text_bytes": 1000}], indirect=True)
@pytest.mark.parametrize("text", ["x" * 1001, "é" * 501])
async def test_text_over_the_limit_is_refused(running: Running, text: str) -> None:
    for attempt in (
        running.stub.Encode(pb.EncodeRequest(model="bytes", texts=["x", text])),
        running.stub.ApplyChatTemplate(chat(text)),
    ):
        error = await failure(attempt)
        assert error.reason is Reason.PROMPT_TOO_LONG
        assert error.metadata["limit_bytes"] == "1000"


@pytest.mark.parametrize("running", [{"allow_request_templates": True}], indirect=True)
async def test_templates_of_requests_work_where_they_are_allowed(running: Running) -> None:
    prompt = await running.stub.ApplyChatTemplate(
        chat("Hi", chat_template="{{ bos_token }}{{ messages[0].content }}")
    )
    assert prompt.text == "<|im_start|>Hi"
    refused = chat("Hi", chat_template="{{ raise_exception('I will not.') }}")
    error = await failure(running.stub.ApplyChatTemplate(refused))
    assert error.reason is Reason.TEMPLATE_ERROR
    assert "I will not." in error.message
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    error = await failure(running.stub.ApplyChatTemplate(chat("Hi", chat_template=endless)))
    assert error.reason is Reason.TEMPLATE_ERROR
    assert "too long" in error.message


async def test_roles_reach_the_template_as_it_knows_them(running: Running) -> None:
    request = message(role=types_pb2.ROLE_DEVELOPER, content="Be brief.")
    prompt = await running.stub.ApplyChatTemplate(request)
    assert prompt.text.startswith("<|im_start|>system\nBe brief.")


@pytest.mark.parametrize("running", [{"allow_request_templates": True}], indirect=True)
async def test_tools_and_their_calls_reach_the_template(running: Running) -> None:
    request = chat("Hi", chat_template="{{ tools | tojson }}{{ messages | tojson }}")
    tool = request.conversation.tools.add(name="f", description="d")
    tool.parameters["maximum"] = 3.0
    request.conversation.messages.add(
        role=ASSISTANT,
        reasoning_content="hm",
        tool_calls=[types_pb2.ToolCall(id="1", name="f", arguments_json='{"n": 1.5}')],
    )
    request.conversation.messages.add(role=TOOL, tool_call_id="1")
    prompt = await running.stub.ApplyChatTemplate(request)
    assert '"parameters": {"maximum": 3}' in prompt.text
    assert '"arguments": {"n": 1.5}' in prompt.text
    assert '"reasoning_content": "hm"' in prompt.text
    assert '{"role": "tool", "content": "", "tool_call_id": "1"}' in prompt.text


async def test_text_that_is_not_utf8_is_refused(running: Running) -> None:
    valid = pb.EncodeRequest(model="bytes", texts=["xyz"]).SerializeToString()
    send_bytes = running.channel.unary_unary("/meshserve.v1.TokenizerService/Encode")
    assert await send_bytes(valid)
    error = await failure(send_bytes(valid.replace(b"xyz", b"\xff\xfe\xfd")))
    assert error.reason is Reason.MALFORMED_MESSAGE


async def test_a_large_prompt_does_not_hold_up_the_others(running: Running) -> None:
    large = pb.EncodeRequest(model="bytes", texts=["The quick brown fox. " * 200_000])
    began = time.monotonic()
    encoding = asyncio.ensure_future(running.stub.Encode(large))
    pauses: list[float] = []
    while not encoding.done():
        asked = time.monotonic()
        await running.stub.Encode(pb.EncodeRequest(model="bytes", texts=["x"]))
        pauses.append(time.monotonic() - asked)
    took_s = time.monotonic() - began
    assert len((await encoding).encoded[0].token_ids) > 200_000
    assert len(pauses) > 10
    assert max(pauses) < took_s / 2


def decode_input(session_id: int, **fields: Any) -> pb.DecodeInput:
    return pb.DecodeInput(session_id=session_id, **fields)


async def exchange(running: Running, *messages: list[pb.DecodeInput]) -> list[pb.DecodeOutput]:
    """All outputs to the messages; the stream is closed after the last."""
    outputs: list[pb.DecodeOutput] = []
    stream = running.stub.StreamDecode(pb.StreamDecodeRequest(inputs=inputs) for inputs in messages)
    async for response in stream:
        outputs += response.outputs
    return outputs


async def test_many_sequences_share_a_stream(running: Running, byte_level: ModelTokenizer) -> None:
    texts = {n: f"sequence {n}: Grüße 日本 👩 " * 3 for n in range(1, 33)}
    ids = {n: byte_level.encode(text).token_ids for n, text in texts.items()}
    longest = max(map(len, ids.values()))
    opening = [decode_input(n, open=pb.DecodeOpen(model="bytes")) for n in ids]
    steps = [
        [
            decode_input(n, token_ids=own[step : step + 1], finish=step + 1 == len(own))
            for n, own in ids.items()
            if step < len(own)
        ]
        for step in range(longest)
    ]
    outputs = await exchange(running, opening, *steps)
    assert len(outputs) == sum(map(len, ids.values()))
    for n, text in texts.items():
        own = [output for output in outputs if output.session_id == n]
        assert "".join(output.text for output in own) == text
        assert [output.finished for output in own] == [False] * (len(own) - 1) + [True]
        assert own[-1].decoded_tokens == len(ids[n])
    sessions = running.metrics.registry.get_sample_value("meshserve_tokenizer_decode_sessions")
    assert sessions == 0


async def test_a_failed_sequence_fails_alone(running: Running, byte_level: ModelTokenizer) -> None:
    fox = byte_level.encode("fox").token_ids
    outputs = await exchange(
        running,
        [
            decode_input(1, open=pb.DecodeOpen(model="bytes"), token_ids=fox),
            decode_input(2, open=pb.DecodeOpen(model="bytes"), token_ids=[0, 10**6]),
            decode_input(3, open=pb.DecodeOpen(model="nobody"), token_ids=fox),
            decode_input(4, token_ids=fox),
        ],
        [decode_input(1, token_ids=fox, finish=True)],
    )
    good = [output for output in outputs if output.session_id == 1]
    assert "".join(output.text for output in good) == "foxfox"
    errors = {
        output.session_id: from_session_status(output.error, peer="tokenizer")
        for output in outputs
        if output.HasField("error")
    }
    assert {n: error.reason for n, error in errors.items()} == {
        2: Reason.INVALID_FIELD,
        3: Reason.MODEL_NOT_FOUND,
        4: Reason.INVALID_FIELD,
    }
    assert errors[2].field_violations[0][0] == "inputs.token_ids[1]"
    assert all(output.finished for output in outputs if output.session_id != 1)


@pytest.mark.parametrize("resumed_at", range(9))
async def test_a_lost_sequence_goes_on_where_it_was(
    running: Running, byte_level: ModelTokenizer, resumed_at: int
) -> None:
    text = "é👩日"
    ids = byte_level.encode(text).token_ids[:9]
    whole = byte_level.detokenizer.decode(ids)
    first = await exchange(
        running,
        [decode_input(1, open=pb.DecodeOpen(model="bytes"), token_ids=ids[:resumed_at])],
    )
    sent = "".join(output.text for output in first)
    opening = pb.DecodeOpen(model="bytes", decoded_token_ids=ids[:resumed_at])
    second = await exchange(
        running, [decode_input(7, open=opening, token_ids=ids[resumed_at:], finish=True)]
    )
    assert sent + "".join(output.text for output in second) == whole
    assert second[-1].decoded_tokens == len(ids)


async def test_a_cancelled_sequence_is_answered_no_more(
    running: Running, byte_level: ModelTokenizer
) -> None:
    fox = byte_level.encode("fox").token_ids
    outputs = await exchange(
        running,
        [decode_input(1, open=pb.DecodeOpen(model="bytes"), token_ids=fox)],
        [decode_input(1, cancel=True)],
        [decode_input(1, open=pb.DecodeOpen(model="bytes"), token_ids=fox, finish=True)],
    )
    assert [(output.text, output.finished) for output in outputs] == [("fox", False), ("fox", True)]


async def test_every_sequence_has_a_span_in_its_own_trace(
    running: Running, byte_level: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(
        "services.tokenizer.decode_session.get_tracer", lambda: provider.get_tracer("test")
    )
    fox = byte_level.encode("fox").token_ids

    def opened(number: int) -> pb.DecodeOpen:
        parent = f"00-{number:032x}-{number:016x}-01"
        return pb.DecodeOpen(model="bytes", trace=types_pb2.TraceContext(traceparent=parent))

    await exchange(
        running,
        [decode_input(n, open=opened(n), token_ids=fox) for n in (1, 2, 3)],
        [
            decode_input(1, finish=True),
            decode_input(2, cancel=True),
            decode_input(3, token_ids=[10**6]),
        ],
    )
    spans: dict[int, ReadableSpan] = {
        span.parent.span_id: span for span in exporter.get_finished_spans() if span.parent
    }
    assert set(spans) == {1, 2, 3}
    for number, span in spans.items():
        assert span.name == "decode session"
        assert span.context is not None
        assert span.context.trace_id == number
        assert span.attributes is not None
        assert span.attributes["meshserve.session.tokens"] == len(fox)
        assert span.attributes["meshserve.session.cancelled"] is (number == 2)
    assert spans[3].status.status_code is trace.StatusCode.ERROR
    assert (spans[3].attributes or {})["error.type"] == "INVALID_FIELD"


async def test_a_draining_replica_finishes_what_it_has_and_takes_no_more(
    running: Running, byte_level: ModelTokenizer
) -> None:
    fox = byte_level.encode("fox").token_ids
    opened = asyncio.Event()

    async def inputs() -> AsyncIterator[pb.StreamDecodeRequest]:
        first = decode_input(1, open=pb.DecodeOpen(model="bytes"), token_ids=fox)
        yield pb.StreamDecodeRequest(inputs=[first])
        await opened.wait()
        running.draining.set()
        late = decode_input(2, open=pb.DecodeOpen(model="bytes"), token_ids=fox)
        last = decode_input(1, token_ids=fox, finish=True)
        yield pb.StreamDecodeRequest(inputs=[late, last])

    outputs: list[pb.DecodeOutput] = []
    async for response in running.stub.StreamDecode(inputs()):
        outputs += response.outputs
        opened.set()
    assert [output.text for output in outputs if output.session_id == 1] == ["fox", "fox"]
    (refused,) = [output for output in outputs if output.session_id == 2]
    assert from_session_status(refused.error, peer="tokenizer").reason is Reason.DRAINING
