"""What the running mesh exposes is what the table declares, and it counts right."""

from __future__ import annotations

import contextlib
import re
import time
import uuid
from collections.abc import Callable

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

import meshserve
from meshserve.v1 import gateway_pb2, gateway_pb2_grpc, types_pb2
from services.runtime.errors import Reason
from services.runtime.replicas import STANDINGS
from services.runtime.telemetry.metrics import EVERY_SERVICE, METRICS
from tests.support.mesh import SERVICES, Mesh

SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


@pytest.fixture(scope="module", autouse=True)
def _traffic(mesh: Mesh) -> None:
    """Requests that end in different ways, with names and texts that no label may carry."""
    with mesh.channel() as channel:
        stub = gateway_pb2_grpc.InferenceServiceStub(channel)
        for request in (
            gateway_pb2.GenerateRequest(text="marmalade", request_id="marmalade-id"),
            gateway_pb2.GenerateRequest(text="x", model="marmalade"),
            gateway_pb2.GenerateRequest(text="My card is 4111 1111 1111 1111."),
            gateway_pb2.GenerateRequest(text=""),
        ):
            request.stopping.max_tokens = 2
            # Refused or answered: what counts here is what it leaves behind.
            with contextlib.suppress(grpc.RpcError):
                stub.Generate(request, timeout=30)
        unknown = channel.unary_unary("/meshserve.v1.InferenceService/Marmalade")
        with pytest.raises(grpc.RpcError):
            unknown(b"", timeout=5)
    with mesh.client() as client:
        for _ in range(2):
            client.chat("Say marmalade.", temperature=0, max_tokens=3)
        with client.stream_chat("Say marmalade.", max_tokens=3) as stream:
            stream.collect()


def declared(service: str) -> dict[str, str]:
    return {row.name: row.kind for row in METRICS if row.service in (EVERY_SERVICE, service)}


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_exposes_what_is_declared_and_nothing_else(mesh: Mesh, service: str) -> None:
    exposed = {
        family.name: family for family in text_string_to_metric_families(mesh.metrics(service))
    }
    assert {name: family.type for name, family in exposed.items()} == declared(service)
    labels = {row.name: set(row.labels) for row in METRICS}
    for name, family in exposed.items():
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == labels[name], sample
            assert any(sample.name == name + suffix for suffix in SUFFIXES[family.type]), sample


MODEL_STATES = ("unloaded", "loading", "ready", "sleeping", "draining", "failed")
ALLOWED: dict[str, Callable[[str], bool]] = {
    "method": re.compile(r"(meshserve\.v1|grpc\.\w+\.v1\w*)\.\w+/[A-Z]\w+|[A-Z]+|other").fullmatch,  # type: ignore[dict-item]
    "code": lambda value: value in grpc.StatusCode.__members__,
    "reason": lambda value: value == "" or value in Reason.__members__,
    "model": lambda value: value in ("smollm2-135m", "unknown"),
    "tenant": lambda value: value == "anonymous",
    "stage": re.compile(r"[a-z_]+").fullmatch,  # type: ignore[dict-item]
    "outcome": re.compile(r"[a-z]+").fullmatch,  # type: ignore[dict-item]
    "command": re.compile(r"[a-z_]+").fullmatch,  # type: ignore[dict-item]
    "subject": lambda value: value in ("prompt", "completion"),
    "action": lambda value: value in ("allow", "flag", "redact", "block"),
    "category": re.compile(r"[a-z_]+(\.[a-z_]+)?").fullmatch,  # type: ignore[dict-item]
    "what": re.compile(r"api_keys|certificate|policies|trust_[a-z]+|valkey").fullmatch,  # type: ignore[dict-item]
    "peer": lambda value: value in SERVICES,
    "target": re.compile(r"dns:///127\.0\.0\.1:\d+").fullmatch,  # type: ignore[dict-item]
    "state": lambda value: value in (*STANDINGS, *MODEL_STATES),
    "route": re.compile(r"/[a-z/{}]*|other").fullmatch,  # type: ignore[dict-item]
    "status": re.compile(r"\d{3}").fullmatch,  # type: ignore[dict-item]
    "process": lambda value: value in ("main", "core"),
    "device": lambda value: value == "cpu",
    "dtype": lambda value: value == "float32",
    "architecture": re.compile(r"[a-z_]+").fullmatch,  # type: ignore[dict-item]
    "service": lambda value: value in SERVICES,
    "version": re.compile(r"\d+\.\d+.*").fullmatch,  # type: ignore[dict-item]
    "le": lambda value: value == "+Inf" or float(value) > 0,
}


@pytest.mark.parametrize("service", SERVICES)
def test_no_label_has_a_value_that_a_caller_made_up(mesh: Mesh, service: str) -> None:
    text = mesh.metrics(service)
    assert "marmalade" not in text.lower()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            for label, value in sample.labels.items():
                assert ALLOWED[label](value), f"{sample.name} {label}={value!r}"


class Counts:
    """How much metrics have grown since this was made."""

    WATCHED = (
        ("gateway", "meshserve_gateway_requests_total", {"reason": ""}),
        ("gateway", "meshserve_gateway_requests_total", {"reason": "PROMPT_TOO_LONG"}),
        ("gateway", "meshserve_gateway_prompt_tokens_total", {}),
        ("gateway", "meshserve_gateway_completion_tokens_total", {}),
        ("gateway", "meshserve_gateway_cached_responses_total", {}),
        ("gateway", "meshserve_gateway_time_to_first_token_seconds_count", {}),
        ("engine", "meshserve_engine_generated_tokens_total", {}),
        ("engine", "meshserve_engine_prompt_length_tokens_count", {}),
        ("cache", "meshserve_cache_lookups_total", {"outcome": "hit"}),
        ("cache", "meshserve_cache_lookups_total", {"outcome": "miss"}),
        ("cache", "meshserve_cache_stores_total", {"outcome": "stored"}),
        ("tokenizer", "meshserve_tokenizer_decoded_tokens_total", {}),
        ("safety", "meshserve_safety_checks_total", {"subject": "prompt"}),
        ("safety", "meshserve_safety_checks_total", {"subject": "completion"}),
    )

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._before = self._read()

    def grown(self) -> list[float]:
        return [now - before for now, before in zip(self._read(), self._before, strict=True)]

    def _read(self) -> list[float]:
        return [
            self._mesh.metric(service, name, **labels) for service, name, labels in self.WATCHED
        ]


def test_a_known_sequence_of_requests_is_counted(mesh: Mesh) -> None:
    """Two answers of 5 tokens, the second twice more from the cache, and one refusal."""
    counts = Counts(mesh)
    one, two = (f"Number {uuid.uuid4().int % 10**6}." for _ in range(2))
    options = {"temperature": 0.0, "max_tokens": 5, "ignore_eos": True}
    with mesh.client() as client:
        prompt_tokens = sum(client.count_tokens(text).tokens for text in (one, two))
        for text in (one, two, two):
            client.generate(text, **options)  # type: ignore[arg-type]
        with client.stream_generate(two, **options) as stream:  # type: ignore[arg-type]
            assert stream.collect().cached
        with pytest.raises(meshserve.InvalidRequestError):
            client.generate("word " * 3000)
    expected = [
        *[4, 1, prompt_tokens, 10, 2, 4],
        *[10, 2],
        *[2, 2, 2],
        10,
        # The refused prompt was checked beside its tokenization, or was called off by it.
        *[pytest.approx(2.5, abs=0.5), 2],
    ]
    deadline = time.monotonic() + 10
    while counts.grown() != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    assert dict(zip((str(each) for each in Counts.WATCHED), counts.grown(), strict=True)) == dict(
        zip((str(each) for each in Counts.WATCHED), expected, strict=True)
    )


def test_nothing_in_flight_is_counted_when_all_is_quiet(mesh: Mesh) -> None:
    gauges = [
        ("gateway", "meshserve_gateway_active_requests"),
        ("tokenizer", "meshserve_tokenizer_decode_sessions"),
        ("safety", "meshserve_safety_completion_sessions"),
        ("engine", "meshserve_engine_running_sequences"),
        ("engine", "meshserve_engine_waiting_sequences"),
        ("engine", "meshserve_engine_kv_blocks_used"),
    ]
    deadline = time.monotonic() + 10
    while any(mesh.metric(*gauge) for gauge in gauges) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert {gauge: mesh.metric(*gauge) for gauge in gauges} == dict.fromkeys(gauges, 0)


def test_tokens_are_counted_by_the_engine_as_by_the_gateway(mesh: Mesh) -> None:
    """Also the one that ends an answer, which has no text."""
    before = mesh.metric("engine", "meshserve_engine_generated_tokens_total")
    request = gateway_pb2.ChatRequest(
        conversation=types_pb2.Conversation(
            messages=[types_pb2.ChatMessage(role=types_pb2.ROLE_USER, content="Say only: hi")]
        ),
        sampling=types_pb2.SamplingParams(temperature=0),
        cache_control=types_pb2.CacheControl(no_cache=True),
    )
    with mesh.channel() as channel:
        answer = gateway_pb2_grpc.InferenceServiceStub(channel).Chat(request, timeout=60)
    assert answer.choices[0].finish_reason == types_pb2.FINISH_REASON_STOP
    generated = mesh.metric("engine", "meshserve_engine_generated_tokens_total") - before
    assert generated == answer.usage.completion_tokens


def test_the_pauses_of_a_stream_are_those_between_its_messages(mesh: Mesh) -> None:
    """As many as messages with text but one, and together as long as the stream goes on for."""
    name = "meshserve_gateway_inter_token_latency_seconds"
    before = [mesh.metric("gateway", f"{name}_{part}") for part in ("count", "sum")]
    request = gateway_pb2.StreamGenerateRequest()
    request.request.text = "Once upon a time there was"
    request.request.stopping.max_tokens = 60
    request.request.stopping.ignore_eos = True
    with mesh.channel() as channel:
        arrived = [
            time.monotonic()
            for event in gateway_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(
                request, timeout=60
            )
            if event.chunk.deltas and event.chunk.deltas[0].text
        ]
    count, total = (
        mesh.metric("gateway", f"{name}_{part}") - was
        for part, was in zip(("count", "sum"), before, strict=True)
    )
    assert count == len(arrived) - 1 > 1
    assert total == pytest.approx(arrived[-1] - arrived[0], abs=0.25)


def test_the_pauses_of_a_stream_are_counted_while_it_goes_on(mesh: Mesh) -> None:
    name = "meshserve_gateway_inter_token_latency_seconds_count"
    before = mesh.metric("gateway", name)
    request = gateway_pb2.StreamGenerateRequest()
    request.request.text = "Once upon another time"
    request.request.stopping.max_tokens = 1000
    request.request.stopping.ignore_eos = True
    with mesh.channel() as channel:
        events = gateway_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(request, timeout=60)
        texts = (event for event in events if any(d.text for d in event.chunk.deltas))
        for _ in range(4):
            next(texts)
        assert mesh.metric("gateway", name) - before >= 3
        events.cancel()


def test_a_denied_call_is_counted_whatever_its_method(mesh: Mesh) -> None:
    before = mesh.metric("gateway", "meshserve_gateway_denials_total", reason="API_KEY_INVALID")
    with mesh.client(api_key="nobody's") as client:
        for denied in (client.models, lambda: client.generate("Hello", max_tokens=1)):
            with pytest.raises(meshserve.AuthenticationError):
                denied()
    after = mesh.metric("gateway", "meshserve_gateway_denials_total", reason="API_KEY_INVALID")
    assert after - before == 2


def test_the_process_that_computes_is_told_apart_from_its_front(mesh: Mesh) -> None:
    front = mesh.process("engine")
    (core,) = front.children()
    for process, label in ((front, "main"), (core, "core")):
        memory = mesh.metric("engine", "meshserve_process_resident_memory_bytes", process=label)
        assert memory == pytest.approx(process.memory_info().rss, rel=0.1)
        started = mesh.metric("engine", "meshserve_process_start_time_seconds", process=label)
        assert started == pytest.approx(process.create_time(), abs=1)
    used = mesh.metric("engine", "meshserve_process_cpu_seconds_total", process="core")
    assert 0 < used <= sum(core.cpu_times()[:2])
