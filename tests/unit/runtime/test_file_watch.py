"""Files that change under a service: what counts as a change, and who hears of it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from services.runtime.file_watch import Contents, FilesRefusedError, FileWatch, read_files
from services.runtime.telemetry import Metrics


class Taker:
    """Takes what is offered, unless it begins with `bad`."""

    def __init__(self, *paths: Path) -> None:
        self.taken: list[Contents] = []
        self.offers = 0
        self.metrics = Metrics("cache")
        self.watch = FileWatch(
            "valkey", paths, self._take, self.metrics, in_use=read_files(list(paths))
        )

    async def _take(self, contents: Contents) -> None:
        self.offers += 1
        if contents[0].startswith(b"bad"):
            raise FilesRefusedError("it is bad")
        self.taken.append(contents)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, {"what": "valkey", **labels})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("first")
    return path


async def test_a_change_counts_once_it_has_been_read_twice(path: Path) -> None:
    taker = Taker(path)
    for half_written in ("sec", "second"):
        path.write_text(half_written)
        await taker.watch.look()
        assert not taker.offers
    await taker.watch.look()
    assert taker.taken == [(b"second",)]
    await taker.watch.look()
    assert taker.offers == 1


async def test_who_cannot_wait_is_offered_it_at_once(path: Path) -> None:
    taker = Taker(path)
    path.write_text("second")
    await taker.watch.look(twice=False)
    assert taker.taken == [(b"second",)]


async def test_a_file_that_is_away_for_a_moment_is_nothing_to_tell(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    taker = Taker(path)
    path.unlink()
    await taker.watch.look()
    path.write_text("first")
    await taker.watch.look()
    await taker.watch.look()
    assert not taker.offers
    assert not caplog.records
    assert taker.metric("meshserve_files_refused") == 0


async def test_what_is_refused_is_offered_again_and_told_of_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    taker = Taker(path)
    path.write_text("bad")
    for _ in range(4):
        await taker.watch.look()
    assert taker.offers == 3
    assert [each.levelno for each in caplog.records] == [logging.WARNING]
    assert taker.metric("meshserve_files_refused") == 1
    assert taker.metric("meshserve_file_reloads_total", outcome="refused") == 1
    path.write_text("first")
    await taker.watch.look()
    assert taker.metric("meshserve_files_refused") == 0


async def test_two_files_are_offered_together(tmp_path: Path) -> None:
    paths = tmp_path / "certificate", tmp_path / "key"
    for path in paths:
        path.write_text("old")
    taker = Taker(*paths)
    for path in paths:
        path.write_text("new")
        await taker.watch.look()
    await taker.watch.look()
    assert taker.taken == [(b"new", b"new")]
