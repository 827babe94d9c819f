"""Projections by the format of their weights, and what is done between them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_bench import Bench, implementations
from services.engine.core.device_sampling import DeviceSampler
from services.engine.core.kernels import OPS
from services.engine.core.kernels.matrices import GroupedMatrix, ScaledMatrix
from services.engine.core.kernels.registry import REFERENCE
from services.engine.core.sampler import SamplingBatch, sample

# (inputs, outputs)
LLAMA_8B = {
    "qkv": (4096, 6144),
    "output": (4096, 4096),
    "gate and up": (4096, 28672),
    "down": (14336, 4096),
    "head": (4096, 128256),
}
QWEN3_600M = {
    "qkv": (1024, 4096),
    "output": (2048, 1024),
    "gate and up": (1024, 6144),
    "down": (3072, 1024),
}
TINY = {"any": (128, 64)}
ROWS = (1, 8, 16, 64, 256, 4096)
FORMATS = ("bf16", "int4", "int8", "fp8 x fp8", "int8 x int8")
_GROUP = 128
# The reference of what is quantised makes floats of the whole matrix, in float64 some.
_MOST_REFERENCE_ROWS = 16


def projections(bench: Bench) -> None:
    """Matrix products of models, each of which reads its weights once."""
    models = {"tiny": TINY} if bench.tiny else {"8B": LLAMA_8B, "0.6B": QWEN3_600M}
    rows = (1, 5) if bench.tiny else ROWS
    for model, layers in models.items():
        for layer, (inputs, outputs) in layers.items():
            for form in FORMATS:
                if bench.left_s <= 0:
                    return
                weight = make_weight(form, outputs, inputs, bench.device)
                for count in rows:
                    _project(bench, f"{model} {layer}, {form}", count, weight, form)


def make_weight(form: str, outputs: int, inputs: int, device: torch.device) -> Any:
    """A matrix in one of FORMATS, as its op takes it."""
    if form == "bf16":
        return torch.empty(outputs, inputs, dtype=torch.bfloat16, device=device).normal_(std=0.02)
    if form in ("int4", "int8"):
        bits = int(form[3:])
        levels = torch.empty(outputs, inputs * bits // 8, dtype=torch.uint8, device=device)
        shape = (outputs, inputs // _GROUP)
        scales = torch.full(shape, 0.04 / 2**bits, dtype=torch.float16, device=device)
        return GroupedMatrix(levels.random_(0, 256), scales, None, bits)
    scales = torch.full((outputs,), 1e-4, device=device)
    if form == "int8 x int8":
        elements = torch.empty(outputs, inputs, dtype=torch.int8, device=device)
        return ScaledMatrix(elements.random_(-127, 127), scales)
    elements = torch.empty(outputs, inputs, dtype=torch.uint8, device=device).random_(0, 0x70)
    return ScaledMatrix(elements.view(torch.float8_e4m3fn), scales)


def _project(bench: Bench, what: str, rows: int, weight: Any, form: str) -> None:
    outputs, inputs = weight.shape
    hidden = torch.randn(rows, inputs, device=bench.device).bfloat16()
    op: str
    args: tuple[Any, ...]
    if form == "bf16":
        op, args, kind = "linear", (hidden, weight, None), "bf16"
    elif form in ("int4", "int8"):
        op, args, kind = "grouped_linear", (hidden, weight, None), "bf16"
    else:
        elements, scales = OPS["quantize_rows"].reference(hidden, weight.elements.dtype)
        op, args = "scaled_linear", (elements, scales, weight, None, torch.bfloat16)
        kind = form.split()[0]
    num_bytes = weight.nbytes + 2.0 * rows * (inputs + outputs)
    for name, run in implementations(OPS[op]).items():
        # cuBLAS is the reference of bf16.
        if name == REFERENCE and form != "bf16" and rows > _MOST_REFERENCE_ROWS:
            continue
        shown = "cuBLAS (reference)" if name == REFERENCE and form == "bf16" else name
        bench.measure(
            f"{what}, {rows} rows",
            shown,
            partial(run, *args),
            num_bytes=num_bytes,
            flops=2.0 * rows * inputs * outputs,
            kind=kind,
        )


def elementwise(bench: Bench) -> None:
    """What reads and writes activations and computes next to nothing: judged by its bytes."""
    hidden_size, inner = (64, 96) if bench.tiny else (4096, 14336)
    heads, head_dim = (4, 16) if bench.tiny else (32, 128)
    for rows in (1, 5) if bench.tiny else (1, 64, 256, 4096):
        hidden, residual = (_rows(bench, rows, hidden_size) for _ in range(2))
        weight = _rows(bench, hidden_size)
        gate_up = _rows(bench, rows, 2 * inner)
        queries = _rows(bench, rows, heads, head_dim)
        cos, sin = (_rows(bench, rows, 1, head_dim) for _ in range(2))
        one, row = 2.0 * rows * hidden_size, 2.0 * rows
        calls: dict[str, tuple[tuple[Any, ...], float]] = {
            "rms_norm": ((hidden, weight, 1e-5), 2 * one),
            "add_rms_norm": ((hidden, residual, weight, 1e-5), 4 * one),
            "quantize_rows": ((hidden, torch.int8), 1.5 * one),
            "add_rms_norm_quantized": ((hidden, residual, weight, 1e-5, torch.int8), 3.5 * one),
            "silu_and_mul": ((gate_up,), 3 * row * inner),
            "rotary_embedding": ((queries, cos, sin), row * head_dim * (2 * heads + 2)),
        }
        for op, (args, num_bytes) in calls.items():
            for name, run in implementations(OPS[op]).items():
                bench.measure(
                    f"{op}, {rows} rows",
                    name,
                    partial(run, *args),
                    num_bytes=num_bytes,
                )


def _rows(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(*shape, device=bench.device).bfloat16()


def sampling(bench: Bench) -> None:
    """Choosing tokens: read once, logits are all that must be."""
    vocab = 503 if bench.tiny else 128256
    for rows in (1, 3) if bench.tiny else (1, 8, 64, 256):
        logits = torch.randn(rows, vocab, device=bench.device).mul_(4)
        drawn = SamplingBatch(
            temperature=np.full(rows, 0.8, np.float32),
            top_k=np.zeros(rows, np.int64),
            top_p=np.full(rows, 0.95, np.float32),
            min_p=np.zeros(rows, np.float32),
            uniforms=(np.arange(rows) + 0.5) / rows,
            logprobs=np.full(rows, -1, np.int64),
        )
        for kind, batch in (("greedy", SamplingBatch.greedy(rows)), ("top-p 0.95", drawn)):
            sampler = DeviceSampler(bench.device, rows, vocab, at_once=False)
            for by, run in (
                ("sampler, to the host", partial(sample, logits, batch)),
                ("on the device", partial(sampler.enqueue, logits, sampler.stage(batch))),
            ):
                case = f"{kind}, {rows} rows of {vocab}"
                bench.measure(case, by, run, num_bytes=4.0 * rows * vocab)
