"""The native attention against the plain-torch reference, and against itself bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.engine.core.kernels.cpu.kv_cache import KvFormat
from services.engine.core.kernels.cpu.library import Library
from tests.fakes.paged_step import Pool, Shape, Text, libraries, reference

KERNELS = libraries()
pytestmark = pytest.mark.skipif(not KERNELS, reason="no native kernels on this machine")

each_isa = pytest.mark.parametrize("kernels", KERNELS, ids=lambda each: each.isa)
each_format = pytest.mark.parametrize("kv_format", list(KvFormat), ids=lambda each: each.name)

# A weight, or its product with the scale of an int8 value, is rounded to bf16: by at most 2**-8 of
# itself. An average of values of size v is off by no more than v / 256, and the sums that make it
# up by much less. Values here are below 5.
WORST = 5 / 256
LONG = 1_000  # tokens; 8 chunks of keys, of which the last is not full


@st.composite
def shapes(draw: Callable[..., int]) -> Shape:
    kv_heads = draw(st.integers(1, 4))
    return Shape(
        heads=kv_heads * draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16])),
        kv_heads=kv_heads,
        head_dim=16 * draw(st.integers(1, 16)),
        block_size=draw(st.sampled_from([16, 32, 64])),
        window=draw(st.one_of(st.none(), st.sampled_from([1, 2, 15, 16, 17, 127, 128, 129, 400]))),
        softcap=draw(st.sampled_from([None, 0.5, 30.0])),
    )


@st.composite
def sequences(draw: Callable[..., int]) -> tuple[int, int]:
    """(queries, context): decode, verification of a draft, a chunk, or a whole prompt."""
    context = draw(st.one_of(st.integers(1, 40), st.integers(100, 300), st.integers(1, 2_000)))
    queries = draw(st.one_of(st.just(1), st.integers(1, 9), st.integers(1, 150)))
    return min(queries, context), context


@given(
    kernels=st.sampled_from(KERNELS or [None]),
    kv_format=st.sampled_from(KvFormat),
    shape=shapes(),
    lengths=st.lists(sequences(), min_size=1, max_size=4),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1_000),
)
@settings(max_examples=25, deadline=None)
def test_it_agrees_with_the_reference_whatever_the_shape(
    kernels: Library,
    kv_format: KvFormat,
    shape: Shape,
    lengths: list[tuple[int, int]],
    threads: int,
    seed: int,
) -> None:
    queries, contexts = zip(*lengths, strict=True)
    pool = Pool(kernels, shape, sum(contexts) // 16 + 5, kv_format, threads, seed)
    texts = [Text.random(shape, context, seed + i) for i, context in enumerate(contexts)]
    blocks = [pool.take(context) for context in contexts]
    pool.write(pool.step(blocks, contexts, contexts), texts)

    step = pool.step(blocks, queries, contexts)
    attended = pool.attend(step, texts)

    expected = reference(pool, step, texts)
    torch.testing.assert_close(attended.double(), expected, rtol=0, atol=WORST)
    typical = (attended - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert typical < 2**-8


def whole(kernels: Library, shape: Shape, kv_format: KvFormat, text: Text, length: int) -> Tensor:
    """The attention of all queries of a sequence that is computed alone, at once, on one thread."""
    pool = Pool(kernels, shape, 100, kv_format, threads=1)
    return pool.run([pool.take(length)], [length], [length], [text])


@each_format
@each_isa
def test_decoding_token_by_token_gives_the_bits_of_one_prefill(
    kernels: Library, kv_format: KvFormat
) -> None:
    shape = Shape()
    text = Text.random(shape, 280, seed=1)
    expected = whole(kernels, shape, kv_format, text, 280)
    pool = Pool(kernels, shape, 20, kv_format, threads=3, seed=5)
    blocks = [pool.take(280)]
    pool.run(blocks, [245], [245], [text])
    for context in range(246, 281):
        assert torch.equal(pool.run(blocks, [1], [context], [text])[0], expected[context - 1])


@each_format
@each_isa
@pytest.mark.parametrize("chunk", [33, 64, 127, 300])
def test_chunks_of_any_size_give_the_bits_of_one_prefill(
    kernels: Library, kv_format: KvFormat, chunk: int
) -> None:
    shape = Shape(heads=9, kv_heads=3, head_dim=64)
    text = Text.random(shape, LONG, seed=2)
    expected = whole(kernels, shape, kv_format, text, LONG)
    pool = Pool(kernels, shape, 80, kv_format, threads=2, seed=6)
    blocks = [pool.take(LONG)]
    for begin in range(0, LONG, chunk):
        end = min(begin + chunk, LONG)
        attended = pool.run(blocks, [end - begin], [end], [text])
        assert torch.equal(attended, expected[begin:end])


@each_format
@each_isa
@pytest.mark.parametrize("heads_per_kv", [1, 2, 5])
@pytest.mark.parametrize("chunks", [1, 3])
def test_queries_that_see_nothing_of_the_last_chunk_are_none_the_worse(
    kernels: Library, kv_format: KvFormat, heads_per_kv: int, chunks: int
) -> None:
    """A few queries on both sides of a chunk's end, whose context is split over threads."""
    shape = Shape(heads=heads_per_kv, kv_heads=1, head_dim=64)
    edge = chunks * 128
    text = Text.random(shape, edge + 12, seed=11)
    expected = whole(kernels, shape, kv_format, text, edge + 12)
    pool = Pool(kernels, shape, 40, kv_format, threads=3, seed=7)
    blocks = [pool.take(edge + 12)]
    pool.run(blocks, [edge + 12], [edge + 12], [text])
    for context in range(edge + 1, edge + 13):
        for queries in (2, 3, 5, 7, 8, 11, 13, 16):
            attended = pool.attend(pool.step(blocks, [queries], [context]), [text])
            assert torch.equal(attended, expected[context - queries : context])


@each_isa
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_neither_company_nor_threads_change_a_bit(kernels: Library, threads: int) -> None:
    shape = Shape(heads=4, kv_heads=1, head_dim=48)
    lengths = [(1, LONG), (7, 300), (150, 150), (1, 17), (40, 600)]
    texts = [Text.random(shape, context, seed) for seed, (_, context) in enumerate(lengths)]
    pool = Pool(kernels, shape, 200, threads=threads)
    blocks = [pool.take(context) for _, context in lengths]
    contexts = [context for _, context in lengths]
    pool.write(pool.step(blocks, contexts, contexts), texts)

    together = pool.attend(pool.step(blocks, [queries for queries, _ in lengths], contexts), texts)

    begin = 0
    for text, (queries, context) in zip(texts, lengths, strict=True):
        alone = whole(kernels, shape, KvFormat.BF16, text, context)[context - queries :]
        assert torch.equal(together[begin : begin + queries], alone)
        begin += queries


@each_format
@each_isa
def test_sequences_that_share_a_prefix_get_the_bits_of_their_own_copy(
    kernels: Library, kv_format: KvFormat
) -> None:
    shape = Shape()
    common = Text.random(shape, 320, seed=3)
    tails = [Text.random(shape, 30, seed) for seed in (4, 5)]
    texts = [
        Text(
            torch.cat((common.queries, tail.queries)),
            torch.cat((common.keys, tail.keys)),
            torch.cat((common.values, tail.values)),
        )
        for tail in tails
    ]
    pool = Pool(kernels, shape, 60, kv_format)
    prefix = pool.take(320)
    pool.run([prefix], [320], [320], [common])
    blocks = [prefix + pool.take(30) for _ in tails]

    attended = pool.run(blocks, [30, 30], [350, 350], texts)

    for index, text in enumerate(texts):
        own = whole(kernels, shape, kv_format, text, 350)[320:]
        assert torch.equal(attended[30 * index : 30 * (index + 1)], own)


@each_format
@each_isa
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_with_its_sequence(
    kernels: Library, kv_format: KvFormat, poison: float
) -> None:
    shape = Shape()
    texts = [Text.random(shape, 200, seed) for seed in range(3)]
    texts[1].keys[150, 0] = poison
    texts[1].values[151, 3] = poison
    pool = Pool(kernels, shape, 60, kv_format)
    blocks = [pool.take(200) for _ in texts]

    attended = pool.run(blocks, [200] * 3, [200] * 3, texts).view(3, 200, -1)

    assert attended[0].isfinite().all()
    assert attended[2].isfinite().all()
    assert not attended[1, 151:].isfinite().all()


@each_format
@each_isa
def test_what_a_block_held_before_reaches_no_result(kernels: Library, kv_format: KvFormat) -> None:
    shape = Shape()
    text = Text.random(shape, 141, seed=7)
    results = []
    for stale in (0x00, 0xFF, 0x7F, 0x3C):
        pool = Pool(kernels, shape, 12, kv_format)
        pool.cache.fill(stale)
        blocks = [pool.take(141)]
        results.append(pool.run(blocks, [140], [140], [text]))
        results.append(pool.run(blocks, [1], [141], [text]))
    for index, result in enumerate(results):
        assert torch.equal(result, results[index % 2])


@each_isa
def test_int8_costs_little_accuracy(kernels: Library) -> None:
    shape = Shape(heads=9, kv_heads=3, head_dim=64)
    text = Text.random(shape, LONG, seed=8)
    exact = whole(kernels, shape, KvFormat.BF16, text, LONG)
    stored = whole(kernels, shape, KvFormat.INT8, text, LONG)
    loss = (stored - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert loss < 0.012  # of the result's size, for normally distributed keys and values


@each_isa
def test_scores_far_apart_do_not_overflow(kernels: Library) -> None:
    shape = Shape()
    text = Text.random(shape, 300, seed=9)
    text = Text(text.queries * 100, text.keys * 100, text.values)
    pool = Pool(kernels, shape, 30)
    blocks = [pool.take(300)]
    attended = pool.run(blocks, [300], [300], [text])
    expected = reference(pool, pool.step(blocks, [300], [300]), [text])
    torch.testing.assert_close(attended.double(), expected, rtol=0, atol=0.02)


WINDOWS = [1, 16, 100, 129, 300]


@each_format
@each_isa
@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_gives_the_same_bits_however_its_queries_are_spread(
    kernels: Library, kv_format: KvFormat, window: int
) -> None:
    shape = Shape(heads=6, kv_heads=2, head_dim=32, window=window, softcap=4.0)
    text = Text.random(shape, 700, seed=12)
    expected = whole(kernels, shape, kv_format, text, 700)
    pool = Pool(kernels, shape, 60, kv_format, threads=3, seed=5)
    blocks = [pool.take(700)]
    begin = 0
    # Chunks, a draft's verification, and decode, in windows that begin and end within a chunk.
    for queries in (1, 130, 37, 1, 5, 260, 2, 1, 1, 16, 1, 1, 200, 4, 40):
        end = min(begin + queries, 700)
        attended = pool.run(blocks, [end - begin], [end], [text])
        assert torch.equal(attended, expected[begin:end])
        begin = end
    assert begin == 700


@each_format
@each_isa
@pytest.mark.parametrize("queries", [1, 6, 90])
def test_what_lies_before_a_window_is_not_read(
    kernels: Library, kv_format: KvFormat, queries: int
) -> None:
    """Its blocks may be somebody else's, or name no memory at all."""
    shape = Shape(heads=4, kv_heads=2, head_dim=32, window=200)
    text = Text.random(shape, 900, seed=13)
    expected = whole(kernels, shape, kv_format, text, 900)[900 - queries :]
    pool = Pool(kernels, shape, 80, kv_format, threads=3, seed=6)
    blocks = [pool.take(900)]
    pool.run(blocks, [900 - queries], [900 - queries], [text])
    step = pool.step(blocks, [queries], [900])
    pool.write(step, [text])
    unseen = (900 - queries + 1 - 200) // 16
    step.block_tables[0, :unseen] = 2**31 - 1
    assert torch.equal(pool.attend(step, [text]), expected)
