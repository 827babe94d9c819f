"""One vocabulary, written as tokenizer.json and as GGUF, gives one tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer

from services.tokenizer.detokenizer import IncrementalDecoder
from services.tokenizer.model_tokenizer import ModelTokenizer, load_model_tokenizer

pytestmark = pytest.mark.slow

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Round the rugged rock the ragged rascal ran, 1234567890 times.",
    "Grüße aus Köln und anderswo",
] * 50
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=100)
thorough = settings(max_examples=200, deadline=None)


def sentencepiece_style() -> Tokenizer:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<unk>", "<s>", "</s>", *byte_tokens],
            show_progress=False,
        ),
    )
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = document["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def unigram_style() -> Tokenizer:
    """A unigram model as T5 has it: every word has its space in front, ends are trimmed."""
    tokenizer = Tokenizer(models.Unigram())
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = metaspace
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=200,
            special_tokens=["<pad>", "</s>", "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), "▁"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def write_unigram_gguf(path: Path, document: dict[str, Any]) -> None:
    vocabulary = document["model"]["vocab"]
    kind = gguf.TokenType
    writer = gguf.GGUFWriter(path, "t5")
    writer.add_tokenizer_model("t5")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_scores([score for _, score in vocabulary])
    writer.add_token_types(
        [kind.CONTROL, kind.CONTROL, kind.UNKNOWN] + [kind.NORMAL] * (len(vocabulary) - 3)
    )
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(path: Path, document: dict[str, Any], *, merges: bool) -> None:
    tokens = sorted(document["model"]["vocab"].items(), key=lambda item: item[1])
    rank = {a + b: index for index, (a, b) in enumerate(document["model"]["merges"])}
    kind = gguf.TokenType
    types = [
        kind.UNKNOWN
        if token == "<unk>"
        else kind.CONTROL
        if token in ("<s>", "</s>")
        else kind.BYTE
        if token.startswith("<0x")
        else kind.NORMAL
        for token, _ in tokens
    ]
    writer = gguf.GGUFWriter(path, "llama")
    for set_size in (
        writer.add_context_length,
        writer.add_embedding_length,
        writer.add_block_count,
        writer.add_feed_forward_length,
        writer.add_head_count,
        writer.add_head_count_kv,
        writer.add_rope_dimension_count,
    ):
        set_size(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_scores([-float(rank.get(token, 10_000)) for token, _ in tokens])
    writer.add_token_types(types)
    if merges:
        writer.add_token_merges([" ".join(pair) for pair in document["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sentencepiece")
    tokenizer = sentencepiece_style()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    document = json.loads(tokenizer.to_str())
    write_gguf(directory / "merges.gguf", document, merges=True)
    write_gguf(directory / "scores.gguf", document, merges=False)
    return directory


@pytest.fixture(scope="module")
def original(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def from_json(directory: Path) -> ModelTokenizer:
    return load_model_tokenizer(directory)


@pytest.fixture(scope="module")
def from_gguf(directory: Path) -> ModelTokenizer:
    return load_model_tokenizer(directory / "merges.gguf")


@pytest.fixture(scope="module")
def from_scores(directory: Path) -> ModelTokenizer:
    return load_model_tokenizer(directory / "scores.gguf")


@pytest.fixture(scope="module")
def transformers_from_scores(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory, gguf_file="scores.gguf")


@thorough
@given(text=texts)
def test_both_formats_encode_as_the_tokenizers_library(
    original: Tokenizer, from_json: ModelTokenizer, from_gguf: ModelTokenizer, text: str
) -> None:
    expected = original.encode(text).ids
    assert from_json.encode(text).token_ids == expected
    assert from_gguf.encode(text).token_ids == expected


@thorough
@given(text=texts)
def test_merges_worked_out_from_scores_encode_as_in_transformers(
    from_scores: ModelTokenizer, transformers_from_scores: Any, text: str
) -> None:
    ours = from_scores.encode(text, add_special_tokens=False).token_ids
    assert ours == transformers_from_scores.encode(text, add_special_tokens=False)


@thorough
@given(text=texts)
def test_text_decodes_as_in_the_tokenizers_library(
    original: Tokenizer, from_json: ModelTokenizer, from_gguf: ModelTokenizer, text: str
) -> None:
    ids = original.encode(text).ids
    expected = original.decode(ids)
    assert from_json.detokenizer.decode(ids) == expected
    assert from_gguf.detokenizer.decode(ids) == expected
    decoder = IncrementalDecoder(from_gguf.detokenizer)
    assert "".join(decoder.feed([i]) for i in ids) + decoder.finish() == expected


@thorough
@given(ids=st.lists(st.integers(0, 599), max_size=40), keep=st.booleans())
def test_tokens_without_single_bytes_decode_as_in_the_tokenizers_library(
    original: Tokenizer, from_json: ModelTokenizer, ids: list[int], keep: bool
) -> None:
    """Runs of byte tokens that are not UTF-8 are left out: the library puts U+FFFD for each byte
    of the whole run, good characters included, which no stream could send as it goes."""
    ids = [i for i in ids if not 3 <= i < 259 and i < original.get_vocab_size()]
    expected = original.decode(ids, skip_special_tokens=not keep)
    assert from_json.detokenizer.decode(ids, keep_special_tokens=keep) == expected


def test_what_the_files_say_is_told(from_json: ModelTokenizer, from_gguf: ModelTokenizer) -> None:
    assert from_json.kind == from_gguf.kind == "sentencepiece-bpe"
    assert from_json.bos_token_id == from_gguf.bos_token_id == 1
    assert from_json.eos_token_ids == (2, 5)
    assert from_gguf.eos_token_ids == (2,)
    assert from_json.vocabulary_size == from_gguf.vocabulary_size
    assert not from_gguf.has_chat_template


@pytest.mark.parametrize("forged", ["<s>", "</s>", "a</s>b", "<unk>", "<0x0A>"])
def test_control_tokens_cannot_be_spelled(
    from_json: ModelTokenizer,
    from_gguf: ModelTokenizer,
    from_scores: ModelTokenizer,
    forged: str,
) -> None:
    for tokenizer in (from_json, from_gguf, from_scores):
        ids = tokenizer.encode(forged, add_special_tokens=False).token_ids
        assert not {0, 1, 2} & set(ids)
        assert tokenizer.detokenizer.decode(ids) == forged


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, list[ModelTokenizer]]:
    directory = tmp_path_factory.mktemp("unigram")
    tokenizer = unigram_style()
    tokenizer.save(str(directory / "tokenizer.json"))
    write_unigram_gguf(directory / "unigram.gguf", json.loads(tokenizer.to_str()))
    loaded = [load_model_tokenizer(directory), load_model_tokenizer(directory / "unigram.gguf")]
    return tokenizer, loaded


@thorough
@given(text=texts.filter(lambda text: "<" not in text), ids=st.lists(st.integers(0, 199)))
def test_unigram_models_are_those_of_the_tokenizers_library(
    unigram: tuple[Tokenizer, list[ModelTokenizer]], text: str, ids: list[int]
) -> None:
    original, loaded = unigram
    ids = [token_id for token_id in ids if token_id < original.get_vocab_size()]
    encoded = original.encode(text).ids
    for tokenizer in loaded:
        assert tokenizer.kind == "sentencepiece-unigram"
        assert tokenizer.encode(text).token_ids == encoded
        for some_ids in (encoded, ids):
            assert tokenizer.detokenizer.decode(some_ids) == original.decode(some_ids)
            decoder = IncrementalDecoder(tokenizer.detokenizer)
            pieces = [decoder.feed([token_id]) for token_id in some_ids]
            assert "".join(pieces) + decoder.finish() == original.decode(some_ids)


@pytest.mark.parametrize("forged", ["</s>", "<pad>", "a</s>b</s>", "<unk>"])
def test_a_unigram_vocabulary_cannot_be_tricked(
    unigram: tuple[Tokenizer, list[ModelTokenizer]], forged: str
) -> None:
    for tokenizer in unigram[1]:
        ids = tokenizer.encode(forged, add_special_tokens=False).token_ids
        # What the vocabulary has no piece for is unknown, and the model's own word for that.
        assert not {0, 1} & set(ids)
