"""Damages an adapter in many ways: each example is read, or refused by the name of a file, in a
process that may take little memory and time.

    python -m tests.fakes.adapter_fuzzing '[[KIND, EXAMPLES, DIRECTORY], ...]'

DIRECTORY holds a model, `model`, and an adapter of it, `a`; KIND is as in tests.fakes.fuzzing.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.engine.core.adapters.config import CONFIG_NAME
from services.engine.core.adapters.reading import read_adapter
from services.engine.core.adapters.targets import Targets
from services.engine.core.models.loader import open_model
from services.runtime.modelfiles import ModelFileError
from tests.fakes.fuzzing import (
    BESIDE_BYTES,
    SECONDS_EACH,
    SIZES_ALLOWED,
    at_most,
    damage_file,
    damage_header,
    damage_tensors,
)

_DAMAGE = {
    "config": damage_file(CONFIG_NAME),
    "header": damage_header,
    "tensors": damage_tensors,
}


def fuzz(kind: str, examples: int, saved: Path) -> None:
    """Damage one adapter in many ways."""
    adapter = saved / "a"
    targets = Targets.of_model(open_model(saved / "model").skeleton)
    size = sum(file.stat().st_size for file in adapter.iterdir())

    @settings(
        max_examples=examples,
        deadline=SECONDS_EACH * 1000,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def every_example_is_read_or_refused(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(shutil.copytree(adapter, Path(folder) / "a"))
            _DAMAGE[kind](data, directory)
            try:
                with at_most(BESIDE_BYTES + SIZES_ALLOWED * size):
                    read_adapter(directory, targets, max_rank=2**40)
            except ModelFileError as error:
                if folder not in str(error):
                    raise AssertionError(f"names no file: {error}") from error

    # Undamaged, so that what is loaded with its first use is not an example's.
    read_adapter(adapter, targets, max_rank=64)
    every_example_is_read_or_refused()


def main() -> None:
    """Run the examples."""
    torch.set_num_threads(1)
    for kind, examples, directory in json.loads(sys.argv[1]):
        print(kind, flush=True)
        fuzz(kind, examples, Path(directory))


if __name__ == "__main__":
    main()
