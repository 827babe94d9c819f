"""The interactive chat remembers what was said, and goes on after every mishap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from rich.console import Console

from meshserve import Client, Message
from meshserve.cli.conversation import Conversation
from meshserve.v1 import gateway_pb2
from tests.fakes.scripted_gateway import ScriptedGateway

Response = gateway_pb2.StreamChatResponse


def echoing(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
    text = request.request.conversation.messages[-1].content
    yield Response(chunk={"deltas": [{"content": f"You said {text}"}]})
    yield Response(complete={"finish_reason": "FINISH_REASON_STOP"})


@pytest.fixture
def talk(gateway: ScriptedGateway) -> Iterator[Callable[..., Conversation]]:
    """Holds a conversation of these lines; an exception among them is raised at the prompt."""
    gateway.on("StreamChat", echoing)
    with Client(gateway.target, api_key="") as client:

        def hold(*lines: str | BaseException, system: str | None = None) -> Conversation:
            pending = iter([*lines, EOFError()])

            def read_line(prompt: str) -> str:
                line = next(pending)
                if isinstance(line, BaseException):
                    raise line
                return line

            conversation = Conversation(
                client, {}, system, read_line=read_line, console=Console(width=100)
            )
            conversation.run()
            return conversation

        yield hold


def test_each_turn_is_sent_with_those_before_it(
    gateway: ScriptedGateway, talk: Callable[..., Conversation]
) -> None:
    conversation = talk("one", "  ", "two", system="Be brief.")
    assert conversation.messages == [
        Message("user", "one"),
        Message("assistant", "You said one"),
        Message("user", "two"),
        Message("assistant", "You said two"),
    ]
    sent = gateway.requests[1].request.conversation.messages
    assert [message.content for message in sent] == ["Be brief.", "one", "You said one", "two"]


def test_clear_forgets_and_system_changes_the_instructions(
    gateway: ScriptedGateway, talk: Callable[..., Conversation]
) -> None:
    conversation = talk("one", "/clear", "/system Rhyme.", "two", "/system", "three")
    assert len(conversation.messages) == 4
    assert gateway.requests[1].request.conversation.messages[0].content == "Rhyme."
    assert gateway.requests[2].request.conversation.messages[0].content == "two"


def test_the_model_can_be_changed_to_one_that_exists(
    gateway: ScriptedGateway,
    talk: Callable[..., Conversation],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def get_model(request: Any, context: grpc.ServicerContext) -> Any:
        if request.model != "big":
            context.abort(grpc.StatusCode.NOT_FOUND, "no model is called 'nope'")
        return gateway_pb2.GetModelResponse(model={"name": "big-1"})

    gateway.on("GetModel", get_model)
    gateway.answer(
        "ListModels",
        gateway_pb2.ListModelsResponse(
            models=[{"name": "big-1"}, {"name": "s", "is_default": True}]
        ),
    )
    talk("/model", "/model big", "one", "/model nope", "two")
    chats = [r for r in gateway.requests if isinstance(r, gateway_pb2.StreamChatRequest)]
    assert [chat.request.model for chat in chats] == ["big-1", "big-1"]
    shown = capsys.readouterr()
    assert "* s" in shown.out
    assert "no model is called 'nope'" in shown.err


def test_a_failed_turn_leaves_no_trace_and_the_conversation_goes_on(
    gateway: ScriptedGateway,
    talk: Callable[..., Conversation],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail_once(request: Any, context: grpc.ServicerContext) -> Any:
        gateway.on("StreamChat", echoing)
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")

    gateway.on("StreamChat", fail_once)
    conversation = talk("one", "two")
    assert [message.content for message in conversation.messages] == ["two", "You said two"]
    assert "the queue is full" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    gateway: ScriptedGateway,
    talk: Callable[..., Conversation],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def endless(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        gateway.on("StreamChat", echoing)
        while context.is_active():
            yield Response(chunk={"deltas": [{"content": "la "}]})

    written: list[str] = []

    def interrupted(text: str, *, terminal: bool) -> None:
        written.append(text)
        if len(written) == 3:
            raise KeyboardInterrupt

    gateway.on("StreamChat", endless)
    monkeypatch.setattr("meshserve.cli.streaming.write_text", interrupted)
    conversation = talk("sing", "two")
    assert gateway.cancelled.wait(5)
    assert conversation.messages[1].content.startswith("la la la")
    assert conversation.messages[3].content == "You said two"


def test_ctrl_c_at_the_prompt_does_not_leave(talk: Callable[..., Conversation]) -> None:
    conversation = talk(KeyboardInterrupt(), "one")
    assert len(conversation.messages) == 2


@pytest.mark.parametrize("word", ["/quit", "/exit"])
def test_quit_leaves(talk: Callable[..., Conversation], word: str) -> None:
    assert talk(word, "never sent").messages == []


def test_unknown_commands_and_help_are_answered(
    gateway: ScriptedGateway,
    talk: Callable[..., Conversation],
    capsys: pytest.CaptureFixture[str],
) -> None:
    talk("/help", "/dance")
    shown = capsys.readouterr().out
    assert "/clear" in shown
    assert "there is no /dance" in shown
    assert gateway.requests == []


def test_an_answer_cannot_drive_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from meshserve.cli.output import write_text

    write_text("\x1b]0;owned\x07 fine\n", terminal=True)
    write_text("\x1b", terminal=False)
    assert capsys.readouterr().out == "\ufffd]0;owned\ufffd fine\n\x1b"
