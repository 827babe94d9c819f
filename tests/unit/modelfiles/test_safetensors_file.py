"""Safetensors files are read where they lie, and what is not one is an error that says where."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.safetensors_file import ITEM_BYTES, SafetensorsFile, read_header


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_tensors_are_those_of_the_reference_library(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        "floats": np.arange(6, dtype=np.float32).reshape(2, 3),
        "halves": np.ones((3, 1, 2), np.float16),
        "bytes": np.arange(5, dtype=np.int8),
        "words": np.array([[1, -2]], np.int32),
        "one": np.array(7, np.int64),
        "none": np.zeros((0, 4), np.float32),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    expected = load_file(path)
    assert set(file.tensors) == set(expected)
    for name, values in expected.items():
        stored = file.tensors[name]
        assert stored.shape == values.shape
        assert stored.num_elements == values.size
        assert file.tensor_bytes(name).tobytes() == values.tobytes()
        content = path.read_bytes()[stored.offset : stored.offset + stored.nbytes]
        assert content == values.tobytes()
    file.release()
    assert file.tensor_bytes("words").view("<i4").tolist() == [1, -2]
    file.close()


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry("F32", [2], 0, 8)}, bytes(4), r"'a': bytes 0 to 8 lie beyond the file's end"),
        ({"a": entry("F32", [2], 8, 0)}, bytes(8), r"'a': bytes 8 to 0 lie beyond"),
        ({"a": entry("F32", [3], 0, 8)}, bytes(8), r"'a': 8 bytes are not \[3\] of F32 \(at byte"),
        ({"a": entry("F32", [2**62, 4], 0, 8)}, bytes(8), "8 bytes are not"),
        ({"a": entry("F3", [2], 0, 8)}, bytes(8), r"'a': type 'F3' is not known"),
        ({"a": entry("F32", [1] * 99, 0, 4)}, bytes(4), "has 99 dimensions, not 0 to 8"),
        ({"a": entry("F32", [-2], 0, 8)}, bytes(8), "'a': is not described as a tensor"),
        ({"a": entry("F32", [True], 0, 4)}, bytes(4), "'a': is not described as a tensor"),
        ({"a": entry("F32", [0.5], 0, 4)}, bytes(4), "'a': is not described as a tensor"),
        ({"a": 7}, b"", "'a': is not described as a tensor"),
        (
            {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)},
            bytes(6),
            r"'b': overlaps the tensor before it \(at byte",
        ),
        (
            {"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 4, 6)},
            bytes(6),
            r"'b': follows a gap \(at byte",
        ),
        ({"a": entry("U8", [2], 0, 2)}, bytes(5), "3 bytes belong to no tensor"),
        (b'{"a": 1, "a": 2}', b"", r"header: is not JSON: 'a' is there twice \(at byte 8\)"),
        (b"[" * 100_000, b"", "header: is not JSON"),
        (b"[]", b"", "header: is not a JSON object"),
        (b"\xff", b"", "header: is not JSON"),
    ],
)
def test_a_damaged_header_is_an_error_that_names_file_tensor_and_place(
    header: Any, data: bytes, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(ModelFileError, match=rf"bad\.safetensors: .*{message}"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 2**63), b"\xff" * 8])
def test_a_file_without_a_header_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"bad\.safetensors: "):
        read_header(path)


def test_every_size_of_an_item_is_that_of_its_name() -> None:
    for name, size in ITEM_BYTES.items():
        bits = 8 if name == "BOOL" else int("".join(filter(str.isdigit, name.partition("_")[0])))
        assert size == bits // 8
