"""Reads the YAML file and the environment into Settings, or says what to mend."""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from services.runtime.health_check import PROBE_FILE_VARIABLE
from services.runtime.settings.gateway import ApiKeySettings
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
        PROBE_FILE_VARIABLE,
    }
)


# What Kubernetes puts into every pod for a Service whose name begins with `meshserve`.
KUBERNETES_SERVICE_LINK = re.compile(
    r"^(?!.*__).*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)$"
)
# Values that an error message must not repeat: a key pasted for its digest, a URL's password.
SECRET_KEYS = frozenset({"sha256", "url"})
LONGEST_VALUE_SHOWN = 80
KEYS_PATH = ("gateway", "auth", "keys")
_KEYS = TypeAdapter(tuple[ApiKeySettings, ...])


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
        document = _read_yaml(text, f"{path}: not valid YAML")
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
        overrides = {name: ".".join(_keys_of(name)) for name in environ if _is_override(name)}
        problems = "\n".join(
            f"{_origin(path, overrides, source)}: {line}" for path, line in _describe(error)
        )
        raise SettingsError(problems) from None


def parse_keys(text: bytes, settings: Settings, *, source: str) -> tuple[ApiKeySettings, ...]:
    """The API keys of `gateway.auth.keys_file`, which go with those of the settings. Raises
    SettingsError, whose text repeats no digest."""
    try:
        document = _read_yaml(text.decode(), f"{source}: not valid YAML")
        if not isinstance(document, list):
            raise SettingsError(f"{source}: expected a list of keys; that of none is []")
        keys = _KEYS.validate_python(document)
        settings.check_keys([*settings.gateway.auth.keys, *keys])
    except UnicodeDecodeError as error:
        raise SettingsError(f"{source}: cannot be read: {error.reason}") from error
    except ValidationError as error:
        problems = _describe(error, below=KEYS_PATH)
        raise SettingsError("\n".join(f"{source}: {line}" for _, line in problems)) from None
    except ValueError as error:
        raise SettingsError(f"{source}: {error}") from None
    return keys


def _is_override(name: str) -> bool:
    return (
        name.startswith(ENVIRONMENT_PREFIX)
        and name not in RESERVED_VARIABLES
        and not KUBERNETES_SERVICE_LINK.search(name)
    )


def _keys_of(name: str) -> list[str]:
    return name.removeprefix(ENVIRONMENT_PREFIX).lower().split(NESTING_SEPARATOR)


def _origin(path: str, overrides: Mapping[str, str], source: str) -> str:
    """Where the value at a path comes from: the variable that set it, or the file."""
    for name, overridden in overrides.items():
        if path == overridden or path.startswith(f"{overridden}."):
            return name
    return source


def _overlay(document: dict[Any, Any], environ: Mapping[str, str]) -> dict[Any, Any]:
    merged = {
        key: dict(value) if isinstance(value, dict) else value for key, value in document.items()
    }
    for name in sorted(environ):
        if not _is_override(name):
            continue
        keys = _keys_of(name)
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
        node[keys[-1]] = _read_yaml(environ[name], f"{name}: not a valid YAML value")
    return merged


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, where YAML's readers let the last one win, and
    takes `on`, `off`, `yes` and `no` for the words that they are, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Called for each mapping. Raises ConstructorError."""
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r} stands twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _read_yaml(text: str, problem: str) -> Any:
    try:
        return yaml.load(text, _StrictLoader)
    except RecursionError as error:
        raise SettingsError(f"{problem}: nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        # Its own text shows the line, which may hold a password.
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SettingsError(f"{problem}: {error.problem}{where}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # A ValueError comes of scalars that look like numbers or dates and are none.
        raise SettingsError(f"{problem}: {error}") from error


def _describe(error: ValidationError, below: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """The path and the text of each problem in what stands at a place in the file."""
    for problem in error.errors(include_url=False):
        location = tuple(problem["loc"])
        path = ".".join(str(part) for part in location)
        if problem["type"] == "extra_forbidden":
            known = _keys_at((*below, *location[:-1]))
            near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            yield path, f"{path}: unknown key; {hint}"
        elif problem["type"] == "missing":
            yield path, f"{path}: required and missing"
        elif problem["type"] == "value_error":
            text = str(problem["ctx"]["error"])
            yield path, f"{path}: {text}" if path else text
        else:
            message = problem["msg"]
            text = f"{path}: {message[0].lower()}{message[1:]}"
            if location[-1:] and location[-1] not in SECRET_KEYS:
                text += f", not {_shown(problem['input'])}"
            yield path, text


def _shown(value: Any) -> str:
    """A value on one short line; a mapping or a list may be of any size."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple | set):
        return "a list"
    try:
        text = repr(value)
    except ValueError:
        # An integer of more digits than Python prints.
        return "what it is"
    return text if len(text) <= LONGEST_VALUE_SHOWN else f"{text[:LONGEST_VALUE_SHOWN]}..."


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
