"""One request is one trace: the span tree over all five processes, parent by parent."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable

import grpc
import pytest

from meshserve.v1 import gateway_pb2, gateway_pb2_grpc, types_pb2
from services.runtime.telemetry.spans import SPANS, STAGES
from tests.support.mesh import Mesh
from tests.support.otlp import ReceivedSpan, Receiver

INFERENCE = "meshserve.v1.InferenceService"
TOKENIZER = "meshserve.v1.TokenizerService"
ENGINE = "meshserve.v1.EngineService"
CACHE = "meshserve.v1.CacheService"
SAFETY = "meshserve.v1.SafetyService"

# (service, kind, name) of each span below its parent; None is the caller's own span.
Edge = tuple[tuple[str, str, str] | None, tuple[str, str, str]]


def gateway(name: str, kind: str = "internal") -> tuple[str, str, str]:
    return ("meshserve-gateway", kind, name)


def hop(parent: tuple[str, str, str], peer: str, method: str) -> list[Edge]:
    """A call from the gateway to a peer: a client span and the server span below it."""
    call = gateway(method, "client")
    return [(parent, call), (call, (f"meshserve-{peer}", "server", method))]


def engine_phases(method: str) -> list[Edge]:
    server = ("meshserve-engine", "server", method)
    return [
        (server, ("meshserve-engine", "internal", phase))
        for phase in ("queue", "prefill", "decode")
    ]


def chat_tree(method: str, *, operation: str = "chat demo") -> list[Edge]:
    """The whole tree of a chat that is generated, checked and kept."""
    rpc = gateway(f"{INFERENCE}/{method}", "server")
    request = gateway(operation)
    stages = {name: gateway(f"stage {name}") for name, _ in STAGES}
    return [
        (None, rpc),
        (rpc, request),
        *((request, stage) for stage in stages.values()),
        *hop(stages["look_up"], "cache", f"{CACHE}/LookUp"),
        *hop(stages["screen"], "safety", f"{SAFETY}/CheckPrompt"),
        *hop(stages["tokenize"], "tokenizer", f"{TOKENIZER}/ApplyChatTemplate"),
        *hop(stages["generate"], "engine", f"{ENGINE}/Generate"),
        *engine_phases(f"{ENGINE}/Generate"),
        (stages["generate"], ("meshserve-tokenizer", "server", "decode session")),
        (stages["moderate"], ("meshserve-safety", "server", "check session")),
        *hop(request, "cache", f"{CACHE}/Store"),
    ]


def edges(spans: list[ReceivedSpan], root: str) -> Counter[Edge]:
    by_id = {span.span_id: span for span in spans}
    found: Counter[Edge] = Counter()
    for span in spans:
        parent = by_id.get(span.parent_id)
        assert parent is not None or span.parent_id == root, f"{span.name} hangs in the air"
        key = (parent.service, parent.kind, parent.name) if parent else None
        found[(key, (span.service, span.kind, span.name))] += 1
    return found


class Caller:
    """A caller with a trace of its own."""

    def __init__(self) -> None:
        self.trace_id = uuid.uuid4().hex
        self.span_id = uuid.uuid4().hex[:16]

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("traceparent", f"00-{self.trace_id}-{self.span_id}-01"),)


def chat_request(prompt: str, **fields: object) -> gateway_pb2.ChatRequest:
    return gateway_pb2.ChatRequest(
        model="demo",
        conversation=types_pb2.Conversation(
            messages=[types_pb2.ChatMessage(role=types_pb2.ROLE_USER, content=prompt)]
        ),
        sampling=types_pb2.SamplingParams(temperature=0),
        stopping=types_pb2.StoppingCriteria(max_tokens=8),
        **fields,  # type: ignore[arg-type]
    )


def fresh_prompt() -> str:
    return f"Say something about {uuid.uuid4().hex[:8]}."


Send = Callable[[gateway_pb2_grpc.InferenceServiceStub, gateway_pb2.ChatRequest, Caller], None]


def unary(
    stub: gateway_pb2_grpc.InferenceServiceStub, request: gateway_pb2.ChatRequest, caller: Caller
) -> None:
    stub.Chat(request, metadata=caller.metadata, timeout=60)


def streaming(
    stub: gateway_pb2_grpc.InferenceServiceStub, request: gateway_pb2.ChatRequest, caller: Caller
) -> None:
    list(
        stub.StreamChat(
            gateway_pb2.StreamChatRequest(request=request), metadata=caller.metadata, timeout=60
        )
    )


BOTH_SHAPES = pytest.mark.parametrize(
    ("method", "send"), [("Chat", unary), ("StreamChat", streaming)]
)


def has_expected(expected: list[Edge], root: str) -> Callable[[list[ReceivedSpan]], bool]:
    """Spans are exported by five processes, each at its own time, children before parents."""
    names = Counter(span for _, span in expected)
    return lambda spans: not names - Counter((s.service, s.kind, s.name) for s in spans)


@BOTH_SHAPES
def test_a_request_is_one_tree_over_five_processes(
    mesh: Mesh, otlp: Receiver, method: str, send: Send
) -> None:
    caller = Caller()
    with mesh.channel() as channel:
        send(gateway_pb2_grpc.InferenceServiceStub(channel), chat_request(fresh_prompt()), caller)
    expected = chat_tree(method)
    spans = otlp.wait_for(caller.trace_id, has_expected(expected, caller.span_id))
    assert edges(spans, caller.span_id) == Counter(expected)
    assert {span.service for span in spans} == {
        f"meshserve-{name}" for name in ("gateway", "tokenizer", "engine", "cache", "safety")
    }
    assert not any(span.failed for span in spans)
    for span in spans:
        parent = next((each for each in spans if each.span_id == span.parent_id), None)
        if parent is not None:
            assert span.start_ns >= parent.start_ns - 1_000_000, span.name


@BOTH_SHAPES
def test_a_cached_answer_stops_at_the_cache(
    mesh: Mesh, otlp: Receiver, method: str, send: Send
) -> None:
    prompt, caller = fresh_prompt(), Caller()
    with mesh.channel() as channel:
        stub = gateway_pb2_grpc.InferenceServiceStub(channel)
        send(stub, chat_request(prompt), Caller())
        send(stub, chat_request(prompt), caller)
    rpc, request = gateway(f"{INFERENCE}/{method}", "server"), gateway("chat demo")
    expected = [
        (None, rpc),
        (rpc, request),
        *(
            (request, gateway(f"stage {name}"))
            for name in ("authenticate", "admit", "route", "look_up", "settle")
        ),
        *hop(gateway("stage look_up"), "cache", f"{CACHE}/LookUp"),
    ]
    spans = otlp.wait_for(caller.trace_id, has_expected(expected, caller.span_id))
    assert edges(spans, caller.span_id) == Counter(expected)
    (inference,) = [span for span in spans if span.name == "chat demo"]
    assert inference.attributes["meshserve.cached"] is True


@BOTH_SHAPES
def test_a_failure_is_marked_where_it_happened_and_above(
    mesh: Mesh, otlp: Receiver, method: str, send: Send
) -> None:
    caller = Caller()
    request = chat_request("word " * 3000)
    with mesh.channel() as channel, pytest.raises(grpc.RpcError) as failure:
        send(gateway_pb2_grpc.InferenceServiceStub(channel), request, caller)
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    spans = otlp.wait_for(
        caller.trace_id,
        lambda spans: any(span.name == f"{INFERENCE}/{method}" for span in spans),
    )
    failed = {(span.service, span.kind, span.name) for span in spans if span.failed}
    assert failed == {
        gateway(f"{INFERENCE}/{method}", "server"),
        gateway("chat demo"),
        gateway("stage tokenize"),
    }
    for span in spans:
        if span.failed:
            assert span.attributes["error.type"] == "PROMPT_TOO_LONG"


@BOTH_SHAPES
def test_a_failure_in_the_last_service_is_one_tree_over_five_processes(
    mesh: Mesh, otlp: Receiver, method: str, send: Send
) -> None:
    """The engine refuses what it cannot do, after every other service has had its part."""
    caller = Caller()
    request = chat_request(fresh_prompt(), adapter="absent")
    with mesh.channel() as channel, pytest.raises(grpc.RpcError) as failure:
        send(gateway_pb2_grpc.InferenceServiceStub(channel), request, caller)
    assert failure.value.code() == grpc.StatusCode.UNIMPLEMENTED
    rpc, inference = gateway(f"{INFERENCE}/{method}", "server"), gateway("chat demo")
    stages = {name: gateway(f"stage {name}") for name, _ in STAGES}
    generation = hop(stages["generate"], "engine", f"{ENGINE}/Generate")
    expected = [
        (None, rpc),
        (rpc, inference),
        *((inference, stage) for stage in stages.values()),
        *hop(stages["look_up"], "cache", f"{CACHE}/LookUp"),
        *hop(stages["screen"], "safety", f"{SAFETY}/CheckPrompt"),
        *hop(stages["tokenize"], "tokenizer", f"{TOKENIZER}/ApplyChatTemplate"),
        *generation,
        *hop(inference, "cache", f"{CACHE}/ReleaseLease"),
    ]
    spans = otlp.wait_for(caller.trace_id, has_expected(expected, caller.span_id))
    assert edges(spans, caller.span_id) == Counter(expected)
    assert {span.service for span in spans} == {
        f"meshserve-{name}" for name in ("gateway", "tokenizer", "engine", "cache", "safety")
    }
    failed = {(span.service, span.kind, span.name): span for span in spans if span.failed}
    assert {*(span for _, span in generation), stages["generate"], inference, rpc} <= set(failed)
    assert {service for service, _, _ in failed} == {"meshserve-gateway", "meshserve-engine"}
    assert {span.attributes["error.type"] for span in failed.values()} == {"CAPABILITY_MISSING"}


def test_an_inference_span_carries_the_genai_attributes(mesh: Mesh, otlp: Receiver) -> None:
    caller = Caller()
    with mesh.channel() as channel:
        unary(gateway_pb2_grpc.InferenceServiceStub(channel), chat_request(fresh_prompt()), caller)
    spans = otlp.wait_for(caller.trace_id, has_expected(chat_tree("Chat"), caller.span_id))
    (inference,) = [span for span in spans if span.name == "chat demo"]
    attributes = inference.attributes
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.request.model"] == "demo"
    assert attributes["gen_ai.response.model"] == "smollm2-135m"
    assert attributes["gen_ai.request.max_tokens"] == 8
    assert attributes["gen_ai.usage.output_tokens"] == 8
    assert attributes["gen_ai.usage.input_tokens"] > 8


def test_every_span_and_attribute_is_declared(mesh: Mesh, otlp: Receiver) -> None:
    with mesh.client() as client:
        client.chat(fresh_prompt(), temperature=0, max_tokens=4)
        client.generate("x", max_tokens=2, seed=1, top_p=0.5)
    declared: dict[tuple[str, str], set[str]] = {}
    for span in SPANS:
        key = (span.service.removeprefix("every service"), span.name)
        declared.setdefault(key, set()).update(span.attributes)
    rpc_attributes = declared[("", "{package}.{Service}/{Method}")]
    for span in list(otlp.spans):
        service = span.service.removeprefix("meshserve-")
        if span.name.startswith("meshserve.v1."):
            allowed = rpc_attributes
        elif span.name.split(" ")[0] in ("chat", "text_completion"):
            allowed = declared[("gateway", "{operation} {model}")]
        else:
            allowed = declared[(service, span.name)]
        undeclared = set(span.attributes) - allowed - {"error.type"}
        assert not undeclared, f"{span.service} {span.name}: {undeclared}"
