"""What a caller asks for arrives as the contract says, and the answer comes back typed."""

from __future__ import annotations

from datetime import UTC, datetime

import grpc
import pytest
from google.protobuf import json_format, struct_pb2
from hypothesis import given
from hypothesis import strategies as st

import meshserve
from meshserve import (
    AsyncClient,
    CacheControl,
    Client,
    FinishReason,
    InvalidRequestError,
    Message,
    SafetyAction,
    Timings,
    Tool,
    ToolCall,
    Usage,
)
from meshserve.options import ChatOptions
from meshserve.v1 import gateway_pb2, types_pb2
from meshserve.wire import requests
from tests.fakes.scripted_gateway import ScriptedGateway

GENERATED = gateway_pb2.GenerateResponse(
    request_id="r1",
    model="smollm2-135m",
    choices=[
        {"index": 1, "text": "Lyon", "finish_reason": "FINISH_REASON_LENGTH"},
        {
            "index": 0,
            "text": "Paris",
            "finish_reason": "FINISH_REASON_STOP",
            "matched_stop": {"token_id": 2},
            "timings": {"queue_ms": 2, "prefill_ms": 40, "steps": 7},
            "token_ids": [260, 4],
            "logprobs": {
                "positions": [
                    {
                        "chosen": {"token_id": 260, "logprob": -0.5, "text": b"Par"},
                        "top": [{"token_id": 260, "logprob": -0.5, "text": b"Par"}],
                    }
                ]
            },
            "safety": {
                "action": "SAFETY_ACTION_FLAG",
                "findings": [
                    {
                        "category": "pii.email",
                        "score": 0.5,
                        "action": "SAFETY_ACTION_FLAG",
                        "end": 3,
                    }
                ],
            },
        },
    ],
    usage={"prompt_tokens": 7, "completion_tokens": 5, "cached_prompt_tokens": 4},
    cached=True,
    create_time={"seconds": 1_700_000_000},
)


def test_a_completion_comes_back_whole_with_choices_in_order(
    gateway: ScriptedGateway, client: Client
) -> None:
    gateway.answer("Generate", GENERATED)

    completion = client.generate("The capital of France is", n=2)

    assert completion.text == "Paris"
    assert str(completion) == "Paris"
    assert [choice.text for choice in completion.choices] == ["Paris", "Lyon"]
    assert completion.finish_reason is FinishReason.STOP
    assert completion.choices[0].matched_stop == 2
    assert completion.choices[0].timings == Timings(queue_s=0.002, prefill_s=0.04, steps=7)
    assert completion.choices[1].timings is None
    assert completion.choices[1].matched_stop is None
    assert completion.choices[0].logprobs[0].chosen.text == b"Par"
    assert completion.choices[0].safety is not None
    assert completion.choices[0].safety.action is SafetyAction.FLAG
    assert completion.choices[1].safety is None
    assert completion.usage == Usage(7, 5, 4, 0)
    assert completion.usage.total_tokens == 12
    assert completion.cached
    assert completion.create_time == datetime.fromtimestamp(1_700_000_000, UTC)


def test_results_cannot_be_changed(gateway: ScriptedGateway, client: Client) -> None:
    gateway.answer("Generate", GENERATED)
    completion = client.generate("x")
    with pytest.raises(AttributeError):
        completion.model = "other"  # type: ignore[misc]


def test_absent_options_stay_absent_and_zero_is_not_absence(
    gateway: ScriptedGateway, client: Client
) -> None:
    gateway.answer("Generate", GENERATED)

    client.generate("x")
    client.generate("x", temperature=0, seed=0, max_tokens=1)

    bare, set_to_zero = gateway.requests
    assert bare == gateway_pb2.GenerateRequest(text="x")
    assert set_to_zero.sampling.HasField("temperature")
    assert set_to_zero.sampling.HasField("seed")
    assert not set_to_zero.sampling.HasField("top_p")


def test_every_option_has_its_place_in_the_request(
    gateway: ScriptedGateway, client: Client
) -> None:
    gateway.answer("Generate", GENERATED)

    client.generate(
        "x",
        model="m",
        max_tokens=16,
        min_tokens=1,
        temperature=0.5,
        top_p=0.75,
        top_k=40,
        min_p=0.25,
        seed=7,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={5: -1.0},
        allowed_token_ids=[1, 2],
        banned_token_ids=[3],
        logits_processors=["plain", {"name": "other", "arguments": {"by": 2}}],
        n=2,
        best_of=3,
        beam_width=4,
        length_penalty=0.5,
        early_stopping=True,
        stop=["\n", "END"],
        stop_token_ids=[2],
        ignore_eos=True,
        include_stop_in_text=True,
        json_schema={"type": "object"},
        priority=-5,
        cache=CacheControl(no_store=True, ttl_s=60),
        request_id="mine",
        logprobs=3,
        prompt_logprobs=1,
        echo=True,
        return_token_ids=True,
        keep_special_tokens=True,
        truncation="drop_oldest",
        adapter="a",
        add_special_tokens=False,
    )

    arguments = struct_pb2.Struct()
    arguments.update({"by": 2})
    assert gateway.requests[0] == gateway_pb2.GenerateRequest(
        model="m",
        text="x",
        sampling=types_pb2.SamplingParams(
            temperature=0.5,
            top_p=0.75,
            top_k=40,
            min_p=0.25,
            seed=7,
            repetition_penalty=1.5,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            logit_bias={5: -1.0},
            allowed_token_ids=[1, 2],
            banned_token_ids=[3],
            n=2,
            best_of=3,
            beam_width=4,
            length_penalty=0.5,
            early_stopping=True,
            logits_processors=[
                types_pb2.LogitsProcessor(name="plain"),
                types_pb2.LogitsProcessor(name="other", arguments=arguments),
            ],
        ),
        stopping=types_pb2.StoppingCriteria(
            max_tokens=16,
            min_tokens=1,
            stop_strings=["\n", "END"],
            stop_token_ids=[2],
            ignore_eos=True,
            include_stop_in_text=True,
        ),
        constraint=types_pb2.OutputConstraint(json_schema='{"type": "object"}'),
        priority=-5,
        cache_control=types_pb2.CacheControl(no_store=True, ttl_s=60),
        request_id="mine",
        output=types_pb2.OutputOptions(
            logprobs=3, prompt_logprobs=1, echo=True, token_ids=True, keep_special_tokens=True
        ),
        truncation=types_pb2.TRUNCATION_POLICY_DROP_OLDEST,
        adapter="a",
        add_special_tokens=False,
    )


def test_a_prompt_is_text_or_token_ids_or_messages(
    gateway: ScriptedGateway, client: Client
) -> None:
    gateway.answer("Generate", GENERATED)

    client.generate([1, 2, 3])
    client.generate([Message("system", "Be brief."), {"role": "user", "content": "Hi"}])

    ids, conversation = gateway.requests
    assert list(ids.token_ids.ids) == [1, 2, 3]
    assert [message.role for message in conversation.conversation.messages] == [
        types_pb2.ROLE_SYSTEM,
        types_pb2.ROLE_USER,
    ]


def test_a_chat_takes_text_and_gives_a_message_that_continues_the_conversation(
    gateway: ScriptedGateway, client: Client
) -> None:
    gateway.answer(
        "Chat",
        gateway_pb2.ChatResponse(
            choices=[
                {
                    "message": {"role": "ROLE_ASSISTANT", "content": "Hello."},
                    "finish_reason": "FINISH_REASON_STOP",
                }
            ]
        ),
    )

    first = client.chat("Hi")
    client.chat([{"role": "user", "content": "Hi"}, first.message, Message("user", "And?")])

    assert first.text == "Hello."
    assert first.message == Message("assistant", "Hello.")
    contents = [message.content for message in gateway.requests[1].conversation.messages]
    assert contents == ["Hi", "Hello.", "And?"]


def test_tools_and_their_calls_travel_both_ways(gateway: ScriptedGateway, client: Client) -> None:
    gateway.answer(
        "Chat",
        gateway_pb2.ChatResponse(
            choices=[
                {
                    "message": {
                        "role": "ROLE_ASSISTANT",
                        "tool_calls": [{"id": "c1", "name": "weather"}],
                    },
                    "finish_reason": "FINISH_REASON_TOOL_CALLS",
                }
            ]
        ),
    )
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}

    answer = client.chat(
        [
            Message("user", "Weather?"),
            Message("assistant", tool_calls=(ToolCall("weather", '{"city": "Oslo"}', "c0"),)),
            Message("tool", "rain", tool_call_id="c0"),
        ],
        tools=[Tool("weather", "Tells the weather.", schema)],
        tool_choice="weather",
        template_arguments={"enable_thinking": False},
    )

    request = gateway.requests[0]
    assert request.tool_choice == gateway_pb2.TOOL_CHOICE_REQUIRED
    assert request.required_tool == "weather"
    assert request.conversation.tools[0].parameters["properties"]["city"]["type"] == "string"
    assert request.conversation.messages[1].tool_calls[0].arguments_json == '{"city": "Oslo"}'
    assert request.conversation.messages[2].tool_call_id == "c0"
    assert request.conversation.template_arguments["enable_thinking"] is False
    assert answer.finish_reason is FinishReason.TOOL_CALLS
    assert answer.message.tool_calls == (ToolCall("weather", "{}", "c1"),)


def test_tokens_are_counted(gateway: ScriptedGateway, client: Client) -> None:
    gateway.answer("CountTokens", gateway_pb2.CountTokensResponse(tokens=9, model="m"))
    assert int(client.count_tokens("some text")) == 9
    assert client.count_tokens([Message("user", "Hi")]).model == "m"


def test_all_pages_of_models_are_read(gateway: ScriptedGateway, client: Client) -> None:
    def list_models(request: gateway_pb2.ListModelsRequest, context: object) -> object:
        if request.page_token == "":
            return gateway_pb2.ListModelsResponse(models=[{"name": "a"}], next_page_token="2")
        assert request.page_token == "2"
        return gateway_pb2.ListModelsResponse(
            models=[{"name": "b", "ready": True, "capabilities": ["MODEL_CAPABILITY_CHAT"]}]
        )

    gateway.on("ListModels", list_models)

    models = client.models()

    assert [model.name for model in models] == ["a", "b"]
    assert models[1].capabilities == ("chat",)


def test_the_default_model_needs_no_name(gateway: ScriptedGateway, client: Client) -> None:
    gateway.answer("GetModel", gateway_pb2.GetModelResponse(model={"name": "smollm2-135m"}))
    assert client.model().name == "smollm2-135m"
    assert gateway.requests[0].model == ""


def test_the_key_travels_as_a_bearer_token(gateway: ScriptedGateway) -> None:
    gateway.answer("Generate", GENERATED)
    with Client(gateway.target, api_key="secret-1") as client:
        client.generate("x")
    assert gateway.metadata[0]["authorization"] == "Bearer secret-1"


def test_the_key_comes_from_the_environment_unless_given(
    gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.answer("Generate", GENERATED)
    monkeypatch.setenv("MESHSERVE_API_KEY", "from-environment")
    with Client(gateway.target) as client:
        client.generate("x")
    with Client(gateway.target, api_key="") as client:
        client.generate("x")
    assert gateway.metadata[0]["authorization"] == "Bearer from-environment"
    assert "authorization" not in gateway.metadata[1]


def test_metadata_of_the_client_and_of_the_call_are_sent(gateway: ScriptedGateway) -> None:
    gateway.answer("Generate", GENERATED)
    with Client(gateway.target, metadata={"x-app": "demo"}) as client:
        client.generate("x", metadata={"X-Trial": "1"})
    assert gateway.metadata[0]["x-app"] == "demo"
    assert gateway.metadata[0]["x-trial"] == "1"


def test_the_active_span_is_the_parent_on_the_server(
    gateway: ScriptedGateway, client: Client
) -> None:
    from opentelemetry.sdk.trace import TracerProvider

    gateway.answer("Generate", GENERATED)
    client.generate("x")
    with TracerProvider().get_tracer("test").start_as_current_span("request") as span:
        client.generate("x")

    context = span.get_span_context()
    assert "traceparent" not in gateway.metadata[0]
    _, trace_id, span_id, _ = gateway.metadata[1]["traceparent"].split("-")
    assert (trace_id, span_id) == (f"{context.trace_id:032x}", f"{context.span_id:016x}")


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"top_k": -1}, "sampling.top_k"),
        ({"seed": 2**64}, "sampling.seed"),
        ({"max_tokens": 1.5}, "stopping.max_tokens"),
        ({"temperature": "hot"}, "sampling.temperature"),
        ({"stop": ["ok", "\udc00"]}, "stopping.stop_strings[1]"),
        ({"stop": [b"x"]}, "stopping.stop_strings[0]"),
        ({"logit_bias": {-1: 0.0}}, "sampling.logit_bias"),
        ({"truncation": "middle"}, "truncation"),
        ({"cache": "no"}, "cache_control"),
        ({"regex": "a", "grammar": "b"}, "constraint"),
        ({"json_schema": {"a": {1, 2}}}, "constraint.json_schema"),
        ({"tools": [Tool("t")]}, "conversation.tools"),
        ({"request_id": 5}, "request_id"),
    ],
)
def test_an_option_that_cannot_travel_is_named_before_anything_is_sent(
    gateway: ScriptedGateway, client: Client, options: dict[str, object], path: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.generate("x", **options)  # type: ignore[arg-type]
    assert [violation.path for violation in caught.value.fields] == [path]
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.reason == "INVALID_FIELD"
    assert gateway.requests == []


@pytest.mark.parametrize(
    ("messages", "path"),
    [
        ([{"role": "wizard", "content": "x"}], "conversation.messages[0].role"),
        ([{"content": "x"}], "conversation.messages[0].role"),
        ([{"role": "user", "contents": "x"}], "conversation.messages[0].contents"),
        ([{"role": "user", "content": 5}], "conversation.messages[0].content"),
        ([Message("user", "a"), "b"], "conversation.messages[1]"),
        ([Message("user", "caf\udce9")], "conversation.messages[0].content"),
        ({"role": "user"}, "conversation.messages"),
        (None, "conversation.messages"),
    ],
)
def test_a_message_that_cannot_travel_is_named(
    gateway: ScriptedGateway, client: Client, messages: object, path: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.chat(messages)  # type: ignore[arg-type]
    assert [violation.path for violation in caught.value.fields] == [path]
    assert gateway.requests == []


def test_a_lone_surrogate_in_a_prompt_is_a_clear_error(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match=r"lone surrogate \(U\+D800\) at position 1"):
        client.generate("a\ud800b")


@given(st.text(st.characters()))
def test_any_text_travels_unchanged_unless_it_holds_a_lone_surrogate(text: str) -> None:
    holds_surrogate = any(0xD800 <= ord(character) <= 0xDFFF for character in text)
    try:
        request = requests.generate_request(text, {"stop": [text]})
    except InvalidRequestError:
        assert holds_surrogate
    else:
        assert not holds_surrogate
        assert (request.text, list(request.stopping.stop_strings)) == (text, [text])


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_any_json_object_can_be_a_template_argument(arguments: dict[str, object]) -> None:
    options: ChatOptions = {"template_arguments": arguments}
    request = requests.chat_request("Hi", options)
    assert json_format.MessageToDict(request.conversation.template_arguments) == arguments


@pytest.mark.parametrize("value", [{1: 2}, {"a": object()}, {"a": "\ud800"}, {"a": {"b": {3}}}, []])
def test_what_json_cannot_hold_is_no_template_argument(value: object) -> None:
    with pytest.raises(InvalidRequestError, match=r"conversation\.template_arguments"):
        requests.chat_request("Hi", {"template_arguments": value})  # type: ignore[typeddict-item]


def test_json_nested_beyond_reason_is_a_clear_error() -> None:
    nested: dict[str, object] = {}
    for _ in range(100_000):
        nested = {"a": nested}
    with pytest.raises(InvalidRequestError, match="nested too deeply"):
        requests.chat_request("Hi", {"template_arguments": nested})
    with pytest.raises(InvalidRequestError, match="nested too deeply"):
        requests.chat_request("Hi", {"json_schema": nested})


def test_a_misspelt_option_is_a_type_error_that_names_the_nearest(client: Client) -> None:
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        client.generate("x", temprature=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("http://host:1", "is a URL; write 'host:1'"),
        ("", "empty"),
        ("host:port", "not HOST:PORT"),
        ("host:0", "not HOST:PORT"),
        ("::1:50051", r"\[ADDRESS\]:PORT"),
    ],
)
def test_a_target_that_grpc_would_misread_is_refused(target: str, says: str) -> None:
    with pytest.raises(meshserve.ConfigurationError, match=says):
        Client(target)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "5", True])
def test_a_timeout_is_a_positive_number(client: Client, timeout: object) -> None:
    with pytest.raises(meshserve.ConfigurationError, match="positive number of seconds"):
        client.generate("x", timeout=timeout)  # type: ignore[arg-type]


def test_a_key_with_a_newline_is_refused_without_being_repeated() -> None:
    with pytest.raises(meshserve.ConfigurationError) as caught:
        Client(api_key="secret\n")
    assert "secret" not in str(caught.value)


def test_a_closed_client_says_so(client: Client) -> None:
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.generate("x")


async def test_the_asyncio_client_gives_the_same_results(gateway: ScriptedGateway) -> None:
    gateway.answer("Generate", GENERATED)
    gateway.answer("CountTokens", gateway_pb2.CountTokensResponse(tokens=9, model="m"))
    gateway.answer("ListModels", gateway_pb2.ListModelsResponse(models=[{"name": "a"}]))
    gateway.answer("GetModel", gateway_pb2.GetModelResponse(model={"name": "a"}))
    gateway.answer("Chat", gateway_pb2.ChatResponse(choices=[{"message": {"content": "Hello."}}]))
    with Client(gateway.target) as client:
        expected = client.generate("x")
    async with AsyncClient(gateway.target, api_key="k") as aclient:
        assert await aclient.generate("x") == expected
        assert (await aclient.chat("Hi")).text == "Hello."
        assert int(await aclient.count_tokens("x")) == 9
        assert [model.name for model in await aclient.models()] == ["a"]
        assert (await aclient.model("a")).name == "a"
    assert gateway.metadata[-1]["authorization"] == "Bearer k"
    with pytest.raises(RuntimeError, match="closed"):
        await aclient.generate("x")


def test_an_asyncio_client_can_be_made_before_its_loop_and_belongs_to_one(
    gateway: ScriptedGateway,
) -> None:
    import asyncio

    gateway.answer("Generate", GENERATED)
    client = AsyncClient(gateway.target)
    assert asyncio.run(client.generate("x")).text == "Paris"
    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(client.generate("x"))
