"""A GGUF model as one, whether it lies in one file or was split into several.

Parts are named NAME-00001-of-00003.gguf and say `split.no` (from 0) and `split.count`; the first
holds the metadata of all.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType

import numpy as np

from services.runtime.modelfiles.errors import ModelFileError
from services.runtime.modelfiles.gguf import GGUFFile, TensorInfo

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class GGUFModel:
    """`metadata` and `tensors` by name, of all files together; tensor bytes on demand.

    path: the only file, or the first of several. Raises ModelFileError as GGUFFile does, and for
    parts that are missing or do not belong together.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        first = GGUFFile(self.path)
        self.metadata = first.metadata
        self._files = [first]
        self._owners: dict[str, GGUFFile] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._files += [GGUFFile(part) for part in _further_parts(first)]
            for index, file in enumerate(self._files):
                self._add(file, index)
            self._check_count()
        except ModelFileError:
            self.close()
            raise

    @property
    def files(self) -> tuple[Path, ...]:
        """All files, in order."""
        return tuple(file.path for file in self._files)

    def _add(self, file: GGUFFile, index: int) -> None:
        metadata = file.metadata
        here = (metadata.integer("split.no", 0), metadata.integer("split.count", 1))
        if here != (index, max(len(self._files), 1)):
            problem = f"says it is part {here[0] + 1} of {here[1]}, not {index + 1} of "
            raise ModelFileError(file.path, problem + str(len(self._files)), what="key 'split.no'")
        for name, info in file.tensors.items():
            if name in self.tensors:
                problem = f"is in {self._owners[name].path.name} as well"
                raise ModelFileError(
                    file.path, problem, what=f"tensor {name!r}", offset=info.offset
                )
            self.tensors[name] = info
            self._owners[name] = file

    def _check_count(self) -> None:
        count = self.metadata.integer("split.tensors.count", len(self.tensors))
        if count != len(self.tensors):
            problem = f"{count} tensors were split, {len(self.tensors)} are here"
            raise ModelFileError(self.path, problem, what="key 'split.tensors.count'")

    def file_of(self, name: str) -> Path:
        """Return where a tensor lies."""
        return self._owners[name].path

    def tensor_bytes(self, name: str) -> np.ndarray:
        """Return the stored bytes of a tensor, as `GGUFFile.tensor_bytes`."""
        return self._owners[name].tensor_bytes(name)

    def release(self) -> None:
        """Give back the memory through which tensors were read so far."""
        for file in self._files:
            file.release()

    def close(self) -> None:
        """Unmap all files; arrays still held by a caller keep theirs mapped until they go."""
        for file in self._files:
            file.close()

    def __enter__(self) -> GGUFModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _further_parts(first: GGUFFile) -> list[Path]:
    path, count = first.path, first.metadata.integer("split.count", 1)
    if count <= 1:
        return []
    named = _PART.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        problem = f"is one of {count} parts, which are named like NAME-00001-of-{count:05}.gguf"
        raise ModelFileError(path, problem, what="key 'split.count'")
    parts = [path.with_name(f"{named[1]}-{at:05}-of-{named[3]}.gguf") for at in range(1, count + 1)]
    if path != parts[0]:
        problem = f"is part {int(named[2])} of {count}; give the first, {parts[0].name}"
        raise ModelFileError(path, problem)
    return parts[1:]
