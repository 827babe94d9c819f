"""From what a caller sends to a grammar in the notation of llguidance (a variant of Lark).

A caller's text is parsed here in Python, in ways that take time and memory of their own: for the
process that checks (`checker`) alone.
"""

from __future__ import annotations

import json
import re
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from services.engine.core.errors import InvalidConstraintError
from services.engine.core.messages import Constraint

# A mask allows every token that a completion may go on with; without this, where only one text can
# follow, it would allow only the one token that an encoder would choose.
_OPTIONS = '%llguidance {"no_forcing": true}\n'
# JSON allows white space without end, which models in doubt produce. This much in a row is enough
# for a document of fifteen levels, indented by two.
_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,32}"
_OWN_OPTIONS = re.compile(r"^\s*%llguidance\b", re.MULTILINE)


def lark_source(constraint: Constraint) -> str:
    """The grammar that a completion under `constraint` follows.

    Raises:
        InvalidConstraintError: it cannot be read.
    """
    match constraint.kind:
        case "json_schema":
            return _OPTIONS + "start: %json " + _schema(constraint.text)
        case "regex":
            grammar = json.loads(LLMatcher.grammar_from_regex(constraint.text))
            return _OPTIONS + str(grammar["grammars"][0]["lark_grammar"])
        case "choice":
            values = json.loads(constraint.text)
            return _OPTIONS + "start: " + " | ".join(map(json.dumps, values))
        case "grammar":
            return _OPTIONS + _grammar(constraint.text)


def _schema(text: str) -> str:
    try:
        schema: Any = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise InvalidConstraintError("the schema is nested too deeply") from None
    except ValueError as error:
        raise InvalidConstraintError(f"not JSON: {error}") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise InvalidConstraintError("a schema is an object, or true")
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": _WHITE_SPACE}})


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _grammar(text: str) -> str:
    if _OWN_OPTIONS.search(text):
        raise InvalidConstraintError("a grammar sets no options of the library (%llguidance)")
    try:
        return str(any_to_lark(text))
    except RecursionError:
        raise InvalidConstraintError("the grammar is nested too deeply") from None
    except (GbnfToLarkError, ValueError, IndexError) as error:
        raise InvalidConstraintError(str(error)) from None
