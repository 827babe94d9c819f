"""Embeddings, classes and scores through a whole mesh that chats as well, all in one engine."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import meshserve
from meshserve.v1 import gateway_pb2, gateway_pb2_grpc
from services.runtime.telemetry.spans import COMMON_ATTRIBUTES, SPANS
from tests.fakes.small_encoders import class_logits, save_small_encoder
from tests.fakes.small_tokenizers import save_small_tokenizer
from tests.support.mesh import Mesh
from tests.support.otlp import ReceivedSpan, Receiver
from tests.support.waiting import wait_until

MINILM = "all-minilm-l6-v2"
TEXTS = [
    "The cat sits outside",
    "A man is playing guitar",
    "Ünïcödé, ☃ and 日本語",
    "x",
    "A much longer text about the weather of last week, which was mild. " * 6,
]
CARD = "my card is 4111 1111 1111 1111"

Small = tuple[PreTrainedModel, PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Small]]:
    """A classifier and a cross-encoder with random weights."""
    made = {}
    for name, kind in (("critic", "bert that classifies"), ("ranker", "bert that scores")):
        path = tmp_path_factory.mktemp(name)
        made[name] = (path, (save_small_encoder(kind, path), save_small_tokenizer(path)))
    return made


@pytest.fixture(scope="module")
def spans() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def mesh(
    tmp_path_factory: pytest.TempPathFactory,
    demo_model_path: Path,
    minilm_path: Path,
    small: dict[str, tuple[Path, Small]],
    spans: Receiver,
) -> Iterator[Mesh]:
    """A chat model and three encoders in one engine, one of which waits for a request."""
    overrides = {
        "models": {
            MINILM: {"source": MINILM, "price": {"prompt": 1000, "completion": 0}},
            "critic": {"source": str(small["critic"][0]), "dtype": "float32"},
            "ranker": {
                "source": str(small["ranker"][0]),
                "dtype": "float32",
                "load": "on_request",
            },
        },
        "telemetry": {"otlp_endpoint": spans.endpoint},
    }
    with Mesh(tmp_path_factory.mktemp("mesh"), overrides) as started:
        yield started


@pytest.fixture
def client(mesh: Mesh) -> Iterator[meshserve.Client]:
    with mesh.client() as opened:
        yield opened


def cosines(found: list[list[float]], expected: torch.Tensor) -> torch.Tensor:
    return torch.cosine_similarity(torch.tensor(found), expected, dim=-1)


def embed_and_keep(mesh: Mesh, client: meshserve.Client, texts: list[str]) -> meshserve.Embeddings:
    """The vectors of new texts, once the cache has them."""

    def kept() -> float:
        return mesh.metric("cache", "meshserve_cache_stores_total", outcome="stored")

    before = kept()
    answer = client.embed(texts)
    wait_until(lambda: kept() == before + len(texts), "the vectors are kept")
    return answer


def engine_calls(mesh: Mesh) -> float:
    """Calls of the gateway to engines that compute something."""
    return sum(
        mesh.metric(
            "gateway",
            "meshserve_rpc_client_calls_total",
            method=f"meshserve.v1.EngineService/{method}",
        )
        for method in ("Embed", "Classify", "Score")
    )


def embedded_by_transformers(path: Path, texts: list[str]) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path, dtype=torch.float32)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))


def test_vectors_are_those_of_transformers(client: meshserve.Client, minilm_path: Path) -> None:
    answer = client.embed(TEXTS, cache=False)
    assert answer.model == MINILM
    assert cosines(answer.vectors, embedded_by_transformers(minilm_path, TEXTS)).min() >= 0.999
    assert all(math.isclose(math.hypot(*vector), 1, rel_tol=1e-3) for vector in answer)
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    assert answer.usage.prompt_tokens == sum(map(len, tokenizer(TEXTS)["input_ids"]))


def test_options_decide_what_a_vector_is(client: meshserve.Client) -> None:
    text = TEXTS[0]
    whole = client.embed(text, normalize=False, cache=False).vector
    short = client.embed(text, dimensions=8, normalize=False, cache=False).vector
    assert short == whole[:8]
    first = client.embed(text, pooling="first", normalize=False, cache=False).vector
    assert first != whole


def test_classes_are_those_of_transformers(
    client: meshserve.Client, small: dict[str, tuple[Path, Small]]
) -> None:
    model, tokenizer = small["critic"][1]
    answer = client.classify(["a good day", "rain again"])
    assert answer.model == "critic"
    for text, classes in zip(["a good day", "rain again"], answer, strict=True):
        probabilities = class_logits(model, tokenizer(text)["input_ids"]).softmax(0).tolist()
        labelled = dict(zip(("bad", "so-so", "good"), probabilities, strict=True))
        assert {each.label: each.score for each in classes} == pytest.approx(labelled, abs=1e-5)
        scores = [each.score for each in classes]
        assert scores == sorted(scores, reverse=True)
    best = client.classify(["a good day"], top_k=1)
    assert [list(each) for each in best] == [[answer.results[0][0]]]


def test_scores_are_those_of_transformers(
    client: meshserve.Client, small: dict[str, tuple[Path, Small]]
) -> None:
    model, tokenizer = small["ranker"][1]
    query, documents = "where is the cat", ["on the mat", "it rains", "a", "the dog is out"]
    answer = client.score(query, documents)
    assert answer.model == "ranker"
    expected = []
    for document in documents:
        pair = tokenizer(query, document)
        start = pair["token_type_ids"].index(1)
        expected.append(class_logits(model, pair["input_ids"], start).sigmoid().item())
    assert answer.scores == pytest.approx(expected, abs=1e-5)
    assert answer.ranking[0] == expected.index(max(expected))


def test_a_request_without_a_model_gets_one_that_can_do_it(client: meshserve.Client) -> None:
    with ThreadPoolExecutor() as pool:
        chat = pool.submit(client.chat, "Say hello", max_tokens=8, temperature=0)
        vectors = [pool.submit(client.embed, text, cache=False) for text in TEXTS]
        assert chat.result().model == "smollm2-135m"
        assert {each.result().model for each in vectors} == {MINILM}
    can = {model.name: model.capabilities for model in client.models()}
    assert can == {
        "smollm2-135m": ("generate", "chat"),
        MINILM: ("embed",),
        "critic": ("classify",),
        "ranker": ("classify", "score"),
    }
    assert client.model(MINILM).embedding_size == 384
    assert client.model("critic").labels == ("bad", "so-so", "good")


@pytest.mark.parametrize(
    ("call", "asked", "missing"),
    [
        ("embed", ("demo", "a"), "MODEL_CAPABILITY_EMBED"),
        ("classify", (MINILM, "a"), "MODEL_CAPABILITY_CLASSIFY"),
        ("score", (MINILM, "a", ["b"]), "MODEL_CAPABILITY_SCORE"),
        ("generate", (MINILM, "a"), "MODEL_CAPABILITY_GENERATE"),
        ("chat", ("critic", "a"), "MODEL_CAPABILITY_CHAT"),
    ],
)
def test_what_a_model_cannot_do_is_said_by_name(
    client: meshserve.Client, call: str, asked: tuple[str, Any], missing: str
) -> None:
    model, *arguments = asked
    with pytest.raises(meshserve.UnsupportedError) as refused:
        getattr(client, call)(*arguments, model=model)
    assert refused.value.reason == "CAPABILITY_MISSING"
    assert refused.value.metadata["capability"] == missing


LONG = "word " * 300


@pytest.mark.parametrize(
    ("call", "arguments", "options", "reason", "path"),
    [
        ("embed", ([],), {}, "INVALID_FIELD", "texts"),
        ("embed", (["a", "", "b"],), {}, "INVALID_FIELD", "texts[1]"),
        ("embed", (["a", "b", LONG],), {}, "PROMPT_TOO_LONG", "texts[2]"),
        ("embed", (["a"] * 16385,), {}, "INVALID_FIELD", "texts"),
        ("embed", (["a"],), {"dimensions": 0}, "INVALID_FIELD", "dimensions"),
        ("embed", (["a"],), {"dimensions": 385}, "INVALID_FIELD", "dimensions"),
        ("embed", (["a"],), {"request_id": "a b"}, "INVALID_FIELD", "request_id"),
        ("embed", (["a" * 9_000_000],), {}, "PROMPT_TOO_LONG", "texts"),
        ("classify", (["a", ""],), {}, "INVALID_FIELD", "texts[1]"),
        ("classify", (["a", LONG],), {}, "PROMPT_TOO_LONG", "texts[1]"),
        ("score", ("", ["a"]), {}, "INVALID_FIELD", "query"),
        ("score", ("q", []), {}, "INVALID_FIELD", "documents"),
        ("score", ("q", ["a", ""]), {}, "INVALID_FIELD", "documents[1]"),
        ("score", ("q", ["a", LONG]), {}, "PROMPT_TOO_LONG", "documents[1]"),
    ],
)
def test_what_cannot_be_taken_is_named_before_anything_is_computed(
    mesh: Mesh,
    client: meshserve.Client,
    call: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    reason: str,
    path: str,
) -> None:
    calls = engine_calls(mesh)
    with pytest.raises(meshserve.InvalidRequestError) as refused:
        getattr(client, call)(*arguments, **options)
    assert refused.value.reason == reason
    assert path in [field.path for field in refused.value.fields]
    assert refused.value.message.count(path) >= ("[" in path)
    assert calls == engine_calls(mesh)


def test_a_value_that_the_contract_does_not_have_is_refused(mesh: Mesh) -> None:
    with mesh.channel() as channel:
        stub = gateway_pb2_grpc.InferenceServiceStub(channel)
        for field, value in (("pooling", 99), ("truncation", 99)):
            with pytest.raises(grpc.RpcError) as refused:
                stub.Embed(gateway_pb2.EmbedRequest(texts=["a"], **{field: value}))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert field in refused.value.details()


def test_a_long_text_is_cut_where_that_is_asked_for(client: meshserve.Client) -> None:
    cut = client.embed(LONG, truncation="drop_newest", cache=False)
    fits = client.embed("word " * 254, cache=False)
    assert cut.usage.prompt_tokens == fits.usage.prompt_tokens == 256
    assert cut.vector == fits.vector
    ends = client.embed("start " + LONG, truncation="drop_oldest", cache=False)
    assert ends.vector == fits.vector


def test_many_texts_are_split_and_come_back_in_order(mesh: Mesh, client: meshserve.Client) -> None:
    texts = [f"{number} bottles on a wall" for number in range(2100)]
    before = engine_calls(mesh)
    vectors = client.embed(texts, cache=False).vectors
    calls = engine_calls(mesh)
    assert calls - before == 3
    for index in (0, 1023, 1024, 2099):
        alone = torch.tensor([client.embed(texts[index], cache=False).vector])
        assert cosines([vectors[index]], alone).min() > 0.9999


def test_a_text_is_computed_once(mesh: Mesh, client: meshserve.Client) -> None:
    texts = ["a text that is kept", "another one"]
    first = embed_and_keep(mesh, client, texts)
    assert first.cached == 0
    assert client.embed(texts).cached == 2
    again = client.embed(["something new", *texts])
    assert again.cached == 2
    assert again.vectors[1:] == first.vectors
    assert client.embed(texts, dimensions=4).cached == 0, "another vector"
    assert client.embed(texts, cache=False).cached == 0
    assert again.usage.prompt_tokens > first.usage.prompt_tokens > 0
    client.embed(["not to be kept"], cache=meshserve.CacheControl(no_store=True))
    time.sleep(0.2)
    assert client.embed(["not to be kept"], cache=meshserve.CacheControl(no_store=True)).cached == 0


def test_what_is_computed_is_counted_and_has_a_price(mesh: Mesh, client: meshserve.Client) -> None:
    def counted(name: str, **labels: str) -> float:
        return mesh.metric("gateway", f"meshserve_gateway_{name}_total", model=MINILM, **labels)

    names = ("inputs", "cached_inputs", "prompt_tokens", "cost")
    texts = ["counted once", "and twice"]
    before = {name: counted(name) for name in names}
    tokens = embed_and_keep(mesh, client, texts).usage.prompt_tokens
    assert client.embed(texts[:1]).cached == 1
    grown = {name: counted(name) - before[name] for name in names}
    assert grown == {
        "inputs": 3,
        "cached_inputs": 1,
        "prompt_tokens": tokens,
        "cost": pytest.approx(tokens / 1000),
    }


def test_the_filter_sees_every_text(client: meshserve.Client) -> None:
    redacted = client.embed([TEXTS[0], CARD], cache=False)
    assert redacted.prompt_safety is not None
    assert [each.text_index for each in redacted.prompt_safety.findings] == [1]
    replaced = client.embed(["my card is [redacted]"], cache=False)
    assert redacted.vectors[1] == pytest.approx(replaced.vector, abs=1e-6)


async def test_a_caller_who_leaves_takes_what_waits_with_it(mesh: Mesh) -> None:
    # As many tokens as an engine lets wait, nearly: seconds of work.
    texts = [f"{number} " + "a long text that takes a while " * 30 for number in range(1000)]
    async with mesh.async_client() as client:
        work = asyncio.create_task(client.embed(texts, cache=False))
        await asyncio.sleep(1.5)
        assert not work.done()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        started = time.monotonic()
        await client.embed("a short one", cache=False)
        assert time.monotonic() - started < 5
        with pytest.raises(meshserve.DeadlineExceededError):
            await client.embed(texts, cache=False, timeout=0.5)
    cancelled = mesh.metric(
        "gateway", "meshserve_gateway_requests_total", model=MINILM, reason="CANCELLED"
    )
    assert cancelled >= 1


def test_a_request_is_one_trace(mesh: Mesh, spans: Receiver) -> None:
    with mesh.client() as client:
        request_id = client.embed(["traced"], cache=False, dimensions=16).request_id
    roots: list[ReceivedSpan] = []

    def arrived() -> bool:
        roots[:] = [
            span for span in spans.spans if span.attributes.get("gen_ai.response.id") == request_id
        ]
        return bool(roots)

    wait_until(arrived, "the span of the request")
    [root] = roots
    assert root.name == f"embeddings {MINILM}"
    assert root.attributes["gen_ai.operation.name"] == "embeddings"
    assert root.attributes["gen_ai.embeddings.dimension.count"] == 16
    assert root.attributes["gen_ai.usage.input_tokens"] == 3
    trace = spans.wait_for(
        root.trace_id,
        lambda found: {"encode", "stage settle"} <= {span.name for span in found},
    )
    names = [span.name for span in trace]
    for stage in ("authenticate", "admit", "route", "look_up", "screen", "tokenize", "encode"):
        assert names.count(f"stage {stage}") == 1
    assert "meshserve.v1.TokenizerService/EncodeInputs" in names
    declared = {attribute for span in SPANS for attribute in span.attributes}
    for span in trace:
        assert set(span.attributes) <= declared | set(COMMON_ATTRIBUTES), span.name
