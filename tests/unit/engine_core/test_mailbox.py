"""Messages between the step loop and its front: in order, whole, and never in a step's way."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from services.engine.core.framing import LENGTH, EventFrames, frame
from services.engine.core.mailbox import ConnectionClosedError, Mailbox
from services.engine.core.messages import (
    Abort,
    Add,
    Command,
    Delta,
    Event,
    Load,
    Log,
    Ping,
    Pong,
    SequenceRequest,
    Step,
    Timing,
)


class Front:
    """The other end of a mailbox's connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(20)
        self.connection = connection
        self._file = connection.makefile("rb")
        self._decoder = msgspec.msgpack.Decoder(Event)
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, *commands: Command) -> None:
        self.connection.sendall(b"".join(frame(command, self._encoder) for command in commands))

    def receive(self) -> Event:
        (length,) = LENGTH.unpack(self._file.read(LENGTH.size))
        event: Event = self._decoder.decode(self._file.read(length))
        return event

    def close(self) -> None:
        self._file.close()
        self.connection.close()


@pytest.fixture
def ends() -> Iterator[tuple[Mailbox, Front]]:
    ours, theirs = socket.socketpair()
    front = Front(ours)
    mailbox = Mailbox(theirs)
    yield mailbox, front
    front.close()
    theirs.close()


def log(number: int, text: str = "") -> Log:
    return Log(20, "test", f"{number} {text}")


def test_events_arrive_in_the_order_in_which_they_were_posted(ends: tuple[Mailbox, Front]) -> None:
    mailbox, front = ends
    for number in range(100):
        mailbox.post(Pong(number, Load(steps=number)))
    for number in range(100):
        assert front.receive() == Pong(number, Load(steps=number))


def test_events_of_several_threads_do_not_get_mixed_up(ends: tuple[Mailbox, Front]) -> None:
    mailbox, front = ends

    def post(thread: int) -> None:
        for number in range(50):
            mailbox.post(log(number, f"{thread} " * 500))

    threads = [threading.Thread(target=post, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    events = [front.receive() for _ in range(200)]
    for number in range(4):
        mine = [
            event for event in events if isinstance(event, Log) and f" {number} " in event.message
        ]
        assert mine == [log(count, f"{number} " * 500) for count in range(50)]


def test_commands_are_put_together_from_the_pieces_in_which_they_come(
    ends: tuple[Mailbox, Front],
) -> None:
    mailbox, front = ends
    add = Add([SequenceRequest(7, list(range(300)))])
    data = frame(add, msgspec.msgpack.Encoder()) + frame(Abort([7]), msgspec.msgpack.Encoder())
    for start in range(0, len(data), 100):
        front.connection.sendall(data[start : start + 100])
        time.sleep(0.001)
    commands: list[Command] = []
    while len(commands) < 2:
        commands += mailbox.take(wait_s=10)
    assert commands == [add, Abort([7])]


def test_a_loop_with_work_does_not_wait_for_commands(ends: tuple[Mailbox, Front]) -> None:
    mailbox, _ = ends
    started = time.monotonic()
    assert mailbox.take(wait_s=0) == []
    assert mailbox.take(wait_s=0.05) == []
    assert time.monotonic() - started < 5


def test_what_comes_during_a_step_is_there_when_it_ends(ends: tuple[Mailbox, Front]) -> None:
    mailbox, front = ends
    front.send(*(Ping(number) for number in range(10)))
    time.sleep(0.3)  # a step
    assert mailbox.take(wait_s=0) == [Ping(number) for number in range(10)]


def test_what_is_posted_before_a_step_is_sent_while_it_runs(ends: tuple[Mailbox, Front]) -> None:
    mailbox, front = ends
    received = threading.Event()

    def read() -> None:
        front.receive()
        received.set()

    threading.Thread(target=read, daemon=True).start()
    mailbox.post(log(0))
    assert received.wait(10)  # as a step does: without the interpreter's lock


def test_a_front_that_does_not_read_holds_nothing_up_for_many_steps(
    ends: tuple[Mailbox, Front],
) -> None:
    mailbox, front = ends
    text = "x" * 20_000
    posting = threading.Thread(target=lambda: [mailbox.post(log(n, text)) for n in range(1000)])
    posting.start()
    posting.join(10)
    assert not posting.is_alive()  # 20 MB: far more than the socket's buffer holds
    for number in range(1000):
        assert front.receive() == log(number, text)


def test_closing_sends_what_has_been_posted(ends: tuple[Mailbox, Front]) -> None:
    mailbox, front = ends
    for number in range(100):
        mailbox.post(log(number))
    mailbox.close()
    assert [front.receive() for _ in range(100)] == [log(number) for number in range(100)]


def test_the_step_loop_learns_that_its_front_is_gone(ends: tuple[Mailbox, Front]) -> None:
    mailbox, front = ends
    front.send(Ping(1))
    front.close()
    time.sleep(0.2)
    for _ in range(2):
        with pytest.raises(ConnectionClosedError):
            mailbox.take(wait_s=10)
    with pytest.raises(ConnectionClosedError):
        mailbox.post(log(0))


def test_a_command_that_makes_no_sense_stops_the_loop(ends: tuple[Mailbox, Front]) -> None:
    mailbox, front = ends
    front.connection.sendall(LENGTH.pack(3) + b"\x93\x01\x02")
    with pytest.raises(msgspec.MsgspecError):
        mailbox.take(wait_s=10)


def test_an_event_that_cannot_be_sent_stops_the_loop_which_can_still_say_so(
    ends: tuple[Mailbox, Front],
) -> None:
    mailbox, front = ends
    mailbox.post(Pong(1 << 70, Load()))
    with pytest.raises(OverflowError):
        mailbox.take(wait_s=10)
    mailbox.post(log(1))
    assert front.receive() == log(1)


def test_a_large_event_leaves_the_small_ones_after_it_whole() -> None:
    frames = EventFrames()
    large = bytes(frames.encode([log(0, "x" * 3_000_000), log(1)]))
    assert large.endswith(frame(log(1), msgspec.msgpack.Encoder()))
    assert bytes(frames.encode([log(2)])) == frame(log(2), msgspec.msgpack.Encoder())


def step(number: int, *, timing: Timing | None = None) -> Step:
    delta = Delta(sequence_id=1, token_ids=[number], timing=timing)
    return Step(number, batch_size=1, num_tokens=1, ended_ns=0, deltas=[delta], load=Load())


def test_further_tokens_are_held_back_and_sent_together(ends: tuple[Mailbox, Front]) -> None:
    mailbox, front = ends
    mailbox.hold_s = 0.2
    started = time.monotonic()
    mailbox.post(step(1))
    mailbox.post(step(2))
    assert front.receive() == step(1)
    assert time.monotonic() - started > 0.15
    assert front.receive() == step(2)


def test_what_is_urgent_takes_along_what_was_held_back(ends: tuple[Mailbox, Front]) -> None:
    mailbox, front = ends
    mailbox.hold_s = 60.0
    mailbox.post(step(1))
    first_token = step(2, timing=Timing(0, 0, 0, 0, 0, 0, 0))
    mailbox.post(first_token)
    assert [front.receive(), front.receive()] == [step(1), first_token]
    mailbox.post(step(3))
    mailbox.post(Pong(1, Load()))
    assert [front.receive(), front.receive()] == [step(3), Pong(1, Load())]
