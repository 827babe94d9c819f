"""A model's step as a program of the native kernels: built once, run in one call."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any, TypeAlias

import torch
from torch import Tensor

from services.engine.core.kernels.cpu.adapters import AdaptedLinear, StepAdapters
from services.engine.core.kernels.cpu.kv_cache import StepView
from services.engine.core.kernels.cpu.packing import LinearWeights, PackedLinear, WeightFormat
from services.engine.core.kernels.cpu.sampling import SampleArgs
from services.engine.core.kernels.cpu.team import Team
from services.runtime.modelfiles import ModelFileError


class Buffer(IntEnum):
    """Where operations read and write rows, `enum class Buffer` of src/program.h."""

    RESIDUAL = 0
    PROJECTED = 1
    ATTENDED = 2
    GATED = 3
    LOGITS = 4
    ROUTED = 5
    MIXED = 6
    SUMS = 7


class OpKind(IntEnum):
    """What an operation does, `enum class OpKind` of src/program.h."""

    EMBED = 0
    NORM = 1
    CONVERT = 2
    LINEAR = 3
    ROTARY_KV = 4
    ATTENTION = 5
    SELECT_ROWS = 6
    ADD_NORM = 7
    ROUTE = 8
    SCATTER_NORM = 9
    EXPERT_LINEAR = 10
    MIX = 11
    SHRINK = 12
    EXPAND = 13


# Those that write what a linear layer reads.
_CONVERSIONS = (OpKind.NORM, OpKind.CONVERT, OpKind.SCATTER_NORM)


class Epilogue(IntEnum):
    """What becomes of a linear layer's sums, `enum class Epilogue` of src/linear.h."""

    STORE = 0
    ADD = 1
    GATED_SILU = 2
    GATED_GELU = 3
    GELU = 4
    CAPPED = 5

    @property
    def gates(self) -> bool:
        """Whether half of the outputs are gates of the other half."""
        return self in (Epilogue.GATED_SILU, Epilogue.GATED_GELU)


class ExpertsShape(ctypes.Structure):
    """`struct ExpertsShape` of src/experts.h."""

    _fields_ = (
        ("count", ctypes.c_int32),
        ("per_token", ctypes.c_int32),
        ("normalizes", ctypes.c_int32),
    )


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
        ("norm_bias", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("weights", ctypes.POINTER(LinearWeights)),
        ("scale", ctypes.c_float),
        ("positions", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("rotary_dim", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("softcap", ctypes.c_float),
        ("experts", ExpertsShape),
        ("adapted", ctypes.c_int32),
    )


class ProgramSpec(ctypes.Structure):
    """`struct ProgramSpec` of src/program.h."""

    _fields_ = (
        ("ops", ctypes.POINTER(OpStruct)),
        ("num_ops", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("attention_scale", ctypes.c_float),
        ("layers", ctypes.c_void_p),
        ("num_layers", ctypes.c_int32),
        ("max_tokens", ctypes.c_int32),
        ("widths", ctypes.c_int32 * len(Buffer)),
        ("max_activation_inputs", ctypes.c_int32),
        ("activation_bytes", ctypes.c_int32),
        ("adapter_width", ctypes.c_int32),
    )


class StepInput(StepView):
    """`struct StepInput` of src/program.h, which begins with its `StepView`."""

    _fields_ = (
        ("token_ids", ctypes.c_void_p),
        ("logits_rows", ctypes.c_void_p),
        ("num_rows", ctypes.c_int32),
        ("logits", ctypes.c_void_p),
        ("sampling", ctypes.POINTER(SampleArgs)),
        ("adapters", ctypes.POINTER(StepAdapters)),
    )


# Of one matrix, or of those of several experts.
Packed: TypeAlias = PackedLinear | list[PackedLinear]


class UnsupportedModelError(Exception):
    """The native kernels do not serve this model; plain torch does."""


@contextlib.contextmanager
def lowering() -> Iterator[None]:
    """Around what appends a model to a program: a shape that the kernels do not serve, which shows
    as a ValueError, raises UnsupportedModelError. A file that cannot be read is no such case."""
    try:
        with torch.inference_mode():
            yield
    except ModelFileError:
        raise
    except ValueError as error:
        raise UnsupportedModelError(str(error)) from None


class ProgramBuilder:
    """Collects a model's operations in order; a model family's `lower` calls its methods.

    `pack(module, gated)` gives the packed weights of a linear layer or embedding, or of each of
    several experts; `read(module, kind)` the "weight" of a norm or its "bias". `max_positions` is
    the longest sequence, `max_adapter_rank` the largest rank of adapters, 0 where there are none.
    """

    def __init__(
        self,
        pack: Callable[[Any, bool], Packed],
        read: Callable[[Any, str], Tensor],
        max_positions: int = 0,
        max_adapter_rank: int = 0,
    ) -> None:
        self._pack = pack
        self._read = read
        self._max_positions = max_positions
        self._max_adapter_rank = max_adapter_rank
        self._packed: dict[int, list[PackedLinear]] = {}
        self._kept: list[Any] = []  # what operations point to
        self._rotated: list[tuple[OpStruct, Any]] = []  # operations and their rotary embeddings
        self._written = [0] * len(Buffer)  # width of the rows that were written last
        self.ops: list[OpStruct] = []
        self.widths = [0] * len(Buffer)
        self.max_activation_inputs = 0
        self.activation_bytes = 0
        self.adapted: list[AdaptedLinear] = []  # the layers that adapters may change
        self.adapter_width = 0

    @property
    def packed(self) -> Iterator[PackedLinear]:
        """The matrices in use, each once."""
        for each in self._packed.values():
            yield from each

    def embed(self, embedding: Any, *, scale: float = 1.0, positions: Any = None) -> None:
        """residual = the embeddings of the step's tokens times `scale`, and of their positions."""
        packed = self._weights(embedding)[0]
        self._widen(Buffer.RESIDUAL, packed.inputs)
        self._add(
            OpKind.EMBED,
            weights=[packed],
            width=packed.inputs,
            scale=scale,
            positions=None if positions is None else self._floats(positions).data_ptr(),
        )

    def norm(self, norm: Any) -> None:
        """The input of the next linear layer = RMSNorm(residual), or LayerNorm."""
        self._norm(OpKind.NORM, norm, Buffer.RESIDUAL)

    def add_norm(self, norm: Any, source: Buffer) -> None:
        """residual += RMSNorm(source)."""
        self._norm(OpKind.ADD_NORM, norm, source)

    def convert(self, source: Buffer) -> None:
        """The input of the next linear layer = the rows of `source`."""
        self._add(OpKind.CONVERT, source=source, width=self._written[source])

    def linear(
        self,
        module: Any,
        target: Buffer,
        *,
        epilogue: Epilogue = Epilogue.STORE,
        cap: float = 0.0,
    ) -> None:
        """target = what was normed or converted last, times the weights of `module`.

        cap: the bound of Epilogue.CAPPED.
        """
        self._linear(OpKind.LINEAR, module, target, epilogue, scale=cap)

    def adapted_linear(
        self, module: Any, target: Buffer, *, epilogue: Epilogue = Epilogue.STORE
    ) -> None:
        """The same of a layer that adapters may change."""
        if not self._max_adapter_rank:
            self.linear(module, target, epilogue=epilogue)
            return
        self._linear(OpKind.LINEAR, module, target, epilogue)
        linear = self.ops[-1]
        adapted = AdaptedLinear(
            module, linear.weights[0].inputs, linear.weights[0].outputs, gated=epilogue.gates
        )
        self.adapted.append(adapted)
        if epilogue.gates:
            self._widen(Buffer.SUMS, adapted.outputs)
        self.adapter_width = max(self.adapter_width, adapted.width(self._max_adapter_rank))
        linear.adapted = len(self.adapted)
        shrink, expand = OpStruct.from_buffer_copy(linear), OpStruct.from_buffer_copy(linear)
        shrink.kind, expand.kind = int(OpKind.SHRINK), int(OpKind.EXPAND)
        self.ops[-1:] = [shrink, linear, expand]

    def rotary_kv(
        self, layer_index: int, rotary: Any = None, *, q_norm: Any = None, k_norm: Any = None
    ) -> None:
        """Norm and rotate the queries and keys in `projected`; store keys and values in the cache.

        rotary: a RotaryEmbedding; None where nothing is rotated.
        """
        fields: dict[str, Any] = {}
        if q_norm is not None:
            fields |= {
                "eps": q_norm.eps,
                "norm_weight": self._floats(q_norm).data_ptr(),
                "key_norm": self._floats(k_norm).data_ptr(),
            }
        if rotary is not None:
            fields["rotary_dim"] = 2 * len(rotary.frequencies)
        self._add(OpKind.ROTARY_KV, layer=layer_index, source=Buffer.PROJECTED, **fields)
        if rotary is not None:
            self._rotated.append((self.ops[-1], rotary))

    def attention(
        self,
        layer_index: int,
        width: int,
        *,
        window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        """attended = attention of the queries in `projected`, [num_tokens, width].

        window: how many tokens a token sees, itself included; softcap: bound of the products.
        """
        self._widen(Buffer.ATTENDED, width)
        self._add(
            OpKind.ATTENTION,
            layer=layer_index,
            source=Buffer.PROJECTED,
            target=Buffer.ATTENDED,
            window=window or 0,
            softcap=softcap or 0.0,
        )

    def mixture_of_experts(self, norm: Any, layer: Any, activation: Epilogue) -> None:
        """residual += what a few experts make of RMSNorm(residual), each by its share.

        layer: `router`, a linear layer; `experts.gate_up` and `experts.down`, matrices of each of
        `experts.count` experts; `per_token` and `normalize`, as ExpertsConfig's.
        """
        shape = ExpertsShape(layer.experts.count, layer.per_token, layer.normalize)
        self.norm(norm)
        self.linear(layer.router, Buffer.ROUTED)
        self._add(OpKind.ROUTE, source=Buffer.ROUTED, experts=shape)
        self._norm(OpKind.SCATTER_NORM, norm, Buffer.RESIDUAL, experts=shape)
        gate_up, down = layer.experts.matrices()
        self._linear(OpKind.EXPERT_LINEAR, gate_up, Buffer.GATED, activation, experts=shape)
        self._add(
            OpKind.CONVERT,
            source=Buffer.GATED,
            width=self._written[Buffer.GATED],
            experts=shape,
        )
        self._linear(OpKind.EXPERT_LINEAR, down, Buffer.MIXED, Epilogue.STORE, experts=shape)
        self._add(OpKind.MIX, source=Buffer.MIXED, width=self._written[Buffer.MIXED], experts=shape)

    def fill_rotary_tables(self) -> None:
        """Compute what the operations that rotate read: before a program runs, not to size one."""
        tables: dict[int, tuple[Tensor, Tensor]] = {}
        for op, rotary in self._rotated:
            if id(rotary) not in tables:
                tables[id(rotary)] = rotary_tables(
                    rotary.frequencies, rotary.amplitude, self._max_positions
                )
            cos, sin = tables[id(rotary)]
            op.cos, op.sin = cos.data_ptr(), sin.data_ptr()
        self._kept += tables.values()

    def select_rows(self) -> None:
        """Keep the rows that logits are wanted of, of `residual` and `attended`."""
        self._add(OpKind.SELECT_ROWS)

    def _norm(self, kind: OpKind, norm: Any, source: Buffer, **fields: Any) -> None:
        weight = self._floats(norm)
        has_bias = getattr(norm, "bias", None) is not None
        self._add(
            kind,
            source=source,
            width=len(weight),
            eps=norm.eps,
            norm_weight=weight.data_ptr(),
            norm_bias=self._floats(norm, "bias").data_ptr() if has_bias else None,
            **fields,
        )

    def _linear(
        self,
        kind: OpKind,
        module: Any,
        target: Buffer,
        epilogue: Epilogue,
        *,
        experts: ExpertsShape | None = None,
        scale: float = 0.0,
    ) -> None:
        packed = self._weights(module, gated=epilogue.gates)
        first = packed[0]
        # The latest norm or conversion writes what this layer reads, in the form that it reads.
        writes_input = next(op for op in reversed(self.ops) if op.kind in _CONVERSIONS)
        writes_input.format = int(first.weight_format is not WeightFormat.BF16)
        assert writes_input.width == first.inputs
        rows = 1 if experts is None else experts.per_token
        self.max_activation_inputs = max(self.max_activation_inputs, first.inputs)
        self.activation_bytes = max(self.activation_bytes, rows * _activation_stride(first.inputs))
        width = first.outputs // 2 if epilogue.gates else first.outputs
        self._widen(target, width, rows)
        self._add(
            kind,
            target=target,
            epilogue=epilogue,
            format=writes_input.format,
            weights=packed,
            scale=scale,
            experts=experts or ExpertsShape(),
        )

    def _weights(self, module: Any, *, gated: bool = False) -> list[PackedLinear]:
        # A tied head is the embedding's own matrix.
        if id(module) not in self._packed:
            packed = self._pack(module, gated)
            self._packed[id(module)] = [packed] if isinstance(packed, PackedLinear) else packed
            self._kept.append(module)
        return self._packed[id(module)]

    def _floats(self, module: Any, kind: str = "weight") -> Tensor:
        values = self._read(module, kind).float().contiguous()
        self._kept.append(values)
        return values

    def _widen(self, buffer: Buffer, width: int, rows: int = 1) -> None:
        self._written[buffer] = width
        self.widths[buffer] = max(self.widths[buffer], rows * width)

    def _add(
        self, kind: OpKind, *, weights: list[PackedLinear] | None = None, **fields: Any
    ) -> None:
        op = OpStruct(kind=int(kind), **{name: _plain(value) for name, value in fields.items()})
        if weights is not None:
            structs = (LinearWeights * len(weights))(*(each.struct for each in weights))
            self._kept.append(structs)
            op.weights = ctypes.cast(structs, ctypes.POINTER(LinearWeights))
        self.ops.append(op)


def _activation_stride(inputs: int) -> int:
    """Bytes of a row of activations, `activation_stride` of src/activations.h."""
    return -(-4 * inputs // 64) * 64


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, IntEnum) else value


class Program:
    """A program ready to run. Raises MemoryError where its buffers do not fit."""

    def __init__(self, builder: ProgramBuilder, team: Team, **shape: Any) -> None:
        """shape: the fields of ProgramSpec that the builder does not know."""
        self._builder = builder  # owns the weights
        self._team = team
        self._keep = shape  # tensors and arrays that the spec points to
        builder.fill_rotary_tables()
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
            activation_bytes=builder.activation_bytes,
            adapter_width=builder.adapter_width,
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
