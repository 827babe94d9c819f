"""The safety RPCs over a real channel: verdicts, many completions on a stream, clear refusals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from meshserve.v1 import safety_pb2, safety_pb2_grpc, types_pb2
from services.runtime import file_watch
from services.runtime.errors import Reason, ServiceError, from_session_status
from services.runtime.server import StartupError
from services.runtime.server_calls import CallInterceptor
from services.runtime.settings import Settings
from services.runtime.telemetry import Metrics
from services.safety import completion_session
from services.safety.service import SafetyService
from tests.support.kubelet import publish
from tests.support.waiting import until

POLICY = """
categories:
  blocked: {prompt: block, completion: block, terms: [stop here]}
  hidden: {prompt: redact, completion: redact, detectors: [credit_card], terms: [badger]}
  noted: {prompt: flag, completion: flag, terms: [noted]}
"""
CARD = "4111 1111 1111 1111"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(completion_session, "get_tracer", lambda: provider.get_tracer("test"))
    return exporter


@pytest.fixture
async def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SafetyService]:
    monkeypatch.setattr(file_watch, "INTERVAL_S", 0.01)
    volume = tmp_path / "policies"
    publish(volume, {"strict.yaml": POLICY.encode()})
    policies = {"strict": volume / "strict.yaml"}
    settings = Settings.model_validate(
        {"safety": {"policies": policies, "max_text_bytes": 12 * 2**20}}
    )
    made = SafetyService(settings, Metrics("safety"))
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def stub(service: SafetyService) -> AsyncIterator[safety_pb2_grpc.SafetyServiceStub]:
    options = [("grpc.max_receive_message_length", 64 * 2**20)]
    server = grpc.aio.server(interceptors=[CallInterceptor(service.metrics)], options=options)
    service.register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        yield safety_pb2_grpc.SafetyServiceStub(channel)
    await server.stop(None)


def opening(session_id: int, text: str = "", **kwargs: object) -> safety_pb2.CompletionInput:
    finish = bool(kwargs.pop("finish", False))
    return safety_pb2.CompletionInput(
        session_id=session_id,
        open=safety_pb2.CompletionOpen(policy="strict", **kwargs),  # type: ignore[arg-type]
        text=text,
        finish=finish,
    )


async def exchange(
    stub: safety_pb2_grpc.SafetyServiceStub, *messages: list[safety_pb2.CompletionInput]
) -> list[list[safety_pb2.CompletionOutput]]:
    call = stub.CheckCompletion(
        iter([safety_pb2.CheckCompletionRequest(inputs=inputs) for inputs in messages])
    )
    return [list(response.outputs) async for response in call]


async def test_a_prompt_gets_its_verdict_and_its_redacted_texts(stub) -> None:
    response = await stub.CheckPrompt(
        safety_pb2.CheckPromptRequest(texts=["noted", f"pay {CARD} now"], policy="strict")
    )
    assert list(response.redacted_texts) == ["noted", "pay [redacted] now"]
    verdict = response.verdict
    assert verdict.action == types_pb2.SAFETY_ACTION_REDACT
    assert [(f.category, f.text_index, f.start, f.end) for f in verdict.findings] == [
        ("noted", 0, 0, 5),
        ("hidden", 1, 4, 4 + len(CARD)),
    ]
    assert CARD not in str(response)
    policy = await stub.GetPolicy(safety_pb2.GetPolicyRequest(policy="strict"))
    assert verdict.policy_revision == policy.revision


async def test_an_ordinary_prompt_has_no_findings(stub) -> None:
    response = await stub.CheckPrompt(safety_pb2.CheckPromptRequest(texts=["hello"]))
    assert response.verdict.action == types_pb2.SAFETY_ACTION_UNSPECIFIED
    assert not response.verdict.findings
    assert not response.redacted_texts


async def test_a_policy_is_described_by_category(stub) -> None:
    policy = await stub.GetPolicy(safety_pb2.GetPolicyRequest(policy="strict"))
    assert [c.name for c in policy.categories] == ["blocked", "hidden", "noted"]
    assert policy.categories[0].prompt_action == types_pb2.SAFETY_ACTION_BLOCK
    assert policy.policy == "strict"
    default = await stub.GetPolicy(safety_pb2.GetPolicyRequest())
    assert default.policy == "default"
    assert default.revision != policy.revision


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (safety_pb2.CheckPromptRequest(), Reason.INVALID_FIELD),
        (safety_pb2.CheckPromptRequest(texts=["x"], policy="nope"), Reason.POLICY_NOT_FOUND),
        (safety_pb2.CheckPromptRequest(texts=["x" * (13 * 2**20)]), Reason.PROMPT_TOO_LONG),
    ],
)
async def test_what_cannot_be_checked_is_refused_with_the_reason(stub, request_, reason) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.CheckPrompt(request_)
    assert ServiceError.from_rpc_error(caught.value, peer="safety").reason is reason


async def test_completions_on_one_stream_are_judged_apart(stub) -> None:
    outputs = await exchange(
        stub,
        [opening(1, "a bad"), opening(2, "now stop"), opening(3, "fine")],
        [
            safety_pb2.CompletionInput(session_id=1, text="ger here"),
            safety_pb2.CompletionInput(session_id=2, text=" here and on"),
            safety_pb2.CompletionInput(session_id=3, finish=True),
        ],
        [safety_pb2.CompletionInput(session_id=1, text="!", finish=True)],
    )
    assert [[(o.session_id, o.released_text, o.finished) for o in m] for m in outputs] == [
        [(1, "a ", False), (2, "now ", False), (3, "fine", False)],
        [(1, "[redacted] here", False), (2, "", True), (3, "", True)],
        [(1, "!", True)],
    ]
    assert outputs[0][0].decided_characters == 2
    assert outputs[1][0].decided_characters == len("a badger here")
    assert outputs[1][1].verdict.action == types_pb2.SAFETY_ACTION_BLOCK
    assert outputs[1][1].decided_characters == len("now ")
    assert outputs[1][2].HasField("verdict")
    assert not outputs[0][0].HasField("verdict")


async def test_a_session_that_fails_fails_alone(stub) -> None:
    outputs = await exchange(
        stub,
        [opening(1, "ok"), safety_pb2.CompletionInput(session_id=9, text="x")],
        [
            safety_pb2.CompletionInput(
                session_id=2, open=safety_pb2.CompletionOpen(policy="nope"), text="x"
            )
        ],
        [opening(1, "again")],
        [opening(3, "ok", finish=True)],
    )
    reasons = [
        from_session_status(o.error, peer="safety").reason if o.HasField("error") else None
        for message in outputs
        for o in message
    ]
    assert reasons == [
        None,
        Reason.INVALID_FIELD,
        Reason.POLICY_NOT_FOUND,
        Reason.INVALID_FIELD,
        None,
    ]
    assert outputs[-1][0].released_text == "ok"


async def test_a_resumed_completion_sees_what_was_released_and_does_not_repeat_it(stub) -> None:
    outputs = await exchange(
        stub, [opening(1, " here, or not", released_text="noted: now stop", finish=True)]
    )
    (output,) = outputs[0]
    assert output.released_text == ""
    assert output.verdict.action == types_pb2.SAFETY_ACTION_BLOCK
    assert [f.category for f in output.verdict.findings] == ["blocked"]


async def test_a_session_is_a_span_under_its_own_trace_without_any_text(stub, spans) -> None:
    trace = types_pb2.TraceContext(traceparent=f"00-{TRACE_ID}-{PARENT_ID}-01")
    await exchange(
        stub,
        [opening(1, "badger one", trace=trace, finish=True), opening(2, "two")],
        [safety_pb2.CompletionInput(session_id=2, cancel=True)],
    )
    first, second = spans.get_finished_spans()
    assert first.name == "check session"
    assert f"{first.context.trace_id:032x}" == TRACE_ID
    assert first.parent is not None
    assert f"{first.parent.span_id:016x}" == PARENT_ID
    assert dict(first.attributes or {}) == {
        "meshserve.session.messages": 1,
        "meshserve.session.characters": len("badger one"),
        "meshserve.session.cancelled": False,
        "meshserve.safety.action": "redact",
        "meshserve.safety.categories": ("hidden",),
    }
    assert (second.attributes or {})["meshserve.session.cancelled"] is True


async def test_findings_are_counted_and_logged_without_text(stub, service, caplog) -> None:
    with caplog.at_level("INFO"):
        await stub.CheckPrompt(
            safety_pb2.CheckPromptRequest(texts=[f"x {CARD}"], policy="strict", tenant="acme")
        )
    sample = service.metrics.registry.get_sample_value
    labels = {"category": "hidden", "action": "redact"}
    assert sample("meshserve_safety_findings_total", labels) == 1
    assert sample("meshserve_safety_checks_total", {"subject": "prompt", "action": "redact"}) == 1
    record = next(r for r in caplog.records if r.message == "safety finding")
    assert record.tenant == "acme"
    assert "4111" not in str(vars(record))


async def test_a_10_mb_prompt_is_checked_while_short_ones_and_the_loop_go_on(stub) -> None:
    text = "an ordinary sentence about nothing in particular, again and again. " * 150_000
    large = asyncio.ensure_future(stub.CheckPrompt(safety_pb2.CheckPromptRequest(texts=[text])))
    answered = 0
    while not large.done():
        await stub.CheckPrompt(safety_pb2.CheckPromptRequest(texts=["short " * 1000]))
        answered += 1
    response = await large
    assert response.verdict.action == types_pb2.SAFETY_ACTION_UNSPECIFIED
    assert answered >= 3


async def test_a_caller_that_goes_away_leaves_no_work_behind(stub, service) -> None:
    text = "1.2.3.4 " * 1_200_000
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.CheckPrompt(safety_pb2.CheckPromptRequest(texts=[text]), timeout=0.5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    began_s = time.process_time()
    await stub.CheckPrompt(safety_pb2.CheckPromptRequest(texts=["ordinary words " * 20_000]))
    assert time.process_time() - began_s < 3


async def test_the_probe_passes_once_the_policies_are_in_force(service) -> None:
    await service.probe()


async def test_a_policy_file_with_mistakes_is_a_clear_startup_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("categories: {c: {promt: flag, terms: [x]}}")
    settings = Settings.model_validate({"safety": {"policies": {"default": path}}})
    service = SafetyService(settings, Metrics("safety"))
    with pytest.raises(StartupError, match=r"bad\.yaml: categories\.c\.promt: unknown") as caught:
        await service.start()
    assert "safety.policies" in caught.value.hint
    await service.stop()


async def test_a_changed_policy_is_in_force_without_a_restart_and_a_broken_one_never(
    service: SafetyService, stub: safety_pb2_grpc.SafetyServiceStub, tmp_path: Path
) -> None:
    async def blocks(text: str) -> bool:
        request = safety_pb2.CheckPromptRequest(policy="strict", texts=[text])
        return (await stub.CheckPrompt(request)).verdict.action == types_pb2.SAFETY_ACTION_BLOCK

    async def until_blocks(text: str) -> None:
        async with asyncio.timeout(30):
            while not await blocks(text):
                await asyncio.sleep(0.01)

    volume = tmp_path / "policies"
    assert not await blocks("go no further")
    changed = POLICY.replace("stop here", "go no further")
    publish(volume, {"strict.yaml": changed.encode()})
    await until_blocks("go no further")
    assert not await blocks("stop here")
    publish(volume, {"strict.yaml": b"categories: {c: {promt: flag, terms: [x]}}"})
    refused = "meshserve_files_refused", {"what": "policies"}
    await until(lambda: service.metrics.registry.get_sample_value(*refused))
    assert await blocks("go no further")
