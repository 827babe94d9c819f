"""Damages model files in a process of its own that may take little memory and time.

    python -m tests.fakes.fuzzing '[[KIND, EXAMPLES, [FILE, ...]], ...]'

KIND says what a copy of the files is damaged in; every example must load, or be refused by a
ModelFileError that names the file. The process ends with 0 when all did, with a traceback and the
example when one did not. An allocation beyond the limit is a MemoryError, an example that takes
longer than its deadline an error of hypothesis.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.engine.core.models.loader import open_model
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.description import describe

# What an example may take: some times the file's size, and what Python and torch take besides.
SIZES_ALLOWED = 32
BESIDE_BYTES = 96 << 20
SECONDS_EACH = 5

_EXTREMES = [0, 1, 2, 7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
_NUMBERS = st.sampled_from(
    [*_EXTREMES, 3, 4, 8, 16, 32, 64, 128, -1, -(2**31), 10**30, 0.5, 1e308, float("nan")]
)
_LEAVES = st.one_of(st.none(), st.booleans(), _NUMBERS, st.text(max_size=8))
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
# Fields that only some families read: without them they would stay unread.
_FIELDS = [
    "head_dim",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "sliding_window",
    "sliding_window_pattern",
    "layer_types",
    "rope_scaling",
    "quantization_config",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "partial_rotary_factor",
    "text_config",
    "n_layer",
    "n_head",
    "n_embd",
    "n_inner",
    "n_positions",
    "rope_local_base_freq",
]
_FAMILIES = [
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GPT2LMHeadModel",
]


def damage_bytes(data: st.DataObject, content: bytes, end: int) -> bytes:
    """Change bytes and numbers before `end`, and cut, now and then."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, min(end, len(content)) - 1))
        if data.draw(st.booleans()):
            changed[at] = data.draw(st.integers(0, 255))
        else:
            size, form = data.draw(st.sampled_from([(8, "<Q"), (4, "<I")]))
            number = data.draw(st.sampled_from(_EXTREMES)) % (1 << (8 * size))
            changed[at : at + size] = struct.pack(form, number)
    if data.draw(st.integers(0, 3)) == 0:
        del changed[data.draw(st.integers(0, len(changed))) :]
    return bytes(changed)


def damage_json(data: st.DataObject, value: Any) -> Any:
    """Replace, drop or add parts of a JSON value."""
    for _ in range(data.draw(st.integers(1, 4))):
        places = list(_places(value))
        if not places:
            return data.draw(_VALUES)
        holder, key = data.draw(st.sampled_from(places))
        what = data.draw(st.integers(0, 3))
        if what == 0 and isinstance(holder, dict):
            del holder[key]
        elif what == 1 and isinstance(holder, dict):
            holder[data.draw(st.sampled_from(_FIELDS) | st.text(max_size=8))] = data.draw(_VALUES)
        else:
            holder[key] = data.draw(_VALUES)
    return value


def _places(value: Any) -> Any:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def damage_gguf(data: st.DataObject, directory: Path) -> Path:
    """Damage the header of one of a model's files; gives the first of them."""
    parts = sorted(directory.glob("*.gguf"))
    part = data.draw(st.sampled_from(parts))
    content = part.read_bytes()
    part.write_bytes(damage_bytes(data, content, min(len(content), 4096)))
    return parts[0]


def damage_header(data: st.DataObject, directory: Path) -> Path:
    """Damage the header of a safetensors file, as bytes or as JSON."""
    path = data.draw(st.sampled_from(sorted(directory.glob("*.safetensors"))))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        path.write_bytes(damage_bytes(data, content, 8 + length))
        return directory
    entries = json.loads(content[8 : 8 + length])
    header = json.dumps(damage_json(data, entries)).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    return directory


def damage_tensors(data: st.DataObject, directory: Path) -> Path:
    """Damage what a few tensors hold: levels, scales, orders of groups."""
    path = data.draw(st.sampled_from(sorted(directory.glob("*.safetensors"))))
    content = path.read_bytes()
    end_of_header = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end_of_header])
    header.pop("__metadata__", None)
    for _ in range(data.draw(st.integers(1, 3))):
        start, end = header[data.draw(st.sampled_from(sorted(header)))]["data_offsets"]
        start, end = end_of_header + start, end_of_header + end
        damaged = damage_bytes(data, content[start:end], end - start).ljust(end - start, b"\xff")
        content = content[:start] + damaged[: end - start] + content[end:]
    path.write_bytes(content)
    return directory


def damage_file(name: str) -> Callable[[st.DataObject, Path], Path]:
    """Damage a JSON file of a directory."""

    def damage(data: st.DataObject, directory: Path) -> Path:
        path = directory / name
        value = json.loads(path.read_bytes())
        if name == "config.json" and data.draw(st.booleans()):
            value["architectures"] = [data.draw(st.sampled_from(_FAMILIES))]
        if name == "config.json" and "quantization_config" in value and data.draw(st.booleans()):
            value["quantization_config"] = damage_json(data, value["quantization_config"])
            path.write_text(json.dumps(value))
        elif data.draw(st.integers(0, 4)) == 0:
            path.write_bytes(damage_bytes(data, path.read_bytes(), 1 << 20))
        elif data.draw(st.integers(0, 9)) == 0:
            path.write_text("[" * 100_000)
        else:
            path.write_text(json.dumps(damage_json(data, value)))
        return directory

    return damage


KINDS: dict[str, Callable[[st.DataObject, Path], Path]] = {
    "gguf": damage_gguf,
    "header": damage_header,
    "tensors": damage_tensors,
    "config": damage_file("config.json"),
    "index": damage_file("model.safetensors.index.json"),
}


def load_everything(path: Path) -> None:
    """Describe a model, load it for torch, and read its matrices for the kernels."""
    describe(path)
    opened = open_model(path)
    try:
        for name, shape in opened.checkpoint.shapes.items():
            if len(shape) == 2:
                opened.checkpoint.read_grouped(name)
                opened.checkpoint.read_scaled(name, torch.device("cpu"))
        opened.load(torch.float32, "cpu")
    finally:
        opened.checkpoint.close()


def fuzz(kind: str, examples: int, files: list[Path]) -> None:
    """Damage the files of one model in many ways."""
    size = sum(file.stat().st_size for file in files)

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
            path = KINDS[kind](data, copied(files, Path(folder)))
            try:
                with at_most(BESIDE_BYTES + SIZES_ALLOWED * size):
                    load_everything(path)
            except ModelFileError as error:
                if folder not in str(error):
                    raise AssertionError(f"names no file: {error}") from error

    # Undamaged, so that what is loaded with its first use is not an example's.
    with tempfile.TemporaryDirectory() as folder:
        directory = copied(files, Path(folder))
        load_everything(next(iter(sorted(directory.glob("*.gguf"))), directory))
    every_example_loads_or_is_refused()


@contextmanager
def at_most(num_bytes: int) -> Iterator[None]:
    """Let the process grow by no more than this."""
    used = 1024 * int(re.findall(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[0])
    resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def copied(files: list[Path], directory: Path) -> Path:
    """Copy files into a directory, and return it."""
    for file in files:
        shutil.copyfile(file, directory / file.name)
    return directory


def main() -> None:
    """Run the examples."""
    torch.set_num_threads(1)
    for kind, examples, paths in json.loads(sys.argv[1]):
        print(kind, paths[0], flush=True)
        fuzz(kind, examples, [Path(path) for path in paths])


if __name__ == "__main__":
    main()
