"""Templates see what published ones need, and none of them can hang, bloat or break the service."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from services.tokenizer.chat_template import ChatTemplate, RenderLimits, TemplateInput
from services.tokenizer.errors import ChatTemplateError, NoChatTemplateError
from services.tokenizer.model_tokenizer import ModelTokenizer

HELLO = TemplateInput([{"role": "user", "content": "Hello"}])
TIGHT = RenderLimits(timeout_s=0.5, max_bytes=1 << 20)


def render(source: str, given: TemplateInput = HELLO, limits: RenderLimits = TIGHT) -> str:
    return str(ChatTemplate(source).render(given, limits))


BOMBS = {
    "endless loops": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "loops over text": "{% set t = 'x' * 90000 %}{% for a in t %}{% for b in t %}"
    "{% endfor %}{% endfor %}",
    "multiplied text": "{{ 'x' * 10**9 }}",
    "multiplied literal": "{{ 'x' * 1000000000 }}",
    "doubled text": "{% set ns = namespace(t='x') %}{% for i in range(99) %}"
    "{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "doubled by tilde": "{% set ns = namespace(t='x') %}{% for i in range(99) %}"
    "{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "replaced text": "{% set ns = namespace(t='xx') %}{% for i in range(99) %}"
    "{% set ns.t = ns.t.replace('x', ns.t) %}{% endfor %}",
    "replace filter": "{% set ns = namespace(t='xx') %}{% for i in range(99) %}"
    "{% set ns.t = ns.t | replace('x', ns.t) %}{% endfor %}",
    "joined text": "{% set t = 'x' * 9999 %}{{ t.join(t) }}",
    "join filter": "{% set t = 'x' * 9999 %}{{ t | join(t) }}",
    "padded text": "{{ 'x'.ljust(10**10) }}",
    "padded center": "{{ 'x'.center(10**10) }}",
    "padded zeros": "{{ 'x'.zfill(10**10) }}",
    "tabs": "{{ '\t'.expandtabs(10**10) }}",
    "percent width": "{{ '%1000000000d' % 3 }}",
    "format width": "{{ '{:>1000000000}'.format(3) }}",
    "nested format width": "{{ '{:>{w}}'.format(3, w=10**9) }}",
    "indent": "{{ 'x' | indent(10**9, true) }}",
    "json indent": "{{ [1] | tojson(indent=10**9) }}",
    "rounding": "{{ 1.5 | round(10**9) }}",
    "power": "{{ 10 ** 10000000000 }}",
    "squares": "{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}"
    "{% endfor %}{{ ns.n }}",
    "number to bytes": "{{ (5).to_bytes(10**10) }}",
    "doubled list": "{% set ns = namespace(t=[1]) %}{% for i in range(99) %}"
    "{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "multiplied list": "{{ ([1] * 10**9) | length }}",
    "shared structure": "{% set ns = namespace(t=[1]) %}{% for i in range(99) %}"
    "{% set ns.t = [ns.t, ns.t] %}{% endfor %}{{ ns.t }}",
    "shared mapping": "{% set ns = namespace(t={}) %}{% for i in range(99) %}"
    "{% set ns.t = dict(a=ns.t, b=ns.t) %}{% endfor %}{{ ns.t == 1 }}",
    "hoarded text": "{% set ns = namespace(t=[]) %}{% set x = 'x' * 900000 %}"
    "{% for i in range(9999) %}{% set ns.t = ns.t + [x ~ i] %}{% endfor %}",
    "long output": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "big range": "{% for i in range(10**9) %}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
    "date": "{{ strftime_now('%1000000000Y') }}",
    "split in characters": "{{ ('x' * 900000) | list | length }}",
    "split in words": "{{ ('x ' * 400000).split(' ') | length }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_malicious_template_ends_soon_and_says_why(name: str) -> None:
    began_s = time.process_time()
    with pytest.raises(ChatTemplateError) as caught:
        render(BOMBS[name])
    assert time.process_time() - began_s < 3
    assert 5 < len(str(caught.value)) < 1000


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{0.__class__}'.format_map({'0': messages}) }}",
    "{{ messages[0]._trusted }}{{ messages[0].content._trusted.x }}",
    "{{ ''.encode('utf-8') }}",
    "{{ namespace(__class__=1) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({}) }}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{{ lipsum() }}",
    "{{ self.__init__ }}{{ cycler.__init__.__globals__ }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_python_is_out_of_reach(source: str) -> None:
    try:
        text = render(source)
    except ChatTemplateError:
        return
    # Jinja answers a forbidden attribute in silence.
    assert text == ""


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% if %}", "line 1"),
        ("\n\n{{ x | nonsense }}", "line 3 .*nonsense"),
        ("{{ raise_exception('No tools, please.') }}", "^No tools, please.$"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[7].content.x }}", "has no element|undefined"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ '%z' % 1 }}", "conversion"),
        ("(" * 10 + "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "compiled|nested|deep"),
        ("x" * (1 << 20) + "x", "characters"),
    ],
)
def test_what_is_wrong_is_said(source: str, says: str) -> None:
    with pytest.raises(ChatTemplateError, match=says):
        render(source)


def test_a_rendering_does_not_disturb_others_on_other_threads() -> None:
    template = ChatTemplate("{% for i in range(2000) %}{{ messages[0].content }}{% endfor %}")
    bomb = ChatTemplate(BOMBS["endless loops"])
    failures: list[BaseException] = []

    def run_bomb() -> None:
        with pytest.raises(ChatTemplateError):
            bomb.render(HELLO, RenderLimits(timeout_s=0.3))

    def run_harmless() -> None:
        try:
            for _ in range(20):
                assert template.render(HELLO, RenderLimits(timeout_s=60)) == "Hello" * 2000
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for run in (run_bomb, run_harmless, run_harmless)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    # What a failed rendering used up is not missing from the next.
    assert render("{{ 'x' * 1000000 }}") == "x" * 1_000_000


def test_variables_of_the_conversation_reach_the_template() -> None:
    given = TemplateInput(
        [{"role": "user", "content": "Hi"}],
        tools=[{"type": "function", "function": {"name": "f"}}],
        add_generation_prompt=False,
        arguments={"enable_thinking": True, "documents": [{"text": "d"}]},
    )
    source = (
        "{{ tools[0].function.name }} {{ add_generation_prompt }} {{ enable_thinking }}"
        " {{ documents[0].text }} {{ other is defined }} {{ strftime_now('%Y') | length }}"
    )
    assert render(source, given) == "f False True d False 4"


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        ("{{ messages[0].content }}!</s>", "Once ", "Once "),
        ("{{ messages[0].content | trim }}!</s>", "Once ", "Once"),
        ("<a>{{ messages[0].content }}</s>", "Once", "<a>Once"),
    ],
)
def test_a_final_message_is_left_open(source: str, content: str, expected: str) -> None:
    given = TemplateInput(
        [{"role": "assistant", "content": content}],
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert render(source, given) == expected


def test_a_final_message_that_is_not_shown_cannot_be_continued() -> None:
    given = TemplateInput(
        [{"role": "assistant", "content": "x"}],
        add_generation_prompt=False,
        continue_final_message=True,
    )
    with pytest.raises(ChatTemplateError, match="continued"):
        render("nothing", given)


def test_the_prompt_is_bounded_in_bytes() -> None:
    given = TemplateInput([{"role": "user", "content": "é" * 600}])
    with pytest.raises(ChatTemplateError, match="1000 bytes"):
        render("{{ messages[0].content }}", given, RenderLimits(max_bytes=1000))


def test_ten_megabytes_of_content_pass_in_good_time() -> None:
    content = "word " * 2_000_000
    source = (
        "{% for m in messages %}<a>{{ m['role'] + '\n' + m['content'] | trim + '<b>' }}{% endfor %}"
    )
    began_s = time.process_time()
    text = render(source, TemplateInput([{"role": "user", "content": content}]), RenderLimits())
    assert time.process_time() - began_s < 1
    assert len(text) == len(content.strip()) + len("<a>user\n<b>")


def test_a_model_without_a_template_says_so(sentencepiece: ModelTokenizer) -> None:
    assert not sentencepiece.has_chat_template
    with pytest.raises(NoChatTemplateError):
        sentencepiece.chat_template()


def test_arguments_nested_too_deeply_are_an_error() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    given = TemplateInput([{"role": "user", "content": "x"}], arguments={"deep": deep})
    with pytest.raises(ChatTemplateError, match="deep"):
        render("x", given)
