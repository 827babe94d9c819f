"""Attention over a paged KV cache (Kwon et al., arXiv:2309.06180): writing to it and reading it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from services.engine.core.kernels.kv_layer import KVLayer, quantize_heads
from services.engine.core.kernels.registry import declare

T = TypeVar("T")

# Query heads that share a KV head are folded into the rows of one attention call, which reads the
# keys once; the mask is repeated for each of them, which only pays while chunks are short.
FOLD_MAX_QUERY_LENGTH = 32
# Sequences that see about as much, within a factor of two, are padded to one length and share a
# call; so do all those that see up to this many blocks.
SHORT_CONTEXT_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class DeviceLengths:
    """How long a step's sequences are, on the device.

    Attributes:
        query_starts: [num_sequences + 1] int32, the first row of each sequence, and the end.
        contexts: [num_sequences] int32, tokens in the cache, the step's own included.
    """

    query_starts: Tensor
    contexts: Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Which tokens of a step belong together and where their keys and values are.

    Tokens are flattened over sequences, `query_lengths[i]` consecutive rows for sequence i, whose
    cache holds `context_lengths[i]` tokens, these included. block_tables: [num_sequences,
    max_blocks] int32; blocks before what a window shows are never looked at.

    lengths: the same on the device, where kernels read them. A step that was captured runs with
    other lengths than it was captured with: then `lengths` tell them, and what the host knows are
    bounds, `query_lengths` of each sequence and `context_lengths` of all.

    is_settled: whether all that attention reads but the queries and the step's own keys and values
    was there before any kernel began that lets the next begin early. So a kernel that does may read
    it before it waits for those before it, however many of them still run.
    """

    query_lengths: tuple[int, ...]
    context_lengths: tuple[int, ...]
    block_tables: Tensor
    block_size: int
    lengths: DeviceLengths | None = None
    are_bounds: bool = False
    is_settled: bool = False
    _prepared: dict[str, Any] = field(default_factory=dict)

    @property
    def num_sequences(self) -> int:
        """Sequences of the step, those included that pad it."""
        return len(self.query_lengths)

    @property
    def max_query_length(self) -> int:
        """What no sequence has more tokens than in this step."""
        return self.once("max query length", lambda: max(self.query_lengths))

    @property
    def max_context_length(self) -> int:
        """What no sequence has more tokens than in the cache."""
        return self.once("max context length", lambda: max(self.context_lengths))

    @property
    def device_lengths(self) -> DeviceLengths:
        """The lengths on the device of the block tables."""
        if self.lengths is not None:
            return self.lengths
        return self.once("device lengths", self._to_device)

    def exact(self) -> AttentionMetadata:
        """With what the host knows made exact, which waits for the device."""
        if not self.are_bounds:
            return self
        lengths = self.device_lengths
        starts, contexts = lengths.query_starts.tolist(), lengths.contexts.tolist()
        counts = tuple(end - start for start, end in pairwise(starts))
        return replace(
            self, query_lengths=counts, context_lengths=tuple(contexts), are_bounds=False
        )

    def _to_device(self) -> DeviceLengths:
        device = self.block_tables.device
        starts = (0, *accumulate(self.query_lengths))
        return DeviceLengths(
            torch.tensor(starts, dtype=torch.int32, device=device),
            torch.tensor(self.context_lengths, dtype=torch.int32, device=device),
        )

    def once(self, key: str, prepare: Callable[[], T]) -> T:
        """Return `prepare()`, computed once per step and not once per layer."""
        if key not in self._prepared:
            self._prepared[key] = prepare()
        prepared: T = self._prepared[key]
        return prepared


@declare
def write_kv(keys: Tensor, values: Tensor, cache: KVLayer, slots: Tensor) -> None:
    """Store the keys and values of a step's tokens in their slots of the cache.

    keys, values: [num_tokens, kv_heads, head_dim]; slots: [num_tokens] int64, block * block_size +
    offset. What the cache's format cannot hold is rounded.
    """
    for heads, stored, scales in (
        (keys, cache.keys, cache.key_scales),
        (values, cache.values, cache.value_scales),
    ):
        elements, own_scales = quantize_heads(heads, stored.dtype)
        _rows(stored).index_copy_(0, slots, elements.view(_rows(stored).dtype))
        if scales is not None and own_scales is not None:
            scales.flatten(0, 1).index_copy_(0, slots, own_scales)


def _rows(stored: Tensor) -> Tensor:
    """[slots, kv_heads, head_dim]; eight-bit floats as bytes, which torch can copy by index."""
    rows = stored.flatten(0, 1)
    return rows.view(torch.uint8) if stored.dtype == torch.float8_e4m3fn else rows


@declare
def paged_attention(
    queries: Tensor,
    cache: KVLayer,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    global_tokens: int = 0,
) -> Tensor:
    """Causal attention of each sequence's queries over its cached tokens.

    queries: [num_tokens, heads, head_dim]; the step's own keys and values are in the cache already.
    Decode, chunked prefill and speculative verification differ in query length alone. Returns
    [num_tokens, heads, head_dim].

    window: how many tokens back a query sees, its own included (Beltagy et al., arXiv:2004.05150);
    None: all. global_tokens: so many tokens at a sequence's beginning stay visible beside the
    window (arXiv:2004.05150; as attention sinks: Xiao et al., arXiv:2309.17453). softcap: bends the
    products of queries and keys, scaled, into (-softcap, softcap) (Gemma 2, arXiv:2408.00118).
    """
    metadata = metadata.exact()
    num_heads, kv_heads = queries.shape[1], cache.keys.shape[2]
    seen = _Seen(window, global_tokens)
    groups = metadata.once(
        f"reference groups {queries.dtype} {seen}",
        lambda: _group_sequences(metadata, num_heads // kv_heads, queries.dtype, seen),
    )
    if len(groups) == 1:
        return _attend(queries, cache, groups[0], scale, softcap)
    output = torch.empty_like(queries)
    for group in groups:
        attended = _attend(queries[group.rows], cache, group, scale, softcap)
        output.index_copy_(0, group.rows, attended)
    return output


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a query sees of the tokens up to its own; see `paged_attention`."""

    window: int | None
    global_tokens: int

    def first_block(self, context: int, query_length: int, block_size: int) -> int:
        """The first block that the first of a sequence's queries sees."""
        if self.window is None or self.global_tokens:
            return 0
        return max(0, context - query_length - self.window + 1) // block_size

    def unseen_blocks(self, context: int, query_length: int, block_size: int) -> slice:
        """Those between the global tokens and the window, which may be anybody's by now."""
        if self.window is None or not self.global_tokens:
            return slice(0, 0)
        near = max(0, context - query_length - self.window + 1) // block_size
        return slice(-(-self.global_tokens // block_size), near)


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences of one query length and similar context lengths, attended to in one call."""

    rows: Tensor  # [num_sequences * query_length]: their rows in the flattened step
    blocks: Tensor  # [num_sequences * num_blocks]: their block tables, padded to one length
    num_sequences: int
    query_length: int
    span: int  # tokens from the beginning of the first block that is seen on, the most of them
    mask: Tensor | None  # additive, [num_sequences or 1, 1, rows or 1, span]
    folded: bool


def _group_sequences(
    metadata: AttentionMetadata, queries_per_kv: int, dtype: torch.dtype, seen: _Seen
) -> list[_Group]:
    members: dict[tuple[int, int], list[int]] = {}
    starts, row = [], 0
    for index, query_length in enumerate(metadata.query_lengths):
        starts.append(row)
        row += query_length
        if query_length == 0:
            continue  # it pads the step
        if query_length > FOLD_MAX_QUERY_LENGTH:
            # A long chunk fills the machine by itself; padding it would only waste work.
            bucket = -1 - index
        else:
            context = metadata.context_lengths[index]
            first = seen.first_block(context, query_length, metadata.block_size)
            num_blocks = -(-context // metadata.block_size) - first
            bucket = (max(num_blocks, SHORT_CONTEXT_BLOCKS) - 1).bit_length()
        members.setdefault((query_length, bucket), []).append(index)
    return [
        _make_group(metadata, indices, starts, queries_per_kv, dtype, seen)
        for indices in members.values()
    ]


def _make_group(
    metadata: AttentionMetadata,
    indices: list[int],
    starts: list[int],
    queries_per_kv: int,
    dtype: torch.dtype,
    seen: _Seen,
) -> _Group:
    device = metadata.block_tables.device
    query_length = metadata.query_lengths[indices[0]]
    contexts = [metadata.context_lengths[index] for index in indices]
    block_size = metadata.block_size
    firsts = [seen.first_block(each, query_length, block_size) for each in contexts]
    # All that follows counts from a sequence's first block that is seen.
    spans = [context - block_size * at for context, at in zip(contexts, firsts, strict=True)]
    span = max(spans)
    num_blocks = -(-span // block_size)
    folded = query_length <= FOLD_MAX_QUERY_LENGTH
    mask = None
    reaches_back = seen.window is not None and seen.window < span
    if query_length > 1 or min(spans) < span or reaches_back:
        # A query sees the keys up to its own position; what lies beyond is later or padding.
        first = torch.tensor(spans, device=device).sub_(query_length).view(-1, 1, 1, 1)
        last_seen = first + torch.arange(query_length, device=device).view(-1, 1)
        positions = torch.arange(span, device=device)
        hidden = positions > last_seen
        if seen.window is not None:
            slid_out = positions <= last_seen - seen.window
            # Where some are global, positions count from the sequence's beginning.
            hidden |= slid_out & (positions >= seen.global_tokens)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
        mask.masked_fill_(hidden, float("-inf"))
        if folded and query_length > 1:
            mask = mask.repeat(1, 1, queries_per_kv, 1)
    rows = torch.tensor([starts[index] for index in indices], device=device)
    rows = (rows.view(-1, 1) + torch.arange(query_length, device=device)).flatten()
    members = torch.tensor(indices, device=device)
    unseen = [seen.unseen_blocks(each, query_length, block_size) for each in contexts]
    if any(firsts) or any(each.start < each.stop for each in unseen):
        columns = torch.tensor(firsts, device=device).view(-1, 1)
        columns = columns + torch.arange(num_blocks, device=device)
        for own, slid in zip(columns, unseen, strict=True):
            own[slid] = 0  # what is hidden has to be a number all the same
        # Beyond the longest table there is padding, which any block will do for.
        columns.clamp_(max=metadata.block_tables.shape[1] - 1)
        blocks = metadata.block_tables[members.view(-1, 1), columns].flatten()
    else:
        blocks = metadata.block_tables[:, :num_blocks].index_select(0, members).flatten()
    return _Group(rows, blocks, len(indices), query_length, span, mask, folded)


def _attend(
    queries: Tensor, cache: KVLayer, group: _Group, scale: float, softcap: float | None
) -> Tensor:
    num_sequences, query_length = group.num_sequences, group.query_length
    kv_heads, head_dim = cache.keys.shape[2:]
    keys = _gather(cache.keys, cache.key_scales, group, queries.dtype)
    values = _gather(cache.values, cache.value_scales, group, queries.dtype)
    if not group.folded:
        rows = queries.view(num_sequences, query_length, -1, head_dim).transpose(1, 2)
        attended = _softmax_attention(rows, keys, values, group.mask, scale, softcap)
        return attended.transpose(1, 2).flatten(0, 1)
    # [sequences, query, kv_heads, queries_per_kv, head_dim] with the query moved next to head_dim.
    folded = queries.view(num_sequences, query_length, kv_heads, -1, head_dim).movedim(1, 3)
    rows = folded.flatten(2, 3)
    attended = _softmax_attention(rows, keys, values, group.mask, scale, softcap)
    return attended.view(folded.shape).movedim(3, 1).reshape(-1, queries.shape[1], head_dim)


def _softmax_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """queries: [sequences, heads, rows, head_dim], keys and values: [sequences, kv_heads, span,
    head_dim] -> the shape of queries."""
    if softcap is None:
        return functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
        )
    repeats = queries.shape[1] // keys.shape[1]
    keys, values = (each.repeat_interleave(repeats, 1) for each in (keys, values))
    scores = torch.tanh((queries @ keys.mT) * (scale / softcap)) * softcap
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values


def _gather(stored: Tensor, scales: Tensor | None, group: _Group, dtype: torch.dtype) -> Tensor:
    """Return the cached vectors of a group, [sequences, kv_heads, span, head_dim]."""
    pages = stored.index_select(0, group.blocks)
    if scales is not None:
        pages = (pages * scales.index_select(0, group.blocks).unsqueeze(-1)).to(dtype)
    elif pages.dtype != dtype:
        pages = pages.to(dtype)
    contiguous = pages.view(group.num_sequences, -1, *stored.shape[2:])
    return contiguous[:, : group.span].transpose(1, 2)
