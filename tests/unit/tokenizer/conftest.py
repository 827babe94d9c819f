"""Small tokenizers of every kind, made here, so that unit tests need no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from services.runtime.tokenizerfiles.definition import TokenizerDefinition
from services.tokenizer.model_tokenizer import ModelTokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog. <|im_start|> <|im_end|>",
    "im_start im_end endoftext system user assistant 1234567890",
    "Grüße aus Köln, 日本語のテキスト, Привет мир, 👩‍👩‍👧 emoji \n\n\t tabs",
] * 20

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_document() -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    return document


def sentencepiece_document() -> dict[str, Any]:
    """BPE over characters with byte fallback and a space in front, as SentencePiece makes it."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    document["added_tokens"] = [
        token for token in document["added_tokens"] if not token["content"].startswith("<0x")
    ]
    return document


@pytest.fixture(scope="session")
def byte_level_json() -> dict[str, Any]:
    return byte_level_document()


@pytest.fixture(scope="session")
def byte_level(byte_level_json: dict[str, Any]) -> ModelTokenizer:
    return ModelTokenizer(
        TokenizerDefinition(
            source=Path("made-in-test"),
            document=byte_level_json,
            bos_token_id=1,
            eos_token_ids=(2,),
            chat_templates={"default": CHATML},
            special_tokens={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        )
    )


@pytest.fixture(scope="session")
def sentencepiece_json() -> dict[str, Any]:
    return sentencepiece_document()


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_json: dict[str, Any]) -> ModelTokenizer:
    return ModelTokenizer(
        TokenizerDefinition(
            source=Path("made-in-test"),
            document=sentencepiece_json,
            bos_token_id=1,
            eos_token_ids=(2,),
        )
    )


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> ModelTokenizer:
    made: ModelTokenizer = request.getfixturevalue(request.param)
    return made
