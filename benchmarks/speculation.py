"""What guessing ahead gives where text suits it, and costs where it does not, at concurrency 1.

    python benchmarks/speculation.py --model smollm2-135m

Each prompt is answered by two cores in turns, one that drafts and one that does not, so that
whatever else the machine does hits both. The two answers must be equal, token by token. Prefill is
left out of the figures: they are output tokens per second from the first token on.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.prompts import PromptSource, english_token_ids
from services.engine.core.engine import EngineCore
from services.engine.core.messages import Sampling, SequenceRequest, Stopping
from services.engine.core.settings import CoreSettings
from services.engine.core.startup import build_engine
from services.runtime.modelfiles import locate
from services.tokenizer.model_tokenizer import load_model_tokenizer

_AGAIN = "\n\nThe same text once more, word for word:\n\n"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One kind of text. The speed-up is the median over pairs of runs, prompt by prompt."""

    text: str
    temperature: float
    plain_tokens_per_s: float
    drafting_tokens_per_s: float
    speed_up: float
    drafted_tokens: int
    accepted_tokens: int


def kinds_of_text(model: str) -> dict[str, Callable[[random.Random], list[int]]]:
    """Prompts by kind: one whose answer is in the prompt, one of prose, one of nothing at all."""
    text = english_token_ids(model)
    source = PromptSource(text, seed=1)
    again = list(load_model_tokenizer(locate(model)).encode(_AGAIN).token_ids)

    def quoted(_: random.Random) -> list[int]:
        passage = list(source.take(200))
        return passage + again + passage[:16]

    return {
        "quotes its prompt": quoted,
        "continues prose": lambda _: list(source.take(128)),
        "continues noise": lambda rng: rng.choices(text, k=128),
    }


def answer(engine: EngineCore, request: SequenceRequest) -> tuple[list[int], float]:
    """The tokens of one answer, and how many came per second after the first step's."""
    engine.add([request])
    token_ids: list[int] = []
    started = 0.0
    at_start = 0
    while engine.has_work:
        for delta in engine.step().deltas:
            token_ids += delta.token_ids
        if token_ids and not at_start:
            started, at_start = time.perf_counter(), len(token_ids)
    return token_ids, (len(token_ids) - at_start) / (time.perf_counter() - started)


def compare(
    engines: tuple[EngineCore, EngineCore],
    text: str,
    prompts: list[list[int]],
    *,
    output_tokens: int,
    temperature: float,
) -> Comparison:
    """Answer each prompt without and with drafts.

    Raises:
        RuntimeError: an answer is not the same with drafts as without.
    """
    speeds: tuple[list[float], list[float]] = ([], [])
    before = engines[1].load()
    for number, prompt in enumerate(prompts):
        request = SequenceRequest(
            number,
            prompt,
            Sampling(temperature=temperature, seed=number),
            Stopping(max_tokens=output_tokens, ignore_eos=True),
        )
        answers = []
        for engine, measured in zip(engines, speeds, strict=True):
            token_ids, tokens_per_s = answer(engine, request)
            answers.append(token_ids)
            measured.append(tokens_per_s)
        if answers[0] != answers[1]:
            raise RuntimeError(f"prompt {number} of {text!r} is answered differently with drafts")
    after = engines[1].load()
    return Comparison(
        text=text,
        temperature=temperature,
        plain_tokens_per_s=statistics.median(speeds[0]),
        drafting_tokens_per_s=statistics.median(speeds[1]),
        speed_up=statistics.median(b / a for a, b in zip(*speeds, strict=True)),
        drafted_tokens=after.drafted_tokens - before.drafted_tokens,
        accepted_tokens=after.accepted_draft_tokens - before.accepted_draft_tokens,
    )


def main() -> int:
    """Measure and print; the exit code is 0 unless something failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="name, path or hub id")
    parser.add_argument("--draft-model", help="draft with this model rather than by look-up")
    parser.add_argument("--weights", default="auto", choices=("auto", "bfloat16", "int8", "int4"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompts", type=int, default=8, help="of each kind")
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)

    def build(method: str) -> EngineCore:
        draft_model = arguments.draft_model
        settings = CoreSettings(
            model_path=str(locate(arguments.model)),
            weights=arguments.weights,
            threads=arguments.threads,
            kv_cache_memory_bytes=1 << 28,
            speculation=method,  # type: ignore[arg-type]
            draft_model_path=None if draft_model is None else str(locate(draft_model)),
        )
        return build_engine(settings)[0]

    engines = build("off"), build("auto")
    kinds = kinds_of_text(arguments.model)
    rng = random.Random(1)
    results = []
    print("text                temperature   tokens/s   drafting   speed-up   accepted of drafted")
    for text, make_prompt in kinds.items():
        for temperature in arguments.temperatures:
            prompts = [make_prompt(rng) for _ in range(arguments.prompts)]
            result = compare(
                engines,
                text,
                prompts,
                output_tokens=arguments.output_tokens,
                temperature=temperature,
            )
            results.append(result)
            print(
                f"{text:19s} {temperature:11.1f} {result.plain_tokens_per_s:10.1f} "
                f"{result.drafting_tokens_per_s:10.1f} {result.speed_up:9.2f}x "
                f"{result.accepted_tokens:10d} of {result.drafted_tokens}",
                flush=True,
            )
    if arguments.json is not None:
        report = {
            "benchmark": "speculation",
            "model": arguments.model,
            "comparisons": [asdict(result) for result in results],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
