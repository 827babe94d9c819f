"""What can go wrong with tokenizers and templates, in terms that know nothing of gRPC."""

from __future__ import annotations


class InvalidTextError(ValueError):
    """A text cannot be tokenized, for example because it holds a lone surrogate."""


class UnknownTokenIdError(ValueError):
    """A token id lies outside the vocabulary; `position` is its place in the sequence."""

    def __init__(self, token_id: int, position: int, vocabulary_size: int) -> None:
        self.token_id = token_id
        self.position = position
        super().__init__(f"{token_id} is not in [0, {vocabulary_size})")


class ChatTemplateError(ValueError):
    """A chat template is not valid, refused a conversation, failed on it or broke a limit."""


class NoChatTemplateError(ChatTemplateError):
    """The model brings no chat template."""


class TooManyTokensError(ValueError):
    """An input has more tokens than the model takes; `index` is its place in the batch."""

    def __init__(self, index: int, tokens: int, limit: int) -> None:
        self.index = index
        self.tokens = tokens
        self.limit = limit
        super().__init__(f"has {tokens} tokens, more than the {limit} that the model takes")
