"""Two requests share an answer exactly when everything that decides it is equal."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from meshserve.v1 import gateway_pb2, types_pb2
from services.gateway.cache_key import cache_key, is_deterministic

Change = Callable[[gateway_pb2.GenerateRequest], None]


def request() -> gateway_pb2.GenerateRequest:
    return gateway_pb2.GenerateRequest(
        model="m",
        text="hello",
        sampling=types_pb2.SamplingParams(
            temperature=0.5, seed=1, logit_bias={5: 1.0, 7: 2.0}, banned_token_ids=[1, 2]
        ),
        stopping=types_pb2.StoppingCriteria(stop_strings=["a", "b"], stop_token_ids=[3, 4]),
    )


def key(
    source: gateway_pb2.GenerateRequest,
    tenant: str = "t",
    model_revision: str = "r",
    policy_revision: str = "p",
) -> tuple[str, str, bytes]:
    made = cache_key(
        source, tenant=tenant, model_revision=model_revision, policy_revision=policy_revision
    )
    return made.scope, made.model, made.request


def set_field(path: str, value: object) -> Change:
    def change(target: gateway_pb2.GenerateRequest) -> None:
        *parents, name = path.split(".")
        part = target
        for parent in parents:
            part = getattr(part, parent)
        if isinstance(value, list):
            del getattr(part, name)[:]
            getattr(part, name).extend(value)
        elif isinstance(value, dict):
            getattr(part, name).clear()
            getattr(part, name).update(value)
        else:
            setattr(part, name, value)

    return change


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("text", "hello "),
        ("model", "n"),
        ("adapter", "x"),
        ("add_special_tokens", False),
        ("truncation", types_pb2.TRUNCATION_POLICY_DROP_OLDEST),
        ("constraint.regex", "a+"),
        ("output.logprobs", 0),
        ("output.echo", True),
        ("output.token_ids", True),
        ("sampling.seed", 2),
        ("sampling.temperature", 0.6),
        ("sampling.top_p", 0.5),
        ("sampling.n", 2),
        ("sampling.presence_penalty", 0.1),
        ("sampling.logit_bias", {5: 1.0}),
        ("sampling.banned_token_ids", [1]),
        ("stopping.max_tokens", 5),
        ("stopping.min_tokens", 5),
        ("stopping.ignore_eos", True),
        ("stopping.include_stop_in_text", True),
        ("stopping.stop_strings", ["a"]),
        ("stopping.stop_token_ids", [3]),
    ],
)
def test_what_decides_the_answer_decides_the_key(path: str, value: object) -> None:
    changed = request()
    set_field(path, value)(changed)
    assert key(changed) != key(request())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("request_id", "mine"),
        ("priority", 5),
        ("cache_control.ttl_s", 5),
        ("cache_control.no_store", True),
        ("sampling.banned_token_ids", [2, 1]),
        ("stopping.stop_token_ids", [4, 3]),
    ],
)
def test_what_does_not_is_left_out(path: str, value: object) -> None:
    changed = request()
    set_field(path, value)(changed)
    assert key(changed) == key(request())


def test_the_order_of_maps_is_of_no_account() -> None:
    biases = {i: float(i % 7) for i in range(200)}
    keys = set()
    for seed in range(5):
        shuffled = list(biases.items())
        random.Random(seed).shuffle(shuffled)
        changed = request()
        set_field("sampling.logit_bias", dict(shuffled))(changed)
        keys.add(key(changed))
    assert len(keys) == 1


def test_greedy_choice_forgets_what_only_shapes_a_draw() -> None:
    greedy, seeded = request(), request()
    set_field("sampling.temperature", 0.0)(greedy)
    set_field("sampling.temperature", 0.0)(seeded)
    seeded.sampling.seed, seeded.sampling.top_p, seeded.sampling.top_k = 9, 0.5, 5
    assert key(greedy) == key(seeded)
    assert seeded.sampling.seed == 9, "the request itself is left as it is"


def test_tenants_models_and_policies_are_kept_apart() -> None:
    same = key(request())
    assert key(request(), tenant="u") != same
    assert key(request(), model_revision="s") != same
    assert key(request(), policy_revision="q") != same
    assert key(request(), model_revision="rp", policy_revision="") != key(
        request(), model_revision="r", policy_revision="p"
    )


def test_only_what_can_be_repeated_is_deterministic() -> None:
    def sampled(**fields: object) -> gateway_pb2.GenerateRequest:
        return gateway_pb2.GenerateRequest(sampling=types_pb2.SamplingParams(**fields))  # type: ignore[arg-type]

    assert is_deterministic(sampled(temperature=0))
    assert is_deterministic(sampled(temperature=1, seed=0))
    assert is_deterministic(sampled(top_k=1))
    processor = types_pb2.LogitsProcessor(name="plugin")
    assert not is_deterministic(sampled(temperature=0, logits_processors=[processor]))
    assert not is_deterministic(sampled())
    assert not is_deterministic(sampled(temperature=1))
    assert not is_deterministic(sampled(top_k=0))
