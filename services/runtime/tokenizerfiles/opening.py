"""From a model's path to the definition of its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.runtime.tokenizerfiles.definition import TokenizerDefinition
from services.runtime.tokenizerfiles.errors import TokenizerLoadError
from services.runtime.tokenizerfiles.gguf_definition import definition_from_gguf
from services.runtime.tokenizerfiles.huggingface_definition import definition_from_directory


@contextmanager
def checked_layout(path: Path) -> Iterator[None]:
    """Has whatever is made of a definition fail with TokenizerLoadError where a file is not laid
    out as it should be."""
    try:
        yield
    except TokenizerLoadError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        problem = f"the tokenizer is not laid out as expected: {type(error).__name__}: {error}"
        raise TokenizerLoadError(path, problem) from error


def open_definition(path: Path) -> TokenizerDefinition:
    """What a GGUF file or a directory of the Hugging Face layout says of its tokenizer.

    A directory without a tokenizer.json but with one GGUF file stands for that file.
    Raises TokenizerLoadError.
    """
    if not path.exists():
        raise TokenizerLoadError(path, "no such file or directory")
    with checked_layout(path):
        if not path.is_dir():
            return definition_from_gguf(path)
        files = sorted(path.glob("*.gguf"))
        if not (path / "tokenizer.json").is_file() and len(files) == 1:
            return definition_from_gguf(files[0])
        return definition_from_directory(path)
