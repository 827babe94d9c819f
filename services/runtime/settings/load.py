"""Reads the YAML file and the environment into Settings, or says what to mend."""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from services.runtime.settings.schema import Settings

ENVIRONMENT_PREFIX = "MESHSERVE_"
NESTING_SEPARATOR = "__"
CONFIG_VARIABLE = "MESHSERVE_CONFIG"
# Variables with the prefix that are not settings.
RESERVED_VARIABLES = frozenset(
    {
        CONFIG_VARIABLE,
        "MESHSERVE_CACHE",
        "MESHSERVE_STATE",
        "MESHSERVE_TARGET",
        "MESHSERVE_API_KEY",
        "MESHSERVE_TLS_CA",
    }
)


class SettingsError(Exception):
    """The settings cannot be used. Its text lists every problem, one a line."""


def load_settings(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from `path`, or from the file that MESHSERVE_CONFIG names, or the defaults alone.

    `MESHSERVE_GATEWAY__LISTEN=0.0.0.0:50051` overrides `gateway.listen`; values are read as YAML.
    Raises SettingsError.
    """
    environ = os.environ if environ is None else environ
    if path is None and environ.get(CONFIG_VARIABLE):
        path = Path(environ[CONFIG_VARIABLE])
    document: Any = {}
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{path}: cannot be read: {error}") from error
        try:
            document = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SettingsError(f"{path}: not valid YAML: {error}") from error
    return parse_settings(document, environ, source=str(path) if path else "settings")


def parse_settings(
    document: Any, environ: Mapping[str, str], *, source: str = "settings"
) -> Settings:
    """Validates a parsed YAML document with the environment laid over it."""
    document = {} if document is None else document
    if not isinstance(document, dict):
        raise SettingsError(f"{source}: expected a mapping of sections at the top")
    merged = _overlay(document, environ)
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        problems = "\n".join(f"{source}: {line}" for line in _describe(error))
        raise SettingsError(problems) from None


def _overlay(document: dict[Any, Any], environ: Mapping[str, str]) -> dict[Any, Any]:
    merged = {
        key: dict(value) if isinstance(value, dict) else value for key, value in document.items()
    }
    for name in sorted(environ):
        if not name.startswith(ENVIRONMENT_PREFIX) or name in RESERVED_VARIABLES:
            continue
        keys = name.removeprefix(ENVIRONMENT_PREFIX).lower().split(NESTING_SEPARATOR)
        node = merged
        for depth, key in enumerate(keys[:-1]):
            child = node.get(key)
            if child is None:
                child = {}
            elif not isinstance(child, dict):
                raise SettingsError(
                    f"{name}: {'.'.join(keys[: depth + 1])} is not a section that holds keys"
                )
            node[key] = dict(child)
            node = node[key]
        try:
            node[keys[-1]] = yaml.safe_load(environ[name])
        except yaml.YAMLError as error:
            raise SettingsError(f"{name}: not a valid YAML value: {error}") from error
    return merged


def _describe(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        location = tuple(problem["loc"])
        path = ".".join(str(part) for part in location)
        if problem["type"] == "extra_forbidden":
            known = _keys_at(location[:-1])
            near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            yield f"{path}: unknown key; {hint}"
        elif problem["type"] == "missing":
            yield f"{path}: required and missing"
        elif problem["type"] == "value_error":
            text = str(problem["ctx"]["error"])
            yield f"{path}: {text}" if path else text
        else:
            message = problem["msg"]
            yield f"{path}: {message[0].lower()}{message[1:]}, not {problem['input']!r}"


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys that the schema knows at a place in the file."""
    current: Any = Settings
    for part in location:
        current = _child(current, part)
    if isinstance(current, type) and issubclass(current, BaseModel):
        return list(current.model_fields)
    return []


def _child(annotation: Any, part: int | str) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(str(part))
        return _without_none(field.annotation) if field else None
    arguments = [a for a in typing.get_args(annotation) if a is not Ellipsis]
    return _without_none(arguments[-1]) if arguments else None


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [a for a in typing.get_args(annotation) if a is not type(None)]
        return members[0]
    return annotation
