"""What a step takes on a card in which sequences go through adapters, beside one without."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from benchmarks.gpu_bench import Bench, Row
from benchmarks.gpu_synthetic import LLAMA_31_8B, tiny, write_adapter
from benchmarks.gpu_workloads import Loaded, engine, prompt, request, run

_RANK = 16
_NUM_ADAPTERS = 8


def adapters(bench: Bench) -> None:
    """Llama 3.1 8B in bf16: batches that decode, all without an adapter, through one, and through
    eight in turn. Adapters are of rank 16, of all projections."""
    shape = tiny(LLAMA_31_8B) if bench.tiny else LLAMA_31_8B
    path = write_adapter(shape, bench.into / "adapter", rank=_RANK)
    batches = (1, 3) if bench.tiny else (1, 8, 64)
    settings: dict[str, Any] = {
        "max_running_sequences": max(batches),
        "max_batch_tokens": 2048,
        "max_adapters": _NUM_ADAPTERS,
        # Each has memory of its own, though they are alike.
        "adapters": {f"adapter-{index}": str(path) for index in range(_NUM_ADAPTERS)},
    }
    # Steps read few rows of the embedding.
    unread = 2 * LLAMA_31_8B["vocab_size"] * LLAMA_31_8B["hidden_size"]
    with engine(bench, LLAMA_31_8B, unread_bytes=unread, **settings) as loaded:
        for batch in batches:
            plain_s = _decode(bench, loaded, batch, 0)
            for count in sorted({1, min(_NUM_ADAPTERS, batch)}):
                if bench.left_s > 0:
                    seconds = _decode(bench, loaded, batch, count)
                    case = f"a step of {batch}, {count} adapters / none"
                    bench.add(Row(bench.part, case, "MeshServe", seconds / plain_s, "times"))


def _decode(bench: Bench, loaded: Loaded, batch: int, count: int) -> float:
    """Write how fast a batch decodes through so many adapters; return the seconds of a step."""
    context, output = (16, 8) if bench.tiny else (512, 64)
    requests = [
        structs.replace(
            request(index, prompt(context, loaded.vocab_size, index), output),
            adapter=f"adapter-{index % count}" if count else "",
        )
        for index in range(batch)
    ]
    timeline = run(bench, loaded.core, requests)
    seconds = timeline.step_s(batch)
    read = sum(list(loaded.facts.adapters.values())[:count])
    floor = bench.floor_s(loaded.decode_bytes(batch, context + output / 2) + read)
    bench.add(
        Row(
            bench.part,
            f"Llama 3.1 8B bf16, batch {batch}, {count or 'no'} adapters",
            "MeshServe",
            batch / seconds,
            "tokens/s",
            seconds,
            floor,
            values={"ms a step": 1e3 * seconds},
        )
    )
    return seconds
