"""A model's step as a program of the native kernels: built once, run in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from services.engine.core.kernels.cpu.kv_cache import StepView
from services.engine.core.kernels.cpu.packing import LinearWeights, PackedLinear, WeightFormat
from services.engine.core.kernels.cpu.sampling import SampleArgs
from services.engine.core.kernels.cpu.team import Team


class Buffer(IntEnum):
    """Where operations read and write rows, `enum class Buffer` of src/program.h."""

    RESIDUAL = 0
    PROJECTED = 1
    ATTENDED = 2
    GATED = 3
    LOGITS = 4


class OpKind(IntEnum):
    """What an operation does, `enum class OpKind` of src/program.h."""

    EMBED = 0
    NORM = 1
    CONVERT = 2
    LINEAR = 3
    ROTARY_KV = 4
    ATTENTION = 5
    SELECT_ROWS = 6


class Epilogue(IntEnum):
    """What becomes of a linear layer's sums, `enum class Epilogue` of src/linear.h."""

    STORE = 0
    ADD = 1
    GATED_SILU = 2


class OpStruct(ctypes.Structure):
    """`struct Op` of src/program.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("layer", ctypes.c_int32),
        ("source", ctypes.c_int32),
        ("target", ctypes.c_int32),
        ("epilogue", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("width", ctypes.c_int32),
        ("norm_weight", ctypes.c_void_p),
        ("weights", ctypes.POINTER(LinearWeights)),
    )


class ProgramSpec(ctypes.Structure):
    """`struct ProgramSpec` of src/program.h."""

    _fields_ = (
        ("ops", ctypes.POINTER(OpStruct)),
        ("num_ops", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("rotary_dim", ctypes.c_int32),
        ("attention_scale", ctypes.c_float),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("layers", ctypes.c_void_p),
        ("num_layers", ctypes.c_int32),
        ("max_tokens", ctypes.c_int32),
        ("widths", ctypes.c_int32 * len(Buffer)),
        ("max_activation_inputs", ctypes.c_int32),
    )


class StepInput(StepView):
    """`struct StepInput` of src/program.h, which begins with its `StepView`."""

    _fields_ = (
        ("token_ids", ctypes.c_void_p),
        ("logits_rows", ctypes.c_void_p),
        ("num_rows", ctypes.c_int32),
        ("logits", ctypes.c_void_p),
        ("sampling", ctypes.POINTER(SampleArgs)),
    )


class ProgramBuilder:
    """Collects a model's operations in order; a model family's `lower` calls its methods.

    `pack(module, gated)` gives the packed weights of a linear layer or embedding, `vector(module)`
    those of a norm as float32.
    """

    def __init__(
        self, pack: Callable[[Any, bool], PackedLinear], vector: Callable[[Any], Tensor]
    ) -> None:
        self._pack = pack
        self._vector = vector
        self._packed: dict[int, PackedLinear] = {}
        self._vectors: list[Tensor] = []
        self.ops: list[OpStruct] = []
        self.widths = [0] * len(Buffer)
        self.max_activation_inputs = 0

    @property
    def packed(self) -> Iterator[PackedLinear]:
        """The matrices in use, each once."""
        yield from self._packed.values()

    def embed(self, embedding: Any) -> None:
        """residual = the embeddings of the step's tokens."""
        packed = self._weights(embedding)
        self._widen(Buffer.RESIDUAL, packed.inputs)
        self._add(OpKind.EMBED, weights=packed)

    def norm(self, norm: Any) -> None:
        """The input of the next linear layer = RMSNorm(residual)."""
        weight = self._vector(norm).float().contiguous()
        self._vectors.append(weight)
        self._add(
            OpKind.NORM,
            source=Buffer.RESIDUAL,
            width=len(weight),
            eps=norm.eps,
            norm_weight=weight.data_ptr(),
        )

    def convert(self, source: Buffer) -> None:
        """The input of the next linear layer = the rows of `source`."""
        self._add(OpKind.CONVERT, source=source, width=self.widths[source])

    def linear(self, module: Any, target: Buffer, *, epilogue: Epilogue = Epilogue.STORE) -> None:
        """target = what was normed or converted last, times the weights of `module`."""
        packed = self._weights(module, gated=epilogue is Epilogue.GATED_SILU)
        # The latest norm or conversion writes what this layer reads, in the form that it reads.
        writes_input = next(
            op for op in reversed(self.ops) if op.kind in (OpKind.NORM, OpKind.CONVERT)
        )
        writes_input.format = int(packed.weight_format is not WeightFormat.BF16)
        assert writes_input.width == packed.inputs
        self.max_activation_inputs = max(self.max_activation_inputs, packed.inputs)
        width = packed.outputs // 2 if epilogue is Epilogue.GATED_SILU else packed.outputs
        self._widen(target, width)
        self._add(
            OpKind.LINEAR,
            target=target,
            epilogue=epilogue,
            format=writes_input.format,
            weights=packed,
        )

    def rotary_kv(self, layer_index: int) -> None:
        """Rotate the queries and keys in `projected`; store keys and values in the cache."""
        self._add(OpKind.ROTARY_KV, layer=layer_index, source=Buffer.PROJECTED)

    def attention(self, layer_index: int, width: int) -> None:
        """attended = attention of the queries in `projected`, [num_tokens, width]."""
        self._widen(Buffer.ATTENDED, width)
        self._add(
            OpKind.ATTENTION,
            layer=layer_index,
            source=Buffer.PROJECTED,
            target=Buffer.ATTENDED,
        )

    def select_rows(self) -> None:
        """Keep the rows that logits are wanted of, of `residual` and `attended`."""
        self._add(OpKind.SELECT_ROWS)

    def _weights(self, module: Any, *, gated: bool = False) -> PackedLinear:
        # A tied head is the embedding's own matrix.
        if id(module) not in self._packed:
            self._packed[id(module)] = self._pack(module, gated)
        return self._packed[id(module)]

    def _widen(self, buffer: Buffer, width: int) -> None:
        self.widths[buffer] = max(self.widths[buffer], width)

    def _add(self, kind: OpKind, *, weights: PackedLinear | None = None, **fields: Any) -> None:
        op = OpStruct(kind=int(kind), **{name: _plain(value) for name, value in fields.items()})
        if weights is not None:
            op.weights = ctypes.pointer(weights.struct)
        self.ops.append(op)


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, IntEnum) else value


class Program:
    """A program ready to run. Raises MemoryError where its buffers do not fit."""

    def __init__(self, builder: ProgramBuilder, team: Team, **shape: Any) -> None:
        """shape: the fields of ProgramSpec that the builder does not know."""
        self._builder = builder  # owns the weights
        self._team = team
        self._keep = shape  # tensors and arrays that the spec points to
        self._ops = (OpStruct * len(builder.ops))(*builder.ops)
        fields = {
            name: value.data_ptr() if isinstance(value, Tensor) else value
            for name, value in shape.items()
        }
        fields["layers"] = ctypes.cast(shape["layers"], ctypes.c_void_p)
        spec = ProgramSpec(
            ops=self._ops,
            num_ops=len(self._ops),
            widths=(ctypes.c_int32 * len(Buffer))(*builder.widths),
            max_activation_inputs=builder.max_activation_inputs,
            **fields,
        )
        table = team.library.table
        self._run, self._free = table.run_program, table.free_program
        self._handle = table.make_program(team.handle, ctypes.byref(spec))
        if not self._handle:
            raise MemoryError("the buffers of a step do not fit")

    def run(self, step: StepInput) -> None:
        """Compute one step. Raises MemoryError where it takes more than there is."""
        if self._run(self._handle, ctypes.byref(step)):
            raise MemoryError("a step's attention takes more memory than there is")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._free(self._handle)


def rotary_tables(
    frequencies: Tensor, amplitude: float, max_positions: int
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, float32 [max_positions, rotary_dim / 2] each."""
    positions = torch.arange(max_positions, dtype=torch.float32)
    angles = positions.unsqueeze(1) * frequencies.float()
    return (angles.cos() * amplitude).contiguous(), (angles.sin() * amplitude).contiguous()
