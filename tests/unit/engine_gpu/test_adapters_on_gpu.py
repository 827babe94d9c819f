"""On a GPU, adapters do what the references say, whenever they come, and nothing waits for them.

What can be seen without one is in test_low_rank and, of graphs, in test_adapted_graphs.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from services.engine.core.kernels import (
    AdapterTable,
    LowRankPart,
    add_low_ranks,
    group_by_adapter,
    registry,
)
from services.engine.core.layers.adapters import PlacedAdapter

SLOTS, MAX_RANK = 8, 64
# Of an 8B model: q, k and v; the way out; gate and up; the way back.
PROJECTIONS = {
    "qkv": (4096, (4096, 1024, 1024)),
    "output": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    registry.select("cuda")
    return torch.device("cuda")


@pytest.fixture
def nothing_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def parts_of(name: str, rank: int, seed: int) -> tuple[LowRankPart, ...]:
    """What an adapter does at a projection, on the host."""
    generator = torch.Generator().manual_seed(seed)
    inputs, sizes = PROJECTIONS[name]
    found, first = [], 0
    for size in sizes:
        down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        found.append(LowRankPart(down, torch.randn(size, rank, generator=generator), first))
        first += size
    return tuple(found)


def placed(parts: dict[str, tuple[LowRankPart, ...]], weight: Tensor) -> PlacedAdapter:
    with torch.inference_mode():
        return PlacedAdapter(parts, weight)


def test_an_adapter_lies_in_one_piece_as_kernels_read_it() -> None:
    parts = {"qkv": parts_of("qkv", 5, 1), "down": parts_of("down", 32, 2)}
    found = placed(parts, torch.empty(0, dtype=torch.bfloat16))
    every = [part for own in found.parts.values() for part in own]
    assert found.num_bytes == sum(part.down.nbytes + part.up.nbytes for part in every)
    assert {part.down.untyped_storage().data_ptr() for part in every} == {
        part.up.untyped_storage().data_ptr() for part in every
    }
    for path, own in parts.items():
        for given, part in zip(own, found.parts[path], strict=True):
            rank = len(given.down)
            assert len(part.down) == part.up.shape[1] == -(-rank // 16) * 16
            assert torch.equal(part.down[:rank], given.down.bfloat16())
            assert torch.equal(part.up[:, :rank], given.up.bfloat16())
            assert not part.down[rank:].any()
            assert not part.up[:, rank:].any()
            assert part.down.data_ptr() % 16 == part.up.data_ptr() % 16 == 0
            assert part.first == given.first


@pytest.mark.gpu
def test_an_adapter_comes_to_a_gpu_as_it_is_on_the_host(gpu: torch.device) -> None:
    parts = {name: parts_of(name, 20, seed) for seed, name in enumerate(PROJECTIONS)}
    here = placed(parts, torch.empty(0, dtype=torch.bfloat16))
    there = placed(parts, torch.empty(0, dtype=torch.bfloat16, device=gpu))
    assert there.num_bytes == here.num_bytes
    for path, own in here.parts.items():
        for mine, other in zip(own, there.parts[path], strict=True):
            assert torch.equal(mine.down, other.down.cpu())
            assert torch.equal(mine.up, other.up.cpu())


def slots_of(tokens: int, count: int, gpu: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(-1, count, (tokens,), generator=generator, dtype=torch.int32).to(gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 33, 64, 200, 1024, 5000])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_tokens_go_through_their_own_adapters(
    name: str, tokens: int, gpu: torch.device, request: pytest.FixtureRequest
) -> None:
    inputs, sizes = PROJECTIONS[name]
    table = AdapterTable(SLOTS, MAX_RANK, [len(sizes)], gpu)
    weight = torch.empty(0, dtype=torch.bfloat16, device=gpu)
    for slot, rank in enumerate((16, 8, 64)):
        table.set(slot, [placed({name: parts_of(name, rank, slot)}, weight).parts[name]])
    hidden = torch.randn(tokens, inputs, device=gpu).bfloat16()
    before = torch.randn(tokens, sum(sizes), device=gpu).bfloat16()
    slots = slots_of(tokens, 3, gpu)
    add_low_ranks(before.clone(), hidden, group_by_adapter(slots), table.at[0])  # compiles
    request.getfixturevalue("nothing_waits")
    grouped = group_by_adapter(slots)
    found = add_low_ranks(before.clone(), hidden, grouped, table.at[0])
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(grouped, group_by_adapter.reference(slots))
    expected = add_low_ranks.reference(before.clone(), hidden, grouped, table.at[0])
    torch.testing.assert_close(found, expected, atol=6e-2, rtol=6e-2)
    without = slots < 0
    assert torch.equal(found[without], before[without])


@pytest.mark.gpu
def test_a_graph_serves_adapters_that_come_after_it(gpu: torch.device) -> None:
    name, tokens = "qkv", 12
    inputs, sizes = PROJECTIONS[name]
    table = AdapterTable(SLOTS, MAX_RANK, [len(sizes)], gpu)
    weight = torch.empty(0, dtype=torch.bfloat16, device=gpu)
    hidden = torch.randn(tokens, inputs, device=gpu).bfloat16()
    before = torch.randn(tokens, sum(sizes), device=gpu).bfloat16()
    projected, slots = before.clone(), torch.full((tokens,), -1, dtype=torch.int32, device=gpu)

    def compute() -> None:
        projected.copy_(before)
        add_low_ranks(projected, hidden, group_by_adapter(slots), table.at[0])

    compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    for round_ in range(4):
        for slot in range(3):
            rank = (16, 8, 64)[(slot + round_) % 3]
            own = placed({name: parts_of(name, rank, 10 * round_ + slot)}, weight)
            table.set(slot, [own.parts[name] if (slot + round_) % 4 else ()])
        slots.copy_(slots_of(tokens, 3, gpu).roll(round_))
        graph.replay()
        grouped = group_by_adapter.reference(slots)
        expected = add_low_ranks.reference(before.clone(), hidden, grouped, table.at[0])
        torch.testing.assert_close(projected, expected, atol=6e-2, rtol=6e-2)
