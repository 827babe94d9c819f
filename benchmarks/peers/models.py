"""The demo model in the format of each peer, all from the one GGUF file that MeshServe serves."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.peers import environments
from services.runtime.modelfiles import ModelStoreError, locate, pull

MODEL = "smollm2-135m"
DIRECTORY = environments.PEERS / "models"
BF16_DIRECTORY = DIRECTORY / "hf-bf16"
OPENVINO_PRECISIONS = ("bf16", "int8")
LLAMACPP_PRECISIONS = ("q4_1", "q8_0")
EXPORT_SCRIPT = Path(__file__).parent / "openvino_export.py"


def llamacpp_model(precision: str) -> Path:
    """The GGUF file of a precision; `q4_1` is the original."""
    return locate(MODEL) if precision == "q4_1" else DIRECTORY / f"{precision}.gguf"


def openvino_directory(precision: str) -> Path:
    """OpenVINO's model and tokenizer of a precision."""
    return DIRECTORY / f"openvino-{precision}"


def are_ready() -> bool:
    """Whether every format is there."""
    try:
        locate(MODEL)
    except ModelStoreError:
        return False
    return all(
        path.exists()
        for path in (
            BF16_DIRECTORY,
            *map(llamacpp_model, LLAMACPP_PRECISIONS),
            *map(openvino_directory, OPENVINO_PRECISIONS),
        )
    )


def make_all() -> None:
    """Makes what is not there. Raises subprocess.CalledProcessError where a converter fails."""
    pull(MODEL)
    if not BF16_DIRECTORY.exists():
        with _made_whole(BF16_DIRECTORY) as directory:
            _write_huggingface(locate(MODEL), directory)
    for precision in LLAMACPP_PRECISIONS:
        wanted = llamacpp_model(precision)
        if not wanted.exists():
            with _made_whole(wanted) as file:
                _requantize(locate(MODEL), file, precision)
    for precision in OPENVINO_PRECISIONS:
        wanted = openvino_directory(precision)
        if not wanted.exists():
            with _made_whole(wanted) as directory:
                environments.OPENVINO.run(
                    EXPORT_SCRIPT, str(BF16_DIRECTORY), str(directory), precision
                )


def without_home(text: str) -> str:
    """A command's word as it may stand in a report."""
    text = text.replace(str(environments.PEERS), "PEERS").replace(f"{ROOT}/", "")
    return text.replace(str(Path.home()), "~")


def _write_huggingface(source: Path, directory: Path) -> None:
    # Imported here: a report can be made where the test dependencies are not installed.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        **where,
    )
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source.parent, **where).save_pretrained(directory)


def _requantize(source: Path, destination: Path, precision: str) -> None:
    command = [
        str(environments.llamacpp_binary("llama-quantize")),
        "--allow-requantize",
        str(source),
        str(destination),
        precision.upper(),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextmanager
def _made_whole(wanted: Path) -> Iterator[Path]:
    """A place beside the wanted one that takes its name once everything is in it."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".making-", dir=wanted.parent))
    try:
        made = folder / wanted.name
        yield made
        os.replace(made, wanted)
    finally:
        shutil.rmtree(folder)
