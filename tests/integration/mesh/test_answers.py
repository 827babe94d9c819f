"""The main job: real answers from the real model through five services."""

from __future__ import annotations

import uuid

import pytest

import meshserve
from tests.support.mesh import Mesh

QUESTION = "What is the capital of France?"


def test_chat_streams_a_sensible_answer(mesh: Mesh) -> None:
    with mesh.client() as client, client.stream_chat(QUESTION, temperature=0) as stream:
        pieces = [chunk.text for chunk in stream]
    assert "Paris" in "".join(pieces)
    assert len(pieces) > 3


def test_a_stream_and_a_single_answer_say_the_same(mesh: Mesh) -> None:
    with mesh.client() as client:
        whole = client.chat(QUESTION, temperature=0, max_tokens=20, cache=False)
        with client.stream_chat(QUESTION, temperature=0, max_tokens=20, cache=False) as stream:
            collected = stream.collect()
    assert collected.text == whole.text
    assert collected.usage == whole.usage
    assert collected.choices[0].finish_reason == whole.choices[0].finish_reason


def test_the_second_equal_deterministic_request_comes_from_the_cache(mesh: Mesh) -> None:
    prompt = f"Tell me one fact about the number {uuid.uuid4().int % 10**9}."
    with mesh.client() as client:
        first = client.chat(prompt, temperature=0, max_tokens=24)
        generated = mesh.metric("engine", "meshserve_engine_generated_tokens_total")
        second = client.chat(prompt, temperature=0, max_tokens=24)
        with client.stream_chat(prompt, temperature=0, max_tokens=24) as stream:
            pieces = [chunk.text for chunk in stream]
            replayed = stream.collect()
    assert not first.cached
    assert second.cached
    assert replayed.cached
    assert (second.text, second.usage) == (first.text, first.usage)
    assert (replayed.text, replayed.usage) == (first.text, first.usage)
    assert len(pieces) > 3, "a replayed stream is still a stream"
    assert mesh.metric("engine", "meshserve_engine_generated_tokens_total") == generated


def test_sampled_requests_are_not_cached_unless_they_bring_a_seed(mesh: Mesh) -> None:
    prompt = f"Write a short poem about {uuid.uuid4().hex}."
    with mesh.client() as client:
        assert not any(client.chat(prompt, temperature=1.0, max_tokens=8).cached for _ in range(2))
        seeded = [client.chat(prompt, temperature=1.0, seed=7, max_tokens=8) for _ in range(2)]
    assert [answer.cached for answer in seeded] == [False, True]


def test_a_caller_may_forgo_the_cache(mesh: Mesh) -> None:
    with mesh.client() as client:
        client.chat(QUESTION, temperature=0, max_tokens=12)
        assert client.chat(QUESTION, temperature=0, max_tokens=12).cached
        assert not client.chat(QUESTION, temperature=0, max_tokens=12, cache=False).cached


def test_a_seed_makes_a_sampled_answer_repeatable(mesh: Mesh) -> None:
    with mesh.client() as client:
        answers = {
            client.generate(
                "Once upon a time", temperature=1.2, seed=42, max_tokens=24, cache=False
            ).text
            for _ in range(3)
        }
        other = client.generate(
            "Once upon a time", temperature=1.2, seed=43, max_tokens=24, cache=False
        ).text
    assert len(answers) == 1
    assert other not in answers


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_end_an_answer_across_token_borders(mesh: Mesh, include: bool) -> None:
    with mesh.client() as client:
        free = client.chat(QUESTION, temperature=0, max_tokens=20, cache=False).text
        # A stop that begins and ends inside words is no sequence of whole tokens.
        middle = len(free) // 2
        stop = free[middle - 2 : middle + 3]
        end = free.index(stop) + (len(stop) if include else 0)
        answer = client.chat(
            QUESTION,
            temperature=0,
            max_tokens=20,
            stop=[stop, "never said"],
            include_stop_in_text=include,
            cache=False,
        )
        with client.stream_chat(
            QUESTION,
            temperature=0,
            max_tokens=20,
            stop=[stop, "never said"],
            include_stop_in_text=include,
            cache=False,
        ) as stream:
            pieces = [chunk.text for chunk in stream]
    assert answer.text == free[:end]
    assert "".join(pieces) == free[:end]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].matched_stop == stop


def test_usage_counts_the_tokens(mesh: Mesh) -> None:
    with mesh.client() as client:
        answer = client.generate("Count with me: one, two,", temperature=0, max_tokens=5)
        counted = client.count_tokens("Count with me: one, two,")
    assert answer.usage.prompt_tokens == counted.tokens
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].finish_reason == "length"


def test_token_ids_are_a_prompt_like_its_text(mesh: Mesh) -> None:
    with mesh.client() as client:
        text = client.generate(
            "The sky is", temperature=0, max_tokens=6, return_token_ids=True, cache=False
        )
        more = client.generate(
            [int(token) for token in text.choices[0].token_ids],
            temperature=0,
            max_tokens=3,
            cache=False,
        )
    assert len(text.choices[0].token_ids) == 6
    assert more.usage.prompt_tokens == 6


def test_several_choices_are_told_apart(mesh: Mesh) -> None:
    with mesh.client() as client:
        answer = client.generate(
            "The best thing is", temperature=1.0, n=3, max_tokens=8, ignore_eos=True
        )
        with client.stream_generate(
            "The best thing is", temperature=1.0, n=3, max_tokens=8
        ) as stream:
            collected = stream.collect()
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 24
    assert [choice.index for choice in collected.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) > 1


def test_the_models_are_listed_with_what_they_can_do(mesh: Mesh) -> None:
    with mesh.client() as client:
        (model,) = client.models()
        assert client.model("demo") == model
    assert model.name == "smollm2-135m"
    assert model.ready
    assert model.is_default
    assert set(model.capabilities) >= {"generate", "chat"}
    assert model.context_tokens == 2048
    assert model.dtype == "float32"


def test_an_alias_is_the_model(mesh: Mesh) -> None:
    with mesh.client() as client:
        assert client.chat(QUESTION, model="demo", temperature=0, max_tokens=4).model == (
            "smollm2-135m"
        )


async def test_the_asyncio_client_streams_too(mesh: Mesh) -> None:
    async with (
        mesh.async_client() as client,
        client.stream_chat(QUESTION, temperature=0, max_tokens=12) as stream,
    ):
        text = "".join([chunk.text async for chunk in stream])
    assert "Paris" in text


def test_the_whole_conversation_reaches_the_model(mesh: Mesh) -> None:
    conversation = [
        {"role": "user", "content": "My favourite colour is green."},
        {"role": "assistant", "content": "Green is a fine colour."},
        meshserve.Message(role="user", content="Repeat: my favourite colour is"),
    ]
    with mesh.client() as client:
        answer = client.chat(conversation, temperature=0, max_tokens=16, repetition_penalty=1.0)
        alone = client.chat(conversation[-1:], temperature=0, max_tokens=16, repetition_penalty=1.0)
        counted = client.count_tokens(conversation)
    assert answer.usage.prompt_tokens == counted.tokens > alone.usage.prompt_tokens
    assert "green" in answer.text.lower()
    assert "green" not in alone.text.lower()
