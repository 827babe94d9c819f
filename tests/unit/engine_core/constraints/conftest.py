"""The small model that spells, and engines over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.core.constraints.compilation import Compiler
from services.engine.core.constraints.vocabulary import Vocabulary, read_vocabulary
from services.engine.core.device_runner import DeviceRunner
from services.engine.core.kernels.cpu import library
from services.engine.core.runner import Runner
from services.engine.core.settings import CoreSettings
from services.engine.core.startup import build_engine
from tests.fakes.spelling_llama import EOS_TOKEN_ID, VOCAB_SIZE, save_spelling_llama


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spelling")
    save_spelling_llama(path)
    return path


@pytest.fixture(scope="session")
def vocabulary(checkpoint: Path) -> Vocabulary:
    return read_vocabulary(checkpoint, VOCAB_SIZE, (EOS_TOKEN_ID,))


@pytest.fixture(scope="session")
def compiler(vocabulary: Vocabulary) -> Compiler:
    return Compiler(lambda: vocabulary)


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[Callable[..., Any]]:
    threads = torch.get_num_threads()

    def build(num_blocks: int = 512, overlaps: bool = False, **fields: Any) -> Any:
        make_runner: Callable[..., Any] = Runner
        if overlaps:
            make_runner = partial(DeviceRunner, vocab_size=VOCAB_SIZE)
            fields["plan_ahead"] = "on"
        fields = {"device": "cpu", "threads": 1, "max_context_tokens": 256, **fields}
        memory = num_blocks * 2 * 2 * 2 * 16 * 16 * 4
        core, _ = build_engine(
            CoreSettings(
                model_path=str(checkpoint),
                dtype="float32",
                kv_cache_memory_bytes=memory,
                **fields,
            ),
            make_runner=make_runner,
        )
        return core

    yield build
    torch.set_num_threads(threads)
    library.activate("off")
