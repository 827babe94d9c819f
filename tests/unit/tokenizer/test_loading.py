"""Tokenizers load from a directory or a GGUF file; what cannot be loaded says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from services.runtime.tokenizerfiles.errors import TokenizerLoadError
from services.runtime.tokenizerfiles.pretokenizers import PRE_TOKENIZER_KINDS
from services.tokenizer.model_tokenizer import load_model_tokenizer

CONTROL, NORMAL, USER_DEFINED = 3, 1, 4


def write_gguf(path: Path, document: dict[str, Any], **changes: Any) -> Path:
    """A byte-level tokenizer as GGUF; `changes` replace or, with None, leave out keys."""
    tokens = [token for token, _ in sorted(document["model"]["vocab"].items(), key=lambda i: i[1])]
    keys: dict[str, Any] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3),
        "merges": [" ".join(pair) for pair in document["model"]["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
    } | changes
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif value is not None:
            writer.add_array(name, value)
    writer.add_string("tokenizer.chat_template", "{{ bos_token }}{{ messages[0].content }}")
    writer.add_string("tokenizer.chat_template.tool_use", "with tools")
    writer.add_tensor("t", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_tells_all_there_is(tmp_path: Path, byte_level_json: dict[str, Any]) -> None:
    path = write_gguf(tmp_path / "m.gguf", byte_level_json, eot_token_id=0, add_bos_token=True)
    tokenizer = load_model_tokenizer(path)
    assert tokenizer.kind == "byte-level-bpe"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2, 0))
    assert tokenizer.vocabulary_size == len(byte_level_json["model"]["vocab"])
    assert tokenizer.has_chat_template
    assert tokenizer.chat_template(with_tools=True).source == "with tools"
    with_bos = tokenizer.encode("fox").token_ids
    assert with_bos == [1, *tokenizer.encode("fox", add_special_tokens=False).token_ids]
    # A directory that holds nothing but the file stands for it.
    assert load_model_tokenizer(tmp_path).revision == tokenizer.revision


def test_the_revision_is_the_content_s(tmp_path: Path, byte_level_json: dict[str, Any]) -> None:
    first = load_model_tokenizer(write_gguf(tmp_path / "a.gguf", byte_level_json))
    again = load_model_tokenizer(write_gguf(tmp_path / "b.gguf", byte_level_json))
    other = load_model_tokenizer(write_gguf(tmp_path / "c.gguf", byte_level_json, pre="smollm"))
    assert first.revision == again.revision != other.revision


@pytest.mark.parametrize("kind", sorted(PRE_TOKENIZER_KINDS))
def test_every_known_split_loses_no_text(
    tmp_path: Path, byte_level_json: dict[str, Any], kind: str
) -> None:
    tokenizer = load_model_tokenizer(write_gguf(tmp_path / "m.gguf", byte_level_json, pre=kind))
    text = "It's 12345 o'clock  IN Köln,\r\n\n日本 (x) ok/\n"
    token_ids = tokenizer.encode(text, add_special_tokens=False).token_ids
    assert tokenizer.detokenizer.decode(token_ids) == text


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [
        ("gpt-2", ["it", "'s", " 12345", " ", " x"]),
        ("smollm", ["it", "'s", " ", "1", "2", "3", "4", "5", " ", " x"]),
        ("llama-bpe", ["it", "'s", " ", "123", "45", " ", " x"]),
        ("qwen2", ["it", "'s", " ", "1", "2", "3", "4", "5", " ", " x"]),
    ],
)
def test_the_kinds_split_as_their_models_do(kind: str, pieces: list[str]) -> None:
    splitter = pre_tokenizers.Sequence([])
    splitter.__setstate__(json.dumps(PRE_TOKENIZER_KINDS[kind].to_json()).encode())
    text = "it's 12345  x"
    assert [text[a:b] for _, (a, b) in splitter.pre_tokenize_str(text)] == pieces


def test_user_defined_tokens_are_found_in_text_and_stay_in_it(
    tmp_path: Path, byte_level_json: dict[str, Any]
) -> None:
    document = json.loads(json.dumps(byte_level_json))
    new_id = len(document["model"]["vocab"])
    document["model"]["vocab"]["<tab>"] = new_id
    types = [CONTROL] * 3 + [NORMAL] * (new_id - 3) + [USER_DEFINED]
    tokenizer = load_model_tokenizer(write_gguf(tmp_path / "m.gguf", document, token_type=types))
    assert new_id in tokenizer.encode("a<tab>b").token_ids
    assert tokenizer.detokenizer.decode([new_id]) == "<tab>"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pre": "martian"}, "'martian'.*tokenizer.ggml.pre"),
        ({"pre": None}, "tokenizer.ggml.pre is missing"),
        ({"model": "rwkv"}, "'rwkv'.*tokenizer.ggml.model"),
        ({"model": None}, "tokenizer.ggml.model"),
        ({"tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens.*not a list of strings"),
        ({"merges": None}, "tokenizer.ggml.merges"),
        ({"merges": ["nospace"]}, "not a valid tokenizer|merge"),
        ({"merges": ["unheard of"]}, "not a valid tokenizer"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type"),
        ({"bos_token_id": 10**6}, "bos_token_id.*1000000"),
        ({"add_bos_token": "yes"}, "add_bos_token.*boolean"),
    ],
)
def test_what_is_wrong_with_a_gguf_file_is_named(
    tmp_path: Path, byte_level_json: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", byte_level_json, **changes)
    with pytest.raises(TokenizerLoadError, match=says) as caught:
        load_model_tokenizer(path)
    assert str(path) in str(caught.value)


def test_a_truncated_file_is_named(tmp_path: Path, byte_level_json: dict[str, Any]) -> None:
    path = write_gguf(tmp_path / "m.gguf", byte_level_json)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(TokenizerLoadError, match=r"m\.gguf"):
        load_model_tokenizer(path)


def write_directory(path: Path, document: dict[str, Any], **files: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(document))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_a_directory_tells_all_there_is(tmp_path: Path, byte_level_json: dict[str, Any]) -> None:
    size = len(byte_level_json["model"]["vocab"])
    path = write_directory(
        tmp_path,
        byte_level_json,
        tokenizer_config={
            "bos_token": {"content": "<|im_start|>"},
            "eos_token": "<|im_end|>",
            "chat_template": [
                {"name": "default", "template": "old"},
                {"name": "tool_use", "template": "tools"},
            ],
            "added_tokens_decoder": {str(size): {"content": "<extra>", "special": True}},
        },
        generation_config={"eos_token_id": [0, 2]},
        config={"eos_token_id": 77},
    )
    (path / "chat_template.jinja").write_text("new")
    tokenizer = load_model_tokenizer(path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (0, 2))
    assert tokenizer.chat_template().source == "new"
    assert tokenizer.chat_template(with_tools=True).source == "tools"
    assert tokenizer.vocabulary_size == size + 1
    assert tokenizer.detokenizer.decode([size]) == ""
    assert tokenizer.detokenizer.decode([size], keep_special_tokens=True) == "<extra>"
    assert size not in tokenizer.encode("<extra>").token_ids


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "None is not supported"),
        ('{"model": {"type": "Oracle"}}', "'Oracle' is not supported"),
        ('{"model": {"type": "BPE"}}', "no vocabulary"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}}', "not a valid"),
        (
            '{"model": {"type": "BPE", "vocab": {"a": 0, "#b": 1, "ab": 2, "aa": 3},'
            ' "merges": ["a #b", "a a"], "continuing_subword_prefix": "#"}}',
            "'a a' does not continue",
        ),
        (
            '{"model": {"type": "BPE", "vocab": {}, "merges": []}, "decoder": {"type": "CTC",'
            ' "pad_token": "_", "word_delimiter_token": "|", "cleanup": true}}',
            "'CTC'",
        ),
    ],
)
def test_what_is_wrong_with_a_directory_is_named(
    tmp_path: Path, content: str | None, says: str
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerLoadError, match=says):
        load_model_tokenizer(tmp_path)


def test_a_broken_template_fails_its_requests_and_not_the_model(
    tmp_path: Path, byte_level_json: dict[str, Any]
) -> None:
    path = write_directory(
        tmp_path, byte_level_json, tokenizer_config={"chat_template": "{% if %}"}
    )
    tokenizer = load_model_tokenizer(path)
    assert tokenizer.encode("fox").token_ids
    with pytest.raises(ValueError, match="line 1"):
        tokenizer.chat_template()


def test_offsets_count_utf8_bytes(tmp_path: Path, byte_level_json: dict[str, Any]) -> None:
    path = write_gguf(tmp_path / "m.gguf", byte_level_json, add_bos_token=True)
    tokenizer = load_model_tokenizer(path)
    text = "fox é日 dog"
    encoded = tokenizer.encode(text, return_offsets=True)
    assert encoded.offsets is not None
    assert encoded.offsets[0] == (0, 0)
    raw = text.encode()
    for token_id, (start, end) in zip(encoded.token_ids[1:], encoded.offsets[1:], strict=True):
        assert tokenizer.detokenizer.piece(token_id) in raw[start:end]
    covered = {byte for start, end in encoded.offsets for byte in range(start, end)}
    assert covered == set(range(len(raw)))


def test_lone_surrogates_are_refused(tmp_path: Path, byte_level_json: dict[str, Any]) -> None:
    tokenizer = load_model_tokenizer(write_gguf(tmp_path / "m.gguf", byte_level_json))
    with pytest.raises(ValueError, match="lone surrogates"):
        tokenizer.encode("a\ud800b")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_document_loads_or_is_refused(
    data: st.DataObject, byte_level_json: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    document = json.loads(json.dumps(byte_level_json))
    for _ in range(data.draw(st.integers(1, 3))):
        holder: Any = document
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys[:12]))
            if isinstance(holder[key], (dict, list)) and data.draw(st.booleans()):
                holder = holder[key]
                continue
            if data.draw(st.booleans()):
                del holder[key]
            else:
                holder[key] = data.draw(
                    st.sampled_from([None, -1, 2**40, "", "x", "\ud800", [], {}, True, 1.5, [[]]])
                )
            break
    path = write_directory(tmp_path_factory.mktemp("damaged"), document)
    try:
        tokenizer = load_model_tokenizer(path)
    except TokenizerLoadError:
        return
    assert tokenizer.vocabulary_size >= 0
