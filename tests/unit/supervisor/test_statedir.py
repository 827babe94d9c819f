"""A running mesh can be found, one that ended cannot, and there is one at a time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from meshserve.supervisor.statedir import (
    AlreadyRunningError,
    RunningMesh,
    ServiceEntry,
    StateDir,
    StateError,
    trim_log,
)

GATEWAY = ServiceEntry("gateway", "127.0.0.1:50051")
MESH = RunningMesh(os.getpid(), GATEWAY, (ServiceEntry("engine", "127.0.0.1:1"), GATEWAY))


def test_what_the_owner_writes_others_read(tmp_path: Path) -> None:
    owner = StateDir(tmp_path / "state")
    owner.acquire()
    owner.write(MESH)
    assert StateDir(tmp_path / "state").running_mesh() == MESH
    owner.release()
    assert StateDir(tmp_path / "state").running_mesh() is None
    assert not owner.is_held()


def test_the_directory_has_one_owner_at_a_time(tmp_path: Path) -> None:
    owner = StateDir(tmp_path)
    owner.acquire()
    owner.write(MESH)
    with pytest.raises(AlreadyRunningError) as caught:
        StateDir(tmp_path).acquire()
    assert caught.value.mesh == MESH
    owner.release()
    StateDir(tmp_path).acquire()


def test_a_state_file_without_an_owner_means_nothing(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"pid": 1}')
    assert StateDir(tmp_path).running_mesh() is None


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"services": 5}', "\xff"])
def test_a_damaged_state_file_is_no_state(tmp_path: Path, content: str) -> None:
    owner = StateDir(tmp_path)
    owner.acquire()
    (tmp_path / "state.json").write_text(content, encoding="latin-1")
    assert StateDir(tmp_path).running_mesh() is None
    owner.release()


def test_a_directory_that_cannot_be_made_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="set MESHSERVE_STATE"):
        StateDir(tmp_path / "file" / "state").acquire()


def test_each_run_begins_its_own_logs_and_keeps_the_last(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    state.log_dir.mkdir()
    (state.log_dir / "engine.log").write_text("before")
    state.acquire()
    assert not (state.log_dir / "engine.log").exists()
    assert (state.log_dir / "engine.log.1").read_text() == "before"
    state.release()


def test_the_directory_comes_from_the_environment(tmp_path: Path) -> None:
    assert StateDir.default({"MESHSERVE_STATE": str(tmp_path)}).path == tmp_path
    assert StateDir.default({"XDG_STATE_HOME": "/x"}).path == Path("/x/meshserve")
    home = Path("~").expanduser()
    assert StateDir.default({}).path == home / ".local/state/meshserve"


def test_a_log_that_is_too_large_is_moved_aside_while_its_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    with path.open("ab", buffering=0) as writer:
        writer.write(b"x" * 90 + b"0123456789")
        trim_log(path, max_bytes=100)
        assert path.stat().st_size == 100
        writer.write(b"y")
        trim_log(path, max_bytes=100)
        writer.write(b"z")
    assert path.read_bytes() == b"z"
    assert (tmp_path / "a.log.1").read_bytes().endswith(b"0123456789y")
    trim_log(tmp_path / "absent.log")
