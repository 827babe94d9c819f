"""Random JSON Schemas whose instances are short."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]


def random_schema(chance: random.Random) -> Schema:
    """A schema of the features that people use, nested a few levels."""
    schema = _any(chance, 3)
    if "$ref" not in str(schema):
        return schema
    node = {
        "type": "object",
        "properties": {
            "v": _leaf(chance),
            "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
        },
        "required": ["v", "next"],
        "additionalProperties": False,
    }
    return {"$defs": {"node": node, "leaf": _leaf(chance)}, **schema}


def _any(chance: random.Random, depth: int) -> Schema:
    if depth == 0 or chance.random() < 0.2:
        return _leaf(chance)
    return chance.choice([_object, _object, _array, _any_of, _reference])(chance, depth)


def _object(chance: random.Random, depth: int) -> Schema:
    names = chance.sample(["a", "b c", "name", "é", "x_1", '"'], chance.randint(1, 3))
    schema: Schema = {
        "type": "object",
        "properties": {name: _any(chance, depth - 1) for name in names},
        "required": chance.sample(names, chance.randint(0, len(names))),
        "additionalProperties": False,
    }
    if chance.random() < 0.2:
        schema["patternProperties"] = {"^z[0-9]$": {"type": "boolean"}}
    return schema


def _array(chance: random.Random, depth: int) -> Schema:
    least = chance.randint(0, 2)
    schema = {"type": "array", "minItems": least, "maxItems": least + chance.randint(0, 2)}
    if chance.random() < 0.3:
        prefix = [_any(chance, depth - 1) for _ in range(2)]
        return {"type": "array", "prefixItems": prefix, "items": False, "minItems": 1}
    return {**schema, "items": _any(chance, depth - 1)}


def _any_of(chance: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(chance, depth - 1) for _ in range(chance.randint(2, 3))]}


def _reference(chance: random.Random, depth: int) -> Schema:
    return {"$ref": chance.choice(["#/$defs/node", "#/$defs/leaf"])}


def _leaf(chance: random.Random) -> Schema:
    low = chance.randint(-50, 50)
    shortest = chance.randint(0, 3)
    return chance.choice(
        [
            {"type": "string", "minLength": shortest, "maxLength": shortest + 3},
            {"type": "string", "pattern": "^[A-C]{2}-[0-9]{1,3}$"},
            {"type": "string", "enum": ["red", "grün", 'say "no"']},
            {"type": "string", "format": "ipv4"},
            {"const": {"k": [1, None]}},
            {"enum": ["a", 3, None, False]},
            {"type": "integer", "minimum": low, "maximum": low + chance.randint(0, 200)},
            {"type": "integer", "exclusiveMinimum": low, "multipleOf": 7, "maximum": low + 40},
            {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
            {"type": ["boolean", "null"]},
        ]
    )
