"""The whole engine on a card, without services around it: from token ids to token ids."""

from __future__ import annotations

import itertools
import random
from typing import Any

import msgspec

from benchmarks.gpu_bench import Bench, Row
from benchmarks.gpu_synthetic import LLAMA_31_8B, QWEN3_600M
from benchmarks.gpu_transformers import run_transformers
from benchmarks.gpu_workloads import Loaded, Timeline, engine, prompt, request, run
from services.engine.core.errors import StartupError

# Of the 8B model, whose head is not its embedding: decodes read a few rows of it. Where matrices
# are of fewer bits, it is of eight.
_UNREAD_ELEMENTS = LLAMA_31_8B["vocab_size"] * LLAMA_31_8B["hidden_size"]
FORMATS = ("auto", "int4", "int8", "fp8", "w8a8")


def decode(bench: Bench) -> None:
    """Llama 3.1 8B in bf16, batches that all decode: held to reading weights and cache once."""
    batches = (1, 3) if bench.tiny else (1, 8, 64, 256)
    with _llama(bench, max_running_sequences=max(batches), max_batch_tokens=2048) as loaded:
        for batch in batches:
            if bench.left_s > 0:
                _decode(bench, loaded, "Llama 3.1 8B bf16", batch)


def saturation(bench: Bench) -> None:
    """Llama 3.1 8B in bf16 with more sequences than run at a time."""
    running, length, output = (4, 8, 6) if bench.tiny else (512, 128, 256)
    with _llama(bench, max_running_sequences=running, max_batch_tokens=4096) as loaded:
        requests = [
            request(index, prompt(length, loaded.vocab_size, index), output)
            for index in range(2 * running)
        ]
        timeline = run(bench, loaded.core, requests)
        case = f"{len(requests)} sequences of {length} + {output} tokens, {running} at a time"
        step_s = timeline.step_s(running)
        values = {"tokens/s while all decode": running / step_s, **_load(loaded)}
        _add_rate(bench, "Llama 3.1 8B bf16, " + case, "MeshServe", timeline, values)


def workload(bench: Bench) -> None:
    """Qwen3 0.6B, 256 sequences, prompts and outputs of 100 to 1,024 tokens, beside transformers.

    Lengths are uniform, with seed 0, and end-of-sequence tokens are passed over.
    """
    numbers = random.Random(0)
    count, least, most = (5, 4, 12) if bench.tiny else (256, 100, 1024)
    lengths = [(numbers.randint(least, most), numbers.randint(least, most)) for _ in range(count)]
    case = f"Qwen3 0.6B bf16, {count} sequences of {least}-{most} + {least}-{most} tokens"
    settings = {"max_running_sequences": count, "max_batch_tokens": 4096}
    with engine(bench, QWEN3_600M, **settings) as loaded:
        prompts = [
            prompt(length, loaded.vocab_size, index) for index, (length, _) in enumerate(lengths)
        ]
        requests = [
            request(index, tokens, output, temperature=0.6, seed=index)
            for index, (tokens, (_, output)) in enumerate(zip(prompts, lengths, strict=True))
        ]
        ours = run(bench, loaded.core, requests)
        _add_rate(bench, case, "MeshServe", ours, _load(loaded))
    wanted = [output for _, output in lengths]
    theirs = run_transformers(bench, QWEN3_600M, prompts, wanted)
    rate = sum(wanted) / theirs.seconds
    bench.add(
        Row(bench.part, case, f"transformers {theirs.version}", rate, "tokens/s", theirs.seconds)
    )
    bench.add(Row(bench.part, case, "MeshServe / transformers", ours.tokens_per_s / rate, "times"))


def quantised(bench: Bench) -> None:
    """Llama 3.1 8B in fewer bits: batch 1, beside bf16 in the same run."""
    found: dict[str, float] = {}
    for form in FORMATS:
        if bench.left_s <= 0:
            return
        name = "bf16" if form == "auto" else form
        try:
            with _llama(bench, weights=form, max_running_sequences=8) as loaded:
                found[name] = _decode(bench, loaded, f"Llama 3.1 8B {name}", 1)
        except (StartupError, msgspec.ValidationError, RuntimeError) as error:
            case = f"Llama 3.1 8B {name}, batch 1"
            bench.add(Row(bench.part, case, "MeshServe", None, "tokens/s", note=str(error)[:300]))
            continue
        if name != "bf16" and "bf16" in found:
            ratio = found["bf16"] / found[name]
            bench.add(Row(bench.part, f"{name} / bf16, batch 1", "MeshServe", ratio, "times"))


def kv_formats(bench: Bench) -> None:
    """Long contexts, with keys and values of 16 and of eight bits."""
    batch, context, output = (2, 64, 6) if bench.tiny else (8, 16384, 32)
    for form in ("auto", "fp8", "int8"):
        if bench.left_s <= 0:
            return
        name = "bf16" if form == "auto" else form
        case = f"Llama 3.1 8B, {name} KV, batch {batch}, context {context}"
        try:
            settings = {"kv_cache_format": form, "max_batch_tokens": 8192}
            with _llama(bench, max_running_sequences=batch, **settings) as loaded:
                _decode(bench, loaded, f"Llama 3.1 8B, {name} KV", batch, context, output)
        except (StartupError, msgspec.ValidationError, RuntimeError) as error:
            bench.add(Row(bench.part, case, "MeshServe", None, "tokens/s", note=str(error)[:300]))


def prefill(bench: Bench) -> None:
    """One prompt at a time: judged by the operations of its matrix products and its attention."""
    config = LLAMA_31_8B
    with _llama(bench, max_running_sequences=2, max_batch_tokens=8192) as loaded:
        for length in (48,) if bench.tiny else (2048, 8192):
            seconds = min(
                run(
                    bench, loaded.core, [request(0, prompt(length, loaded.vocab_size, seed), 1)]
                ).seconds
                for seed in range(3)
            )
            heads = config["num_attention_heads"] * config["head_dim"] * config["num_hidden_layers"]
            # The head computes one row, whose operations are next to nothing.
            head = config["vocab_size"] * config["hidden_size"]
            layers = loaded.weight_bytes / 2 - head
            flops = 2.0 * layers * length + 2.0 * heads * length * length
            bench.add(
                Row(
                    bench.part,
                    f"Llama 3.1 8B bf16, a prompt of {length}",
                    "MeshServe",
                    length / seconds,
                    "tokens/s",
                    seconds,
                    bench.floor_s(loaded.weight_bytes, flops),
                    values={"TFLOP/s": flops / seconds / 1e12},
                )
            )


def first_tokens(bench: Bench) -> None:
    """A long prompt that joins others that decode, by how much of it a step may compute."""
    decoding, length, output = (3, 40, 12) if bench.tiny else (64, 8192, 96)
    for chunk in (16, 64) if bench.tiny else (512, 2048, 8192):
        if bench.left_s <= 0:
            return
        settings = {"max_running_sequences": decoding + 1, "max_batch_tokens": chunk}
        with _llama(bench, **settings) as loaded:
            others = [
                request(index, prompt(16, loaded.vocab_size, index), output)
                for index in range(decoding)
            ]
            joins = request(decoding, prompt(length, loaded.vocab_size, decoding), 4)
            timeline = run(bench, loaded.core, others, [joins], after_steps=4)
            ids = range(decoding)
            waited = timeline.first_token_s(decoding) - timeline.joined_s
            bench.add(
                Row(
                    bench.part,
                    f"Llama 3.1 8B bf16, a prompt of {length} beside {decoding} decodes, "
                    f"{chunk} tokens a step",
                    "MeshServe",
                    1e3 * waited,
                    "ms to the first token",
                    waited,
                    values={
                        "longest gap of the others, ms": 1e3 * timeline.longest_gap_s(ids),
                        "median step before it, ms": 1e3 * timeline.step_s(decoding, skip=0),
                    },
                )
            )


def speculation(bench: Bench) -> None:
    """Text that repeats itself and text that does not, with and without drafts by prompt look-up:
    of the latter, drafts are to take nothing away."""
    length, output = (24, 16) if bench.tiny else (512, 256)
    for kind in ("off", "ngram"):
        if bench.left_s <= 0:
            return
        with _llama(bench, max_running_sequences=8, speculation=kind) as loaded:
            phrase = prompt(16, loaded.vocab_size, 7)
            repeated = (phrase * (length // 16 + 1))[:length]
            for batch, temperature in itertools.product((1, 8), (0.0, 1.0)):
                requests = [
                    request(
                        index,
                        prompt(length, loaded.vocab_size, index) if temperature else repeated,
                        output,
                        temperature=temperature,
                        seed=index,
                    )
                    for index in range(batch)
                ]
                before = loaded.core.load()
                timeline = run(bench, loaded.core, requests)
                load = loaded.core.load()
                drafted = load.drafted_tokens - before.drafted_tokens
                accepted = load.accepted_draft_tokens - before.accepted_draft_tokens
                values = {"drafted": float(drafted), "accepted": float(accepted)}
                text = "text without a pattern" if temperature else "text that repeats itself"
                case = f"Llama 3.1 8B bf16, batch {batch}, {text}, drafts {kind}"
                _add_rate(bench, case, "MeshServe", timeline, values)


def _llama(bench: Bench, **settings: Any) -> Any:
    element_bytes = 2 if settings.get("weights", "auto") == "auto" else 1
    unread = element_bytes * _UNREAD_ELEMENTS
    return engine(bench, LLAMA_31_8B, unread_bytes=unread, **settings)


def _decode(
    bench: Bench, loaded: Loaded, what: str, batch: int, context: int = 512, output: int = 64
) -> float:
    """Write how fast a batch decodes; return the seconds of a step."""
    if bench.tiny:
        context, output = min(context, 64), min(output, 8)
    requests = [
        request(index, prompt(context, loaded.vocab_size, index), output) for index in range(batch)
    ]
    timeline = run(bench, loaded.core, requests)
    seconds = timeline.step_s(batch)
    floor = bench.floor_s(loaded.decode_bytes(batch, context + output / 2))
    bench.add(
        Row(
            bench.part,
            f"{what}, batch {batch}, context {context}",
            "MeshServe",
            batch / seconds,
            "tokens/s",
            seconds,
            floor,
            values={"ms a step": 1e3 * seconds, "s for all": timeline.seconds},
        )
    )
    return seconds


def _add_rate(
    bench: Bench, case: str, by: str, timeline: Timeline, values: dict[str, float]
) -> None:
    bench.add(
        Row(
            bench.part,
            case,
            by,
            timeline.tokens_per_s,
            "tokens/s",
            timeline.seconds,
            values={"tokens": float(timeline.num_tokens)} | values,
        )
    )


def _load(loaded: Loaded) -> dict[str, float]:
    load = loaded.core.load()
    cache = loaded.facts.kv_cache_memory_bytes / 2**30
    return {"preemptions": float(load.preemptions), "KV cache, GiB": cache}
