"""Further gateways on the same mesh: keys, limits that replicas share, and peers that are away."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from meshserve.v1 import gateway_pb2, gateway_pb2_grpc, types_pb2
from tests.support.errors import Failure, failure_of
from tests.support.mesh import Mesh
from tests.support.ports import free_ports
from tests.support.process import ServiceProcess

Code = grpc.StatusCode
Stub = gateway_pb2_grpc.InferenceServiceStub

OPEN_KEY, DEMO_KEY, OTHER_KEY, LIMITED_KEY = "key-open", "key-demo", "key-other", "key-limited"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


def gateway_settings(mesh: Mesh, host: str = "127.0.0.1", **sections: Any) -> dict[str, Any]:
    """Those of the mesh, with `sections` laid over them and ports of its own."""
    settings = copy.deepcopy(mesh.settings)
    port, metrics_port = free_ports(2)
    for name, section in sections.items():
        settings.setdefault(name, {}).update(section)
    settings["gateway"]["listen"] = f"{host}:{port}"
    settings["gateway"]["metrics_listen"] = f"127.0.0.1:{metrics_port}"
    settings["gateway"]["http_listen"] = None
    return settings


@contextmanager
def gateway(
    mesh: Mesh, folder: Path, *, host: str = "127.0.0.1", healthy: bool = True, **sections: Any
) -> Iterator[Stub]:
    """One more gateway before the mesh's other services."""
    settings = gateway_settings(mesh, host, **sections)
    port = settings["gateway"]["listen"].rpartition(":")[2]
    with ServiceProcess("gateway", folder / f"gateway-{port}", settings) as process:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            if healthy:
                process.wait_until_healthy()
            else:
                # It serves, and says of itself that it is not of much use.
                grpc.channel_ready_future(channel).result(timeout=30)
                assert process.health() != "SERVING"
            yield Stub(channel)
        assert "Traceback" not in process.log, process.log


def nowhere() -> dict[str, str]:
    """The target of a service that is away."""
    return {"target": f"dns:///127.0.0.1:{free_ports(1)[0]}"}


def request(**fields: Any) -> gateway_pb2.GenerateRequest:
    fields.setdefault("stopping", types_pb2.StoppingCriteria(max_tokens=2))
    fields.setdefault("sampling", types_pb2.SamplingParams(temperature=0))
    return gateway_pb2.GenerateRequest(text="Hello there", **fields)


def failure(stub: Stub, key: str | None = None, timeout: float = 30, **fields: Any) -> Failure:
    with pytest.raises(grpc.RpcError) as error:
        stub.Generate(request(**fields), metadata=bearer(key) if key else None, timeout=timeout)
    return failure_of(error.value)


# --- API keys


@pytest.fixture(scope="module")
def guarded(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stub, Stub]]:
    """Two replicas that can be reached from elsewhere, and so ask for keys by themselves."""
    keys = [
        {"name": "open", "sha256": digest(OPEN_KEY)},
        {"name": "demo-only", "sha256": digest(DEMO_KEY), "models": ["demo"]},
        {"name": "limited", "sha256": digest(LIMITED_KEY), "requests_per_minute": 30},
    ]
    limits = {"auth": {"keys": keys}, "rate_limit": {"burst": 3}}
    folder = tmp_path_factory.mktemp("guarded")
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(gateway(mesh, folder, host="0.0.0.0", gateway=limits))
            for _ in range(2)
        )
        yield first, second


def test_a_gateway_that_others_can_reach_asks_for_a_key(guarded: tuple[Stub, Stub]) -> None:
    stub, _ = guarded
    missing, wrong = failure(stub), failure(stub, OTHER_KEY)
    assert (missing.code, missing.reason) == (Code.UNAUTHENTICATED, "API_KEY_MISSING")
    assert (wrong.code, wrong.reason) == (Code.UNAUTHENTICATED, "API_KEY_INVALID")
    assert OTHER_KEY not in wrong.message
    answer = stub.Generate(request(), metadata=bearer(OPEN_KEY), timeout=30)
    assert answer.usage.completion_tokens == 2
    with pytest.raises(grpc.RpcError) as scheme:
        stub.Generate(request(), metadata=(("authorization", OPEN_KEY),), timeout=30)
    assert failure_of(scheme.value).reason == "API_KEY_INVALID"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("CountTokens", gateway_pb2.CountTokensRequest(text="x")),
        ("ListModels", gateway_pb2.ListModelsRequest()),
        ("GetModel", gateway_pb2.GetModelRequest()),
        ("Embed", gateway_pb2.EmbedRequest(texts=["x"])),
        ("Chat", gateway_pb2.ChatRequest()),
    ],
)
def test_every_method_asks_for_the_key(
    guarded: tuple[Stub, Stub], method: str, message: Any
) -> None:
    with pytest.raises(grpc.RpcError) as error:
        getattr(guarded[0], method)(message, timeout=30)
    assert error.value.code() is Code.UNAUTHENTICATED


def test_a_key_for_an_alias_is_a_key_for_its_model(guarded: tuple[Stub, Stub]) -> None:
    stub, _ = guarded
    for name in ("demo", "smollm2-135m", ""):
        stub.Generate(request(model=name), metadata=bearer(DEMO_KEY), timeout=30)
    listed = stub.ListModels(gateway_pb2.ListModelsRequest(), metadata=bearer(DEMO_KEY), timeout=30)
    assert [model.name for model in listed.models] == ["smollm2-135m"]


def test_a_limit_holds_over_all_replicas_and_recovers(guarded: tuple[Stub, Stub]) -> None:
    """30 a minute with bursts of 3: the fourth is refused by either replica, for two seconds."""
    deadline = time.monotonic() + 20
    answered, refused = 0, None
    for turn in range(8):
        try:
            guarded[turn % 2].Generate(request(), metadata=bearer(LIMITED_KEY), timeout=30)
            answered += 1
        except grpc.RpcError as error:
            refused = error
            break
    assert refused is not None
    # What comes back while the first ones are answered is one more at the most.
    assert answered in (3, 4)
    told = failure_of(refused)
    assert (told.code, told.reason) == (Code.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    assert told.retry_after_s is not None
    assert 0 < told.retry_after_s <= 2
    status = status_pb2.Status.FromString(
        dict(refused.trailing_metadata())["grpc-status-details-bin"]
    )
    quota = error_details_pb2.QuotaFailure()
    assert any(detail.Unpack(quota) for detail in status.details)
    assert quota.violations[0].subject == "tenant:limited"
    time.sleep(told.retry_after_s + 0.05)
    guarded[1].Generate(request(), metadata=bearer(LIMITED_KEY), timeout=30)
    assert time.monotonic() < deadline


# --- room and time


def test_room_and_time_are_limited(mesh: Mesh, tmp_path: Path) -> None:
    """One request at a time, of two seconds where the caller sets no deadline."""
    long = request(
        stopping=types_pb2.StoppingCriteria(max_tokens=2000, ignore_eos=True),
        cache_control=types_pb2.CacheControl(no_cache=True),
    )
    limits = {"default_timeout_s": 2, "max_active_requests": 1}
    with gateway(mesh, tmp_path, gateway=limits) as stub:
        running = stub.StreamGenerate(gateway_pb2.StreamGenerateRequest(request=long))
        next(running)
        full = failure(stub)
        with pytest.raises(grpc.RpcError) as error:
            list(running)
        late = failure_of(error.value)
        assert (full.code, full.reason) == (Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert full.retry_after_s == 1.0
        assert (late.code, late.reason) == (Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
        assert late.metadata["request_id"]
        assert stub.Generate(request(), timeout=30).usage.completion_tokens == 2
    with mesh.client() as client:
        assert client.generate("x", max_tokens=1).usage.completion_tokens == 1


def test_a_gateway_that_ends_lets_go_of_what_it_was_computing(mesh: Mesh, tmp_path: Path) -> None:
    """Its drain is too short for the answer; whoever asks the same elsewhere need not wait."""
    message = gateway_pb2.StreamGenerateRequest(
        request=gateway_pb2.GenerateRequest(
            text=f"Count up from {time.time_ns()}.",
            sampling=types_pb2.SamplingParams(temperature=0),
            stopping=types_pb2.StoppingCriteria(max_tokens=1500, ignore_eos=True),
        )
    )
    settings = gateway_settings(mesh, gateway={"drain_timeout_s": 0.5})
    with grpc.insecure_channel(settings["gateway"]["listen"]) as channel:
        with ServiceProcess("gateway", tmp_path, settings) as process:
            process.wait_until_healthy()
            stream = Stub(channel).StreamGenerate(message, timeout=60)
            next(iter(stream))
        with pytest.raises(grpc.RpcError) as error:
            list(stream)
    assert error.value.code() in (Code.UNAVAILABLE, Code.CANCELLED)
    assert process.wait() == 0
    assert "Traceback" not in process.log, process.log
    with mesh.channel() as channel:
        started = time.monotonic()
        answers = Stub(channel).StreamGenerate(message, timeout=60)
        next(iter(answers))
        answers.cancel()
    assert time.monotonic() - started < 15, "for a lease that stays it would wait for 30 s"


# --- peers that are away


def test_without_cache_valkey_and_filter_it_answers_all_the_same(
    mesh: Mesh, tmp_path: Path
) -> None:
    with gateway(
        mesh,
        tmp_path,
        cache=nowhere(),
        safety={**nowhere(), "when_unavailable": "allow"},
        valkey={"url": f"redis://127.0.0.1:{free_ports(1)[0]}/0"},
        gateway={"rate_limit": {"requests_per_minute": 1, "burst": 1}},
    ) as stub:
        for _ in range(3):
            answer = stub.Generate(request(), timeout=30)
            assert answer.usage.completion_tokens == 2
            assert not answer.cached


def test_a_gateway_that_must_know_its_limits_refuses_without_them(
    mesh: Mesh, tmp_path: Path
) -> None:
    with gateway(
        mesh,
        tmp_path,
        valkey={"url": f"redis://127.0.0.1:{free_ports(1)[0]}/0"},
        gateway={"rate_limit": {"requests_per_minute": 1000, "when_unavailable": "refuse"}},
    ) as stub:
        refused = failure(stub)
        assert (refused.code, refused.reason) == (Code.UNAVAILABLE, "LIMITS_UNAVAILABLE")
        assert refused.retry_after_s is not None


def test_without_its_filter_a_gateway_refuses_by_default(mesh: Mesh, tmp_path: Path) -> None:
    with gateway(mesh, tmp_path, safety=nowhere()) as stub:
        refused = failure(stub)
    assert (refused.code, refused.reason) == (Code.UNAVAILABLE, "SERVICE_UNAVAILABLE")
    assert refused.metadata["service"] == "safety"
    assert refused.retry_after_s is not None


@pytest.mark.parametrize("away", ["engine", "tokenizer"])
def test_a_gateway_whose_peers_never_came_says_which(mesh: Mesh, tmp_path: Path, away: str) -> None:
    with gateway(mesh, tmp_path, healthy=False, **{away: nowhere()}) as stub:
        refused = failure(stub)
        assert (refused.code, refused.reason) == (Code.UNAVAILABLE, "SERVICE_UNAVAILABLE")
        assert refused.metadata["service"] == away
        (model,) = stub.ListModels(gateway_pb2.ListModelsRequest(), timeout=10).models
        assert (model.name, model.ready) == ("smollm2-135m", False)


# --- the cache, through the shared gateway


def test_fifty_equal_requests_are_computed_once(mesh: Mesh) -> None:
    before = mesh.metric("engine", "meshserve_engine_generated_tokens_total")
    text = f"Tell me about the number {time.time_ns()}."
    message = gateway_pb2.GenerateRequest(
        text=text,
        sampling=types_pb2.SamplingParams(temperature=0),
        stopping=types_pb2.StoppingCriteria(max_tokens=16, ignore_eos=True),
    )
    with mesh.channel() as channel, ThreadPoolExecutor(50) as pool:
        stub = Stub(channel)
        answers = list(pool.map(lambda _: stub.Generate(message, timeout=60), range(50)))
    assert len({answer.choices[0].text for answer in answers}) == 1
    assert sum(not answer.cached for answer in answers) == 1
    time.sleep(0.3)
    assert mesh.metric("engine", "meshserve_engine_generated_tokens_total") - before == 16


def test_a_caller_that_leaves_takes_no_lease_with_it(mesh: Mesh) -> None:
    """Whoever asks the same next computes at once, however early the first one left."""
    with mesh.channel() as channel:
        stub = Stub(channel)
        for number, after_s in enumerate((0.0005, 0.002, 0.005, 0.01, 0.03, 0.2)):
            message = gateway_pb2.GenerateRequest(
                text=f"Count to {time.time_ns()} ({number}).",
                sampling=types_pb2.SamplingParams(temperature=0),
                stopping=types_pb2.StoppingCriteria(max_tokens=100, ignore_eos=True),
            )
            call = stub.Generate.future(message, timeout=60)
            time.sleep(after_s)
            call.cancel()
            started = time.monotonic()
            answers = stub.StreamGenerate(
                gateway_pb2.StreamGenerateRequest(request=message), timeout=60
            )
            next(iter(answers))
            first_text_s = time.monotonic() - started
            answers.cancel()
            assert first_text_s < 15, f"left after {after_s} s"


def test_what_was_redacted_never_reaches_the_engine(mesh: Mesh) -> None:
    """A card number costs other tokens than what stands for it."""
    with mesh.client() as client:
        for prefix in ("My card is", "Pay with", "Once more:"):
            answer = client.generate(
                f"{prefix} 4111 1111 1111 1111.", max_tokens=1, temperature=0, cache=False
            )
            redacted = client.count_tokens(f"{prefix} [redacted].").tokens
            plain = client.count_tokens(f"{prefix} 4111 1111 1111 1111.").tokens
            assert plain != redacted
            assert answer.usage.prompt_tokens == redacted
