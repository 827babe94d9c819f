"""A small tokenizer of BERT's kind, for small random encoders: one token a character."""

from __future__ import annotations

import string
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
VOCABULARY = {
    token: token_id
    for token_id, token in enumerate(
        (
            *SPECIAL_TOKENS,
            *string.ascii_lowercase,
            *string.digits,
            *(f"##{each}" for each in string.ascii_lowercase + string.digits),
        )
    )
}


def save_small_tokenizer(path: Path, *, strategy: str | None = None) -> PreTrainedTokenizerFast:
    """Saves it beside a model of 97 tokens or more, and returns it as `transformers` has it.
    `strategy`: of truncation, as tokenizer.json names it."""
    backend = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", VOCABULARY["[CLS]"]), ("[SEP]", VOCABULARY["[SEP]"])],
    )
    if strategy is not None:
        backend.enable_truncation(64, strategy=strategy)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(path)
    # What transformers saves names no truncation that it was not asked for itself.
    backend.save(str(path / "tokenizer.json"))
    return tokenizer
