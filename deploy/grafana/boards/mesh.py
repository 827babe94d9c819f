"""The services as processes that call one another."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard
from panels import (
    BYTES,
    CORES,
    PER_SECOND,
    RATE,
    SECONDS,
    THIRD,
    TOKENS_PER_SECOND,
    Panels,
    Query,
    board,
    graph,
    laid_out,
    number,
    percentiles,
    present,
    rate,
    rows,
)

CHOSEN = 'job=~"$service", instance=~"$replica"'
SERVICES = "gateway|tokenizer|engine|cache|safety"


def mesh() -> dashboard.Dashboard:
    """Replicas, calls of each hop, processors and memory."""
    made = board(
        "mesh",
        "MeshServe: Mesh",
        "The services as processes that call one another.",
        "service",
        "replica",
    )
    for service in SERVICES.split("|"):
        made = made.with_panel(
            number(
                service.capitalize(),
                Query(f'sum(meshserve_healthy{{job="{service}"}}) or vector(0)'),
                "Replicas whose own probe succeeds.",
                limits=(1, 1),
                worse="below",
            )
        )
    made = made.with_panel(
        number(
            "Not reached",
            Query(f'count(up{{job=~"{SERVICES}"}} == 0) or vector(0)'),
            "Replicas that Prometheus knows of and does not reach.",
            limits=(1, 1),
        )
    )
    return laid_out(
        made,
        *_replicas(),
        dashboard.Row("Calls"),
        *_calls(),
        dashboard.Row("HTTP"),
        *_http(),
        dashboard.Row("Processes"),
        *_processes(),
    )


def _replicas() -> Panels:
    return (
        graph(
            "Replicas as callers see them",
            present("meshserve_rpc_client_replicas", CHOSEN, "peer, state", "{{peer}} {{state}}"),
            "By service and state, summed over the callers that are chosen: with two gateways each "
            "is counted twice.",
        ),
        graph(
            "Replicas to call",
            Query(
                "min by (peer, target) "
                f'(meshserve_rpc_client_replicas{{{CHOSEN}, state="serving"}})',
                "{{peer}} {{target}}",
            ),
            "By target, of the caller that knows the fewest that serve. With none, its calls fail.",
        ),
    )


def _calls() -> Panels:
    return (
        graph(
            "Calls answered",
            rate("meshserve_rpc_server_calls_total", CHOSEN, "method"),
            "By method. Calls that travel on a shared stream are counted as if they had their own.",
            unit=PER_SECOND,
        ),
        graph(
            "Duration at the answering side (p95)",
            percentiles("meshserve_rpc_server_duration_seconds", CHOSEN, by="method", at=(0.95,)),
            "By method. A stream lasts as long as what it carries.",
            unit=SECONDS,
        ),
        graph(
            "Calls made",
            rate("meshserve_rpc_client_calls_total", CHOSEN, "job, method", "{{job}} → {{method}}"),
            "By who calls what.",
            unit=PER_SECOND,
        ),
        graph(
            "Duration at the calling side (p95)",
            percentiles("meshserve_rpc_client_duration_seconds", CHOSEN, by="method", at=(0.95,)),
            "What it takes longer than at the answering side is the way, and waiting.",
            unit=SECONDS,
        ),
        graph(
            "Calls that failed",
            rate(
                "meshserve_rpc_server_calls_total",
                f'{CHOSEN}, code!="OK"',
                "job, method, code",
                "{{job}} {{method}} {{code}}",
            ),
            "By gRPC code, callers' mistakes and calls given up included.",
            unit=PER_SECOND,
        ),
        graph(
            "Calls being answered",
            present(
                "meshserve_rpc_server_active_calls", CHOSEN, "job, method", "{{job}} {{method}}"
            ),
            "Standing streams between services among them.",
        ),
    )


def _processes() -> Panels:
    by_process = "job, instance, process"
    legend = "{{job}} {{instance}} {{process}}"
    return (
        graph(
            "Processors",
            rate("meshserve_process_cpu_seconds_total", CHOSEN, by_process, legend),
            "Processors that each process keeps busy. `core` is what computes in an engine.",
            unit=CORES,
            stacked=True,
        ),
        graph(
            "Memory",
            present("meshserve_process_resident_memory_bytes", CHOSEN, by_process, legend),
            "Resident memory.",
            unit=BYTES,
            stacked=True,
        ),
        graph(
            "Threads",
            present("meshserve_process_threads", CHOSEN, by_process, legend),
            "Threads of each process.",
            width=THIRD,
        ),
        graph(
            "Files and sockets",
            present("meshserve_process_open_fds", CHOSEN, by_process, legend),
            "Open in each process.",
            width=THIRD,
        ),
        graph(
            "Age",
            Query(f"time() - meshserve_process_start_time_seconds{{{CHOSEN}}}", legend),
            "Time since each process was started.",
            unit=SECONDS,
            width=THIRD,
        ),
        graph(
            "Text at the tokenizer",
            [
                Query(f"sum(rate(meshserve_tokenizer_{name}_tokens_total[{RATE}]))", name)
                for name in ("encoded", "decoded")
            ],
            "Tokens that texts were turned into, and that were turned into text.",
            unit=TOKENS_PER_SECOND,
            width=THIRD,
        ),
        graph(
            "Completions being decoded",
            present("meshserve_tokenizer_decode_sessions", "", "instance"),
            "Sequences whose tokens a replica of the tokenizer turns into text.",
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Files read again",
            [
                rate(
                    "meshserve_file_reloads_total", CHOSEN, "what, outcome", "{{what}} {{outcome}}"
                ),
                present(
                    "meshserve_files_refused", CHOSEN, "what", "{{what}}: processes that refuse it"
                ),
            ],
            "Keys, passwords and certificates that changed while a service ran: changes a second, "
            "and files that cannot be used.",
            width=THIRD,
        ),
        graph(
            "Certificates expire in",
            Query(
                f"meshserve_certificate_expiry_seconds{{{CHOSEN}}} - time()", "{{job}} {{instance}}"
            ),
            "Of those that are served with TLS.",
            unit=SECONDS,
            width=THIRD,
        ),
        rows(
            "Versions",
            Query(f"meshserve_build_info{{{CHOSEN}}}"),
            "What each replica runs.",
            width=THIRD,
        ),
    )


def _http() -> Panels:
    return (
        graph(
            "Calls by HTTP",
            rate(
                "meshserve_http_server_calls_total",
                CHOSEN,
                "method, route, status",
                "{{method}} {{route}} {{status}}",
            ),
            "By path and status, as the gateways answered them.",
            unit=PER_SECOND,
            width=THIRD,
        ),
        graph(
            "Duration by path (p95)",
            percentiles("meshserve_http_server_duration_seconds", CHOSEN, by="route", at=(0.95,)),
            "An event stream lasts for as long as it is read.",
            unit=SECONDS,
            width=THIRD,
        ),
        graph(
            "Calls being answered by HTTP",
            present("meshserve_http_server_active_calls", CHOSEN, "route"),
            "By path.",
            width=THIRD,
        ),
        graph(
            "Event streams",
            present("meshserve_http_server_event_streams", CHOSEN, "route"),
            "Answers of the playground, and what the console watches.",
            width=THIRD,
        ),
        graph(
            "HTTP connections",
            [
                present("meshserve_http_server_connections", CHOSEN, "instance", "{{instance}}"),
                rate(
                    "meshserve_http_server_refused_connections_total",
                    CHOSEN,
                    "instance",
                    "{{instance}} refused a second",
                ),
            ],
            "Open ones, and those refused beyond `gateway.max_http_connections`.",
            width=THIRD,
        ),
        graph(
            "Who watches",
            present("meshserve_gateway_watchers", CHOSEN, "instance"),
            "Calls of WatchMesh and live views of the console; more than `gateway.max_watchers` "
            "are refused.",
            width=THIRD,
        ),
    )
