"""`meshserve chat` and `meshserve generate`: the answer on standard output, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from meshserve.supervisor.statedir import RunningMesh, ServiceEntry, StateDir
from meshserve.v1 import gateway_pb2, types_pb2
from tests.fakes.scripted_gateway import ScriptedGateway, capital_of_france


def chatting(*texts: str) -> Callable[[Any, Any], Iterator[Any]]:
    response = gateway_pb2.StreamChatResponse
    messages = [response(chunk={"deltas": [{"content": text}]}) for text in texts]
    end = response(complete={"finish_reason": "FINISH_REASON_STOP"})
    return lambda request, context: iter([*messages, end])


def test_chat_writes_the_answer_alone(gateway: ScriptedGateway, meshserve: Callable) -> None:
    gateway.on("StreamChat", chatting("Par", "is."))
    result = meshserve("chat", "--target", gateway.target, "-s", "Be brief.", "Capital of France?")
    assert (result.code, result.out, result.err) == (0, "Paris.\n", "")
    messages = gateway.requests[0].request.conversation.messages
    assert [(m.role, m.content) for m in messages] == [
        (types_pb2.ROLE_SYSTEM, "Be brief."),
        (types_pb2.ROLE_USER, "Capital of France?"),
    ]


def test_on_a_terminal_a_line_below_the_answer_tells_what_it_cost(
    gateway: ScriptedGateway,
) -> None:
    response = gateway_pb2.StreamChatResponse
    messages = [
        response(chunk={"deltas": [{"content": "Par"}]}),
        response(chunk={"deltas": [{"content": "is."}]}),
        response(
            complete={
                "finish_reason": "FINISH_REASON_LENGTH",
                "usage": {"prompt_tokens": 9, "completion_tokens": 2, "cached_prompt_tokens": 8},
                "cached": True,
            }
        ),
    ]
    gateway.on("StreamChat", lambda request, context: iter(messages))
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "meshserve", "chat", "x", "--target", gateway.target]
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):
        while data := os.read(controller, 4096):
            shown += data
    assert process.wait(30) == 0
    text = shown.decode()
    assert text.startswith("Paris.\r\n")
    assert "2 tokens · from the cache · first after" in text
    assert "8 of 9 prompt tokens reused · cut off at the token limit" in text


def test_an_answer_that_ends_its_line_gets_no_second_end(
    gateway: ScriptedGateway, meshserve: Callable
) -> None:
    gateway.on("StreamChat", chatting("Paris.\n"))
    assert meshserve("chat", "--target", gateway.target, "x").out == "Paris.\n"


@pytest.mark.parametrize("arguments", [("chat",), ("chat", "-")])
def test_a_message_comes_from_a_pipe(
    gateway: ScriptedGateway, meshserve: Callable, arguments: tuple[str, ...]
) -> None:
    gateway.on("StreamChat", chatting("ok"))
    result = meshserve(*arguments, "--target", gateway.target, stdin="Grüße\n".encode())
    assert result.code == 0
    assert gateway.requests[0].request.conversation.messages[0].content == "Grüße"


def test_generate_streams_the_completion_and_passes_the_flags(
    gateway: ScriptedGateway, meshserve: Callable, tmp_path: Path
) -> None:
    gateway.on("StreamGenerate", lambda request, context: iter(capital_of_france()))
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "string"}')
    line = (
        "-m smollm2-135m -n 12 --min-tokens 1 -t 0 --top-p 0.5 --top-k 3 --min-p 0.25 --seed 7 "
        "--repetition-penalty 1.5 --presence-penalty 1 --frequency-penalty -1 --stop a --stop b "
        "--ignore-eos --no-cache --priority 5 --request-id mine --adapter ad --echo "
        f"--no-special-tokens --json-schema {schema} --api-key k --target {gateway.target}"
    )
    result = meshserve("generate", "The capital is", *line.split())
    assert (result.code, result.out) == (0, "Paris.\n")
    assert gateway.requests[0].request == gateway_pb2.GenerateRequest(
        model="smollm2-135m",
        text="The capital is",
        sampling=types_pb2.SamplingParams(
            temperature=0,
            top_p=0.5,
            top_k=3,
            min_p=0.25,
            seed=7,
            repetition_penalty=1.5,
            presence_penalty=1,
            frequency_penalty=-1,
        ),
        stopping=types_pb2.StoppingCriteria(
            max_tokens=12, min_tokens=1, stop_strings=["a", "b"], ignore_eos=True
        ),
        constraint=types_pb2.OutputConstraint(json_schema='{"type": "string"}'),
        priority=5,
        cache_control=types_pb2.CacheControl(no_cache=True),
        request_id="mine",
        adapter="ad",
        output=types_pb2.OutputOptions(echo=True),
        add_special_tokens=False,
    )
    assert gateway.metadata[0]["authorization"] == "Bearer k"


def test_a_grammar_is_read_from_its_file(
    gateway: ScriptedGateway, meshserve: Callable, tmp_path: Path
) -> None:
    gateway.on("StreamGenerate", lambda request, context: iter(capital_of_france()))
    grammar = tmp_path / "answer.lark"
    grammar.write_text('start: "Paris."')
    result = meshserve("generate", "x", "--grammar", str(grammar), "--target", gateway.target)
    assert result.code == 0
    assert gateway.requests[0].request.constraint.grammar == 'start: "Paris."'


def test_flags_that_were_not_given_are_absent(
    gateway: ScriptedGateway, meshserve: Callable
) -> None:
    gateway.on("StreamGenerate", lambda request, context: iter(capital_of_france()))
    meshserve("generate", "x", "--target", gateway.target)
    assert gateway.requests[0].request == gateway_pb2.GenerateRequest(text="x")


def test_generate_writes_the_whole_result_as_json(
    gateway: ScriptedGateway, meshserve: Callable
) -> None:
    gateway.answer(
        "Generate",
        gateway_pb2.GenerateResponse(
            request_id="r1",
            choices=[
                {
                    "text": "Grüße",
                    "finish_reason": "FINISH_REASON_STOP",
                    "logprobs": {"positions": [{"chosen": {"token_id": 1, "text": b"\xc3"}}]},
                }
            ],
            create_time={"seconds": 0},
        ),
    )
    result = meshserve("generate", "-", "--json", "--target", gateway.target, stdin=b"Hi")
    document = json.loads(result.out)
    assert document["choices"][0]["text"] == "Grüße"
    assert document["choices"][0]["finish_reason"] == "stop"
    assert document["create_time"] == "1970-01-01T00:00:00+00:00"
    assert gateway.requests[0].text == "Hi"


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 2),
        (grpc.StatusCode.NOT_FOUND, 2),
        (grpc.StatusCode.UNAVAILABLE, 3),
        (grpc.StatusCode.UNAUTHENTICATED, 4),
        (grpc.StatusCode.PERMISSION_DENIED, 4),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 5),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 6),
        (grpc.StatusCode.INTERNAL, 1),
    ],
)
def test_a_failure_is_a_line_and_a_code(
    gateway: ScriptedGateway, meshserve: Callable, code: grpc.StatusCode, exit_code: int
) -> None:
    def fail(request: Any, context: grpc.ServicerContext) -> Any:
        context.abort(code, "what happened")

    gateway.on("StreamChat", fail)
    result = meshserve("chat", "--target", gateway.target, "x")
    assert result.code == exit_code
    assert result.out == ""
    assert result.err.startswith("error: ")


def test_what_was_written_before_a_failure_stays_and_the_failure_follows(
    gateway: ScriptedGateway, meshserve: Callable
) -> None:
    gateway.on("StreamGenerate", lambda request, context: iter(capital_of_france()[:2]))
    result = meshserve("generate", "x", "--target", gateway.target)
    assert result.code == 1
    assert result.out == "Par\n"
    assert "ended before the answer was complete" in result.err


def test_a_mesh_on_this_machine_is_found(
    gateway: ScriptedGateway, meshserve: Callable, tmp_path: Path
) -> None:
    gateway.on("StreamChat", chatting("ok"))
    state = StateDir(tmp_path / "state")
    state.acquire()
    entry = ServiceEntry("gateway", gateway.target)
    state.write(RunningMesh(1, entry, (entry,)))
    assert meshserve("chat", "x").out == "ok\n"
    state.release()


def test_the_target_comes_from_the_environment(
    gateway: ScriptedGateway, meshserve: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.on("StreamChat", chatting("ok"))
    monkeypatch.setenv("MESHSERVE_TARGET", gateway.target)
    assert meshserve("chat", "x").out == "ok\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("chta",), "No such command"),
        (("generate",), "Missing argument"),
        (("generate", "x", "--top-k", "many"), "not a valid integer"),
        (("generate", "x", "--n", "2"), "need --json"),
        (("generate", "x", "--timeout", "-1"), "positive number of seconds"),
        (("generate", "x", "--json-schema", "/no/such/file"), "cannot be read"),
        (("generate", "x", "--json-schema", '{"type": "object"}'), "give the path of a file"),
        (("chat", "x", "--target", "http://host:1"), "is a URL"),
        (("chat", "x", "--tls-ca", "/no/such.pem"), "/no/such.pem"),
        (("chat", "a\udcffb"), "lone surrogate"),
        (("chat", "x", "--api-key", "a\nb"), "API key"),
        (("up", "--config", "/no/such.yaml"), "cannot be read"),
        (("up", "--model", "/no/such.gguf"), "no file"),
        (("models", "show", "/no/such.gguf"), "no file"),
        (("models", "pull", "no such model"), "not a model"),
    ],
)
def test_wrong_usage_is_a_line_that_says_what(
    meshserve: Callable, arguments: tuple[str, ...], says: str
) -> None:
    result = meshserve(*arguments)
    assert result.code != 0
    assert says in result.err
    assert result.err.startswith("error: ")


def test_a_missing_model_is_named_whatever_ports_are_in_use(
    gateway: ScriptedGateway, meshserve: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESHSERVE_GATEWAY__LISTEN", gateway.target)
    assert "no file" in meshserve("up", "--model", "/no/such.gguf").err


def test_a_port_in_use_is_found_before_anything_is_pulled_or_started(
    gateway: ScriptedGateway, meshserve: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESHSERVE_GATEWAY__LISTEN", gateway.target)
    result = meshserve("up")
    assert result.code == 78
    assert f"port {gateway.target.rpartition(':')[2]} is in use" in result.err
    assert "gateway.listen (MESHSERVE_GATEWAY__LISTEN)" in result.err
    assert "pulling" not in result.err


def test_a_wrong_setting_names_the_nearest_key(
    meshserve: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESHSERVE_GATEWAY__LISTN", "x")
    result = meshserve("up")
    assert result.code == 78
    assert "did you mean 'listen'?" in result.err


def test_input_that_is_not_utf8_is_refused(meshserve: Callable) -> None:
    result = meshserve("generate", "-", stdin=b"ab\xff")
    assert result.code == 2
    assert "not UTF-8 (byte 2)" in result.err


def test_where_nobody_listens_the_way_out_is_named(meshserve: Callable) -> None:
    result = meshserve("chat", "x", "--target", "127.0.0.1:1")
    assert result.code == 3
    assert "meshserve up" in result.err


def test_a_defect_leaves_a_report_and_a_line(
    gateway: ScriptedGateway,
    meshserve: Callable,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("meshserve.cli.chat.make_connection", broken)
    result = meshserve("chat", "x")
    assert result.code == 1
    assert "unexpected ZeroDivisionError: oops" in result.err
    assert "ZeroDivisionError" in (tmp_path / "state" / "crash.txt").read_text()
