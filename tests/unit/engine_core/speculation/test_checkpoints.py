"""Real checkpoints answer the same with and without drafts, on plain torch and natively."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.engine.core.engine import EngineCore
from services.engine.core.errors import StartupError
from services.engine.core.messages import Sampling, SequenceRequest, Stopping
from services.engine.core.settings import CoreSettings
from services.engine.core.startup import build_engine
from tests.fakes.small_llama import VOCAB_SIZE, save_small_llama

PHRASE = [5, 17, 40, 8, 60, 33, 21]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_small_llama(path)
    return path


def engine_of(path: Path, **settings: Any) -> EngineCore:
    return build_engine(
        CoreSettings(
            model_path=str(path),
            device="cpu",
            threads=1,
            kv_cache_memory_bytes=1 << 22,
            max_running_sequences=4,
            **settings,
        )
    )[0]


def answers_of(engine: EngineCore) -> dict[int, list[int]]:
    answers: dict[int, list[int]] = {}
    requests = [
        SequenceRequest(
            index,
            PHRASE * 3 + [index],
            Sampling(temperature=temperature, seed=index, repetition_penalty=penalty),
            Stopping(max_tokens=60, ignore_eos=True),
        )
        for index, (temperature, penalty) in enumerate([(0.0, 1.0), (0.8, 1.0), (0.0, 1.1)])
    ]
    engine.add(requests)
    while engine.has_work:
        for delta in engine.step().deltas:
            answers.setdefault(delta.sequence_id, []).extend(delta.token_ids)
        engine.check_integrity()
    return answers


@pytest.mark.parametrize(
    "backend", [{"dtype": "float32", "cpu_kernels": "off"}, {}], ids=["torch", "native"]
)
def test_answers_are_the_same_whatever_drafts(checkpoint: Path, backend: dict[str, Any]) -> None:
    plain = answers_of(engine_of(checkpoint, speculation="off", **backend))
    looked_up = engine_of(checkpoint, speculation="ngram", **backend)
    assert answers_of(looked_up) == plain
    drafted = engine_of(checkpoint, draft_model_path=str(checkpoint), **backend)
    assert answers_of(drafted) == plain
    load = drafted.load()
    # The model as its own draft model is always right.
    assert load.accepted_draft_tokens == load.drafted_tokens > 0


def test_a_draft_model_of_another_vocabulary_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    save_small_llama(tmp_path, vocab_size=VOCAB_SIZE + 1)
    with pytest.raises(StartupError, match=f"{VOCAB_SIZE + 1} tokens, the model one of"):
        engine_of(checkpoint, draft_model_path=str(tmp_path))


def test_a_draft_model_is_asked_for_by_name() -> None:
    with pytest.raises(ValueError, match="draft_model"):
        CoreSettings(model_path="a-model", speculation="draft")
