"""GGUF files are read exactly, and what is not one is an error that says where."""

from __future__ import annotations

import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.ggml_types import GGML_TYPES
from services.runtime.modelfiles.gguf import GGUFFile


def header(num_tensors: int, num_entries: int, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_entries) + body


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def read_everything(path: Path) -> None:
    with GGUFFile(path) as file:
        for key in file.metadata:
            _ = file.metadata[key]
        for name, info in file.tensors.items():
            assert file.tensor_bytes(name).nbytes == info.nbytes


def test_every_value_type_reads_as_it_was_written(small_gguf: Path) -> None:
    with GGUFFile(small_gguf) as file:
        values = {key: file.metadata[key] for key in file.metadata}
    assert values["n.u8"] == 255
    assert values["n.i8"] == -1
    assert values["n.u16"] == 65_535
    assert values["n.i16"] == -2
    assert values["n.u32"] == 2**32 - 1
    assert values["n.i32"] == -3
    assert values["n.u64"] == 2**64 - 1
    assert values["n.i64"] == -4
    assert values["n.f32"] == 0.5
    assert values["n.f64"] == 0.25
    assert values["n.bool"] is True
    assert values["text"] == "größe 語 🙂"
    assert values["words"] == ["a", "", "ccc", "ü"]
    assert list(values["ints"]) == [1, 2, 3]
    assert list(values["floats"]) == [0.5, 1.5]
    assert list(values["flags"]) == [True, False, True]


def test_tensors_have_row_major_shapes_and_their_bytes(small_gguf: Path) -> None:
    with GGUFFile(small_gguf) as file:
        assert file.tensors["f32"].shape == (2, 3)
        floats = file.tensor_bytes("f32").view("<f4")
        assert floats.tolist() == [0, 1, 2, 3, 4, 5]
        assert file.tensors["q8"].type.name == "Q8_0"
        assert file.tensors["q8"].nbytes == 2 * 34


def test_the_demo_model_reads_as_the_reference_reader_has_it(demo_model_path: Path) -> None:
    reference = gguf.GGUFReader(demo_model_path)
    with GGUFFile(demo_model_path) as file:
        expected = {key: field for key, field in reference.fields.items() if "GGUF." not in key}
        assert set(file.metadata) == set(expected)
        for key, field in expected.items():
            found = file.metadata[key]
            plain = found.tolist() if isinstance(found, np.ndarray) else found
            assert plain == field.contents()
        assert [
            (tensor.name, tuple(tensor.shape[::-1]), tensor.data_offset, tensor.n_bytes)
            for tensor in reference.tensors
        ] == [(info.name, info.shape, info.offset, info.nbytes) for info in file.tensors.values()]


def test_storage_types_are_those_of_the_reference_package() -> None:
    expected = {
        int(kind): (kind.name, *sizes)
        for kind, sizes in gguf.GGML_QUANT_SIZES.items()
        if int(kind) in GGML_TYPES
    }
    assert expected == {
        number: (kind.name, kind.block_elements, kind.block_bytes)
        for number, kind in GGML_TYPES.items()
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"PK\3\4 a zip file", "not a GGUF file"),
        (b"GG", "magic: needs 4 bytes but the file has only 2 more"),
        (header(0, 0, version=1), "version 1 is not supported"),
        (header(0, 0, version=3 << 24), "big-endian"),
        (header(2**60, 0), "tensor count: 1152921504606846976 entries do not fit"),
        (header(0, 2**60), "metadata count: 1152921504606846976 entries do not fit"),
        (header(0, 1, string(b"key") + struct.pack("<IQ", 8, 2**50)), "key 'key': needs"),
        (header(0, 1, string(b"key") + struct.pack("<IIQ", 9, 4, 2**60)), "key 'key': needs"),
        (header(0, 1, string(b"key") + struct.pack("<IIQ", 9, 8, 2**60)), "key 'key': needs"),
        (header(0, 1, string(b"key") + struct.pack("<I", 99)), "value type 99"),
        (header(0, 1, string(b"\xff\xfe") + struct.pack("<IBxx", 0, 1)), "is not UTF-8"),
        (
            header(0, 2, 2 * (string(b"twice") + struct.pack("<IB", 0, 1))),
            "key 'twice': is there twice",
        ),
        (
            header(0, 1, string(b"deep") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9),
            "nested more than",
        ),
        (
            header(1, 0, string(b"big") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)),
            "tensor 'big': 4835703278458516698824704 bytes .* beyond the file's end",
        ),
        (header(1, 0, string(b"t") + struct.pack("<IQIQ", 1, 4, 77, 0)), "ggml type 77"),
        (header(1, 0, string(b"t") + struct.pack("<IQIQ", 1, 33, 2, 0)), "not whole blocks"),
        (header(1, 0, string(b"t") + struct.pack("<IQIQ", 1, 0, 0, 0)), "has no elements"),
        (header(1, 0, string(b"t") + struct.pack("<IQIQ", 9, 1, 0, 0)), "9 dimensions"),
        (header(1, 0, string(b"t") + struct.pack("<IQIQ", 1, 1, 0, 7)), "not aligned"),
        (
            header(
                2,
                0,
                b"".join(string(n) + struct.pack("<IQIQ", 1, 8, 0, 0) for n in (b"t", b"u"))
                + bytes(64),
            ),
            "tensor 'u': overlaps the tensor before it .at byte",
        ),
    ],
)
def test_a_damaged_file_is_an_error_that_names_file_part_and_place(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=message) as caught:
        read_everything(path)
    assert str(path) in str(caught.value)


def test_a_lie_in_the_header_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "liar.gguf"
    path.write_bytes(header(0, 1, string(b"key") + struct.pack("<IIQ", 9, 8, 2**32) + bytes(64)))
    tracemalloc.start()
    with pytest.raises(ModelFileError):
        GGUFFile(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_a_missing_file_and_a_directory_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        GGUFFile(tmp_path / "none.gguf")
    with pytest.raises(ModelFileError, match="cannot be read"):
        GGUFFile(tmp_path)


def test_metadata_of_the_wrong_type_is_an_error_that_names_the_key(small_gguf: Path) -> None:
    with GGUFFile(small_gguf) as file:
        with pytest.raises(ModelFileError, match=r"key 'text': is str, not an integer"):
            file.metadata.integer("text")
        with pytest.raises(ModelFileError, match=r"key 'n.bool': is bool, not an integer"):
            file.metadata.integer("n.bool")
        with pytest.raises(ModelFileError, match=r"key 'absent': is missing"):
            file.metadata.string("absent")
        assert file.metadata.integer("absent", 7) == 7


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_mutated_file_is_read_or_refused_and_nothing_else(
    data: st.DataObject, small_gguf: Path, tmp_path: Path
) -> None:
    content = bytearray(small_gguf.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    path = tmp_path / "mutated.gguf"
    path.write_bytes(content[:cut])
    with suppress(ModelFileError):
        read_everything(path)


def test_every_truncation_is_refused(small_gguf: Path, tmp_path: Path) -> None:
    content = small_gguf.read_bytes()
    with GGUFFile(small_gguf) as file:
        needed = max(info.offset + info.nbytes for info in file.tensors.values())
    path = tmp_path / "cut.gguf"
    for length in range(0, needed, 7):
        path.write_bytes(content[:length])
        with pytest.raises(ModelFileError):
            GGUFFile(path)
