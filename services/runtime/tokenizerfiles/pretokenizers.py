"""How each kind of byte-level BPE vocabulary splits text before merging, by its GGUF name.

A GGUF file names the kind in `tokenizer.ggml.pre`; merges were learned on text split that way, and
a wrong split gives other tokens. The kinds are listed in the GGUF specification's companion table
of pre-tokenizer types (https://github.com/ggml-org/llama.cpp, `llama_vocab_pre_type`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any


@dataclass(frozen=True, slots=True)
class PreTokenizerKind:
    """One way of splitting text.

    `digits` splits off every numeric character alone; `patterns` are applied one after the other,
    and none means the GPT-2 pattern; `nfc` composes characters first; `whole_words` takes a word
    that is in the vocabulary as it is, without merging; `adds_bos` is what holds where a file does
    not say whether a beginning-of-sequence token is added.
    """

    patterns: tuple[str, ...] = ()
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    adds_bos: bool = False

    def to_json(self) -> dict[str, Any]:
        """The pre-tokenizer in the notation of tokenizer.json."""
        steps: list[dict[str, Any]] = []
        if self.digits:
            steps.append({"type": "Digits", "individual_digits": True})
        steps += [
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            }
            for pattern in self.patterns
        ]
        steps.append(
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": False,
                "use_regex": not self.patterns,
            }
        )
        return {"type": "Sequence", "pretokenizers": steps}


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
)

LLAMA3_PATTERN = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}{_REST}"
QWEN2_PATTERN = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{_REST}"
QWEN35_PATTERN = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_PATTERN = rf"{'|'.join(_CASED_WORDS)}|\p{{N}}{_REST_WITH_SLASH}"
GPT4O_PATTERN = (
    "|".join(f"{word}{_CONTRACTIONS}?" for word in _CASED_WORDS)
    + rf"|\p{{N}}{{1,3}}{_REST_WITH_SLASH}"
)
DEEPSEEK3_PATTERNS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
BLOOM_PATTERN = r" ?[^(\s|.,!?…。，、।۔،)]+"

_GPT2 = PreTokenizerKind()
_DIGITS_GPT2 = PreTokenizerKind(digits=True)
_LLAMA3 = PreTokenizerKind((LLAMA3_PATTERN,), whole_words=True, adds_bos=True)
_LLAMA3_MERGING = PreTokenizerKind((LLAMA3_PATTERN,))
_QWEN2 = PreTokenizerKind((QWEN2_PATTERN,), nfc=True)
_GPT4O = PreTokenizerKind((GPT4O_PATTERN,))


def _named(kind: PreTokenizerKind, *names: str) -> dict[str, PreTokenizerKind]:
    return dict.fromkeys(names, kind)


PRE_TOKENIZER_KINDS: dict[str, PreTokenizerKind] = reduce(
    lambda left, right: left | right,
    (
        _named(_GPT2, "gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jina-es", "jina-de", "roberta-bpe"),
        _named(
            _DIGITS_GPT2,
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
        ),
        _named(_LLAMA3, "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"),
        _named(_LLAMA3_MERGING, "dbrx", "smaug-bpe", "glm4", "chatglm-bpe", "lfm2", "midm-2.0"),
        _named(_QWEN2, "qwen2", "deepseek-r1-qwen", "megrez", "kormo"),
        _named(PreTokenizerKind((QWEN2_PATTERN,)), "stablelm2", "hunyuan"),
        _named(PreTokenizerKind((QWEN35_PATTERN,), nfc=True), "qwen35"),
        _named(PreTokenizerKind((TEKKEN_PATTERN,), whole_words=True, adds_bos=True), "tekken"),
        _named(_GPT4O, "gpt-4o", "o200k", "llama4", "minimax-m2", "kanana2"),
        _named(PreTokenizerKind(DEEPSEEK3_PATTERNS), "deepseek-v3"),
        _named(PreTokenizerKind((BLOOM_PATTERN,)), "bloom", "poro-chat", "gpt3-finnish"),
    ),
)
