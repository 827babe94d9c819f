"""Every text of a request that can reach the model: to be checked, and replaced when redacted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from meshserve.v1 import gateway_pb2, types_pb2
from services.runtime.errors import invalid_field


@dataclass(frozen=True, slots=True)
class PromptText:
    """A text, the path of its field, and how it is replaced."""

    path: str
    text: str
    replace: Callable[[str], None]


def prompt_texts(request: gateway_pb2.GenerateRequest) -> list[PromptText]:
    """The texts of a text or a conversation, empty ones left out; none for token ids.

    Raises ServiceError for a struct that is not JSON.
    """
    kind = request.WhichOneof("input")
    if kind == "text":
        return [_field(request, "text", "text")]
    if kind == "conversation":
        return [each for each in _conversation(request.conversation) if each.text]
    return []


def _conversation(conversation: types_pb2.Conversation) -> Iterator[PromptText]:
    for position, message in enumerate(conversation.messages):
        path = f"conversation.messages[{position}]"
        for name in ("name", "content", "reasoning_content", "tool_call_id"):
            yield _field(message, name, f"{path}.{name}")
        for number, call in enumerate(message.tool_calls):
            for name in ("id", "name"):
                yield _field(call, name, f"{path}.tool_calls[{number}].{name}")
            yield PromptText(
                f"{path}.tool_calls[{number}].arguments_json",
                call.arguments_json,
                lambda text, call=call: _replace_json_text(call, text),  # type: ignore[misc]
            )
    for position, tool in enumerate(conversation.tools):
        path = f"conversation.tools[{position}]"
        for name in ("name", "description"):
            yield _field(tool, name, f"{path}.{name}")
        if tool.HasField("parameters"):
            yield _struct(tool.parameters, f"{path}.parameters")
    if conversation.HasField("template_arguments"):
        yield _struct(conversation.template_arguments, "conversation.template_arguments")
    yield _field(conversation, "chat_template", "conversation.chat_template")


def _field(message: Message, name: str, path: str) -> PromptText:
    return PromptText(path, getattr(message, name), lambda text: setattr(message, name, text))


def _struct(struct: Struct, path: str) -> PromptText:
    """A struct as its JSON, so that its keys and numbers are checked too."""
    try:
        text = json.dumps(json_format.MessageToDict(struct), ensure_ascii=False)
    except (ValueError, json_format.Error):
        raise invalid_field(path, "must be JSON: numbers are finite, values are set") from None
    return PromptText(path, text, lambda redacted: _replace_struct(struct, redacted))


def _replace_struct(struct: Struct, text: str) -> None:
    """Takes the redacted JSON over; where redaction broke it, nothing of it is safe to keep."""
    struct.Clear()
    parsed = _parsed(text)
    if isinstance(parsed, dict):
        struct.update(parsed)


def _replace_json_text(call: types_pb2.ToolCall, text: str) -> None:
    call.arguments_json = text if _parsed(text) is not None else "{}"


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None
