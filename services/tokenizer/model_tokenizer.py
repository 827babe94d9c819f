"""The tokenizer of one model: texts to token ids and back, conversations to prompts.

Everything here is synchronous and may be called from many threads at once; the `tokenizers`
library lets go of the interpreter lock while it encodes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from services.runtime.tokenizerfiles.definition import (
    DEFAULT_TEMPLATE,
    TOOL_TEMPLATE,
    TokenizerDefinition,
)
from services.runtime.tokenizerfiles.errors import TokenizerLoadError
from services.runtime.tokenizerfiles.opening import checked_layout, open_definition
from services.runtime.tokenizerfiles.token_bytes import token_bytes
from services.tokenizer.chat_template import ChatTemplate, RenderLimits, TemplateInput
from services.tokenizer.control_tokens import ControlTokens
from services.tokenizer.detokenizer import Detokenizer
from services.tokenizer.encoder_inputs import InputEncoder
from services.tokenizer.errors import (
    ChatTemplateError,
    NoChatTemplateError,
)
from services.tokenizer.library import is_panic, library_failures
from services.tokenizer.long_texts import CHUNK_CHARS, can_be_cut, cut, in_rounds

# Encoded where it stands: less work than handing it to a thread pool.
INLINE_CHARS = 1024
# Templates of requests that are kept compiled, and how long one may be: compiling holds the
# interpreter lock.
CACHED_TEMPLATES = 32
MAX_REQUEST_TEMPLATE_CHARS = 1 << 15


@dataclass(frozen=True, slots=True)
class EncodedText:
    """Token ids of a text and, if asked for, the [start, end) UTF-8 bytes that each stands for."""

    token_ids: list[int]
    offsets: list[tuple[int, int]] | None = None


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A conversation as the model reads it."""

    text: str
    token_ids: list[int]


class ModelTokenizer:
    """The tokenizer of one model.

    Attributes:
        kind: kind of tokenizer, for example `byte-level-bpe`.
        revision: identifies its content.
        detokenizer: token ids to text, also piece by piece.
        inputs: texts and pairs of texts to inputs of an encoder.
        bos_token_id, eos_token_ids: tokens that begin and end a sequence.

    Raises:
        TokenizerLoadError: the definition does not make a working tokenizer.
    """

    def __init__(self, definition: TokenizerDefinition) -> None:
        self._control = _control_tokens(definition)
        self._backend = _backend(definition, self._control)
        self.inputs = InputEncoder(self._backend, definition.document)
        self.kind = definition.kind
        self.revision = definition.revision()
        self.bos_token_id = definition.bos_token_id
        self.eos_token_ids = tuple(definition.eos_token_ids)
        table = token_bytes(definition)
        self.detokenizer = Detokenizer(table.pieces, table.special_ids, table.beginning)
        self._special_tokens = dict(definition.special_tokens)
        self._template_of_source = lru_cache(CACHED_TEMPLATES)(
            partial(
                ChatTemplate,
                special_tokens=self._special_tokens,
                max_source_chars=MAX_REQUEST_TEMPLATE_CHARS,
            )
        )
        # A template that cannot be compiled fails the requests that need it, not the model.
        self._templates: dict[str, ChatTemplate | ChatTemplateError] = {}
        for name, source in definition.chat_templates.items():
            try:
                self._templates[name] = ChatTemplate(source, self._special_tokens)
            except ChatTemplateError as error:
                self._templates[name] = error
        self._cuts_long_texts = can_be_cut(definition.document)

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids."""
        return self.detokenizer.vocabulary_size

    @property
    def has_chat_template(self) -> bool:
        """Whether the model brings a chat template."""
        return DEFAULT_TEMPLATE in self._templates

    def encode(
        self, text: str, *, add_special_tokens: bool = True, return_offsets: bool = False
    ) -> EncodedText:
        """Token ids of a text. Control tokens that it spells out are ordinary text.

        Raises InvalidTextError for a text with lone surrogates.
        """
        return self.encode_batch(
            [text], add_special_tokens=add_special_tokens, return_offsets=return_offsets
        )[0]

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        add_special_tokens: bool = True,
        return_offsets: bool = False,
    ) -> list[EncodedText]:
        """Token ids of several texts, encoded in parallel. Raises InvalidTextError."""
        if return_offsets:
            encodings = self._encode(texts, add_special_tokens, with_offsets=True)
            return [
                EncodedText(encoding.ids, _byte_offsets(text, encoding.offsets))
                for text, encoding in zip(texts, encodings, strict=True)
            ]
        encoded: list[EncodedText | None] = [None] * len(texts)
        whole: list[int] = []
        for index, text in enumerate(texts):
            if self._cuts_long_texts and len(text) > 2 * CHUNK_CHARS:
                encoded[index] = EncodedText(self._encode_long(text, add_special_tokens))
            else:
                whole.append(index)
        encodings = self._encode([texts[index] for index in whole], add_special_tokens)
        for index, encoding in zip(whole, encodings, strict=True):
            encoded[index] = EncodedText(encoding.ids)
        return [entry for entry in encoded if entry is not None]

    def chat_template(self, *, with_tools: bool = False, source: str = "") -> ChatTemplate:
        """The template for a conversation: `source` if given, else the model's own.

        Raises NoChatTemplateError if there is none, ChatTemplateError if it cannot be compiled.
        """
        if source:
            return self._template_of_source(source)
        name = TOOL_TEMPLATE if with_tools and TOOL_TEMPLATE in self._templates else None
        template = self._templates.get(name or DEFAULT_TEMPLATE)
        if template is None:
            raise NoChatTemplateError("the model has no chat template")
        if isinstance(template, ChatTemplateError):
            raise template
        return template

    def apply_chat_template(
        self,
        given: TemplateInput,
        *,
        template: ChatTemplate | None = None,
        limits: RenderLimits | None = None,
    ) -> RenderedPrompt:
        """The prompt of a conversation; only the template can place control tokens.

        Raises:
            ChatTemplateError: the template refused the conversation, failed or broke a limit.
            InvalidTextError: the prompt has lone surrogates.
        """
        template = template or self.chat_template(with_tools=bool(given.tools))
        rendered = template.render(given, limits)
        marked = self._control.mark(rendered)
        return RenderedPrompt(
            text=str(rendered),
            token_ids=self.encode_batch([marked], add_special_tokens=False)[0].token_ids,
        )

    def _encode_long(self, text: str, add_special_tokens: bool) -> list[int]:
        parts = self._encode(cut(text), add_special_tokens=False)
        token_ids = [token_id for part in parts for token_id in part.ids]
        if add_special_tokens:
            # What the tokenizer puts around any text it puts around the empty one.
            around = self._encode(["x"], add_special_tokens=True)[0]
            inner = len(self._encode(["x"], add_special_tokens=False)[0].ids)
            before = around.special_tokens_mask.index(0)
            token_ids = around.ids[:before] + token_ids + around.ids[before + inner :]
        return token_ids

    def _encode(
        self, texts: Sequence[str], add_special_tokens: bool, *, with_offsets: bool = False
    ) -> list[Encoding]:
        encode = self._backend.encode_batch if with_offsets else self._backend.encode_batch_fast
        encodings: list[Encoding] = []
        with library_failures():
            if len(texts) == 1 and len(texts[0]) <= INLINE_CHARS:
                # Not handed to the library's thread pool, where it would wait for long texts.
                return [self._backend.encode(texts[0], add_special_tokens=add_special_tokens)]
            for batch in in_rounds(texts):
                encodings += encode(batch, add_special_tokens=add_special_tokens)
        return encodings


def load_model_tokenizer(path: Path) -> ModelTokenizer:
    """The tokenizer of a model on disk: a GGUF file, or a directory of the Hugging Face layout.

    Raises TokenizerLoadError.
    """
    with checked_layout(path):
        return ModelTokenizer(open_definition(path))


def _control_tokens(definition: TokenizerDefinition) -> ControlTokens:
    """Special tokens, and other added tokens that the model's own templates write."""
    sources = "\n".join(definition.chat_templates.values())
    return ControlTokens(
        {
            token["id"]: token["content"]
            for token in definition.document.get("added_tokens") or []
            if token["special"] or (token["content"].strip() and token["content"] in sources)
        }
    )


def _backend(definition: TokenizerDefinition, control: ControlTokens) -> Tokenizer:
    document = {**definition.document, "truncation": None, "padding": None}
    try:
        backend = Tokenizer.from_str(json.dumps(control.hide(document)))
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise TokenizerLoadError(definition.source, f"not a valid tokenizer: {error}") from None
    for token_id in control.contents:
        if backend.token_to_id(control.name(token_id)) != token_id:
            raise TokenizerLoadError(
                definition.source,
                f"the added token {control.contents[token_id]!r} does not get its id {token_id}",
            )
    return backend


def _byte_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    if text.isascii():
        return list(offsets)
    position = [0, *accumulate(len(character.encode()) for character in text)]
    return [(position[start], position[end]) for start, end in offsets]
