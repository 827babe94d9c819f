"""Damages the files of an encoder in many ways: each example is read, or refused by the name of a
file, in a process that may take little memory and time.

    python -m tests.fakes.encoder_fuzzing '[["modules.json", 100, "DIRECTORY"]]'
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

from services.engine.core.encoding.answers import load_dense
from services.engine.core.encoding.loader import open_encoder
from services.runtime.modelfiles import ModelFileError
from tests.fakes.fuzzing import (
    BESIDE_BYTES,
    SECONDS_EACH,
    SIZES_ALLOWED,
    at_most,
    damage_file,
    damage_header,
)


def load_everything(path: Path) -> None:
    """Load an encoder for torch, with its head and its dense layers."""
    opened = open_encoder(path)
    try:
        opened.load(torch.float32, "cpu")
        opened.load_head("cpu")
        for dense in opened.outputs.dense:
            load_dense(dense)
    finally:
        opened.checkpoint.close()


def fuzz(what: str, examples: int, model: Path) -> None:
    """Damage one file of a model, or the header of its tensors, in many ways."""
    damage = damage_header if what.endswith(".safetensors") else damage_file(what)
    size = sum(file.stat().st_size for file in model.rglob("*") if file.is_file())

    @settings(
        max_examples=examples,
        deadline=SECONDS_EACH * 1000,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def every_example_loads_or_is_refused(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(shutil.copytree(model, Path(folder) / "model"))
            damage(data, (directory / what).parent if what.endswith(".safetensors") else directory)
            try:
                with at_most(BESIDE_BYTES + SIZES_ALLOWED * size):
                    load_everything(directory)
            except ModelFileError as error:
                if folder not in str(error):
                    raise AssertionError(f"names no file: {error}") from error

    # Undamaged, so that what is loaded with its first use is not an example's.
    load_everything(model)
    every_example_loads_or_is_refused()


def main() -> None:
    """Run the examples."""
    torch.set_num_threads(1)
    for what, examples, model in json.loads(sys.argv[1]):
        print(what, model, flush=True)
        fuzz(what, examples, Path(model))


if __name__ == "__main__":
    main()
