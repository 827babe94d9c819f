"""What the `tokenizers` library raises, in terms of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from services.tokenizer.errors import InvalidTextError


@contextmanager
def library_failures() -> Iterator[None]:
    """Around calls of the library that are given text. Raises InvalidTextError and RuntimeError."""
    try:
        yield
    except (UnicodeEncodeError, TypeError):
        raise InvalidTextError("the text holds lone surrogates") from None
    except BaseException as error:
        if not is_panic(error):
            raise
        raise RuntimeError(f"the tokenizers library failed: {error}") from None


def is_panic(error: BaseException) -> bool:
    """Whether the library's native code gave up; it is no Exception, to pass through handlers."""
    return type(error).__name__ == "PanicException"
