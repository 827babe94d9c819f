"""A small GGUF file that has some of everything."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest


@pytest.fixture(scope="session")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_uint8("n.u8", 255)
    writer.add_int8("n.i8", -1)
    writer.add_uint16("n.u16", 65_535)
    writer.add_int16("n.i16", -2)
    writer.add_uint32("n.u32", 2**32 - 1)
    writer.add_int32("n.i32", -3)
    writer.add_uint64("n.u64", 2**64 - 1)
    writer.add_int64("n.i64", -4)
    writer.add_float32("n.f32", 0.5)
    writer.add_float64("n.f64", 0.25)
    writer.add_bool("n.bool", True)
    writer.add_string("text", "größe 語 🙂")
    writer.add_array("words", ["a", "", "ccc", "ü"])
    writer.add_array("ints", [1, 2, 3])
    writer.add_array("floats", [0.5, 1.5])
    writer.add_array("flags", [True, False, True])
    writer.add_tensor("f32", np.arange(6, dtype=np.float32).reshape(2, 3))
    quantised = gguf.quants.quantize(
        np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64), gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("q8", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
