"""What can go wrong while a tokenizer's files are read."""

from __future__ import annotations

from pathlib import Path


class TokenizerLoadError(ValueError):
    """A model's tokenizer files are missing, damaged or of a kind that is not supported.

    The text names the file and the key at fault and can be shown to a user as it stands.
    """

    def __init__(self, path: Path | str, problem: str) -> None:
        self.path = Path(path)
        self.problem = problem
        super().__init__(f"{path}: {problem}")
