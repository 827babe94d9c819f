"""What a request may ask for beside its text, through five services."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import meshserve
from services.tokenizer.model_tokenizer import load_model_tokenizer
from tests.fakes import logits_plugins
from tests.support.mesh import Mesh

TEXT = "The capital of France is Paris, and the capital of Italy is Rome."


@pytest.fixture(scope="module")
def judge(demo_model_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        demo_model_path.parent, gguf_file=demo_model_path.name, dtype=torch.float32
    ).eval()


@pytest.mark.slow
def test_a_prompt_is_scored_as_transformers_scores_it(
    mesh: Mesh, judge: Any, demo_model_path: Path
) -> None:
    token_ids = list(load_model_tokenizer(demo_model_path).encode(TEXT).token_ids)
    with torch.inference_mode():
        expected = judge(torch.tensor([token_ids])).logits[0].log_softmax(dim=-1)
    options = {"temperature": 0, "max_tokens": 2, "cache": False}
    with mesh.client() as client:
        client.generate(TEXT, **options)  # so that all of it is in the engine's prefix cache
        answer = client.generate(TEXT, prompt_logprobs=3, n=2, **options)
        with client.stream_generate(TEXT, prompt_logprobs=3, **options) as stream:
            streamed = stream.collect()
        echoed = client.generate(TEXT, echo=True, logprobs=3, **options)
        plain = client.generate(TEXT, **options)
    assert streamed.usage.cached_prompt_tokens == 0
    assert len(answer.prompt_logprobs) == len(token_ids) - 1
    for position, entry in enumerate(answer.prompt_logprobs):
        following = token_ids[position + 1]
        assert entry.chosen.token_id == following
        assert entry.chosen.logprob == pytest.approx(float(expected[position, following]), abs=1e-3)
        likeliest = expected[position].topk(3)
        assert [each.token_id for each in entry.top] == likeliest.indices.tolist()
        assert [each.logprob for each in entry.top] == pytest.approx(
            likeliest.values.tolist(), abs=1e-3
        )
    assert streamed.prompt_logprobs == answer.prompt_logprobs == echoed.prompt_logprobs
    assert echoed.text == TEXT + plain.text
    assert len(echoed.choices[0].logprobs) == 2
    assert plain.prompt_logprobs == ()


def test_a_conversation_is_scored_as_its_template_makes_it(mesh: Mesh) -> None:
    options = {"temperature": 0, "max_tokens": 2, "prompt_logprobs": 1, "cache": False}
    with mesh.client() as client:
        answer = client.chat(TEXT, **options)
        with client.stream_chat(TEXT, **options) as stream:
            streamed = stream.collect()
    assert len(answer.prompt_logprobs) == answer.usage.prompt_tokens - 1
    assert all(
        entry.chosen.logprob <= entry.top[0].logprob <= 0 for entry in answer.prompt_logprobs
    )
    assert streamed.prompt_logprobs == answer.prompt_logprobs


@pytest.mark.slow
def test_beams_are_those_of_transformers(mesh: Mesh, judge: Any, demo_model_path: Path) -> None:
    token_ids = list(load_model_tokenizer(demo_model_path).encode(TEXT).token_ids)
    expected = judge.generate(
        torch.tensor([token_ids]),
        attention_mask=torch.ones(1, len(token_ids), dtype=torch.long),
        num_beams=4,
        num_return_sequences=2,
        length_penalty=0.5,
        do_sample=False,
        max_new_tokens=10,
    )
    options = {"beam_width": 4, "n": 2, "length_penalty": 0.5, "max_tokens": 10}
    with mesh.client() as client:
        answer = client.generate(TEXT, return_token_ids=True, logprobs=0, cache=False, **options)
        with client.stream_generate(TEXT, cache=False, **options) as stream:
            streamed = stream.collect()
    for choice, wanted in zip(answer.choices, expected[:, len(token_ids) :].tolist(), strict=True):
        assert list(choice.token_ids) == wanted[: len(choice.token_ids)]
        assert len(choice.logprobs) == len(choice.token_ids)
    assert [choice.text for choice in streamed.choices] == [
        choice.text for choice in answer.choices
    ]


def test_the_best_of_several_are_the_likeliest(mesh: Mesh) -> None:
    options = {"temperature": 1.0, "seed": 11, "max_tokens": 12, "stop": [" the"], "cache": False}
    with mesh.client() as client:
        drawn = client.generate(TEXT, n=6, logprobs=0, **options)
        best = client.generate(TEXT, n=2, best_of=6, **options)
    ranked = sorted(
        drawn.choices, key=lambda choice: -mean(each.chosen.logprob for each in choice.logprobs)
    )
    assert [choice.index for choice in best.choices] == [0, 1]
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert [choice.finish_reason for choice in best.choices] == [
        choice.finish_reason for choice in ranked[:2]
    ]
    assert best.choices[0].logprobs == ()
    assert best.usage.completion_tokens == drawn.usage.completion_tokens


def test_the_best_of_several_cannot_be_streamed(mesh: Mesh) -> None:
    with (
        mesh.client() as client,
        pytest.raises(meshserve.InvalidRequestError) as caught,
        client.stream_generate(TEXT, n=1, best_of=3) as stream,
    ):
        stream.collect()
    assert caught.value.fields[0].path == "request.sampling.best_of"


def test_a_conversation_that_is_too_long_loses_its_oldest_turns(mesh: Mesh) -> None:
    system = {"role": "system", "content": "Answer in one word."}
    turns = [
        {"role": role, "content": f"{number} " * 60}
        for number in range(12)
        for role in ("user", "assistant")
    ]
    last = {"role": "user", "content": "What is the capital of France?"}
    options = {"temperature": 0, "max_tokens": 8, "cache": False}
    with mesh.client() as client:
        with pytest.raises(meshserve.InvalidRequestError):
            client.chat([system, *turns, last], **options)
        cut = client.chat([system, *turns, last], truncation="drop_oldest", **options)
        fitting = next(
            rest
            for first in range(0, len(turns) + 1, 2)
            if client.count_tokens(rest := [system, *turns[first:], last]).tokens <= 2048 - 8
        )
        whole = client.chat(fitting, **options)
        with pytest.raises(meshserve.InvalidRequestError):
            client.chat([system, *turns, last], truncation="drop_newest", **options)
    assert len(fitting) < len(turns) + 2
    assert cut.text == whole.text
    assert cut.usage.prompt_tokens == whole.usage.prompt_tokens


def test_min_tokens_holds_back_every_end(mesh: Mesh) -> None:
    options = {"temperature": 0, "max_tokens": 24, "cache": False}
    with mesh.client() as client:
        free = client.generate(TEXT, ignore_eos=True, return_token_ids=True, **options)
        stop = free.text[2:5]
        ended = client.generate(TEXT, ignore_eos=True, stop=[stop], **options)
        held = client.generate(TEXT, ignore_eos=True, stop=[stop], min_tokens=16, **options)
    assert ended.usage.completion_tokens < 16 <= held.usage.completion_tokens
    assert free.text.startswith(held.text)


@pytest.mark.slow
def test_a_logits_processor_is_installed_named_and_refused_by_name(
    tmp_path: Path, demo_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    logits_plugins.install(packages)
    monkeypatch.setenv("PYTHONPATH", f"{packages}{os.pathsep}{Path(__file__).parents[3]}")
    options = {"temperature": 0, "max_tokens": 4, "return_token_ids": True}
    with Mesh(tmp_path) as own, own.client() as client:
        plain = client.generate([5, 6], **options)
        processor = {"name": "count-down", "arguments": {"start": 300}}
        counted = client.generate([5, 6], n=2, logits_processors=[processor], **options)
        with pytest.raises(meshserve.InvalidRequestError, match="count-down") as refused:
            client.generate([5, 6], logits_processors=["count-up"], **options)
        with pytest.raises(meshserve.ServerError):
            client.generate([5, 6], logits_processors=["raises"], **options)
        again = client.generate([5, 6], cache=False, **options)
    assert [choice.token_ids for choice in counted.choices] == [(305, 304, 303, 302)] * 2
    assert refused.value.fields[0].path == "sampling.logits_processors[0].name"
    assert again.choices[0].token_ids == plain.choices[0].token_ids
