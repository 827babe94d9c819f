"""The policy file: what is looked for, and what is done about it.

Immutable once read. Every problem of a file is found when it is read, and named with its place.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.resources
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

import re2
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from services.safety import injection
from services.safety.detectors import DETECTORS
from services.safety.patterns import PatternError, parse_pattern
from services.safety.sources import TermSource, compile_pattern
from services.safety.verdict import Action

DEFAULT_POLICY = "default"
# Part of every revision, as are the detectors' patterns: raised whenever the same file comes to
# decide differently by any other change.
DECISION_VERSION = 1
MAX_TERM_CHARS = 200
MAX_TERMS = 200_000
_CATEGORY_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}(\.[a-z][a-z0-9_]{0,39}){0,3}")


class PolicyError(Exception):
    """A policy file that cannot be used. Its text lists every problem, one a line."""


def _to_action(value: Any) -> Any:
    names = {action.name.lower(): action for action in Action}
    if isinstance(value, Action):
        return value
    if value not in names:
        raise ValueError(f"expected one of {', '.join(names)}, not {value!r}")
    return names[value]


ActionField = Annotated[Action, BeforeValidator(_to_action)]
Score = Annotated[float, Field(gt=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PatternTerm(_Part):
    """A bounded pattern of the policy's own (docs/safety.md)."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_.]{0,39}$")]
    pattern: Annotated[str, Field(min_length=1, max_length=2000)]
    ignore_case: bool = True
    score: Score = 1.0

    @model_validator(mode="after")
    def _can_be_compiled(self) -> Self:
        try:
            parsed = parse_pattern(self.pattern, ignore_case=self.ignore_case)
            compile_pattern(parsed.words)
            compile_pattern(rf"(?:{parsed.prefixes})\z")
        except PatternError as error:
            raise ValueError(f"pattern {self.name!r}: {error}") from None
        except re2.error as error:
            raise ValueError(f"pattern {self.name!r}: RE2 refuses it: {error}") from None
        return self


class Category(_Part):
    """One thing the policy knows: how it is recognised and what is done about it."""

    description: str = ""
    prompt: ActionField = Action.ALLOW
    completion: ActionField = Action.ALLOW
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    detectors: tuple[str, ...] = ()
    terms: tuple[str, ...] = ()
    term_score: Score = 1.0
    leet: bool = False
    patterns: tuple[PatternTerm, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        known = [*DETECTORS, injection.NAME]
        for name in self.detectors:
            if name not in known:
                raise ValueError(f"unknown detector {name!r}; {_nearest(name, known)}")
        if injection.NAME in self.detectors and Action.REDACT in (self.prompt, self.completion):
            raise ValueError(
                f"{injection.NAME} judges a text, not a place in it: use flag or block, not redact"
            )
        _check_terms(self.terms, leet=self.leet)
        if not (self.detectors or self.terms or self.patterns):
            raise ValueError("recognises nothing: give detectors, terms or patterns")
        return self


class Policy(_Part):
    """A whole policy. `name` comes from the settings, not from the file."""

    name: str = Field(DEFAULT_POLICY, exclude=True)
    description: str = ""
    replacement: Annotated[str, Field(max_length=200)] = "[redacted]"
    allow_terms: tuple[str, ...] = ()
    allow_patterns: tuple[PatternTerm, ...] = ()
    categories: dict[str, Category]

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for name in self.categories:
            if not _CATEGORY_NAME.fullmatch(name):
                raise ValueError(
                    f"category {name!r}: a name is lower-case words joined by dots, as `pii.email`"
                )
        _check_terms(self.allow_terms, leet=False)
        return self

    @property
    def revision(self) -> str:
        """Identifies what is decided: equal for equal content, whatever the layout of the file."""
        content = {
            "decisions": DECISION_VERSION,
            "policy": self.model_dump(mode="json"),
            "detectors": {name: made.pattern.words for name, made in DETECTORS.items()},
            "evidence": [
                [kind.kind, kind.weight, kind.terms, [made.pattern.words for made in kind.patterns]]
                for kind in injection.EVIDENCE
            ],
        }
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def load_policy(name: str, path: Path | None) -> Policy:
    """Reads a policy file, or the one that ships with the mesh. Raises PolicyError."""
    source = str(path) if path else f"policy {name!r}"
    try:
        text = (
            path.read_text(encoding="utf-8")
            if path is not None
            else importlib.resources.files("services.safety")
            .joinpath("policies", f"{DEFAULT_POLICY}.yaml")
            .read_text(encoding="utf-8")
        )
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"{source}: cannot be read: {error}") from None
    return parse_policy(text, name=name, source=source)


def parse_policy(text: str, *, name: str = DEFAULT_POLICY, source: str = "policy") -> Policy:
    """Reads the YAML text of a policy. Raises PolicyError with every problem and its place."""
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise PolicyError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(document, dict):
        raise PolicyError(f"{source}: expected a mapping with `categories` at the top")
    if "name" in document:
        raise PolicyError(f"{source}: name: unknown key; a policy is named in `safety.policies`")
    try:
        return Policy.model_validate({**document, "name": name})
    except ValidationError as error:
        problems = "\n".join(f"{source}: {line}" for line in _describe(error))
        raise PolicyError(problems) from None


def _check_terms(terms: tuple[str, ...], *, leet: bool) -> None:
    if len(terms) > MAX_TERMS:
        raise ValueError(f"{len(terms)} terms; at most {MAX_TERMS} are allowed")
    for number, term in enumerate(terms):
        if len(term) > MAX_TERM_CHARS:
            raise ValueError(f"terms.{number}: longer than {MAX_TERM_CHARS} characters")
        if not TermSource.folded(term, leet=leet):
            raise ValueError(f"terms.{number}: {term!r} is empty once it is folded")


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(sorted(known))}"


def _describe(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        location = problem["loc"]
        path = ".".join(str(part) for part in location)
        if problem["type"] == "extra_forbidden":
            keys = [key for key in _model_at(location).model_fields if key != "name"]
            yield f"{path}: unknown key; {_nearest(str(location[-1]), keys)}"
        elif problem["type"] == "missing":
            yield f"{path}: required and missing"
        elif problem["type"] == "value_error":
            message = str(problem["ctx"]["error"])
            yield f"{path}: {message}" if path else message
        else:
            message = problem["msg"]
            yield f"{path}: {message[0].lower()}{message[1:]}"


def _model_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    """The model whose unknown key is at the end of a location."""
    if len(location) == 1:
        return Policy
    return PatternTerm if "patterns" in location[:-1] else Category
