"""Attention of few queries in CUDA C++ gives what the reference gives."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from services.engine.core.kernels import cuda
from services.engine.core.kernels.attention import AttentionMetadata, DeviceLengths, paged_attention
from services.engine.core.kernels.cuda import attention
from services.engine.core.kernels.cuda.attention import Card, divide, paged_attention_cuda, serves
from services.engine.core.kernels.kv_layer import KVLayer, quantize_heads
from tests.fakes.cuda.emulator import Emulator, guarded
from tests.fakes.sparse_memory import sparse

H100 = Card(132, 227 * 1024)
# Divides even short sequences: among several parts, of one warp or two.
SMALL_CARD = Card(64, 50 * 1024)


@dataclass
class Step:
    """Sequences as (query length, context length), and the model's shapes."""

    sequences: Sequence[tuple[int, int]]
    group: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype = torch.bfloat16
    scale: float = 0.125
    window: int | None = None
    softcap: float | None = None


def make(step: Step) -> tuple[Tensor, KVLayer, AttentionMetadata]:
    """Queries, a cache whose other tokens are NaN where the format has one, and the metadata."""
    needed = [-(-context // step.block_size) for _, context in step.sequences]
    num_blocks = sum(needed) + 3
    order = torch.randperm(num_blocks, dtype=torch.int32)
    tables = torch.full((len(needed), max(needed)), num_blocks + 1000, dtype=torch.int32)
    shape = (num_blocks, step.block_size, step.kv_heads, step.head_dim)
    used = torch.zeros(shape[:2], dtype=torch.bool)
    taken = 0
    for row, (blocks, (_, context)) in enumerate(zip(needed, step.sequences, strict=True)):
        tables[row, :blocks] = order[taken : taken + blocks]
        taken += blocks
        for token in range(context):
            used[int(tables[row, token // step.block_size]), token % step.block_size] = True
    layer: list[Tensor | None] = []
    all_scales: list[Tensor | None] = []
    for _ in range(2):
        elements, scales = quantize_heads(torch.randn(shape).to(step.dtype), step.cache_dtype)
        unused = 127 if elements.dtype == torch.int8 else float("nan")
        elements = torch.where(used[..., None, None], elements.float(), unused)
        layer.append(guarded(elements.to(step.cache_dtype)))
        all_scales.append(None if scales is None else guarded(scales))
    metadata = AttentionMetadata(
        tuple(queries for queries, _ in step.sequences),
        tuple(context for _, context in step.sequences),
        guarded(tables),
        step.block_size,
    )
    num_tokens = sum(queries for queries, _ in step.sequences)
    queries = torch.randn(num_tokens, step.group * step.kv_heads, step.head_dim).to(step.dtype)
    return guarded(queries), KVLayer(*layer, *all_scales), metadata  # type: ignore[arg-type]


def reference(step: Step, queries: Tensor, cache: KVLayer, metadata: AttentionMetadata) -> Tensor:
    """The op's own answer, computed in float32."""
    wide = [each.float().nan_to_num(0.0) for each in (cache.keys, cache.values)]
    for index, scales in enumerate((cache.key_scales, cache.value_scales)):
        if scales is not None:
            wide[index] = wide[index] * scales.unsqueeze(-1)
    tables = metadata.block_tables.clamp(max=cache.keys.shape[0] - 1)
    exact = AttentionMetadata(
        metadata.query_lengths, metadata.context_lengths, tables, metadata.block_size
    )
    return paged_attention.reference(
        queries.float(), KVLayer(*wide), exact, step.scale, step.window, step.softcap
    )


def check(step: Step) -> None:
    queries, cache, metadata = make(step)
    assert serves(queries, cache, metadata)
    found = paged_attention_cuda(
        queries, cache, metadata, step.scale, step.window, step.softcap
    ).float()
    expected = reference(step, queries, cache, metadata)
    bound = 1.6e-2 if step.dtype == torch.bfloat16 else 4e-3
    torch.testing.assert_close(found, expected, atol=bound, rtol=bound)


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Card, "of", lambda device: SMALL_CARD)


FORMATS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.float16, torch.int8),
    (torch.bfloat16, torch.int8),
]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("dtype", "cache_dtype"), FORMATS)
def test_one_query_sees_all_of_its_sequence(
    emulated: Emulator, dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int
) -> None:
    sequences = [(1, 1), (1, 70), (1, 300)]
    conflicts = emulated.bank_conflicts
    check(Step(sequences, head_dim=head_dim, dtype=dtype, cache_dtype=cache_dtype))
    assert emulated.bank_conflicts == conflicts


@pytest.mark.parametrize(("dtype", "cache_dtype"), FORMATS)
def test_parts_of_a_sequence_are_added_up(
    emulated: Emulator, divided: None, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    step = Step([(1, 900), (1, 200), (2, 2)], dtype=dtype, cache_dtype=cache_dtype)
    for seed in range(3):
        with emulated.schedule(seed):
            check(step)
    assert not attention._arrived[torch.device("cpu"), 0][-1].any()


def test_what_graphs_count_in_is_kept_when_more_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_arrived", {})
    first = weakref.ref(attention._counters(torch.empty(1), 10))
    assert attention._counters(torch.empty(1), 8192) is first()
    assert len(attention._counters(torch.empty(1), 8193)) == 8193
    assert first() is not None


@given(
    sequences=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 150)), min_size=1, max_size=4),
    group=st.sampled_from([1, 2, 4, 5, 8]),
    block_size=st.sampled_from([1, 8, 16, 32]),
    window=st.sampled_from([None, 1, 17, 64]),
    softcap=st.sampled_from([None, 30.0]),
    cache_dtype=st.sampled_from([torch.bfloat16, torch.float8_e4m3fn, torch.int8]),
    seed=st.integers(0, 3),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_ragged_steps_windows_and_soft_caps(
    emulated: Emulator,
    divided: None,
    sequences: list[tuple[int, int]],
    group: int,
    block_size: int,
    window: int | None,
    softcap: float | None,
    cache_dtype: torch.dtype,
    seed: int,
) -> None:
    queries = [(query, query + before) for query, before in sequences]
    with emulated.schedule(seed):
        check(
            Step(
                queries,
                group=group,
                block_size=block_size,
                window=window,
                softcap=softcap,
                cache_dtype=cache_dtype,
                scale=0.5 if softcap else 0.125,
            )
        )


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("block_size", [1, 16])
def test_blocks_that_a_window_hides_are_not_looked_at(
    emulated: Emulator, divided: None, block_size: int, cache_dtype: torch.dtype
) -> None:
    sequences = [(1, context) for context in range(80, 130, 7)]
    step = Step(sequences, block_size=block_size, window=17, cache_dtype=cache_dtype)
    queries, cache, metadata = make(step)
    expected = reference(step, queries, cache, metadata)
    # Blocks that belong to nobody hold no numbers.
    nobody = set(range(len(cache.keys))) - set(metadata.block_tables.flatten().tolist())
    for row, (_, context) in enumerate(sequences):
        metadata.block_tables[row, : (context - 17) // block_size] = min(nobody)
    for scales in (cache.key_scales, cache.value_scales):
        if scales is not None:
            scales[min(nobody)] = float("nan")
    found = paged_attention_cuda(queries, cache, metadata, step.scale, step.window)
    torch.testing.assert_close(found.float(), expected, atol=1.6e-2, rtol=1.6e-2)


def test_a_cache_is_read_wherever_it_lies(emulated: Emulator) -> None:
    """Beyond what 32 bits count, if it is blocks that lie far apart; nothing else is served."""
    step = Step([(1, 70)], dtype=torch.float16, cache_dtype=torch.float16)
    queries, cache, metadata = make(step)
    for stride, is_served in (
        ((1 << 29, 128, 64, 1), True),
        ((1024, 1 << 30, 64, 1), False),
        ((1024, 64, 1 << 30, 1), False),
    ):
        keys, values = (sparse(tuple(cache.keys.shape), stride, torch.float16) for _ in range(2))
        keys.copy_(cache.keys.nan_to_num(0))
        values.copy_(cache.values.nan_to_num(0))
        far = KVLayer(keys, values)
        assert serves(queries, far, metadata) == is_served
        if is_served:
            found = paged_attention_cuda(queries, far, metadata, step.scale)
            assert torch.equal(found, paged_attention_cuda(queries, cache, metadata, step.scale))


def test_captured_steps_read_their_lengths_on_the_device(emulated: Emulator, divided: None) -> None:
    step = Step([(1, 65), (1, 33), (1, 1)])
    queries, cache, metadata = make(step)
    exact = metadata.device_lengths
    # The host knows bounds alone: the table is wider than any sequence needs.
    wide = torch.full((3, 64), 9999, dtype=torch.int32)
    wide[:, : metadata.block_tables.shape[1]] = metadata.block_tables
    lengths = DeviceLengths(exact.query_starts.clone(), exact.contexts.clone())
    bounds = AttentionMetadata((1, 1, 1), (1024,) * 3, wide, 16, lengths, are_bounds=True)
    found = paged_attention_cuda(queries, cache, bounds, step.scale)
    expected = reference(step, queries, cache, metadata)
    torch.testing.assert_close(found.float(), expected, atol=1.6e-2, rtol=1.6e-2)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("sequence", [(1, 1), (1, 17), (1, 48), (3, 50), (1, 300)])
def test_only_what_earlier_steps_wrote_is_read_before_the_kernel_before_has_ended(
    emulated: Emulator, divided: None, sequence: tuple[int, int], cache_dtype: torch.dtype
) -> None:
    step = Step([sequence], kv_heads=1, cache_dtype=cache_dtype)
    queries, cache, metadata = make(step)
    settled = dataclasses.replace(metadata, is_settled=True)
    expected = paged_attention_cuda(queries, cache, metadata, step.scale)
    own, context = sequence
    parts = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    for seed in range(3):
        writes = [(queries, queries.clone())]
        for token in range(context - own, context):
            block = int(metadata.block_tables[0, token // step.block_size])
            for part in parts:
                if part is not None:
                    there = part[block, token % step.block_size]
                    writes.append((there, there.clone()))
        for there, values in writes:
            there.fill_(99)
            emulated.written_before(there, values)
        with emulated.schedule(seed):
            found = paged_attention_cuda(queries, cache, settled, step.scale)
        assert torch.equal(found, expected)


def test_what_earlier_steps_wrote_is_read_at_once(emulated: Emulator) -> None:
    step = Step([(1, 40)], kv_heads=1)
    queries, cache, metadata = make(step)
    settled = dataclasses.replace(metadata, is_settled=True)
    expected = paged_attention_cuda(queries, cache, metadata, step.scale)
    # What comes later, and never does in an engine, is not seen.
    first = cache.keys[int(metadata.block_tables[0, 0])]
    later = torch.full_like(first, 99)
    emulated.written_before(first, later)
    assert torch.equal(paged_attention_cuda(queries, cache, settled, step.scale), expected)
    assert torch.equal(first, later)
    assert not torch.equal(paged_attention_cuda(queries, cache, settled, step.scale), expected)


def test_layers_that_lie_between_others_are_read_where_they_are(emulated: Emulator) -> None:
    step = Step([(1, 40)], dtype=torch.float16, cache_dtype=torch.float16)
    queries, cache, metadata = make(step)
    stacked = torch.stack([cache.keys, torch.full_like(cache.keys, torch.nan), cache.values], 1)
    packed = torch.cat([torch.full_like(queries, torch.nan), queries], 1)
    layer = KVLayer(stacked[:, 0], stacked[:, 2])
    found = paged_attention_cuda(packed[:, 8:], layer, metadata, step.scale)
    expected = reference(step, queries, cache, metadata)
    torch.testing.assert_close(found.float(), expected, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("what", ["many queries", "head_dim", "global tokens", "block size"])
def test_what_the_kernel_does_not_serve_is_computed_all_the_same(
    emulated: Emulator, what: str
) -> None:
    step = Step([(1, 20)], dtype=torch.float16, cache_dtype=torch.float16, window=8)
    if what == "many queries":
        step.sequences = [(17, 20)]
    elif what == "head_dim":
        step.head_dim = 80
    elif what == "block size":
        step.block_size = 12
    global_tokens = 2 if what == "global tokens" else 0
    queries, cache, metadata = make(step)
    layer = KVLayer(cache.keys.nan_to_num(0), cache.values.nan_to_num(0))
    assert serves(queries, layer, metadata) == (what == "global tokens")
    arguments = (queries, layer, metadata, step.scale, step.window, None, global_tokens)
    assert torch.equal(
        paged_attention_cuda(*arguments), attention.beneath(paged_attention)(*arguments)
    )


def test_a_card_is_filled_with_one_wave_where_one_sequence_cannot() -> None:
    stage = 3 * 2 * 16 * 256
    # Llama 3.1 8B, one sequence of 8,192 tokens: 16 parts of each of 8 heads, 128 blocks.
    assert divide(8, 512, stage, H100) == attention.Division(8, 16, 16)
    # Nor is it otherwise where the host knows no more than what the model can take.
    assert divide(8, 8192, stage, H100) == attention.Division(8, 16, 16)
    # 64 of them fill it twice over, two blocks at a time, and are divided to be even.
    many = divide(64 * 8, 512, stage, H100)
    assert many == attention.Division(4, 3, 171)
    assert divide(64 * 8, 64, stage, H100).splits == 1
    # However long they could be, few blocks are started that may have nothing to do.
    assert divide(64 * 8, 8192, stage, H100).splits * 64 * 8 <= 6 * 2 * 132
    # One token is never divided.
    assert divide(8, 1, stage, H100).splits == 1


@pytest.fixture(scope="module")
def on_gpu() -> torch.device:
    device = torch.device("cuda")
    cuda.activate(device)
    assert cuda.why_not() is None, cuda.why_not()
    return device


def on_device(
    contexts: Sequence[int], queries: int, cache_dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, KVLayer, AttentionMetadata]:
    """A step of Llama 3.1 8B's shapes, as many queries of each sequence."""
    most = -(-max(contexts) // 16)
    tables = torch.randperm(len(contexts) * most, device=device, dtype=torch.int32)
    shape = (len(contexts) * most, 16, 8, 128)
    halves = []
    for _ in range(2):
        drawn = torch.randn(shape, device=device, dtype=torch.bfloat16)
        halves.append(quantize_heads(drawn, cache_dtype))
    (keys, key_scales), (values, value_scales) = halves
    metadata = AttentionMetadata(
        (queries,) * len(contexts), tuple(contexts), tables.view(len(contexts), most), 16
    )
    rows = torch.randn(len(contexts) * queries, 32, 128, device=device, dtype=torch.bfloat16)
    return rows, KVLayer(keys, values, key_scales, value_scales), metadata


def attended(queries: Tensor, cache: KVLayer, metadata: AttentionMetadata, index: int) -> Tensor:
    """What torch computes, in float32, of one sequence: [queries, heads, head_dim]."""
    count, context = metadata.query_lengths[index], metadata.context_lengths[index]
    blocks = metadata.block_tables[index, : -(-context // 16)].long()
    keys, values = (
        (stored[blocks].float() * (1.0 if scales is None else scales[blocks].unsqueeze(-1)))
        .flatten(0, 1)[:context]
        .transpose(0, 1)
        for stored, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales))
    )
    first = sum(metadata.query_lengths[:index])
    rows = queries[first : first + count].float().transpose(0, 1)
    positions = torch.arange(context, device=queries.device)
    seen = positions <= context - count + torch.arange(count, device=queries.device).view(-1, 1)
    exact = functional.scaled_dot_product_attention(
        rows, keys, values, attn_mask=seen, scale=0.088, enable_gqa=True
    )
    return exact.transpose(0, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("queries", [1, 4, 8])
@pytest.mark.parametrize(
    ("batch", "context"), [(1, 1), (1, 8192), (1, 100_000), (16, 8192), (64, 8192), (256, 700)]
)
def test_a_card_computes_what_torch_does(
    on_gpu: torch.device, batch: int, context: int, queries: int, cache_dtype: torch.dtype
) -> None:
    lengths = torch.randint(-(-context // 2), context + 1, (batch,)).clamp(min=queries).tolist()
    rows, cache, metadata = on_device(lengths, queries, cache_dtype, on_gpu)
    found = paged_attention_cuda(rows, cache, metadata, 0.088)
    for index in range(batch):
        exact = attended(rows, cache, metadata, index)
        own = found[index * queries : (index + 1) * queries].float()
        torch.testing.assert_close(own, exact, atol=4e-3, rtol=1.6e-2)
    # A race would show: parts are added up in their own order, whichever block is the last.
    for _ in range(20):
        assert torch.equal(paged_attention_cuda(rows, cache, metadata, 0.088), found)


@pytest.mark.gpu
def test_a_captured_step_runs_again_with_other_lengths(on_gpu: torch.device) -> None:
    rows, cache, metadata = on_device([3001] * 8, 1, torch.bfloat16, on_gpu)
    lengths = metadata.device_lengths
    bounds = AttentionMetadata(
        (1,) * 8, (4096,) * 8, metadata.block_tables, 16, lengths, are_bounds=True
    )
    paged_attention_cuda(rows, cache, bounds, 0.088)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = paged_attention_cuda(rows, cache, bounds, 0.088)
    for contexts in ([1, 5, 3001, 64, 65, 2000, 16, 17], [7] * 8):
        lengths.contexts.copy_(torch.tensor(contexts))
        graph.replay()
        exact = AttentionMetadata((1,) * 8, tuple(contexts), metadata.block_tables, 16)
        for index in range(8):
            expected = attended(rows, cache, exact, index)
            torch.testing.assert_close(
                found[index : index + 1].float(), expected, atol=4e-3, rtol=1.6e-2
            )
