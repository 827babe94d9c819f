"""A Gemma 3 through the whole mesh: chat template, stream, a prompt in chunks, and the death of
its engine's core."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import meshserve
from tests.fakes.decoder_families import save_model, served
from tests.fakes.spelling_llama import (
    VOCAB_SIZE,
    save_spelling_tokenizer,
    spelled,
    tokens_of,
)
from tests.support.mesh import Mesh
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NEW_TOKENS = 16
GREEDY = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "cache": False}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Where it is, with tokenizer and template, and the model."""
    path = tmp_path_factory.mktemp("gemma")
    changes = served("gemma3", vocab_size=VOCAB_SIZE, max_position_embeddings=1024)
    reference = save_model("gemma3", path, **changes)
    save_spelling_tokenizer(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path, reference


@pytest.fixture(scope="module")
def mesh(
    gemma: tuple[Path, Any], demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mesh]:
    models = {"gemma": {"source": str(gemma[0]), "dtype": "float32"}}
    with Mesh(tmp_path_factory.mktemp("mesh"), {"models": models}) as started:
        yield started


def completed(reference: Any, prompt: str) -> list[int]:
    """What transformers goes on with."""
    token_ids = tokens_of(prompt)
    ids = reference.generate(
        torch.tensor([token_ids]),
        attention_mask=torch.ones(1, len(token_ids), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
    )
    found: list[int] = ids[0, len(token_ids) :].tolist()
    return found


def cores_of(mesh: Mesh) -> list[psutil.Process]:
    """The core processes of all engines."""
    assert mesh._process is not None
    return [
        child
        for child in psutil.Process(mesh._process.pid).children(recursive=True)
        if "services.engine.core.process" in child.cmdline()
    ]


def test_it_chats_streams_reads_long_prompts_and_comes_back(
    mesh: Mesh, gemma: tuple[Path, Any]
) -> None:
    _, reference = gemma
    expected = completed(reference, "<user>Hello<assistant>")
    with mesh.client(timeout=120) as client:
        answer = client.chat("Hello", model="gemma", return_token_ids=True, **GREEDY)
        assert list(answer.choices[0].token_ids) == expected
        assert answer.text == spelled(expected).decode(errors="replace")
        with client.stream_chat("Hello", model="gemma", **GREEDY) as stream:
            assert stream.collect().text == answer.text
        prompt = "A prompt of more tokens than a step takes. " * 16
        long = client.generate(prompt, model="gemma", return_token_ids=True, **GREEDY)
        assert list(long.choices[0].token_ids) == completed(reference, prompt)

        cores = cores_of(mesh)
        assert cores
        for core in cores:
            core.send_signal(signal.SIGKILL)

        def answers_again() -> bool:
            try:
                again = client.chat("Hello", model="gemma", **GREEDY)
            except meshserve.MeshServeError:
                return False
            return again.text == answer.text

        wait_until(answers_again, "the core is back", 120)
