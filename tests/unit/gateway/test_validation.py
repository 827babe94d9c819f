"""Any request is either taken or refused with fields that it has."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import given
from hypothesis import strategies as st

from meshserve.v1 import gateway_pb2, types_pb2
from services.gateway.validation import validate
from services.runtime.errors import Reason, ServiceError

MAX_PROMPT_BYTES = 4096
_FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, 100.0, math.nan, math.inf, -math.inf]),
    st.floats(width=32),
)
_VALUES: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_FLOAT: _FLOATS,
    FieldDescriptor.TYPE_DOUBLE: st.floats(allow_nan=False, allow_infinity=False),
    FieldDescriptor.TYPE_UINT32: st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1)),
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_INT32: st.one_of(st.integers(-3, 3), st.integers(-(2**31), 2**31 - 1)),
    FieldDescriptor.TYPE_ENUM: st.one_of(st.integers(0, 5), st.integers(-(2**31), 2**31 - 1)),
    FieldDescriptor.TYPE_STRING: st.one_of(st.sampled_from(["", "a b", "x" * 200]), st.text()),
}


@st.composite
def messages(draw: st.DrawFn, kind: Descriptor, depth: int = 0) -> dict[str, Any]:
    """The fields of a random message, as keyword arguments."""
    fields: dict[str, Any] = {}
    oneofs: dict[str, str] = {}
    for field in kind.fields:
        if not draw(st.booleans()):
            continue
        if field.containing_oneof is not None:
            if field.containing_oneof.name in oneofs:
                continue
            oneofs[field.containing_oneof.name] = field.name
        if field.message_type is None:
            value = _VALUES[field.type]
            fields[field.name] = draw(st.lists(value, max_size=4) if field.is_repeated else value)
        elif field.message_type.GetOptions().map_entry:
            biases = st.dictionaries(st.integers(0, 2**32 - 1), _FLOATS, max_size=3)
            fields[field.name] = draw(biases)
        elif field.message_type.full_name == "google.protobuf.Struct":
            continue
        elif depth < 4:
            below = messages(field.message_type, depth + 1)
            fields[field.name] = draw(st.lists(below, max_size=3) if field.is_repeated else below)
    return fields


def field_exists(path: str, kind: Descriptor) -> bool:
    """Whether a path such as `a.b[3].c` names a field or a oneof of a message."""
    name, _, rest = path.partition(".")
    bare = re.sub(r"\[\d+\]$", "", name)
    if not rest and bare in kind.oneofs_by_name:
        return True
    field = kind.fields_by_name.get(bare)
    if field is None or (bare != name and not field.is_repeated):
        return False
    return not rest or (field.message_type is not None and field_exists(rest, field.message_type))


@given(fields=messages(gateway_pb2.GenerateRequest.DESCRIPTOR))
def test_any_request_is_taken_or_refused_by_fields_that_exist(fields: dict[str, Any]) -> None:
    request = gateway_pb2.GenerateRequest(**fields)
    refusal: ServiceError | None = None
    try:
        validate(request, MAX_PROMPT_BYTES)
    except ServiceError as error:
        refusal = error
    if refusal is not None:
        assert refusal.reason in (Reason.INVALID_FIELD, Reason.PROMPT_TOO_LONG)
        assert refusal.field_violations
        for path, description in refusal.field_violations:
            assert field_exists(path, request.DESCRIPTOR), path
            assert description
        return
    assert request.WhichOneof("input") is not None
    assert 0 <= (request.sampling.temperature or 0) <= 100
    assert not request.sampling.HasField("top_p") or 0 < request.sampling.top_p <= 1


def test_all_violations_are_told_at_once() -> None:
    request = gateway_pb2.GenerateRequest(
        priority=1000,
        sampling=types_pb2.SamplingParams(temperature=-1, top_p=2),
        stopping=types_pb2.StoppingCriteria(stop_strings=["", "x" * 2000]),
    )
    with pytest.raises(ServiceError) as caught:
        validate(request, MAX_PROMPT_BYTES)
    assert {path for path, _ in caught.value.field_violations} == {
        "input",
        "priority",
        "sampling.temperature",
        "sampling.top_p",
        "stopping.stop_strings[0]",
        "stopping.stop_strings[1]",
    }


@pytest.mark.parametrize("text", ["x" * 4097, "ö" * 2049])
def test_a_prompt_is_measured_in_bytes(text: str) -> None:
    with pytest.raises(ServiceError) as caught:
        validate(gateway_pb2.GenerateRequest(text=text), MAX_PROMPT_BYTES)
    assert caught.value.reason is Reason.PROMPT_TOO_LONG
    validate(gateway_pb2.GenerateRequest(text=text[:2048]), MAX_PROMPT_BYTES)
