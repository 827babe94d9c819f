"""Addresses that cannot be listened on are named with their setting before anything starts."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from meshserve.supervisor.ports import AddressError, check_addresses
from meshserve.supervisor.spec import ListenAddress


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_free_addresses_pass(busy_port: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    check_addresses(
        [
            ListenAddress("a.listen", f"127.0.0.1:{free}"),
            ListenAddress("b.listen", "unix:/tmp/socket"),
        ]
    )


def test_a_port_in_use_names_port_and_setting(busy_port: int) -> None:
    with pytest.raises(AddressError) as caught:
        check_addresses([ListenAddress("gateway.listen", f"127.0.0.1:{busy_port}")])
    assert f"port {busy_port} is in use" in str(caught.value)
    assert "gateway.listen (MESHSERVE_GATEWAY__LISTEN)" in str(caught.value)


def test_the_process_that_holds_the_port_is_named() -> None:
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            os.write(write_end, str(listener.getsockname()[1]).encode())
            import time

            time.sleep(60)
            os._exit(0)
    try:
        port = int(os.read(read_end, 16))
        with pytest.raises(AddressError, match=rf"in use by .* \(process {child}\)"):
            check_addresses([ListenAddress("engine.listen", f"127.0.0.1:{port}")])
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_all_problems_are_told_at_once(busy_port: int) -> None:
    with pytest.raises(AddressError) as caught:
        check_addresses(
            [
                ListenAddress("a.listen", f"127.0.0.1:{busy_port}"),
                ListenAddress("b.listen", f"127.0.0.1:{busy_port}"),
                ListenAddress("c.listen", "127.0.0.1:0"),
                ListenAddress("d.listen", "no-such-host.invalid:1"),
                ListenAddress("e.listen", "192.0.2.1:4000"),
            ]
        )
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert "b.listen and a.listen are both" in lines[1]
    assert "give it a fixed port" in lines[2]
    assert "no address 'no-such-host.invalid'" in lines[3]
    assert lines[4].startswith("e.listen: 192.0.2.1:4000 cannot be listened on")
