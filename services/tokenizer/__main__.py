"""`python -m services.tokenizer` runs the tokenizer."""

from __future__ import annotations

from services.runtime.server import run
from services.tokenizer.service import TokenizerService

if __name__ == "__main__":
    run(TokenizerService, TokenizerService.name)
