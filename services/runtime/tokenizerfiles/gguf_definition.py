"""The tokenizer that a GGUF file's own metadata describes (keys `tokenizer.ggml.*`).

Keys per the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from services.runtime.modelfiles.errors import ModelFileError
from services.runtime.modelfiles.gguf import GGUFFile, GGUFMetadata
from services.runtime.tokenizerfiles.definition import (
    DEFAULT_TEMPLATE,
    TokenizerDefinition,
    added_token,
)
from services.runtime.tokenizerfiles.errors import TokenizerLoadError
from services.runtime.tokenizerfiles.pretokenizers import PRE_TOKENIZER_KINDS, PreTokenizerKind

SPACE_MARK = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_KINDS_OF_MODEL = ("gpt2", "llama", "t5")


def definition_from_gguf(path: Path) -> TokenizerDefinition:
    """Reads a GGUF file.

    Raises:
        TokenizerLoadError: the file cannot be read, has no tokenizer, or one of a kind that is not
            supported; the text names the kind or key.
    """
    try:
        with GGUFFile(path) as file:
            return _Reader(path, file.metadata).definition()
    except ModelFileError as error:
        raise TokenizerLoadError(path, str(error).removeprefix(f"{path}: ")) from error


class _Reader:
    def __init__(self, path: Path, metadata: GGUFMetadata) -> None:
        self._path = path
        self._metadata = metadata
        self._tokens = self._strings("tokens")
        types = self._numbers("token_type", len(self._tokens))
        self._types = [int(kind) for kind in types] or [NORMAL] * len(self._tokens)

    def definition(self) -> TokenizerDefinition:
        model = self._metadata.string("tokenizer.ggml.model")
        if model not in _KINDS_OF_MODEL:
            raise self._fail(
                f"tokenizer kind {model!r} (tokenizer.ggml.model) is not supported, only "
                f"{', '.join(_KINDS_OF_MODEL)} are"
            )
        document: dict[str, Any]
        if model == "gpt2":
            kind = self._pre_tokenizer_kind()
            document, adds_bos, adds_eos = self._byte_level(kind), kind.adds_bos, False
        elif model == "llama":
            document, adds_bos, adds_eos = self._sentencepiece_bpe(), True, False
        else:
            document, adds_bos, adds_eos = self._unigram(), False, True
        bos = self._token_id("bos_token_id")
        ends = [token_id for key in _END_KEYS if (token_id := self._token_id(key)) is not None]
        document |= {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added_tokens(model),
            "post_processor": post_processor(
                self._named(bos if self._flag("add_bos_token", adds_bos) else None),
                self._named(ends[0] if ends and self._flag("add_eos_token", adds_eos) else None),
            ),
        }
        special = {"bos_token": bos, "eos_token": ends[0] if ends else None}
        special["unk_token"] = self._token_id("unknown_token_id")
        special["pad_token"] = self._token_id("padding_token_id")
        return TokenizerDefinition(
            source=self._path,
            document=document,
            bos_token_id=bos,
            eos_token_ids=tuple(dict.fromkeys(ends)),
            chat_templates=self._chat_templates(),
            special_tokens={
                name: self._tokens[token_id]
                for name, token_id in special.items()
                if token_id is not None
            },
        )

    def _byte_level(self, kind: PreTokenizerKind) -> dict[str, Any]:
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        }
        return {
            "normalizer": {"type": "NFC"} if kind.nfc else None,
            "pre_tokenizer": kind.to_json(),
            "decoder": byte_level,
            "model": _bpe(
                self._vocabulary(),
                self._strings("merges"),
                ignore_merges=kind.whole_words,
            ),
        }

    def _sentencepiece_bpe(self) -> dict[str, Any]:
        prefixed = self._flag("add_space_prefix", True)
        unknown = self._token_id("unknown_token_id")
        if unknown is None and UNKNOWN in self._types:
            unknown = self._types.index(UNKNOWN)
        vocabulary = self._vocabulary()
        merges: Sequence[Any] = (
            self._strings("merges")
            if "tokenizer.ggml.merges" in self._metadata
            else self._merges_from_scores(vocabulary)
        )
        decoder: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if prefixed:
            decoder.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        return {
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Metaspace",
                "replacement": SPACE_MARK,
                "prepend_scheme": "first" if prefixed else "never",
                "split": False,
            },
            "decoder": {"type": "Sequence", "decoders": decoder},
            "model": _bpe(
                vocabulary,
                merges,
                unk_token=None if unknown is None else self._tokens[unknown],
                fuse_unk=True,
                byte_fallback=BYTE in self._types,
            ),
        }

    def _unigram(self) -> dict[str, Any]:
        scores = self._numbers("scores", len(self._tokens))
        if not len(scores):
            raise self._fail("key 'tokenizer.ggml.scores' is missing")
        steps: list[dict[str, Any]] = []
        charsmap = self._metadata.get("tokenizer.ggml.precompiled_charsmap")
        if isinstance(charsmap, np.ndarray) and len(charsmap):
            raw = charsmap.astype(np.uint8).tobytes()
            steps.append(
                {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}
            )
        if self._flag("remove_extra_whitespaces", True):
            steps.append({"type": "Strip", "strip_left": False, "strip_right": True})
            steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE_MARK})
        metaspace = {
            "type": "Metaspace",
            "replacement": SPACE_MARK,
            "prepend_scheme": "always" if self._flag("add_space_prefix", True) else "never",
            "split": True,
        }
        unknown = self._token_id("unknown_token_id")
        return {
            "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
            "pre_tokenizer": metaspace,
            "decoder": metaspace,
            "model": {
                "type": "Unigram",
                "unk_id": self._types.index(UNKNOWN) if unknown is None else unknown,
                "vocab": [
                    [token, float(score)] for token, score in zip(self._tokens, scores, strict=True)
                ],
                "byte_fallback": BYTE in self._types,
            },
        }

    def _merges_from_scores(self, vocabulary: dict[str, int]) -> list[list[str]]:
        """The merges that a SentencePiece BPE vocabulary implies, best score first."""
        scores = self._numbers("scores", len(self._tokens))
        if not len(scores):
            raise self._fail("neither 'tokenizer.ggml.merges' nor 'tokenizer.ggml.scores' is there")
        mergeable = {
            token
            for token, token_id in vocabulary.items()
            if self._types[token_id] in (NORMAL, USER_DEFINED)
        }
        ranked: list[tuple[float, int, int, str, str]] = []
        for token in mergeable:
            score = float(scores[vocabulary[token]])
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in mergeable and right in mergeable:
                    ranked.append((score, len(left), len(right), left, right))
        # Best first. Among splits of equal rank the order of the vocabulary decides, so that every
        # replica merges alike.
        ranked.sort(key=lambda merge: (vocabulary[merge[3] + merge[4]], vocabulary[merge[3]]))
        ranked.sort(key=lambda merge: merge[:3], reverse=True)
        return [[left, right] for *_, left, right in ranked]

    def _vocabulary(self) -> dict[str, int]:
        vocabulary: dict[str, int] = {}
        for token_id, token in enumerate(self._tokens):
            vocabulary.setdefault(token, token_id)
        return vocabulary

    def _added_tokens(self, model: str) -> list[dict[str, Any]]:
        special = (CONTROL,) if model == "gpt2" else (CONTROL, UNKNOWN)
        added = []
        for token_id, (token, kind) in enumerate(zip(self._tokens, self._types, strict=True)):
            # Runs of spaces in a SentencePiece vocabulary come about by merging.
            by_merging = model != "gpt2" and SPACE_MARK in token
            if token and (kind in special or (kind == USER_DEFINED and not by_merging)):
                added.append(added_token(token_id, token, special=kind in special))
        return added

    def _chat_templates(self) -> dict[str, str]:
        prefix = "tokenizer.chat_template"
        templates: dict[str, str] = {}
        for key in self._metadata:
            if key == prefix:
                templates[DEFAULT_TEMPLATE] = self._metadata.string(key)
            elif key.startswith(f"{prefix}."):
                templates[key.removeprefix(f"{prefix}.")] = self._metadata.string(key)
        return templates

    def _pre_tokenizer_kind(self) -> PreTokenizerKind:
        if "tokenizer.ggml.pre" not in self._metadata:
            raise self._fail(
                "the file does not say how text is split before merging (tokenizer.ggml.pre is "
                "missing); convert the model again with a current converter"
            )
        name = self._metadata.string("tokenizer.ggml.pre")
        if name not in PRE_TOKENIZER_KINDS:
            raise self._fail(
                f"pre-tokenizer kind {name!r} (tokenizer.ggml.pre) is not supported; known kinds: "
                f"{', '.join(sorted(PRE_TOKENIZER_KINDS))}"
            )
        return PRE_TOKENIZER_KINDS[name]

    def _token_id(self, key: str) -> int | None:
        name = f"tokenizer.ggml.{key}"
        if name not in self._metadata:
            return None
        token_id = self._metadata.integer(name)
        if not 0 <= token_id < len(self._tokens):
            raise self._fail(f"key {name!r} is {token_id}, not in [0, {len(self._tokens)})")
        return token_id

    def _named(self, token_id: int | None) -> tuple[int, str] | None:
        return None if token_id is None else (token_id, self._tokens[token_id])

    def _flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, bool):
            raise self._fail(f"key 'tokenizer.ggml.{key}' is not a boolean")
        return value

    def _strings(self, key: str) -> list[str]:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            problem = "is missing" if value is None else "is not a list of strings"
            raise self._fail(f"key 'tokenizer.ggml.{key}' {problem}")
        return [str(item) for item in value]

    def _numbers(self, key: str, length: int) -> Sequence[Any]:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return []
        if not isinstance(value, np.ndarray) or len(value) != length:
            raise self._fail(f"key 'tokenizer.ggml.{key}' is not a list of {length} numbers")
        numbers: list[Any] = value.tolist()
        return numbers

    def _fail(self, problem: str) -> TokenizerLoadError:
        return TokenizerLoadError(self._path, problem)


def post_processor(
    begin: tuple[int, str] | None, end: tuple[int, str] | None
) -> dict[str, Any] | None:
    """The step that puts a beginning and an end token, each (id, content), around a text."""
    if begin is None and end is None:
        return None
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    special: dict[str, Any] = {}
    for token, place in ((begin, 0), (end, len(pair) + 1)):
        if token is None:
            continue
        token_id, content = token
        entry = {"SpecialToken": {"id": content, "type_id": 0}}
        single.insert(place, entry)
        pair.insert(place, entry)
        special[content] = {"id": content, "ids": [token_id], "tokens": [content]}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _bpe(
    vocabulary: dict[str, int],
    merges: Sequence[Any],
    *,
    unk_token: str | None = None,
    fuse_unk: bool = False,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": fuse_unk,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocabulary,
        "merges": list(merges),
    }
