"""Builds conversations from messages as callers write them: objects or dicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from meshserve.options import MessageLike, Messages, TemplateOptions
from meshserve.types import Message, Tool, ToolCall
from meshserve.v1 import types_pb2
from meshserve.wire.assign import assign, assign_struct, invalid_field, one_of

ROLES = {
    "system": types_pb2.ROLE_SYSTEM,
    "developer": types_pb2.ROLE_DEVELOPER,
    "user": types_pb2.ROLE_USER,
    "assistant": types_pb2.ROLE_ASSISTANT,
    "tool": types_pb2.ROLE_TOOL,
}
_MESSAGE_KEYS = frozenset(
    {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}
)


def fill_conversation(
    conversation: types_pb2.Conversation, messages: Messages, options: TemplateOptions
) -> None:
    """Fills in messages, tools and template variables. Raises InvalidRequestError."""
    conversation.SetInParent()
    if isinstance(messages, Mapping | Message) or not isinstance(messages, Iterable):
        raise invalid_field(
            "conversation.messages", f"must be a list of messages, not {type(messages).__name__}"
        )
    for index, message in enumerate(messages):
        _fill_message(conversation.messages.add(), message, f"conversation.messages[{index}]")
    tools = options.get("tools") or ()
    if isinstance(tools, Mapping | str | Tool):
        raise invalid_field("conversation.tools", "must be a list of tools")
    for index, tool in enumerate(tools):
        _fill_tool(conversation.tools.add(), tool, f"conversation.tools[{index}]")
    for name in ("add_generation_prompt", "continue_final_message", "chat_template"):
        assign(conversation, name, options.get(name), f"conversation.{name}")
    arguments = options.get("template_arguments")
    if arguments is not None:
        path = "conversation.template_arguments"
        assign_struct(conversation.template_arguments, arguments, path)


def _fill_message(target: types_pb2.ChatMessage, message: MessageLike, path: str) -> None:
    source = _message_mapping(message, path)
    role = source.get("role")
    if role not in ROLES:
        raise invalid_field(f"{path}.role", one_of(role, ROLES))
    target.role = ROLES[role]
    for name in ("content", "name", "tool_call_id", "reasoning_content"):
        assign(target, name, source.get(name), f"{path}.{name}")
    for index, call in enumerate(source.get("tool_calls") or ()):
        _fill_tool_call(target.tool_calls.add(), call, f"{path}.tool_calls[{index}]")


def _message_mapping(message: MessageLike, path: str) -> Mapping[str, Any]:
    if isinstance(message, Message):
        return {name: getattr(message, name) for name in _MESSAGE_KEYS}
    if not isinstance(message, Mapping):
        raise invalid_field(path, f"must be a message, not {type(message).__name__}")
    unknown = [key for key in message if key not in _MESSAGE_KEYS]
    if unknown:
        raise invalid_field(f"{path}.{unknown[0]}", one_of(unknown[0], _MESSAGE_KEYS))
    return message


def _fill_tool_call(target: types_pb2.ToolCall, call: object, path: str) -> None:
    if isinstance(call, ToolCall):
        call = {"id": call.id, "name": call.name, "arguments_json": call.arguments_json}
    if not isinstance(call, Mapping):
        raise invalid_field(path, f"must be a tool call, not {type(call).__name__}")
    for name in ("id", "name", "arguments_json"):
        assign(target, name, call.get(name), f"{path}.{name}")


def _fill_tool(target: types_pb2.Tool, tool: object, path: str) -> None:
    if isinstance(tool, Tool):
        tool = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    if not isinstance(tool, Mapping):
        raise invalid_field(path, f"must be a tool, not {type(tool).__name__}")
    assign(target, "name", tool.get("name"), f"{path}.name")
    assign(target, "description", tool.get("description"), f"{path}.description")
    if tool.get("parameters"):
        assign_struct(target.parameters, tool["parameters"], f"{path}.parameters")
