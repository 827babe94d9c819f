"""What one engine step hands to the model: tokens of all sequences, flattened."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from services.engine.core.kernels.attention import DeviceLengths


@dataclass(frozen=True, slots=True)
class CapturedShape:
    """The shape of a step that is computed by captured graphs, whatever it holds of it.

    Attributes:
        num_tokens: and, where all of the step is captured, as many sequences and rows of logits.
        max_query_length: what no sequence has more tokens than. None: any; attention, which depends
            on these lengths, is computed between graphs of what does not.
        has_adapters: whether tokens go through adapters. What is captured without them has none of
            their kernels.
    """

    num_tokens: int
    max_query_length: int | None
    has_adapters: bool = False


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's tokens, flattened over sequences; tensors live on the model's device.

    The tokens of one sequence are contiguous and in order, so a sequence's queries are the
    ``query_lengths[i]`` rows that follow those of sequence ``i - 1``. ``num_sequences`` is
    ``len(query_lengths)``; each context length is at least the query length.

    Where the KV cache has several groups of layers, ``slots`` and ``block_tables`` have a first
    dimension more, the group. What a layer's window hides of a sequence need not be in its table.
    """

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    slots: Tensor  # [num_tokens] int64: block * block_size + offset, where K and V of each token go
    block_tables: Tensor  # [num_sequences, max_blocks] int32, padded with 0
    query_lengths: tuple[int, ...]  # tokens computed per sequence in this step
    context_lengths: tuple[int, ...]  # tokens in the KV cache per sequence after this step
    logits_rows: Tensor  # [num_rows] int64: rows of the flattened batch whose logits are wanted
    # The same lengths where kernels read them; None: whoever needs them brings them there.
    lengths: DeviceLengths | None = None
    are_bounds: bool = False  # what AttentionMetadata says of it
    # Of block_tables, the columns that are in use, where they are wider; None: all.
    num_table_columns: int | None = None
    captured: CapturedShape | None = None  # what it is padded to; None: to nothing
    adapters: tuple[int, ...] | None = None  # per sequence, -1 for none; None: nobody has one
    # The same per token where kernels read it, [num_tokens] int32; None: whoever needs it brings it
    # there. With it, nothing looks at `adapters`.
    token_adapters: Tensor | None = None
