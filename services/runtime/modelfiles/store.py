"""The model store: fetch a model into the cache directory, and find it there again.

A source is a name of the catalogue, a path to a .gguf file or a Hugging Face directory, or a hub id
`org/name[@revision]`. A model appears in the cache whole or not at all: it is fetched and checked
in a staging directory on the same file system and renamed into place, under a lock that other
processes wait for and that dies with its holder.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from services.runtime.modelfiles import hub, wheels
from services.runtime.modelfiles.catalogue import CATALOGUE
from services.runtime.modelfiles.errors import ModelStoreError

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in total or 0 where that is not known)."""

ADAPTER_CONFIG = "adapter_config.json"
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?", re.ASCII)


def default_cache_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """Return MESHSERVE_CACHE, else XDG_CACHE_HOME/meshserve, else ~/.cache/meshserve."""
    if own := environment.get("MESHSERVE_CACHE"):
        return Path(own).expanduser()
    if shared := environment.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "meshserve"
    return Path("~/.cache/meshserve").expanduser()


def pull(source: str, cache_dir: Path | None = None, progress: Progress = lambda *_: None) -> Path:
    """Make the model available on this machine and return its path (.gguf file or directory).

    What is already there and intact is not fetched again; a local path is returned as it is.

    Raises:
        ModelStoreError: it cannot be fetched; says what to do, and leaves no half file.
    """
    models_dir = (cache_dir or default_cache_dir()) / "models"
    if source in CATALOGUE:
        return wheels.pull(CATALOGUE[source], models_dir / source, progress)
    if (path := _local_path(source)) is not None:
        return path
    return hub.pull(*_split_hub_id(source), models_dir / "hub", progress)


def locate(source: str, cache_dir: Path | None = None) -> Path:
    """Return where the model is on this machine, without any network.

    Raises:
        ModelStoreError: it is not there, or not whole.
    """
    models_dir = (cache_dir or default_cache_dir()) / "models"
    if source in CATALOGUE:
        return wheels.locate(CATALOGUE[source], models_dir / source)
    if (path := _local_path(source)) is not None:
        return path
    return hub.locate(*_split_hub_id(source), models_dir / "hub")


def locate_adapter(source: str, cache_dir: Path | None = None) -> Path:
    """Return where the adapter is on this machine, without any network: a directory that PEFT
    wrote, or a hub id that was fetched.

    Raises:
        ModelStoreError: it is not there.
    """
    path = Path(source).expanduser()
    if source and _exists(path):
        if not _exists(path / ADAPTER_CONFIG):
            raise ModelStoreError(
                f"{path} is no directory with an {ADAPTER_CONFIG}.",
                way_out="Give a directory that PEFT wrote.",
            )
        return path.absolute()
    if source.startswith(("/", "./", "../", "~")):
        raise ModelStoreError(
            f"There is no directory {path}.", way_out="Check the path of the adapter."
        )
    if not _HUB_ID.fullmatch(source):
        raise ModelStoreError(
            f"{source!r} is not an adapter this can find.",
            way_out="Give a directory that PEFT wrote, or a hub id like org/name or "
            "org/name@revision.",
        )
    models_dir = (cache_dir or default_cache_dir()) / "models"
    return hub.locate(*_split_hub_id(source), models_dir / "hub", config=ADAPTER_CONFIG)


def check_source(source: str) -> None:
    """Check, without any network, that `source` names something that `pull` could bring here.

    Raises:
        ModelStoreError: it is a path where there is no model, or no name at all.
    """
    if source not in CATALOGUE and _local_path(source) is None:
        _split_hub_id(source)


def _local_path(source: str) -> Path | None:
    path = Path(source).expanduser()
    if source and _exists(path):
        if path.is_dir() and not (path / "config.json").exists():
            raise ModelStoreError(
                f"{path} is a directory without a config.json.",
                way_out="Give a Hugging Face model directory or a .gguf file.",
            )
        return path
    if source.endswith(".gguf") or source.startswith(("/", "./", "../", "~")):
        raise ModelStoreError(
            f"There is no file or directory {path}.", way_out="Check the path of the model."
        )
    return None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for the file system, or a folder that may not be looked into
        return False


def _split_hub_id(source: str) -> tuple[str, str | None]:
    if not _HUB_ID.fullmatch(source):
        near = difflib.get_close_matches(source, CATALOGUE, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ModelStoreError(
            f"{source!r} is not a model this can find.{hint}",
            way_out=f"Give one of {', '.join(CATALOGUE)}, a path to a .gguf file or Hugging Face "
            "directory, or a hub id like org/name or org/name@revision.",
        )
    repository, _, revision = source.partition("@")
    return repository, revision or None
