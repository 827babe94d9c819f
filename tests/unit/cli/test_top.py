"""`meshserve top`: what it shows, writes and says when there is nothing to show."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from google.protobuf.descriptor import Descriptor
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from meshserve.cli.top_format import (
    ASCII,
    UNICODE,
    Glyphs,
    bar,
    duration,
    number,
    percent,
    size,
)
from meshserve.cli.top_screen import VIEWS, Screen
from meshserve.v1 import mesh_pb2, monitor_pb2
from services.runtime.errors import Reason, ServiceError
from tests.fakes.scripted_mesh_service import ScriptedMeshService, picture
from tests.support.ports import free_ports
from tests.support.terminal import Terminal
from tests.unit.cli.conftest import Result

Run = Callable[..., Result]


@pytest.fixture
def service() -> Iterator[ScriptedMeshService]:
    started = ScriptedMeshService()
    yield started
    started.stop()


def lines(screen: Screen, width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    with console.capture() as capture:
        console.print(screen.render(width, height))
    return capture.get().removesuffix("\n").split("\n")


def screen(view: str = "replicas", glyphs: Glyphs = UNICODE, engines: int = 1) -> Screen:
    shown = Screen("gateway:50051", 1.0, glyphs, view)
    for time in (1, 2, 3):
        shown.take(picture(time, engines))
    return shown


def test_a_small_terminal_has_room_for_all_that_matters() -> None:
    shown = "\n".join(lines(screen(), 80, 24))
    for fact in (
        "6 of 6 replicas serving", "12.3/s", "9 active", "2.0% failed: RATE_LIMITED", "100/s out",
        "TTFT 10ms, p95 250ms", "7 running, 0 waiting", "KV cache 42%", "hits 50% of 4.0/s",
        "8.0/s checked", "17 blocked", "1.50 USD/h", "● gateway", "10.0.0.1:50051", "200M",
        "████░░░░░░  42%", "q  quit",
    ):  # fmt: skip
        assert fact in shown, fact


@given(
    st.integers(40, 220),
    st.integers(10, 60),
    st.integers(0, 60),
    st.sampled_from(list(VIEWS)),
    st.sampled_from([UNICODE, ASCII]),
    st.text("vspjk ", max_size=8),
)
def test_a_terminal_of_any_size_is_filled_and_never_overrun(
    width: int, height: int, engines: int, view: str, glyphs: Glyphs, keys: str
) -> None:
    shown = screen(view, glyphs, engines)
    for key in keys:
        shown.press(key)
    written = lines(shown, width, height)
    assert len(written) == height
    assert max(map(len, written)) <= width
    if glyphs is ASCII:
        assert "".join(written).isascii()


def test_each_view_begins_with_its_own_table_and_others_follow_where_there_is_room() -> None:
    tall = screen()
    heads = ("SERVICE", "ENGINE", "MODEL", "TENANT")
    shown = [line.split()[0] for line in lines(tall, 160, 50) if line.startswith(heads)]
    assert shown == list(heads)
    tall.press("3")
    shown = [line.split()[0] for line in lines(tall, 160, 50) if line.startswith(heads)]
    assert shown[0] == "TENANT"
    small = [line.split()[0] for line in lines(screen("models"), 80, 16) if line.startswith(heads)]
    assert small[0] == "MODEL"


def test_keys_choose_sort_pause_scroll_and_quit() -> None:
    shown = screen(engines=40)
    assert "39 more" not in "\n".join(lines(shown, 80, 24))
    assert "more" in "\n".join(lines(shown, 80, 24))
    shown.press("s")
    assert "sort: cpu" in lines(shown, 80, 24)[-1]
    first = next(line for line in lines(shown, 80, 24) if "engine" in line and "10.0" in line)
    assert "10.0.0.40:50051" in first, "the busiest comes first"
    top_before = lines(shown, 80, 24)[8]
    for key in "\x1b[B":  # the arrow down
        shown.press(key)
    assert lines(shown, 80, 24)[8] != top_before
    shown.press("p")
    shown.take(picture(9))
    assert "paused" in lines(shown, 80, 24)[0]
    assert "40 of" not in lines(shown, 80, 24)[0]
    assert "more" in "\n".join(lines(shown, 80, 24)), "what was shown stays"
    shown.press("v")
    assert shown.view == "models"
    assert not shown.is_done
    shown.press("q")
    assert shown.is_done


def test_a_replica_that_does_not_answer_says_why_in_the_place_of_its_numbers() -> None:
    mesh = picture(3)
    replica = mesh.services[2].replicas[0]
    replica.CopyFrom(
        mesh_pb2.ReplicaOverview(
            address="10.0.0.1:50053",
            service="engine",
            state=monitor_pb2.REPLICA_STATE_UNREACHABLE,
            problem="Connection refused",
        )
    )
    shown = Screen("gateway:50051", 1.0, UNICODE)
    shown.take(mesh)
    text = lines(shown, 80, 24)
    assert "5 of 6 replicas serving" in text[0]
    assert any(
        re.match(r"✗ engine +10\.0\.0\.1:50053 unreachable · Connection refused", line)
        for line in text
    )


def test_a_service_without_replicas_is_not_left_out() -> None:
    mesh = picture(3)
    del mesh.services[2].replicas[:]
    shown = Screen("gateway:50051", 1.0, UNICODE)
    shown.take(mesh)
    assert any(re.match("- engine +no replica is known", line) for line in lines(shown, 80, 24))


def test_a_bar_is_full_only_when_all_is_used() -> None:
    assert bar(0, 5, ASCII) == "....."
    assert bar(0.001, 5, ASCII) == "#...."
    assert bar(0.6, 5, ASCII) == "###.."
    assert bar(0.999, 5, ASCII) == "####."
    assert bar(1, 5, ASCII) == "#####"


@given(st.floats(min_value=0, max_value=9e11))
def test_numbers_keep_to_their_columns(value: float) -> None:
    assert len(number(value)) <= 5
    assert len(size(value)) <= 5
    assert len(duration(min(value, 5e6))) <= 6
    assert len(percent(min(value, 1))) <= 5


def test_sparklines_tell_of_what_happened_between_two_pictures() -> None:
    shown = screen(engines=2)
    assert list(shown.trends.requests) == [20, 20]
    assert list(shown.trends.tokens) == [200, 200]
    restarted = picture(4, 2)
    restarted.services[2].replicas[0].instance_id = "another"
    shown.take(restarted)
    assert list(shown.trends.tokens)[-1] == 100, "another process counts from its own beginning"


def names_of(message: Descriptor) -> set[str]:
    return {field.name for field in message.fields}


def test_json_has_every_field_of_the_contract_by_its_name(
    service: ScriptedMeshService, meshserve: Run
) -> None:
    result = meshserve("top", "--target", service.target, "--json", "--once", "--interval", "0.25")
    assert result.code == 0
    document = json.loads(result.out)
    assert set(document) == names_of(mesh_pb2.MeshSnapshot.DESCRIPTOR)
    engine = document["services"][2]["replicas"][0]
    assert set(engine) == names_of(mesh_pb2.ReplicaOverview.DESCRIPTOR)
    assert set(engine["engine"]) == names_of(mesh_pb2.EngineOverview.DESCRIPTOR)
    assert engine["state"] == "serving"
    assert engine["memory_bytes"] == 200 * 2**20
    assert engine["engine"]["draft_acceptance_ratio"] is None
    assert document["services"][0]["replicas"][0]["engine"] is None
    assert document["traffic"]["errors"] == [
        {"name": "RATE_LIMITED", "per_second": 0.2, "total": 3}
    ]
    assert document["time"].startswith("2027-")


def test_json_goes_on_line_by_line(service: ScriptedMeshService) -> None:
    command = ["top", "--target", service.target, "--json", "--interval", "0.25"]
    with subprocess.Popen(
        [sys.executable, "-m", "meshserve", *command], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        seen = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert [each["window_ms"] for each in seen] == [0, 500, 1000]


def test_a_report_into_a_pipe_is_plain_text_once(
    service: ScriptedMeshService, meshserve: Run
) -> None:
    result = meshserve(
        "top", "--target", service.target, "--interval", "0.25", "--api-key", "secret"
    )
    assert result.code == 0
    assert "\x1b" not in result.out
    for head in ("SERVICE", "ENGINE", "MODEL", "TENANT"):
        assert re.search(f"^{head} ", result.out, re.MULTILINE)
    assert service.authorizations == ["Bearer secret"]


@pytest.mark.parametrize(
    ("reason", "way_out"),
    [
        (Reason.NOT_AN_OPERATOR, "operator: true"),
        (Reason.API_KEY_MISSING, "--api-key"),
    ],
)
def test_a_key_that_may_not_is_told_so(meshserve: Run, reason: Reason, way_out: str) -> None:
    service = ScriptedMeshService(error=ServiceError(reason, "not you"))
    result = meshserve("top", "--target", service.target, "--once")
    service.stop()
    assert result.code == 4
    assert "not you" in result.err
    assert way_out in result.err


def test_a_mesh_that_is_down_is_said_with_the_way_out(meshserve: Run) -> None:
    (port,) = free_ports(1)
    result = meshserve("top", "--target", f"127.0.0.1:{port}")
    assert result.code == 3
    assert f"127.0.0.1:{port}" in result.err
    assert "meshserve up" in result.err


def test_a_mesh_that_is_down_is_said_on_a_terminal_too() -> None:
    (port,) = free_ports(1)
    with Terminal(["top", "--target", f"127.0.0.1:{port}"], columns=80, rows=24) as terminal:
        assert terminal.wait_for_end(60) == 3
        after = terminal.output.rpartition("\x1b[?1049l")[2]
        assert "meshserve up" in after, "below what was there before"


def test_on_a_terminal_it_lives_until_it_is_quit(service: ScriptedMeshService) -> None:
    arguments = ["top", "--target", service.target, "--interval", "0.25"]
    with Terminal(arguments, columns=80, rows=24) as terminal:
        terminal.wait_for("6 of 6 replicas serving")
        terminal.press("v")
        terminal.wait_for("view: models")
        terminal.press("p")
        terminal.wait_for("paused")
        terminal.press("q")
        assert terminal.wait_for_end() == 0
        shown = [each for each in terminal.pictures if "meshserve top" in each[0]]
        assert shown
        assert all(len(each) == 24 for each in shown)
        assert max(len(line) for each in shown for line in each) <= 80
        assert "\x1b[?1049h" in terminal.output, "it has a screen of its own"
        assert terminal.output.endswith("\x1b[?25h\x1b[?1049l"), "and gives the old one back"


def test_without_colours_every_state_still_shows(service: ScriptedMeshService) -> None:
    arguments = ["top", "--target", service.target, "--interval", "0.25"]
    with Terminal(arguments, columns=100, rows=30, NO_COLOR="1") as terminal:
        terminal.wait_for("6 of 6 replicas serving")
        terminal.press("q")
        assert terminal.wait_for_end() == 0
        assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", terminal.output)
        assert "● engine" in terminal.output


def test_it_waits_for_a_gateway_that_is_restarted() -> None:
    first = ScriptedMeshService()
    arguments = ["top", "--target", first.target, "--interval", "0.25"]
    with Terminal(arguments, columns=100, rows=30) as terminal:
        terminal.wait_for("6 of 6 replicas serving")
        first.stop()
        terminal.wait_for("the gateway is away; trying again")
        second = ScriptedMeshService(first.port)
        terminal.wait_for("6 of 6 replicas serving")
        terminal.press("q")
        assert terminal.wait_for_end() == 0
        second.stop()
