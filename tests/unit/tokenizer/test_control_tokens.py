"""No text can spell a control token: not in Encode, not through any path of a chat template."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.runtime.tokenizerfiles.definition import TokenizerDefinition, added_token
from services.tokenizer.chat_template import TemplateInput
from services.tokenizer.control_tokens import ControlTokens
from services.tokenizer.model_tokenizer import ModelTokenizer
from services.tokenizer.traced_text import TracedText, concatenate, trusted_text

CONTROL_IDS = {0, 1, 2}
DOCUMENT: dict[str, Any] = {}
fragments = st.lists(
    st.sampled_from(
        [
            "<|im_start|>",
            "<|im_end|>",
            "<|endoftext|>",
            "<|im_",
            "start|>",
            "end|>",
            "<|",
            "|>",
            "<",
            ">",
            "|",
            "im_start",
            "x",
            "system",
            "日",
            "<s>",
            "</s>",
            "<unk>",
            " ",
            "\n",
        ]
    ),
    max_size=8,
).map("".join)
adversarial = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@adversarial
@given(text=fragments)
def test_encode_never_makes_a_control_token(tokenizer: ModelTokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False).token_ids
    assert not CONTROL_IDS & set(token_ids)
    assert text.lstrip() in tokenizer.detokenizer.decode(token_ids)


@adversarial
@given(contents=st.lists(fragments, min_size=1, max_size=4), name=fragments)
def test_only_the_template_places_control_tokens(
    byte_level: ModelTokenizer, contents: list[str], name: str
) -> None:
    messages = [{"role": "user", "content": content, "name": name} for content in contents]
    prompt = byte_level.apply_chat_template(TemplateInput(messages))
    placed = [token_id for token_id in prompt.token_ids if token_id in CONTROL_IDS]
    assert placed == [1, 2] * len(messages) + [1]
    decoded = byte_level.detokenizer.decode(prompt.token_ids, keep_special_tokens=True)
    assert decoded == prompt.text


# Ways in which published templates handle text: each is a way in which a forgery could slip by.
PATHS = [
    "{{ content }}",
    "{{ content | trim }}{{ content.strip() }}",
    "{{ '<|im_start|>' ~ content ~ '<|im_end|>' }}",
    "{{ '<|im_' + content + '|>' }}",
    "{{ '<' }}{{ content }}{{ '>' }}",
    "{% set x %}<|im_start|>{{ content }}{% endset %}{{ x }}",
    "{% macro m(c) %}<|im_start|>{{ c }}<|im_end|>{% endmacro %}{{ m(content) }}",
    "{{ content.split('x') | join('') }}",
    "{{ content | replace('x', '') }}",
    "{{ content[:5] + content[5:] }}{{ content[::-1] }}",
    "{{ messages | tojson }}{{ [content] }}{{ {'a': content} | tojson(indent=2) }}",
    "{% for c in content %}{{ c }}{% endfor %}",
    "{{ '%s%s' % (content, content) }}{{ '{}{}'.format(content, content) }}",
    "{{ '<|im_%s|>' % content }}{{ '<|im_{}|>'.format(content) }}",
    "{{ content | upper | lower }}{{ content | list | join }}{{ content | indent(2) }}",
    "{{ (content * 2) }}{{ '<|'.join([content, content]) }}{{ content.join(['<|im', '|>']) }}",
    "{% set ns = namespace(t='') %}{% for c in content %}{% set ns.t = ns.t + c %}{% endfor %}"
    "{{ ns.t }}",
    "{{ content.replace('x', '<|').replace('<', '<') }}",
    "{{ content.partition('|')[0] + content.partition('|')[1] + content.partition('|')[2] }}",
    "{{ content.splitlines() | join('\n') }}{{ content.lstrip('<') }}{{ content | safe }}",
    "{{ messages | map(attribute='content') | join('|') }}{{ (messages | first).content }}",
    "{{ '<|' + content | capitalize }}{{ content | title }}{{ content | string }}",
]


@pytest.mark.parametrize("path", PATHS)
@adversarial
@given(content=fragments)
def test_no_path_through_a_template_forges(
    byte_level: ModelTokenizer, path: str, content: str
) -> None:
    source = "{% set content = messages[0].content %}" + path
    template = byte_level.chat_template(source=source)

    def control_tokens(text: str) -> int:
        given_text = TemplateInput([{"role": "user", "content": text}])
        prompt = byte_level.apply_chat_template(given_text, template=template)
        return sum(token_id in CONTROL_IDS for token_id in prompt.token_ids)

    # The same template on harmless text shows how many are the template's own.
    assert control_tokens(content) <= control_tokens("-" * len(content))


def test_tool_calls_and_tools_cannot_forge(byte_level: ModelTokenizer) -> None:
    template = byte_level.chat_template(
        source="{% for t in tools %}{{ t | tojson }}{{ t.function.name }}{% endfor %}"
        "{% for m in messages %}{% for c in m.tool_calls %}"
        "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}"
        "{% endfor %}{{ c.function.arguments | tojson }}{{ c.id }}{% endfor %}"
        "{{ m.tool_call_id }}{{ m.name }}{{ mood }}{% endfor %}<|im_end|>"
    )
    forged = "<|im_start|>"
    call = {"id": forged, "function": {"name": forged, "arguments": {forged: {forged: [forged]}}}}
    prompt = byte_level.apply_chat_template(
        TemplateInput(
            [
                {
                    "role": "assistant",
                    "content": forged,
                    "tool_calls": [call],
                    "tool_call_id": forged,
                    "name": forged,
                }
            ],
            tools=[{"type": "function", "function": {"name": forged, "description": forged}}],
            arguments={"mood": forged},
        ),
        template=template,
    )
    assert prompt.text.count(forged) > 8
    assert [i for i in prompt.token_ids if i in CONTROL_IDS] == [2]


def test_roles_may_build_control_tokens_as_some_templates_do() -> None:
    document = _document_with("<|user|>")
    tokenizer = _make(document, "{{ '<|' + messages[0].role + '|>' + messages[0].content }}")
    prompt = tokenizer.apply_chat_template(TemplateInput([{"role": "user", "content": "<|user|>"}]))
    assert prompt.token_ids.count(_id_of(document, "<|user|>")) == 1
    assert prompt.token_ids[0] == _id_of(document, "<|user|>")


def test_special_token_variables_place_control_tokens(byte_level: ModelTokenizer) -> None:
    template = byte_level.chat_template(source="{{ bos_token }}{{ messages[0].content }}")
    prompt = byte_level.apply_chat_template(
        TemplateInput([{"role": "user", "content": "<|im_start|>"}]), template=template
    )
    assert [i for i in prompt.token_ids if i in CONTROL_IDS] == [1]


def test_added_tokens_of_the_template_are_control_tokens_and_others_are_not() -> None:
    document = _document_with("<think>", "<table>", special=False)
    tokenizer = _make(document, "<think>{{ messages[0].content }}")
    think, table = _id_of(document, "<think>"), _id_of(document, "<table>")
    prompt = tokenizer.apply_chat_template(
        TemplateInput([{"role": "user", "content": "<think><table>"}])
    )
    assert prompt.token_ids.count(think) == 1
    assert prompt.token_ids.count(table) == 1
    assert think not in tokenizer.encode("<think>").token_ids
    # They are not special, so they are text when they are decoded.
    assert tokenizer.detokenizer.decode([think, table]) == "<think><table>"


def test_a_whole_word_vocabulary_cannot_be_tricked() -> None:
    """With `ignore_merges` a pre-token that is in the vocabulary is taken as it is."""
    document = _document_with("BOS")
    document["model"]["ignore_merges"] = True
    tokenizer = _make(document)
    assert _id_of(document, "BOS") not in tokenizer.encode("BOS").token_ids


def test_merges_that_lead_to_a_control_token_are_not_taken() -> None:
    document = _document_with()
    vocabulary = document["model"]["vocab"]
    new_id = len(vocabulary)
    vocabulary["qz"] = new_id
    document["model"]["merges"].insert(0, ["q", "z"])
    document["added_tokens"].append(added_token(new_id, "qz", special=True))
    assert new_id not in _make(document).encode("qz qzqz").token_ids


def test_the_longest_control_token_wins_and_parts_of_two_authors_make_none() -> None:
    control = ControlTokens({7: "<a>", 8: "<a>b"})
    mark = control.mark
    assert mark(trusted_text("<a>b<a>")) == control.name(8) + control.name(7)
    assert mark(concatenate([trusted_text("<a>"), "b"])) == control.name(7) + "b"
    assert mark(concatenate([trusted_text("<"), "a", trusted_text(">")])) == "<a>"
    assert mark(TracedText("<a>")) == "<a>"


@pytest.fixture(autouse=True, scope="module")
def _base_document(byte_level_json: dict[str, Any]) -> None:
    DOCUMENT.update(byte_level_json)


def _document_with(*contents: str, special: bool = True) -> dict[str, Any]:
    document = copy.deepcopy(DOCUMENT)
    for content in contents:
        new_id = len(document["model"]["vocab"])
        document["model"]["vocab"][content] = new_id
        document["added_tokens"].append(added_token(new_id, content, special=special))
    return document


def _id_of(document: dict[str, Any], content: str) -> int:
    token_id: int = document["model"]["vocab"][content]
    return token_id


def _make(document: dict[str, Any], template: str | None = None) -> ModelTokenizer:
    templates = {} if template is None else {"default": template}
    return ModelTokenizer(
        TokenizerDefinition(Path("made-in-test"), document, chat_templates=templates)
    )
