"""No text of a request can reach the model without having been listed to be checked."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from meshserve.v1 import gateway_pb2, types_pb2
from services.gateway.prompt_texts import prompt_texts
from services.runtime.errors import ServiceError

SECRET = "SECRET"


def fill(message: Message, value: str) -> None:
    """Sets every string that a message can have, also of fields that come later."""
    if isinstance(message, Struct):
        message.update({value: {"nested": [value, {value: value}]}})
        return
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None:
            part = getattr(message, field.name)
            fill(part.add() if field.is_repeated else part, value)
        elif field.type == field.TYPE_STRING:
            text = json.dumps({value: value}) if field.name.endswith("_json") else value
            setattr(message, field.name, text)


def redact(request: gateway_pb2.GenerateRequest, secret: str = SECRET) -> list[str]:
    paths = []
    for each in prompt_texts(request):
        if secret in each.text:
            paths.append(each.path)
            each.replace(each.text.replace(secret, "[redacted]"))
    return paths


def test_every_string_of_a_conversation_is_listed() -> None:
    request = gateway_pb2.GenerateRequest()
    fill(request.conversation, SECRET)
    assert SECRET.encode() in request.SerializeToString()
    paths = redact(request)
    assert SECRET.encode() not in request.SerializeToString()
    assert "conversation.messages[0].content" in paths
    assert "conversation.messages[0].tool_calls[0].arguments_json" in paths
    assert "conversation.tools[0].parameters" in paths
    arguments = request.conversation.messages[0].tool_calls[0].arguments_json
    assert json.loads(arguments) == {"[redacted]": "[redacted]"}
    assert request.conversation.tools[0].parameters["[redacted]"]["nested"][0] == "[redacted]"


def test_a_text_is_listed_as_it_stands() -> None:
    request = gateway_pb2.GenerateRequest(text=f"a {SECRET}")
    assert redact(request) == ["text"]
    assert request.text == "a [redacted]"


def with_arguments(arguments: str) -> gateway_pb2.GenerateRequest:
    call = types_pb2.ToolCall(name="pay", arguments_json=arguments)
    message = types_pb2.ChatMessage(role=types_pb2.ROLE_ASSISTANT, tool_calls=[call])
    return gateway_pb2.GenerateRequest(conversation=types_pb2.Conversation(messages=[message]))


def test_arguments_that_redaction_breaks_are_dropped_whole() -> None:
    request = with_arguments('{"card": 4111111111111111}')
    assert redact(request, "4111111111111111")
    assert request.conversation.messages[0].tool_calls[0].arguments_json == "{}"


def test_numbers_of_a_struct_are_checked_too() -> None:
    request = with_arguments("{}")
    parameters = request.conversation.tools.add(name="pay").parameters
    parameters.update({"default": 4111111111111111, "type": "number"})
    assert redact(request, "4111111111111111") == ["conversation.tools[0].parameters"]
    assert not parameters.fields


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_struct_that_is_no_json_is_refused_by_its_path(value: Any) -> None:
    request = with_arguments("{}")
    request.conversation.template_arguments.update({"x": value})
    with pytest.raises(ServiceError) as caught:
        prompt_texts(request)
    assert caught.value.field_violations[0][0] == "conversation.template_arguments"


def test_what_has_no_text_lists_none() -> None:
    assert prompt_texts(gateway_pb2.GenerateRequest()) == []
    ids = gateway_pb2.GenerateRequest(token_ids=types_pb2.TokenIds(ids=[1]))
    assert prompt_texts(ids) == []
