"""Rules of all kinds compile or are refused, in little time and memory, whoever wrote them."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from services.engine.core.constraints import checking
from services.engine.core.constraints.compilation import Compilation, Compiler
from services.engine.core.constraints.vocabulary import Vocabulary, read_vocabulary
from services.engine.core.errors import ConstraintsUnavailableError, InvalidConstraintError
from services.engine.core.messages import Constraint
from tests.fakes.json_schemas import random_schema
from tests.fakes.small_llama import save_small_llama
from tests.support.waiting import wait_until

DEEP = 100_000


def compiled(compiler: Compiler, kind: str, text: str) -> Compilation:
    compilation = compiler.compile(Constraint(kind, text))  # type: ignore[arg-type]
    wait_until(lambda: compilation.done, "the rule is compiled", timeout_s=60)
    assert (compilation.grammar is None) != (compilation.error is None)
    return compilation


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("json_schema", "{", "not JSON"),
        ("json_schema", "3", "an object, or true"),
        ("json_schema", '{"minimum": NaN}', "NaN is not JSON"),
        ("json_schema", '{"type": "strng"}', "Invalid type: strng"),
        ("json_schema", '{"not": {"const": 1}}', r'Unimplemented keys: \["not"\]'),
        ("json_schema", '{"uniqueItems": true, "type": "array"}', "uniqueItems"),
        ("json_schema", '{"type": "string", "format": "frob"}', "Unknown format: frob"),
        ("json_schema", '{"$ref": "#/nope"}', "Pointer '/nope' does not exist"),
        ("json_schema", '{"$ref": "http://example.com/a.json"}', "does not fetch"),
        ("json_schema", '{"$ref": "#"}', "."),
        ("json_schema", '{"type": "string", "minLength": 5, "maxLength": 3}', "greater than"),
        ("json_schema", '{"type": "string", "pattern": "(?=a)b"}', "look-around"),
        ("json_schema", '{"items":' * DEEP, "nested too deeply"),
        ("regex", "(", "unclosed group"),
        ("regex", r"\bword\b", "lookarounds"),
        ("regex", "", "empty text"),
        ("regex", "(" * DEEP + ")" * DEEP, "."),
        ("choice", '[""]', "empty text"),
        ("grammar", "start: nowhere", "nowhere"),
        ("grammar", "start: start", "."),
        ("grammar", 'root ::= "a', "."),
        ("grammar", '%llguidance {"no_forcing": false}\nstart: "a"', "no options"),
        ("grammar", "start: " + "(" * DEEP + '"a"' + ")" * DEEP, "."),
    ],
)
def test_what_is_wrong_with_a_rule_is_said(
    compiler: Compiler, kind: str, text: str, says: str
) -> None:
    error = compiled(compiler, kind, text).error
    assert isinstance(error, InvalidConstraintError)
    with pytest.raises(InvalidConstraintError, match=says):
        raise error
    assert 0 < len(str(error)) <= 600
    assert "llguidance {" not in str(error), "what we put around a rule is no concern of its author"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", "true"),
        ("json_schema", "{}"),
        ("json_schema", '{"type": "object"}'),
        ("json_schema", '{"x-guidance": {"whitespace_flexible": 3}, "type": "integer"}'),
        ("json_schema", '{"title": "A", "description": "b", "examples": [1], "default": 2}'),
        ("regex", "^abc$"),
        ("regex", "a/b\n"),
        ("choice", '["a", "a", "ab"]'),
        ("grammar", 'start: "a" start? // Lark'),
        ("grammar", 'root ::= [a-z]+ ("," root)? # GBNF'),
    ],
)
def test_what_people_write_compiles(compiler: Compiler, kind: str, text: str) -> None:
    assert compiled(compiler, kind, text).error is None


def test_a_rule_is_compiled_once_and_kept_while_there_is_room(vocabulary: Vocabulary) -> None:
    compiler = Compiler(lambda: vocabulary)
    first = compiled(compiler, "regex", "a+")
    assert compiler.compile(Constraint("regex", "a+")) is first
    assert compiler.compile(Constraint("regex", "a+b")) is not first
    assert compiler.compile(Constraint("choice", '["a+"]')) is not first
    for number in range(300):
        compiler.compile(Constraint("regex", f"a{{{number + 1}}}"))
    assert len(compiler._kept) <= 256
    again = compiled(compiler, "regex", "a+")
    assert again is not first
    wait_until(lambda: compiler.counts.compiled == 304, "all are compiled", timeout_s=60)
    assert compiler.counts.found == 1


def test_what_takes_too_long_is_given_up_and_the_next_rule_compiled(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "_CHECK_TIMEOUT_S", 0.001)
    compiler = Compiler(lambda: vocabulary)
    slow = json.dumps({"enum": [f"value {number} of many" for number in range(100_000)]})
    error = compiled(compiler, "json_schema", slow).error
    assert isinstance(error, InvalidConstraintError)
    assert "more than 2 s" in str(error)
    monkeypatch.undo()
    assert compiled(compiler, "regex", "a").error is None


def test_what_needs_too_much_memory_is_given_up_and_the_next_rule_compiled(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "MAX_MEMORY_BYTES", 8 << 20)
    compiler = Compiler(lambda: vocabulary)
    large = json.dumps({"enum": [f"value {number} of many" for number in range(30_000)]})
    error = compiled(compiler, "json_schema", large).error
    assert isinstance(error, InvalidConstraintError)
    assert "memory" in str(error)
    assert compiled(compiler, "regex", "a").error is None


def test_a_model_whose_tokens_are_not_known_follows_no_rules(tmp_path: Path) -> None:
    save_small_llama(tmp_path)
    compiler = Compiler(lambda: read_vocabulary(tmp_path, 97, (2,)))
    for _ in range(2):
        error = compiled(compiler, "regex", "a").error
        assert isinstance(error, ConstraintsUnavailableError)
        assert "tokenizer.json" in str(error)
    assert compiler.counts.compiled == 2


def test_damaged_rules_are_refused_or_compiled_within_seconds(compiler: Compiler) -> None:
    chance = random.Random(5)
    keywords = ["type", "$ref", "anyOf", "allOf", "pattern", "items", "minItems", "required", "not"]
    values = [None, -1, 10**30, "#", "", [], {}, True, "(a|b*)*{9}", [{}], "integer", 1e308]
    sources: list[tuple[str, str]] = []
    for _ in range(80):
        schema = random_schema(chance)
        text = json.dumps(schema)
        match chance.randrange(3):
            case 0:  # cut, doubled or mixed up
                start, end = sorted(chance.choices(range(len(text)), k=2))
                text = text[:start] + text[end:] + chance.choice(["", text, "}" * 9])
            case 1:  # a keyword that means something else
                schema[chance.choice(keywords)] = chance.choice(values)
                text = json.dumps(schema)
            case 2:  # deep
                for _ in range(chance.choice([5, 60, 200])):
                    schema = {chance.choice(["items", "additionalProperties"]): schema}
                text = json.dumps({**schema, "type": chance.choice(["array", "object"])})
        sources.append(("json_schema", text))
    alphabet = 'ab01(){}[]|*+?.^$\\dw,-:/"\n'
    for kind in ("regex", "grammar"):
        for _ in range(40):
            text = "".join(chance.choices(alphabet, k=chance.randrange(1, 60)))
            sources.append((kind, text if kind == "regex" else f"start: {text}"))
    sources += [
        ("regex", "(((a{1,99}){1,99}){1,99}){1,99}"),
        ("regex", "(.*a.{25}|.*b.{25})+"),
        ("regex", "a{1000000}"),
        ("json_schema", json.dumps({"type": "array", "minItems": 10**9, "items": {}})),
        ("json_schema", json.dumps({"type": "string", "minLength": 10**9})),
        ("json_schema", json.dumps({"properties": {f"p{i}": {} for i in range(2000)}})),
        ("grammar", "start: " + "a_ " * 5000 + "\na_: a_ a_ | "),
    ]
    slowest_s = 0.0
    for kind, text in sources:
        begun_s = time.process_time()
        error = compiled(compiler, kind, text).error
        # Of this process: what a step would be kept from.
        slowest_s = max(slowest_s, time.process_time() - begun_s)
        assert error is None or isinstance(error, InvalidConstraintError), (kind, text, error)
    assert slowest_s < 5
