"""A conversation as the contract has it, turned into what chat templates expect."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from google.protobuf import json_format, struct_pb2

from meshserve.v1 import types_pb2
from services.runtime.errors import ServiceError, invalid_field
from services.runtime.tokenizerfiles.huggingface_definition import SPECIAL_TOKEN_NAMES
from services.tokenizer.chat_template import TemplateInput

ROLE_NAMES = {
    types_pb2.ROLE_SYSTEM: "system",
    types_pb2.ROLE_USER: "user",
    types_pb2.ROLE_ASSISTANT: "assistant",
    types_pb2.ROLE_TOOL: "tool",
    types_pb2.ROLE_DEVELOPER: "developer",
}
RESERVED_ARGUMENTS = frozenset({"messages", "tools", "add_generation_prompt", *SPECIAL_TOKEN_NAMES})
# An assistant that calls tools, or a tool with nothing to report, says nothing.
_MAY_BE_SILENT = (types_pb2.ROLE_ASSISTANT, types_pb2.ROLE_TOOL)


def template_input(
    conversation: types_pb2.Conversation, *, knows_developer: bool, path: str = "conversation"
) -> TemplateInput:
    """What a conversation gives a template.

    `knows_developer` says whether the template knows the role `developer`; otherwise it gets
    `system`. Raises ServiceError INVALID_FIELD with the path of the field at fault.
    """
    if not conversation.messages:
        raise invalid_field(f"{path}.messages", "at least one message is needed")
    messages = [
        _message(message, f"{path}.messages[{index}]", knows_developer)
        for index, message in enumerate(conversation.messages)
    ]
    continues = conversation.continue_final_message
    if continues and conversation.add_generation_prompt:
        raise invalid_field(
            f"{path}.continue_final_message", "does not go together with add_generation_prompt"
        )
    asks_for_prompt = (
        conversation.add_generation_prompt
        if conversation.HasField("add_generation_prompt")
        else not continues
    )
    return TemplateInput(
        messages=messages,
        tools=[
            _tool(tool, f"{path}.tools[{index}]") for index, tool in enumerate(conversation.tools)
        ]
        or None,
        add_generation_prompt=asks_for_prompt,
        continue_final_message=continues,
        arguments=_arguments(conversation.template_arguments, f"{path}.template_arguments"),
    )


def _message(message: types_pb2.ChatMessage, path: str, knows_developer: bool) -> dict[str, Any]:
    role = ROLE_NAMES.get(message.role)
    if role is None:
        known = ", ".join(ROLE_NAMES.values())
        problem = f"is {message.role}, not one of {known}" if message.role else "is required"
        raise invalid_field(f"{path}.role", problem)
    if role == "developer" and not knows_developer:
        role = "system"
    if not message.content and message.role not in _MAY_BE_SILENT:
        raise invalid_field(f"{path}.content", "is required")
    if message.tool_calls and message.role != types_pb2.ROLE_ASSISTANT:
        raise invalid_field(f"{path}.tool_calls", "only the assistant calls tools")
    if message.tool_call_id and message.role != types_pb2.ROLE_TOOL:
        raise invalid_field(f"{path}.tool_call_id", "only a tool's message answers a call")
    made: dict[str, Any] = {"role": role, "content": message.content}
    if message.name:
        made["name"] = message.name
    if message.tool_calls:
        made["tool_calls"] = [
            _tool_call(call, f"{path}.tool_calls[{index}]")
            for index, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id:
        made["tool_call_id"] = message.tool_call_id
    if message.reasoning_content:
        # Templates disagree on the name.
        made["reasoning_content"] = made["thinking"] = message.reasoning_content
    return made


def _tool_call(call: types_pb2.ToolCall, path: str) -> dict[str, Any]:
    if not call.name:
        raise invalid_field(f"{path}.name", "is required")
    arguments = _json_object(call.arguments_json, f"{path}.arguments_json")
    made: dict[str, Any] = {
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }
    return {"id": call.id, **made} if call.id else made


def _tool(tool: types_pb2.Tool, path: str) -> dict[str, Any]:
    if not tool.name:
        raise invalid_field(f"{path}.name", "is required")
    function: dict[str, Any] = {"name": tool.name, "description": tool.description}
    function["parameters"] = (
        _struct(tool.parameters, f"{path}.parameters")
        if tool.HasField("parameters")
        else {"type": "object", "properties": {}}
    )
    return {"type": "function", "function": function}


def _arguments(arguments: struct_pb2.Struct, path: str) -> dict[str, Any]:
    for name in arguments.fields:
        if name in RESERVED_ARGUMENTS:
            raise invalid_field(f"{path}.{name}", "is set by the server")
    return _struct(arguments, path)


def _struct(struct: struct_pb2.Struct, path: str) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json_format.MessageToDict(struct)
    except (ValueError, RecursionError, json_format.SerializeToJsonError):
        raise invalid_field(path, "has a value that JSON does not have") from None
    whole: dict[str, Any] = _whole_numbers(value)
    return whole


def _whole_numbers(value: Any) -> Any:
    """A Struct knows only floating-point numbers; templates print whole ones without a point."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    return value


def _json_object(text: str, path: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _not_json(path, error) from None
    if not isinstance(value, dict):
        raise invalid_field(path, "is not a JSON object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _not_json(path: str, error: Exception) -> ServiceError:
    if isinstance(error, RecursionError):
        return invalid_field(path, "is nested too deeply")
    if isinstance(error, json.JSONDecodeError):
        return invalid_field(path, f"is not JSON: {error.msg} at character {error.pos}")
    return invalid_field(path, "is not JSON")
