"""What each type of GGUF costs in size and perplexity, as the engine keeps it in memory.

    python -m benchmarks.peers llamacpp
    python -m benchmarks.gguf_types --tokens 4096

llama.cpp's library, which the peers' environment brings, quantises the matrices of a model's layers
to each type; the head stays at 8 bits, as conversions keep it wider than the rest. "file" is the
perplexity of the result in float32, the other lines are that of the native kernels with the weights
kept in several ways. Rows that are no whole blocks of a type are filled up with zeros first.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.environments import PEERS
from benchmarks.perplexity import CHOICES
from benchmarks.prompts import english_prompts
from services.engine.core.kernels import cpu, select
from services.engine.core.kernels.cpu.kv_cache import KvFormat
from services.engine.core.kernels.cpu.packing import GroupedWeight, quantize_8
from services.engine.core.kernels.cpu.team import Team
from services.engine.core.models.loader import OpenedModel, open_model
from services.engine.core.models.native import NativeModel
from services.engine.core.quantization.measuring import native_step, perplexity, torch_step
from services.engine.core.weights.dequantize import dequantize
from services.engine.core.weights.grouped import GROUPED, read_grouped
from services.runtime.modelfiles import locate
from services.runtime.modelfiles.ggml_types import GGML_TYPES, GGMLType

TYPES = ("Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0")
TYPES += ("IQ4_NL", "IQ4_XS")


class Quantised:
    """A checkpoint whose matrices are stored as a type of GGUF."""

    def __init__(self, opened: OpenedModel, library: ctypes.CDLL, storage: GGMLType) -> None:
        self.bits = 8 * storage.block_bytes / storage.block_elements
        self._checkpoint, self._storage = opened.checkpoint, storage
        self._raw = {
            name: self._quantise(library, self._checkpoint.read(name))
            for name in self._checkpoint.shapes
            if name.startswith("layers.") and len(self._checkpoint.shapes[name]) == 2
        }

    def _quantise(self, library: ctypes.CDLL, values: Tensor) -> np.ndarray:
        storage, (rows, width) = self._storage, values.shape
        padded = torch.zeros(rows, -(-width // storage.block_elements) * storage.block_elements)
        padded[:, :width] = values
        raw = np.empty(padded.numel() // storage.block_elements * storage.block_bytes, np.uint8)
        library.ggml_quantize_chunk(
            storage.type_id,
            ctypes.c_void_p(padded.data_ptr()),
            ctypes.c_void_p(raw.ctypes.data),
            ctypes.c_int64(0),
            ctypes.c_int64(rows),
            ctypes.c_int64(padded.shape[1]),
            None,
        )
        return raw

    def read(self, name: str) -> Tensor:
        """As stored, in float32."""
        if name not in self._raw:
            return self._checkpoint.read(name)
        rows, width = self._checkpoint.shapes[name]
        return dequantize(self._raw[name], self._storage, (rows, self._width(name)))[:, :width]

    def read_grouped(self, name: str) -> GroupedWeight | None:
        """As the engine keeps it."""
        if name not in self._raw:
            return quantize_8(self._checkpoint.read(name))
        rows, width = self._checkpoint.shapes[name]
        if self._storage.name not in GROUPED:
            return quantize_8(self.read(name))
        whole = read_grouped(self._raw[name], self._storage, (rows, self._width(name)))
        minima = None if whole.minima is None else whole.minima[:, : width // 32]
        return GroupedWeight(
            whole.levels[:, :width], whole.scales[:, : width // 32], minima, whole.bits
        )

    def release(self) -> None:
        """Nothing of it lies in a file."""

    def _width(self, name: str) -> int:
        blocks = self._raw[name].size // self._storage.block_bytes
        return blocks * self._storage.block_elements // self._checkpoint.shapes[name][0]


def main() -> None:
    """Print a line for each type and each way of keeping it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--types", nargs="+", default=TYPES)
    options = parser.parse_args()
    windows = english_prompts(options.model, options.tokens // options.window, options.window)
    (library_path,) = PEERS.glob("llamacpp/venv/lib/python3*/site-packages/*/bin/libggml-base.so")
    library = ctypes.CDLL(str(library_path))
    select("cpu")
    kernels = cpu.activate("auto")
    assert kernels is not None
    team = Team(kernels, torch.get_num_threads())
    path = locate(options.model)
    own = perplexity(torch_step(open_model(path), options.window), windows)
    print(f"{'the model itself':24} {own:8.3f}")
    by_name = {storage.name: storage for storage in GGML_TYPES.values()}
    for name in options.types:
        _print_type(path, by_name[name], library, team, windows)


def _print_type(
    path: Path, storage: GGMLType, library: ctypes.CDLL, team: Team, windows: list[list[int]]
) -> None:
    opened = open_model(path)
    quantised = Quantised(opened, library, storage)
    opened = OpenedModel(opened.config, quantised, opened.skeleton)  # type: ignore[arg-type]
    window = len(windows[0])
    stored = perplexity(torch_step(opened, window), windows)
    print(f"{storage.name:8} {'file':10} {quantised.bits:5.2f} bits {stored:8.3f}", flush=True)
    for weights in CHOICES:
        model = NativeModel(opened.skeleton, opened.checkpoint, team, weights)
        found = perplexity(native_step(model, KvFormat.BF16, window), windows)
        size = sum(model.weight_bytes.values()) / 2**20
        change = 100 * (found / stored - 1)
        print(f"{'':8} {weights:10} {size:6.1f} MiB {found:8.3f} {change:+6.2f} %", flush=True)


if __name__ == "__main__":
    main()
