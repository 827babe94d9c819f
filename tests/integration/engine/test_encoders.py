"""Encoders through the core's own process: vectors, classes and scores as transformers has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel

from meshserve.v1 import engine_pb2, types_pb2
from services.engine.core.encoding.loader import open_encoder
from services.engine.core.encoding.pooling import pool
from services.engine.core.settings import BatcherSettings, CoreSettings
from services.engine.core_client import CoreStartError
from services.tokenizer.model_tokenizer import load_model_tokenizer
from tests.fakes.small_encoders import (
    HIDDEN_SIZE,
    SECOND_TEXTS,
    batch_of_all,
    class_logits,
    save_small_encoder,
    sequences,
)
from tests.fakes.small_llama import save_small_llama
from tests.support.engine_server import EngineServer, engine_server


def inputs_of(
    token_ids: Sequence[Sequence[int]], second_texts: Sequence[int | None] | None = None
) -> list[engine_pb2.EncoderInput]:
    starts = second_texts or [None] * len(token_ids)
    return [
        engine_pb2.EncoderInput(token_ids=ids, second_text_start=start)
        for ids, start in zip(token_ids, starts, strict=True)
    ]


async def embed(
    server: EngineServer, inputs: list[engine_pb2.EncoderInput], **fields: Any
) -> Tensor:
    """[num_inputs, size]"""
    response = await server.stub.Embed(
        engine_pb2.EngineServiceEmbedRequest(request_id="r", inputs=inputs, **fields)
    )
    return torch.tensor([list(each.values) for each in response.embeddings])


def least_cosine(found: Tensor, expected: Tensor) -> float:
    return torch.cosine_similarity(found, expected, dim=-1).min().item()


async def test_embeddings_are_pooled_and_normalised_as_asked(tmp_path: Path) -> None:
    save_small_encoder("bert", tmp_path)
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    (tmp_path / "modules.json").write_text(
        json.dumps([{"type": f"sentence_transformers.models.{k}", "path": p} for k, p in modules])
    )
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
    hidden = open_encoder(tmp_path).load(torch.float32, "cpu")(batch_of_all())
    lengths = batch_of_all().lengths
    inputs = inputs_of(sequences(), SECOND_TEXTS)
    async with engine_server(CoreSettings(model_path=str(tmp_path), device="cpu")) as server:
        mean = pool(hidden, lengths, "mean")
        found = await embed(server, inputs)
        assert least_cosine(found, mean) > 0.9999
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(len(inputs)))
        found = await embed(
            server, inputs, pooling=types_pb2.POOLING_LAST, normalize=False, dimensions=10
        )
        expected = pool(hidden, lengths, "last")[:, :10]
        assert least_cosine(found, expected) > 0.999
        torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)
        info = await server.stub.GetModelInfo(engine_pb2.GetModelInfoRequest())
        assert info.architecture == "BertModel"
        assert info.context_tokens == 80
        assert info.embedding_size == HIDDEN_SIZE
        assert list(info.capabilities) == [types_pb2.MODEL_CAPABILITY_EMBED]
        async for load in server.stub.WatchLoad(engine_pb2.WatchLoadRequest()):
            assert load.steps >= 2
            assert load.prompt_tokens == 2 * sum(lengths)
            assert load.kv_blocks_total == 0
            break


async def test_classes_come_likeliest_first_under_their_names(tmp_path: Path) -> None:
    reference = save_small_encoder("deberta that classifies", tmp_path)
    settings = CoreSettings(model_path=str(tmp_path), device="cpu", dtype="float32")
    async with engine_server(settings) as server:
        response = await server.stub.Classify(
            engine_pb2.EngineServiceClassifyRequest(
                request_id="r", inputs=inputs_of(sequences(), SECOND_TEXTS)
            )
        )
        info = await server.stub.GetModelInfo(engine_pb2.GetModelInfoRequest())
        assert list(info.labels) == ["bad", "so-so", "good"]
        assert list(info.capabilities) == [types_pb2.MODEL_CAPABILITY_CLASSIFY]
    for found, token_ids, second in zip(
        response.classifications, sequences(), SECOND_TEXTS, strict=True
    ):
        expected = class_logits(reference, token_ids, second).softmax(-1)
        scores = [each.score for each in found.scores]
        assert scores == sorted(scores, reverse=True)
        labels = [reference.config.id2label[int(index)] for index in expected.argsort().flip(0)]
        assert [each.label for each in found.scores] == labels
        assert scores == pytest.approx(expected.sort(descending=True).values.tolist(), abs=1e-4)


async def test_pairs_are_scored_with_their_token_types(tmp_path: Path) -> None:
    reference = save_small_encoder("bert that scores", tmp_path)
    async with engine_server(CoreSettings(model_path=str(tmp_path), device="cpu")) as server:
        request = engine_pb2.EngineServiceScoreRequest(
            request_id="r", inputs=inputs_of(sequences(), SECOND_TEXTS)
        )
        scores = (await server.stub.Score(request)).scores
        info = await server.stub.GetModelInfo(engine_pb2.GetModelInfoRequest())
        assert set(info.capabilities) == {
            types_pb2.MODEL_CAPABILITY_CLASSIFY,
            types_pb2.MODEL_CAPABILITY_SCORE,
        }
        with pytest.raises(grpc.RpcError) as raised:
            await embed(server, inputs_of(sequences()))
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    expected = [
        class_logits(reference, token_ids, second).sigmoid().item()
        for token_ids, second in zip(sequences(), SECOND_TEXTS, strict=True)
    ]
    assert list(scores) == pytest.approx(expected, abs=0.02)


async def test_a_decoder_makes_embeddings_of_its_last_token(tmp_path: Path) -> None:
    """Also of a sequence that takes several steps."""
    save_small_llama(tmp_path)
    (tmp_path / "modules.json").write_text(
        json.dumps(
            [
                {"type": "sentence_transformers.models.Transformer", "path": ""},
                {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
            ]
        )
    )
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode_lasttoken": true}')
    reference = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = torch.stack(
            [reference(torch.tensor([ids])).last_hidden_state[0, -1] for ids in sequences()]
        )
    settings = CoreSettings(
        model_path=str(tmp_path),
        device="cpu",
        dtype="float32",
        batcher=BatcherSettings(max_tokens=40),
    )
    async with engine_server(settings) as server:
        found = await embed(server, inputs_of(sequences()))
        info = await server.stub.GetModelInfo(engine_pb2.GetModelInfoRequest())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert list(info.capabilities) == [types_pb2.MODEL_CAPABILITY_EMBED]


async def test_a_model_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    save_small_encoder("bert", tmp_path)
    settings = CoreSettings(model_path=str(tmp_path), device="cpu", max_context_tokens=81)
    with pytest.raises(CoreStartError, match="positions for 80 tokens, not for 81"):
        async with engine_server(settings):
            pass


TEXTS = (
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A cheetah is running behind its prey, which does not see it coming through the high grass.",
    "vec",
)


@pytest.mark.slow
async def test_minilm_gives_the_vectors_of_transformers(minilm_path: Path) -> None:
    """The real weights, and the similarities that they are known for."""
    path = minilm_path
    tokenizer = load_model_tokenizer(path)
    token_ids = [tokenizer.encode(text).token_ids for text in TEXTS]
    reference = AutoModel.from_pretrained(path).eval()
    with torch.no_grad():
        pooled = [reference(torch.tensor([ids])).last_hidden_state[0].mean(0) for ids in token_ids]
    expected = functional.normalize(torch.stack(pooled), dim=-1)
    settings = {
        "bfloat16": CoreSettings(model_path=str(path), device="cpu"),
        "int8": CoreSettings(model_path=str(path), device="cpu", weights="int8"),
        "float32": CoreSettings(model_path=str(path), device="cpu", dtype="float32"),
    }
    for name, each in settings.items():
        async with engine_server(each) as server:
            found = await embed(server, inputs_of(token_ids))
            info = await server.stub.GetModelInfo(engine_pb2.GetModelInfoRequest())
        assert (info.context_tokens, info.embedding_size) == (256, 384)
        assert least_cosine(found, expected) > 0.999
        if name == "float32":
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        similar = (found @ found.T)[0]
        assert similar[1] > 0.7
        assert (similar[2:] < 0.3).all()
