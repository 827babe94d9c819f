"""What a kubelet does for a pod, done here: volumes of ConfigMaps and Secrets, and probes."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path

_versions = itertools.count(1)


def publish(folder: Path, files: Mapping[str, bytes]) -> None:
    """Puts files into a volume, or puts others in their place, all in one moment.

    As in k8s.io/kubernetes/pkg/volume/util/atomic_writer.go: each name is a symbolic link to
    `..data/NAME`, `..data` is one to a folder with the files, and is renamed over. So the links
    that a service opens never change; what they lead to does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = folder / "..data"
    old = before.resolve() if before.is_symlink() else None
    new = folder / f"..2026_01_01_{next(_versions):06}"
    new.mkdir()
    for name, content in files.items():
        (new / name).write_bytes(content)
    link = folder / "..data_tmp"
    link.symlink_to(new.name)
    link.rename(before)
    for name in files:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(Path("..data") / name)
    if old is not None:
        for gone in old.iterdir():
            if gone.name not in files:
                (folder / gone.name).unlink()
        shutil.rmtree(old)
