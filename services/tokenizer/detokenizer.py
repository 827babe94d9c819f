"""Token ids back into text: in one go, or piece by piece as they come.

Every token stands for some bytes, and a text is those bytes read as UTF-8. That holds for
byte-level BPE, whose tokens spell bytes in an alphabet of printable characters (Radford et al.
2019, "Language Models are Unsupervised Multitask Learners", section 2.2), and for SentencePiece
models, whose pieces are text with U+2581 for the space and whose `<0xNN>` pieces are single bytes
(Kudo and Richardson 2018, https://aclanthology.org/D18-2012). What depends on the place in the
text is only how it begins: some models drop the space that their encoder put there.

Bytes that are not UTF-8 become U+FFFD, one for each maximal subpart as the Unicode standard
recommends (section 3.9), so that what was sent never has to be taken back.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from services.runtime.tokenizerfiles.token_bytes import TextBeginning
from services.tokenizer.errors import UnknownTokenIdError


class Detokenizer:
    """What each token of a vocabulary stands for.

    Args:
        pieces: bytes of each token id, [vocabulary size]; empty for ids that have no token.
        special_ids: control tokens, which leave no text unless they are asked for.
        beginning: how the beginning of a text differs.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        special_ids: Iterable[int],
        beginning: TextBeginning | None = None,
    ) -> None:
        self.beginning = beginning or TextBeginning({})
        self._all = list(pieces)
        self._visible = list(pieces)
        for token_id in special_ids:
            self._visible[token_id] = b""
        self._special_ids = frozenset(special_ids)

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids."""
        return len(self._all)

    def piece(self, token_id: int) -> bytes:
        """Bytes of one token, control tokens included. Raises UnknownTokenIdError."""
        if not 0 <= token_id < len(self._all):
            raise UnknownTokenIdError(token_id, 0, len(self._all))
        return self._all[token_id]

    def pieces(self, keep_special_tokens: bool) -> list[bytes]:
        """Bytes of every token, [vocabulary size]; not to be changed."""
        return self._all if keep_special_tokens else self._visible

    def is_hidden(self, token_id: int, keep_special_tokens: bool) -> bool:
        """Whether a token leaves no trace in the text."""
        return not keep_special_tokens and token_id in self._special_ids

    def decode(self, token_ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        """Text of a whole sequence. Raises UnknownTokenIdError."""
        decoder = IncrementalDecoder(self, keep_special_tokens=keep_special_tokens)
        return decoder.feed(token_ids) + decoder.finish()


class IncrementalDecoder:
    """Text of a sequence whose tokens come a few at a time.

    The pieces that `feed` and `finish` return add up to what `Detokenizer.decode` makes of all
    tokens at once; none ends within a character. The work is proportional to the tokens fed.
    """

    def __init__(self, detokenizer: Detokenizer, *, keep_special_tokens: bool = False) -> None:
        self._detokenizer = detokenizer
        self._keep_special_tokens = keep_special_tokens
        self._pieces = detokenizer.pieces(keep_special_tokens)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._fed_tokens = 0
        self._at_first_token = bool(detokenizer.beginning.pieces)
        self._spaces_to_strip = detokenizer.beginning.stripped_spaces
        # Which token each byte belongs to that is held back as part of a character: at most three.
        self._held_owners: list[int] = []

    @property
    def decoded_tokens(self) -> int:
        """How many tokens from the first on have all of their text returned already."""
        return self._held_owners[0] if self._held_owners else self._fed_tokens

    def feed(self, token_ids: Sequence[int]) -> str:
        """Returns the text that the tokens complete.

        Raises UnknownTokenIdError, and then has taken none of the tokens.
        """
        pieces = self._pieces
        try:
            new = [pieces[token_id] for token_id in token_ids]
        except IndexError:
            raise self._unknown(token_ids) from None
        if token_ids and min(token_ids) < 0:
            raise self._unknown(token_ids)
        if self._at_first_token:
            self._begin(token_ids, new)
        if self._spaces_to_strip:
            self._strip(new)
        text = self._utf8.decode(b"".join(new))
        self._note_held(new)
        self._fed_tokens += len(new)
        return text

    def finish(self) -> str:
        """Returns what was held back: U+FFFD for a character that never became whole."""
        self._held_owners.clear()
        return self._utf8.decode(b"", final=True)

    def _unknown(self, token_ids: Sequence[int]) -> UnknownTokenIdError:
        size = len(self._pieces)
        position = next(i for i, token_id in enumerate(token_ids) if not 0 <= token_id < size)
        return UnknownTokenIdError(token_ids[position], position, size)

    def _begin(self, token_ids: Sequence[int], new: list[bytes]) -> None:
        for index, token_id in enumerate(token_ids):
            if not self._detokenizer.is_hidden(token_id, self._keep_special_tokens):
                new[index] = self._detokenizer.beginning.pieces.get(token_id, new[index])
                self._at_first_token = False
                return

    def _strip(self, new: list[bytes]) -> None:
        for index, piece in enumerate(new):
            kept = piece
            while self._spaces_to_strip and kept.startswith(b" "):
                kept = kept[1:]
                self._spaces_to_strip -= 1
            new[index] = kept
            if kept:
                self._spaces_to_strip = 0
                return

    def _note_held(self, new: list[bytes]) -> None:
        held_bytes = len(self._utf8.getstate()[0])
        owners: list[int] = []
        index = len(new)
        while len(owners) < held_bytes and index:
            index -= 1
            count = min(len(new[index]), held_bytes - len(owners))
            owners[:0] = [self._fed_tokens + index] * count
        older = held_bytes - len(owners)
        self._held_owners = (self._held_owners[-older:] if older else []) + owners
