"""Sets fields of request messages so that a value that cannot travel is a clear error at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import grpc
from google.protobuf import struct_pb2
from google.protobuf.message import Message as ProtoMessage

from meshserve.errors import FieldViolation, InvalidRequestError

INVALID_FIELD = "INVALID_FIELD"


def invalid_field(path: str, description: str) -> InvalidRequestError:
    """The error that a server would answer with for the same field."""
    return InvalidRequestError(
        f"{path}: {description}",
        code=grpc.StatusCode.INVALID_ARGUMENT,
        reason=INVALID_FIELD,
        fields=(FieldViolation(path, description),),
    )


def checked_text(value: object, path: str) -> str:
    """`value`, if it is text that UTF-8 can carry."""
    if not isinstance(value, str):
        raise invalid_field(path, f"must be text, not {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise invalid_field(
            path,
            f"holds a lone surrogate (U+{ord(value[error.start]):04X}) at position {error.start}, "
            "which is not a character",
        ) from None
    return value


def assign(message: ProtoMessage, field: str, value: object, path: str) -> None:
    """Sets a scalar field. None leaves it absent. Raises InvalidRequestError."""
    if value is None:
        return
    if isinstance(value, str | bytes):  # protobuf takes bytes for text, silently
        value = checked_text(value, path)
    try:
        setattr(message, field, value)
    except (TypeError, ValueError) as error:
        raise invalid_field(path, _complaint(value, error)) from None


def extend(message: ProtoMessage, field: str, values: object, path: str) -> None:
    """Appends to a repeated scalar field. None leaves it empty. Raises InvalidRequestError."""
    if values is None:
        return
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise invalid_field(path, f"must be a list, not {type(values).__name__}")
    repeated = getattr(message, field)
    for index, value in enumerate(values):
        if isinstance(value, str | bytes):
            value = checked_text(value, f"{path}[{index}]")
        try:
            repeated.append(value)
        except (TypeError, ValueError) as error:
            raise invalid_field(f"{path}[{index}]", _complaint(value, error)) from None


def assign_struct(struct: struct_pb2.Struct, value: Mapping[str, Any], path: str) -> None:
    """Fills a JSON object. Raises InvalidRequestError for what JSON cannot hold."""
    struct.SetInParent()
    if not isinstance(value, Mapping):
        raise invalid_field(path, f"must be a mapping, not {type(value).__name__}")
    try:
        _check_texts(value, path)
        struct.update(value)
    except (TypeError, ValueError) as error:
        raise invalid_field(path, f"is not a JSON object: {error}") from None
    except RecursionError:
        raise invalid_field(path, "is nested too deeply") from None


def one_of(value: object, known: Iterable[str]) -> str:
    """What to say of a value that should have been one of these."""
    return f"{value!r} is none of {', '.join(sorted(known))}"


def _check_texts(value: object, path: str) -> None:
    if isinstance(value, str):
        checked_text(value, path)
    elif isinstance(value, Mapping):
        for key, child in value.items():
            if not isinstance(key, str):
                raise invalid_field(path, f"has a key that is not text: {key!r}")
            checked_text(key, path)
            _check_texts(child, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            _check_texts(child, f"{path}[{index}]")


def _complaint(value: object, error: Exception) -> str:
    if isinstance(error, TypeError):
        return f"has the wrong type: {type(value).__name__}"
    return f"{value!r} is out of range"
