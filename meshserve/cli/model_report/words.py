"""What a model reads and writes: its tokenizer, its chat template, how its answers are sampled."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.runtime.modelfiles import CATALOGUE, ModelFileError
from services.runtime.modelfiles.fields import read_json
from services.runtime.tokenizerfiles.definition import (
    DEFAULT_TEMPLATE,
    TOOL_TEMPLATE,
    TokenizerDefinition,
)
from services.runtime.tokenizerfiles.errors import TokenizerLoadError
from services.runtime.tokenizerfiles.opening import open_definition
from services.tokenizer.chat_template import ChatTemplate, TemplateInput
from services.tokenizer.errors import ChatTemplateError

# Said by one who asks a template what it shows of a conversation.
_MARK = "zqxjkv"
_TOOL = {
    "type": "function",
    "function": {
        "name": f"{_MARK}_tool",
        "description": "Looks something up.",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
    },
}
_LICENCE_LINE = re.compile(r"^licen[cs]e:\s*(\S+)\s*$", re.MULTILINE)
_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """A model's tokenizer: its kind, or why there is none to be had."""

    kind: str | None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """A model's chat template.

    `roles` are those whose messages it shows; `tools` whether it shows tools that are offered;
    `problem` why it cannot be used.
    """

    source: str
    names: tuple[str, ...]
    roles: tuple[str, ...]
    tools: bool
    problem: str | None = None


def read_words(path: Path) -> tuple[TokenizerFacts, TemplateFacts | None]:
    """Look at a model's tokenizer and chat template; never raises for what is damaged."""
    try:
        definition = open_definition(path)
    except TokenizerLoadError as error:
        return TokenizerFacts(None, str(error)), None
    return TokenizerFacts(definition.kind), _template(path, definition)


def _template(path: Path, definition: TokenizerDefinition) -> TemplateFacts | None:
    templates = definition.chat_templates
    if not templates:
        return None
    names = tuple(templates)
    main = templates.get(DEFAULT_TEMPLATE, next(iter(templates.values())))
    try:
        template = ChatTemplate(main, definition.special_tokens)
        with_tools = ChatTemplate(templates.get(TOOL_TEMPLATE, main), definition.special_tokens)
    except ChatTemplateError as error:
        return TemplateFacts(_source(path), names, (), False, str(error))
    roles = tuple(
        role
        for role, messages in (
            ("system", [_says("system", _MARK), _says("user", "hello")]),
            ("user", [_says("user", _MARK)]),
            (
                "assistant",
                [_says("user", "hello"), _says("assistant", _MARK), _says("user", "go on")],
            ),
            (
                "tool",
                [
                    _says("user", "hello"),
                    {"role": "assistant", "content": "", "tool_calls": [_call()]},
                    {**_says("tool", _MARK), "name": "look_up", "tool_call_id": "call00001"},
                ],
            ),
        )
        if _shows(template, messages)
    )
    tools = _shows(with_tools, [_says("user", "hello")], [_TOOL])
    return TemplateFacts(_source(path), names, roles, tools)


def _says(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _call() -> dict[str, Any]:
    function = {"name": "look_up", "arguments": {"what": "it"}}
    return {"id": "call00001", "type": "function", "function": function}


def _shows(
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    tools: list[Mapping[str, Any]] | None = None,
) -> bool:
    """Whether the mark comes out of a template that it was put into."""
    try:
        return _MARK in template.render(TemplateInput(messages, tools))
    except ChatTemplateError:
        return False


def _source(path: Path) -> str:
    if not path.is_dir():
        return "tokenizer.chat_template in the file"
    return (
        "chat_template.jinja"
        if (path / "chat_template.jinja").is_file()
        else "tokenizer_config.json"
    )


def read_licence(path: Path, stated: str | None) -> str | None:
    """What a model's files say of its licence: what the file itself states, the model card, or the
    first line of a licence that lies beside it."""
    if stated:
        return stated
    for model in CATALOGUE.values():
        if path.name == model.name and path.is_dir():
            return model.licence
    directory = path if path.is_dir() else path.parent
    if not path.is_dir():
        return None
    if (card := directory / "README.md").is_file():
        found = _LICENCE_LINE.search(card.read_text(encoding="utf-8", errors="replace")[:4096])
        if found:
            return found[1]
    for name in _LICENCE_FILES:
        if (file := directory / name).is_file():
            lines = file.read_text(encoding="utf-8", errors="replace")[:4096].splitlines()
            return next((line.strip() for line in lines if line.strip()), None)
    return None


def catalogue_sampling(path: Path) -> dict[str, float]:
    """How a model of the catalogue answers best, by field of SamplingParams."""
    for model in CATALOGUE.values():
        if not model.beside and path.name == model.file_name:
            return dict(model.sampling)
    return {}


def read_quantization(path: Path) -> dict[str, Any] | None:
    """What config.json says of how weights are quantised, in brief."""
    try:
        found = read_json(path / "config.json").get("quantization_config")
    except ModelFileError:
        return None
    if not isinstance(found, dict):
        return None
    groups = found.get("config_groups")
    weights = [
        group["weights"]
        for group in (groups.values() if isinstance(groups, dict) else ())
        if isinstance(group, dict) and isinstance(group.get("weights"), dict)
    ] or [found]
    return {
        "method": found.get("quant_method"),
        "format": found.get("format") or found.get("checkpoint_format") or found.get("version"),
        "bits": [each.get("num_bits") or each.get("bits") for each in weights],
        "group_size": weights[0].get("group_size"),
    }
