"""What the engines compute, and with what."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard
from panels import (
    BYTES,
    CORES,
    COUNT,
    PER_SECOND,
    RATE,
    SECONDS,
    SHARE,
    THIRD,
    TOKENS_PER_SECOND,
    WHOLE,
    Panels,
    Query,
    board,
    graph,
    laid_out,
    percentiles,
    present,
    rate,
    rows,
    share,
)

CHOSEN = 'model=~"$model", instance=~"$engine"'
# One process, or one for each of several models.
CORE = 'process=~"core.*", instance=~"$engine"'


def engine() -> dashboard.Dashboard:
    """Queue, batch, KV cache, speculation, and the core's process."""
    made = board(
        "engine",
        "MeshServe: Engine",
        "What the engines compute, and with what.",
        "model",
        "engine",
    )
    return laid_out(
        made,
        *_load(),
        dashboard.Row("Steps"),
        *_steps(),
        dashboard.Row("KV cache"),
        *_kv_cache(),
        dashboard.Row("Speculation"),
        *_speculation(),
        dashboard.Row("Rules for outputs"),
        *_rules(),
        dashboard.Row("Encoders"),
        *_encoders(),
        dashboard.Row("Models"),
        *_models(),
        dashboard.Row("Core"),
        *_core(),
    )


def _load() -> Panels:
    return (
        graph(
            "Queue",
            present("meshserve_engine_waiting_sequences", CHOSEN, "instance"),
            "Sequences that wait to be computed.",
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Time in the queue",
            percentiles("meshserve_engine_queue_duration_seconds", CHOSEN),
            "From arrival in the engine to the first step that computed the request.",
            unit=SECONDS,
            width=THIRD,
        ),
        graph(
            "Running",
            present("meshserve_engine_running_sequences", CHOSEN, "instance"),
            "Sequences that are computed.",
            width=THIRD,
            stacked=True,
        ),
    )


def _steps() -> Panels:
    return (
        graph(
            "Step duration",
            percentiles("meshserve_engine_step_duration_seconds", CHOSEN),
            "A running stream gets its next tokens with a step.",
            unit=SECONDS,
            width=THIRD,
        ),
        graph(
            "Batch",
            [
                *percentiles("meshserve_engine_batch_sequences", CHOSEN, at=(0.5, 0.95)),
                Query(
                    f"sum(rate(meshserve_engine_batch_sequences_sum{{{CHOSEN}}}[{RATE}])) / "
                    f"sum(rate(meshserve_engine_batch_sequences_count{{{CHOSEN}}}[{RATE}]))",
                    "mean",
                ),
            ],
            "Sequences computed in a step.",
            width=THIRD,
        ),
        graph(
            "Tokens in a step",
            percentiles("meshserve_engine_batch_tokens", CHOSEN, at=(0.5, 0.95)),
            "Prompt tokens, next tokens and verified guesses.",
            width=THIRD,
        ),
        graph(
            "Tokens computed",
            [
                Query(f"sum(rate(meshserve_engine_{name}_total{{{CHOSEN}}}[{RATE}]))", legend)
                for name, legend in (("prompt_tokens", "prompt"), ("generated_tokens", "generated"))
            ],
            "By all engines chosen.",
            unit=TOKENS_PER_SECOND,
            width=THIRD,
        ),
        graph(
            "Steps",
            rate("meshserve_engine_steps_total", CHOSEN, "instance"),
            "Steps a second.",
            unit=PER_SECOND,
            width=THIRD,
        ),
        graph(
            "Prompt lengths",
            percentiles("meshserve_engine_prompt_length_tokens", CHOSEN),
            "Tokens in the prompts of requests.",
            width=THIRD,
        ),
    )


def _kv_cache() -> Panels:
    return (
        graph(
            "KV cache",
            Query(
                f"meshserve_engine_kv_blocks_used{{{CHOSEN}}} / "
                f"meshserve_engine_kv_blocks{{{CHOSEN}}}",
                "{{instance}}",
            ),
            "Share of the blocks that sequences hold.",
            unit=SHARE,
            width=THIRD,
            most=1,
        ),
        graph(
            "Prefix cache",
            share(
                "meshserve_engine_cache_hit_tokens_total",
                "meshserve_engine_cache_queried_tokens_total",
                CHOSEN,
                "instance",
            ),
            "Share of the prompts' tokens that were there and were not computed again.",
            unit=SHARE,
            width=THIRD,
            most=1,
        ),
        graph(
            "Preemptions",
            rate("meshserve_engine_preemptions_total", CHOSEN, "instance"),
            "Sequences put back in the queue because the KV cache was full.",
            unit=PER_SECOND,
            width=THIRD,
        ),
    )


def _rules() -> Panels:
    return (
        graph(
            "Rules",
            [
                Query(f"sum(rate(meshserve_engine_{name}_total{{{CHOSEN}}}[{RATE}]))", legend)
                for name, legend in (
                    ("compiled_constraints", "compiled"),
                    ("found_constraints", "known already"),
                )
            ],
            "JSON Schemas, regular expressions and others that requests bring.",
            unit=PER_SECOND,
            width=THIRD,
        ),
        graph(
            "Time to compile a rule",
            _mean("constraint_compile_seconds", "compiled_constraints"),
            "The request waits for it, and no other.",
            unit=SECONDS,
            width=THIRD,
        ),
        graph(
            "Time to make a mask",
            _mean("mask_seconds", "masks"),
            "Once for each token of an output under a rule.",
            unit=SECONDS,
            width=THIRD,
        ),
    )


def _mean(seconds: str, count: str) -> Query:
    """Seconds that each of the events counted took; nothing while there are none."""
    pace = f"sum by (instance) (rate(meshserve_engine_{count}_total{{{CHOSEN}}}[{RATE}]) > 0)"
    return Query(
        f"sum by (instance) (rate(meshserve_engine_{seconds}_total{{{CHOSEN}}}[{RATE}])) / {pace}",
        "{{instance}}",
    )


def _encoders() -> Panels:
    return (
        graph(
            "Inputs read by encoders",
            rate("meshserve_engine_encoded_inputs_total", CHOSEN, "task"),
            "Texts, or pairs of texts, by what is made of them.",
            unit=PER_SECOND,
            width=THIRD,
        ),
        graph(
            "Inputs of answered requests",
            rate("meshserve_gateway_inputs_total", 'model=~"$model"', "operation"),
            "What was read and what the response cache held together.",
            unit=PER_SECOND,
            width=THIRD,
        ),
        graph(
            "Vectors from the response cache",
            share(
                "meshserve_gateway_cached_inputs_total",
                "meshserve_gateway_inputs_total",
                'model=~"$model"',
                "model",
                whole_matchers='model=~"$model", operation="embeddings"',
            ),
            "Share of the texts whose vectors were known.",
            unit=SHARE,
            width=THIRD,
            most=1,
        ),
    )


def _speculation() -> Panels:
    return (
        graph(
            "Guesses that were right",
            share(
                "meshserve_engine_accepted_draft_tokens_total",
                "meshserve_engine_drafted_tokens_total",
                CHOSEN,
                "instance",
            ),
            "Share of the tokens guessed ahead that the model agreed with. Nothing is guessed "
            "while it does not pay.",
            unit=SHARE,
            most=1,
        ),
        graph(
            "Guesses",
            [
                Query(f"sum(rate(meshserve_engine_{name}_total{{{CHOSEN}}}[{RATE}]))", legend)
                for name, legend in (
                    ("drafted_tokens", "verified"),
                    ("accepted_draft_tokens", "right"),
                )
            ],
            "Tokens guessed ahead.",
            unit=TOKENS_PER_SECOND,
        ),
    )


def _models() -> Panels:
    return (
        graph(
            "States in the engines",
            Query(
                f"count by (model, state) (meshserve_engine_model_state{{{CHOSEN}}} == 1)",
                "{{model}} {{state}}",
            ),
            "Engines by the state that each of their models is in.",
            width=THIRD,
        ),
        graph(
            "States as gateways see them",
            Query(
                'max by (model, state) (meshserve_gateway_model_engines{model=~"$model"}) > 0',
                "{{model}} {{state}}",
            ),
            "Engines that may run a model, by what it is doing there.",
            width=THIRD,
        ),
        graph(
            "Time to load",
            Query(
                f"sum by (model) (meshserve_engine_load_duration_seconds_sum{{{CHOSEN}}}) / "
                f"sum by (model) (meshserve_engine_load_duration_seconds_count{{{CHOSEN}}})",
                "{{model}}",
            ),
            "How long a model took on average to come into memory, since the engines started.",
            unit=SECONDS,
            width=THIRD,
        ),
        graph(
            "Adapters",
            Query('max by (model) (meshserve_gateway_adapters{model=~"$model"})', "{{model}}"),
            "Adapters that requests can name.",
            width=THIRD,
        ),
        graph(
            "Calls that load and unload",
            rate(
                "meshserve_gateway_hosting_calls_total",
                "",
                "action, reason",
                "{{action}} {{reason}}",
            ),
            "Calls that have engines load, unload, sleep or wake, with the reason of what fails.",
            unit=PER_SECOND,
            width=2 * THIRD,
        ),
    )


def _core() -> Panels:
    return (
        graph(
            "Processors",
            rate("meshserve_process_cpu_seconds_total", CORE, "instance"),
            "Processors that the computing process keeps busy.",
            unit=CORES,
            width=THIRD,
        ),
        graph(
            "Memory",
            present("meshserve_process_resident_memory_bytes", CORE, "instance"),
            "Resident memory of the computing process: weights, KV cache and what a step needs.",
            unit=BYTES,
            width=THIRD,
        ),
        graph(
            "Restarts and failed sequences",
            [
                *(
                    Query(
                        f"increase(meshserve_engine_{name}_total{{{CHOSEN}}}[{RATE}])",
                        f"{{{{instance}}}} {name.replace('_', ' ')}",
                    )
                    for name in ("core_restarts", "failed_sequences")
                ),
            ],
            "Restarts of the core, and sequences whose computation failed alone.",
            width=THIRD,
        ),
        graph(
            "GPU",
            Query(f"meshserve_engine_gpu_utilization{{{CHOSEN}}}", "{{instance}} {{device}}"),
            "Share of the time in which the GPU ran a kernel. Nothing on a CPU.",
            unit=SHARE,
            width=THIRD,
            most=1,
        ),
        graph(
            "GPU memory",
            Query(
                f"meshserve_engine_gpu_memory_used_bytes{{{CHOSEN}}} / "
                f"meshserve_engine_gpu_memory_bytes{{{CHOSEN}}}",
                "{{instance}} {{device}}",
            ),
            "Share of the GPU's memory in use, by any process. Nothing on a CPU.",
            unit=SHARE,
            width=THIRD,
            most=1,
        ),
        graph(
            "Waiting for an engine to start",
            present("meshserve_gateway_requests_awaiting_engine", 'model=~"$model"', "model"),
            "Requests to models whose engines run only while they are asked for.",
            width=THIRD,
        ),
        rows(
            "Engines",
            Query(f"meshserve_engine_info{{{CHOSEN}}}"),
            "What each engine runs, and on what.",
            unit=COUNT,
            width=WHOLE,
        ),
    )
