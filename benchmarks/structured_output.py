"""What it costs to hold completions to a JSON Schema: tokens per second with and without.

`python -m benchmarks.structured_output [MODEL]` drives the engine core, without the mesh around it
and without speculation, whose luck would differ between the two texts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from services.engine.core.engine import EngineCore
from services.engine.core.messages import Constraint, Sampling, SequenceRequest, Stopping
from services.engine.core.settings import CoreSettings
from services.engine.core.startup import build_engine
from services.runtime.modelfiles.store import locate

_TOKENS = 128
_PROMPT_TOKENS = 64
_BATCHES = (1, 16)
_ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["name", "age", "tags", "note"],
    "additionalProperties": False,
}
# Longer than the answers, so that none of them ends early.
_SCHEMA = json.dumps({"type": "array", "items": _ITEM, "minItems": 100})


def main() -> int:
    """Print one line for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    core, facts = build_engine(
        CoreSettings(
            model_path=str(locate(arguments.model, None)),
            speculation="off",
            kv_cache_memory_bytes=1 << 28,
        )
    )
    assert isinstance(core, EngineCore)
    rules = (None, Constraint("json_schema", _SCHEMA))
    _tokens_per_s(core, 1, facts.vocab_size, rules[1])  # compiles it
    before = core.load()
    print(f"first use of a rule: {before.constraint_compile_us / 1000:.0f} ms beside the steps")
    for batch in _BATCHES:
        rates: dict[Constraint | None, list[float]] = {rule: [] for rule in rules}
        for _ in range(arguments.rounds):
            for rule in rules:  # in turns
                rates[rule].append(_tokens_per_s(core, batch, facts.vocab_size, rule))
        plain, ruled = (statistics.median(rates[rule]) for rule in rules)
        after = core.load()
        mask_us = (after.mask_us - before.mask_us) / (after.masks - before.masks)
        before = after
        print(
            f"batch {batch:2}: {plain:6.0f} tokens/s without a rule, {ruled:6.0f} under one "
            f"({ruled / plain - 1:+.1%}); a mask takes {mask_us:.0f} us"
        )
    return 0


def _tokens_per_s(core: EngineCore, batch: int, vocab_size: int, rule: Constraint | None) -> float:
    prompt = [5 + 7 * position % (vocab_size - 5) for position in range(_PROMPT_TOKENS)]
    core.add(
        [
            SequenceRequest(
                number,
                [*prompt, number],
                Sampling(temperature=1.0, seed=number),
                Stopping(max_tokens=_TOKENS, ignore_eos=True),
                constraint=rule,
            )
            for number in range(batch)
        ]
    )
    tokens = 0
    started_s = time.perf_counter()
    while core.has_work:
        brought = sum(len(delta.token_ids) for delta in core.step().deltas)
        if tokens == 0 and brought:
            started_s = time.perf_counter()  # decoding is measured, not the prompt
        tokens += brought
    return (tokens - batch) / (time.perf_counter() - started_s)


if __name__ == "__main__":
    raise SystemExit(main())
