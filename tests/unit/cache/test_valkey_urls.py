"""URLs and embedded servers that cannot work are refused before anything is started."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from services.runtime.valkey import (
    EmbeddedValkey,
    EmbeddedValkeyError,
    ValkeyUrlError,
    connect,
    embedded_server_command,
)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "valkey",
        "http://localhost:6379",
        "redis://",
        "redis://localhost:port",
        "redis://localhost:99999",
        "redis://localhost/zero",
        "redis://localhost?no_such_option=1",
        "redis://localhost?socket_timeout=soon",
        "unix://",
        "redis+cluster://",
        "redis+cluster://127.0.0.1:1,:2",
        "redis+cluster://127.0.0.1:7000/3",
    ],
)
def test_unusable_urls_are_refused(url):
    with pytest.raises(ValkeyUrlError):
        connect(url)


@pytest.mark.parametrize("url", ["redis://u:hunter2@h/zero", "redis+cluster://:hunter2@h:1/3"])
def test_passwords_are_never_repeated(url):
    with pytest.raises(ValkeyUrlError) as caught:
        connect(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "is_cluster"),
    [
        ("redis://localhost", False),
        ("redis://user:secret@127.0.0.1:6380/2?socket_timeout=3", False),
        ("rediss://127.0.0.1:6380", False),
        ("unix:///run/valkey.sock?db=1", False),
        ("redis+cluster://127.0.0.1:7000,127.0.0.1:7001", True),
        ("rediss+cluster://user:secret@127.0.0.1:7000", True),
    ],
)
async def test_usable_urls_are_taken_without_connecting(url, is_cluster):
    async with connect(url) as client:
        assert client.is_cluster is is_cluster
        assert "secret" not in client.name


def test_the_embedded_server_needs_one_way_in(tmp_path):
    with pytest.raises(EmbeddedValkeyError):
        EmbeddedValkey(tmp_path)
    with pytest.raises(EmbeddedValkeyError):
        EmbeddedValkey(tmp_path, port=1, unix_socket=tmp_path / "s")


@pytest.mark.parametrize("port", [0, -1, 70000])
def test_impossible_ports_are_refused(tmp_path, port):
    with pytest.raises(EmbeddedValkeyError):
        EmbeddedValkey(tmp_path, port=port)


def test_a_socket_path_that_no_system_takes_is_refused(tmp_path):
    with pytest.raises(EmbeddedValkeyError, match="use a port"):
        EmbeddedValkey(tmp_path, unix_socket=tmp_path / ("s" * 100))


def test_too_little_memory_is_refused(tmp_path):
    with pytest.raises(EmbeddedValkeyError, match="memory"):
        EmbeddedValkey(tmp_path, port=7000, max_memory_bytes=1000)


def test_a_line_break_cannot_smuggle_a_directive_in(tmp_path):
    with pytest.raises(EmbeddedValkeyError):
        EmbeddedValkey(tmp_path, port=7000, password="x\nbind 0.0.0.0")


def test_a_data_directory_that_cannot_be_written_is_a_clear_error(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(EmbeddedValkeyError, match=r"valkey\.url"):
        embedded_server_command(file / "data", port=7000)


def test_the_password_is_in_a_private_file_and_not_in_the_command(tmp_path):
    command = EmbeddedValkey(tmp_path, port=7000, password="hunter2").command()
    assert "hunter2" not in " ".join(command)
    config = Path(command[-1])
    assert "hunter2" in config.read_text()
    assert stat.S_IMODE(config.stat().st_mode) == 0o600


def test_nothing_but_loopback_is_listened_on(tmp_path):
    config = Path(embedded_server_command(tmp_path, port=7000)[-1]).read_text().splitlines()
    assert [line for line in config if line.startswith("bind")] == ["bind 127.0.0.1"]
    assert "protected-mode yes" in config
