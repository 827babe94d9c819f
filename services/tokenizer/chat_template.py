"""A chat template: compiled once, rendered into text that knows what the template itself wrote."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Template
from jinja2.exceptions import TemplateError, TemplateSyntaxError

from services.tokenizer.errors import ChatTemplateError
from services.tokenizer.template_environment import ChatTemplateEnvironment
from services.tokenizer.traced_text import (
    TracedText,
    budget,
    concatenate,
    traced,
    trusted_text,
)

MAX_SOURCE_CHARS = 1 << 20
# All strings of a rendering together, in multiples of the largest one.
_TOTAL_TEXT_FACTOR = 16
_MAX_REASON_CHARS = 500
_CONTINUATION_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """What one rendering may take."""

    timeout_s: float = 2.0
    max_bytes: int = 32 * 2**20


@dataclass(frozen=True, slots=True)
class TemplateInput:
    """What a conversation gives a template.

    `messages` and `tools` are shaped as published templates expect them; `arguments` are further
    variables. Text in them is the conversation's and can place no control token, apart from the
    values of `role`, which come from a fixed list.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    arguments: Mapping[str, Any] | None = None


class ChatTemplate:
    """A compiled template. It can be rendered on many threads at once.

    Args:
        source: Jinja source.
        special_tokens: variables such as `bos_token` and the control tokens they stand for.
        max_source_chars: largest source that is compiled.

    Raises:
        ChatTemplateError: the source is too long or not a valid template.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        max_source_chars: int = MAX_SOURCE_CHARS,
    ) -> None:
        if len(source) > max_source_chars:
            raise ChatTemplateError(f"the template has more than {max_source_chars} characters")
        self.source = source
        self._special_tokens = {
            name: trusted_text(token) for name, token in (special_tokens or {}).items()
        }
        self._environment = _environment()
        budget.begin(MAX_SOURCE_CHARS, MAX_SOURCE_CHARS * _TOTAL_TEXT_FACTOR)
        try:
            self._template: Template = self._environment.from_string(source)
        except ChatTemplateError:
            raise
        except TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"line {error.lineno} of the template: {_reason(error)}"
            ) from None
        except Exception as error:
            # Deep nesting ends in RecursionError, SyntaxError or MemoryError of Python's compiler.
            raise ChatTemplateError(f"the template cannot be compiled: {_reason(error)}") from None
        finally:
            budget.end()

    def mentions(self, name: str) -> bool:
        """Whether the source speaks of something, for example of a role."""
        return name in self.source

    def render(self, given: TemplateInput, limits: RenderLimits | None = None) -> TracedText:
        """Returns the prompt.

        Raises:
            ChatTemplateError: the template refused the conversation (with the template's own
                message), failed on it, or broke a limit.
        """
        limits = limits or RenderLimits()
        rendered = self._run(given, limits)
        if given.continue_final_message:
            rendered = _cut_after_final_message(rendered, str(given.messages[-1]["content"]))
        if not rendered.isascii() and len(rendered.encode(errors="replace")) > limits.max_bytes:
            raise ChatTemplateError(f"the prompt has more than {limits.max_bytes} bytes")
        return rendered

    def _variables(self, given: TemplateInput) -> dict[str, Any]:
        messages = [_traced_message(message) for message in given.messages]
        if given.continue_final_message:
            messages[-1]["content"] = messages[-1]["content"] + _CONTINUATION_MARK
        return {
            "documents": None,
            **{name: _traced_value(value) for name, value in (given.arguments or {}).items()},
            **self._special_tokens,
            "messages": messages,
            "tools": _traced_value(given.tools) if given.tools else None,
            "add_generation_prompt": given.add_generation_prompt,
        }

    def _run(self, given: TemplateInput, limits: RenderLimits) -> TracedText:
        environment = self._environment
        # A character takes a byte at least.
        budget.begin(limits.max_bytes, limits.max_bytes * _TOTAL_TEXT_FACTOR)
        environment.begin(limits.timeout_s)
        try:
            context = self._template.new_context(self._variables(given))
            parts: list[str] = []
            chars = 0
            for part in self._template.root_render_func(context):
                environment.tick()
                chars += len(part)
                budget.check(chars)
                parts.append(part)
            return concatenate(parts)
        except ChatTemplateError:
            raise
        except TemplateError as error:
            raise ChatTemplateError(_reason(error)) from None
        except RecursionError:
            raise ChatTemplateError("the template nests too deeply") from None
        except MemoryError:
            raise ChatTemplateError("the template takes too much memory") from None
        except Exception as error:
            # The template's own mistakes: a missing key, a sum of text and number.
            raise ChatTemplateError(f"{type(error).__name__}: {_reason(error)}") from None
        finally:
            environment.end()
            budget.end()


_shared_environment: ChatTemplateEnvironment | None = None
_shared_environment_lock = threading.Lock()


def _environment() -> ChatTemplateEnvironment:
    """The one environment of the process; what belongs to a rendering is kept per thread."""
    global _shared_environment
    with _shared_environment_lock:
        if _shared_environment is None:
            _shared_environment = ChatTemplateEnvironment()
        return _shared_environment


def _traced_message(message: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {key: _traced_value(value) for key, value in message.items()}
    # Roles come from an enumeration; templates build control tokens from them.
    made["role"] = trusted_text(str(message["role"]))
    return made


def _traced_value(value: Any) -> Any:
    if isinstance(value, str):
        return traced(value)
    if isinstance(value, Mapping):
        return {traced(str(key)): _traced_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_traced_value(item) for item in value]
    return value


def _cut_after_final_message(rendered: TracedText, content: str) -> TracedText:
    """Drops what the template put after the final message's content."""
    at = rendered.rfind(_CONTINUATION_MARK.strip())
    if at < 0 or content.strip() not in rendered:
        raise ChatTemplateError(
            "the template does not show the final message as it is, so it cannot be continued"
        )
    if rendered[at : at + len(_CONTINUATION_MARK)] == _CONTINUATION_MARK:
        return rendered[:at]
    # The template trims messages, so the open one is trimmed as well.
    return rendered[:at].rstrip()


def _reason(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:_MAX_REASON_CHARS]
