"""What the tokens of the model spell, from its own files."""

from __future__ import annotations

from pathlib import Path

import msgspec

from services.engine.core.errors import ConstraintsUnavailableError
from services.runtime.tokenizerfiles.errors import TokenizerLoadError
from services.runtime.tokenizerfiles.opening import checked_layout, open_definition
from services.runtime.tokenizerfiles.token_bytes import token_bytes


class Vocabulary(msgspec.Struct, frozen=True):
    """The tokens of a model.

    `pieces[i]` are the bytes of token i, empty where no text is to become of it, [vocab_size];
    special tokens are no text either, whatever their bytes are.
    """

    pieces: list[bytes]
    special_token_ids: list[int]
    eos_token_ids: list[int]


def read_vocabulary(
    model_path: Path | str, vocab_size: int, eos_token_ids: tuple[int, ...]
) -> Vocabulary:
    """The vocabulary of the model at `model_path`, as wide as its logits.

    Raises:
        ConstraintsUnavailableError: its files do not tell.
    """
    path = Path(model_path)
    try:
        definition = open_definition(path)
        with checked_layout(path):
            table = token_bytes(definition)
    except TokenizerLoadError as error:
        raise ConstraintsUnavailableError(f"the model's tokens are not known: {error}") from None
    ends = [token_id for token_id in eos_token_ids if token_id < vocab_size]
    if not ends:
        raise ConstraintsUnavailableError("the model has no token that ends a sequence")
    pieces = [*table.pieces[:vocab_size]]
    pieces += [b""] * (vocab_size - len(pieces))
    special = {*ends, *(token_id for token_id in table.special_ids if token_id < vocab_size)}
    return Vocabulary(pieces, sorted(special), ends)
