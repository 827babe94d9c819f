"""Answers that follow a rule, through five services."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

import meshserve
from tests.support.mesh import Mesh

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "hobbies": {
            "type": "array",
            "items": {"enum": ["chess", "tennis", "music"]},
            "maxItems": 3,
        },
    },
    "required": ["name", "age", "hobbies"],
    "additionalProperties": False,
}
PROMPT = "Describe a person as JSON with name, age and hobbies."
SUM = 'start: number (("+" | "-") number)+\nnumber: /[1-9][0-9]?/'


def test_every_choice_is_an_instance_of_the_schema(mesh: Mesh) -> None:
    with mesh.client() as client:
        answer = client.chat(
            PROMPT, json_schema=SCHEMA, n=3, temperature=1.0, seed=4, max_tokens=120, logprobs=1
        )
        with client.stream_chat(PROMPT, json_schema=SCHEMA, temperature=0, max_tokens=120) as one:
            streamed = one.collect()
    for choice in (*answer.choices, *streamed.choices):
        assert choice.finish_reason is meshserve.FinishReason.STOP
        jsonschema.validate(json.loads(choice.text), SCHEMA)
    assert len({choice.text for choice in answer.choices}) > 1


def test_other_rules_are_followed_as_well(mesh: Mesh) -> None:
    options = {"temperature": 0.8, "seed": 1, "max_tokens": 40}
    with mesh.client() as client:
        phone = client.generate("Call me: ", regex=r"[0-9]{3}-[0-9]{4}", **options)
        mood = client.generate("I feel", choice=["good", "so-so", "not good"], **options)
        numbers = client.generate("4 and 5 is ", grammar=SUM, **options)
    assert re.fullmatch(r"[0-9]{3}-[0-9]{4}", phone.text)
    assert mood.text in ("good", "so-so", "not good")
    assert re.match(r"[1-9][0-9]?[+-][1-9]", numbers.text)


@pytest.mark.parametrize(
    ("rule", "path", "says"),
    [
        ({"json_schema": {"not": {}}}, "json_schema", 'Unimplemented keys: ["not"]'),
        ({"json_schema": {"$ref": "#/$defs/a"}}, "json_schema", "does not exist"),
        ({"regex": "(a"}, "regex", "unclosed group"),
        ({"grammar": "start: a"}, "grammar", "unknown name"),
    ],
)
def test_what_is_wrong_with_a_rule_is_said_by_its_field(
    mesh: Mesh, rule: dict[str, object], path: str, says: str
) -> None:
    with mesh.client() as client, pytest.raises(meshserve.InvalidRequestError) as caught:
        client.generate("Hello", max_tokens=5, **rule)
    (field,) = caught.value.fields
    assert field.path == f"constraint.{path}"
    assert says in field.description


def test_the_cache_tells_rules_apart(mesh: Mesh) -> None:
    options = {"temperature": 0, "max_tokens": 10}
    with mesh.client() as client:
        texts = [
            client.generate("Yes or no? ", choice=choice, **options).text
            for choice in (None, ["yes", "no"], ["perhaps"], ["yes", "no"])
        ]
    assert texts[1] == texts[3]
    assert texts[1] in ("yes", "no")
    assert texts[2] == "perhaps"
    assert texts[0] not in texts[1:]
