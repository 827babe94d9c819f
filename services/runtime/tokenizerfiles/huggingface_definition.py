"""The tokenizer that a Hugging Face model directory describes.

Files: `tokenizer.json` (required), `tokenizer_config.json`, chat templates (`chat_template.jinja`,
`additional_chat_templates/*.jinja` or keys of the config), `generation_config.json` and
`config.json` for the tokens that end a sequence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.runtime.tokenizerfiles.definition import (
    DEFAULT_TEMPLATE,
    TokenizerDefinition,
    added_token,
)
from services.runtime.tokenizerfiles.errors import TokenizerLoadError

SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_SUPPORTED_MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")


def definition_from_directory(path: Path) -> TokenizerDefinition:
    """Reads a model directory.

    Raises:
        TokenizerLoadError: a file is missing, is not what it should be, or names a kind of model
            that is not supported.
    """
    document = _read_object(path / "tokenizer.json", required=True)
    model = document.get("model")
    if not isinstance(model, dict) or model.get("type") not in _SUPPORTED_MODELS:
        kind = model.get("type") if isinstance(model, dict) else model
        raise TokenizerLoadError(
            path / "tokenizer.json",
            f"model kind {kind!r} is not supported, only {', '.join(_SUPPORTED_MODELS)} are",
        )
    if not isinstance(model.get("vocab"), (dict, list)):
        raise TokenizerLoadError(path / "tokenizer.json", "the model has no vocabulary")
    _check_merges(path / "tokenizer.json", model)
    config = _read_object(path / "tokenizer_config.json")
    special = {
        name: content
        for name in SPECIAL_TOKEN_NAMES
        if (content := _content(config.get(name))) is not None
    }
    ids = _token_ids(document)
    _complete_added_tokens(document, config, special, ids)
    bos = special.get("bos_token")
    return TokenizerDefinition(
        source=path,
        document=document,
        bos_token_id=None if bos is None else ids.get(bos),
        eos_token_ids=_eos_token_ids(path, special, ids),
        chat_templates=_chat_templates(path, config),
        special_tokens=special,
    )


def _check_merges(path: Path, model: Mapping[str, Any]) -> None:
    """Refuses merges that the tokenizers library would end the whole process over.

    It cuts the prefix of continuing pieces off the second part of every merge, there or not.
    """
    prefix = model.get("continuing_subword_prefix")
    if model["type"] != "BPE" or not prefix or not isinstance(prefix, str):
        return
    for merge in model.get("merges") or ():
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not str(parts[-1]).startswith(prefix):
            raise TokenizerLoadError(
                path, f"the merge {merge!r} does not continue with the prefix {prefix!r}"
            )


def _token_ids(document: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, list):
        ids = {str(token): token_id for token_id, (token, _) in enumerate(vocabulary)}
    else:
        ids = dict(vocabulary)
    for token in document.get("added_tokens") or []:
        ids[token["content"]] = token["id"]
    return ids


def _complete_added_tokens(
    document: dict[str, Any],
    config: Mapping[str, Any],
    special: Mapping[str, str],
    ids: dict[str, int],
) -> None:
    """Adds the tokens that only the config knows, and marks as special what it names as special."""
    added = {token["id"]: dict(token) for token in document.get("added_tokens") or []}
    for key, token in (config.get("added_tokens_decoder") or {}).items():
        token_id = int(key)
        if token_id not in added:
            entry = added_token(token_id, token["content"], special=bool(token.get("special")))
            added[token_id] = entry | {name: token[name] for name in entry if name in token}
            ids[token["content"]] = token_id
    for content in special.values():
        if content in ids:
            added.setdefault(ids[content], added_token(ids[content], content, special=True))
            added[ids[content]]["special"] = True
    document["added_tokens"] = [added[token_id] for token_id in sorted(added)]


def _eos_token_ids(
    path: Path, special: Mapping[str, str], ids: Mapping[str, int]
) -> tuple[int, ...]:
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _read_object(path / name).get("eos_token_id")
        if value is not None:
            found += value if isinstance(value, list) else [value]
            break
    eos = special.get("eos_token")
    if eos is not None and eos in ids:
        found.append(ids[eos])
    if not all(isinstance(token_id, int) and token_id >= 0 for token_id in found):
        raise TokenizerLoadError(path, f"eos_token_id is {found}, not token ids")
    return tuple(dict.fromkeys(found))


def _chat_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    templates: dict[str, str] = {}
    configured = config.get("chat_template")
    if isinstance(configured, str):
        templates[DEFAULT_TEMPLATE] = configured
    elif isinstance(configured, list):
        templates |= {entry["name"]: entry["template"] for entry in configured}
    for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = _read_text(file)
    if (file := path / "chat_template.jinja").is_file():
        templates[DEFAULT_TEMPLATE] = _read_text(file)
    return templates


def _content(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read_object(path: Path, *, required: bool = False) -> dict[str, Any]:
    if not path.is_file():
        if required:
            raise TokenizerLoadError(path, "no such file")
        return {}
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise TokenizerLoadError(path, f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerLoadError(path, "is not a JSON object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerLoadError(path, f"cannot be read: {error}") from None
